"""The replay window of a keypair, RFC 6479: which counters have been seen (paper §5.4.6).

`check` before opening, `mark` only after: a forged counter must not move the window.
The engine has its own; this one serves the slow data path of the tests.
"""

from __future__ import annotations

__all__ = ["WINDOW", "ReplayWindow"]

WINDOW = 8128
"""Counters behind the greatest that are still taken: 8192 bits less one 64-bit word (RFC 6479 §2)."""


class ReplayWindow:
    """Remembers the greatest counter and which of the `WINDOW` before it have come."""

    __slots__ = ("_greatest", "_seen")

    def __init__(self) -> None:
        self._greatest = -1
        self._seen = 0  # bit n: the counter `greatest - n` has come

    def check(self, counter: int) -> bool:
        """Whether `counter` is new and not too old. Changes nothing."""
        if counter > self._greatest:
            return True
        age = self._greatest - counter
        return age < WINDOW and not self._seen >> age & 1

    def mark(self, counter: int) -> None:
        """Remember `counter`. Only for one that `check` allowed and whose packet is authentic."""
        if counter > self._greatest:
            shift = min(counter - self._greatest, WINDOW)
            self._seen = (self._seen << shift | 1) & ((1 << WINDOW) - 1)
            self._greatest = counter
        else:
            self._seen |= 1 << (self._greatest - counter)
