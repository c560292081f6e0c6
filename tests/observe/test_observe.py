"""Running tunnels seen from outside: the control socket, status, top, metrics and the page, on real tunnels."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.netns import Lab, Namespace, wait_until
from support.tunnels import Pipe, bind_udp

from fasttun import Config, Forwarder, WireGuard
from fasttun.observe import Observers
from fasttun.observe.client import running
from fasttun.observe.metrics import exposition
from fasttun.observe.snapshot import snapshot
from fasttun.observe.web import CLIENTS
from fasttun.wireguard.config import PeerConfig
from fasttun.wireguard.keys import PresharedKey, PrivateKey

ROOT = Path(__file__).resolve().parents[2]
FASTTUN = (sys.executable, "-m", "fasttun")


def fasttun(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FASTTUN, *words], capture_output=True, text=True, timeout=20, check=False, **options)


@pytest.fixture
def tunnel() -> Iterator[Forwarder]:
    """A listener on a socketpair, in this process."""
    with Pipe.make() as pipe, bind_udp() as sock, \
            Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=pipe.fd) as tunnel:
        yield tunnel


# ------------------------------------------------------------------------------- documents, socket

def described() -> set[str]:
    """The fields that docs/status-schema.md names."""
    return set(re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "status-schema.md").read_text(), re.MULTILINE))


def paths(value: Any, prefix: str = "") -> set[str]:
    if isinstance(value, dict) and prefix.rpartition(".")[2] not in (
            "drops", "system_calls", "errors", "offloads", "control_drops"):
        return {path for key, one in value.items() for path in paths(one, f"{prefix}.{key}".lstrip("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {path for one in value for path in paths(one, f"{prefix}[]")}
    return {prefix}


def test_every_field_is_described(tunnel: Forwarder) -> None:
    key, psk = PrivateKey.generate(), PresharedKey.generate()
    config = Config(private_key=key, peers=(PeerConfig(PrivateKey.generate().public, psk),))
    with Pipe.make() as pipe, WireGuard(config, tun_fd=pipe.fd) as wireguard:
        documents = [snapshot(tunnel), snapshot(wireguard)]
    for document in documents:
        assert document["schema"] == 1
        assert paths(json.loads(json.dumps(document))) <= described()
        for secret in (key.to_base64(), psk.to_base64()):
            assert secret not in json.dumps(document)
    assert [document["mode"] for document in documents] == ["plain", "wireguard"]
    assert documents[1]["peers"][0]["preshared_key"] is True
    assert documents[1]["aead"]
    assert len(documents[0]["workers"]) == 1


def test_the_socket_is_private_and_goes(tunnel: Forwarder, runtime: Path) -> None:
    with Observers(tunnel):
        (one,) = running()
        assert one.pid == os.getpid()
        assert stat.S_IMODE(one.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
        assert one.ask()["local_port"] == tunnel.local_port
    assert list(runtime.iterdir()) == []
    assert running() == []


@pytest.mark.parametrize("request_", [b"\n", b"[]\n", b"{}\n", b"snapshot\n", b'{"request": "none"}\n',
                                      b'{"request": []}\n', b"x" * 5000, b"[" * 4000 + b"\n", b""])
def test_bad_requests_get_an_error(tunnel: Forwarder, request_: bytes) -> None:
    with Observers(tunnel):
        (one,) = running()
        with one.connect() as sock:
            sock.sendall(request_)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while part := sock.recv(65536):
                answer += part
        assert "error" in json.loads(answer)
        assert one.ask()["schema"] == 1


def test_silent_clients_do_not_keep_others_out(tunnel: Forwarder) -> None:
    with Observers(tunnel):
        (one,) = running()
        silent = [one.connect() for _ in range(15)]
        assert one.ask()["schema"] == 1
        for sock in silent:
            sock.close()


def test_a_stale_socket_is_removed(runtime: Path) -> None:
    runtime.mkdir()
    path = runtime / "tun9.999999.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    assert running() == []
    assert not path.exists()


def test_nothing_running_says_so() -> None:
    for words in (("status",), ("status", "--json"), ("status", "tun9"), ("top",)):
        done = fasttun(*words)
        assert done.returncode == 1
        assert re.search("no tunnel.* running", done.stderr)


# ---------------------------------------------------------------------------------------- metrics

def test_metrics_are_what_prometheus_reads(tunnel: Forwarder) -> None:
    _, text = exposition(tunnel)
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    assert {"fasttun_info", "fasttun_packets", "fasttun_bytes", "fasttun_offload_enabled"} <= set(families)
    drops = {(sample.labels["direction"], sample.labels["reason"]) for sample in families["fasttun_drops"].samples
             if sample.name == "fasttun_drops_total"}
    assert ("inbound", "stranger") in drops
    assert ("outbound", "no_peer") in drops


def test_the_dashboard_asks_for_what_there_is() -> None:
    config = Config(private_key=PrivateKey.generate(), peers=(PeerConfig(PrivateKey.generate().public),))
    with Pipe.make() as pipe, WireGuard(config, tun_fd=pipe.fd) as wireguard:
        member = wireguard._host._members[config.peers[0].public_key]  # type: ignore[union-attr]
        member.peer.last_handshake_wall = time.time()
        member.round_trip_s = 0.01
        member.losses.loss = lambda *_: 0.0  # type: ignore[method-assign]
        _, text = exposition(wireguard)
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
        if not family.samples:  # counters that have counted nothing yet
            samples.setdefault(f"{family.name}_total", set()).update({"call", "errno", "reason"})
    dashboard = json.loads((ROOT / "contrib" / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) >= 8
    for expression in expressions:
        names = re.findall(r"fasttun_\w+", expression)
        assert names
        for name in names:
            assert name in samples, expression
        labels = {label for group in re.findall(r"by \(([^)]*)\)|\{([^}]*)\}", expression)
                  for part in group for label in re.findall(r"[a-z_]+(?==|,|$| )", part)}
        assert labels - {"instance", "job"} <= set().union(*(samples[name] for name in names)), expression


def test_the_page_is_whole(tunnel: Forwarder) -> None:
    observers = Observers(tunnel, metrics="127.0.0.1:0")
    with observers:
        assert observers._web is not None
        base = f"http://{observers._web.address}"
        with urllib.request.urlopen(f"{base}/", timeout=5) as answer:
            page = answer.read().decode()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert not re.search(r"(src|href)\s*=|https?://", page), "the page must not load anything"
        document = json.load(urllib.request.urlopen(f"{base}/status.json", timeout=5))
        assert document["mode"] == "plain"
        for field in set(re.findall(r"(?:now|peer)\.(\w+)", page)) - {"time"}:
            assert field in described_names(), field
        assert b"fasttun_uptime_seconds" in urllib.request.urlopen(f"{base}/metrics", timeout=5).read()
        for path in ("/../page.html", "/etc/passwd", "/metrics/x"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(base + path, timeout=5)
            assert refused.value.code == 404
            refused.value.close()


@pytest.mark.parametrize(("host", "status"), [
    ("localhost:9586", 200), ("127.0.0.1", 200), ("[::1]:9586", 200), (None, 200),
    ("evil.example", 421), ("evil.example:9586", 421), ("127.0.0.1.evil.example", 421), ("[", 421), ("", 421)])
def test_the_page_answers_to_no_foreign_name(tunnel: Forwarder, host: str | None, status: int) -> None:
    """DNS rebinding: a page of the web that makes its own name point to 127.0.0.1."""
    with Observers(tunnel, metrics="127.0.0.1:0") as observers:
        assert observers._web is not None
        for path in ("/status.json", "/metrics", "/"):
            assert f" {status} " in _http(observers._web.address, path, host)


def test_the_page_takes_so_many_clients_and_no_more(tunnel: Forwarder) -> None:
    with Observers(tunnel, metrics="127.0.0.1:0") as observers, contextlib.ExitStack() as stack:
        assert observers._web is not None
        host, _, port = observers._web.address.rpartition(":")
        before = threading.active_count()
        for _ in range(40):
            stack.enter_context(socket.create_connection((host, int(port)), 5))
        wait_until(lambda: threading.active_count() == before + CLIENTS)
        assert _http(observers._web.address, "/", None) == ""
        stack.close()
        wait_until(lambda: " 200 " in _http(observers._web.address, "/", None))


def _http(address: str, path: str, host_header: str | None) -> str:
    """The first line of the answer."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as sock, contextlib.suppress(ConnectionError):
        named = f"Host: {host_header}\r\n" if host_header is not None else ""
        sock.sendall(f"GET {path} HTTP/1.0\r\n{named}\r\n".encode())
        return sock.makefile("rb").readline().decode()
    return ""


