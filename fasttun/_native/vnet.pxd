"""The header that a TUN device with IFF_VNET_HDR puts before each frame, and what IP and TCP call their bits.

Layout and constants: linux/virtio_net.h (`struct virtio_net_hdr`, 10 bytes, in the machine's byte order
unless TUNSETVNETBE or TUNSETVNETLE says otherwise, which fasttun never sets).
"""

from libc.stdint cimport uint8_t, uint16_t


cdef packed struct vnet_header_t:
    uint8_t flags
    uint8_t gso_type
    uint16_t hdr_len      # all headers together; a hint, never trusted
    uint16_t gso_size     # payload bytes of each packet but the last
    uint16_t csum_start   # where the checksum's range begins
    uint16_t csum_offset  # from there to the checksum field


cdef enum:
    VNET_HEADER_LENGTH = 10

    VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
    VIRTIO_NET_HDR_F_DATA_VALID = 2
    VIRTIO_NET_HDR_GSO_NONE = 0
    VIRTIO_NET_HDR_GSO_TCPV4 = 1
    VIRTIO_NET_HDR_GSO_UDP = 3
    VIRTIO_NET_HDR_GSO_TCPV6 = 4
    VIRTIO_NET_HDR_GSO_UDP_L4 = 5
    VIRTIO_NET_HDR_GSO_ECN = 0x80

    PROTOCOL_HOP_BY_HOP = 0
    PROTOCOL_TCP = 6
    PROTOCOL_UDP = 17
    PROTOCOL_ROUTING = 43
    PROTOCOL_AUTHENTICATION = 51
    PROTOCOL_ICMPV6 = 58
    PROTOCOL_DESTINATION = 60

    TCP_FIN = 0x01
    TCP_SYN = 0x02
    TCP_RST = 0x04
    TCP_PSH = 0x08
    TCP_ACK = 0x10
    TCP_URG = 0x20
    TCP_ECE = 0x40
    TCP_CWR = 0x80
