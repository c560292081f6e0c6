"""`fasttun wg NAME` / `fasttun-wg NAME`: wireguard-go's conventions, and `wg` and `wg-quick` over a real device."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.netns import Lab, Namespace, wait_until

from fasttun.wireguard.keys import PresharedKey, PrivateKey

pytestmark = pytest.mark.netns

PROGRAM = f"#!{sys.executable}\nimport sys\nfrom fasttun.cli.wg import main\nsys.exit(main())\n"
INSIDE = 'mount -t tmpfs none /run && mkdir /run/wireguard && mount --bind "$0" /run/wireguard && exec "$@"'
SHUT_S = 5.0


class Host:
    """A network namespace in which /run holds nothing but a directory of control sockets."""

    def __init__(self, ns: Namespace, directory: Path) -> None:
        for program in ("wg", "wg-quick"):
            if shutil.which(program) is None:
                pytest.skip(f"needs the {program} program (apt install wireguard-tools)")
        self.ns = ns
        self.directory = directory / ns.name
        self.sockets = self.directory / "sockets"
        self.sockets.mkdir(parents=True)
        self.program = self.directory / "fasttun-wg"
        self.program.write_text(PROGRAM)
        self.program.chmod(0o755)

    def run(self, *words: str, check: bool = True, input: str | None = None, **env: str) -> str:
        """The output; stderr too unless `check`."""
        # PATH: wg-quick calls the program by its bare name.
        path = f"{self.directory}:{os.environ['PATH']}"
        done = self.ns.run(
            ["sh", "-c", INSIDE, str(self.sockets), *words], check=check, input=input, env={"PATH": path, **env}
        )
        return done.stdout if check else done.stdout + done.stderr

    def start(self, *words: str, **env: str) -> None:
        """In the background, as it goes there by itself."""
        self.run(str(self.program), *words, **env)

    def popen(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return self.ns.popen(["sh", "-c", INSIDE, str(self.sockets), str(self.program), *words], env=env)

    def wg(self, *words: str, input: str | None = None) -> str:
        return self.run("wg", *words, input=input)

    def processes(self) -> list[int]:
        return [int(pid) for pid in self.ns_pids() if b"fasttun-wg" in _cmdline(pid)]

    def ns_pids(self) -> list[str]:
        done = subprocess.run(["ip", "netns", "pids", self.ns.name], capture_output=True, text=True, check=True)
        return done.stdout.split()

    def process(self) -> int:
        (pid,) = self.processes()
        return pid

    def ended(self) -> None:
        wait_until(lambda: not self.processes(), SHUT_S, what="the process is gone")

    def there(self) -> bool:
        return "wg0" in self.ns.devices()


def _cmdline(pid: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture
def host(lab: Lab, tmp_path: Path) -> Host:
    return Host(lab.namespace(), tmp_path)


@pytest.fixture
def pair(lab: Lab, tmp_path: Path) -> tuple[Host, Host, str, str]:
    """Two hosts with a cable, and their outer IPv4 addresses."""
    a, b, link = lab.pair()
    return Host(a, tmp_path), Host(b, tmp_path), link.a.v4, link.b.v4


# -------------------------------------------------------------------------------------- its own life


def test_it_returns_when_wg_can_reach_it(host: Host) -> None:
    host.start("wg0")
    assert host.wg("show", "interfaces") == "wg0\n"
    assert re.fullmatch(r"interface: wg0\n  listening port: \d+\n", host.wg())
    (link,) = host.ns.ip_json("link", "show", "wg0")
    assert link["mtu"] == 1420
    assert "UP" not in link["flags"]
    status = os.stat(host.sockets / "wg0.sock")
    assert status.st_mode & 0o777 == 0o600
    pid = host.process()
    assert os.getsid(pid) == pid, "it has left the terminal's session"
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}


def test_deleting_the_device_ends_it(host: Host) -> None:
    host.start("wg0")
    host.ns.ip("link", "delete", "wg0")
    host.ended()
    assert os.listdir(host.sockets) == []


def test_deleting_an_up_device_ends_it(host: Host) -> None:
    host.start("wg0")
    host.ns.ip("link", "set", "wg0", "up")
    host.ns.ip("link", "delete", "wg0")
    host.ended()
    assert os.listdir(host.sockets) == []


def test_removing_its_socket_ends_it(host: Host) -> None:
    host.start("wg0")
    os.unlink(host.sockets / "wg0.sock")
    host.ended()
    assert not host.there()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it(host: Host, number: int) -> None:
    host.start("wg0")
    os.kill(host.process(), number)
    host.ended()
    assert not host.there()
    assert os.listdir(host.sockets) == []


def test_a_killed_one_is_replaced(host: Host) -> None:
    host.start("wg0")
    os.kill(host.process(), signal.SIGKILL)
    host.ended()
    assert os.listdir(host.sockets) == ["wg0.sock"]
    host.start("wg0")
    assert host.wg("show", "interfaces") == "wg0\n"


def test_the_name_is_taken_once(host: Host) -> None:
    host.start("wg0")
    said = host.run(str(host.program), "wg0", check=False)
    assert said.startswith("fasttun: ")
    assert "wg0" in said
    assert len(host.processes()) == 1
    assert host.wg("show", "interfaces") == "wg0\n"


def test_a_living_socket_of_the_name_is_respected(host: Host) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(host.sockets / "wg0.sock"))
        other.listen()
        said = host.run(str(host.program), "wg0", check=False)
        assert "serves wg0" in said
        assert not host.there()
        assert host.processes() == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [((), "NAME"), (("a/b",), "a/b"), (("x" * 16,), "x" * 16), (("wg0", "--nonsense"), "--nonsense"),
     (("wg0", "--user", "nosuchuser"), "nosuchuser")],
)  # fmt: skip
def test_bad_use_says_so(host: Host, words: tuple[str, ...], problem: str) -> None:
    said = host.run(str(host.program), *words, check=False)
    assert said.startswith("fasttun: ")
    assert problem.lower() in said.lower()
    assert said.count("\n") == 1
    assert host.ns.devices() == {"lo"}


@pytest.mark.parametrize("variable", ["WG_TUN_FD", "WG_UAPI_FD"])
@pytest.mark.parametrize("value", ["x", "-1", "99"])
def test_bad_descriptors_say_so(host: Host, variable: str, value: str) -> None:
    said = host.run(str(host.program), "wg0", check=False, **{variable: value})
    assert said.startswith("fasttun: ")
    assert host.processes() == []
    assert host.ns.devices() == {"lo"}


@pytest.mark.parametrize(("words", "env"), [(("-f", "wg0"), {}), (("wg0",), {"WG_PROCESS_FOREGROUND": "1"}),
                                            (("--foreground", "wg0"), {"LOG_LEVEL": "verbose"})])
def test_in_the_foreground(host: Host, words: tuple[str, ...], env: dict[str, str]) -> None:
    process = host.popen(*words, **env)
    wait_until(lambda: (host.sockets / "wg0.sock").exists(), what="the control socket")
    assert host.wg("show", "interfaces") == "wg0\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=SHUT_S)
    assert process.returncode == 0
    assert ("wg0 is there" in said) == ("LOG_LEVEL" in env)


def test_log_level_silent_is_silent(host: Host) -> None:
    for level, says in (("silent", False), ("error", False), ("verbose", True), ("nonsense", False)):
        process = host.popen("-f", "wg0", LOG_LEVEL=level)
        wait_until(lambda: (host.sockets / "wg0.sock").exists(), what="the control socket")
        host.run("sh", "-c", "wg set wg0 peer $(wg genkey | wg pubkey) allowed-ips 10.0.0.0/8")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=SHUT_S)
        assert bool(said) == says, said


def test_descriptors_handed_over(host: Host, tmp_path: Path) -> None:
    """As wireguard-go's parent does for its child."""
    starter = (
        "import fcntl, os, socket, struct, sys\n"
        "tun = os.open('/dev/net/tun', os.O_RDWR)\n"
        "fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH22x', b'wg7', 0x1001))\n"
        "sock = socket.socket(socket.AF_UNIX)\n"
        "sock.bind('/run/wireguard/wg7.sock')\n"
        "sock.listen()\n"
        "os.set_inheritable(tun, True); os.set_inheritable(sock.fileno(), True)\n"
        "os.environ.update(WG_TUN_FD=str(tun), WG_UAPI_FD=str(sock.fileno()), WG_PROCESS_FOREGROUND='1')\n"
        "os.execv(sys.argv[1], [sys.argv[1], 'wg7'])\n"
    )
    process = host.ns.popen(
        ["sh", "-c", INSIDE, str(host.sockets), sys.executable, "-c", starter, str(host.program)])
    wait_until(lambda: "wg7" in host.ns.devices() and (host.sockets / "wg7.sock").exists(), what="wg7")
    assert wait_until(lambda: host.wg("show", "wg7", "listen-port").strip().isdecimal())
    host.ns.ip("link", "set", "wg7", "up")
    host.wg("set", "wg7", "fwmark", "9")
    assert host.wg("show", "wg7", "fwmark") == "0x9\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(SHUT_S) == 0
    assert os.listdir(host.sockets) == []
    assert "wg7" not in host.ns.devices()


