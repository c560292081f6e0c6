"""Checks of the way to the server: an answer, the path's MTU, NAT in between, a route into the tunnel itself.

Not for: sending and hearing (`contact`), this host's own firewall (`port`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..endpoint import Endpoint
from ..errors import EndpointError
from ..mtu import overhead
from ..netlink import Place, code_of, netlink
from .contact import Contact, measure
from .finding import FAIL, OK, SKIPPED, WARNING, Finding, Question

__all__ = ["CHECKS", "nat", "path_mtu", "reachable", "routing_loop"]

_TUNNELS = frozenset({"tun", "wireguard"})
_LEAST_INNER = 1280  # IPv6's minimum (RFC 8200 §5)
_WIREGUARD_OVERHEAD = 32  # WireGuard paper §5.4.6: header, counter and tag of a data message
_SENT_NOWHERE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)

_PathCheck = Callable[[Question, Contact, Endpoint], Finding]


def _with_contact(name: str) -> Callable[[_PathCheck], Callable[[Question], Finding]]:
    """Skips a check of the way to the server when there is none, or its name does not resolve."""

    def decorate(check: _PathCheck) -> Callable[[Question], Finding]:
        @wraps(check)
        def run(ask: Question) -> Finding:
            contact = ask.contact
            if contact is None:
                return Finding(name, SKIPPED, "no --server to ask")
            if contact.endpoint is None:
                return Finding(name, SKIPPED, f"{ask.server} has no address")
            return check(ask, contact, contact.endpoint)

        return run

    return decorate


def reachable(ask: Question) -> Finding:
    """The server answers the greeting that a client sends it."""
    name = "reachable"
    contact = ask.contact
    if contact is None:
        return Finding(name, SKIPPED, "no --server to ask")
    error, endpoint = contact.error, contact.endpoint
    if endpoint is None:
        return Finding(name, FAIL, str(error), getattr(error, "hint", ""))
    if contact.answered:
        return Finding(name, OK, f"{endpoint} answers in {contact.rtt_s * 1000:.1f} ms")
    if error is not None and error.errno == errno.ECONNREFUSED:
        return Finding(name, FAIL, f"{endpoint} is there, and nothing listens on UDP port {ask.port} (ICMP: refused)",
                       "start the listener there, or name its port: --server HOST:PORT")
    if error is not None and error.errno in (errno.EPERM, errno.EACCES):
        return Finding(name, FAIL, f"this host itself refuses to send to {endpoint} ({error.strerror})",
                       "a firewall here drops outgoing UDP: see nft list ruleset, iptables-save")
    if error is not None and error.errno in _SENT_NOWHERE:
        return Finding(name, FAIL, f"no way to {endpoint}: {error.strerror}",
                       f"see ip route get {endpoint.host}, and whether the host is up")
    if ask.config is not None:
        return Finding(name, OK, f"{endpoint} says nothing, as WireGuard does to strangers: neither proof nor trouble")
    said = f" ({error.strerror})" if error is not None else ""
    seen = f"{endpoint} does not answer{said}: it is down, or UDP port {ask.port} is dropped on the way"
    return Finding(name, FAIL, seen,
                   "there: start fasttun --listen, open the port "
                   f"(nft add rule inet filter input udp dport {ask.port} accept; the cloud's security group), "
                   "forward it if behind NAT; a lametun listener never answers, one with --key only its peers")


@_with_contact("path mtu")
def path_mtu(ask: Question, contact: Contact, endpoint: Endpoint) -> Finding:
    """The largest packet that crosses the path whole, measured with DF."""
    name = "path mtu"
    if not contact.answered and (ask.config is None or contact.error is not None):
        return Finding(name, SKIPPED, "the server does not answer, so nothing can be measured")
    try:
        path, told = measure(endpoint, contact.rtt_s or 0.25, answers=contact.answered)
        from ..mtu import path_mtu as believed

        route = believed(endpoint.host, endpoint.scope_id)
    except EndpointError as error:
        return Finding(name, SKIPPED, str(error))
    except OSError as error:
        return Finding(name, WARNING, f"not even small packets come back: {error.strerror}",
                       "ask again: the path loses packets")
    version = endpoint.host.version
    inner = path - overhead(version, "raw") - (_WIREGUARD_OVERHEAD if ask.config is not None else 0)
    how = "measured" if contact.answered else "as ICMP and the route tell; the server does not answer"
    seen = f"{path} bytes ({how}): {inner} inside the tunnel"
    wanted = ask.config.mtu if ask.config is not None else None
    if wanted is not None and wanted > inner:
        return Finding(name, FAIL, f"{seen}, and the configuration has MTU = {wanted}", f"set MTU = {inner}")
    if contact.answered and path < route and not told:
        return Finding(name, WARNING, f"{seen}; the route says {route}, and nobody on the way says why (no ICMP)",
                       f"set --mtu {inner} on both sides, or let ICMP “fragmentation needed” pass")
    if inner < _LEAST_INNER:
        return Finding(name, WARNING, f"{seen}, too little for IPv6 inside (1280)",
                       f"use IPv4 inside with --mtu {inner}, or find the narrow link")
    return Finding(name, OK, seen + (", as ICMP says" if told else ""))


@_with_contact("nat")
def nat(ask: Question, contact: Contact, endpoint: Endpoint) -> Finding:
    """Whether the server sees another address than this host has."""
    name = "nat"
    if contact.mapped is None or contact.local is None:
        return Finding(name, SKIPPED, "the server does not tell whom it sees")
    same = (contact.mapped.host, contact.mapped.port) == (contact.local.host, contact.local.port)
    if same:
        return Finding(name, OK, f"none: the server sees {contact.local}")
    seen = f"NAT in between: {contact.local} appears as {contact.mapped}"
    if ask.config is not None and not any(peer.persistent_keepalive for peer in ask.config.peers):
        return Finding(name, WARNING, f"{seen}, and no peer has PersistentKeepalive",
                       "set PersistentKeepalive = 25 for the server, or it cannot reach this host after a pause")
    return Finding(name, OK, f"{seen}; fasttun keeps the mapping open, and only the other side need be reachable")


@_with_contact("routing loop")
def routing_loop(ask: Question, contact: Contact, endpoint: Endpoint) -> Finding:
    """Whether the way to the server leads into a tunnel, whose datagrams would then chase their own tail."""
    name = "routing loop"
    place = Place()
    try:
        device, kind, marked = place.run(lambda: _way(endpoint))
    except Exception as error:
        if code_of(error) is None:
            raise
        return Finding(name, SKIPPED, f"no route to {endpoint.host}: {os.strerror(code_of(error) or 0)}")
    finally:
        place.close()
    if kind not in _TUNNELS:
        return Finding(name, OK, f"{endpoint.host} is reached by {device}, no tunnel")
    if marked:
        return Finding(name, OK, f"{endpoint.host} is reached by {device}, and outside it by firewall mark {marked:#x}")
    return Finding(name, FAIL, f"the way to the server {endpoint.host} leads into {device}, which is a tunnel itself",
                   f"keep the server outside: ip route add {endpoint.host} via GATEWAY dev INTERFACE; see ip route get "
                   f"{endpoint.host}")


def _way(endpoint: Endpoint) -> tuple[str, str, int]:
    """(interface, its kind or "", firewall mark that leads elsewhere or 0) of the route to `endpoint`."""
    with netlink() as ipr:
        name, kind = _leads_to(ipr, endpoint)
        if kind in _TUNNELS:
            for rule in ipr.get_rules(family=_family(endpoint)):
                mark = rule.get("FRA_FWMARK")
                if mark and _leads_to(ipr, endpoint, mark=mark)[1] not in _TUNNELS:
                    return name, kind, int(mark)
        return name, kind, 0


def _family(endpoint: Endpoint) -> int:
    return 2 if endpoint.host.version == 4 else 10  # AF_INET, AF_INET6


def _leads_to(ipr: Any, endpoint: Endpoint, **key: Any) -> tuple[str, str]:
    extra = {"oif": endpoint.scope_id} if endpoint.scope_id else {}
    route = ipr.route("get", dst=str(endpoint.host), family=_family(endpoint), **extra, **key)[0]
    link = ipr.link("get", index=route.get("RTA_OIF"))[0]
    info = link.get("IFLA_LINKINFO")
    return link.get("IFLA_IFNAME"), (info.get("IFLA_INFO_KIND") or "") if info else ""


CHECKS = {"reachable": reachable, "routing loop": routing_loop, "path mtu": path_mtu, "nat": nat}
