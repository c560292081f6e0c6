"""wg-quick's configuration format: a file is a `Config`, and a `Config` is a file again.

Everything that wg-quick(8) and wg(8) name is read, in any case, as they read it: later lines win and lists add up
within a section; a [Peer] whose public key was there before sets that one's allowed IPs anew and keeps the rest.
Not for: editing a file in place (`store`), nor for carrying out what it says (`tunnel`, `quick`).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import ipaddress
import logging
import os
import re
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ConfigurationError
from .keys import PresharedKey, PrivateKey, PublicKey

__all__ = [
    "DIRECTORY", "Config", "PeerConfig", "Section", "check_endpoint", "config_path", "interface_name", "read_sections",
    "read_text", "write_private",
]

log = logging.getLogger(__name__)

DIRECTORY = Path("/etc/wireguard")
"""Where a name without a slash is looked for, as wg-quick does."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

_NAME = re.compile(r"[a-zA-Z0-9_=+.-]{1,15}")
_PEER_NAME = re.compile(r"#+\s*Name\s*=\s*(.*)", re.IGNORECASE)
_SWITCHED_OFF = re.compile(r"#[#\s]*(\[|\w+\s*=)")
"""A comment that was a setting or a section."""
_KEY_LIKE = re.compile(r"[A-Za-z0-9+/]{20,}=*")
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

    def settings(self) -> list[tuple[str, str]]:
        """Key and value of each line, with all secrets; the name is none."""
        found = [("PublicKey", str(self.public_key))]
        if self.preshared_key:
            found.append(("PresharedKey", self.preshared_key.to_base64()))
        if self.allowed_ips:
            found.append(("AllowedIPs", ", ".join(map(str, self.allowed_ips))))
        if self.endpoint:
            found.append(("Endpoint", self.endpoint))
        if self.persistent_keepalive:
            found.append(("PersistentKeepalive", str(self.persistent_keepalive)))
        return found

    def text(self) -> str:
        """The section as it stands in a file, with all its secrets. ConfigurationError for what no line can hold."""
        name = [_written("# Name", self.name)] if self.name else []
        return "\n".join(["[Peer]", *name, *_settings_text(self.settings())]) + "\n"


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
        return cls.parse(read_text(path), source=os.fspath(path))

    @classmethod
    def parse(cls, text: str, *, source: str = "<string>") -> Config:
        """The configuration in `text`; `source` names it in errors. ConfigurationError, never with a secret in it."""
        values: dict[str, Any] = {}
        peers: dict[PublicKey, dict[str, Any]] = {}
        for section in read_sections(text, source):
            if section.kind == "interface":
                _take(section, values, source)
                continue
            given: dict[str, Any] = {"allowed_ips": ()}
            _take(section, given, source)
            if "public_key" not in given:
                raise _wrong(
                    source, section.header, "[Peer]", "has no PublicKey", "add PublicKey = the other side's key")
            if section.name:
                given["name"] = section.name
            peers[given["public_key"]] = peers.get(given["public_key"], {}) | given
        return cls(**values, peers=tuple(PeerConfig(**given) for given in peers.values()))

    def settings(self) -> list[tuple[str, str]]:
        """Key and value of each line of [Interface], with all secrets."""
        found: list[tuple[str, str]] = []
        if self.address:
            found.append(("Address", ", ".join(map(str, self.address))))
        if self.private_key is not None:
            found.append(("PrivateKey", self.private_key.to_base64()))
        if self.listen_port is not None:
            found.append(("ListenPort", str(self.listen_port)))
        if self.fwmark:
            found.append(("FwMark", hex(self.fwmark)))
        if self.dns:
            found.append(("DNS", ", ".join(self.dns)))
        if self.mtu is not None:
            found.append(("MTU", str(self.mtu)))
        if self.table != "auto":
            found.append(("Table", self.table))
        for key, commands in (("PreUp", self.pre_up), ("PostUp", self.post_up), ("PreDown", self.pre_down),
                              ("PostDown", self.post_down)):
            found += [(key, command) for command in commands]
        if self.save_config:
            found.append(("SaveConfig", "true"))
        return found

    def text(self) -> str:
        """The file's text, with all secrets; what `parse` makes the same of.

        ConfigurationError for what no line can hold, such as a command with a # in it.
        """
        lines = ["[Interface]", *_settings_text(self.settings())]
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


