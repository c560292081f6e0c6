"""What an `Interface` asks its host to do. To be carried out in the order given.

The host is the engine with its sockets, or `software.SoftwareTunnel` in tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..endpoint import Endpoint
from .keypairs import Keypair
from .peer import Peer

__all__ = [
    "ActivateKeypair", "Drop", "DropQueue", "EndpointLearned", "HandshakeDone", "InstallKeypair", "Output",
    "RemoveKeypair", "Send", "SendKeepalive",
]


@dataclass(frozen=True)
class Send:
    """Send this handshake message. `peer`: None for a cookie reply, whose receiver is not known yet."""

    datagram: bytes
    endpoint: Endpoint
    peer: Peer | None


@dataclass(frozen=True)
class InstallKeypair:
    """Receive under `keypair.local_index` from now on; do not send under it yet."""

    peer: Peer
    keypair: Keypair


@dataclass(frozen=True)
class ActivateKeypair:
    """Send under `keypair` from now on, first of all what waits in the peer's queue.

    confirm: if nothing waits, send an empty packet, not to be reported back. The responder may not send before
    something came under the new keys (paper §5.4.6, §6.5).
    """

    peer: Peer
    keypair: Keypair
    confirm: bool


@dataclass(frozen=True)
class RemoveKeypair:
    """Neither send nor receive under `keypair` any more, and wipe every copy of its keys.

    The interface's own copy is already wiped.
    """

    peer: Peer
    keypair: Keypair


@dataclass(frozen=True)
class SendKeepalive:
    """Send what waits in the peer's queue, or an empty packet if nothing does. Not to be reported back."""

    peer: Peer
    keypair: Keypair


@dataclass(frozen=True)
class DropQueue:
    """Drop what waits in the peer's queue: there will be no session."""

    peer: Peer


@dataclass(frozen=True)
class EndpointLearned:
    """The peer has proven to be at `endpoint`."""

    peer: Peer
    endpoint: Endpoint


@dataclass(frozen=True)
class HandshakeDone:
    """A session is confirmed from both sides. `wall`: seconds since 1970, as `wg show` gives it."""

    peer: Peer
    wall: float


@dataclass(frozen=True)
class Drop:
    """A datagram or a wish was not taken. `reason`: the name of a counter."""

    reason: str


Output = (
    Send | InstallKeypair | ActivateKeypair | RemoveKeypair | SendKeepalive | DropQueue | EndpointLearned
    | HandshakeDone | Drop
)
