# The replay window of a keypair, RFC 6479: which counters have come (WireGuard paper §5.4.6). The greatest one
# says which block a bit belongs to, so that nothing is ever shifted. Slow twin: fasttun/wireguard/replay.py.
# Not for: threads; the caller holds a lock.

from libc.stdint cimport uint64_t
from fasttun._native.system cimport memset

cdef extern from *:
    """
    #define FT_REPLAY_LIMIT 0xffffffffffffdfffULL
    """
    const uint64_t REPLAY_LIMIT "FT_REPLAY_LIMIT"
    # REJECT_AFTER_MESSAGES, 2^64 - 2^13 - 1 (paper §6.1): the first counter that is refused

cdef enum:
    REPLAY_BLOCKS = 128
    # of 64 bits, a power of two; one of them is redundant (RFC 6479 §2)
    REPLAY_WINDOW = 8128
    # counters, the greatest with them, that are still told apart

ctypedef struct replay_t:
    uint64_t next
    # the greatest counter that has come, plus one; 0 when none has
    uint64_t[128] blocks


cdef inline void replay_init(replay_t *w) noexcept nogil:
    memset(w, 0, sizeof(replay_t))


cdef inline bint replay_check(const replay_t *w, uint64_t counter) noexcept nogil:
    """Whether `counter` is new, not too old and below the limit. Changes nothing: for before opening."""
    if counter >= REPLAY_LIMIT:
        return False
    if counter >= w.next:
        return True
    if w.next - counter > REPLAY_WINDOW:
        return False
    return not w.blocks[(counter >> 6) & (REPLAY_BLOCKS - 1)] >> (counter & 63) & 1


cdef inline bint replay_mark(replay_t *w, uint64_t counter) noexcept nogil:
    """Remembers the counter of an authentic packet. False, and nothing changed, where `replay_check` is False."""
    cdef uint64_t block, first, last
    if not replay_check(w, counter):
        return False
    last = counter >> 6
    if counter >= w.next:
        first = (w.next - 1) >> 6 if w.next else 0
        if last - first > REPLAY_BLOCKS:
            first = last - REPLAY_BLOCKS
        for block in range(first + 1, last + 1):
            w.blocks[block & (REPLAY_BLOCKS - 1)] = 0
        w.next = counter + 1
    w.blocks[last & (REPLAY_BLOCKS - 1)] |= <uint64_t>1 << (counter & 63)
    return True
