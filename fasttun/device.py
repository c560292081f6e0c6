"""The TUN device: create it or attach to one, configure it, and put everything back at close.

Opening is by ioctl on /dev/net/tun (drivers/net/tun.c); links, addresses and routes go by netlink through
pyroute2, which is imported when the first change or netlink question comes up: attaching to a finished
device of one's own needs neither it nor root.
Not for: packets (the engine reads and writes the descriptors), nor choosing an MTU (`fasttun.mtu`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Any

from .errors import DeviceError, StateError
from .netlink import Place, code_of, netlink

__all__ = ["TunDevice"]

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network

CLONE_DEVICE = "/dev/net/tun"

# linux/if_tun.h. The requests are asm-generic's encoding, which x86, arm, riscv, s390 and loongarch share.
TUNSETIFF = 0x400454CA
TUNGETFEATURES = 0x800454CF
TUNSETOFFLOAD = 0x400454D0
TUNGETIFF = 0x800454D2
TUNGETVNETHDRSZ = 0x800454D7
TUNSETVNETHDRSZ = 0x400454D8
IFF_TUN = 0x0001
IFF_MULTI_QUEUE = 0x0100
IFF_PERSIST = 0x0800
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_USO4 = 0x20
TUN_F_USO6 = 0x40
VNET_HEADER_LENGTH = 10
"""Bytes: `struct virtio_net_hdr` without num_buffers (linux/virtio_net.h)."""
_OFFLOADS = {
    "csum": TUN_F_CSUM,
    "tso4": TUN_F_TSO4,
    "tso6": TUN_F_TSO6,
    "ecn": TUN_F_TSO_ECN,
    "uso": TUN_F_USO4 | TUN_F_USO6,  # the kernel takes both or none
}
_OFFLOAD_LADDER = (
    frozenset(_OFFLOADS),
    frozenset({"csum", "tso4", "tso6", "ecn"}),  # USO: Linux 6.2
    frozenset({"csum", "tso4", "tso6"}),
    frozenset({"csum"}),
    frozenset[str](),
)

# linux/if.h, linux/sockios.h
_IFF_UP = 0x1
_SIOCGIFFLAGS = 0x8913
_SIOCGIFMTU = 0x8921
_IFREQ = struct.Struct("16sH22x")
_IFREQ_INT = struct.Struct("16si20x")

# linux/rtnetlink.h, linux/if_addr.h
_RT_TABLE_MAIN = 254
_RT_SCOPE_LINK = 253
_RTN_UNICAST = 1
_RTN_LOCAL = 2
_RTPROT_KERNEL = 2
_RTNH_F_ONLINK = 4
_IFA_F_NODAD = 0x02
_IFA_F_SETTABLE = _IFA_F_NODAD | 0x100 | 0x200  # MANAGETEMPADDR, NOPREFIXROUTE

_IPV6_MIN_MTU = 1280  # RFC 8200 §5; below it Linux takes IPv6 off the device (net/ipv6/addrconf.c)

# What a step of undoing meets when someone else has already undone it.
_GONE = frozenset({errno.ENODEV, errno.ENXIO, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENOENT})

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def _reported(operation: str, subject: str, hint: Callable[[int], str]) -> Iterator[None]:
    """Turn a netlink or system error into a DeviceError with its hint."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        code = code_of(error)
        if code is None:
            raise
        raise DeviceError(operation, subject, code, hint(code)) from error


@dataclass(frozen=True)
class _Kind:
    """What netlink says of an existing interface, before attaching to it."""

    kind: str
    flags: int | None  # of TUNSETIFF; None when the kernel (before 4.18) does not tell
    queues: int


@dataclass(frozen=True)
class _Before:
    """Addresses and routes of an attached device before the first change, as netlink messages."""

    addresses: list[Any]
    routes: list[Any]


