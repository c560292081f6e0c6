"""Inbound: neighbouring packets of one TCP or UDP flow become one frame for the TUN device.

The packet's way: classify (`_classify_packet`) → find its flow's open frame → join it, or close that frame
and open a new one, or pass alone → at the burst's end `coalescer_finish` patches the headers of joined
frames and lays out their iovecs. Payloads are never copied. Not for deciding whether a packet may enter:
what goes in comes out, in the order of each flow, also when it is malformed.

A joined frame tells the kernel that its checksums hold, hence both are verified before a packet joins. And
it must be one that segmentation turns back into the very packets that went in, bit for bit; that decides
every rule below. What cannot be told from the flow's own packets passes alone, unmodified, with an empty
vnet header, and the kernel judges it.

Sources: net/ipv4/tcp_offload.c (tcp_gro_receive), net/ipv4/udp_offload.c, net/ipv4/af_inet.c
(inet_gro_receive), include/linux/virtio_net.h for what a TUN device accepts.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

from fasttun._native.checksum cimport (
    ft_fold, ft_load16, ft_load32, ft_load64, ft_load_be16, ft_load_be32, ft_pseudo_v4, ft_pseudo_v6,
    ft_store16, ft_store_be16, ft_sum,
)
from fasttun._native.system cimport iovec
from fasttun._native.vnet cimport (
    PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP, TCP_ACK, TCP_ECE, TCP_FIN, TCP_PSH,
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4, VNET_HEADER_LENGTH, vnet_header_t,
)


cdef enum:
    COALESCE_FULL = -1

    # One burst. A coalescer_t is 52 KiB, of which a burst touches what it fills.
    COALESCE_MAX_PACKETS = 512
    # A frame has one iovec for the vnet header and one for each packet.
    COALESCE_MAX_IOVECS = 1024
    # Frames that can still grow, found by hash in sets of two. A third flow of a set closes the older frame:
    # a flood of flows costs joins, never time.
    COALESCE_FLOW_SLOTS = 64
    # UDP_MAX_SEGMENTS of kernels before 6.7; a TUN device refuses frames with more.
    COALESCE_MAX_UDP_SEGMENTS = 64
    COALESCE_MAX_LENGTH = 65535
    COALESCE_NONE = 0xffff

    # How a packet bears on its flow (`parsed_packet_t.kind`).
    COALESCE_FOREIGN = 0   # belongs to no TCP or UDP flow
    COALESCE_PAIR = 1      # may belong to any flow between its two addresses: fragments, options, odd lengths
    COALESCE_ALONE = 2     # of a known flow, but must pass alone
    COALESCE_JOINABLE = 3

    COALESCE_ID_UNKNOWN = 0
    COALESCE_ID_COUNTS = 1
    COALESCE_ID_FIXED = 2


cdef struct coalesced_packet_t:
    uint8_t *data
    uint16_t length
    uint16_t payload_offset
    uint16_t next             # index of the frame's next packet, or COALESCE_NONE


cdef struct coalesced_frame_t:
    # For the writer, valid after coalescer_finish: writev(fd, iov, iov_count) writes
    # VNET_HEADER_LENGTH + length bytes.
    iovec *iov
    uint32_t iov_count
    uint32_t length           # bytes from the IP header on
    uint32_t packets          # that it was made of
    uint32_t packet_bytes     # sum of their lengths
    # For the coalescer.
    uint32_t next_sequence
    uint16_t next_identification
    uint16_t first            # packet indices
    uint16_t last
    uint16_t segment_length   # payload of the first packet
    uint16_t l4_offset
    vnet_header_t vnet
    uint8_t version
    uint8_t protocol
    uint8_t last_flags        # TCP flags of the last packet
    uint8_t identification    # COALESCE_ID_


cdef struct coalescer_t:
    coalesced_frame_t frames[COALESCE_MAX_PACKETS]   # in the order of their first packets
    uint32_t frame_count
    uint32_t packet_count
    uint32_t iov_count
    bint join_tcp
    bint join_udp
    # Also joins packets with DF whose IPv4 ID stays the same (some senders, RFC 6864 §4.1). Segmentation then
    # numbers them upwards: the one change that is not bit for bit, and one that receivers must ignore.
    bint join_fixed_ids
    uint16_t slots[COALESCE_FLOW_SLOTS]              # open frames by flow, or COALESCE_NONE
    coalesced_packet_t packets[COALESCE_MAX_PACKETS]
    iovec iovecs[COALESCE_MAX_IOVECS]


cdef struct parsed_packet_t:
    uint8_t kind
    uint8_t version
    uint8_t protocol
    uint8_t flags             # TCP's
    uint16_t l4_offset
    uint16_t payload_offset
    uint16_t payload_length


cdef inline void coalescer_init(
    coalescer_t *c, bint join_tcp, bint join_udp, bint join_fixed_ids
) noexcept nogil:
    """join_udp: only where TUNSETOFFLOAD took TUN_F_USO4 and TUN_F_USO6. Both off: all packets pass alone."""
    c.join_tcp = join_tcp
    c.join_udp = join_udp
    c.join_fixed_ids = join_fixed_ids
    coalescer_reset(c)


cdef inline void coalescer_reset(coalescer_t *c) noexcept nogil:
    """Forgets the last burst; its packets' memory may be reused from here on."""
    c.frame_count = 0
    c.packet_count = 0
    c.iov_count = 0
    memset(c.slots, 0xff, sizeof(c.slots))


