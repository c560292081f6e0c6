"""`--explain`: the tunnel's set-up as the `ip` commands one would type, each with what it is for.

The text is a shell script that does the same when run as root; the undo stands in its comments. Asks the
kernel for the route to a server given by address, and nothing else: no name is looked up, no packet sent.
"""

from __future__ import annotations

import ipaddress
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from ..config import TunnelConfig
from ..endpoint import SOCKET_BUFFER
from ..errors import EndpointError
from ..mtu import IP_HEADER, PI_LENGTH, UDP_HEADER, inner_mtu, path_mtu

__all__ = ["explanation"]

_WIDTH = 100
_USUAL_PATH_MTU = 1500
"""Bytes: Ethernet's, assumed where no route tells."""

Host = IPv4Address | IPv6Address


@dataclass(frozen=True)
class _Step:
    """One paragraph: why, the commands, and the commands that take it back (none: the device's end does)."""

    why: str
    do: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()


def explanation(config: TunnelConfig) -> str:
    """The whole text, newline at its end."""
    lines = [*_comment(_title(config)), ""]
    steps = [*_steps(config)]
    for number, step in enumerate(steps, 1):
        lines += [*_comment(f"{number}. {step.why}", indent="   "), *step.do, ""]
    lines += [*_comment("Then packets flow. " + _loop(config)), ""]
    lines += [*_comment("Not part of it, but often missing:")]
    for hint in _hints(config):
        lines += _comment(f"- {hint}", indent="  ")
    lines += ["", *_comment("At exit, the way back:")]
    lines += [f"#     {command}" for step in reversed(steps) for command in step.undo]
    return "\n".join(lines) + "\n"


def _title(config: TunnelConfig) -> str:
    goal = "listen on" if config.listen else f"connect to {config.server},"
    return (
        f"What fasttun would do to {goal} UDP port {config.port}, as commands to run as root. Nothing has been changed."
    )


def _steps(config: TunnelConfig) -> Iterator[_Step]:
    device = shlex.quote(config.device)
    flags = " multi_queue" if config.workers > 1 else ""
    yield _Step(
        f"A TUN device is a network card without a wire. What the kernel routes into {config.device}, a "
        "program reads as IP packets; what the program writes, arrives as if from the wire. With `user NAME` "
        f"at the end, that user's fasttun needs no root later. If {config.device} exists, fasttun uses it "
        "and leaves it there.",
        (f"ip tuntap add dev {device} mode tun{flags}",),
        (f"ip tuntap del dev {device} mode tun{flags}",),
    )
    if config.address:
        networks = sorted({str(address.network) for address in config.address})
        yield _Step(
            "This host's address in the private network. The prefix length also makes a route: "
            f"{_and(networks)} {'is' if len(networks) == 1 else 'are'} now behind {config.device}.",
            tuple(
                f"ip address add {address} dev {device}{' nodad' if address.version == 6 else ''}"
                for address in config.address
            ),
        )
    value, arithmetic = _mtu(config)
    yield _Step(arithmetic, (f"ip link set dev {device} mtu {value}",))
    yield _Step("Switch it on.", (f"ip link set dev {device} up",))
    if config.route:
        yield from _pinned(config)
        yield _Step(
            f"What lies beyond the other end: the kernel sends packets for {_and([*map(str, config.route)])} "
            f"into {config.device} from now on.",
            tuple(f"ip route add {network} dev {device}" for network in config.route),
        )


def _pinned(config: TunnelConfig) -> Iterator[_Step]:
    """The host route that keeps the tunnel's own datagrams out of the tunnel."""
    host = _literal(config.server)
    if host is None:
        if config.server is not None and any(network.prefixlen <= 1 for network in config.route):
            yield _Step(
                f"{config.server} itself must not be reached through the tunnel that it carries: fasttun "
                "looks its address up, and gives it a route of its own by today's gateway where a network "
                "below covers it."
            )
        return
    if not any(host.version == network.version and host in network for network in config.route):
        return
    gateway = f"$(ip route get {host} | grep -oE -m1 '(via [^ ]+ )?dev [^ ]+')"
    yield _Step(
        f"{host} itself must not be reached through the tunnel that it carries: a route of its own, by "
        "today's gateway, before the wider one takes over.",
        (f"ip route add {host} {gateway}",),
        (f"ip route del {host}",),
    )


