"""What is sent through the tunnel, and how it is counted. Every function blocks its thread, outside of the GIL.

TCP goes out by sendfile from memory and is thrown away by the kernel at its end (MSG_TRUNC), UDP goes out and
comes in many datagrams a call (UDP_SEGMENT, UDP_GRO), so that the tunnel is the bottleneck and not this.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from dataclasses import dataclass, field

from .wire import MOST_BYTES, PATIENCE_S, widen

__all__ = ["Arrived", "Echoes", "datagram_size", "echo", "receive_tcp", "receive_udp", "send_tcp", "send_udp"]

_PIECE = 1 << 18
_LARGEST_SEND = 65000
_MOST_SEGMENTS = 64
_BURST_S = 0.002
_QUIET_S = 0.3
_TCP_NOTSENT_LOWAT, _UDP_SEGMENT, _UDP_GRO, _IP_MTU, _IPV6_MTU = 25, 103, 104, 14, 24
_LOCAL_TROUBLE = (errno.ENOBUFS, errno.EAGAIN, errno.ECONNREFUSED, errno.EPERM, errno.ENETUNREACH, errno.EHOSTUNREACH)


@dataclass
class Arrived:
    """What a receiver has counted: payload bytes, datagrams (UDP), and seconds from the first to the last."""

    bytes: int = 0
    packets: int = 0
    seconds: float = 0.0

    @property
    def bits_per_s(self) -> float:
        return self.bytes * 8 / self.seconds if self.seconds > 0 else 0.0


def send_tcp(sock: socket.socket, seconds: float, stop: threading.Event) -> None:
    """Sends zeros for so long or until `stop`, then ends the stream. OSError."""
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _PIECE)  # the end does not wait for a long queue
    fd = os.memfd_create("fasttun-bench")
    try:
        os.ftruncate(fd, _PIECE)
        end, moved, sent = time.monotonic() + seconds, time.monotonic(), 0
        while (now := time.monotonic()) < end and not stop.is_set() and sent < MOST_BYTES:
            try:
                sent += os.sendfile(sock.fileno(), fd, 0, _PIECE)
                moved = now
            except BlockingIOError:
                if now - moved > PATIENCE_S:
                    raise
        sock.shutdown(socket.SHUT_WR)
    finally:
        os.close(fd)


def receive_tcp(sock: socket.socket, stop: threading.Event) -> Arrived:
    """Counts until the stream's end, or `stop`. OSError."""
    buffer = bytearray(_PIECE)
    found = Arrived()
    begin = 0.0
    while not stop.is_set() and found.bytes < MOST_BYTES:
        size = sock.recv_into(buffer, _PIECE, socket.MSG_TRUNC)
        now = time.monotonic()
        if not size:
            break
        begin = begin or now
        found.bytes += size
        found.seconds = now - begin
    return found


def datagram_size(sock: socket.socket) -> int:
    """Payload bytes of the largest datagram that a connected socket sends without fragments."""
    if sock.family == socket.AF_INET6:
        return sock.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU) - 48
    return sock.getsockopt(socket.IPPROTO_IP, _IP_MTU) - 28


def send_udp(sock: socket.socket, token: bytes, size: int, rate: float, seconds: float, stop: threading.Event) -> int:
    """Sends datagrams of `size` bytes that begin with `token`, `rate` bits of payload a second; how many. OSError."""
    burst = max(1, min(_MOST_SEGMENTS, _LARGEST_SEND // size, int(rate * _BURST_S / 8 / size)))
    if burst > 1:
        try:
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, size)
        except OSError:
            burst = 1
    data = token.ljust(size, b"\0") * burst
    gap = burst * size * 8 / rate
    sent = 0
    begin = due = time.monotonic()
    while (now := time.monotonic()) - begin < seconds and not stop.is_set():
        if now < due:
            time.sleep(due - now)
            continue
        due = max(due + gap, now - 10 * _BURST_S)  # what was slept over is caught up with, not more
        try:
            sent += sock.send(data) // size
        except OSError as error:
            if burst > 1 and error.errno in (errno.EIO, errno.EINVAL, errno.EMSGSIZE):  # no segmentation on this way
                sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 0)
                gap, burst, data = gap / burst, 1, data[:size]
            elif error.errno not in _LOCAL_TROUBLE:
                raise
    return sent


def receive_udp(sock: socket.socket, token: bytes, size: int, over: threading.Event, seconds: float) -> Arrived:
    """Counts datagrams of `size` bytes with `token`, until none comes any more after `over`, or for `seconds`."""
    widen(sock)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    buffer = bytearray(65536)
    found = Arrived()
    begin = 0.0
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        if not select.select([sock], [], [], _QUIET_S)[0]:
            if over.is_set():
                break
            continue
        length = sock.recv_into(buffer)  # several of one flow at once, all of `size`
        if buffer[:len(token)] != token or length % size:
            continue
        now = time.monotonic()
        begin = begin or now
        found.bytes += length
        found.packets += length // size
        found.seconds = now - begin
    return found


def echo(sock: socket.socket, token: bytes, stop: threading.Event) -> None:
    """Sends every datagram with `token` back, until `stop`."""
    while not stop.is_set():
        if select.select([sock], [], [], _QUIET_S)[0]:
            with contextlib.suppress(OSError):
                data, sender = sock.recvfrom(2048)
                if data.startswith(token):
                    sock.sendto(data, sender)


@dataclass
class Echoes:
    """Times there and back, in microseconds, of the echoes that came, and how many were asked for."""

    sent: int = 0
    times_us: list[float] = field(default_factory=list)

    def ask(self, sock: socket.socket, token: bytes, interval_s: float, stop: threading.Event) -> None:
        """Asks a connected socket's other side until `stop`, one every `interval_s`; the last may come a bit later."""
        asked: dict[bytes, float] = {}
        due = time.monotonic()
        last = None
        while last is None or (asked and time.monotonic() < last):
            now = time.monotonic()
            if stop.is_set():
                last = last or now + 2 * _QUIET_S
            elif now >= due:
                due = now + interval_s
                name = token + self.sent.to_bytes(8, "big")
                self.sent += 1
                asked[name] = time.perf_counter()
                with contextlib.suppress(OSError):
                    sock.send(name.ljust(64, b"\0"))
            wait = (last if last is not None else due) - time.monotonic()
            if select.select([sock], [], [], max(0.0, min(wait, _QUIET_S)))[0]:
                with contextlib.suppress(OSError):
                    begin = asked.pop(sock.recv(2048)[:len(token) + 8], None)
                    if begin is not None:
                        self.times_us.append((time.perf_counter() - begin) * 1e6)
