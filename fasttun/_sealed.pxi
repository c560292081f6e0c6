# The WireGuard mode's part of the loop, included by _core.pyx: packets are sealed before they are grouped into
# messages, and opened before they are delivered. `sessions.lock` is held from begin_sealed to end_sealed.
#
#   outbound   aim_sealed (allowed IPs) -> forward_sealed: seal_packet, or queue_packet without a session
#              -> seal_pending, once for all packets in a row under one key
#   inbound    take_sealed (receiver index, window) -> open_pending -> enter (source allowed?) -> deliver
#   control    take_sealed: handshake messages with a valid mac1 go to Python; work_sealed: what Python asks for

cdef inline void begin_sealed(worker_t *w) noexcept nogil:
    cdef int _attempt
    # A mutex is not fair: without this a busy loop could shut the control side out for long.
    for _attempt in range(64):
        if not load_int(&w.sessions.waiting):
            break
        sched_yield()
    pthread_mutex_lock(&w.sessions.lock)
    w.sealing.destination_known = False
    w.sealing.source_known = False
    w.sealing.aimed = NULL


cdef inline void end_sealed(worker_t *w, uint64_t now) noexcept nogil:
    if should_wake(w.sessions, now):
        w.sessions.told = True
        w.news = True
    pthread_mutex_unlock(&w.sessions.lock)


# --------------------------------------------------------------------------------------- outbound

cdef inline session_peer_t *aim_sealed(worker_t *w, const uint8_t *packet, int version) noexcept nogil:
    """The peer whose allowed IPs hold the packet's destination, or NULL. The packet has a whole IP header."""
    cdef sealing_t *c = w.sealing
    cdef address_t destination
    cdef int32_t number
    packet_destination(packet, version, &destination)
    if version == 6 and is_mapped_ipv4(destination.high, destination.low):
        return NULL  # it would pass for the IPv4 address that it spells
    if c.destination_known and c.destination.low == destination.low and c.destination.high == destination.high:
        return c.peer
    number = allowedips_lookup(&w.sessions.allowed, &destination)
    c.peer = w.sessions.peers[number] if number >= 0 else NULL
    c.destination = destination
    c.destination_known = True
    return c.peer


cdef inline void seal_pending(worker_t *w) noexcept nogil:
    cdef sealing_t *c = w.sealing
    if c.seal_count:
        ft_seal(&c.seal_keypair.send, c.seals, c.seal_count)
        c.seal_count = 0


cdef inline void write_header(uint8_t *header, keypair_t *keypair, ft_aead_packet *packet) noexcept nogil:
    """The header of the next data message under `keypair`, and the counter for sealing what follows it."""
    cdef uint32_t word = htole32(4)
    cdef uint64_t counter = htole64(keypair.counter)
    memcpy(header, &word, 4)
    word = htole32(keypair.remote_index)
    memcpy(header + 4, &word, 4)
    memcpy(header + 8, &counter, 8)
    packet.counter = keypair.counter
    keypair.counter += 1


cdef inline void seal_packet(worker_t *w, session_peer_t *peer, uint8_t *packet, uint32_t length) noexcept nogil:
    """Adds a packet, with SESSION_HEADER bytes of room before it and padding and tag behind, to the messages."""
    cdef sealing_t *c = w.sealing
    cdef keypair_t *keypair = peer.current
    cdef uint32_t size = padded(w.sessions, length)
    cdef ft_aead_packet *seal
    if c.seal_count and (c.seal_keypair != keypair or c.seal_count == SEAL_BATCH):
        seal_pending(w)
    if c.aimed != peer:
        close_group(w)
        c.aimed = peer
        w.target.address = peer.address
        w.target.local = peer.local
    c.seal_keypair = keypair
    seal = &c.seals[c.seal_count]
    c.seal_count += 1
    seal.data = packet
    seal.length = size
    memset(packet + length, 0, size - length)
    write_header(packet - SESSION_HEADER, keypair, seal)
    append(w, packet - SESSION_HEADER, size + SESSION_OVERHEAD, SESSION_OVERHEAD, length)
    peer.sent_packets += 1
    peer.sent_bytes += size + SESSION_OVERHEAD