cdef inline bint _transport_checksum_holds(
    const uint8_t *packet, size_t length, const parsed_packet_t *parsed
) noexcept nogil:
    cdef uint16_t l4_length = <uint16_t>(length - parsed.l4_offset)
    cdef uint64_t sum
    if parsed.version == 4:
        sum = ft_pseudo_v4(packet + 12, parsed.protocol, l4_length)
    else:
        sum = ft_pseudo_v6(packet + 8, parsed.protocol, l4_length)
    return ft_fold(ft_sum(packet + parsed.l4_offset, l4_length, sum)) == 0xffff


cdef inline void _classify_packet(
    const coalescer_t *c, const uint8_t *packet, size_t length, parsed_packet_t *parsed
) noexcept nogil:
    """Fills `parsed`; what does not apply to its kind is 0 (COALESCE_FOREIGN is)."""
    cdef size_t l4, header
    cdef const uint8_t *transport
    memset(parsed, 0, sizeof(parsed_packet_t))
    if length < 28:
        return
    if packet[0] >> 4 == 4:
        parsed.version = 4
        parsed.protocol = packet[9]
        if parsed.protocol != PROTOCOL_TCP and parsed.protocol != PROTOCOL_UDP:
            return
        if packet[0] != 0x45 or ft_load_be16(packet + 6) & 0x3fff or ft_load_be16(packet + 2) != length:
            parsed.kind = COALESCE_PAIR
            return
        l4 = 20
    elif packet[0] >> 4 == 6:
        if length < 48:
            return
        parsed.version = 6
        parsed.protocol = packet[6]
        if parsed.protocol != PROTOCOL_TCP and parsed.protocol != PROTOCOL_UDP:
            if parsed.protocol != PROTOCOL_ICMPV6:
                parsed.kind = COALESCE_PAIR
            return
        if <size_t>ft_load_be16(packet + 4) + 40 != length:
            parsed.kind = COALESCE_PAIR
            return
        l4 = 40
    else:
        return
    transport = packet + l4
    parsed.l4_offset = <uint16_t>l4
    if parsed.protocol == PROTOCOL_TCP:
        if length < l4 + 20:
            return
        header = l4 + (transport[12] >> 4) * 4
        if header < l4 + 20 or header > length:
            return
        parsed.flags = transport[13]
        parsed.kind = COALESCE_ALONE
        if not c.join_tcp or (parsed.flags & <uint8_t>~(TCP_PSH | TCP_FIN | TCP_ECE)) != TCP_ACK:
            return
        # 0xffff is a valid checksum that no sender computes and that segmentation would give back as 0.
        if ft_load16(transport + 16) == 0xffff:
            return
    else:
        header = l4 + 8
        parsed.kind = COALESCE_ALONE
        if not c.join_udp or ft_load_be16(transport + 4) != length - l4 or ft_load16(transport + 6) == 0:
            return
    parsed.payload_offset = <uint16_t>header
    parsed.payload_length = <uint16_t>(length - header)
    if parsed.payload_length == 0:
        return
    if parsed.version == 4:
        if ft_load16(packet + 10) == 0xffff or ft_fold(ft_sum(packet, 20, 0)) != 0xffff:
            return
    if _transport_checksum_holds(packet, length, parsed):
        parsed.kind = COALESCE_JOINABLE


