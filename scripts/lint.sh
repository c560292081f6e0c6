#!/bin/bash
# All linters, each to its end, configured in pyproject.toml; status 1 when one finds something.
# Changes nothing, and expects scripts/bootstrap.sh to have prepared .venv.

set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"   # cython-lint starts pycodestyle by name
status=0

check() {
    echo "lint: $1"
    "${@:2}" || status=1
}

stubbed=()
for stub in fasttun/*.pyi; do
    [ -e "$stub" ] && stubbed+=("fasttun.$(basename "$stub" .pyi)")
done

check ruff ruff check --quiet --output-format concise .
check mypy mypy
check cython-lint cython-lint fasttun
if [ ${#stubbed[@]} -gt 0 ]; then
    check stubtest .venv/bin/python -m mypy.stubtest --mypy-config-file pyproject.toml --ignore-disjoint-bases \
        --allowlist scripts/stubtest-allowlist.txt --ignore-unused-allowlist "${stubbed[@]}"
fi
exit $status
