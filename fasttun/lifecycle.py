"""Tunnel: the life of a running tunnel, whatever it speaks: start once, run, stop for good, undo everything.

A subclass fills `_set_up` (open, make the engines), `_watch` (its control thread) and `stats`.
Not for: what is opened (forwarder.py, wireguard/tunnel.py) or the loop (fasttun/_core.pyx).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from ._core import Engine
from .errors import FasttunError, StateError
from .stats import Stats

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network
    from types import TracebackType

    from typing_extensions import Self

    from .device import TunDevice

__all__ = ["Tunnel"]

log = logging.getLogger("fasttun")

RESOLVER_PATIENCE_S = 1.0
"""How long `stop()` waits for a resolver that does not answer; its thread then ends by itself."""


class Tunnel:
    """A running tunnel. Usable from any thread; starts once, stops for good."""

    mode: ClassVar[str]
    """What it speaks: "plain" or "wireguard"."""

    def __init__(self, before_threads: Callable[[], object] | None) -> None:
        self.device: TunDevice | None = None
        self._before_threads = before_threads
        self._lock = threading.RLock()  # a signal handler may call stop() inside start()
        self._ended = threading.Event()
        self._closed = threading.Event()
        self._closer: threading.Thread | None = None
        self._on_end: list[Callable[[], object]] = []
        self._state = "new"
        self._stop_asked = False
        self._error: FasttunError | None = None
        self._undo = contextlib.ExitStack()
        self._sockets: list[socket.socket] = []
        self._engines: list[Engine] = []
        self._threads: list[threading.Thread] = []
        self._watcher: threading.Thread | None = None
        self._wake = -1
        self._offloads: dict[str, str] = {}
        self._started_at = 0.0
        self._final: Stats | None = None

    # What a subclass fills in.

    def _set_up(self) -> None:
        """Opens everything, makes the engines, and ends with `_start_threads`. Undoing goes to `self._undo`."""
        raise NotImplementedError

    def _watch(self) -> None:
        """The control thread, until the tunnel is no longer starting or running."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Forgets what holds memory and descriptors, once the last snapshot is taken."""

    def stats(self) -> Stats:
        """A snapshot of all counters; after `stop()` the last one."""
        raise NotImplementedError

    # What a user calls.

    def start(self) -> None:
        """Sets everything up and starts forwarding; returns at once. What fails half-way is undone."""
        with self._lock:
            if self._state != "new":
                raise StateError(f"this tunnel is {self._state}; make a new one")
            self._state = "starting"
        try:
            self._set_up()
        except BaseException as error:
            if self._error is None:  # for others that wait
                self._error = (error if isinstance(error, FasttunError)
                               else StateError(f"the tunnel did not start: {error!r}"))
            self._tear_down()
            raise
        with self._lock:
            stop_asked, self._state = self._stop_asked, "running"
        if stop_asked:
            self.stop()

    def stop(self) -> None:
        """Ends forwarding and puts back devices, addresses and routes. May be called twice, from any thread.

        While another thread is inside `start()` it returns at once; that `start()` then ends the tunnel. While
        another is inside `stop()` it waits for that to end, except in a thread of the tunnel (`on_peer`).
        """
        here = threading.current_thread()
        with self._lock:
            if self._state == "new":
                self._state = "closed"
                self._closed.set()
                self._ended.set()
            if self._state == "starting":
                self._stop_asked = True
            mine = self._state == "running"
            if mine:
                self._closer = here  # first: a signal handler may come in between, and must not wait for itself
                self._state = "closing"
            others = self._state == "closing" and not mine and self._closer is not here
        if mine:
            self._tear_down()
        elif others and here is not self._watcher and here not in self._threads:
            # Leaving early could end the process before the other thread has put everything back.
            self._closed.wait()

    def _tear_down(self) -> None:
        """Ends the threads that there are and undoes what was set up; then everyone who waits is told."""
        self._state = "closing"
        here = self._closer = threading.current_thread()
        try:
            for engine in self._engines:
                engine.stop()
            for thread in self._threads:
                if thread is not here:
                    thread.join()
            self._wake_watcher()
            if self._watcher is not None and self._watcher is not here:
                self._watcher.join(RESOLVER_PATIENCE_S)
            self._final = self.stats()
            self._engines = []
            self._let_go()
        finally:
            try:
                self._undo.close()
            finally:
                self._state = "closed"
                self._closed.set()
                self._finish()

    close = stop

    def run(self) -> None:
        """start(), then wait until the tunnel ends, then stop(). Raises what ended it."""
        if self._state == "new":
            self.start()
        try:
            self.wait()
        finally:
            self.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the tunnel has ended, or `timeout` seconds: whether it has. Raises what ended it."""
        if self._state == "new":
            raise StateError("the tunnel was not started")
        ended = self._ended.wait(timeout)
        if ended and self._error is not None:
            raise self._error
        return ended

    async def wait_closed(self) -> None:
        """As `wait()`, without blocking the event loop."""
        if self._state == "new":
            raise StateError("the tunnel was not started")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not future.done():
                future.set_result(None)

        def ended() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
                loop.call_soon_threadsafe(settle)

        with self._lock:
            if not self._ended.is_set():
                self._on_end.append(ended)
            else:
                settle()
        await future
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            self.stop()  # start() goes on in its thread, and ends by itself
            starting.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await asyncio.to_thread(self.stop)

    def _finish(self) -> None:
        with self._lock:
            self._ended.set()
            waiting, self._on_end = self._on_end, []
        for tell in waiting:
            tell()

    # The threads.

    def _start_threads(self) -> None:
        """Gives up what is no longer needed (`before_threads`), then lets packets flow."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._undo.callback(os.close, self._wake)
        if self._before_threads is not None:
            self._before_threads()
        self._started_at = time.monotonic()
        for number, engine in enumerate(self._engines):
            thread = threading.Thread(target=self._work, args=(engine,), name=f"fasttun-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._watcher = threading.Thread(target=self._keep_watch, name="fasttun-watch", daemon=True)
        self._watcher.start()

    def _work(self, engine: Engine) -> None:
        try:
            engine.run()
        except FasttunError as error:
            self._fail(error)
        except BaseException as error:  # a signal handler that raised, or a defect: both end the tunnel
            log.exception("the loop ended unexpectedly")
            self._fail(StateError(f"the loop ended: {error!r}"))

    def _fail(self, error: FasttunError) -> None:
        if self._state in ("starting", "running") and self._error is None:
            self._error = error
            for engine in self._engines:
                engine.stop()
            self._finish()

    def _keep_watch(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # a tunnel that greets nobody any more must not look healthy
            if self._state in ("starting", "running"):
                log.exception("the watcher ended unexpectedly")
                self._fail(StateError(f"the watcher ended: {error!r}"))

    def _wake_watcher(self) -> None:
        if self._wake >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    # What it is.

    @property
    def routes(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks that the kernel routes into the device, in any table; empty without a device."""
        from .routes import routes_through

        return routes_through(self.device)

    def through_the_loop(self) -> contextlib.AbstractContextManager[object]:
        """Within it every packet passes through the loop, where it can be captured."""
        return contextlib.nullcontext()

    @property
    def running(self) -> bool:
        """Whether packets are being forwarded."""
        return self._state == "running" and not self._ended.is_set()

    @property
    def local_port(self) -> int:
        """The UDP port of this side; 0 before `start()` and on sockets that have none."""
        name = self._sockets[0].getsockname() if self._sockets and self._state == "running" else None
        return int(name[1]) if isinstance(name, tuple) else 0

    def worker_cpu_s(self) -> list[float]:
        """Processor seconds of each worker so far; empty when none runs."""
        ticks = os.sysconf("SC_CLK_TCK")
        found = []
        for thread in self._threads:
            with contextlib.suppress(OSError), open(f"/proc/self/task/{thread.native_id}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
                found.append((int(fields[11]) + int(fields[12])) / ticks)
        return found
