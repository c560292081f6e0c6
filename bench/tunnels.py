"""The tunnels under comparison: one class each, all over the same link with the same inner addresses and MTU.

A tunnel knows how to say what it lacks, how to start on both hosts, and which processes are its own. It knows
nothing of measures and rounds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from fasttun.demo.hosts import Host, HostError, Program

INNER_MTU = 1428  # a UDP payload of 1400 bytes exactly; every tunnel here fits it into the link's 1500
INNER = ("10.99.0.1", "10.99.0.2")
INNER_PREFIX = 24
LINK_DEVICE = "eth0"
PURE_PYTHON = Path(__file__).resolve().with_name("pure_python.py")


class Tunnel(ABC):
    """Joins two hosts. `name` is for JSON and options, `title` for people."""

    name: str
    title: str
    addresses: tuple[str, str] = INNER
    measures: tuple[str, ...] | None = None  # the only ones that say something about it; None: all

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def missing(self) -> str | None:
        """What the machine lacks for it, or None."""
        return None

    def version(self) -> str | None:
        """One line, None where the kernel's version says it."""
        return None

    @abstractmethod
    def start(self, hosts: tuple[Host, Host]) -> None:
        """Starts both ends and sets their addresses. HostError."""

    def stop(self) -> None:
        """Stops both ends; what it made in the hosts goes with the hosts."""
        for program in self.programs:
            program.stop()
        self.programs.clear()

    def check(self) -> None:
        """HostError unless all its processes run."""
        for program in self.programs:
            program.check()

    def _device_up(self, hosts: tuple[Host, Host], device: str) -> None:
        """Waits for the device that the programs make, then sets address, MTU and up, as a user would."""
        for host, address in zip(hosts, self.addresses, strict=True):
            wait_for(
                lambda: host.run("ip", "link", "show", device, check=False).returncode == 0,  # noqa: B023
                f"{self.name}: device {device} on {host.name}",
                self.check,
            )
            host.ip(f"addr add {address}/{INNER_PREFIX} dev {device}", f"link set {device} mtu {INNER_MTU} up")


def wait_for(
    condition: Callable[[], bool], what: str, check: Callable[[], None] = lambda: None, timeout_s: float = 15
) -> None:
    """Polls until `condition` holds; HostError after the timeout, or as soon as `check` raises one."""
    end = time.monotonic() + timeout_s
    while not condition():
        check()
        if time.monotonic() > end:
            raise HostError(f"{what}: not there within {timeout_s:g} s")
        time.sleep(0.05)


def first_line(*command: str) -> str | None:
    """The first line that a program prints about itself, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()), None)


def lacks(*programs: str) -> str | None:
    absent = [program for program in programs if shutil.which(program) is None]
    return f"not on PATH: {', '.join(absent)}" if absent else None


class BareLink(Tunnel):
    name, title = "veth", "bare veth link"

    def start(self, hosts: tuple[Host, Host]) -> None:
        self.addresses = (hosts[0].outer, hosts[1].outer)


class PurePython(Tunnel):
    name, title = "pure-python", "pure Python"

    def version(self) -> str:
        return f"Python {sys.version.split()[0]}"

    def start(self, hosts: tuple[Host, Host]) -> None:
        server, client = hosts
        for host, role in ((server, ["-listen"]), (client, ["-server", server.outer])):
            self.programs.append(host.start(sys.executable, str(PURE_PYTHON), *role, title=self.name))
        self._device_up(hosts, "tun0")


class Lametun(Tunnel):
    name, title = "lametun", "lametun (Go)"

    def missing(self) -> str | None:
        return lacks("lametun")

    def start(self, hosts: tuple[Host, Host]) -> None:
        server, client = hosts
        for host, role in ((server, ["-listen"]), (client, ["-server", server.outer])):
            self.programs.append(host.start("lametun", *role))
        self._device_up(hosts, "tun0")


class Fasttun(Tunnel):
    def __init__(self, name: str, title: str, *options: str, measures: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.name, self.title, self.options, self.measures = name, title, options, measures

    def missing(self) -> str | None:
        done = subprocess.run(
            [sys.executable, "-c", "import fasttun._core, fasttun.cli"],
            capture_output=True,
            text=True,
            check=False,
        )
        return (done.stderr.strip().splitlines() or ["it does not start"])[-1] if done.returncode else None

    def version(self) -> str | None:
        return first_line(sys.executable, "-m", "fasttun", "--version")

    def start(self, hosts: tuple[Host, Host]) -> None:
        server, client = hosts
        for host, role, address in (
            (server, ["--listen"], INNER[0]),
            (client, ["--server", server.outer], INNER[1]),
        ):
            self.programs.append(
                host.start(
                    sys.executable,
                    "-m",
                    "fasttun",
                    *role,
                    "--address",
                    f"{address}/{INNER_PREFIX}",
                    "--mtu",
                    str(INNER_MTU),
                    *self.options,
                    title=self.name,
                )
            )


class FasttunFastPath(Fasttun):
    """The plain mode with the kernel's fast path, where the installed fasttun has it."""

    def __init__(self) -> None:
        super().__init__("fasttun-fast-path", "fasttun --fast-path", "--fast-path")

    def missing(self) -> str | None:
        if reason := super().missing():
            return reason
        done = subprocess.run(
            [sys.executable, "-m", "fasttun", "--help"], capture_output=True, text=True, check=False
        )
        return None if "--fast-path" in done.stdout else "this fasttun has no --fast-path"


