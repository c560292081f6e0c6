"""Host: the sans-IO protocol joined to the engine's sessions, and the peers that are behind both.

What the engine has (handshake messages, news about data) goes to `Interface`; what that asks for is carried out on
`SessionTable`. Every change of configuration passes here, so that both always agree. Safe for threads: `guard`.
Not for: sockets, devices and threads (`tunnel`), nor names in configuration files beyond an endpoint's.
"""

from __future__ import annotations

import copy
import ipaddress
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Final

from .._core import NEWS_FLAGS, SessionTable
from ..endpoint import Endpoint, resolve
from ..errors import ConfigurationError, FasttunError
from ..stats import LossWindow, WireGuardPeer
from . import keylog
from .config import PeerConfig
from .interface import Interface
from .keys import PresharedKey, PrivateKey, PublicKey
from .messages import TYPE_INITIATION, TYPE_RESPONSE, message_type
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

__all__ = ["KEEP", "Host", "Keep", "look_up", "split_endpoint"]

log = logging.getLogger("fasttun")

MESSAGES_A_TURN = 64
_SENT, _SENT_LAST, _RECEIVED, _HEARD, _WAITING = (
    NEWS_FLAGS[name] for name in ("sent", "sent_last", "received", "heard", "waiting"))

_V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Keep(Enum):
    """The type of `KEEP`."""

    KEEP = 0


KEEP: Final = Keep.KEEP
"""For `update_peer`: leave it as it is."""


class _Member:
    """What the host knows of a peer beyond the protocol: its number in the engine, its networks, its name."""

    __slots__ = ("allowed_ips", "given", "initiated_at", "losses", "name", "number", "peer", "round_trip_s")

    def __init__(self, peer: Peer, number: int, name: str | None, given: str | None) -> None:
        self.peer = peer
        self.number = number
        self.name = name
        self.given = given
        """The endpoint as it was configured: a name is looked up again when the peer does not answer."""
        self.allowed_ips: dict[Network, None] = {}
        self.losses = LossWindow()
        self.initiated_at: float | None = None
        """When the last initiation was sent, monotonic; None once it has been answered."""
        self.round_trip_s: float | None = None


