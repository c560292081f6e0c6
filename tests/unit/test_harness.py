"""The test support itself: a proxy that is too kind, or a skip that hides, would make other tests worthless."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.netns import wait_until
from support.udp_proxy import Faults, UdpProxy

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


def drain(sock: socket.socket) -> list[bytes]:
    sock.settimeout(0.2)
    got = []
    while True:
        try:
            got.append(sock.recv(65535))
        except TimeoutError:
            return got


def test_proxy_passes_both_ways(server: socket.socket, client: socket.socket) -> None:
    with UdpProxy(server.getsockname()) as proxy:
        client.sendto(b"ping", proxy.address)
        data, source = server.recvfrom(100)
        server.sendto(b"pong", source)
        assert data == b"ping"
        assert client.recvfrom(100) == (b"pong", proxy.address)
        assert {source[1]} == proxy.source_ports


def send_through(faults: Faults, server: socket.socket, client: socket.socket, seed: int) -> list[bytes]:
    with UdpProxy(server.getsockname(), seed=seed, to_server=faults) as proxy:
        for number in range(200):
            client.sendto(number.to_bytes(2, "big") * 8, proxy.address)
            if number % 20 == 19:
                wait_until(lambda so_far=number + 1: proxy.counts["to_server received"] == so_far)
        return drain(server)


def test_proxy_loses_the_same_again_with_the_same_seed(server: socket.socket, client: socket.socket) -> None:
    first = send_through(Faults(lose=0.3), server, client, seed=1)
    assert first == send_through(Faults(lose=0.3), server, client, seed=1)
    assert first != send_through(Faults(lose=0.3), server, client, seed=2)
    assert 100 < len(first) < 180


@pytest.mark.parametrize(
    ("faults", "holds"),
    [
        (Faults(duplicate=0.3), lambda got, sent: len(got) > 230 and set(got) == set(sent)),
        (Faults(reorder=0.3), lambda got, sent: got != sent and sorted(got) == sorted(sent)),
        (Faults(truncate=0.5), lambda got, sent: len(got) == 200 and 50 < sum(len(g) < 16 for g in got) < 150),
        (Faults(corrupt=1.0), lambda got, sent: len(got) == 200 and all(g not in sent for g in got[::7])),
        (Faults(inject=0.5), lambda got, sent: len(got) > 250 and set(sent) < set(got)),
        (Faults(delay_ms=(1, 30)), lambda got, sent: got != sent and sorted(got) == sorted(sent)),
        (Faults(), lambda got, sent: got == sent),
    ],
    ids=["duplicate", "reorder", "truncate", "corrupt", "inject", "delay", "none"],
)
def test_proxy_faults(faults: Faults, holds: object, server: socket.socket, client: socket.socket) -> None:
    sent = [number.to_bytes(2, "big") * 8 for number in range(200)]
    got = send_through(faults, server, client, seed=3)
    assert holds(got, sent), (len(got), got[:20])  # type: ignore[operator]


def test_proxy_rebinds_and_injects(server: socket.socket, client: socket.socket) -> None:
    with UdpProxy(server.getsockname()) as proxy:
        client.sendto(b"one", proxy.address)
        before = server.recvfrom(100)[1]
        proxy.rebind()
        client.sendto(b"two", proxy.address)
        data, after = server.recvfrom(100)
        assert data == b"two"
        assert after != before
        server.sendto(b"back", after)
        assert client.recv(100) == b"back"
        proxy.inject(b"known")
        assert server.recvfrom(100) == (b"known", after)
        proxy.inject(b"stray", stray=True)
        data, stray = server.recvfrom(100)
        assert data == b"stray"
        assert stray not in (before, after)
        proxy.inject(b"down", direction="to_client")
        assert client.recvfrom(100) == (b"down", proxy.address)


def test_proxy_ends_by_itself(server: socket.socket) -> None:
    with UdpProxy(server.getsockname(), lifetime_s=0.2) as proxy:
        wait_until(lambda: not proxy._thread.is_alive(), timeout=3)


@pytest.mark.parametrize(
    ("strict", "status", "word"), [("1", 1, "1 failed, 1 xfailed, 3 errors"), ("0", 0, "4 skipped, 1 xfailed")]
)
def test_a_skip_fails_a_run_that_forbids_skips(tmp_path: Path, strict: str, status: int, word: str) -> None:
    (tmp_path / "test_skips.py").write_text(
        textwrap.dedent(
            """
            import pytest

            def test_inside():
                pytest.skip("inside")

            @pytest.mark.skip(reason="marked")
            def test_marked():
                pass

            @pytest.mark.skipif(True, reason="conditional")
            def test_conditional():
                pass

            @pytest.fixture
            def resource():
                pytest.skip("fixture")

            def test_fixture(resource):
                pass

            @pytest.mark.xfail(reason="known")
            def test_known():
                raise ValueError
            """
        )
    )
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--rootdir", tmp_path, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTTUN_NO_SKIP": strict, "PYTHONPATH": str(CONFTEST.parent), "PYTEST_ADDOPTS": ""},
        timeout=60,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert word in done.stdout


def test_a_skipped_module_fails_it_too(tmp_path: Path) -> None:
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module_here')\n")
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--rootdir", tmp_path, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTTUN_NO_SKIP": "1", "PYTHONPATH": str(CONFTEST.parent), "PYTEST_ADDOPTS": ""},
        timeout=60,
    )
    assert done.returncode not in (0, 5), done.stdout
    assert "a skip is a failure" in done.stdout
