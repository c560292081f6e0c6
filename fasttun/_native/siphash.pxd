# SipHash-2-4 of a few 64-bit words (Aumasson and Bernstein, 2012): keyed, so that nobody outside can
# choose colliding hash-table entries or guess the tag of a return-routability challenge.

from libc.stdint cimport uint64_t

ctypedef struct siphash_key_t:
    uint64_t k0
    uint64_t k1


cdef inline uint64_t rotl64(uint64_t x, int bits) noexcept nogil:
    return (x << bits) | (x >> (64 - bits))


cdef inline void sip_round(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[1] = rotl64(v[1], 13) ^ v[0]
    v[0] = rotl64(v[0], 32)
    v[2] += v[3]
    v[3] = rotl64(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = rotl64(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = rotl64(v[1], 17) ^ v[2]
    v[2] = rotl64(v[2], 32)


cdef inline uint64_t siphash(const siphash_key_t *key, const uint64_t *words, int count) noexcept nogil:
    """SipHash-2-4 of `count` words in native order; as the reference for 8 × count bytes, little-endian."""
    cdef uint64_t[4] v
    cdef uint64_t tail = <uint64_t>(count * 8) << 56
    cdef int i
    v[0] = key.k0 ^ 0x736f6d6570736575ULL
    v[1] = key.k1 ^ 0x646f72616e646f6dULL
    v[2] = key.k0 ^ 0x6c7967656e657261ULL
    v[3] = key.k1 ^ 0x7465646279746573ULL
    for i in range(count):
        v[3] ^= words[i]
        sip_round(v)
        sip_round(v)
        v[0] ^= words[i]
    v[3] ^= tail
    sip_round(v)
    sip_round(v)
    v[0] ^= tail
    v[2] ^= 0xff
    sip_round(v)
    sip_round(v)
    sip_round(v)
    sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]
