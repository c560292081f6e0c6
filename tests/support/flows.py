"""Hypothesis strategies for TCP and UDP flows as `support.twins` describes packets. Not for real traffic."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import strategies as st

from support import twins
from support.twins import ACK, CWR, ECE, FIN, PSH, RST, SYN, TCP, UDP, URG, Packet

V6 = (bytes.fromhex("fd070000000000000000000000000001"), bytes.fromhex("fd070000000000000000000000000002"))
V4 = (b"\x0a\x07\x00\x01", b"\x0a\x07\x00\x02")

TIMESTAMPS = b"\x01\x01\x08\x0a" + bytes(range(8))
OPTIONS = st.one_of(
    st.just(b""),
    st.just(TIMESTAMPS),
    st.integers(1, 10).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n)),
)
WORD = st.integers(0, 0xFFFF)
# The places where 16- and 32-bit numbers wrap, and anything else.
IDENTIFICATION = st.one_of(st.sampled_from([0, 1, 0x7FFF, 0xFFFA, 0xFFFF]), WORD)
SEQUENCE = st.one_of(st.sampled_from([0, 0x7FFFFFF0, 0xFFFFFF00, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))


def contents(length: int, seed: int) -> bytes:
    """`length` bytes; every fourth seed gives only zeroes or ones, where checksums have their edges."""
    if seed % 4 == 0:
        return (b"\0" if seed % 8 else b"\xff") * length
    return random.Random(seed).randbytes(length)


@st.composite
def heads(draw: st.DrawFn, protocols: tuple[int, ...] = (TCP, UDP)) -> Packet:
    """A packet without payload, any field of which may have any value that a flow's packets share."""
    version = draw(st.sampled_from([4, 6]))
    protocol = draw(st.sampled_from(protocols))
    source, destination = V4 if version == 4 else V6
    packet = Packet(
        version=version,
        protocol=protocol,
        source=source,
        destination=destination,
        source_port=draw(st.integers(40000, 40007)),
        destination_port=draw(WORD),
        traffic_class=draw(st.integers(0, 255)),
        hop_limit=draw(st.integers(0, 255)),
        flow_label=draw(st.integers(0, 0xFFFFF)),
        identification=draw(IDENTIFICATION),
        fragment=draw(st.sampled_from([0x4000, 0x4000, 0, 0x8000])),
    )
    if protocol == UDP:
        return packet
    return replace(
        packet,
        sequence=draw(SEQUENCE),
        acknowledgement=draw(st.integers(0, 0xFFFFFFFF)),
        reserved=draw(st.sampled_from([0, 0, 1, 15])),
        flags=draw(st.sampled_from([ACK, ACK, ACK | ECE])),
        window=draw(WORD),
        urgent=draw(st.sampled_from([0, 0, 7])),
        options=draw(OPTIONS),
    )


@st.composite
def gso_frames(draw: st.DrawFn) -> tuple[Packet, int]:
    """A frame as the kernel hands it to a device with segmentation offload, and its gso_size."""
    head = draw(heads())
    gso_size = draw(st.one_of(st.integers(1, 64), st.integers(500, 1460)))
    count = draw(st.integers(1, 9))
    last = draw(st.integers(1, gso_size))
    payload = contents((count - 1) * gso_size + last, draw(st.integers(0, 1 << 20)))
    flags = head.flags | draw(st.sampled_from([0, PSH, FIN, PSH | FIN, CWR, CWR | PSH, URG]))
    if head.version == 4:
        head = replace(head, ip_options=draw(st.sampled_from([b"", b"", b"\x94\x04\0\0", bytes([1] * 40)])))
    else:
        head = replace(head, extensions=draw(EXTENSIONS))
    return replace(head, flags=flags, payload=payload), gso_size


def extension(kind: int, units: int) -> tuple[int, bytes]:
    """Type and body of one IPv6 extension header, `units` 8-byte units beyond the first."""
    if kind == 51:  # the authentication header counts in 4 bytes, less two
        return kind, bytes([units * 2]) + bytes(units * 8 + 6)
    return kind, bytes([units]) + bytes(units * 8 + 6)


EXTENSIONS = st.one_of(
    st.just(()),
    st.lists(st.builds(extension, st.sampled_from([0, 60, 51]), st.integers(0, 3)), max_size=4).map(tuple),
)

