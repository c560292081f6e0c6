"""The constants of the paper's §6.1 and the timers of one peer (§6.2 to §6.5), without a clock.

`PeerTimers` is told what happened and when, and tells what is due. The host sleeps until `next_deadline()`
and then asks `expire(now)`. Limits that follow from a keypair's age or counters are in `keypairs`.
All times are seconds, monotonic.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable

__all__ = [
    "INITIATION_INTERVAL", "KEEPALIVE_TIMEOUT", "REJECT_AFTER_TIME", "REKEY_AFTER_TIME", "REKEY_ATTEMPT_TIME",
    "REKEY_TIMEOUT", "REKEY_TIMEOUT_JITTER_MAX", "ZERO_KEYS_TIME", "PeerTimers", "TimerEvent",
]

REKEY_AFTER_TIME = 120.0
"""Age at which the initiator of a session makes the next one."""
REJECT_AFTER_TIME = 180.0
"""Age from which a session neither sends nor receives."""
REKEY_ATTEMPT_TIME = 90.0
"""How long a handshake is retried before it is given up."""
REKEY_TIMEOUT = 5.0
"""How long a response is waited for; also the least time between two initiations to a peer."""
KEEPALIVE_TIMEOUT = 10.0
"""Silence after which received data is answered by a keepalive."""
REKEY_TIMEOUT_JITTER_MAX = 0.333
"""Greatest random addition to REKEY_TIMEOUT (§6.4): two peers must not retry in step for ever."""
INITIATION_INTERVAL = 1 / 50
"""Least time between two initiations taken from one peer, seconds: bounds what a stolen key can make us compute.

