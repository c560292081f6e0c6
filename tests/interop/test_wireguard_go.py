"""Debian's wireguard-go, the real `wg`, tshark and scapy: others understand us, and we them.

Not for: fasttun with itself (netns/test_wireguard.py).
"""

from __future__ import annotations

import itertools
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from netns.test_offloads import transfer
from scapy.contrib.wireguard import (
    Wireguard,
    WireguardCookieReply,
    WireguardInitiation,
    WireguardResponse,
    WireguardTransport,
)
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap
from support.netns import Lab, Namespace, wait_until
from support.wireguard import host_configs, lost, reaches, running
from support.wireguard_go import Go

from fasttun.wireguard import keypairs, timers
from fasttun.wireguard.config import Config
from fasttun.wireguard.keys import PresharedKey, PrivateKey
from fasttun.wireguard.load import LoadMeter
from fasttun.wireguard.noise import InitiatorHandshake

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(not (shutil.which("wireguard-go") and shutil.which("wg")),
                       reason="needs wireguard-go and wg (apt install wireguard-go wireguard-tools)"),
]

SIZE = 4 << 20
A, B, A6, B6 = "10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"
ROLES = pytest.mark.parametrize("go_listens", [True, False], ids=["fasttun begins", "wireguard-go begins"])


def both(a: Namespace, b: Namespace, configs: tuple[Config, Config], go_listens: bool) -> tuple[Any, Any]:
    """Context managers for (the listener at a, the client at b); one of them is wireguard-go."""
    first, second = configs
    return (Go(a, first), running(b, second)) if go_listens else (running(a, first), Go(b, second))


@ROLES
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("preshared", [True, False], ids=["preshared", ""])
def test_files_cross_both_ways_inside_v4_and_v6(lab: Lab, go_listens: bool, outer: int, preshared: bool) -> None:
    a, b, link = lab.pair()
    endpoint = f"{link.a.v4}:51820" if outer == 4 else f"[{link.a.v6}]:51820"
    configs = host_configs(endpoint, preshared=PresharedKey.generate() if preshared else None)
    near, far = both(a, b, configs, go_listens)
    with near, far:
        reaches(b, A)
        for sender, receiver, host in ((b, a, A), (a, b, B), (b, a, A6), (a, b, B6)):
            transfer(sender, receiver, host, SIZE)
        for host, sizes in ((A, (0, 1391, 1392, 4000)), (A6, (0, 1371, 1372, 4000))):
            for size in sizes:
                b.run(["ping", "-c1", "-W2", "-s", str(size), host])


@ROLES
def test_a_wrong_key_is_refused(lab: Lab, go_listens: bool) -> None:
    a, b, link = lab.pair()
    first, second = host_configs(f"{link.a.v4}:51820", preshared=PresharedKey.generate())
    for wrong in (replace(second, private_key=PrivateKey.generate()),
                  replace(second, peers=(replace(second.peers[0], preshared_key=PresharedKey.generate()),))):
        near, far = both(a, b, (first, wrong), go_listens)
        with near, far:
            assert lost(b, A, 2, 0.2) == 2
    near, far = both(a, b, (first, second), go_listens)
    with near, far:
        reaches(b, A)


@ROLES
def test_persistent_keepalive_makes_a_session_out_of_nothing(lab: Lab, go_listens: bool) -> None:
    a, b, link = lab.pair()
    near, far = both(a, b, host_configs(f"{link.a.v4}:51820", keepalive=1), go_listens)
    with near as listener, far as client:
        theirs, ours = (listener, client) if go_listens else (client, listener)
        # A first message that is lost is sent again after REKEY_TIMEOUT, 5 s.
        wait_until(lambda: theirs.peer().handshake and ours.peers[0].last_handshake, 12)
        packets = ours.peers[0].tx_packets if go_listens else ours.peers[0].rx_packets
        time.sleep(2.2)
        now = ours.peers[0].tx_packets if go_listens else ours.peers[0].rx_packets
        assert now - packets in (1, 2, 3)
        reaches(a, B)


