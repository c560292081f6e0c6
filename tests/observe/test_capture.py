"""`fasttun capture` without root: the stream and the command on tunnels over socketpairs, both modes.

Not for: the filter's verdicts (test_filter), real devices and processes that are stopped (tests/netns/test_capture).
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.netns import wait_until
from support.tunnels import Client, Pipe, bind_udp, ip_packet, stun_request, stun_success, threads
from support.wireguard import at, ends, exchange, pair_of_configs

from fasttun import Forwarder, StateError
from fasttun.cli.packets import line, summary
from fasttun.endpoint import Endpoint
from fasttun.observe import Observers, handshakes, stream
from fasttun.observe.client import Running, choose
from fasttun.observe.filter import compile_filter
from fasttun.observe.handshakes import HandshakeTap, KeyQueue, datagram_packet
from fasttun.observe.stream import Packet, PcapngReader, request
from fasttun.wireguard import keylog, timers
from fasttun.wireguard.keys import PresharedKey, PrivateKey, PublicKey

FASTTUN = (sys.executable, "-m", "fasttun")
RING = 8 << 20
SETTLE_S = 0.05
"""A datagram is shown to the capture after it was sent, so its receiver may be ahead."""


class Server:
    """A listener on a socketpair with its control socket, and a client that has said who it is."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.pipe = stack.enter_context(Pipe.make())
        sock = stack.enter_context(bind_udp())
        self.address = sock.getsockname()
        self.tunnel = stack.enter_context(Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=self.pipe.fd))
        self._observers = stack.enter_context(Observers(self.tunnel))
        self.client = stack.enter_context(Client(self.address))
        self.client.send(ip_packet("10.7.0.2", "10.7.0.1", b"hello"))
        self.pipe.receive()

    @property
    def running(self) -> Running:
        return choose(None)

    @property
    def captured(self) -> bool:
        handler: Any = self._observers._control._handlers["capture"]
        return bool(handler.taking)

    def inbound(self, number: int, size: int = 8) -> bytes:
        packet = ip_packet("10.7.0.2", "10.7.0.1", struct.pack("!HHI", 7, 9, number).ljust(size, b"i"), protocol=17)
        self.client.send(packet)
        assert self.pipe.receive() == packet
        return packet

    def outbound(self, number: int) -> bytes:
        packet = ip_packet("10.7.0.1", "10.7.0.2", struct.pack("!HHI", 9, 7, number), protocol=17)
        self.pipe.send(packet)
        assert self.client.receive() == packet
        return packet


@pytest.fixture
def server() -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        yield Server(stack)
    assert not threads()


class Taken:
    """A capture under way. `end` asks for the rest; a context manager."""

    def __init__(self, tunnel: Running, **fields: Any) -> None:
        self._sock, self._first = request(tunnel, **fields)
        self._sock.settimeout(10)
        self.reader = PcapngReader()
        self.raw = b""

    def __enter__(self) -> Taken:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def packets(self, *, ask: bool = True) -> list[Packet]:
        """All packets, once the tunnel has ended the stream."""
        if ask:
            time.sleep(SETTLE_S)
            self._sock.shutdown(socket.SHUT_WR)
        found = list(self.reader.feed(self._first))
        self.raw = self._first
        while data := self._sock.recv(1 << 18):
            self.raw += data
            found += self.reader.feed(data)
        return found


# ------------------------------------------------------------------------------------------------- the stream

def test_inner_and_outer_are_what_passed(server: Server) -> None:
    with Taken(server.running, what="both") as taken:
        before = time.time_ns()
        came, went = server.inbound(1), server.outbound(2)
        packets = taken.packets()
        after = time.time_ns()
    assert [(packet.outer, packet.outbound) for packet in packets] == [
        (True, False), (False, False), (False, True), (True, True)]
    assert [packet.data for packet in packets if not packet.outer] == [came, went]
    for packet, inner in zip((packets[0], packets[3]), (came, went), strict=True):
        assert packet.length == len(packet.data) == len(inner) + 28
        assert packet.data[28:] == inner
        ports = struct.unpack_from("!HH", packet.data, 20)
        assert sorted(ports) == sorted((server.client.port, server.address[1]))
    assert all(before <= packet.time_ns <= after for packet in packets)
    assert (taken.reader.packets, taken.reader.missed) == (4, 0)


