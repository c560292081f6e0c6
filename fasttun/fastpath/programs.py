"""The two programs of the fast path, and the layout of what they share with Python. docs/design.md, "Fast path".

outbound, on the TUN device's egress: packets to a known peer get the outer IPv4 and UDP headers and go to the device
towards it. inbound, on that device's ingress: datagrams of a known peer that hold one whole packet lose them and
come in through the TUN device. Everything else goes on its usual way, so the loop sees what is not known yet.
A packet here may be a TCP segmentation frame of up to 64 KiB, which goes through whole.

Not for: who is known (`path`), the encoding of instructions (`assembler`), loading (`bpf`).
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from .assembler import Assembler, Register

__all__ = ["ANY", "COUNTS", "HEADERS", "KEY_SIZE", "SLOT_COUNTS_SIZE", "SOURCE_SIZE", "TARGET_SIZE", "Way",
           "inbound", "key_of", "outbound"]

HEADERS = 28
"""Bytes before each packet: IPv4 without options, UDP."""
KEY_SIZE = 16
"""Bytes of an inner address, IPv4 as ::ffff:0:0/96."""
ANY = bytes(KEY_SIZE)
"""The key of a client's only peer, for all addresses."""

_TARGET = struct.Struct("=II28sI")  # slot, interface, headers, their partial sum
_SOURCE = struct.Struct("=I4s4s2s2x")  # slot, outer address of the peer, ours, its port
COUNTS = struct.Struct("=QQQQQ")
"""Of one slot and processor: packets and bytes outbound, the same inbound, CLOCK_MONOTONIC of the last inbound."""
TARGET_SIZE, SOURCE_SIZE, SLOT_COUNTS_SIZE = _TARGET.size, _SOURCE.size, COUNTS.size

_MAP_LOOKUP, _KTIME_GET_NS, _REDIRECT, _PULL_DATA, _CHANGE_HEAD, _ADJUST_ROOM, _REDIRECT_NEIGHBOUR = \
    1, 5, 23, 39, 43, 50, 152
_NEXT = -1  # TCX_NEXT: the packet goes on its way
_DROP = 2  # TCX_DROP
_ROOM_AFTER_LINK = 1  # BPF_ADJ_ROOM_MAC
_FIXED_GSO, _ENCAP_IPV4, _ENCAP_UDP, _DECAP_IPV4, _DECAP_IPV6 = 1, 1 << 1, 1 << 4, 1 << 7, 1 << 8
_TO_INGRESS = 1  # BPF_F_INGRESS
_ETHERNET = 14
_UDP, _TCP = 17, 6
_NO_FRAGMENT = 0x4000
_TTL = 64

# struct __sk_buff
_LENGTH, _TYPE, _MARK, _PROTOCOL, _VLAN, _DATA, _DATA_END, _GSO_SEGMENTS, _GSO_SIZE = 0, 4, 8, 16, 20, 76, 80, 164, 176

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FRAME = map(Register, range(11))

# The programs' stack.
_KEY, _SLOT, _PACKETS, _BYTES = -16, -20, -32, -40


def _network_order(value: int) -> int:
    """A 16-bit field as a load of two bytes gives it in this machine's order."""
    return int.from_bytes(value.to_bytes(2, "big"), sys.byteorder)


@dataclass(frozen=True)
class Way:
    """How datagrams reach one peer: from and to which outer IPv4 address and port, through which interface.

    slot: index of the peer's counters.
    """

    slot: int
    interface: int
    local: IPv4Address
    local_port: int
    remote: IPv4Address
    remote_port: int

    def target(self) -> bytes:
        """The outbound map's value."""
        headers = struct.pack("!BBHHHBBH4s4sHHHH", 0x45, 0, 0, 0, _NO_FRAGMENT, _TTL, _UDP, 0, self.local.packed,
                              self.remote.packed, self.local_port, self.remote_port, 0, 0)
        return _TARGET.pack(self.slot, self.interface, headers, sum(struct.unpack("=10H", headers[:20])))

    def source(self) -> bytes:
        """The inbound map's value."""
        return _SOURCE.pack(self.slot, self.remote.packed, self.local.packed, struct.pack("!H", self.remote_port))