def _mtu(config: TunnelConfig) -> tuple[int, str]:
    """The MTU, and how it comes about."""
    if config.mtu is not None:
        return config.mtu, (
            f"The largest packet inside: {config.mtu} bytes, as asked for with --mtu. Each travels with "
            f"{_headers(4, config.framing)} bytes of headers in front over IPv4 "
            f"({_headers(6, config.framing)} over IPv6), and in fragments if the path is narrower than that."
        )
    version, path, known = _path(config)
    framing = "pi" if config.framing == "pi" else "raw"
    value = inner_mtu(path, version, framing)
    parts = [f"{path} ({known})", f"{IP_HEADER[version]} (IPv{version} header)", f"{UDP_HEADER} (UDP header)"]
    if framing == "pi":
        parts.append(f"{PI_LENGTH} (packet information)")
    return value, (
        "The MTU is the largest packet inside that still crosses the path in one piece, headers included: "
        f"{' - '.join(parts)} = {value} bytes."
    )


def _headers(version: int, framing: str) -> str:
    pi = f" + {PI_LENGTH}" if framing == "pi" else ""
    return f"{IP_HEADER[version]} + {UDP_HEADER}{pi}"


def _path(config: TunnelConfig) -> tuple[int, int, str]:
    """Outer IP version, path MTU in bytes, and where that is known from."""
    host = _literal(config.server) or _literal(config.bind)
    version = host.version if host is not None else 4
    if config.server is not None and host is not None:
        try:
            return version, path_mtu(host), f"the route to {host}"
        except EndpointError:
            pass
    return version, _USUAL_PATH_MTU, "Ethernet's, assumed here"


def _loop(config: TunnelConfig) -> str:
    inside = " behind 4 bytes of packet information" if config.framing == "pi" else ""
    if config.listen:
        senders = f" from {_and([*map(str, config.allow)])} alone" if config.allow else ""
        return (
            f"fasttun takes UDP datagrams on port {config.port}{senders}, each one IP packet{inside}, and "
            f"writes the packet to {config.device}; it notes which address inside came from where, and sends "
            f"what it reads from {config.device} there. Nothing is encrypted."
        )
    return (
        f"fasttun reads a packet from {config.device}, sends it{inside} as one UDP datagram to "
        f"{config.server} port {config.port}, and writes what comes back to {config.device}. "
        "Nothing is encrypted."
    )


def _hints(config: TunnelConfig) -> Iterator[str]:
    if config.listen:
        yield (
            f"a firewall here must let UDP port {config.port} in: "
            f"iptables -A INPUT -p udp --dport {config.port} -j ACCEPT"
        )
    families = {network.version for network in (*config.address, *config.route)} or {4}
    switches = [
        name
        for version, name in ((4, "net.ipv4.ip_forward=1"), (6, "net.ipv6.conf.all.forwarding=1"))
        if version in families
    ]
    yield (
        f"the host at the edge of a routed network must pass packets on: sysctl -w {' '.join(switches)}, "
        "and that network needs a way back (a route to here, or masquerading)"
    )
    yield (
        "without root, large socket buffers must be allowed: "
        f"sysctl -w net.core.rmem_max={SOCKET_BUFFER} net.core.wmem_max={SOCKET_BUFFER}"
    )


def _literal(host: str | None) -> Host | None:
    try:
        return None if host is None else ipaddress.ip_address(host)
    except ValueError:
        return None


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="# ",
        subsequent_indent=f"# {indent}",
        break_long_words=False,
        break_on_hyphens=False,
    )
