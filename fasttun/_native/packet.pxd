# The inner packet: is it a whole, well-formed IP packet, and which addresses does it carry.
# Not for: transport headers (segment.pxd, coalesce.pxd) or what is around the packet (wire.pxd).

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from fasttun._native.endpoint cimport mapped_ipv4
from fasttun._native.system cimport memcpy

ctypedef struct address_t:
    # An inner address: 16 bytes in network order as two words, IPv4 as v4-mapped.
    uint64_t high
    uint64_t low


cdef inline uint16_t get16(const uint8_t *p) noexcept nogil:
    return (<uint16_t>p[0] << 8) | p[1]


cdef inline void put16(uint8_t *p, uint32_t value) noexcept nogil:
    p[0] = <uint8_t>(value >> 8)
    p[1] = <uint8_t>value


cdef inline uint32_t sum_words(const uint8_t *p, size_t length, uint32_t total) noexcept nogil:
    """Adds `length` bytes as big-endian 16-bit words (RFC 1071); for headers, at most 64 KiB."""
    cdef size_t i = 0
    while i + 1 < length:
        total += get16(p + i)
        i += 2
    if i < length:
        total += <uint32_t>p[i] << 8
    return total


cdef inline uint16_t fold_words(uint32_t total) noexcept nogil:
    total = (total & 0xffff) + (total >> 16)
    total = (total & 0xffff) + (total >> 16)
    return <uint16_t>total


cdef inline int packet_version(const uint8_t *packet, size_t length) noexcept nogil:
    """4 or 6 when `packet` is one whole IP packet of exactly `length` bytes, else 0.

    IPv4 with its header checksum (RFC 791 §3.1), IPv6 without jumbo payload (RFC 8200 §3).
    """
    cdef size_t header
    if length >= 20 and packet[0] >> 4 == 4:
        header = (packet[0] & 15) * 4
        if header < 20 or get16(packet + 2) != length or header > length:
            return 0
        return 4 if fold_words(sum_words(packet, header, 0)) == 0xffff else 0
    if length >= 40 and packet[0] >> 4 == 6:
        return 6 if <size_t>get16(packet + 4) + 40 == length else 0
    return 0


cdef inline void packet_source(const uint8_t *packet, int version, address_t *to) noexcept nogil:
    if version == 4:
        mapped_ipv4(packet + 12, &to.high, &to.low)
    else:
        memcpy(&to.high, packet + 8, 8)
        memcpy(&to.low, packet + 16, 8)


cdef inline void packet_destination(const uint8_t *packet, int version, address_t *to) noexcept nogil:
    if version == 4:
        mapped_ipv4(packet + 16, &to.high, &to.low)
    else:
        memcpy(&to.high, packet + 24, 8)
        memcpy(&to.low, packet + 32, 8)


cdef inline bint can_be_source(const uint8_t *packet, int version) noexcept nogil:
    """Whether the source is an address that one host can have: not unspecified, loopback or multicast.

    IPv4 (RFC 1122 §3.2.1.3): not 0/8, 127/8, 224/4 and above. IPv6 (RFC 4291 §2): not ::/96 as a whole
    (unspecified, loopback), not v4-mapped (it would alias an IPv4 entry of the table), not ff00::/8.
    """
    cdef uint64_t high
    cdef uint32_t middle
    if version == 4:
        return packet[12] != 0 and packet[12] != 127 and packet[12] < 224
    if packet[8] == 0xff:
        return False
    memcpy(&high, packet + 8, 8)
    memcpy(&middle, packet + 16, 4)
    return high != 0 or (middle != 0 and not (packet[16] == 0 and packet[17] == 0
                                              and packet[18] == 0xff and packet[19] == 0xff))
