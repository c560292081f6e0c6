"""Checks of this machine: TUN driver, capabilities, kernel, offloads, buffers, sysctls, clock, IPv6.

Not for: what lies between the hosts (`path`), the listener's port (`port`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
import time
from pathlib import Path

from ..device import CLONE_DEVICE, IFF_MULTI_QUEUE, IFF_VNET_HDR, TUNGETFEATURES
from ..endpoint import SOCKET_BUFFER
from ..offload import DISTRUSTED, distrust, enable_udp, kernel_version
from .finding import (
    CAP_NET_ADMIN,
    FAIL,
    OK,
    SKIPPED,
    WARNING,
    Finding,
    Question,
    has_capability,
    in_container,
)

__all__ = ["CHECKS", "buffers", "capabilities", "clock", "forwarding", "ipv6", "offloads", "reverse_path", "tun"]

_CONTAINER_FIX = "start the container with --device /dev/net/tun --cap-add NET_ADMIN"
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
_TIME_ERROR = 5  # linux/timex.h
_TIMEX_BYTES = 512
"""More than `struct timex` has on any platform."""
_FIRST_YEAR = 2024
_USO_SINCE = (6, 2, 0)
_STRICT = 1  # net.ipv4.conf.*.rp_filter, RFC 3704 §2.2


def tun(ask: Question) -> Finding:
    """/dev/net/tun is there, may be opened, and its driver answers."""
    name = "tun"
    make = f"mkdir -p /dev/net; mknod -m 0666 {CLONE_DEVICE} c 10 200"
    try:
        fd = os.open(CLONE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        fix = f"in a container: {_CONTAINER_FIX}; else, as root: modprobe tun, and if it stays away: {make}"
        return Finding(name, FAIL, f"{CLONE_DEVICE} does not exist", _CONTAINER_FIX if in_container() else fix)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            return Finding(name, FAIL, "the kernel has no TUN driver", "as root: modprobe tun")
        if os.geteuid() == 0:
            mend = f"in a container: {_CONTAINER_FIX}"
        else:
            mend = f"run it with sudo, or let everybody open it: chmod 0666 {CLONE_DEVICE}"
        return Finding(name, FAIL, f"{CLONE_DEVICE} may not be opened: {os.strerror(error.errno or 0)}", mend)
    try:
        features = struct.unpack("I", fcntl.ioctl(fd, TUNGETFEATURES, bytes(4)))[0]
    except OSError as error:
        mend = f"it is no TUN clone device: rm {CLONE_DEVICE}; {make}"
        return Finding(name, FAIL, f"{CLONE_DEVICE} does not answer: {error.strerror}", mend)
    finally:
        os.close(fd)
    if not features & IFF_VNET_HDR or not features & IFF_MULTI_QUEUE:
        return Finding(name, WARNING, "the TUN driver is old: no vnet header or no queues", "use Linux 3.8 or newer")
    return Finding(name, OK, f"{CLONE_DEVICE} opens, with vnet header and queues")


def capabilities(ask: Question) -> Finding:
    """CAP_NET_ADMIN, which makes and configures devices."""
    name = "capabilities"
    if has_capability(CAP_NET_ADMIN):
        return Finding(name, OK, "CAP_NET_ADMIN is in effect")
    if os.geteuid() == 0:
        return Finding(name, FAIL, "root without CAP_NET_ADMIN", f"in a container: {_CONTAINER_FIX}")
    return Finding(
        name, WARNING, f"user {os.geteuid()} without CAP_NET_ADMIN: no device can be made or configured",
        "run it with sudo; or on a device made for this user: sudo ip tuntap add dev tun0 mode tun user $USER",
    )


def offloads(ask: Question) -> Finding:
    """Segmentation by the kernel on both sides of the tunnel, and this kernel's known bugs in it."""
    name = "offloads"
    version = kernel_version()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        states = enable_udp(sock, gso=True, gro=True)
    bugs = [reason for offload in DISTRUSTED if (reason := distrust(offload, version))]
    lacking = [f"{offload} is {state}" for offload, state in states.items() if state != "on"]
    if version < _USO_SINCE:
        lacking.append("no UDP segmentation on TUN devices before Linux 6.2")
    kernel = f"Linux {platform.release()}"
    if bugs:
        return Finding(name, WARNING, f"{kernel}: {'; '.join(bugs)}; fasttun leaves that off",
                       "slower, not wrong: use a kernel outside the versions named")
    if lacking:
        return Finding(name, WARNING, f"{kernel}: {'; '.join(lacking)}", "slower, not wrong: use a newer kernel")
    return Finding(name, OK, f"{kernel} has all of them and none of the known bugs")


