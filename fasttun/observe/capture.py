"""A capture of a running tunnel: from the loops' rings to a stream of pcapng, in a thread of whoever asked.

The loops never wait for it; what found a ring full is counted and written down at the end.
Not for: the file format (`pcapng`), the filter (`filter`), who may ask (`server`).
"""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

from .._version import __version__
from ..errors import ConfigurationError
from . import pcapng
from .filter import compile_filter
from .local import LocalAddresses

if TYPE_CHECKING:
    from .._core import Engine
    from .handshakes import HandshakeTap, KeyQueue

    Source = Engine | HandshakeTap

__all__ = ["SNAP_LENGTH", "WHAT", "Capture", "Captured"]

WHAT = ("inner", "outer", "both")
SNAP_LENGTH = 262144
"""Bytes: more than any packet, as Wireshark's default."""
PAUSE_S = 0.05


@dataclass(frozen=True)
class Captured:
    """What a capture came to: packets written, and packets that found the ring full."""

    packets: int
    missed: int


class Capture:
    """One capture. what: "inner", "outer" or "both". Raises `ConfigurationError` here, `StateError` in `run`."""

    def __init__(self, *, what: str = "inner", filter: str = "", snap_length: int = SNAP_LENGTH) -> None:
        if what not in WHAT:
            raise ConfigurationError("what", f"{what!r} is not known", f"use {', '.join(WHAT)}")
        if not 1 <= snap_length <= SNAP_LENGTH:
            raise ConfigurationError("snap_length", f"{snap_length} is out of range", f"use 1 to {SNAP_LENGTH}")
        self._inner, self._outer = what != "outer", what != "inner"
        self._clauses = compile_filter(filter)
        self._snap_length = snap_length
        self._stop = threading.Event()
        self._packets = self._missed = 0
        self._addresses = LocalAddresses()

    def stop(self) -> None:
        """Ends `run` soon. Any thread."""
        self._stop.set()

    def run(self, engines: Sequence[Source], device: str, write: Callable[[bytes], object], *,
            local_port: int = 0, limit: int | None = None, seconds: float | None = None,
            keys: KeyQueue | None = None, begun: Callable[[], object] = bool) -> Captured:
        """Writes pcapng by `write` until `stop`, `limit` packets, or `seconds` have passed, and what is left then.

        keys: what is in it is written before the packets that it opens. begun: called once packets are taken.
        An error that `write` raises ends the capture and goes on to the caller.
        """
        end = None if seconds is None else time.monotonic() + seconds
        self._packets = self._missed = 0
        with self._rings(engines, local_port):
            write(pcapng.header(device, self._snap_length, f"fasttun {__version__}"))
            begun()
            while not self._stop.is_set() and self._packets != limit and (end is None or time.monotonic() < end):
                if not self._pass_on(engines, write, limit, keys):
                    self._stop.wait(PAUSE_S)
        while self._packets != limit and self._pass_on(engines, write, limit, keys):
            pass  # what the rings still held
        # One ring serves both interfaces: the loss is written down once.
        interface = pcapng.INNER if self._inner else pcapng.OUTER
        write(pcapng.statistics(interface, time.time_ns(), self._missed))
        return Captured(self._packets, self._missed)

    def _pass_on(self, engines: Sequence[Source], write: Callable[[bytes], object], limit: int | None,
                 keys: KeyQueue | None) -> int:
        """Writes what the rings hold, in the order of time; how many packets that was."""
        found = [engine.capture_read() for engine in engines]
        # Only now: a key is queued before the packet that was made with it is sent.
        for text in keys.take() if keys is not None else ():
            write(pcapng.secrets(text))
        self._missed = sum(missed for _, missed in found)
        ordered = list(heapq.merge(*(taken for taken, _ in found), key=itemgetter(0)))
        if limit is not None:
            ordered = ordered[:limit - self._packets]
        self._packets += len(ordered)
        if ordered:
            write(b"".join(self._block(*record) for record in ordered))
        return len(ordered)

    def _block(self, at_ns: int, outer: bool, outbound: bool, length: int, data: bytes) -> bytes:
        if outer:
            return pcapng.packet(pcapng.OUTER, at_ns, outbound, length, self._addresses.fill(data, outbound=outbound))
        return pcapng.packet(pcapng.INNER, at_ns, outbound, length, data)

    @contextlib.contextmanager
    def _rings(self, engines: Sequence[Source], local_port: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for engine in engines:
                engine.capture_start(inner=self._inner, outer=self._outer, snap_length=self._snap_length,
                                     clauses=self._clauses, local_port=local_port)
                stack.callback(engine.capture_stop)
            yield
