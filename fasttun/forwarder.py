"""Forwarder: a running tunnel of the plain mode, as an object. Opens what the configuration names.

start() takes: socket, device, peer table, workers, watcher; whatever fails half-way is undone in reverse.
Not for: the loop (fasttun/_core.pyx), the device (fasttun/device.py), when to greet (plain/greeting.py).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import math
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from . import offload
from ._core import OFFLOAD_NAMES, Engine, PeerTable
from .config import DEFAULT_DEVICE, DEFAULT_PORT, Interface, Network, TunnelConfig
from .endpoint import Endpoint, open_udp, resolve, source_control, tell_local_address
from .errors import ConfigurationError, DeviceError, EndpointError, FasttunError, StateError
from .lifecycle import Tunnel
from .mtu import inner_mtu, path_mtu
from .plain.greeting import Greeter, binding_request
from .stats import DirectionStats, PeerStats, Stats

if TYPE_CHECKING:

    from .device import TunDevice
    from .fastpath import FastPath

__all__ = ["Forwarder"]

log = logging.getLogger("fasttun")

BURST_PACKETS = 64
ETHERNET_MTU = 1500
EXPIRE_EVERY_S = 15.0
FAST_PATH_EVERY_S = 1.0
FAST_PATH_PAUSE_S = 0.05
"""Between two looks at the peers for the fast path, however much is new."""
FAST_PATH_ASK_EVERY_S = 5.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Addresses = str | Interface | Iterable[str | Interface]
Networks = str | Network | Iterable[str | Network]


class Forwarder(Tunnel):
    """A tunnel between a TUN device and a UDP socket. Usable from any thread; starts once, stops for good.

    Keywords as `TunnelConfig`. `on_peer(PeerStats)`: called from a thread of the tunnel when a peer is
    heard first or has moved; it must not block. `before_threads()`: called once all is open, before the
    first thread, for dropping privileges.
    Raises `ConfigurationError` here; `start()` raises `DeviceError` and `EndpointError`.
    """

    mode = "plain"
    tap: Callable[[int, bytes, Endpoint, Address | None], object] | None = None
    """Called with each greeting sent and when (ns since 1970), while somebody captures; must not block."""

    def __init__(
        self,
        *,
        listen: bool = False,
        server: str | None = None,
        port: int = DEFAULT_PORT,
        device: str = DEFAULT_DEVICE,
        address: Addresses = (),
        route: Networks = (),
        mtu: int | str | None = None,
        framing: str = "auto",
        bind: str | None = None,
        allow: Networks = (),
        workers: int = 1,
        tun_fd: int | None = None,
        udp_fd: int | None = None,
        tun_offload: bool = True,
        udp_gso: bool = True,
        udp_gro: bool = True,
        batch: bool = True,
        busy_poll_us: int = 0,
        fast_path: bool = False,
        on_peer: Callable[[PeerStats], object] | None = None,
        before_threads: Callable[[], object] | None = None,
    ) -> None:
        fields: dict[str, Any] = {
            "listen": listen, "server": server, "port": port, "device": device, "address": address,
            "route": route, "mtu": mtu, "framing": framing, "bind": bind, "allow": allow, "workers": workers,
            "tun_fd": tun_fd, "udp_fd": udp_fd, "tun_offload": tun_offload, "udp_gso": udp_gso,
            "udp_gro": udp_gro, "batch": batch, "busy_poll_us": busy_poll_us,
            "fast_path": fast_path,
        }
        self._prepare(TunnelConfig(**fields), on_peer, before_threads)

    @classmethod
    def from_config(
        cls,
        config: TunnelConfig,
        *,
        on_peer: Callable[[PeerStats], object] | None = None,
        before_threads: Callable[[], object] | None = None,
    ) -> Forwarder:
        """A tunnel from a configuration that is already validated."""
        self = cls.__new__(cls)
        self._prepare(config, on_peer, before_threads)
        return self

    def _prepare(self, config: TunnelConfig, on_peer: Callable[[PeerStats], object] | None,
                 before_threads: Callable[[], object] | None) -> None:
        super().__init__(before_threads)
        self.config = config
        self.mtu = config.mtu or 0
        """Bytes of the largest inner packet; 0 before `start()` when it is derived from the path."""
        self._on_peer = on_peer
        self._resolve_asked = False
        self._resolvable = False
        self._table: PeerTable | None = None
        self._greeter: Greeter | None = None
        self._fast_path: FastPath | None = None
        self._ask_at = self._sync_at = 0.0
        self._synced_at = -FAST_PATH_EVERY_S
        self._fixed = False
        self._pinned: set[object] = set()

    # ------------------------------------------------------------------------------------ set-up

    def _set_up(self) -> None:
        config = self.config
        servers = resolve(config.server, config.port) if config.server is not None else []
        connected = self._open_sockets(servers)
        self._fixed = connected or not config.listen
        family = self._sockets[0].family
        if connected:
            servers = _connected_peer(self._sockets[0])
        elif servers:
            servers = self._reachable(servers)
        if not self.mtu:
            self.mtu = self._derive_mtu(servers, family)
        tun_fds = self._open_device(servers)
        own = self._own_addresses()
        self._table = PeerTable(
            family=int(family), fixed=self._fixed, framing=config.framing,
            allow=config.allow, own=own, unfinished=config.fast_path)
        if servers:
            first = servers[0]
            self._table.set_server(first.host, first.port, first.scope_id)
            self._resolvable = not connected and not _is_literal(config.server)
            self._greeter = Greeter(servers, time.monotonic(), resolvable=self._resolvable)
        elif connected:
            self._table.set_server(ipaddress.IPv6Address(0), 0)
        for tun_fd, sock in zip(tun_fds, self._sockets, strict=True):
            self._offloads = offload.enable_udp(
                sock, gso=config.udp_gso and config.batch, gro=config.udp_gro and config.batch)
            if config.udp_fd is not None and self._offloads["udp-gro"] == offload.ON:
                self._undo.callback(offload.disable_gro, sock)
            self._engines.append(Engine(
                self._table, tun_fd=tun_fd, udp_fd=sock.fileno(), mtu=self.mtu, connected=connected,
                burst_packets=BURST_PACKETS if config.batch else 1, busy_poll_us=config.busy_poll_us,
                sticky=self._sticky(sock), unfinished=config.fast_path,
                name=self.device.name if self.device else "descriptor",
                vnet_header=self.device is not None and self.device.vnet_header,
                join_udp=self.device is not None and "uso" in self.device.offloads,
                udp_gso=self._offloads["udp-gso"] == offload.ON,
                udp_gro=self._offloads["udp-gro"] == offload.ON))
        self._offloads["tun"] = self._tun_offload()
        self._offloads["batch"] = offload.ON if config.batch else offload.ASKED_OFF
        if config.fast_path:
            self._offloads["fast-path"] = self._open_fast_path(servers)
        self._start_threads()

    def _open_fast_path(self, servers: list[Endpoint]) -> str:
        """"on", or why it is off; the tunnel goes on without."""
        from .fastpath import FastPath

        assert self.device is not None
        assert self._table is not None
        bound = self.config.bind
        try:
            fast_path = FastPath(
                self._table, tun=socket.if_nametoindex(self.device.name), mtu=self.device.mtu(),
                port=self._sockets[0].getsockname()[1], bound=ipaddress.ip_address(bound) if bound else None,
                own=self._own_addresses(), fixed=self._fixed)
        except DeviceError as error:
            log.warning("no fast path: %s", error)
            return f"off: {error}"
        self._undo.callback(fast_path.close)
        fast_path.attach_ahead(server.host for server in servers)
        self._fast_path = fast_path
        return offload.ON

    def _open_sockets(self, servers: list[Endpoint]) -> bool:
        """Fills `self._sockets`, one a worker; whether they are connected to the only peer."""
        config = self.config
        if config.udp_fd is not None:
            sock = self._keep(_borrow_socket(config.udp_fd))
            self._sockets.append(sock)
            try:
                sock.getpeername()
            except OSError:
                if not config.listen and not servers:
                    raise ConfigurationError(
                        "udp_fd", "is not connected, and neither listen nor server is given",
                        "connect it to the peer, or say listen=True or server=HOST") from None
                return False
            return True
        port = config.port if config.listen else 0
        only_v4 = config.bind is None and servers and all(server.host.version == 4 for server in servers)
        family = socket.AF_INET if only_v4 else socket.AF_UNSPEC
        for _ in range(config.workers):
            sock = self._keep(open_udp(bind=config.bind, port=port, family=family,
                                       reuse_port=config.workers > 1))
            self._sockets.append(sock)
            port = sock.getsockname()[1]
        return False

    def _reachable(self, servers: list[Endpoint]) -> list[Endpoint]:
        """The addresses that the socket can send to and this host has a route to, in their order."""
        versions = _ip_versions(self._sockets[0])
        error: EndpointError | None = None
        found = []
        for server in servers:
            if server.host.version not in versions:
                continue
            try:
                path_mtu(server.host, server.scope_id)
            except EndpointError as unreachable:
                error = error or unreachable
            else:
                found.append(server)
        if not found:
            if error is not None:
                raise error
            raise ConfigurationError("server", f"{self.config.server!r} has no address of the socket's family",
                                     "bind to an address of the same family as the server's")
        return found

    def _derive_mtu(self, servers: list[Endpoint], family: int) -> int:
        config = self.config
        framing = "pi" if config.framing == "pi" else "raw"
        if servers:
            host = servers[0].host
            return inner_mtu(path_mtu(host, servers[0].scope_id), host.version, framing)
        if config.bind is not None:
            host = ipaddress.ip_address(config.bind.split("%")[0])
            if not host.is_unspecified:
                return inner_mtu(_interface_mtu(host), host.version, framing)
        return inner_mtu(ETHERNET_MTU, 4, framing)

    def _open_device(self, servers: list[Endpoint]) -> tuple[int, ...]:
        config = self.config
        if config.tun_fd is not None:
            try:
                fd = os.dup(config.tun_fd)
            except OSError as error:
                raise DeviceError("use", f"tun_fd {config.tun_fd}", error.errno or errno.EBADF) from error
            self._undo.callback(os.close, fd)
            if os.get_blocking(fd):
                os.set_blocking(fd, False)
                self._undo.callback(_restore_blocking, fd)
            return (fd,)
        from .device import TunDevice

        vnet_header = config.tun_offload and config.batch and offload.distrust("tun") is None
        device = TunDevice.open(config.device, queues=config.workers, vnet_header=vnet_header)
        self._undo.callback(device.close)
        self.device = device
        device.configure(addresses=config.address, routes=config.route, mtu=self._device_mtu(device))
        self.mtu = max(self.mtu, device.mtu())
        for server in servers:
            self._pin(server)
        return device.fds

    def _sticky(self, sock: socket.socket) -> bool:
        """A listener on all addresses answers from the one that was asked."""
        if not self.config.listen or self.config.bind is not None:
            return False
        if self.config.udp_fd is not None:
            self._undo.callback(tell_local_address, sock, False)
        return tell_local_address(sock)

    def _tun_offload(self) -> str:
        if self.device is None:
            return "off: a descriptor is used as it is"
        if self.device.vnet_header:
            return offload.ON
        if not (self.config.tun_offload and self.config.batch):
            return offload.ASKED_OFF
        return f"off: {offload.distrust('tun') or 'the device has no vnet header'}"

    def _device_mtu(self, device: TunDevice) -> int | None:
        """The MTU to set; None leaves an attached device's own, when nothing was asked for."""
        if device.created or self.config.mtu is not None or self.config.address:
            return self.mtu
        return None

    def _pin(self, server: Endpoint) -> None:
        """Keeps the way to the server out of the tunnel when a route of the tunnel covers it."""
        if self.device is None or server.host in self._pinned:
            return
        if any(server.host in network for network in self.config.route):
            self.device.pin_route(server.host)
            self._pinned.add(server.host)

    def _own_addresses(self) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        if self.device is not None:
            return [interface.ip for interface in self.device.addresses()]
        return [interface.ip for interface in self.config.address]

    def _keep(self, sock: socket.socket) -> socket.socket:
        self._undo.callback(sock.close)
        return sock

    def _let_go(self) -> None:
        self._table = None

    # ----------------------------------------------------------------------------- control thread

    def _watch(self) -> None:
        """Takes the workers' events, greets the server, forgets the silent. Sleeps when nothing is due."""
        table = self._table
        assert table is not None
        told_of: Endpoint | None = None
        expire_at = time.monotonic() + EXPIRE_EVERY_S
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(table.notify_fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        fast_path = self._fast_path
        if fast_path is not None:
            poll.register(fast_path, select.POLLIN)
        while self._state in ("starting", "running") and not self._ended.is_set():
            now = time.monotonic()
            wait = max(0.0, expire_at - now) if self.config.listen else 3600.0
            if self._greeter is not None:
                wait = min(wait, self._greet(now))
            if self._resolve_asked:
                self._resolve_asked = False
                self._take_new_addresses()
                continue
            if self._state not in ("starting", "running"):
                return  # the resolver took its time, and what follows is closed
            if self._fixed:
                for server in self.peers:
                    if server.endpoint == told_of:
                        continue
                    if server.silent_s == math.inf:
                        wait = min(wait, 1.0)
                    else:
                        told_of = server.endpoint
                        self._tell_peer(server)
            if fast_path is not None:
                wait = min(wait, max(0.0, self._sync_at - time.monotonic()))
            ready = {fd for fd, _ in poll.poll(math.ceil(wait * 1000))}
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            events = table.events()
            peers_now = {peer.endpoint: peer for peer in self.peers} if events else {}
            for kind, value, address, number in events:
                endpoint = Endpoint(*value)
                self._take_event(kind, endpoint, address, number, peers_now.get(endpoint))
            if self.config.listen and time.monotonic() >= expire_at:
                expire_at = time.monotonic() + EXPIRE_EVERY_S
                forgotten = table.expire()
                if forgotten:
                    log.info("%d silent peer(s) forgotten", forgotten)
            if fast_path is not None:
                now = time.monotonic()
                if any(event[0] in ("peer", "moved") for event in events):
                    self._ask_at = now
                changed = fast_path.fileno() in ready
                if events or changed:
                    self._sync_at = min(self._sync_at, self._synced_at + FAST_PATH_PAUSE_S)
                if not self._keep_fast_path(fast_path, now, changed):
                    poll.unregister(fast_path)
                    fast_path.close()
                    fast_path = None

    def _keep_fast_path(self, fast_path: FastPath, now: float, changed: bool) -> bool:
        """If it is time, brings it in line with the table; asks peers, new ones at once, whether they have one.

        changed: its descriptor is readable. False when the kernel takes no more of it.
        """
        try:
            if changed:
                fast_path.take_changes()  # now, or the descriptor stays readable
            if now < self._sync_at:
                return True
            self._synced_at, self._sync_at = now, now + FAST_PATH_EVERY_S
            fast_path.sync()
            if now >= self._ask_at:
                self._ask_at = now + FAST_PATH_ASK_EVERY_S
                if self._greeter is not None:
                    self._send_greeting(self._greeter.current)
                for endpoint, local, request in fast_path.questions():
                    self._send_from(local, request, Endpoint(*endpoint))
        except OSError as error:
            self._offloads["fast-path"] = f"off: given up at run time ({error.strerror})"
            log.warning("no fast path any more: %s; packets go on through the loop", error.strerror)
            return False
        return True

    def _take_event(self, kind: str, endpoint: Endpoint, address: object, value: int,
                    peer: PeerStats | None) -> None:
        if kind == "greeted":
            log.debug("the server answers; it sees this host as %s", endpoint)
            if self._greeter is not None:
                self._greeter.answered(value / 1e6 if value >= 0 else None)
        elif kind == "offload":
            name = OFFLOAD_NAMES[value >> 16]
            reason = f"off: given up at run time ({os.strerror(value & 0xffff)})"
            if self._offloads.get(name) != reason:
                self._offloads[name] = reason
                log.warning("offload %s is %s; packets go on one by one", name, reason)
        else:
            log.info("peer %s %s %s", address, "is at" if kind == "peer" else "has moved to", endpoint)
            if peer is not None:
                self._tell_peer(peer)

    def _tell_peer(self, peer: PeerStats) -> None:
        if self._on_peer is not None:
            try:
                self._on_peer(peer)
            except Exception:
                log.exception("on_peer raised")

    def _greet(self, now: float) -> float:
        assert self._greeter is not None
        peers = self.peers
        step = self._greeter.poll(now, peers[0].silent_s if peers else float("inf"))
        if step.move_to is not None:
            log.info("no answer; trying the server's next address, %s", step.move_to)
            self._move_server(step.move_to)
        if step.resolve:
            log.info("the server has been silent; resolving %s again", self.config.server)
            self._take_new_addresses()
        if step.greet and self._state in ("starting", "running"):
            self._send_greeting(self._greeter.current)
        return step.wait_s

    def _send_greeting(self, server: Endpoint) -> None:
        table = self._table
        if table is None:  # stopped while the resolver was asked
            return
        transaction = os.urandom(12)
        table.set_greeting(transaction)
        if self._greeter is not None:
            self._greeter.sent(time.monotonic())
        sock = self._sockets[0]
        request = binding_request(transaction, unfinished=self.config.fast_path)
        tap, at_ns = self.tap, time.time_ns()  # its answer may be here before we are back
        with contextlib.suppress(OSError):  # the network may be down: the next greeting comes by itself
            sock.sendto(request, socket.MSG_DONTWAIT, server.sockaddr(sock.family))
            if tap is not None:
                tap(at_ns, request, server, None)

    def _send_from(self, local: Address | None, data: bytes, to: Endpoint) -> None:
        """One datagram that leaves from `local`, if that is given; lost if the network is down."""
        sock = self._sockets[0]
        source = [source_control(sock.family, local)] if local is not None else []
        tap, at_ns = self.tap, time.time_ns()
        with contextlib.suppress(OSError):
            sock.sendmsg([data], source, socket.MSG_DONTWAIT, to.sockaddr(sock.family))
            if tap is not None:
                tap(at_ns, data, to, local)

    def _take_new_addresses(self) -> None:
        assert self.config.server is not None
        assert self._greeter is not None
        try:
            servers = self._reachable(resolve(self.config.server, self.config.port))
        except FasttunError as error:
            log.warning("%s", error)
            return
        if self._state != "running":
            return
        moved = self._greeter.replace(servers, time.monotonic())
        if moved is not None:
            log.info("the server has moved to %s", moved)
            self._move_server(moved)

    def _move_server(self, server: Endpoint) -> None:
        table = self._table
        if table is None:
            return
        try:
            self._pin(server)
        except FasttunError as error:
            log.warning("%s", error)
        table.set_server(server.host, server.port, server.scope_id)

    def resolve_again(self) -> None:
        """Has the server's name resolved again, soon and in a thread of the tunnel. Nothing without a name."""
        if self._resolvable:
            self._resolve_asked = True
            self._wake_watcher()

    # --------------------------------------------------------------------------------- what it is

    @property
    def peers(self) -> tuple[PeerStats, ...]:
        """The peers as they are now: the server, or those that a listener has learned."""
        final, table = self._final, self._table
        if final is not None:
            return cast("tuple[PeerStats, ...]", final.peers)
        if self._fast_path is not None:
            self._fast_path.collect()
        return _peers(table, self._greeter) if table is not None else ()

    def through_the_loop(self) -> contextlib.AbstractContextManager[object]:
        """As of `Tunnel`: the fast path rests meanwhile."""
        return super().through_the_loop() if self._fast_path is None else self._fast_path.paused()

    def wait_peer(self, timeout: float | None = None) -> PeerStats:
        """Waits until a peer has been heard and returns it. Raises `TimeoutError` after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            heard = [peer for peer in self.peers if peer.silent_s != float("inf")]
            if heard:
                return min(heard, key=lambda peer: peer.silent_s)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"no peer was heard within {timeout} s")
            if self.wait(0.02 if left is None else min(0.02, left)):
                raise StateError("the tunnel has ended")

    def stats(self) -> Stats:
        """A snapshot of all counters; after `stop()` the last one."""
        # Taken in this order, because stop() sets the last snapshot before it lets go of what it was made from.
        engines, table, final = self._engines, self._table, self._final
        if final is not None:
            return final
        outbound = inbound = (0, 0)
        if self._fast_path is not None:
            self._fast_path.collect()
            outbound, inbound = self._fast_path.carried.outbound, self._fast_path.carried.inbound
        counters = [engine.counters() for engine in engines]
        offloads = dict(self._offloads)
        return Stats(
            uptime_s=time.monotonic() - self._started_at if self._started_at else 0.0,
            outbound=DirectionStats.total([c["outbound"] for c in counters], *outbound),
            inbound=DirectionStats.total([c["inbound"] for c in counters], *inbound),
            peers=_peers(table, self._greeter) if table is not None else (),
            system_calls=_total(c["calls"] for c in counters),
            errors=_total(c["errors"] for c in counters),
            offloads=offloads,
            events_lost=table.events_lost if table is not None else 0,
        )


def _borrow_socket(fd: int) -> socket.socket:
    """The caller's datagram socket by a descriptor of our own. EndpointError when it is none."""
    own = -1
    try:
        own = os.dup(fd)
        sock = socket.socket(fileno=own)
    except OSError as error:
        if own >= 0:
            os.close(own)
        raise EndpointError("use", f"udp_fd {fd}", error.errno or errno.EBADF) from error
    if sock.type != socket.SOCK_DGRAM:
        sock.close()
        raise EndpointError("use", f"udp_fd {fd}", errno.EPROTOTYPE, "give a datagram socket")
    return sock


def _ip_versions(sock: socket.socket) -> tuple[int, ...]:
    """The versions of IP that `sock` sends."""
    if sock.family == socket.AF_INET:
        return (4,)
    if sock.family == socket.AF_INET6 and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return (6,)
    return (4, 6)


def _connected_peer(sock: socket.socket) -> list[Endpoint]:
    """The endpoint that an IP socket is connected to; none for another family's."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return []
    return [Endpoint.from_sockaddr(sock.getpeername())]


def _is_literal(host: str | None) -> bool:
    try:
        ipaddress.ip_address((host or "").split("%")[0].strip("[]"))
    except ValueError:
        return False
    return True


def _interface_mtu(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    """The MTU of the interface that has `host`, or Ethernet's when the kernel does not say."""
    try:
        from .mtu import address_mtu

        return address_mtu(host)
    except (ImportError, EndpointError):
        return ETHERNET_MTU


def _restore_blocking(fd: int) -> None:
    os.set_blocking(fd, True)


def _total(many: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in many:
        total.update(one)
    return dict(total)


def _peers(table: PeerTable, greeter: Greeter | None) -> tuple[PeerStats, ...]:
    """greeter: of a client, whose only peer is the one that it greets."""
    round_trip_s = greeter.round_trip_s if greeter is not None else None
    loss = greeter.loss(time.monotonic()) if greeter is not None else None
    return tuple(
        PeerStats(
            endpoint=Endpoint(*peer["endpoint"]), framing=peer["framing"], addresses=tuple(peer["addresses"]),
            inbound_packets=peer["inbound_packets"], inbound_bytes=peer["inbound_bytes"],
            outbound_packets=peer["outbound_packets"], outbound_bytes=peer["outbound_bytes"],
            silent_s=float("inf") if peer["silent_s"] is None else peer["silent_s"],
            round_trip_s=round_trip_s, loss=loss)
        for peer in table.peers())
