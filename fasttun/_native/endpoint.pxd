# An outer endpoint as a comparable value, and its way from and to the kernel's sockaddr.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from fasttun._native.system cimport (
    AF_INET, AF_INET6, htonl, htons, memcpy, memset, ntohs, sockaddr_in, sockaddr_in6,
)

cdef enum:
    SOCKADDR_SIZE = 28
    # sizeof(struct sockaddr_in6), the larger of the two

ctypedef struct endpoint_t:
    # The address in network order, IPv4 as v4-mapped (RFC 4291 §2.5.5.2); port in host order.
    uint64_t high
    uint64_t low
    uint32_t scope_id
    uint32_t port

ctypedef struct sockaddr_t:
    uint8_t[28] bytes
    uint32_t length


cdef inline bint same_endpoint(const endpoint_t *a, const endpoint_t *b) noexcept nogil:
    return a.low == b.low and a.port == b.port and a.high == b.high and a.scope_id == b.scope_id


cdef inline void mapped_ipv4(const uint8_t *address, uint64_t *high, uint64_t *low) noexcept nogil:
    """The 16 bytes ::ffff:a.b.c.d as two words, in the order that memcpy would give."""
    cdef uint8_t[16] full
    memset(full, 0, 10)
    full[10] = 0xff
    full[11] = 0xff
    memcpy(full + 12, address, 4)
    memcpy(high, full, 8)
    memcpy(low, full + 8, 8)


cdef inline bint is_mapped_ipv4(uint64_t high, uint64_t low) noexcept nogil:
    cdef uint8_t[8] tail
    memcpy(tail, &low, 8)
    return high == 0 and tail[0] == 0 and tail[1] == 0 and tail[2] == 0xff and tail[3] == 0xff


cdef inline bint endpoint_from_sockaddr(endpoint_t *to, const void *address, uint32_t length) noexcept nogil:
    """False when `address` is of neither IP family."""
    cdef const uint8_t *raw = <const uint8_t *>address
    cdef uint16_t family
    if length < 16:
        return False
    memcpy(&family, raw, 2)
    to.scope_id = 0
    to.port = ntohs((<const sockaddr_in *>address).sin_port)
    if family == AF_INET:
        mapped_ipv4(raw + 4, &to.high, &to.low)
        return True
    if family == AF_INET6 and length >= SOCKADDR_SIZE:
        memcpy(&to.high, raw + 8, 8)
        memcpy(&to.low, raw + 16, 8)
        to.scope_id = (<const sockaddr_in6 *>address).sin6_scope_id
        return True
    return False


cdef inline bint endpoint_to_sockaddr(const endpoint_t *endpoint, int family, sockaddr_t *to) noexcept nogil:
    """False when the endpoint cannot be reached by a socket of `family`."""
    cdef sockaddr_in *v4
    cdef sockaddr_in6 *v6
    memset(to.bytes, 0, SOCKADDR_SIZE)
    if family == AF_INET6:
        v6 = <sockaddr_in6 *>to.bytes
        v6.sin6_family = AF_INET6
        v6.sin6_port = htons(<uint16_t>endpoint.port)
        v6.sin6_scope_id = endpoint.scope_id
        memcpy(to.bytes + 8, &endpoint.high, 8)
        memcpy(to.bytes + 16, &endpoint.low, 8)
        to.length = SOCKADDR_SIZE
        return True
    if family == AF_INET and is_mapped_ipv4(endpoint.high, endpoint.low):
        v4 = <sockaddr_in *>to.bytes
        v4.sin_family = AF_INET
        v4.sin_port = htons(<uint16_t>endpoint.port)
        memcpy(to.bytes + 4, (<const uint8_t *>&endpoint.low) + 4, 4)
        to.length = 16
        return True
    return False


cdef inline bint in_network(uint64_t high, uint64_t low, const uint8_t *network, int bits) noexcept nogil:
    """Whether the address is within `network`/`bits`, both as 16 bytes (IPv4: mapped, bits + 96)."""
    cdef uint8_t[16] address
    cdef int whole = bits >> 3
    cdef int rest = bits & 7
    cdef int i
    memcpy(address, &high, 8)
    memcpy(address + 8, &low, 8)
    for i in range(whole):
        if address[i] != network[i]:
            return False
    return rest == 0 or ((address[whole] ^ network[whole]) >> (8 - rest)) == 0
