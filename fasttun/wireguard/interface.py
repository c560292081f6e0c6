"""`Interface`: a WireGuard device without sockets and without a clock.

A handshake datagram's way through it, in order:

    consume ── type and length (`messages`) ── mac1 ── under load: mac2, rate (`cookies`, `load`, `ratelimiter`)
            ── handshake (`noise`) ── keypair (`keypairs`) ── timers ── outputs for the host

The host sends and receives, seals and opens data packets, keeps their queue, finds the peer by inner address,
and reports data traffic back by `data_sent` and `data_received`. It sleeps until `next_deadline()` and then calls
`tick`. Nothing here raises for what comes from outside: the answer is a `Drop`.

`now` is in seconds, monotonic, never decreasing; `wall` is in seconds since 1970. Not thread-safe.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ..endpoint import Endpoint
from ..errors import ConfigurationError
from .cookies import CookieChecker
from .indices import IndexTable
from .keypairs import Keypair
from .keys import PresharedKey, PrivateKey, PublicKey, wipe
from .load import LoadMeter
from .messages import (
    TYPE_COOKIE_REPLY,
    TYPE_DATA,
    TYPE_INITIATION,
    CookieReply,
    Initiation,
    Response,
    message_type,
)
from .noise import InitiatorHandshake, TransportKeys, open_initiation
from .outputs import (
    ActivateKeypair,
    Drop,
    DropQueue,
    EndpointLearned,
    HandshakeDone,
    InstallKeypair,
    Output,
    RemoveKeypair,
    Send,
    SendKeepalive,
)
from .peer import Peer
from .ratelimiter import RateLimiter
from .refusal import Refused
from .timers import INITIATION_INTERVAL, TimerEvent

__all__ = ["MAX_PEERS", "MAX_PERSISTENT_KEEPALIVE", "IndexOwner", "Interface"]

MAX_PEERS = 1 << 16
"""Bounds memory, and keeps the index table sparse."""
MAX_PERSISTENT_KEEPALIVE = 65535
"""Seconds; the greatest that the control protocol can say."""


KeyLog = Callable[[PrivateKey, PublicKey, PrivateKey, PresharedKey], object]
"""Given our static key, the peer's, our ephemeral key and the preshared one; must keep no reference to them."""


class IndexOwner(NamedTuple):
    """Who has an index: a session, or with `keypair` None a handshake that we began."""

    peer: Peer
    keypair: Keypair | None


