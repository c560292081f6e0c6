"""A capture over the control socket: one line of JSON, then pcapng until the connection's end.

    {"request": "capture", "what": "inner", "filter": "tcp port 80", "snap_length": 96, "count": 10, "seconds": 5}

All fields but the first may be left out. The answer's first line is {"capture": 1, "name": DEVICE} or an error.
"keys": true puts the WireGuard keys that open the outer packets into the file, for root and the tunnel's own user;
"handshake": true makes new sessions at the capture's begin, since those from before cannot be opened.
Whoever reads ends it by closing its writing half: then come what the rings still held, and the statistics.
A reader that does not read keeps only its own thread waiting; the loops count what it misses.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, StateError
from .capture import SNAP_LENGTH, Capture
from .client import Running
from .handshakes import HandshakeTap, KeyQueue
from .pcapng import INNER
from .server import ControlServer

__all__ = ["VERSION", "Packet", "PcapngReader", "register", "request"]

VERSION = 1
LOOK_EVERY_S = 0.2
LONGEST_LINE = 4096

_PACKET, _STATISTICS, _ISB_IFDROP = 6, 5, 5
_LARGEST_BLOCK = SNAP_LENGTH + 4096


# ------------------------------------------------------------------------------------------------------ the tunnel


def register(server: ControlServer, tunnel: Any) -> None:
    """Lets the tunnel's control socket answer "capture"."""
    server.register("capture", _Streams(tunnel, server))


class _Streams:
    """The handler: one capture at a time."""

    def __init__(self, tunnel: Any, server: ControlServer) -> None:
        self._tunnel = tunnel
        self._server = server
        self._one = threading.Lock()
        self.taking = False
        """Whether packets that pass are in a capture."""

    def __call__(self, connection: socket.socket, asked: dict[str, Any]) -> None:
        limit, seconds = _number(asked, "count", int), _number(asked, "seconds", float)
        capture = Capture(what=_text(asked, "what", "inner"), filter=_text(asked, "filter", ""),
                          snap_length=int(_number(asked, "snap_length", int) or SNAP_LENGTH))
        keys, handshake = _flag(asked, "keys"), _flag(asked, "handshake")
        if (keys or handshake) and not hasattr(self._tunnel, "key_log"):
            raise ConfigurationError("keys" if keys else "handshake", "is for encrypted tunnels; this one is plain")
        if keys:
            _check_may_have_keys(connection, self._server.path)
        if not self._tunnel.running:
            raise StateError("it does not run")
        if not self._one.acquire(blocking=False):
            raise StateError("its packets are being captured already; one capture at a time")
        try:
            self._run(capture, connection, int(limit) if limit is not None else None, seconds, keys, handshake)
        finally:
            self.taking = False
            self._one.release()
        connection.shutdown(socket.SHUT_WR)  # not before: who reads the end may begin another one at once

    def _run(self, capture: Capture, connection: socket.socket, limit: int | None, seconds: float | None,
             with_keys: bool, handshake: bool) -> None:
        tunnel = self._tunnel
        keys = KeyQueue() if with_keys else None
        device = tunnel.device.name if tunnel.device is not None else getattr(tunnel, "name", "descriptor")
        tap = HandshakeTap() if hasattr(tunnel, "tap") else None
        sources = [*tunnel._engines, *([tap] if tap is not None else [])]
        answer = json.dumps({"capture": VERSION, "name": device}).encode() + b"\n"
        sink = _Sink(connection, tunnel, answer)
        ended = threading.Event()

        def begun() -> None:
            self.taking = True
            if handshake:
                tunnel.new_handshakes()

        watch = threading.Thread(target=_until_asked, args=(connection, tunnel, capture, ended),
                                 name="fasttun-capture", daemon=True)
        watch.start()
        if tap is not None:
            tunnel.tap = tap
        try:
            with tunnel.key_log(keys.add) if keys is not None else contextlib.nullcontext(), \
                    tunnel.through_the_loop():
                capture.run(sources, device, sink.write, local_port=tunnel.local_port, limit=limit, seconds=seconds,
                            keys=keys, begun=begun)
            connection.shutdown(socket.SHUT_RD)  # wakes the watch
        finally:
            if tap is not None:
                tunnel.tap = None
            ended.set()
            watch.join()


def _until_asked(connection: socket.socket, tunnel: Any, capture: Capture, ended: threading.Event) -> None:
    """Stops the capture when its reader has had enough, or the tunnel has ended."""
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLRDHUP)
    while not ended.is_set():
        if poll.poll(LOOK_EVERY_S * 1000) or not tunnel.running:
            capture.stop()
            return


