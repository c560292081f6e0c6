#!/bin/sh
# Builds the extensions with AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize, and runs the
# tests that feed them hostile input there. The ordinary build is not touched.
#
#   scripts/sanitize.sh [pytest arguments]      default: $default below
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
case $python in /*) ;; */*) python=$PWD/$python ;; esac
compiler=${CC:-gcc}
target=$PWD/build/sanitize

echo "sanitize: building into build/sanitize"
FASTTUN_SANITIZE=1 CC=$compiler "$python" setup.py -q build \
    --build-base "$target/base" --build-lib "$target/lib"

# The interpreter itself is not instrumented, so the run-time libraries must be loaded before it.
libraries=
for name in libasan.so libubsan.so; do
    path=$("$compiler" -print-file-name=$name)
    case $path in /*) libraries="$libraries $path" ;; esac
done
[ -n "$libraries" ] || { echo "sanitize: $compiler has no libasan (Debian: apt-get install libasan8)" >&2; exit 1; }

# Wiped keys stay to be seen in AddressSanitizer's quarantine.
default="tests/property tests/fuzz tests/wireguard/test_engine.py"
[ $# -gt 0 ] || set -- $default --deselect \
    tests/wireguard/test_engine.py::test_keys_are_wiped_with_their_session_their_peer_and_the_table
echo "sanitize: running $*"
# Leaks are Python's own at exit. A crash is to be seen as such: no pytest-xdist, no capture of the report.
exec env LD_PRELOAD="$libraries" PYTHONPATH="$target/lib" PYTHONMALLOC=malloc FASTTUN_SANITIZED=1 \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    "$python" -c '
import sys
sys.path.remove("")  # the checkout, where the ordinary build lies
import fasttun._testing, pytest
if not fasttun._testing.__file__.startswith(sys.argv[1]):
    sys.exit("sanitize: imported " + fasttun._testing.__file__ + ", which is not the sanitized build")
sys.exit(pytest.main(sys.argv[2:]))' "$target/lib" -p no:cacheprovider -q --capture=sys "$@"
