"""The cross-platform control protocol (wireguard.com/xplatform): what `wg` speaks to a device in userspace.

Here are its words alone: bytes to requests (`Requests`), a request to a device and the answer (`answer`).
A set transaction is read to its end and checked whole before any of it is applied, so a bad line changes nothing
(wireguard-go has by then applied the lines before it). Once checked, what can still fail is the system's
part, the port and the mark, which come first.
Not for: the socket (`control`).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..endpoint import Endpoint, resolve
from ..errors import ConfigurationError, FasttunError
from .keys import KEY_LENGTH, PresharedKey, PrivateKey, PublicKey

if TYPE_CHECKING:
    from ..stats import WireGuardPeer
    from .config import PeerConfig

__all__ = ["MAX_LINE", "MAX_REQUEST", "Device", "Get", "PeerChange", "ProtocolError", "Requests", "Set", "answer"]

MAX_LINE = 1024
"""Bytes; the longest that means anything has some 120 (an endpoint with a zone)."""
MAX_REQUEST = 16 << 20
"""Bytes of one transaction, which is held until its end: some 300,000 allowed IPs."""

_UNKNOWN = 55
"""What wireguard-go answers when it knows no better (ENOANO)."""

_log = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Device(Protocol):
    """What the protocol drives: the live side of `WireGuard`. Every call may come from any thread."""

    @property
    def private_key(self) -> PrivateKey | None: ...
    @property
    def listen_port(self) -> int: ...
    @property
    def fwmark(self) -> int: ...
    @property
    def peers(self) -> Sequence[WireGuardPeer]: ...
    def set_private_key(self, private_key: PrivateKey | None, /) -> None: ...
    def set_listen_port(self, port: int, /) -> None: ...
    def set_fwmark(self, fwmark: int, /) -> None: ...
    def add_peer(self, config: PeerConfig, /) -> None: ...
    def remove_peer(self, public_key: PublicKey, /) -> None: ...
    def replace_peers(self) -> None: ...
    def update_peer(
        self,
        public_key: PublicKey,
        /,
        *,
        preshared_key: PresharedKey | None = ...,
        endpoint: Endpoint = ...,
        persistent_keepalive: int = ...,
        allowed_ips: Iterable[Network] = ...,
        replace_allowed_ips: bool = ...,
        remove_allowed_ips: Iterable[Network] = ...,
    ) -> None: ...


class ProtocolError(FasttunError):
    """A request that cannot be taken. `code`: the errno that answers it. `fatal`: where the next request begins
    is not known, so the connection must end. The message names the key of a line, never its value."""

    def __init__(self, code: int, problem: str, *, fatal: bool = False) -> None:
        super().__init__(problem)
        self.code = code
        self.fatal = fatal

    def answer(self) -> bytes:
        return _status(self.code)


@dataclass(frozen=True)
class Get:
    """get=1: everything about the device and its peers."""


@dataclass
class PeerChange:
    """What one `public_key` line and those after it ask for. None: leave it as it is."""

    public_key: PublicKey
    remove: bool = False
    update_only: bool = False
    preshared_key: PresharedKey | None = None
    """32 zero bytes: none from now on."""
    endpoint: Endpoint | None = None
    persistent_keepalive: int | None = None
    replace_allowed_ips: bool = False
    allowed_ips: dict[Network, bool] = field(default_factory=dict)
    """True to add, False to take away; the last word on each."""

    def networks(self, wanted: bool) -> tuple[Network, ...]:
        return tuple(network for network, add in self.allowed_ips.items() if add is wanted)


@dataclass
class Set:
    """set=1. None: leave it as it is."""

    private_key: PrivateKey | None = None
    no_private_key: bool = False
    listen_port: int | None = None
    fwmark: int | None = None
    replace_peers: bool = False
    peers: list[PeerChange] = field(default_factory=list)


class Requests:
    """Cuts a stream of bytes into requests. Holds one unfinished request, of `MAX_REQUEST` bytes at most."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._searched = 0
        self._line = 0  # where the last line begins

    def __bool__(self) -> bool:
        """Whether bytes are held: a request that has begun, or whole ones that `next` has not been asked for."""
        return bool(self._data)

    def feed(self, data: bytes) -> None:
        """Take more bytes in. Call `next` until it gives None before feeding again."""
        self._data += data

    def next(self) -> Get | Set | None:
        """The next whole request, None when more bytes are needed. Raises ProtocolError, for one request each."""
        end = self._data.find(b"\n\n", self._searched)
        self._check(end)
        if end < 0:
            self._searched = max(0, len(self._data) - 1)
            return None
        lines = bytes(self._data[:end]).split(b"\n")
        del self._data[: end + 2]
        self._searched = self._line = 0
        return _parse(lines)

    def _check(self, end: int) -> None:
        """Refuse early what will never become a request."""
        data = self._data
        first, newline, _ = bytes(data[: MAX_LINE + 1]).partition(b"\n")
        if newline and first not in (b"get=1", b"set=1"):
            raise ProtocolError(errno.EPROTO, "neither get=1 nor set=1", fatal=True)
        self._line = max(self._line, data.rfind(b"\n", self._line) + 1)
        if end < 0 and (len(data) - self._line > MAX_LINE or len(data) > MAX_REQUEST):
            raise ProtocolError(errno.EPROTO, "a line or a transaction without an end", fatal=True)