class FasttunWireGuard(Fasttun):
    """The same two commands with keys: WireGuard's protocol, as wireguard-go speaks it."""

    def start(self, hosts: tuple[Host, Host]) -> None:
        private = [_output(sys.executable, "-m", "fasttun", "genkey") for _ in hosts]
        public = [_output(sys.executable, "-m", "fasttun", "pubkey", stdin=key) for key in private]
        server, client = hosts
        for here, (host, role) in enumerate(((server, ["--listen"]), (client, ["--server", server.outer]))):
            self.programs.append(
                host.start(
                    sys.executable, "-m", "fasttun", *role,
                    "--address", f"{INNER[here]}/{INNER_PREFIX}", "--mtu", str(INNER_MTU),
                    "--key", str(host.file(private[here] + "\n")), "--peer", public[1 - here],
                    *self.options, title=self.name,
                )
            )  # fmt: skip


class Socat(Tunnel):
    name, title = "socat", "socat"

    def missing(self) -> str | None:
        return lacks("socat")

    def version(self) -> str | None:
        done = subprocess.run(["socat", "-V"], capture_output=True, text=True, check=False)
        return next((line for line in done.stdout.splitlines() if line.startswith("socat version")), None)

    def start(self, hosts: tuple[Host, Host]) -> None:
        for host, other, address in ((hosts[0], hosts[1], INNER[0]), (hosts[1], hosts[0], INNER[1])):
            self.programs.append(
                host.start(
                    "socat",
                    f"UDP4-DATAGRAM:{other.outer}:1234,bind={host.outer}:1234",
                    f"TUN:{address}/{INNER_PREFIX},tun-name=tun0,iff-no-pi",
                )
            )
        for host in hosts:
            wait_for(
                lambda: host.run("ip", "link", "show", "tun0", check=False).returncode == 0,  # noqa: B023
                f"socat: tun0 on {host.name}",
                self.check,
            )
            host.ip(f"link set tun0 mtu {INNER_MTU} up")


class Fastd(Tunnel):
    name, title = "fastd", "fastd, method null"

    def missing(self) -> str | None:
        return lacks("fastd")

    def version(self) -> str | None:
        return first_line("fastd", "--version")

    def start(self, hosts: tuple[Host, Host]) -> None:
        keys = [_fastd_keys() for _ in hosts]
        for here, host in enumerate(hosts):
            other = hosts[1 - here]
            configuration = host.file(
                f'log level warn;\nmode tun;\ninterface "tun0";\nmtu {INNER_MTU};\nmethod "null";\n'
                f'bind {host.outer}:10000;\nsecret "{keys[here][0]}";\n'
                f'peer "other" {{\n  key "{keys[1 - here][1]}";\n  remote {other.outer}:10000;\n}}\n'
            )
            self.programs.append(host.start("fastd", "--config", configuration))
        self._device_up(hosts, "tun0")


