"""Which offloads of the UDP socket this kernel has, switched on where they are wanted and to be trusted.

Not for: the TUN device's own (fasttun/device.py), or giving one up while packets flow (fasttun/_core.pyx).
"""

from __future__ import annotations

import errno
import platform
import re
import socket

__all__ = ["ON", "enable_udp", "kernel_version"]

ON = "on"
SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104


def kernel_version(release: str | None = None) -> tuple[int, int, int]:
    """(major, minor, patch) of `release`, by default the running kernel's; (0, 0, 0) when unreadable."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release or platform.release())
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def enable_udp(sock: socket.socket, *, gso: bool, gro: bool) -> dict[str, str]:
    """Probes UDP_SEGMENT and sets UDP_GRO on `sock`; {"udp-gso": …, "udp-gro": …}, each "on" or "off: why"."""
    return {"udp-gso": _try(sock, UDP_SEGMENT, 0) if gso else "off: asked for",
            "udp-gro": _try(sock, UDP_GRO, 1) if gro else "off: asked for"}


def _try(sock: socket.socket, option: int, value: int) -> str:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "off: not an IP socket"
    try:
        sock.setsockopt(SOL_UDP, option, value)
    except OSError as error:
        return f"off: the kernel refused it ({errno.errorcode.get(error.errno or 0, 'unknown')})"
    return ON
