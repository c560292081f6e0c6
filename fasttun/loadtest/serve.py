"""The side that answers: it listens on a tunnel's inner addresses, for its inner networks, one session at a time.

Every transfer has an end: by time, by bytes, by patience, and by the session's, which is its control connection's.
UDP up: the client sends to the port that it was told, then {"do": "end"}, and gets the count. UDP down: the
client's first datagram, the session's token, says where to; {"sent": N} follows when all is sent.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, ip_address
from typing import Any

from ..errors import EndpointError, StateError
from .generator import echo, receive_tcp, receive_udp, send_tcp, send_udp
from .wire import (
    LARGEST_DATAGRAM,
    LONGEST_SECONDS,
    MOST_STREAMS,
    PATIENCE_S,
    PORT,
    TOKEN_BYTES,
    VERSION,
    Lines,
    patient,
)

__all__ = ["Server"]

log = logging.getLogger("fasttun")

LONGEST_SESSION_S = 900.0
GREETERS = 32
"""Connections that have not said what they are; each is given `PATIENCE_S`."""
_SO_BINDTODEVICE = 25


@dataclass
class _Session:
    """One client's, from its first line to its control connection's end."""

    peer: str
    token: bytes
    begun: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)
    streams: int = 0


class Server:
    """Answers on `addresses` of `device`. `open` binds (EndpointError); `run` answers until `close`."""

    def __init__(self, device: str, addresses: Iterable[IPv4Interface | IPv6Interface], port: int = PORT) -> None:
        self._device = device
        self._addresses = tuple(addresses)
        self._port = port
        self._listeners: list[socket.socket] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._room = threading.BoundedSemaphore(GREETERS)
        self._lock = threading.Lock()
        self._session: _Session | None = None
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()

    def open(self) -> None:
        """Binds to each address. EndpointError."""
        for address in self._addresses:
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            sock = socket.socket(family, socket.SOCK_STREAM)
            self._listeners.append(sock)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with contextlib.suppress(PermissionError):  # the address alone, then
                    sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, self._device.encode())
                sock.bind((str(address.ip), self._port))
                sock.listen(GREETERS)
                sock.setblocking(False)
            except OSError as error:
                self.close()
                raise EndpointError(
                    "listen on", f"TCP {address.ip} port {self._port}", error.errno or 0, "--port chooses another"
                ) from error

    def run(self) -> None:
        """Answers until `close`."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for sock in self._listeners:
            poll.register(sock, select.POLLIN)
        by_number = {sock.fileno(): sock for sock in self._listeners}
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake:
                    return
                with contextlib.suppress(OSError):
                    self._admit(by_number[fd].accept()[0])

    def stop(self) -> None:
        """Makes `run` return. From any thread or signal handler."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Ends everything. May be called twice."""
        self.stop()
        with self._lock:
            if self._session is not None:
                self._session.stop.set()
            for sock in (*self._listeners, *self._open):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(2 * PATIENCE_S)
        for sock in self._listeners:
            sock.close()
        self._listeners = []
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _admit(self, sock: socket.socket) -> None:
        """Only who has an address of the tunnel's own networks, and while there is room."""
        source = ip_address(sock.getpeername()[0].partition("%")[0])
        if not any(source in address.network for address in self._addresses) or \
                not self._room.acquire(blocking=False):
            log.debug("refused: %s", source)
            sock.close()
            return
        thread = threading.Thread(target=self._serve, args=(sock,), name="fasttun-bench", daemon=True)
        with self._lock:
            self._open.add(sock)
            self._threads.add(thread)
        thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                patient(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                lines = Lines(sock)
                try:
                    self._greet(lines)
                except (StateError, BlockingIOError) as error:
                    log.debug("%s", error)
                    lines.send(error=str(error) if isinstance(error, StateError) else "it took too long")
        except OSError as error:
            log.debug("%s", error)
        finally:
            self._room.release()
            with self._lock:
                self._open.discard(sock)
                self._threads.discard(threading.current_thread())

    def _greet(self, lines: Lines) -> None:
        first = lines.receive()
        if first.get("bench") != VERSION:
            raise StateError(f"this is version {VERSION} of the agreement; use the same fasttun on both sides")
        if "token" in first:
            self._stream(lines, first)
        else:
            self._control(lines)

    # ------------------------------------------------------------------------------------------------ TCP streams

    def _stream(self, lines: Lines, asked: dict[str, Any]) -> None:
        seconds = _seconds(asked)
        with self._lock:
            session = self._session
            if session is None or asked["token"] != session.token.hex() or \
                    session.peer != lines.sock.getpeername()[0]:
                raise StateError("there is no such session")
            if session.streams >= MOST_STREAMS:
                raise StateError(f"at most {MOST_STREAMS} streams at a time")
            session.streams += 1
        try:
            if _way(asked) == "up":
                found = receive_tcp(lines.sock, session.stop)
                lines.send(bytes=found.bytes, seconds=found.seconds)
            else:
                send_tcp(lines.sock, seconds, session.stop)
                lines.sock.recv(1)  # its end: the client has all
        finally:
            with self._lock:
                session.streams -= 1

    # -------------------------------------------------------------------------------------------------- a session

    def _control(self, lines: Lines) -> None:
        peer = lines.sock.getpeername()[0]
        session = _Session(peer, os.urandom(TOKEN_BYTES))
        with self._lock:
            if self._session is not None:
                raise StateError(f"it is measuring with {self._session.peer}; try again later")
            self._session = session
        log.info("measuring with %s", peer)
        try:
            lines.send(bench=VERSION, token=session.token.hex())
            patient(lines.sock, 4 * LONGEST_SECONDS)  # streams run without a word here
            while time.monotonic() - session.begun < LONGEST_SESSION_S:
                asked = lines.receive()
                if asked.get("do") == "bye":
                    break
                if asked.get("do") == "echo":
                    self._echo(lines, session)
                elif asked.get("do") == "udp":
                    self._udp(lines, session, asked)
                else:
                    raise StateError(f"{asked.get('do')!r} is not known here")
        finally:
            session.stop.set()
            with self._lock:
                self._session = None
            log.info("done with %s", peer)

    def _udp_socket(self, lines: Lines) -> socket.socket:
        """At the inner address that the client has reached."""
        sock = socket.socket(lines.sock.family, socket.SOCK_DGRAM)
        try:
            sock.bind((lines.sock.getsockname()[0], 0))
        except BaseException:
            sock.close()
            raise
        return sock

    def _echo(self, lines: Lines, session: _Session) -> None:
        sock = self._udp_socket(lines)

        def work() -> None:
            with sock:
                echo(sock, session.token, session.stop)

        threading.Thread(target=work, name="fasttun-bench-echo", daemon=True).start()
        lines.send(port=sock.getsockname()[1])

    def _udp(self, lines: Lines, session: _Session, asked: dict[str, Any]) -> None:
        way, seconds = _way(asked), _seconds(asked)
        size, rate = asked.get("size"), asked.get("rate")
        if not isinstance(size, int) or not TOKEN_BYTES <= size <= LARGEST_DATAGRAM:
            raise StateError(f"size {size!r} is not from {TOKEN_BYTES} to {LARGEST_DATAGRAM} bytes")
        if not isinstance(rate, (int, float)) or not 1e3 <= rate <= 1e12:
            raise StateError(f"rate {rate!r} is not from 1e3 to 1e12 bits a second")
        with self._udp_socket(lines) as sock:
            if way == "up":
                self._udp_up(lines, session, sock, size, seconds)
            else:
                lines.send(port=sock.getsockname()[1])
                sock.connect(_first_sender(sock, session))
                lines.send(sent=send_udp(sock, session.token, size, rate, seconds, session.stop))

    def _udp_up(self, lines: Lines, session: _Session, sock: socket.socket, size: int, seconds: float) -> None:
        over = threading.Event()
        found = []

        def work() -> None:
            found.append(receive_udp(sock, session.token, size, over, seconds + PATIENCE_S))

        thread = threading.Thread(target=work, name="fasttun-bench-udp", daemon=True)
        thread.start()
        try:
            lines.send(port=sock.getsockname()[1])
            if lines.receive().get("do") != "end":
                raise StateError("the end of the datagrams was expected")
        finally:
            over.set()
            thread.join()
        (arrived,) = found
        lines.send(packets=arrived.packets, bytes=arrived.bytes, seconds=arrived.seconds)


def _first_sender(sock: socket.socket, session: _Session) -> Any:
    end = time.monotonic() + PATIENCE_S
    while (left := end - time.monotonic()) > 0:
        if select.select([sock], [], [], left)[0]:
            data, sender = sock.recvfrom(2048)
            if data == session.token and sender[0] == session.peer:
                return sender
    raise StateError("no datagram of the client's has arrived")


def _way(asked: dict[str, Any]) -> str:
    if asked.get("way") not in ("up", "down"):
        raise StateError(f"way {asked.get('way')!r} is neither up nor down")
    return str(asked["way"])


def _seconds(asked: dict[str, Any]) -> float:
    seconds = asked.get("seconds")
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or not 0 < seconds <= LONGEST_SECONDS:
        raise StateError(f"{seconds!r} seconds are not more than 0 and at most {LONGEST_SECONDS:.0f}")
    return float(seconds)