cdef inline uint32_t _flow_slot(const uint8_t *packet, const parsed_packet_t *parsed) noexcept nogil:
    """First slot of the flow's set of two (the other is the slot with the last bit flipped)."""
    cdef uint64_t mix
    if parsed.version == 4:
        mix = ft_load64(packet + 12)
    else:
        mix = ft_load64(packet + 8) ^ ft_load64(packet + 16) * 3 ^ ft_load64(packet + 24) * 5 \
            ^ ft_load64(packet + 32) * 7
    mix = (mix ^ (<uint64_t>ft_load32(packet + parsed.l4_offset) << 16) ^ parsed.protocol) \
        * <uint64_t>0x9e3779b97f4a7c15
    return <uint32_t>(mix >> 32) % COALESCE_FLOW_SLOTS


cdef inline bint _same_flow(
    const coalescer_t *c, const coalesced_frame_t *frame, const uint8_t *packet, const parsed_packet_t *parsed
) noexcept nogil:
    cdef const uint8_t *first = c.packets[frame.first].data
    if frame.version != parsed.version or frame.protocol != parsed.protocol:
        return False
    if ft_load32(first + parsed.l4_offset) != ft_load32(packet + parsed.l4_offset):
        return False
    if parsed.version == 4:
        return ft_load64(first + 12) == ft_load64(packet + 12)
    return memcmp(first + 8, packet + 8, 32) == 0


cdef inline bint _can_join(
    const coalescer_t *c, coalesced_frame_t *frame, const uint8_t *packet, const parsed_packet_t *parsed
) noexcept nogil:
    """Of one flow, joinable both: would segmentation give this packet back as the frame's next one?

    Sets how the frame's IPv4 IDs run when it says yes to the second packet.
    """
    cdef const uint8_t *first = c.packets[frame.first].data
    cdef const uint8_t *a = first + parsed.l4_offset
    cdef const uint8_t *b = packet + parsed.l4_offset
    cdef size_t options
    cdef uint16_t identification
    if parsed.payload_length > frame.segment_length:
        return False
    if frame.length + parsed.payload_length > COALESCE_MAX_LENGTH:
        return False
    if parsed.protocol == PROTOCOL_TCP:
        if ft_load_be32(b + 4) != frame.next_sequence or ft_load32(a + 8) != ft_load32(b + 8):
            return False
        # Header length and reserved bits | flags | window | urgent pointer | options.
        if a[12] != b[12] or (a[13] ^ b[13]) & <uint8_t>~(TCP_PSH | TCP_FIN):
            return False
        if ft_load16(a + 14) != ft_load16(b + 14) or ft_load16(a + 18) != ft_load16(b + 18):
            return False
        options = parsed.payload_offset - parsed.l4_offset - 20
        if options and memcmp(a + 20, b + 20, options) != 0:
            return False
    if parsed.version == 6:
        # Version, traffic class, flow label | next header, hop limit.
        return ft_load32(first) == ft_load32(packet) and ft_load16(first + 6) == ft_load16(packet + 6)
    # Version, header length, TOS | DF and the reserved bit | TTL, protocol.
    if ft_load16(first) != ft_load16(packet) or ft_load16(first + 6) != ft_load16(packet + 6):
        return False
    if ft_load16(first + 8) != ft_load16(packet + 8):
        return False
    identification = ft_load_be16(packet + 4)
    if frame.identification != COALESCE_ID_FIXED and identification == frame.next_identification:
        frame.identification = COALESCE_ID_COUNTS
        return True
    if not c.join_fixed_ids or frame.identification == COALESCE_ID_COUNTS or not first[6] & 0x40:
        return False
    if identification != ft_load_be16(first + 4):
        return False
    frame.identification = COALESCE_ID_FIXED
    return True


