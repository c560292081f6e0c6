"""Joining inbound packets: what segmentation makes of the joined frames is what went in, bit for bit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet import TCP as ScapyTCP
from scapy.layers.inet import UDP as ScapyUDP
from scapy.layers.inet6 import IPv6
from support import flows, twins
from support.twins import ACK, CWR, DATA_VALID, ECE, FIN, PSH, TCP, UDP, Packet

from fasttun import _testing


def taken_apart(packets: list[bytes], **keywords: bool) -> list[list[bytes]]:
    """The packets of each frame, as the twin's segmentation and fasttun's own see them."""
    frames = []
    for header, frame in _testing.join(packets, **keywords):
        parts = twins.split(header, frame)
        assert not frame or _testing.split(header, frame) == parts
        frames.append(parts)
    return frames


def stream(count: int, size: int, head: Packet | None = None, seed: int = 1) -> list[Packet]:
    """`count` packets that follow one another, all joinable."""
    packet = head or Packet()
    packets = []
    for index in range(count):
        packets.append(replace(packet, payload=flows.contents(size, seed + index)))
        packet = replace(packet, sequence=packet.sequence + size, identification=packet.identification + 1)
    return packets


def built(packets: list[Packet]) -> list[bytes]:
    return [packet.build() for packet in packets]


@settings(max_examples=500)
@given(flows.bursts(max_flows=2), st.booleans())
def test_frames_are_the_twins(packets: list[bytes], join_udp: bool) -> None:
    assert taken_apart(packets, join_udp=join_udp) == twins.join(packets, join_udp)


@settings(max_examples=100)
@given(flows.bursts(max_flows=2, max_packets=40, wild=False))
def test_clean_flows_join_as_the_twins(packets: list[bytes]) -> None:
    assert taken_apart(packets) == twins.join(packets, True)


def check_identity(packets: list[bytes], frames: list[list[bytes]]) -> None:
    """Every packet comes out, once; each flow in order; frames in the order of their first packets."""
    assert sorted(part for frame in frames for part in frame) == sorted(packets)

    def by_flow(sequence: list[bytes]) -> dict[object, list[bytes]]:
        result: dict[object, list[bytes]] = {}
        for packet in sequence:
            result.setdefault(twins.flow_of(packet) if len(packet) >= 28 else None, []).append(packet)
        return result

    assert by_flow([part for frame in frames for part in frame]) == by_flow(packets)


@settings(max_examples=150)
@given(flows.bursts(max_flows=9, max_packets=12))
def test_many_flows_keep_their_order(packets: list[bytes]) -> None:
    check_identity(packets, taken_apart(packets))


def test_more_flows_than_the_table_holds() -> None:
    heads = [
        Packet(source_port=port, version=version, source=source, destination=destination)
        for port in range(40000, 40080)
        for version, (source, destination) in ((4, flows.V4), (6, flows.V6))
    ]
    iterators = [iter(built(stream(3, 20, head))) for head in heads]
    turns = [index for index in range(len(heads)) for _ in range(3)]
    random.Random(7).shuffle(turns)
    packets = [next(iterators[index]) for index in turns]
    frames = taken_apart(packets)
    check_identity(packets, frames)
    assert len(frames) < len(packets)
    firsts = [packets.index(frame[0]) for frame in frames]
    assert firsts == sorted(firsts)


@settings(max_examples=300)
@given(st.data())
def test_no_input_goes_out_of_bounds(data: st.DataObject) -> None:
    """Random bytes, and real packets with a few bytes changed or cut; a sanitizer build sees the bounds."""
    packets = data.draw(
        st.one_of(
            flows.bursts(max_flows=3, max_packets=6),
            st.lists(st.binary(max_size=120), max_size=12),
            st.lists(
                st.builds(lambda v, b: bytes([v]) + b, st.sampled_from([0x45, 0x46, 0x60]), st.binary(max_size=120)),
                max_size=12,
            ),
        )
    )
    packets = list(packets)
    for _ in range(data.draw(st.integers(0, 4)) if packets else 0):
        index = data.draw(st.integers(0, len(packets) - 1))
        packet = bytearray(packets[index])
        if packet:
            packet[data.draw(st.integers(0, min(len(packet), 70) - 1))] = data.draw(st.integers(0, 255))
        packets[index] = bytes(packet[: data.draw(st.integers(0, 80))]) if data.draw(st.booleans()) else bytes(packet)
    frames = taken_apart(packets)
    assert sorted(part for frame in frames for part in frame) == sorted(packets)


@settings(max_examples=40)
@given(flows.bursts(max_flows=2, max_packets=6, wild=False))
def test_scapy_sees_frames_with_right_headers(packets: list[bytes]) -> None:
    for header, frame in _testing.join(packets):
        if header[1] == 0:
            continue
        version = frame[0] >> 4
        parsed = IP(frame) if version == 4 else IPv6(frame)
        kind = ScapyTCP if header[1] in (twins.GSO_TCPV4, twins.GSO_TCPV6) else ScapyUDP
        assert kind in parsed
        if version == 4:
            assert parsed.len == len(frame)
            found, parsed.chksum = parsed.chksum, None
            assert IP(bytes(parsed)).chksum == found
        else:
            assert parsed.plen == len(frame) - 40
        if kind is ScapyUDP:
            assert parsed[kind].len == len(frame) - (20 if version == 4 else 40)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_stream_is_one_frame(version: int, protocol: int) -> None:
    source, destination = flows.V4 if version == 4 else flows.V6
    packets = built(
        stream(
            40,
            1380,
            Packet(
                version=version,
                protocol=protocol,
                source=source,
                destination=destination,
                sequence=2**32 - 5000,
                identification=65530,
            ),
        )
    )
    ((header, frame),) = _testing.join(packets)
    assert twins.split(header, frame) == packets


@pytest.mark.parametrize("index", [0, 3, 7])
@pytest.mark.parametrize("flags", [PSH, FIN])
def test_push_ends_a_frame_and_is_on_it(flags: int, index: int) -> None:
    packets = stream(8, 100)
    packets[index] = replace(packets[index], flags=ACK | flags)
    frames = taken_apart(built(packets))
    assert [len(frame) for frame in frames] == [length for length in (index + 1, 7 - index) if length]


@pytest.mark.parametrize("flags", [ACK | CWR, ACK | 0x02, ACK | 0x04, ACK | 0x20, 0])
def test_odd_flags_pass_alone_and_unmodified(flags: int) -> None:
    packets = stream(3, 100)
    packets[1] = replace(packets[1], flags=flags)
    assert _testing.join(built(packets))[1] == (bytes(10), packets[1].build())
    assert [len(frame) for frame in taken_apart(built(packets))] == [1, 1, 1]


def test_congestion_echo_joins_only_its_like() -> None:
    packets = stream(4, 100)
    packets[2:] = [replace(packet, flags=ACK | ECE) for packet in packets[2:]]
    assert [len(frame) for frame in taken_apart(built(packets))] == [2, 2]


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("at", [11, 25, 200])
def test_bad_checksum_passes_alone_for_the_kernel_to_judge(protocol: int, at: int) -> None:
    packets = built(stream(5, 1000, Packet(protocol=protocol)))
    packets[2] = packets[2][:at] + bytes([packets[2][at] ^ 0x40]) + packets[2][at + 1 :]
    frames = _testing.join(packets)
    assert (bytes(10), packets[2]) in frames
    assert [part for header, frame in frames for part in twins.split(header, frame)] == packets


def test_single_verified_packet_is_marked_so() -> None:
    packet = Packet(payload=b"single").build()
    assert _testing.join([packet]) == [(twins.vnet(DATA_VALID), packet)]
    assert _testing.join([packet], join_tcp=False) == [(bytes(10), packet)]


def test_udp_joins_only_when_asked_and_with_checksums() -> None:
    packets = stream(4, 50, Packet(protocol=UDP))
    assert len(_testing.join(built(packets), join_udp=True)) == 1
    assert _testing.join(built(packets), join_udp=False) == [(bytes(10), packet) for packet in built(packets)]
    bare = [replace(packet, checksum=0) for packet in packets]
    assert _testing.join(built(bare)) == [(bytes(10), packet) for packet in built(bare)]


def test_udp_frames_hold_64_packets() -> None:
    frames = taken_apart(built(stream(150, 10, Packet(protocol=UDP))))
    assert [len(frame) for frame in frames] == [64, 64, 22]


@pytest.mark.parametrize("version", [4, 6])
def test_frames_hold_65535_bytes(version: int) -> None:
    source, destination = flows.V4 if version == 4 else flows.V6
    head = Packet(version=version, source=source, destination=destination)
    room = 65535 - head.header_length
    packets = built(stream(50, room // 45, head))
    _, frame = _testing.join(packets)[0]
    assert len(frame) == head.header_length + room // 45 * 45 <= 65535


def test_a_burst_may_be_full() -> None:
    packets = built(stream(_testing.BURST_PACKETS, 1))
    ((header, frame),) = _testing.join(packets)
    assert twins.split(header, frame) == packets
    with pytest.raises(ValueError, match="at most"):
        _testing.join([*packets, packets[0]])


def test_a_fragment_keeps_its_place_in_the_flow() -> None:
    packets = built(stream(4, 100))
    fragment = Packet(fragment=0x2000, payload=b"part", identification=9).build()
    elsewhere = Packet(fragment=0x2000, payload=b"part", source=b"\x0a\x07\x00\x09").build()
    assert [len(frame) for frame in taken_apart([*packets[:2], fragment, *packets[2:]])] == [2, 1, 2]
    assert [len(frame) for frame in taken_apart([*packets[:2], elsewhere, *packets[2:]])] == [4, 1]


def test_constant_ids_join_only_when_asked() -> None:
    packets = [replace(packet, identification=0) for packet in stream(4, 100)]
    assert len(_testing.join(built(packets))) == 4
    ((header, frame),) = _testing.join(built(packets), join_fixed_ids=True)
    assert [
        replace(twins.parse(part), identification=0, ip_checksum=None).build() for part in twins.split(header, frame)
    ] == built(packets)
    counting = built(stream(4, 100))
    assert len(_testing.join(counting, join_fixed_ids=True)) == 1
    mixed = [replace(packet, identification=number) for packet, number in zip(packets, (0, 0, 1, 2), strict=True)]
    assert len(_testing.join(built(mixed), join_fixed_ids=True)) == 2
    without_df = [replace(packet, fragment=0) for packet in packets]
    assert len(_testing.join(built(without_df), join_fixed_ids=True)) == 4


def test_a_coalescer_forgets_the_last_burst() -> None:
    coalescer = _testing.Coalescer()
    packets = built(stream(20, 100))
    shuffled = packets[:]
    random.Random(3).shuffle(shuffled)
    for burst in (packets[:10], packets[10:], shuffled, packets):
        once = _testing.Coalescer().join(burst)
        assert coalescer.join(burst) == once
        assert sum(count for _, _, count in once) == len(burst)


def test_a_checksum_of_ones_that_holds_is_not_joined() -> None:
    """Where the sum is 0, 0xffff holds as 0 does; segmentation could not give it back."""
    packets = stream(3, 100)
    bare = replace(packets[1], payload=packets[1].payload[:-2] + b"\0\0")
    rest = twins.ones_sum(bare.pseudo() + bare.transport(0))
    packets[1] = replace(bare, payload=bare.payload[:-2] + (0xFFFF - rest).to_bytes(2, "big"))
    assert packets[1].build()[36:38] == b"\0\0"
    assert [len(frame) for frame in taken_apart(built(packets))] == [3]
    packets[1] = replace(packets[1], checksum=0xFFFF)
    assert twins.checksums_hold(packets[1].build())
    assert [len(frame) for frame in taken_apart(built(packets))] == [1, 1, 1]


def test_an_ip_checksum_of_ones_that_holds_is_not_joined() -> None:
    numbered = stream(1, 100)[0]
    rest = twins.ones_sum(replace(numbered, identification=0, ip_checksum=0).build()[:20])
    packets = stream(3, 100, Packet(identification=0xFFFF - rest - 1))
    assert packets[1].build()[10:12] == b"\0\0"
    assert [len(frame) for frame in taken_apart(built(packets))] == [3]
    packets[1] = replace(packets[1], ip_checksum=0xFFFF)
    assert twins.checksums_hold(packets[1].build())
    assert [len(frame) for frame in taken_apart(built(packets))] == [1, 1, 1]


def test_udp_without_checksum_is_not_joined_even_where_zero_would_hold() -> None:
    packets = stream(3, 100, Packet(protocol=UDP))
    bare = replace(packets[1], payload=packets[1].payload[:-2] + b"\0\0")
    rest = twins.ones_sum(bare.pseudo() + bare.transport(0))
    packets[1] = replace(bare, payload=bare.payload[:-2] + (0xFFFF - rest).to_bytes(2, "big"))
    assert packets[1].build()[26:28] == b"\xff\xff"
    assert [len(frame) for frame in taken_apart(built(packets))] == [3]
    packets[1] = replace(packets[1], checksum=0)
    assert [len(frame) for frame in taken_apart(built(packets))] == [1, 1, 1]


@pytest.mark.parametrize("part", ["source", "destination"])
@pytest.mark.parametrize("version", [4, 6])
def test_flows_that_share_a_slot_are_told_apart(version: int, part: str) -> None:
    """Packets that would follow one another, but for one address: more flows than slots, so that many collide."""
    source, destination = flows.V4 if version == 4 else flows.V6
    head = Packet(version=version, source=source, destination=destination)
    packets = [
        replace(packet, **{part: getattr(packet, part)[:-2] + index.to_bytes(2, "big")})
        for index, packet in enumerate(stream(500, 20, head))
    ]
    assert [len(frame) for frame in taken_apart(built(packets))] == [1] * 500
    packets = [
        replace(packet, source_port=packet.source_port + index) for index, packet in enumerate(stream(500, 20, head))
    ]
    assert [len(frame) for frame in taken_apart(built(packets))] == [1] * 500