class Host:
    """One device's protocol and sessions.

    send(datagram, endpoint, local address or None): sends a handshake message; must not raise. told: collects a
    snapshot of each peer whose session is confirmed, for the owner to take; None to collect none.
    """

    def __init__(self, table: SessionTable, send: Callable[[bytes, Endpoint, Address | None], object],
                 told: list[WireGuardPeer] | None = None) -> None:
        self.guard = threading.RLock()
        self.drops: Counter[str] = Counter()
        """Handshake messages that were not taken, by reason."""
        self._table = table
        self._send = send
        self._told = told
        self._protocol = Interface()
        self._members: dict[PublicKey, _Member] = {}
        self._by_number: dict[int, _Member] = {}
        self._owners: dict[Network, _Member] = {}
        self._resolving: set[PublicKey] = set()
        self._closed = False

    def close(self) -> None:
        """Wipes all keys. Nothing may be called after it."""
        with self.guard:
            self._closed = True
            self._carry_out(self._protocol.set_private_key(None))
            for member in self._members.values():
                member.peer.wipe()

    # ------------------------------------------------------------------------------ what happens

    def next_deadline(self) -> float | None:
        """When `turn` is next of use by the timers: seconds, monotonic; None when none is pending."""
        with self.guard:
            return self._protocol.next_deadline()

    def turn(self) -> tuple[int, bool, tuple[str, int] | None]:
        """Takes in some of what the engine has, and does what is due.

        Returns how many handshake messages still wait, whether there was news about data, and the offload that
        the engine has given up, if any.
        """
        with self.guard:  # what is in the news must not outlive a change of configuration
            messages, news, backlog, lost = self._table.take(MESSAGES_A_TURN)
            taken_at = time.monotonic()
            for item in news:  # first: a message may push out the session that was heard
                self._take_news(*item)
        waiting = backlog + len(messages)
        for datagram, source, local in messages:
            waiting -= 1
            with self.guard:
                outputs = self._protocol.consume(
                    datagram, Endpoint(*source), time.monotonic(), time.time(), backlog=waiting)
                self._note_round_trip(datagram, outputs, taken_at)
                self._carry_out(outputs, Endpoint(*source), local)
        with self.guard:
            self._carry_out(self._protocol.tick(time.monotonic(), time.time()))
        return backlog, bool(news), lost

    def _note_round_trip(self, datagram: bytes, outputs: Iterable[Output], taken_at: float) -> None:
        """A response that was taken answers the last initiation: an earlier one's is not known any more."""
        for output in outputs:
            if isinstance(output, HandshakeDone) and message_type(datagram) == TYPE_RESPONSE:
                member = self._members.get(output.peer.public_key)
                if member is not None and member.initiated_at is not None:
                    member.round_trip_s = taken_at - member.initiated_at
                    member.initiated_at = None

    def _take_news(self, number: int, flags: int, index: int, source: tuple[Any, int, int], counter: int) -> None:
        member = self._by_number.get(number)
        if member is None:
            return
        peer, protocol = member.peer, self._protocol
        now, wall = time.monotonic(), time.time()
        if peer.keypairs.current is not None:
            peer.keypairs.current.send_counter = max(peer.keypairs.current.send_counter, counter)
        if flags & _SENT and not flags & _SENT_LAST:
            self._carry_out(protocol.data_sent(peer, now, wall))
        if flags & _HEARD:
            self._carry_out(protocol.data_received(
                index, Endpoint(*source), now, wall, keepalive=not flags & _RECEIVED))
        if flags & _SENT and flags & _SENT_LAST:
            self._carry_out(protocol.data_sent(peer, now, wall))
        if flags & _WAITING:
            self._carry_out(protocol.need_handshake(peer, now, wall))

    def _carry_out(self, outputs: Iterable[Output], source: Endpoint | None = None,
                   local: Address | None = None) -> None:
        """Does what the protocol asks for, in order. source, local: of the message that led to it."""
        for output in outputs:
            if isinstance(output, Drop):
                self.drops[output.reason] += 1
                continue
            if isinstance(output, RemoveKeypair):
                self._table.remove_keypair(output.keypair.local_index)
                continue
            member = self._members.get(output.peer.public_key) if output.peer is not None else None
            if isinstance(output, Send):
                if output.endpoint != source and member is not None:
                    local = self._table.peer_counters(member.number)["local"]
                if member is not None and message_type(output.datagram) == TYPE_INITIATION:
                    member.initiated_at = time.monotonic()
                self._send(output.datagram, output.endpoint, local)
            elif member is not None:
                self._carry_out_for(member, output, local)

    def _carry_out_for(self, member: _Member, output: Output, local: Address | None) -> None:
        table = self._table
        if isinstance(output, InstallKeypair):
            pair = output.keypair
            table.install(member.number, pair.local_index, pair.remote_index, pair.keys.send, pair.keys.receive)
        elif isinstance(output, ActivateKeypair):
            table.activate(output.keypair.local_index, output.confirm)
        elif isinstance(output, SendKeepalive):
            table.keepalive(member.number)
        elif isinstance(output, DropQueue):
            table.drop_queue(member.number)
            self._look_up_again(member)
        elif isinstance(output, EndpointLearned):
            at = output.endpoint
            table.set_endpoint(member.number, (at.host, at.port, at.scope_id), local)
            log.debug("peer %r is at %s", member.peer.public_key, at)
        elif isinstance(output, HandshakeDone):
            log.debug("session with peer %r", member.peer.public_key)
            if self._told is not None:
                self._told.append(self._snapshot(member))

    def log_keys(self, write: Callable[[str], object] | None) -> None:
        """From now on `write` gets what opens a capture (`keylog`), first the device's own keys; None ends it."""
        with self.guard:
            private_key = self._protocol.private_key
            self._protocol.key_log = None
            if write is None:
                return
            if private_key is not None:
                for text in keylog.of_device(private_key, self._members):
                    write(text)
            self._protocol.key_log = lambda *keys: write(keylog.of_handshake(*keys))

    def new_handshakes(self) -> None:
        """Begins one with every peer that can be reached; 5 s after the last one with it, if that is later."""
        with self.guard:
            for member in self._members.values():
                self._carry_out(self._protocol.new_handshake(member.peer, time.monotonic(), time.time()))

    def keepalive_all(self) -> None:
        """An authentic packet to every peer with a session, such as when our port has changed."""
        with self.guard:
            for member in self._members.values():
                self._table.keepalive(member.number)

    def look_up_again(self) -> None:
        """Has the names of all peers looked up again, soon and in threads aside."""
        with self.guard:
            for member in self._members.values():
                self._look_up_again(member)

    def _look_up_again(self, member: _Member) -> None:
        """A peer that does not answer may have moved: its name, if it has one, is asked for again."""
        key = member.peer.public_key
        if member.given is None or key in self._resolving or self._closed or member.peer.removed:
            return
        host, port = split_endpoint(member.given)
        if _is_literal(host):
            return
        self._resolving.add(key)

        def work() -> None:
            try:
                found = resolve(host, port)[0]
            except FasttunError as error:
                log.debug("%s", error)
                return
            finally:
                self._resolving.discard(key)
            with self.guard:
                if not self._closed and self._members.get(key) is member and found != member.peer.endpoint:
                    log.info("peer %r: %s is now %s", key, member.given, found)
                    self._set_endpoint(member, found)

        threading.Thread(target=work, name="fasttun-resolve", daemon=True).start()

    # ------------------------------------------------------------------------------ configuration

    @property
    def private_key(self) -> PrivateKey | None:
        """A copy of the device's key; None without one."""
        with self.guard:
            return copy.copy(self._protocol.private_key) if self._protocol.private_key is not None else None

    def set_private_key(self, private_key: PrivateKey | None) -> None:
        """Become another: all sessions end, and a peer with the new key's public key is removed."""
        with self.guard:
            outputs = self._protocol.set_private_key(copy.copy(private_key) if private_key is not None else None)
            self._table.set_mac1_key(self._protocol.mac1_key)
            self._carry_out(outputs)
            for member in [member for key, member in self._members.items() if key not in self._protocol.peers]:
                self._forget(member)

    def add_peer(self, config: PeerConfig, endpoint: Endpoint | None) -> None:
        """A new peer, at `endpoint` if that is known. ConfigurationError when it is there or is this device."""
        _refuse_mapped(config.allowed_ips)
        with self.guard:
            secret = copy.copy(config.preshared_key) if config.preshared_key else None
            peer = self._protocol.add_peer(config.public_key, preshared_key=secret)
            try:
                number = self._table.add_peer()
            except BaseException:
                self._protocol.remove_peer(peer)
                raise
            member = _Member(peer, number, config.name, config.endpoint)
            self._members[config.public_key] = self._by_number[number] = member
            for network in config.allowed_ips:
                self._allow(member, network)
            if endpoint is not None:
                self._set_endpoint(member, endpoint)
            if config.persistent_keepalive:
                self._set_keepalive(member, config.persistent_keepalive)

    def remove_peer(self, public_key: PublicKey) -> None:
        """Forget the peer, its sessions and its allowed IPs. Nothing when it is not there."""
        with self.guard:
            member = self._members.get(public_key)
            if member is not None:
                self._carry_out(self._protocol.remove_peer(member.peer))
                self._forget(member)

    def update_peer(
        self, public_key: PublicKey, *, preshared_key: PresharedKey | Keep | None, endpoint: Endpoint | Keep,
        name: str | None, persistent_keepalive: int | Keep, allowed_ips: Iterable[Network], replace_allowed_ips: bool,
        remove_allowed_ips: Iterable[Network],
    ) -> None:
        """As `WireGuard.update_peer`."""
        allowed_ips = tuple(allowed_ips)
        _refuse_mapped(allowed_ips)
        with self.guard:
            member = self._members[public_key]
            if not isinstance(preshared_key, Keep):
                secret = copy.copy(preshared_key) if preshared_key is not None else None
                self._protocol.set_preshared_key(member.peer, secret)
            if not isinstance(endpoint, Keep):
                member.given = name or str(endpoint)
                self._set_endpoint(member, endpoint)
            gone = list(member.allowed_ips) if replace_allowed_ips else list(remove_allowed_ips)
            for network in gone:
                self._disallow(member, network)
            for network in allowed_ips:
                self._allow(member, network)
            if not isinstance(persistent_keepalive, Keep):
                self._set_keepalive(member, persistent_keepalive)

    def _set_endpoint(self, member: _Member, endpoint: Endpoint) -> None:
        self._protocol.set_endpoint(member.peer, endpoint)
        self._table.set_endpoint(member.number, (endpoint.host, endpoint.port, endpoint.scope_id))

    def _set_keepalive(self, member: _Member, interval_s: int) -> None:
        self._carry_out(self._protocol.set_persistent_keepalive(
            member.peer, interval_s, time.monotonic(), time.time()))

    def _allow(self, member: _Member, network: Network) -> None:
        owner = self._owners.get(network)
        if owner is not None:
            owner.allowed_ips.pop(network, None)
        self._owners[network] = member
        member.allowed_ips[network] = None
        self._table.allow(member.number, network)

    def _disallow(self, member: _Member, network: Network) -> None:
        if self._owners.get(network) is member:
            del self._owners[network]
            del member.allowed_ips[network]
            self._table.disallow(member.number, network)

    def _forget(self, member: _Member) -> None:
        """Takes a peer that the protocol has already removed out of everything else."""
        del self._members[member.peer.public_key]
        del self._by_number[member.number]
        for network in member.allowed_ips:
            del self._owners[network]
        self._table.remove_peer(member.number)

    # --------------------------------------------------------------------------------- snapshots

    def endpoints(self) -> list[Endpoint]:
        """Where the peers are, as far as that is known."""
        with self.guard:
            return [member.peer.endpoint for member in self._members.values() if member.peer.endpoint is not None]

    def public_keys(self) -> list[PublicKey]:
        """Of all peers."""
        with self.guard:
            return list(self._members)

    def peers(self) -> tuple[WireGuardPeer, ...]:
        """All peers as they are now."""
        with self.guard:
            return tuple(self._snapshot(member) for member in self._members.values())

    def peer_configs(self) -> tuple[PeerConfig, ...]:
        """All peers as a configuration file would have them."""
        with self.guard:
            return tuple(_configuration(member) for member in self._members.values())

    def _snapshot(self, member: _Member) -> WireGuardPeer:
        peer = member.peer
        counted = self._table.peer_counters(member.number)
        at = counted["endpoint"]
        return WireGuardPeer(
            public_key=peer.public_key,
            preshared_key=copy.copy(peer.preshared_key) if peer.preshared_key else None,
            endpoint=Endpoint(*at) if at is not None else peer.endpoint,
            allowed_ips=tuple(member.allowed_ips),
            last_handshake=peer.last_handshake_wall,
            rx_bytes=counted["rx_bytes"] + peer.handshake_rx_bytes,
            tx_bytes=counted["tx_bytes"] + peer.handshake_tx_bytes,
            rx_packets=counted["rx_packets"], tx_packets=counted["tx_packets"],
            persistent_keepalive=int(peer.timers.persistent_keepalive), queued=counted["queued"],
            rx_expected=counted["rx_expected"], round_trip_s=member.round_trip_s,
            loss=member.losses.loss(time.monotonic(), counted["rx_expected"], counted["rx_packets"]))


