"""The configuration file as the state of a listener: peers come and go, everything else stays byte for byte.

Each change is made under a lock, to a copy that takes the file's place at once: whoever reads, and whatever
crashes, finds the file before or after the change, whole. A crash may leave the copy beside it (`.NAME.conf.….tmp`,
mode 0600); who takes the lock next takes it away.
Not for: the format (`config`), a running tunnel (`uapi`).
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import ConfigurationError
from .config import Config, PeerConfig, Section, read_sections, read_text, write_private
from .keys import PublicKey

__all__ = ["Store", "free_addresses"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Edit = tuple[int, int, Sequence[str]]
"""First line, last line (excluded), what comes in their place."""

_ENDPOINT = re.compile(r"#\s*Endpoint\s*=\s*(\S+)", re.IGNORECASE)
_STALE_S = 60.0
"""A writer that does not take the lock (`Config.write`) is done with its copy within this."""


class Store:
    """A wg-quick file that is edited in place. ConfigurationError for what is wrong with it, OSError from the disk.

    path: as given; a symbolic link stays one, and its target is what changes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._target = Path(os.path.realpath(path))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the file meanwhile. The lock is a file beside it, since the file itself is replaced."""
        lock = self._target.with_name(f".{self._target.name}.lock")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._sweep()
            yield
        finally:
            os.close(handle)

    def _sweep(self) -> None:
        prefix = f".{self._target.name}."
        with os.scandir(self._target.parent) as entries:
            for entry in entries:
                if entry.name.startswith(prefix) and entry.name.endswith(".tmp"):
                    with contextlib.suppress(OSError):
                        if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_S:
                            os.unlink(entry.path)

    def text(self) -> str:
        """The file as it is, with its line ends; bytes that are not UTF-8 are escaped (surrogateescape)."""
        return read_text(self.path)

    def config(self) -> Config:
        """The file as values."""
        return self._parse(self.text())

    def _parse(self, text: str) -> Config:
        return Config.parse(text, source=str(self.path))

    def replace(self, text: str) -> None:
        """`text` takes the file's place. Owner and mode stay; a mode that others may read does not."""
        self._parse(text)
        write_private(self._target, text, like=self._target.stat())

    def add_peer(self, peer: PeerConfig, *, endpoint: str | None = None) -> str:
        """Puts the peer at the end. Returns the text before. ConfigurationError when its key or name is taken.

        endpoint: to be remembered with the same write, see `remember_endpoint`.
        """
        before = self.text()
        for other in self._parse(before).peers:
            if other.public_key == peer.public_key:
                raise ConfigurationError("name", f"{peer.public_key} is a peer already", "revoke it first")
            if peer.name and other.name == peer.name:
                raise ConfigurationError("name", f"{peer.name!r} is taken", "choose another, or revoke it first")
        after = before if endpoint is None else self._with_endpoint(before, endpoint)
        self.replace(_with_section(after, peer.text()))
        return before

    def remove_peer(self, who: str) -> tuple[PeerConfig, str]:
        """Takes out the peer with this name or public key: it, and the text before. ConfigurationError for none."""
        before = self.text()
        found = [peer for peer in self._parse(before).peers if who in (peer.name, str(peer.public_key))]
        if not found:
            raise ConfigurationError("name", f"{who!r} is no peer of {self.path}", "see fasttun peers")
        if len(found) > 1:
            raise ConfigurationError("name", f"{who!r} is the name of {len(found)} peers", "give the public key")
        lines = before.split("\n")
        self.replace(_edited(lines, [_removal(section, lines) for section in read_sections(before)
                                     if _key(section) == found[0].public_key]))
        return found[0], before

    def save(self, config: Config) -> None:
        """The file says what `config` says, in its own order and with its own comments: what SaveConfig does.

        Settings that say the same already stay as they are written. Names that `config` does not know are kept.
        A file that is gone is made anew.
        """
        if not self._target.exists():
            write_private(self._target, config.text())
            return
        before = self.text()
        self.replace(_saved(before, self._parse(before), config))

    def endpoint(self) -> str | None:
        """What was remembered by `remember_endpoint`: a comment in [Interface]."""
        text = self.text()
        place = _endpoint_line(text.split("\n"), read_sections(text, str(self.path)))
        return place[1] if place else None

    def remember_endpoint(self, endpoint: str) -> None:
        """Keeps the public address that guests are told, as a comment that other programs pass over."""
        self.replace(self._with_endpoint(self.text(), endpoint))

    def _with_endpoint(self, text: str, endpoint: str) -> str:
        lines, sections = text.split("\n"), read_sections(text, str(self.path))
        end = _line_end(lines)
        comment = f"# Endpoint = {endpoint}{end}"
        if place := _endpoint_line(lines, sections):
            return _edited(lines, [(place[0], place[0] + 1, [comment])])
        header = next((section.header for section in sections if section.kind == "interface"), None)
        if header is None:
            return f"[Interface]{end}\n{comment}\n{end}\n" + text.removeprefix("\ufeff")
        return _edited(lines, [(header + 1, header + 1, [comment])])


# ----------------------------------------------------------------------------------------------- edits of a text

def _edited(lines: list[str], edits: Iterable[_Edit]) -> str:
    """The text with all edits, which do not overlap, made."""
    lines = list(lines)
    for first, last, put in sorted(edits, key=lambda edit: edit[:2], reverse=True):
        lines[first:last] = put
    return "\n".join(lines)


