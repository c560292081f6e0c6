"""The commands and scripts of README.md, run on two hosts with the addresses that it names.

The README writes for two real machines, `$ sudo …` on both and a placeholder where a key belongs; COMMANDS says for
each of its commands on which host it runs here, or why it does not.
Not for: the numbers (tests/unit/test_report.py), the tutorial and the how-tos (test_pages.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.netns import wait_until
from support.transcript import Machine, Shell, blocks

README = Path(__file__).resolve().parents[2] / "README.md"
A, B = "a", "b"
SERVER, CLIENT = "198.51.100.7", "198.51.100.8"

FILLED_IN = {"CLIENTKEY": "$(cat public-b)", "SERVERKEY": "$(cat public-a)", "HOST": SERVER, "listen …": "listen",
             "--endpoint vpn.example.org": f"--endpoint {SERVER}", "sudo ": ""}
"""What stands in the README for something of the reader's. Here all is run by root."""

PLAIN_A = "sudo fasttun --listen --address 10.7.0.1/24"
PLAIN_B = f"sudo fasttun --server {SERVER} --address 10.7.0.2/24"
KEYS = "umask 077; fasttun genkey > key; fasttun pubkey < key"
SEALED_A = "sudo fasttun --listen --address 10.7.0.1/24 --key key --peer CLIENTKEY,10.7.0.2"
SEALED_B = f"sudo fasttun --server {SERVER} --address 10.7.0.2/24 --key key --peer SERVERKEY"
METRICS = "sudo fasttun --listen … --metrics 127.0.0.1:9586"

COMMANDS = {
    PLAIN_A: "run", PLAIN_B: "run", "ping 10.7.0.1": "run", KEYS: "run", SEALED_A: "run", SEALED_B: "run",
    "sudo fasttun up wg0": "run", "sudo wg show wg0": "run", "sudo fasttun down wg0": "run",
    "sudo fasttun invite alice --endpoint vpn.example.org": "run",
    "fasttun status": "run", "fasttun doctor --server HOST": "run", METRICS: "run",
    "pip install '.[wireguard]'": "needs the network; scripts/bootstrap.sh does it",
    "make demo": "tests/netns/test_demo.py",
    "fasttun top": "needs a terminal; tests/observe/test_views.py",
    "fasttun capture -w - | wireshark -k -i -": "needs a display; tests/netns/test_capture.py",
    "fasttun bench": "measures for seconds; tests/netns/test_loadtest.py",
    "make test": "is this", "make docs": "tests/docs/test_site.py",
    "make bench": "takes hours", "make sanitize": "takes minutes; CI runs it",
}


def written() -> list[str]:
    """The commands of the console blocks, without the remarks behind them."""
    return [re.sub(r"\s+# .*", "", line.removeprefix("$ "))
            for block in blocks(README) if block.language == "console" for line in block.text.splitlines()]


def test_every_command_is_decided_on() -> None:
    assert set(written()) == set(COMMANDS)


def script(number: int) -> str:
    return [block.text for block in blocks(README) if block.language == "python"][number]


class Hosts:
    """Two hosts on one cable, with the README's addresses and a directory each."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        host = machine.shell("host")
        self.do(host, f"ip netns add {A}; ip netns add {B}; mkdir {A} {B}")
        self.do(host, f"ip link add eth0 netns {A} type veth peer name eth0 netns {B}")
        self.shells = {name: machine.shell(name) for name in (A, B)}
        for name, address in ((A, SERVER), (B, CLIENT)):
            self.run(name, f"cd {name}; ip address add {address}/24 dev eth0")
            self.run(name, "ip link set lo up; ip link set eth0 up")

    @staticmethod
    def do(shell: Shell, command: str) -> str:
        output, status = shell.run(command)
        assert status == 0, f"{command}\n{output}"
        return output

    def run(self, name: str, command: str) -> str:
        """A command to its end; those of the README with the placeholders filled in."""
        for text, value in FILLED_IN.items():
            command = command.replace(text, value)
        return self.do(self.shells[name], command)

    def start(self, name: str, command: str) -> None:
        self.run(name, f"> log; {command} 2>> log &")

    def end(self, name: str) -> None:
        self.run(name, "kill $!; wait")

    def reaches(self, name: str, address: str) -> None:
        wait_until(lambda: not self.shells[name].run(f"ping -c 1 -W 1 {address}")[1], 10, what=f"{name} to {address}")


@pytest.fixture
def hosts():
    with Machine() as machine:
        yield Hosts(machine)


@pytest.mark.netns
def test_quick_start_and_see_it(hosts: Hosts) -> None:
    hosts.start(A, f"{PLAIN_A} --metrics 127.0.0.1:9586")
    hosts.start(B, PLAIN_B)
    hosts.reaches(B, "10.7.0.1")
    assert "plain" in hosts.run(A, "fasttun status")
    hosts.run(A, "python -c 'import urllib.request as r; r.urlopen(\"http://127.0.0.1:9586/metrics\").read()'")
    hosts.end(B)
    output, _ = hosts.shells[B].run(f"fasttun doctor --server {SERVER}")
    assert SERVER in output
    hosts.end(A)
    assert "tun0" not in hosts.run(A, "ip link") + hosts.run(B, "ip link")


@pytest.mark.netns
def test_encrypted(hosts: Hosts) -> None:
    for name in (A, B):
        hosts.run(name, f"{KEYS} > ../public-{name}; cp key ..; cd ..; mv key key-{name}; cd {name}")
    for name in (A, B):
        hosts.run(name, "cp ../public-* .")
    hosts.start(A, SEALED_A)
    hosts.start(B, SEALED_B)
    hosts.reaches(B, "10.7.0.1")


@pytest.mark.netns
def test_files_and_guests_and_the_class(hosts: Hosts) -> None:
    """`up`, `wg show`, `invite` and the second script, on one /etc/wireguard/wg0.conf."""
    hosts.run(A, "mkdir -p /etc/wireguard; umask 077; printf '[Interface]\\nPrivateKey = %s\\nAddress = 10.7.0.1/24\\n"
                 "ListenPort = 51820\\n' $(fasttun genkey) > /etc/wireguard/wg0.conf")
    hosts.run(A, "sudo fasttun up wg0")
    assert "listening port: 51820" in hosts.run(A, "sudo wg show wg0")
    guest = hosts.run(A, "sudo fasttun invite alice --endpoint vpn.example.org 2> /dev/null")
    hosts.machine.write("alice.conf", guest)
    hosts.run(B, "umask 077; cat ../alice.conf > alice.conf; fasttun up ./alice.conf")
    hosts.reaches(B, "10.7.0.1")
    assert "alice" in hosts.run(A, "fasttun peers")
    hosts.run(A, "fasttun revoke alice")
    assert hosts.shells[B].run("ping -c 1 -W 1 10.7.0.1")[1] != 0
    hosts.run(A, "sudo fasttun down wg0")
    hosts.machine.write("second.py", script(1))
    assert hosts.run(A, "python ../second.py") == "()\n"


@pytest.mark.netns
def test_from_python(hosts: Hosts) -> None:
    hosts.start(A, PLAIN_A)
    wait_until(lambda: "listens" in hosts.run(A, "cat log"), 10)
    hosts.machine.write("first.py", script(0))
    assert hosts.run(B, "python ../first.py").startswith("Stats(uptime_s=")


def test_there_are_two_scripts() -> None:
    assert len([block for block in blocks(README) if block.language == "python"]) == 2


def test_the_sites_start_page_shows_the_first_script() -> None:
    page = README.parent / "docs" / "index.md"
    assert [block.text for block in blocks(page) if block.language == "python"] == [script(0)]