@pytest.mark.parametrize("what", ["inner", "outer", "both"])
def test_other_programs_read_it(server: Server, tmp_path: Path, what: str) -> None:
    scapy = pytest.importorskip("scapy.all")
    with Taken(server.running, what=what, snap_length=60) as taken:
        for number in range(5):
            server.inbound(number, size=200)
            server.outbound(number)
        packets = taken.packets()
    path = tmp_path / "taken.pcapng"
    path.write_bytes(taken.raw)
    assert [bytes(packet) for packet in scapy.rdpcap(str(path))] == [packet.data for packet in packets]
    assert len(packets) == (20 if what == "both" else 10)
    assert {packet.length for packet in packets if not packet.outer} <= {220, 28}
    assert max(len(packet.data) for packet in packets) == 60
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark (apt install tshark)")
    done = subprocess.run(
        ["tshark", "-n", "-r", str(path), "-T", "fields", "-e", "frame.interface_name", "-e", "frame.len", "-e",
         "frame.cap_len", "-e", "frame.packet_flags_direction", "-e", "ip.checksum.status",
         "-o", "ip.check_checksum:TRUE"],
        capture_output=True, text=True, timeout=60)
    assert "appears" not in done.stderr
    assert "cut short" not in done.stderr
    assert done.returncode == 0, done.stderr
    name = "descriptor"
    expected = [[f"{name}-outer" if packet.outer else name, str(packet.length), str(len(packet.data)),
                 "0x00000002" if packet.outbound else "0x00000001"] for packet in packets]
    rows = [row.split("\t") for row in done.stdout.splitlines()]
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    assert [int(row[3], 16) for row in rows] == [int(row[3], 16) for row in expected]
    assert {row[4] for row in rows} <= {"1", "Good"}, "the headers that were made up are whole"


def test_a_filter_and_a_count(server: Server) -> None:
    with Taken(server.running, filter="src port 9", count=3) as taken:
        for number in range(5):
            server.inbound(number)
            server.outbound(number)
        packets = taken.packets(ask=False)
    assert [struct.unpack_from("!I", packet.data, 24)[0] for packet in packets] == [0, 1, 2]
    assert all(packet.outbound for packet in packets)


def test_it_ends_by_time(server: Server) -> None:
    begin = time.monotonic()
    with Taken(server.running, seconds=0.3) as taken:
        server.inbound(0)
        assert len(taken.packets(ask=False)) == 1
    assert 0.25 < time.monotonic() - begin < 3


def test_what_a_flood_overruns_is_counted_exactly(server: Server) -> None:
    """Nobody reads until all has passed: the ring and the sockets hold some, the rest is counted, none is lost."""
    wanted, others = 9000, 200
    flood = ip_packet("10.7.0.1", "10.7.0.3", struct.pack("!HH", 5, 5).ljust(1380, b"f"), protocol=17)
    other = ip_packet("10.7.0.1", "10.7.0.3", struct.pack("!HH", 6, 6), protocol=17)
    with Taken(server.running, filter="udp port 5") as taken:
        def passed() -> int:
            outbound = server.tunnel.stats().outbound
            return outbound.packets_out + outbound.dropped

        begin = passed()
        for number in range(wanted):
            server.pipe.send(flood)
            if number < others:
                server.pipe.send(other)
        wait_until(lambda: passed() - begin == wanted + others, what="the tunnel goes on, though the reader does not")
        packets = taken.packets()
    assert taken.reader.missed
    assert {packet.data for packet in packets} == {flood}
    assert len(packets) + taken.reader.missed == wanted
    assert RING // 1500 < len(packets) < wanted
    with Taken(server.running) as again:  # a new capture counts anew
        server.inbound(0)
        assert len(again.packets()) == 1
    assert again.reader.missed == 0