def read_text(path: str | os.PathLike[str]) -> str:
    """The file's text; bytes that are not UTF-8 are kept (surrogateescape). ConfigurationError when it cannot be read.

    Warns once of a file that others can read.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except OSError as error:
        hint = {errno.ENOENT: f"name a file, or one in {DIRECTORY} without its .conf",
                errno.EACCES: "only its owner can: run it as root"}.get(error.errno or 0, "")
        raise ConfigurationError("config", f"{os.fspath(path)}: {error.strerror}", hint) from None
    place = os.path.realpath(path)
    if stat.S_ISREG(mode) and mode & 0o077 and place not in _warned_of:
        _warned_of.add(place)
        log.warning("%s: others can read its keys; chmod 600 it", os.fspath(path))
    return text


_warned_of: set[str] = set()


def write_private(path: Path, content: str | bytes, *, like: os.stat_result | None = None) -> None:
    """Replaces the file at `path` by `content`, whole or not at all; a symbolic link stays one.

    Mode 0600, or what `like` leaves its owner; the owner of `like`, where that is allowed. OSError from the disk.
    """
    path = Path(os.path.realpath(path))
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if like is not None:
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), like.st_uid, like.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(like.st_mode) & 0o700 or 0o600)
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


def check_endpoint(text: str) -> str:
    """`text` as "host:port" or "[v6]:port". ConfigurationError when it is none."""
    try:
        if text.split() != [text]:
            _no(f"{_shown(text)} is not HOST:PORT", "leave out the white space")
        return _endpoint(text)
    except ConfigurationError as error:
        raise ConfigurationError("endpoint", error.problem, error.hint) from None


# --------------------------------------------------------------------------------------------- sections

@dataclass(frozen=True, slots=True)
class Setting:
    """One line. number: counted from 0. key: in lower case."""

    number: int
    key: str
    value: str


@dataclass(slots=True)
class Section:
    """A section as it stands in a text, whose lines `text.split("\\n")` are counted from 0.

    first to end (excluded) is all that is its own: the comments directly above its header, and its last setting with
    the comments directly below. What stands free between two sections belongs to neither.
    kind: "interface" or "peer". name: of its comment `# Name = …`.
    """

    kind: str
    first: int
    header: int
    end: int
    settings: list[Setting]
    name: str | None = None


def read_sections(text: str, source: str = "<string>") -> list[Section]:
    """All sections in order, with known keys only; values are not looked at. ConfigurationError."""
    found: list[Section] = []
    lines = text.split("\n")
    for number, raw in enumerate(lines):
        if "\0" in raw:
            raise _wrong(source, number, "a line", "holds a NUL byte", "the file is to be UTF-8 text")
        bare = raw.partition("#")[0].strip().removeprefix("\ufeff" if number == 0 else "").strip()
        if not bare:
            continue
        if bare.startswith("["):
            first = number
            floor = found[-1].end if found else 0
            while first > floor and _goes_with_next(lines[first - 1]):
                first -= 1
            if found:
                _close(found[-1], lines, first)
            found.append(Section(_kind(bare, source, number), first, number, number + 1, []))
            continue
        setting = _setting(bare, found[-1].kind if found else "", source, number)
        found[-1].settings.append(setting)
        found[-1].end = number + 1
    if found:
        _close(found[-1], lines, len(lines))
    return found


def _goes_with_next(line: str) -> bool:
    """A comment that the section below it is introduced by."""
    line = line.strip().removeprefix("\ufeff")
    return line.startswith("#") and (not _SWITCHED_OFF.match(line) or _PEER_NAME.match(line) is not None)


def _close(section: Section, lines: list[str], limit: int) -> None:
    while section.end < limit and lines[section.end].lstrip().startswith("#"):
        section.end += 1
    for number in (*range(section.header + 1, section.end), *range(section.first, section.header)):
        if named := _PEER_NAME.match(lines[number].strip().removeprefix("\ufeff")):
            # Any bytes are kept in the file; what is shown and typed is text.
            section.name = named[1].strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace") or None
            return


def _kind(bare: str, source: str, number: int) -> str:
    kind = "".join(bare.lower().split())
    if kind not in ("[interface]", "[peer]"):
        raise _wrong(source, number, _shown(bare)[1:-1], "is no section", "there are [Interface] and [Peer]")
    return kind[1:-1]


def _setting(bare: str, section: str, source: str, number: int) -> Setting:
    written, equals, value = (part.strip() for part in bare.partition("="))
    key = "".join(written.split()).lower()
    # What is no word may be part of a key: it is not repeated.
    shown = written if re.fullmatch(r"[A-Za-z]{1,20}", written) else "a line"
    if not section:
        raise _wrong(source, number, shown, "stands before any section", "begin with [Interface]")
    known = _KNOWN[section]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1) if len(key) <= 40 else []
        hint = f"did you mean {known[near[0]][0]}?" if near else f"[{section.title()}] has " + ", ".join(
            name for name, *_ in known.values())
        raise _wrong(source, number, shown, f"is not known in [{section.title()}]", hint)
    if not equals:
        raise _wrong(source, number, shown, "has no value", f"write {known[key][0]} = value")
    return Setting(number, key, value)


def _take(section: Section, into: dict[str, Any], source: str) -> None:
    """The section's values by field: lists add up, anything else takes the place of what is there."""
    for setting in section.settings:
        written, name, read = _KNOWN[section.kind][setting.key]
        try:
            value = read(setting.value)
        except ConfigurationError as error:
            raise _wrong(source, setting.number, written, error.problem, error.hint) from None
        if isinstance(value, tuple):
            value = (*into.get(name, ()), *value)
            if name == "allowed_ips":
                value = tuple(dict.fromkeys(value))
        into[name] = value


