# The forwarding loop: packets between a TUN descriptor and a UDP socket, without the GIL.
#
# A packet's way through this file:
#   outbound   outbound_burst: read_packets (one a read) or read_frames (vnet header, split)
#              -> aim (choose the peer) -> append (group by endpoint and size)
#              flush: sendmmsg with UDP_SEGMENT -> send_singly where the kernel refuses a group
#   inbound    inbound_burst: recvmmsg with UDP_GRO -> take (classify, admit) -> deliver: write,
#              or join neighbours and write_frames (vnet header)
#   control    binding_datagram: STUN; serve: poll, stop, errors
#
# Not for: opening devices or sockets (fasttun/device.py, fasttun/endpoint.py), policy about peers
# (_native/peers.pxd), anything that needs Python while packets flow.
# Every function here is `noexcept nogil` and returns >= 0 or -errno.

from cpython.exc cimport PyErr_CheckSignals
from cython cimport no_gc_clear
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc

from fasttun._native.aead cimport ft_aead_backend, ft_aead_init, ft_aead_packet, ft_open, ft_seal
from fasttun._native.allowedips cimport (
    allowedips_free, allowedips_init, allowedips_insert, allowedips_lookup, allowedips_remove,
    allowedips_remove_peer,
)
from fasttun._native.capture cimport (
    CAPTURE_CLAUSES, CAPTURE_INNER, CAPTURE_OUTER, CAPTURE_RING, SIDE_DESTINATION, SIDE_SOURCE, capture_inner,
    capture_outer, capture_record_t, capture_t, load_acquire, store_release,
)
from fasttun._native.checksum cimport ft_checksum_variant
from fasttun._native.coalesce cimport (
    COALESCE_FULL, coalesced_frame_t, coalescer_add, coalescer_finish, coalescer_init, coalescer_reset,
    coalescer_t,
)
from fasttun._native.counters cimport *
from fasttun._native.endpoint cimport *
from fasttun._native.icmp cimport too_big
from fasttun._native.mac1 cimport ft_mac1_check, ft_mac1_free, ft_mac1_new
from fasttun._native.packet cimport *
from fasttun._native.peers cimport *
from fasttun._native.replay cimport replay_check, replay_init, replay_mark
from fasttun._native.segment cimport (
    SEGMENT_MAX_PACKETS, segment_frame, segment_out_size, segments_t,
)
from fasttun._native.stun cimport *
from fasttun._native.system cimport *
from fasttun._native.unfinished cimport unfinished_packet
from fasttun._native.sessions cimport *
from fasttun._native.vnet cimport (
    VIRTIO_NET_HDR_GSO_NONE, VNET_HEADER_LENGTH, vnet_header_t,
)
from fasttun._native.wire cimport *

import errno as _errno
import ipaddress
import os

from fasttun.errors import ConfigurationError, DeviceError, StateError

cdef enum:
    SLOT = 2048
    # bytes for one packet, as in the article; a larger MTU takes a larger multiple
    HEAD_ROOM = 64
    # bytes before each packet for what a wire format puts there; one cache line
    TAIL_ROOM = 64
    # bytes after each packet, for a tag and padding
    FRAME = 65536
    # bytes of the largest read from a TUN or a UDP socket with offloads
    MAX_BURST = 256
    MAX_MESSAGES = 4096
    # datagram groups between two sendmmsg: a frame's worst case, twice
    FRAMES_BYTES = 262144
    # bytes of split frames between two sendmmsg: four TSO frames, within a core's L2 cache
    MAX_SEGMENTS = 64
    # datagrams in one group: UDP_MAX_SEGMENTS of kernels before 6.2 (include/linux/udp.h)
    MAX_DATAGRAM = 65507
    # bytes of a single datagram: 65,535 less the IPv4 and UDP headers
    MAX_GROUP = 60000
    # bytes of a group of datagrams. With the headers down to the link's it must stay below the device's
    # gso_max_size, 65,536 or a little less, or the kernel cuts it in software (net/core/dev.c,
    # gso_features_check). 60,000 makes as few messages of a full frame as the limit itself would: two.
    CONTROL = 96
    # bytes for the control messages of one message: the segments' size, and a local address
    MAX_RECEIVE = 64
    MAX_WRITES = 128
    # packets between two sendmmsg to a socket that stands in for the TUN
    GRO_RECEIVE = 16
    # 64 KiB frames a recvmmsg: 1 MiB, no more than a core's cache
    SEAL_BATCH = 64
    # packets sealed or opened in one call, all under one key

cdef enum:
    ANY_PATH = 1232
    # bytes of a datagram that fits every path: IPv6's smallest MTU (RFC 8200, 5) less the IPv6 and UDP headers

cdef enum:
    OFFLOAD_UDP_GSO = 1
    OFFLOAD_TUN = 2

ctypedef struct target_t:
    # Where consecutive packets to one inner destination go; saves the look-up for all but the first.
    address_t destination
    sockaddr_t address
    address_t local
    int32_t peer
    uint32_t generation
    uint8_t framing
    uint8_t alternate
    bint valid
    uint64_t packets
    uint64_t bytes

ctypedef struct origin_t:
    # The same for consecutive datagrams from one endpoint and inner source.
    endpoint_t endpoint
    address_t source
    int32_t peer
    uint32_t generation
    int framing
    int version
    bint valid
    uint64_t packets
    uint64_t bytes

ctypedef struct sealing_t:
    # The WireGuard mode's packets between the TUN and the messages, and the other way; see _sealed.pxi.
    ft_aead_packet[64] seals
    int seal_count
    keypair_t *seal_keypair
    address_t destination
    session_peer_t *peer
    session_peer_t *aimed
    # whose endpoint the open message goes to
    bint destination_known
    ft_aead_packet[64] opens
    uint8_t[64] open_messages
    int open_count
    keypair_t *open_keypair
    address_t source
    session_peer_t *source_peer
    bint source_known
    endpoint_t[64] senders
    address_t[64] locals
    # of each message of a recvmmsg

ctypedef struct group_t:
    # A message under construction: `packets` datagrams of `size` bytes each, the last may be shorter.
    uint32_t packets
    uint32_t size
    uint32_t bytes
    uint32_t inner_bytes
    address_t local
    uint8_t head
    bint closed

ctypedef struct worker_t:
    int tun_fd
    int udp_fd
    int event_fd
    int stop
    int family
    bint connected
    bint gso
    bint gro
    bint vnet
    bint tun_is_socket
    bint tun_ends
    # a read of nothing from the TUN is its end; to a datagram socket it is an empty datagram
    bint sticky
    uint64_t busy_poll_ns
    int burst
    int receive
    size_t slot
    size_t receive_slot
    table_t *table
    sessions_t *sessions
    # one of the two is NULL: the plain mode has a peer table, the WireGuard mode sessions
    sealing_t *sealing
    int notify_fd
    # outbound
    uint8_t *arena
    size_t arena_size
    uint8_t *frame
    mmsghdr *messages
    iovec *vectors
    sockaddr_t *names
    uint8_t *controls
    group_t *groups
    int message_count
    int message_next
    int vector_count
    uint32_t target_serial
    target_t target
    bint tun_ready
    # inbound
    bint unfinished
    uint32_t mtu
    uint8_t *receive_arena
    mmsghdr *receive_messages
    iovec *receive_vectors
    sockaddr_t *receive_names
    uint8_t *receive_controls
    origin_t origin
    coalescer_t *coalescer
    uint8_t *split
    mmsghdr *writes
    iovec *write_vectors
    int write_count
    bint udp_ready
    bint news
    uint8_t[1280] scratch
    counters_t counters
    capture_t *capture
    int capturing
    capture_t *tap
    # `capture` while somebody captures; looked at once a burst
    uint16_t port


# ---------------------------------------------------------------------------------------- control

cdef inline void tell(int fd) noexcept nogil:
    cdef uint64_t one = 1
    write(fd, &one, 8)


cdef inline bint is_known(const address_t *local) noexcept nogil:
    return local.high != 0 or local.low != 0


cdef inline size_t put_source(uint8_t *control, const address_t *local, int family) noexcept nogil:
    """Writes the control message that makes a datagram leave from `local`; its space in bytes.

    An IPv6 socket takes IPv4 sources as v4-mapped ones (net/ipv4/ip_sockglue.c, ip_cmsg_send).
    """
    cdef cmsghdr *header = <cmsghdr *>control
    cdef uint8_t *data = CMSG_DATA(header)
    if family == AF_INET:
        header.cmsg_level = IPPROTO_IP
        header.cmsg_type = IP_PKTINFO
        header.cmsg_len = CMSG_LEN(12)
        memset(data, 0, 12)
        memcpy(data + 4, (<const uint8_t *>&local.low) + 4, 4)
        return CMSG_SPACE(12)
    header.cmsg_level = IPPROTO_IPV6
    header.cmsg_type = IPV6_PKTINFO
    header.cmsg_len = CMSG_LEN(20)
    memcpy(data, local, 16)
    memset(data + 16, 0, 4)
    return CMSG_SPACE(20)


cdef ssize_t send_from(worker_t *w, const void *data, size_t length, const void *name, uint32_t name_length,
                       const address_t *local) noexcept nogil:
    """sendto() that leaves from `local`, where that is known and still an address of this host."""
    cdef msghdr header
    cdef iovec vector
    cdef uint8_t[96] control
    cdef ssize_t sent
    if not is_known(local):
        return sendto(w.udp_fd, data, length, MSG_DONTWAIT, name, name_length)
    memset(&header, 0, sizeof(msghdr))
    vector.iov_base = <void *>data
    vector.iov_len = length
    header.msg_name = <void *>name
    header.msg_namelen = name_length
    header.msg_iov = &vector
    header.msg_iovlen = 1
    header.msg_control = control
    header.msg_controllen = put_source(control, local, w.family)
    sent = sendmsg(w.udp_fd, &header, MSG_DONTWAIT)
    if sent < 0 and errno in (EINVAL, EADDRNOTAVAIL, ENETUNREACH):
        return sendto(w.udp_fd, data, length, MSG_DONTWAIT, name, name_length)
    return sent


