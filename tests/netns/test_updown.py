"""`fasttun up` and `fasttun down` on hosts of their own, with users' files as they are found in the wild."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.netns import Lab, Namespace, assert_unchanged, snapshot, wait_until

from fasttun.wireguard.keys import PrivateKey

FASTTUN = (sys.executable, "-m", "fasttun")


def gone(number: int) -> bool:
    """Whether the process has ended; who inherits it may take its time to notice."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Keys:
    def __init__(self) -> None:
        private = PrivateKey.generate()
        self.private = private.to_base64()
        self.public = str(private.public)


SERVER, CLIENT, OTHER = Keys(), Keys(), Keys()


class Host:
    """A host whose /run, /etc/wireguard and resolver are its own: a mount namespace beside the network's."""

    def __init__(self, ns: Namespace, directory: Path) -> None:
        self.ns = ns
        self.etc = directory / f"{ns.name}-etc"
        self.run_directory = directory / f"{ns.name}-run"
        self.bin = directory / f"{ns.name}-bin"
        for path in (self.etc, self.run_directory / "wireguard", self.bin):
            path.mkdir(parents=True)
        self.etc.chmod(0o700)
        self.holder = ns.popen([
            "unshare", "--mount", "sh", "-c",
            f"mkdir -p /etc/wireguard /run/wireguard; mount --bind {self.etc} /etc/wireguard; "
            f"mount --bind {self.run_directory}/wireguard /run/wireguard; echo; exec sleep 600",
        ])
        assert self.holder.stdout is not None
        self.holder.stdout.readline()
        self.runtime = self.run_directory / "fasttun"

    def words(self, *command: Any) -> list[str]:
        environment = {
            "FASTTUN_RUNTIME_DIR": str(self.runtime),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "OUT": str(self.run_directory),
        }
        inside = ["nsenter", f"--target={self.holder.pid}", "--mount", "--"]
        return [*inside, "env", *(f"{name}={value}" for name, value in environment.items()), *map(str, command)]

    def run(self, *command: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.ns.run(self.words(*command), check=check)

    def fasttun(self, *words: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(*FASTTUN, *words, check=check)

    def refused(self, *words: Any, status: int = 1) -> str:
        """The one line of error."""
        done = self.fasttun(*words, check=False)
        assert done.returncode == status, done.stderr
        assert done.stderr.count("\n") >= 1
        return done.stderr.splitlines()[-1]

    def file(self, name: str, text: str) -> Path:
        path = self.etc / f"{name}.conf"
        path.write_text(text)
        path.chmod(0o600)
        return path

    def tool(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def out(self, name: str) -> str:
        path = self.run_directory / name
        return path.read_text() if path.exists() else ""

    def process(self, name: str = "wg0") -> int:
        return int((self.runtime / f"{name}.pid").read_text())

    def kill(self, name: str = "wg0") -> None:
        number = self.process(name)
        os.kill(number, signal.SIGKILL)
        wait_until(lambda: gone(number) and name not in self.ns.devices())

    def left(self) -> list[str]:
        """The runtime directory, without sockets of `fasttun status`, which takes away stale ones itself."""
        files = self.runtime.iterdir() if self.runtime.exists() else ()
        return sorted(path.name for path in files if path.suffix != ".sock")

    def ping(self, target: str, count: int = 1) -> bool:
        return self.ns.run(["ping", "-c", str(count), "-W", "3", target], check=False).returncode == 0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def host(lab: Lab, directory: Path) -> Host:
    """A host with a network and a default route that answers nothing beyond it."""
    ns, _, link = lab.pair()
    ns.ip("route", "add", "default", "via", link.b.v4)
    ns.ip("-6", "route", "add", "default", "via", link.b.v6)
    return Host(ns, directory)


ALONE = f"""[Interface]
PrivateKey = {CLIENT.private}
Address = 10.9.0.2/24
"""
FULL = f"""{ALONE}
[Peer]
PublicKey = {SERVER.public}
AllowedIPs = 0.0.0.0/0, ::/0
Endpoint = 10.99.0.2:51820
"""

pytestmark = pytest.mark.netns


# ----------------------------------------------------------------------------------------- files from the wild

# A server as dozens of how-tos have it: it forwards and masquerades what its clients send.
NAT_SERVER = f"""\
[Interface]
Address = 10.66.66.1/24,fd42:42:42::1/64
ListenPort = 51820
PrivateKey = {SERVER.private}
PostUp = iptables -I INPUT -p udp --dport 51820 -j ACCEPT
PostUp = iptables -I FORWARD -i eth0 -o %i -j ACCEPT
PostUp = iptables -I FORWARD -i %i -j ACCEPT
PostUp = iptables -t nat -A POSTROUTING -o eth1 -j MASQUERADE; ip6tables -t nat -A POSTROUTING -o eth1 -j MASQUERADE
PostDown = iptables -D INPUT -p udp --dport 51820 -j ACCEPT
PostDown = iptables -D FORWARD -i eth0 -o %i -j ACCEPT
PostDown = iptables -D FORWARD -i %i -j ACCEPT
PostDown = iptables -t nat -D POSTROUTING -o eth1 -j MASQUERADE; ip6tables -t nat -D POSTROUTING -o eth1 -j MASQUERADE

### Client phone
[Peer]
PublicKey = {CLIENT.public}
AllowedIPs = 10.66.66.2/32,fd42:42:42::2/128

# laptop
[peer]
publickey={OTHER.public}
AllowedIPs=10.66.66.3/32
"""
# A phone: everything through the tunnel, names too, and nothing beside it (the kill switch of wg-quick(8)).
EXIT_CLIENT = f"""\
[Interface]
PrivateKey = {CLIENT.private}
Address = 10.66.66.2/32,fd42:42:42::2/128
DNS = 10.66.66.1, fd42:42:42::1, corp.example
PostUp = iptables -I OUTPUT ! -o %i -m mark ! --mark $(wg show %i fwmark) -m addrtype ! --dst-type LOCAL -j REJECT
PostUp = ip6tables -I OUTPUT ! -o %i -m mark ! --mark $(wg show %i fwmark) -m addrtype ! --dst-type LOCAL -j REJECT
PreDown = iptables -D OUTPUT ! -o %i -m mark ! --mark $(wg show %i fwmark) -m addrtype ! --dst-type LOCAL -j REJECT
PreDown = ip6tables -D OUTPUT ! -o %i -m mark ! --mark $(wg show %i fwmark) -m addrtype ! --dst-type LOCAL -j REJECT

[Peer]
PublicKey = {SERVER.public}
Endpoint = 10.99.0.2:51820
AllowedIPs = 0.0.0.0/0,::/0
PersistentKeepalive = 25
"""
# Two sites that leave the routing to a routing daemon, or to hooks.
SITE = """\
[Interface]
Address = {address}
PrivateKey = {private}
ListenPort = 51821
Table = off
MTU = 1400
PostUp = ip route add {network} dev %i
PreDown = ip route del {network} dev %i

[Peer]
PublicKey = {public}
AllowedIPs = 0.0.0.0/0
Endpoint = {endpoint}:51821
"""


def test_an_exit_node_and_its_client(lab: Lab, directory: Path) -> None:
    """All of the client's packets leave by the server, under its address; the tunnel's own do not go in circles."""
    for program in ("iptables", "wg"):
        if not shutil.which(program):
            pytest.skip(f"needs {program} (apt install iptables wireguard-tools)")
    client, gate, world, near, far = lab.routed()
    a, b = Host(client, directory), Host(gate, directory)
    a.tool("resolvconf", '#!/bin/sh\necho "$@" >> $OUT/resolvconf; [ $1 = -d ] || cat >> $OUT/resolvconf\n')
    for version in (4, 6):  # the world knows the gate alone
        world.ip(f"-{version}", "route", "del", "default")
    before = {host.ns: snapshot(host.ns) for host in (a, b)}
    b.file("wg0", NAT_SERVER)
    a.file("wg0", EXIT_CLIENT)
    b.fasttun("up", "wg0")
    a.fasttun("up", "wg0")
    assert client.ip_json("link", "show", "wg0")[0]["mtu"] == 1420
    assert a.ping(far.b.v4)
    assert a.ping(far.b.v6)
    assert not a.ping(near.b.v4), "the kill switch: not even the neighbour"
    assert "-x\nnameserver 10.66.66.1\nnameserver fd42:42:42::1\nsearch corp.example\n" in a.out("resolvconf")
    with world.enter(), socket.create_server(("", 7000)) as listener:
        listener.settimeout(5)
        reader = client.popen(["bash", "-c", f"wc -c < /dev/tcp/{far.b.v4}/7000"])
        connection, (source, _) = listener.accept()
        connection.settimeout(10)
        with connection:
            assert source == far.a.v4, "the server's own address"
            connection.sendall(b"x" * 3_000_000)
        assert int(reader.communicate(timeout=20)[0]) == 3_000_000
    shown = a.run("wg", "show", "wg0").stdout
    assert "fwmark: 0xca6c" in shown
    assert "latest handshake" in shown
    a.fasttun("down", "wg0")
    b.fasttun("down", b.etc / "wg0.conf")
    assert a.out("resolvconf").endswith("-d wg0 -f\n")
    for host, state in before.items():
        assert_unchanged(host, state)
        for program in ("iptables-save", "ip6tables-save"):
            assert not [line for line in host.run([program]).stdout.splitlines() if line.startswith("-A")]
    assert a.left() == b.left() == []


def test_two_sites_with_routes_of_their_own(lab: Lab, directory: Path) -> None:
    left, right, link = lab.pair()
    hosts = []
    for ns, own, other, end, network in (
        (left, CLIENT, SERVER, link.b, "192.168.20.0/24"),
        (right, SERVER, CLIENT, link.a, "192.168.10.0/24"),
    ):
        number = 1 if ns is left else 2
        ns.ip("address", "add", f"192.168.{number}0.1/24", "dev", "lo")
        host = Host(ns, directory)
        host.file("site", SITE.format(
            address=f"10.100.0.{number}/32", private=own.private, public=other.public, endpoint=end.v4,
            network=network))
        hosts.append(host)
    before = {host.ns: snapshot(host.ns) for host in hosts}
    for host in hosts:
        host.fasttun("up", "site")
        assert host.ns.ip_json("link", "show", "site")[0]["mtu"] == 1400
        assert "lookup main suppress" not in host.ns.ip("rule")
    assert left.run(["ping", "-c1", "-W3", "-I", "192.168.10.1", "192.168.20.1"])
    for host in hosts:
        host.fasttun("down", "site")
    for ns, state in before.items():
        assert_unchanged(ns, state)


def test_a_key_that_a_hook_sets(host: Host) -> None:
    """As wg-quick(8) shows it: no key in the file; `wg` finds the tunnel while hooks run."""
    if not shutil.which("wg"):
        pytest.skip("needs wg (apt install wireguard-tools)")
    text = ALONE.replace(f"PrivateKey = {CLIENT.private}", f"PostUp = wg set %i private-key <(echo {CLIENT.private})")
    host.file("wg0", text)
    host.fasttun("up", "wg0")
    assert CLIENT.public in host.run("wg", "show", "wg0", "public-key").stdout
    host.fasttun("down", "wg0")


# -------------------------------------------------------------------------------------------------- up and down


def test_hooks_run_in_order_around_the_device(host: Host) -> None:
    kinds = ("PreUp", "PostUp", "PreDown", "PostDown")
    look = "ip -br address show dev %i 2> /dev/null | grep -q 10.9.0.2 && echo {0} with || echo {0} without"
    hooks = "".join(f"{kind} = ({look.format(kind)}) >> $OUT/order\n" for kind in kinds)
    host.file("wg0", ALONE + hooks)
    done = host.fasttun("up", "wg0")
    assert "PostUp: (ip -br address show dev wg0" in done.stderr
    host.fasttun("down", "wg0")
    assert host.out("order").splitlines() == ["PreUp without", "PostUp with", "PreDown with", "PostDown without"]


def test_up_says_what_it_did_not_do(host: Host) -> None:
    before = snapshot(host.ns)
    assert "/etc/wireguard/wg0.conf: No such file" in host.refused("up", "wg0")
    assert "NAME.conf" in host.refused("up", "/etc/passwd")
    assert "15 letters" in host.refused("up", f"/tmp/{'x' * 16}.conf")
    path = host.file("wg0", ALONE + "[Peer]\nPublicKey = nonsense\n")
    assert f"{path.name}:5: PublicKey" in host.refused("up", "wg0")
    host.file("wg0", ALONE + "Table = nowhere\nPreUp = touch $OUT/ran\n")
    assert "Table" in host.refused("up", "wg0")
    assert host.out("ran") == ""
    host.file("eth0", ALONE)
    assert "exists already" in host.refused("up", "eth0")
    assert "not up" in host.refused("down", "wg0")
    assert host.left() == []
    assert_unchanged(host.ns, before)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("PreUp = echo >&2 no luck; exit 3", "PreUp command 1 of wg0 failed with exit status 3"),
        ("PostUp = false", "PostUp command 1 of wg0"),
        ("DNS = 10.9.0.1", "apt install openresolv"),
        ("MTU = 1000\nAddress = fd09::2/64", "1280"),
    ],
)
def test_a_set_up_that_fails_is_undone(host: Host, line: str, says: str) -> None:
    before = snapshot(host.ns)
    host.ns.sysctl("net.ipv4.conf.all.src_valid_mark", 0)
    host.file("wg0", FULL.replace("[Peer]", f"{line}\n[Peer]"))
    assert says in host.refused("up", "wg0")
    assert host.ns.sysctl("net.ipv4.conf.all.src_valid_mark") == "0"
    assert host.run("nft", "list", "ruleset").stdout == ""
    assert host.left() == []
    assert_unchanged(host.ns, before)
    assert os.listdir(host.run_directory / "wireguard") == []


def test_up_twice_is_an_error_that_names_the_process(host: Host) -> None:
    host.file("wg0", ALONE)
    host.fasttun("up", "wg0")
    number = host.process()
    assert f"wg0 is up already (process {number})" in host.refused("up", "wg0")
    assert host.process() == number
    host.fasttun("down", "wg0")
    wait_until(lambda: gone(number), 1)
    assert "not up" in host.refused("down", "wg0")


def test_of_two_at_once_one_wins(host: Host) -> None:
    host.file("wg0", ALONE)
    racers = [host.ns.popen(host.words(*FASTTUN, "up", "wg0")) for _ in range(3)]
    assert sorted(racer.wait(20) for racer in racers) == [0, 1, 1]
    host.fasttun("down", "wg0")
    assert host.left() == []


def test_the_background_process_keeps_nothing_of_its_caller(host: Host) -> None:
    host.file("wg0", ALONE)
    with subprocess.Popen(
        ["ip", "netns", "exec", host.ns.name, *host.words(*FASTTUN, "up", "wg0")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:
        out, _ = process.communicate(timeout=20)  # ends only when nobody holds the pipes
    assert "wg0 (10.9.0.2/24, MTU 1420) is up" in out
    number = host.process()
    assert os.getsid(number) == number
    assert os.readlink(f"/proc/{number}/cwd") == "/"
    assert {os.readlink(f"/proc/{number}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    os.kill(number, signal.SIGHUP)
    time.sleep(0.1)
    assert not gone(number), "a hang-up is nothing to it"
    host.fasttun("down", "wg0")


GATE = f"""[Interface]
PrivateKey = {SERVER.private}
Address = 10.9.0.1/24
ListenPort = 51820

[Peer]
PublicKey = {CLIENT.public}
AllowedIPs = 10.9.0.2/32
"""
NEW_PEER = f"""
[Peer]
PublicKey = {OTHER.public}
AllowedIPs = 10.9.0.3/32, 10.77.0.0/24
Endpoint = 10.99.0.2:4
"""


def test_a_changed_file_is_taken_over_on_sighup_and_sessions_go_on(lab: Lab, directory: Path) -> None:
    """A peer comes, is changed and goes; the other one's session is the same throughout, and loses no packet."""
    a, b, link = lab.pair()
    server, client = Host(a, directory), Host(b, directory)
    server.file("wg0", GATE)
    client.file("wg0", f"{ALONE}[Peer]\nPublicKey = {SERVER.public}\nAllowedIPs = 10.9.0.0/24\n"
                       f"Endpoint = {link.a.v4}:51820\n")
    log = directory / "log"
    with open(log, "w") as stderr:
        process = a.popen(server.words(*FASTTUN, "up", "-f", "wg0"), stderr=stderr)

    def reload(text: str, expected: str) -> str:
        """SIGHUP with that file; the line that tells what came of it."""
        server.file("wg0", text)
        size = log.stat().st_size
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: expected in log.read_text()[size:], what=f"{expected}: {log.read_text()}")
        return log.read_text()[size:]

    def shown(what: str) -> dict[str, str]:
        rows = [row.split(maxsplit=1) for row in server.run("wg", "show", "wg0", what).stdout.splitlines()]
        return {row[0]: row[1] if len(row) > 1 else "" for row in rows}

    wait_until(lambda: "is up" in log.read_text(), 15)
    client.fasttun("up", "wg0")
    assert client.ping("10.9.0.1")
    session = shown("latest-handshakes")[CLIENT.public]
    time.sleep(1.1)  # handshakes are told in seconds
    pings = b.popen(["ping", "-q", "-i0.05", "-c40", "-W2", "10.9.0.1"])

    told = reload(GATE + NEW_PEER, "SIGHUP: ")
    assert "wg0.conf: peers: 1 added, 0 removed, 0 changed" in told
    assert shown("allowed-ips") == {CLIENT.public: "10.9.0.2/32", OTHER.public: "10.9.0.3/32 10.77.0.0/24"}
    assert shown("endpoints")[OTHER.public] == "10.99.0.2:4"
    assert "10.77.0.0/24" in a.ip("route", "show", "dev", "wg0")

    changed = NEW_PEER.replace("10.77.0.0/24", "10.78.0.0/24").replace("10.99.0.2:4", "localhost:5")
    told = reload(GATE.replace("10.9.0.1/24", "10.9.0.1/16") + changed + "PersistentKeepalive = 7\n", "SIGHUP: ")
    assert "peers: 0 added, 0 removed, 1 changed; at the next start: Address\n" in told
    assert shown("allowed-ips")[OTHER.public] == "10.9.0.3/32 10.78.0.0/24"
    assert shown("persistent-keepalive") == {CLIENT.public: "off", OTHER.public: "7"}
    assert shown("endpoints")[OTHER.public] in ("127.0.0.1:5", "[::1]:5")
    routes = a.ip("route", "show", "dev", "wg0")
    assert "10.78.0.0/24" in routes
    assert "10.77.0.0/24" not in routes
    assert "10.9.0.0/24" in routes, "the kernel's own route stays"

    for broken, problem in ((f"{GATE}[Peer]\nPublicKey = x\n", "wg0.conf:10: PublicKey: has 1 characters"),
                            (f"{GATE}[Peer]\nPublicKey = {SERVER.public}\n", "wg0.conf: PublicKey: ")):
        told = reload(broken, "everything goes on as before")
        assert told.count("\n") == 1, told
        assert problem in told
        assert set(shown("peers")) == {CLIENT.public, OTHER.public}

    told = reload(GATE, "SIGHUP: ")
    assert "peers: 0 added, 1 removed, 0 changed" in told
    assert set(shown("peers")) == {CLIENT.public}
    assert "10.78.0.0/24" not in a.ip("route", "show", "dev", "wg0")
    out, _ = pings.communicate(timeout=20)
    assert ", 0% packet loss" in out
    assert shown("latest-handshakes")[CLIENT.public] == session
    client.fasttun("down", "wg0")
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0


def test_in_the_foreground_it_tells_systemd_and_ends_by_signal(host: Host, directory: Path) -> None:
    before = snapshot(host.ns)
    host.file("wg0", FULL)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(directory / "notify"))
        channel.settimeout(15)
        process = host.ns.popen(host.words("env", f"NOTIFY_SOCKET={directory}/notify", *FASTTUN, "up", "-f", "wg0"))
        assert channel.recv(1000).startswith(b"READY=1")
        assert host.process() == process.pid
        process.send_signal(signal.SIGTERM)
        assert channel.recv(1000).startswith(b"STOPPING=1")
    assert process.wait(15) == 0
    assert_unchanged(host.ns, before)


def test_an_interrupt_in_the_middle_of_up_undoes_it(host: Host) -> None:
    """Ctrl-C reaches the hook, the parent and the child; the shell gets its prompt when all is undone."""
    before = snapshot(host.ns)
    host.file("wg0", FULL.replace("[Peer]", "PostUp = touch $OUT/there; exec sleep 60\n[Peer]"))
    process = host.ns.popen(host.words(*FASTTUN, "up", "wg0"), start_new_session=True)
    wait_until(lambda: (host.run_directory / "there").exists(), 15)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(15) == 1
    assert process.stderr is not None
    assert "PostUp command 1 of wg0 was ended by a signal: Interrupt" in process.stderr.read()
    assert host.left() == []
    assert_unchanged(host.ns, before)


def test_down_while_it_comes_up(host: Host) -> None:
    before = snapshot(host.ns)
    host.file("wg0", FULL.replace("[Peer]", "PreUp = touch $OUT/there; sleep 0.5\n[Peer]"))
    process = host.ns.popen(host.words(*FASTTUN, "up", "wg0"))
    wait_until(lambda: (host.run_directory / "there").exists(), 15)
    host.fasttun("down", "wg0")
    assert process.wait(15) == 128 + signal.SIGTERM
    assert_unchanged(host.ns, before)


def test_down_passes_on_what_failed_and_the_rest_is_undone(host: Host) -> None:
    before = snapshot(host.ns)
    host.tool("resolvconf", "#!/bin/sh\n[ $1 != -d ] || { echo resolver on strike >&2; exit 1; }\n")
    host.file("wg0", FULL.replace("[Peer]", "DNS = 10.9.0.1\nPostDown = false\nPostDown = touch $OUT/second\n[Peer]"))
    host.fasttun("up", "wg0")
    error = host.refused("down", "wg0")
    assert "PostDown command 1 of wg0 failed" in error
    assert error.count("resolver on strike") == 1
    assert (host.run_directory / "second").exists()
    assert_unchanged(host.ns, before)
    assert host.left() == []


@pytest.mark.parametrize("then", ["down", "up"])
def test_what_a_killed_tunnel_left_is_taken_away(host: Host, then: str) -> None:
    before = snapshot(host.ns)
    host.ns.sysctl("net.ipv4.conf.all.src_valid_mark", 0)
    host.tool("resolvconf", '#!/bin/sh\necho "$@" >> $OUT/resolvconf; [ $1 = -d ] || cat > /dev/null\n')
    host.file("wg0", FULL.replace("[Peer]", "DNS = 10.9.0.1\nPostUp = true\nPostDown = echo %i >> $OUT/post\n[Peer]"))
    host.fasttun("up", "wg0")
    host.kill()
    assert host.left() == ["wg0.pid", "wg0.state"]
    assert CLIENT.private not in (host.runtime / "wg0.state").read_text()
    assert snapshot(host.ns).rules != before.rules
    host.fasttun(then, "wg0")
    assert host.out("resolvconf").splitlines()[:2] == ["-a wg0 -m 0 -x", "-d wg0 -f"]
    assert host.out("post") == "wg0\n"
    if then == "up":
        assert len(host.ns.ip("rule").splitlines()) == len(before.rules) - host.ns.ip("-6", "rule").count("\n") + 4
        host.fasttun("down", "wg0")
    assert host.left() == []
    assert host.ns.sysctl("net.ipv4.conf.all.src_valid_mark") == "0"
    assert host.run("nft", "list", "ruleset").stdout == ""
    assert_unchanged(host.ns, before)


def test_save_config_keeps_what_wg_has_changed(host: Host) -> None:
    if not shutil.which("wg"):
        pytest.skip("needs wg (apt install wireguard-tools)")
    path = host.file("wg0", FULL.replace("[Peer]", "SaveConfig = true\nListenPort = 4444\n[Peer]"))
    host.fasttun("up", "wg0")
    host.run("wg", "set", "wg0", "peer", OTHER.public, "allowed-ips", "10.9.0.7/32")
    host.fasttun("down", "wg0")
    text = path.read_text()
    assert OTHER.public in text
    assert "10.9.0.7/32" in text
    assert SERVER.public in text
    assert "FwMark" not in text, "it was chosen, not configured"
    assert path.stat().st_mode & 0o777 == 0o600
    host.fasttun("up", "wg0")
    assert OTHER.public in host.run("wg", "show", "wg0", "peers").stdout
    host.fasttun("down", "wg0")


@pytest.mark.parametrize(
    "how", [("ip", "link", "delete", "wg0"), ("rm", "/run/wireguard/wg0.sock"), ("wg-quick", "down", "wg0")],
    ids=["device", "socket", "wg-quick"],
)
def test_who_ends_the_tunnel_otherwise_ends_its_surroundings(host: Host, how: tuple[str, ...]) -> None:
    if not shutil.which(how[0]):
        pytest.skip(f"needs {how[0]} (apt install wireguard-tools)")
    before = snapshot(host.ns)
    host.file("wg0", FULL)
    host.fasttun("up", "wg0")
    number = host.process()
    host.run(*how)
    wait_until(lambda: gone(number), 10)
    assert host.run("nft", "list", "ruleset").stdout == ""
    assert_unchanged(host.ns, before)
    assert host.left() == []


def test_without_root_it_says_so(host: Host) -> None:
    host.file("wg0", ALONE)
    done = host.run("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *FASTTUN, "up", "wg0", check=False)
    assert done.returncode == 1
    assert "needs root: sudo fasttun up wg0" in done.stderr
    done = host.run("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *FASTTUN, "down", "wg0",
                    check=False)
    assert "needs root: sudo fasttun down wg0" in done.stderr


def test_the_process_that_holds_keys_leaves_no_core() -> None:
    code = "from fasttun.cli.updown import _hide_memory as h; import ctypes; h(); print(ctypes.CDLL(None).prctl(3))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"
