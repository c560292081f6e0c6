"""The command line without a tunnel: bad use, help, --explain, and the main loop on a fake forwarder."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from fasttun import log
from fasttun.cli import lines, main, report, serve
from fasttun.cli.command import COMMANDS, go_style
from fasttun.cli.explain import explanation
from fasttun.config import TunnelConfig
from fasttun.endpoint import Endpoint
from fasttun.errors import ConfigurationError, DeviceError
from fasttun.stats import DirectionStats, PeerStats, Stats

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _quiet_log():
    """The log as it was: `log.configure` is for a process of its own."""
    import logging

    root = logging.getLogger("fasttun")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


def fasttun(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(PROJECT), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "fasttun", *words],
        capture_output=True,
        text=True,
        timeout=30,
        env=env,
        **options,
    )


# ------------------------------------------------------------------------------------------ bad use

CLIENT = ("--server", "198.51.100.7")
BAD_USE = [
    ((), "--listen", "--server"),
    (("--listen", *CLIENT), "--listen", "--server"),
    (("--server", ""), "--server", "empty"),
    (("--listen", "--port", "0"), "--port", "1 to 65535"),
    (("--listen", "--port", "70000"), "--port", "1 to 65535"),
    (("--listen", "--port", "http"), "--port", "1 to 65535"),
    (("--listen", "--device", "sixteencharacter"), "--device", "1 to 15"),
    (("--listen", "--device", "a/b"), "--device", "1 to 15"),
    (("--listen", "--address", "10.7.0.300/24"), "--address", "CIDR"),
    (("--listen", "--address", "10.7.0.1/33"), "--address", "CIDR"),
    (("--listen", "--address", "10.7.0.1/24", "--address", "none"), "--address", "CIDR"),
    (("--listen", "--route", "private"), "--route", "CIDR"),
    (("--listen", "--allow", "10.0.0.0/40"), "--allow", "CIDR"),
    ((*CLIENT, "--allow", "10.0.0.0/8"), "--allow", "--server"),
    (("--listen", "--mtu", "575"), "--mtu", "576 to 65535"),
    (("--listen", "--mtu", "65536"), "--mtu", "576 to 65535"),
    (("--listen", "--mtu", "big"), "--mtu", "576 to 65535"),
    (("--listen", "--framing", "ethernet"), "--framing", "auto, raw or pi"),
    (("--listen", "--bind", "eth0"), "--bind", "192.0.2.1"),
    (("--listen", "--workers", "0"), "--workers", "1 to"),
    (("--listen", "--busy-poll", "9999999"), "--busy-poll", "microseconds"),
    (("--listen", "--log-format", "xml"), "--log-format", "text or json"),
    (("--listen", "--user", "no-such-user-here"), "--user", "nobody"),
    (("--listen", "--user", "root"), "--user", "nobody"),
    (("--listen", "--prot", "1"), "--prot", "--port"),
    (("--server",), "--server", "needs a value"),
    (("--listen=yes",), "--listen", "fasttun --help"),
    (("198.51.100.7",), "198.51.100.7", "--server"),
    (("demi",), "demi", "did you mean demo?"),
    (("--listen", "demo"), "--listen", "demo --help"),
    (("-listen", "-port", "0"), "--port", "1 to 65535"),
]


@pytest.mark.parametrize(("words", "flag", "fix"), BAD_USE, ids=lambda value: " ".join(value) if value else None)
def test_bad_use_is_one_line_with_flag_and_fix(words, flag, fix, capfd):
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith(f"fasttun: {flag}: ")
    assert fix in err


def test_every_field_of_the_configuration_has_the_flag_that_its_errors_name():
    help_text = fasttun("--help").stdout
    without_flag = {"tun_fd", "udp_fd"}  # for the library
    for field in dataclasses.fields(TunnelConfig):
        if field.name not in without_flag:
            assert f"{lines.flag_of(field.name)} " in help_text.replace("\n", " "), field.name


def test_a_word_inside_another_is_not_made_a_flag():
    error = ConfigurationError("server", "listener 'server' has no server", "a listening server")
    assert lines.configuration(error) == "--server: listener 'server' has no --server; a listening server"


def test_the_lines_break_is_never_the_users(capfd):
    assert main(["--listen", "--device", "a\nb"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


# -------------------------------------------------------------------------------------- exit status


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            DeviceError("create", "tun0", 1, "run it as root"),
            1,
            "fasttun: create tun0: Operation not permitted [EPERM]; run it as root\n",
        ),
        (ConfigurationError("mtu", "is odd", "make it even"), 2, "fasttun: --mtu: is odd; make it even\n"),
        (FileNotFoundError(2, "x", "/dev/net/tun"), 1, "fasttun: /dev/net/tun: No such file or directory\n"),
        (ZeroDivisionError("oh"), 1, "fasttun: internal error: ZeroDivisionError: oh; please report it"),
        (KeyboardInterrupt(), 130, ""),
        (
            ModuleNotFoundError("No module named 'fasttun._core'", name="fasttun._core"),
            1,
            "fasttun: fasttun._core is missing",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_are_one_line_and_a_status(error, status, line, capfd, monkeypatch):
    def serve_failing(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(serve, "serve", serve_failing)
    assert main(["--listen"]) == status
    err = capfd.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_an_error_is_json_where_the_log_is(capfd, monkeypatch):
    def serve_failing(*_: object, **__: object) -> int:
        raise DeviceError("create", "tun0", 1)

    monkeypatch.setattr(serve, "serve", serve_failing)
    assert main(["--listen", "--log-format", "json", "-qq"]) == 1
    entry = json.loads(capfd.readouterr().err)
    assert entry["level"] == "error"
    assert entry["message"] == "create tun0: Operation not permitted [EPERM]"


def test_a_reader_that_has_enough_is_no_error():
    command = f"{sys.executable} -m fasttun --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, cwd=PROJECT)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "1\n")  # the pipe may take all before the reader is gone


# ---------------------------------------------------------------------------- version, help, flags


def test_version():
    done = fasttun("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"fasttun {__import__('fasttun').__version__}\n"


@pytest.mark.parametrize("words", [["--version"], ["--help"]])
def test_version_and_help_load_nothing_of_the_tunnel(words):
    code = f"""