cdef inline void _close_pair(coalescer_t *c, const uint8_t *packet) noexcept nogil:
    """Closes the frames between the packet's two addresses (20 or 40 bytes are there)."""
    cdef int slot
    cdef coalesced_frame_t *frame
    cdef const uint8_t *first
    cdef uint8_t version = packet[0] >> 4
    for slot in range(COALESCE_FLOW_SLOTS):
        if c.slots[slot] == COALESCE_NONE:
            continue
        frame = &c.frames[c.slots[slot]]
        first = c.packets[frame.first].data
        if frame.version != version:
            continue
        if version == 4:
            if ft_load64(first + 12) != ft_load64(packet + 12):
                continue
        elif memcmp(first + 8, packet + 8, 32) != 0:
            continue
        c.slots[slot] = COALESCE_NONE


cdef inline int coalescer_add(coalescer_t *c, uint8_t *packet, uint16_t length) noexcept nogil:
    """Takes one packet: 0, or COALESCE_FULL when the burst has COALESCE_MAX_PACKETS (nothing taken).

    packet: must stay where it is until the burst is written, and is the coalescer's to change (headers only).
    """
    cdef parsed_packet_t parsed
    cdef coalesced_packet_t *entry
    cdef coalesced_frame_t *frame
    cdef uint32_t index = c.packet_count
    cdef uint32_t slot = COALESCE_NONE, home = 0, other = 0
    if index == COALESCE_MAX_PACKETS:
        return COALESCE_FULL
    _classify_packet(c, packet, length, &parsed)
    c.packet_count += 1
    entry = &c.packets[index]
    entry.data = packet
    entry.length = length
    entry.payload_offset = parsed.payload_offset
    entry.next = COALESCE_NONE

    if parsed.kind == COALESCE_PAIR:
        _close_pair(c, packet)
    elif parsed.kind >= COALESCE_ALONE:
        home = _flow_slot(packet, &parsed)
        other = home ^ 1
        if c.slots[home] != COALESCE_NONE and _same_flow(c, &c.frames[c.slots[home]], packet, &parsed):
            slot = home
        elif c.slots[other] != COALESCE_NONE and _same_flow(c, &c.frames[c.slots[other]], packet, &parsed):
            slot = other
        if slot != COALESCE_NONE:
            frame = &c.frames[c.slots[slot]]
            if parsed.kind == COALESCE_JOINABLE and _can_join(c, frame, packet, &parsed):
                c.packets[frame.last].next = <uint16_t>index
                frame.last = <uint16_t>index
                frame.last_flags = parsed.flags
                frame.packets += 1
                frame.packet_bytes += length
                frame.length += parsed.payload_length
                frame.next_sequence += parsed.payload_length
                frame.next_identification += 1
                if (
                    parsed.payload_length < frame.segment_length
                    or parsed.flags & (TCP_PSH | TCP_FIN)
                    or (parsed.protocol == PROTOCOL_UDP and frame.packets == COALESCE_MAX_UDP_SEGMENTS)
                ):
                    c.slots[slot] = COALESCE_NONE
                return 0
            c.slots[slot] = COALESCE_NONE

    frame = &c.frames[c.frame_count]
    frame.length = length
    frame.packets = 1
    frame.packet_bytes = length
    frame.first = <uint16_t>index
    frame.last = <uint16_t>index
    memset(&frame.vnet, 0, VNET_HEADER_LENGTH)
    if parsed.kind == COALESCE_JOINABLE:
        frame.vnet.flags = VIRTIO_NET_HDR_F_DATA_VALID
        frame.version = parsed.version
        frame.protocol = parsed.protocol
        frame.last_flags = parsed.flags
        frame.l4_offset = parsed.l4_offset
        frame.segment_length = parsed.payload_length
        frame.identification = COALESCE_ID_UNKNOWN
        if parsed.version == 4:
            frame.next_identification = ft_load_be16(packet + 4) + 1
        if parsed.protocol == PROTOCOL_TCP:
            frame.next_sequence = ft_load_be32(packet + parsed.l4_offset + 4) + parsed.payload_length
        if not parsed.flags & (TCP_PSH | TCP_FIN):
            if slot == COALESCE_NONE:
                if c.slots[home] == COALESCE_NONE:
                    slot = home
                elif c.slots[other] == COALESCE_NONE or c.slots[other] < c.slots[home]:
                    slot = other
                else:
                    slot = home
            c.slots[slot] = <uint16_t>c.frame_count
    c.frame_count += 1
    return 0


