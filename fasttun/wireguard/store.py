"""The configuration file as the state of a listener: peers come and go, everything else stays byte for byte.

Each change is made under a lock, to a copy that takes the file's place at once: whoever reads, and whatever
crashes, finds the file before or after the change, whole.
Not for: the format (`config`), a running tunnel (`uapi`).
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigurationError
from .config import Config, PeerConfig, write_private
from .keys import PublicKey

__all__ = ["Store", "free_addresses"]

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_SECTION = re.compile(r"\s*\[")
_ENDPOINT = re.compile(r"^[ \t]*#[ \t]*Endpoint[ \t]*=[ \t]*(\S+)[ \t]*$", re.IGNORECASE | re.MULTILINE)


class Store:
    """A wg-quick file that is edited in place. ConfigurationError for what is wrong with it, OSError from the disk."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the file meanwhile. The lock is a file beside it, since the file itself is replaced."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def text(self) -> str:
        """The file as it is."""
        Config.read(self.path)  # says what is wrong with it
        return self.path.read_bytes().decode()

    def config(self) -> Config:
        """The file as values."""
        return Config.read(self.path)

    def replace(self, text: str) -> None:
        """`text` takes the file's place. Owner and mode stay; a mode that others may read does not."""
        Config.parse(text, source=str(self.path))
        before = self.path.stat()
        write_private(self.path, text)
        with contextlib.suppress(PermissionError):
            os.chown(self.path, before.st_uid, before.st_gid)
        os.chmod(self.path, stat.S_IMODE(before.st_mode) & 0o700 or 0o600)

    def add_peer(self, peer: PeerConfig) -> str:
        """Puts the peer at the end. Returns the text before. ConfigurationError when its key or name is taken."""
        before = self.text()
        for other in Config.parse(before, source=str(self.path)).peers:
            if other.public_key == peer.public_key:
                raise ConfigurationError("name", f"{peer.public_key} is a peer already", "revoke it first")
            if peer.name and other.name == peer.name:
                raise ConfigurationError("name", f"{peer.name!r} is taken", "choose another, or revoke it first")
        gap = "" if before.endswith("\n\n") or not before else "\n" if before.endswith("\n") else "\n\n"
        self.replace(before + gap + peer.text())
        return before

    def remove_peer(self, who: str) -> tuple[PeerConfig, str]:
        """Takes out the peer with this name or public key: it, and the text before. ConfigurationError for none."""
        before = self.text()
        found = [peer for peer in Config.parse(before, source=str(self.path)).peers
                 if who in (peer.name, str(peer.public_key))]
        if not found:
            raise ConfigurationError("name", f"{who!r} is no peer of {self.path}", "see fasttun peers")
        if len(found) > 1:
            raise ConfigurationError("name", f"{who!r} is the name of {len(found)} peers", "give the public key")
        self.replace("".join(part for part in _sections(before) if not _holds(part, found[0].public_key)))
        return found[0], before

    def endpoint(self) -> str | None:
        """What was remembered by `remember_endpoint`: a comment in the file."""
        found = _ENDPOINT.search(self.text())
        return found[1] if found else None

    def remember_endpoint(self, endpoint: str) -> None:
        """Keeps the public address that guests are told, as a comment that other programs pass over."""
        text = self.text()
        line = f"# Endpoint = {endpoint}"
        if _ENDPOINT.search(text):
            text = _ENDPOINT.sub(line, text, count=1)
        else:
            text = re.sub(r"^(\ufeff?[ \t]*\[Interface\][^\n]*)$", rf"\1\n{line}", text, count=1,
                          flags=re.IGNORECASE | re.MULTILINE)
        self.replace(text)


def _sections(text: str) -> list[str]:
    """The text cut before each line that opens a section; put together again it is the same."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        if _SECTION.match(line):
            parts.append("")
        parts[-1] += line
    return parts


def _holds(section: str, key: PublicKey) -> bool:
    found = re.search(r"^[ \t]*PublicKey[ \t]*=[ \t]*([^\s#]+)", section, re.IGNORECASE | re.MULTILINE)
    return section.lstrip().lower().startswith("[peer]") and found is not None and found[1] == str(key)


def free_addresses(config: Config) -> tuple[Interface, ...]:
    """One free address in each network of the device's own. ConfigurationError when there is none."""
    if not config.address:
        raise ConfigurationError("Address", "the device has none", "add Address = 10.7.0.1/24 to its file")
    taken: list[Network] = [network for peer in config.peers for network in peer.allowed_ips]
    own = {address.ip for address in config.address}
    chosen: dict[Network, Interface] = {}
    for address in config.address:
        if address.network not in chosen:
            chosen[address.network] = _free(address.network, taken, own)
    return tuple(chosen.values())


def _free(network: Network, taken: list[Network], own: set[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> Interface:
    # A network of several addresses that a peer has is taken whole, unless it holds the device's own network.
    blocks = [other for other in taken if other.version == network.version and not network.subnet_of(other)]  # type: ignore[arg-type]
    singles = {other.network_address for other in blocks if other.num_addresses == 1}
    wide = [other for other in blocks if other.num_addresses > 1]
    for host in network.hosts():
        if host not in own and host not in singles and not any(host in other for other in wide):
            return ipaddress.ip_interface(f"{host}/{host.max_prefixlen}")
    raise ConfigurationError("Address", f"{network} is full", "give the device a larger network, or revoke a peer")
