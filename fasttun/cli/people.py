"""`fasttun invite NAME`, `revoke NAME`, `peers`: who may use a listener, kept in its wg-quick file.

A change goes to the file first and then to the running tunnel, by its control socket; if that refuses it, the file
is put back. Not for: editing the file (`fasttun.wireguard.store`), the tunnel.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigurationError, EndpointError

if TYPE_CHECKING:
    from ..wireguard.config import Config, PeerConfig
    from ..wireguard.store import Store

__all__ = ["invite", "peers", "revoke"]

SOCKETS = Path("/var/run/wireguard")
KEEPALIVE_S = 25
DEFAULT_PORT = 51820
_PATIENCE_S = 5.0

_interface = click.option("--interface", "-i", default="wg0", show_default=True, metavar="NAME",
                          help="The listener, whose file is /etc/wireguard/NAME.conf.")
_config = click.option("--config", metavar="FILE", help="Its file, when it is elsewhere.")


@click.command()
@click.argument("name")
@_interface
@_config
@click.option("--endpoint", metavar="HOST[:PORT]", help="Where guests reach this host; remembered in the file.")
@click.option("--allowed-ips", metavar="CIDRS", help="What the guest sends here (the listener's own networks); "
              "0.0.0.0/0,::/0 for everything.")
@click.option("--dns", metavar="ADDRS", help="Name servers for the guest.")
@click.option("--psk/--no-psk", default=True, help="With a preshared key of its own (yes).")
@click.option("--keepalive", default=KEEPALIVE_S, show_default=True, metavar="S", help="The guest's; 0 for none.")
@click.option("--qr/--no-qr", default=None, help="Also as a QR code, for the phone's WireGuard app (on a terminal).")
@click.option("--output", "-o", metavar="FILE", help="Write the guest's file there, mode 0600, not to standard output.")
@click.option("--png", metavar="FILE", help="The QR code as a picture, mode 0600.")
def invite(name: str, interface: str, config: str | None, endpoint: str | None, allowed_ips: str | None,
           dns: str | None, psk: bool, keepalive: int, qr: bool | None, output: str | None, png: str | None) -> None:
    """Let NAME in: make keys, pick a free address, add the peer, print its configuration."""
    from ..wireguard.config import Config, PeerConfig, write_private
    from ..wireguard.keys import PresharedKey, PrivateKey
    from ..wireguard.store import free_addresses

    if not name.isprintable() or "#" in name or not name.strip():
        raise ConfigurationError("name", f"{name!r} cannot be a name", "use letters and digits")
    store = _store(interface, config)
    with store.locked():
        host = store.config()
        if host.private_key is None:
            raise ConfigurationError("config", f"{store.path} has no PrivateKey", "make one with fasttun genkey")
        reach = _endpoint(store, host, endpoint)
        key, secret = PrivateKey.generate(), PresharedKey.generate() if psk else None
        addresses = free_addresses(host)
        member = PeerConfig(key.public, secret, tuple(address.network for address in addresses), name=name)
        guest = Config(
            private_key=key, address=addresses, dns=tuple(dns.split(",")) if dns else (),
            peers=(PeerConfig(host.private_key.public, secret, _allowed(allowed_ips, host), reach, keepalive),))
        before = store.add_peer(member)
        try:
            _tell(interface, store, _wish(member))
        except BaseException:
            store.replace(before)
            raise
        if endpoint is not None:
            store.remember_endpoint(reach)
    if output is not None:
        write_private(Path(output), guest.text())
    else:
        click.echo(guest.text(), nl=False)
    if png is not None:
        _picture(guest.text(), Path(png))
    if qr or (qr is None and sys.stdout.isatty()):
        _code(guest.text())


@click.command()
@click.argument("who", metavar="NAME|PUBLICKEY")
@_interface
@_config
def revoke(who: str, interface: str, config: str | None) -> None:
    """Shut a peer out: from the file, and at once from the running tunnel."""
    store = _store(interface, config)
    with store.locked():
        member, before = store.remove_peer(who)
        try:
            _tell(interface, store, [f"public_key={bytes(member.public_key).hex()}", "remove=true"])
        except BaseException:
            store.replace(before)
            raise
    click.echo(f"{member.name or member.public_key} is out")


@click.command()
@_interface
@_config
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def peers(interface: str, config: str | None, as_json: bool) -> None:
    """The peers of a listener: from its file, and what the running tunnel knows of them."""
    store = _store(interface, config)
    live = _running(interface, store)
    rows = [_row(peer, live.get(bytes(peer.public_key).hex()) if live is not None else None)
            for peer in store.config().peers]
    if as_json:
        click.echo(json.dumps({"schema": 1, "interface": store.path.stem, "running": live is not None, "peers": rows},
                              indent=1))
        return
    heads = ("name", "public_key", "allowed_ips", "endpoint", "last_handshake", "rx_bytes", "tx_bytes")
    table = [[_cell(row[head], head) for head in heads] for row in rows]
    titles = ["name", "public key", "addresses", "endpoint", "last handshake", "received", "sent"]
    if live is None:
        titles, table = titles[:3], [row[:3] for row in table]
    widths = [max(len(row[column]) for row in [titles, *table]) for column in range(len(titles))]
    for line in [titles, *table]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any, head: str) -> str:
    if head == "allowed_ips":
        return ", ".join(value)
    if head == "last_handshake":
        return f"{time.time() - value:.0f} s ago" if value else "never"
    if head in ("rx_bytes", "tx_bytes"):
        from .report import size

        return size(value or 0)
    return str(value) if value is not None else "–"


def _row(peer: PeerConfig, live: Mapping[str, Any] | None) -> dict[str, Any]:
    live = live or {}
    return {
        "name": peer.name, "public_key": str(peer.public_key), "allowed_ips": [str(ip) for ip in peer.allowed_ips],
        "endpoint": live.get("endpoint", peer.endpoint), "last_handshake": int(live.get("last_handshake_time_sec", 0)),
        "rx_bytes": int(live.get("rx_bytes", 0)), "tx_bytes": int(live.get("tx_bytes", 0)),
    }


def _store(interface: str, config: str | None) -> Store:
    from ..wireguard.config import config_path
    from ..wireguard.store import Store

    return Store(Path(config) if config is not None else config_path(interface))


def _endpoint(store: Store, host: Config, given: str | None) -> str:
    """Where a guest finds this host: as given, as remembered, or as packets leave it."""
    port = host.listen_port or DEFAULT_PORT
    if host.listen_port is None:
        click.echo(f"warning: {store.path} has no ListenPort: the port changes with each start", err=True)
    text = given or store.endpoint()
    if text is None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.connect(("192.0.2.1", 9))  # asks the routing table, sends nothing
            text = sock.getsockname()[0]
        if text is None:
            raise ConfigurationError("endpoint", "is not known", "say --endpoint HOST, where guests reach this host")
        if ipaddress.ip_address(text).is_private:
            click.echo(f"warning: {text} is a private address; say --endpoint HOST if guests come from outside",
                       err=True)
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    return text if text.rpartition("]")[2].count(":") else f"{text}:{port}"


def _allowed(text: str | None, host: Config) -> tuple[Any, ...]:
    if text is None:
        return tuple(dict.fromkeys(address.network for address in host.address))
    try:
        return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in text.split(","))
    except ValueError:
        raise ConfigurationError("allowed_ips", f"{text!r} is no list of networks", "as in 10.7.0.0/24,::/0") from None


# ----------------------------------------------------------------------------------- running tunnel

def _wish(peer: PeerConfig) -> list[str]:
    lines = [f"public_key={bytes(peer.public_key).hex()}"]
    if peer.preshared_key:
        lines.append(f"preshared_key={peer.preshared_key.to_bytes().hex()}")
    return [*lines, "replace_allowed_ips=true", *(f"allowed_ip={network}" for network in peer.allowed_ips)]


def _ask(interface: str, lines: Iterable[str]) -> list[str] | None:
    """A transaction with the running tunnel (wireguard.com/xplatform): its answer; None when none runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_PATIENCE_S)
        try:
            sock.connect(str(SOCKETS / f"{interface}.sock"))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        sock.sendall(("\n".join(lines) + "\n\n").encode())
        answer = b""
        while not answer.endswith(b"\n\n"):
            part = sock.recv(65536)
            if not part:
                break
            answer += part
    found = answer.decode().strip().split("\n")
    code = next((int(line[6:]) for line in found if line.startswith("errno=")), -1)
    if code:
        raise EndpointError("configure", interface, abs(code), "the tunnel refused it; nothing was changed")
    return found