def test_a_capture_costs_no_system_call(server: Server) -> None:
    """The loop makes the same calls a packet with a capture, without one before, and without one after."""
    def calls() -> dict[str, int]:
        before = server.tunnel.stats().system_calls
        for number in range(50):
            server.inbound(number)
            server.outbound(number)
        after = server.tunnel.stats().system_calls
        return {name: after[name] - before[name] for name in after if name != "poll"}

    off = calls()
    with Taken(server.running, what="both") as taken:
        on = calls()
        assert len(taken.packets()) == 200
    assert off == on == calls()
    assert sum(off.values()) > 0


def test_one_capture_at_a_time(server: Server) -> None:
    with Taken(server.running) as taken:
        with pytest.raises(StateError, match="captured already; one capture at a time"):
            request(server.running)
        server.inbound(0)
        assert len(taken.packets()) == 1
    with Taken(server.running) as taken:
        assert taken.packets() == []


def test_a_reader_that_goes_ends_it(server: Server) -> None:
    with Taken(server.running):
        pass

    def again() -> bool:
        with contextlib.suppress(StateError), Taken(server.running) as taken:
            server.inbound(0)
            return len(taken.packets()) == 1
        return False

    wait_until(again)


def test_the_tunnels_end_is_the_captures(server: Server) -> None:
    with Taken(server.running) as taken:
        server.inbound(0)
        server.tunnel.stop()
        assert len(taken.packets(ask=False)) == 1
        assert taken.reader.missed == 0


def test_a_stopped_tunnel_waits_for_no_reader() -> None:
    with contextlib.ExitStack() as stack:
        server = Server(stack)
        with Taken(server.running):
            flood = ip_packet("10.7.0.1", "10.7.0.3", bytes(1380))
            for _ in range(1000):
                server.pipe.send(flood)
            begin = time.monotonic()
            server.tunnel.stop()
            assert time.monotonic() - begin < 1
            wait_until(lambda: not any("_serve" in one.name for one in threading.enumerate()))


