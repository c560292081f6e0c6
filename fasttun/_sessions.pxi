# SessionTable: the control side's hand on the WireGuard mode's sessions, included by _core.pyx.
# The structures and their rules are in _native/sessions.pxd; who calls this is fasttun/wireguard/tunnel.py.
NEWS_FLAGS = {"sent": NEWS_SENT, "received": NEWS_RECEIVED, "heard": NEWS_HEARD, "first": NEWS_FIRST,
              "waiting": NEWS_WAITING, "sent_last": NEWS_SENT_LAST}


cdef class SessionTable:
    """Peers, sessions and allowed IPs of one WireGuard device, shared with its loop. Usable from any thread.

    family: of the UDP socket. mtu: bytes of the largest inner packet that may wait for a session. A peer is a
    number that `add_peer` gives; endpoints are (host, port, scope_id). Wrong numbers raise `KeyError`.
    """

    cdef sessions_t *s
    cdef readonly int notify_fd

    def __cinit__(self, *, int family=AF_INET6, int mtu=1420):
        cdef int32_t i
        cdef sessions_t *s
        self.notify_fd = -1
        s = self.s = <sessions_t *>calloc(1, sizeof(sessions_t))
        if s == NULL:
            raise MemoryError("fasttun: no memory for the sessions")
        pthread_mutex_init(&s.lock, NULL)
        s.family = family
        s.event_fd = -1
        s.mtu = mtu
        s.slot_size = (mtu + 63) // 64 * 64
        s.buckets = <keypair_t **>calloc(KEYPAIR_BUCKETS, sizeof(keypair_t *))
        s.slots = <uint8_t *>calloc(QUEUE_SLOTS, sizeof(slot_t) + s.slot_size)
        s.messages = <message_t *>calloc(MESSAGE_RING, sizeof(message_t))
        if s.buckets == NULL or s.slots == NULL or s.messages == NULL or allowedips_init(&s.allowed) < 0:
            raise MemoryError("fasttun: no memory for the sessions")
        for i in range(QUEUE_SLOTS):
            slot_at(s, i).next = i + 1 if i + 1 < QUEUE_SLOTS else -1
        s.slots_left = QUEUE_SLOTS
        self.notify_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.notify_fd < 0:
            raise DeviceError("eventfd", "sessions", errno)

    def __dealloc__(self):
        cdef sessions_t *s = self.s
        cdef int32_t i
        if self.notify_fd >= 0:
            close(self.notify_fd)
        if s == NULL:
            return
        if s.buckets != NULL:
            for i in range(KEYPAIR_BUCKETS):
                while s.buckets[i] != NULL:
                    remove_keypair(s, s.buckets[i])
        for i in range(s.peer_capacity):
            free(s.peers[i])
        allowedips_free(&s.allowed)
        ft_mac1_free(s.mac1)
        pthread_mutex_destroy(&s.lock)
        free(s.peers)
        free(s.buckets)
        free(s.slots)
        free(s.messages)
        free(s)

    cdef void acquire(self) noexcept:
        add_int(&self.s.waiting, 1)
        with nogil:
            pthread_mutex_lock(&self.s.lock)
        add_int(&self.s.waiting, -1)

    cdef void release(self) noexcept:
        pthread_mutex_unlock(&self.s.lock)

    cdef session_peer_t *peer(self, int32_t number) except NULL:
        """The peer with this number; the lock is held, and given back when there is none."""
        if 0 <= number < self.s.peer_capacity and self.s.peers[number] != NULL:
            return self.s.peers[number]
        self.release()
        raise KeyError(number)

    # ------------------------------------------------------------------------------ configuration

    def set_mac1_key(self, bytes key):
        """The key (32 bytes) that handshake messages to us are checked with; None: none is let through."""
        cdef EVP_MAC_CTX *new = NULL
        cdef EVP_MAC_CTX *old
        if key is not None:
            if len(key) != 32:
                raise ConfigurationError("mac1_key", "is not 32 bytes")
            new = ft_mac1_new(<const uint8_t *><const char *>key)
            if new == NULL:
                raise MemoryError("fasttun: libcrypto gave no BLAKE2s")
        self.acquire()
        old, self.s.mac1 = self.s.mac1, new
        self.release()
        ft_mac1_free(old)

    def set_mtu(self, int mtu):
        """Bytes of the largest inner packet: no padding goes beyond it."""
        self.acquire()
        self.s.mtu = mtu
        self.release()

    def add_peer(self):
        """A new peer without endpoint, session and allowed IPs: its number."""
        cdef sessions_t *s = self.s
        cdef session_peer_t *peer = <session_peer_t *>calloc(1, sizeof(session_peer_t))
        cdef session_peer_t **grown
        cdef int32_t number = 0
        cdef int32_t capacity
        if peer == NULL:
            raise MemoryError("fasttun: no memory for a peer")
        self.acquire()
        if s.peer_count == s.peer_capacity:
            number = s.peer_capacity
            capacity = 2 * s.peer_capacity if s.peer_capacity else 16
            grown = <session_peer_t **>realloc(s.peers, capacity * sizeof(session_peer_t *))
            if grown == NULL:
                self.release()
                free(peer)
                raise MemoryError("fasttun: no memory for a peer")
            memset(grown + s.peer_capacity, 0, (capacity - s.peer_capacity) * sizeof(session_peer_t *))
            s.peers = grown
            s.peer_capacity = capacity
        else:
            number = s.peer_hint
            while s.peers[number] != NULL:
                number = number + 1 if number + 1 < s.peer_capacity else 0
        s.peer_hint = number + 1 if number + 1 < s.peer_capacity else 0
        peer.number = number
        s.peers[number] = peer
        s.peer_count += 1
        self.release()
        return number

    def remove_peer(self, int32_t number):
        """Forgets the peer, its sessions, its queue and its allowed IPs."""
        cdef session_peer_t *peer
        cdef sessions_t *s = self.s
        cdef keypair_t *keypair
        cdef keypair_t *following
        cdef int i
        self.acquire()
        peer = self.peer(number)
        for i in range(KEYPAIR_BUCKETS if peer.keypairs else 0):
            keypair = s.buckets[i]
            while keypair != NULL:
                following = keypair.next
                if keypair.peer == peer:
                    remove_keypair(s, keypair)
                keypair = following
        drop_waiting(s, peer)
        allowedips_remove_peer(&s.allowed, number)
        forget_peer(s, peer)
        self.release()
        self.wake()

    def set_endpoint(self, int32_t number, tuple endpoint, local=None):
        """Where the peer is, until it proves to be elsewhere; whether this socket can reach it.

        local: this host's address that it sends to, when known.
        """
        cdef endpoint_t value
        cdef address_t here
        cdef session_peer_t *peer
        cdef bint reachable
        set_endpoint_value(&value, endpoint)
        if local is not None:
            set_address(&here, local)  # here: nothing may raise under the lock
        self.acquire()
        peer = self.peer(number)
        if not peer.reachable or not same_endpoint(&peer.endpoint, &value):
            memset(&peer.local, 0, sizeof(address_t))
        if local is not None:
            peer.local = here
        peer.endpoint = value
        reachable = peer.reachable = endpoint_to_sockaddr(&value, self.s.family, &peer.address)
        self.release()
        return reachable

    def allow(self, int32_t number, network):
        """Inner addresses of `network` belong to the peer from now on, whosever they were."""
        cdef address_t prefix
        cdef int result
        cdef uint8_t bits = prefix_bits(network)
        set_address(&prefix, network.network_address)
        self.acquire()
        self.peer(number)
        result = allowedips_insert(&self.s.allowed, &prefix, bits, number)
        self.release()
        if result < 0:
            raise MemoryError("fasttun: no memory for allowed IPs")

    def disallow(self, int32_t number, network):
        """`network` is not the peer's any more, if it was."""
        cdef address_t prefix
        cdef uint8_t bits = prefix_bits(network)
        set_address(&prefix, network.network_address)
        self.acquire()
        allowedips_remove(&self.s.allowed, &prefix, bits, number)
        self.release()

    # ----------------------------------------------------------------------------------- sessions

    def install(self, int32_t number, unsigned int local_index, unsigned int remote_index, send, receive, *,
                double age_s=0.0, unsigned long long counter=0):
        """Receives under `local_index` from now on. send, receive: keys of 32 bytes, copied.

        age_s, counter: seconds since the handshake and the first counter, other than 0 in tests.
        """
        cdef const uint8_t[::1] send_key = send
        cdef const uint8_t[::1] receive_key = receive
        cdef session_peer_t *peer
        cdef keypair_t *keypair
        if send_key.shape[0] != 32 or receive_key.shape[0] != 32:
            raise ConfigurationError("key", "is not 32 bytes")
        keypair = <keypair_t *>calloc(1, sizeof(keypair_t))
        if keypair == NULL or ft_aead_init(&keypair.send, &send_key[0]) < 0:
            free(keypair)
            raise MemoryError("fasttun: no memory for a session")
        if ft_aead_init(&keypair.receive, &receive_key[0]) < 0:
            ft_aead_wipe(&keypair.send)
            free(keypair)
            raise MemoryError("fasttun: no memory for a session")
        replay_init(&keypair.window)
        keypair.counter = counter
        keypair.local_index = local_index
        keypair.remote_index = remote_index
        keypair.born_ns = now_ns() - <uint64_t>(age_s * 1e9)
        self.acquire()
        if not 0 <= number < self.s.peer_capacity or self.s.peers[number] == NULL:
            self.release()
            ft_aead_wipe(&keypair.send)
            ft_aead_wipe(&keypair.receive)
            free(keypair)
            raise KeyError(number)
        peer = self.s.peers[number]
        keypair.peer = peer
        peer.keypairs += 1
        add_keypair(self.s, keypair)
        self.release()

    def activate(self, unsigned int local_index, bint confirm):
        """Sends under this keypair from now on, first what waits; confirm: a keepalive if nothing does."""
        cdef keypair_t *keypair
        self.acquire()
        keypair = find_keypair(self.s, local_index)
        if keypair != NULL:
            keypair.peer.current = keypair
            want_work(self.s, keypair.peer, WORK_FLUSH | (WORK_KEEPALIVE if confirm else 0))
        self.release()
        self.wake()

    def remove_keypair(self, unsigned int local_index):
        """Neither sends nor receives under it any more, and wipes it. Nothing when it is not there."""
        cdef keypair_t *keypair
        self.acquire()
        keypair = find_keypair(self.s, local_index)
        if keypair != NULL:
            keypair.peer.keypairs -= 1
            remove_keypair(self.s, keypair)
        self.release()

    def keepalive(self, int32_t number):
        """Sends what waits for the peer, or an empty packet."""
        self.acquire()
        want_work(self.s, self.peer(number), WORK_FLUSH | WORK_KEEPALIVE)
        self.release()
        self.wake()

    def drop_queue(self, int32_t number):
        """Drops what waits for the peer: there will be no session. The loop counts it as `no_session`."""
        self.acquire()
        drop_waiting(self.s, self.peer(number))
        self.release()
        self.wake()

    cpdef void wake(self) noexcept:
        """Makes a sleeping loop look again: for work, or because its socket was replaced."""
        if self.s.event_fd >= 0:
            tell(self.s.event_fd)

    # --------------------------------------------------------------------------------------- news

    def take(self, int limit=256):
        """What the loop has for the control side: (messages, news, backlog, offload).

        messages: up to `limit` tuples (datagram, endpoint, local address or None) with a valid mac1; backlog:
        how many more wait. news: tuples (number, flags, index of the keypair last heard, endpoint, counter of
        the current keypair), flags a sum of NEWS_FLAGS. offload: (name, errno) of one given up, or None. Until 200 ms
        later news that can wait does not write to `notify_fd`: look again by then.
        """
        cdef sessions_t *s = self.s
        cdef uint64_t wakes
        cdef int count = 0
        cdef int known = 0
        cdef int i, offload
        cdef int32_t capacity = s.peer_capacity
        cdef message_t *copied
        cdef news_t *news
        cdef session_peer_t *peer
        copied = <message_t *>malloc(limit * sizeof(message_t))
        news = <news_t *>malloc((capacity + 1) * sizeof(news_t))
        if copied == NULL or news == NULL:
            free(copied)
            free(news)
            raise MemoryError("fasttun: no memory for news")
        self.acquire()
        read(self.notify_fd, &wakes, 8)
        s.told = False
        s.urgent = False
        while count < limit and s.message_tail != s.message_head:
            copied[count] = s.messages[s.message_tail & (MESSAGE_RING - 1)]
            s.message_tail += 1
            count += 1
        backlog = s.message_head - s.message_tail
        while s.news != NULL and known < capacity:
            peer = s.news
            s.news = peer.next_news
            news[known].number = peer.number
            news[known].flags = peer.news
            news[known].index = peer.heard_index
            news[known].endpoint = peer.endpoint
            news[known].counter = peer.current.counter if peer.current != NULL else 0
            peer.news = 0
            known += 1
        if known:
            s.quiet_until_ns = now_ns() + QUIET_NS
        offload = s.offload_lost
        s.offload_lost = 0
        self.release()
        try:
            messages = [(copied[i].data[:copied[i].length], endpoint_value(&copied[i].endpoint),
                         unpacked(&copied[i].local) if is_known(&copied[i].local) else None)
                        for i in range(count)]
            told = [(news[i].number, news[i].flags, news[i].index, endpoint_value(&news[i].endpoint),
                     news[i].counter) for i in range(known)]
        finally:
            free(copied)
            free(news)
        return messages, told, backlog, (OFFLOAD_NAMES[offload >> 16], offload & 0xffff) if offload else None

    def peer_counters(self, int32_t number):
        """A dict of the peer's traffic, in packets and bytes of whole datagrams, without handshakes."""
        cdef session_peer_t peer
        self.acquire()
        peer = self.peer(number)[0]
        self.release()
        return {
            "rx_packets": peer.received_packets, "rx_bytes": peer.received_bytes,
            "rx_expected": peer.expected_packets,
            "tx_packets": peer.sent_packets, "tx_bytes": peer.sent_bytes, "queued": peer.queued,
            "endpoint": endpoint_value(&peer.endpoint) if peer.reachable else None,
            "local": unpacked(&peer.local) if is_known(&peer.local) else None,
        }

    @property
    def messages_lost(self):
        """Handshake messages that found the ring full."""
        return self.s.messages_lost

    def lookup(self, address):
        """The number of the peer that has this inner address, or None."""
        cdef address_t value
        cdef int32_t number
        set_address(&value, address)
        self.acquire()
        number = allowedips_lookup(&self.s.allowed, &value)
        self.release()
        return number if number >= 0 else None


cdef uint8_t prefix_bits(network) except? 255:
    return network.prefixlen + (96 if network.version == 4 else 0)
