"""The service: units that systemd takes and finds well shut, what `service` writes, what the process tells.

Nothing here touches this machine's systemd: `--root` is a temporary directory, the manager a socket of the test's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.netns import Lab

from fasttun import notify
from fasttun.cli import service
from fasttun.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
LISTEN = ["--listen", "--address", "10.7.0.1/24"]


def command(root: Path, *words: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "fasttun", "service", words[0], "--root", str(root), *words[1:]],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def systemd_analyze() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here (apt install systemd)")
    return program


@pytest.mark.parametrize("name", service.UNITS)
def test_contrib_holds_the_same_unit(name: str) -> None:
    assert (ROOT / "contrib" / name).read_text() == service.UNITS[name], (
        "python -m fasttun.cli.service contrib")


@pytest.mark.parametrize(("name", "most"), [("fasttun@.service", 2.5), ("fasttun-up@.service", 4.0)])
def test_systemd_finds_the_sandbox_ok(name: str, most: float) -> None:
    done = subprocess.run([systemd_analyze(), "security", "--offline=true", "--no-pager", ROOT / "contrib" / name],
                          capture_output=True, text=True)
    verdict = re.search(r"Overall exposure level for \S+: ([\d.]+) (\w+)", done.stdout)
    assert verdict is not None, done.stdout + done.stderr
    assert verdict[2] == "OK"
    assert float(verdict[1]) <= most


def test_systemd_takes_the_installed_units(tmp_path: Path) -> None:
    """`verify` looks for the program, too."""
    (tmp_path / "etc/wireguard").mkdir(parents=True)
    (tmp_path / "etc/wireguard/wg0.conf").touch()
    command(tmp_path, "install", "tun0", "--", *LISTEN)
    command(tmp_path, "install", "wg0")
    units = sorted((tmp_path / "etc/systemd/system").iterdir())
    assert [unit.name for unit in units] == ["fasttun-up@.service", "fasttun@.service"]
    for unit in units:
        done = subprocess.run([systemd_analyze(), "verify", "--man=no", unit], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_install_and_remove_leave_nothing(tmp_path: Path) -> None:
    told = command(tmp_path, "install", "tun0", "--", *LISTEN)
    flags = tmp_path / "etc/fasttun/tun0.conf"
    assert flags.read_text() == 'FASTTUN_FLAGS="--listen --address 10.7.0.1/24"\n'
    assert stat.S_IMODE(flags.stat().st_mode) == 0o600
    assert f"to do: systemctl --root={tmp_path} enable fasttun@tun0.service" in told
    command(tmp_path, "install", "tun1", "--", "--server", "198.51.100.7")
    command(tmp_path, "remove", "tun0")
    assert (tmp_path / "etc/systemd/system/fasttun@.service").exists(), "tun1 still needs it"
    command(tmp_path, "remove", "tun1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert "no service" in command(tmp_path, "remove", "tun0", status=1)


def test_install_again_replaces_the_flags(tmp_path: Path) -> None:
    command(tmp_path, "install", "tun0", "--", *LISTEN)
    command(tmp_path, "install", "tun0", "--", "--server", "198.51.100.7")
    assert "198.51.100.7" in (tmp_path / "etc/fasttun/tun0.conf").read_text()


def test_the_sandbox_is_opened_for_the_fast_path_alone(tmp_path: Path) -> None:
    drop_in = tmp_path / "etc/systemd/system/fasttun@tun0.service.d/fast-path.conf"
    command(tmp_path, "install", "tun0", "--", *LISTEN, "--fast-path")
    assert "CAP_BPF" in drop_in.read_text()
    command(tmp_path, "install", "tun0", "--", *LISTEN)
    assert not drop_in.parent.exists()
    command(tmp_path, "install", "tun0", "--", *LISTEN, "--fast-path")
    command(tmp_path, "remove", "tun0")
    assert not drop_in.parent.exists()


def test_a_packaged_unit_is_left_to_the_package(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/systemd/system").mkdir(parents=True)
    (tmp_path / "usr/lib/systemd/system/fasttun@.service").touch()
    command(tmp_path, "install", "tun0", "--", *LISTEN)
    assert not (tmp_path / "etc/systemd").exists()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["tun0", "--", "--listen", "--server", "x"], "--listen"),
        (["tun0", "--", "--listen", "--port", "0"], "--port"),
        (["tun0", "--", "--lissten"], "--lissten"),
        (["tun0", "--", "--listen", "status"], "status"),
        (["tun0", "--", "--listen", "--user", "nobody"], "--user"),
        (["tun0", "--", "--listen", "--explain"], "--explain"),
        (["tun/0", "--", "--listen"], "tun/0"),
        (["-x", "--", "--listen"], "-x"),
        (["an-interface-too-long", "--", "--listen"], "too-long"),
        (["wg0"], "/etc/wireguard/wg0.conf"),
        (["tun0", "--", *LISTEN, "--key", "/root/key", "--peer", "x"], "/root/key is out of the service's sight"),
        (["--now", "tun0", "--", "--listen"], "--root"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, words: list[str], hint: str) -> None:
    told = command(tmp_path, "install", *words, status=2)
    assert hint in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("unit", "place", "seen"), [
    ("fasttun", "/home/me/bin", False), ("fasttun", "/tmp/x", False), ("fasttun-up", "/tmp/x", False),
    ("fasttun-up", "/home/me/bin", True), ("fasttun", "/opt/fasttun/bin", True), ("fasttun", "/homes/x", True),
])
def test_a_program_that_the_unit_hides_is_refused(unit: str, place: str, seen: bool) -> None:
    with contextlib.nullcontext() if seen else pytest.raises(ConfigurationError, match=f"{place}/fasttun is out of"):
        service._check_is_seen("service", unit, f"{place}/fasttun")


@pytest.mark.parametrize("flags", [
    ["--listen"], ["--server", "a b"], ["--key", "/etc/fasttun/it's"], ["--key", 'a"b\\c'], ["--key", "$HOME `x`"],
    ["--address", "10.7.0.1/24", "--peer", "KEY=,10.7.0.2"],
])  # fmt: skip
def test_flags_come_back_as_they_were(flags: list[str]) -> None:
    """Read as systemd.exec(5) reads an EnvironmentFile=, then split as systemd.service(5) splits $FASTTUN_FLAGS."""
    quoted = service._quoted(flags)
    assert quoted[0] == quoted[-1] == '"'
    value = re.sub(r'\\(["\\`$])', r"\1", quoted[1:-1])
    words = [re.sub(r"\\(.)", r"\1", word) if word.startswith("'") else word for word in _split(value)]
    assert [word.strip("'") if word[:1] == "'" else word for word in words] == flags


def _split(value: str) -> list[str]:
    return re.findall(r"'(?:\\.|[^'\\])*'|\S+", value)


class Manager:
    """A service manager's side: what the process has told, by NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))

    def next(self, timeout_s: float = 10.0) -> str:
        """The next message, "" when none comes."""
        self.socket.settimeout(timeout_s)
        try:
            return self.socket.recv(4096).decode()
        except TimeoutError:
            return ""

    def until(self, fits: Callable[[str], bool], timeout_s: float = 10.0) -> str:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            message = self.next(deadline - time.monotonic())
            if fits(message):
                return message
        raise AssertionError("nothing like it was told")

    def drain(self) -> None:
        while self.next(0.01):
            pass