def test_another_user_keeps_what_it_needs(host: Host) -> None:
    host.start("wg0", "--user", "nobody")
    (pid,) = host.processes()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["Uid"].split() == [str(pwd.getpwnam("nobody").pw_uid)] * 4
    assert int(status["CapEff"], 16) == 1 << 12
    for tid in os.listdir(f"/proc/{pid}/task"):
        text = Path(f"/proc/{pid}/task/{tid}/status").read_text()
        assert int(re.search(r"CapEff:\t(\w+)", text)[1], 16) in (0, 1 << 12)  # type: ignore[index]
    host.wg("set", "wg0", "listen-port", "4444", "fwmark", "77")
    assert host.wg("show", "wg0", "fwmark") == "0x4d\n"
    assert host.wg("show", "wg0", "listen-port") == "4444\n"
    os.unlink(host.sockets / "wg0.sock")
    host.ended()
    assert not host.there()


def test_other_files_that_go_do_not_end_it(host: Host) -> None:
    host.start("wg0")
    host.start("wg1")
    host.ns.ip("link", "delete", "wg1")
    wait_until(lambda: len(host.processes()) == 1, SHUT_S)
    assert host.wg("show", "interfaces") == "wg0\n"


# --------------------------------------------------------------------------------- `wg`, its whole surface


