"""Greets a server as a client does (STUN Binding, RFC 8489), in any size; hears what comes back, ICMP too.

Not for: verdicts (`fasttun.doctor.path`), the greeting's schedule (`fasttun.plain.greeting`).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..endpoint import Endpoint, resolve
from ..errors import EndpointError

__all__ = ["Contact", "Probe", "contact", "measure"]

_COOKIE = b"\x21\x12\xa4\x42"
_REQUEST, _SUCCESS, _ERROR = 0x0001, 0x0101, 0x0111
_MAPPED, _XOR_MAPPED = 0x0001, 0x0020
_PADDING = 0x0026  # RFC 5780 §7.6
_HEADER = 20
_UDP_HEADER = 8
_IP_HEADER = {4: 20, 6: 40}

# linux/in.h, linux/in6.h, linux/errqueue.h
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_IP_MTU, _IPV6_MTU = 14, 24
_EXTENDED_ERROR = struct.Struct("=IBBBBII")

_TRIES = 3
_LEAST_MTU = {4: 576, 6: 1280}
_MAX_PATH = 65535


@dataclass(frozen=True)
class Contact:
    """How the server was met. `error`: why nothing could be sent or resolved, or what ICMP said; None otherwise.

    `local`: the address and port sent from; `mapped`: the same as the server saw them; `rtt_s`: of the answer.
    """

    endpoint: Endpoint | None
    answered: bool = False
    local: Endpoint | None = None
    mapped: Endpoint | None = None
    rtt_s: float = 0.0
    error: EndpointError | OSError | None = None


class Probe:
    """A socket connected to `endpoint` that sends with DF whatever the path is said to carry. OSError."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.version = endpoint.host.version
        self._family = socket.AF_INET if self.version == 4 else socket.AF_INET6
        self._level = socket.IPPROTO_IP if self.version == 4 else socket.IPPROTO_IPV6
        self.learnt_mtu: int | None = None
        """Bytes, as the last ICMP "too big" or this host's own interface said."""
        self._socket = socket.socket(self._family, socket.SOCK_DGRAM)
        try:
            v4 = self.version == 4
            self._socket.setsockopt(self._level, _IP_MTU_DISCOVER if v4 else _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
            self._socket.setsockopt(self._level, _IP_RECVERR if v4 else _IPV6_RECVERR, 1)
            self._socket.connect(endpoint.sockaddr(self._family))
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def local(self) -> Endpoint:
        return Endpoint.from_sockaddr(self._socket.getsockname())

    @property
    def route_mtu(self) -> int:
        """Bytes that the kernel believes the path carries."""
        return self._socket.getsockopt(self._level, _IP_MTU if self.version == 4 else _IPV6_MTU)

    @property
    def headers(self) -> int:
        return _IP_HEADER[self.version] + _UDP_HEADER

    def greet(self, wait_s: float, size: int | None = None) -> Endpoint | bool:
        """Send one greeting, as a packet of `size` bytes with its headers, and wait for its answer.

        The mapped address in the answer, True for one without, False for none. OSError as ICMP or the system
        said; EMSGSIZE among them, after which `learnt_mtu` may be set.
        """
        request, transaction = _request(_HEADER if size is None else size - self.headers)
        self.send(request)
        return self._await(transaction, time.monotonic() + wait_s)

    def send(self, datagram: bytes) -> None:
        try:
            self._socket.send(datagram)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                self._read_errors()
                raise
            if error.errno not in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
                raise
            self._read_errors()  # that was about a datagram before this one
            self._socket.send(datagram)

    def listen(self, wait_s: float) -> None:
        """Wait for ICMP errors alone; OSError as they say."""
        self._await(b"", time.monotonic() + wait_s)

    def _await(self, transaction: bytes, deadline: float) -> Endpoint | bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            for _, events in poll.poll(left * 1000):
                if events & select.POLLERR:
                    code = self._read_errors()
                    if code:
                        raise OSError(code, os.strerror(code))
                with contextlib.suppress(BlockingIOError):
                    answer = self._socket.recv(2048)
                    if answer[4:8] == _COOKIE and answer[8:20] == transaction:
                        return _mapped(answer) or True
        return False

    def _read_errors(self) -> int:
        """Take what the error queue has (ip(7), IP_RECVERR); the last errno, 0 for none."""
        code = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                _, messages, _, _ = self._socket.recvmsg(0, 512, socket.MSG_ERRQUEUE)
                for level, _, data in messages:
                    if level == self._level and len(data) >= _EXTENDED_ERROR.size:
                        code, _, _, _, _, info, _ = _EXTENDED_ERROR.unpack_from(data)
                        if code == errno.EMSGSIZE and info:
                            self.learnt_mtu = info
        self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # taken, so that no later call fails by it
        return code


def _request(length: int) -> tuple[bytes, bytes]:
    """A Binding request of `length` bytes, a multiple of 4 (RFC 8489 §5), and its transaction."""
    transaction = os.urandom(12)
    body = b""
    if length > _HEADER:
        padding = length - _HEADER - 4
        body = struct.pack("!HH", _PADDING, padding) + bytes(padding)
    return struct.pack("!HH", _REQUEST, len(body)) + _COOKIE + transaction + body, transaction


def _attributes(answer: bytes) -> Iterator[tuple[int, bytes]]:
    at = _HEADER
    while at + 4 <= len(answer):
        kind, length = struct.unpack_from("!HH", answer, at)
        yield kind, answer[at + 4 : at + 4 + length]
        at += 4 + (length + 3 & ~3)


def _mapped(answer: bytes) -> Endpoint | None:
    """RFC 8489 §14.1 and §14.2; None when there is neither."""
    for kind, value in _attributes(answer):
        if kind in (_MAPPED, _XOR_MAPPED) and len(value) in (8, 20):
            mask = answer[4:20] if kind == _XOR_MAPPED else bytes(16)
            port = int.from_bytes(value[2:4], "big") ^ int.from_bytes(mask[:2], "big")
            host = bytes(a ^ b for a, b in zip(value[4:], mask, strict=False))
            return Endpoint(ipaddress.ip_address(host), port)
    return None


def contact(server: str, port: int, timeout_s: float = 2.0) -> Contact:
    """Greet each address of the server, best first, until one answers. Never raises."""
    try:
        endpoints = resolve(server, port)
    except EndpointError as error:
        return Contact(None, error=error)
    met = [_meet(endpoint, timeout_s / len(endpoints)) for endpoint in endpoints]
    return next((one for one in met if one.answered), met[0])


def _meet(endpoint: Endpoint, timeout_s: float) -> Contact:
    error: OSError | None = None
    local = None
    try:
        with Probe(endpoint) as probe:
            local = probe.local
            for _ in range(_TRIES):
                started = time.monotonic()
                try:
                    answer = probe.greet(timeout_s / _TRIES)
                except OSError as met:
                    error = met
                    continue
                if answer:
                    mapped = answer if isinstance(answer, Endpoint) else None
                    return Contact(endpoint, True, local, mapped, time.monotonic() - started)
    except OSError as met:
        error = met
    return Contact(endpoint, local=local, error=error)


def measure(endpoint: Endpoint, rtt_s: float, *, answers: bool = True) -> tuple[int, bool]:
    """Bytes of the largest packet that gets through with DF, to 4 bytes; and whether ICMP told of the limit.

    By bisection between the least that every path carries and what this host's route says, each size asked for
    twice before it counts as lost. `answers`: the server answers greetings; else only what ICMP tells is known.
    OSError when not even the smallest gets through.
    """
    wait_s = min(1.0, max(0.1, 4 * rtt_s))
    with Probe(endpoint) as probe:
        ceiling = min(probe.route_mtu, _MAX_PATH)
        if not answers:
            return _told(probe, ceiling, wait_s)

        def passes(size: int) -> bool:
            for _ in range(2):
                try:
                    if probe.greet(wait_s, size):
                        return True
                except OSError as error:
                    if error.errno == errno.EMSGSIZE:
                        return False
            return False

        low, high = _LEAST_MTU[probe.version], _on_grid(ceiling, probe.headers)
        if not passes(low):
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        if passes(high):
            return max(ceiling if ceiling - high < 4 else high, low), False
        while high - low > 4:
            told = _on_grid(probe.learnt_mtu or 0, probe.headers)
            middle = told if low < told < high else _on_grid((low + high) // 2, probe.headers)
            if passes(middle):
                low = middle
                if middle == told:
                    return probe.learnt_mtu or middle, True
            else:
                high = middle
        return low, probe.learnt_mtu is not None


def _on_grid(size: int, headers: int) -> int:
    """The largest size up to this whose STUN message is a multiple of 4 bytes."""
    return (size - headers) // 4 * 4 + headers


def _told(probe: Probe, ceiling: int, wait_s: float) -> tuple[int, bool]:
    told = False
    for _ in range(4):
        try:
            probe.send(bytes(ceiling - probe.headers))
            probe.listen(wait_s)
            break
        except OSError as error:
            if error.errno != errno.EMSGSIZE or not probe.learnt_mtu or probe.learnt_mtu >= ceiling:
                break
            ceiling, told = probe.learnt_mtu, True
    return ceiling, told
