# The WireGuard mode's state that the loop reads: peers, keypairs by receiver index, the queue of packets that
# wait for a session, and the two ways to the control side (handshake messages, news about data).
#
# Every function expects the caller to hold `sessions.lock`; none makes a system call. The loop holds the lock
# for a burst and never across a sleep. Handshakes, timers and policy are Python's: fasttun/wireguard/.
# Paper: "WireGuard: Next Generation Kernel Network Tunnel", version of 2020.

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from fasttun._native.aead cimport ft_aead_key, ft_aead_wipe
from fasttun._native.allowedips cimport allowedips_lookup, allowedips_t
from fasttun._native.endpoint cimport endpoint_t, sockaddr_t
from fasttun._native.mac1 cimport EVP_MAC_CTX
from fasttun._native.packet cimport address_t
from fasttun._native.replay cimport REPLAY_LIMIT, replay_t
from fasttun._native.system cimport memcpy, memset, pthread_mutex_t

cdef extern from *:
    """
    #include <endian.h>
    """
    uint32_t htole32(uint32_t) noexcept nogil
    uint64_t htole64(uint64_t) noexcept nogil
    uint32_t le32toh(uint32_t) noexcept nogil
    uint64_t le64toh(uint64_t) noexcept nogil

cdef enum:
    SESSION_HEADER = 16
    # type, receiver index, counter (§5.4.6)
    SESSION_TAG = 16
    SESSION_OVERHEAD = 32
    SESSION_PADDING = 16
    QUEUE_LIMIT = 128
    # packets that wait for one peer's session; the oldest goes first
    QUEUE_SLOTS = 1024
    # for all peers together
    KEYPAIR_BUCKETS = 16384
    # a power of two; receiver indices are random, so their low bits are a hash
    MESSAGE_RING = 4096
    # a power of two: handshake messages on their way to Python
    MESSAGE_SIZE = 148
    # bytes of the largest handshake message, the initiation
    REPLY_LIMIT = 64
    # messages in the ring above which no cookie reply enters: anyone can make one, it has no mac1

cdef enum:
    REJECT_AFTER_TIME_NS = 180000000000
    QUIET_NS = 200000000
    # between two wake-ups of the control side for news that can wait

cdef enum:
    # What has happened with a peer's data since the control side last looked.
    NEWS_SENT = 1
    NEWS_RECEIVED = 2
    # authentic data with an inner packet
    NEWS_HEARD = 4
    # anything authentic, keepalives too
    NEWS_FIRST = 8
    # the first under a keypair: `heard_index`
    NEWS_WAITING = 16
    # a packet waits for a session
    NEWS_SENT_LAST = 32
    # of sent and received, sent was the later

cdef enum:
    # What the control side wants the loop to do for a peer.
    WORK_FLUSH = 1
    WORK_KEEPALIVE = 2

ctypedef struct keypair_t:
    ft_aead_key send
    ft_aead_key receive
    replay_t window
    uint64_t counter
    # of the next packet sent
    uint64_t born_ns
    uint32_t local_index
    uint32_t remote_index
    uint64_t serial
    # of all keypairs in the order of their handshakes
    session_peer_t *peer
    keypair_t *next
    bint heard

ctypedef struct session_peer_t:
    int32_t number
    keypair_t *current
    # what we send under; NULL without a session
    endpoint_t endpoint
    sockaddr_t address
    address_t local
    # this host's outer address that the peer sends to; zero when not known
    bint reachable
    # `address` is known
    int32_t keypairs
    int32_t queue_head
    int32_t queue_tail
    int32_t queued
    uint64_t received_packets
    uint64_t received_bytes
    uint64_t expected_packets
    # by their counters: what the peer has sent up to the last one that came
    uint64_t sent_packets
    uint64_t sent_bytes
    # bytes of whole datagrams
    uint32_t heard_index
    int news
    session_peer_t *next_news
    int work
    session_peer_t *next_work

ctypedef struct news_t:
    endpoint_t endpoint
    uint64_t counter
    int32_t number
    int flags
    uint32_t index

ctypedef struct slot_t:
    int32_t next
    uint32_t length

ctypedef struct message_t:
    endpoint_t endpoint
    address_t local
    uint32_t length
    uint8_t[148] data