def buffers(ask: Question) -> Finding:
    """Whether a socket here gets the buffers that a burst needs, tried on one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        granted = {
            "net.core.rmem_max": _granted(sock, _SO_RCVBUFFORCE, socket.SO_RCVBUF),
            "net.core.wmem_max": _granted(sock, _SO_SNDBUFFORCE, socket.SO_SNDBUF),
        }
    short = [key for key, size in granted.items() if size < SOCKET_BUFFER]
    if not short:
        return Finding("buffers", OK, f"sockets get {SOCKET_BUFFER} bytes each way")
    seen = ", ".join(f"{key} allows {granted[key]}" for key in short)
    sysctls = " ".join(f"{key}={SOCKET_BUFFER}" for key in short)
    return Finding("buffers", WARNING, f"{seen} of the {SOCKET_BUFFER} bytes wanted: bulk transfers lose packets",
                   f"as root: sysctl -w {sysctls}; or give fasttun CAP_NET_ADMIN, which has no such limit")


def _granted(sock: socket.socket, force: int, plain: int) -> int:
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, SOCKET_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
    return sock.getsockopt(socket.SOL_SOCKET, plain) // 2  # the kernel reports twice the value (socket(7))


def _sysctl(path: str) -> int:
    return int(Path("/proc/sys/net", path).read_text())


def _routes_for_others(ask: Question) -> bool:
    """Whether the configuration has this host carry packets between peers, or from networks behind it."""
    config = ask.config
    if config is None or config.listen_port is None:
        return False
    own = [address.network for address in config.address]
    members = [peer for peer in config.peers if peer.allowed_ips]
    beyond = [net for peer in members for net in peer.allowed_ips
              if not any(net.version == mine.version and net.subnet_of(mine) for mine in own)]  # type: ignore[arg-type]
    return len(members) > 1 or bool(beyond)


def forwarding(ask: Question) -> Finding:
    """Whether this host passes packets on, which a listener between networks or peers must."""
    name = "forwarding"
    if not ask.listens:
        return Finding(name, SKIPPED, "a client need not forward; the listener's own doctor tells")
    switches = {"net.ipv4.ip_forward": "ipv4/ip_forward", "net.ipv6.conf.all.forwarding": "ipv6/conf/all/forwarding"}
    off = [key for key, path in switches.items() if os.path.exists(f"/proc/sys/net/{path}") and not _sysctl(path)]
    if not off:
        return Finding(name, OK, "packets between networks are passed on")
    mend = f"as root: sysctl -w {' '.join(f'{key}=1' for key in off)}"
    if _routes_for_others(ask):
        return Finding(name, WARNING, f"{', '.join(off)}: off, so peers reach this host and nothing behind it", mend)
    return Finding(name, OK, f"{', '.join(off)}: off, which is right unless networks or peers meet here; then {mend}")


def reverse_path(ask: Question) -> Finding:
    """Strict reverse-path filters, which drop what comes out of a tunnel whose way back lies elsewhere."""
    name = "reverse path"
    base = Path("/proc/sys/net/ipv4/conf")
    try:
        everywhere = _sysctl("ipv4/conf/all/rp_filter")
        strict = sorted(entry.name for entry in base.iterdir() if entry.name not in ("all", "lo")
                        and max(everywhere, int((entry / "rp_filter").read_text())) == _STRICT)
    except OSError as error:
        return Finding(name, SKIPPED, f"not readable: {error}")
    if not strict:
        return Finding(name, OK, "no strict filter (rp_filter)")
    everything = ask.config is not None and any(net.prefixlen == 0 and net.version == 4
                                                for peer in ask.config.peers for net in peer.allowed_ips)
    routes = _sysctl("ipv4/ip_forward") == 1
    if routes or everything:
        return Finding(
            name, WARNING, f"rp_filter is strict on {', '.join(strict)}: packets whose way back is another are dropped",
            "as root, to loose: sysctl -w net.ipv4.conf.all.rp_filter=2"
            + ("; and net.ipv4.conf.all.src_valid_mark=1" if everything else ""),
        )
    return Finding(name, OK, f"strict on {', '.join(strict)}, which hurts only a host that routes")


def clock(ask: Question) -> Finding:
    """The clock is of this age, and something keeps it: WireGuard takes no handshake dated before the last one."""
    name = "clock"
    now = time.gmtime()
    mend = "set it, and keep it: timedatectl set-ntp true, or run chrony"
    if now.tm_year < _FIRST_YEAR:
        seen = f"it is {now.tm_year} by this clock: peers that saw a later one refuse its handshakes"
        return Finding(name, FAIL, seen, mend)
    date = time.strftime("%Y-%m-%d %H:%M UTC", now)
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: adjtimex(2) only reads
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    if state == _TIME_ERROR:
        return Finding(name, WARNING, f"{date}; nothing is known to keep this clock (adjtimex: not synchronised)", mend)
    if state < 0:
        return Finding(name, OK, f"{date}; whether it is synchronised is not told here")
    return Finding(name, OK, f"{date}, synchronised")


def ipv6(ask: Question) -> Finding:
    """IPv6 in the kernel, switched on, and with a way out."""
    name = "ipv6"
    if not os.path.exists("/proc/net/if_inet6"):
        return Finding(name, WARNING, "this kernel runs without IPv6", "use IPv4 alone, or boot without ipv6.disable=1")
    if _sysctl("ipv6/conf/all/disable_ipv6"):
        return Finding(name, WARNING, "IPv6 is switched off (net.ipv6.conf.all.disable_ipv6)",
                       "use IPv4 alone, or as root: sysctl -w net.ipv6.conf.all.disable_ipv6=0")
    with open("/proc/net/if_inet6") as file:  # address, index, prefix length, scope, flags, name
        outside = any(line.split()[3] == "00" for line in file)
    if not outside:
        return Finding(name, OK, "IPv6 works inside a tunnel; outside, this host has no global address")
    return Finding(name, OK, "this host has a global address")


CHECKS = {
    "tun": tun,
    "capabilities": capabilities,
    "offloads": offloads,
    "buffers": buffers,
    "forwarding": forwarding,
    "reverse path": reverse_path,
    "clock": clock,
    "ipv6": ipv6,
}
