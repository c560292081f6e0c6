"""Packets as a pcapng file (draft-ietf-opsawg-pcapng), for Wireshark and tcpdump: what `fasttun capture` writes.

Two interfaces of link type RAW (whole IP packets): 0 the tunnel's inner packets, 1 the datagrams around them.
Not for: taking packets from the loop (`capture`).
"""

from __future__ import annotations

import struct

__all__ = ["INNER", "OUTER", "header", "packet", "secrets", "statistics"]

INNER, OUTER = 0, 1
"""Numbers of the two interfaces."""

_LINKTYPE_RAW = 101
_SECTION, _INTERFACE, _STATISTICS, _PACKET, _SECRETS = 0x0A0D0D0A, 1, 5, 6, 10
_SECRETS_WIREGUARD = 0x57474B4C
_IF_NAME, _IF_TSRESOL, _SHB_USERAPPL, _ISB_IFDROP, _EPB_FLAGS = 2, 9, 4, 5, 2
_NANOSECONDS = 9
_INBOUND, _OUTBOUND = 1, 2


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def _block(kind: int, body: bytes, *options: bytes) -> bytes:
    if options:
        body += b"".join(options) + bytes(4)
    length = len(body) + 12
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


def header(device: str, snap_length: int, application: str) -> bytes:
    """How the file begins: the section, and both interfaces, named `device` and `device`-outer."""
    section = _block(
        _SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1), _option(_SHB_USERAPPL, application.encode()))
    return section + b"".join(
        _block(_INTERFACE, struct.pack("<HHI", _LINKTYPE_RAW, 0, snap_length),
               _option(_IF_NAME, name.encode()), _option(_IF_TSRESOL, bytes([_NANOSECONDS])))
        for name in (device, f"{device}-outer"))


def packet(interface: int, time_ns: int, outbound: bool, length: int, data: bytes) -> bytes:
    """One packet: `length` bytes on the wire, of which `data` was kept; time_ns since 1970."""
    body = struct.pack("<IIIII", interface, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), length)
    flags = struct.pack("<I", _OUTBOUND if outbound else _INBOUND)
    return _block(_PACKET, body + data + bytes(-len(data) % 4), _option(_EPB_FLAGS, flags))


def statistics(interface: int, time_ns: int, missed: int) -> bytes:
    """How many packets of an interface found the ring full."""
    body = struct.pack("<III", interface, time_ns >> 32, time_ns & 0xFFFFFFFF)
    return _block(_STATISTICS, body, _option(_ISB_IFDROP, struct.pack("<Q", missed)))


def secrets(key_log: str) -> bytes:
    """A decryption-secrets block with WireGuard's keys in Wireshark's `wg.keylog_file` form."""
    data = key_log.encode()
    return _block(_SECRETS, struct.pack("<II", _SECRETS_WIREGUARD, len(data)) + data + bytes(-len(data) % 4))
