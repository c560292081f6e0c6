"""How large an inner packet may be: header arithmetic, and the route's MTU to the peer.

Not for: fragmentation, or setting the MTU of a device (`fasttun.device`).
"""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

from .errors import EndpointError
from .netlink import Place, code_of, netlink

__all__ = ["PI_LENGTH", "address_mtu", "inner_mtu", "overhead", "path_mtu"]

PI_LENGTH = 4
"""Bytes of packet information before a packet in framing "pi" (`struct tun_pi`, linux/if_tun.h)."""
UDP_HEADER = 8
IP_HEADER = {4: 20, 6: 40}
_FRAMING = {"raw": 0, "pi": PI_LENGTH}
_MAX_UDP_PAYLOAD = {4: 65535 - 20 - 8, 6: 65535 - 8}
"""Bytes: IPv4's total length (RFC 791 §3.1) and UDP's length (RFC 768) are 16 bits; no jumbograms."""

_IP_MTU = 14  # linux/in.h; Python's socket module names neither
_IPV6_MTU = 24  # linux/in6.h
_DISCARD_PORT = 9  # RFC 863: any port does, nothing is sent


def overhead(outer_version: int, framing: str) -> int:
    """Bytes that the tunnel adds to an inner packet: IP header without options, UDP header, framing.

    `outer_version`: 4 or 6. `framing`: "raw" or "pi". ValueError for others.
    """
    if outer_version not in IP_HEADER:
        raise ValueError(f"outer_version must be 4 or 6, not {outer_version!r}")
    if framing not in _FRAMING:
        raise ValueError(f"framing must be 'raw' or 'pi', not {framing!r}")
    return IP_HEADER[outer_version] + UDP_HEADER + _FRAMING[framing]


def inner_mtu(path_mtu: int, outer_version: int, framing: str) -> int:
    """Bytes of the largest inner packet whose datagram crosses a path of `path_mtu` bytes in one piece.

    ValueError when the path does not hold the headers and one byte.
    """
    largest = min(path_mtu - overhead(outer_version, framing), _MAX_UDP_PAYLOAD[outer_version] - _FRAMING[framing])
    if largest < 1:
        raise ValueError(f"a path MTU of {path_mtu} bytes leaves no room for a packet")
    return largest


def path_mtu(host: IPv4Address | IPv6Address, scope_id: int = 0, *, local: IPv4Address | None = None) -> int:
    """Bytes: the MTU of today's route to `host`, with what path MTU discovery has learnt. Sends nothing.

    `scope_id`: interface index for a link-local host without %scope. `local`: for datagrams from this address of
    an IPv4 `host`'s peer. EndpointError (ENETUNREACH) when there is no route.
    """
    host = ip_address(host)
    if isinstance(host, IPv6Address) and host.ipv4_mapped is not None:
        host = host.ipv4_mapped
    try:
        if isinstance(host, IPv4Address):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                if local is not None:
                    probe.bind((str(local), 0))
                probe.connect((str(host), _DISCARD_PORT))
                return probe.getsockopt(socket.IPPROTO_IP, _IP_MTU)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            # Given a tuple, Python ignores a %scope in the text.
            probe.connect((str(host), _DISCARD_PORT, 0, scope_id or _scope_id(host)))
            return probe.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU)
    except OSError as error:
        raise EndpointError(
            "find the path MTU to", str(host), error.errno or errno.ENODEV, _route_hint(error.errno, host)
        ) from error


def _scope_id(host: IPv6Address) -> int:
    scope = host.scope_id or "0"
    return int(scope) if scope.isdecimal() else socket.if_nametoindex(scope)


def address_mtu(host: IPv4Address | IPv6Address) -> int:
    """Bytes: the MTU of the interface that has the address `host`. EndpointError (EADDRNOTAVAIL) if none has."""
    host = type(host)(int(host))  # without a %scope

    def work() -> int | None:
        with netlink() as ipr:
            for message in ipr.get_addr(family=socket.AF_INET if host.version == 4 else socket.AF_INET6):
                if ip_address(message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")) == host:
                    return int(ipr.link("get", index=message["index"])[0].get("IFLA_MTU"))
        return None

    place = Place()
    try:
        found = place.run(work)
    except Exception as error:
        code = code_of(error)
        if code is None:
            raise
        raise EndpointError("find the interface of", str(host), code) from error
    finally:
        place.close()
    if found is None:
        raise EndpointError(
            "find the interface of", str(host), errno.EADDRNOTAVAIL, "it is no address of this host: see `ip address`"
        )
    return found


def _route_hint(code: int | None, host: IPv4Address | IPv6Address) -> str:
    if code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EADDRNOTAVAIL, errno.EINVAL):
        return f"this host has no route there: see `ip route get {host}`"
    if code == errno.EAFNOSUPPORT:
        return "this kernel has no IPv6"
    return ""