def _wrong(source: str, number: int, what: str, problem: str, hint: str = "") -> ConfigurationError:
    return ConfigurationError(f"{source}:{number + 1}: {what}", problem, hint)


def _settings_text(settings: Iterable[tuple[str, str]]) -> list[str]:
    return [_written(key, value) for key, value in settings]


def _written(key: str, value: str) -> str:
    """One line. ConfigurationError when reading it would give something else."""
    if "\n" in value or "\0" in value or ("#" in value and not key.startswith("#")):
        raise ConfigurationError(key.lstrip("# "), "has a line break or a # in it, which no line of a file can hold",
                                 "for a command: put it into a script")
    return f"{key} = {value}"


# --------------------------------------------------------------------------------------------- values

def _no(problem: str, hint: str = "") -> NoReturn:
    """The reader of a value does not know where that stands: `_take` says it."""
    raise ConfigurationError("", problem, hint)


def _shown(value: str) -> str:
    """A wrong value in an error, without what may be a key that slipped into it."""
    value = _KEY_LIKE.sub("…", value)
    return repr(value if len(value) <= 60 else value[:60] + "…")


def _parts(value: str) -> list[str]:
    return value.replace(",", " ").split()  # wg-quick takes either


def _addresses(value: str) -> tuple[Interface, ...]:
    try:
        found = tuple(ipaddress.ip_interface(part) for part in _parts(value))
    except ValueError:
        _no(f"{_shown(value)} is no address", "as in 10.7.0.1/24, fd07::1/64")
    if "%" in value:
        _no(f"{_shown(value)} names an interface", "leave out % and what follows")
    return found


