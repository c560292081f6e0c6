"""WireGuard: a running device, as an object: the sans-IO `Interface` joined to the engine and its socket.

The engine seals and opens data; one control thread takes its news and the handshake messages, asks `Interface`
what follows, and carries that out. Configuration changes come in from any thread, under one lock.
Not for: routes, DNS and hooks (`quick`), the control socket (`uapi`), the file format (`config`).
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import ipaddress
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, Final, cast

from .. import offload
from .._core import NEWS_FLAGS, Engine, SessionTable
from ..device import TunDevice
from ..endpoint import Endpoint, open_udp, resolve, tell_local_address
from ..errors import ConfigurationError, DeviceError, EndpointError, FasttunError, StateError
from ..lifecycle import Tunnel
from ..stats import DirectionStats, Stats, WireGuardPeer
from .config import Config, PeerConfig
from .interface import Interface
from .keys import PresharedKey, PrivateKey, PublicKey
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

__all__ = ["DEFAULT_MTU", "KEEP", "WireGuard"]

log = logging.getLogger("fasttun")

DEFAULT_MTU = 1420
"""1500 less an IPv6 and a UDP header, and WireGuard's own 32 bytes; as every other implementation."""
LARGEST_MTU = 9000
"""What buffers are made for: the device's MTU may be changed while it runs."""
BURST_PACKETS = 64
NEWS_EVERY_S = 0.2
"""How often the engine's news about data is looked at while there is some; the timers need no better."""
MTU_EVERY_S = 1.0
MESSAGES_A_TURN = 64
_SENT, _SENT_LAST, _RECEIVED, _HEARD, _WAITING = (
    NEWS_FLAGS[name] for name in ("sent", "sent_last", "received", "heard", "waiting"))
_SO_MARK = 36
_IP_PKTINFO = 8
_IPV6_PKTINFO = 50
_TUNGETIFF = 0x800454D2
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_VNET_HDR = 0x4000

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class _Keep(Enum):
    KEEP = 0


KEEP: Final = _Keep.KEEP
"""For `update_peer`: leave it as it is."""


class _Member:
    """What the host knows of a peer beyond the protocol: its number in the engine, its networks, its name."""

    __slots__ = ("allowed_ips", "given", "name", "number", "peer")

    def __init__(self, peer: Peer, number: int, name: str | None, given: str | None) -> None:
        self.peer = peer
        self.number = number
        self.name = name
        self.given = given
        """The endpoint as it was configured: a name is looked up again when the peer does not answer."""
        self.allowed_ips: dict[Network, None] = {}