cdef inline void send_control(worker_t *w, const sockaddr_t *to, const address_t *local, const uint8_t *data,
                              size_t length) noexcept nogil:
    """One small datagram beside the bursts; lost when the socket has no room, as any datagram may be."""
    cdef const void *name = NULL
    cdef uint32_t name_length = 0
    cdef endpoint_t remote
    if not w.connected:
        name = <const void *>to.bytes
        name_length = to.length
    if send_from(w, data, length, name, name_length, local) < 0:
        count_error(&w.counters, errno)
        return
    w.counters.control_out += 1
    if w.tap != NULL and endpoint_from_sockaddr(&remote, to.bytes, to.length):
        capture_outer(w.tap, True, data, length, local, w.port, &remote)


cdef void send_check(worker_t *w, const check_t *check) noexcept nogil:
    cdef uint8_t[24] request
    send_control(w, &check.to, &check.local, request, stun_request(request, check.transaction, w.table.unfinished))


cdef void binding_datagram(worker_t *w, const uint8_t *data, size_t length, const endpoint_t *from_,
                           const address_t *local, uint64_t now) noexcept nogil:
    """A STUN datagram: answers a request, takes a success as proof that its sender receives from here."""
    cdef table_t *t = w.table
    cdef uint8_t[48] response
    cdef int kind = stun_type(data, length)
    cdef bint unfinished = kind != 0 and t.unfinished and stun_unfinished(data, length)
    cdef bint answer = False
    cdef bint news = False
    cdef int32_t peer
    cdef sockaddr_t to
    cdef endpoint_t mapped
    w.counters.control_in += 1
    if kind == 0:
        return
    pthread_mutex_lock(&t.lock)
    if kind == STUN_REQUEST_TYPE:
        if t.fixed:
            answer = t.peer_count > 0 and same_endpoint(&t.peers[0].endpoint, from_)
        else:
            answer = is_allowed(t, from_)
            peer = find_peer(t, from_) if answer else -1
            if peer >= 0 and not is_expired(t, peer, now):
                t.peers[peer].kept_ns = now
        answer = answer and may_answer_stun(t, now)
    elif t.fixed:
        if t.peer_count > 0 and t.greeting_set and same_endpoint(&t.peers[0].endpoint, from_) \
                and memcmp(data + 8, t.greeting, TRANSACTION_SIZE) == 0:
            heard_from(t, 0, FRAMING_RAW, now)
            t.peers[0].unfinished = unfinished
            if stun_mapped(data, length, &mapped):
                news = table_event(t, EVENT_GREETED, &mapped, NULL, round_trip_us(t))
    else:
        check_answered(t, from_, local, data + 8, unfinished, now, &news)
    pthread_mutex_unlock(&t.lock)
    w.news = w.news or news
    if answer and endpoint_to_sockaddr(from_, w.family, &to):
        send_control(w, &to, local, response, stun_success(response, data, from_, unfinished))


# --------------------------------------------------------------------------------------- outbound

cdef inline void close_group(worker_t *w) noexcept nogil:
    """No later datagram may join the open message: the target has changed."""
    if w.message_count:
        w.groups[w.message_count - 1].closed = True


cdef inline void settle_target(worker_t *w) noexcept nogil:
    """Adds what went to the present target to its peer. The caller holds the table's lock."""
    cdef peer_t *peer
    if w.target.valid and w.target.peer >= 0 and w.target.packets:
        peer = &w.table.peers[w.target.peer]
        if peer.generation == w.target.generation:
            peer.outbound_packets += w.target.packets
            peer.outbound_bytes += w.target.bytes
            peer.alternate = w.target.alternate
    w.target.packets = 0
    w.target.bytes = 0
    w.target.valid = False


cdef void aim(worker_t *w, const address_t *destination, uint64_t now) noexcept nogil:
    """Makes `w.target` the peer for `destination`."""
    cdef table_t *t = w.table
    cdef target_t *target = &w.target
    cdef peer_t *peer
    if target.valid and target.destination.low == destination.low and \
            target.destination.high == destination.high:
        return
    pthread_mutex_lock(&t.lock)
    settle_target(w)
    target.destination = destination[0]
    target.peer = peer_for(t, destination, now)
    target.valid = True
    w.target_serial += 1
    if target.peer >= 0:
        peer = &t.peers[target.peer]
        target.generation = peer.generation
        target.address = peer.address
        target.local = peer.local
        target.framing = <uint8_t>t.framing if t.framing != FRAMING_AUTO else peer.framing
        target.alternate = peer.alternate
    pthread_mutex_unlock(&t.lock)


cdef inline int framing_now(target_t *target) noexcept nogil:
    """The framing of the next packet: while a server's is unknown, raw and PI in turn."""
    if target.framing != FRAMING_AUTO:
        return target.framing
    target.alternate ^= 1
    return FRAMING_RAW if target.alternate else FRAMING_PI


cdef void append(worker_t *w, uint8_t *data, uint32_t length, uint32_t head, uint32_t inner) noexcept nogil:
    """Adds one datagram (`head` bytes of framing, then the packet of `inner` bytes) to the messages to send.

    It joins the open message when that goes to the same target and holds datagrams of this size.
    """
    cdef group_t *group
    cdef msghdr *header
    cdef iovec *vector
    if w.gso and w.message_count:
        group = &w.groups[w.message_count - 1]
        if not group.closed and length <= group.size and group.packets < MAX_SEGMENTS \
                and group.bytes + length <= MAX_GROUP and group.head == head:
            vector = &w.vectors[w.vector_count - 1]
            if <uint8_t *>vector.iov_base + vector.iov_len == data:
                vector.iov_len += length
            else:
                vector += 1
                vector.iov_base = data
                vector.iov_len = length
                w.vector_count += 1
                w.messages[w.message_count - 1].msg_hdr.msg_iovlen += 1
            group.packets += 1
            group.bytes += length
            group.inner_bytes += inner
            group.closed = length < group.size
            return
        group.closed = True
    group = &w.groups[w.message_count]
    group.packets = 1
    group.size = length
    group.bytes = length
    group.inner_bytes = inner
    group.head = <uint8_t>head
    group.closed = False
    group.local = w.target.local
    vector = &w.vectors[w.vector_count]
    vector.iov_base = data
    vector.iov_len = length
    w.names[w.message_count] = w.target.address
    header = &w.messages[w.message_count].msg_hdr
    header.msg_name = NULL if w.connected else w.names[w.message_count].bytes
    header.msg_namelen = 0 if w.connected else w.target.address.length
    header.msg_iov = vector
    header.msg_iovlen = 1
    header.msg_control = NULL
    header.msg_controllen = 0
    w.vector_count += 1
    w.message_count += 1


cdef void drop_message(worker_t *w, int index, int reason) noexcept nogil:
    w.counters.outbound.drops[reason] += w.groups[index].packets


cdef inline ssize_t write_packet(worker_t *w, uint8_t *packet, size_t length) noexcept nogil:
    """write() of one packet as the TUN takes it, behind an empty vnet header where there is one."""
    cdef vnet_header_t vnet
    cdef iovec[2] vectors
    w.counters.calls[CALL_WRITE] += 1
    if not w.vnet:
        return write(w.tun_fd, packet, length)
    memset(&vnet, 0, VNET_HEADER_LENGTH)
    vectors[0].iov_base = &vnet
    vectors[0].iov_len = VNET_HEADER_LENGTH
    vectors[1].iov_base = packet
    vectors[1].iov_len = length
    return writev(w.tun_fd, vectors, 2) - VNET_HEADER_LENGTH


cdef void tell_too_big(worker_t *w, const uint8_t *packet, size_t length) noexcept nogil:
    """Answers a packet that no datagram can carry with the ICMP error that names the MTU."""
    cdef int version = packet_version(packet, length)
    cdef size_t size
    if version == 0 or length < 48:
        return
    size = too_big(w.scratch, packet, length, version, MAX_DATAGRAM - PI_LENGTH)
    if size and write_packet(w, w.scratch, size) == <ssize_t>size:
        w.counters.too_big_told += 1


cdef bint is_fatal(int error) noexcept nogil:
    """Whether a descriptor is gone: closed, or no socket. All else is survived.

    ENODEV is not among them: a socket reports it when an interface that a link-local peer was on has gone.
    """
    return error in (EBADF, EBADFD, ENOTCONN, ENOTSOCK)


cdef void tap_datagram(worker_t *w, int index, const uint8_t *data, size_t length) noexcept nogil:
    """Shows a sent datagram of message `index` to whoever captures."""
    cdef endpoint_t to
    if w.connected:
        to = w.table.peers[0].endpoint
    elif not endpoint_from_sockaddr(&to, w.names[index].bytes, w.names[index].length):
        return
    capture_outer(w.tap, True, data, length, &w.groups[index].local, w.port, &to)


cdef void tap_message(worker_t *w, int index) noexcept nogil:
    cdef group_t *group = &w.groups[index]
    cdef msghdr *header = &w.messages[index].msg_hdr
    cdef size_t i, at, length
    for i in range(header.msg_iovlen):
        at = 0
        while at < header.msg_iov[i].iov_len:
            length = header.msg_iov[i].iov_len - at
            if length > group.size:
                length = group.size
            tap_datagram(w, index, <uint8_t *>header.msg_iov[i].iov_base + at, length)
            at += length


cdef int send_singly(worker_t *w, int index) noexcept nogil:
    """Sends the datagrams of one message each by itself; >= 0, or -errno when the socket is gone."""
    cdef group_t *group = &w.groups[index]
    cdef msghdr *header = &w.messages[index].msg_hdr
    cdef size_t i, at, length
    cdef uint8_t *data
    cdef ssize_t sent
    cdef int error, _attempt
    i = 0
    at = 0
    while i < header.msg_iovlen:
        # A vector holds datagrams of the group's size back to back; only the group's last may be shorter.
        data = <uint8_t *>header.msg_iov[i].iov_base + at
        length = header.msg_iov[i].iov_len - at
        if length > group.size:
            length = group.size
        at += length
        if at == header.msg_iov[i].iov_len:
            i += 1
            at = 0
        for _attempt in range(2):
            w.counters.calls[CALL_SENDMMSG] += 1
            sent = send_from(w, data, length, header.msg_name, header.msg_namelen, &group.local)
            if sent >= 0:
                break
            error = errno
            count_error(&w.counters, error)
            if is_fatal(error):
                return -error
            # A pending error of an earlier datagram is reported instead of sending this one.
            if error != ECONNREFUSED and error != EINTR:
                break
        if sent >= 0:
            count_burst(&w.counters.outbound.bursts_out, 1)
            w.counters.outbound.packets_out += 1
            w.counters.outbound.bytes_out += length - group.head
            if w.tap != NULL:
                tap_datagram(w, index, data, length)
        elif error == EMSGSIZE:
            w.counters.outbound.drops[DROP_TOO_BIG] += 1
            if w.sessions == NULL:
                tell_too_big(w, data + group.head, length - group.head)
        else:
            w.counters.outbound.drops[DROP_SEND_FAILED] += 1
    return 0


