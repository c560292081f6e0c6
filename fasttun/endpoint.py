"""The outer side: endpoints, names, and the UDP socket.

A name becomes `Endpoint`s by `resolve`; `open_udp` gives the one socket a worker forwards through.
Not for: choosing a peer or sending (the engine), nor MTU (`fasttun.mtu`).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import zip_longest
from typing import Any

from .errors import EndpointError

__all__ = ["SOCKET_BUFFER", "Endpoint", "open_udp", "resolve", "source_control", "tell_local_address"]

SOCKET_BUFFER = 7 << 20
"""Bytes asked for each direction. The default (208 KiB) is full after three coalesced reads."""

# linux/in.h, linux/in6.h: Python's socket module names none of these.
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
_PMTUDISC_WANT = 1
_IP_PKTINFO = 8
_IPV6_RECVPKTINFO = 49
# asm-generic/socket.h
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

_log = logging.getLogger(__name__)
_told_capped = False


@dataclass(frozen=True)
class Endpoint:
    """One address and port outside the tunnel. `scope_id`: a link-local address's interface index, else 0."""

    host: IPv4Address | IPv6Address
    port: int
    scope_id: int = 0

    @classmethod
    def from_sockaddr(cls, address: tuple[Any, ...]) -> Endpoint:
        """From what `recvfrom` gives, for either family; an IPv4-mapped address becomes IPv4."""
        host = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(host, IPv6Address) and host.ipv4_mapped is not None:
            host = host.ipv4_mapped
        scope_id = int(address[3]) if len(address) > 3 and host.version == 6 else 0
        return cls(host, int(address[1]), scope_id)

    def sockaddr(self, family: int) -> tuple[Any, ...]:
        """The tuple for calls on a socket of `family`; IPv4 as ::ffff:a.b.c.d on an AF_INET6 socket.

        EndpointError (EAFNOSUPPORT) for an IPv6 host on an AF_INET socket.
        """
        if family == socket.AF_INET6:
            host = f"::ffff:{self.host}" if self.host.version == 4 else str(self.host)
            return (host, self.port, 0, self.scope_id)
        if self.host.version == 6:
            raise EndpointError("reach", str(self), errno.EAFNOSUPPORT, "the socket is an IPv4 one")
        return (str(self.host), self.port)

    def __str__(self) -> str:
        if self.host.version == 4:
            return f"{self.host}:{self.port}"
        return f"[{self.host}{_scope_suffix(self.scope_id)}]:{self.port}"


def _scope_suffix(scope_id: int) -> str:
    if not scope_id:
        return ""
    try:
        return f"%{socket.if_indextoname(scope_id)}"
    except OSError:  # the interface is gone, its number still tells
        return f"%{scope_id}"


def _scope_id(literal: str, scope: str | None, operation: str) -> int:
    if not scope:
        return 0
    if scope.isdecimal():
        return int(scope)
    try:
        return socket.if_nametoindex(scope)
    except OSError as error:
        raise EndpointError(
            operation, literal, errno.ENODEV, f"there is no interface {scope}: see `ip link`"
        ) from error


def _literal(text: str, port: int, operation: str) -> Endpoint | None:
    """The endpoint when `text` is an IP address (with or without %scope), else None."""
    try:
        host = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(host, IPv4Address):
        return Endpoint(host, port)
    return Endpoint(IPv6Address(int(host)), port, _scope_id(text, host.scope_id, operation))