@ROLES
def test_roaming(lab: Lab, go_listens: bool) -> None:
    a, b, link = lab.pair()
    near, far = both(a, b, host_configs(f"{link.a.v4}:51820"), go_listens)
    b.sysctl("net.ipv4.conf.all.promote_secondaries", 1)
    with near as listener, far as client:
        theirs, ours = (listener, client) if go_listens else (client, listener)
        reaches(b, A)
        handshake = theirs.peer().handshake
        # The client moves to another address and another port.
        b.ip("address", "add", "10.99.0.9/24", "dev", link.b.device)
        b.ip("address", "del", f"{link.b.v4}/24", "dev", link.b.device)
        if go_listens:
            with b.enter():
                ours.set_listen_port(40001)
        else:
            theirs.wg("set", "wgo", "listen-port", "40001")
        assert lost(b, A, 10, 0.02) == 0
        seen = theirs.peer().endpoint if go_listens else str(ours.peers[0].endpoint)
        assert seen == "10.99.0.9:40001"
        assert lost(a, B, 10, 0.02) == 0
        # The listener moves to another port; it has to speak first.
        if go_listens:
            theirs.wg("set", "wgo", "listen-port", "40002")
        else:
            with a.enter():
                ours.set_listen_port(40002)
        assert lost(a, B, 10, 0.02) == 0
        assert lost(b, A, 10, 0.02) == 0
        seen = str(ours.peers[0].endpoint) if go_listens else theirs.peer().endpoint
        assert seen == f"{link.a.v4}:40002"
        assert theirs.peer().handshake == handshake


def test_a_restarted_wireguard_go_is_reached_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "REKEY_TIMEOUT", 0.3)
    monkeypatch.setattr(timers, "KEEPALIVE_TIMEOUT", 0.3)
    a, b, link = lab.pair()
    first, second = host_configs(f"{link.a.v4}:51820")
    with running(b, second) as client:
        with Go(a, first):
            reaches(b, A)
        before = client.peers[0].last_handshake
        with Go(a, first):
            reaches(b, A)
            assert client.peers[0].last_handshake > before
            client.stop()
            with running(b, second):
                reaches(b, A)
                reaches(a, B)


