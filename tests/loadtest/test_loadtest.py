"""The load test without a tunnel: both sides on loopback, bad sides played by the test, the table and the picture.

Not for: figures of real tunnels (tests/netns/test_loadtest).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest
from support.netns import wait_until
from support.tunnels import descriptors

from fasttun import StateError
from fasttun.cli.bench import _candidates, _table
from fasttun.loadtest import generator, measure, serve, wire
from fasttun.loadtest.measure import Measurement
from fasttun.loadtest.plot import check, draw
from fasttun.loadtest.serve import Server
from fasttun.loadtest.wire import Lines

FASTTUN = (sys.executable, "-m", "fasttun")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def serving(*networks: str) -> Iterator[int]:
    """A server on loopback; its port. Afterwards no thread and no descriptor is left."""
    before, port = set(descriptors()), free_port()
    server = Server("lo", [ip_interface(text) for text in networks or ("127.0.0.1/8",)], port)
    with contextlib.closing(server):
        server.open()
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield port
        finally:
            server.stop()
            thread.join(10)
            assert not thread.is_alive()
    wait_until(lambda: not left_threads())
    assert set(descriptors()) <= before


def left_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fasttun-bench")]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    with serving() as port, Measurement("127.0.0.1", seconds=0.3, port=port) as measurement:
        return measurement.run()


def test_the_document_is_version_1(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document)) == document
    assert document["schema"] == 1
    assert set(document) == {"schema", "version", "time", "tunnel", "peer", "local", "seconds", "tcp", "udp", "rtt"}
    assert [(one["way"], one["streams"]) for one in document["tcp"]] == [("up", 1), ("up", 4), ("down", 1), ("down", 4)]
    assert [one["way"] for one in document["udp"]] == ["up", "down"]
    assert [one["load"] for one in document["rtt"]] == ["idle", "up", "down"]
    for one in document["tcp"]:
        assert set(one) == {"way", "streams", "bits_per_s", "bytes", "seconds"}
        assert one["bits_per_s"] == pytest.approx(one["bytes"] * 8 / one["seconds"])
        assert 0.2 < one["seconds"] < 3
        assert one["bits_per_s"] > 1e8
    for one in document["udp"]:
        assert set(one) == {"way", "bits_per_s", "size", "sent", "received", "loss", "offered_bits_per_s"}
        assert 0 < one["received"] <= one["sent"]
        assert one["loss"] == pytest.approx(1 - one["received"] / one["sent"])
    for one in document["rtt"]:
        assert set(one) == {"load", "min_us", "avg_us", "max_us", "sent", "received"}
        assert 0 < one["min_us"] <= one["avg_us"] <= one["max_us"] < 5e6
        assert 0 < one["received"] <= one["sent"]


def test_the_table_names_all_of_it(document: dict[str, Any]) -> None:
    lines = list(_table(document))
    assert len(lines) == 1 + 4 + 2 + 3
    assert max(map(len, lines)) <= 100
    assert "127.0.0.1 to 127.0.0.1" in lines[0]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_drawn(document: dict[str, Any], tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"out.{suffix}"
    unanswered = {**document, "rtt": [{**document["rtt"][0], "min_us": None, "avg_us": None, "max_us": None}]}
    for one in (unanswered, document):
        draw(one, str(path))
    assert path.read_bytes()[:5] == {"svg": b"<?xml", "png": b"\x89PNG\r"}[suffix]


@pytest.mark.parametrize("path", ["out.pdf", "out", "/nonexistent/out.svg"])
def test_a_picture_that_cannot_be_is_refused_first(path: str) -> None:
    with pytest.raises(ValueError, match=r"^plot: "):
        check(path)


def test_counts_are_exact() -> None:
    """What the receivers count is what the senders sent, to the byte and to the datagram."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, \
            socket.create_connection(listener.getsockname()) as near, listener.accept()[0] as far:
        sent = b"x" * 1_234_567
        thread = threading.Thread(target=lambda: (near.sendall(sent), near.shutdown(socket.SHUT_WR)))
        thread.start()
        assert generator.receive_tcp(far, stop).bytes == len(sent)
        thread.join()
    token, over = b"12345678", threading.Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near:
        far.bind(("127.0.0.1", 0))
        near.connect(far.getsockname())
        near.send(b"another!" + bytes(992))
        near.send(token)
        found: list[generator.Arrived] = []
        thread = threading.Thread(target=lambda: found.append(generator.receive_udp(far, token, 1000, over, 5)))
        thread.start()
        count = generator.send_udp(near, token, 1000, 40e6, 0.3, stop)
        over.set()
        thread.join()
    assert found[0].packets == count
    assert found[0].bytes == 1000 * count
    assert count * 8000 == pytest.approx(40e6 * 0.3, rel=0.2), "the rate is kept"


# ------------------------------------------------------------------------------------- what the answering side does

@contextlib.contextmanager
def lines(port: int) -> Iterator[Lines]:
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        yield Lines(sock)


