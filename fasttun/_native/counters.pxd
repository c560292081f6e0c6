# What a worker counts. Each counter has one writer, its worker; readers use relaxed loads.
# The names that users see are in fasttun/_core.pyx, in the same order.

from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    /* The smallest i with packets <= 2^i; the last bucket of BURST_BUCKETS takes what is above 4,096. */
    static inline int ft_burst_bucket(uint32_t packets) {
        int bits = packets <= 1 ? 0 : 32 - __builtin_clz(packets - 1);
        return bits < 13 ? bits : 13;
    }
    """
    int ft_burst_bucket(uint32_t packets) noexcept nogil

cdef enum:
    # outbound
    DROP_OUT_MALFORMED = 0
    DROP_NO_PEER = 1
    DROP_TOO_BIG = 2
    DROP_SEND_FAILED = 3
    DROP_UNSENT = 4
    DROP_NO_SESSION = 5
    DROP_QUEUE_FULL = 6
    DROP_NO_ENDPOINT = 7
    # inbound
    DROP_IN_MALFORMED = 0
    DROP_OVERSIZED = 1
    DROP_STRANGER = 2
    DROP_MARTIAN = 3
    DROP_UNPROVEN = 4
    DROP_TABLE_FULL = 5
    DROP_TUN_DOWN = 6
    DROP_TUN_FULL = 7
    DROP_TUN_REFUSED = 8
    DROP_UNKNOWN_INDEX = 9
    DROP_EXPIRED = 10
    DROP_REPLAYED = 11
    DROP_FORGED = 12
    DROP_NOT_ALLOWED = 13
    DROP_REASONS = 14

cdef enum:
    CALL_READ = 0
    CALL_WRITE = 1
    CALL_SENDMMSG = 2
    CALL_RECVMMSG = 3
    CALL_POLL = 4
    CALLS = 5

cdef enum:
    ERRNO_LIMIT = 134
    # above EHWPOISON, the last one of Linux

cdef enum:
    BURST_BUCKETS = 14

ctypedef struct bursts_t:
    # How many packets a system call carried: calls by powers of two, and the packets of all of them.
    uint64_t[14] calls
    uint64_t packets

ctypedef struct direction_t:
    uint64_t packets_in
    uint64_t bytes_in
    uint64_t packets_out
    uint64_t bytes_out
    uint64_t[14] drops
    bursts_t bursts_in
    bursts_t bursts_out

ctypedef struct counters_t:
    direction_t outbound
    direction_t inbound
    uint64_t[5] calls
    uint64_t[134] errors
    uint64_t control_in
    uint64_t control_out
    uint64_t too_big_told
    uint64_t bad_mac1


cdef inline void count_burst(bursts_t *b, uint32_t packets) noexcept nogil:
    """Of a system call that carried `packets`, at least one."""
    b.calls[ft_burst_bucket(packets)] += 1
    b.packets += packets


cdef inline void count_error(counters_t *c, int error) noexcept nogil:
    if 0 < error < ERRNO_LIMIT:
        c.errors[error] += 1
    else:
        c.errors[0] += 1
