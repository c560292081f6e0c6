"""WireGuard: a running device, as an object: its TUN device, its socket, its threads, its live configuration.

The engine seals and opens data; one control thread sleeps until the engine has something for the protocol, or a
timer is due, and lets `Host` do the rest.
Not for: the protocol's steps (`host`, `interface`), routes, DNS and hooks (`quick`), the control socket (`uapi`),
the file format (`config`).
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
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import cast

from .. import offload
from .._core import Engine, SessionTable
from ..device import TunDevice
from ..endpoint import Endpoint, open_udp, tell_local_address
from ..errors import ConfigurationError, DeviceError, EndpointError, FasttunError, StateError
from ..lifecycle import Tunnel
from ..stats import DirectionStats, Stats, WireGuardPeer
from .config import Config, PeerConfig
from .host import KEEP, Host, Keep, look_up
from .keys import PresharedKey, PrivateKey, PublicKey

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
_SO_MARK = 36
_IP_PKTINFO = 8
_IPV6_PKTINFO = 50
_TUNGETIFF = 0x800454D2
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_VNET_HDR = 0x4000

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class WireGuard(Tunnel):
    """A WireGuard device. Usable from any thread; starts once, stops for good.

    config: keys, port, addresses and peers; None for a device that is configured while it runs. name: of the TUN
    device; tun_fd: use this descriptor of one instead. mtu: bytes, before the configuration's own; 1420 else.
    configure: give the device its addresses and `routes` and take it up; without, only its MTU is set.
    tun_offload, udp_gso, udp_gro, busy_poll_us, before_threads: as for `Forwarder`. on_handshake(WireGuardPeer):
    called from a thread of the tunnel when a session is confirmed; it must not block.
    `start()` raises `DeviceError`, `EndpointError` and `ConfigurationError`. It sets no DNS, and no routes but those.
    """

    mode = "wireguard"
    tap: Callable[[int, bytes, Endpoint, Address | None], object] | None = None
    """Called with each handshake message sent and when (ns since 1970), while somebody captures; must not block."""

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
        self._fwmark = self._config.fwmark
        self._host: Host | None = None
        self._table: SessionTable | None = None
        self._told: list[WireGuardPeer] = []
        self._send_failed: Counter[str] = Counter()
        self._mtu_at = 0.0

    # ------------------------------------------------------------------------------------ set-up

    def _set_up(self) -> None:
        config = self._config
        sock = self._open_socket(config.listen_port or 0)
        self._undo.callback(sock.close)
        self._sockets.append(sock)
        tun_fd, vnet_header, join_udp = self._open_device()
        largest = max(self.mtu, LARGEST_MTU)
        table = SessionTable(family=int(sock.family), mtu=largest)
        table.set_mtu(self.mtu)
        tun_offload, udp_gso, udp_gro = self._switches
        self._offloads |= offload.enable_udp(sock, gso=udp_gso, gro=udp_gro)
        self._offloads["tun"] = offload.ON if vnet_header else \
            offload.ASKED_OFF if not tun_offload else \
            f"off: {offload.distrust('tun') or 'the device has no vnet header'}"
        self._engines.append(Engine(
            table, tun_fd=tun_fd, udp_fd=sock.fileno(), mtu=largest, burst_packets=BURST_PACKETS,
            busy_poll_us=self._busy_poll_us, sticky=True, name=self.name, vnet_header=vnet_header,
            join_udp=join_udp, udp_gso=self._offloads["udp-gso"] == offload.ON,
            udp_gro=self._offloads["udp-gro"] == offload.ON))
        host = Host(table, self._send, self._told if self._on_handshake is not None else None)
        if config.private_key is not None:
            host.set_private_key(config.private_key)
        for peer in config.peers:
            host.add_peer(peer, look_up(peer))
        self._pin_endpoints(host)
        self._table, self._host = table, host
        self._start_threads()

    def _pin_endpoints(self, host: Host) -> None:
        """Keeps the ways to the peers out of the tunnel where a route of ours covers them."""
        for endpoint in host.endpoints():
            if self.device is not None and any(endpoint.host in route for route in self._routes):
                self.device.pin_route(endpoint.host)

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
        host = self._host
        if host is not None:
            with host.guard:  # whoever waits for it finds the tunnel ended
                host.close()
                self._host = self._table = None

    # ----------------------------------------------------------------------------- control thread

    def _watch(self) -> None:
        host, table = self._host, self._table
        assert host is not None
        assert table is not None
        poll = select.poll()
        poll.register(table.notify_fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        backlog, busy = 0, False
        while self._state in ("starting", "running") and not self._ended.is_set():
            poll.poll(0 if backlog else _patience_ms(host.next_deadline(), busy))
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            backlog, busy, lost = host.turn()
            if lost is not None:
                self._offload_lost(*lost)
            if busy:
                self._follow_mtu(table)
            self._tell_handshakes(host)

    def _send(self, datagram: bytes, to: Endpoint, local: Address | None) -> None:
        """A handshake message, from the address that the peer knows; lost when the network does not take it."""
        sock = self._sockets[0]
        try:
            address = to.sockaddr(sock.family)
        except EndpointError:
            self._send_failed["unreachable"] += 1
            return
        tap, at_ns = self.tap, time.time_ns()  # its answer may be here before we are back
        for control in ([_source(sock.family, local)] if local is not None else []), []:
            try:
                sock.sendmsg([datagram], control, socket.MSG_DONTWAIT, address)
                if tap is not None:
                    tap(at_ns, datagram, to, local)
                return
            except OSError as error:  # `local` may be gone: then once more without
                reason = error
        self._send_failed["send-failed"] += 1
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

    def _tell_handshakes(self, host: Host) -> None:
        with host.guard:
            told, self._told[:] = list(self._told), []
        for peer in told:
            try:
                assert self._on_handshake is not None
                self._on_handshake(peer)
            except Exception:
                log.exception("on_handshake raised")

    # -------------------------------------------------------------------------- live configuration

    @contextlib.contextmanager
    def _running_host(self) -> Iterator[Host]:
        """The host, its guard held: it does not end meanwhile. StateError when the tunnel does not run."""
        host = self._host
        with host.guard if host is not None else contextlib.nullcontext():
            if host is None or self._host is not host:
                raise StateError("the tunnel does not run")
            yield host

    @property
    def private_key(self) -> PrivateKey | None:
        """A copy of the device's key; None without one."""
        host = self._host
        if host is not None:
            return host.private_key
        return copy.copy(self._config.private_key) if self._config.private_key is not None else None

    def set_private_key(self, private_key: PrivateKey | None) -> None:
        """Become another: all sessions end, and a peer with the new key's public key is removed."""
        with self._running_host() as host:
            host.set_private_key(private_key)
        self._wake_watcher()

    @property
    def listen_port(self) -> int:
        """The UDP port; before `start()` the configured one, 0 for any."""
        return self.local_port or self._config.listen_port or 0

    def set_listen_port(self, port: int) -> None:
        """Listen on another port (0: any) from now on; sessions go on. EndpointError leaves all as it was."""
        if not 0 <= port <= 65535:
            raise ConfigurationError("listen_port", f"{port} is out of range", "use 0 to 65535")
        with self._running_host() as host:
            table, old = self._table, self._sockets[0]
            assert table is not None
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
            host.keepalive_all()  # peers learn the port from the next authentic packet

    @property
    def fwmark(self) -> int:
        """The mark of outgoing datagrams (SO_MARK); 0 for none."""
        return self._fwmark

    def set_fwmark(self, fwmark: int) -> None:
        """Mark outgoing datagrams from now on; 0 for not. EndpointError (EPERM) without CAP_NET_ADMIN."""
        if not 0 <= fwmark <= 0xFFFFFFFF:
            raise ConfigurationError("fwmark", f"{fwmark} is out of range", "use 32 bits")
        with self._running_host():
            _mark(self._sockets[0], fwmark)
            self._fwmark = fwmark

    def add_peer(self, config: PeerConfig, *, at: Endpoint | None = None) -> None:
        """A new peer, live. ConfigurationError when it is there or is this device; EndpointError for its name.

        at: what its endpoint's name stands for, when that has been looked up already.
        """
        endpoint = at or look_up(config)
        with self._running_host() as host:
            host.add_peer(config, endpoint)
        self._wake_watcher()

    def remove_peer(self, public_key: PublicKey) -> None:
        """Forget the peer, its sessions and its allowed IPs. Nothing when it is not there."""
        with self._running_host() as host:
            host.remove_peer(public_key)

    def replace_peers(self) -> None:
        """Forget all peers."""
        with self._running_host() as host:
            for public_key in host.public_keys():
                host.remove_peer(public_key)

    def update_peer(
        self,
        public_key: PublicKey,
        *,
        preshared_key: PresharedKey | Keep | None = KEEP,
        endpoint: Endpoint | Keep = KEEP,
        name: str | None = None,
        persistent_keepalive: int | Keep = KEEP,
        allowed_ips: Iterable[Network] = (),
        replace_allowed_ips: bool = False,
        remove_allowed_ips: Iterable[Network] = (),
    ) -> None:
        """Change what is given. allowed_ips are added, and taken from whoever had them. KeyError for no such peer.

        A new preshared key counts from the next handshake message on; a new endpoint from the next packet on.
        name: "host:port" that led to the endpoint, to be looked up again when the peer stays silent.
        """
        with self._running_host() as host:
            host.update_peer(
                public_key, preshared_key=preshared_key, endpoint=endpoint, name=name,
                persistent_keepalive=persistent_keepalive, allowed_ips=allowed_ips,
                replace_allowed_ips=replace_allowed_ips, remove_allowed_ips=remove_allowed_ips)
        self._wake_watcher()

    @contextlib.contextmanager
    def key_log(self, write: Callable[[str], object]) -> Iterator[None]:
        """Meanwhile `write` gets the keys that open a capture, as text for Wireshark (`keylog`); it must not block.

        First this device's private key; then the ephemeral key of each handshake from now on. One at a time.
        """
        with self._running_host() as host:
            host.log_keys(write)
        try:
            yield
        finally:
            host.log_keys(None)

    def new_handshakes(self) -> None:
        """Makes new sessions with all peers that can be reached; those that there are go on until then."""
        with self._running_host() as host:
            host.new_handshakes()
        self._wake_watcher()

    def resolve_again(self) -> None:
        """Has the names of all peers looked up again, soon and aside."""
        with self._running_host() as host:
            host.look_up_again()

    # --------------------------------------------------------------------------------- what it is

    @property
    def peers(self) -> tuple[WireGuardPeer, ...]:
        """All peers as they are now; after `stop()` as they were last."""
        host, final = self._host, self._final
        if final is not None:
            return cast("tuple[WireGuardPeer, ...]", final.peers)
        return host.peers() if host is not None else ()

    def config(self) -> Config:
        """The configuration as it runs now; what only the file knows (addresses, DNS, hooks) as it was given."""
        try:
            with self._running_host() as host:
                return replace(
                    self._config, private_key=host.private_key, listen_port=self.listen_port or None,
                    fwmark=self._fwmark, peers=host.peer_configs())
        except StateError:
            return self._config

    def stats(self) -> Stats:
        """A snapshot of all counters; after `stop()` the last one."""
        # Taken in this order, because stop() sets the last snapshot before it lets go of what it was made from.
        engines, host, table, final = self._engines, self._host, self._table, self._final
        if final is not None:
            return final
        counters = engines[0].counters() if engines else None
        drops = self._send_failed + (host.drops if host is not None else Counter())
        if counters is not None and counters["bad_mac1"]:
            drops["bad-mac1"] += counters["bad_mac1"]
        return Stats(
            uptime_s=time.monotonic() - self._started_at if self._started_at else 0.0,
            outbound=DirectionStats.total([counters["outbound"]] if counters else []),
            inbound=DirectionStats.total([counters["inbound"]] if counters else []),
            peers=self.peers,
            system_calls=dict(counters["calls"]) if counters else {},
            errors=dict(counters["errors"]) if counters else {},
            offloads=dict(self._offloads),
            events_lost=table.messages_lost if table is not None else 0,
            control_drops=dict(drops),
            aead=counters["aead"] if counters else "",
        )


def _patience_ms(deadline: float | None, busy: bool) -> int:
    """How long the control thread may sleep, in milliseconds; -1 for as long as nothing happens."""
    waits = [NEWS_EVERY_S] if busy else []
    if deadline is not None:
        waits.append(max(0.0, deadline - time.monotonic()))
    return math.ceil(min(waits) * 1000) if waits else -1


def _mark(sock: socket.socket, fwmark: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, struct.pack("I", fwmark))
    except PermissionError as error:
        raise EndpointError("mark", f"the socket with {fwmark:#x}", error.errno or 1, "needs CAP_NET_ADMIN") from error


def _source(family: int, local: Address) -> tuple[int, int, bytes]:
    """The control message that makes a datagram leave from `local`."""
    if family == socket.AF_INET:
        return socket.IPPROTO_IP, _IP_PKTINFO, bytes(4) + local.packed + bytes(4)
    packed = local.packed if local.version == 6 else b"\0" * 10 + b"\xff\xff" + local.packed
    return socket.IPPROTO_IPV6, _IPV6_PKTINFO, packed + bytes(4)
