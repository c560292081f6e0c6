"""Is the interface under load (paper §5.3)? Then handshakes need a cookie before they cost a DH.

Two signs: more handshake messages wait than can be worked off at once, or more came in a second than one core
can answer. Either holds for `UNDER_LOAD_TIME`, so that a peer's retry with a cookie still meets the same rule.
"""

from __future__ import annotations

__all__ = ["MAX_BACKLOG", "MAX_PER_SECOND", "UNDER_LOAD_TIME", "LoadMeter"]

MAX_BACKLOG = 512
"""Handshake messages waiting, an eighth of a ring of 4096."""
MAX_PER_SECOND = 500
"""Handshake messages with a right mac1: half of what one core answers."""
UNDER_LOAD_TIME = 1.0
"""Seconds for which the interface stays under load after the last sign of it."""


class LoadMeter:
    """Counts handshake messages in windows of one second."""

    def __init__(self, max_per_second: int = MAX_PER_SECOND, max_backlog: int = MAX_BACKLOG) -> None:
        self._max_per_second = max_per_second
        self._max_backlog = max_backlog
        self._window_end = float("-inf")
        self._count = 0
        self._loaded_until = float("-inf")

    def message(self, now: float, backlog: int) -> bool:
        """Count one message, with `backlog` more waiting; True when under load. `now`: seconds, monotonic."""
        if now >= self._window_end:
            self._window_end = now + 1.0
            self._count = 0
        self._count += 1
        if self._count > self._max_per_second or backlog >= self._max_backlog:
            self._loaded_until = now + UNDER_LOAD_TIME
        return now < self._loaded_until