class Interface:
    """One private key, its peers, and their handshakes, sessions and timers."""

    def __init__(
        self, private_key: PrivateKey | None = None, *, load: LoadMeter | None = None,
        indices: IndexTable[IndexOwner] | None = None,
    ) -> None:
        """`load`, `indices`: replaced in tests."""
        self._private_key: PrivateKey | None = None
        self._checker: CookieChecker | None = None
        self._peers: dict[PublicKey, Peer] = {}
        self._indices: IndexTable[IndexOwner] = IndexTable() if indices is None else indices
        self._load = LoadMeter() if load is None else load
        self._limiter = RateLimiter()
        self._wake_ups: list[tuple[float, int, Peer]] = []
        self._wake_up_order = itertools.count()
        self.key_log: KeyLog | None = None
        """Called with the keys of each handshake message of ours before it is sent; None but on a person's request."""
        self.set_private_key(private_key)

    # configuration

    @property
    def private_key(self) -> PrivateKey | None:
        """The interface's key; None for an interface that takes and begins no handshakes."""
        return self._private_key

    @property
    def mac1_key(self) -> bytes | None:
        """What the engine checks mac1 with before it passes a handshake message on; None without a private key."""
        return None if self._checker is None else self._checker.mac1_key

    @property
    def peers(self) -> Mapping[PublicKey, Peer]:
        """All peers by public key; read-only."""
        return MappingProxyType(self._peers)

    def set_private_key(self, private_key: PrivateKey | None) -> list[Output]:
        """Become another: all sessions end, and a peer that has the new key's public key is removed.

        The same key again changes nothing. The key before is wiped; `private_key` is kept, not copied.
        """
        if private_key is not None and private_key == self._private_key:
            return []
        outputs: list[Output] = []
        if private_key is not None and private_key.public in self._peers:
            outputs += self.remove_peer(self._peers[private_key.public])
        if self._private_key is not None:
            self._private_key.wipe()
        if self._checker is not None:
            self._checker.wipe()
        self._private_key = private_key
        self._checker = None if private_key is None else CookieChecker(private_key.public)
        for peer in self._peers.values():
            outputs += self._end_sessions(peer)
            self._precompute(peer)
        return outputs

    def add_peer(
        self, public_key: PublicKey, *, preshared_key: PresharedKey | None = None, endpoint: Endpoint | None = None
    ) -> Peer:
        """A new peer. ConfigurationError when it is there already, is ourselves, or there are MAX_PEERS.

        A low-order key is taken, as the kernel does, but every handshake with it is refused.
        """
        if self._private_key is not None and public_key == self._private_key.public:
            raise ConfigurationError("public_key", "is this interface's own", "a peer needs the other side's key")
        if public_key in self._peers:
            raise ConfigurationError("public_key", f"{public_key} is a peer already")
        if len(self._peers) >= MAX_PEERS:
            raise ConfigurationError("public_key", f"would be peer number {MAX_PEERS + 1}", f"at most {MAX_PEERS}")
        peer = Peer(public_key, preshared_key or PresharedKey.none(), endpoint)
        self._precompute(peer)
        self._peers[public_key] = peer
        return peer

    def remove_peer(self, peer: Peer) -> list[Output]:
        """Forget the peer, its sessions and its handshake under way. Later calls for it do nothing."""
        if peer.removed:
            return []
        del self._peers[peer.public_key]
        outputs = [*self._end_sessions(peer), DropQueue(peer)]
        peer.removed = True
        peer.timers.stop()
        peer.wipe()
        return outputs

    def set_preshared_key(self, peer: Peer, preshared_key: PresharedKey | None) -> None:
        """Counts from the next handshake message on, also in a handshake under way; sessions stay."""
        old, peer.preshared_key = peer.preshared_key, preshared_key or PresharedKey.none()
        if old is not peer.preshared_key:
            old.wipe()

    def set_endpoint(self, peer: Peer, endpoint: Endpoint) -> None:
        """Where to send from now on, until the peer proves to be elsewhere."""
        peer.endpoint = endpoint

    def set_persistent_keepalive(self, peer: Peer, interval_s: int, now: float, wall: float) -> list[Output]:
        """0 turns it off. Turned on, it sends at once. ConfigurationError above MAX_PERSISTENT_KEEPALIVE."""
        if not 0 <= interval_s <= MAX_PERSISTENT_KEEPALIVE:
            raise ConfigurationError(
                "persistent_keepalive", f"is {interval_s}", f"0 to {MAX_PERSISTENT_KEEPALIVE} seconds"
            )
        if peer.removed:
            return []
        turned_on = interval_s > 0 and peer.timers.persistent_keepalive == 0
        peer.timers.set_persistent_keepalive(float(interval_s), now)
        outputs = self._keepalive(peer, now, wall) if turned_on else []
        self._schedule(peer)
        return outputs

    # time

    def next_deadline(self) -> float | None:
        """When `tick` is next of use, never later than that; None when no timer is pending."""
        while self._wake_ups:
            deadline, _, peer = self._wake_ups[0]
            if not peer.removed and peer.wake_at == deadline:
                return deadline
            heapq.heappop(self._wake_ups)
        return None

    def tick(self, now: float, wall: float) -> list[Output]:
        """Do what is due. May be called early or late."""
        outputs: list[Output] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            peer = heapq.heappop(self._wake_ups)[2]
            peer.wake_at = None
            for event in peer.timers.expire(now):
                outputs += self._timer_event(peer, event, now, wall)
            self._schedule(peer)
        return outputs

    def _timer_event(self, peer: Peer, event: TimerEvent, now: float, wall: float) -> list[Output]:
        if event is TimerEvent.RETRY_HANDSHAKE:
            return self._initiate(peer, now, wall)
        if event is TimerEvent.NEW_HANDSHAKE:
            return self._want_handshake(peer, now, wall)
        if event is TimerEvent.GIVE_UP_HANDSHAKE:
            self._end_handshake(peer)
            return [DropQueue(peer)]
        if event is TimerEvent.ZERO_KEYS:
            return [*self._end_sessions(peer), DropQueue(peer)]
        return self._keepalive(peer, now, wall)

    def _schedule(self, peer: Peer) -> None:
        """Note an earlier wake-up. A later one needs no note: the early look finds it."""
        deadline = peer.timers.next_deadline()
        if deadline is not None and not peer.removed and (peer.wake_at is None or deadline < peer.wake_at):
            peer.wake_at = deadline
            heapq.heappush(self._wake_ups, (deadline, next(self._wake_up_order), peer))

    # traffic, reported by the host

    def need_handshake(self, peer: Peer, now: float, wall: float) -> list[Output]:
        """A packet waits for a session. May be called for each such packet."""
        if peer.removed:
            return []
        outputs = self._want_handshake(peer, now, wall)
        self._schedule(peer)
        return outputs

    def new_handshake(self, peer: Peer, now: float, wall: float) -> list[Output]:
        """Renew the session, though the one that there is may be good: now, or as soon as that is allowed."""
        if peer.removed or peer.endpoint is None or self._private_key is None:
            return []
        at_once = peer.timers.may_initiate(now)
        outputs = self._want_handshake(peer, now, wall)
        if not at_once:
            peer.timers.initiate_later()
        self._schedule(peer)
        return outputs

    def data_sent(self, peer: Peer, now: float, wall: float) -> list[Output]:
        """Data was sent under the peer's current keypair. Once a burst is enough; not for keepalives.

        The keypair's `send_counter` is to be up to date.
        """
        if peer.removed:
            return []
        peer.timers.data_sent(now)
        outputs = self._rekey_after_send(peer, now, wall)
        self._schedule(peer)
        return outputs

    def data_received(
        self, local_index: int, source: Endpoint, now: float, wall: float, *, keepalive: bool
    ) -> list[Output]:
        """An authentic data packet came under `local_index` from `source`; `keepalive`: it was empty.

        Must be reported for the first packet under a keypair, and for every change of `source`; otherwise once
        a burst is enough.
        """
        owner = self._indices.get(local_index)
        if owner is None or owner.keypair is None:
            return []
        peer, keypair = owner.peer, owner.keypair
        outputs: list[Output] = []
        pushed_out = peer.keypairs.confirm(keypair)
        if pushed_out is not None:
            self._end_handshake(peer)
            outputs.append(ActivateKeypair(peer, keypair, confirm=False))
            outputs += self._remove(peer, pushed_out)
            outputs += self._handshake_done(peer, wall)
        outputs += self._learn_endpoint(peer, source)
        peer.timers.authenticated_received(now)
        if not keepalive:
            peer.timers.data_received(now)
        outputs += self._rekey_after_receive(peer, now, wall)
        self._schedule(peer)
        return outputs

    # datagrams

    def consume(
        self, datagram: bytes, source: Endpoint, now: float, wall: float, *, backlog: int = 0
    ) -> list[Output]:
        """Take in a handshake message or cookie reply. `backlog`: how many more are waiting behind it.

        Never raises for what is in `datagram`. Data messages are the host's: Drop("data-not-expected").
        """
        try:
            kind = message_type(datagram)
            if kind == TYPE_DATA:
                raise Refused("data-not-expected")
            if kind == TYPE_COOKIE_REPLY:
                return self._consume_cookie_reply(CookieReply.parse(datagram), now)
            if self._private_key is None or self._checker is None:
                raise Refused("no-private-key")
            reply = self._guard(self._checker, datagram, source, now, backlog)
            if reply is not None:
                return [reply, Drop("cookie-needed")]
            if kind == TYPE_INITIATION:
                return self._consume_initiation(self._private_key, datagram, source, now)
            return self._consume_response(self._private_key, datagram, source, now, wall)
        except Refused as refused:
            return [Drop(refused.reason)]

    def _guard(
        self, checker: CookieChecker, datagram: bytes, source: Endpoint, now: float, backlog: int
    ) -> Send | None:
        """Refuse what must not cost a DH; under load, a cookie reply for who has not proven its address (§5.3)."""
        if not checker.check_mac1(datagram):
            raise Refused("bad-mac1")
        if not self._load.message(now, backlog):
            return None
        if not checker.check_mac2(datagram, source, now):
            return Send(checker.create_reply(datagram, source, now).encode(), source, None)
        if not self._limiter.allow(source.host, now):
            raise Refused("rate-limited")
        return None

    def _consume_initiation(
        self, private_key: PrivateKey, datagram: bytes, source: Endpoint, now: float
    ) -> list[Output]:
        received = open_initiation(private_key, Initiation.parse(datagram))
        try:
            peer = self._peers.get(received.remote)
            if peer is None:
                raise Refused("unknown-peer")
            if peer.static_static is None:
                raise Refused("low-order-key")
            timestamp = received.verify(bytes(peer.static_static))
            if timestamp <= peer.greatest_timestamp:
                raise Refused("initiation-replayed")
            if now - peer.last_initiation < INITIATION_INTERVAL:
                raise Refused("initiation-flood")
            index = self._indices.allocate(IndexOwner(peer, None))
            try:
                response, keys = received.respond(
                    index, peer.preshared_key, ephemeral=self._draw_ephemeral(private_key, peer))
            except Refused:
                self._indices.release(index)
                raise
        finally:
            received.wipe()
        peer.greatest_timestamp = timestamp
        peer.last_initiation = now
        peer.timers.authenticated_received(now)
        peer.handshake_rx_bytes += len(datagram)
        outputs = self._learn_endpoint(peer, source)
        outputs += self._install(
            peer, keys, local_index=index, remote_index=response.receiver, now=now, initiator=False
        )
        message = peer.cookies.add_macs(response.encode(), now)
        peer.handshake_tx_bytes += len(message)
        peer.timers.response_sent(now)
        outputs.append(Send(message, source, peer))
        self._schedule(peer)
        return outputs

    def _consume_response(
        self, private_key: PrivateKey, datagram: bytes, source: Endpoint, now: float, wall: float
    ) -> list[Output]:
        response = Response.parse(datagram)
        owner = self._indices.get(response.receiver)
        if owner is None or owner.keypair is not None or owner.peer.handshake is None:
            raise Refused("unknown-index")
        peer, handshake = owner.peer, owner.peer.handshake
        keys = handshake.finish(response, private_key, peer.preshared_key)
        handshake.wipe()
        peer.handshake = None
        peer.timers.authenticated_received(now)
        peer.timers.session_derived(now)
        peer.handshake_rx_bytes += len(datagram)
        outputs = self._learn_endpoint(peer, source)
        outputs += self._install(
            peer, keys, local_index=handshake.sender, remote_index=response.sender, now=now, initiator=True
        )
        outputs += self._handshake_done(peer, wall)
        self._schedule(peer)
        return outputs

    def _consume_cookie_reply(self, reply: CookieReply, now: float) -> list[Output]:
        """Keep the cookie for the next retry. Not a sign of life, and never a reason to roam."""
        owner = self._indices.get(reply.receiver)
        if owner is None:
            raise Refused("unknown-index")
        owner.peer.cookies.consume_reply(reply, now)
        return []

    # steps

    def _want_handshake(self, peer: Peer, now: float, wall: float) -> list[Output]:
        peer.timers.handshake_wanted(now)
        return self._initiate(peer, now, wall)

    def _initiate(self, peer: Peer, now: float, wall: float) -> list[Output]:
        """Send an initiation, unless the last handshake message is too recent."""
        if not peer.timers.may_initiate(now):
            return []
        if self._private_key is None:
            return [Drop("no-private-key")]
        if peer.endpoint is None:
            return [Drop("no-endpoint")]
        if peer.static_static is None:
            return [Drop("low-order-key")]
        self._end_handshake(peer)
        index = self._indices.allocate(IndexOwner(peer, None))
        try:
            peer.handshake, initiation = InitiatorHandshake.begin(
                self._private_key, peer.public_key, bytes(peer.static_static), index, peer.next_timestamp(wall),
                ephemeral=self._draw_ephemeral(self._private_key, peer),
            )
        except Refused as refused:
            self._indices.release(index)
            return [Drop(refused.reason)]
        message = peer.cookies.add_macs(initiation.encode(), now)
        peer.handshake_tx_bytes += len(message)
        peer.timers.initiation_sent(now)
        return [Send(message, peer.endpoint, peer)]

    def _draw_ephemeral(self, private_key: PrivateKey, peer: Peer) -> PrivateKey:
        """A new key for one handshake message, which wipes it."""
        ephemeral = PrivateKey.generate()
        if self.key_log is not None:
            self.key_log(private_key, peer.public_key, ephemeral, peer.preshared_key)
        return ephemeral

    def _keepalive(self, peer: Peer, now: float, wall: float) -> list[Output]:
        """Send a keepalive, or begin a handshake if there is no session to send it under."""
        keypair = peer.keypairs.current
        if keypair is None or not keypair.can_send(now):
            return self._want_handshake(peer, now, wall)
        if peer.endpoint is None:
            return [Drop("no-endpoint")]
        peer.timers.authenticated_sent(now)
        return [SendKeepalive(peer, keypair), *self._rekey_after_send(peer, now, wall)]

    def _rekey_after_send(self, peer: Peer, now: float, wall: float) -> list[Output]:
        keypair = peer.keypairs.current
        if keypair is None or not keypair.wants_rekey_after_send(now):
            return []
        return self._want_handshake(peer, now, wall)

    def _rekey_after_receive(self, peer: Peer, now: float, wall: float) -> list[Output]:
        keypair = peer.keypairs.current
        if keypair is None or peer.timers.last_minute_handshake_sent or not keypair.wants_rekey_after_receive(now):
            return []
        peer.timers.last_minute_handshake_sent = True
        return self._want_handshake(peer, now, wall)

    def _install(
        self, peer: Peer, keys: TransportKeys, *, local_index: int, remote_index: int, now: float, initiator: bool
    ) -> list[Output]:
        keypair = Keypair(keys, local_index=local_index, remote_index=remote_index, created=now, initiator=initiator)
        self._indices.reassign(local_index, IndexOwner(peer, keypair))
        pushed_out = peer.keypairs.install(keypair)
        outputs: list[Output] = [InstallKeypair(peer, keypair)]
        if initiator:
            peer.timers.authenticated_sent(now)
            outputs.append(ActivateKeypair(peer, keypair, confirm=True))
        return outputs + self._remove(peer, pushed_out)

    def _handshake_done(self, peer: Peer, wall: float) -> list[Output]:
        peer.timers.handshake_complete()
        peer.last_handshake_wall = wall
        return [HandshakeDone(peer, wall)]

    def _learn_endpoint(self, peer: Peer, source: Endpoint) -> list[Output]:
        """Roam (paper §2.1). Only to be called for what was authentic."""
        if peer.endpoint == source:
            return []
        peer.endpoint = source
        return [EndpointLearned(peer, source)]

    def _remove(self, peer: Peer, keypairs: list[Keypair]) -> list[Output]:
        for keypair in keypairs:
            self._indices.release(keypair.local_index)
            keypair.keys.wipe()
        return [RemoveKeypair(peer, keypair) for keypair in keypairs]

    def _end_handshake(self, peer: Peer) -> None:
        """Forget the handshake that we began, if any; a response to it is not known any more."""
        if peer.handshake is not None:
            self._indices.release(peer.handshake.sender)
            peer.handshake.wipe()
            peer.handshake = None

    def _end_sessions(self, peer: Peer) -> list[Output]:
        self._end_handshake(peer)
        return self._remove(peer, peer.keypairs.clear())

    def _precompute(self, peer: Peer) -> None:
        """DH of the static keys, once: half of a handshake's cost for the initiator's side of it."""
        wipe(peer.static_static)
        peer.static_static = None
        if self._private_key is not None:
            try:
                peer.static_static = bytearray(self._private_key.exchange(peer.public_key))
            except Refused:
                peer.static_static = None