def described_names() -> set[str]:
    return {part for path in described() for part in re.findall(r"\w+", path)}


@pytest.mark.parametrize("address", ["9586", "localhost:9586", "127.0.0.1:x", "127.0.0.1:70000", ":9586"])
def test_a_bad_address_is_named(address: str) -> None:
    done = fasttun("--listen", "--address", "10.7.0.1/24", "--metrics", address)
    assert done.returncode == 2
    assert done.stderr.startswith("fasttun: --metrics: ")


# ------------------------------------------------------------------------------------ real tunnels

@dataclass
class Pair:
    a: Namespace
    b: Namespace
    processes: list[Any]


@pytest.fixture
def pair(lab: Lab, runtime: Path) -> Iterator[Pair]:
    a, b, link = lab.pair()
    keys = [subprocess.run([*FASTTUN, "genkey"], capture_output=True, text=True, check=True).stdout for _ in "ab"]
    files = []
    for name, key in zip("ab", keys, strict=True):
        files.append(runtime.parent / f"{name}.key")
        files[-1].touch(0o600)
        files[-1].write_text(key)
    public = [str(PrivateKey.from_base64(key).public) for key in keys]
    processes = [
        a.popen([*FASTTUN, "--listen", "--address", "10.7.0.1/24", "--device", "enc0", "--key", str(files[0]),
                 "--peer", public[1], "--metrics", "127.0.0.1:9586"]),
        b.popen([*FASTTUN, "--server", link.a.v4, "--address", "10.7.0.2/24", "--device", "enc1", "--key",
                 str(files[1]), "--peer", public[0]]),
    ]
    wait_until(lambda: b.run(["ping", "-c1", "-W1", "10.7.0.1"], check=False).returncode == 0, 15, what="the tunnel")
    yield Pair(a, b, processes)
    for process in processes:
        process.terminate()
        process.wait(10)