@dataclass(frozen=True)
class _Hop:
    """Where a route leads: the interface, and the gateway (`via`: one of the other family, RFC 5549)."""

    oif: int
    gateway: str | None
    via: Any

    @classmethod
    def of(cls, route: Any) -> _Hop:
        paths = route.get("RTA_MULTIPATH")
        if paths:
            return cls(int(paths[0]["oif"]), paths[0].get("RTA_GATEWAY"), paths[0].get("RTA_VIA"))
        return cls(_oif(route), route.get("RTA_GATEWAY"), route.get("RTA_VIA"))


class TunDevice:
    """An open TUN device. `open` makes one; the maker must `close` it. Also a context manager.

    `fds`: non-blocking descriptors without packet information, one per queue; they stay this object's.
    `created`: it did not exist before and vanishes at close. `vnet_header`: each packet carries a
    `struct virtio_net_hdr` of 10 bytes. `offloads`: what the kernel granted of
    csum, tso4, tso6, ecn, uso; empty without vnet header.
    Methods may be called from any thread, also from one that runs an event loop (they block for
    milliseconds), one at a time; they work in the network namespace that `open` was called in.
    """

    def __init__(
        self,
        name: str,
        index: int,
        fds: tuple[int, ...],
        *,
        created: bool,
        vnet_header: bool,
        offloads: frozenset[str],
        place: Place,
        restore: Callable[[], None] | None,
    ) -> None:
        """Not for callers: use `open`. `restore`: puts the device's own flags back after the last close."""
        self.name = name
        self.index = index
        self.fds = fds
        self.created = created
        self.vnet_header = vnet_header
        self.offloads = offloads
        self._place = place
        self._restore = restore
        self._undo: list[_Step] = []
        self._before: _Before | None = None
        # An owner who attached without root can put the flags back without root.
        self._opened_by_root = os.geteuid() == 0
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> TunDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def open(cls, name: str, *, queues: int = 1, vnet_header: bool = False) -> TunDevice:
        """Create the device, or attach to an idle one that exists. Raises DeviceError.

        `name`: at most 15 characters; "%d" in it takes the first free number. `queues` > 1 needs a
        multi-queue device. `vnet_header` is a wish: see the attribute for what came of it.
        An ordinary user can attach to a persistent device of their own.
        """
        if queues < 1:
            raise ValueError(f"queues must be at least 1, not {queues}")
        place = Place()
        fds: list[int] = []
        restore: Callable[[], None] | None = None
        try:
            fds.append(_open_clone(name))
            flags = IFF_TUN | IFF_NO_PI | _wanted_features(fds[0], name, queues, vnet_header)
            existing = place.run(lambda: _examine(name))
            if existing is not None:
                flags |= _check_attachable(name, existing, queues)
            name = _attach(fds[0], name, flags)
            actual = _flags(fds[0], name)
            if existing is not None and existing.flags is not None:
                restore = _restorer(fds[0], name, existing.flags, actual)
            while len(fds) < queues:
                fds.append(_open_clone(name))
                _attach(fds[-1], name, flags)
            if not actual & IFF_NO_PI or (actual & IFF_VNET_HDR and not vnet_header):
                raise DeviceError("attach to", name, errno.EBUSY, _busy_hint(name), "in use with other packet headers")
            offloads = _set_offloads(fds[0], name) if actual & IFF_VNET_HDR else frozenset[str]()
            return cls(
                name,
                socket.if_nametoindex(name),
                tuple(fds),
                # The kernel removes a device with its last descriptor, unless it is persistent.
                created=not actual & IFF_PERSIST,
                vnet_header=bool(actual & IFF_VNET_HDR),
                offloads=offloads,
                place=place,
                restore=restore,
            )
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if restore is not None:
                restore()
            place.close()
            if isinstance(error, OSError) and not isinstance(error, DeviceError):
                raise DeviceError("open", name, error.errno or errno.EIO) from error
            raise

    @property
    def needs_admin_to_close(self) -> bool:
        """Whether `close` needs CAP_NET_ADMIN to put back what was changed (a created device does not)."""
        if self._closed:
            return False
        if self._restore is not None and self._opened_by_root:
            return True
        return any(step.elsewhere or not self.created for step in self._undo)

    def mtu(self) -> int:
        """Bytes, as the kernel has it now. DeviceError (ENODEV) when the device is gone."""
        return self._ask(_SIOCGIFMTU, _IFREQ_INT)

    def addresses(self) -> tuple[Interface, ...]:
        """As the kernel has them now, link-local ones too; empty when the device is gone."""
        self._check_open()

        def work() -> tuple[Interface, ...]:
            with _reported("list the addresses of", self.name, _no_hint), netlink() as ipr:
                return tuple(_interface_of(message) for message in ipr.get_addr(index=self.index))

        return self._place.run(work)

    def configure(
        self,
        *,
        addresses: Iterable[Interface] = (),
        routes: Iterable[Network] = (),
        mtu: int | None = None,
        up: bool = True,
    ) -> None:
        """Give the device what it lacks: MTU (bytes; None leaves it), addresses, up-state, routes.

        What is already so is left alone, now and at close; every change is undone at close, and at once
        when a later one fails. Without anything to change it makes no netlink call. Raises DeviceError.
        """
        self._check_open()
        address_list = [ip_interface(address) for address in addresses]
        route_list = [ip_network(route) for route in routes]
        mark = len(self._undo)

        def work() -> None:
            try:
                self._configure(address_list, route_list, mtu, up)
            except BaseException:
                self._undo_to(mark)
                raise

        self._place.run(work)

    def pin_route(self, host: Address) -> None:
        """Keep `host` reachable by today's gateway although a route that covers it leads into the tunnel.

        Adds a host route to the main table (undone at close), unless there is one or `host` is this
        machine. Before or after `configure` adds the covering route. Raises DeviceError.
        """
        self._check_open()
        host = ip_address(host)
        self._place.run(lambda: self._pin(host))

    def close(self) -> None:
        """Put everything back and close the descriptors. Idempotent; never raises, logs what it could not."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._place.run(lambda: self._undo_to(0))
        except Exception as error:
            _log.warning("%s was not put back as it was: %s", self.name, error)
        finally:
            for fd in self.fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
            if self._restore is not None:
                self._place.run(self._restore)
            self._place.close()

    # ------------------------------------------------------------------------------------ configuration

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(f"the device {self.name} is closed")

    def _ask(self, request: int, layout: struct.Struct) -> int:
        """An interface ioctl's number. By name: the one the kernel knows it by now."""
        self._check_open()

        def work() -> int:
            try:
                name = _current_name(self.fds[0])
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    answer = fcntl.ioctl(sock, request, layout.pack(name, 0))
            except OSError as error:
                code = errno.ENODEV if error.errno == errno.EBADFD else error.errno or errno.EIO
                raise DeviceError("query", self.name, code) from error
            return int(layout.unpack(answer)[1])

        return self._place.run(work)

    def _configure(self, addresses: list[Interface], routes: list[Network], mtu: int | None, up: bool) -> None:
        now_mtu = self.mtu()
        is_up = bool(self._ask(_SIOCGIFFLAGS, _IFREQ) & _IFF_UP)
        self._check_ipv6_fits([*addresses, *routes], now_mtu if mtu is None else mtu)
        change_mtu = mtu is not None and mtu != now_mtu
        bring_up = up and not is_up
        if not (change_mtu or bring_up or addresses or routes):
            return
        with netlink() as ipr:
            if not self.created and self._before is None:
                self._before = self._state(ipr)
            if change_mtu and mtu is not None:
                with _reported("set the MTU of", self.name, self._mtu_hint(mtu)):
                    ipr.link("set", index=self.index, mtu=mtu)
                self._record(f"MTU {now_mtu}", lambda ipr: ipr.link("set", index=self.index, mtu=now_mtu))
            # Addresses while it is down: their connected routes come with the up-state, all at once.
            for address in addresses:
                self._add_address(ipr, address)
            if bring_up:
                with _reported("bring up", self.name, _admin_hint(f"ip link set {self.name} up")):
                    ipr.link("set", index=self.index, state="up")
                self._record("down", lambda ipr: ipr.link("set", index=self.index, state="down"))
            for route in routes:
                self._add_route(ipr, route)

    def _check_ipv6_fits(self, wanted: list[Interface | Network], mtu: int) -> None:
        for item in wanted:
            if item.version == 6 and mtu < _IPV6_MIN_MTU:
                raise DeviceError(
                    "configure",
                    self.name,
                    errno.EINVAL,
                    f"use an MTU of {_IPV6_MIN_MTU} or more, or no IPv6",
                    f"{item} is IPv6, which Linux turns off with an MTU below {_IPV6_MIN_MTU} ({mtu})",
                )

    def _record(self, what: str, undo: Callable[[Any], object], *, elsewhere: bool = False) -> None:
        self._undo.append(_Step(what, undo, elsewhere))

    def _add_address(self, ipr: Any, address: Interface) -> None:
        if address in map(_interface_of, ipr.get_addr(index=self.index)):
            return
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        spec = {
            "index": self.index,
            "family": family,
            "address": str(address.ip),
            "prefixlen": address.network.prefixlen,
        }
        # Without duplicate detection an IPv6 address is usable at once; there is no one else on the link.
        extra = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
        with _reported(f"add {address} to", self.name, self._address_hint(address)):
            ipr.addr("add", **spec, **extra)
        self._record(f"no address {address}", lambda ipr: ipr.addr("del", **spec))

    def _add_route(self, ipr: Any, network: Network) -> None:
        same = self._routes_to(ipr, network)
        if any(_oif(route) == self.index for route in same):
            return
        spec: dict[str, Any] = {
            "family": socket.AF_INET if network.version == 4 else socket.AF_INET6,
            "dst": str(network),
            "oif": self.index,
            "table": _RT_TABLE_MAIN,
        }
        if network.version == 4:
            spec["scope"] = _RT_SCOPE_LINK
        with _reported(f"route {network} into", self.name, self._route_hint(network, same)):
            ipr.route("add", **spec)
        self._record(f"no route {network}", lambda ipr: ipr.route("del", **spec))

    @staticmethod
    def _routes_to(ipr: Any, network: Network) -> list[Any]:
        """The main table's routes for exactly this network."""
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        found = []
        for route in ipr.get_routes(family=family):
            if _table(route) != _RT_TABLE_MAIN or route["dst_len"] != network.prefixlen:
                continue
            destination = route.get("RTA_DST")
            if destination is None or ip_address(destination) == network.network_address:
                found.append(route)
        return found

    def _pin(self, host: Address) -> None:
        family = socket.AF_INET if host.version == 4 else socket.AF_INET6
        hint = f"there must be a route to the server: see `ip route get {host}`"
        with netlink() as ipr:
            with _reported("find the route to", str(host), lambda code: hint):
                route = ipr.route("get", family=family, dst=str(host))[0]
            if route["type"] == _RTN_LOCAL:
                return
            hop = _Hop.of(route) if _oif(route) != self.index else self._hop_outside(ipr, host)
            if hop is None:
                raise DeviceError(
                    "pin the route to",
                    str(host),
                    errno.ENETUNREACH,
                    f"give it a host route: ip route add {host} via GATEWAY",
                    f"the only route to the server leads into {self.name} itself",
                )
            spec: dict[str, Any] = {
                "family": family,
                "dst": f"{host}/{host.max_prefixlen}",
                "oif": hop.oif,
                "table": _RT_TABLE_MAIN,
            }
            if hop.gateway is not None:
                # The gateway comes from a route that works; it need not be in a connected network.
                spec |= {"gateway": hop.gateway, "flags": _RTNH_F_ONLINK}
            elif hop.via is not None:
                spec |= {"via": hop.via, "flags": _RTNH_F_ONLINK}
            elif host.version == 4:
                spec["scope"] = _RT_SCOPE_LINK
            with _reported("pin the route to", str(host), _admin_hint(f"ip route add {host} …")):
                try:
                    ipr.route("add", **spec)
                except Exception as error:
                    if code_of(error) == errno.EEXIST:
                        return
                    raise
            self._record(f"no host route {host}", lambda ipr: ipr.route("del", **spec), elsewhere=True)

    def _hop_outside(self, ipr: Any, host: Address) -> _Hop | None:
        """The next hop that the main table would give without this device: longest prefix, then metric."""
        family = socket.AF_INET if host.version == 4 else socket.AF_INET6
        best: tuple[int, int] | None = None
        hop: _Hop | None = None
        for route in ipr.get_routes(family=family):
            if _table(route) != _RT_TABLE_MAIN or route["type"] != _RTN_UNICAST:
                continue
            candidate = _Hop.of(route)
            if candidate.oif in (0, self.index):
                continue
            if host not in ip_network(f"{route.get('RTA_DST') or _any_of(route)}/{route['dst_len']}"):
                continue
            rank = (route["dst_len"], -int(route.get("RTA_PRIORITY") or 0))
            if best is None or rank > best:
                best, hop = rank, candidate
        return hop

    # --------------------------------------------------------------------------------------------- undo

    def _state(self, ipr: Any) -> _Before:
        return _Before(
            addresses=list(ipr.get_addr(index=self.index)),
            # Those of protocol kernel come and go with the addresses, some a moment later.
            routes=[
                route for route in ipr.get_routes() if _oif(route) == self.index and route["proto"] != _RTPROT_KERNEL
            ],
        )

    def _undo_to(self, mark: int) -> None:
        """Take back the changes after `mark`, last first. Logs what fails, and goes on."""
        steps = self._undo[mark:]
        del self._undo[mark:]
        if self._closed and self.created:  # the kernel takes the device's own with the device
            steps = [step for step in steps if step.elsewhere]
        if not steps:
            return
        with netlink() as ipr:
            for step in reversed(steps):
                self._attempt(step.what, partial(step.undo, ipr))
            if mark == 0 and self._before is not None:
                self._put_back_lost(ipr, self._before)
                self._before = None

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            code = code_of(error)
            if code is None:
                raise
            if code not in _GONE:
                _log.warning("cannot put %s back to %s: %s", self.name, what, os.strerror(code))

    def _put_back_lost(self, ipr: Any, before: _Before) -> None:
        """Add again what the kernel dropped on the way, and drop what it made.

        Link down takes IPv6 addresses and all routes, an MTU below 1280 all of IPv6; coming back from
        there makes a new link-local address.
        """
        now = self._state(ipr)
        known = {_address_key(message) for message in before.addresses}
        renewed = any(message["scope"] == _RT_SCOPE_LINK for message in before.addresses)
        for message in now.addresses if renewed else ():
            if message["scope"] == _RT_SCOPE_LINK and _address_key(message) not in known:
                interface = _interface_of(message)
                self._attempt(
                    f"no address {interface}",
                    partial(
                        ipr.addr,
                        "del",
                        index=self.index,
                        address=str(interface.ip),
                        prefixlen=interface.network.prefixlen,
                    ),
                )
        present = {_address_key(message) for message in now.addresses}
        for message in before.addresses:
            if _address_key(message) not in present:
                self._attempt(f"address {_interface_of(message)}", partial(_replay_address, ipr, message))
        present_routes = {_route_key(route) for route in self._state(ipr).routes}
        lost = [route for route in before.routes if _route_key(route) not in present_routes]
        for route in sorted(lost, key=lambda route: route.get("RTA_GATEWAY") is not None):
            self._attempt(f"route {route.get('RTA_DST') or 'default'}", partial(_replay_route, ipr, route))

    # -------------------------------------------------------------------------------------------- hints

    def _mtu_hint(self, mtu: int) -> Callable[[int], str]:
        def hint(code: int) -> str:
            if code == errno.EINVAL:
                return "a TUN device takes 68 to 65535 bytes"
            return _admin_hint(f"ip link set {self.name} mtu {mtu}")(code)

        return hint

    def _address_hint(self, address: Interface) -> Callable[[int], str]:
        def hint(code: int) -> str:
            if code == errno.EACCES and address.version == 6:
                return f"IPv6 is off here: sysctl -w net.ipv6.conf.{self.name}.disable_ipv6=0"
            if code in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                return "this kernel has no IPv6"
            if code == errno.EEXIST:
                return f"the device has {address.ip} with another prefix length: see `ip address`"
            if code == errno.EADDRNOTAVAIL:
                return "it is no host address"
            return _admin_hint(f"ip address add {address} dev {self.name}")(code)

        return hint

    def _route_hint(self, network: Network, same: list[Any]) -> Callable[[int], str]:
        def hint(code: int) -> str:
            if code == errno.EEXIST:
                holder = next((_device_name(_oif(route)) for route in same if _oif(route)), "")
                where = f" by {holder}" if holder else ""
                if network.prefixlen == 0:
                    halves = " and ".join(map(str, network.subnets()))
                    return f"there is a default route{where}: route {halves} instead"
                return f"this network is already routed{where}: remove that route, or route a part of it"
            if code == errno.ENETDOWN:
                return f"bring {self.name} up first"
            return _admin_hint(f"ip route add {network} dev {self.name}")(code)

        return hint


