"""`fasttun invite NAME`, `revoke NAME`, `peers`: who may use a listener, kept in its wg-quick file.

The guest's own files are written first: without them a peer that is let in has lost its key. Then the change goes to
the listener's file, then to the running tunnel by its control socket; if one of these fails, what was before is
restored. Not for: editing the file (`fasttun.wireguard.store`), the tunnel.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import ipaddress
import json
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO, StringIO
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

_BEGIN, _END = "\x1b[97;40m", "\x1b[0m"
"""White on black, whatever the terminal's colours: a code in negative is not read by every camera."""

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_interface = click.option("--interface", "-i", metavar="NAME",
                          help="The listener, whose file is /etc/wireguard/NAME.conf (wg0).")
_config = click.option("--config", metavar="FILE", help="Its file, when it is elsewhere: NAME.conf.")


@click.command()
@click.argument("name")
@_interface
@_config
@click.option("--endpoint", metavar="HOST[:PORT]", help="Where guests reach this host; remembered in the file.")
@click.option("--allowed-ips", metavar="CIDRS", help="What the guest sends here (the listener's own networks); "
              "0.0.0.0/0,::/0 for everything.")
@click.option("--dns", metavar="ADDRS", help="Name servers for the guest.")
@click.option("--psk/--no-psk", default=True, help="With a preshared key of its own (yes).")
@click.option("--keepalive", type=click.IntRange(0, 65535), default=KEEPALIVE_S, show_default=True, metavar="S",
              help="The guest's; 0 for none.")
@click.option("--qr/--no-qr", default=None, help="Also as a QR code, for the phone's WireGuard app (on a terminal).")
@click.option("--output", "-o", metavar="FILE", help="Write the guest's file there, mode 0600, not to standard output.")
@click.option("--png", metavar="FILE", help="The QR code as a picture, mode 0600.")
def invite(name: str, interface: str | None, config: str | None, endpoint: str | None, allowed_ips: str | None,
           dns: str | None, psk: bool, keepalive: int, qr: bool | None, output: str | None, png: str | None) -> None:
    """Let NAME in: make keys, pick a free address, add the peer, print its configuration."""
    from ..wireguard.config import Config, PeerConfig
    from ..wireguard.keys import PresharedKey, PrivateKey
    from ..wireguard.store import free_addresses

    name = name.strip()
    if not name or not name.isprintable() or "#" in name:
        raise ConfigurationError("name", f"{name!r} cannot be a name", "use letters and digits")
    host = _Host.of(interface, config)
    with host.store.locked():
        own = host.store.config()
        if own.private_key is None:
            raise ConfigurationError("config", f"{host.store.path} has no PrivateKey", "make one with fasttun genkey")
        live = host.running()
        reach = _endpoint(host, own, live, endpoint)
        key, secret = PrivateKey.generate(), PresharedKey.generate() if psk else None
        addresses = free_addresses(own, live.networks() if live is not None else ())
        member = PeerConfig(key.public, secret, tuple(address.network for address in addresses), name=name)
        guest = Config(
            private_key=key, address=addresses, dns=tuple(dns.replace(",", " ").split()) if dns else (),
            peers=(PeerConfig(own.private_key.public, secret, _allowed(allowed_ips, own), reach, keepalive),))
        handed = _Handed(guest.text(), output, png, qr if qr is not None else sys.stdout.isatty())
        with handed.written():
            before = host.store.add_peer(member, endpoint=reach if endpoint is not None else None)
            try:
                host.tell(live, _wish(member))
                handed.printed()
            except BaseException:
                if live is not None:
                    with contextlib.suppress(Exception):
                        host.ask(["set=1", *_farewell(bytes(key.public))])
                host.store.replace(before)
                raise


@click.command()
@click.argument("who", metavar="NAME|PUBLICKEY")
@_interface
@_config
def revoke(who: str, interface: str | None, config: str | None) -> None:
    """Shut a peer out: from the file, and at once from the running tunnel."""
    host = _Host.of(interface, config)
    with host.store.locked():
        live = host.running()
        saved = {bytes(peer.public_key) for peer in host.store.config().peers}
        key = live.key(who) if live is not None else None
        if key is not None and key not in saved:  # it came by `wg set`, for one
            host.ask(["set=1", *_farewell(key)])
        else:
            member, before = host.store.remove_peer(who)
            who = member.name or str(member.public_key)
            try:
                host.tell(live, _farewell(bytes(member.public_key)))
            except BaseException:
                host.store.replace(before)
                raise
    click.echo(f"{_printable(who)} is out")