def _networks(value: str) -> tuple[Network, ...]:
    parts = _parts(re.sub(r"\s*/\s*", "/", value))
    try:
        if any("%" in part or not re.fullmatch(r"[^/]+(/[0-9]+)?", part) for part in parts):
            raise ValueError
        networks = tuple(ipaddress.ip_network(part, strict=False) for part in parts)
    except ValueError:
        _no(f"{_shown(value)} is no network", "as in 10.7.0.2/32, 192.168.5.0/24")
    for network in networks:
        if network.version == 6 and network.subnet_of(_V4_MAPPED):
            _no(f"{network} is v4-mapped, and on no wire", "write the IPv4 network")
    return networks


def _number(low: int, high: int, *, base: str = r"[0-9]{1,20}", off: bool = False) -> Callable[[str], int]:
    """`base`: what a number looks like; one that begins with 0x is hexadecimal, any other decimal."""
    def read(value: str) -> int:
        text = _squeezed(value)
        if off and text.lower() == "off":
            return 0
        number = int(text, 16 if text.startswith("0x") else 10) if re.fullmatch(base, text) else low - 1
        if not low <= number <= high:
            _no(f"{_shown(value)} is not a number from {low} to {high}" + (", nor off" if off else ""))
        return number

    return read


def _flag(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        _no(f"{_shown(value)} is not true or false")
    return value.lower() == "true"


def _endpoint(value: str) -> str:
    """Host and port as `wg` finds them: the last colon parts them, also of an IPv6 address without brackets."""
    host, colon, port = "".join(value.split()).rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not port.isdecimal():
        with contextlib.suppress(OSError, UnicodeError):
            port = str(socket.getservbyname(port, "udp"))
    if not colon or not _is_host(host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) <= 65535:
        _no(f"{_shown(value)} is not HOST:PORT", "as in vpn.example.org:51820 or [2001:db8::1]:51820")
    return f"[{host}]:{int(port)}" if ":" in host else f"{host}:{int(port)}"


def _is_host(text: str) -> bool:
    if ":" not in text:
        return re.fullmatch(r"[^\[\]/%,;\\\x00-\x20\x7f-\xa0\ud800-\udfff]{1,253}", text) is not None
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _table(value: str) -> str:
    found = value.lower() if value.lower() in _TABLES else value
    if not found or any(character.isspace() for character in found):
        _no(f"{_shown(value)} is no routing table", "use auto, off, a number or a name")
    return found


def _squeezed(value: str) -> str:
    return "".join(value.split())


def _preshared(value: str) -> PresharedKey | None:
    key = PresharedKey.from_base64(_squeezed(value))
    return key if key else None


def _command(value: str) -> tuple[str, ...]:
    return (value,)


_Reader = Callable[[str], Any]

_INTERFACE: tuple[tuple[str, str, _Reader], ...] = (
    ("PrivateKey", "private_key", lambda value: PrivateKey.from_base64(_squeezed(value))),
    ("ListenPort", "listen_port", _number(0, 65535)),
    ("FwMark", "fwmark", _number(0, 0xFFFFFFFF, base=r"0x[0-9a-fA-F]{1,16}|[0-9]{1,20}", off=True)),
    ("Address", "address", _addresses),
    ("DNS", "dns", lambda value: tuple(_parts(value))),
    ("MTU", "mtu", _number(68, 65535)),
    ("Table", "table", _table),
    ("PreUp", "pre_up", _command), ("PostUp", "post_up", _command),
    ("PreDown", "pre_down", _command), ("PostDown", "post_down", _command),
    ("SaveConfig", "save_config", _flag),
)
_PEER: tuple[tuple[str, str, _Reader], ...] = (
    ("PublicKey", "public_key", lambda value: PublicKey.from_base64(_squeezed(value))),
    ("PresharedKey", "preshared_key", _preshared),
    ("AllowedIPs", "allowed_ips", _networks),
    ("Endpoint", "endpoint", _endpoint),
    ("PersistentKeepalive", "persistent_keepalive", _number(0, 65535, off=True)),
)
_KNOWN: Mapping[str, Mapping[str, tuple[str, str, _Reader]]] = {
    kind: {row[0].lower(): row for row in rows} for kind, rows in (("interface", _INTERFACE), ("peer", _PEER))
}
"""By section and key in lower case: how it is written, the field, and what reads its value."""