def key_of(address: IPv4Address | IPv6Address) -> bytes:
    """The maps' key for an inner address."""
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


def outbound(targets: int, counts: int) -> bytes:
    """Code for the egress of the TUN device. targets, counts: descriptors of the maps."""
    a = Assembler()
    a.mov(R6, R1)
    a.load(4, R7, R6, _LENGTH)
    a.jump_if(R7, ">", 65535 - HEADERS, "pass")
    a.load(4, R2, R6, _DATA)
    a.load(4, R3, R6, _DATA_END)
    _need(a, R2, R3, 20, "pass")
    a.load(1, R5, R2)
    a.do("rsh", R5, 4)
    a.jump_if(R5, "==", 6, "v6")
    a.jump_if(R5, "!=", 4, "pass")
    _ipv4_key(a, R2, 16)
    a.jump("look up")
    a.label("v6")
    _need(a, R2, R3, 40, "pass")
    _ipv6_key(a, R2, 24)
    a.label("look up")
    _find(a, targets)
    a.load(4, R1, R8, 0)
    a.store(4, FRAME, _SLOT, R1)
    _count(a, 0)
    a.mov(R1, R6)
    a.mov(R2, HEADERS)
    a.mov(R3, _ROOM_AFTER_LINK)
    a.mov(R4, _FIXED_GSO | _ENCAP_IPV4 | _ENCAP_UDP)
    a.call(_ADJUST_ROOM)
    a.jump_if(R0, "!=", 0, "pass")
    a.load(4, R2, R6, _DATA)
    a.load(4, R3, R6, _DATA_END)
    _need(a, R2, R3, HEADERS, "drop")
    for at in range(0, HEADERS, 4):
        a.load(4, R1, R8, 8 + at)
        a.store(4, R2, at, R1)
    a.do("add", R7, HEADERS)
    a.mov(R1, R7)
    a.big_endian(R1, 16)
    a.store(2, R2, 2, R1)
    a.load(4, R4, R8, 8 + HEADERS)
    a.do("add", R4, R1)
    for _ in range(2):
        a.mov(R5, R4)
        a.do("rsh", R5, 16)
        a.do("and", R4, 0xFFFF)
        a.do("add", R4, R5)
    a.do("xor", R4, 0xFFFF)
    a.store(2, R2, 10, R4)
    a.do("sub", R7, 20)
    a.big_endian(R7, 16)
    a.store(2, R2, 24, R7)
    a.store(4, R6, _MARK, 0)
    _add_counts(a, counts, 0)
    # The helper that finds the neighbour takes an Ethernet header off first.
    a.mov(R1, R6)
    a.mov(R2, _ETHERNET)
    a.mov(R3, 0)
    a.call(_CHANGE_HEAD)
    a.jump_if(R0, "!=", 0, "drop")
    a.load(4, R1, R8, 4)
    a.mov(R2, 0)
    a.mov(R3, 0)
    a.mov(R4, 0)
    a.call(_REDIRECT_NEIGHBOUR)
    a.exit()
    _ending(a, "pass", _NEXT)
    _ending(a, "drop", _DROP)
    return a.code()


