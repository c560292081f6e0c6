"""The local address of outer packets that the loop has sent or taken without knowing it: what the kernel would use.

Wireshark takes the packets of one WireGuard session for those of two where an address is missing in some.
Not for: the headers themselves (fasttun/_native/capture.pxd, `handshakes`).
"""

from __future__ import annotations

import contextlib
import socket
import struct

__all__ = ["LocalAddresses", "header_checksum"]

_ANY_PORT = 9
_LARGEST = 4096
"""Remembered addresses."""


class LocalAddresses:
    """Asks the routes once for each remote address, in the network namespace of the thread that asks."""

    def __init__(self) -> None:
        self._towards: dict[bytes, bytes] = {}

    def fill(self, packet: bytes, *, outbound: bool) -> bytes:
        """The packet with its local address, where that is zeros and there is a route; else as it is."""
        fourth = packet[:1] and packet[0] >> 4 == 4
        first, size = (12, 4) if fourth else (8, 16)
        here, there = (first, first + size) if outbound else (first + size, first)
        if len(packet) < first + 2 * size or any(packet[here:here + size]):
            return packet
        local = self._address(packet[there:there + size])
        filled = packet[:here] + local + packet[here + size:]
        if fourth:
            filled = filled[:10] + header_checksum(filled[:20]) + filled[12:]
        return filled

    def _address(self, remote: bytes) -> bytes:
        known = self._towards.get(remote)
        if known is None:
            known = _source_towards(remote)
            if len(self._towards) < _LARGEST:
                self._towards[remote] = known
        return known


def _source_towards(remote: bytes) -> bytes:
    """What the kernel would send from, or zeros; nothing is sent."""
    family = socket.AF_INET if len(remote) == 4 else socket.AF_INET6
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((socket.inet_ntop(family, remote), _ANY_PORT))
        return socket.inet_pton(family, sock.getsockname()[0].partition("%")[0])
    return bytes(len(remote))


def header_checksum(header: bytes) -> bytes:
    """Of an IPv4 header of 20 bytes, whatever stands in its own place (RFC 791)."""
    total = sum(struct.unpack("!10H", header[:10] + b"\0\0" + header[12:]))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
