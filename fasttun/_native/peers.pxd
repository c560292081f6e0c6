# Who is behind which inner address: the peer table of the plain mode, and the rule by which an address
# moves. docs/design.md ("Peer learning") states the rule and what it withstands; tests/support/twins.py
# holds a slow twin.
#
# Two hash tables in fixed arrays: entries (inner address -> peer) and peers (outer endpoint). Every
# function expects the caller to hold `table.lock`; none of them makes a system call.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from fasttun._native.endpoint cimport (
    endpoint_t, endpoint_to_sockaddr, in_network, same_endpoint, sockaddr_t,
)
from fasttun._native.packet cimport address_t
from fasttun._native.siphash cimport siphash, siphash_key_t
from fasttun._native.system cimport memcpy, memset, precise_ns, pthread_mutex_t
from fasttun._native.wire cimport FRAMING_AUTO, FRAMING_RAW

cdef enum:
    MAX_ALLOWED = 256
    # outer networks of --allow
    MAX_OWN = 32
    # this host's inner addresses
    MAX_ADDRESSES_A_PEER = 1024
    # so that one sender cannot fill the table
    EVENT_RING = 256
    # a power of two
    CHECK_BUCKETS = 256
    # a power of two: rate limit of checks to claimants, by hash of their endpoint
    STUN_BURST = 1000
    # Binding requests answered at once; refilled at the same number a second
    TRANSACTION_SIZE = 12

cdef enum:
    CHECKS_NEEDED = 2
    # unanswered checks of the present owner before its address may move

cdef enum:
    PROOF_NS = 8000000000
    # how long a claimant's answer counts: about as long as the check that it answers

cdef enum:
    SCAN_NS = 100000000
    # between two looks through a full table: else each datagram that it refuses would cost one

cdef enum:
    ADMIT_STRANGER = -1
    ADMIT_UNPROVEN = -2
    ADMIT_FULL = -3

cdef enum:
    EVENT_PEER = 1
    EVENT_MOVED = 2
    EVENT_GREETED = 3
    EVENT_OFFLOAD = 4
    EVENT_FAST_PATH = 5

ctypedef struct peer_t:
    endpoint_t endpoint
    sockaddr_t address
    address_t local
    # this host's outer address that the peer sends to, and gets its answers from; zero when not known
    uint64_t heard_ns
    uint64_t kept_ns
    # last Binding request: it keeps the peer from expiring, but is no word in a contest
    uint64_t first_check_ns
    uint64_t last_check_ns
    uint64_t asked_ns
    # when it was last sent a check as an owner: its own, for a bucket shared with a claimant would starve it
    uint64_t inbound_packets
    uint64_t inbound_bytes
    uint64_t outbound_packets
    uint64_t outbound_bytes
    uint32_t generation
    int32_t addresses
    int32_t next
    uint8_t used
    uint8_t framing
    uint8_t checks
    uint8_t alternate
    uint8_t unfinished
    # it has said that it takes packets whose checksum and segmentation are left to it

ctypedef struct entry_t:
    address_t address
    endpoint_t candidate
    # the last claimant that has answered a check, and when; 0 for none
    uint64_t proven_ns
    int32_t peer
    int32_t next
    uint8_t used

ctypedef struct event_t:
    endpoint_t endpoint
    address_t address
    int32_t kind
    int32_t value

ctypedef struct check_t:
    # A Binding request that the caller must send, once the lock is given back.
    bint wanted
    sockaddr_t to
    address_t local
    uint8_t[12] transaction

ctypedef struct allowed_t:
    uint8_t[16] network
    int32_t bits

ctypedef struct table_t:
    pthread_mutex_t lock
    siphash_key_t key
    int family
    bint fixed
    bint unfinished
    # what this side says of itself, see peer_t
    int framing
    uint64_t expiry_ns
    uint64_t scanned_ns
    # when a full table was last looked through for peers that have expired
    uint64_t patience_ns
    # how long an owner may take to answer a check
    int32_t peer_capacity
    int32_t peer_count
    int32_t peer_free
    int32_t peer_mask
    peer_t *peers
    int32_t *peer_buckets
    int32_t entry_capacity
    int32_t entry_count
    int32_t entry_free
    int32_t entry_mask
    entry_t *entries
    int32_t *entry_buckets
    int32_t allowed_count
    allowed_t[256] allowed
    int32_t own_count
    address_t[32] own
    uint64_t[256] check_sent_ns
    uint64_t stun_tokens
    uint64_t stun_refill_ns
    uint8_t[12] greeting
    bint greeting_set
    uint64_t greeting_ns
    # when it was set; 0 once it is answered
    event_t[256] events
    uint64_t event_head
    uint64_t event_tail
    uint64_t events_lost


