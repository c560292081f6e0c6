"""Tunnels without root: socketpairs in place of TUN devices, UDP over loopback, packets made by hand.

Not for: real devices (support/netns.py).
"""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from fasttun import Forwarder, Stats

__all__ = [
    "COOKIE",
    "Client",
    "Pipe",
    "assert_balanced",
    "bind_udp",
    "descriptors",
    "ip_packet",
    "pi",
    "settled",
    "stun_request",
    "stun_success",
    "threads",
]

COOKIE = b"\x21\x12\xa4\x42"


def checksum(data: bytes) -> int:
    """RFC 1071, for an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip_packet(source: str, destination: str, payload: bytes = b"", *, protocol: int = 253, flags: int = 0) -> bytes:
    """A whole IPv4 or IPv6 packet, without anything of the kernel's. protocol 253: RFC 3692, experiments."""
    src, dst = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    if src.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + src.packed + dst.packed + payload
    header = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, flags, 64, protocol, 0))
    header += src.packed + dst.packed
    header[10:12] = struct.pack("!H", checksum(bytes(header)))
    return bytes(header) + payload


def pi(packet: bytes) -> bytes:
    """The packet with lametun's packet information before it (struct tun_pi, linux/if_tun.h)."""
    return struct.pack("!HH", 0, 0x0800 if packet[0] >> 4 == 4 else 0x86DD) + packet


def stun_request(transaction: bytes = b"transaction!") -> bytes:
    return struct.pack("!HH", 1, 0) + COOKIE + transaction


def stun_success(transaction: bytes, mapped: tuple[str, int] | None = None) -> bytes:
    """RFC 8489 §14.2."""
    body = b""
    if mapped is not None:
        host = ipaddress.ip_address(mapped[0])
        mask = COOKIE + transaction
        value = bytes(a ^ b for a, b in zip(host.packed, mask, strict=False))
        body = struct.pack("!HHBBH", 0x20, 4 + len(value), 0, 1 if host.version == 4 else 2, mapped[1] ^ 0x2112) + value
    return struct.pack("!HH", 0x101, len(body)) + COOKIE + transaction + body


def bind_udp(host: str = "127.0.0.1", *, connect: tuple[str, int] | None = None) -> socket.socket:
    """A UDP socket on a free port, with a timeout so that no test hangs."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(5)
    if connect is not None:
        sock.connect(connect)
    return sock


@dataclass
class Pipe:
    """A stand-in for a TUN device: the tunnel gets `tunnel`, the test plays the host's network at `app`."""

    app: socket.socket
    tunnel: socket.socket

    @classmethod
    def make(cls) -> Pipe:
        app, tunnel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        app.settimeout(5)
        return cls(app, tunnel)

    @property
    def fd(self) -> int:
        return self.tunnel.fileno()

    def send(self, packet: bytes) -> None:
        self.app.send(packet)

    def receive(self, timeout: float = 5) -> bytes:
        self.app.settimeout(timeout)
        return self.app.recv(70000)

    def silent(self, seconds: float = 0.05) -> bool:
        """Whether nothing comes out for so long."""
        return not select.select([self.app], [], [], seconds)[0]

    def close(self) -> None:
        self.app.close()
        self.tunnel.close()

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Client:
    """A peer that the test plays itself, on a UDP socket of its own."""

    to: tuple[str, int]
    sock: socket.socket = field(default_factory=bind_udp)

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])

    def send(self, datagram: bytes) -> None:
        self.sock.sendto(datagram, self.to)

    def receive(self, timeout: float = 5) -> bytes:
        self.sock.settimeout(timeout)
        return self.sock.recv(70000)

    def silent(self, seconds: float = 0.05) -> bool:
        return not select.select([self.sock], [], [], seconds)[0]

    def answer_check(self, timeout: float = 5) -> bytes:
        """Waits for a Binding request and answers it; its transaction."""
        request = self.receive(timeout)
        assert request[:8] == b"\x00\x01\x00\x00" + COOKIE, request
        self.send(stun_success(request[8:20]))
        return request[8:20]

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def descriptors() -> dict[str, str]:
    """The open descriptors of this process and what they are, after what is garbage has gone."""
    gc.collect()
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def threads() -> list[str]:
    """Names of the tunnel's threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fasttun")]


def settled(forwarder: Forwarder, still_s: float = 0.05, timeout: float = 5) -> Stats:
    """The counters once they have stopped moving."""
    deadline = time.monotonic() + timeout
    last = forwarder.stats()
    while True:
        time.sleep(still_s)
        now = forwarder.stats()
        if (now.inbound, now.outbound) == (last.inbound, last.outbound):
            return now
        assert time.monotonic() < deadline, f"the counters never come to rest: {now}"
        last = now


def assert_balanced(stats: Stats) -> None:
    """in = out + drops, in both directions, to the packet."""
    for direction in (stats.outbound, stats.inbound):
        assert direction.packets_in == direction.packets_out + direction.dropped, direction
        assert direction.bytes_out <= direction.bytes_in


@contextlib.contextmanager
def in_thread(forwarder: Forwarder) -> Iterator[list[BaseException | None]]:
    """run() in a thread; afterwards the list holds how it ended (None: without an error)."""
    ended: list[BaseException | None] = []

    def work() -> None:
        try:
            forwarder.run()
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ended
    finally:
        forwarder.stop()
        thread.join(10)
        assert not thread.is_alive()
