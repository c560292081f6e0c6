"""What people see of running tunnels: who may ask, what has ended, `status` and `top` on terminals.

Not for: the documents and the socket (test_observe.py), the page (test_page.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import shutil
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console
from support.netns import Lab, wait_until
from support.tunnels import Pipe, bind_udp, ip_packet

from fasttun import Config, Forwarder, WireGuard
from fasttun.cli.status import _documents
from fasttun.cli.top import View, view
from fasttun.errors import StateError
from fasttun.observe import Observers, client
from fasttun.observe.client import Running, choose, known
from fasttun.observe.snapshot import snapshot
from fasttun.wireguard.config import PeerConfig
from fasttun.wireguard.keys import PrivateKey

NOBODY = 65534


@pytest.fixture
def tunnel() -> Iterator[Forwarder]:
    with Pipe.make() as pipe, bind_udp() as sock, \
            Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=pipe.fd) as tunnel:
        yield tunnel


@pytest.fixture
def observed(tunnel: Forwarder) -> Iterator[Observers]:
    with Observers(tunnel) as observers:
        yield observers


# ------------------------------------------------------------------------------------- who may ask

@contextlib.contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@dataclass
class Places:
    roots: Path
    own: Path


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """Root's runtime directory and another user's, below one that all may enter."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    monkeypatch.delenv("FASTTUN_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "own"))
    monkeypatch.setattr(client, "ROOTS", base / "roots")
    yield Places(base / "roots", base / "own" / "fasttun")
    shutil.rmtree(base)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen()
        yield


@pytest.mark.netns
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_who_may_not_ask_is_told(places: Places, mode: int) -> None:
    """The directory is shut, or the socket in it is: neither is the same as no tunnel."""
    places.roots.mkdir()
    path = places.roots / "tun0.1.sock"
    with listening(path):
        places.roots.chmod(mode)
        with another_user(), pytest.raises(StateError, match="ask as the user that runs") as told:
            known()
        assert str(path if mode == 0o755 else places.roots) in str(told.value)
        with another_user(), pytest.raises(StateError, match="ask as the user that runs"):
            choose("tun0")


@pytest.mark.netns
def test_own_tunnels_are_found_beside_those_of_root(places: Places) -> None:
    places.roots.mkdir(0o700)
    places.own.mkdir(parents=True)
    path = places.own / "tun1.2.sock"
    with listening(path):
        path.chmod(0o666)
        with another_user():
            assert [one.name for one in known()] == ["tun1"]


@pytest.mark.netns
def test_without_a_runtime_directory_nothing_runs(places: Places) -> None:
    with another_user(), pytest.raises(StateError, match=r"^no tunnel is running$"):
        known()


@pytest.mark.netns
def test_what_is_bound_is_bound_before_the_rights_go(lab: Lab, runtime: Path) -> None:
    """A control socket in root's directory and a port below 1024, of a process that becomes nobody."""
    host = lab.namespace()
    process = host.popen([sys.executable, "-m", "fasttun", "--listen", "--address", "10.7.0.1/24", "--user", "nobody",
                          "--metrics", "127.0.0.1:80"])
    wait_until(lambda: [one.name for one in client.running()] == ["tun0"], 15)
    (one,) = client.running()
    assert one.pid == process.pid
    assert one.ask()["running"]
    assert f"Uid:\t{NOBODY}" in Path(f"/proc/{process.pid}/status").read_text()
    with host.enter(), urllib.request.urlopen("http://127.0.0.1:80/metrics", timeout=5) as answer:
        assert b"fasttun_uptime_seconds" in answer.read()
    process.terminate()
    assert process.wait(10) == 0
    assert client.running() == []
    assert list(runtime.iterdir()) == []


# ----------------------------------------------------------------------------------- what has ended

@pytest.fixture
def strange(runtime: Path) -> Iterator[Callable[[bytes | None], Running]]:
    """Makes a control socket that answers with these bytes, or never."""
    runtime.mkdir()
    with contextlib.ExitStack() as stack:
        def make(answer: bytes | None) -> Running:
            path = runtime / "odd.1.sock"
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()

            def serve() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        held.append(connection)
                        if answer is not None:
                            connection.recv(100)
                            connection.sendall(answer)
                            connection.close()

            held: list[socket.socket] = []
            thread = threading.Thread(target=serve)
            thread.start()

            def end() -> None:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()
                for connection in held:
                    connection.close()

            stack.callback(end)
            return Running("odd", 1, path)

        yield make