@click.command()
@_interface
@_config
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def peers(interface: str | None, config: str | None, as_json: bool) -> None:
    """The peers of a listener: from its file, and what the running tunnel knows of them."""
    host = _Host.of(interface, config)
    live = host.running()
    known = {bytes(peer.public_key).hex(): peer for peer in host.store.config().peers}
    rows = [_row(key, known.get(key), live.peers.get(key, {}) if live is not None else {})
            for key in dict.fromkeys([*known, *(live.peers if live is not None else ())])]
    if as_json:
        click.echo(json.dumps({"schema": 1, "interface": host.interface, "running": live is not None, "peers": rows},
                              indent=1))
        return
    heads = {"name": "name", "public_key": "public key", "allowed_ips": "addresses"}
    if live is not None:
        heads |= {"endpoint": "endpoint", "last_handshake": "last handshake", "rx_bytes": "received",
                  "tx_bytes": "sent"}
    _table([*heads.values()], [[_cell(row[head], head) for head in heads] for row in rows])


def _table(titles: list[str], rows: list[list[str]]) -> None:
    """By rich on a terminal, where it is installed; else in plain columns, for `grep` and `awk`."""
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            table = Table(box=None, header_style="bold")
            for title in titles:
                # A key that is cut off cannot be copied.
                table.add_column(title, no_wrap=title == "public key", overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            Console(file=sys.stdout).print(table)
            return
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    for line in [titles, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any, head: str) -> str:
    if head == "allowed_ips":
        return _printable(", ".join(value))
    if head == "last_handshake":
        return f"{time.time() - value:.0f} s ago" if value else "never"
    if head in ("rx_bytes", "tx_bytes"):
        from .report import size

        return size(value or 0)
    return _printable(str(value)) if value is not None else "–"


def _printable(text: str) -> str:
    """Without what a terminal would take as a command."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _row(key: str, peer: PeerConfig | None, live: dict[str, list[str]]) -> dict[str, Any]:
    from ..wireguard.keys import PublicKey

    def last(field: str, default: str | None = None) -> str | None:
        return live[field][-1] if field in live else default

    networks = live.get("allowed_ip", []) if live or peer is None else [str(network) for network in peer.allowed_ips]
    return {
        "name": peer.name if peer is not None else None, "public_key": str(PublicKey(bytes.fromhex(key))),
        "saved": peer is not None, "allowed_ips": networks,
        "endpoint": last("endpoint", peer.endpoint if peer is not None else None),
        "last_handshake": int(last("last_handshake_time_sec") or 0),
        "rx_bytes": int(last("rx_bytes") or 0), "tx_bytes": int(last("tx_bytes") or 0),
    }


def _endpoint(host: _Host, own: Config, live: _Live | None, given: str | None) -> str:
    """Where a guest finds this host: as given, as remembered, or as packets leave it."""
    from ..wireguard.config import check_endpoint

    text = given or host.store.endpoint()
    if text is None:
        text = _outgoing_address()
        if ipaddress.ip_address(text).is_private:
            click.echo(f"warning: {text} is a private address; say --endpoint HOST if guests come from outside",
                       err=True)
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    if ":" not in text.rpartition("]")[2]:
        port = own.listen_port or (live.listen_port if live is not None else 0) or DEFAULT_PORT
        if not own.listen_port:
            click.echo(f"warning: {host.store.path} has no ListenPort: the port changes with each start", err=True)
        text = f"{text}:{port}"
    return check_endpoint(text)


def _outgoing_address() -> str:
    # Nothing is sent: connecting a datagram socket only asks the routing table.
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((elsewhere, 9))
            return str(sock.getsockname()[0])
    raise ConfigurationError("endpoint", "is not known", "say --endpoint HOST, where guests reach this host")


def _allowed(text: str | None, own: Config) -> tuple[_Network, ...]:
    if text is None:
        return tuple(dict.fromkeys(address.network for address in own.address))
    try:
        return tuple(ipaddress.ip_network(part, strict=False) for part in text.replace(",", " ").split())
    except ValueError:
        raise ConfigurationError("allowed_ips", f"{text!r} is no list of networks", "as in 10.7.0.0/24,::/0") from None


# --------------------------------------------------------------------------------- file and running tunnel

@dataclass
class _Live:
    """What a running tunnel says of itself (wireguard.com/xplatform, get=1). peers: by public key in hex."""

    listen_port: int = 0
    peers: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[str]) -> _Live:
        live, peer = cls(), None
        for key, _, value in (line.partition("=") for line in lines):
            if key == "public_key":
                peer = live.peers.setdefault(value, {})
            elif peer is not None:
                peer.setdefault(key, []).append(value)
            elif key == "listen_port":
                live.listen_port = int(value)
        return live

    def key(self, text: str) -> bytes | None:
        """The public key that `text` is the base64 of, when a peer has it."""
        keys = map(bytes.fromhex, self.peers)
        return next((key for key in keys if base64.b64encode(key).decode() == text), None)

    def networks(self) -> Iterator[_Network]:
        for peer in self.peers.values():
            yield from map(ipaddress.ip_network, peer.get("allowed_ip", ()))


@dataclass(frozen=True)
class _Host:
    """The listener: its device's name, and its file."""

    interface: str
    store: Store

    @classmethod
    def of(cls, interface: str | None, config: str | None) -> _Host:
        """The device is called as the file is, not as what a symbolic link leads to; --interface says otherwise."""
        from ..wireguard.config import config_path, interface_name
        from ..wireguard.store import Store

        path = Path(config) if config is not None else config_path(interface or "wg0")
        if interface is None or config is None:
            return cls(interface_name(path), Store(path))
        return cls(interface, Store(path))

    def running(self) -> _Live | None:
        """None when it does not run."""
        answer = self.ask(["get=1"])
        return _Live.of(answer) if answer is not None else None

    def tell(self, live: _Live | None, lines: Iterable[str]) -> None:
        """Has the running tunnel, if there is one, do it. EndpointError when it refuses."""
        if live is not None and self.ask(["set=1", *lines]) is not None:
            return
        try:
            socket.if_nametoindex(self.interface)
        except OSError:
            click.echo(f"{self.interface} does not run: the file counts at its next start", err=True)
        else:
            click.echo(f"{self.interface} is not fasttun's: tell it yourself, "
                       f"wg syncconf {self.interface} <(wg-quick strip {self.store.path})", err=True)

    def ask(self, lines: Iterable[str]) -> list[str] | None:
        """One transaction (wireguard.com/xplatform): the answer's lines; None when none runs. EndpointError."""
        path = SOCKETS / f"{self.interface}.sock"
        answer = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_PATIENCE_S)
            try:
                sock.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            except OSError as error:
                raise EndpointError("connect to", str(path), error.errno or errno.ETIMEDOUT) from None
            try:
                sock.sendall(("\n".join(lines) + "\n\n").encode())
                while not answer.endswith(b"\n\n") and (part := sock.recv(65536)):
                    answer += part
            except OSError as error:
                raise EndpointError("ask", self.interface, error.errno or errno.ETIMEDOUT) from None
        found = answer.decode("utf-8", "replace").strip().split("\n")
        code = next((line[6:] for line in found if line.startswith("errno=")), "")
        if not code.removeprefix("-").isdecimal():
            raise EndpointError("ask", self.interface, errno.EPROTO, "it broke off; see its log")
        if int(code):
            raise EndpointError("configure", self.interface, abs(int(code)), "it refused; nothing was changed")
        return found