@dataclass(frozen=True)
class _Step:
    """How to take one change back. `elsewhere`: it is not on the device, so it does not go with it."""

    what: str
    undo: Callable[[Any], object]
    elsewhere: bool


def _no_hint(_code: int) -> str:
    return ""


def _admin_hint(command: str) -> Callable[[int], str]:
    def hint(code: int) -> str:
        return f"run fasttun with sudo, or once: sudo {command}" if code in (errno.EPERM, errno.EACCES) else ""

    return hint


def _device_name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------- netlink messages


def _oif(route: Any) -> int:
    return int(route.get("RTA_OIF") or 0)


def _table(route: Any) -> int:
    return int(route.get("RTA_TABLE") or route["table"])


def _interface_of(message: Any) -> Interface:
    # IFA_ADDRESS is the other end's on a point-to-point address; IPv6 sends IFA_LOCAL only for those.
    return ip_interface(f"{message.get('IFA_LOCAL') or message.get('IFA_ADDRESS')}/{message['prefixlen']}")


def _address_key(message: Any) -> tuple[object, ...]:
    return (_interface_of(message), message.get("IFA_ADDRESS"))


def _route_key(route: Any) -> tuple[object, ...]:
    named = ("RTA_TABLE", "RTA_DST", "RTA_PRIORITY", "RTA_GATEWAY", "RTA_PREFSRC", "RTA_SRC")
    return (
        *(route[field] for field in ("family", "dst_len", "src_len", "tos", "type", "proto")),
        *(route.get(name) for name in named),
    )