@contextlib.contextmanager
def session(port: int) -> Iterator[tuple[Lines, str]]:
    with lines(port) as control:
        control.send(bench=1)
        yield control, control.receive()["token"]


@pytest.mark.parametrize("first", [{"bench": 2}, {}, {"bench": 1, "token": "00" * 8, "way": "up", "seconds": 1}])
def test_strangers_get_an_error(first: dict[str, Any]) -> None:
    with serving() as port, lines(port) as one:
        one.send(**first)
        with pytest.raises(StateError, match="the other side says: "):
            one.receive()


@pytest.mark.parametrize("raw", [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"x" * 5000, b"[" * 4000 + b"\n"])
def test_other_protocols_get_an_error(raw: bytes) -> None:
    with serving() as port, lines(port) as one:
        one.sock.sendall(raw)
        with pytest.raises((StateError, ConnectionError)):
            one.receive()


@pytest.mark.parametrize("asked", [
    {"do": "nothing"}, {}, {"do": "udp"}, {"do": "udp", "way": "up", "seconds": 61, "size": 100, "rate": 1e6},
    {"do": "udp", "way": "up", "seconds": 1, "size": 10000, "rate": 1e6},
    {"do": "udp", "way": "down", "seconds": 1, "size": 100, "rate": 1e13},
    {"do": "udp", "way": "down", "seconds": float("nan"), "size": 100, "rate": 1e6},
    {"do": "udp", "way": "down", "seconds": "1", "size": 100, "rate": 1e6},
])
def test_bad_requests_end_the_session(asked: dict[str, Any]) -> None:
    with serving() as port:
        with session(port) as (control, _):
            control.send(**asked)
            with pytest.raises(StateError, match="the other side says: "):
                control.receive()
        wait_until(lambda: not left_threads())
        with session(port):
            pass


@pytest.mark.parametrize("asked", [{"way": "up", "seconds": 61}, {"way": "sideways", "seconds": 1}, {"way": "down"}])
def test_bad_streams_are_refused(asked: dict[str, Any]) -> None:
    with serving() as port, session(port) as (_, token), lines(port) as stream:
        stream.send(bench=1, token=token, **asked)
        with pytest.raises(StateError, match="the other side says: "):
            stream.receive()


def test_streams_are_bounded() -> None:
    with serving() as port, session(port) as (_, token), contextlib.ExitStack() as stack:
        for _ in range(wire.MOST_STREAMS):
            stream = stack.enter_context(lines(port))
            stream.send(bench=1, token=token, way="up", seconds=10)
        time.sleep(0.2)
        one = stack.enter_context(lines(port))
        one.send(bench=1, token=token, way="up", seconds=10)
        with pytest.raises(StateError, match="at most 16 streams"):
            one.receive()


def test_one_session_at_a_time() -> None:
    with serving() as port:
        with session(port), pytest.raises(StateError, match=r"it is measuring with 127\.0\.0\.1"):
            Measurement("127.0.0.1", port=port).__enter__()
        wait_until(lambda: not left_threads())
        with Measurement("127.0.0.1", port=port):
            pass


def test_only_inner_networks_are_answered() -> None:
    """The client comes from 127.0.0.2; a server whose network is 127.0.0.1/32 has nothing to say to it."""
    with serving("127.0.0.1/32") as port:
        with socket.create_connection(("127.0.0.1", port), 5, source_address=("127.0.0.2", 0)) as sock:
            assert sock.recv(1) == b""
        with session(port):
            pass


def test_udp_goes_only_to_the_client() -> None:
    """Somebody else's datagram, and one without the token, do not choose where the flood goes to."""
    with serving() as port, session(port) as (control, token):
        control.send(do="udp", way="down", size=100, rate=1e6, seconds=0.2)
        where = ("127.0.0.1", control.receive()["port"])
        with contextlib.ExitStack() as stack:
            other, mine = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
            wire.widen(mine)
            other.bind(("127.0.0.2", 0))
            other.sendto(bytes.fromhex(token), where)
            other.sendto(b"guess---", where)
            mine.sendto(bytes.fromhex(token), where)
            sent = control.receive()["sent"]
            assert sent > 50
            mine.settimeout(1)
            assert sum(mine.recv(200)[:8] == bytes.fromhex(token) for _ in range(sent)) == sent
            other.setblocking(False)
            with pytest.raises(BlockingIOError):
                other.recv(200)


def test_a_client_that_falls_silent_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PATIENCE_S", 0.2)
    monkeypatch.setattr(serve, "patient", lambda sock, seconds=0: wire.patient(sock, 0.2))
    with serving() as port, session(port) as (control, token), lines(port) as stream:
        stream.send(bench=1, token=token, way="up", seconds=10)
        wait_until(lambda: not left_threads(), 3)
        for one in (stream, control):
            with pytest.raises(StateError, match="took too long"):
                one.receive()


def test_the_server_ends_in_the_middle() -> None:
    port = free_port()
    server = Server("lo", [ip_interface("127.0.0.1/8")], port)
    server.open()
    threading.Thread(target=server.run).start()
    threading.Timer(1.5, server.close).start()
    with pytest.raises(StateError, match=r"127\.0\.0\.1: "), \
            Measurement("127.0.0.1", seconds=20, port=port) as measurement:
        measurement.run()
    wait_until(lambda: not left_threads())