cdef inline void forward_sealed(worker_t *w, session_peer_t *peer, uint8_t *packet, uint32_t length,
                                uint64_t now) noexcept nogil:
    """One packet to `peer`: sealed now, or kept until there is a session."""
    cdef direction_t *outbound = &w.counters.outbound
    if peer == NULL:
        outbound.drops[DROP_NO_PEER] += 1
    elif can_send(peer, now) and peer.queued == 0:
        seal_packet(w, peer, packet, length)
        tell_sent(w.sessions, peer)
    elif not peer.reachable:
        outbound.drops[DROP_NO_ENDPOINT] += 1
    elif length > w.sessions.slot_size:
        outbound.drops[DROP_TOO_BIG] += 1
    else:
        # Only the first wakes the control side: a peer that does not answer must not keep it awake.
        tell_news(w.sessions, peer, NEWS_WAITING, peer.queued == 0)
        outbound.drops[DROP_QUEUE_FULL] += queue_packet(w.sessions, peer, packet, length)


cdef void send_keepalive(worker_t *w, session_peer_t *peer) noexcept nogil:
    """An empty packet under the current keypair, beside the bursts."""
    cdef uint8_t[32] message
    cdef ft_aead_packet seal
    write_header(message, peer.current, &seal)
    seal.data = message + SESSION_HEADER
    seal.length = 0
    ft_seal(&peer.current.send, &seal, 1)
    peer.sent_packets += 1
    peer.sent_bytes += SESSION_OVERHEAD
    send_control(w, &peer.address, &peer.local, message, SESSION_OVERHEAD)


cdef inline void count_dropped(worker_t *w) noexcept nogil:
    """What the control side has dropped is the loop's to count."""
    w.counters.outbound.drops[DROP_NO_SESSION] += w.sessions.queue_dropped
    w.sessions.queue_dropped = 0


cdef inline bint has_sealed_work(worker_t *w) noexcept nogil:
    """Whether Python has asked for something, and the messages are free for it."""
    return w.sessions != NULL and w.message_count == 0 and load_int(&w.sessions.has_work)


cdef int work_sealed(worker_t *w) noexcept nogil:
    """Sends what waited for a session, and keepalives. No message may be waiting. >= 0, or -errno."""
    cdef sessions_t *s = w.sessions
    cdef uint64_t now = now_ns()
    cdef session_peer_t *peer
    cdef slot_t *slot
    cdef size_t used = 0
    cdef size_t room = s.slot_size + SESSION_HEADER + SESSION_PADDING + SESSION_TAG
    cdef int32_t number
    cdef bint sent
    begin_sealed(w)
    count_dropped(w)
    while s.work != NULL:
        peer = s.work
        sent = False
        while peer.queued and can_send(peer, now) and used + room <= w.arena_size:
            number = unqueue(s, peer)
            slot = slot_at(s, number)
            memcpy(w.arena + used + SESSION_HEADER, slot_data(slot), slot.length)
            seal_packet(w, peer, w.arena + used + SESSION_HEADER, slot.length)
            free_slot(s, number)
            used += room
            sent = True
        if sent:
            peer.work &= ~WORK_KEEPALIVE
            tell_sent(s, peer)
        if peer.queued and can_send(peer, now):
            break  # no room: the rest at the next turn
        if peer.work & WORK_KEEPALIVE and can_send(peer, now):
            send_keepalive(w, peer)
        peer.work = 0
        s.work = peer.next_work
    store_int(&s.has_work, s.work != NULL)
    seal_pending(w)
    end_sealed(w, now)
    if w.message_count == 0:
        return 0
    if w.gso or w.sticky:
        write_controls(w)
    return flush(w)


