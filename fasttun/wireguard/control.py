"""The control socket: where `wg` finds a device in userspace, /var/run/wireguard/NAME.sock.

One thread serves all clients, none of which it ever waits for. A client has a time for each request, and bounds on
what it may send; what does not read its answer sends no further request. Whoever can connect can do all that
the protocol can: the directory and the socket are its owner's alone.
Not for: the words that go over it (`uapi`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..config import MAX_NAME
from ..errors import ConfigurationError, DeviceError, StateError
from .uapi import Device, ProtocolError, Requests, answer

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DIRECTORY", "ControlSocket", "check_name"]

DIRECTORY = "/var/run/wireguard"
"""Where `wg` looks."""
MAX_CLIENTS = 16
"""Connections at a time; one more ends the one that has been silent for longest."""
PATIENCE_S = 10.0
"""For a request to come in whole, and for its answer to be taken."""
PIECE = 1 << 16
"""Bytes read or written for one client before the others have their turn."""

# linux/inotify.h
_IN_MOVED_FROM, _IN_DELETE, _IN_DELETE_SELF, _IN_IGNORED = 0x40, 0x200, 0x400, 0x8000
_EVENT = struct.Struct("iIII")

_log = logging.getLogger(__name__)


def check_name(name: str) -> None:
    """ConfigurationError unless an interface can be called that (IFNAMSIZ, linux/if.h)."""
    if not re.fullmatch(r"[^/:\s\0]+", name) or name in (".", "..") or len(name.encode()) > MAX_NAME:
        hint = f"use 1 to {MAX_NAME} characters without spaces or slashes, such as wg0"
        raise ConfigurationError("name", f"{name!r} is not an interface's name", hint)


class ControlSocket:
    """A device's control socket. `open()`, `start()`, `close()`; as a context manager it does all three.

    name: of the interface. directory: made with mode 0700 where it is missing. listen_fd: a listening socket that
    is there already, and belongs to this object from now on. on_removed: called once, from this object's
    thread, when somebody has removed the socket's file, which by custom asks the device to end.
    DeviceError: the socket cannot be made, or (EADDRINUSE) another process serves that name.
    """

    def __init__(
        self,
        device: Device,
        name: str,
        *,
        directory: str = DIRECTORY,
        listen_fd: int | None = None,
        on_removed: Callable[[], object] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        check_name(name)
        self.path = os.path.join(directory, f"{name}.sock")
        self._name, self._directory = name, directory
        self._device = device
        self._listen_fd = listen_fd
        self._on_removed = on_removed
        self._patience_s = patience_s
        self._listener: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._wake = self._watch = -1
        self._clients: dict[int, _Client] = {}
        self._closing = False

    def open(self) -> None:
        """Listen. Clients that connect from now on wait for `start`."""
        if self._listener is not None or self._closing:
            raise StateError("a control socket opens once")
        try:
            self._listener = self._adopt() if self._listen_fd is not None else self._listen()
            self._listener.setblocking(False)
            if self._listener.getsockname() == self.path:
                self._inode = _inode(self.path)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._watch = _watch(os.path.dirname(self.path))
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, DeviceError):
                raise _failure(self.path, error) from error
            raise

    def start(self) -> None:
        """Serve, from a thread of its own."""
        if self._listener is None or self._thread is not None:
            raise StateError("a control socket starts once, after open()")
        self._thread = threading.Thread(target=self._run, name=f"{self._name}-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections and remove the socket's file. Not for `on_removed` to call; may be called twice."""
        self._closing = True
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None
        self._release()

    def __enter__(self) -> Self:
        self.open()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------- the file

    def _adopt(self) -> socket.socket:
        assert self._listen_fd is not None
        listener = socket.socket(fileno=self._listen_fd)
        if listener.family != socket.AF_UNIX or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.detach()
            raise OSError(errno.EINVAL, "not a listening Unix socket")
        listener.set_inheritable(False)
        path = listener.getsockname()
        if isinstance(path, str) and path:
            self.path = path
        return listener

    def _listen(self) -> socket.socket:
        with contextlib.suppress(FileExistsError):
            os.makedirs(self._directory, mode=0o700)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listener.fileno(), 0o600)  # the file will have it from its first moment
            with _locked(self._directory):
                self._remove_stale()
                listener.bind(self.path)
                listener.listen()
        except BaseException:
            listener.close()
            raise
        return listener

    def _remove_stale(self) -> None:
        """Take away what a process that is dead has left; DeviceError when it lives."""
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise OSError(errno.EEXIST, "a file that is no socket is in its place")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a full backlog is answered at once, and is a sign of life
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)
                return
            except FileNotFoundError:
                return
            except BlockingIOError:
                pass
        raise DeviceError("create control socket", self.path, errno.EADDRINUSE,
                          f"a process that runs serves {self._name}: end it, or choose another name")

    def _release(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._stop_listening()
        for fd in (self._wake, self._watch):
            if fd >= 0:
                os.close(fd)
        self._wake = self._watch = -1

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self._inode is not None and _inode(self.path) == self._inode:
                with contextlib.suppress(OSError):
                    os.unlink(self.path)

    # ------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        assert self._listener is not None
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._listener, select.POLLIN)
        if self._watch >= 0:
            poll.register(self._watch, select.POLLIN)
        while not self._closing:
            for fd, _ in poll.poll(self._rest_ms()):
                if fd in self._clients:
                    self._serve(self._clients[fd], poll)
                elif self._listener is not None and fd == self._listener.fileno():
                    self._accept(poll)
                elif fd == self._watch and self._was_removed():
                    poll.unregister(self._watch)
                    poll.unregister(self._listener)
                    self._stop_listening()
                    if self._on_removed is not None:
                        self._on_removed()
            now = time.monotonic()
            for client in [c for c in self._clients.values() if c.deadline is not None and now >= c.deadline]:
                self._drop(client, poll)

    def _rest_ms(self) -> int | None:
        deadlines = [client.deadline for client in self._clients.values() if client.deadline is not None]
        return max(0, int((min(deadlines) - time.monotonic()) * 1000) + 1) if deadlines else None

    def _was_removed(self) -> bool:
        """Whether the file has left. By the events alone: without privileges it can no longer be looked for."""
        name, removed = os.fsencode(os.path.basename(self.path)), False
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._watch, 1 << 16)
        while data:
            _, mask, _, length = _EVENT.unpack_from(data)
            who = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
            removed |= who == name if length else bool(mask & (_IN_DELETE_SELF | _IN_IGNORED))
            data = data[_EVENT.size + length :]
        return removed and self._inode is not None

    def _accept(self, poll: select.poll) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("control socket: no connection accepted: %s", error)
            time.sleep(0.1)  # out of descriptors: it would be asked for again at once
            return
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(min(self._clients.values(), key=lambda client: client.heard), poll)
        sock.setblocking(False)
        self._clients[sock.fileno()] = _Client(sock)
        poll.register(sock, select.POLLIN)

    def _serve(self, client: _Client, poll: select.poll) -> None:
        try:
            client.turn(self._device, self._patience_s)
        except (OSError, EOFError):
            self._drop(client, poll)
        else:
            poll.modify(client.sock, select.POLLOUT if client.to_send else select.POLLIN)

    def _drop(self, client: _Client, poll: select.poll | None = None) -> None:
        if poll is not None:
            poll.unregister(client.sock)
        del self._clients[client.sock.fileno()]
        client.sock.close()


