"""When a client greets its server, tries the server's next address, or asks the resolver again.

No sockets and no clock: every call is told the time (seconds, monotonic). A greeting is a STUN Binding
request (RFC 8489); its answer shows that the server is there, and keeps a NAT's mapping open.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ..endpoint import Endpoint

__all__ = ["KEEPALIVE_S", "SILENCE_S", "Greeter", "Step", "binding_request"]

UNFINISHED = 0xFA57
"""The attribute of docs/wire.md, "Finding a fast path": without a value, and ignored by whoever does not know it."""

FIRST_STEPS_S = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Waits between the greetings to a server that has not been heard; then the last one for ever."""
TRIES_BEFORE_NEXT = 3
"""Unanswered greetings after which a name's next address is tried."""
KEEPALIVE_S = 20.0
"""Between greetings to a server that answers: below the 30 s after which the hastiest NATs forget."""
SILENCE_S = 45.0
"""Silence of the server after which its name is resolved again: two keepalives lost."""
RESOLVE_EVERY_S = 30.0
LOSS_GREETINGS = 32
"""How many greetings the share of lost ones is of."""
ANSWER_S = 1.0
"""A greeting without an answer counts as lost only after this."""
COARSE_CLOCK_S = 0.05
"""How far the clock of `silent_s` may be behind that of `now`: a few ticks of the slowest kernel."""


def binding_request(transaction: bytes, *, unfinished: bool = False) -> bytes:
    """A STUN Binding request (RFC 8489 §5). transaction: 12 bytes. unfinished: with the attribute of a fast path."""
    attributes = struct.pack("!HH", UNFINISHED, 0) if unfinished else b""
    return struct.pack("!HHI", 0x0001, len(attributes), 0x2112A442) + transaction + attributes


@dataclass(frozen=True)
class Step:
    """What is to be done now, and `wait_s` until the next call at the latest."""

    greet: bool
    move_to: Endpoint | None
    resolve: bool
    wait_s: float


class Greeter:
    """The schedule of one client. `addresses`: the server's, best first, at least one."""

    def __init__(self, addresses: Sequence[Endpoint], now: float, *, resolvable: bool) -> None:
        self._addresses = list(addresses)
        self._resolvable = resolvable
        self._index = 0
        self._unanswered = 0
        self._due = now
        self._since = now
        self._resolved = now
        self._ever_heard = False
        self._answers = False
        self._sent: deque[tuple[float, bool]] = deque(maxlen=LOSS_GREETINGS)
        self.round_trip_s: float | None = None
        """Of the last greeting answered; None before there is one from the address in use."""

    @property
    def current(self) -> Endpoint:
        """The address in use."""
        return self._addresses[self._index]

    def sent(self, now: float) -> None:
        """A greeting was sent."""
        self._sent.append((now, False))

    def answered(self, round_trip_s: float | None = None) -> None:
        """The last greeting was answered: from now on this server's silence means that it is gone.

        lametun answers none; it may be silent for hours because it has nothing to say.
        """
        self._answers = True
        if round_trip_s is not None:
            self.round_trip_s = round_trip_s
        if self._sent:
            self._sent[-1] = (self._sent[-1][0], True)

    def loss(self, now: float) -> float | None:
        """The share of the last greetings that had no answer, 0 to 1; None from a server that answers none."""
        if not self._answers:
            return None
        known = [answered for sent, answered in self._sent.copy() if answered or now - sent >= ANSWER_S]
        return known.count(False) / len(known) if known else None

    def _begin_anew(self) -> None:
        """What was known is of another address."""
        self._unanswered = 0
        self._answers = False
        self._sent.clear()
        self.round_trip_s = None

    def replace(self, addresses: Sequence[Endpoint], now: float) -> Endpoint | None:
        """Takes a resolver's new answer; returns the address to move to when the one in use is gone."""
        self._resolved = now
        old = self.current
        self._addresses = list(addresses)
        self._index = self._addresses.index(old) if old in self._addresses else 0
        if self.current == old:
            return None
        self._begin_anew()
        self._due = self._since = now
        return self.current

    def poll(self, now: float, silent_s: float) -> Step:
        """The step due at `now`. silent_s: since the server was last heard, `inf` if never."""
        if now - silent_s < self._since - COARSE_CLOCK_S:
            silent_s = inf  # it was heard at the address before this one
        heard = silent_s < SILENCE_S
        if heard:
            self._unanswered = 0
            self._ever_heard = True
            # The wait after an unanswered greeting was short; an answered one buys the long wait.
            self._due = max(self._due, now - silent_s + KEEPALIVE_S) if silent_s < KEEPALIVE_S else self._due
        resolve = (not heard and self._ever_heard and self._resolvable
                   and now - self._resolved >= RESOLVE_EVERY_S)
        if resolve:
            self._resolved = now
        if now < self._due:
            return Step(False, None, resolve, self._due - now)
        move_to = None
        is_gone = not heard and (self._answers or silent_s == inf)
        if is_gone and self._unanswered >= TRIES_BEFORE_NEXT and len(self._addresses) > 1:
            self._index = (self._index + 1) % len(self._addresses)
            self._begin_anew()
            self._since = now
            move_to = self.current
        wait = KEEPALIVE_S if heard else FIRST_STEPS_S[min(self._unanswered, len(FIRST_STEPS_S) - 1)]
        self._unanswered += 1
        self._due = now + wait
        return Step(True, move_to, resolve, wait)