cdef void lose_sealed_source(worker_t *w, const address_t *local) noexcept nogil:
    cdef sessions_t *s = w.sessions
    cdef int32_t i
    pthread_mutex_lock(&s.lock)
    for i in range(s.peer_capacity):
        if s.peers[i] != NULL and s.peers[i].local.low == local.low and s.peers[i].local.high == local.high:
            memset(&s.peers[i].local, 0, sizeof(address_t))
    pthread_mutex_unlock(&s.lock)


cdef void abandon_queues(worker_t *w) noexcept nogil:
    cdef sessions_t *s = w.sessions
    cdef int32_t i
    pthread_mutex_lock(&s.lock)
    for i in range(s.peer_capacity):
        if s.peers[i] != NULL:
            w.counters.outbound.drops[DROP_UNSENT] += drop_queue(s, s.peers[i])
    count_dropped(w)
    pthread_mutex_unlock(&s.lock)


# ---------------------------------------------------------------------------------------- inbound

cdef inline int lose_sealed(worker_t *w, uint32_t inner, int reason) noexcept nogil:
    """Counts a data message that is not taken."""
    w.counters.inbound.packets_in += 1
    w.counters.inbound.bytes_in += inner
    w.counters.inbound.drops[reason] += 1
    return 0


cdef inline uint32_t inner_length(const uint8_t *packet, uint32_t length) noexcept nogil:
    """The length that the IP header of a padded packet gives; 0 when there is none that fits."""
    cdef uint32_t inner = 0
    if length >= 20 and packet[0] >> 4 == 4:
        inner = get16(packet + 2)
    elif length >= 40 and packet[0] >> 4 == 6:
        inner = <uint32_t>get16(packet + 4) + 40
    return inner if inner <= length else 0


cdef inline int enter(worker_t *w, session_peer_t *peer, uint8_t *packet, uint32_t length) noexcept nogil:
    """One opened packet with its padding: to the TUN, if its source is the peer's. >= 0, or -errno."""
    cdef sealing_t *c = w.sealing
    cdef direction_t *inbound = &w.counters.inbound
    cdef uint32_t inner = inner_length(packet, length)
    cdef int version = packet_version(packet, inner)
    cdef address_t source
    cdef int32_t number
    inbound.packets_in += 1
    inbound.bytes_in += inner if version else length
    if version == 0:
        inbound.drops[DROP_IN_MALFORMED] += 1
        return 0
    packet_source(packet, version, &source)
    if version == 6 and is_mapped_ipv4(source.high, source.low):
        # It would pass for the IPv4 address that it spells.
        inbound.drops[DROP_NOT_ALLOWED] += 1
        return 0
    if not c.source_known or c.source.low != source.low or c.source.high != source.high:
        number = allowedips_lookup(&w.sessions.allowed, &source)
        c.source = source
        c.source_peer = w.sessions.peers[number] if number >= 0 else NULL
        c.source_known = True
    if c.source_peer != peer:
        inbound.drops[DROP_NOT_ALLOWED] += 1
        return 0
    return deliver(w, packet, inner)


cdef inline void heard_at(worker_t *w, session_peer_t *peer, int message) noexcept nogil:
    """The peer's last authentic packet came in `message`: it is there (roaming, §2.1)."""
    cdef endpoint_t *sender = &w.sealing.senders[message]
    peer.local = w.sealing.locals[message]
    if not peer.reachable or not same_endpoint(&peer.endpoint, sender):
        peer.endpoint = sender[0]
        peer.reachable = endpoint_to_sockaddr(sender, w.family, &peer.address)