cdef void give_up(worker_t *w, int offload, int error) noexcept nogil:
    """The kernel has refused an offload that it had granted: do without from here on, and say so."""
    if offload == OFFLOAD_UDP_GSO:
        w.gso = False
    else:
        coalescer_init(w.coalescer, False, False, False)
    if w.sessions != NULL:
        w.sessions.offload_lost = (offload << 16) | error
        w.news = True
        return
    pthread_mutex_lock(&w.table.lock)
    w.news = table_event(w.table, EVENT_OFFLOAD, NULL, NULL, (offload << 16) | error) or w.news
    pthread_mutex_unlock(&w.table.lock)


cdef void write_controls(worker_t *w) noexcept nogil:
    """Gives each message what it needs of UDP_SEGMENT (more than one datagram) and of a source address."""
    cdef int i
    cdef group_t *group
    cdef msghdr *header
    cdef cmsghdr *control
    cdef uint8_t *space
    cdef size_t used
    cdef uint16_t size
    for i in range(w.message_next, w.message_count):
        group = &w.groups[i]
        header = &w.messages[i].msg_hdr
        space = w.controls + i * CONTROL
        used = 0
        if group.packets > 1:
            control = <cmsghdr *>space
            control.cmsg_level = SOL_UDP
            control.cmsg_type = UDP_SEGMENT
            control.cmsg_len = CMSG_LEN(2)
            size = <uint16_t>group.size
            memcpy(CMSG_DATA(control), &size, 2)
            used = CMSG_SPACE(2)
        if is_known(&group.local):
            used += put_source(space + used, &group.local, w.family)
        header.msg_control = space if used else NULL
        header.msg_controllen = used


cdef void lose_source(worker_t *w, const address_t *lost) noexcept nogil:
    """`lost` is no address of this host any more: what waits, and what follows, leaves from another."""
    cdef address_t local = lost[0]
    cdef int i
    for i in range(w.message_next, w.message_count):
        if w.groups[i].local.low == local.low and w.groups[i].local.high == local.high:
            memset(&w.groups[i].local, 0, sizeof(address_t))
    write_controls(w)
    if w.sessions != NULL:
        lose_sealed_source(w, &local)
        return
    pthread_mutex_lock(&w.table.lock)
    forget_local(w.table, &local)
    pthread_mutex_unlock(&w.table.lock)


cdef int flush(worker_t *w) noexcept nogil:
    """Sends what waits. 0: all gone; 1: the socket is full, the rest waits; -errno: the socket is dead."""
    cdef int sent, error, i, result
    cdef uint32_t packets
    cdef int refused = 0
    while w.message_next < w.message_count:
        w.counters.calls[CALL_SENDMMSG] += 1
        sent = sendmmsg(w.udp_fd, w.messages + w.message_next, w.message_count - w.message_next, MSG_DONTWAIT)
        if sent > 0:
            packets = 0
            for i in range(w.message_next, w.message_next + sent):
                packets += w.groups[i].packets
                w.counters.outbound.bytes_out += w.groups[i].inner_bytes
                if w.tap != NULL:
                    tap_message(w, i)
            w.counters.outbound.packets_out += packets
            count_burst(&w.counters.outbound.bursts_out, packets)
            w.message_next += sent
            refused = 0
            continue
        error = errno
        if error == EAGAIN:
            return 1
        count_error(&w.counters, error)
        if error == EINTR:
            continue
        if is_fatal(error):
            return -error
        if error in (EINVAL, EADDRNOTAVAIL, ENETUNREACH) and is_known(&w.groups[w.message_next].local):
            lose_source(w, &w.groups[w.message_next].local)
            continue
        if error == ECONNREFUSED and refused < 2:
            # A pending error of an earlier datagram, taken back by reporting it: send again.
            refused += 1
            continue
        if w.groups[w.message_next].packets > 1 and error in (EIO, EINVAL, EOPNOTSUPP) and \
                (error != EINVAL or w.groups[w.message_next].size <= ANY_PATH):
            # Older kernels say EINVAL, not EMSGSIZE, of datagrams above the path's MTU: no reason to give up.
            give_up(w, OFFLOAD_UDP_GSO, error)
        if w.groups[w.message_next].packets > 1 or error == EMSGSIZE:
            result = send_singly(w, w.message_next)
            if result < 0:
                return result
        else:
            drop_message(w, w.message_next, DROP_SEND_FAILED)
        w.message_next += 1
        refused = 0
    w.message_count = 0
    w.message_next = 0
    w.vector_count = 0
    return 0


cdef inline bint aim_at(worker_t *w, const uint8_t *packet, int version, uint64_t now) noexcept nogil:
    """Aims at the packet's destination; False when no peer is there. The packet has a whole IP header."""
    cdef address_t destination
    cdef uint32_t serial = w.target_serial
    packet_destination(packet, version, &destination)
    if version == 6 and is_mapped_ipv4(destination.high, destination.low):
        memset(&destination, 0, sizeof(address_t))  # nobody's: it must not pass for the IPv4 one that it spells
    aim(w, &destination, now)
    if serial != w.target_serial:
        close_group(w)
    return w.target.peer >= 0


cdef inline int read_failed(worker_t *w, ssize_t length) noexcept nogil:
    """After a read of the TUN that gave nothing: 0, or -errno when the device is gone."""
    cdef int error = errno if length < 0 else EPIPE
    w.tun_ready = False
    if error == EAGAIN:
        return 0
    count_error(&w.counters, error)
    if is_fatal(error) or error == EPIPE:
        return -error
    w.tun_ready = error == EINTR
    return 0


cdef inline void packet_read(worker_t *w, uint8_t *packet, size_t length, uint64_t now) noexcept nogil:
    """One packet in its slot: aims it and adds it to the messages to send."""
    cdef uint32_t head = 0
    cdef int version = packet_version(packet, length)
    w.counters.outbound.packets_in += 1
    w.counters.outbound.bytes_in += length
    if version == 0:
        w.counters.outbound.drops[DROP_OUT_MALFORMED] += 1
        return
    if w.tap != NULL:
        capture_inner(w.tap, True, packet, length)
    if w.sessions != NULL:
        forward_sealed(w, aim_sealed(w, packet, version), packet, <uint32_t>length, now)
        return
    if not aim_at(w, packet, version, now):
        w.counters.outbound.drops[DROP_NO_PEER] += 1
        return
    w.target.packets += 1
    w.target.bytes += length
    if framing_now(&w.target) == FRAMING_PI:
        head = PI_LENGTH
        write_pi(packet - PI_LENGTH, version)
    append(w, packet - head, <uint32_t>length + head, head, <uint32_t>length)


cdef int read_packets(worker_t *w, uint64_t now) noexcept nogil:
    """A burst of single packets from the TUN, each in a slot of its own."""
    cdef uint8_t *packet
    cdef ssize_t length
    cdef int reads
    for reads in range(w.burst):
        packet = w.arena + reads * w.slot + HEAD_ROOM
        w.counters.calls[CALL_READ] += 1
        length = read(w.tun_fd, packet, w.slot - HEAD_ROOM - TAIL_ROOM)
        if length < 0 or (length == 0 and w.tun_ends):
            return read_failed(w, length)
        count_burst(&w.counters.outbound.bursts_in, 1)
        packet_read(w, packet, length, now)
    return 0


cdef int read_socket(worker_t *w, uint64_t now) noexcept nogil:
    """The same from a socket that stands in for the TUN: a burst a call."""
    cdef int i, count
    for i in range(w.burst):
        w.writes[i].msg_hdr.msg_iov = &w.write_vectors[i]
        w.write_vectors[i].iov_base = w.arena + i * w.slot + HEAD_ROOM
        w.write_vectors[i].iov_len = w.slot - HEAD_ROOM - TAIL_ROOM
    w.counters.calls[CALL_RECVMMSG] += 1
    count = recvmmsg(w.tun_fd, w.writes, w.burst, MSG_DONTWAIT, NULL)
    if count <= 0:
        return read_failed(w, count)
    count_burst(&w.counters.outbound.bursts_in, count)
    for i in range(count):
        if w.writes[i].msg_len == 0 and w.tun_ends:
            return read_failed(w, 0)
        packet_read(w, w.arena + i * w.slot + HEAD_ROOM, w.writes[i].msg_len, now)
    w.tun_ready = count == w.burst
    return 0


cdef void frame_failed(worker_t *w, const vnet_header_t *vnet, size_t length, int reason) noexcept nogil:
    """Counts a frame that is no packet, as one."""
    count_burst(&w.counters.outbound.bursts_in, 1)
    w.counters.outbound.packets_in += 1
    w.counters.outbound.bytes_in += length
    w.counters.outbound.drops[reason] += 1


