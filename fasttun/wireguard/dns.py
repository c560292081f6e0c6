"""Name servers for as long as a tunnel is up, through what manages /etc/resolv.conf on this host.

That is resolvconf(8) where it is installed, as wg-quick does, else systemd-resolved. Not for: resolving names.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DeviceError
from .changes import run_tool

__all__ = ["NameServers"]

_INTERFACE_ORDER = Path("/etc/resolvconf/interface-order")
_RESOLVED = Path("/run/systemd/resolve")


@dataclass(frozen=True)
class NameServers:
    """All queries go to `servers`, through the tunnel. A change as in `changes`.

    tool: "resolvconf" or "resolvectl". record: the name under which the tool keeps it; for resolvectl the
    interface. search: domains tried for names without a dot.
    """

    tool: str
    record: str
    servers: tuple[str, ...]
    search: tuple[str, ...]

    @classmethod
    def of(cls, interface: str, entries: Iterable[str]) -> NameServers | None:
        """For the entries of `DNS =`: addresses are servers, other words search domains. None without a server.

        DeviceError names the package that is missing.
        """
        servers: list[str] = []
        search: list[str] = []
        for entry in entries:
            (servers if _is_address(entry) else search).append(entry)
        if not servers:
            return None
        tool = _find_tool(interface)
        record = _record_prefix() + interface if tool == "resolvconf" else interface
        return cls(tool, record, tuple(servers), tuple(search))

    def apply(self) -> None:
        if self.tool == "resolvconf":
            lines = [f"nameserver {server}\n" for server in self.servers]
            if self.search:
                lines.append(f"search {' '.join(self.search)}\n")
            # Metric 0 and exclusive: no other interface's servers are asked.
            run_tool(["resolvconf", "-a", self.record, "-m", "0", "-x"], "".join(lines))
            return
        run_tool(["resolvectl", "dns", self.record, *self.servers])
        # "~.": this interface is the one for every domain.
        run_tool(["resolvectl", "domain", self.record, *self.search, "~."])

    def undo(self) -> None:
        if self.tool == "resolvconf":
            run_tool(["resolvconf", "-d", self.record, "-f"])
        elif Path("/sys/class/net", self.record).exists():  # else resolved has forgotten it with the interface
            run_tool(["resolvectl", "revert", self.record])


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _find_tool(interface: str) -> str:
    if shutil.which("resolvconf"):
        return "resolvconf"
    if shutil.which("resolvectl") and _RESOLVED.is_dir():
        return "resolvectl"
    raise DeviceError(
        "set the name servers of",
        interface,
        errno.ENOENT,
        "apt install openresolv (or run systemd-resolved), or take DNS out of the file",
        "neither resolvconf nor a running systemd-resolved is here",
    )


def _record_prefix() -> str:
    """What Debian's resolvconf orders first: its list of interface names has patterns such as `tun.*`."""
    try:
        text = _INTERFACE_ORDER.read_text()
    except OSError:
        return ""
    match = re.search(r"^([A-Za-z0-9-]+)\*$", text, re.MULTILINE)
    return f"{match[1]}." if match else ""