def test_every_wg_subcommand(host: Host, tmp_path: Path) -> None:
    own, other, third = (PrivateKey.generate() for _ in range(3))
    secret = PresharedKey.generate()
    for name, text in (("own", own.to_base64()), ("psk", secret.to_base64())):
        (tmp_path / name).write_text(text)
    peer, second = str(other.public), str(third.public)
    host.start("wg0")
    host.wg("set", "wg0", "private-key", str(tmp_path / "own"), "listen-port", "51820", "fwmark", "0x1234",
            "peer", peer, "preshared-key", str(tmp_path / "psk"), "endpoint", "192.0.2.1:9", "persistent-keepalive",
            "25", "allowed-ips", "10.1.0.0/16,fd01::/64", "peer", second, "allowed-ips", "10.2.0.0/16")

    def show(what: str) -> str:
        return host.wg("show", "wg0", what)

    def rows(what: str) -> dict[str, str]:
        return dict(line.split("\t", 1) for line in show(what).splitlines())

    assert show("public-key").strip() == str(own.public)
    assert show("private-key").strip() == own.to_base64()
    assert (show("listen-port"), show("fwmark")) == ("51820\n", "0x1234\n")
    assert show("peers").split() == [peer, second]
    assert rows("preshared-keys") == {peer: secret.to_base64(), second: "(none)"}
    assert rows("endpoints") == {peer: "192.0.2.1:9", second: "(none)"}
    assert {key: set(value.split()) for key, value in rows("allowed-ips").items()} == {
        peer: {"10.1.0.0/16", "fd01::/64"}, second: {"10.2.0.0/16"}}
    assert rows("persistent-keepalive") == {peer: "25", second: "off"}
    assert rows("latest-handshakes") == {peer: "0", second: "0"}
    assert set(rows("transfer")) == {peer, second}
    assert host.wg("show", "all", "dump").startswith(f"wg0\t{own.to_base64()}\t{own.public}\t51820\t0x1234\n")

    configuration = host.wg("showconf", "wg0")
    host.wg("set", "wg0", "peer", second, "allowed-ips", "10.1.0.0/16")
    assert set(rows("allowed-ips")[peer].split()) == {"fd01::/64"}, "an allowed IP moves"
    host.wg("set", "wg0", "peer", peer, "preshared-key", "/dev/null", "persistent-keepalive", "off",
            "endpoint", "[2001:db8::5]:65535")
    assert (rows("preshared-keys")[peer], rows("persistent-keepalive")[peer]) == ("(none)", "off")
    assert rows("endpoints")[peer] == "[2001:db8::5]:65535"
    host.wg("set", "wg0", "peer", second, "remove")
    assert show("peers").split() == [peer]
    host.wg("addconf", "wg0", "/dev/stdin", input=f"[Peer]\nPublicKey = {second}\nAllowedIPs = 10.9.0.0/16\n")
    assert rows("allowed-ips")[second] == "10.9.0.0/16"
    host.wg("syncconf", "wg0", "/dev/stdin", input=configuration)
    assert host.wg("showconf", "wg0") == configuration
    host.wg("setconf", "wg0", "/dev/stdin", input="[Interface]\n")
    assert host.wg("showconf", "wg0") == "[Interface]\nListenPort = 51820\n" or show("peers") == ""
    host.wg("setconf", "wg0", "/dev/stdin", input=configuration)
    assert host.wg("showconf", "wg0") == configuration


