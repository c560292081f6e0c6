"""Splitting outbound frames, against a twin that builds each packet from its fields, and against scapy."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from support import flows, twins
from support.twins import (
    ACK,
    CWR,
    FIN,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CSUM,
    PSH,
    TCP,
    UDP,
    Packet,
)

from fasttun import _testing

REASONS = ("bad header", "bad checksum offsets", "bad gso", "too long", "no room")


def vnet_of(
    frame: Packet, gso_size: int, *, ecn: bool = False, hint: int = 0, flags: int = NEEDS_CSUM
) -> bytes:
    kind = GSO_UDP_L4 if frame.protocol == UDP else GSO_TCPV4 if frame.version == 4 else GSO_TCPV6
    return twins.vnet(
        flags,
        kind | (GSO_ECN if ecn else 0),
        hint,
        gso_size,
        frame.transport_offset,
        16 if frame.protocol == TCP else 6,
    )


def split(frame: Packet, gso_size: int, **keywords: int) -> list[bytes]:
    return _testing.split(vnet_of(frame, gso_size), frame.with_partial_checksum().build(), **keywords)


@settings(max_examples=500)
@given(flows.gso_frames(), st.booleans(), st.integers(0, 65535))
def test_packets_are_the_twins(case: tuple[Packet, int], ecn: bool, hint: int) -> None:
    frame, gso_size = case
    header = vnet_of(frame, gso_size, ecn=ecn, hint=hint)
    packets = _testing.split(header, frame.with_partial_checksum().build())
    assert packets == [packet.build() for packet in twins.segment(frame, gso_size)]


@settings(max_examples=40)
@given(flows.gso_frames())
def test_scapy_would_build_the_same_packets(case: tuple[Packet, int]) -> None:
    """Lengths and checksums taken out of a packet and computed again by scapy are the ones it had."""
    frame, gso_size = case
    packets = split(frame, gso_size)
    if frame.version == 6:
        frame = replace(frame, extensions=())  # scapy takes a packet's authentication header for opaque bytes
        packets = split(frame, gso_size)
    for data in packets[:2] + packets[-1:]:
        packet = IP(data) if frame.version == 4 else IPv6(data)
        if frame.version == 4:
            packet.len = packet.chksum = None
        else:
            packet.plen = None
        packet["TCP" if frame.protocol == TCP else "UDP"].chksum = None
        if frame.protocol == UDP:
            packet["UDP"].len = None
        else:
            packet["TCP"].remove_payload()  # options may be any bytes: keep them as they were parsed
            offset = frame.header_length
            packet = packet / data[offset:]
        rebuilt = bytes(packet)
        if (
            frame.protocol == TCP
            and rebuilt[frame.transport_offset + 20 : frame.header_length] != frame.options
        ):
            continue
        assert rebuilt == data


@settings(max_examples=150)
@given(flows.gso_frames(), st.integers(0, 40), st.integers(0, 40))
def test_rooms_stay_free_and_do_not_change_the_packets(
    case: tuple[Packet, int], head: int, tail: int
) -> None:
    frame, gso_size = case
    assert split(frame, gso_size, head_room=head, tail_room=tail) == split(frame, gso_size)


@settings(max_examples=150)
@given(flows.gso_frames(), st.integers(0, 20), st.integers(0, 20))
def test_output_needs_exactly_its_size(case: tuple[Packet, int], head: int, tail: int) -> None:
    frame, gso_size = case
    packets = split(frame, gso_size)
    exact = sum(len(packet) + head + tail for packet in packets)
    assert split(frame, gso_size, head_room=head, tail_room=tail, out_size=exact) == packets
    with pytest.raises(ValueError, match="no room"):
        split(frame, gso_size, head_room=head, tail_room=tail, out_size=exact - 1)


@settings(max_examples=150)
@given(flows.gso_frames())
def test_max_packet_is_the_longest_packet(case: tuple[Packet, int]) -> None:
    frame, gso_size = case
    packets = split(frame, gso_size)
    assert split(frame, gso_size, max_packet=len(packets[0])) == packets
    with pytest.raises(ValueError, match="too long"):
        split(frame, gso_size, max_packet=len(packets[0]) - 1)


def test_flags_on_first_middle_and_last() -> None:
    frame = Packet(flags=ACK | PSH | FIN | CWR, payload=bytes(30))
    flags = [twins.parse(packet).flags for packet in split(frame, 10)]
    assert flags == [ACK | CWR, ACK, ACK | PSH | FIN]


def test_full_frame_of_the_smallest_payloads_linux_sends() -> None:
    frame = Packet(payload=bytes(65535 - 52), options=flows.TIMESTAMPS)
    packets = split(frame, 36, head_room=48, tail_room=16)
    assert len(packets) == -(-(65535 - 52) // 36)
    with pytest.raises(ValueError, match="no room"):
        split(frame, 1)


def test_routing_header_keeps_the_final_destination_in_the_pseudo_header() -> None:
    final = bytes(range(16))
    routing = (43, bytes([2, 0, 1]) + bytes(4) + final)
    frame = Packet(
        version=6,
        source=flows.V6[0],
        destination=flows.V6[1],
        extensions=(routing,),
        pseudo_destination=final,
        payload=flows.contents(3000, 5),
    )
    assert split(frame, 1000) == [packet.build() for packet in twins.segment(frame, 1000)]


@settings(max_examples=300)
@given(flows.heads(), st.integers(0, 200), st.integers(0, 1 << 20))
@example(Packet(protocol=UDP), 0, 0)
def test_single_packet_gets_its_checksum_finished(head: Packet, length: int, seed: int) -> None:
    packet = replace(head, payload=flows.contents(length, seed))
    header = twins.vnet(NEEDS_CSUM, 0, 0, 0, packet.transport_offset, 16 if packet.protocol == TCP else 6)
    partial = packet.with_partial_checksum().build()
    assert _testing.split(header, partial) == [packet.build()]
    assert _testing.complete(header, partial) == packet.build()
    for offsets in ((len(partial) - 1, 0), (0, len(partial) - 1), (65535, 65535)):
        for call in (_testing.split, _testing.complete):
            with pytest.raises(ValueError, match="bad checksum offsets"):
                call(twins.vnet(NEEDS_CSUM, 0, 0, 0, *offsets), partial)


def test_udp_checksum_of_zero_is_sent_as_ones() -> None:
    packet = Packet(protocol=UDP, payload=b"\0\0")
    rest = twins.ones_sum(packet.pseudo() + packet.transport(0))
    packet = replace(packet, payload=(0xFFFF - rest).to_bytes(2, "big"))
    assert packet.build()[26:28] == b"\xff\xff"
    header = twins.vnet(NEEDS_CSUM, 0, 0, 0, 20, 6)
    assert _testing.split(header, packet.with_partial_checksum().build()) == [packet.build()]
    assert split(packet, 2) == [packet.build()]
    assert split(replace(packet, payload=packet.payload * 3), 2)[0] == packet.build()


@settings(max_examples=100)
@given(st.binary(min_size=1, max_size=200))
def test_any_packet_without_offload_is_copied(data: bytes) -> None:
    assert _testing.split(bytes(10), data) == [data]
    with pytest.raises(ValueError, match="too long"):
        _testing.split(bytes(10), data, max_packet=len(data) - 1)


@pytest.mark.parametrize(
    ("frame", "header", "reason"),
    [
        (Packet(payload=b"x" * 9), {"gso_size": 0}, "bad gso"),
        (Packet(payload=b"x" * 9), {"gso_type": twins.GSO_UDP}, "bad gso"),
        (Packet(payload=b"x" * 9), {"gso_type": 2}, "bad gso"),
        (Packet(payload=b"x" * 9), {"gso_type": GSO_TCPV6}, "bad header"),
        (Packet(payload=b"x" * 9), {"gso_type": GSO_UDP_L4}, "bad header"),
        (Packet(payload=b"x" * 9, fragment=0x2000), {}, "bad header"),
        (Packet(payload=b"x" * 9, fragment=1), {}, "bad header"),
        (Packet(payload=b"x" * 9), {"csum_start": 24}, "bad checksum offsets"),
        (Packet(payload=b"x" * 9), {"csum_offset": 6}, "bad checksum offsets"),
        (
            Packet(
                version=6,
                source=flows.V6[0],
                destination=flows.V6[1],
                extensions=(flows.extension(44, 0),),
                payload=b"x" * 9,
            ),
            {},
            "bad header",
        ),
        (
            Packet(
                version=6,
                source=flows.V6[0],
                destination=flows.V6[1],
                extensions=(flows.extension(60, 0),) * 9,
                payload=b"x" * 9,
            ),
            {},
            "bad header",
        ),
    ],
)
def test_reasons(frame: Packet, header: dict[str, int], reason: str) -> None:
    kind = GSO_TCPV4 if frame.version == 4 else GSO_TCPV6
    fields = {
        "flags": NEEDS_CSUM,
        "gso_type": kind,
        "hdr_len": 0,
        "gso_size": 4,
        "csum_start": frame.transport_offset,
        "csum_offset": 16,
    }
    with pytest.raises(ValueError, match=reason):
        _testing.split(twins.vnet(**{**fields, **header}), frame.with_partial_checksum().build())


@settings(max_examples=200)
@given(flows.gso_frames(), st.integers(0, 200))
def test_cut_headers_are_refused(case: tuple[Packet, int], keep: int) -> None:
    frame, gso_size = case
    data = frame.with_partial_checksum().build()[: min(keep, frame.header_length - 1)]
    with pytest.raises(ValueError, match="bad header"):
        _testing.split(vnet_of(frame, gso_size), data)


@settings(max_examples=600)
@given(st.data())
def test_no_input_goes_out_of_bounds(data: st.DataObject) -> None:
    """Random vnet headers and frames, and real ones changed in a few bytes; a sanitizer build sees the rest."""
    if data.draw(st.booleans()):
        frame, gso_size = data.draw(flows.gso_frames())
        raw = bytearray(frame.with_partial_checksum().build())
        header = bytearray(vnet_of(frame, gso_size))
        for _ in range(data.draw(st.integers(0, 4))):
            raw[data.draw(st.integers(0, min(len(raw), frame.header_length + 8) - 1))] = data.draw(
                st.integers(0, 255)
            )
        for _ in range(data.draw(st.integers(0, 2))):
            header[data.draw(st.integers(0, 9))] = data.draw(st.integers(0, 255))
        raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    else:
        header = bytearray(data.draw(st.binary(min_size=10, max_size=10)))
        header[1] = data.draw(st.sampled_from([0, 1, 3, 4, 5, 0x81, header[1]]))
        raw = bytearray(data.draw(st.binary(max_size=200)))
    out_size = data.draw(st.one_of(st.none(), st.integers(0, 4000)))
    try:
        packets = _testing.split(
            bytes(header),
            bytes(raw),
            data.draw(st.integers(0, 65535)),
            data.draw(st.integers(0, 30)),
            data.draw(st.integers(0, 30)),
            out_size,
        )
    except ValueError as error:
        if str(error) not in REASONS:
            raise
        return
    assert packets
    assert len({len(packet) for packet in packets[:-1]}) <= 1
    size = struct.unpack("=HHHHH", header)[2]
    if header[1] & 0x7F and len(packets) > 1:
        assert len(packets[0]) >= len(packets[-1]) > len(packets[0]) - size
