"""Finds the running tunnels of this machine and asks them. Not for: what they answer (`snapshot`)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StateError
from .server import VARIABLE, runtime_directory

__all__ = ["Running", "choose", "known", "running"]

PATIENCE_S = 5.0
LONGEST_ANSWER = 1 << 26
"""Bytes; some hundred thousand peers."""
ROOTS = Path("/run/fasttun")
"""Root's runtime directory."""


@dataclass(frozen=True)
class Running:
    """A running tunnel: its device's name, its process, its control socket."""

    name: str
    pid: int
    path: Path

    def connect(self) -> socket.socket:
        """OSError when it is gone, or not ours to ask."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(PATIENCE_S)
            sock.connect(str(self.path))
        except BaseException:
            sock.close()
            raise
        return sock

    def ask(self, request: str = "snapshot", **fields: Any) -> dict[str, Any]:
        """Its answer. StateError for an error that it gives, and when it has ended meanwhile."""
        try:
            answer = self._exchange(json.dumps({"request": request, **fields}).encode() + b"\n")
            found: dict[str, Any] = json.loads(answer)
        except TimeoutError:
            raise StateError(f"{self.name} (process {self.pid}) does not answer") from None
        except (OSError, ValueError):
            raise StateError(f"{self.name} has ended") from None
        if "error" in found and "schema" not in found:
            raise StateError(f"{self.name}: {found['error']}")
        return found

    def _exchange(self, line: bytes) -> bytes:
        """What comes until the other side closes, or ValueError when that is beyond all reason."""
        with self.connect() as sock:
            sock.sendall(line)
            answer = bytearray()
            while part := sock.recv(1 << 16):
                answer += part
                if len(answer) > LONGEST_ANSWER:
                    raise ValueError("too long")
        return bytes(answer)


def running() -> list[Running]:
    """Those that can be asked, by name. Sockets of processes that are gone are removed.

    PermissionError, with the file's name, when there are none but some that this user may not ask.
    """
    found: list[Running] = []
    refused: OSError | None = None
    for directory in _directories():
        try:
            entries = sorted(os.listdir(directory))
        except FileNotFoundError:
            continue
        except PermissionError as error:
            refused = error
            continue
        for one in filter(None, (_named(directory / entry) for entry in entries)):
            try:
                one.connect().close()
            except ConnectionRefusedError:
                with contextlib.suppress(OSError):
                    one.path.unlink()
            except PermissionError as error:
                refused = PermissionError(error.errno, error.strerror, str(one.path))
            except OSError:
                continue
            else:
                found.append(one)
    if refused is not None and not found:
        raise refused
    return sorted(found, key=lambda one: (one.name, one.pid))


def _directories() -> list[Path]:
    """Where this user's sockets are, and for all but root also where root's are."""
    own = runtime_directory()
    return [own] if os.environ.get(VARIABLE) or own == ROOTS else [own, ROOTS]


def _named(path: Path) -> Running | None:
    """NAME.PID.sock, taken apart; None for another kind of file."""
    name, _, pid = path.name.removesuffix(".sock").rpartition(".")
    return Running(name, int(pid), path) if path.name.endswith(".sock") and pid.isdecimal() else None


def choose(name: str | None) -> Running:
    """The one running tunnel, or the one of that name. StateError when there is none, or several."""
    found = [one for one in known() if name is None or one.name == name]
    if not found:
        raise StateError(f"no tunnel {name} is running")
    if len(found) > 1:
        raise StateError(f"several are running: {', '.join(f'{one.name} ({one.pid})' for one in found)}; name one")
    return found[0]


def known() -> list[Running]:
    """As `running`, but StateError, for people, when there are none or none that may be asked."""
    try:
        found = running()
    except PermissionError as error:
        raise StateError(
            f"no tunnel of this user is running, and {error.filename} is not for it to read; "
            "ask as the user that runs the tunnel, such as root"
        ) from None
    if not found:
        raise StateError("no tunnel is running")
    return found
