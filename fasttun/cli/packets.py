"""A packet in one line, in the manner of `tcpdump -n`: time, way, addresses, ports, protocol, length.

Never fails: what is cut off or not known is left out. Not for: looking inside; that is Wireshark's.
"""

from __future__ import annotations

import struct
import time
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..observe.stream import Packet

__all__ = ["line", "summary"]

_TCP, _UDP, _ICMP, _ICMP6, _FRAGMENT = 6, 17, 1, 58, 44
_NAMES = {2: "IGMP", 33: "DCCP", 41: "IPv6", 47: "GRE", 50: "ESP", 51: "AH", 89: "OSPF", 132: "SCTP", 136: "UDP-Lite"}
_TCP_FLAGS = ((0x02, "S"), (0x01, "F"), (0x04, "R"), (0x08, "P"), (0x20, "U"), (0x40, "E"), (0x80, "W"), (0x10, "."))
_ECHOES = {_ICMP: {8: "echo request", 0: "echo reply"}, _ICMP6: {128: "echo request", 129: "echo reply"}}
_OTHER = {
    _ICMP: {3: "unreachable", 5: "redirect", 11: "time exceeded"},
    _ICMP6: {1: "unreachable", 2: "packet too big", 3: "time exceeded", 133: "router solicitation",
             134: "router advertisement", 135: "neighbour solicitation", 136: "neighbour advertisement"},
}  # fmt: skip
_WIREGUARD = {
    b"\1\0\0\0": ("handshake initiation, sender", 148), b"\2\0\0\0": ("handshake response, sender", 92),
    b"\3\0\0\0": ("cookie reply, receiver", 64), b"\4\0\0\0": ("data, receiver", 0),
}  # fmt: skip


def line(packet: Packet, *, side: bool = False) -> str:
    """The packet's line. side: say whether it is inside or outside of the tunnel."""
    seconds, rest = divmod(packet.time_ns, 1_000_000_000)
    clock = time.strftime("%H:%M:%S", time.localtime(seconds))
    where = ("outer " if packet.outer else "inner ") if side else ""
    way = "out" if packet.outbound else "in "
    return f"{clock}.{rest // 1000:06} {where}{way} {summary(packet.data, packet.length, outer=packet.outer)}"


def summary(data: bytes, length: int, *, outer: bool = False) -> str:
    """What an IP packet of `length` bytes, of which `data` was kept, is about."""
    if len(data) >= 20 and data[0] >> 4 == 4:
        protocol, at = data[9], (data[0] & 15) * 4
        source, destination = str(IPv4Address(data[12:16])), str(IPv4Address(data[16:20]))
        offset = (struct.unpack_from("!H", data, 6)[0] & 0x1FFF) * 8
        version = "IP "
    elif len(data) >= 40 and data[0] >> 4 == 6:
        protocol, at = data[6], 40
        source, destination = str(IPv6Address(data[8:24])), str(IPv6Address(data[24:40]))
        offset = 0
        version = "IP6"
        if protocol == _FRAGMENT and len(data) >= 48:
            protocol, at = data[40], 48
            offset = struct.unpack_from("!H", data, 42)[0] & 0xFFF8
    else:
        return f"not a whole IP header, length {length}"
    if offset:
        return f"{version} {source} > {destination}: fragment at {offset}, {_name(protocol)}, length {length - at}"
    ports = struct.unpack_from("!HH", data, at) if protocol in (_TCP, _UDP) and len(data) >= at + 4 else None
    if ports is not None:
        source, destination = f"{source}.{ports[0]}", f"{destination}.{ports[1]}"
    return f"{version} {source} > {destination}: {_inside(data, length, protocol, at, outer)}"


def _name(protocol: int) -> str:
    return {_TCP: "TCP", _UDP: "UDP", _ICMP: "ICMP", _ICMP6: "ICMP6"}.get(protocol) or \
        _NAMES.get(protocol, f"protocol {protocol}")


def _inside(data: bytes, length: int, protocol: int, at: int, outer: bool) -> str:
    body = data[at:]
    if protocol == _TCP and len(body) >= 14:
        header = (body[12] >> 4) * 4
        flags = "".join(letter for bit, letter in _TCP_FLAGS if body[13] & bit) or "none"
        return f"TCP, flags [{flags}], length {max(0, length - at - header)}"
    if protocol == _UDP and len(body) >= 8:
        text, least = _WIREGUARD.get(body[8:12], ("", 0)) if outer else ("", 0)
        if text and len(body) >= 16 and length - at - 8 >= least:
            return f"WireGuard {text} {struct.unpack_from('<I', body, 12)[0]:#010x}, length {length - at - 8}"
        return f"UDP, length {length - at - 8}"
    if protocol in _ECHOES and len(body) >= 8:
        echo = _ECHOES[protocol].get(body[0])
        if echo is not None:
            identifier, sequence = struct.unpack_from("!HH", body, 4)
            return f"{_name(protocol)} {echo}, id {identifier}, seq {sequence}, length {length - at}"
        kind = _OTHER[protocol].get(body[0], f"type {body[0]}")
        return f"{_name(protocol)} {kind}, length {length - at}"
    return f"{_name(protocol)}, length {length - at}"