class _Sink:
    """Writes to the reader, however long it takes, while the tunnel runs."""

    def __init__(self, connection: socket.socket, tunnel: Any, first: bytes) -> None:
        connection.settimeout(LOOK_EVERY_S)
        self._connection = connection
        self._tunnel = tunnel
        self._first = first

    def write(self, data: bytes) -> None:
        """OSError when the reader has gone, or the tunnel has while the reader did not read."""
        view = memoryview(self._first + data)
        self._first = b""
        while view:
            try:
                view = view[self._connection.send(view):]
            except TimeoutError:
                if not self._tunnel.running:
                    raise


def _check_may_have_keys(connection: socket.socket, path: Path | None) -> None:
    """StateError unless root or the tunnel's own user asks, by a socket that is closed to others."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (0, os.geteuid()):
        raise StateError("its keys are for root and for the user that runs it")
    mode = stat.S_IMODE(os.stat(path).st_mode) if path is not None else 0
    if mode & 0o077:
        raise StateError(f"its keys are not told by a socket that others may use: chmod 600 {path}")


def _flag(asked: dict[str, Any], field: str) -> bool:
    value = asked.get(field, False)
    if not isinstance(value, bool):
        raise ConfigurationError(field, f"{value!r} is neither true nor false")
    return value


def _text(asked: dict[str, Any], field: str, default: str) -> str:
    value = asked.get(field, default)
    if not isinstance(value, str):
        raise ConfigurationError(field, f"{value!r} is not a text")
    return value


def _number(asked: dict[str, Any], field: str, kind: type[int] | type[float]) -> float | None:
    value = asked.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 1 << 53:
        raise ConfigurationError(field, f"{value!r} is not a positive number")
    return value


# ------------------------------------------------------------------------------------------------------ the reader


def request(tunnel: Running, **fields: Any) -> tuple[socket.socket, bytes]:
    """Begins a capture: the connection, and what of the pcapng came with the first line. StateError, OSError.

    Close the writing half to end it; then read on to the end.
    """
    sock = tunnel.connect()
    try:
        sock.sendall(json.dumps({"request": "capture", **fields}).encode() + b"\n")
        line = b""
        while b"\n" not in line:
            part = sock.recv(LONGEST_LINE)
            if not part:
                raise StateError(f"{tunnel.name}: it ended without an answer")
            line += part
        line, _, rest = line.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise StateError(f"{tunnel.name}: {answer['error']}")
        if answer.get("capture") != VERSION:
            raise StateError(f"{tunnel.name}: speaks another version of captures; use the same fasttun on both ends")
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock, rest


class Packet:
    """A packet of a capture: when (ns since 1970), which side of the tunnel, which way, how long, what was kept."""

    __slots__ = ("data", "length", "outbound", "outer", "time_ns")

    def __init__(self, time_ns: int, outer: bool, outbound: bool, length: int, data: bytes) -> None:
        self.time_ns, self.outer, self.outbound, self.length, self.data = time_ns, outer, outbound, length, data


class PcapngReader:
    """Follows the pcapng that `Capture` writes, in pieces of any size: counts, and with `parse` hands packets out."""

    def __init__(self, *, parse: bool = True) -> None:
        self._parse = parse
        self.packets = 0
        self.missed: int | None = None
        """Known at the end; None when the stream broke off before."""
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Packet]:
        """The packets that are complete with this piece. ValueError for what `Capture` does not write."""
        data = self._rest + data
        at = 0
        while len(data) - at >= 8:
            kind, size = struct.unpack_from("<II", data, at)
            if not 12 <= size <= _LARGEST_BLOCK or size % 4:
                raise ValueError(f"a block of {size} bytes")
            if len(data) - at < size:
                break
            if kind == _PACKET:
                self.packets += 1
                if self._parse:
                    yield _packet(data, at + 8)
            elif kind == _STATISTICS:
                self._take_statistics(data[at + 20:at + size - 4])
            at += size
        self._rest = data[at:]

    def _take_statistics(self, options: bytes) -> None:
        code, length = struct.unpack_from("<HH", options)
        if code == _ISB_IFDROP and length == 8:
            self.missed = struct.unpack_from("<Q", options, 4)[0]


def _packet(data: bytes, at: int) -> Packet:
    interface, high, low, stored, length = struct.unpack_from("<IIIII", data, at)
    begin = at + 20
    flags = struct.unpack_from("<I", data, begin + stored + (-stored % 4) + 4)[0]
    return Packet(high << 32 | low, interface != INNER, flags & 3 == 2, length, data[begin:begin + stored])
