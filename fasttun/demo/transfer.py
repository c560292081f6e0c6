"""What the demo runs inside its hosts: one end of a file transfer over TCP, or a ping. Standard library only.

    transfer.py ping HOST COUNT                       {"sent", "received", "min_ms", "avg_ms"}
    transfer.py receive HOST PORT                     {"ready"}, then {"bytes", "sha256"}
    transfer.py send HOST PORT FILE SECONDS-AT-MOST   many {"bytes", "packets", "seconds"}, {"sha256"}
    transfer.py flow HOST PORT SECONDS-AT-MOST        {"ready"}, then zeros to a "receive", whatever they cost

Each answer is one JSON object on a line of stdout. `packets` are TCP segments as the kernel counts them at
the sender, so a segmentation frame of 64 KiB counts as all the packets that it stands for.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import struct
import sys
import time

_CHUNK_BYTES = 1 << 20
_REPORT_INTERVAL_S = 0.2
_STALLED_AFTER_MS = 20_000  # a tunnel that carries nothing for so long is taken as dead
_TCP_INFO_BYTES_ACKED = 120  # offsets in struct tcp_info, linux/tcp.h
_TCP_INFO_SEGS_OUT = 136


def answer(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def ping(host: str, count: int) -> None:
    """ICMP echoes, one after another, a second for each answer at most. Needs root (raw socket)."""
    identity = os.getpid() & 0xFFFF
    times_ms: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        for sequence in range(count):
            begin = time.monotonic()
            try:
                sock.sendto(_echo(identity, sequence), (host, 0))
            except OSError:  # no route: the device is not up yet
                time.sleep(0.1)
                continue
            while (left := begin + 1.0 - time.monotonic()) > 0:
                if not select.select([sock], [], [], left)[0]:
                    break
                kind, _, _, got_identity, got_sequence = struct.unpack_from("!BBHHH", sock.recv(2048), 20)
                if (kind, got_identity, got_sequence) == (0, identity, sequence):
                    times_ms.append((time.monotonic() - begin) * 1e3)
                    time.sleep(0.02)
                    break
    mean = sum(times_ms) / len(times_ms) if times_ms else None
    answer(sent=count, received=len(times_ms), min_ms=min(times_ms, default=None), avg_ms=mean)


def _echo(identity: int, sequence: int) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, identity, sequence) + b"fasttun demo" * 4
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return body[:2] + struct.pack("!H", checksum) + body[4:]


def receive(host: str, port: int) -> None:
    """Takes one connection, reads it to its end, answers with the hash of what came."""
    digest, total = hashlib.sha256(), 0
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with socket.create_server((host, port)) as listener:
        answer(ready=True)
        listener.settimeout(_STALLED_AFTER_MS / 1000)
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(_STALLED_AFTER_MS / 1000)
        while length := connection.recv_into(buffer):
            digest.update(view[:length])
            total += length
        answer(bytes=total, sha256=digest.hexdigest())


def send(host: str, port: int, path: str, limit_s: float) -> None:
    """Sends the file, or as much of it as `limit_s` allows, and waits until the receiver has read it all."""
    with open(path, "rb") as file, socket.create_connection((host, port), _STALLED_AFTER_MS / 1000) as sock:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_AFTER_MS)
        size, offset = os.fstat(file.fileno()).st_size, 0
        begin = reported = time.monotonic()
        while offset < size and (now := time.monotonic()) - begin < limit_s:
            offset += os.sendfile(sock.fileno(), file.fileno(), offset, min(_CHUNK_BYTES, size - offset))
            if now - reported >= _REPORT_INTERVAL_S:
                reported = now
                _report(sock, now - begin)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(_CHUNK_BYTES):
            pass
        seconds = time.monotonic() - begin
        answer(bytes=offset, packets=_tcp_info(sock)[1], seconds=seconds)

        digest = hashlib.sha256()
        file.seek(0)
        while offset > 0 and (data := file.read(min(_CHUNK_BYTES, offset))):
            digest.update(data)
            offset -= len(data)
        answer(sha256=digest.hexdigest())


def flow(host: str, port: int, limit_s: float) -> None:
    """Sends for so long, or until it is ended."""
    with socket.create_connection((host, port), _STALLED_AFTER_MS / 1000) as sock:
        answer(ready=True)
        end, chunk = time.monotonic() + limit_s, bytes(_CHUNK_BYTES)
        while time.monotonic() < end:
            sock.sendall(chunk)


def _report(sock: socket.socket, seconds: float) -> None:
    acknowledged, packets = _tcp_info(sock)
    answer(bytes=acknowledged, packets=packets, seconds=seconds)


def _tcp_info(sock: socket.socket) -> tuple[int, int]:
    """Bytes that the receiver's kernel has acknowledged, segments sent."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    acknowledged: int = struct.unpack_from("=Q", info, _TCP_INFO_BYTES_ACKED)[0]
    segments: int = struct.unpack_from("=I", info, _TCP_INFO_SEGS_OUT)[0]
    return acknowledged, segments


def main(words: list[str]) -> int:
    try:
        if words[0] == "ping":
            ping(words[1], int(words[2]))
        elif words[0] == "receive":
            receive(words[1], int(words[2]))
        elif words[0] == "flow":
            flow(words[1], int(words[2]), float(words[3]))
        else:
            send(words[1], int(words[2]), words[3], float(words[4]))
    except OSError as error:
        print(f"{words[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
