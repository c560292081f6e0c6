"""bench/pure_python.py is a faithful lametun: the same flags, the same wire, the same faults.

The baseline is only worth comparing with, and interoperating with, if it behaves as the original.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.netns import Lab, Link, Namespace, wait_until

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "pure_python.py"
PI_IPV4 = b"\0\0\x08\0"
PORT = 1234


def start(host: Namespace, address: str, *flags: str) -> subprocess.Popen[str]:
    """The tunnel, and what a user of lametun types after it."""
    process = host.popen([sys.executable, SCRIPT, *flags])
    try:
        wait_until(lambda: "tun0" in host.devices(), what="tun0")
    except AssertionError:
        process.kill()
        raise AssertionError(process.communicate()) from None
    host.ip("address", "add", f"{address}/24", "dev", "tun0")
    host.ip("link", "set", "tun0", "mtu", "1468", "up")
    return process


def start_both(a: Namespace, b: Namespace, link: Link, *flags: str) -> list[subprocess.Popen[str]]:
    return [
        start(a, "10.7.0.1", "-listen", *flags),
        start(b, "10.7.0.2", "-server", link.a.v4, *flags),
    ]


def ping(host: Namespace, address: str, *flags: str) -> bool:
    return host.run(["ping", "-n", "-c1", "-W2", *flags, address], check=False).returncode == 0


def echo_request(source: str, destination: str) -> bytes:
    icmp = struct.pack("!BBHHH", 8, 0, 0, 7, 1)
    icmp = icmp[:2] + struct.pack("!H", internet_checksum(icmp)) + icmp[4:]
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(icmp), 1, 0, 64, 1, 0) + addresses
    return header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:] + icmp


def internet_checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def udp(host: Namespace, port: int = 0) -> socket.socket:
    with host.enter():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", port))
    sock.settimeout(5)
    return sock


def receive_ipv4(sock: socket.socket) -> bytes:
    """The next datagram that holds IPv4; the kernel sends some IPv6 of its own into a new device."""
    while True:
        data = sock.recv(4096)
        if data[4] >> 4 == 4:
            return data


@pytest.mark.netns
def test_two_of_them_carry_packets_both_ways(lab: Lab) -> None:
    a, b, link = lab.pair()
    processes = start_both(a, b, link)
    assert ping(b, "10.7.0.1")
    assert ping(a, "10.7.0.2")
    assert ping(b, "10.7.0.1", "-M", "do", "-s", str(1468 - 28))
    assert all(process.poll() is None for process in processes)


@pytest.mark.netns
def test_datagram_is_packet_information_and_the_packet(lab: Lab) -> None:
    a, b, link = lab.pair()
    with udp(a, PORT) as peer:
        start(b, "10.7.0.2", "-server", link.a.v4)
        assert not ping(b, "10.7.0.1", "-W1")
        data = receive_ipv4(peer)
    assert data[:4] == PI_IPV4
    version_and_length, total_length = data[4], int.from_bytes(data[6:8], "big")
    assert (version_and_length, total_length) == (0x45, len(data) - 4)
    assert data[16:24] == socket.inet_aton("10.7.0.2") + socket.inet_aton("10.7.0.1")


@pytest.mark.netns
def test_source_port_is_the_port_on_both_sides(lab: Lab) -> None:
    a, b, link = lab.pair()
    with udp(a, 4321) as peer:
        start(b, "10.7.0.2", "-server", link.a.v4, "-port=4321")
        ping(b, "10.7.0.1", "-W1")
        assert peer.recvfrom(4096)[1] == (link.b.v4, 4321)


@pytest.mark.netns
def test_last_sender_of_any_datagram_is_the_peer(lab: Lab) -> None:
    a, b, link = lab.pair()
    start(a, "10.7.0.1", "-listen")
    with udp(b) as first, udp(b) as second:
        for sock in (first, second, first):
            sock.sendto(PI_IPV4 + echo_request("10.7.0.2", "10.7.0.1"), (link.a.v4, PORT))
            assert receive_ipv4(sock)[24:26] == b"\0\0"  # echo reply
        # Not even IP, so nothing answers it; but it takes the tunnel over.
        second.sendto(PI_IPV4 + b"\x45" + bytes(30), (link.a.v4, PORT))
        ping(a, "10.7.0.2", "-W1")
        assert receive_ipv4(second)[24:26] == b"\x08\0"  # the ping that a sent out


@pytest.mark.netns
def test_drops_packets_before_a_peer_is_known(lab: Lab) -> None:
    a, b, link = lab.pair()
    listener = start(a, "10.7.0.1", "-listen")
    assert not ping(a, "10.7.0.2", "-W1")
    assert listener.poll() is None
    start(b, "10.7.0.2", "-server", link.a.v4)
    assert ping(b, "10.7.0.1")
    assert ping(a, "10.7.0.2")


@pytest.mark.netns
@pytest.mark.parametrize("datagram", [b"", b"\0\0\x08"], ids=["empty", "shorter than packet information"])
def test_one_bad_datagram_ends_it(lab: Lab, datagram: bytes) -> None:
    a, b, link = lab.pair()
    process = start(a, "10.7.0.1", "-listen")
    with udp(b) as sender:
        sender.sendto(datagram, (link.a.v4, PORT))
        _, said = process.communicate(timeout=5)
    assert said.startswith("error from UDP to the tun device: ")
    assert process.returncode == 0
    wait_until(lambda: "tun0" not in a.devices(), what="tun0 gone")


@pytest.mark.netns
def test_packet_for_a_device_that_is_down_ends_it(lab: Lab) -> None:
    a, b, link = lab.pair()
    listener, client = start_both(a, b, link)
    assert ping(b, "10.7.0.1")
    a.down("tun0")
    ping(b, "10.7.0.1", "-W1")
    _, said = listener.communicate(timeout=5)
    assert "Input/output error" in said
    assert client.poll() is None


@pytest.mark.netns
def test_unreachable_network_ends_it(lab: Lab) -> None:
    a, b, link = lab.pair()
    _, client = start_both(a, b, link)
    link.b.down()
    ping(b, "10.7.0.1", "-W1")
    _, said = client.communicate(timeout=5)
    assert said.startswith("error from the tun device to UDP: ")
    assert "unreachable" in said


@pytest.mark.netns
@pytest.mark.parametrize("flag", ["--verbose", "--quiet", None])
def test_line_per_packet_only_with_verbose(lab: Lab, flag: str | None) -> None:
    a, b, link = lab.pair()
    processes = start_both(a, b, link, *([flag] if flag else []))
    assert ping(b, "10.7.0.1")
    for process in processes:
        process.terminate()
    said = [process.communicate(timeout=5)[0] for process in processes]
    first_lines, rest = zip(*(text.split("\n", 1) for text in said), strict=True)
    assert first_lines == (
        "listen:true server: dev:tun0 port:1234",
        f"listen:false server:{link.a.v4} dev:tun0 port:1234",
    )
    lines = [re.sub(r"\d+", "N", line) for text in rest for line in text.splitlines()]
    if flag == "--verbose":
        assert {"Read N bytes from the tun device.", "Writing N bytes to the tun device."} <= set(lines)
    else:
        assert lines == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-listen", "-server", "198.51.100.1"], "Cannot listen and set server flag\n"),
        ([], "You must specify the server or mark this host to listen\n"),
    ],
)
def test_one_role_has_to_be_given(flags: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, message)
    assert done.stdout.startswith("listen:")


@pytest.fixture(scope="module")
def pure_python() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pure_python_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loops_run_over_descriptors(pure_python: ModuleType) -> None:
    device, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with device, tun, udp_here() as sock:
        device.send(b"before a peer is known")
        device.close()
        peer = pure_python.Peer()
        with pytest.raises(EOFError):
            pure_python.tun_to_udp(tun.fileno(), sock, peer)
        assert peer.address is None

    device, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with device, tun, udp_here() as sock, udp_here() as wire:
        device.send(b"one")
        device.send(b"x" * 3000)  # longer than the buffer
        device.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            pure_python.tun_to_udp(tun.fileno(), sock, pure_python.Peer(wire.getsockname()))
        assert [wire.recv(4096), wire.recv(4096)] == [b"one", b"x" * 2048]

        wire.sendto(b"two", sock.getsockname())
        wire.sendto(b"three", sock.getsockname())
        peer = pure_python.Peer()
        sock.settimeout(0.2)  # ends the loop after what is there
        with pytest.raises(OSError, match="timed out"):
            pure_python.udp_to_tun(sock, tun.fileno(), peer)
        assert peer.address == wire.getsockname()
        device.settimeout(2)
        assert [device.recv(4096), device.recv(4096)] == [b"two", b"three"]


def udp_here() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(2)
    return sock


def test_demo_carries_the_same_file() -> None:
    link = SCRIPT.parents[1] / "fasttun" / "demo" / "pure_python.py"
    assert link.read_bytes() == SCRIPT.read_bytes()
    assert os.access(SCRIPT, os.X_OK)
