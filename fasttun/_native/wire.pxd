# What a datagram of the plain mode is, by its first bytes; see docs/wire.md. The kinds never overlap.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

cdef enum:
    FRAMING_AUTO = 0
    # raw: the datagram is the IP packet; pi: 4 bytes of packet information before it (linux/if_tun.h)
    FRAMING_RAW = 1
    FRAMING_PI = 2
    PI_LENGTH = 4

cdef enum:
    KIND_NONE = 0
    KIND_RAW = 1
    KIND_PI = 2
    KIND_STUN = 3


cdef inline int datagram_kind(const uint8_t *d, size_t length) noexcept nogil:
    """One of KIND_*, by the first bytes only; what it holds is still to be checked."""
    if length < 20:
        return KIND_NONE
    if d[0] >> 4 == 4 or d[0] >> 4 == 6:
        return KIND_RAW
    if d[0] == 0 and d[1] == 0 and ((d[2] == 0x08 and d[3] == 0x00) or (d[2] == 0x86 and d[3] == 0xdd)):
        return KIND_PI
    if d[0] <= 1 and d[4] == 0x21 and d[5] == 0x12 and d[6] == 0xa4 and d[7] == 0x42:
        return KIND_STUN
    return KIND_NONE


cdef inline void write_pi(uint8_t *to, int version) noexcept nogil:
    """struct tun_pi: flags 0, then the EtherType, big-endian (linux/if_tun.h)."""
    to[0] = 0
    to[1] = 0
    to[2] = 0x08 if version == 4 else 0x86
    to[3] = 0x00 if version == 4 else 0xdd
