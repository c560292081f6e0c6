"""What a tunnel is to be: one validated, immutable value, made by the command line or by a script.

Every rule that needs no system call is checked here, once. Not for: anything that asks the machine.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import Any

from .errors import ConfigurationError

__all__ = ["DEFAULT_DEVICE", "DEFAULT_PORT", "FRAMINGS", "MAX_MTU", "MIN_MTU", "TunnelConfig"]

DEFAULT_PORT = 1234
DEFAULT_DEVICE = "tun0"
FRAMINGS = ("auto", "raw", "pi")
MIN_MTU = 576
"""Bytes: what every IPv4 host must be able to receive (RFC 791 §3.1)."""
MAX_MTU = 65535
MAX_NAME = 15
"""Characters of an interface's name: IFNAMSIZ less the NUL (linux/if.h)."""
MAX_WORKERS = 64
MAX_BUSY_POLL_US = 1000

Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class TunnelConfig:
    """The configuration of one plain tunnel. Raises `ConfigurationError` that names the field.

    `listen` or `server`: wait for the other side, or the name or address of the side that waits.
    `port`: UDP port of the listener. `device`: the TUN device's name; made, or used where it exists.
    `address`: of this host inside. `route`: networks to reach through the tunnel. `allow`: a listener's senders.
    These three: one string or `ipaddress` object, or an iterable of them.
    `bind`: own address to listen on or to send from. `framing`: auto, raw or pi (docs/wire.md).
    `workers`: threads, each with a queue of the device and a socket. `busy_poll_us`: spin this long before sleeping.
    `tun_offload`, `udp_gso`, `udp_gro`, `batch`: False switches one off, for measuring.
    `mtu`: bytes of the largest inner packet, or None or "auto" to derive it from the path to the peer.
    `fast_path`: the kernel carries the packets of known peers (docs/design.md, "Fast path").
    `tun_fd`, `udp_fd`: descriptors to use in place of `device` and of an own socket; the caller keeps them.
    """

    listen: bool = False
    server: str | None = None
    port: int = DEFAULT_PORT
    device: str = DEFAULT_DEVICE
    address: tuple[Interface, ...] = ()
    route: tuple[Network, ...] = ()
    mtu: int | None = None
    framing: str = "auto"
    bind: str | None = None
    allow: tuple[Network, ...] = ()
    workers: int = 1
    tun_fd: int | None = None
    udp_fd: int | None = None
    tun_offload: bool = True
    udp_gso: bool = True
    udp_gro: bool = True
    batch: bool = True
    busy_poll_us: int = 0
    fast_path: bool = False

    def __post_init__(self) -> None:
        settle = _Settle(self)
        self._check_role()
        settle.integer("port", 1, 65535, "a UDP port")
        settle.set("device", _device_name(self.device))
        settle.set("address", _parse_all("address", self.address, _interface))
        settle.set("route", _parse_all("route", self.route, _network))
        settle.set("allow", _parse_all("allow", self.allow, _network))
        if self.mtu == "auto":  # type: ignore[comparison-overlap]
            settle.set("mtu", None)
        if self.mtu is not None:
            settle.integer("mtu", MIN_MTU, MAX_MTU, "bytes, or auto")
        if self.framing not in FRAMINGS:
            raise ConfigurationError("framing", f"{self.framing!r} is not a framing", "use auto, raw or pi")
        if self.bind is not None:
            settle.set("bind", _bind_address(self.bind))
        settle.integer("workers", 1, MAX_WORKERS, "threads")
        settle.integer("busy_poll_us", 0, MAX_BUSY_POLL_US, "microseconds")
        for name in ("tun_fd", "udp_fd"):
            if getattr(self, name) is not None:
                settle.integer(name, 0, 2**31 - 1, "an open descriptor")
        self._check_combinations()

    def _check_role(self) -> None:
        if self.listen and self.server is not None:
            raise ConfigurationError("listen", "cannot be used together with server",
                                     "one side listens, the other names it as server")
        if not self.listen and self.server is None and self.udp_fd is None:
            raise ConfigurationError("listen", "neither listen nor server is given",
                                     "listen on one host, name that host as server on the other")
        if self.server is not None and not str(self.server).strip():
            raise ConfigurationError("server", "is empty", "give the listening host's name or address")

    def _check_combinations(self) -> None:
        if self.allow and not self.listen:
            raise ConfigurationError("allow", "has no use with server",
                                     "a client takes datagrams from its server alone")
        if self.workers > 1 and (self.tun_fd is not None or self.udp_fd is not None):
            raise ConfigurationError("workers", "descriptors serve one worker", "use workers=1")
        if self.fast_path and (self.tun_fd is not None or self.udp_fd is not None):
            raise ConfigurationError("fast_path", "cannot be had with descriptors", "name a device instead")
        if self.fast_path and self.framing == "pi":
            raise ConfigurationError("fast_path", "carries packets without packet information alone",
                                     "use framing raw or auto")
        if self.mtu is not None and self.mtu < 1280:
            v6 = [a for a in self.address if a.version == 6] + [r for r in self.route if r.version == 6]
            if v6:
                raise ConfigurationError("mtu", f"{self.mtu} is below 1280, which IPv6 needs for {v6[0]}",
                                         "use 1280 or more, or IPv4 alone")
        if self.tun_fd is not None and self.route:
            raise ConfigurationError("route", "cannot be set on a descriptor", "set it on the device yourself")

    def replace(self, **changes: Any) -> TunnelConfig:
        """A copy with `changes`, validated again."""
        return dataclasses.replace(self, **changes)


