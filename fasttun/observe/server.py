"""The control socket of a running tunnel: a line of JSON in, a line of JSON out.

NAME.PID.sock in the runtime directory, mode 0600. {"request": "snapshot"} is answered with the document of
`snapshot`; an answer to what cannot be done is {"error": "..."}. A handler may also stream after its line.
Not for: finding sockets and asking (`client`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FasttunError
from .snapshot import snapshot

__all__ = ["ControlServer", "runtime_directory"]

VARIABLE = "FASTTUN_RUNTIME_DIR"
LONGEST_REQUEST = 4096
PATIENCE_S = 5.0
RETRY_S = 0.05
CLIENTS = 16

Handler = Callable[[socket.socket, dict[str, Any]], dict[str, Any] | None]
"""Given the connection and the request; its answer, or None when it has answered by itself."""


def runtime_directory() -> Path:
    """Where the sockets are: FASTTUN_RUNTIME_DIR, /run/fasttun for root, else below XDG_RUNTIME_DIR."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/fasttun")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "fasttun"


class ControlServer:
    """Answers for one tunnel. `open` binds (OSError), `start` begins, `close` ends and removes the socket."""

    def __init__(self, tunnel: Any) -> None:
        self._tunnel = tunnel
        self._handlers: dict[str, Handler] = {"snapshot": lambda _, __: snapshot(tunnel)}
        self._listener: socket.socket | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._room = threading.BoundedSemaphore(CLIENTS)
        self.path: Path | None = None

    def register(self, request: str, handler: Handler) -> None:
        """Answers one more kind of request."""
        self._handlers[request] = handler

    def open(self) -> None:
        """Makes the socket, and the directory (0700) where it is missing. OSError."""
        directory = runtime_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        device = self._tunnel.device
        name = device.name if device is not None else getattr(self._tunnel, "name", "descriptor")
        path = directory / f"{name}.{os.getpid()}.sock"
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)  # of an earlier process with our number
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o177)
            try:
                listener.bind(str(new))
            finally:
                os.umask(before)
            listener.listen(CLIENTS)
            new.rename(path)  # only now: whoever finds a socket that refuses takes it for a dead one
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        self._listener, self.path = listener, path
        self._wake = socket.socketpair()

    def start(self) -> None:
        """Answers from now on, in a thread. Nothing when `open` has failed."""
        if self._listener is not None:
            self._thread = threading.Thread(target=self._run, name="fasttun-control", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the thread and removes the socket. May be called twice."""
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake[1].send(b"x")
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for sock in (self._listener, *(self._wake or ())):
            if sock is not None:
                sock.close()
        self._listener = self._wake = None
        if self.path is not None:
            with contextlib.suppress(OSError):  # after --user the directory is not ours; a reader removes it
                self.path.unlink()
            self.path = None

    def _run(self) -> None:
        listener, wake = self._listener, self._wake
        assert listener is not None
        assert wake is not None
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(wake[0], select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if wake[0].fileno() in ready:
                return
            try:
                connection, _ = listener.accept()
            except OSError:  # gone again; or out of descriptors, and then it stays ready
                time.sleep(RETRY_S)
                continue
            if self._room.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(PATIENCE_S)
                answer = self._answer(connection)
                if answer is not None:
                    connection.sendall(json.dumps(answer).encode() + b"\n")
        finally:
            self._room.release()

    def _answer(self, connection: socket.socket) -> dict[str, Any] | None:
        line = b""
        while not line.endswith(b"\n"):
            part = connection.recv(LONGEST_REQUEST)
            line += part
            if not part or len(line) > LONGEST_REQUEST:
                return {"error": "a request is one line of JSON"}
        try:
            request = json.loads(line)
            handler = self._handlers[request["request"]]
        except (ValueError, TypeError, RecursionError):
            return {"error": "a request is one line of JSON"}
        except KeyError:
            return {"error": f"known requests: {', '.join(sorted(self._handlers))}"}
        try:
            return handler(connection, request)
        except FasttunError as error:
            return {"error": str(error)}