# ------------------------------------------------------------------------------------------ reading


def _parse(lines: list[bytes]) -> Get | Set:
    if lines[0] == b"get=1":
        if len(lines) > 1:
            raise ProtocolError(errno.EINVAL, "get=1 takes no further lines")
        return Get()
    request = Set()
    read: Callable[[str, str], None] = _DeviceLines(request).read
    for line in lines[1:]:
        key, equals, value = line.decode("latin-1").partition("=")
        if not equals or len(line) > MAX_LINE:
            raise ProtocolError(errno.EPROTO, "a line is not KEY=VALUE")
        if key == "public_key":
            peer = PeerChange(PublicKey(_key(key, value)))
            request.peers.append(peer)
            read = _PeerLines(peer).read
        else:
            read(key, value)
    return request


class _Lines:
    """Reads the lines about one thing, each by the method that is named after its key."""

    _keys: tuple[str, ...]

    def read(self, key: str, value: str) -> None:
        if key not in self._keys:
            raise ProtocolError(errno.EINVAL, f"{key[:40]!r}: there is no such key here")
        getattr(self, key)(value)


class _DeviceLines(_Lines):
    _keys = ("private_key", "listen_port", "fwmark", "replace_peers")

    def __init__(self, request: Set) -> None:
        self._to = request

    def private_key(self, value: str) -> None:
        data = _key("private_key", value)
        self._to.no_private_key = not any(data)
        self._to.private_key = PrivateKey(data) if any(data) else None

    def listen_port(self, value: str) -> None:
        self._to.listen_port = _number("listen_port", value, 0xFFFF)

    def fwmark(self, value: str) -> None:
        self._to.fwmark = _number("fwmark", value, 0xFFFFFFFF)

    def replace_peers(self, value: str) -> None:
        self._to.replace_peers = _true("replace_peers", value)


class _PeerLines(_Lines):
    _keys = (
        "remove", "update_only", "preshared_key", "endpoint", "persistent_keepalive_interval",
        "replace_allowed_ips", "allowed_ip", "protocol_version",
    )  # fmt: skip

    def __init__(self, peer: PeerChange) -> None:
        self._to = peer

    def remove(self, value: str) -> None:
        self._to.remove = _true("remove", value)

    def update_only(self, value: str) -> None:
        self._to.update_only = _true("update_only", value)

    def preshared_key(self, value: str) -> None:
        self._to.preshared_key = PresharedKey(_key("preshared_key", value))

    def endpoint(self, value: str) -> None:
        self._to.endpoint = _endpoint(value)

    def persistent_keepalive_interval(self, value: str) -> None:
        self._to.persistent_keepalive = _number("persistent_keepalive_interval", value, 0xFFFF)

    def replace_allowed_ips(self, value: str) -> None:
        self._to.replace_allowed_ips = _true("replace_allowed_ips", value)
        self._to.allowed_ips.clear()

    def allowed_ip(self, value: str) -> None:
        add = not value.startswith("-")
        network = _network(value if add else value[1:])
        self._to.allowed_ips.pop(network, None)
        self._to.allowed_ips[network] = add

    def protocol_version(self, value: str) -> None:
        if value != "1":
            raise ProtocolError(errno.EINVAL, "protocol_version: only 1 is known")


def _key(key: str, value: str) -> bytes:
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * KEY_LENGTH}}}", value):
        raise ProtocolError(errno.EINVAL, f"{key}: is not {2 * KEY_LENGTH} hexadecimal digits")
    return bytes.fromhex(value)