import sys
from fasttun.cli import main
assert main({words!r}) == 0
slow = {{"rich", "pyroute2", "asyncio", "ctypes", "json", "socket", "fasttun._core", "fasttun.forwarder",
        "fasttun.device", "fasttun.cli.serve", "fasttun.cli.demo", "fasttun.demo"}}
print(sorted(slow & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=PROJECT)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_help_has_the_flags_in_sections_and_examples():
    text = fasttun("--help").stdout
    for section in ("Which side:", "Private network:", "Between the hosts:", "Examples:", "Commands:"):
        assert f"{section}\n" in text
    assert "sudo fasttun --listen --address 10.7.0.1/24" in text
    assert max(map(len, text.splitlines())) <= 100
    for name, command in COMMANDS.items():
        assert f" {name} {command.help} " in f" {' '.join(text.split())} "


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_load_and_have_help_of_their_own(name):
    done = fasttun(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: fasttun {name} ")


def test_go_style_flags_of_the_article():
    given = ["-listen", "-port=7", "-device", "tun3", "-server", "-", "-v", "-q", "-porter", "--", "-port"]
    assert go_style(given) == [
        "--listen", "--port=7", "--device", "tun3", "--server", "-", "-v", "-q", "-porter", "--", "-port"
    ]  # fmt: skip


def configuration_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> TunnelConfig:
    """The configuration that a command line makes."""
    got: list[TunnelConfig] = []
    monkeypatch.setattr(serve, "serve", lambda config, **_: got.append(config) or 0)
    assert main(words) == 0
    return got[0]


def test_no_flag_leaves_every_default(monkeypatch):
    assert configuration_of(monkeypatch, "--listen") == TunnelConfig(listen=True)


def test_every_flag_arrives(monkeypatch):
    client = configuration_of(
        monkeypatch, "--server", "vpn.example", "--port", "7", "--device", "tun9", "--address", "10.7.0.2/24",
        "--address", "fd07::2/64", "--route", "10.8.0.0/16", "--mtu", "1300", "--framing", "pi",
        "--bind", "::", "--workers", "2", "--no-tun-offload", "--no-udp-gso", "--no-udp-gro", "--no-batch",
        "--busy-poll", "30",
    )  # fmt: skip
    assert client == TunnelConfig(
        server="vpn.example", port=7, device="tun9", address=("10.7.0.2/24", "fd07::2/64"),
        route="10.8.0.0/16", mtu=1300, framing="pi", bind="::", workers=2, tun_offload=False,
        udp_gso=False, udp_gro=False,
        batch=False, busy_poll_us=30,
    )  # fmt: skip
    listener = configuration_of(
        monkeypatch, "--listen", "--allow", "10.0.0.0/8", "--allow", "fd00::/8", "--mtu", "auto"
    )
    assert listener == TunnelConfig(listen=True, allow=("10.0.0.0/8", "fd00::/8"))


def test_busy_poll_needs_no_value(monkeypatch):
    assert configuration_of(monkeypatch, "--listen", "--busy-poll").busy_poll_us == 50
    assert configuration_of(monkeypatch, "--busy-poll", "--listen").busy_poll_us == 50
    assert configuration_of(monkeypatch, "--listen", "--busy-poll=7").busy_poll_us == 7


# ------------------------------------------------------------------------------------------ explain


def test_explain_of_a_client():
    text = explanation(
        TunnelConfig(server="vpn.example", address=("10.7.0.2/24", "fd07::2/64"), route="192.168.5.0/24")
    )
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert commands == [
        "ip tuntap add dev tun0 mode tun",
        "ip address add 10.7.0.2/24 dev tun0",
        "ip address add fd07::2/64 dev tun0 nodad",
        "ip link set dev tun0 mtu 1472",
        "ip link set dev tun0 up",
        "ip route add 192.168.5.0/24 dev tun0",
    ]
    assert "1500 (Ethernet's, assumed here) - 20 (IPv4 header) - 8 (UDP header) = 1472 bytes" in flat(text)
    assert "#     ip tuntap del dev tun0 mode tun" in text
    assert "net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1" in flat(text)


def test_explain_pins_the_way_to_a_server_that_a_route_covers():
    text = explanation(TunnelConfig(server="203.0.113.9", route=("203.0.113.0/24", "fd00::/8"), mtu=1400))
    assert "\nip route add 203.0.113.9 $(ip route get 203.0.113.9 |" in text
    assert text.index("ip route add 203.0.113.9 ") < text.index("ip route add 203.0.113.0/24 dev tun0")
    assert text.index("#     ip route del 203.0.113.9") < text.index("#     ip tuntap del")
    other = explanation(TunnelConfig(server="203.0.113.9", route="203.0.114.0/24", mtu=1400))
    assert "ip route get" not in other


@pytest.mark.parametrize(
    ("options", "arithmetic", "value"),
    [
        ({"framing": "pi"}, "1500 (Ethernet's, assumed here) - 20 (IPv4 header) - 8 (UDP header) - 4", 1468),
        ({"bind": "2001:db8::1"}, "1500 (Ethernet's, assumed here) - 40 (IPv6 header) - 8 (UDP ", 1452),
        ({"mtu": 1300}, "1300 bytes, as asked for with --mtu", 1300),
    ],
)  # fmt: skip
def test_explain_shows_the_mtu_arithmetic(options, arithmetic, value):
    text = explanation(TunnelConfig(listen=True, **options))
    assert arithmetic in flat(text)
    assert f"\nip link set dev tun0 mtu {value}\n" in text


def test_explain_asks_the_kernel_for_the_route_to_an_address():
    """Loopback's MTU is known to everyone: 65536, of which IPv4 can use one less."""
    text = explanation(TunnelConfig(server="127.0.0.1"))
    assert "65535 (the route to 127.0.0.1) - 20" in flat(text)


def test_explain_is_a_shell_script_and_needs_no_root():
    done = fasttun("--listen", "--device", "a'b", "--workers", "2", "--explain")
    assert (done.returncode, done.stderr) == (0, "")
    assert "dev 'a'\"'\"'b' mode tun multi_queue" in done.stdout
    subprocess.run(["sh", "-n"], input=done.stdout, text=True, check=True)


def flat(text: str) -> str:
    return " ".join(text.replace("\n#", " ").split())


# ------------------------------------------------------------------------------------------- report


def stats(*, packets: int = 3, drops: dict[str, int] | None = None) -> Stats:
    drops = drops or {}
    peer = PeerStats(
        Endpoint(ip_address("2001:db8::7"), 1234),
        "raw",
        (ip_address("10.7.0.2"),),
        1,
        84,
        packets,
        4200,
        1.25,
    )
    return Stats(
        uptime_s=61.5,
        outbound=DirectionStats(packets + sum(drops.values()), 5000, packets, 4200, {**drops, "never": 0}),
        inbound=DirectionStats(1, 84, 1, 84, {}),
        peers=(peer,),
        system_calls={"read": 5, "write": 0},
        errors={"ECONNREFUSED": 2},
        offloads={"udp-gso": "on", "batch": "off: asked for"},
        events_lost=1,
    )


def test_summary_names_drops_by_reason():
    texts = [text for text, _ in report.summary(stats(drops={"no_peer": 2, "too_big": 1}))]
    assert texts == [
        "outbound: 3 packets, 4.20 kB; dropped 3 (no_peer 2, too_big 1)",
        "inbound: 1 packet, 84 B; dropped 0",
    ]


def test_counters_show_peers_calls_errors_and_offloads():
    texts = [text for text, _ in report.counters(stats())]
    assert texts[2] == (
        "peer [2001:db8::7]:1234 (10.7.0.2), raw, heard 1.2 s ago: to it 3 packets, 4.20 kB; from it 1 packet, 84 B"
    )
    assert texts[3] == (
        "up 62 s; system calls: read 5; survived: ECONNREFUSED 2; udp-gso on, batch off: asked for; events lost: 1"
    )


def test_report_fields_are_json():
    never = dataclasses.replace(stats().peers[0], silent_s=float("inf"))
    for _, fields in report.counters(dataclasses.replace(stats(), peers=(never,))):
        json.dumps(fields, allow_nan=False)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_996, "10.0 kB"),
     (999_400, "999 kB"), (999_600, "1.00 MB"), (5_301_000_000, "5.30 GB"), (2 * 10**18, "2000 PB")],
)  # fmt: skip
def test_sizes(count, text):
    assert report.size(count) == text