def inbound(sources: int, counts: int, *, port: int, tun: int, ethernet: bool) -> bytes:
    """Code for the ingress of a device towards peers.

    sources, counts: descriptors of the maps. port: our UDP port. tun: the TUN device's index. ethernet: whether
    the device's packets begin with an Ethernet header, or with IP.
    """
    link = _ETHERNET if ethernet else 0
    packet = link + HEADERS
    a = Assembler()
    a.mov(R6, R1)
    a.load(4, R1, R6, _PROTOCOL)
    a.jump_if(R1, "!=", _network_order(0x0800), "pass")
    a.load(4, R1, R6, _TYPE)
    a.jump_if(R1, "!=", 0, "pass")
    a.load(4, R1, R6, _VLAN)
    a.jump_if(R1, "!=", 0, "pass")
    a.load(4, R7, R6, _LENGTH)
    a.jump_if(R7, "<", packet + 20, "pass")
    a.load(4, R2, R6, _DATA)
    a.load(4, R3, R6, _DATA_END)
    a.mov(R1, R2)
    a.do("add", R1, packet + 20)
    a.jump_if(R1, "<=", R3, "linear")
    # Some drivers leave the headers in pages.
    a.mov(R1, R6)
    a.mov(R2, packet + 20)
    a.call(_PULL_DATA)
    a.jump_if(R0, "!=", 0, "pass")
    a.load(4, R2, R6, _DATA)
    a.load(4, R3, R6, _DATA_END)
    _need(a, R2, R3, packet + 20, "pass")
    a.label("linear")
    for size, at, mask, value in (
        (1, link, None, 0x45),
        (1, link + 9, None, _UDP),
        (2, link + 22, None, _network_order(port)),
        (2, link + 6, _network_order(0x3FFF), 0),
    ):
        a.load(size, R1, R2, at)
        if mask is not None:
            a.do("and", R1, mask)
        a.jump_if(R1, "!=", value, "pass")
    # One whole packet: what several datagrams in one buffer hold has no length that fits.
    a.do("sub", R7, link)
    a.load(2, R1, R2, link + 2)
    a.big_endian(R1, 16)
    a.jump_if(R1, "!=", R7, "pass")
    a.do("sub", R7, 20)
    a.load(2, R1, R2, link + 24)
    a.big_endian(R1, 16)
    a.jump_if(R1, "!=", R7, "pass")
    a.do("sub", R7, 8)
    a.load(1, R9, R2, packet)
    a.do("rsh", R9, 4)
    a.jump_if(R9, "==", 6, "v6")
    a.jump_if(R9, "!=", 4, "pass")
    a.load(2, R1, R2, packet + 2)
    a.big_endian(R1, 16)
    a.jump_if(R1, "!=", R7, "pass")
    _ipv4_key(a, R2, packet + 12)
    a.jump("look up")
    a.label("v6")
    _need(a, R2, R3, packet + 40, "pass")
    a.load(2, R1, R2, packet + 4)
    a.big_endian(R1, 16)
    a.do("add", R1, 40)
    a.jump_if(R1, "!=", R7, "pass")
    # ::/64 spells IPv4 addresses, too: the loop decides.
    a.load(8, R1, R2, packet + 8)
    a.jump_if(R1, "==", 0, "pass")
    _ipv6_key(a, R2, packet + 8)
    a.label("look up")
    _find(a, sources)
    a.load(4, R2, R6, _DATA)
    a.load(4, R3, R6, _DATA_END)
    _need(a, R2, R3, packet, "pass")
    for size, at, field in ((4, link + 12, 4), (4, link + 16, 8), (2, link + 20, 12)):
        a.load(size, R1, R2, at)
        a.load(size, R4, R8, field)
        a.jump_if(R1, "!=", R4, "pass")
    a.load(4, R1, R8, 0)
    a.store(4, FRAME, _SLOT, R1)
    _count(a, packet)
    a.mov(R4, _FIXED_GSO | _DECAP_IPV4)
    a.jump_if(R9, "==", 4, "decapsulate")
    a.mov(R4, _FIXED_GSO | _DECAP_IPV6)
    a.label("decapsulate")
    a.mov(R1, R6)
    a.mov(R2, -HEADERS)
    a.mov(R3, _ROOM_AFTER_LINK)
    a.call(_ADJUST_ROOM)
    a.jump_if(R0, "!=", 0, "pass")
    a.store(4, R6, _MARK, 0)
    _add_counts(a, counts, 16)
    a.mov(R1, tun)
    a.mov(R2, _TO_INGRESS)
    a.call(_REDIRECT)
    a.exit()
    _ending(a, "pass", _NEXT)
    return a.code()


def _need(a: Assembler, data: Register, end: Register, length: int, otherwise: str) -> None:
    """The verifier's condition for reading `length` bytes at `data`. Overwrites r1."""
    a.mov(R1, data)
    a.do("add", R1, length)
    a.jump_if(R1, ">", end, otherwise)


def _ipv4_key(a: Assembler, data: Register, at: int) -> None:
    a.store(8, FRAME, _KEY, 0)
    a.store(4, FRAME, _KEY + 8, int.from_bytes(b"\0\0\xff\xff", sys.byteorder))
    a.load(4, R1, data, at)
    a.store(4, FRAME, _KEY + 12, R1)