def _number(key: str, value: str, largest: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", value) or int(value) > largest:
        raise ProtocolError(errno.EINVAL, f"{key}: is not a number from 0 to {largest}")
    return int(value)


def _true(key: str, value: str) -> bool:
    if value != "true":
        raise ProtocolError(errno.EINVAL, f"{key}: the only value is true")
    return True


def _endpoint(value: str) -> Endpoint:
    """ADDRESS:PORT or [ADDRESS]:PORT; names are the client's to look up."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+(?:%[^\]%\s]{1,40})?)\]|([0-9.]+)):([0-9]{1,5})", value, re.ASCII)
    problem = ProtocolError(errno.EINVAL, "endpoint: is not ADDRESS:PORT or [ADDRESS]:PORT")
    if match is None or not 0 < int(match[3]) <= 0xFFFF:
        raise problem
    host, port = match[1] or match[2], int(match[3])
    try:
        if ipaddress.ip_address(host).version != (6 if match[1] else 4):
            raise problem
        endpoint = resolve(host, port)[0]
    except (ValueError, FasttunError):
        raise problem from None
    if endpoint.scope_id > 0x7FFFFFFF:
        raise problem
    return endpoint


def _network(value: str) -> Network:
    """ADDRESS/BITS; bits beyond them are ignored. An IPv4-mapped IPv6 network would mean IPv4 traffic: refused."""
    address, _, bits = value.partition("/")
    if re.fullmatch("[0-9]{1,3}", bits, re.ASCII) and "%" not in address:
        try:
            network = ipaddress.ip_network((address, int(bits)), strict=False)
        except ValueError:
            pass
        else:
            if network.version == 4 or network.network_address.ipv4_mapped is None or network.prefixlen < 96:
                return network
    raise ProtocolError(errno.EINVAL, "allowed_ip: is not ADDRESS/BITS")


# ---------------------------------------------------------------------------------------- answering


def answer(request: Get | Set, device: Device) -> bytes:
    """Do what is asked of the device; the whole answer, errno and blank line included. Raises nothing."""
    try:
        if isinstance(request, Get):
            return "".join(f"{key}={value}\n" for key, value in _described(device)).encode() + _status(0)
        _apply(request, device)
    except Exception as error:
        code = _errno_of(error)
        _log.warning("control socket: %s", error if isinstance(error, FasttunError) else type(error).__name__)
        return _status(code)
    return _status(0)


def _status(code: int) -> bytes:
    """Negative, as wireguard-go's: `wg` negates it again to name the error."""
    return b"errno=%d\n\n" % -code


def _errno_of(error: Exception) -> int:
    if isinstance(error, ProtocolError):
        return error.code
    if isinstance(error, ConfigurationError):
        return errno.EINVAL
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return error.errno
    return _UNKNOWN


def _described(device: Device) -> Iterator[tuple[str, Any]]:
    key = device.private_key
    if key is not None:
        yield "private_key", key.to_bytes().hex()
    for name, number in (("listen_port", device.listen_port), ("fwmark", device.fwmark)):
        if number:
            yield name, number
    for peer in device.peers:
        yield from _described_peer(peer)


def _described_peer(peer: WireGuardPeer) -> Iterator[tuple[str, Any]]:
    secret = peer.preshared_key
    seconds = int(peer.last_handshake)
    yield "public_key", bytes(peer.public_key).hex()
    yield "preshared_key", (secret.to_bytes() if secret is not None else bytes(KEY_LENGTH)).hex()
    yield "protocol_version", 1
    if peer.endpoint is not None:
        yield "endpoint", peer.endpoint
    yield "last_handshake_time_sec", seconds
    yield "last_handshake_time_nsec", int((peer.last_handshake - seconds) * 1e9)
    yield "tx_bytes", peer.tx_bytes
    yield "rx_bytes", peer.rx_bytes
    yield "persistent_keepalive_interval", peer.persistent_keepalive
    for network in peer.allowed_ips:
        yield "allowed_ip", network


def _apply(request: Set, device: Device) -> None:
    if request.fwmark is not None:
        device.set_fwmark(request.fwmark)
    if request.listen_port is not None:
        device.set_listen_port(request.listen_port)
    if request.private_key is not None or request.no_private_key:
        device.set_private_key(request.private_key)
    if request.replace_peers:
        device.replace_peers()
    if not request.peers:
        return
    key = device.private_key
    own = key.public if key is not None else None
    known = {peer.public_key for peer in device.peers}
    for peer in request.peers:
        if peer.public_key != own:
            _apply_peer(peer, device, known)


def _apply_peer(change: PeerChange, device: Device, known: set[PublicKey]) -> None:
    """`known`: the device's peers, kept up to date."""
    if change.remove:
        device.remove_peer(change.public_key)
        known.discard(change.public_key)
    elif change.public_key in known:
        _update_peer(change, device)
    elif not change.update_only:
        device.add_peer(_new_peer(change))
        known.add(change.public_key)


def _new_peer(change: PeerChange) -> PeerConfig:
    from .config import PeerConfig

    return PeerConfig(
        public_key=change.public_key,
        preshared_key=change.preshared_key or None,
        allowed_ips=change.networks(True),
        endpoint=str(change.endpoint) if change.endpoint is not None else None,
        persistent_keepalive=change.persistent_keepalive or 0,
    )


def _update_peer(change: PeerChange, device: Device) -> None:
    given: dict[str, Any] = {}
    if change.preshared_key is not None:
        given["preshared_key"] = change.preshared_key or None
    if change.endpoint is not None:
        given["endpoint"] = change.endpoint
    if change.persistent_keepalive is not None:
        given["persistent_keepalive"] = change.persistent_keepalive
    device.update_peer(
        change.public_key,
        **given,
        allowed_ips=change.networks(True),
        replace_allowed_ips=change.replace_allowed_ips,
        remove_allowed_ips=change.networks(False),
    )
