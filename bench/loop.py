"""The loop alone, without root: a socketpair in place of the TUN device, UDP over loopback.

    python -m bench.loop                    packets a second and the ratio fasttun : pure Python

The tunnel under test is a process of its own, so that it shares no interpreter lock with the generator. The
generator is a closed loop of sendmmsg and recvmmsg, with less on its way than the sockets hold: nothing is lost.
Its UDP socket sends with UDP_SEGMENT and receives with UDP_GRO, as a fasttun peer does, so that it is not what
limits; a tunnel that uses neither gets and gives one packet a call all the same.
pytest-benchmark's face of this is test_loop.py; the same over real devices is endtoend.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TUNNELS = ("fasttun", "pure-python")
DIRECTIONS = ("outbound", "inbound")
SIZES = (64, 512, 1400)  # bytes of the whole inner packet
WINDOW_PACKETS, BURST_PACKETS = 128, 32
BUFFER_BYTES = 212_992  # allowed to everyone, and the kernel doubles it: room for 180 packets of 1400 bytes
STALLED_AFTER_S = 5

_MSG_WAITFORONE = 0x10000  # linux/socket.h
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104  # linux/udp.h
_SLOT_BYTES = 65_536


class _iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _mmsghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("padding", ctypes.c_int),  # the end of struct msghdr, which is aligned to 8 bytes
        ("length", ctypes.c_uint),
    )


_libc = ctypes.CDLL(None, use_errno=True)


class Burst:
    """Room for up to 32 packets that one call sends or receives."""

    def __init__(self, packet: bytes = b"") -> None:
        size = len(packet) or _SLOT_BYTES
        self._memory = ctypes.create_string_buffer(packet * BURST_PACKETS, BURST_PACKETS * size)
        base = ctypes.addressof(self._memory)
        self._vectors = (_iovec * BURST_PACKETS)(*((base + size * n, size) for n in range(BURST_PACKETS)))
        self._messages = (_mmsghdr * BURST_PACKETS)()
        for number, message in enumerate(self._messages):
            message.vectors = ctypes.addressof(self._vectors) + number * ctypes.sizeof(_iovec)
            message.vector_count = 1

    def send(self, fd: int, count: int) -> int:
        """How many of `count` copies went. OSError."""
        return self._check(_libc.sendmmsg(fd, self._messages, count, 0))

    def receive(self, fd: int, packet_bytes: int) -> int:
        """Waits for one, takes what else is there; how many packets of that length. OSError (EAGAIN: timeout)."""
        count = self._check(_libc.recvmmsg(fd, self._messages, BURST_PACKETS, _MSG_WAITFORONE, None))
        lengths = [message.length for message in self._messages[:count]]
        return sum(length // packet_bytes for length in lengths if length % packet_bytes == 0)

    @staticmethod
    def _check(result: int) -> int:
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result


def inner_packet(length: int) -> bytes:
    """A well-formed IPv4 and UDP packet of that many bytes; its UDP checksum is absent (0)."""
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 1, 0, 64, 17, 0, bytes([10, 7, 0, 1]), bytes([10, 7, 0, 2]))
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + header[12:]
    return header + struct.pack("!HHHH", 5000, 5001, length - 20, 0) + bytes(length - 28)


class Rig:
    """A running tunnel process with the generator's ends of it."""

    def __init__(
        self, tunnel: str, direction: str, packet_bytes: int, device: socket.socket, wire: socket.socket
    ) -> None:
        information = b"\0\0\x08\0" if tunnel == "pure-python" else b""  # its device has 4 bytes of it, fasttun's none
        packet = information + inner_packet(packet_bytes)
        self._source, self._sink = (device, wire) if direction == "outbound" else (wire, device)
        self._length = len(packet)
        self._out, self._in = Burst(packet), Burst()
        self._train = memoryview(packet * BURST_PACKETS)
        self._segmenting = False
        with contextlib.suppress(OSError):  # kernels before 5.0 have neither
            if direction == "outbound":
                wire.setsockopt(_SOL_UDP, _UDP_GRO, 1)
            else:
                wire.setsockopt(_SOL_UDP, _UDP_SEGMENT, self._length)
                self._segmenting = True

    def transfer(self, count: int) -> None:
        """Sends `count` packets and waits until all have come out. OSError (EAGAIN) if one does not."""
        source, sink = self._source.fileno(), self._sink.fileno()
        sent = received = 0
        while received < count:
            burst = min(BURST_PACKETS, count - sent)
            if burst and sent - received <= WINDOW_PACKETS - burst:
                if self._segmenting:
                    sent += self._source.send(self._train[: burst * self._length]) // self._length
                else:
                    sent += self._out.send(source, burst)
            else:
                received += self._in.receive(sink, self._length)


@contextlib.contextmanager
def rig(tunnel: str, direction: str, packet_bytes: int) -> Iterator[Rig]:
    """Starts the tunnel, sends it 64 packets for a beginning, and stops it at the end."""
    with contextlib.ExitStack() as stack:
        device, tun = (stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        wire, udp = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        for end in (wire, udp):
            end.bind(("127.0.0.1", 0))
        wire.connect(udp.getsockname())
        for end in (device, tun, wire, udp):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        timeout = struct.pack("@ll", STALLED_AFTER_S, 0)
        for end in (device, wire):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        process = subprocess.Popen(
            [sys.executable, __file__, tunnel, str(tun.fileno()), str(udp.fileno()), str(wire.getsockname()[1])],
            pass_fds=(tun.fileno(), udp.fileno()),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            built = Rig(tunnel, direction, packet_bytes, device, wire)
            built.transfer(64)
            yield built
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _be_the_tunnel(tunnel: str, tun_fd: int, udp_fd: int, port: int) -> None:
    if tunnel == "fasttun":
        import fasttun

        fasttun.Forwarder(server="127.0.0.1", port=port, tun_fd=tun_fd, udp_fd=udp_fd, framing="raw", mtu=1472).run()
    else:
        from bench import pure_python

        sock = socket.socket(fileno=udp_fd)
        pure_python.forward(tun_fd, sock, pure_python.Peer(("127.0.0.1", port)))


def packets_per_second(tunnel: str, direction: str, packet_bytes: int, seconds: float = 0.5) -> float:
    """One measurement of about that length."""
    with rig(tunnel, direction, packet_bytes) as running:
        begin, count = time.monotonic(), 0
        while (took := time.monotonic() - begin) < seconds:
            running.transfer(2048)
            count += 2048
    return count / took


def main() -> None:
    print(f"{'':10} {'bytes':>5} {'fasttun':>12} {'pure Python':>12} {'ratio':>6}   packets/s, medians of 5 in turn")
    for direction in DIRECTIONS:
        for packet_bytes in SIZES:
            pairs = [[packets_per_second(tunnel, direction, packet_bytes) for tunnel in TUNNELS] for _ in range(5)]
            ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
            print(f"{direction:10} {packet_bytes:5} {ours:12,.0f} {theirs:12,.0f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    arguments: Sequence[str] = sys.argv[1:]
    if arguments:
        _be_the_tunnel(arguments[0], *(int(word) for word in arguments[1:]))
    else:
        main()