_SANDBOX = """
import ctypes, os, sys
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(65, 1, 0, 0, 0) and ctypes.get_errno() != 22:  # PR_SET_MDWE, Linux 6.3: MemoryDenyWriteExecute=
    sys.exit("no MDWE")
os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.netns
@pytest.mark.parametrize("mode", ["plain", "encrypted"])
def test_the_process_does_its_part_within_the_sandbox(lab: Lab, tmp_path: Path, mode: str) -> None:
    """The unit's capabilities, no new privileges, no writable and executable memory; READY to STOPPING."""
    ns, manager = lab.namespace(), Manager(tmp_path / "notify")
    flags = LISTEN
    if mode == "encrypted":
        key = tmp_path / "key"
        key.write_text("YAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n")
        key.chmod(0o600)
        flags = [*LISTEN, "--key", str(key), "--peer", "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="]
    bounding = "-all,+net_admin,+net_bind_service"
    process = ns.popen(
        ["setpriv", "--bounding-set", bounding, "--inh-caps", "-all", "--no-new-privs", sys.executable, "-c", _SANDBOX,
         sys.executable, "-m", "fasttun", "--device", "tun5", *flags],
        env={"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "400000", "FASTTUN_RUNTIME_DIR": str(tmp_path)})
    try:
        assert manager.next().startswith("READY=1")
        assert "tun5" in ns.devices()
        for _ in range(3):
            assert manager.next(2) == "WATCHDOG=1"
        process.send_signal(signal.SIGHUP)
        assert manager.until(lambda text: text.startswith("RELOADING=1"))
        assert manager.until(lambda text: text.startswith("READY=1"))
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        manager.drain()
        assert manager.next(0.7) == "", "a process that stands still says that it is alive"
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        assert manager.until(lambda text: text.startswith("STOPPING=1"))
        assert process.wait(10) == 0
    finally:
        manager.socket.close()
    assert "tun5" not in ns.devices()


@pytest.mark.netns
def test_its_system_calls_are_those_that_the_unit_allows(lab: Lab, tmp_path: Path) -> None:
    """What the filter would refuse, as strace sees a start, a reload and an end."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here (apt install strace)")
    listed = subprocess.run([systemd_analyze(), "syscall-filter"], capture_output=True, text=True).stdout
    sets = {block.split()[0]: [row.strip() for row in block.splitlines()[1:] if row.strip() and "#" not in row]
            for block in listed.split("\n\n") if block.startswith("@")}

    def members(name: str) -> set[str]:
        return {call for row in sets[name] for call in (members(row) if row.startswith("@") else {row})}

    text = service.UNITS["fasttun@.service"]
    allowed = members("@system-service") | members("@default")
    for name in re.findall(r"@\w+", re.findall(r"SystemCallFilter=~(.*)", text)[0]):
        allowed -= members(name) - members("@default")
    trace = tmp_path / "trace"
    ns, manager = lab.namespace(), Manager(tmp_path / "notify")
    process = ns.popen(["strace", "-f", "-qq", "-o", trace, sys.executable, "-m", "fasttun", *LISTEN],
                       env={"NOTIFY_SOCKET": str(manager.path), "FASTTUN_RUNTIME_DIR": str(tmp_path)})
    with manager.socket:
        manager.until(lambda told: told.startswith("READY=1"))
        child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(child, signal.SIGHUP)
        manager.until(lambda told: told.startswith("READY=1"))
        os.kill(child, signal.SIGTERM)
        assert process.wait(10) == 0
    used = set(re.findall(r"^\d+ +([a-z_0-9]+)\(", trace.read_text(), re.M))
    assert {"ioctl", "socket", "bind"} <= used
    # Asked for a thread's stack; where it is refused, glibc has a default.
    assert used - allowed - {"prlimit64"} == set()


def test_the_watchdogs_interval_is_half_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for usec, pid, expected in (("30000000", None, 15.0), ("30000000", str(os.getpid()), 15.0),
                                ("30000000", "1", None), ("0", None, None), ("x", None, None), (None, None, None)):
        for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert notify.watchdog_interval_s() == expected


def test_a_dead_tunnel_tells_the_watchdog_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttun.cli import serve

    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with manager.socket, serve._Signals() as signals:
        signals.alive = lambda: False
        ended = serve._Watched(signals, lambda: time.sleep(0.4))
        assert signals.next() == serve._ENDED
        ended.join()
        assert manager.next(0.01) == ""
        signals.alive = lambda: True
        serve._Watched(signals, lambda: time.sleep(0.4)).join(0)
        assert signals.next() == serve._ENDED
        assert manager.next(0.01) == "WATCHDOG=1"
