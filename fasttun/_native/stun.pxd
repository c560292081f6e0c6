# STUN Binding (RFC 8489) as far as fasttun uses it: the client's greeting and keepalive, and the check that
# a claimed endpoint really receives what is sent to it. Two attributes: XOR-MAPPED-ADDRESS, and one of our own
# by which both sides of a fast path find each other (docs/wire.md).

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from fasttun._native.endpoint cimport endpoint_t, is_mapped_ipv4, mapped_ipv4
from fasttun._native.packet cimport get16, put16
from fasttun._native.system cimport memcpy, memset

cdef enum:
    STUN_HEADER = 20
    STUN_TRANSACTION = 12
    STUN_REQUEST_MAX = 24
    STUN_RESPONSE_MAX = 48
    STUN_REQUEST_TYPE = 0x0001
    STUN_SUCCESS_TYPE = 0x0101
    STUN_XOR_MAPPED_ADDRESS = 0x0020
    STUN_UNFINISHED = 0xfa57
    # no value: the sender takes packets whose checksum and segmentation are left to the receiver


cdef inline int stun_type(const uint8_t *d, size_t length) noexcept nogil:
    """STUN_REQUEST_TYPE or STUN_SUCCESS_TYPE when well-formed, else 0. Unknown attributes are let pass."""
    cdef int kind
    if length < STUN_HEADER or <size_t>get16(d + 2) + STUN_HEADER != length or length & 3:
        return 0
    kind = get16(d)
    return kind if kind == STUN_REQUEST_TYPE or kind == STUN_SUCCESS_TYPE else 0


cdef inline size_t stun_header(uint8_t *to, int kind, int length, const uint8_t *transaction) noexcept nogil:
    put16(to, kind)
    put16(to + 2, length)
    to[4] = 0x21
    to[5] = 0x12
    to[6] = 0xa4
    to[7] = 0x42
    memcpy(to + 8, transaction, STUN_TRANSACTION)
    return STUN_HEADER


cdef inline size_t put_unfinished(uint8_t *message, size_t length) noexcept nogil:
    """Adds the attribute; the message's new length."""
    put16(message + length, STUN_UNFINISHED)
    put16(message + length + 2, 0)
    put16(message + 2, get16(message + 2) + 4)
    return length + 4


cdef inline size_t stun_request(uint8_t *to, const uint8_t *transaction, bint unfinished) noexcept nogil:
    """A Binding request: 20 bytes, 24 with the attribute."""
    stun_header(to, STUN_REQUEST_TYPE, 0, transaction)
    return put_unfinished(to, STUN_HEADER) if unfinished else STUN_HEADER


cdef inline size_t stun_success(uint8_t *to, const uint8_t *request, const endpoint_t *seen,
                                bint unfinished) noexcept nogil:
    """The Binding success that tells the sender of `request` how it is seen: 32 or 44 bytes (§14.2), and 4."""
    cdef const uint8_t *address
    cdef int i, size
    cdef bint v4 = is_mapped_ipv4(seen.high, seen.low)
    cdef uint8_t[16] full
    memcpy(full, &seen.high, 8)
    memcpy(full + 8, &seen.low, 8)
    address = &full[0]
    size = 16
    if v4:
        address += 12
        size = 4
    stun_header(to, STUN_SUCCESS_TYPE, 8 + size, request + 8)
    put16(to + 20, STUN_XOR_MAPPED_ADDRESS)
    put16(to + 22, 4 + size)
    to[24] = 0
    to[25] = 1 if v4 else 2
    put16(to + 26, seen.port ^ 0x2112)
    for i in range(size):
        to[28 + i] = address[i] ^ to[4 + i]
    return put_unfinished(to, 28 + size) if unfinished else 28 + size


cdef inline bint stun_unfinished(const uint8_t *d, size_t length) noexcept nogil:
    """Whether a message that `stun_type` has found well-formed has the attribute."""
    cdef size_t at = STUN_HEADER
    while at + 4 <= length:
        if get16(d + at) == STUN_UNFINISHED:
            return True
        at += 4 + ((<size_t>get16(d + at + 2) + 3) & ~<size_t>3)
    return False


cdef inline bint stun_mapped(const uint8_t *d, size_t length, endpoint_t *to) noexcept nogil:
    """Reads XOR-MAPPED-ADDRESS of a success that `stun_type` has found well-formed. False without one."""
    cdef size_t at = STUN_HEADER
    cdef size_t size
    cdef uint8_t[16] full
    cdef int i, count
    while at + 4 <= length:
        size = get16(d + at + 2)
        if at + 4 + size > length:
            return False
        if get16(d + at) == STUN_XOR_MAPPED_ADDRESS and size >= 8:
            count = 4 if d[at + 5] == 1 else 16
            if size < <size_t>(4 + count):
                return False
            for i in range(count):
                full[i] = d[at + 8 + i] ^ d[4 + i]
            to.scope_id = 0
            to.port = get16(d + at + 6) ^ 0x2112
            if count == 4:
                mapped_ipv4(full, &to.high, &to.low)
            else:
                memcpy(&to.high, full, 8)
                memcpy(&to.low, full + 8, 8)
            return True
        at += 4 + ((size + 3) & ~<size_t>3)
    return False
