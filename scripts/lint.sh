#!/bin/bash
# All linters, each to its end, configured in pyproject.toml; status 1 when one finds something.
# Changes nothing, and expects scripts/bootstrap.sh to have prepared .venv.

set -uo pipefail
cd "$(dirname "$0")/.."
status=0

check() {
    echo "lint: $1"
    "${@:2}" || status=1
}

stubbed=()
for stub in fasttun/*.pyi; do
    [ -e "$stub" ] && stubbed+=("fasttun.$(basename "$stub" .pyi)")
done

check ruff .venv/bin/ruff check --quiet .
check mypy .venv/bin/mypy
check cython-lint .venv/bin/cython-lint fasttun
if [ ${#stubbed[@]} -gt 0 ]; then
    check stubtest .venv/bin/stubtest --mypy-config-file pyproject.toml "${stubbed[@]}"
fi
exit $status