class _Client:
    """One connection: its unfinished request, or the rest of an answer, never both growing."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.to_send = memoryview(b"")
        self.heard = time.monotonic()
        self.deadline: float | None = None
        """Until when the request must be whole, or the answer taken; None between requests."""
        self._requests = Requests()
        self._ends = False

    def turn(self, device: Device, patience_s: float) -> None:
        """Read or write as far as it goes now. Raises EOFError or OSError when the connection is over."""
        if self.to_send:
            self.to_send = self.to_send[self.sock.send(self.to_send[:PIECE], socket.MSG_NOSIGNAL) :]
            if self.to_send:
                return
            if self._ends:
                raise EOFError
            self.deadline = None
        else:
            data = self.sock.recv(PIECE)
            if not data:
                raise EOFError
            self.heard = time.monotonic()
            self._requests.feed(data)
        self._answer(device)
        if self.to_send:
            self.deadline = time.monotonic() + patience_s
        elif not self._requests:
            self.deadline = None
        elif self.deadline is None:
            self.deadline = time.monotonic() + patience_s

    def _answer(self, device: Device) -> None:
        try:
            request = self._requests.next()
            if request is None:
                return
            reply = answer(request, device)
        except ProtocolError as error:
            _log.warning("control socket: %s", error)
            reply, self._ends = error.answer(), error.fatal
        self.to_send = memoryview(reply)


def _failure(path: str, error: OSError) -> DeviceError:
    hint = "" if error.errno else "use a shorter directory"  # no errno: longer than a sockaddr_un holds
    code = error.errno or errno.ENAMETOOLONG
    return DeviceError("create control socket", path, code, hint, error.strerror or "")


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """One process at a time looks whether a socket is stale: it would take away what another has just made."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _watch(directory: str) -> int:
    """A descriptor that is readable when a file leaves the directory (inotify(7)); -1 where that cannot be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        return -1
    events = _IN_DELETE | _IN_MOVED_FROM | _IN_DELETE_SELF
    if libc.inotify_add_watch(fd, os.fsencode(directory or "."), events) < 0:
        os.close(fd)
        return -1
    return fd
