"""FastPath: keeps the kernel's maps in line with the peer table, and brings its counters back.

Not for: the programs (`programs`), learning peers (fasttun/_native/peers.pxd), the thread that calls
(fasttun/forwarder.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeVar

from .._core import PeerTable
from ..errors import DeviceError, EndpointError, FasttunError
from ..mtu import path_mtu
from ..netlink import Place, code_of, netlink
from . import bpf, programs
from .programs import ANY, COUNTS, HEADERS, Way, key_of

__all__ = ["Carried", "FastPath"]

log = logging.getLogger("fasttun")

ADDRESSES = 8192 + 1  # the peer table's, and ANY
SLOTS = 1024
_ETHERNET, _WITHOUT_HEADER = (1,), (519, 65534)  # ARPHRD_ETHER; ARPHRD_RAWIP, ARPHRD_NONE
_UNICAST = 1  # RTN_UNICAST
_ROUTE_GROUPS = 0x1 | 0x10 | 0x40 | 0x80  # RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE

T = TypeVar("T")
Address = IPv4Address | IPv6Address
EndpointValue = tuple[Address, int, int]


@dataclass(frozen=True)
class Carried:
    """Packets and inner bytes that the kernel has carried."""

    outbound: tuple[int, int] = (0, 0)
    inbound: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _Route:
    interface: int
    source: IPv4Address


class FastPath:
    """Two programs on the TUN device `tun` (its index) and on the devices towards the peers of `table`.

    mtu: bytes, of the TUN device. port: our UDP port. bound: the outer address that the socket is bound to, if any.
    own: this host's inner addresses. fixed: `table` has one peer, to which everything goes.
    Raises `DeviceError` where the kernel has no tcx (before 6.6) or refuses: it wants CAP_BPF, CAP_PERFMON and
    CAP_NET_ADMIN. Methods may be called from any thread; nothing remains after `close()`, or after the process.
    """

    def __init__(self, table: PeerTable, *, tun: int, mtu: int, port: int, bound: Address | None,
                 own: Iterable[Address], fixed: bool) -> None:
        self._table, self._tun, self._mtu, self._port, self._fixed = table, tun, mtu, port, fixed
        self._bound = bound if isinstance(bound, IPv4Address) and not bound.is_unspecified else None
        self._lock = threading.RLock()
        self._undo = contextlib.ExitStack()
        self._targets: dict[bytes, bytes] = {}
        self._sources: dict[bytes, bytes] = {}
        self._never = {key_of(address): bytes(programs.SOURCE_SIZE) for address in own} if fixed else {}
        self._links: dict[int, int | None] = {}  # interface: descriptor, None where it cannot be
        self._routes: dict[tuple[IPv4Address, IPv4Address | None], _Route | None] = {}
        self._path_mtus: dict[IPv4Address, int] = {}
        self._slots: dict[EndpointValue, int] = {}
        self._free = list(range(SLOTS - 1, -1, -1))
        self._seen: dict[int, tuple[int, ...]] = {}
        self._told: dict[EndpointValue, str] = {}
        self._paused = 0
        self._closed = False
        self.carried = Carried()
        """In total, as of the last `collect`."""
        try:
            self._open()
        except OSError as error:
            self.close()
            if isinstance(error, FasttunError):
                raise
            raise DeviceError("set up the fast path on", f"interface {tun}", error.errno or errno.EINVAL,
                              _hint(error.errno)) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        def own(fd: int) -> int:
            self._undo.callback(os.close, fd)
            return fd

        self._processors = _possible_processors()
        self._place = Place()
        self._undo.callback(self._place.close)
        self._target_map = own(bpf.create_map(bpf.HASH, programs.KEY_SIZE, programs.TARGET_SIZE, ADDRESSES, "targets"))
        self._source_map = own(bpf.create_map(bpf.HASH, programs.KEY_SIZE, programs.SOURCE_SIZE, ADDRESSES, "sources"))
        self._counts = own(bpf.create_map(bpf.PERCPU_ARRAY, 4, programs.SLOT_COUNTS_SIZE, SLOTS, "counts"))
        self._inbound = {
            ethernet: own(bpf.load_program(
                programs.inbound(self._source_map, self._counts, port=self._port, tun=self._tun, ethernet=ethernet),
                "fasttun_in", bpf.TCX_INGRESS))
            for ethernet in (True, False)}
        outbound = own(bpf.load_program(programs.outbound(self._target_map, self._counts), "fasttun_out",
                                        bpf.TCX_EGRESS))
        own(bpf.attach(outbound, self._tun, bpf.TCX_EGRESS))
        self._changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        self._undo.callback(self._changes.close)
        self._changes.bind((0, _ROUTE_GROUPS))

    def attach_ahead(self, hosts: Iterable[Address]) -> None:
        """Puts the program on the devices towards `hosts`, or without any on all that may become one.

        What is not done here is done when a peer is learned, which needs the same privileges.
        """
        with self._lock:
            routes = [self._route(host, self._bound) for host in hosts if isinstance(host, IPv4Address)]
            for interface in [route.interface for route in routes if route] or self._all_interfaces():
                self._attach(interface)

    def fileno(self) -> int:
        """Readable when routes, addresses or devices have changed: time for `take_changes()`, and `sync()`."""
        return self._changes.fileno()

    def sync(self) -> None:
        """Puts into the maps what the table says now, and takes out the rest."""
        with self._lock:
            if self._closed:
                return
            self.collect()
            self.take_changes()
            peers = [] if self._paused else self._table.peers()
            targets: dict[bytes, bytes] = {}
            sources = dict(self._never) if peers else {}
            for peer in peers:
                way = self._way(peer)
                if way is None:
                    continue
                keys = [ANY] if self._fixed else [key_of(address) for address in peer["addresses"]]
                targets.update(dict.fromkeys(keys, way.target()))
                sources.update(dict.fromkeys(keys, way.source()))
            _put(self._source_map, self._sources, sources)
            _put(self._target_map, self._targets, targets)
            self._free_slots({peer["endpoint"] for peer in peers})

    def _free_slots(self, stay: set[EndpointValue]) -> None:
        """Once nothing counts there any more: what came until now is the old peer's."""
        gone = self._slots.keys() - stay
        if gone:
            self.collect()
        for endpoint in gone:
            self._free.append(self._slots.pop(endpoint))
            self._told.pop(endpoint, None)

    def questions(self) -> list[tuple[EndpointValue, Address | None, bytes]]:
        """What to send to the learned peers to know which have a fast path: endpoint, own address, datagram."""
        return [(peer["endpoint"], peer["local"], peer["question"]) for peer in self._table.peers()
                if peer["question"] is not None and peer["framing"] == "raw"]

    def collect(self) -> None:
        """Adds what the kernel has carried since the last time to the table's peers and to `carried`."""
        with self._lock:
            if self._closed:
                return
            for endpoint, slot in self._slots.items():
                now = self._read(slot)
                before = self._seen.get(slot, (0, 0, 0, 0, 0))
                if now == before:
                    continue
                self._seen[slot] = now
                host = _ipv4(endpoint[0])
                if host is not None:
                    self._path_mtus.pop(host, None)  # where nothing goes nothing is learnt of the path
                outbound_packets, outbound_bytes, inbound_packets, inbound_bytes = (
                    now[i] - before[i] for i in range(4))
                self._table.account(
                    endpoint, inbound_packets=inbound_packets, inbound_bytes=inbound_bytes,
                    outbound_packets=outbound_packets, outbound_bytes=outbound_bytes,
                    heard_ns=now[4] if inbound_packets else 0)
                was = self.carried
                self.carried = Carried(
                    (was.outbound[0] + outbound_packets, was.outbound[1] + outbound_bytes),
                    (was.inbound[0] + inbound_packets, was.inbound[1] + inbound_bytes))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, every packet goes through the loop."""
        with self._lock:
            self._paused += 1
        try:
            self.sync()
            yield
        finally:
            with self._lock:
                self._paused -= 1
            self.sync()

    @property
    def peers(self) -> int:
        """How many peers' packets the kernel carries."""
        with self._lock:
            return len({_slot_of(value) for value in self._targets.values()})

    def close(self) -> None:
        """Takes the programs off; what they have carried is collected. May be called twice."""
        with self._lock:
            if not self._closed and self._slots:
                with contextlib.suppress(OSError):  # what is closed next goes anyway
                    _put(self._target_map, self._targets, {})
                    _put(self._source_map, self._sources, {})
                    self.collect()
            self._closed = True
            for link in self._links.values():
                if link is not None:
                    os.close(link)
            self._links = {}
            self._undo.close()

    # One peer.

    def _way(self, peer: dict[str, Any]) -> Way | None:
        """How its packets go; None, and a line in the log, when the loop has to carry them."""
        endpoint: EndpointValue = peer["endpoint"]
        host, port, _ = endpoint
        reason = ""
        if not peer["unfinished"]:
            return None  # not asked yet, not heard, or without a fast path
        if isinstance(host, IPv6Address) and host.ipv4_mapped is not None:
            host = host.ipv4_mapped
        route = None
        local = _ipv4(peer["local"]) or self._bound
        if not reason and not isinstance(host, IPv4Address):
            reason = "an outer address of IPv6"
        elif isinstance(host, IPv4Address):
            route = self._route(host, local)
            if route is None:
                reason = reason or "no route that leaves this host by a device"
            elif self._mtu_towards(host, local) < self._mtu + HEADERS:
                reason = reason or "a path that does not carry the device's MTU"
            elif self._attach(route.interface) is None:
                reason = reason or "a device that takes no program"
        if reason or route is None or not isinstance(host, IPv4Address):
            if self._told.get(endpoint) != reason:
                self._told[endpoint] = reason
                log.info("no fast path to %s port %d: it has %s", host, port, reason)
            return None
        slot = self._slots.get(endpoint)
        if slot is None:
            if not self._free:
                return None
            slot = self._slots[endpoint] = self._free.pop()
        return Way(slot, route.interface, local or route.source, self._port, host, port)

    def _mtu_towards(self, host: IPv4Address, local: IPv4Address | None) -> int:
        if host not in self._path_mtus:
            try:
                self._path_mtus[host] = self._place.run(lambda: path_mtu(host, local=local))
            except EndpointError:
                self._path_mtus[host] = 0
        return self._path_mtus[host]

    def _route(self, host: IPv4Address, local: IPv4Address | None) -> _Route | None:
        """The way to `host` for datagrams from `local`, as rules may tell them apart."""
        if (host, local) not in self._routes:
            self._routes[host, local] = self._ask_route(host, local)
        return self._routes[host, local]

    def _ask_route(self, host: IPv4Address, local: IPv4Address | None) -> _Route | None:
        asked = {"dst": str(host)} if local is None else {"dst": str(host), "src": str(local)}

        def work() -> _Route | None:
            with netlink() as ipr:
                found = ipr.route("get", **asked)[0]
            interface, source = found.get("RTA_OIF"), found.get("RTA_PREFSRC") or local
            if found["type"] != _UNICAST or interface in (None, self._tun) or source is None:
                return None
            return _Route(int(interface), IPv4Address(source))

        return self._quietly(work)

    def _attach(self, interface: int) -> int | None:
        """The link of the inbound program on `interface`; None where it cannot be attached."""
        if interface not in self._links:
            self._links[interface] = None
            kind = self._quietly(lambda: self._interface_type(interface))
            if kind in _ETHERNET + _WITHOUT_HEADER:
                try:
                    self._links[interface] = bpf.attach(self._inbound[kind in _ETHERNET], interface, bpf.TCX_INGRESS)
                except OSError as error:
                    log.warning("no fast path through interface %d: %s", interface, error.strerror)
        return self._links[interface]

    def _interface_type(self, interface: int) -> int:
        with netlink() as ipr:
            return int(ipr.link("get", index=interface)[0]["ifi_type"])

    def _all_interfaces(self) -> list[int]:
        def work() -> list[int]:
            with netlink() as ipr:
                return sorted({int(message["index"]) for message in ipr.get_addr(family=socket.AF_INET)
                               if self._bound is None or message.get("IFA_LOCAL") == str(self._bound)})

        return [index for index in self._quietly(work) or [] if index not in (1, self._tun)]

    def _quietly(self, work: Callable[[], T]) -> T | None:
        """work()'s value; None when the kernel says no."""
        try:
            return self._place.run(work)
        except Exception as error:
            if code_of(error) is None:
                raise
            return None

    def take_changes(self) -> None:
        """Forgets the routes when the kernel has told of a change."""
        with self._lock:
            if not self._closed:
                self._take_changes()

    def _take_changes(self) -> None:
        changed = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    changed = bool(self._changes.recv(65536)) or changed
                except OSError as error:
                    if error.errno != errno.ENOBUFS:  # messages were lost: something has changed
                        raise
                    changed = True
        if changed:
            self._routes.clear()
            self._path_mtus.clear()
            gone = self._place.run(lambda: [interface for interface in self._links if not _exists(interface)])
            for interface in gone:
                link = self._links.pop(interface)
                if link is not None:
                    os.close(link)

    def _read(self, slot: int) -> tuple[int, ...]:
        raw = bpf.lookup(self._counts, struct.pack("=I", slot), programs.SLOT_COUNTS_SIZE * self._processors)
        assert raw is not None
        each = list(COUNTS.iter_unpack(raw))
        return (*(sum(counts[i] for counts in each) for i in range(4)), max(counts[4] for counts in each))


def _put(fd: int, present: dict[bytes, bytes], wanted: dict[bytes, bytes]) -> None:
    """Brings the map, which holds `present`, to `wanted`; `present` says what it holds then."""
    for key in present.keys() - wanted.keys():
        bpf.delete(fd, key)
        del present[key]
    for key, value in wanted.items():
        if present.get(key) != value:
            bpf.update(fd, key, value)
            present[key] = value


def _slot_of(target: bytes) -> int:
    return int(struct.unpack_from("=I", target)[0])


def _ipv4(address: Address | None) -> IPv4Address | None:
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped
    return address


def _exists(interface: int) -> bool:
    try:
        socket.if_indextoname(interface)
    except OSError:
        return False
    return True


def _possible_processors() -> int:
    with open("/sys/devices/system/cpu/possible") as file:
        return int(file.read().strip().rpartition("-")[2].rpartition(",")[2]) + 1


def _hint(code: int | None) -> str:
    if code == errno.EPERM:
        return "it needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
    if code in (errno.EINVAL, errno.ENOSYS):
        return "it needs Linux 6.6 or newer with eBPF (CONFIG_BPF_SYSCALL, CONFIG_NET_XGRESS)"
    return ""
