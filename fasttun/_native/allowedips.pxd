# Allowed IPs: which peer owns an inner address, by longest prefix (WireGuard paper §2, "cryptokey routing").
#
# One hash table of prefixes, and for each family the list of lengths in use, longest first: a look-up asks once
# for each such length. So its cost grows with the number of different lengths (typically 1 to 5), and with the
# number of prefixes only as far as the processor's caches do. Memory: 48 bytes a prefix, at most twice over, and
# 4 a peer number; nothing before the first prefix. Nothing shrinks before `allowedips_free`.
#
# IPv4 is v4-mapped, with 96 + n bits. A prefix within ::ffff:0:0/96 is an IPv4 one; all others are IPv6, and
# never match an IPv4 address (::/0 does not). Not for: threads; the caller holds a lock.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc

from fasttun._native.endpoint cimport is_mapped_ipv4
from fasttun._native.packet cimport address_t
from fasttun._native.system cimport memcpy, memset

cdef enum:
    ALLOWED_MIN = 64
    # prefixes; a power of two, as the capacity always is
    ALLOWED_MAX = 16777216
    # prefixes, so that no index overflows: 0.8 GB

ctypedef struct allowed_prefix_t:
    # A prefix: in its bucket's chain (`next`) and in its peer's list (`before`, `after`); -1 ends each.
    address_t prefix
    int32_t bits
    int32_t peer
    int32_t next
    int32_t before
    int32_t after

ctypedef struct allowed_length_t:
    address_t mask
    int32_t bits
    int32_t count

ctypedef struct allowed_family_t:
    int32_t length_count
    allowed_length_t[129] lengths

ctypedef struct allowedips_t:
    allowed_prefix_t *entries
    int32_t *buckets
    # twice as many as entries
    int32_t *heads
    # by peer number: the first of its prefixes, -1 for none
    int32_t capacity
    int32_t count
    int32_t fresh
    # entries from here on have never been used
    int32_t unused
    # chain of entries given back, by `next`
    int32_t peer_capacity
    allowed_family_t v4
    allowed_family_t v6


cdef inline int allowedips_init(allowedips_t *t) noexcept nogil:
    """An empty table. Returns 0."""
    memset(t, 0, sizeof(allowedips_t))
    t.unused = -1
    return 0


cdef inline void allowedips_free(allowedips_t *t) noexcept nogil:
    """Gives the memory back; the table is empty, and may be used again."""
    free(t.entries)
    free(t.buckets)
    free(t.heads)
    allowedips_init(t)


cdef inline uint32_t _allowed_bucket(const allowedips_t *t, const address_t *prefix, int32_t bits) noexcept nogil:
    cdef uint64_t h = (prefix.high ^ <uint64_t>bits) * <uint64_t>0x9e3779b97f4a7c15
    h = (h ^ (h >> 32) ^ prefix.low) * <uint64_t>0xd6e8feb86659fd93
    h = (h ^ (h >> 32)) * <uint64_t>0xd6e8feb86659fd93
    return <uint32_t>(h >> 32) & <uint32_t>(2 * t.capacity - 1)


cdef inline int32_t _allowed_find(const allowedips_t *t, uint64_t high, uint64_t low, int32_t bits) noexcept nogil:
    cdef address_t prefix
    cdef const allowed_prefix_t *entry
    cdef int32_t at
    prefix.high = high
    prefix.low = low
    at = t.buckets[_allowed_bucket(t, &prefix, bits)]
    while at >= 0:
        entry = &t.entries[at]
        if entry.prefix.low == low and entry.prefix.high == high and entry.bits == bits:
            break
        at = entry.next
    return at


cdef inline int32_t allowedips_lookup(const allowedips_t *t, const address_t *address) noexcept nogil:
    """The peer with the longest prefix that holds the address, -1 for none."""
    cdef const allowed_family_t *family = &t.v4 if is_mapped_ipv4(address.high, address.low) else &t.v6
    cdef const allowed_length_t *length
    cdef int32_t at, i
    for i in range(family.length_count):
        length = &family.lengths[i]
        at = _allowed_find(t, address.high & length.mask.high, address.low & length.mask.low, length.bits)
        if at >= 0:
            return t.entries[at].peer
    return -1


cdef inline void _allowed_mask(int bits, address_t *mask) noexcept nogil:
    cdef uint8_t[16] bytes
    cdef int i
    for i in range(16):
        bytes[i] = 0xff if bits >= 8 * i + 8 else <uint8_t>(0xff00 >> (bits - 8 * i)) if bits > 8 * i else 0
    memcpy(mask, bytes, 16)


cdef inline allowed_family_t *_allowed_family(allowedips_t *t, const address_t *prefix, int bits) noexcept nogil:
    return &t.v4 if bits >= 96 and is_mapped_ipv4(prefix.high, prefix.low) else &t.v6


cdef inline void _allowed_add_length(allowed_family_t *family, int bits) noexcept nogil:
    cdef int32_t i = family.length_count
    cdef int32_t at = 0
    while at < i and family.lengths[at].bits > bits:
        at += 1
    if at < i and family.lengths[at].bits == bits:
        family.lengths[at].count += 1
        return
    while i > at:
        family.lengths[i] = family.lengths[i - 1]
        i -= 1
    family.length_count += 1
    family.lengths[at].bits = bits
    family.lengths[at].count = 1
    _allowed_mask(bits, &family.lengths[at].mask)


cdef inline void _allowed_drop_length(allowed_family_t *family, int bits) noexcept nogil:
    cdef int32_t at = 0
    while family.lengths[at].bits != bits:
        at += 1
    family.lengths[at].count -= 1
    if family.lengths[at].count:
        return
    family.length_count -= 1
    while at < family.length_count:
        family.lengths[at] = family.lengths[at + 1]
        at += 1