def _tell(interface: str, store: Store, lines: Iterable[str]) -> None:
    if _ask(_name(interface, store), ["set=1", *lines]) is None:
        click.echo(f"{_name(interface, store)} does not run: it is in the file, for the next start", err=True)


def _running(interface: str, store: Store) -> dict[str, dict[str, str]] | None:
    """What the running tunnel says of each peer, by public key in hex."""
    answer = _ask(_name(interface, store), ["get=1"])
    if answer is None:
        return None
    found: dict[str, dict[str, str]] = {}
    peer: dict[str, str] = {}
    for line in answer:
        key, _, value = line.partition("=")
        if key == "public_key":
            peer = found[value] = {}
        peer[key] = value
    return found


def _name(interface: str, store: Store) -> str:
    return store.path.stem if store.path.suffix == ".conf" else interface


# ------------------------------------------------------------------------------------------ QR code

def _segno() -> Any:
    try:
        import segno
    except ModuleNotFoundError:
        raise ImportError("a QR code needs segno: pip install 'fasttun[qr]', or say --no-qr") from None
    return segno


def _code(text: str) -> None:
    """In half blocks; light modules are drawn, as terminals are dark."""
    _segno().make(text, error="l", micro=False).terminal(out=sys.stdout, compact=True)


def _picture(text: str, path: Path) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        _segno().make(text, error="l", micro=False).save(file, kind="png", scale=6)