LENGTHS = st.sampled_from(["full", "full", "full", "full", "full", "full", "short", "long", "none"])
CHANGES = st.sampled_from(
    [
        "nothing",
        "nothing",
        "nothing",
        "nothing",
        "nothing",
        "nothing",
        "nothing",
        "nothing",
        "nothing",
        "psh",
        "fin",
        "cwr",
        "ece",
        "syn",
        "rst",
        "urg",
        "no ack",
        "traffic class",
        "hop limit",
        "flow label",
        "identification",
        "same identification",
        "df",
        "reserved",
        "sequence",
        "acknowledgement",
        "window",
        "urgent",
        "options",
        "more options",
        "checksum",
        "checksum 0",
        "checksum ffff",
        "ip checksum",
        "ip checksum ffff",
        "udp length",
        "fragment",
        "ip options",
        "extension",
        "total length",
        "icmp",
    ]
)


def changed(packet: Packet, change: str) -> bytes:
    """The packet with one thing about it other than its neighbours', valid in the rest."""
    flag = {"psh": PSH, "fin": FIN, "cwr": CWR, "ece": ECE, "syn": SYN, "rst": RST, "urg": URG, "no ack": ACK}
    if change in flag:
        return replace(packet, flags=packet.flags ^ flag[change]).build()
    built = packet.build()
    if change in ("checksum", "ip checksum"):
        at = packet.transport_offset + 5 if change == "checksum" else 11
        return built[:at] + bytes([built[at] ^ 1]) + built[at + 1 :]
    if change == "extension" and packet.version == 6:
        return replace(packet, extensions=(extension(60, 0),)).build()
    if change == "ip options" and packet.version == 4:
        return replace(packet, ip_options=b"\x94\x04\0\0").build()
    if change == "icmp":
        return built[:9] + b"\x01" + built[10:] if packet.version == 4 else built[:6] + b"\x3a" + built[7:]
    fields: dict[str, dict[str, object]] = {
        "traffic class": {"traffic_class": packet.traffic_class ^ 3},
        "hop limit": {"hop_limit": packet.hop_limit ^ 1},
        "flow label": {"flow_label": packet.flow_label ^ 1},
        "identification": {"identification": packet.identification + 7},
        "same identification": {"identification": packet.identification - 1},
        "df": {"fragment": packet.fragment ^ 0x4000},
        "reserved": {"reserved": packet.reserved ^ 1},
        "sequence": {"sequence": packet.sequence + 1},
        "acknowledgement": {"acknowledgement": packet.acknowledgement ^ 1},
        "window": {"window": packet.window ^ 1},
        "urgent": {"urgent": packet.urgent ^ 1},
        "options": {"options": bytes(len(packet.options))},
        "more options": {"options": (packet.options + TIMESTAMPS)[:40]},
        "checksum 0": {"checksum": 0},
        "checksum ffff": {"checksum": 0xFFFF},
        "ip checksum ffff": {"ip_checksum": 0xFFFF},
        "udp length": {"udp_length": len(packet.payload) + 7},
        "fragment": {"fragment": 0x2000},
        "total length": {"total_length": len(built) - 1},
    }
    return replace(packet, **fields.get(change, {})).build()  # type: ignore[arg-type]


@st.composite
def flow_packets(draw: st.DrawFn, max_packets: int = 12, wild: bool = True) -> list[bytes]:
    """The packets of one flow in order, most of them joinable; with `wild`, some odd in one way."""
    packet = draw(heads())
    size = draw(st.integers(2, 90))
    seed = draw(st.integers(0, 1 << 20))
    packets = []
    for index in range(draw(st.integers(1, max_packets))):
        length = {"full": size, "short": size // 2, "long": size + 3, "none": 0}[draw(LENGTHS)]
        packet = replace(packet, payload=contents(length, seed + index))
        packets.append(changed(packet, draw(CHANGES) if wild else "nothing"))
        packet = replace(packet, sequence=packet.sequence + length, identification=packet.identification + 1)
    return packets


@st.composite
def bursts(draw: st.DrawFn, max_flows: int = 2, max_packets: int = 12, wild: bool = True) -> list[bytes]:
    """Packets of several flows, interleaved; each flow's in order."""
    flows = draw(st.lists(flow_packets(max_packets, wild), min_size=1, max_size=max_flows))
    turns = draw(st.permutations([index for index, flow in enumerate(flows) for _ in flow]))
    iterators = [iter(flow) for flow in flows]
    return [next(iterators[index]) for index in turns]


__all__ = ["EXTENSIONS", "bursts", "contents", "flow_packets", "gso_frames", "heads", "twins"]
