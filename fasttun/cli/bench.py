"""`fasttun bench`: how fast a running tunnel is now, measured through it with the peer.

The other side runs `fasttun bench --serve`. Not for: the measuring (`fasttun.loadtest`).
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from typing import Any

import click

from ..errors import ConfigurationError, StateError

__all__ = ["bench"]

_PORT = 5204


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--serve", is_flag=True, help="Be the other side: answer on the tunnel's own addresses until Ctrl-C.")
@click.option("--peer", metavar="ADDRESS", help="The other side's address inside; else the one of the tunnel's peer.")
@click.option("--seconds", type=click.FloatRange(0.2, 60), default=3.0, show_default=True, metavar="S",
              help="Of each transfer.")
@click.option("--port", type=click.IntRange(1, 65535), default=_PORT, show_default=True, metavar="N",
              help="TCP port of the agreement, inside the tunnel.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON document (schema 1).")
@click.option("--plot", metavar="FILE", help="Draw it, too: a name in .svg or .png.")
def bench(name: str | None, serve: bool, peer: str | None, seconds: float, port: int, as_json: bool,
          plot: str | None) -> int:
    """Measure the running tunnel, or the one of that NAME: TCP and UDP both ways, loss, round-trip times.

    Start `fasttun bench --serve` on the other side first.
    """
    if serve:
        for flag, given in (("peer", peer), ("plot", plot), ("json", as_json)):
            if given:
                raise ConfigurationError(flag, "is not for --serve", "give it on the other side")
        return _serve(name, port)
    if plot is not None:
        from ..loadtest.plot import check

        check(plot)
    tunnel, address = _target(name, peer)
    from ..loadtest.measure import Measurement

    say = (lambda text: click.echo(f"{text} …", err=True)) if sys.stderr.isatty() else lambda _: None
    with _terminable(), Measurement(address, tunnel=tunnel, seconds=seconds, port=port, say=say) as measurement:
        document = measurement.run()
    if as_json:
        click.echo(json.dumps(document))
    else:
        for line in _table(document):
            click.echo(line)
    if plot is not None:
        from ..loadtest.plot import draw

        draw(document, plot)
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as Ctrl-C: what is open is closed."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _serve(name: str | None, port: int) -> int:
    from .. import log
    from ..loadtest.serve import Server
    from ..observe.client import choose

    log.configure("text", 0)
    now = choose(name).ask()
    addresses = _own(now)
    if not addresses:
        raise StateError(f"{now['name']} has no address inside")
    server = Server(now["name"], addresses, port)
    with contextlib.closing(server):
        server.open()
        former = {number: signal.signal(number, lambda *_: server.stop()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            listed = ", ".join(str(address.ip) for address in addresses)
            click.echo(f"answering on {listed}, TCP port {port}; on the other side: fasttun bench", err=True)
            server.run()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
    return 0


def _own(now: dict[str, Any]) -> list[IPv4Interface | IPv6Interface]:
    """A tunnel's addresses that a peer can name."""
    return [one for one in map(ip_interface, now["device"]["addresses"]) if not one.ip.is_link_local]


def _target(name: str | None, peer: str | None) -> tuple[str | None, str]:
    """The tunnel's name, where it is known, and the address to measure with."""
    if peer is not None:
        try:
            return name, str(ip_address(peer))
        except ValueError:
            raise ConfigurationError("peer", f"{peer!r} is not an address", "as in 10.7.0.1") from None
    from ..observe.client import choose

    now = choose(name).ask()
    found = _candidates(now)
    if len(found) != 1:
        several = f"it has several peers: {', '.join(found)}" if found else "its peer's address inside is not known"
        raise StateError(f"{now['name']}: {several}; name one with --peer ADDRESS")
    return str(now["name"]), found[0]


def _candidates(now: dict[str, Any]) -> list[str]:
    """An address of each peer that is known to be a host's; IPv4 before IPv6.

    Of a network that a peer has, and this host is in, the first host is taken: what a listener is given.
    """
    own = {one.ip for one in _own(now)}
    found = []
    for peer in now["peers"]:
        networks = sorted(map(ip_network, peer["addresses"]), key=lambda one: (one.version, -one.prefixlen))
        hosts = [one.network_address for one in networks if one.num_addresses == 1 and one.network_address not in own]
        shared = [one for one in networks if one.num_addresses > 1 and any(ip in one for ip in own)]
        if not hosts and shared:
            inside = next(one for one in _own(now) if one.ip in shared[0]).network
            hosts = [ip for ip in (inside.network_address + 1,) if ip not in own and ip in inside]
        found += [str(ip) for ip in hosts if not ip.is_link_local][:1]
    if not now["peers"] or not found:
        first = [one.network.network_address + 1 for one in _own(now)
                 if one.network.num_addresses > 1 and one.network.network_address + 1 != one.ip]
        return [str(ip) for ip in first[:1]]
    return found


def _table(document: dict[str, Any]) -> Iterator[str]:
    name = f"{document['tunnel']}, " if document["tunnel"] else ""
    yield f"{name}{document['local']} to {document['peer']}, {document['seconds']:g} s each"
    for one in document["tcp"]:
        streams = f"{one['streams']} stream{'s' if one['streams'] > 1 else ''}"
        yield f"  TCP  {one['way']:5} {streams:10} {_rate(one['bits_per_s'])}"
    for one in document["udp"]:
        yield (f"  UDP  {one['way']:5} {one['size']:<4} bytes {_rate(one['bits_per_s'])}   {one['loss']:.2%} lost of "
               f"{one['sent']} at {_rate(one['offered_bits_per_s']).strip()}")
    for one in document["rtt"]:
        load = "idle" if one["load"] == "idle" else f"TCP {one['load']}"
        if one["avg_us"] is None:
            yield f"  RTT  {load:16} no answer to {one['sent']}"
            continue
        times = " / ".join(f"{one[key] / 1000:.2f}" for key in ("min_us", "avg_us", "max_us"))
        lost = one["sent"] - one["received"]
        missing = f", {lost} of {one['sent']} lost" if lost else ""
        yield f"  RTT  {load:16} {times} ms (least / average / most){missing}"


def _rate(bits_per_s: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_s >= size:
            return f"{bits_per_s / size:8.2f} {unit}"
    return f"{bits_per_s:8.0f} bit/s "
