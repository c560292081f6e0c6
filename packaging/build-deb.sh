#!/bin/bash
# Builds the Debian package from this source tree, for this machine's architecture and its python3.
#
# usage: packaging/build-deb.sh [DIRECTORY]     (dist)
#
# Needs dpkg-dev, and what packaging/debian/control names; pip asks the package index for the libraries that
# go into the package. Works in a copy: the tree stays as it is. Prints the package's path.

set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
target=${1:-$source/dist}
command -v dpkg-buildpackage >/dev/null || {
    echo "build-deb: dpkg-buildpackage is not here: apt-get install dpkg-dev" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/fasttun" "$target"
tar -C "$source" -c --exclude-vcs --exclude=./.venv --exclude=./build --exclude=./dist --exclude='*.so' \
    --exclude=__pycache__ --exclude='*.egg-info' --exclude='./.*_cache' --exclude=./.hypothesis . |
    tar -C "$work/fasttun" -x
cp -r "$work/fasttun/packaging/debian" "$work/fasttun/debian"
cd "$work/fasttun"
dpkg-buildpackage -b -us -uc >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    exit 1
}
cp "$work"/*.deb "$target/"
(cd "$work" && for package in *.deb; do echo "$target/$package"; done)
