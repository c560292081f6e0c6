"""The agreement between the two sides: lines of JSON on TCP, a version, and limits that the answering side keeps.

A session is one control connection, which begins with {"bench": 1} and is answered {"bench": 1, "token": ...}.
A TCP stream is a connection to the same port that begins with {"bench": 1, "token": ..., "way": "up"|"down",
"seconds": S}: "up" is counted until its end and answered with a count, "down" is sent. On the control connection
{"do": "udp", "way": ..., "size": N, "rate": bits/s, "seconds": S} and {"do": "echo"} are answered with {"port": P};
see `serve` for what follows. An answer to what cannot be done is {"error": "..."}.
Up is from who asks to who answers.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any

from ..errors import StateError

__all__ = [
    "LARGEST_DATAGRAM", "LONGEST_SECONDS", "MOST_BYTES", "MOST_STREAMS", "PATIENCE_S", "PORT", "TOKEN_BYTES",
    "VERSION", "Lines", "patient", "widen",
]

VERSION = 1
PORT = 5204
"""TCP; inside the tunnel only."""
LONGEST_SECONDS = 60.0
"""Of one transfer."""
MOST_STREAMS = 16
"""At a time."""
LARGEST_DATAGRAM = 9000
"""Payload bytes; below any path's own limit it is the path that decides."""
MOST_BYTES = 1 << 40
"""Of one transfer: more than 100 Gbit/s make in `LONGEST_SECONDS`."""
PATIENCE_S = 10.0
"""How long either side waits for the other without a sign of life."""
TOKEN_BYTES = 8
_LONGEST_LINE = 4096
_SO_RCVBUFFORCE = 33


class Lines:
    """JSON lines on a connected socket. Errors: StateError for what is no line of JSON, OSError."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""

    def send(self, **fields: Any) -> None:
        """One line."""
        self.sock.sendall(json.dumps(fields).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next line. StateError when the other side says {"error"} or has ended."""
        while b"\n" not in self._rest:
            part = self.sock.recv(_LONGEST_LINE)
            self._rest += part
            if not part or len(self._rest) > _LONGEST_LINE:
                raise StateError("the other side has ended" if not part else "the other side does not speak this")
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise StateError("the other side does not speak this")
        if "error" in found:
            raise StateError(f"the other side says: {found['error']}"[:500])
        return found


def patient(sock: socket.socket, seconds: float = PATIENCE_S) -> None:
    """Makes a blocking call give up (BlockingIOError) after so long, without `settimeout`'s second system call."""
    sock.settimeout(None)
    wait = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)


def widen(sock: socket.socket, size: int = 4 << 20) -> None:
    """A receive buffer of that many bytes, or what the kernel allows."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
