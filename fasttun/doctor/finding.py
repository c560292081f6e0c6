"""What a check has found, and what all checks are asked about.

Not for: looking (the other files of this package), showing (`fasttun.cli.doctor`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..config import DEFAULT_PORT

if TYPE_CHECKING:
    from ..wireguard.config import Config
    from .contact import Contact

__all__ = ["CAP_NET_ADMIN", "FAIL", "OK", "SKIPPED", "STATUSES", "WARNING", "Finding", "Question",
           "has_capability", "in_container"]

OK, WARNING, FAIL, SKIPPED = STATUSES = ("ok", "warning", "fail", "skipped")
CAP_NET_ADMIN = 12  # linux/capability.h
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")


@dataclass(frozen=True)
class Finding:
    """name: of the check. status: one of STATUSES. seen: what is so. mend: what to do, "" when nothing is."""

    name: str
    status: str
    seen: str
    mend: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked about. `server`: host name or address, None for a listener. `port`: the listener's UDP port.

    `config`: of a WireGuard tunnel. `timeout_s`: how long an answer of the server is waited for, in all.
    """

    server: str | None = None
    port: int = DEFAULT_PORT
    config: Config | None = field(default=None, repr=False)
    timeout_s: float = 2.0

    @property
    def listens(self) -> bool:
        return self.server is None

    @cached_property
    def contact(self) -> Contact | None:
        """The one exchange with the server that several checks read; None without a server."""
        if self.server is None:
            return None
        from .contact import contact

        return contact(self.server, self.port, self.timeout_s)


def has_capability(number: int) -> bool:
    """Whether this process has the capability in effect (/proc/self/status)."""
    with open("/proc/self/status") as file:
        return any(line.startswith("CapEff:") and int(line.split()[1], 16) >> number & 1 for line in file)


def in_container() -> bool:
    """Whether a container runtime has left its mark."""
    return "container" in os.environ or any(map(os.path.exists, _CONTAINER_MARKS))