def resolve(host: str, port: int) -> list[Endpoint]:
    """All endpoints of a name, at least one; a literal address needs no resolver.

    In getaddrinfo's order (RFC 6724), families taking turns so that the next try uses the other one
    (RFC 8305 §4). EndpointError names the host; its errno is then getaddrinfo's EAI_ code.
    """
    endpoint = _literal(host, port, "resolve")
    if endpoint is not None:
        return [endpoint]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, proto=socket.IPPROTO_UDP)
    except socket.gaierror as error:
        raise EndpointError(
            "resolve", host, error.errno or errno.EIO, _resolver_hint(error.errno), error.strerror or ""
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a label too long or empty, a NUL byte
        raise EndpointError(
            "resolve", repr(host), errno.EINVAL, "give a host name or an IP address", "not a host name"
        ) from error
    endpoints = list(dict.fromkeys(Endpoint.from_sockaddr(entry[4]) for entry in found))
    if not endpoints:
        raise EndpointError("resolve", host, socket.EAI_NODATA, reason="the name has no address")
    first = [e for e in endpoints if e.host.version == endpoints[0].host.version]
    other = [e for e in endpoints if e.host.version != endpoints[0].host.version]
    return [e for pair in zip_longest(first, other) for e in pair if e is not None]


def _resolver_hint(code: int | None) -> str:
    if code == socket.EAI_AGAIN:
        return "the name server does not answer: try again, or give an IP address"
    return "check the spelling, or give an IP address"


def open_udp(*, bind: str | None, port: int, family: int, reuse_port: bool = False) -> socket.socket:
    """A bound, non-blocking UDP socket with large buffers; the caller closes it. Raises EndpointError.

    `bind`: IPv4 or IPv6 literal (with %scope), or None for every address of this host.
    `port`: 0 = one the kernel chooses. `reuse_port`: several sockets share the port (SO_REUSEPORT).
    `family`: AF_INET, AF_INET6, or AF_UNSPEC for bind's own. AF_INET6 and AF_UNSPEC without `bind` take IPv4
    too, and become AF_INET where the kernel has no IPv6: read `.family` of what comes back.
    Datagrams above the path MTU are fragmented here, others carry DF (IP_PMTUDISC_WANT).
    """
    subject = f"{f'[{bind}]' if bind and ':' in bind else bind or '*'}:{port}"
    local = None
    if bind is not None:
        local = _literal(bind, port, "bind")
        if local is None:
            raise EndpointError("bind", subject, errno.EINVAL, "give an address of this host", "not an IP address")
        bind_family = socket.AF_INET6 if local.host.version == 6 else socket.AF_INET
        if family == socket.AF_UNSPEC:
            family = bind_family
        elif family != bind_family:
            raise EndpointError(
                "bind",
                subject,
                errno.EAFNOSUPPORT,
                "bind to an address of the server's family (IPv4 or IPv6)",
            )
    elif family == socket.AF_UNSPEC:
        family = socket.AF_INET6
    try:
        try:
            return _open(family, local, port, reuse_port)
        except OSError as error:
            no_ipv6 = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)
            if not (no_ipv6 and family == socket.AF_INET6 and bind is None):
                raise
            return _open(socket.AF_INET, None, port, reuse_port)
    except OSError as error:
        code = error.errno or errno.EIO
        raise EndpointError("bind", subject, code, _bind_hint(code, port)) from error


def _open(family: int, local: Endpoint | None, port: int, reuse_port: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(local is not None))
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_WANT)
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_WANT)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _enlarge_buffers(sock)
        if local is not None:
            sock.bind(local.sockaddr(family))
        else:
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    except BaseException:
        sock.close()
        raise
    return sock


def tell_local_address(sock: socket.socket, on: bool = True) -> bool:
    """Makes `sock` report the local address of each datagram (IP_PKTINFO), or not; False for other families."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, on)
    elif sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, on)
    else:
        return False
    return True


def source_control(family: int, local: IPv4Address | IPv6Address) -> tuple[int, int, bytes]:
    """The control message that makes a datagram leave from `local`. family: of the socket that sends it."""
    if family == socket.AF_INET:
        return socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, local.packed, bytes(4))
    mapped = local.packed if local.version == 6 else bytes(10) + b"\xff\xff" + local.packed
    return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16si", mapped, 0)


def _enlarge_buffers(sock: socket.socket) -> None:
    global _told_capped
    granted = {}
    for name, force, plain in (
        ("rmem_max", _SO_RCVBUFFORCE, socket.SO_RCVBUF),
        ("wmem_max", _SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, SOCKET_BUFFER)
        except PermissionError:  # needs CAP_NET_ADMIN; the plain option is capped, never refused
            sock.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BUFFER)
        # The kernel keeps and reports twice the value, for its own bookkeeping (socket(7)).
        granted[name] = sock.getsockopt(socket.SOL_SOCKET, plain) // 2
    if min(granted.values()) < SOCKET_BUFFER and not _told_capped:
        _told_capped = True
        _log.info(
            "socket buffers are %s bytes, not %d: bulk transfers will be slower; as root: %s",
            "/".join(str(value) for value in granted.values()),
            SOCKET_BUFFER,
            "sysctl -w " + " ".join(f"net.core.{name}={SOCKET_BUFFER}" for name in granted),
        )


def _bind_hint(code: int, port: int) -> str:
    if code == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else port - 1
        return f"another process has this port: try --port {other}, or find it with `ss -lunp sport = {port}`"
    if code == errno.EADDRNOTAVAIL:
        return "it is no address of this host: see `ip address`"
    if code in (errno.EACCES, errno.EPERM) and port < 1024:
        return "ports below 1024 need root"
    if code == errno.EAFNOSUPPORT:
        return "this kernel has no IPv6"
    if code in (errno.EINVAL, errno.ENODEV):
        return "a link-local address needs its interface, as in fe80::1%eth0"
    return ""