@pytest.mark.parametrize(("fields", "problem"), [
    ({"what": "all"}, "what: 'all' is not known"), ({"what": 1}, "not a text"), ({"filter": "nonsense"}, "filter: "),
    ({"snap_length": 0}, "positive"), ({"snap_length": 1 << 20}, "out of range"), ({"snap_length": "x"}, "positive"),
    ({"count": -1}, "positive"), ({"count": 1.5}, "positive"), ({"seconds": True}, "positive"),
    ({"seconds": float("inf")}, "positive"), ({"seconds": float("nan")}, "positive"),
    ({"filter": " and ".join(["tcp"] * 65)}, "65 terms"),
])
def test_bad_requests_get_an_error(server: Server, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(StateError, match=re.escape(problem)):
        request(server.running, **fields)
    with Taken(server.running) as taken:
        assert taken.packets() == []


@given(st.data())
def test_the_reader_takes_pieces_of_any_size(data: st.DataObject) -> None:
    from fasttun.observe import pcapng

    bodies = data.draw(st.lists(st.binary(max_size=70), max_size=6))
    raw = pcapng.header("tun0", 96, "test") + b"".join(
        pcapng.packet(number % 2, 10**18 + number, number % 3 == 0, len(body) + 5, body)
        for number, body in enumerate(bodies)) + pcapng.statistics(0, 1, 42)
    reader, found, at_ = PcapngReader(), [], 0
    while at_ < len(raw):
        size = data.draw(st.integers(1, 100))
        found += reader.feed(raw[at_:at_ + size])
        at_ += size
    assert [(one.outer, one.time_ns, one.outbound, one.length, one.data) for one in found] == [
        (number % 2 == 1, 10**18 + number, number % 3 == 0, len(body) + 5, body) for number, body in enumerate(bodies)]
    assert (reader.packets, reader.missed) == (len(bodies), 42)


# -------------------------------------------------------------------------------------------------- WireGuard

def messages(packets: list[Packet]) -> list[tuple[str, int]]:
    """Way and message type of outer packets, in the order of time."""
    return [("out" if packet.outbound else "in", packet.data[28])
            for packet in sorted(packets, key=lambda packet: packet.time_ns) if packet.outer]


@pytest.mark.parametrize("captured", ["initiator", "responder"])
def test_handshakes_are_in_it_both_ways(captured: str) -> None:
    with ends() as pair:  # b begins
        tunnel, other = (pair.b, pair.a) if captured == "initiator" else (pair.a, pair.b)
        with Observers(tunnel), Taken(choose(None), what="both") as taken:
            exchange(pair)
            packets = taken.packets()
        mine, theirs = ("out", "in") if captured == "initiator" else ("in", "out")
        seen = messages(packets)
        assert seen[:2] == [(mine, 1), (theirs, 2)]
        assert {("in", 4), ("out", 4)} <= set(seen)
        for packet in packets:
            if packet.outer:
                ports = struct.unpack_from("!HH", packet.data, 20)
                way = (tunnel.listen_port, other.listen_port)
                assert ports == (way if packet.outbound else way[::-1])
        assert sum(not packet.outer for packet in packets) == 2
        wait_until(lambda: tunnel.tap is None)


def decrypted(raw: bytes, path: Path) -> list[tuple[str, str]]:
    """Inner source and WireGuard message type of each outer packet, by Wireshark with nothing but the capture."""
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark (apt install tshark)")
    path.write_bytes(raw)
    done = subprocess.run(
        ["tshark", "-n", "-r", str(path), "-T", "fields", "-e", "ip.src", "-e", "wg.type"],
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [row.split("\t") for row in done.stdout.splitlines()]
    return [(source.partition(",")[2], kind) for source, kind in rows]


def forms_of(key: PrivateKey | PresharedKey) -> list[bytes]:
    """In which one could find it in a file."""
    return [key.to_base64().encode(), key.to_bytes(), key.to_bytes().hex().encode()]


@pytest.mark.parametrize("preshared", [False, True])
@pytest.mark.parametrize("captured", ["initiator", "responder"])
def test_with_keys_a_capture_opens_itself(captured: str, preshared: bool, tmp_path: Path) -> None:
    secret = PresharedKey.generate() if preshared else None
    configs = pair_of_configs(preshared=secret)
    with ends(configs) as pair:  # b begins
        tunnel, mine, theirs = (pair.b, *configs[::-1]) if captured == "initiator" else (pair.a, *configs)
        assert mine.private_key is not None
        assert theirs.private_key is not None
        with Observers(tunnel), Taken(choose(None), what="outer", keys=True) as taken:
            exchange(pair)
            taken.packets()
            assert [kind for _, kind in decrypted(taken.raw, tmp_path / "out.pcapng")][:2] == ["1", "2"]
            inside = {source for source, kind in decrypted(taken.raw, tmp_path / "out.pcapng") if kind == "4"}
            assert {"10.9.0.1", "10.9.0.2"} <= inside
            assert forms_of(mine.private_key)[0] in taken.raw
            assert secret is None or forms_of(secret)[0] in taken.raw
            assert not any(form in taken.raw for form in forms_of(theirs.private_key))
            wait_until(lambda: tunnel.tap is None)
        assert tunnel._host is not None
        assert tunnel._host._protocol.key_log is None


def test_without_keys_no_secret_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []
    generate = PrivateKey.generate

    def draw() -> PrivateKey:
        key = generate()
        drawn.extend(forms_of(key))
        return key

    secret = PresharedKey.generate()
    configs = pair_of_configs(preshared=secret)
    monkeypatch.setattr(PrivateKey, "generate", draw)
    with ends(configs) as pair, Observers(pair.b), Taken(choose(None), what="both") as taken:
        exchange(pair)
        assert len(taken.packets()) > 4
    assert len(drawn) == 6, "both ends draw their ephemeral keys here"
    for config in configs:
        assert config.private_key is not None
        drawn += forms_of(config.private_key)
    assert not any(form in taken.raw for form in drawn + forms_of(secret))


def test_new_sessions_are_made_for_a_capture_even_after_a_fresh_one(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timers, "REKEY_TIMEOUT", 0.3)
    with ends() as pair, Observers(pair.b):
        exchange(pair)
        begin, first = time.monotonic(), pair.b.peers[0].last_handshake
        with Taken(choose(None), what="outer", keys=True, handshake=True) as taken:
            exchange(pair, b"in the session from before")
            wait_until(lambda: pair.b.peers[0].last_handshake > first)
            assert time.monotonic() - begin > 0.1
            exchange(pair, b"in the new one")
            taken.packets()
    kinds = decrypted(taken.raw, tmp_path / "out.pcapng")
    assert ("", "4") in kinds
    assert {("10.9.0.1", "4"), ("10.9.0.2", "4")} <= set(kinds[kinds.index(("", "2")):])


def test_keys_are_for_who_may_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with ends() as pair, Observers(pair.b):
        running = choose(None)
        running.path.chmod(0o660)
        with pytest.raises(StateError, match=r"others may use: chmod 600 .*\.sock"):
            request(running, what="outer", keys=True)
        with Taken(running, what="outer") as taken:  # without keys it is nobody's business
            assert taken.packets() == []
    here, there = socket.socketpair()
    with here, there, monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4242)
        if os.getuid():
            with pytest.raises(StateError, match="for root and for the user that runs it"):
                stream._check_may_have_keys(here, None)
        other = SimpleNamespace(getsockopt=lambda *_: struct.pack("3i", 1, 4243, 4243))
        with pytest.raises(StateError, match="for root and for the user that runs it"):
            stream._check_may_have_keys(cast("socket.socket", other), None)
        same = SimpleNamespace(getsockopt=lambda *_: struct.pack("3i", 1, 4242, 4242))
        stream._check_may_have_keys(cast("socket.socket", same), None)


def test_a_device_with_many_peers_tells_its_keys_in_pieces() -> None:
    private = PrivateKey.generate()
    peers = [PublicKey(os.urandom(32)) for _ in range(1500)]
    texts = list(keylog.of_device(private, peers))
    assert len(texts) == 3
    assert max(map(len, texts)) < 1 << 16
    lines = "".join(texts).splitlines()
    assert lines == [f"LOCAL_STATIC_PRIVATE_KEY = {private.to_base64()}",
                     *(f"REMOTE_STATIC_PUBLIC_KEY = {peer}" for peer in peers)]


def test_keys_that_nobody_fetches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "KEYS", 3)
    queue = KeyQueue()
    for number in range(5):
        queue.add(str(number))
    assert list(queue.take()) == ["0", "1", "2"]
    assert list(queue.take()) == []