@pytest.mark.parametrize("answer", [b"", b'{"schema": 1, "pi', b"\n", b"\xff\xfe\n"])
def test_half_an_answer_is_an_end(strange: Callable[[bytes | None], Running], answer: bytes) -> None:
    with pytest.raises(StateError, match=r"^odd has ended$"):
        strange(answer).ask()


def test_a_tunnel_that_is_gone_has_ended(runtime: Path) -> None:
    with pytest.raises(StateError, match=r"^tun9 has ended$"):
        Running("tun9", 1, runtime / "tun9.1.sock").ask()


def test_an_endless_answer_is_cut(
    strange: Callable[[bytes | None], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONGEST_ANSWER", 1000)
    with pytest.raises(StateError):
        strange(b'{"schema": 1, "x": "' + b"x" * 2000 + b'"}\n').ask()


def test_one_that_hangs_does_not_hide_the_others(
    observed: Observers, strange_beside: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    (document,) = _documents(None)
    assert document["pid"] == os.getpid()
    assert "odd (process 1) does not answer" in capsys.readouterr().err


@pytest.fixture
def strange_beside(observed: Observers, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(client, "PATIENCE_S", 0.3)
    path = runtime / "odd.1.sock"
    with listening(path):
        yield Running("odd", 1, path)


# --------------------------------------------------------------------------------------- terminals

@dataclass
class Terminal:
    """A program on a terminal of a size; `keys` are pressed one after the other, each after a time."""

    words: list[str]
    env: dict[str, str] = field(default_factory=dict)
    columns: int = 80
    lines: int = 24
    raw: bytes = b""
    status: int | None = None

    def __post_init__(self) -> None:
        self.screen = pyte.Screen(self.columns, self.lines)
        self._stream = pyte.ByteStream(self.screen)
        size = struct.pack("HHHH", self.lines, self.columns, 0, 0)
        self._pid, self._master = pty.fork()
        if self._pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            # Given, not inherited: readline, which pytest loads, sets COLUMNS where os.environ does not see it.
            ours = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
            env = {key: value for key, value in os.environ.items() if key not in ours}
            os.execve(sys.executable, [sys.executable, "-m", "fasttun", *self.words],
                      {**env, "TERM": "xterm-256color", **self.env})

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def look(self, seconds: float = 0.05) -> None:
        if self.status is None and select.select([self._master], [], [], seconds)[0]:
            try:
                part = os.read(self._master, 65536)
            except OSError:
                self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                return
            self.raw += part
            self._stream.feed(part)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def wait(self, pattern: str) -> None:
        """Until the screen shows it."""
        end = time.monotonic() + 15
        while not re.search(pattern, self.text, re.MULTILINE):
            assert time.monotonic() < end, self.text
            self.look()

    def end(self) -> int:
        """Until the program has ended: its exit status."""
        end = time.monotonic() + 15
        while self.status is None:
            assert time.monotonic() < end, self.text
            self.look()
        return self.status

    def close(self) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)
        os.close(self._master)


@pytest.fixture
def busy() -> Iterator[Observers]:
    """A listener with two peers, of which the first sends more, and with datagrams that are no packets."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        pipe, sock = stack.enter_context(Pipe.make()), stack.enter_context(bind_udp())
        peers = [stack.enter_context(bind_udp()) for _ in range(2)]
        tunnel = stack.enter_context(Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=pipe.fd))

        def traffic() -> None:
            while not stop.wait(0.01):
                for number, peer in enumerate(peers):
                    packet = ip_packet(f"10.7.0.{number + 2}", "10.7.0.1", b"x" * (800 if number == 0 else 100))
                    peer.sendto(packet, sock.getsockname())
                peers[0].sendto(b"junk", sock.getsockname())
                with contextlib.suppress(OSError):
                    pipe.receive(0.2)
                    pipe.receive(0.2)

        thread = threading.Thread(target=traffic)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        wait_until(lambda: len(tunnel.peers) == 2)
        yield stack.enter_context(Observers(tunnel))


def test_top_chooses_a_peer_by_the_arrows(busy: Observers) -> None:
    with contextlib.closing(Terminal(["top", "--interval", "0.2"])) as terminal:
        terminal.wait(r"inbound +[\d.]+ kbit/s +[\d,]+ packets/s")
        terminal.wait(r"dropped  inbound malformed [\d,]+ \([\d,]+/s\)")
        assert "> " not in terminal.text
        terminal.press(b"\x1b[B")
        terminal.wait(r"^> 127\.0\.0\.1:\d+ +10\.7\.0\.2 ")
        terminal.wait(r"^127\.0\.0\.1:\d+  [\d.]+ kbit/s, both ways")
        terminal.press(b"\x1b[B\x1b[B")
        terminal.wait(r"^> 127\.0\.0\.1:\d+ +10\.7\.0\.3 ")
        terminal.press(b"\x1b[A\x1b[A")
        terminal.wait(r"^127\.0\.0\.1:\d+ +10\.7\.0\.2 ")
        assert "both ways" not in terminal.text
        terminal.press(b"p")
        terminal.wait("paused")
        terminal.press(b"q")
        assert terminal.end() == 0


def test_top_ends_with_its_tunnel_and_leaves_the_terminal_whole(busy: Observers) -> None:
    with contextlib.closing(Terminal(["top", "--interval", "0.2"])) as terminal:
        terminal.wait("packets/s")
        busy.close()
        assert terminal.end() == 1
        assert terminal.raw.rstrip().endswith(b"fasttun: descriptor has ended")
        assert terminal.raw.rindex(b"\x1b[?1049l") > terminal.raw.rindex(b"\x1b[?1049h")
        assert terminal.raw.rindex(b"\x1b[?25h") > terminal.raw.rindex(b"\x1b[?25l")


def test_keys_take_no_looks_of_their_own(busy: Observers, tunnel: Forwarder) -> None:
    """Else the graphs would run faster while somebody types."""
    looks = []

    def counted(_: socket.socket, __: dict[str, Any]) -> dict[str, Any]:
        looks.append(time.monotonic())
        return snapshot(tunnel)

    busy._control.register("snapshot", counted)
    with contextlib.closing(Terminal(["top", "--interval", "30"])) as terminal:
        terminal.wait(r"s sort \(received\)")
        for name in ("sent", "name", "received"):
            terminal.press(b"s")
            terminal.wait(rf"s sort \({name}\)")
        terminal.press(b"q")
        assert terminal.end() == 0
    assert len(looks) == 1


def test_top_without_colour_has_none(busy: Observers) -> None:
    with contextlib.closing(Terminal(["top", "--interval", "0.2"], {"NO_COLOR": "1"})) as terminal:
        terminal.wait("█")
        terminal.press(b"q")
        terminal.end()
    colours = [code for codes in re.findall(rb"\x1b\[([\d;]*)m", terminal.raw) for code in codes.split(b";")]
    assert {int(code or 0) for code in colours} <= {0, 1, 2}


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "dumb", "PYTHONIOENCODING": "ascii"}])
def test_top_on_a_dumb_terminal_moves_no_cursor(busy: Observers, env: dict[str, str]) -> None:
    with contextlib.closing(Terminal(["top", "--interval", "0.2", "--count", "4"], env)) as terminal:
        assert terminal.end() == 0
    assert b"\x1b[" not in terminal.raw.replace(b"\x1b[?25h", b"")
    assert terminal.raw.count(b"q quit") == 4
    if "PYTHONIOENCODING" in env:
        assert terminal.raw.isascii()


def document(at: float, peers: int, load: int) -> dict[str, Any]:
    """A plain tunnel at a time, whose peer number N has received N * load bytes a second."""
    direction = {"packets_in": int(at), "bytes_in": 0, "packets_out": int(at * load), "bytes_out": int(at * load)}
    return {
        "time": at, "mode": "plain", "name": "tun0", "uptime_s": at, "device": {"mtu": 1472},
        "workers": [{"cpu_s": at / 4}], "outbound": {**direction, "drops": {"no_peer": 2, "stranger": 0}},
        "inbound": {**direction, "drops": {"malformed": int(50 * at)}},
        "peers": [{"id": f"192.0.2.1:{number}", "endpoint": f"192.0.2.1:{number}", "addresses": [f"10.7.0.{number}"],
                   "silent_s": 0.0, "rx_bytes": int(number * load * at), "tx_bytes": 0}
                  for number in range(1, peers + 1)],
    }


def shown(history: list[dict[str, Any]], seen: View, columns: int = 80, lines: int = 24) -> list[str]:
    """What `top` draws, line by line."""
    console = Console(file=io.StringIO(), width=columns, height=lines, force_terminal=False)
    console.print(view(history, console, seen))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


@pytest.mark.parametrize("chosen", [None, "192.0.2.1:1", "192.0.2.1:100"])
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 50), (60, 20)])
def test_top_never_outgrows_the_terminal(chosen: str | None, columns: int, lines: int) -> None:
    rows = shown([document(float(at), 100, 1000) for at in range(1, 200)], View(peer=chosen), columns, lines)
    assert len(rows) <= lines
    assert max(map(len, rows)) <= columns
    if chosen is not None:
        assert sum(row.startswith("> ") and chosen in row.replace("…", "") for row in rows) == 1


def test_top_shows_round_trip_and_loss_where_there_is_room() -> None:
    history = [document(1.0, 3, 1000), document(2.0, 3, 1000)]
    history[-1]["peers"][0].update(round_trip_s=0.0123, loss=0.025)
    rows = shown(history, View())
    assert any(re.search(r"192\.0\.2\.1:1 .* 12\.3 ms +2\.5 % ", row) for row in rows)
    assert any(re.search(r"192\.0\.2\.1:2 .* - +- ", row) for row in rows)
    assert not any("ms" in row for row in shown(history, View(), 60))


def test_the_processor_time_is_of_two_seconds() -> None:
    """One hundredth of a second, as the kernel counts, is 10 % of a look of 0.1 s."""
    history = [document(at / 10, 1, 1000) for at in range(100, 150)]
    for one in history:
        one["workers"] = [{"cpu_s": one["time"] // 1 / 100}]
    assert " workers 1%" in shown(history[:41], View())[0]
    assert " workers -" in shown(history[:1], View())[0]


def test_the_figures_of_top_are_right() -> None:
    rows = shown([document(10.0, 3, 1000), document(12.0, 3, 1000)], View(peer="192.0.2.1:2"))
    assert rows[0].startswith("tun0  plain  MTU 1472  up 12 s  workers 25%")
    assert re.match(r"inbound   8\.00 kbit/s      1,000 packets/s", rows[1])
    assert "dropped  inbound malformed 600 (50/s), outbound no_peer 2" in rows
    order = [match[1] for row in rows if (match := re.match(r"[> ] 192\.0\.2\.1:(\d) .* bit/s$", row))]
    assert order == ["3", "2", "1"]
    assert any(row.startswith("192.0.2.1:2  16.0 kbit/s, both ways") for row in rows)


@pytest.mark.parametrize(("columns", "whole"), [(80, False), (140, True)])
def test_status_fits_the_terminal(columns: int, whole: bool) -> None:
    """Nothing is lost on a narrow one but the rest of the key, and a pipe gets all of it."""
    peer = PrivateKey.generate().public
    config = Config(private_key=PrivateKey.generate(), peers=(PeerConfig(
        peer, None, (ip_network("10.8.0.0/24"), ip_network("fd00:8::/64")), "127.0.0.1:999"),))
    with Pipe.make() as pipe, WireGuard(config, tun_fd=pipe.fd, name="wg7") as wireguard, Observers(wireguard):
        with contextlib.closing(Terminal(["status", "wg7"], columns=columns)) as terminal:
            assert terminal.end() == 0
        lines = terminal.text.splitlines()
        bare = re.sub(r"\x1b\[[\d;]*m", "", terminal.raw.decode())
        assert max(map(len, bare.splitlines())) <= columns
        (row,) = (line for line in lines if str(peer)[:10] in line)
        assert (str(peer) in row) == whole
        assert re.search(r" never +- +- +0 B +0 B$", row)
        assert "fd00:8::/64" in terminal.text
        with contextlib.closing(Terminal(["status", "wg7", "--watch", "0.3"], columns=columns)) as terminal:
            terminal.wait(r"handshake +rtt +lost +received +/s +sent +/s")
