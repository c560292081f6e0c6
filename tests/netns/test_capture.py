"""`fasttun capture` on real tunnels: both modes, several workers, segmented frames, a reader that is stopped."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.netns import Lab, Namespace, wait_until

from fasttun.observe.client import choose
from fasttun.observe.stream import PcapngReader
from fasttun.wireguard.keys import PrivateKey

pytestmark = pytest.mark.netns

FASTTUN = (sys.executable, "-m", "fasttun")
LARGEST = 10000
"""Bytes of a frame from the device before it is segmented; packets of the tunnel are far smaller."""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTTUN_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@contextlib.contextmanager
def pair(lab: Lab, tmp_path: Path, mode: str, *words: str) -> Iterator[tuple[Namespace, Namespace]]:
    """A listener tun0 at 10.7.0.1 and a client tun1 at 10.7.0.2, each in a process of its own."""
    a, b, link = lab.pair()
    extra: list[list[str]] = [[], []]
    if mode == "wireguard":
        keys = [PrivateKey.generate() for _ in range(2)]
        for number, key in enumerate(keys):
            path = tmp_path / f"{number}.key"
            path.touch(0o600)
            path.write_text(key.to_base64())
            extra[number] = ["--key", str(path), "--peer", str(keys[1 - number].public)]
    processes = [
        a.popen([*FASTTUN, "--listen", "--address", "10.7.0.1/24", "--device", "tun0", *extra[0], *words]),
        b.popen([*FASTTUN, "--server", link.a.v4, "--address", "10.7.0.2/24", "--device", "tun1", *extra[1], *words]),
    ]
    try:
        ping = ["ping", "-c1", "-W1", "10.7.0.1"]
        wait_until(lambda: b.run(ping, check=False).returncode == 0, 15, what="the tunnel")
        yield a, b
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(10)


@contextlib.contextmanager
def capture(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`fasttun capture` into `path`, once it has begun."""
    process = subprocess.Popen([*FASTTUN, "capture", *words, "-w", str(path)], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: process.poll() is not None or (path.exists() and path.stat().st_size), 10)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def end(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Packets and misses."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    found = re.fullmatch(r"(\d+) packets?, (\d+) missed\n", err)
    assert found, err
    assert process.returncode == 0
    return int(found[1]), int(found[2])


def send_tcp(a: Namespace, b: Namespace, mebibytes: int, port: int = 7000) -> float:
    """That many from b to a, intact; seconds."""
    receive = """
import hashlib, socket, sys
with socket.create_server(("10.7.0.1", int(sys.argv[1]))) as server:
    print("ready", flush=True)
    sock, _ = server.accept()
    digest, size = hashlib.sha1(), 0
    while part := sock.recv(1 << 20):
        digest.update(part)
        size += len(part)
print(size, digest.hexdigest())
"""
    send = """
import hashlib, os, socket, sys
data = os.urandom(1 << 20)
digest = hashlib.sha1()
with socket.create_connection(("10.7.0.1", int(sys.argv[1])), 10) as sock:
    for _ in range(int(sys.argv[2])):
        sock.sendall(data)
        digest.update(data)
print(int(sys.argv[2]) << 20, digest.hexdigest())
"""
    receiver = a.popen([sys.executable, "-c", receive, str(port)])
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "ready\n"
    begin = time.monotonic()
    sent = b.python(send, str(port), str(mebibytes), timeout=60).stdout
    assert receiver.communicate(timeout=60)[0] == sent
    return time.monotonic() - begin


def counted(name: str) -> dict[str, Any]:
    return choose(name).ask()


def packets_of(name: str) -> int:
    now = counted(name)
    return int(now["inbound"]["packets_out"] + now["outbound"]["packets_in"])


def tshark(path: Path, *fields: str) -> list[list[str]]:
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark (apt install tshark)")
    words = [word for field in fields for word in ("-e", field)]
    done = subprocess.run(["tshark", "-n", "-r", str(path), "-T", "fields", *words], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert "cut short" not in done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("mode", ["plain", "wireguard"])
def test_every_packet_of_a_transfer_is_in_it(lab: Lab, tmp_path: Path, mode: str) -> None:
    """Frames of many segments come as the packets that travel: inside and outside there are equally many."""
    path = tmp_path / "out.pcapng"
    with pair(lab, tmp_path, mode) as (a, b):
        before = packets_of("tun1")
        with capture(path, "tun1", "--what", "both", "-s", "96") as process:
            send_tcp(a, b, 2)
            time.sleep(0.2)
            passed = packets_of("tun1") - before
            packets, missed = end(process)
    rows = tshark(path, "frame.interface_id", "frame.len", "tcp.dstport", "udp.dstport")
    assert len(rows) == packets
    inner = [row for row in rows if row[0] == "0"]
    outer = [row for row in rows if row[0] == "1"]
    assert len(inner) + len(outer) + missed >= 2 * passed
    assert max(int(row[1]) for row in rows) < LARGEST
    if not missed:
        assert len(inner) >= passed
        assert sum(row[2] == "7000" for row in inner) > (2 << 20) // 1500


def test_both_workers_are_in_it(lab: Lab, tmp_path: Path) -> None:
    """Flows of several clients' ports spread over the listener's sockets; their packets come in one stream."""
    path = tmp_path / "out.pcapng"
    code = """
import socket, sys
for number in range(16):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(20):
            sock.sendto(b"x" * 100, ("10.7.0.1", 7100 + number))
"""
    with pair(lab, tmp_path, "plain", "--workers", "2") as (_, b):
        assert len(counted("tun1")["workers"]) == 2
        with capture(path, "tun1", "udp") as process:
            b.python(code)
            time.sleep(0.2)
            assert end(process) == (320, 0)
    rows = tshark(path, "udp.dstport", "frame.time_epoch")
    assert sorted(row[0] for row in rows) == sorted(str(7100 + number) for number in range(16) for _ in range(20))


def test_the_tunnel_does_not_wait_for_a_stopped_reader(lab: Lab, tmp_path: Path) -> None:
    """32 MiB pass a capture whose program is stopped: whole, in time, and what it misses is counted to the packet."""
    path = tmp_path / "out.pcapng"
    with pair(lab, tmp_path, "plain") as (a, b):
        alone = send_tcp(a, b, 32)
        before = packets_of("tun0")
        with capture(path, "tun0") as process:
            os.kill(process.pid, signal.SIGSTOP)
            stopped = send_tcp(a, b, 32, port=7001)
            time.sleep(0.3)
            passed = packets_of("tun0") - before
            os.kill(process.pid, signal.SIGCONT)
            packets, missed = end(process)
    assert missed > 0
    assert packets + missed == passed
    assert stopped < 5 * alone + 5
    assert len(tshark(path, "frame.number")) == packets


def test_a_capture_of_handshakes_reads_as_wireguard(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "out.pcapng"
    with pair(lab, tmp_path, "wireguard") as (_, b):
        with capture(path, "tun1", "--what", "outer") as process:
            b.run(["ping", "-c3", "-i0.2", "10.7.0.1"])
            packets, missed = end(process)
        assert missed == 0
        rows = tshark(path, "wg.type", "ip.src", "ip.dst", "udp.length")
        assert len(rows) == packets
        assert {row[0] for row in rows} <= {"1", "2", "3", "4"}
        assert "4" in {row[0] for row in rows}
        assert all(int(row[3]) > 8 for row in rows)


def test_with_keys_the_file_alone_decrypts_the_tunnel(lab: Lab, tmp_path: Path) -> None:
    """Wireshark reads the pings in it, and finds no secret in a file without --keys."""
    with pair(lab, tmp_path, "wireguard") as (_, b):
        path, bare = tmp_path / "out.pcapng", tmp_path / "bare.pcapng"
        with capture(bare, "tun1", "--what", "outer") as process:
            b.run(["ping", "-c2", "-i0.2", "10.7.0.1"])
            end(process)
        path.touch(0o644)
        process = subprocess.Popen(
            [*FASTTUN, "capture", "tun0", "--what", "outer", "--keys", "--handshake", "-w", str(path)],
            stderr=subprocess.PIPE, text=True)
        try:  # two handshakes have 5 s between them
            wait_until(lambda: b.run(["ping", "-c1", "10.7.0.1"]) and 2 in _types(path), 10, 0.3)
            b.run(["ping", "-c3", "-i0.2", "-s111", "10.7.0.1"])
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert err.count("\nwarning: ") == 1
    assert "PRIVATE KEY" in err.splitlines()[0]
    assert "cannot be decrypted" not in err
    assert path.stat().st_mode & 0o777 == 0o600
    seen = [(row[0], row[1]) for row in tshark(path, "icmp.type", "icmp.seq", "data.len") if row[2] == "103"]
    assert seen == [(kind, str(number)) for number in (1, 2, 3) for kind in ("8", "0")]
    assert not any(row[0] for row in tshark(bare, "icmp.type"))
    secrets = [(tmp_path / f"{number}.key").read_text() for number in range(2)]
    for text in secrets:
        assert text.encode() not in bare.read_bytes()
        assert base64.b64decode(text) not in bare.read_bytes()
    assert [text.encode() in path.read_bytes() for text in secrets] == [True, False]


def _types(path: Path) -> set[int]:
    """Of the WireGuard messages in a capture of outer packets over IPv4."""
    return {packet.data[28] for packet in PcapngReader().feed(path.read_bytes())}


def test_it_prints_what_a_ping_is(lab: Lab, tmp_path: Path) -> None:
    with pair(lab, tmp_path, "wireguard") as (_, b):
        process = subprocess.Popen([*FASTTUN, "capture", "tun0", "-c", "2", "icmp"], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        wait_until(lambda: b.run(["ping", "-c1", "-W1", "10.7.0.1"]) and process.poll() is not None, 10, 0.2)
        out, err = process.communicate(timeout=10)
    assert err == "2 packets, 0 missed\n"
    assert re.search(r" in  IP  10\.7\.0\.2 > 10\.7\.0\.1: ICMP echo request, id \d+, seq 1, length 64$", out, re.M)
    assert re.search(r" out IP  10\.7\.0\.1 > 10\.7\.0\.2: ICMP echo reply, id \d+, seq 1, length 64$", out, re.M)
