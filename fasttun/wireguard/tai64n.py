"""TAI64N timestamps of handshake initiations (paper §5.1; https://cr.yp.to/libtai/tai64.html).

Twelve bytes whose order as bytes is the order in time. Not for: clocks; the caller gives the wall time.
"""

from __future__ import annotations

import struct

__all__ = ["NEVER", "TIMESTAMP_LENGTH", "WHITENING_NS", "later", "stamp"]

TIMESTAMP_LENGTH = 12
WHITENING_NS = 1 << 24
"""Nanoseconds are cut to a multiple of this (about 17 ms), so that stamps tell little about the clock."""

NEVER = bytes(TIMESTAMP_LENGTH)
"""Before every timestamp: what a peer has sent last when it has sent none."""

_EPOCH = 0x400000000000000A
_SECOND_NS = 1_000_000_000
_FORMAT = struct.Struct(">QI")


def stamp(wall: float) -> bytes:
    """The whitened timestamp of `wall`, in seconds since 1970 UTC. A time before 1970 counts as 1970."""
    seconds, nanoseconds = divmod(max(0, int(wall * _SECOND_NS)), _SECOND_NS)
    return _FORMAT.pack(_EPOCH + seconds, nanoseconds & ~(WHITENING_NS - 1))


def later(timestamp: bytes) -> bytes:
    """The next whitened timestamp after `timestamp`."""
    seconds, nanoseconds = _FORMAT.unpack(timestamp)
    nanoseconds += WHITENING_NS
    if nanoseconds >= _SECOND_NS:
        seconds, nanoseconds = seconds + 1, 0
    return _FORMAT.pack(seconds, nanoseconds)