ctypedef struct sessions_t:
    pthread_mutex_t lock
    int waiting
    # control calls that want the lock: the loop lets them go first
    int family
    int event_fd
    # the worker's; -1 before there is one
    uint32_t mtu
    # no padding goes beyond it
    allowedips_t allowed
    session_peer_t **peers
    int32_t peer_capacity
    int32_t peer_count
    int32_t peer_hint
    # where to look for a free number
    keypair_t **buckets
    uint64_t keypair_serial
    uint8_t *slots
    # QUEUE_SLOTS of slot_t and `slot_size` bytes
    size_t slot_size
    int32_t slot_free
    int32_t slots_left
    uint64_t queue_dropped
    # packets that the control side dropped, not counted yet
    EVP_MAC_CTX *mac1
    # NULL without a private key: no handshake message is for us
    message_t *messages
    uint32_t message_head
    uint32_t message_tail
    uint64_t messages_lost
    session_peer_t *news
    bint urgent
    bint told
    # the control side has been woken and has not looked yet
    uint64_t quiet_until_ns
    # before that, news that can wait does not wake the control side
    session_peer_t *work
    int has_work
    int offload_lost
    # offload << 16 | errno of one that the loop has given up; 0 for none


cdef inline slot_t *slot_at(sessions_t *s, int32_t slot) noexcept nogil:
    return <slot_t *>(s.slots + slot * (sizeof(slot_t) + s.slot_size))


cdef inline uint8_t *slot_data(slot_t *slot) noexcept nogil:
    return <uint8_t *>slot + sizeof(slot_t)


cdef inline uint32_t padded(const sessions_t *s, uint32_t length) noexcept nogil:
    """The length after padding to a multiple of 16, which neither exceeds the MTU nor cuts anything (§5.4.6)."""
    cdef uint32_t full = (length + SESSION_PADDING - 1) & ~<uint32_t>(SESSION_PADDING - 1)
    if full > s.mtu:
        full = s.mtu
    return full if full > length else length


# ----------------------------------------------------------------------------------------- keypairs

cdef inline keypair_t *find_keypair(const sessions_t *s, uint32_t local_index) noexcept nogil:
    cdef keypair_t *keypair = s.buckets[local_index & (KEYPAIR_BUCKETS - 1)]
    while keypair != NULL and keypair.local_index != local_index:
        keypair = keypair.next
    return keypair


cdef inline void add_keypair(sessions_t *s, keypair_t *keypair) noexcept nogil:
    cdef uint32_t bucket = keypair.local_index & (KEYPAIR_BUCKETS - 1)
    s.keypair_serial += 1
    keypair.serial = s.keypair_serial
    keypair.next = s.buckets[bucket]
    s.buckets[bucket] = keypair


cdef inline void remove_keypair(sessions_t *s, keypair_t *keypair) noexcept nogil:
    """Unlinks the keypair, overwrites its keys and frees it."""
    cdef keypair_t **link = &s.buckets[keypair.local_index & (KEYPAIR_BUCKETS - 1)]
    while link[0] != keypair:
        link = &link[0].next
    link[0] = keypair.next
    if keypair.peer.current == keypair:
        keypair.peer.current = NULL
    ft_aead_wipe(&keypair.send)
    ft_aead_wipe(&keypair.receive)
    free(keypair)


cdef inline bint can_send(const session_peer_t *peer, uint64_t now) noexcept nogil:
    """Whether there is a session whose time and messages have not run out, and somewhere to send to."""
    cdef const keypair_t *keypair = peer.current
    return keypair != NULL and peer.reachable and now < keypair.born_ns + REJECT_AFTER_TIME_NS \
        and keypair.counter < REPLAY_LIMIT


# --------------------------------------------------------------------------------------------- news

cdef inline void tell_news(sessions_t *s, session_peer_t *peer, int news, bint urgent) noexcept nogil:
    if peer.news == 0:
        peer.next_news = s.news
        s.news = peer
    peer.news |= news
    if urgent:
        s.urgent = True


cdef inline void tell_sent(sessions_t *s, session_peer_t *peer) noexcept nogil:
    tell_news(s, peer, NEWS_SENT | NEWS_SENT_LAST, False)


cdef inline void tell_received(sessions_t *s, session_peer_t *peer, keypair_t *keypair, bint empty) noexcept nogil:
    """An authentic packet came. The first under a keypair confirms it, which the control side must know soon.

    Here it counts at once: the answer must not go under an older one, which the peer may have lost (§5.4.6).
    """
    cdef bint first = not keypair.heard
    keypair.heard = True
    if first and (peer.current == NULL or keypair.serial > peer.current.serial):
        peer.current = keypair
    if first or not peer.news & NEWS_FIRST:
        peer.heard_index = keypair.local_index
    tell_news(s, peer, NEWS_HEARD | (0 if empty else NEWS_RECEIVED) | (NEWS_FIRST if first else 0), first)
    if not empty:
        peer.news &= ~NEWS_SENT_LAST


