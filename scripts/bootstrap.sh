#!/bin/bash
# Makes a fresh clone ready: system packages, the virtual environment .venv, the built extension.
# The Makefile calls it; each step that has nothing to do costs milliseconds and says nothing.
#
# usage: scripts/bootstrap.sh build|demo|test|bench
#   build   compiler, headers, .venv with fasttun in editable form
#   demo    build, and what `fasttun demo` needs
#   test    build, and what the tests and the linters need
#   bench   test, and the tunnels to compare with (bench/install-peers.sh; what cannot be had is left out)
# As root it installs what is lacking with apt-get; else it names the packages and ends with status 1.
# FASTTUN_PYTHON: the interpreter for .venv (default: the first usable python3 of 3.10 or newer).

set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"
export PIP_DISABLE_PIP_VERSION_CHECK=1

level=${1:?usage: scripts/bootstrap.sh build|demo|test|bench}
venv=.venv
say() { echo "bootstrap: $*" >&2; }

# ---------------------------------------------------------------- system packages

packages=()   # lacking

need_program() { command -v "$1" >/dev/null || packages+=("$2"); }

# Debian's python3 comes without ensurepip (python3-venv) and without headers (python3-dev); others have both.
python_ok='import sys; sys.exit(sys.version_info < (3, 10))'
python_venv='import ensurepip, venv'
python_headers='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'

find_python() {
    local candidate
    for candidate in ${FASTTUN_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3}; do
        if "$candidate" -c "$python_ok" 2>/dev/null; then
            # A shim (pyenv's) answers differently in other directories: keep the real path.
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

compiles() {
    printf '#include <stdlib.h>\n#include <linux/if_tun.h>\n' | cc -fsyntax-only -x c - 2>/dev/null
}

compiles_openssl() {
    printf '#include <openssl/opensslv.h>\n#if OPENSSL_VERSION_MAJOR < 3\n#error old\n#endif\n' |
        cc -fsyntax-only -x c - 2>/dev/null
}

compiles_ipsec_mb() { echo '#include <intel-ipsec-mb.h>' | cc -fsyntax-only -x c - 2>/dev/null; }

venv_usable() { [ -x $venv/bin/python ] && $venv/bin/python -c "$python_ok" 2>/dev/null; }

lacking() {
    packages=()
    python=$(find_python)
    if [ -z "$python" ]; then
        packages+=(python3 python3-venv python3-dev)
    else
        # Debian names them after the version when the interpreter is not its default one.
        local debian=python3
        case $(readlink -f "$python") in
            /usr/bin/python3.*) [ "$(readlink -f /usr/bin/python3)" = "$(readlink -f "$python")" ] ||
                debian=$(basename "$(readlink -f "$python")") ;;
        esac
        venv_usable || "$python" -c "$python_venv" 2>/dev/null || packages+=("$debian-venv")
        if venv_usable; then python=$venv/bin/python; fi
        "$python" -c "$python_headers" || packages+=("$debian-dev")
    fi
    compiles || packages+=(gcc libc6-dev linux-libc-dev)
    compiles_openssl || packages+=(libssl-dev)
    [ "$level" = build ] && return
    need_program ip iproute2
    need_program ping iputils-ping
    [ "$level" = demo ] && return
    need_program git git
    need_program modprobe kmod
    need_program iperf3 iperf3
    need_program socat socat
    need_program ethtool ethtool
    need_program iptables iptables
    need_program nft nftables
    need_program wireguard-go wireguard-go
    need_program wg wireguard-tools
    need_program tshark tshark
    need_program tcpdump tcpdump
    need_program chromium chromium
    need_program zsh zsh
    need_program fish fish
    need_program mandoc mandoc
    need_program strace strace
    need_program systemd-analyze systemd
    need_program dpkg-deb dpkg
    need_program dpkg-buildpackage dpkg-dev
    need_program man man-db
    need_program setpriv util-linux
    need_program sysctl procps
    need_program script bsdutils
    # The Debian package is built for Debian's own interpreter.
    if ! { /usr/bin/python3 -c "$python_venv" && /usr/bin/python3 -c "$python_headers"; } 2>/dev/null; then
        packages+=(python3 python3-venv python3-dev)
    fi
}

