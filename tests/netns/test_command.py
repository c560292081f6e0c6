"""The command between two hosts: set-up, traffic, signals, and that everything is put back after each end."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.netns import Lab, Namespace, Snapshot, assert_unchanged, snapshot, wait_until

pytestmark = pytest.mark.netns

FASTTUN = (sys.executable, "-m", "fasttun")
NOBODY = pwd.getpwnam("nobody")
AS_NOBODY = (
    "setpriv",
    "--reuid",
    "nobody",
    "--regid",
    str(NOBODY.pw_gid),
    "--clear-groups",
    "--no-new-privs",
)
NET_ADMIN = 1 << 12
READY = "neither encrypted nor authenticated"
"""In the last line before the tunnel waits for signals."""


class Command:
    """A running `fasttun`, its stderr collected as lines."""

    def __init__(self, ns: Namespace, *flags: str, prefix: tuple[str, ...] = (), **options: Any) -> None:
        self.process = ns.popen([*prefix, *FASTTUN, *flags], **options)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def ready(self) -> Command:
        self.said(READY)
        return self

    def said(self, text: str) -> str:
        """The first line that contains `text`, waited for."""

        def find() -> str:
            if self.process.poll() is not None and not self._reader.is_alive():
                assert any(text in line for line in self.lines), f"ended without {text!r}: {self.lines}"
            return next((line for line in self.lines if text in line), "")

        return wait_until(find, 15, what=f"{text!r} in {self.lines}")

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, number: int = 0) -> int:
        """The exit status, after sending a signal if one is given."""
        if number:
            self.send(number)
        status = self.process.wait(15)
        self._reader.join(5)
        return status

    def threads(self) -> list[dict[str, str]]:
        """/proc/PID/task/*/status."""
        found = []
        for task in os.listdir(f"/proc/{self.process.pid}/task"):
            text = Path(f"/proc/{self.process.pid}/task/{task}/status").read_text()
            found.append(dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line))
        return found


def ping(ns: Namespace, host: str, *options: str) -> None:
    ns.run(["ping", "-c", "2", "-i", "0.1", "-W", "2", *options, host], timeout=15)


def reaches(ns: Namespace, host: str) -> None:
    """Within ten seconds: a listener takes its time before it believes that a peer has moved."""
    wait_until(lambda: ns.run(["ping", "-c1", "-W1", host], check=False).returncode == 0, 10)


def assert_no_traceback(*commands: Command) -> None:
    for command in commands:
        assert not [line for line in command.lines if "Traceback" in line or 'File "' in line]


# ------------------------------------------------------------------------------------------ traffic


@pytest.mark.parametrize("outer", ["v4", "v6"])
def test_two_hosts_become_one_network_and_part_again(lab: Lab, outer: str) -> None:
    a, b, link = lab.pair()
    before = snapshot(a), snapshot(b)
    listener = Command(a, "--listen", "--address", "10.7.0.1/24", "--address", "fd07::1/64").ready()
    client = Command(
        b, "--server", getattr(link.a, outer), "--address", "10.7.0.2/24", "--address", "fd07::2/64",
        "--route", "192.168.77.0/24",
    ).ready()  # fmt: skip
    mtu = {"v4": 1472, "v6": 1452}[outer]
    assert b.ip_json("link", "show", "tun0")[0]["mtu"] == mtu
    assert f"tun0 (10.7.0.2/24, fd07::2/64, MTU {mtu}) to " in client.lines[0]
    assert "tun0 (10.7.0.1/24, fd07::1/64, MTU 1472) listens on UDP port 1234" in listener.lines[0]
    ping(b, "10.7.0.1")
    ping(a, "10.7.0.2")
    ping(b, "fd07::1")
    ping(a, "fd07::2")
    ping(b, "10.7.0.1", "-M", "do", "-s", str(mtu - 28))
    assert b.ip("route", "get", "192.168.77.5").startswith("192.168.77.5 dev tun0")
    assert client.end(signal.SIGINT) == 0
    assert listener.end(signal.SIGTERM) == 0
    assert_unchanged(a, before[0])
    assert_unchanged(b, before[1])
    assert_no_traceback(client, listener)
    for command in (client, listener):
        assert " outbound: " in command.lines[-2]
        assert " inbound: " in command.lines[-1]


def test_the_summary_counts_to_the_packet(lab: Lab) -> None:
    a, b, link = lab.pair()
    listener = Command(a, "-listen", "--address", "10.7.0.1/24", "--log-format", "json").ready()
    client = Command(b, "-server", link.a.v4, "--address", "10.7.0.2/24", "--log-format", "json").ready()
    ping(b, "10.7.0.1", "-c", "20", "-i", "0.01", "-s", "100")
    assert client.end(signal.SIGTERM) == 0
    assert listener.end(signal.SIGTERM) == 0
    ends = {}
    for name, command in (("client", client), ("listener", listener)):
        for entry in map(json.loads, command.lines):
            assert entry["time"] < "3"
            if "direction" in entry:
                assert entry["packets_in"] == entry["packets_out"] + sum(entry["drops"].values())
                ends[name, entry["direction"]] = entry
    for there, back in ((("client", "outbound"), ("listener", "inbound")),
                        (("listener", "outbound"), ("client", "inbound"))):  # fmt: skip
        assert ends[there]["packets_out"] >= 20
        assert ends[there]["bytes_out"] >= 20 * 128
        assert ends[there]["packets_out"] == ends[back]["packets_in"]


# ------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("route", ["192.168.7.0/24", "10.99.0.0/16"], ids=["a route", "a route over the server"])
def test_kill_9_leaves_nothing_that_hinders_the_next_start(lab: Lab, route: str) -> None:
    a, b, link = lab.pair()
    flags = ("--server", link.a.v4, "--address", "10.7.0.2/24", "--route", route)
    before = snapshot(b)
    Command(a, "--listen", "--address", "10.7.0.1/24").ready()
    client = Command(b, *flags).ready()
    reaches(b, "10.7.0.1")
    client.end(signal.SIGKILL)
    client = Command(b, *flags).ready()
    reaches(b, "10.7.0.1")
    assert client.end(signal.SIGINT) == 0
    assert_no_traceback(client)
    if route == "192.168.7.0/24":
        assert_unchanged(b, before)
    else:  # the killed one's own way to the server is on eth0, and no longer anyone's
        assert b.devices() == {"lo", "eth0"}


HALF_WAY = {
    "the second address is refused": ("--address", "fd07::1/64"),
    "the second route is there already": ("--route", "192.168.7.0/24", "--route", "192.168.8.0/24"),
}


@pytest.mark.parametrize("flags", HALF_WAY.values(), ids=HALF_WAY.keys())
def test_an_error_half_way_undoes_the_first_half(lab: Lab, flags: tuple[str, ...]) -> None:
    a, _, link = lab.pair()
    a.sysctl("net/ipv6/conf/default/disable_ipv6", 1)  # for devices to come
    a.ip("route", "add", "192.168.8.0/24", "via", link.b.v4)
    before = snapshot(a)
    done = a.run([*FASTTUN, "--listen", "--address", "10.7.0.1/24", *flags], check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_error(done.stderr, "fd07::1/64" if "--address" in flags else "192.168.8.0/24")
    assert_unchanged(a, before)


def assert_one_error(stderr: str, *parts: str) -> None:
    """One line that names `parts`."""
    lines = [line for line in stderr.splitlines() if not line.startswith("20")]  # log lines have the time
    assert len(lines) == 1, stderr
    assert lines[0].startswith("fasttun: ")
    for part in parts:
        assert part in lines[0]


def test_sigterm_at_any_moment_of_set_up_is_undone(lab: Lab) -> None:
    a, _, _ = lab.pair()
    before = snapshot(a)
    statuses = set()
    for step in range(12):
        command = Command(a, "--listen", "--address", "10.7.0.1/24", "--route", "192.168.7.0/24")
        time.sleep(0.04 * step)
        statuses.add(command.end(signal.SIGTERM))
        assert_no_traceback(command)
        assert_unchanged(a, before)
    assert statuses <= {0, -signal.SIGTERM}  # the latter: while the interpreter itself was starting
    assert 0 in statuses


def test_a_deleted_device_ends_it_with_an_error(lab: Lab) -> None:
    a, _, _ = lab.pair()
    before = snapshot(a)
    command = Command(a, "--listen", "--address", "10.7.0.1/24").ready()
    a.ip("link", "delete", "tun0")
    assert command.end() == 1
    assert "tun0" in command.lines[-1]
    assert_no_traceback(command)
    assert_unchanged(a, before)


FAILURES = {
    "a device that is no TUN device": (("--listen", "--device", "eth0"), ("eth0", "[E")),
    "a name that does not resolve": (("--server", "host.invalid"), ("host.invalid",)),
    "an address that is not ours": (("--listen", "--bind", "192.0.2.99"), ("192.0.2.99", "[EADDRNOTAVAIL]")),
    "a port that is taken": (("--listen", "--port", "7777"), ("7777", "Address already in use [EADDRINUSE]")),
}


@pytest.mark.parametrize(("flags", "parts"), FAILURES.values(), ids=FAILURES.keys())
def test_what_fails_is_named(lab: Lab, flags: tuple[str, ...], parts: tuple[str, ...]) -> None:
    a, _, _ = lab.pair()
    with a.enter(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as taken:
        taken.bind(("::", 7777))
        before = snapshot(a)
        done = a.run([*FASTTUN, *flags], check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert_one_error(done.stderr, *parts)
    assert_unchanged(a, before)


def test_without_root_the_error_says_what_to_do(lab: Lab) -> None:
    a, _, _ = lab.pair()
    done = a.run([*AS_NOBODY, *FASTTUN, "--listen", "--address", "10.7.0.1/24"], check=False)
    assert done.returncode == 1
    assert_one_error(done.stderr, "tun0", "Operation not permitted [EPERM]", "sudo")


# --------------------------------------------------------------------------------------- privileges


def test_a_users_own_device_needs_no_root(lab: Lab) -> None:
    a, b, link = lab.pair()
    b.ip("tuntap", "add", "dev", "mine", "mode", "tun", "user", "nobody")
    b.ip("address", "add", "10.7.0.2/24", "dev", "mine")
    b.ip("link", "set", "mine", "mtu", "1400", "up")
    settle_qdisc(b, "mine")
    b.sysctl("net/ipv6/conf/mine/disable_ipv6", 1)  # or the first carrier brings a fe80:: address for good
    before = snapshot(b)
    Command(a, "--listen", "--address", "10.7.0.1/24").ready()
    client = Command(b, "--server", link.a.v4, "--device", "mine", prefix=AS_NOBODY).ready()
    ping(b, "10.7.0.1")
    assert client.end(signal.SIGTERM) == 0
    assert_unchanged(b, before)


def settle_qdisc(ns: Namespace, device: str) -> None:
    """The kernel gives a device its queue at the first carrier, and never takes it away again."""
    ns.run(["tc", "qdisc", "replace", "dev", device, "root", "pfifo_fast"])


USER_CASES = {
    "an own device vanishes by itself": (False, (), 0),
    "an attached one needs one capability": (True, (), NET_ADMIN),
    "so does a pinned route": (False, ("--route", "10.99.0.0/16"), NET_ADMIN),
}


@pytest.mark.parametrize(("attach", "flags", "kept"), USER_CASES.values(), ids=USER_CASES.keys())
def test_user_drops_root_and_still_undoes_all(lab: Lab, attach: bool, flags: tuple[str, ...], kept: int) -> None:
    a, b, link = lab.pair()
    if attach:
        b.ip("tuntap", "add", "dev", "tun0", "mode", "tun")
        b.ip("link", "set", "tun0", "mtu", "1300")
        settle_qdisc(b, "tun0")
    before = snapshot(b)
    Command(a, "--listen", "--address", "10.7.0.1/24").ready()
    client = Command(b, "--server", link.a.v4, "--address", "10.7.0.2/24", "--user", "nobody", *flags).ready()
    threads = client.threads()
    assert len(threads) >= 2
    for status in threads:
        assert status["Uid"].split() == [str(NOBODY.pw_uid)] * 4
        assert status["Gid"].split() == [str(NOBODY.pw_gid)] * 4
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == kept
        assert int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
    ping(b, "10.7.0.1")
    assert client.end(signal.SIGTERM) == 0
    assert_no_traceback(client)
    assert_unchanged(b, before)


# ---------------------------------------------------------------------------------- signals, notify


@contextlib.contextmanager
def hosts_file(ns: Namespace) -> Iterator[Path]:
    """What commands in `ns` see as /etc/hosts (ip-netns(8)); write it in place."""
    directory = Path("/etc/netns") / ns.name
    had_parent = directory.parent.exists()
    directory.mkdir(parents=True)
    try:
        yield directory / "hosts"
    finally:
        shutil.rmtree(directory)
        if not had_parent:
            with contextlib.suppress(OSError):
                directory.parent.rmdir()


@contextlib.contextmanager
def service_manager(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(10)
        yield sock


def test_hang_up_follows_the_name_to_its_new_address(lab: Lab, tmp_path: Path) -> None:
    a, b, link = lab.pair()
    a.ip("address", "add", "10.99.0.9/24", "dev", link.a.device)
    Command(a, "--listen", "--address", "10.7.0.1/24").ready()
    with hosts_file(b) as hosts, service_manager(tmp_path / "notify") as manager:
        hosts.write_text(f"{link.a.v4} server.test\n")
        client = Command(
            b, "--server", "server.test", "--address", "10.7.0.2/24",
            env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
        ).ready()  # fmt: skip
        assert manager.recv(4096).startswith(b"READY=1\nSTATUS=tun0 (10.7.0.2/24")
        assert f"to {link.a.v4}:1234" in client.lines[0]
        ping(b, "10.7.0.1")
        hosts.write_text("10.99.0.9 server.test\n")
        client.send(signal.SIGHUP)
        assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(4096) == b"READY=1"
        client.said("10.99.0.9:1234")
        a.sysctl(f"net/ipv4/conf/{link.a.device}/promote_secondaries", 1)
        a.ip("address", "del", f"{link.a.v4}/24", "dev", link.a.device)
        reaches(b, "10.7.0.1")
        client.send(signal.SIGUSR1)
        client.said("peer 10.99.0.9:1234")
        assert client.end(signal.SIGTERM) == 0
        assert manager.recv(4096).startswith(b"STOPPING=1")


def test_usr1_prints_counters_of_a_quiet_tunnel(lab: Lab) -> None:
    a, b, link = lab.pair()
    listener = Command(a, "--listen", "--address", "10.7.0.1/24", "-qq")
    wait_until(lambda: "tun0" in a.devices())
    Command(b, "--server", link.a.v4, "--address", "10.7.0.2/24").ready()
    reaches(b, "10.7.0.1")
    assert listener.lines == []
    listener.send(signal.SIGUSR1)
    assert "; dropped " in listener.said("outbound: ")
    assert "10.7.0.2" in listener.said(f"peer {link.b.v4}:")
    assert "system calls: " in listener.said("up ")
    listener.send(signal.SIGHUP)  # a listener has nothing to look up: it goes on
    ping(b, "10.7.0.1")
    assert listener.end(signal.SIGINT) == 0


# ------------------------------------------------------------------------------------------ explain


def _essence(ns: Namespace) -> dict[str, object]:
    """What the commands of --explain are to bring about; not: carrier, persistence, what the kernel adds."""
    (device,) = ns.ip_json("address", "show", "dev", "tun0")
    routes = [
        {key: route.get(key) for key in ("dst", "dev", "gateway", "scope", "metric")}
        for family in ("-4", "-6")
        for route in ns.ip_json(family, "route", "show")
        if not str(route["dst"]).startswith("fe80")
    ]
    return {
        "mtu": device["mtu"],
        "up": "UP" in device["flags"],
        "kind": device["linkinfo"]["info_kind"],
        "addresses": sorted(
            (entry["local"], entry["prefixlen"]) for entry in device["addr_info"] if entry["scope"] == "global"
        ),
        "routes": sorted(routes, key=str),
    }


def test_explain_is_what_the_command_does(lab: Lab) -> None:
    _, b, link = lab.pair()
    b.ip("route", "add", "203.0.113.0/24", "via", link.a.v4)
    before: Snapshot = snapshot(b)
    flags = (
        "--server", "203.0.113.7", "--address", "10.7.0.2/24", "--address", "fd07::2/64",
        "--route", "192.168.5.0/24", "--route", "fd08::/64", "--route", "203.0.112.0/20",
    )  # fmt: skip
    script = b.run([*FASTTUN, *flags, "--explain"]).stdout
    assert_unchanged(b, before)
    b.run(["sh", "-e"], input=script)
    by_hand = _essence(b)
    undo = [line.removeprefix("#     ") for line in script.splitlines() if line.startswith("#     ")]
    b.run(["sh", "-e"], input="\n".join(undo))
    assert_unchanged(b, before)
    command = Command(b, *flags).ready()
    for name, value in _essence(b).items():
        assert value == by_hand[name], name
    assert command.end(signal.SIGTERM) == 0
    assert_unchanged(b, before)


def test_explain_needs_no_root(lab: Lab) -> None:
    a = lab.namespace()
    done = a.run([*AS_NOBODY, *FASTTUN, "--listen", "--explain"])
    assert "ip tuntap add dev tun0 mode tun" in done.stdout
    assert a.devices() == {"lo"}


def test_a_hung_up_terminal_ends_it(lab: Lab) -> None:
    a = lab.namespace()
    before = snapshot(a)
    done = subprocess.run(
        [sys.executable, "-c", _HANG_UP, a.name, *FASTTUN, "--listen", "--address", "10.7.0.1/24"],
        capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "0", done.stderr
    assert_unchanged(a, before)


_HANG_UP = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execvp("ip", ["ip", "netns", "exec", *sys.argv[1:]])
text = b""
while b"neither encrypted" not in text:
    text += os.read(terminal, 4096)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