cdef inline bint should_wake(const sessions_t *s, uint64_t now) noexcept nogil:
    """Whether the control side is to look now: at once for what cannot wait, else not too often."""
    return not s.told and (
        s.urgent or s.message_head != s.message_tail or (s.news != NULL and now >= s.quiet_until_ns))


cdef inline bint put_message(sessions_t *s, const uint8_t *data, uint32_t length, const endpoint_t *from_,
                             const address_t *local) noexcept nogil:
    """Hands a handshake message to the control side; False when the ring is full."""
    cdef message_t *message
    if s.message_head - s.message_tail == MESSAGE_RING:
        s.messages_lost += 1
        return False
    message = &s.messages[s.message_head & (MESSAGE_RING - 1)]
    message.endpoint = from_[0]
    message.local = local[0]
    message.length = length
    memcpy(message.data, data, length)
    s.message_head += 1
    return True


cdef inline bint put_reply(sessions_t *s, const uint8_t *data, uint32_t length, const endpoint_t *from_,
                           const address_t *local) noexcept nogil:
    """The same for a cookie reply, which leaves most of the ring to those who know our public key."""
    if s.message_head - s.message_tail >= REPLY_LIMIT:
        s.messages_lost += 1
        return False
    return put_message(s, data, length, from_, local)


# -------------------------------------------------------------------------------------------- queue

cdef inline int32_t unqueue(sessions_t *s, session_peer_t *peer) noexcept nogil:
    """Takes the oldest waiting packet off the peer's queue: its slot, for `free_slot`; -1 when none waits."""
    cdef int32_t slot = peer.queue_head
    if peer.queued == 0:
        return -1
    peer.queue_head = slot_at(s, slot).next
    peer.queued -= 1
    return slot


cdef inline void free_slot(sessions_t *s, int32_t slot) noexcept nogil:
    slot_at(s, slot).next = s.slot_free
    s.slot_free = slot
    s.slots_left += 1


cdef inline int queue_packet(sessions_t *s, session_peer_t *peer, const uint8_t *packet,
                             uint32_t length) noexcept nogil:
    """Keeps a packet until there is a session. Returns how many were lost for it: an old one, or itself.

    No peer gets more than are left for others, or a few silent ones would take them all.
    """
    cdef int lost = 0
    cdef int32_t slot
    if length > s.slot_size:
        return 1
    if peer.queued >= QUEUE_LIMIT or (peer.queued and peer.queued >= s.slots_left):
        free_slot(s, unqueue(s, peer))
        lost = 1
    if s.slot_free < 0:
        return 1
    slot = s.slot_free
    s.slot_free = slot_at(s, slot).next
    s.slots_left -= 1
    slot_at(s, slot).length = length
    memcpy(slot_data(slot_at(s, slot)), packet, length)
    if peer.queued:
        slot_at(s, peer.queue_tail).next = slot
    else:
        peer.queue_head = slot
    peer.queue_tail = slot
    peer.queued += 1
    return lost


cdef inline int drop_queue(sessions_t *s, session_peer_t *peer) noexcept nogil:
    """Frees what waits for the peer: how many packets that were."""
    cdef int dropped = 0
    while peer.queued:
        free_slot(s, unqueue(s, peer))
        dropped += 1
    return dropped


# ------------------------------------------------------------------------------------- control's side

cdef inline void want_work(sessions_t *s, session_peer_t *peer, int work) noexcept nogil:
    if peer.work == 0:
        peer.next_work = s.work
        s.work = peer
    peer.work |= work
    s.has_work = 1


cdef inline void drop_waiting(sessions_t *s, session_peer_t *peer) noexcept nogil:
    """Frees what waits for the peer, for the loop to count."""
    s.queue_dropped += drop_queue(s, peer)
    s.has_work = 1


cdef inline void forget_peer(sessions_t *s, session_peer_t *peer) noexcept nogil:
    """Takes the peer off every list and frees it; its keypairs and allowed IPs are already gone."""
    cdef session_peer_t **link
    if peer.news:
        link = &s.news
        while link[0] != peer:
            link = &link[0].next_news
        link[0] = peer.next_news
    if peer.work:
        link = &s.work
        while link[0] != peer:
            link = &link[0].next_work
        link[0] = peer.next_work
    s.peers[peer.number] = NULL
    s.peer_count -= 1
    free(peer)