cdef int read_frames(worker_t *w, uint64_t now) noexcept nogil:
    """A burst of frames from a TUN with vnet header; each is split into its packets, checksums finished."""
    cdef vnet_header_t vnet
    cdef iovec[2] vectors
    cdef segments_t segments
    cdef uint8_t *data
    cdef size_t used = 0
    cdef size_t i, size
    cdef ssize_t length
    cdef int version, _reads, result
    cdef uint32_t head, tail
    cdef session_peer_t *peer = NULL
    vectors[0].iov_base = &vnet
    vectors[0].iov_len = VNET_HEADER_LENGTH
    vectors[1].iov_base = w.frame
    vectors[1].iov_len = FRAME
    for _reads in range(w.burst):
        if used > FRAMES_BYTES or w.message_count > MAX_MESSAGES - SEGMENT_MAX_PACKETS \
                or w.vector_count > MAX_MESSAGES - SEGMENT_MAX_PACKETS:
            return 0
        w.counters.calls[CALL_READ] += 1
        length = readv(w.tun_fd, vectors, 2)
        if length <= 0:
            return read_failed(w, length)
        length -= VNET_HEADER_LENGTH
        version = 0
        if length >= 20:
            version = w.frame[0] >> 4
            if version == 6 and length < 40:
                version = 0
        if (version != 4 and version != 6) or \
                (vnet.gso_type == VIRTIO_NET_HDR_GSO_NONE and packet_version(w.frame, length) == 0):
            frame_failed(w, &vnet, length if length > 0 else 0, DROP_OUT_MALFORMED)
            continue
        head = 0
        tail = 0
        if w.sessions != NULL:
            peer = aim_sealed(w, w.frame, version)
            head = SESSION_HEADER
            tail = SESSION_PADDING + SESSION_TAG
        elif aim_at(w, w.frame, version, now) and framing_now(&w.target) == FRAMING_PI:
            head = PI_LENGTH
        result = segment_frame(&vnet, w.frame, length, w.arena + used, w.arena_size - used, head, tail, 65535,
                               &segments)
        if result <= 0:
            frame_failed(w, &vnet, length, DROP_OUT_MALFORMED)
            continue
        size = (segments.count - 1) * segments.packet_length + segments.last_length
        count_burst(&w.counters.outbound.bursts_in, segments.count)
        w.counters.outbound.packets_in += segments.count
        w.counters.outbound.bytes_in += size
        data = w.arena + used
        if w.tap != NULL:
            for i in range(segments.count):
                capture_inner(w.tap, True, data + i * segments.stride + head,
                              segments.packet_length if i + 1 < segments.count else segments.last_length)
        if w.sessions != NULL:
            for i in range(segments.count):
                size = segments.packet_length if i + 1 < segments.count else segments.last_length
                forward_sealed(w, peer, data + head, <uint32_t>size, now)
                data += segments.stride
            used = <size_t>(data - w.arena)
            continue
        if w.target.peer < 0:
            w.counters.outbound.drops[DROP_NO_PEER] += segments.count
            continue
        w.target.packets += segments.count
        w.target.bytes += size
        for i in range(segments.count):
            if head:
                write_pi(data, version)
            size = segments.packet_length if i + 1 < segments.count else segments.last_length
            append(w, data, <uint32_t>size + head, head, <uint32_t>size)
            data += segments.stride
        used = <size_t>(data - w.arena)
    return 0


cdef int outbound_burst(worker_t *w) noexcept nogil:
    """Reads up to a burst from the TUN and sends it. >= 0, or -errno when a descriptor is dead."""
    cdef uint64_t now = now_ns()
    cdef int result
    w.tun_ready = True
    w.tap = w.capture if load_int(&w.capturing) else NULL
    if w.sessions != NULL:
        begin_sealed(w)
    if w.vnet:
        result = read_frames(w, now)
    elif w.tun_is_socket:
        result = read_socket(w, now)
    else:
        result = read_packets(w, now)
    if w.sessions != NULL:
        seal_pending(w)
        end_sealed(w, now)
    elif w.target.valid:
        pthread_mutex_lock(&w.table.lock)
        settle_target(w)
        pthread_mutex_unlock(&w.table.lock)
    if result < 0 or w.message_count == 0:
        return result
    if w.gso or w.sticky:
        write_controls(w)
    return flush(w)


# ---------------------------------------------------------------------------------------- inbound

cdef inline void settle_origin(worker_t *w) noexcept nogil:
    """Adds what came from the present origin to its peer. The caller holds the table's lock."""
    cdef peer_t *peer
    if w.origin.valid and w.origin.packets:
        peer = &w.table.peers[w.origin.peer]
        if peer.generation == w.origin.generation:
            peer.inbound_packets += w.origin.packets
            peer.inbound_bytes += w.origin.bytes
    w.origin.packets = 0
    w.origin.bytes = 0
    w.origin.valid = False


cdef bint may_enter(worker_t *w, const endpoint_t *from_, const address_t *local, const uint8_t *packet,
                    int version, int framing, uint32_t length, uint64_t now) noexcept nogil:
    """Whether the packet's inner source belongs to its sender; counts the drop when it does not."""
    cdef table_t *t = w.table
    cdef origin_t *origin = &w.origin
    cdef address_t source
    cdef check_t[2] checks
    cdef int32_t peer
    cdef int reason
    packet_source(packet, version, &source)
    # The version too: an IPv6 source may spell an IPv4 one (::ffff:a.b.c.d), and must not pass for it.
    if origin.valid and origin.framing == framing and origin.version == version and \
            origin.source.low == source.low and origin.source.high == source.high and \
            same_endpoint(&origin.endpoint, from_):
        origin.packets += 1
        origin.bytes += length
        return True
    checks[0].wanted = False
    checks[1].wanted = False
    pthread_mutex_lock(&t.lock)
    settle_origin(w)
    reason = -1
    peer = -1
    if not t.fixed and not is_allowed(t, from_):
        reason = DROP_STRANGER
    elif not t.fixed and (not can_be_source(packet, version) or is_own(t, &source)):
        reason = DROP_MARTIAN
    else:
        peer = admit(t, from_, local, &source, framing, now, checks, &w.news)
        if peer == ADMIT_STRANGER:
            reason = DROP_STRANGER
        elif peer == ADMIT_UNPROVEN:
            reason = DROP_UNPROVEN
        elif peer < 0:
            reason = DROP_TABLE_FULL
    if peer >= 0:
        origin.endpoint = from_[0]
        origin.source = source
        origin.peer = peer
        origin.generation = t.peers[peer].generation
        origin.framing = framing
        origin.version = version
        origin.valid = True
        origin.packets = 1
        origin.bytes = length
    pthread_mutex_unlock(&t.lock)
    if checks[0].wanted:
        send_check(w, &checks[0])
    if checks[1].wanted:
        send_check(w, &checks[1])
    if reason >= 0:
        w.counters.inbound.drops[reason] += 1
        return False
    return True


cdef int write_failed(worker_t *w, uint32_t packets) noexcept nogil:
    """Counts what a failed write to the TUN has lost. 0, or -errno when the device is gone."""
    cdef int error = errno
    count_error(&w.counters, error)
    if is_fatal(error) or error == EPIPE:
        w.counters.inbound.drops[DROP_TUN_DOWN] += packets
        return -error
    if error == EIO:
        w.counters.inbound.drops[DROP_TUN_DOWN] += packets
    elif error in (EAGAIN, ENOBUFS):
        w.counters.inbound.drops[DROP_TUN_FULL] += packets
    else:
        w.counters.inbound.drops[DROP_TUN_REFUSED] += packets
    return 0


cdef int write_one(worker_t *w, uint8_t *packet, uint32_t length) noexcept nogil:
    if write_packet(w, packet, length) == <ssize_t>length:
        count_burst(&w.counters.inbound.bursts_out, 1)
        w.counters.inbound.packets_out += 1
        w.counters.inbound.bytes_out += length
        return 0
    return write_failed(w, 1)


cdef int write_split(worker_t *w, coalesced_frame_t *frame) noexcept nogil:
    """A joined frame that the TUN has refused goes to it as the packets it was made of."""
    cdef segments_t segments
    cdef uint8_t *data
    cdef size_t length = 0
    cdef size_t i
    cdef int result
    for i in range(1, frame.iov_count):
        memcpy(w.frame + length, frame.iov[i].iov_base, frame.iov[i].iov_len)
        length += frame.iov[i].iov_len
    # Not the outbound arena: datagrams that the socket had no room for may still wait there.
    data = w.split
    if segment_frame(&frame.vnet, w.frame, length, data, segment_out_size(0, 0), 0, 0, 65535, &segments) < 0:
        w.counters.inbound.drops[DROP_TUN_REFUSED] += frame.packets
        return 0
    for i in range(segments.count):
        length = segments.packet_length if i + 1 < segments.count else segments.last_length
        result = write_one(w, data + i * segments.stride, <uint32_t>length)
        if result < 0:
            w.counters.inbound.drops[DROP_TUN_DOWN] += segments.count - i - 1
            return result
    return 0


cdef int write_frames(worker_t *w) noexcept nogil:
    """Writes what the coalescer holds. >= 0, or -errno when the device is gone."""
    cdef coalescer_t *c = w.coalescer
    cdef coalesced_frame_t *frame
    cdef uint32_t i
    cdef uint32_t count = coalescer_finish(c)
    cdef int result = 0
    cdef int error
    for i in range(count):
        frame = &c.frames[i]
        if result < 0:
            w.counters.inbound.drops[DROP_TUN_DOWN] += frame.packets
            continue
        w.counters.calls[CALL_WRITE] += 1
        if writev(w.tun_fd, frame.iov, frame.iov_count) == <ssize_t>(VNET_HEADER_LENGTH + frame.length):
            count_burst(&w.counters.inbound.bursts_out, frame.packets)
            w.counters.inbound.packets_out += frame.packets
            w.counters.inbound.bytes_out += frame.packet_bytes
            continue
        error = errno
        if error == EINVAL and frame.packets > 1:
            count_error(&w.counters, error)
            give_up(w, OFFLOAD_TUN, error)
            result = write_split(w, frame)
        else:
            result = write_failed(w, frame.packets)
    coalescer_reset(c)
    return result


