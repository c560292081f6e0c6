"""One peer: its keys, where it is, its sessions and timers. The steps between them are the `Interface`'s.

Change a peer through its `Interface`, which tells the host what follows; reading is free.
"""

from __future__ import annotations

from ..endpoint import Endpoint
from . import tai64n
from .cookies import CookieGenerator
from .keypairs import Keypairs
from .keys import PresharedKey, PublicKey, wipe
from .noise import InitiatorHandshake
from .timers import PeerTimers

__all__ = ["Peer"]


class Peer:
    """State of one peer. Identity is by object: the same key added again is another peer."""

    __slots__ = (
        "cookies", "endpoint", "greatest_timestamp", "handshake", "handshake_rx_bytes", "handshake_tx_bytes",
        "keypairs", "last_handshake_wall", "last_initiation", "last_timestamp_sent", "preshared_key", "public_key",
        "removed", "static_static", "timers", "wake_at",
    )

    def __init__(self, public_key: PublicKey, preshared_key: PresharedKey, endpoint: Endpoint | None) -> None:
        self.public_key = public_key
        self.preshared_key = preshared_key
        self.endpoint = endpoint
        self.cookies = CookieGenerator(public_key)
        self.timers = PeerTimers()
        self.keypairs = Keypairs()
        self.handshake: InitiatorHandshake | None = None
        """The one that we began and that has no answer yet."""
        self.static_static: bytearray | None = None
        """DH of the two static keys; None while there is no private key, or when the peer's is low-order."""
        self.greatest_timestamp = tai64n.NEVER
        """Of the initiations taken from the peer: a replayed one is not greater (paper §5.1)."""
        self.last_timestamp_sent = tai64n.NEVER
        self.last_initiation = float("-inf")
        """When the last initiation was taken from it; seconds, monotonic."""
        self.last_handshake_wall = 0.0
        """When a session was last confirmed, seconds since 1970; 0 for never."""
        self.handshake_rx_bytes = 0
        self.handshake_tx_bytes = 0
        """Handshake messages in either direction, to add to what the engine counts."""
        self.removed = False
        self.wake_at: float | None = None
        """The interface's own note of when it will look at the timers."""

    def __repr__(self) -> str:
        return f"<Peer {self.public_key!r}>"

    def next_timestamp(self, wall: float) -> bytes:
        """The timestamp of an initiation at `wall`, always greater than the last one.

        A clock that is set back would otherwise shut us out until it has caught up.
        """
        self.last_timestamp_sent = max(tai64n.stamp(wall), tai64n.later(self.last_timestamp_sent))
        return self.last_timestamp_sent

    def wipe(self) -> None:
        """Overwrite the secrets that the peer itself holds; keypairs and handshake are the interface's to end."""
        wipe(self.static_static)
        self.static_static = None
        self.preshared_key.wipe()
        self.cookies.wipe()