def _replay_address(ipr: Any, message: Any) -> None:
    spec = {name: message[name] for name in ("index", "family", "prefixlen", "scope")}
    for key, name in (("local", "IFA_LOCAL"), ("address", "IFA_ADDRESS"), ("broadcast", "IFA_BROADCAST")):
        if message.get(name) is not None:
            spec[key] = message.get(name)
    if message.get("IFA_LABEL") is not None:
        spec["label"] = message.get("IFA_LABEL")
    # What the kernel takes from outside; the other flags are its own marks.
    kept = int(message.get("IFA_FLAGS") or message["flags"]) & _IFA_F_SETTABLE
    times = message.get("IFA_CACHEINFO")
    if times and times["ifa_valid"] != 0xFFFFFFFF:
        spec |= {"preferred_lft": times["ifa_preferred"], "valid_lft": times["ifa_valid"]}
    ipr.addr("add", **spec, **({"flags": kept} if kept else {}))


def _replay_route(ipr: Any, route: Any) -> None:
    spec: dict[str, Any] = {name: route[name] for name in ("family", "tos", "scope", "proto", "type")}
    spec |= {"dst": f"{route.get('RTA_DST') or _any_of(route)}/{route['dst_len']}", "oif": _oif(route)}
    spec["table"] = _table(route)
    spec["flags"] = route["flags"] & _RTNH_F_ONLINK
    for key, name in (("gateway", "RTA_GATEWAY"), ("prefsrc", "RTA_PREFSRC"), ("priority", "RTA_PRIORITY")):
        if route.get(name) is not None:
            spec[key] = route.get(name)
    if route.get("RTA_METRICS") is not None:
        spec["metrics"] = route.get("RTA_METRICS")
    ipr.route("add", **spec)