cdef int write_socket(worker_t *w) noexcept nogil:
    """Sends the packets collected for a socket that stands in for the TUN. >= 0, or -errno when it is dead."""
    cdef int i
    cdef int next_ = 0
    cdef int sent
    cdef int result = 0
    while next_ < w.write_count:
        w.counters.calls[CALL_SENDMMSG] += 1
        sent = sendmmsg(w.tun_fd, w.writes + next_, w.write_count - next_, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent > 0:
            count_burst(&w.counters.inbound.bursts_out, sent)
            w.counters.inbound.packets_out += sent
            for i in range(next_, next_ + sent):
                w.counters.inbound.bytes_out += w.writes[i].msg_len
            next_ += sent
            continue
        result = write_failed(w, 1)
        next_ += 1
        if result < 0:
            w.counters.inbound.drops[DROP_TUN_DOWN] += w.write_count - next_
            break
    w.write_count = 0
    return result


cdef int deliver(worker_t *w, uint8_t *packet, uint32_t length) noexcept nogil:
    """Hands one packet to the TUN, or to what does so at the burst's end."""
    cdef int result
    if w.tap != NULL:
        capture_inner(w.tap, False, packet, length)
    if w.tun_is_socket:
        w.writes[w.write_count].msg_hdr.msg_iov = &w.write_vectors[w.write_count]
        w.write_vectors[w.write_count].iov_base = packet
        w.write_vectors[w.write_count].iov_len = length
        w.write_count += 1
        return write_socket(w) if w.write_count == MAX_WRITES else 0
    if not w.vnet:
        return write_one(w, packet, length)
    if coalescer_add(w.coalescer, packet, <uint16_t>length) != COALESCE_FULL:
        return 0
    result = write_frames(w)
    if result < 0:
        w.counters.inbound.drops[DROP_TUN_DOWN] += 1
        return result
    coalescer_add(w.coalescer, packet, <uint16_t>length)
    return 0


cdef int finish(worker_t *w, vnet_header_t *vnet, uint8_t *packet, uint32_t length) noexcept nogil:
    """Hands on a packet that a fast path has sent unfinished, as one packet or, if it is a frame, as its packets."""
    cdef coalesced_frame_t frame
    cdef iovec[2] vectors
    cdef uint32_t more = 0
    cdef int result = 0
    if vnet.gso_size:
        more = (length - vnet.hdr_len - 1) // vnet.gso_size
        w.counters.inbound.packets_in += more
        w.counters.inbound.bytes_in += more * vnet.hdr_len
    if w.tap != NULL:
        capture_inner(w.tap, False, packet, length)
    frame.iov = vectors
    frame.iov_count = 2
    vectors[0].iov_base = vnet
    vectors[0].iov_len = VNET_HEADER_LENGTH
    vectors[1].iov_base = packet
    vectors[1].iov_len = length
    frame.vnet = vnet[0]
    frame.packets = 1 + more
    if not w.vnet:
        return write_split(w, &frame)
    if w.coalescer.packet_count:  # what came before goes first
        result = write_frames(w)
        if result < 0:
            w.counters.inbound.drops[DROP_TUN_DOWN] += 1 + more
            return result
    w.counters.calls[CALL_WRITE] += 1
    if writev(w.tun_fd, vectors, 2) == <ssize_t>(VNET_HEADER_LENGTH + length):
        count_burst(&w.counters.inbound.bursts_out, 1 + more)
        w.counters.inbound.packets_out += 1 + more
        w.counters.inbound.bytes_out += length + more * vnet.hdr_len
        return 0
    return write_failed(w, 1 + more)


cdef int take(worker_t *w, uint8_t *data, uint32_t length, const endpoint_t *from_, const address_t *local,
              uint64_t now) noexcept nogil:
    """One datagram, by what its first bytes say it is. >= 0, or -errno when the TUN is dead."""
    cdef int kind = datagram_kind(data, length)
    cdef int version
    cdef vnet_header_t vnet
    if kind == KIND_STUN:
        binding_datagram(w, data, length, from_, local, now)
        return 0
    if kind == KIND_PI:
        data += PI_LENGTH
        length -= PI_LENGTH
    w.counters.inbound.packets_in += 1
    w.counters.inbound.bytes_in += length
    version = 0 if kind == KIND_NONE else packet_version(data, length)
    if version == 0:
        w.counters.inbound.drops[DROP_IN_MALFORMED] += 1
        return 0
    if not may_enter(w, from_, local, data, version, FRAMING_PI if kind == KIND_PI else FRAMING_RAW, length,
                     now):
        return 0
    if w.unfinished and unfinished_packet(data, length, w.mtu, &vnet):
        return finish(w, &vnet, data, length)
    return deliver(w, data, length)


cdef inline uint32_t read_controls(msghdr *header, uint32_t length, address_t *local) noexcept nogil:
    """The size of the datagrams that UDP_GRO has put together, `length` for a single one; fills `local`."""
    cdef cmsghdr *control = CMSG_FIRSTHDR(header)
    cdef uint32_t segment = length
    cdef int size
    memset(local, 0, sizeof(address_t))
    while control != NULL:
        if control.cmsg_level == SOL_UDP and control.cmsg_type == UDP_GRO:
            memcpy(&size, CMSG_DATA(control), sizeof(int))
            if 0 < size < <int>length:
                segment = <uint32_t>size
        elif control.cmsg_level == IPPROTO_IP and control.cmsg_type == IP_PKTINFO:
            mapped_ipv4(CMSG_DATA(control) + 4, &local.high, &local.low)
        elif control.cmsg_level == IPPROTO_IPV6 and control.cmsg_type == IPV6_PKTINFO:
            memcpy(local, CMSG_DATA(control), 16)
        control = CMSG_NXTHDR(header, control)
    return segment


cdef int inbound_burst(worker_t *w) noexcept nogil:
    """Takes what one recvmmsg brings to the TUN. >= 0, or -errno when a descriptor is dead."""
    cdef uint64_t now
    cdef msghdr *header
    cdef endpoint_t from_
    cdef address_t local
    cdef uint8_t *data
    cdef uint32_t length, size, step
    cdef uint32_t datagrams = 0
    cdef int i, count, error
    cdef int result = 0
    for i in range(w.receive):
        header = &w.receive_messages[i].msg_hdr
        header.msg_namelen = 0 if w.connected else SOCKADDR_SIZE
        header.msg_controllen = CONTROL if w.gro or w.sticky else 0
        header.msg_flags = 0
    w.counters.calls[CALL_RECVMMSG] += 1
    count = recvmmsg(w.udp_fd, w.receive_messages, w.receive, MSG_DONTWAIT, NULL)
    if count < 0:
        error = errno
        w.udp_ready = False
        if error == EAGAIN:
            return 0
        count_error(&w.counters, error)
        if is_fatal(error):
            return -error
        # Errors of datagrams sent earlier (ECONNREFUSED and the like) are reported here, one a call.
        w.udp_ready = True
        return 0
    w.udp_ready = count == w.receive
    now = now_ns()
    w.tap = w.capture if load_int(&w.capturing) else NULL
    if w.sessions != NULL:
        begin_sealed(w)
    for i in range(count):
        header = &w.receive_messages[i].msg_hdr
        length = w.receive_messages[i].msg_len
        data = <uint8_t *>w.receive_vectors[i].iov_base
        if w.connected:
            from_ = w.table.peers[0].endpoint
        elif not endpoint_from_sockaddr(&from_, header.msg_name, header.msg_namelen):
            length = 0
        if header.msg_flags & MSG_TRUNC or length == 0:
            w.counters.inbound.packets_in += 1
            w.counters.inbound.bytes_in += length
            w.counters.inbound.drops[DROP_OVERSIZED if header.msg_flags & MSG_TRUNC else DROP_IN_MALFORMED] += 1
            datagrams += 1
            continue
        size = read_controls(header, length, &local)
        datagrams += (length + size - 1) // size
        if w.sessions != NULL:
            w.sealing.senders[i] = from_
            w.sealing.locals[i] = local
        while length:
            step = size if size < length else length
            if w.tap != NULL:
                capture_outer(w.tap, False, data, step, &local, w.port, &from_)
            if w.sessions != NULL:
                result = take_sealed(w, data, step, i, now)
            else:
                result = take(w, data, step, &from_, &local, now)
            if result < 0:
                break
            data += step
            length -= step
        if result < 0:
            break
    if datagrams:
        count_burst(&w.counters.inbound.bursts_in, datagrams)
    if w.sessions != NULL:
        if result >= 0:
            result = open_pending(w)
        end_sealed(w, now)
    if w.write_count:
        if result < 0:
            w.counters.inbound.drops[DROP_TUN_DOWN] += w.write_count
            w.write_count = 0
        else:
            result = write_socket(w)
    if w.vnet and w.coalescer.packet_count:
        if result < 0:
            w.counters.inbound.drops[DROP_TUN_DOWN] += w.coalescer.packet_count
            coalescer_reset(w.coalescer)
        else:
            result = write_frames(w)
    if w.sessions == NULL and w.origin.valid:
        pthread_mutex_lock(&w.table.lock)
        settle_origin(w)
        pthread_mutex_unlock(&w.table.lock)
    return result


# ------------------------------------------------------------------------------------ WireGuard mode

include "_sealed.pxi"


# ------------------------------------------------------------------------------------------- loop

cdef int rest(worker_t *w) noexcept nogil:
    """Sleeps until a descriptor is ready. >= 0, -EINTR, or -errno when a descriptor is dead.

    With busy polling it looks again and again first, for at most that long: a wake-up costs more than the
    wait for an answer that is under way. It yields between looks, since the answer may need this very core.
    An idle tunnel spins once after its last packet, then sleeps.
    """
    cdef pollfd[3] fds
    cdef bint waits = w.message_next < w.message_count
    cdef uint64_t count, until
    cdef int ready = 0
    fds[0].fd = w.event_fd
    fds[0].events = POLLIN
    fds[1].fd = -1 if waits else w.tun_fd
    fds[1].events = POLLIN
    fds[2].fd = w.udp_fd
    fds[2].events = POLLIN | POLLOUT if waits else POLLIN
    if w.busy_poll_ns:
        until = precise_ns() + w.busy_poll_ns
        while ready == 0 and precise_ns() < until:
            w.counters.calls[CALL_POLL] += 1
            ready = poll(fds, 3, 0)
            if ready == 0:
                sched_yield()
    if ready == 0:
        w.counters.calls[CALL_POLL] += 1
        ready = poll(fds, 3, -1)
    if ready < 0:
        return -errno
    if fds[0].revents:
        read(w.event_fd, &count, 8)
    if fds[1].revents & POLLNVAL or fds[2].revents & POLLNVAL:
        return -EBADF
    # POLLERR on the UDP socket is an error of a datagram sent earlier: the next receive takes it.
    # POLLERR on the TUN is a deleted device: the next read says so.
    w.tun_ready = fds[1].revents != 0
    w.udp_ready = (fds[2].revents & ~POLLOUT) != 0
    return 0


cdef int serve(worker_t *w) noexcept nogil:
    """The loop. Returns 0 when stopped, -EINTR for signals to be seen to, -errno when a descriptor is dead."""
    cdef int result
    while not load_int(&w.stop):
        if not (w.tun_ready or w.udp_ready or has_sealed_work(w)):
            result = rest(w)
            if result < 0:
                return result
        if w.message_next < w.message_count:
            result = flush(w)
            if result < 0:
                return result
        if has_sealed_work(w):
            result = work_sealed(w)
            if result < 0:
                return result
        if w.tun_ready and w.message_count == 0:
            result = outbound_burst(w)
            if result < 0:
                return result
        if w.udp_ready:
            result = inbound_burst(w)
            if result < 0:
                return result
            if w.udp_ready:
                # Under steady load of one direction no poll tells about the other: look.
                w.tun_ready = True
        elif w.tun_ready:
            w.udp_ready = True
        if w.message_count:
            w.tun_ready = False
        if w.news:
            w.news = False
            tell(w.notify_fd)
    return 0


cdef void abandon(worker_t *w) noexcept nogil:
    """Counts as dropped what is still unsent when the loop ends."""
    cdef int i
    for i in range(w.message_next, w.message_count):
        drop_message(w, i, DROP_UNSENT)
    w.message_count = 0
    w.message_next = 0
    w.vector_count = 0
    if w.sessions != NULL:
        abandon_queues(w)


# ---------------------------------------------------------------------------------------- classes

OUTBOUND_DROPS = ("malformed", "no_peer", "too_big", "send_failed", "unsent", "no_session", "queue_full",
                  "no_endpoint")
INBOUND_DROPS = ("malformed", "oversized", "stranger", "martian", "unproven", "table_full", "tun_down",
                 "tun_full", "tun_refused", "unknown_index", "expired", "replayed", "forged", "not_allowed")
CALL_NAMES = ("read", "write", "sendmmsg", "recvmmsg", "poll")
EVENT_NAMES = {EVENT_PEER: "peer", EVENT_MOVED: "moved", EVENT_GREETED: "greeted", EVENT_OFFLOAD: "offload",
               EVENT_FAST_PATH: "fast-path"}
OFFLOAD_NAMES = {OFFLOAD_UDP_GSO: "udp-gso", OFFLOAD_TUN: "tun"}
SIDES = {"source": SIDE_SOURCE, "destination": SIDE_DESTINATION}
FRAMING_CODES = {"auto": FRAMING_AUTO, "raw": FRAMING_RAW, "pi": FRAMING_PI}
FRAMING_NAMES = {FRAMING_AUTO: "unknown", FRAMING_RAW: "raw", FRAMING_PI: "pi"}


cdef int socket_type(int fd) noexcept:
    """SOCK_DGRAM and the like; -1 for what is no socket."""
    cdef int kind
    cdef unsigned int size = sizeof(int)
    return kind if getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) == 0 else -1


