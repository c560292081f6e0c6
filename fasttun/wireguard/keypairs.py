"""A session's two keys with their limits, and the three of them that a peer may have at once (paper §6.1 to §6.3).

The engine seals and opens by these keys in C; `Keypair.seal` and `Keypair.open` are the same in slow Python.
Not for: the handshake that makes the keys (`noise`), when to renew them (`timers`, `interface`).
"""

from __future__ import annotations

from nacl import bindings
from nacl.exceptions import CryptoError

from .messages import DATA_HEADER_LENGTH, DataHeader
from .noise import TransportKeys
from .refusal import Refused
from .replay import ReplayWindow
from .timers import KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_AFTER_TIME, REKEY_TIMEOUT

__all__ = [
    "PADDING_MULTIPLE", "REJECT_AFTER_MESSAGES", "REKEY_AFTER_MESSAGES", "Keypair", "Keypairs", "padded_length",
]

REKEY_AFTER_MESSAGES = 1 << 60
"""Messages after which the sender makes a new session (paper §6.1)."""
REJECT_AFTER_MESSAGES = (1 << 64) - (1 << 13) - 1
"""Counters from here on are neither sent nor taken (paper §6.1)."""
PADDING_MULTIPLE = 16
"""Inner packets are padded with zeros to a multiple of this, to hide their length (paper §5.4.6)."""

_NONCE_PREFIX = bytes(4)


def padded_length(length: int, mtu: int) -> int:
    """The length of an inner packet of `length` after padding, which never exceeds `mtu` nor cuts anything."""
    return max(length, min(mtu, -(-length // PADDING_MULTIPLE) * PADDING_MULTIPLE))


class Keypair:
    """One session. `created`: seconds, monotonic. `initiator`: whether we began its handshake."""

    __slots__ = ("created", "initiator", "keys", "local_index", "remote_index", "replay", "send_counter")

    def __init__(
        self, keys: TransportKeys, *, local_index: int, remote_index: int, created: float, initiator: bool
    ) -> None:
        self.keys = keys
        self.local_index = local_index
        self.remote_index = remote_index
        self.created = created
        self.initiator = initiator
        self.send_counter = 0
        """The next counter; kept by the engine once it has the keypair."""
        self.replay = ReplayWindow()

    def __repr__(self) -> str:
        role = "initiator" if self.initiator else "responder"
        return f"<Keypair {self.local_index:08x} {role}>"

    def expired(self, now: float) -> bool:
        """Whether it is too old to send or receive (REJECT_AFTER_TIME)."""
        return now - self.created >= REJECT_AFTER_TIME

    def can_send(self, now: float) -> bool:
        """Whether neither time nor messages have run out."""
        return not self.expired(now) and self.send_counter < REJECT_AFTER_MESSAGES

    def wants_rekey_after_send(self, now: float) -> bool:
        """REKEY_AFTER_MESSAGES for both sides, REKEY_AFTER_TIME for the initiator only (§6.2).

        If both sides acted on time they would do it in the same moment.
        """
        if self.send_counter > REKEY_AFTER_MESSAGES:
            return True
        return self.initiator and now - self.created >= REKEY_AFTER_TIME

    def wants_rekey_after_receive(self, now: float) -> bool:
        """Whether an initiator that only receives should renew now, before the session ends under it (§6.2)."""
        return self.initiator and now - self.created >= REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT

    def seal(self, packet: bytes, now: float) -> bytes:
        """The datagram for a padded inner packet; b"" makes a keepalive. Refused("keypair-expired")."""
        if not self.can_send(now):
            raise Refused("keypair-expired")
        counter = self.send_counter
        self.send_counter += 1
        sealed = bindings.crypto_aead_chacha20poly1305_ietf_encrypt(
            packet, None, _NONCE_PREFIX + counter.to_bytes(8, "little"), bytes(self.keys.send)
        )
        return DataHeader(self.remote_index, counter).encode() + sealed

    def open(self, datagram: bytes, now: float) -> bytes:
        """The padded inner packet. The window is checked before opening and marked after.

        Refused: "keypair-expired", "replayed", "data-not-authentic".
        """
        counter = DataHeader.parse(datagram).counter
        if self.expired(now) or counter >= REJECT_AFTER_MESSAGES:
            raise Refused("keypair-expired")
        if not self.replay.check(counter):
            raise Refused("replayed")
        try:
            packet = bindings.crypto_aead_chacha20poly1305_ietf_decrypt(
                datagram[DATA_HEADER_LENGTH:], None, _NONCE_PREFIX + counter.to_bytes(8, "little"),
                bytes(self.keys.receive),
            )
        except CryptoError:
            raise Refused("data-not-authentic") from None
        self.replay.mark(counter)
        return packet


class Keypairs:
    """A peer's sessions: `current` sends; `previous` still receives; `next` waits for its confirmation.

    The responder of a handshake cannot know that its response arrived until data comes under the new keys.
    """

    __slots__ = ("current", "next", "previous")

    def __init__(self) -> None:
        self.previous: Keypair | None = None
        self.current: Keypair | None = None
        self.next: Keypair | None = None

    def install(self, keypair: Keypair) -> list[Keypair]:
        """Take in a new session: the initiator's is confirmed, the responder's becomes `next`.

        Returns those that it pushed out, for the caller to remove and wipe.
        """
        if keypair.initiator:
            # A `next` that the peer may already send under must go on receiving: it outranks `current`.
            if self.next is not None:
                removed = [self.previous, self.current]
                self.previous, self.next = self.next, None
            else:
                removed = [self.previous]
                self.previous = self.current
            self.current = keypair
        else:
            removed = [self.previous, self.next]
            self.previous, self.next = None, keypair
        return [old for old in removed if old is not None]

    def confirm(self, keypair: Keypair) -> list[Keypair] | None:
        """Data came under `keypair`. None unless it was `next`, which now is `current`; else those pushed out."""
        if self.next is not keypair:
            return None
        removed = [self.previous] if self.previous is not None else []
        self.previous, self.current, self.next = self.current, keypair, None
        return removed

    def clear(self) -> list[Keypair]:
        """Empty all three; returns those that were there."""
        removed = [old for old in (self.previous, self.current, self.next) if old is not None]
        self.previous = self.current = self.next = None
        return removed