# ---------------------------------------------------------------------------------------- main loop


@dataclasses.dataclass
class FakeDevice:
    name: str = "tun0"
    needs_admin_to_close: bool = False


class FakeForwarder:
    """Says what is done to it; ends when told."""

    def __init__(
        self, error: Exception | None = None, start_error: Exception | None = None, start_s: float = 0
    ) -> None:
        self.calls: list[str] = []
        self.device = FakeDevice()
        self.mtu, self.local_port, self.peers = 1472, 1234, ()
        self.error, self.start_error, self.start_s = error, start_error, start_s
        self.ended = threading.Event()
        if error is not None:
            self.ended.set()

    def from_config(self, config: TunnelConfig, before_threads: Callable[[], None] | None = None) -> FakeForwarder:
        return self

    def __enter__(self) -> FakeForwarder:
        self.calls.append("start")
        time.sleep(self.start_s)
        if self.start_error:
            raise self.start_error
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("close")

    def wait(self) -> bool:
        self.ended.wait()
        if self.error:
            raise self.error
        return True

    def stop(self) -> None:
        self.calls.append("stop")
        self.ended.set()

    def resolve_again(self) -> None:
        self.calls.append("resolve_again")

    def stats(self) -> Stats:
        return stats(drops={"no_peer": 2})