cdef bytes packed(object address):
    """The 16 bytes of an ipaddress object, IPv4 as v4-mapped."""
    raw = address.packed
    return raw if len(raw) == 16 else b"\0" * 10 + b"\xff\xff" + raw


cdef object unpacked(const address_t *address):
    raw = (<const uint8_t *>address)[:16]
    return ipaddress.IPv4Address(raw[12:]) if raw[:12] == b"\0" * 10 + b"\xff\xff" else ipaddress.IPv6Address(raw)


cdef int set_address(address_t *to, object address) except -1:
    raw = packed(address)
    memcpy(to, <const char *>raw, 16)
    return 0


cdef int set_endpoint_value(endpoint_t *to, tuple value) except -1:
    host, port, scope_id = value
    set_address(<address_t *>to, host)
    to.port = port
    to.scope_id = scope_id
    return 0


cdef tuple endpoint_value(const endpoint_t *endpoint):
    return unpacked(<const address_t *>endpoint), endpoint.port, endpoint.scope_id


cdef double silence(uint64_t now, uint64_t heard) noexcept:
    return (now - heard) / 1e9 if now > heard else 0.0


cdef class PeerTable:
    """The peers of one tunnel, shared by its workers. Methods may be called from any thread.

    family: of the UDP sockets. fixed: one configured peer, set by `set_server`, nothing is learned.
    allow: outer networks (`ipaddress`) that may send; own: inner addresses that no peer may have.
    expiry_s: silence after which a peer is forgotten. patience_s: how long an owner may take to answer
    before a claimant is asked. unfinished: tell peers that ask that this side takes unfinished packets (see
    `Engine`), and learn it of them. Addresses and endpoints are `ipaddress` objects and (host, port, scope_id).
    """

    cdef table_t *t
    cdef readonly int notify_fd

    def __cinit__(self, *, int family=AF_INET6, bint fixed=False, str framing="auto", allow=(), own=(),
                  double expiry_s=180.0, double patience_s=1.0, int peers=1024, int addresses=8192,
                  bint unfinished=False):
        cdef int i
        self.notify_fd = -1
        if not 0 < peers <= 1 << 20 or not 0 < addresses <= 1 << 20:
            raise ConfigurationError("peers", "the table's capacities are out of range", "use 1 to 1048576")
        if len(allow) > MAX_ALLOWED:
            raise ConfigurationError("allow", f"{len(allow)} networks", f"use at most {MAX_ALLOWED}")
        self.t = <table_t *>calloc(1, sizeof(table_t))
        if self.t == NULL:
            raise MemoryError("fasttun: no memory for the peer table")
        pthread_mutex_init(&self.t.lock, NULL)
        self.t.family = family
        self.t.fixed = fixed
        self.t.unfinished = unfinished
        self.t.framing = FRAMING_CODES[framing]
        self.t.expiry_ns = <uint64_t>(expiry_s * 1e9)
        self.t.patience_ns = <uint64_t>(patience_s * 1e9)
        self.t.stun_tokens = STUN_BURST
        key = os.urandom(16)
        memcpy(&self.t.key, <const char *>key, 16)
        self.t.peer_capacity = peers
        self.t.peer_mask = (1 << (peers - 1).bit_length()) - 1
        self.t.entry_capacity = addresses
        self.t.entry_mask = (1 << (addresses - 1).bit_length()) - 1
        self.t.peers = <peer_t *>calloc(peers, sizeof(peer_t))
        self.t.peer_buckets = <int32_t *>calloc(self.t.peer_mask + 1, sizeof(int32_t))
        self.t.entries = <entry_t *>calloc(addresses, sizeof(entry_t))
        self.t.entry_buckets = <int32_t *>calloc(self.t.entry_mask + 1, sizeof(int32_t))
        if self.t.peers == NULL or self.t.peer_buckets == NULL or self.t.entries == NULL \
                or self.t.entry_buckets == NULL:
            raise MemoryError("fasttun: no memory for the peer table")
        memset(self.t.peer_buckets, 0xff, (self.t.peer_mask + 1) * sizeof(int32_t))
        memset(self.t.entry_buckets, 0xff, (self.t.entry_mask + 1) * sizeof(int32_t))
        for i in range(peers):
            self.t.peers[i].next = i + 1 if i + 1 < peers else -1
        for i in range(addresses):
            self.t.entries[i].next = i + 1 if i + 1 < addresses else -1
        for network in allow:
            raw = packed(network.network_address)
            memcpy(self.t.allowed[self.t.allowed_count].network, <const char *>raw, 16)
            self.t.allowed[self.t.allowed_count].bits = network.prefixlen + (96 if network.version == 4 else 0)
            self.t.allowed_count += 1
        for address in list(own)[:MAX_OWN]:
            set_address(&self.t.own[self.t.own_count], address)
            self.t.own_count += 1
        self.notify_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.notify_fd < 0:
            raise DeviceError("eventfd", "peer table", errno)

    def __dealloc__(self):
        if self.notify_fd >= 0:
            close(self.notify_fd)
        if self.t != NULL:
            pthread_mutex_destroy(&self.t.lock)
            free(self.t.peers)
            free(self.t.peer_buckets)
            free(self.t.entries)
            free(self.t.entry_buckets)
            free(self.t)

    cdef void acquire(self) noexcept:
        with nogil:
            pthread_mutex_lock(&self.t.lock)

    cdef void release(self) noexcept:
        pthread_mutex_unlock(&self.t.lock)

    def set_server(self, host, int port, unsigned int scope_id=0):
        """Makes (host, port) the one peer of a fixed table, or moves it there; its counters go on."""
        cdef endpoint_t endpoint
        cdef sockaddr_t address
        if not self.t.fixed:
            raise StateError("set_server is for a table with a fixed peer")
        set_endpoint_value(&endpoint, (host, port, scope_id))
        if not endpoint_to_sockaddr(&endpoint, self.t.family, &address) and self.t.family in (AF_INET, AF_INET6):
            raise ConfigurationError("server", f"{host} cannot be reached by this socket's family")
        self.acquire()
        try:
            if self.t.peer_count == 0:
                self.t.peer_count = 1
                self.t.peer_free = -1
                self.t.peers[0].used = 1
                self.t.peers[0].generation = 1
                self.t.peers[0].next = -1
            elif not same_endpoint(&self.t.peers[0].endpoint, &endpoint):
                self.t.peers[0].framing = FRAMING_AUTO
                self.t.peers[0].heard_ns = 0
                self.t.peers[0].unfinished = False
            self.t.peers[0].endpoint = endpoint
            self.t.peers[0].address = address
        finally:
            self.release()

    def set_greeting(self, bytes transaction):
        """The transaction (12 bytes) of the Binding request to the server whose success counts."""
        if len(transaction) != TRANSACTION_SIZE:
            raise ConfigurationError("transaction", "is not 12 bytes")
        self.acquire()
        memcpy(self.t.greeting, <const char *>transaction, TRANSACTION_SIZE)
        self.t.greeting_set = True
        self.t.greeting_ns = precise_ns()
        self.release()

    def account(self, endpoint, *, unsigned long long inbound_packets, unsigned long long inbound_bytes,
                unsigned long long outbound_packets, unsigned long long outbound_bytes, unsigned long long heard_ns):
        """Adds packets that passed outside the loop to a peer. heard_ns: of the last inbound one, 0 for none.

        False when there is no such peer.
        """
        cdef endpoint_t value
        cdef int32_t peer
        set_endpoint_value(&value, endpoint)
        self.acquire()
        if self.t.fixed:
            peer = 0 if self.t.peer_count and same_endpoint(&self.t.peers[0].endpoint, &value) else -1
        else:
            peer = find_peer(self.t, &value)
        if peer >= 0:
            self.t.peers[peer].inbound_packets += inbound_packets
            self.t.peers[peer].inbound_bytes += inbound_bytes
            self.t.peers[peer].outbound_packets += outbound_packets
            self.t.peers[peer].outbound_bytes += outbound_bytes
            if heard_ns > self.t.peers[peer].heard_ns:
                self.t.peers[peer].heard_ns = heard_ns
                self.t.peers[peer].checks = 0
        self.release()
        return peer >= 0

    def expire(self):
        """Forgets the peers that have been silent for longer than the expiry; returns how many."""
        cdef int removed
        self.acquire()
        removed = expire_peers(self.t, now_ns())
        self.release()
        return removed

    def peers(self):
        """A list of dicts, one a peer, by age in the table; `silent_s` is None before the first datagram.

        local: the address of this host that the peer sends to, if known. question: a Binding request to it, whose
        answer says whether it takes unfinished packets; None for the fixed peer, which is greeted.
        """
        cdef table_t *t = self.t
        cdef uint8_t[24] request
        cdef uint8_t[12] transaction
        cdef uint64_t tag
        cdef int32_t peer_count = 1 if t.fixed else t.peer_capacity
        cdef int32_t entry_count = 0 if t.fixed else t.entry_capacity
        cdef int32_t i
        cdef uint64_t now
        cdef peer_t *peer
        cdef peer_t *peers = <peer_t *>calloc(peer_count, sizeof(peer_t))
        cdef entry_t *entries = <entry_t *>calloc(entry_count + 1, sizeof(entry_t))
        found = {}
        try:
            if peers == NULL or entries == NULL:
                raise MemoryError("fasttun: no memory for a snapshot of the peers")
            # Copied first: no Python code may run under a lock that workers and signal handlers take too.
            with nogil:
                pthread_mutex_lock(&t.lock)
                now = now_ns()
                memcpy(peers, t.peers, peer_count * sizeof(peer_t))
                memcpy(entries, t.entries, entry_count * sizeof(entry_t))
                pthread_mutex_unlock(&t.lock)
            for i in range(peer_count):
                peer = &peers[i]
                if not peer.used or (not t.fixed and has_expired(t, peer, now)):
                    continue
                found[i] = {
                    "endpoint": endpoint_value(&peer.endpoint),
                    "framing": FRAMING_NAMES[t.framing or peer.framing],
                    "addresses": [],
                    "question": None,
                    "unfinished": bool(peer.unfinished),
                    "local": unpacked(&peer.local) if is_known(&peer.local) else None,
                    "inbound_packets": peer.inbound_packets, "inbound_bytes": peer.inbound_bytes,
                    "outbound_packets": peer.outbound_packets, "outbound_bytes": peer.outbound_bytes,
                    "silent_s": silence(now, max(peer.heard_ns, peer.kept_ns)) if peer.heard_ns else None,
                }
            for i in range(entry_count):
                if not entries[i].used or entries[i].peer not in found:
                    continue
                one = found[entries[i].peer]
                one["addresses"].append(unpacked(&entries[i].address))
                if one["question"] is None:
                    tag = check_tag(t, &peers[entries[i].peer].endpoint, i, &entries[i].address, check_epoch(now))
                    memcpy(transaction, &i, 4)
                    memcpy(transaction + 4, &tag, 8)
                    one["question"] = request[:stun_request(request, transaction, t.unfinished)]
        finally:
            free(peers)
            free(entries)
        return list(found.values())

    def events(self):
        """Takes the events since the last call: tuples (kind, endpoint, inner address, value)."""
        cdef event_t[256] events
        cdef event_t *event
        cdef uint64_t wakes
        cdef int i
        cdef int count = 0
        with nogil:
            read(self.notify_fd, &wakes, 8)
            pthread_mutex_lock(&self.t.lock)
            while self.t.event_tail != self.t.event_head:
                events[count] = self.t.events[self.t.event_tail & (EVENT_RING - 1)]
                self.t.event_tail += 1
                count += 1
            pthread_mutex_unlock(&self.t.lock)
        taken = []
        for i in range(count):
            event = &events[i]
            taken.append((EVENT_NAMES[event.kind], endpoint_value(&event.endpoint),
                          unpacked(&event.address), event.value))
        return taken

    @property
    def events_lost(self):
        """Events that found the ring full."""
        return self.t.events_lost

    # The three below are the loop's own steps with the clock in the caller's hand, for tests.

    def admit(self, endpoint, address, str framing, unsigned long long at_ns):
        """What the loop does with a packet: (peer's index or reason below zero, list of checks).

        A check is ((host, port, scope_id), transaction) of a Binding request that would be sent.
        """
        cdef endpoint_t from_
        cdef address_t source
        cdef address_t local
        cdef check_t[2] checks
        cdef bint news = False
        cdef int32_t peer
        cdef int i
        memset(&local, 0, sizeof(address_t))
        set_endpoint_value(&from_, endpoint)
        set_address(&source, address)
        memset(checks, 0, sizeof(checks))
        self.acquire()
        peer = admit(self.t, &from_, &local, &source, FRAMING_CODES[framing], at_ns, checks, &news)
        self.release()
        sent = []
        for i in range(2):
            if checks[i].wanted:
                endpoint_from_sockaddr(&from_, checks[i].to.bytes, checks[i].to.length)
                sent.append((endpoint_value(&from_), checks[i].transaction[:TRANSACTION_SIZE]))
        return peer, sent

    def check_answered(self, endpoint, bytes transaction, unsigned long long at_ns):
        """What the loop does with a Binding success; whether the transaction was one sent there."""
        cdef endpoint_t from_
        cdef bint news = False
        cdef bint ours
        cdef address_t local
        memset(&local, 0, sizeof(address_t))
        set_endpoint_value(&from_, endpoint)
        if len(transaction) != TRANSACTION_SIZE:
            raise ConfigurationError("transaction", "is not 12 bytes")
        self.acquire()
        ours = check_answered(self.t, &from_, &local, <const uint8_t *><const char *>transaction, False, at_ns,
                              &news)
        self.release()
        return ours

    def lookup(self, address, unsigned long long at_ns):
        """The endpoint that a packet to `address` goes to, or None."""
        cdef address_t destination
        cdef int32_t peer
        set_address(&destination, address)
        self.acquire()
        peer = peer_for(self.t, &destination, at_ns)
        found = endpoint_value(&self.t.peers[peer].endpoint) if peer >= 0 else None
        self.release()
        return found


