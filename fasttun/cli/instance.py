"""The one process that keeps a tunnel of a name up: its lock, its number, and how another process ends it.

NAME.pid in the runtime directory is locked (flock) as long as the process lives, so a number in it that counts
is never a stale one. NAME.state beside it is the tunnel's `Journal`.
Not for: what a tunnel does (`updown`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import DeviceError, StateError

__all__ = ["Instance"]

_DIRECTORY = "/run/fasttun"
_VARIABLE = "FASTTUN_RUNTIME_DIR"
_WRITTEN_WITHIN_S = 2.0
"""How long after its lock a process may take to write its number."""


class Instance:
    """The place of the tunnel `name` in the runtime directory: FASTTUN_RUNTIME_DIR, or /run/fasttun."""

    def __init__(self, name: str) -> None:
        self.name = name
        directory = Path(os.environ.get(_VARIABLE) or _DIRECTORY)
        self.state = directory / f"{name}.state"
        self._pid = directory / f"{name}.pid"

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Be the tunnel's process for the block. StateError when another one is."""
        fd = self._lock()
        if fd is None:
            number = self._number()
            who = f" (process {number})" if number else ""
            raise StateError(f"{self.name} is up already{who}; to end it: fasttun down {self.name}")
        with self._held(fd):
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
            yield

    @contextlib.contextmanager
    def end(self) -> Iterator[bool]:
        """End the process if there is one, wait until it has; then nobody else is it for the block.

        Gives whether there was one.
        """
        fd = self._lock()
        was = fd is None
        if fd is None:
            self._terminate()
            fd = self._lock(wait=True)
        assert fd is not None
        with self._held(fd):
            yield was

    def _lock(self, *, wait: bool = False) -> int | None:
        """The locked file's descriptor; None when another process has it."""
        self._make_directory()
        while True:
            fd = os.open(self._pid, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                # Whoever had it before has removed the file: then the lock is on nothing.
                if os.fstat(fd).st_ino == os.stat(self._pid).st_ino:
                    return fd
            except BlockingIOError:
                os.close(fd)
                return None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    @contextlib.contextmanager
    def _held(self, fd: int) -> Iterator[None]:
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._pid.unlink()
            os.close(fd)

    def _make_directory(self) -> None:
        try:
            self._pid.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DeviceError("make", str(self._pid.parent), error.errno or 0, f"or set {_VARIABLE}") from error

    def _number(self) -> int:
        """The process's; 0 when it is gone, or does not tell."""
        deadline = time.monotonic() + _WRITTEN_WITHIN_S
        while time.monotonic() < deadline:
            try:
                text = self._pid.read_text()
            except FileNotFoundError:
                return 0
            if text.endswith("\n"):
                return int(text)
            time.sleep(0.01)
        return 0

    def _terminate(self) -> None:
        """Ask the process that has the lock to end, and no other that has its number by now."""
        number = self._number()
        if not number:
            return
        try:
            process = os.pidfd_open(number)
        except ProcessLookupError:
            return
        try:
            fd = self._lock()
            if fd is None:  # it has the lock still, so the descriptor is this process's
                signal.pidfd_send_signal(process, signal.SIGTERM)
            else:
                os.close(fd)
        except ProcessLookupError:
            pass
        finally:
            os.close(process)