def test_what_wg_is_told_when_it_cannot_be(host: Host, tmp_path: Path) -> None:
    host.start("wg0")
    with host.ns.enter():
        taken = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with taken:
        taken.bind(("::", 7777))
        assert "Address already in use" in host.run("wg", "set", "wg0", "listen-port", "7777", check=False)
    host.wg("set", "wg0", "listen-port", "7777")
    own = PrivateKey.generate()
    (tmp_path / "own").write_text(own.to_base64())
    host.wg("set", "wg0", "private-key", str(tmp_path / "own"), "peer", str(own.public), "allowed-ips", "10.0.0.0/8")
    assert host.wg("show", "wg0", "peers") == "", "its own key as a peer is passed over"


def join(a: Host, b: Host, outer_a: str, outer_b: str, directory: Path) -> tuple[PrivateKey, PrivateKey]:
    """wg0 on both hosts, told of each other; 10.7.0.1 and .2."""
    keys = PrivateKey.generate(), PrivateKey.generate()
    ends = (a, keys[0], keys[1], outer_b), (b, keys[1], keys[0], outer_a)
    for number, (host, own, other, outer) in enumerate(ends):
        host.start("wg0")
        host.wg("setconf", "wg0", "/dev/stdin", input=(
            f"[Interface]\nPrivateKey = {own.to_base64()}\nListenPort = 51820\n[Peer]\nPublicKey = {other.public}\n"
            f"Endpoint = {outer}:51820\nAllowedIPs = 10.7.0.0/24\n"))
        host.ns.ip("address", "add", f"10.7.0.{number + 1}/24", "dev", "wg0")
        host.ns.ip("link", "set", "wg0", "up")
    return keys


def ping(host: Host, address: str, count: int = 1) -> None:
    host.ns.run(["ping", "-c", str(count), "-i", "0.01", "-W", "3", address])


def test_live_changes_lose_nothing(pair: tuple[Host, Host, str, str], tmp_path: Path) -> None:
    a, b, outer_a, outer_b = pair
    keys = join(a, b, outer_a, outer_b, tmp_path)
    ping(a, "10.7.0.2")
    flood = a.ns.popen(["ping", "-i", "0.01", "-c", "150", "-W", "2", "10.7.0.2"])
    time.sleep(0.2)
    a.wg("set", "wg0", "listen-port", "51999")
    a.wg("set", "wg0", "fwmark", "5")
    a.wg("set", "wg0", "peer", str(PrivateKey.generate().public), "allowed-ips", "10.8.0.0/24")
    a.wg("set", "wg0", "peer", str(keys[1].public), "persistent-keepalive", "1",
         "allowed-ips", "10.7.0.0/24,10.9.0.0/24")
    b.wg("set", "wg0", "listen-port", "51998")
    said, _ = flood.communicate(timeout=20)
    received = int(re.search(r"(\d+) received", said)[1])  # type: ignore[index]
    assert received >= 148, "at most what was on the way when a port changed"
    assert b.wg("show", "wg0", "endpoints").split()[1] == f"{outer_a}:51999"
    transfer = a.wg("show", "wg0", "transfer").splitlines()[0].split()
    assert transfer[0] == str(keys[1].public)
    assert min(map(int, transfer[1:])) > 100 * 100
    assert abs(time.time() - int(a.wg("show", "wg0", "latest-handshakes").split()[1])) < 10


