# The ICMP error that tells a sender the MTU when its packet does not fit the datagram that must carry it.
# IPv4: RFC 792 and RFC 1191 §4 (type 3, code 4). IPv6: RFC 4443 §3.2 (type 2).

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t
from fasttun._native.packet cimport can_be_source, fold_words, get16, put16, sum_words
from fasttun._native.system cimport memcpy, memset

cdef enum:
    TOO_BIG_MAX = 1280
    # bytes of the answer: IPv6's least MTU; for IPv4 576 (RFC 1812 §4.3.2.3)
    ICMP = 1
    ICMPV6 = 58


cdef inline bint may_be_answered(const uint8_t *packet, int version) noexcept nogil:
    """RFC 1122 §3.2.2 and RFC 4443 §2.4(e): nothing about ICMP errors, later fragments, multicast."""
    if not can_be_source(packet, version):
        return False
    if version == 4:
        if not packet[6] & 0x40 or packet[16] >= 224 or (get16(packet + 6) & 0x1fff) != 0:
            return False
        return not (packet[9] == ICMP and packet[(packet[0] & 15) * 4] not in (0, 8))
    return packet[24] != 0xff and not (packet[6] == ICMPV6 and packet[40] < 128)


cdef inline size_t too_big(uint8_t *to, const uint8_t *packet, size_t length, int version,
                           uint32_t mtu) noexcept nogil:
    """Writes the answer to `packet` (a whole IP packet of >= 28 or 48 bytes) and returns its length, or 0.

    to: at least TOO_BIG_MAX bytes, not aliasing `packet`. The error seems to come from where the packet was
    going: from an address of this host's own, the kernel would take it for a martian (fib_validate_source).
    """
    cdef size_t quoted, total
    cdef uint32_t total_sum
    if not may_be_answered(packet, version):
        return 0
    if version == 4:
        quoted = length if length < 548 else 548
        total = 28 + quoted
        memset(to, 0, 28)
        to[0] = 0x45
        put16(to + 2, total)
        to[8] = 64
        to[9] = ICMP
        memcpy(to + 12, packet + 16, 4)
        memcpy(to + 16, packet + 12, 4)
        put16(to + 10, <uint32_t>(~fold_words(sum_words(to, 20, 0))) & 0xffff)
        to[20] = 3
        to[21] = 4
        put16(to + 26, mtu if mtu < 65535 else 65535)
        memcpy(to + 28, packet, quoted)
        put16(to + 22, <uint32_t>(~fold_words(sum_words(to + 20, total - 20, 0))) & 0xffff)
        return total
    quoted = length if length < TOO_BIG_MAX - 48 else TOO_BIG_MAX - 48
    total = 48 + quoted
    memset(to, 0, 48)
    to[0] = 0x60
    put16(to + 4, total - 40)
    to[6] = ICMPV6
    to[7] = 64
    memcpy(to + 8, packet + 24, 16)
    memcpy(to + 24, packet + 8, 16)
    to[40] = 2
    put16(to + 44, mtu >> 16)
    put16(to + 46, mtu & 0xffff)
    memcpy(to + 48, packet, quoted)
    total_sum = sum_words(to + 8, 32, <uint32_t>(total - 40) + ICMPV6)
    put16(to + 42, <uint32_t>(~fold_words(sum_words(to + 40, total - 40, total_sum))) & 0xffff)
    return total
