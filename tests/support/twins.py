"""Slow twins of the offload helpers, written from the RFCs and nothing else, for the property tests.

Not for speed and not for use outside of tests: whole packets are taken apart and built again each time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

TCP, UDP = 6, 17
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))

NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 3, 4, 5, 0x80


def ones_sum(data: bytes, initial: int = 0) -> int:
    """RFC 1071: the one's-complement sum of 16-bit words, odd data padded with a zero byte."""
    if len(data) % 2:
        data += b"\0"
    total = initial
    for (word,) in struct.iter_unpack("!H", data):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def inverted_sum(data: bytes) -> int:
    return ~ones_sum(data) & 0xFFFF


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """RFC 9293 §3.1 for 4-byte addresses, RFC 8200 §8.1 for 16-byte ones."""
    form = "!BBH" if len(source) == 4 else "!I3xB"
    tail = struct.pack(form, 0, protocol, length) if len(source) == 4 else struct.pack(form, length, protocol)
    return source + destination + tail


@dataclass(frozen=True)
class Packet:
    """One IP packet with a TCP or UDP header. `None` in a length or checksum: as it should be."""

    version: int = 4
    protocol: int = TCP
    source: bytes = b"\x0a\x07\x00\x01"
    destination: bytes = b"\x0a\x07\x00\x02"
    traffic_class: int = 0
    flow_label: int = 0
    identification: int = 0
    fragment: int = 0x4000  # flags and offset; 0x4000 is DF
    hop_limit: int = 64
    ip_options: bytes = b""
    extensions: tuple[tuple[int, bytes], ...] = ()  # (type, header bytes from the length byte on)
    source_port: int = 40000
    destination_port: int = 5201
    sequence: int = 0
    acknowledgement: int = 0
    reserved: int = 0  # the four bits behind TCP's data offset
    flags: int = ACK
    window: int = 512
    urgent: int = 0
    options: bytes = b""
    payload: bytes = field(default=b"", repr=False)
    ip_checksum: int | None = None
    checksum: int | None = None
    total_length: int | None = None
    udp_length: int | None = None
    pseudo_destination: bytes | None = None  # behind a routing header

    @property
    def header_length(self) -> int:
        ip = 20 + len(self.ip_options) if self.version == 4 else 40 + sum(1 + len(body) for _, body in self.extensions)
        return ip + (20 + len(self.options) if self.protocol == TCP else 8)

    @property
    def transport_offset(self) -> int:
        return self.header_length - (20 + len(self.options) if self.protocol == TCP else 8)

    def transport(self, checksum: int) -> bytes:
        if self.protocol == TCP:
            offset = (20 + len(self.options)) // 4
            return (
                struct.pack(
                    "!HHIIBBHHH",
                    self.source_port,
                    self.destination_port,
                    self.sequence & 0xFFFFFFFF,
                    self.acknowledgement,
                    offset << 4 | self.reserved,
                    self.flags,
                    self.window,
                    checksum,
                    self.urgent,
                )
                + self.options
                + self.payload
            )
        length = 8 + len(self.payload) if self.udp_length is None else self.udp_length
        return struct.pack("!HHHH", self.source_port, self.destination_port, length, checksum) + self.payload

    def pseudo(self) -> bytes:
        return pseudo_header(
            self.source, self.pseudo_destination or self.destination, self.protocol, len(self.transport(0))
        )

    def build(self) -> bytes:
        checksum = self.checksum
        if checksum is None:
            checksum = inverted_sum(self.pseudo() + self.transport(0))
            if self.protocol == UDP and checksum == 0:
                checksum = 0xFFFF
        transport = self.transport(checksum)
        if self.version == 4:
            length = 20 + len(self.ip_options) + len(transport) if self.total_length is None else self.total_length

            def header(ip_checksum: int) -> bytes:
                return (
                    struct.pack(
                        "!BBHHHBBH4s4s",
                        0x40 | (5 + len(self.ip_options) // 4),
                        self.traffic_class,
                        length & 0xFFFF,
                        self.identification & 0xFFFF,
                        self.fragment,
                        self.hop_limit,
                        self.protocol,
                        ip_checksum,
                        self.source,
                        self.destination,
                    )
                    + self.ip_options
                )

            return header(inverted_sum(header(0)) if self.ip_checksum is None else self.ip_checksum) + transport
        chain = b""
        following = self.protocol
        for kind, body in reversed(self.extensions):
            chain = bytes([following]) + body + chain
            following = kind
        length = len(chain + transport) if self.total_length is None else self.total_length
        return (
            struct.pack(
                "!IHBB16s16s",
                6 << 28 | self.traffic_class << 20 | self.flow_label,
                length & 0xFFFF,
                following,
                self.hop_limit,
                self.source,
                self.destination,
            )
            + chain
            + transport
        )

    def with_partial_checksum(self) -> Packet:
        """As the kernel hands it to a device that checksums: the field holds the pseudo-header's sum."""
        return replace(self, checksum=ones_sum(self.pseudo()))


def parse(data: bytes) -> Packet:
    """A whole TCP or UDP packet without extension headers, taken apart; ValueError otherwise."""
    version = data[0] >> 4
    if version == 4:
        ihl = (data[0] & 15) * 4
        (
            _,
            traffic_class,
            total,
            identification,
            fragment,
            ttl,
            protocol,
            ip_checksum,
            source,
            destination,
        ) = struct.unpack("!BBHHHBBH4s4s", data[:20])
        fields = {
            "version": 4,
            "traffic_class": traffic_class,
            "identification": identification,
            "fragment": fragment,
            "hop_limit": ttl,
            "ip_checksum": ip_checksum,
            "ip_options": data[20:ihl],
        }
        if total != len(data) or ihl < 20:
            raise ValueError("length")
        rest = data[ihl:]
    elif version == 6:
        word, length, protocol, hop_limit, source, destination = struct.unpack("!IHBB16s16s", data[:40])
        fields = {
            "version": 6,
            "traffic_class": word >> 20 & 0xFF,
            "flow_label": word & 0xFFFFF,
            "hop_limit": hop_limit,
        }
        if length != len(data) - 40:
            raise ValueError("length")
        rest = data[40:]
    else:
        raise ValueError("version")
    fields |= {"source": source, "destination": destination, "protocol": protocol}
    if protocol == TCP:
        (
            source_port,
            destination_port,
            sequence,
            acknowledgement,
            offset,
            flags,
            window,
            checksum,
            urgent,
        ) = struct.unpack("!HHIIBBHHH", rest[:20])
        header = (offset >> 4) * 4
        if header < 20 or header > len(rest):
            raise ValueError("data offset")
        return Packet(
            **fields,
            source_port=source_port,
            destination_port=destination_port,
            sequence=sequence,
            acknowledgement=acknowledgement,
            reserved=offset & 15,
            flags=flags,
            window=window,
            urgent=urgent,
            checksum=checksum,
            options=rest[20:header],
            payload=rest[header:],
        )
    if protocol == UDP:
        source_port, destination_port, length, checksum = struct.unpack("!HHHH", rest[:8])
        return Packet(
            **fields,
            source_port=source_port,
            destination_port=destination_port,
            udp_length=length,
            checksum=checksum,
            payload=rest[8:],
        )
    raise ValueError("protocol")


def checksums_hold(data: bytes) -> bool:
    """Both checksums of a packet that `parse` takes."""
    packet = parse(data)
    if packet.version == 4 and ones_sum(data[: 20 + len(packet.ip_options)]) != 0xFFFF:
        return False
    assert packet.checksum is not None
    return ones_sum(packet.pseudo() + packet.transport(packet.checksum)) == 0xFFFF


def vnet(
    flags: int = 0,
    gso_type: int = 0,
    hdr_len: int = 0,
    gso_size: int = 0,
    csum_start: int = 0,
    csum_offset: int = 0,
) -> bytes:
    return struct.pack("=BBHHHH", flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)


def segment(frame: Packet, gso_size: int) -> list[Packet]:
    """What a device with segmentation offload puts on the wire for `frame`."""
    payloads = [frame.payload[at : at + gso_size] for at in range(0, len(frame.payload), gso_size)] or [b""]
    packets = []
    for index, payload in enumerate(payloads):
        flags = frame.flags
        if index < len(payloads) - 1:
            flags &= ~(FIN | PSH)
        if index > 0:
            flags &= ~CWR
        packets.append(
            replace(
                frame,
                payload=payload,
                flags=flags,
                sequence=frame.sequence + index * gso_size,
                identification=frame.identification + index,
                checksum=None,
                ip_checksum=None,
                total_length=None,
                udp_length=None,
            )
        )
    return packets


def split(header: bytes, frame: bytes) -> list[bytes]:
    """The packets of a frame as a coalescer wrote it; checks that its vnet header says what it should."""
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset = struct.unpack("=BBHHHH", header)
    if gso_type == GSO_NONE:
        assert flags in (0, DATA_VALID)
        assert (hdr_len, gso_size, csum_start, csum_offset) == (0, 0, 0, 0)
        return [frame]
    whole = parse(frame)
    assert gso_type == {(4, TCP): GSO_TCPV4, (6, TCP): GSO_TCPV6}.get((whole.version, whole.protocol), GSO_UDP_L4)
    assert flags == NEEDS_CSUM
    assert hdr_len == whole.header_length
    assert csum_start == whole.transport_offset
    assert csum_offset == (16 if whole.protocol == TCP else 6)
    assert len(whole.payload) > gso_size > 0
    assert whole.checksum == ones_sum(whole.pseudo())
    assert len(frame) <= 65535
    if whole.version == 4:
        assert inverted_sum(frame[:20]) == 0
    if whole.protocol == UDP:
        assert whole.udp_length == len(whole.payload) + 8
        assert len(whole.payload) <= 64 * gso_size
    return [packet.build() for packet in segment(whole, gso_size)]


def may_join(data: bytes, join_udp: bool) -> bool:
    """May this packet share a frame with others at all?"""
    try:
        packet = parse(data)
    except (ValueError, struct.error):
        return False
    if packet.ip_options or packet.fragment & 0x3FFF or not packet.payload:
        return False
    if packet.protocol == TCP:
        if packet.flags & ~(PSH | FIN | ECE) != ACK:
            return False
    elif not join_udp or packet.checksum == 0 or packet.udp_length != len(packet.payload) + 8:
        return False
    return checksums_hold(data) and build_again(packet) == data


def build_again(packet: Packet) -> bytes:
    return replace(packet, checksum=None, ip_checksum=None).build()


def flow_of(data: bytes) -> tuple[object, ...] | None:
    """The flow's key; None where no TCP or UDP flow can be told."""
    try:
        packet = parse(data)
    except (ValueError, struct.error):
        return None
    if packet.ip_options or packet.fragment & 0x3FFF:
        return None
    return (packet.protocol, packet.source, packet.destination, packet.source_port, packet.destination_port)


def addresses_of(data: bytes) -> bytes:
    return data[12:20] if data[0] >> 4 == 4 else data[8:40]


def may_belong_to_any_flow(data: bytes) -> bool:
    """A packet without a key: may it still be TCP or UDP between its two addresses (a fragment, say)?"""
    return data[9] in (TCP, UDP) if data[0] >> 4 == 4 else data[6] != 58


def unite(parts: list[bytes]) -> Packet:
    """The frame that holds all of `parts`, if it is one."""
    packets = [parse(part) for part in parts]
    return replace(
        packets[0],
        payload=b"".join(packet.payload for packet in packets),
        flags=packets[0].flags | packets[-1].flags & (PSH | FIN),
    )


def is_frame(parts: list[bytes]) -> bool:
    """The rule that all others follow from: does segmenting the united frame give back just these packets?"""
    if len({flow_of(part) for part in parts}) > 1:
        return False
    whole = unite(parts)
    if whole.header_length + len(whole.payload) > 65535 or (whole.protocol == UDP and len(parts) > 64):
        return False
    return [packet.build() for packet in segment(whole, len(parse(parts[0]).payload))] == parts


def join(packets: list[bytes], join_udp: bool) -> list[list[bytes]]:
    """The packets of each frame, in order, with room for any number of open flows."""
    frames: list[list[bytes]] = []
    open_frames: dict[object, list[bytes]] = {}
    for packet in packets:
        key = flow_of(packet)
        frame = open_frames.pop(key, None) if key else None
        if key is None and may_belong_to_any_flow(packet):
            open_frames = {k: f for k, f in open_frames.items() if addresses_of(f[0]) != addresses_of(packet)}
        joins = may_join(packet, join_udp)
        if joins and frame is not None and is_frame([*frame, packet]):
            frame.append(packet)
        else:
            frame = [packet]
            frames.append(frame)
        if joins:
            open_frames[key] = frame
    return frames
