"""The whole tunnel, with each offload on, off, and taken back by the kernel in mid-transfer: nothing is lost."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.netns import Lab, Namespace, wait_until
from support.transfer import SIZE, transfer

pytestmark = pytest.mark.netns

ADDRESSES = (["--address", "10.7.0.1/24", "--address", "fd07::1/64"],
             ["--address", "10.7.0.2/24", "--address", "fd07::2/64"])
FASTTUN = [sys.executable, "-m", "fasttun"]


class Run:
    """A tunnel between two new hosts, as two processes of the command."""

    def __init__(self, lab: Lab, *options: str, env: dict[str, str] | None = None, outer: int = 4) -> None:
        self.a, self.b, self.link = lab.pair()
        server = self.link.a.v4 if outer == 4 else self.link.a.v6
        self.processes = [
            self.a.popen([*FASTTUN, "--listen", "--log-format", "json", *ADDRESSES[0], *options], env=env),
            self.b.popen([*FASTTUN, "--server", server, "--log-format", "json", *ADDRESSES[1], *options], env=env),
        ]
        wait_until(lambda: self.b.run(["ping", "-c1", "-W1", "10.7.0.1"], check=False).returncode == 0, 15)

    def end(self) -> list[list[dict[str, Any]]]:
        """Ends both; what each has logged."""
        logs = []
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            _, errors = process.communicate(timeout=15)
            assert process.returncode == 0, errors
            logs.append([json.loads(line) for line in errors.splitlines() if line.startswith("{")])
        return logs


@pytest.mark.parametrize("options", [
    [], ["--no-tun-offload"], ["--no-udp-gso"], ["--no-udp-gro"],
    ["--no-tun-offload", "--no-udp-gso", "--no-udp-gro"], ["--no-batch"],
], ids=" ".join)
@pytest.mark.parametrize("outer", [4, 6])
def test_every_switch_carries_the_same_bytes(lab: Lab, options: list[str], outer: int) -> None:
    run = Run(lab, *options, outer=outer)
    size = SIZE // 4 if "--no-batch" in options else SIZE
    for host in ("10.7.0.1", "fd07::1"):
        transfer(run.b, run.a, host, size)
    transfer(run.a, run.b, "10.7.0.2", size)
    # Fragments, and a packet of every size around the MTU's edge, both families.
    for address, sizes in (("10.7.0.1", (0, 1, 1400, 1444, 1445, 4000)), ("fd07::1", (0, 1400, 1424, 4000))):
        for payload in sizes:
            run.b.run(["ping", "-c1", "-W2", "-s", str(payload), address])
    for log in run.end():
        assert_balanced(log)


def assert_balanced(log: list[dict[str, Any]]) -> None:
    """in = out + drops in the summary of each direction."""
    summary = {entry["direction"]: entry for entry in log if "direction" in entry}
    assert set(summary) == {"outbound", "inbound"}, log
    for entry in summary.values():
        assert entry["packets_in"] == entry["packets_out"] + sum(entry["drops"].values()), entry


@pytest.fixture(scope="module")
def refusing_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("preload") / "refusing_kernel.so"
    source = Path(__file__).parents[1] / "support" / "refusing_kernel.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize(("variable", "name"), [("REFUSE_GSO_AFTER", "udp-gso"), ("REFUSE_JOIN_AFTER", "tun")])
def test_an_offload_taken_back_in_mid_transfer_loses_nothing(
    lab: Lab, refusing_kernel: Path, variable: str, name: str
) -> None:
    run = Run(lab, env={"LD_PRELOAD": str(refusing_kernel), variable: "40"})
    before = retransmitted(run.b)
    transfer(run.b, run.a, "10.7.0.1")
    # Nothing lost on the way: TCP had to send nothing twice on account of the refusal.
    assert retransmitted(run.b) - before <= 2
    logs = run.end()
    told = [entry for log in logs for entry in log
            if re.search(rf"offload {name} is off: given up", str(entry.get("message")))]
    assert 1 <= len(told) <= 2, logs  # once a process, however many messages were refused
    for log in logs:
        assert_balanced(log)


def test_a_group_above_the_paths_mtu_does_not_end_grouping(lab: Lab, refusing_kernel: Path) -> None:
    run = Run(lab, env={"LD_PRELOAD": str(refusing_kernel), "REFUSE_GSO_ABOVE": "1300"})
    before = retransmitted(run.b)
    transfer(run.b, run.a, "10.7.0.1", SIZE // 4)
    assert retransmitted(run.b) - before <= 2
    logs = run.end()
    assert not [entry for log in logs for entry in log if "given up" in str(entry.get("message"))]
    for log in logs:
        assert_balanced(log)


def test_a_refused_group_that_fits_any_path_ends_grouping(lab: Lab, refusing_kernel: Path) -> None:
    run = Run(lab, env={"LD_PRELOAD": str(refusing_kernel), "REFUSE_GSO_ABOVE": "0"})
    for source, target in ((run.b, "10.7.0.1"), (run.a, "10.7.0.2")):
        # Bursts of small datagrams, so that a read of the TUN finds several.
        with source.enter(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(2000):
                sock.sendto(b"x" * 64, (target, 9))
    logs = run.end()
    told = [entry for log in logs for entry in log if "given up" in str(entry.get("message"))]
    assert 1 <= len(told) <= 2, logs


def retransmitted(ns: Namespace) -> int:
    with ns.enter(), open("/proc/thread-self/net/snmp") as file:
        names, values = [line.split() for line in file if line.startswith("Tcp:")]
    return int(values[names.index("RetransSegs")])


def test_ecn_marks_and_extension_headers_cross(lab: Lab) -> None:
    run = Run(lab)
    for ns in (run.a, run.b):
        ns.sysctl("net.ipv4.tcp_ecn", 1)
    transfer(run.b, run.a, "10.7.0.1")
    transfer(run.b, run.a, "fd07::1")
    for tos in ("0x02", "0x03"):
        run.b.run(["ping", "-c1", "-W2", "-Q", tos, "10.7.0.1"])
    # A destination-options header before UDP, and one before a fragmented UDP packet.
    with run.a.enter():
        server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        server.bind(("fd07::1", 9))
        server.settimeout(5)
    with run.b.enter():
        client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with server, client:
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
        for size in (100, 1300, 6000):
            client.sendto(b"x" * size, ("fd07::1", 9))
            assert len(server.recv(65536)) == size
    run.end()


def test_bulk_costs_far_less_than_a_call_a_packet(lab: Lab) -> None:
    run = Run(lab)
    transfer(run.b, run.a, "10.7.0.1")
    for process in run.processes:
        process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    for log in run.end():
        (calls,) = [entry["system_calls"] for entry in log if "system_calls" in entry]
        moved = max(entry["packets_out"] for entry in log if "direction" in entry)
        assert moved > SIZE / 1500
        # Two calls a packet without offloads; a frame of 64 KiB holds 45.
        assert sum(calls.values()) < moved / 2, (calls, moved)


@pytest.mark.parametrize(("outer", "mtu"), [(4, 1424), (6, 1284)])
def test_no_group_is_so_long_that_the_kernel_cuts_it(lab: Lab, outer: int, mtu: int) -> None:
    # 46 datagrams of 1,424 bytes, or 51 of 1,284 over IPv6, fit a datagram's 65,507
    # bytes, but not with the headers the device's 65,535: a group of so many leaves the kernel one by one.
    run = Run(lab, "--mtu", str(mtu), outer=outer)
    transfer(run.b, run.a, "10.7.0.1")
    (device,) = run.b.ip_json("-s", "link", "show", "dev", run.link.b.device)
    run.end()
    assert device["stats64"]["tx"]["packets"] < SIZE / mtu / 8