def _any_of(route: Any) -> str:
    return "0.0.0.0" if route["family"] == socket.AF_INET else "::"


# ------------------------------------------------------------------------------------------ opening by ioctl


def _open_clone(name: str) -> int:
    try:
        return os.open(CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        code = error.errno or errno.EIO
        hint = ""
        if code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            hint = "load the driver (sudo modprobe tun), or give the container --device /dev/net/tun"
        elif code in (errno.EACCES, errno.EPERM):
            hint = f"run fasttun with sudo, or let this user open {CLONE_DEVICE}"
        raise DeviceError(f"open {CLONE_DEVICE} for", name, code, hint) from error


def _wanted_features(fd: int, name: str, queues: int, vnet_header: bool) -> int:
    features = struct.unpack("I", fcntl.ioctl(fd, TUNGETFEATURES, bytes(4)))[0]
    if queues > 1 and not features & IFF_MULTI_QUEUE:
        raise DeviceError("open", name, errno.EINVAL, "use --workers 1", "this kernel has no multi-queue TUN")
    return (IFF_MULTI_QUEUE if queues > 1 else 0) | (features & IFF_VNET_HDR if vnet_header else 0)


def _exists(name: str) -> bool:
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def _examine(name: str) -> _Kind | None:
    """What an existing interface of that name is; None when there is none."""
    if not _exists(name):
        return None
    with _reported("examine", name, _no_hint), netlink() as ipr:
        link = ipr.link("get", ifname=name)[0]
    info = link.get("IFLA_LINKINFO")
    kind = (info.get("IFLA_INFO_KIND") if info else None) or ""
    data = info.get("IFLA_INFO_DATA") if info and kind == "tun" else None
    if not data or data.get("IFLA_TUN_TYPE") is None:
        return _Kind(kind, None, 0)
    if data.get("IFLA_TUN_TYPE") != IFF_TUN:
        return _Kind("tap", None, 0)
    flags = IFF_TUN if data.get("IFLA_TUN_PI") else IFF_TUN | IFF_NO_PI
    flags |= IFF_VNET_HDR if data.get("IFLA_TUN_VNET_HDR") else 0
    flags |= IFF_MULTI_QUEUE if data.get("IFLA_TUN_MULTI_QUEUE") else 0
    return _Kind(kind, flags, int(data.get("IFLA_TUN_NUM_QUEUES") or 0))


def _check_attachable(name: str, existing: _Kind, queues: int) -> int:
    """Flags that attaching needs in addition. DeviceError when it cannot be attached to."""
    if existing.kind != "tun":
        raise DeviceError(
            "attach to",
            name,
            errno.EINVAL,
            f"use another name: --device {_other_name(name)}",
            f"it is no TUN device but of kind {existing.kind or 'hardware'}",
        )
    if existing.flags is None:
        return 0
    if existing.queues:
        raise DeviceError("attach to", name, errno.EBUSY, _busy_hint(name), "another process holds it")
    if queues > 1 and not existing.flags & IFF_MULTI_QUEUE:
        raise DeviceError(
            "attach to",
            name,
            errno.EINVAL,
            f"use --workers 1, or make it anew: ip link del {name}; ip tuntap add dev {name} mode tun multi_queue",
            f"it has one queue, and {queues} are needed",
        )
    return existing.flags & IFF_MULTI_QUEUE


def _attach(fd: int, name: str, flags: int) -> str:
    """TUNSETIFF; the device's name, from the kernel when `name` is a pattern."""
    try:
        answer = fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    except OSError as error:
        code = error.errno or errno.EIO
        raise DeviceError("open", name, code, _attach_hint(name, code)) from error
    return str(_IFREQ.unpack(answer)[0].rstrip(b"\0").decode())


def _attach_hint(name: str, code: int) -> str:
    if code in (errno.EPERM, errno.EACCES):
        return (
            "run fasttun with sudo, or make a device for this user once: "
            f"sudo ip tuntap add dev {name} mode tun user $USER"
        )
    if code == errno.EBUSY:
        return _busy_hint(name)
    if code == errno.EINVAL:
        return "the name is not a possible one, or belongs to a device that is no TUN or has other queues"
    if code == errno.E2BIG:
        return "the kernel gives no more queues: use fewer --workers"
    return ""


def _busy_hint(name: str) -> str:
    return f"another process holds {name}: stop it, or use another name: --device {_other_name(name)}"


def _other_name(name: str) -> str:
    stem = name.rstrip("0123456789")
    number = name[len(stem) :]
    return f"{stem}{int(number) + 1 if number else 1}"


def _current(fd: int) -> tuple[bytes, int]:
    name, flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
    return name.rstrip(b"\0"), flags


def _current_name(fd: int) -> bytes:
    return _current(fd)[0]


def _flags(fd: int, name: str) -> int:
    try:
        return _current(fd)[1]
    except OSError as error:
        raise DeviceError("query", name, error.errno or errno.EIO) from error


def _set_offloads(fd: int, name: str) -> frozenset[str]:
    """Fix the vnet header's length, and ask for the most that the kernel gives."""
    try:
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_LENGTH))
    except OSError as error:
        raise DeviceError("set the vnet header of", name, error.errno or errno.EIO) from error
    for offloads in _OFFLOAD_LADDER:
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, sum(_OFFLOADS[offload] for offload in offloads))
        except OSError:
            continue
        return offloads
    return frozenset()


def _restorer(fd: int, name: str, before: int, actual: int) -> Callable[[], None] | None:
    """How to give an attached device its own flags back, once all descriptors are closed.

    They live on in a persistent device, and only TUNSETIFF sets them (drivers/net/tun.c, tun_set_iff).
    """
    kept = IFF_NO_PI | IFF_VNET_HDR
    if before & kept == actual & kept and not actual & IFF_VNET_HDR:
        return None
    header_length = struct.unpack("i", fcntl.ioctl(fd, TUNGETVNETHDRSZ, bytes(4)))[0]

    def restore() -> None:
        if not _exists(name):  # deleted meanwhile, and TUNSETIFF would make a new one
            return
        try:
            again = _open_clone(name)
            try:
                _attach(again, name, before)
                fcntl.ioctl(again, TUNSETVNETHDRSZ, struct.pack("i", header_length))
                fcntl.ioctl(again, TUNSETOFFLOAD, 0)
            finally:
                os.close(again)
        except OSError as error:
            if _exists(name):
                _log.warning("the packet headers of %s stay as fasttun set them: %s", name, error)

    return restore