def test_sessions_are_renewed_without_loss(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours at a hundred times the speed; the real 120 s are below."""
    monkeypatch.setattr(timers, "REKEY_TIMEOUT", 0.3)
    monkeypatch.setattr(keypairs, "REKEY_AFTER_TIME", 0.5)
    a, b, link = lab.pair()
    first, second = host_configs(f"{link.a.v4}:51820")
    done: list[object] = []
    with Go(a, first), running(b, second, on_handshake=done.append):
        reaches(b, A)
        assert lost(b, A, 500, 0.005) == 0
        assert len(done) >= 4


def test_wireguard_go_proves_its_address_when_we_are_under_load(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadMeter, "message", lambda *_: True)
    a, b, link = lab.pair()
    first, second = host_configs(f"{link.a.v4}:51820")
    with running(a, first) as ours, Go(b, second), Capture(a, link.a.device) as capture:
        reaches(b, A, 15)
        assert ours.stats().control_drops["cookie-needed"] >= 1
        frames = capture.frames()
    kinds = [Wireguard(payload)[1].__class__ for payload in map(udp_payload, frames)]
    assert kinds[:4] == [WireguardInitiation, WireguardCookieReply, WireguardInitiation, WireguardResponse]


# ----------------------------------------------------------------------------- what others decode

class Capture:
    """Ethernet frames of UDP datagrams on one device of a host. A context manager."""

    def __init__(self, ns: Namespace, device: str) -> None:
        with ns.enter():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            self._sock.bind((device, 3))

    def frames(self) -> list[bytes]:
        self._sock.setblocking(False)
        found = []
        while True:
            try:
                frame = self._sock.recv(70000)
            except BlockingIOError:
                return found
            if frame[12:14] == b"\x08\x00" and frame[23] == 17:
                found.append(frame)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


def udp_payload(frame: bytes) -> bytes:
    header = 14 + (frame[14] & 15) * 4
    return frame[header + 8:header + int.from_bytes(frame[header + 4:header + 6], "big")]


@pytest.fixture
def ephemerals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PrivateKey]]:
    """The ephemeral keys of the handshakes that we begin: drawn here, and handed to the handshake."""
    drawn: list[PrivateKey] = []
    begin = InitiatorHandshake.begin

    def known(*arguments: Any, ephemeral: PrivateKey) -> Any:
        drawn.append(PrivateKey(ephemeral.to_bytes()))
        return begin(*arguments, ephemeral=ephemeral)

    monkeypatch.setattr(InitiatorHandshake, "begin", known)
    return iter([drawn]).__next__()


def test_scapy_and_tshark_decode_our_packets(
    lab: Lab, ephemerals: list[PrivateKey], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b, link = lab.pair()
    shared = PresharedKey.generate()
    first, second = host_configs(f"{link.a.v4}:51820", preshared=shared)
    with running(a, first), Capture(b, link.b.device) as capture:
        with running(b, second, udp_gso=False):
            b.run(["ping", "-c1", "-W2", "-s", "100", A])
            b.run(["ping", "-c1", "-W2", A6])
        frames = capture.frames()

    payloads = list(map(udp_payload, frames))
    parsed = [Wireguard(payload) for payload in payloads]
    assert [packet.message_type for packet in parsed[:4]] == [1, 2, 4, 4]
    assert all(packet.reserved_zero == 0 for packet in parsed)
    initiation, response, data = parsed[0][WireguardInitiation], parsed[1][WireguardResponse], parsed[2]
    assert initiation.unencrypted_ephemeral == bytes(ephemerals[0].public)
    assert response.receiver_index == initiation.sender_index
    assert data[WireguardTransport].receiver_index == response.sender_index
    assert data[WireguardTransport].counter == 0
    assert len(data[WireguardTransport].encrypted_encapsulated_packet) == 128 + 16
    assert [bytes(packet) for packet in parsed] == payloads

    tshark = shutil.which("tshark")
    assert tshark, "apt install tshark"
    keys = tmp_path / "keys"
    keys.write_text(f"LOCAL_STATIC_PRIVATE_KEY={second.private_key.to_base64()}\n"
                    f"REMOTE_STATIC_PUBLIC_KEY={first.private_key.public}\n"
                    f"LOCAL_EPHEMERAL_PRIVATE_KEY={ephemerals[0].to_base64()}\n"
                    f"PRESHARED_KEY={shared.to_base64()}\n")
    wrpcap(str(tmp_path / "capture.pcap"), [Ether(frame) for frame in frames])
    done = lab.namespace().run([
        tshark, "-r", tmp_path / "capture.pcap", "-o", f"wg.keylog_file:{keys}", "-d", "udp.port==51820,wg",
        "-T", "fields", "-E", "separator=,", "-e", "wg.type", "-e", "wg.receiver_pubkey.known_privkey",
        "-e", "wg.handshake_ok", "-e", "ip.dst", "-e", "icmp.type", "-e", "ipv6.dst", "-e", "icmpv6.type",
        "-e", "_ws.expert.message",
    ])
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1,"), done.stderr
    assert lines[1].startswith("2,")
    assert "1" in lines[1].split(",")[2], lines  # wg.handshake_ok: the response is authentic under these keys
    assert re.search(rf"^4,.*{A},8,", lines[2]), lines
    assert any(re.search(rf"^4,.*{B},0,", line) for line in lines), lines
    assert any(re.search(rf"^4,.*{A6},128", line) for line in lines), lines
    assert any(re.search(rf"^4,.*{B6},129", line) for line in lines), lines


# ------------------------------------------------------------------------------------ in real time

@pytest.mark.slow
@pytest.mark.waits
def test_real_time(lab: Lab) -> None:
    """REKEY_AFTER_TIME, 120 s, with each side as the initiator; and a restart of ours, which theirs notices at 15 s.

    All three at once, and nothing but waiting: it costs no processor time beside other tests.
    """
    pairs = []
    for go_listens in (True, False):
        a, b, link = lab.pair()
        pairs.append((go_listens, a, b, both(a, b, host_configs(f"{link.a.v4}:51820"), go_listens)))
    c, d, link = lab.pair()
    first, second = host_configs(f"{link.a.v4}:51820")
    (_, a, b, (near, far)), (_, e, f, (other_near, other_far)) = pairs
    with near as go_server, far as ours, other_near as listener, other_far as go_client, Go(d, second):
        with running(c, first):
            reaches(d, A)
        with running(c, first):
            started = time.monotonic()
            watches = []
            for ns in (b, f):
                reaches(ns, A)
                watches.append(ns.popen(["ping", "-q", "-n", "-i0.5", "-c250", "-W2", A]))
            handshakes = ours.peers[0].last_handshake, go_client.peer().handshake
            assert d.run(["ping", "-i1", "-c20", "-W1", A], check=False, timeout=40).returncode == 0
            assert time.monotonic() - started > 10
            for ping in watches:
                out, _ = ping.communicate(timeout=150)
                assert " 0% packet loss" in out, out
            renewed = ours.peers[0].last_handshake, go_client.peer().handshake
            for before, after in zip(handshakes, renewed, strict=True):
                assert 119 <= after - before <= 124, (handshakes, renewed)
            assert abs(go_server.peer().handshake - renewed[0]) <= 1
            assert abs(listener.peers[0].last_handshake - renewed[1]) <= 2
    assert e is not a
    assert list(itertools.islice(pairs, 2))
