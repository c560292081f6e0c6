#!/bin/sh
# Installs what the end-to-end benchmark runs beside fasttun, on Debian and Ubuntu, as root. May be run again.
# A lametun or a newer wireguard-go (as wireguard-go-2025) joins when it is on PATH; neither is packaged.
set -eu

packages="ethtool fastd gcc iperf3 iproute2 iputils-ping libc6-dev openvpn socat util-linux wireguard-go wireguard-tools"

missing=""
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
if [ -z "$missing" ]; then
    echo "bench: all peers are installed"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "bench: missing:$missing; run this as root, or: apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
echo "bench: installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# One by one, so that a package which this release does not have costs only its own row of the table.
status=0
for package in $missing; do
    apt-get install -y -qq --no-install-recommends "$package" >/dev/null || { echo "bench: no $package" >&2; status=1; }
done
exit "$status"