def _wish(peer: PeerConfig) -> list[str]:
    lines = [f"public_key={bytes(peer.public_key).hex()}"]
    if peer.preshared_key:
        lines.append(f"preshared_key={peer.preshared_key.to_bytes().hex()}")
    return [*lines, "replace_allowed_ips=true", *(f"allowed_ip={network}" for network in peer.allowed_ips)]


def _farewell(public_key: bytes) -> list[str]:
    return [f"public_key={public_key.hex()}", "remove=true"]


# ----------------------------------------------------------------------------------------- the guest's file

class _Handed:
    """The guest's file in all forms that were asked for, made at once: what follows can only fail for the system."""

    def __init__(self, text: str, output: str | None, png: str | None, on_terminal: bool) -> None:
        self._text, self._output, self._png = text, output, png
        self._code = _code(text) if on_terminal else ""
        self._picture = _picture(text) if png is not None else b""

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """With the files in place; they are taken away again when what they are for fails. OSError."""
        from ..wireguard.config import write_private

        made: list[Path] = []
        try:
            for path, content in ((self._output, self._text), (self._png, self._picture)):
                if path is not None:
                    write_private(Path(path), content)
                    made.append(Path(path))
            yield
        except BaseException:
            for made_path in made:
                with contextlib.suppress(OSError):
                    made_path.unlink()
            raise

    def printed(self) -> None:
        """What goes to standard output is there. OSError."""
        if self._output is None:
            click.echo(self._text, nl=False)
        click.echo(self._code, nl=False)
        sys.stdout.flush()


def _qr(text: str) -> Any:
    try:
        import segno
    except ModuleNotFoundError:
        raise ImportError("a QR code needs segno: pip install 'fasttun[qr]', or say --no-qr") from None
    try:
        return segno.make(text, error="l", micro=False)
    except segno.DataOverflowError:
        raise ConfigurationError("qr", "the configuration is too long for a QR code", "say --no-qr") from None


def _code(text: str) -> str:
    """In half blocks, the light modules drawn."""
    drawn = StringIO()
    _qr(text).terminal(out=drawn, compact=True)
    if not sys.stdout.isatty():
        return drawn.getvalue()
    return "".join(f"{_BEGIN}{line}{_END}\n" for line in drawn.getvalue().splitlines())


def _picture(text: str) -> bytes:
    drawn = BytesIO()
    _qr(text).save(drawn, kind="png", scale=6)
    return drawn.getvalue()