cdef inline uint64_t hash_of_endpoint(table_t *t, const endpoint_t *e) noexcept nogil:
    cdef uint64_t[3] words
    words[0] = e.high
    words[1] = e.low
    words[2] = (<uint64_t>e.scope_id << 32) | e.port
    return siphash(&t.key, words, 3)


cdef inline int32_t bucket_of_endpoint(table_t *t, const endpoint_t *e) noexcept nogil:
    return <int32_t>(hash_of_endpoint(t, e) & <uint64_t>t.peer_mask)


cdef inline int32_t bucket_of_address(table_t *t, const address_t *a) noexcept nogil:
    cdef uint64_t[2] words
    words[0] = a.high
    words[1] = a.low
    return <int32_t>(siphash(&t.key, words, 2) & <uint64_t>t.entry_mask)


cdef inline int32_t find_peer(table_t *t, const endpoint_t *e) noexcept nogil:
    cdef int32_t i = t.peer_buckets[bucket_of_endpoint(t, e)]
    while i >= 0 and not same_endpoint(&t.peers[i].endpoint, e):
        i = t.peers[i].next
    return i


cdef inline int32_t find_entry(table_t *t, const address_t *a) noexcept nogil:
    cdef int32_t i = t.entry_buckets[bucket_of_address(t, a)]
    while i >= 0 and not (t.entries[i].address.low == a.low and t.entries[i].address.high == a.high):
        i = t.entries[i].next
    return i


cdef inline bint table_event(table_t *t, int kind, const endpoint_t *endpoint,
                             const address_t *address, int value) noexcept nogil:
    """False when the ring is full: the event is then counted as lost."""
    cdef event_t *event
    if t.event_head - t.event_tail >= EVENT_RING:
        t.events_lost += 1
        return False
    event = &t.events[t.event_head & (EVENT_RING - 1)]
    event.kind = kind
    event.value = value
    if endpoint != NULL:
        event.endpoint = endpoint[0]
    else:
        memset(&event.endpoint, 0, sizeof(endpoint_t))
    if address != NULL:
        event.address = address[0]
    else:
        memset(&event.address, 0, sizeof(address_t))
    t.event_head += 1
    return True


cdef inline int round_trip_us(table_t *t) noexcept nogil:
    """Microseconds since the greeting that is now answered; -1 when it was answered before."""
    cdef uint64_t us
    if t.greeting_ns == 0:
        return -1
    us = (precise_ns() - t.greeting_ns) // 1000
    t.greeting_ns = 0
    return <int>us if us < 0x7fffffff else 0x7fffffff


cdef inline int32_t add_peer(table_t *t, const endpoint_t *e, uint64_t now) noexcept nogil:
    """The new peer's index, or -1 when the table is full or the endpoint is of no use to the socket."""
    cdef int32_t i = t.peer_free
    cdef int32_t bucket
    cdef uint32_t generation
    cdef sockaddr_t address
    if i < 0 or not endpoint_to_sockaddr(e, t.family, &address):
        return -1
    t.peer_free = t.peers[i].next
    generation = t.peers[i].generation + 1
    memset(&t.peers[i], 0, sizeof(peer_t))
    t.peers[i].generation = generation
    t.peers[i].endpoint = e[0]
    t.peers[i].address = address
    t.peers[i].heard_ns = now
    t.peers[i].used = 1
    bucket = bucket_of_endpoint(t, e)
    t.peers[i].next = t.peer_buckets[bucket]
    t.peer_buckets[bucket] = i
    t.peer_count += 1
    return i


cdef inline void unlink_entry(table_t *t, int32_t index) noexcept nogil:
    cdef int32_t bucket = bucket_of_address(t, &t.entries[index].address)
    cdef int32_t i = t.entry_buckets[bucket]
    if i == index:
        t.entry_buckets[bucket] = t.entries[index].next
    else:
        while t.entries[i].next != index:
            i = t.entries[i].next
        t.entries[i].next = t.entries[index].next
    t.entries[index].used = 0
    t.entries[index].next = t.entry_free
    t.entry_free = index
    t.entry_count -= 1