def run_with(fake: FakeForwarder, config: TunnelConfig, *signals: int, first_after_s: float = 0.1) -> int:
    """serve() with signals sent to this process, one after the other."""

    def send() -> None:
        time.sleep(first_after_s)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return serve.serve(config, factory=fake.from_config)
    finally:
        sender.join()


@pytest.fixture
def log_lines():
    stream = io.StringIO()
    log.configure("json", 0, stream)

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    return read


LISTENER = TunnelConfig(listen=True, address="10.7.0.1/24", allow="10.0.0.0/8")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_cleanly_with_summary(number, log_lines):
    fake = FakeForwarder()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    assert run_with(fake, LISTENER, number) == 0
    assert fake.calls == ["start", "stop", "close"]
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    opening, warning, outbound, inbound = log_lines()
    assert opening["message"] == "tun0 (10.7.0.1/24, MTU 1472) listens on UDP port 1234 for 10.0.0.0/8"
    assert (opening["device"], opening["mtu"], opening["port"]) == ("tun0", 1472, 1234)
    assert warning["level"] == "warning"
    assert "neither encrypted nor authenticated" in warning["message"]
    assert outbound["drops"] == {"no_peer": 2}
    assert inbound["packets_out"] == 1


def test_a_signal_during_set_up_waits_for_it_and_then_undoes():
    fake = FakeForwarder(start_s=0.5)
    assert run_with(fake, LISTENER, signal.SIGTERM) == 0
    assert fake.calls == ["start", "stop", "close"]