def _configuration(member: _Member) -> PeerConfig:
    peer = member.peer
    return PeerConfig(
        public_key=peer.public_key,
        preshared_key=copy.copy(peer.preshared_key) if peer.preshared_key else None,
        allowed_ips=tuple(member.allowed_ips), name=member.name,
        endpoint=str(peer.endpoint) if peer.endpoint is not None else member.given,
        persistent_keepalive=int(peer.timers.persistent_keepalive))


def look_up(peer: PeerConfig) -> Endpoint | None:
    """Where the peer's `endpoint` is now; None without one. EndpointError for a name that is not found."""
    return resolve(*split_endpoint(peer.endpoint))[0] if peer.endpoint is not None else None


def split_endpoint(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". ConfigurationError otherwise."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ConfigurationError(
            "Endpoint", f"{text!r} is not HOST:PORT", "as in 198.51.100.7:51820 or [2001:db8::1]:51820")
    return host.strip("[]"), int(port)


def _refuse_mapped(networks: Iterable[Network]) -> None:
    """ConfigurationError for a network below ::ffff:0:0/96: in the engine that is IPv4's."""
    for network in networks:
        if network.version == 6 and network.subnet_of(_V4_MAPPED):
            raise ConfigurationError("allowed_ips", f"{network} is v4-mapped, and on no wire", "give the IPv4 network")


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
