"""How the package speaks netlink: pyroute2's IPRoute, in the right thread and network namespace.

pyroute2 is imported at the first use. Not for: what is asked or changed (`fasttun.device`, `fasttun.mtu`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

__all__ = ["Place", "code_of", "netlink"]

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000  # linux/sched.h


class Place:
    """The network namespace of the thread that made it: later calls run there, whatever thread they are in.

    IPRoute drives an event loop of its own, so it must not run inside a running one either.
    """

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no /proc: then nobody moves between namespaces by it
            self._fd = -1

    def run(self, work: Callable[[], T]) -> T:
        """work()'s value or exception, from this thread when it fits, else from one made for it."""
        elsewhere = self._elsewhere()
        if not elsewhere and not _in_event_loop():
            return work()
        done: list[T] = []
        failed: list[BaseException] = []

        def inside() -> None:
            try:
                if elsewhere:
                    _setns(self._fd)
                done.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=inside, name="fasttun-netlink")
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return done[0]

    def _elsewhere(self) -> bool:
        if self._fd < 0:
            return False
        mine, here = os.fstat(self._fd), os.stat("/proc/thread-self/ns/net")
        return (mine.st_dev, mine.st_ino) != (here.st_dev, here.st_ino)

    def close(self) -> None:
        """Idempotent. Later `run`s stay in the caller's namespace."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _setns(fd: int) -> None:
    if sys.version_info >= (3, 12):
        os.setns(fd, _CLONE_NEWNET)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def netlink() -> Iterator[Any]:
    """A pyroute2 IPRoute for a few calls: about 3 ms, the first one 150 ms more for the import."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        yield ipr


def code_of(error: BaseException) -> int | None:
    """The errno of a netlink or system error; None for any other exception."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    from pyroute2.netlink.exceptions import NetlinkError

    return abs(int(error.code)) if isinstance(error, NetlinkError) else None