# ------------------------------------------------------------------------------------------ what the asking side does

def answering(answer: Callable[[socket.socket], object]) -> Any:
    """A server of one connection, played by the test; its port."""
    @contextlib.contextmanager
    def play() -> Iterator[int]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def work() -> None:
                with contextlib.suppress(OSError), listener.accept()[0] as sock:
                    sock.recv(1000)
                    answer(sock)
            thread = threading.Thread(target=work)
            thread.start()
            yield int(listener.getsockname()[1])
            thread.join(5)
    return play()


@pytest.mark.parametrize(("raw", "problem"), [
    (b"SSH-2.0-x\r\n", "does not speak this"), (b'{"bench": 2, "token": ""}\n', "another version"),
    (b'{"bench": 1}\n', "does not speak this"), (b'{"bench": 1, "token": 5}\n', "does not speak this"),
    (b'{"bench": 1, "token": "zz"}\n', "does not speak this"), (b'{"error": "no"}\n', "the other side says: no"),
    (b"", "the other side has ended"), (b"x" * 9000, "does not speak this|broke"),
])
def test_a_wrong_peer_is_named(raw: bytes, problem: str) -> None:
    with answering(lambda sock: sock.sendall(raw)) as port, \
            pytest.raises(StateError, match=f"127.0.0.1: .*({problem})"):
        Measurement("127.0.0.1", port=port).__enter__()
    assert not left_threads()


def test_a_peer_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "patient", lambda sock, seconds=0: wire.patient(sock, 0.2))
    with answering(lambda sock: time.sleep(0.5)) as port, pytest.raises(StateError, match="fallen silent"):
        Measurement("127.0.0.1", port=port).__enter__()


def test_nobody_there_is_named() -> None:
    done = subprocess.run([*FASTTUN, "bench", "--peer", "127.0.0.1", "--port", str(free_port())], capture_output=True,
                          text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Connection refused; is `fasttun bench --serve` running there?" in done.stderr


@pytest.mark.parametrize(("words", "status", "error"), [
    (["--peer", "nowhere"], 2, "--peer: 'nowhere' is not an address"), (["--seconds", "0"], 2, "--seconds: "),
    (["--seconds", "61"], 2, "--seconds: "), (["--port", "0"], 2, "--port: "), (["--plot", "x.pdf"], 2, "--plot: "),
    (["tun7"], 1, "no tunnel "), (["--serve"], 1, "no tunnel is running"),
    (["--serve", "--json"], 2, "--json: is not for --serve"),
])
def test_bad_use_is_named(words: list[str], status: int, error: str, tmp_path: Path) -> None:
    done = subprocess.run([*FASTTUN, "bench", *words], capture_output=True, text=True, timeout=20,
                          env={**os.environ, "FASTTUN_RUNTIME_DIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"fasttun: {error}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_both_sides_work(number: signal.Signals) -> None:
    with serving() as port:
        process = subprocess.Popen([*FASTTUN, "bench", "--peer", "127.0.0.1", "--port", str(port), "--seconds", "30"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(left_threads()) > 1, 10)
        time.sleep(1.5)  # in the middle of the first stream
        process.send_signal(number)
        out, _ = process.communicate(timeout=5)
        assert process.returncode == 130
        assert out == ""
        wait_until(lambda: not left_threads(), 3)
        with session(port):
            pass


# --------------------------------------------------------------------------------------------- whom to measure with

def tunnel(addresses: list[str], *peers: list[str]) -> dict[str, Any]:
    return {"name": "tun0", "device": {"addresses": addresses}, "peers": [{"addresses": peer} for peer in peers]}


@pytest.mark.parametrize(("now", "expected"), [
    (tunnel(["10.7.0.1/24"], ["10.7.0.2"]), ["10.7.0.2"]),
    (tunnel(["10.7.0.1/24", "fd07::1/64"], ["fd07::2/128", "10.7.0.2/32"]), ["10.7.0.2"]),
    (tunnel(["10.7.0.1/24"], ["10.7.0.2/32"], ["10.7.0.3/32"]), ["10.7.0.2", "10.7.0.3"]),
    (tunnel(["10.7.0.2/24"], ["10.7.0.0/24"]), ["10.7.0.1"]), (tunnel(["10.7.0.2/24"], ["0.0.0.0/0"]), ["10.7.0.1"]),
    (tunnel(["10.7.0.2/24"], []), ["10.7.0.1"]), (tunnel(["10.7.0.1/24"]), []),
    (tunnel(["10.7.0.2/32"], ["192.168.0.0/16"]), []),
    (tunnel(["fe80::1/64", "10.7.0.2/24"], ["fe80::2"]), ["10.7.0.1"]),
])
def test_the_peers_address_is_found(now: dict[str, Any], expected: list[str]) -> None:
    assert _candidates(now) == expected