class _Settle:
    """Writes normalised values into the frozen dataclass while it is being made."""

    def __init__(self, config: TunnelConfig) -> None:
        self.config = config

    def set(self, name: str, value: object) -> None:
        object.__setattr__(self.config, name, value)

    def integer(self, name: str, low: int, high: int, unit: str) -> None:
        given = getattr(self.config, name)
        try:
            value = int(given) if isinstance(given, str) else operator.index(given)
        except (TypeError, ValueError):
            raise ConfigurationError(name, f"{given!r} is not a whole number",
                                     f"use {low} to {high} ({unit})") from None
        if not low <= value <= high:
            raise ConfigurationError(name, f"{value} is out of range", f"use {low} to {high} ({unit})")
        self.set(name, value)


def _device_name(name: object) -> str:
    hint = f"use 1 to {MAX_NAME} characters without spaces or slashes, such as tun0"
    if not isinstance(name, str) or not name:
        raise ConfigurationError("device", "is empty", hint)
    if len(name.encode()) > MAX_NAME:
        raise ConfigurationError("device", f"{name!r} has {len(name.encode())} characters", hint)
    if name in (".", "..") or any(c.isspace() or c in "/:\0" for c in name):
        raise ConfigurationError("device", f"{name!r} is not an interface name", hint)
    return name


def _bind_address(text: object) -> str:
    host = str(text).strip()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ConfigurationError("bind", f"{host!r} is not an IP address",
                                 "use an address of this host, such as 192.0.2.1 or 2001:db8::1") from None
    return host


def _interface(text: object) -> Interface:
    return ipaddress.ip_interface(text)  # type: ignore[arg-type]


def _network(text: object) -> Network:
    return ipaddress.ip_network(text, strict=False)  # type: ignore[arg-type]


def _parse_all(field: str, given: object, parse: Any) -> tuple[Any, ...]:
    many: Iterable[object]
    if given is None:
        many = ()
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes, IPv4Network, IPv6Network)):
        many = given
    else:
        many = (given,)
    parsed = []
    for item in many:
        try:
            parsed.append(parse(item.strip() if isinstance(item, str) else item))
        except ValueError:
            example = "10.7.0.1/24" if field == "address" else "10.7.0.0/24"
            raise ConfigurationError(field, f"{str(item)!r} is not an address with a prefix length",
                                     f"use CIDR notation, such as {example} or 2001:db8::/64") from None
    return tuple(dict.fromkeys(parsed))