cdef inline void remove_peer(table_t *t, int32_t index) noexcept nogil:
    """Removes the peer with its entries: one pass over all entries, rare."""
    cdef int32_t bucket, i
    if t.peers[index].addresses:
        for i in range(t.entry_capacity):
            if t.entries[i].used and t.entries[i].peer == index:
                unlink_entry(t, i)
    bucket = bucket_of_endpoint(t, &t.peers[index].endpoint)
    i = t.peer_buckets[bucket]
    if i == index:
        t.peer_buckets[bucket] = t.peers[index].next
    else:
        while t.peers[i].next != index:
            i = t.peers[i].next
        t.peers[i].next = t.peers[index].next
    t.peers[index].used = 0
    t.peers[index].addresses = 0
    t.peers[index].generation += 1
    t.peers[index].next = t.peer_free
    t.peer_free = index
    t.peer_count -= 1


cdef inline bint is_older(uint64_t now, uint64_t then, uint64_t age_ns) noexcept nogil:
    """Whether `then` is more than `age_ns` past; workers' clocks differ by a tick, so `then` may be ahead."""
    return now > then and now - then > age_ns


cdef inline bint has_expired(const table_t *t, const peer_t *peer, uint64_t now) noexcept nogil:
    return is_older(now, peer.heard_ns, t.expiry_ns) and is_older(now, peer.kept_ns, t.expiry_ns)


cdef inline bint is_expired(table_t *t, int32_t peer, uint64_t now) noexcept nogil:
    return has_expired(t, &t.peers[peer], now)


cdef inline int expire_peers(table_t *t, uint64_t now) noexcept nogil:
    """Removes every peer that has been silent for longer than the expiry; how many."""
    cdef int32_t i
    cdef int removed = 0
    if t.fixed:
        return 0
    for i in range(t.peer_capacity):
        if t.peers[i].used and is_expired(t, i, now):
            remove_peer(t, i)
            removed += 1
    return removed


cdef inline void heard_from(table_t *t, int32_t peer, int framing, uint64_t now) noexcept nogil:
    t.peers[peer].heard_ns = now
    t.peers[peer].checks = 0
    # Whoever has sent raw once can read raw; lametun never sends it. So raw sticks.
    if t.peers[peer].framing != FRAMING_RAW and framing != FRAMING_AUTO:
        t.peers[peer].framing = <uint8_t>framing


cdef inline uint64_t check_tag(const table_t *t, const endpoint_t *to, int32_t entry, const address_t *address,
                               uint64_t epoch) noexcept nogil:
    cdef uint64_t[7] words
    words[0] = to.high
    words[1] = to.low
    words[2] = (<uint64_t>to.scope_id << 32) | to.port
    words[3] = <uint64_t>entry
    words[4] = address.high
    words[5] = address.low
    words[6] = epoch
    return siphash(&t.key, words, 7)


cdef inline uint64_t check_epoch(uint64_t now) noexcept nogil:
    """4.3 s steps; an answer counts in the step of its check and in the next."""
    return now >> 32


