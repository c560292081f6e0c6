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
from .server import runtime_directory

__all__ = ["Running", "choose", "running"]

PATIENCE_S = 5.0


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
        """Its answer. StateError for an error that it gives, OSError when it is gone."""
        with self.connect() as sock:
            sock.sendall(json.dumps({"request": request, **fields}).encode() + b"\n")
            answer = b""
            while part := sock.recv(1 << 16):
                answer += part
        found: dict[str, Any] = json.loads(answer or b'{"error": "it ended without an answer"}')
        if "error" in found and "schema" not in found:
            raise StateError(f"{self.name}: {found['error']}")
        return found


def running() -> list[Running]:
    """Those that can be asked, by name. Sockets of processes that are gone are removed. PermissionError."""
    found = []
    try:
        entries = sorted(os.listdir(runtime_directory()))
    except FileNotFoundError:
        return []
    for entry in entries:
        name, _, pid = entry.removesuffix(".sock").rpartition(".")
        if not entry.endswith(".sock") or not pid.isdecimal():
            continue
        one = Running(name, int(pid), runtime_directory() / entry)
        try:
            one.connect().close()
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                one.path.unlink()
        except OSError:
            continue
        else:
            found.append(one)
    return found


def choose(name: str | None) -> Running:
    """The one running tunnel, or the one of that name. StateError when there is none, or several."""
    try:
        found = [one for one in running() if name is None or one.name == name]
    except PermissionError:
        raise StateError(f"{runtime_directory()} is not readable: ask as the user that runs the tunnel") from None
    if not found:
        raise StateError(f"no tunnel {name} is running" if name else "no tunnel is running")
    if len(found) > 1:
        raise StateError(f"several are running: {', '.join(f'{one.name} ({one.pid})' for one in found)}; name one")
    return found[0]
