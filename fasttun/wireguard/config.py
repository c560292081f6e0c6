"""wg-quick's configuration format: a file is a `Config`, and a `Config` is a file again.

Everything that wg-quick(8) and wg(8) name is read, in any case, as they read it: later lines win, lists add up, a
public key that comes twice is one peer. Not for: editing a file in place (`store`), nor for carrying out what it
says (`tunnel`, `quick`).
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .keys import PresharedKey, PrivateKey, PublicKey

__all__ = ["DIRECTORY", "Config", "PeerConfig", "config_path", "interface_name", "write_private"]

log = logging.getLogger(__name__)

DIRECTORY = Path("/etc/wireguard")
"""Where a name without a slash is looked for, as wg-quick does."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

_NAME = re.compile(r"[a-zA-Z0-9_=+.-]{1,15}")
_PEER_NAME = re.compile(r"#\s*Name\s*=\s*(.*)", re.IGNORECASE)
_TABLES = ("auto", "off")
_V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True)
class PeerConfig:
    """One [Peer]. endpoint: "host:port" or "[v6]:port", not looked up. persistent_keepalive: seconds, 0 for off.

    name: for people; in a file the comment `# Name = …` above the peer's lines.
    """

    public_key: PublicKey
    preshared_key: PresharedKey | None = None
    allowed_ips: tuple[Network, ...] = ()
    endpoint: str | None = None
    persistent_keepalive: int = 0
    name: str | None = None

    def text(self) -> str:
        """The section as it stands in a file, with all its secrets."""
        lines = ["[Peer]"]
        if self.name:
            lines.append(f"# Name = {self.name}")
        lines.append(f"PublicKey = {self.public_key}")
        if self.preshared_key:
            lines.append(f"PresharedKey = {self.preshared_key.to_base64()}")
        if self.allowed_ips:
            lines.append(f"AllowedIPs = {', '.join(map(str, self.allowed_ips))}")
        if self.endpoint:
            lines.append(f"Endpoint = {self.endpoint}")
        if self.persistent_keepalive:
            lines.append(f"PersistentKeepalive = {self.persistent_keepalive}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Config:
    """A device and its peers. Read from a file by `read`, or made from values; immutable.

    table: "auto", "off", or a routing table's number or name. mtu, listen_port: None leaves the choice to fasttun.
    """

    private_key: PrivateKey | None = None
    listen_port: int | None = None
    fwmark: int = 0
    address: tuple[Interface, ...] = ()
    dns: tuple[str, ...] = ()
    mtu: int | None = None
    table: str = "auto"
    pre_up: tuple[str, ...] = ()
    post_up: tuple[str, ...] = ()
    pre_down: tuple[str, ...] = ()
    post_down: tuple[str, ...] = ()
    save_config: bool = False
    peers: tuple[PeerConfig, ...] = field(default=())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Config:
        """The file at `path`. ConfigurationError with file, line and field; a warning when others can read it."""
        try:
            with open(path, encoding="utf-8") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read()
        except UnicodeDecodeError:
            raise ConfigurationError("config", f"{path} is not UTF-8 text") from None
        except OSError as error:
            raise ConfigurationError("config", f"{path}: {error.strerror}", "name a file, or one in "
                                     f"{DIRECTORY} without its .conf") from None
        if stat.S_ISREG(mode) and mode & 0o077:
            log.warning("%s: others can read its keys; chmod 600 it", path)
        return cls.parse(text, source=str(path))

    @classmethod
    def parse(cls, text: str, *, source: str = "<string>") -> Config:
        """The configuration in `text`; `source` names it in errors. ConfigurationError, never with a secret in it."""
        values: dict[str, Any] = {}
        peers: dict[PublicKey, dict[str, Any]] = {}
        peer: dict[str, Any] | None = None
        for line in _lines(text, source):
            if line.section == "interface":
                _take(line, values, _INTERFACE)
                continue
            if line.key is None:
                peer = {"line": line}
                continue
            assert peer is not None
            if line.key == "name":
                peer["name"] = line.value
                continue
            _take(line, peer, _PEER)
            if line.key == "publickey":
                # As wg does: the same key again goes on where the first left off.
                peer = peers.setdefault(peer["public_key"], peer) | peer
                peers[peer["public_key"]] = peer
        _check_peers(text, source, peers)
        for member in peers.values():
            member.pop("line")
        return cls(**values, peers=tuple(PeerConfig(**member) for member in peers.values()))

    def text(self) -> str:
        """The file's text, with all secrets; what `parse` makes the same of."""
        lines = ["[Interface]"]
        if self.address:
            lines.append(f"Address = {', '.join(map(str, self.address))}")
        if self.private_key is not None:
            lines.append(f"PrivateKey = {self.private_key.to_base64()}")
        for key, value in (("ListenPort", self.listen_port), ("FwMark", hex(self.fwmark) if self.fwmark else None),
                           ("DNS", ", ".join(self.dns)), ("MTU", self.mtu),
                           ("Table", self.table if self.table != "auto" else None)):
            if value:
                lines.append(f"{key} = {value}")
        for key, commands in (("PreUp", self.pre_up), ("PostUp", self.post_up), ("PreDown", self.pre_down),
                              ("PostDown", self.post_down)):
            lines += [f"{key} = {command}" for command in commands]
        if self.save_config:
            lines.append("SaveConfig = true")
        return "\n".join([*lines, "", *(peer.text() for peer in self.peers)])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all, readable by its owner alone. OSError when the disk does not take it."""
        write_private(Path(path), self.text())

    def with_peers(self, peers: tuple[PeerConfig, ...]) -> Config:
        """The same device with these peers."""
        return replace(self, peers=peers)


def config_path(name: str, directory: Path = DIRECTORY) -> Path:
    """The file that wg-quick would take: a path that ends in .conf, or the name of one in `directory`."""
    if "/" in name or name.endswith(".conf"):
        return Path(name)
    return directory / f"{name}.conf"


def interface_name(path: Path) -> str:
    """The device that a file is for: its name without .conf. ConfigurationError when no device can be called that."""
    name = path.name.removesuffix(".conf")
    if path.suffix != ".conf" or not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigurationError(
            "config", f"{path.name!r} does not name a device",
            "call the file NAME.conf, NAME of 1 to 15 letters, digits and _=+.-")
    return name


def write_private(path: Path, text: str) -> None:
    """Replaces the file at `path` by `text`, whole or not at all, mode 0600; a symbolic link stays one."""
    path = Path(os.path.realpath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# --------------------------------------------------------------------------------------------- lines

@dataclass(frozen=True)
class _Line:
    """One setting with where it stands; key None for the line that opens a [Peer]."""

    source: str
    number: int
    section: str
    key: str | None
    written: str
    value: str

    def wrong(self, problem: str, hint: str = "") -> ConfigurationError:
        return _wrong(self.source, self.number, self.written, problem, hint)


def _wrong(source: str, number: int, what: str, problem: str, hint: str = "") -> ConfigurationError:
    return ConfigurationError(f"{source}:{number}: {what}", problem, hint)


def _lines(text: str, source: str) -> Iterator[_Line]:
    section = ""
    for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if section == "peer" and (found := _PEER_NAME.match(raw.strip())):
            yield _Line(source, number, section, "name", "Name", found[1].strip())
            continue
        stripped = raw.partition("#")[0].strip()
        if not stripped:
            continue
        if stripped.startswith("["):
            section = stripped.strip("[]").strip().lower()
            if section not in ("interface", "peer") or not stripped.endswith("]"):
                raise _wrong(source, number, stripped[:20], "is no section", "there are [Interface] and [Peer]")
            if section == "peer":
                yield _Line(source, number, section, None, "[Peer]", "")
            continue
        written, equals, value = (part.strip() for part in stripped.partition("="))
        # What is no word may be part of a key: it is not repeated.
        shown = written if re.fullmatch(r"[A-Za-z]{1,20}", written) else "a line"
        if not section:
            raise _wrong(source, number, shown, "stands before any section", "begin with [Interface]")
        known = _INTERFACE if section == "interface" else _PEER
        if written.lower() not in known:
            near = difflib.get_close_matches(written.lower(), known, n=1)
            hint = f"did you mean {known[near[0]][0]}?" if near else f"[{section.title()}] has " + ", ".join(
                name for name, *_ in known.values())
            raise _wrong(source, number, shown, f"is not known in [{section.title()}]", hint)
        if not equals:
            raise _wrong(source, number, written, "has no value", f"write {known[written.lower()][0]} = value")
        yield _Line(source, number, section, written.lower(), known[written.lower()][0], value)


def _take(line: _Line, into: dict[str, Any], known: dict[str, tuple[str, str, Callable[[_Line], Any]]]) -> None:
    """Adds one setting: a tuple to what is there, anything else in its place."""
    assert line.key is not None
    _, name, read = known[line.key]
    try:
        value = read(line)
    except ConfigurationError as error:
        if error.field.startswith(line.source):
            raise
        raise line.wrong(error.problem, error.hint) from None
    if isinstance(value, tuple):
        value = (*into.get(name, ()), *value)
        if name == "allowed_ips":
            value = tuple(dict.fromkeys(value))
    into[name] = value


def _check_peers(text: str, source: str, peers: dict[PublicKey, dict[str, Any]]) -> None:
    """Every [Peer] has a key. Read again, since a peer without one is in no table."""
    opened: _Line | None = None
    for line in _lines(text, source):
        if line.section == "peer" and line.key is None:
            if opened is not None:
                raise opened.wrong("has no PublicKey", "add PublicKey = the other side's key")
            opened = line
        elif line.key == "publickey":
            opened = None
    if opened is not None:
        raise opened.wrong("has no PublicKey", "add PublicKey = the other side's key")


def _parts(line: _Line) -> list[str]:
    return line.value.replace(",", " ").split()  # wg-quick takes either


def _addresses(line: _Line) -> tuple[Interface, ...]:
    try:
        return tuple(ipaddress.ip_interface(part) for part in _parts(line))
    except ValueError:
        raise line.wrong(f"{line.value!r} is no address", "as in 10.7.0.1/24, fd07::1/64") from None


def _networks(line: _Line) -> tuple[Network, ...]:
    try:
        networks = tuple(ipaddress.ip_network(part, strict=False) for part in _parts(line))
    except ValueError:
        raise line.wrong(f"{line.value!r} is no network", "as in 10.7.0.2/32, 192.168.5.0/24") from None
    for network in networks:
        if network.version == 6 and network.subnet_of(_V4_MAPPED):
            raise line.wrong(f"{network} is v4-mapped, and on no wire", "write the IPv4 network")
    return networks


def _number(low: int, high: int, *, off: str | None = None) -> Callable[[_Line], int]:
    def read(line: _Line) -> int:
        if off is not None and line.value.lower() == off:
            return 0
        try:
            value = int(line.value, 0) if line.key == "fwmark" else int(line.value)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise line.wrong(f"{line.value!r} is not a number from {low} to {high}")
        return value

    return read


def _flag(line: _Line) -> bool:
    if line.value.lower() not in ("true", "false"):
        raise line.wrong(f"{line.value!r} is not true or false")
    return line.value.lower() == "true"


def _endpoint(line: _Line) -> str:
    host, colon, port = line.value.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) <= 65535 or (
            ":" in host and not (host.startswith("[") and host.endswith("]"))):
        raise line.wrong(f"{line.value!r} is not HOST:PORT", "as in vpn.example.org:51820 or [2001:db8::1]:51820")
    return line.value


def _table(line: _Line) -> str:
    value = line.value.lower() if line.value.lower() in _TABLES else line.value
    if not value or any(character.isspace() for character in value):
        raise line.wrong(f"{line.value!r} is no routing table", "use auto, off, a number or a name")
    return value


def _preshared(line: _Line) -> PresharedKey | None:
    key = PresharedKey.from_base64(line.value)
    return key if key else None


_COMMAND: Callable[[_Line], tuple[str, ...]] = lambda line: (line.value,)  # noqa: E731

_INTERFACE: dict[str, tuple[str, str, Callable[[_Line], Any]]] = {
    name.lower(): (name, attribute, read) for name, attribute, read in (
        ("PrivateKey", "private_key", lambda line: PrivateKey.from_base64(line.value)),
        ("ListenPort", "listen_port", _number(0, 65535)),
        ("FwMark", "fwmark", _number(0, 0xFFFFFFFF, off="off")),
        ("Address", "address", _addresses),
        ("DNS", "dns", lambda line: tuple(_parts(line))),
        ("MTU", "mtu", _number(68, 65535)),
        ("Table", "table", _table),
        ("PreUp", "pre_up", _COMMAND), ("PostUp", "post_up", _COMMAND),
        ("PreDown", "pre_down", _COMMAND), ("PostDown", "post_down", _COMMAND),
        ("SaveConfig", "save_config", _flag),
    )
}
"""By the key in lower case: how it is written, the field, and what reads its value."""
_PEER: dict[str, tuple[str, str, Callable[[_Line], Any]]] = {
    name.lower(): (name, attribute, read) for name, attribute, read in (
        ("PublicKey", "public_key", lambda line: PublicKey.from_base64(line.value)),
        ("PresharedKey", "preshared_key", _preshared),
        ("AllowedIPs", "allowed_ips", _networks),
        ("Endpoint", "endpoint", _endpoint),
        ("PersistentKeepalive", "persistent_keepalive", _number(0, 65535, off="off")),
    )
}