cdef inline void make_check(table_t *t, const endpoint_t *to, const address_t *local, int32_t entry,
                            uint64_t now, uint64_t *sent_ns, check_t *check) noexcept nogil:
    """Fills `check` unless the last one of those that share `sent_ns` is less than a fifth of the patience ago."""
    cdef uint32_t number = <uint32_t>entry
    cdef uint64_t tag
    if not is_older(now, sent_ns[0], t.patience_ns // 5 - 1):
        return
    if not endpoint_to_sockaddr(to, t.family, &check.to):
        return
    sent_ns[0] = now
    tag = check_tag(t, to, entry, &t.entries[entry].address, check_epoch(now))
    memcpy(check.transaction, &number, 4)
    memcpy(check.transaction + 4, &tag, 8)
    check.local = local[0]
    check.wanted = True


cdef inline bint is_mute(const table_t *t, const peer_t *owner, uint64_t now) noexcept nogil:
    """Whether the owner has left two checks unanswered, the first for all the patience, and not said a word."""
    return owner.checks >= CHECKS_NEEDED and is_older(now, owner.first_check_ns, t.patience_ns - 1) \
        and is_older(now, owner.last_check_ns, t.patience_ns // 3 - 1)


cdef inline void contest(table_t *t, int32_t entry, const endpoint_t *claimant, const address_t *local,
                         uint64_t now, check_t *checks) noexcept nogil:
    """`claimant` sends from an address that another endpoint owns: asks the owner, and if it is slow, him too.

    Both at a time, so that senders that back off (TCP) need few claims. checks: room for two.
    """
    cdef peer_t *owner = &t.peers[t.entries[entry].peer]
    cdef uint64_t *claimants_ns = &t.check_sent_ns[hash_of_endpoint(t, claimant) & (CHECK_BUCKETS - 1)]
    if owner.checks and is_older(now, owner.first_check_ns, t.patience_ns // 5 - 1):
        make_check(t, claimant, local, entry, now, claimants_ns, &checks[1])
    if owner.checks == 0 or (owner.checks < CHECKS_NEEDED
                             and is_older(now, owner.last_check_ns, t.patience_ns // 3 - 1)):
        make_check(t, &owner.endpoint, &owner.local, entry, now, &owner.asked_ns, &checks[0])
        if checks[0].wanted:
            if owner.checks == 0:
                owner.first_check_ns = now
            owner.checks += 1
            owner.last_check_ns = now


cdef inline int32_t move_entry(table_t *t, int32_t entry, const endpoint_t *to, const address_t *local,
                               uint64_t now) noexcept nogil:
    """Gives the address to `to`: its peer's index, or -1 when there is no room for it."""
    cdef int32_t owner = t.entries[entry].peer
    cdef int32_t peer = find_peer(t, to)
    if peer < 0:
        peer = add_peer(t, to, now)
    if peer < 0 or t.peers[peer].addresses >= MAX_ADDRESSES_A_PEER:
        return -1
    t.entries[entry].peer = peer
    t.entries[entry].proven_ns = 0
    t.peers[peer].addresses += 1
    t.peers[peer].local = local[0]
    heard_from(t, peer, FRAMING_RAW, now)
    t.peers[owner].addresses -= 1
    if t.peers[owner].addresses == 0:
        remove_peer(t, owner)
    return peer


cdef inline int32_t admit(table_t *t, const endpoint_t *from_, const address_t *local,
                          const address_t *source, int framing, uint64_t now, check_t *checks,
                          bint *news) noexcept nogil:
    """The peer to which a packet from `source`, received from `from_` at `local`, belongs; or ADMIT_* below 0.

    Learns a free address at once. checks: two; where `wanted`, a Binding request is to be sent. `news`: set when an
    event was posted.
    """
    cdef int32_t peer, entry, owner, bucket
    if t.fixed:
        if t.peer_count == 0 or not same_endpoint(&t.peers[0].endpoint, from_):
            return ADMIT_STRANGER
        heard_from(t, 0, framing, now)
        return 0
    peer = find_peer(t, from_)
    entry = find_entry(t, source)
    if entry >= 0:
        owner = t.entries[entry].peer
        if owner == peer:
            t.peers[peer].local = local[0]
            heard_from(t, peer, framing, now)
            return peer
        if not is_expired(t, owner, now):
            if t.entries[entry].proven_ns and same_endpoint(&t.entries[entry].candidate, from_) \
                    and not is_older(now, t.entries[entry].proven_ns, PROOF_NS) \
                    and is_mute(t, &t.peers[owner], now):
                peer = move_entry(t, entry, from_, local, now)
                if peer < 0:
                    return ADMIT_FULL
                news[0] = table_event(t, EVENT_MOVED, from_, source, 0) or news[0]
                return peer
            contest(t, entry, from_, local, now, checks)
            return ADMIT_UNPROVEN
        remove_peer(t, owner)
    if (t.entry_free < 0 or (peer < 0 and t.peer_free < 0)) and is_older(now, t.scanned_ns, SCAN_NS - 1):
        t.scanned_ns = now
        expire_peers(t, now)
        peer = find_peer(t, from_)
    if t.entry_free < 0 or (peer >= 0 and t.peers[peer].addresses >= MAX_ADDRESSES_A_PEER):
        return ADMIT_FULL
    if peer < 0:
        peer = add_peer(t, from_, now)
        if peer < 0:
            return ADMIT_FULL
        news[0] = table_event(t, EVENT_PEER, from_, source, 0) or news[0]
    elif t.unfinished:
        news[0] = table_event(t, EVENT_FAST_PATH, from_, source, 0) or news[0]
    entry = t.entry_free
    t.entry_free = t.entries[entry].next
    t.entries[entry].address = source[0]
    t.entries[entry].peer = peer
    t.entries[entry].proven_ns = 0
    t.entries[entry].used = 1
    bucket = bucket_of_address(t, source)
    t.entries[entry].next = t.entry_buckets[bucket]
    t.entry_buckets[bucket] = entry
    t.entry_count += 1
    t.peers[peer].addresses += 1
    t.peers[peer].local = local[0]
    heard_from(t, peer, framing, now)
    return peer


cdef inline bint check_answered(table_t *t, const endpoint_t *from_, const address_t *local,
                                const uint8_t *transaction, bint unfinished, uint64_t now,
                                bint *news) noexcept nogil:
    """A Binding success has come from `from_`. False when its transaction is none that we have sent there.

    From the owner of the address: the owner lives, the claim falls. From the claimant: he receives what is
    sent to him; the address moves now if the owner is mute, else with his next packet if it is by then.
    """
    cdef uint32_t number
    cdef uint64_t tag
    cdef int32_t entry, owner
    memcpy(&number, transaction, 4)
    memcpy(&tag, transaction + 4, 8)
    if number >= <uint32_t>t.entry_capacity or not t.entries[number].used:
        return False
    entry = <int32_t>number
    if tag != check_tag(t, from_, entry, &t.entries[entry].address, check_epoch(now)) and \
            tag != check_tag(t, from_, entry, &t.entries[entry].address, check_epoch(now) - 1):
        return False
    owner = t.entries[entry].peer
    if same_endpoint(&t.peers[owner].endpoint, from_):
        heard_from(t, owner, FRAMING_RAW, now)
        if t.unfinished and t.peers[owner].unfinished != unfinished:
            t.peers[owner].unfinished = unfinished
            news[0] = table_event(t, EVENT_FAST_PATH, from_, NULL, unfinished) or news[0]
    elif is_mute(t, &t.peers[owner], now):
        if move_entry(t, entry, from_, local, now) >= 0:
            news[0] = table_event(t, EVENT_MOVED, from_, &t.entries[entry].address, 0) or news[0]
    else:
        t.entries[entry].candidate = from_[0]
        t.entries[entry].proven_ns = now
    return True


cdef inline int32_t peer_for(table_t *t, const address_t *destination, uint64_t now) noexcept nogil:
    """The peer that a packet to `destination` goes to, or -1.

    The owner of the address; else, when there is only one peer, that one.
    """
    cdef int32_t entry, i
    if t.fixed:
        return 0 if t.peer_count else -1
    if t.peer_count == 0:
        return -1
    entry = find_entry(t, destination)
    if entry >= 0:
        return -1 if is_expired(t, t.entries[entry].peer, now) else t.entries[entry].peer
    if t.peer_count == 1:
        for i in range(t.peer_capacity):
            if t.peers[i].used:
                return -1 if is_expired(t, i, now) else i
    return -1


cdef inline bint is_allowed(const table_t *t, const endpoint_t *from_) noexcept nogil:
    """Whether the outer address is within --allow; with none given, all are."""
    cdef int32_t i
    for i in range(t.allowed_count):
        if in_network(from_.high, from_.low, t.allowed[i].network, t.allowed[i].bits):
            return True
    return t.allowed_count == 0


cdef inline bint is_own(const table_t *t, const address_t *a) noexcept nogil:
    """Whether it is an inner address of this host, which no peer may have."""
    cdef int32_t i
    for i in range(t.own_count):
        if t.own[i].low == a.low and t.own[i].high == a.high:
            return True
    return False


cdef inline void forget_local(table_t *t, const address_t *local) noexcept nogil:
    """`local` is no longer an address of this host: answers leave from where the routes say."""
    cdef int32_t i
    for i in range(t.peer_capacity):
        if t.peers[i].used and t.peers[i].local.low == local.low and t.peers[i].local.high == local.high:
            memset(&t.peers[i].local, 0, sizeof(address_t))


cdef inline bint may_answer_stun(table_t *t, uint64_t now) noexcept nogil:
    """A token bucket over all sources: bounds what a flood of requests can make us send."""
    cdef uint64_t step = 1000000000 // STUN_BURST
    cdef uint64_t gained = (now - t.stun_refill_ns) // step if now > t.stun_refill_ns else 0
    if gained:
        t.stun_tokens = STUN_BURST if gained > STUN_BURST - t.stun_tokens else t.stun_tokens + gained
        t.stun_refill_ns += gained * step
    if t.stun_tokens == 0:
        return False
    t.stun_tokens -= 1
    return True