def _ipv6_key(a: Assembler, data: Register, at: int) -> None:
    for part in range(0, 16, 4):
        a.load(4, R1, data, at + part)
        a.store(4, FRAME, _KEY + part, R1)


def _look_up(a: Assembler, map_fd: int, at: int) -> None:
    """r0 = the value for the key on the stack at `at`, 0 without one. Overwrites r1 to r5."""
    a.map(R1, map_fd)
    a.mov(R2, FRAME)
    a.do("add", R2, at)
    a.call(_MAP_LOOKUP)


def _find(a: Assembler, map_fd: int) -> None:
    """r8 = the value for the key on the stack, or for ANY; else the packet passes."""
    _look_up(a, map_fd, _KEY)
    a.jump_if(R0, "!=", 0, "found")
    a.store(8, FRAME, _KEY, 0)
    a.store(8, FRAME, _KEY + 8, 0)
    _look_up(a, map_fd, _KEY)
    a.jump_if(R0, "==", 0, "pass")
    a.label("found")
    a.mov(R8, R0)


def _count(a: Assembler, packet: int) -> None:
    """Packets and inner bytes of this buffer to the stack: a frame's are those of its segments.

    r7: inner bytes of the buffer. packet: where the inner packet begins. Overwrites r0 to r5. A frame of anything but
    TCP passes: what ends in a socket has lost the size of its datagrams.
    """
    a.store(8, FRAME, _PACKETS, 1)
    a.store(8, FRAME, _BYTES, R7)
    a.load(4, R5, R6, _GSO_SIZE)
    a.jump_if(R5, "==", 0, "counted")
    a.load(4, R2, R6, _DATA)
    a.load(4, R3, R6, _DATA_END)
    _need(a, R2, R3, packet + 20, "pass")
    a.load(1, R0, R2, packet)
    a.mov(R4, R0)
    a.do("rsh", R4, 4)
    a.jump_if(R4, "==", 6, "count v6")
    a.do("and", R0, 15)
    a.do("lsh", R0, 2)
    a.load(1, R4, R2, packet + 9)
    a.jump("count transport")
    a.label("count v6")
    a.mov(R0, 40)
    a.load(1, R4, R2, packet + 6)
    a.label("count transport")
    # r0: bytes of the IP header, r4: the protocol.
    a.jump_if(R4, "!=", _TCP, "pass")
    a.do("add", R2, R0)
    _need(a, R2, R3, packet + 20, "pass")
    a.load(1, R4, R2, packet + 12)
    a.do("rsh", R4, 4)
    a.do("lsh", R4, 2)
    a.do("add", R0, R4)
    # segments = ceil((bytes - headers) / size); each further one has the headers again.
    a.jump_if(R0, ">=", R7, "pass")
    a.mov(R1, R7)
    a.do("sub", R1, R0)
    a.do("add", R1, R5)
    a.do("sub", R1, 1)
    a.do("div", R1, R5)
    a.store(8, FRAME, _PACKETS, R1)
    a.do("sub", R1, 1)
    a.do("mul", R1, R0)
    a.do("add", R1, R7)
    a.store(8, FRAME, _BYTES, R1)
    a.label("counted")


def _add_counts(a: Assembler, counts: int, at: int) -> None:
    """Adds what `_count` found to the slot's counters at `at`; inbound also the time. Overwrites r0 to r5."""
    _look_up(a, counts, _SLOT)
    a.jump_if(R0, "==", 0, "uncounted")
    for field, stack in ((at, _PACKETS), (at + 8, _BYTES)):
        a.load(8, R1, R0, field)
        a.load(8, R2, FRAME, stack)
        a.do("add", R1, R2)
        a.store(8, R0, field, R1)
    if at:
        a.mov(R9, R0)
        a.call(_KTIME_GET_NS)
        a.store(8, R9, at + 16, R0)
    a.label("uncounted")


def _ending(a: Assembler, label: str, verdict: int) -> None:
    a.label(label)
    a.mov(R0, verdict)
    a.exit()
