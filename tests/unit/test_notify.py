"""sd_notify over real unix sockets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from fasttun import notify


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch) -> Iterator[socket.socket]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@fasttun-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield sock


def test_ready_and_stopping(manager):
    assert notify.ready("tun0 is up")
    assert manager.recv(4096) == b"READY=1\nSTATUS=tun0 is up"
    assert notify.ready()
    assert manager.recv(4096) == b"READY=1"
    assert notify.stopping()
    assert manager.recv(4096) == b"STOPPING=1"


def test_reloading_has_the_monotonic_time(manager):
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notify.reloading()
    first, second = manager.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    name, value = second.split("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_stays_one_assignment(manager):
    assert notify.status("evil\nMAINPID=1")
    assert manager.recv(4096) == b"STATUS=evil MAINPID=1"


def test_without_a_manager_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.ready()


@pytest.mark.parametrize(
    "address", ["", "relative", "vsock:2:1234", "/nonexistent/notify", "@fasttun-nobody", "/" + "x" * 200]
)
def test_a_manager_that_is_gone_is_no_error(address, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify.ready()