def _line_end(lines: list[str]) -> str:
    """What stands before each line feed."""
    return "\r" if len(lines) > 1 and lines[0].endswith("\r") else ""


def _with_section(text: str, section: str) -> str:
    feed = _line_end(text.split("\n")) + "\n"
    if text and not text.endswith("\n"):
        text += feed
    gap = feed if text.strip("\ufeff\r\n") and not text.endswith(("\n\n", "\n\r\n")) else ""
    return text + gap + section.replace("\n", feed)


def _removal(section: Section, lines: list[str]) -> _Edit:
    """All that is the section's, and the blank lines below unless they are all that parts its neighbours."""
    end = section.end
    if section.first == 0 or not lines[section.first - 1].strip():
        while end < len(lines) - 1 and not lines[end].strip():
            end += 1
    return section.first, end, ()


def _key(section: Section) -> PublicKey | None:
    values = [setting.value for setting in section.settings if setting.key == "publickey"]
    return PublicKey.from_base64("".join(values[-1].split())) if values else None


def _endpoint_line(lines: list[str], sections: list[Section]) -> tuple[int, str] | None:
    """Where the remembered endpoint stands, and what it is."""
    for section in sections:
        if section.kind == "interface":
            for number in range(section.header + 1, section.end):
                if found := _ENDPOINT.fullmatch(lines[number].strip()):
                    return number, found[1]
    return None


def _saved(text: str, old: Config, new: Config) -> str:
    lines, sections = text.split("\n"), read_sections(text)
    edits: list[_Edit] = []
    device = [section for section in sections if section.kind == "interface"]
    edits += _resetting(device, lines, old.settings(), new.settings())
    wanted = {peer.public_key: peer for peer in new.peers}
    known = {peer.public_key: peer for peer in old.peers}
    kept: set[PublicKey] = set()
    keys = [_key(section) for section in sections]
    for section, key in zip(sections, keys, strict=True):
        if key is None:
            continue
        if key in wanted and keys.count(key) == 1:
            kept.add(key)
            edits += _resetting([section], lines, known[key].settings(), wanted[key].settings())
        else:
            edits.append(_removal(section, lines))
    text = _edited(lines, edits)
    if not device:
        text = new.with_peers(()).text() + text.removeprefix("\ufeff")
    for key, peer in wanted.items():
        if key not in kept:
            text = _with_section(text, _named(peer, known.get(key)).text())
    return text


def _named(peer: PeerConfig, known: PeerConfig | None) -> PeerConfig:
    if peer.name is None and known is not None:
        return PeerConfig(peer.public_key, peer.preshared_key, peer.allowed_ips, peer.endpoint,
                          peer.persistent_keepalive, known.name)
    return peer


def _resetting(sections: list[Section], lines: list[str], old: list[tuple[str, str]],
               new: list[tuple[str, str]]) -> Iterator[_Edit]:
    """Edits that change what differs: a key's lines go, its new ones stand where the first stood, or at the end."""
    if not sections:
        return
    end = _line_end(lines)
    settings = [setting for section in sections for setting in section.settings]
    last = max((setting.number for setting in sections[0].settings), default=sections[0].header) + 1
    added: list[str] = []
    for key in dict.fromkeys(key for key, _ in (*old, *new)):
        values = [value for other, value in new if other == key]
        if values == [value for other, value in old if other == key]:
            continue
        put = [f"{key} = {value}{end}" for value in values]
        numbers = [setting.number for setting in settings if setting.key == key.lower()]
        if not numbers:
            added += put
        for number in numbers:
            yield number, number + 1, put if number == numbers[0] else ()
    yield last, last, added


# --------------------------------------------------------------------------------------------- addresses

def free_addresses(config: Config, taken: Iterable[Network] = ()) -> tuple[Interface, ...]:
    """One free address in each network of the device's own. ConfigurationError when there is none.

    taken: networks beside those of the configuration's peers.
    """
    if not config.address:
        raise ConfigurationError("Address", "the device has none", "add Address = 10.7.0.1/24 to its file")
    used = [*taken, *(network for peer in config.peers for network in peer.allowed_ips)]
    used += [ipaddress.ip_network(address.ip) for address in config.address]
    chosen: dict[Network, Interface] = {}
    for address in config.address:
        if address.network not in chosen:
            chosen[address.network] = free = _free(address.network, used)
            used.append(free.network)
    return tuple(chosen.values())


def _free(network: Network, used: Iterable[Network]) -> Interface:
    """The lowest. What a peer has is taken whole, unless it holds all of this network."""
    first, last = int(network.network_address), int(network.broadcast_address)
    if network.max_prefixlen - network.prefixlen > 1:  # else each address is a host's (RFC 3021, RFC 6164)
        first += 1  # the network's own, IPv6's routers' (RFC 4291 §2.6.1)
        last -= network.version == 4
    blocks = sorted((int(other.network_address), int(other.broadcast_address)) for other in used
                    if other.version == network.version and (
                        other.prefixlen > network.prefixlen or other.prefixlen == network.max_prefixlen))
    for low, high in blocks:
        if low <= first <= high:
            first = high + 1
    if first > last:
        raise ConfigurationError("Address", f"{network} is full", "give the device a larger network, or revoke a peer")
    found: Address = type(network.network_address)(first)
    return ipaddress.ip_interface(f"{found}/{network.max_prefixlen}")