# -------------------------------------------------------------------------------------------- wg-quick


def quick_file(host: Host, text: str) -> str:
    path = host.directory / "wg0.conf"
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def quick(host: Host, *words: str) -> str:
    return host.run("wg-quick", *words, WG_QUICK_USERSPACE_IMPLEMENTATION="fasttun-wg")


def test_wg_quick_up_and_down(pair: tuple[Host, Host, str, str], tmp_path: Path) -> None:
    if os.path.exists("/sys/module/wireguard"):
        pytest.skip("wg-quick prefers this kernel's own WireGuard")
    a, b, outer_a, outer_b = pair
    keys = PrivateKey.generate(), PrivateKey.generate()
    paths = []
    ends = (a, keys[0], keys[1], outer_b), (b, keys[1], keys[0], outer_a)
    for number, (host, own, other, outer) in enumerate(ends):
        paths.append(quick_file(host, (
            f"[Interface]\nPrivateKey = {own.to_base64()}\nListenPort = 51820\nAddress = 10.7.0.{number + 1}/24, "
            f"fd07::{number + 1}/64\nMTU = 1380\nPostUp = ip link set %i alias up\n"
            f"SaveConfig = {'true' if number else 'false'}\n"
            f"[Peer]\nPublicKey = {other.public}\nEndpoint = {outer}:51820\nAllowedIPs = 10.7.0.0/24, fd07::/64\n")))
        quick(host, "up", paths[-1])
    ping(a, "10.7.0.2")
    ping(b, "fd07::1")
    (link,) = a.ns.ip_json("link", "show", "wg0")
    assert (link["mtu"], link["ifalias"]) == (1380, "up")
    b.wg("set", "wg0", "peer", str(keys[0].public), "persistent-keepalive", "17")
    quick(b, "save", paths[1])
    assert "PersistentKeepalive = 17" in Path(paths[1]).read_text()
    assert f"PrivateKey = {keys[1].to_base64()}" in quick(b, "strip", paths[1])
    for host, path in zip((a, b), paths, strict=True):
        quick(host, "down", path)
        host.ended()
        assert not host.there()
        assert os.listdir(host.sockets) == []


def test_wg_quick_with_a_default_route(pair: tuple[Host, Host, str, str], tmp_path: Path) -> None:
    """0.0.0.0/0 through the tunnel: the mark keeps the tunnel's own datagrams out of it."""
    if os.path.exists("/sys/module/wireguard"):
        pytest.skip("wg-quick prefers this kernel's own WireGuard")
    a, b, outer_a, _ = pair
    server, client = PrivateKey.generate(), PrivateKey.generate()
    a.start("wg0")
    a.wg("setconf", "wg0", "/dev/stdin", input=(
        f"[Interface]\nPrivateKey = {server.to_base64()}\nListenPort = 51820\n"
        f"[Peer]\nPublicKey = {client.public}\nAllowedIPs = 10.7.0.2/32\n"))
    a.ns.ip("address", "add", "192.0.2.1/32", "dev", "lo")
    a.ns.ip("address", "add", "10.7.0.1/24", "dev", "wg0")
    a.ns.ip("link", "set", "wg0", "up")
    path = quick_file(b, (
        f"[Interface]\nPrivateKey = {client.to_base64()}\nAddress = 10.7.0.2/32\n"
        f"[Peer]\nPublicKey = {server.public}\nEndpoint = {outer_a}:51820\nAllowedIPs = 0.0.0.0/0, ::/0\n"))
    before = json.dumps(b.ns.ip_json("rule", "show"))
    quick(b, "up", path)
    assert b.wg("show", "wg0", "fwmark") == "0xca6c\n"
    ping(b, "192.0.2.1", 3)
    ping(b, outer_a)
    assert int(b.wg("show", "wg0", "transfer").split()[1]) > 3 * 84
    quick(b, "down", path)
    b.ended()
    assert json.dumps(b.ns.ip_json("rule", "show")) == before
    assert b.ns.run(["ping", "-c1", "-W1", "192.0.2.1"], check=False).returncode != 0