install_packages() {
    lacking
    [ ${#packages[@]} -eq 0 ] && return
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "lacking: ${packages[*]} (Debian's names)"
        say "install them, then run this again:  sudo apt-get install ${packages[*]}"
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    say "apt-get update"
    apt-get -qq update || say "apt-get update failed; trying with the lists there are"
    say "apt-get install ${packages[*]}"
    apt-get -qq -y --no-install-recommends install "${packages[@]}" >/dev/null
    lacking
    if [ ${#packages[@]} -gt 0 ]; then
        say "still lacking after the install: ${packages[*]}"
        exit 1
    fi
}

# Encryption is twice as fast with it (fasttun/_native/aead.h), and works without: no failure, no update for it.
install_ipsec_mb() {
    [ "$(uname -m)" = x86_64 ] && [ "$(id -u)" -eq 0 ] && ! compiles_ipsec_mb || return 0
    apt-cache show libipsec-mb-dev >/dev/null 2>&1 || return 0
    say "apt-get install libipsec-mb-dev"
    if DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install libipsec-mb-dev >/dev/null; then
        rm -f $venv/.fasttun-built   # the extension sees it only when it is built
    else
        say "going on without"
    fi
}

# A container may lack the device node although its kernel has the driver.
make_tun_node() {
    [ "$level" = build ] || [ -c /dev/net/tun ] || [ "$(id -u)" -ne 0 ] && return
    modprobe tun 2>/dev/null || true
    [ -c /dev/net/tun ] && return
    say "mknod /dev/net/tun"
    mkdir -p /dev/net && mknod -m 0666 /dev/net/tun c 10 200 || say "no /dev/net/tun can be made here"
}

# ---------------------------------------------------------------- virtual environment and build

# Sources of the extension newer than the last build, or none built for this interpreter.
stale_build() {
    [ -e $venv/.fasttun-built ] || return 0
    [ -n "$(find setup.py pyproject.toml fasttun \
        \( -name '*.pyx' -o -name '*.pxi' -o -name '*.pxd' -o -name '*.h' -o -name setup.py -o -name pyproject.toml \) \
        -newer $venv/.fasttun-built -print -quit)" ] && return 0
    ! compgen -G "fasttun/_core.*.so" >/dev/null
}

make_venv() {
    venv_usable && return
    say "making $venv with $python ($("$python" -V))"
    "$python" -m venv --clear $venv
}

install_fasttun() {
    local extra stamp
    case $level in
        build) extra= ;;
        demo) extra=demo ;;
        test | bench) extra=test ;;
    esac
    stamp=$venv/.fasttun-installed${extra:+-$extra}
    if [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt setup.py ]; then
        stale_build || return 0
        say "building the extension"
        touch $venv/.fasttun-starts
        $venv/bin/python setup.py -q build_ext --inplace
    else
        say "installing fasttun${extra:+[$extra]} and what it needs into $venv, building the extension (a minute or two)"
        touch $venv/.fasttun-starts
        $venv/bin/python -m pip install -qq "setuptools>=77" "cython>=3.1"
        # setuptools warns of every editable install.
        PYTHONWARNINGS=ignore $venv/bin/python -m pip install -qq --no-build-isolation --editable ".${extra:+[$extra]}"
        touch -r $venv/.fasttun-starts "$stamp"
        # What the larger set of extras has installed, the smaller ones have too.
        if [ "$extra" = test ]; then touch -r "$stamp" $venv/.fasttun-installed-demo; fi
        touch -r "$stamp" $venv/.fasttun-installed
    fi
    mv $venv/.fasttun-starts $venv/.fasttun-built
}

case $level in
    build | demo | test | bench) ;;
    *) say "no such level: $level"; exit 2 ;;
esac
install_packages
install_ipsec_mb
if [ "$level" = bench ]; then bench/install-peers.sh || say "going on with the tunnels there are"; fi
make_tun_node
make_venv
exec 9>$venv/.fasttun-lock
flock 9   # two makes at once build one after the other
install_fasttun