cdef int open_pending(worker_t *w) noexcept nogil:
    """Opens what waits, all under one key, and takes it in. >= 0, or -errno when the TUN is dead."""
    cdef sealing_t *c = w.sealing
    cdef keypair_t *keypair = c.open_keypair
    cdef session_peer_t *peer
    cdef ft_aead_packet *packet
    cdef uint32_t inner
    cdef int i
    cdef int count = c.open_count
    cdef int result = 0
    cdef uint64_t before
    c.open_count = 0
    if count == 0:
        return 0
    peer = keypair.peer
    ft_open(&keypair.receive, c.opens, count)
    before = keypair.window.next
    for i in range(count):
        packet = &c.opens[i]
        inner = packet.length - SESSION_TAG
        if result < 0:
            lose_sealed(w, inner, DROP_TUN_DOWN)
            continue
        if not packet.ok:
            lose_sealed(w, inner, DROP_FORGED)
            continue
        if not replay_mark(&keypair.window, packet.counter):
            lose_sealed(w, inner, DROP_REPLAYED)
            continue
        heard_at(w, peer, c.open_messages[i])
        peer.received_packets += 1
        peer.received_bytes += packet.length + SESSION_HEADER
        tell_received(w.sessions, peer, keypair, inner == 0)
        if inner == 0:
            w.counters.control_in += 1
        else:
            result = enter(w, peer, packet.data, inner)
    peer.expected_packets += keypair.window.next - before
    return result


cdef inline int take_data(worker_t *w, uint8_t *data, uint32_t length, int message, uint64_t now) noexcept nogil:
    """One data message, up to what can be known before it is opened. >= 0, or -errno when the TUN is dead."""
    cdef sealing_t *c = w.sealing
    cdef keypair_t *keypair = c.open_keypair
    cdef ft_aead_packet *packet
    cdef uint32_t inner = length - SESSION_OVERHEAD
    cdef uint32_t index
    cdef uint64_t counter
    cdef int result = 0
    memcpy(&index, data + 4, 4)
    index = le32toh(index)
    memcpy(&counter, data + 8, 8)
    counter = le64toh(counter)
    if c.open_count == 0 or keypair.local_index != index:
        keypair = find_keypair(w.sessions, index)
    if keypair == NULL:
        return lose_sealed(w, inner, DROP_UNKNOWN_INDEX)
    if now >= keypair.born_ns + REJECT_AFTER_TIME_NS:
        return lose_sealed(w, inner, DROP_EXPIRED)
    if not replay_check(&keypair.window, counter):
        return lose_sealed(w, inner, DROP_REPLAYED)
    if c.open_count and (c.open_keypair != keypair or c.open_count == SEAL_BATCH):
        result = open_pending(w)
    c.open_keypair = keypair
    packet = &c.opens[c.open_count]
    packet.data = data + SESSION_HEADER
    packet.length = length - SESSION_HEADER
    packet.counter = counter
    c.open_messages[c.open_count] = <uint8_t>message
    c.open_count += 1
    return result


cdef int take_sealed(worker_t *w, uint8_t *data, uint32_t length, int message, uint64_t now) noexcept nogil:
    """One datagram of the WireGuard mode, by its type (§5.4). >= 0, or -errno when the TUN is dead.

    A handshake message reaches Python only with a valid mac1, so that who does not know our public key costs
    no more than a hash.
    """
    cdef uint32_t kind = 0
    if length >= 4:
        memcpy(&kind, data, 4)
        kind = le32toh(kind)
    if kind == 4 and length >= SESSION_OVERHEAD:
        return take_data(w, data, length, message, now)
    if (kind == 1 and length == 148) or (kind == 2 and length == 92):
        w.counters.control_in += 1
        if not ft_mac1_check(w.sessions.mac1, data, length):
            w.counters.bad_mac1 += 1
            return 0
        put_message(w.sessions, data, length, &w.sealing.senders[message], &w.sealing.locals[message])
        return 0
    if kind == 3 and length == 64:
        w.counters.control_in += 1
        put_reply(w.sessions, data, length, &w.sealing.senders[message], &w.sealing.locals[message])
        return 0
    return lose_sealed(w, length, DROP_IN_MALFORMED)