@pytest.mark.netns
def test_status_of_real_tunnels(pair: Pair) -> None:
    documents = [json.loads(line) for line in fasttun("status", "--json").stdout.splitlines()]
    assert [document["name"] for document in documents] == ["enc0", "enc1"]
    server, client = documents
    assert server["peers"][0]["rx_packets"] > 0
    assert time.time() - client["peers"][0]["last_handshake"] < 30
    assert "10.7.0.2/24" in client["device"]["addresses"]
    text = fasttun("status", "enc0").stdout
    assert re.search(r"^enc0 +WireGuard", text)
    assert "10.7.0.1/24, MTU" in text
    assert re.search(r"last|handshake", text)
    watching = subprocess.Popen([*FASTTUN, "status", "enc0", "--watch", "0.2"], stdout=subprocess.PIPE, text=True)
    pair.b.run(["ping", "-c5", "-i0.1", "10.7.0.1"])
    time.sleep(0.5)
    watching.terminate()
    assert re.search(r"[1-9]\d* packets/s", watching.communicate(timeout=10)[0])


@pytest.mark.netns
def test_metrics_and_page_of_a_real_tunnel(pair: Pair) -> None:
    with pair.a.enter():
        text = urllib.request.urlopen("http://127.0.0.1:9586/metrics", timeout=5).read().decode()
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
             for family in text_string_to_metric_families(text) for sample in family.samples}
    assert found["fasttun_packets_total", (("direction", "inbound"),)] > 0
    ages = [value for (name, _), value in found.items() if name == "fasttun_peer_handshake_age_seconds"]
    assert len(ages) == 1
    assert 0 <= ages[0] < 30


def screen(words: list[str], seconds: float, *, columns: int = 80, lines: int = 24, env: dict[str, str] | None = None,
           keys: bytes = b"") -> list[str]:
    """What stands on a terminal of that size after so long; the program has to end by `q`."""
    pyte = pytest.importorskip("pyte")
    shown = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(shown)
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm-256color", **(env or {})})
        os.execvp(words[0], words)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    end, last = time.monotonic() + seconds, [""] * lines
    sent = False
    while True:
        if time.monotonic() > end and not sent:
            last, sent = list(shown.display), True
            os.write(master, keys + b"q")
            end += 5
        if time.monotonic() > end:
            os.kill(pid, 9)
            break
        if select.select([master], [], [], 0.05)[0]:
            try:
                stream.feed(os.read(master, 65536))
            except OSError:
                break
    _, status = os.waitpid(pid, 0)
    os.close(master)
    assert os.waitstatus_to_exitcode(status) == 0
    return last


@pytest.mark.netns
@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}, {"TERM": "vt100"}])
def test_top_fits_a_small_terminal(pair: Pair, env: dict[str, str]) -> None:
    stop = threading.Event()

    def traffic() -> None:
        while not stop.is_set():
            pair.b.run(["ping", "-c10", "-i0.02", "-s1200", "10.7.0.1"], check=False)

    running_ = threading.Thread(target=traffic)
    running_.start()
    try:
        lines = screen([*FASTTUN, "top", "enc0", "--interval", "0.2"], 3.0, env=env, keys=b"s")
    finally:
        stop.set()
        running_.join()
    text = "\n".join(lines)
    assert lines[0].startswith("enc0  WireGuard  MTU")
    assert re.search(r"inbound +[\d.]+ [kM]?bit/s +[1-9]\d* packets/s", text)
    assert "█" in text
    assert "10.7.0.2" in text or "0.0.0.0/0" in text
    assert "q quit" in text