cdef inline int _allowed_grow(allowedips_t *t) noexcept nogil:
    """Room for one more prefix; -1 when there is no memory."""
    cdef int32_t capacity = 2 * t.capacity if t.capacity else ALLOWED_MIN
    cdef void *memory
    cdef uint32_t bucket
    cdef int32_t i
    if t.unused >= 0 or t.fresh < t.capacity:
        return 0
    if capacity > ALLOWED_MAX:
        return -1
    memory = realloc(t.entries, <size_t>capacity * sizeof(allowed_prefix_t))
    if memory == NULL:
        return -1
    t.entries = <allowed_prefix_t *>memory
    memory = realloc(t.buckets, 2 * <size_t>capacity * sizeof(int32_t))
    if memory == NULL:
        return -1
    t.buckets = <int32_t *>memory
    t.capacity = capacity
    memset(t.buckets, 0xff, 2 * <size_t>capacity * sizeof(int32_t))
    for i in range(t.fresh):
        bucket = _allowed_bucket(t, &t.entries[i].prefix, t.entries[i].bits)
        t.entries[i].next = t.buckets[bucket]
        t.buckets[bucket] = i
    return 0


cdef inline int _allowed_grow_peers(allowedips_t *t, int32_t peer) noexcept nogil:
    cdef int32_t capacity = t.peer_capacity if t.peer_capacity else ALLOWED_MIN
    cdef void *memory
    if peer < t.peer_capacity:
        return 0
    if peer >= ALLOWED_MAX:
        return -1
    while capacity <= peer:
        capacity *= 2
    memory = realloc(t.heads, <size_t>capacity * sizeof(int32_t))
    if memory == NULL:
        return -1
    t.heads = <int32_t *>memory
    memset(t.heads + t.peer_capacity, 0xff, <size_t>(capacity - t.peer_capacity) * sizeof(int32_t))
    t.peer_capacity = capacity
    return 0


cdef inline void _allowed_enlist(allowedips_t *t, int32_t at, int32_t peer) noexcept nogil:
    cdef int32_t head = t.heads[peer]
    t.entries[at].peer = peer
    t.entries[at].before = -1
    t.entries[at].after = head
    if head >= 0:
        t.entries[head].before = at
    t.heads[peer] = at


cdef inline void _allowed_delist(allowedips_t *t, int32_t at) noexcept nogil:
    cdef const allowed_prefix_t *entry = &t.entries[at]
    if entry.before >= 0:
        t.entries[entry.before].after = entry.after
    else:
        t.heads[entry.peer] = entry.after
    if entry.after >= 0:
        t.entries[entry.after].before = entry.before


cdef inline int allowedips_insert(allowedips_t *t, const address_t *prefix, uint8_t bits,
                                  int32_t peer) noexcept nogil:
    """Gives the prefix (host bits are ignored) to `peer` >= 0, whoever had it. -1: no memory, nothing changed."""
    cdef allowed_family_t *family = _allowed_family(t, prefix, bits)
    cdef address_t mask
    cdef allowed_prefix_t *entry
    cdef uint32_t bucket
    cdef int32_t at
    if bits > 128 or peer < 0 or _allowed_grow(t) < 0 or _allowed_grow_peers(t, peer) < 0:
        return -1
    _allowed_mask(bits, &mask)
    at = _allowed_find(t, prefix.high & mask.high, prefix.low & mask.low, bits)
    if at >= 0:
        _allowed_delist(t, at)
        _allowed_enlist(t, at, peer)
        return 0
    at = t.unused
    if at >= 0:
        t.unused = t.entries[at].next
    else:
        at = t.fresh
        t.fresh += 1
    entry = &t.entries[at]
    entry.prefix.high = prefix.high & mask.high
    entry.prefix.low = prefix.low & mask.low
    entry.bits = bits
    bucket = _allowed_bucket(t, &entry.prefix, bits)
    entry.next = t.buckets[bucket]
    t.buckets[bucket] = at
    _allowed_enlist(t, at, peer)
    _allowed_add_length(family, bits)
    t.count += 1
    return 0


cdef inline void _allowed_take(allowedips_t *t, int32_t at) noexcept nogil:
    cdef allowed_prefix_t *entry = &t.entries[at]
    cdef int32_t *link = &t.buckets[_allowed_bucket(t, &entry.prefix, entry.bits)]
    while link[0] != at:
        link = &t.entries[link[0]].next
    link[0] = entry.next
    _allowed_delist(t, at)
    _allowed_drop_length(_allowed_family(t, &entry.prefix, entry.bits), entry.bits)
    entry.next = t.unused
    t.unused = at
    t.count -= 1


cdef inline bint allowedips_remove(allowedips_t *t, const address_t *prefix, uint8_t bits,
                                   int32_t peer) noexcept nogil:
    """Takes the prefix from `peer`; False when it is not exactly this peer's."""
    cdef address_t mask
    cdef int32_t at
    if bits > 128 or t.count == 0:
        return False
    _allowed_mask(bits, &mask)
    at = _allowed_find(t, prefix.high & mask.high, prefix.low & mask.low, bits)
    if at < 0 or t.entries[at].peer != peer:
        return False
    _allowed_take(t, at)
    return True


cdef inline void allowedips_remove_peer(allowedips_t *t, int32_t peer) noexcept nogil:
    """Takes all that the peer has."""
    while 0 <= peer < t.peer_capacity and t.heads[peer] >= 0:
        _allowed_take(t, t.heads[peer])