class WireGuard(Tunnel):
    """A WireGuard device. Usable from any thread; starts once, stops for good.

    config: keys, port, addresses and peers; None for a device that is configured while it runs. name: of the TUN
    device; tun_fd: use this descriptor of one instead. mtu: bytes, before the configuration's own; 1420 else.
    configure: give the device its addresses and `routes` and take it up; without, only its MTU is set.
    tun_offload, udp_gso, udp_gro, busy_poll_us, before_threads: as for `Forwarder`. on_handshake(WireGuardPeer):
    called from a thread of the tunnel when a session is confirmed; it must not block.
    `start()` raises `DeviceError`, `EndpointError` and `ConfigurationError`. It sets no DNS, and no routes but those.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        name: str = "wg0",
        tun_fd: int | None = None,
        mtu: int | None = None,
        tun_offload: bool = True,
        udp_gso: bool = True,
        udp_gro: bool = True,
        busy_poll_us: int = 0,
        configure: bool = True,
        routes: Iterable[Network] = (),
        on_handshake: Callable[[WireGuardPeer], object] | None = None,
        before_threads: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(before_threads)
        self._config = config if config is not None else Config(private_key=None)
        self.name = name
        self.mtu = mtu or self._config.mtu or DEFAULT_MTU
        """Bytes of the largest inner packet."""
        self._tun_fd = tun_fd
        self._switches = (tun_offload, udp_gso, udp_gro)
        self._busy_poll_us = busy_poll_us
        self._configure = configure
        self._routes = tuple(routes) if configure else ()
        self._on_handshake = on_handshake
        self._guard = threading.RLock()
        self._protocol = Interface()
        self._members: dict[PublicKey, _Member] = {}
        self._by_number: dict[int, _Member] = {}
        self._owners: dict[Network, _Member] = {}
        self._table: SessionTable | None = None
        self._fwmark = self._config.fwmark
        self._control_drops: Counter[str] = Counter()
        self._news: list[WireGuardPeer] = []
        self._resolving: set[PublicKey] = set()
        self._mtu_at = 0.0

    # ------------------------------------------------------------------------------------ set-up

    def _set_up(self) -> None:
        sock = self._open_socket(self._config.listen_port or 0)
        self._undo.callback(sock.close)
        self._sockets.append(sock)
        tun_fd, vnet_header, join_udp = self._open_device()
        largest = max(self.mtu, LARGEST_MTU)
        self._table = SessionTable(family=int(sock.family), mtu=largest)
        self._table.set_mtu(self.mtu)
        tun_offload, udp_gso, udp_gro = self._switches
        self._offloads |= offload.enable_udp(sock, gso=udp_gso, gro=udp_gro)
        self._offloads["tun"] = offload.ON if vnet_header else \
            offload.ASKED_OFF if not tun_offload else \
            f"off: {offload.distrust('tun') or 'the device has no vnet header'}"
        self._engines.append(Engine(
            self._table, tun_fd=tun_fd, udp_fd=sock.fileno(), mtu=largest, burst_packets=BURST_PACKETS,
            busy_poll_us=self._busy_poll_us, sticky=True, name=self.name, vnet_header=vnet_header,
            join_udp=join_udp, udp_gso=self._offloads["udp-gso"] == offload.ON,
            udp_gro=self._offloads["udp-gro"] == offload.ON))
        if self._config.private_key is not None:
            self._set_private_key(self._config.private_key)
        for peer in self._config.peers:
            self._add_peer(peer)
        self._pin_endpoints()
        self._start_threads()

    def _pin_endpoints(self) -> None:
        """Keeps the ways to the peers out of the tunnel where a route of ours covers them."""
        for member in self._members.values():
            at = member.peer.endpoint
            if self.device is not None and at is not None and any(at.host in route for route in self._routes):
                self.device.pin_route(at.host)

    def _open_socket(self, port: int) -> socket.socket:
        sock = open_udp(bind=None, port=port, family=socket.AF_UNSPEC)
        try:
            tell_local_address(sock)
            if self._fwmark:
                _mark(sock, self._fwmark)
        except BaseException:
            sock.close()
            raise
        return sock

    def _open_device(self) -> tuple[int, bool, bool]:
        """The TUN descriptor, whether it has a vnet header, and whether it takes joined UDP."""
        wanted = self._switches[0] and offload.distrust("tun") is None
        if self._tun_fd is not None:
            return self._borrow_device(self._tun_fd)
        device = TunDevice.open(self.name, vnet_header=wanted)
        self._undo.callback(device.close)
        self.device = device
        self.name = device.name
        addresses = self._config.address if self._configure else ()
        device.configure(addresses=addresses, routes=self._routes, mtu=self.mtu, up=self._configure)
        return device.fds[0], device.vnet_header, "uso" in device.offloads

    def _borrow_device(self, tun_fd: int) -> tuple[int, bool, bool]:
        """The caller's descriptor, by one of our own. DeviceError when there is none."""
        try:
            fd = os.dup(tun_fd)
        except OSError as error:
            raise DeviceError("use", f"tun_fd {tun_fd}", error.errno or 0) from error
        self._undo.callback(os.close, fd)
        os.set_blocking(fd, False)
        try:
            name, flags = struct.unpack("16sH22x", fcntl.ioctl(fd, _TUNGETIFF, bytes(40)))
        except OSError:  # a socket stands in for the device
            return fd, False, False
        self.name = name.partition(b"\0")[0].decode()
        if flags & _IFF_VNET_HDR:
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", 10))
        return fd, bool(flags & _IFF_VNET_HDR), False

    def _let_go(self) -> None:
        with self._guard:
            self._table = None
            self._protocol.set_private_key(None)
            for member in self._members.values():
                member.peer.wipe()

    # ----------------------------------------------------------------------------- control thread

    def _watch(self) -> None:
        table = self._table
        assert table is not None
        poll = select.poll()
        poll.register(table.notify_fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        busy = False
        while self._state in ("starting", "running") and not self._ended.is_set():
            poll.poll(self._patience_ms(busy))
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            busy = self._turn(table)
            self._tell_handshakes()

    def _patience_ms(self, busy: bool) -> int:
        """How long the control thread may sleep, in milliseconds; -1 for as long as nothing happens."""
        with self._guard:
            deadline = self._protocol.next_deadline()
        waits = [NEWS_EVERY_S] if busy else []
        if deadline is not None:
            waits.append(max(0.0, deadline - time.monotonic()))
        return math.ceil(min(waits) * 1000) if waits else -1

    def _turn(self, table: SessionTable) -> bool:
        """Takes in what the engine has, and does what is due; whether there was news about data."""
        any_news = False
        backlog = 1
        while backlog:
            messages, news, backlog, lost = table.take(MESSAGES_A_TURN)
            if lost is not None:
                self._offload_lost(*lost)
            waiting = backlog + len(messages)
            for datagram, source, local in messages:
                waiting -= 1
                with self._guard:
                    outputs = self._protocol.consume(
                        datagram, Endpoint(*source), time.monotonic(), time.time(), backlog=waiting)
                    self._carry_out(outputs, Endpoint(*source), local)
            for item in news:
                any_news = True
                with self._guard:
                    self._take_news(*item)
            with self._guard:
                self._carry_out(self._protocol.tick(time.monotonic(), time.time()))
        if any_news:
            self._follow_mtu(table)
        return any_news

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
        table = self._table
        if table is None:
            return
        for output in outputs:
            if isinstance(output, Drop):
                self._control_drops[output.reason] += 1
                continue
            if isinstance(output, RemoveKeypair):
                table.remove_keypair(output.keypair.local_index)
                continue
            member = self._members.get(output.peer.public_key) if output.peer is not None else None
            if isinstance(output, Send):
                if output.endpoint != source and member is not None:
                    local = table.peer_counters(member.number)["local"]
                self._send(output.datagram, output.endpoint, local)
            elif member is not None:
                self._carry_out_for(member, output, table, local)

    def _carry_out_for(self, member: _Member, output: Output, table: SessionTable, local: Address | None) -> None:
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
            if self._on_handshake is not None:
                self._news.append(self._snapshot(member, table))

    def _send(self, datagram: bytes, to: Endpoint, local: Address | None) -> None:
        """A handshake message, from the address that the peer knows; lost when the network does not take it."""
        sock = self._sockets[0]
        try:
            address = to.sockaddr(sock.family)
        except EndpointError:
            self._control_drops["unreachable"] += 1
            return
        for control in ([_source(sock.family, local)] if local is not None else []), []:
            try:
                sock.sendmsg([datagram], control, socket.MSG_DONTWAIT, address)
                return
            except OSError as error:  # `local` may be gone: then once more without
                reason = error
        self._control_drops["send-failed"] += 1
        log.debug("handshake message to %s: %s", to, reason)

    def _offload_lost(self, name: str, code: int) -> None:
        self._offloads[name] = f"off: given up at run time ({os.strerror(code)})"
        log.warning("offload %s is %s; packets go on one by one", name, self._offloads[name])

    def _follow_mtu(self, table: SessionTable) -> None:
        """The device's MTU may be changed by others; padding must not go beyond it."""
        now = time.monotonic()
        if self.device is None or now < self._mtu_at:
            return
        self._mtu_at = now + MTU_EVERY_S
        with contextlib.suppress(FasttunError):
            mtu = self.device.mtu()
            if mtu != self.mtu:
                self.mtu = mtu
                table.set_mtu(mtu)

    def _tell_handshakes(self) -> None:
        with self._guard:
            told, self._news = self._news, []
        for peer in told:
            try:
                assert self._on_handshake is not None
                self._on_handshake(peer)
            except Exception:
                log.exception("on_handshake raised")

    def _look_up_again(self, member: _Member) -> None:
        """A peer that does not answer may have moved: its name, if it has one, is asked for again, aside."""
        key = member.peer.public_key
        if member.given is None or key in self._resolving or self._state != "running":
            return
        host, port = _split_endpoint(member.given)
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
            with self._guard:
                if self._members.get(key) is member and self._table is not None and found != member.peer.endpoint:
                    log.info("peer %r: %s is now %s", key, member.given, found)
                    self._set_endpoint(member, found)

        threading.Thread(target=work, name="fasttun-resolve", daemon=True).start()

    def resolve_again(self) -> None:
        """Has the names of all peers looked up again, soon and aside."""
        with self._guard:
            for member in self._members.values():
                self._look_up_again(member)

    # -------------------------------------------------------------------------- live configuration

    @property
    def private_key(self) -> PrivateKey | None:
        """A copy of the device's key; None without one."""
        with self._guard:
            key = self._protocol.private_key if self._table is not None else self._config.private_key
            return copy.copy(key) if key is not None else None

    def set_private_key(self, private_key: PrivateKey | None) -> None:
        """Become another: all sessions end, and a peer with the new key's public key is removed."""
        with self._running():
            self._set_private_key(private_key)

    def _set_private_key(self, private_key: PrivateKey | None) -> None:
        assert self._table is not None
        key = copy.copy(private_key) if private_key is not None else None
        outputs = self._protocol.set_private_key(key)
        self._table.set_mac1_key(self._protocol.mac1_key)
        self._carry_out(outputs)
        for public_key in [key for key in self._members if key not in self._protocol.peers]:
            self._forget(self._members[public_key])

    @property
    def listen_port(self) -> int:
        """The UDP port; before `start()` the configured one, 0 for any."""
        return self.local_port or self._config.listen_port or 0

    def set_listen_port(self, port: int) -> None:
        """Listen on another port (0: any) from now on; sessions go on. EndpointError leaves all as it was."""
        if not 0 <= port <= 65535:
            raise ConfigurationError("listen_port", f"{port} is out of range", "use 0 to 65535")
        with self._running() as table:
            old = self._sockets[0]
            if port == self.local_port:
                return
            new = self._open_socket(port)
            try:
                if new.family != old.family:
                    raise EndpointError("bind", f"port {port}", 0, reason="IPv6 has come or gone since the start")
                offload.enable_udp(new, gso=self._switches[1], gro=self._offloads["udp-gro"] == offload.ON)
                # The engine's descriptor keeps its number: its next call finds the new socket behind it.
                os.dup2(new.fileno(), old.fileno(), inheritable=False)
            finally:
                new.close()
            table.wake()
            # Peers learn the port from the next authentic packet: give them one.
            for member in self._members.values():
                if member.peer.keypairs.current is not None:
                    table.keepalive(member.number)

    @property
    def fwmark(self) -> int:
        """The mark of outgoing datagrams (SO_MARK); 0 for none."""
        return self._fwmark

    def set_fwmark(self, fwmark: int) -> None:
        """Mark outgoing datagrams from now on; 0 for not. EndpointError (EPERM) without CAP_NET_ADMIN."""
        if not 0 <= fwmark <= 0xFFFFFFFF:
            raise ConfigurationError("fwmark", f"{fwmark} is out of range", "use 32 bits")
        with self._running():
            _mark(self._sockets[0], fwmark)
            self._fwmark = fwmark

    @property
    def peers(self) -> tuple[WireGuardPeer, ...]:
        """All peers as they are now; after `stop()` as they were last."""
        final = self._final
        if final is not None:
            return cast("tuple[WireGuardPeer, ...]", final.peers)
        with self._guard:
            table = self._table
            if table is None:
                return ()
            return tuple(self._snapshot(member, table) for member in self._members.values())

    def add_peer(self, config: PeerConfig) -> None:
        """A new peer, live. ConfigurationError when it is there or is this device; EndpointError for its name."""
        with self._running():
            self._add_peer(config)

    def _add_peer(self, config: PeerConfig) -> None:
        assert self._table is not None
        endpoint = _resolve_endpoint(config.endpoint) if config.endpoint is not None else None
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
        with self._running():
            member = self._members.get(public_key)
            if member is not None:
                self._carry_out(self._protocol.remove_peer(member.peer))
                self._forget(member)

    def replace_peers(self) -> None:
        """Forget all peers."""
        with self._running():
            for public_key in list(self._members):
                self.remove_peer(public_key)

    def update_peer(
        self,
        public_key: PublicKey,
        *,
        preshared_key: PresharedKey | _Keep | None = KEEP,
        endpoint: Endpoint | _Keep = KEEP,
        persistent_keepalive: int | _Keep = KEEP,
        allowed_ips: Iterable[Network] = (),
        replace_allowed_ips: bool = False,
        remove_allowed_ips: Iterable[Network] = (),
    ) -> None:
        """Change what is given. allowed_ips are added, and taken from whoever had them. KeyError for no such peer.

        A new preshared key counts from the next handshake message on; a new endpoint from the next packet on.
        """
        with self._running():
            member = self._members[public_key]
            if not isinstance(preshared_key, _Keep):
                self._protocol.set_preshared_key(
                    member.peer, copy.copy(preshared_key) if preshared_key is not None else None)
            if not isinstance(endpoint, _Keep):
                member.given = str(endpoint)
                self._set_endpoint(member, endpoint)
            if replace_allowed_ips:
                for network in list(member.allowed_ips):
                    self._disallow(member, network)
            for network in remove_allowed_ips:
                self._disallow(member, network)
            for network in allowed_ips:
                self._allow(member, network)
            if not isinstance(persistent_keepalive, _Keep):
                self._set_keepalive(member, persistent_keepalive)

    def config(self) -> Config:
        """The configuration as it runs now; what only the file knows (addresses, DNS, hooks) as it was given."""
        with self._guard:
            if self._table is None:
                return self._config
            return replace(
                self._config, private_key=self.private_key, listen_port=self.listen_port or None,
                fwmark=self._fwmark, peers=tuple(self._peer_config(member) for member in self._members.values()))

    def _peer_config(self, member: _Member) -> PeerConfig:
        peer = member.peer
        return PeerConfig(
            public_key=peer.public_key,
            preshared_key=copy.copy(peer.preshared_key) if peer.preshared_key else None,
            allowed_ips=tuple(member.allowed_ips), name=member.name,
            endpoint=str(peer.endpoint) if peer.endpoint is not None else member.given,
            persistent_keepalive=int(peer.timers.persistent_keepalive))

    @contextlib.contextmanager
    def _running(self) -> Iterator[SessionTable]:
        """The lock, and the engine's table. StateError when the tunnel does not run."""
        with self._guard:
            if self._table is None:
                raise StateError("the tunnel does not run")
            yield self._table
        self._wake_watcher()

    def _set_endpoint(self, member: _Member, endpoint: Endpoint) -> None:
        assert self._table is not None
        self._protocol.set_endpoint(member.peer, endpoint)
        self._table.set_endpoint(member.number, (endpoint.host, endpoint.port, endpoint.scope_id))

    def _set_keepalive(self, member: _Member, interval_s: int) -> None:
        self._carry_out(self._protocol.set_persistent_keepalive(
            member.peer, interval_s, time.monotonic(), time.time()))

    def _allow(self, member: _Member, network: Network) -> None:
        assert self._table is not None
        owner = self._owners.get(network)
        if owner is not None:
            owner.allowed_ips.pop(network, None)
        self._owners[network] = member
        member.allowed_ips[network] = None
        self._table.allow(member.number, network)

    def _disallow(self, member: _Member, network: Network) -> None:
        assert self._table is not None
        if self._owners.get(network) is member:
            del self._owners[network]
            del member.allowed_ips[network]
            self._table.disallow(member.number, network)

    def _forget(self, member: _Member) -> None:
        """Takes a peer that the protocol has already removed out of everything else."""
        assert self._table is not None
        del self._members[member.peer.public_key]
        del self._by_number[member.number]
        for network in member.allowed_ips:
            del self._owners[network]
        self._table.remove_peer(member.number)

    # --------------------------------------------------------------------------------- what it is

    def _snapshot(self, member: _Member, table: SessionTable) -> WireGuardPeer:
        peer = member.peer
        counted = table.peer_counters(member.number)
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
            persistent_keepalive=int(peer.timers.persistent_keepalive), queued=counted["queued"])

    def stats(self) -> Stats:
        """A snapshot of all counters; after `stop()` the last one."""
        engines, table, final = self._engines, self._table, self._final
        if final is not None:
            return final
        counters = engines[0].counters() if engines else None
        drops = Counter(self._control_drops)
        if counters is not None and counters["bad_mac1"]:
            drops["bad-mac1"] += counters["bad_mac1"]
        return Stats(
            uptime_s=time.monotonic() - self._started_at if self._started_at else 0.0,
            outbound=_direction(counters, "outbound"),
            inbound=_direction(counters, "inbound"),
            peers=self.peers,
            system_calls=dict(counters["calls"]) if counters else {},
            errors=dict(counters["errors"]) if counters else {},
            offloads=dict(self._offloads),
            events_lost=table.messages_lost if table is not None else 0,
            control_drops=dict(drops),
        )


def _direction(counters: dict[str, Any] | None, name: str) -> DirectionStats:
    return DirectionStats(**counters[name]) if counters else DirectionStats(0, 0, 0, 0)


def _mark(sock: socket.socket, fwmark: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, fwmark & 0xFFFFFFFF)
    except PermissionError as error:
        raise EndpointError("mark", f"the socket with {fwmark:#x}", error.errno or 1, "needs CAP_NET_ADMIN") from error


def _source(family: int, local: Address) -> tuple[int, int, bytes]:
    """The control message that makes a datagram leave from `local`."""
    if family == socket.AF_INET:
        return socket.IPPROTO_IP, _IP_PKTINFO, bytes(4) + local.packed + bytes(4)
    packed = local.packed if local.version == 6 else b"\0" * 10 + b"\xff\xff" + local.packed
    return socket.IPPROTO_IPV6, _IPV6_PKTINFO, packed + bytes(4)


def _split_endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ConfigurationError(
            "Endpoint", f"{text!r} is not HOST:PORT", "as in 198.51.100.7:51820 or [2001:db8::1]:51820")
    return host.strip("[]"), int(port)


def _resolve_endpoint(text: str) -> Endpoint:
    return resolve(*_split_endpoint(text))[0]


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
