"""Outbound: one frame read from the TUN device becomes the packets that go on the wire.

The packet's way: parse the headers (bounds before bytes) → sum the parts of the headers that all packets
share, once → per packet: headers copied and patched, payload copied and summed in one pass. Not for sending,
nor for choosing the peer. A frame is what the kernel built, but nothing here trusts it: any input ends in
packets or in a reason code, within `frame[:length]` and `out[:out_size]`.

Sources: net/ipv4/tcp_offload.c and udp_offload.c for what changes from packet to packet;
RFC 8200 §4 for extension headers, RFC 768 for the zero checksum.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fasttun._native.checksum cimport (
    ft_add, ft_be16, ft_be32, ft_copy_sum, ft_fold, ft_load16, ft_load32, ft_load_be16, ft_load_be32,
    ft_pseudo_v4, ft_pseudo_v6, ft_store16, ft_store32, ft_store_be16, ft_sum, ft_without16,
)
from fasttun._native.vnet cimport (
    PROTOCOL_AUTHENTICATION, PROTOCOL_DESTINATION, PROTOCOL_HOP_BY_HOP, PROTOCOL_ROUTING, PROTOCOL_TCP,
    PROTOCOL_UDP, TCP_CWR, TCP_FIN, TCP_PSH, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
    vnet_header_t,
)


cdef enum:
    SEGMENT_BAD_HEADER = -1      # not the IP, TCP or UDP header that gso_type promises, or cut short
    SEGMENT_BAD_CHECKSUM = -2    # csum_start and csum_offset point outside the frame, or not at the header
    SEGMENT_BAD_GSO = -3         # gso_type unknown, or gso_size 0
    SEGMENT_TOO_LONG = -4        # a packet would be longer than max_packet: worth an ICMP "packet too big"
    SEGMENT_NO_ROOM = -5         # out_size is too small, or more than SEGMENT_MAX_PACKETS
    SEGMENT_REASONS = 5

    # Bounds the output of one frame: Linux's smallest TCP payload is 36 bytes (net.ipv4.tcp_min_snd_mss of 48
    # less the timestamps), and 65535 / 36 = 1821; UDP has at most 128 packets a frame.
    SEGMENT_MAX_PACKETS = 2048
    SEGMENT_MAX_FRAME = 65535
    SEGMENT_MAX_EXTENSIONS = 8   # IPv6 extension headers walked before giving up


cdef struct segments_t:
    # Packet i: out + i * stride + head_room, `packet_length` bytes long, the last one `last_length`.
    size_t count
    size_t packet_length
    size_t last_length
    size_t stride


cdef inline size_t segment_out_size(size_t head_room, size_t tail_room) noexcept nogil:
    """Size of `out` that holds the packets of any frame (headers up to 120 bytes)."""
    return SEGMENT_MAX_FRAME + SEGMENT_MAX_PACKETS * (120 + head_room + tail_room)


cdef inline int complete_checksum(const vnet_header_t *vnet, uint8_t *packet, size_t length) noexcept nogil:
    """Finishes, in place, the checksum that the kernel left to the device: 0, or SEGMENT_BAD_CHECKSUM.

    The field holds the pseudo-header's sum, not inverted; the range runs to the packet's end.
    """
    cdef size_t start = vnet.csum_start
    cdef size_t field = start + vnet.csum_offset
    cdef uint16_t checksum
    if not vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        return 0
    if field + 2 > length:
        return SEGMENT_BAD_CHECKSUM
    checksum = ~ft_fold(ft_sum(packet + start, length - start, 0))
    ft_store16(packet + field, finished_checksum(checksum, vnet.csum_offset))
    return 0


cdef inline uint16_t finished_checksum(uint16_t checksum, size_t csum_offset) noexcept nogil:
    """A UDP checksum of 0 means "none", so that it is sent as 0xffff; 6 is UDP's offset, TCP's is 16."""
    return 0xffff if checksum == 0 and csum_offset == 6 else checksum


cdef inline int _copy_single(
    const vnet_header_t *vnet, const uint8_t *frame, size_t length, uint8_t *to
) noexcept nogil:
    cdef size_t start = vnet.csum_start
    cdef size_t field = start + vnet.csum_offset
    cdef uint16_t checksum
    if not vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        memcpy(to, frame, length)
        return 0
    if field + 2 > length:
        return SEGMENT_BAD_CHECKSUM
    memcpy(to, frame, start)
    checksum = ~ft_fold(ft_copy_sum(to + start, frame + start, length - start, 0))
    ft_store16(to + field, finished_checksum(checksum, vnet.csum_offset))
    return 0


cdef inline int _find_transport(
    const uint8_t *frame, size_t length, uint8_t protocol, size_t *offset, bint *routed
) noexcept nogil:
    """Where the header of `protocol` begins: 0, or SEGMENT_BAD_HEADER, also for fragments and other chains.

    routed: an IPv6 routing header was passed, hence the pseudo-header's destination is not the IP header's.
    """
    cdef size_t at
    cdef uint8_t following
    cdef int _
    routed[0] = False
    if length < 20:
        return SEGMENT_BAD_HEADER
    if frame[0] >> 4 == 4:
        at = (frame[0] & 15) * 4
        if at < 20 or frame[9] != protocol or ft_load_be16(frame + 6) & 0x3fff:
            return SEGMENT_BAD_HEADER
        offset[0] = at
        return 0 if at <= length else SEGMENT_BAD_HEADER
    if frame[0] >> 4 != 6 or length < 40:
        return SEGMENT_BAD_HEADER
    following = frame[6]
    at = 40
    for _ in range(SEGMENT_MAX_EXTENSIONS + 1):
        if following == protocol:
            offset[0] = at
            return 0
        if at + 8 > length:
            return SEGMENT_BAD_HEADER
        if following == PROTOCOL_AUTHENTICATION:
            following = frame[at]
            at += (<size_t>frame[at + 1] + 2) * 4
        elif following in (PROTOCOL_HOP_BY_HOP, PROTOCOL_ROUTING, PROTOCOL_DESTINATION):
            if following == PROTOCOL_ROUTING:
                routed[0] = True
            following = frame[at]
            at += (<size_t>frame[at + 1] + 1) * 8
        else:
            return SEGMENT_BAD_HEADER
        if at > length:
            return SEGMENT_BAD_HEADER
    return SEGMENT_BAD_HEADER


cdef inline int segment_frame(
    const vnet_header_t *vnet, const uint8_t *frame, size_t length,
    uint8_t *out, size_t out_size, size_t head_room, size_t tail_room, size_t max_packet,
    segments_t *result,
) noexcept nogil:
    """Splits one frame into whole packets, checksums finished: their count, or a negative SEGMENT_ code.

    frame: `length` bytes behind the vnet header; unchanged. out: `out_size` bytes that do not overlap it
    (`segment_out_size` is always enough); packet i lies at out + i * result.stride + head_room with
    `tail_room` free bytes behind it, so that `count` packets of equal size are one UDP_SEGMENT message of
    head_room + packet_length + tail_room each. Rooms are not written. max_packet counts from the IP header.
    hdr_len is ignored. result is set only on success; on failure `out` may hold rubbish.
    """
    cdef uint8_t kind = vnet.gso_type & ~VIRTIO_NET_HDR_GSO_ECN
    cdef uint8_t protocol, flags = 0, sent_flags
    cdef size_t l4 = 0, header, payload, size, count, stride, i, take = 0, total, field
    cdef const uint8_t *data = frame
    cdef uint8_t *to
    cdef uint64_t shared, ip_shared = 0, each
    cdef uint32_t sequence = 0
    cdef uint16_t identification = 0, checksum, l4_length
    cdef bint routed = False, version6

    if length == 0 or length > SEGMENT_MAX_FRAME:
        return SEGMENT_BAD_HEADER

    if kind == VIRTIO_NET_HDR_GSO_NONE:
        if length > max_packet:
            return SEGMENT_TOO_LONG
        if out_size < length or out_size - length < head_room + tail_room:
            return SEGMENT_NO_ROOM
        if _copy_single(vnet, frame, length, out + head_room) < 0:
            return SEGMENT_BAD_CHECKSUM
        result.count = 1
        result.packet_length = length
        result.last_length = length
        result.stride = head_room + length + tail_room
        return 1

    if kind == VIRTIO_NET_HDR_GSO_TCPV4 or kind == VIRTIO_NET_HDR_GSO_TCPV6:
        protocol = PROTOCOL_TCP
    elif kind == VIRTIO_NET_HDR_GSO_UDP_L4:
        protocol = PROTOCOL_UDP
    else:
        return SEGMENT_BAD_GSO
    size = vnet.gso_size
    if size == 0:
        return SEGMENT_BAD_GSO

    if _find_transport(frame, length, protocol, &l4, &routed) < 0:
        return SEGMENT_BAD_HEADER
    version6 = frame[0] >> 4 == 6
    if (kind == VIRTIO_NET_HDR_GSO_TCPV4 and version6) or (kind == VIRTIO_NET_HDR_GSO_TCPV6 and not version6):
        return SEGMENT_BAD_HEADER
    if protocol == PROTOCOL_TCP:
        if l4 + 20 > length:
            return SEGMENT_BAD_HEADER
        header = l4 + (frame[l4 + 12] >> 4) * 4
        if header < l4 + 20 or header > length:
            return SEGMENT_BAD_HEADER
        field = 16
    else:
        header = l4 + 8
        if header > length:
            return SEGMENT_BAD_HEADER
        field = 6
    if vnet.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        if vnet.csum_start != l4 or vnet.csum_offset != field:
            return SEGMENT_BAD_CHECKSUM
    elif routed:
        return SEGMENT_BAD_CHECKSUM

    payload = length - header
    if payload <= size:
        count = 1
        size = payload
    else:
        count = (payload + size - 1) // size
    if header + size > max_packet:
        return SEGMENT_TOO_LONG
    stride = head_room + header + size + tail_room
    if count > SEGMENT_MAX_PACKETS or (count - 1) * stride + head_room + header + \
            (payload - (count - 1) * size) + tail_room > out_size:
        return SEGMENT_NO_ROOM

    # What all packets share: the pseudo-header without the length, and the transport header without the
    # fields that change.
    if routed:
        shared = ft_load16(frame + l4 + field) + <uint64_t>(<uint16_t>~ft_be16(<uint16_t>(length - l4)))
    elif version6:
        shared = ft_pseudo_v6(frame + 8, protocol, 0)
    else:
        shared = ft_pseudo_v4(frame + 12, protocol, 0)
    if protocol == PROTOCOL_TCP:
        sequence = ft_load_be32(frame + l4 + 4)
        flags = frame[l4 + 13]
        shared = ft_sum(frame + l4, header - l4, shared)
        shared = ft_without16(shared, frame + l4 + 4)
        shared = ft_without16(shared, frame + l4 + 6)
        shared = ft_without16(shared, frame + l4 + 12)
        shared = ft_without16(shared, frame + l4 + 16)
    else:
        shared = ft_add(shared, ft_load32(frame + l4))
    if not version6:
        identification = ft_load_be16(frame + 4)
        ip_shared = ft_sum(frame, l4, 0)
        ip_shared = ft_without16(ip_shared, frame + 2)
        ip_shared = ft_without16(ip_shared, frame + 4)
        ip_shared = ft_without16(ip_shared, frame + 10)

    data = frame + header
    to = out + head_room
    for i in range(count):
        take = size if i + 1 < count else payload - (count - 1) * size
        total = header + take
        l4_length = <uint16_t>(total - l4)
        memcpy(to, frame, header)
        if version6:
            ft_store_be16(to + 4, <uint16_t>(total - 40))
        else:
            ft_store_be16(to + 2, <uint16_t>total)
            ft_store_be16(to + 4, identification)
            each = ip_shared + ft_load16(to + 2) + ft_load16(to + 4)
            checksum = ~ft_fold(each)
            ft_store16(to + 10, checksum)
            identification += 1
        each = ft_add(shared, ft_be16(l4_length))
        if protocol == PROTOCOL_TCP:
            sent_flags = flags
            if i + 1 < count:
                sent_flags &= <uint8_t>~(TCP_FIN | TCP_PSH)
            if i:
                sent_flags &= <uint8_t>~TCP_CWR
            to[l4 + 13] = sent_flags
            ft_store32(to + l4 + 4, ft_be32(sequence))
            each = ft_add(each, <uint64_t>ft_load32(to + l4 + 4) + ft_load16(to + l4 + 12))
            checksum = ~ft_fold(ft_copy_sum(to + header, data, take, each))
            ft_store16(to + l4 + 16, checksum)
            sequence += <uint32_t>take
        else:
            ft_store_be16(to + l4 + 4, l4_length)
            each = ft_add(each, ft_be16(l4_length))
            checksum = ~ft_fold(ft_copy_sum(to + header, data, take, each))
            ft_store16(to + l4 + 6, finished_checksum(checksum, 6))
        data += take
        to += stride

    result.count = count
    result.packet_length = header + size
    result.last_length = header + take
    result.stride = stride
    return <int>count