def _fastd_keys() -> tuple[str, str]:
    done = subprocess.run(["fastd", "--generate-key"], capture_output=True, text=True, check=True)
    fields = dict(line.lower().split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    return fields["secret"], fields["public"]


class OpenVPN(Tunnel):
    name, title = "openvpn", "OpenVPN, no cipher"

    def missing(self) -> str | None:
        return lacks("openvpn")

    def version(self) -> str | None:
        return first_line("openvpn", "--version")

    def start(self, hosts: tuple[Host, Host]) -> None:
        for host, other, here, there in (
            (hosts[0], hosts[1], *INNER),
            (hosts[1], hosts[0], *reversed(INNER)),
        ):
            self.programs.append(
                host.start(
                    "openvpn",
                    "--dev",
                    "tun0",
                    "--dev-type",
                    "tun",
                    "--proto",
                    "udp4",
                    "--local",
                    host.outer,
                    "--remote",
                    other.outer,
                    "1194",
                    "--port",
                    "1194",
                    "--ifconfig",
                    here,
                    there,
                    "--tun-mtu",
                    str(INNER_MTU),
                    "--cipher",
                    "none",
                    "--auth",
                    "none",
                    "--verb",
                    "1",
                )
            )


class WireGuardGo(Tunnel):
    def __init__(self, name: str, title: str, binary: str) -> None:
        super().__init__()
        self.name, self.title, self.binary = name, title, binary

    def missing(self) -> str | None:
        return lacks(self.binary, "wg")

    def version(self) -> str | None:
        return first_line(self.binary, "--version")

    def start(self, hosts: tuple[Host, Host]) -> None:
        # One directory of control sockets serves all namespaces, so the two devices need two names.
        devices = [f"wgb{os.getpid() % 100000}{side}" for side in "lr"]
        private = [_output("wg", "genkey") for _ in hosts]
        public = [_output("wg", "pubkey", stdin=key) for key in private]
        for here, host in enumerate(hosts):
            configuration = host.file(
                f"[Interface]\nPrivateKey = {private[here]}\nListenPort = 51820\n[Peer]\n"
                f"PublicKey = {public[1 - here]}\nAllowedIPs = 0.0.0.0/0\n"
                f"Endpoint = {hosts[1 - here].outer}:51820\n"
            )
            self.programs.append(
                host.start(self.binary, "--foreground", devices[here], title=self.name, env={"LOG_LEVEL": "error"})
            )
            wait_for(
                Path(f"/var/run/wireguard/{devices[here]}.sock").exists,
                f"{self.name}: its control socket",
                self.check,
            )
            host.run("wg", "setconf", devices[here], configuration)
            host.ip(
                f"addr add {INNER[here]}/{INNER_PREFIX} dev {devices[here]}",
                f"link set {devices[here]} mtu {INNER_MTU} up",
            )


def _output(*command: str, stdin: str = "") -> str:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout.strip()


class Vxlan(Tunnel):
    name, title = "vxlan", "kernel VXLAN"

    def start(self, hosts: tuple[Host, Host]) -> None:
        for here, host in enumerate(hosts):
            host.ip(
                f"link add vxlan0 type vxlan id 42 local {host.outer} remote {hosts[1 - here].outer} "
                f"dstport 4789 dev {LINK_DEVICE}",
                f"addr add {INNER[here]}/{INNER_PREFIX} dev vxlan0",
                f"link set vxlan0 mtu {INNER_MTU} up",
            )


NO_OFFLOADS = ("--no-tun-offload", "--no-udp-gso", "--no-udp-gro")


def all_tunnels(peer_binaries: Sequence[str] = ()) -> list[Tunnel]:
    """Every tunnel, in the order of a round; `peer_binaries` are further wireguard-go executables."""
    tunnels: list[Tunnel] = [
        BareLink(),
        Vxlan(),
        Fasttun("fasttun", "fasttun"),
        FasttunFastPath(),
        Fasttun("fasttun-busy-poll", "fasttun --busy-poll 50", "--busy-poll", "50", measures=("ping", "udp")),
        Fasttun("fasttun-no-offload", "fasttun without offloads", *NO_OFFLOADS),
        Fasttun("fasttun-one-call", "fasttun, one packet a call", "--no-batch", *NO_OFFLOADS),
        FasttunWireGuard("fasttun-wireguard", "fasttun, WireGuard (encrypts)"),
        PurePython(),
        Lametun(),
        Socat(),
        Fastd(),
        OpenVPN(),
        WireGuardGo("wireguard-go", "wireguard-go (encrypts)", "wireguard-go"),
        WireGuardGo("wireguard-go-2025", "wireguard-go 2025 (encrypts)", "wireguard-go-2025"),
    ]
    for binary in peer_binaries:
        name = Path(binary).name
        tunnels = [tunnel for tunnel in tunnels if tunnel.name != name]
        tunnels.append(WireGuardGo(name, f"{name} (encrypts)", binary))
    return tunnels