def test_a_second_signal_does_not_disturb_the_undo():
    fake = FakeForwarder()
    undone: list[bool] = []
    slow_stop = fake.stop

    def stop() -> None:
        time.sleep(0.4)
        slow_stop()
        undone.append(True)

    fake.stop = stop  # type: ignore[method-assign]
    assert run_with(fake, LISTENER, signal.SIGINT, signal.SIGINT, signal.SIGTERM) == 0
    assert undone == [True]


def test_a_look_up_is_left_at_once(monkeypatch):
    from fasttun import endpoint

    leave = threading.Event()
    monkeypatch.setattr(endpoint, "resolve", lambda host, port: leave.wait(10))
    fake = FakeForwarder()
    started = time.monotonic()
    assert run_with(fake, TunnelConfig(server="slow.example"), signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 5
    assert fake.calls == []
    leave.set()


def test_hang_up_resolves_again_and_the_end_is_by_signal(log_lines):
    fake = FakeForwarder()
    assert run_with(fake, TunnelConfig(server="127.0.0.1"), signal.SIGHUP, signal.SIGTERM) == 0
    assert fake.calls == ["start", "resolve_again", "stop", "close"]


def test_hang_up_ends_it_when_the_terminal_went(monkeypatch):
    there = iter([True, False])
    monkeypatch.setattr(serve, "_terminal_is_there", lambda: next(there))
    fake = FakeForwarder()
    assert run_with(fake, TunnelConfig(server="127.0.0.1"), signal.SIGHUP) == 0
    assert fake.calls == ["start", "stop", "close"]


def test_under_nohup_a_hang_up_is_a_reload(monkeypatch):
    there = iter([True, False])
    monkeypatch.setattr(serve, "_terminal_is_there", lambda: next(there))
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fake = FakeForwarder()
        assert run_with(fake, TunnelConfig(server="127.0.0.1"), signal.SIGHUP, signal.SIGTERM) == 0
    finally:
        signal.signal(signal.SIGHUP, former)
    assert fake.calls == ["start", "resolve_again", "stop", "close"]


def test_usr1_prints_counters_even_when_quiet(capfd):
    log.configure("text", -2)
    assert run_with(FakeForwarder(), LISTENER, signal.SIGUSR1, signal.SIGTERM) == 0
    shown = capfd.readouterr().err.splitlines()
    assert len(shown) == 4  # the summary at exit is not shown
    assert "peer [2001:db8::7]:1234" in shown[2]


def test_the_engines_end_is_raised_after_the_undo(log_lines):
    error = DeviceError("read", "tun0", 77, "the device was deleted")
    fake = FakeForwarder(error=error)
    with pytest.raises(DeviceError, match="deleted"):
        serve.serve(LISTENER, factory=fake.from_config)
    assert fake.calls == ["start", "stop", "close"]
    assert [line["direction"] for line in log_lines() if "direction" in line] == ["outbound", "inbound"]


def test_a_failed_start_says_nothing_of_counters(log_lines):
    fake = FakeForwarder(start_error=DeviceError("create", "tun0", 1))
    with pytest.raises(DeviceError):
        serve.serve(LISTENER, factory=fake.from_config)
    assert log_lines() == []
