# Packets for whoever captures: a ring with one writer, the worker, and one reader, a Python thread. The worker
# never waits: what does not fit is counted. With nobody capturing it costs one look at a pointer a packet.
# Not for: the file format (fasttun/observe/pcapng.py), the filter's grammar (fasttun/observe/filter.py).
#
# Each record is a whole IP packet. Outer ones are given the IP and UDP headers that they travel under, without
# UDP checksum, since the socket shows none.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from fasttun._native.endpoint cimport endpoint_t, is_mapped_ipv4
from fasttun._native.packet cimport address_t, fold_words, get16, put16, sum_words
from fasttun._native.system cimport memcpy, memset, realtime_ns

cdef enum:
    CAPTURE_INNER = 1
    CAPTURE_OUTER = 2
    CAPTURE_CLAUSES = 64
    CAPTURE_RING = 8388608
    # bytes, a power of two

cdef enum:
    SIDE_SOURCE = 1
    SIDE_DESTINATION = 2

cdef extern from *:
    """
    #define ft_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define ft_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    uint64_t load_acquire "ft_load_acquire"(const uint64_t *) noexcept nogil
    void store_release "ft_store_release"(uint64_t *, uint64_t) noexcept nogil

ctypedef struct capture_clause_t:
    # A term of a conjunction: all that it names must hold. A term with `last` ends a conjunction, and any one of
    # them that holds is enough.
    uint8_t[16] network
    # IPv4 as v4-mapped
    int bits
    # -1: not about a network
    int port
    # -1: not about a port
    int version
    # 0: not about it
    int protocol
    # -1: not about it
    int sides
    # SIDE_*, any of which is enough
    bint negated
    bint last

ctypedef struct capture_record_t:
    uint64_t time_ns
    # since 1970
    uint32_t size
    # of the record with its padding; 0: the ring goes on at its beginning
    uint32_t length
    # of the packet
    uint32_t stored
    uint8_t what
    uint8_t outbound
    uint16_t unused

ctypedef struct capture_t:
    uint64_t head
    uint64_t tail
    uint64_t missed
    uint32_t snap_length
    int what
    int clause_count
    capture_clause_t[64] clauses
    uint8_t *ring


cdef inline bint _matches_network(const uint8_t *address, int length, const capture_clause_t *clause) noexcept nogil:
    cdef uint8_t[16] full
    cdef int whole = clause.bits >> 3
    cdef int rest = clause.bits & 7
    cdef int i
    if length == 4:
        memset(full, 0, 10)
        full[10] = 0xff
        full[11] = 0xff
        memcpy(full + 12, address, 4)
    else:
        memcpy(full, address, 16)
    for i in range(whole):
        if full[i] != clause.network[i]:
            return False
    return rest == 0 or ((full[whole] ^ clause.network[whole]) >> (8 - rest)) == 0


cdef inline bint _term_holds(const capture_clause_t *clause, const uint8_t *packet, size_t length) noexcept nogil:
    """Whether one term holds for an IP packet; a packet too short for what is asked does not match."""
    cdef int version = packet[0] >> 4 if length >= 20 else 0
    cdef int protocol, address_length
    cdef size_t transport
    cdef const uint8_t *source
    cdef bint first = True
    if version == 4:
        protocol = packet[9]
        transport = (packet[0] & 15) * 4
        source = packet + 12
        address_length = 4
        first = (get16(packet + 6) & 0x1fff) == 0
    elif version == 6 and length >= 40:
        protocol = packet[6]
        transport = 40
        source = packet + 8
        address_length = 16
    else:
        return False
    if clause.version and clause.version != version:
        return False
    if clause.protocol >= 0 and clause.protocol != protocol:
        return False
    if clause.bits >= 0 and not (
            (clause.sides & SIDE_SOURCE and _matches_network(source, address_length, clause)) or
            (clause.sides & SIDE_DESTINATION and
             _matches_network(source + address_length, address_length, clause))):
        return False
    if clause.port >= 0:
        # Only the protocols that have ports: TCP, UDP, DCCP, SCTP, UDP-Lite.
        if not first or transport + 4 > length or protocol not in (6, 17, 33, 132, 136):
            return False
        if not ((clause.sides & SIDE_SOURCE and get16(packet + transport) == clause.port) or
                (clause.sides & SIDE_DESTINATION and get16(packet + transport + 2) == clause.port)):
            return False
    return True


cdef inline bint capture_matches(const capture_t *c, const uint8_t *packet, size_t length) noexcept nogil:
    """Whether the filter lets the packet through; no terms let everything through."""
    cdef bint holds = True
    cdef int i
    if c.clause_count == 0:
        return True
    for i in range(c.clause_count):
        if holds:
            holds = _term_holds(&c.clauses[i], packet, length) != c.clauses[i].negated
        if c.clauses[i].last:
            if holds:
                return True
            holds = True
    return False


cdef inline void _capture_store(capture_t *c, int what, bint outbound, const uint8_t *head, size_t head_length,
                                const uint8_t *packet, size_t length) noexcept nogil:
    cdef uint64_t at = c.head & (CAPTURE_RING - 1)
    cdef size_t total = head_length + length
    cdef size_t stored = total if total < c.snap_length else c.snap_length
    cdef uint64_t size = (sizeof(capture_record_t) + stored + 7) & ~<uint64_t>7
    cdef uint64_t skipped = CAPTURE_RING - at if at + size > CAPTURE_RING else 0
    cdef capture_record_t *record
    if c.head - load_acquire(&c.tail) + skipped + size + sizeof(capture_record_t) > CAPTURE_RING:
        c.missed += 1
        return
    if skipped:
        if skipped >= sizeof(capture_record_t):
            (<capture_record_t *>(c.ring + at)).size = 0
        at = 0
    record = <capture_record_t *>(c.ring + at)
    record.time_ns = realtime_ns()
    record.size = <uint32_t>size
    record.length = <uint32_t>total
    record.stored = <uint32_t>stored
    record.what = <uint8_t>what
    record.outbound = outbound
    if head_length > stored:
        head_length = stored
    memcpy(c.ring + at + sizeof(capture_record_t), head, head_length)
    memcpy(c.ring + at + sizeof(capture_record_t) + head_length, packet, stored - head_length)
    store_release(&c.head, c.head + skipped + size)


cdef inline void capture_inner(capture_t *c, bint outbound, const uint8_t *packet, size_t length) noexcept nogil:
    if c.what & CAPTURE_INNER and capture_matches(c, packet, length):
        _capture_store(c, CAPTURE_INNER, outbound, packet, 0, packet, length)


cdef inline void capture_outer(capture_t *c, bint outbound, const uint8_t *data, size_t length,
                               const address_t *local, uint16_t local_port,
                               const endpoint_t *remote) noexcept nogil:
    """A datagram between `local` (zero when not known) and `remote`."""
    cdef uint8_t[48] head
    cdef const uint8_t *here = <const uint8_t *>local
    cdef const uint8_t *there = <const uint8_t *>remote
    cdef const uint8_t *from_ = here if outbound else there
    cdef const uint8_t *to = there if outbound else here
    cdef uint8_t *udp
    cdef size_t head_length = 48
    if not c.what & CAPTURE_OUTER:
        return
    memset(head, 0, 48)
    if is_mapped_ipv4(remote.high, remote.low):
        head_length = 28
        head[0] = 0x45
        put16(head + 2, <uint32_t>length + 28)
        head[6] = 0x40
        head[8] = 64
        head[9] = 17
        memcpy(head + 12, from_ + 12, 4)
        memcpy(head + 16, to + 12, 4)
        put16(head + 10, <uint16_t>~fold_words(sum_words(head, 20, 0)))
        udp = head + 20
    else:
        head[0] = 0x60
        put16(head + 4, <uint32_t>length + 8)
        head[6] = 17
        head[7] = 64
        memcpy(head + 8, from_, 16)
        memcpy(head + 24, to, 16)
        udp = head + 40
    put16(udp, local_port if outbound else remote.port)
    put16(udp + 2, remote.port if outbound else local_port)
    put16(udp + 4, <uint32_t>length + 8)
    if capture_matches(c, head, head_length):
        _capture_store(c, CAPTURE_OUTER, outbound, head, head_length, data, length)
