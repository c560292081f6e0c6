"""Which offloads of the UDP socket this kernel has, switched on where they are wanted and to be trusted.

Not for: the TUN device's own (fasttun/device.py), or giving one up while packets flow (fasttun/_core.pyx).
"""

from __future__ import annotations

import contextlib
import errno
import platform
import re
import socket

__all__ = ["ASKED_OFF", "ON", "disable_gro", "distrust", "enable_udp", "kernel_version"]

ON = "on"
ASKED_OFF = "off: asked for"

Version = tuple[int, int, int]

DISTRUSTED: dict[str, tuple[tuple[Version, Version, str], ...]] = {
    "udp-gso": (
        ((7, 0, 0), (7, 1, 5), "UDP_SEGMENT of Linux 7.0 to 7.1.4 mangles headers when the last segment is full"),
    ),
    "udp-gro": (
        ((0, 0, 0), (5, 12, 0), "UDP_GRO before Linux 5.12 loses datagrams of tunnels"),
    ),
    "tun": (
        ((6, 6, 44), (6, 6, 45), "the TUN driver of Linux 6.6.44 refuses frames whose last packet is short"),
    ),
}
"""By offload: kernels from the first version up to, not including, the second; and what is wrong there."""
SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104


def kernel_version(release: str | None = None) -> Version:
    """(major, minor, patch) of `release`, by default the running kernel's; (0, 0, 0) when unreadable."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release or platform.release())
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def distrust(name: str, version: Version | None = None) -> str | None:
    """Why the offload `name` is not to be used on that kernel, by default the running one; None if it may."""
    running = version or kernel_version()
    for first, mended, reason in DISTRUSTED.get(name, ()):
        if first <= running < mended:
            return reason
    return None


def enable_udp(sock: socket.socket, *, gso: bool, gro: bool) -> dict[str, str]:
    """Probes UDP_SEGMENT and sets UDP_GRO on `sock`; {"udp-gso": …, "udp-gro": …}, each "on" or "off: why"."""
    return {"udp-gso": _try(sock, "udp-gso", UDP_SEGMENT, 0) if gso else ASKED_OFF,
            "udp-gro": _try(sock, "udp-gro", UDP_GRO, 1) if gro else ASKED_OFF}


def disable_gro(sock: socket.socket) -> None:
    """Takes UDP_GRO off a socket that goes on without fasttun; never raises."""
    with contextlib.suppress(OSError):
        sock.setsockopt(SOL_UDP, UDP_GRO, 0)


def _try(sock: socket.socket, name: str, option: int, value: int) -> str:
    reason = distrust(name)
    if reason is not None:
        return f"off: {reason}"
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "off: not an IP socket"
    try:
        sock.setsockopt(SOL_UDP, option, value)
    except OSError as error:
        return f"off: the kernel refused it ({errno.errorcode.get(error.errno or 0, 'unknown')})"
    return ON