include "_sessions.pxi"


@no_gc_clear
cdef class Engine:
    """One worker: a TUN queue, a UDP socket, and the loop between them. Descriptors are borrowed.

    mtu: bytes of the largest inner packet expected from either side. burst_packets: 1 to 256 reads from the
    TUN before they are sent; 1 is one packet a call. udp_gso, udp_gro: the offload is there and wanted
    (UDP_GRO is already set on the socket). vnet_header: the TUN has IFF_VNET_HDR with headers of 10 bytes;
    join_udp: it also takes joined UDP (TUN_F_USO). connected: the socket is connected, its peer the only one.
    busy_poll_us: microseconds of looking for packets before each sleep, 0 for none. sticky: the socket tells
    the address that a datagram came to (IP_PKTINFO), and the answers leave from there. unfinished: datagrams may
    hold packets, also frames of TCP, whose checksum or segmentation the sender's kernel has left to the receiver, as
    a fast path sends them over virtual links; with the TUN a device. name: for errors.
    table: a `PeerTable` for the plain mode, a `SessionTable` for WireGuard's, which takes one worker.
    `run()` once, from one thread; `stop()` and `counters()` from any.
    """

    cdef worker_t *w
    cdef readonly object table
    cdef str name
    cdef int state

    def __cinit__(self, table not None, *, int tun_fd, int udp_fd, int mtu=1500,
                  int burst_packets=64, bint udp_gso=False, bint udp_gro=False, bint vnet_header=False,
                  bint join_udp=False, bint connected=False, int busy_poll_us=0,
                  bint sticky=False, bint unfinished=False, str name="tunnel"):
        cdef int i
        cdef worker_t *w
        if not 1 <= burst_packets <= MAX_BURST:
            raise ConfigurationError("burst_packets", f"{burst_packets} is out of range", f"use 1 to {MAX_BURST}")
        if not 68 <= mtu <= 65535:
            raise ConfigurationError("mtu", f"{mtu} is out of range", "use 68 to 65535")
        self.table = table
        w = self.w = <worker_t *>calloc(1, sizeof(worker_t))
        if w == NULL:
            raise MemoryError("fasttun: no memory for a worker")
        w.event_fd = -1
        w.tun_fd = tun_fd
        w.udp_fd = udp_fd
        w.notify_fd = table.notify_fd
        if isinstance(table, SessionTable):
            w.sessions = (<SessionTable>table).s
            w.family = w.sessions.family
            w.sealing = <sealing_t *>calloc(1, sizeof(sealing_t))
            if w.sealing == NULL:
                raise MemoryError("fasttun: no memory for a worker's packets")
        else:
            w.table = (<PeerTable?>table).t
            w.family = w.table.family
        w.connected = connected
        w.burst = burst_packets
        w.gso = udp_gso
        w.gro = udp_gro
        w.vnet = vnet_header
        w.sticky = sticky
        w.unfinished = unfinished
        w.mtu = mtu
        self.name = name
        w.busy_poll_ns = <uint64_t>busy_poll_us * 1000
        w.slot = (mtu + HEAD_ROOM + TAIL_ROOM + SLOT - 1) // SLOT * SLOT
        w.receive = 1 if burst_packets == 1 else GRO_RECEIVE if udp_gro or unfinished else MAX_RECEIVE
        w.receive_slot = FRAME if udp_gro or unfinished else (mtu + SESSION_OVERHEAD + SLOT - 1) // SLOT * SLOT
        w.tun_ends = socket_type(tun_fd) != SOCK_DGRAM
        w.tun_is_socket = burst_packets > 1 and not vnet_header and socket_type(tun_fd) >= 0
        if w.tun_is_socket:
            w.writes = <mmsghdr *>calloc(MAX_BURST, sizeof(mmsghdr))
            w.write_vectors = <iovec *>calloc(MAX_BURST, sizeof(iovec))
            if w.writes == NULL or w.write_vectors == NULL:
                raise MemoryError("fasttun: no memory for a worker's messages")
            for i in range(MAX_BURST):
                w.writes[i].msg_hdr.msg_iovlen = 1
        w.arena_size = burst_packets * w.slot
        if vnet_header or unfinished:
            w.frame = <uint8_t *>calloc(1, FRAME)
            w.split = <uint8_t *>calloc(1, segment_out_size(0, 0))
            if w.frame == NULL or w.split == NULL:
                raise MemoryError("fasttun: no memory for a worker's frames")
        if vnet_header:
            w.arena_size = FRAMES_BYTES + FRAME + segment_out_size(
                SESSION_HEADER, SESSION_PADDING + SESSION_TAG)
            w.coalescer = <coalescer_t *>calloc(1, sizeof(coalescer_t))
            if w.coalescer == NULL:
                raise MemoryError("fasttun: no memory for a worker's frames")
            # Fixed IDs too: senders with DF may repeat one (RFC 6864 §4.1), Linux's UDP does.
            coalescer_init(w.coalescer, True, join_udp, True)
        w.arena = <uint8_t *>calloc(1, w.arena_size)
        w.messages = <mmsghdr *>calloc(MAX_MESSAGES, sizeof(mmsghdr))
        w.vectors = <iovec *>calloc(MAX_MESSAGES, sizeof(iovec))
        w.names = <sockaddr_t *>calloc(MAX_MESSAGES, sizeof(sockaddr_t))
        w.controls = <uint8_t *>calloc(MAX_MESSAGES, CONTROL)
        w.groups = <group_t *>calloc(MAX_MESSAGES, sizeof(group_t))
        w.receive_arena = <uint8_t *>calloc(w.receive, w.receive_slot)
        w.receive_messages = <mmsghdr *>calloc(w.receive, sizeof(mmsghdr))
        w.receive_vectors = <iovec *>calloc(w.receive, sizeof(iovec))
        w.receive_names = <sockaddr_t *>calloc(w.receive, sizeof(sockaddr_t))
        w.receive_controls = <uint8_t *>calloc(w.receive, CONTROL)
        if w.arena == NULL or w.messages == NULL or w.vectors == NULL or w.names == NULL or w.controls == NULL \
                or w.groups == NULL or w.receive_arena == NULL or w.receive_messages == NULL \
                or w.receive_vectors == NULL or w.receive_names == NULL or w.receive_controls == NULL:
            raise MemoryError("fasttun: no memory for a worker's buffers")
        for i in range(w.receive):
            w.receive_vectors[i].iov_base = w.receive_arena + i * w.receive_slot
            w.receive_vectors[i].iov_len = w.receive_slot
            w.receive_messages[i].msg_hdr.msg_iov = &w.receive_vectors[i]
            w.receive_messages[i].msg_hdr.msg_iovlen = 1
            w.receive_messages[i].msg_hdr.msg_name = NULL if connected else w.receive_names[i].bytes
            w.receive_messages[i].msg_hdr.msg_control = w.receive_controls + i * CONTROL
        w.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if w.event_fd < 0:
            raise DeviceError("eventfd", "worker", errno)
        if w.sessions != NULL:
            w.sessions.event_fd = w.event_fd

    def __dealloc__(self):
        if self.w != NULL:
            if self.w.sessions != NULL and self.w.sessions.event_fd == self.w.event_fd:
                self.w.sessions.event_fd = -1
            free(self.w.sealing)
            if self.w.capture != NULL:
                free(self.w.capture.ring)
                free(self.w.capture)
            if self.w.event_fd >= 0:
                close(self.w.event_fd)
            free(self.w.arena)
            free(self.w.frame)
            free(self.w.split)
            free(self.w.writes)
            free(self.w.write_vectors)
            free(self.w.coalescer)
            free(self.w.messages)
            free(self.w.vectors)
            free(self.w.names)
            free(self.w.controls)
            free(self.w.groups)
            free(self.w.receive_arena)
            free(self.w.receive_messages)
            free(self.w.receive_vectors)
            free(self.w.receive_names)
            free(self.w.receive_controls)
            free(self.w)

    def run(self):
        """Forwards until `stop()`. Raises `DeviceError` when a descriptor is dead, and what a signal raises.

        A second call raises `StateError`.
        """
        cdef int result
        cdef worker_t *w = self.w
        if self.state:
            raise StateError("an Engine runs once; make a new one")
        self.state = 1
        w.tun_ready = True
        w.udp_ready = True
        try:
            while True:
                with nogil:
                    result = serve(w)
                if result != -EINTR:
                    break
                PyErr_CheckSignals()
        finally:
            self.end()
            tell(w.notify_fd)
        if result < 0:
            raise DeviceError("forward through", self.name, -result, _dead_hint(-result))

    cdef void end(self) noexcept:
        with nogil:  # it takes the lock, and whoever has that may be waiting for the GIL
            abandon(self.w)

    def stop(self):
        """Makes `run()` return soon; before `run()`, makes it return at once. Any thread, any number of times."""
        store_int(&self.w.stop, 1)
        tell(self.w.event_fd)

    def capture_start(self, *, bint inner=True, bint outer=False, unsigned int snap_length=262144,
                      clauses=(), int local_port=0):
        """Puts packets into the ring for `capture_read`, until `capture_stop`; one capture at a time.

        snap_length: bytes kept of each packet. local_port: of the socket, for outer packets' headers. clauses:
        tuples (network or None, port or -1, version or 0, protocol or -1, sides, negated, last), see
        _native/capture.pxd; at most 64. Raises `StateError` while another capture runs.
        """
        cdef capture_t *c = self.w.capture
        cdef int i
        if load_int(&self.w.capturing):
            raise StateError("this worker's packets are being captured already")
        if len(clauses) > CAPTURE_CLAUSES:
            raise ConfigurationError("filter", f"has {len(clauses)} terms", f"use at most {CAPTURE_CLAUSES}")
        if c == NULL:
            # Kept for the next capture: the loop may still be looking at it after `capture_stop`.
            c = <capture_t *>calloc(1, sizeof(capture_t))
            if c != NULL:
                c.ring = <uint8_t *>calloc(1, CAPTURE_RING)
            if c == NULL or c.ring == NULL:
                free(c)
                raise MemoryError("fasttun: no memory for capturing")
            self.w.capture = c
        store_release(&c.tail, load_acquire(&c.head))
        c.missed = 0
        c.snap_length = snap_length
        c.what = (CAPTURE_INNER if inner else 0) | (CAPTURE_OUTER if outer else 0)
        for i, (network, port, version, protocol, sides, negated, last) in enumerate(clauses):
            c.clauses[i].bits = -1
            if network is not None:
                raw = packed(network.network_address)
                memcpy(c.clauses[i].network, <const char *>raw, 16)
                c.clauses[i].bits = prefix_bits(network)
            c.clauses[i].port = port
            c.clauses[i].version = version
            c.clauses[i].protocol = protocol
            c.clauses[i].sides = sides
            c.clauses[i].negated = negated
            c.clauses[i].last = last
        c.clause_count = len(clauses)
        self.w.port = local_port
        store_int(&self.w.capturing, 1)

    def capture_stop(self):
        """No more packets come into the ring; those in it can still be read."""
        store_int(&self.w.capturing, 0)

    def capture_read(self, int limit=1024):
        """Takes up to `limit` packets: (list of (time in ns since 1970, outer?, outbound?, length, bytes), missed).

        missed: packets that found the ring full, since `capture_start`.
        """
        cdef capture_t *c = self.w.capture
        cdef capture_record_t *record
        cdef uint64_t head, tail, at
        cdef const uint8_t *data
        found = []
        if c == NULL:
            return found, 0
        head = load_acquire(&c.head)
        tail = c.tail
        while tail != head and len(found) < limit:
            at = tail & (CAPTURE_RING - 1)
            record = <capture_record_t *>(c.ring + at)
            if CAPTURE_RING - at < sizeof(capture_record_t) or record.size == 0:
                tail += CAPTURE_RING - at
                continue
            data = c.ring + at + sizeof(capture_record_t)
            found.append((record.time_ns, record.what == CAPTURE_OUTER, bool(record.outbound), record.length,
                          data[:record.stored]))
            tail += record.size
        store_release(&c.tail, tail)
        return found, load_u64(&c.missed)

    def counters(self):
        """This worker's counters as plain numbers: `outbound`, `inbound`, `calls`, `errors`, and more."""
        cdef int i
        cdef counters_t *c = &self.w.counters
        return {
            "outbound": direction(&c.outbound, OUTBOUND_DROPS),
            "inbound": direction(&c.inbound, INBOUND_DROPS),
            "calls": {CALL_NAMES[i]: load_u64(&c.calls[i]) for i in range(CALLS)},
            "errors": {_errno.errorcode.get(i, str(i)): load_u64(&c.errors[i])
                       for i in range(ERRNO_LIMIT) if load_u64(&c.errors[i])},
            "control_in": load_u64(&c.control_in), "control_out": load_u64(&c.control_out),
            "too_big_told": load_u64(&c.too_big_told), "bad_mac1": load_u64(&c.bad_mac1),
            "checksum": ft_checksum_variant().decode(),
            "aead": ft_aead_backend().decode() if self.w.sessions != NULL else "",
        }


cdef dict direction(direction_t *d, tuple reasons):
    cdef int i
    return {
        "packets_in": load_u64(&d.packets_in), "bytes_in": load_u64(&d.bytes_in),
        "packets_out": load_u64(&d.packets_out), "bytes_out": load_u64(&d.bytes_out),
        "drops": {name: load_u64(&d.drops[i]) for i, name in enumerate(reasons)},
        "bursts_in": bursts(&d.bursts_in), "bursts_out": bursts(&d.bursts_out),
    }


cdef tuple bursts(bursts_t *b):
    cdef int i
    return [load_u64(&b.calls[i]) for i in range(BURST_BUCKETS)], load_u64(&b.packets)


cdef str _dead_hint(int error):
    if error in (EBADFD, ENODEV):
        return "the TUN device was deleted while the tunnel ran"
    if error == EPIPE:
        return "the other end of the descriptor was closed"
    return "a descriptor was closed while the tunnel ran"