@pytest.mark.parametrize("answered", [True, False])
def test_a_plain_clients_greetings_are_in_it(answered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the control thread sends, and what comes back."""
    with contextlib.ExitStack() as stack:
        pipe, server = stack.enter_context(Pipe.make()), stack.enter_context(bind_udp())
        host, port = server.getsockname()
        tunnel = stack.enter_context(Forwarder(server=host, port=port, tun_fd=pipe.fd))
        server.settimeout(5)
        server.recv(64)
        stack.enter_context(Observers(tunnel))
        taken = stack.enter_context(Taken(choose(None), what="outer"))
        tunnel._send_greeting(Endpoint(*_v4(host, port)))
        request_, client = server.recvfrom(64)
        if answered:
            server.sendto(stun_success(request_[8:20]), client)
            wait_until(lambda: tunnel.peers[0].silent_s < 1)
        packets = [packet for packet in taken.packets() if packet.data[36:48] == request_[8:20]]
    assert [packet.outbound for packet in packets] == ([True, False] if answered else [True])
    assert packets[0].data[28:] == request_
    assert struct.unpack_from("!4s4sHH", packets[0].data, 12) == (bytes([127, 0, 0, 1]),) * 2 + (client[1], port)


def test_the_loops_own_stun_messages_are_in_it(server: Server) -> None:
    """A listener's answer to a greeting, and its check of an address's owner whom another one contests."""
    with contextlib.closing(Client(server.address)) as stranger, Taken(server.running, what="outer") as taken:
        server.client.send(stun_request())
        answer = server.client.receive()
        stranger.send(ip_packet("10.7.0.2", "10.7.0.1", b"mine"))
        check = server.client.receive()
        packets = [packet for packet in taken.packets() if packet.outbound]
    assert [packet.data[28:] for packet in packets][:2] == [answer, check]
    ports = [struct.unpack_from("!HH", packet.data, 20) for packet in packets]
    assert ports[:2] == [(server.address[1], server.client.port)] * 2
    assert packets[0].data[12:20] == bytes([127, 0, 0, 1]) * 2


def test_a_filter_is_for_handshakes_too() -> None:
    with ends() as pair:
        with Observers(pair.b), Taken(choose(None), what="outer", filter="src port 1") as taken:
            exchange(pair)
            assert taken.packets() == []
        with Observers(pair.b), Taken(choose(None), what="inner") as taken:
            pair.b.update_peer(pair.b.peers[0].public_key, endpoint=at(pair.a))
            exchange(pair)
            assert len(taken.packets()) == 2


def test_the_queue_of_handshakes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "QUEUE", 10)
    tap = HandshakeTap()
    to = Endpoint(*_v4("10.0.0.1", 7))
    tap(1, b"before", to, None)
    tap.capture_start(outer=True, snap_length=40, clauses=compile_filter("udp port 7"), local_port=9)
    for _ in range(25):
        tap(2, bytes(148), to, None)
    found, missed = tap.capture_read()
    assert (len(found), missed) == (10, 15)
    assert {(len(data), length) for _, _, _, length, data in found} == {(40, 176)}
    tap.capture_stop()
    tap(3, b"after", to, None)
    assert tap.capture_read() == ([], 15)


def _v4(text: str, port: int) -> tuple[Any, int]:
    import ipaddress
    return ipaddress.ip_address(text), port


@pytest.mark.parametrize(("local", "remote"), [
    ("10.0.0.1", "10.0.0.2"), (None, "10.0.0.2"), ("::ffff:10.0.0.1", "::ffff:10.0.0.2"), ("fd00::1", "fd00::2"),
    (None, "fd00::2")])
def test_headers_made_up_are_whole(local: str | None, remote: str) -> None:
    scapy = pytest.importorskip("scapy.all")
    here = _v4(local, 0)[0] if local else None
    packet = datagram_packet(b"x" * 148, here, 51820, *_v4(remote, 7))
    parsed = (scapy.IPv6 if packet[0] >> 4 == 6 else scapy.IP)(packet)
    assert (parsed.dst, parsed[scapy.UDP].sport, parsed[scapy.UDP].dport) == (remote.removeprefix("::ffff:"), 51820, 7)
    assert parsed.src == (local or ("::" if ":" in remote else "0.0.0.0")).removeprefix("::ffff:")
    assert bytes(parsed[scapy.UDP].payload) == b"x" * 148
    if parsed.version == 4:
        sent = parsed.chksum
        del parsed.chksum
        assert scapy.IP(bytes(parsed)).chksum == sent


# ------------------------------------------------------------------------------------------------ the command

@contextlib.contextmanager
def command(server: Server, *words: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """`fasttun capture`, once it has begun."""
    process = subprocess.Popen([*FASTTUN, "capture", *words], stderr=subprocess.PIPE, **options)
    try:
        wait_until(lambda: server.captured or process.poll() is not None, 10, what="the capture")
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def lines_of(process: subprocess.Popen[bytes]) -> tuple[list[str], str]:
    out, err = process.communicate(timeout=10)
    return (out or b"").decode().splitlines(), err.decode()


def test_it_prints_a_line_a_packet(server: Server) -> None:
    with command(server, "-c", "4", "--what", "both", stdout=subprocess.PIPE) as process:
        server.inbound(1)
        server.outbound(2)
        lines, err = lines_of(process)
    assert err == "4 packets, 0 missed\n"
    assert process.returncode == 0
    clock = r"\d\d:\d\d:\d\d\.\d{6}"
    outside = rf"IP  127\.0\.0\.1\.{server.client.port} > [\d.]+\.{server.address[1]}: UDP, length 28"
    assert re.fullmatch(rf"{clock} outer in  {outside}", lines[0])
    assert re.fullmatch(rf"{clock} inner in  IP  10\.7\.0\.2\.7 > 10\.7\.0\.1\.9: UDP, length 0", lines[1])
    assert re.fullmatch(rf"{clock} inner out IP  10\.7\.0\.1\.9 > 10\.7\.0\.2\.7: UDP, length 0", lines[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_file_properly(server: Server, tmp_path: Path, number: signal.Signals) -> None:
    scapy = pytest.importorskip("scapy.all")
    path = tmp_path / "out.pcapng"
    with command(server, "-w", str(path), "udp", "port", "7") as process:
        wait_until(lambda: path.stat().st_size)
        sent = [server.inbound(number) for number in range(20)]
        process.send_signal(number)
        assert lines_of(process) == ([], "20 packets, 0 missed\n")
    assert process.returncode == 0
    assert [bytes(packet) for packet in scapy.rdpcap(str(path))] == sent
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_packets_reach_a_pipe_at_once(server: Server) -> None:
    with command(server, "-w", "-", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        raw = b""

        def arrived(data: bytes) -> bool:
            nonlocal raw
            raw += os.read(fd, 65536) if select.select([fd], [], [], 0)[0] else b""
            return data in raw

        wait_until(lambda: arrived(b"descriptor-outer"))
        for number in range(3):
            packet = server.inbound(number)
            wait_until(lambda: arrived(packet), 2)  # noqa: B023
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_reader_of_the_pipe_that_goes_ends_it(server: Server, busy: bool) -> None:
    with command(server, "-w", "-", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(4) == b"\n\r\r\n"
        process.stdout.close()
        if busy:
            server.inbound(0)
        assert process.wait(10) == 0
        assert re.fullmatch(rb"\d packets?, 0 missed\n", process.stderr.read())
    wait_until(lambda: not server.captured)


def test_a_terminal_is_refused(server: Server) -> None:
    reader, writer = pty.openpty()
    try:
        done = subprocess.run(
            [*FASTTUN, "capture", "-w", "-"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=20)
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 2
    assert done.stderr.startswith("fasttun: -w: standard output is a terminal; ")


@pytest.mark.parametrize(("words", "status", "error"), [
    (["tcp", "nonsense"], 2, "filter: 'nonsense' is not known here; as in "),
    (["tun7"], 1, "no tunnel tun7 is running"),
    (["-s", "0"], 2, "--snap-length: "), (["-c", "0"], 2, "--count: "), (["--what", "all"], 2, "--what: "),
    (["--seconds", "0"], 2, "--seconds: "), (["-w", "/nonexistent/x"], 1, "/nonexistent/x: No such file"),
    (["not"], 2, "filter: nothing stands after 'not'"),
    (["--keys"], 2, "--keys: is for a file or a pipe"),
    (["--keys", "-w", "/nonexistent/x"], 2, "--keys: inner packets"),
    (["--keys", "-w", "/nonexistent/x", "--what", "both", "-s", "99"], 2, "--keys: a packet that is cut short"),
    (["--handshake"], 1, "descriptor: handshake: is for encrypted tunnels; this one is plain"),
])
def test_bad_use_is_named(server: Server, words: list[str], status: int, error: str) -> None:
    done = subprocess.run([*FASTTUN, "capture", *words], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"fasttun: {error}")


def test_a_name_and_a_filter_are_told_apart(server: Server) -> None:
    name = server.running.name
    with command(server, "-c", "1", name, "dst", "port", "7", stdout=subprocess.PIPE) as process:
        server.inbound(0)
        server.outbound(1)
        lines, _ = lines_of(process)
    assert len(lines) == 1
    assert "out IP" in lines[0]


def test_without_a_tunnel_it_says_so() -> None:
    done = subprocess.run([*FASTTUN, "capture"], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (1, "fasttun: no tunnel is running\n")


# ---------------------------------------------------------------------------------------------- a packet's line

@given(st.binary(max_size=120), st.integers(0, 70000), st.booleans())
def test_any_bytes_have_a_line(data: bytes, more: int, outer: bool) -> None:
    for head in (b"", b"\x45", b"\x60"):
        text = line(Packet(1, outer, False, len(data) + more, head + data), side=True)
        assert "\n" not in text


def test_lines_say_what_packets_are() -> None:
    scapy = pytest.importorskip("scapy.all")
    ip, ip6 = scapy.IP(src="10.7.0.1", dst="10.7.0.2"), scapy.IPv6(src="fd07::1", dst="fd07::2")
    cases = [
        (ip / scapy.TCP(sport=80, dport=5, flags="SA"), "IP  10.7.0.1.80 > 10.7.0.2.5: TCP, flags [S.], length 0"),
        (ip6 / scapy.TCP(sport=1, dport=2, flags="PA") / b"abc",
         "IP6 fd07::1.1 > fd07::2.2: TCP, flags [P.], length 3"),
        (ip / scapy.UDP(sport=1, dport=2) / b"x", "IP  10.7.0.1.1 > 10.7.0.2.2: UDP, length 1"),
        (ip / scapy.ICMP(id=5, seq=6), "IP  10.7.0.1 > 10.7.0.2: ICMP echo request, id 5, seq 6, length 8"),
        (ip / scapy.ICMP(type=3), "IP  10.7.0.1 > 10.7.0.2: ICMP unreachable, length 8"),
        (ip6 / scapy.ICMPv6EchoReply(id=1, seq=2), "IP6 fd07::1 > fd07::2: ICMP6 echo reply, id 1, seq 2, length 8"),
        (scapy.IP(src="10.7.0.1", dst="10.7.0.2", frag=185, proto=17) / bytes(9),
         "IP  10.7.0.1 > 10.7.0.2: fragment at 1480, UDP, length 9"),
        (scapy.IP(src="10.7.0.1", dst="10.7.0.2", proto=253) / bytes(4),
         "IP  10.7.0.1 > 10.7.0.2: protocol 253, length 4"),
    ]
    for packet, text in cases:
        raw = bytes(packet)
        assert summary(raw, len(raw)) == text
    message = bytes(ip / scapy.UDP(sport=1, dport=2)) + b"\4\0\0\0" + struct.pack("<I", 0xABCD) + bytes(24)
    assert summary(message, len(message), outer=True).endswith("WireGuard data, receiver 0x0000abcd, length 32")
    assert summary(message[:28], 1000).endswith("UDP, length 972"), "cut off"
