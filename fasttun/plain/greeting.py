"""When a client greets its server, tries the server's next address, or asks the resolver again.

No sockets and no clock: every call is told the time (seconds, monotonic). A greeting is a STUN Binding
request (RFC 8489); its answer shows that the server is there, and keeps a NAT's mapping open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ..endpoint import Endpoint

__all__ = ["KEEPALIVE_S", "SILENCE_S", "Greeter", "Step"]

FIRST_STEPS_S = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Waits between the greetings to a server that has not been heard; then the last one for ever."""
TRIES_BEFORE_NEXT = 3
"""Unanswered greetings after which a name's next address is tried."""
KEEPALIVE_S = 20.0
"""Between greetings to a server that answers: below the 30 s after which the hastiest NATs forget."""
SILENCE_S = 45.0
"""Silence of the server after which its name is resolved again: two keepalives lost."""
RESOLVE_EVERY_S = 30.0
COARSE_CLOCK_S = 0.05
"""How far the clock of `silent_s` may be behind that of `now`: a few ticks of the slowest kernel."""


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

    @property
    def current(self) -> Endpoint:
        """The address in use."""
        return self._addresses[self._index]

    def answered(self) -> None:
        """A greeting was answered: from now on this server's silence means that it is gone.

        lametun answers none; it may be silent for hours because it has nothing to say.
        """
        self._answers = True

    def replace(self, addresses: Sequence[Endpoint], now: float) -> Endpoint | None:
        """Takes a resolver's new answer; returns the address to move to when the one in use is gone."""
        self._resolved = now
        old = self.current
        self._addresses = list(addresses)
        self._index = self._addresses.index(old) if old in self._addresses else 0
        if self.current == old:
            return None
        self._unanswered = 0
        self._due = self._since = now
        self._answers = False
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
            self._unanswered = 0
            self._since = now
            self._answers = False
            move_to = self.current
        wait = KEEPALIVE_S if heard else FIRST_STEPS_S[min(self._unanswered, len(FIRST_STEPS_S) - 1)]
        self._unanswered += 1
        self._due = now + wait
        return Step(True, move_to, resolve, wait)