cdef inline void _patch_headers(
    coalesced_frame_t *frame, uint8_t *packet, uint16_t header_length
) noexcept nogil:
    """Makes the first packet's headers, and the vnet header, those of the whole frame."""
    cdef uint16_t l4_length = <uint16_t>(frame.length - frame.l4_offset)
    cdef uint8_t *transport = packet + frame.l4_offset
    cdef uint64_t pseudo
    cdef uint16_t checksum
    frame.vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    frame.vnet.hdr_len = header_length
    frame.vnet.gso_size = frame.segment_length
    frame.vnet.csum_start = frame.l4_offset
    if frame.version == 4:
        ft_store_be16(packet + 2, <uint16_t>frame.length)
        ft_store16(packet + 10, 0)
        checksum = ~ft_fold(ft_sum(packet, 20, 0))
        ft_store16(packet + 10, checksum)
        pseudo = ft_pseudo_v4(packet + 12, frame.protocol, l4_length)
    else:
        ft_store_be16(packet + 4, l4_length)
        pseudo = ft_pseudo_v6(packet + 8, frame.protocol, l4_length)
    if frame.protocol == PROTOCOL_TCP:
        if frame.version == 4:
            frame.vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4
        else:
            frame.vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV6
        frame.vnet.csum_offset = 16
        transport[13] |= frame.last_flags & (TCP_PSH | TCP_FIN)
        ft_store16(transport + 16, ft_fold(pseudo))
    else:
        frame.vnet.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4
        frame.vnet.csum_offset = 6
        ft_store_be16(transport + 4, l4_length)
        ft_store16(transport + 6, ft_fold(pseudo))


cdef inline uint32_t coalescer_finish(coalescer_t *c) noexcept nogil:
    """Ends the burst: the number of frames, each ready to be written. Once a burst; then coalescer_reset."""
    cdef uint32_t i
    cdef uint16_t index
    cdef coalesced_frame_t *frame
    cdef coalesced_packet_t *entry
    cdef iovec *iov = c.iovecs
    for i in range(c.frame_count):
        frame = &c.frames[i]
        entry = &c.packets[frame.first]
        if frame.packets > 1:
            _patch_headers(frame, entry.data, entry.payload_offset)
        frame.iov = iov
        iov.iov_base = &frame.vnet
        iov.iov_len = VNET_HEADER_LENGTH
        iov += 1
        iov.iov_base = entry.data
        iov.iov_len = entry.length
        index = entry.next
        while index != COALESCE_NONE:
            entry = &c.packets[index]
            iov += 1
            iov.iov_base = entry.data + entry.payload_offset
            iov.iov_len = entry.length - entry.payload_offset
            index = entry.next
        iov += 1
        frame.iov_count = <uint32_t>(iov - frame.iov)
    c.iov_count = <uint32_t>(iov - c.iovecs)
    return c.frame_count