A peer that is removed and added again begins at once, for what it sent before is forgotten with it. When its new
initiation arrives within this time of the old one, or with the same whitened timestamp, the other side refuses it
(§5.1) without a word, and the retry comes a REKEY_TIMEOUT later. Only the refusing side knows, so it stays so.
"""
ZERO_KEYS_TIME = 3 * REJECT_AFTER_TIME
"""Time without a new session after which all keys are wiped (§6.3)."""


class TimerEvent(enum.Enum):
    """What is due."""

    RETRY_HANDSHAKE = enum.auto()
    GIVE_UP_HANDSHAKE = enum.auto()
    NEW_HANDSHAKE = enum.auto()
    SEND_KEEPALIVE = enum.auto()
    PERSISTENT_KEEPALIVE = enum.auto()
    ZERO_KEYS = enum.auto()


def _random_jitter() -> float:
    return random.uniform(0.0, REKEY_TIMEOUT_JITTER_MAX)


class PeerTimers:
    """Five deadlines, each a time or None. `jitter`: gives 0 to REKEY_TIMEOUT_JITTER_MAX, replaced in tests."""

    __slots__ = (
        "_attempt_started", "_jitter", "_keepalive_again", "_last_handshake_sent", "_new_handshake",
        "_persistent_at", "_persistent_keepalive", "_retry_handshake", "_send_keepalive", "_zero_keys",
        "last_minute_handshake_sent",
    )

    def __init__(self, jitter: Callable[[], float] = _random_jitter) -> None:
        self._jitter = jitter
        self._persistent_keepalive = 0.0
        self.last_minute_handshake_sent = False
        """Whether the session's end has already led to a handshake on receiving (§6.2)."""
        self.stop()

    def stop(self) -> None:
        """Nothing is due any more, and the next handshake may start at once."""
        self._retry_handshake: float | None = None
        self._send_keepalive: float | None = None
        self._new_handshake: float | None = None
        self._zero_keys: float | None = None
        self._persistent_at: float | None = None
        self._keepalive_again = False
        self._attempt_started = self._last_handshake_sent = float("-inf")

    # what happened

    def handshake_wanted(self, now: float) -> None:
        """Something new needs a session: REKEY_ATTEMPT_TIME counts from here (§6.4)."""
        self._attempt_started = now

    def may_initiate(self, now: float) -> bool:
        """Whether REKEY_TIMEOUT has passed since the last handshake message to this peer (§6.1)."""
        return now - self._last_handshake_sent >= REKEY_TIMEOUT

    def initiate_later(self) -> None:
        """As soon as `may_initiate` allows it."""
        self._retry_handshake = self._last_handshake_sent + REKEY_TIMEOUT + self._jitter()

    def initiation_sent(self, now: float) -> None:
        """An initiation is on its way, first or repeated."""
        self._last_handshake_sent = now
        self._retry_handshake = now + REKEY_TIMEOUT + self._jitter()
        self.authenticated_sent(now)

    def response_sent(self, now: float) -> None:
        """A response is on its way, and with it a session has been derived."""
        self._last_handshake_sent = now
        self.session_derived(now)
        self.authenticated_sent(now)

    def session_derived(self, now: float) -> None:
        """There are new transport keys."""
        self._zero_keys = now + ZERO_KEYS_TIME

    def handshake_complete(self) -> None:
        """A response was taken, or the first data on a session that we responded to."""
        self._retry_handshake = None
        self.last_minute_handshake_sent = False

    def data_sent(self, now: float) -> None:
        """A data packet that is not a keepalive was sent: an answer is expected (§6.5)."""
        if self._new_handshake is None:
            self._new_handshake = now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + self._jitter()
        self.authenticated_sent(now)

    def data_received(self, now: float) -> None:
        """A data packet that is not a keepalive was received: it is to be answered in KEEPALIVE_TIMEOUT.

        Keepalives must not come here, or two silent peers would answer each other for ever (§6.5).
        """
        if self._send_keepalive is None:
            self._send_keepalive = now + KEEPALIVE_TIMEOUT
        else:
            self._keepalive_again = True

    def authenticated_sent(self, now: float) -> None:
        """Anything was sent that the peer can authenticate: data, keepalive, handshake."""
        self._send_keepalive = None
        self._restart_persistent(now)

    def authenticated_received(self, now: float) -> None:
        """Anything authentic was received: data, keepalive, handshake. The peer is alive."""
        self._new_handshake = None
        self._restart_persistent(now)

    def set_persistent_keepalive(self, interval: float, now: float) -> None:
        """Send something at least every `interval` seconds; 0 turns it off."""
        self._persistent_keepalive = interval
        self._restart_persistent(now)

    @property
    def persistent_keepalive(self) -> float:
        """The interval in seconds; 0 when off."""
        return self._persistent_keepalive

    def _restart_persistent(self, now: float) -> None:
        interval = self._persistent_keepalive
        self._persistent_at = now + interval if interval > 0 else None

    # what is due

    def next_deadline(self) -> float | None:
        """When `expire` will next have something to tell; None when nothing is pending."""
        pending = [
            deadline
            for deadline in (
                self._retry_handshake, self._send_keepalive, self._new_handshake, self._zero_keys, self._persistent_at,
            )
            if deadline is not None
        ]
        return min(pending, default=None)

    def expire(self, now: float) -> list[TimerEvent]:
        """What is due at `now`, each once. Zeroing comes first, so that no event uses keys that are too old."""
        due: list[TimerEvent] = []
        if self._zero_keys is not None and now >= self._zero_keys:
            self._zero_keys = None
            due.append(TimerEvent.ZERO_KEYS)
        if self._retry_handshake is not None and now >= self._retry_handshake:
            due.extend(self._retry_or_give_up(now))
        if self._new_handshake is not None and now >= self._new_handshake:
            self._new_handshake = None
            due.append(TimerEvent.NEW_HANDSHAKE)
        if self._send_keepalive is not None and now >= self._send_keepalive:
            self._send_keepalive = now + KEEPALIVE_TIMEOUT if self._keepalive_again else None
            self._keepalive_again = False
            due.append(TimerEvent.SEND_KEEPALIVE)
        if self._persistent_at is not None and now >= self._persistent_at:
            # Restarted here too, since without an endpoint nothing is sent that would restart it.
            self._restart_persistent(now)
            due.append(TimerEvent.PERSISTENT_KEEPALIVE)
        return due

    def _retry_or_give_up(self, now: float) -> list[TimerEvent]:
        if now - self._attempt_started >= REKEY_ATTEMPT_TIME:
            self._retry_handshake = self._send_keepalive = None
            if self._zero_keys is None:
                self._zero_keys = now + ZERO_KEYS_TIME
            return [TimerEvent.GIVE_UP_HANDSHAKE]
        if not self.may_initiate(now):  # a response went out meanwhile
            self._retry_handshake = self._last_handshake_sent + REKEY_TIMEOUT + self._jitter()
            return []
        self._retry_handshake = None
        return [TimerEvent.RETRY_HANDSHAKE]
