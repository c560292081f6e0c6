# Inbound packets that a peer's fast path has sent as its kernel had them: the transport checksum, and TCP's
# segmentation, are left to the network card, and over a virtual link nobody does them before the receiver.
# Not for: packets from the TUN device (segment.pxd), which a vnet header describes.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from fasttun._native.checksum cimport ft_fold, ft_load16, ft_pseudo_v4, ft_pseudo_v6
from fasttun._native.segment cimport _find_transport
from fasttun._native.vnet cimport (
    PROTOCOL_TCP, PROTOCOL_UDP, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    vnet_header_t,
)


cdef inline bint unfinished_packet(
    const uint8_t *packet, size_t length, uint32_t mtu, vnet_header_t *vnet
) noexcept nogil:
    """Whether the checksum field of a whole IP packet holds what the kernel puts there for a card to finish.

    That is the sum of the pseudo-header. A finished checksum is the same by chance once in 65,536 packets; finishing
    it again gives a checksum that holds, too. vnet: filled, also for a frame of TCP longer than `mtu`, whose packets
    then fill the MTU.
    """
    cdef size_t l4 = 0
    cdef size_t field = 16
    cdef size_t header
    cdef uint32_t l4_length
    cdef bint routed = False
    cdef uint8_t protocol = PROTOCOL_TCP
    cdef bint v4 = packet[0] >> 4 == 4
    if _find_transport(packet, length, PROTOCOL_TCP, &l4, &routed) < 0 or l4 + 20 > length:
        protocol = PROTOCOL_UDP
        field = 6
        if _find_transport(packet, length, PROTOCOL_UDP, &l4, &routed) < 0 or l4 + 8 > length:
            return False
    l4_length = <uint32_t>(length - l4)
    if routed or ft_load16(packet + l4 + field) != ft_fold(
            ft_pseudo_v4(packet + 12, protocol, l4_length) if v4 else ft_pseudo_v6(packet + 8, protocol, l4_length)):
        return False
    memset(vnet, 0, sizeof(vnet_header_t))
    vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM
    vnet.csum_start = l4
    vnet.csum_offset = field
    if length > mtu:
        header = l4 + (packet[l4 + 12] >> 4) * 4
        if protocol != PROTOCOL_TCP or header < l4 + 20 or header >= length or header >= mtu:
            return False
        vnet.gso_type = VIRTIO_NET_HDR_GSO_TCPV4 if v4 else VIRTIO_NET_HDR_GSO_TCPV6
        vnet.hdr_len = header
        vnet.gso_size = mtu - header
    return True
