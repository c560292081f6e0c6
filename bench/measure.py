"""The measures: what is asked of a tunnel that is up. Each returns numbers and knows no tunnel by name.

"up" is from the second host to the first (client to listener), "down" the other way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fasttun.demo.hosts import Host, HostError, Program

# Datagrams on their way at once. What overflows a tunnel's shortest queue shows as loss and does not count.
UDP_WINDOWS = (64, 128, 256)
LOSS_ALLOWED = 0.001
IPERF_PORT = 5201
SINK_PORT, SINK_CONTROL_PORT = 5301, 5302
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Route:
    """A tunnel that is up: both hosts, their addresses inside it, and the processes that carry it."""

    hosts: tuple[Host, Host]
    addresses: tuple[str, str]
    programs: Sequence[Program]

    def cpu_seconds(self) -> float:
        """User and system time of the tunnel's processes, all threads, both ends."""
        ticks = 0
        for program in self.programs:
            fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS

    def peak_rss_kib(self) -> int | None:
        """The larger of the two ends' largest resident set so far; None for a kernel tunnel."""
        peaks = [
            int(found[1])
            for program in self.programs
            if (found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{program.pid}/status").read_text()))
        ]
        return max(peaks, default=None)


def busy_seconds() -> float:
    """What all cores of the machine spent on anything since it started, interrupts included; stolen time is not."""
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) / _TICKS


@contextlib.contextmanager
def iperf_server(path: Route) -> Iterator[Program]:
    """iperf3's server on the first host, for as long as the context lasts."""
    program = path.hosts[0].start("iperf3", "-s", "-p", str(IPERF_PORT), title="iperf3-server")
    try:
        deadline = time.monotonic() + 5
        while path.hosts[0].run("ss", "-Hltn", f"sport = {IPERF_PORT}").stdout.strip() == "":
            program.check()
            if time.monotonic() > deadline:
                raise HostError("iperf3 -s: not listening within 5 s")
            time.sleep(0.02)
        yield program
    finally:
        program.stop()


def _iperf(path: Route, seconds: int, *options: str) -> dict[str, object]:
    done = path.hosts[1].run(
        "iperf3",
        "-c",
        path.addresses[0],
        "-p",
        str(IPERF_PORT),
        "-t",
        str(seconds),
        "-J",
        "--connect-timeout",
        "3000",
        *options,
        check=False,
        timeout_s=seconds + 20,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise HostError(f"iperf3: {(done.stderr or done.stdout).strip()[-200:]}") from None
    if "error" in answer:
        raise HostError(f"iperf3: {answer['error']}")
    return answer["end"]


def tcp(path: Route, *, seconds: int, streams: int, down: bool, congestion: str) -> dict[str, float]:
    """bps as received, retransmits, cpu_s_per_gb (only with processes to count), system_cpu_s_per_gb.

    The latter counts the whole machine, iperf3 and all else that ran: it alone compares tunnels in the kernel.
    """
    options = ["-P", str(streams), "-C", congestion] + (["-R"] if down else [])
    cpu_before, busy_before = path.cpu_seconds(), busy_seconds()
    end = _iperf(path, seconds, *options)
    cpu, busy = path.cpu_seconds() - cpu_before, busy_seconds() - busy_before
    received, sent = end["sum_received"], end["sum_sent"]
    values = {"bps": received["bits_per_second"], "retransmits": sent.get("retransmits", 0)}
    if received["bytes"]:
        gigabytes = received["bytes"] / 1e9
        values["system_cpu_s_per_gb"] = busy / gigabytes
        if path.programs:
            values["cpu_s_per_gb"] = cpu / gigabytes
    return values


def iperf_udp(path: Route, *, seconds: int, payload_bytes: int = 64) -> dict[str, float]:
    """pps that arrived and loss (0..1) when iperf3 sends all it can: an open loop, so loss is normal."""
    total = _iperf(path, seconds, "-u", "-b", "0", "-l", str(payload_bytes), "-w", "2M")["sum"]
    arrived = max(0, total["packets"] - total["lost_packets"])
    return {"pps": arrived / total["seconds"], "loss": total["lost_packets"] / max(1, total["packets"])}


def compile_udp_load(directory: Path) -> Path:
    """Builds udp_load.c. HostError with the compiler's message."""
    program = directory / "udp_load"
    source = Path(__file__).resolve().with_name("udp_load.c")
    try:
        subprocess.run(
            ["gcc", "-O2", "-o", str(program), str(source)], check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise HostError("gcc is missing: the UDP generator is compiled when the benchmark starts") from None
    except subprocess.CalledProcessError as error:
        raise HostError(f"gcc: {error.stderr}") from None
    return program


def udp_closed_loop(path: Route, udp_load: Path, *, seconds: float, payload_bytes: int) -> dict[str, float]:
    """The best pps with a loss of at most 0.1 % over the windows; if all lose more, that which loses least.

    `seconds` in all. Reports of the sink travel beside the tunnel. Keys: pps, loss, window.
    """
    sink_host, send_host = path.hosts
    sink = sink_host.start(str(udp_load), "sink", str(SINK_PORT), str(SINK_CONTROL_PORT), title="udp-sink")
    try:
        deadline = time.monotonic() + 5
        while "ready" not in sink.output():
            sink.check()
            if time.monotonic() > deadline:
                raise HostError("udp_load sink: not ready within 5 s")
            time.sleep(0.02)
        runs = []
        for window in UDP_WINDOWS:
            done = send_host.run(
                str(udp_load),
                "send",
                path.addresses[0],
                str(SINK_PORT),
                sink_host.outer,
                str(SINK_CONTROL_PORT),
                str(payload_bytes),
                str(window),
                str(seconds / len(UDP_WINDOWS)),
                timeout_s=seconds + 20,
            )
            run = json.loads(done.stdout)
            runs.append(
                {
                    "pps": run["received"] / run["seconds"],
                    "window": window,
                    "loss": 1 - run["received"] / max(1, run["sent"]),
                }
            )
    finally:
        sink.stop()
    clean = [run for run in runs if run["loss"] <= LOSS_ALLOWED]
    return max(clean, key=lambda run: run["pps"]) if clean else min(runs, key=lambda run: run["loss"])


def ping(path: Route, *, count: int, interval_s: float) -> dict[str, float]:
    """min_us, avg_us, max_us and loss of `count` echoes from the second host."""
    done = path.hosts[1].run(
        "ping",
        "-q",
        "-n",
        "-c",
        str(count),
        "-i",
        f"{interval_s:g}",
        "-W",
        "2",
        path.addresses[0],
        check=False,
        timeout_s=count * interval_s + 20,
    )
    times = re.search(r"= ([\d.]+)/([\d.]+)/([\d.]+)/", done.stdout)
    lost = re.search(r"([\d.]+)% packet loss", done.stdout)
    if times is None or lost is None:
        raise HostError(f"ping: {(done.stderr or done.stdout).strip()[-200:]}")
    low, mean, high = (float(value) * 1000 for value in times.groups())
    return {"min_us": low, "avg_us": mean, "max_us": high, "loss": float(lost[1]) / 100}


def ping_under_load(path: Route, *, seconds: int, congestion: str = "cubic") -> dict[str, float]:
    """As `ping`, while one TCP stream fills the tunnel in the same direction: the queue that it builds."""
    load = path.hosts[1].popen(
        "iperf3",
        "-c",
        path.addresses[0],
        "-p",
        str(IPERF_PORT),
        "-t",
        str(seconds + 1),
        "-C",
        congestion,
        "-J",
        "--connect-timeout",
        "3000",
    )
    try:
        time.sleep(0.5)  # past slow start
        if load.poll() is not None:
            raise HostError("iperf3: the load ended before the ping")
        return ping(path, count=max(10, round(seconds / 0.02)), interval_s=0.02)
    finally:
        try:
            load.communicate(timeout=seconds + 20)
        except subprocess.TimeoutExpired:
            load.kill()
            load.communicate()


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A directory for what is compiled."""
    with tempfile.TemporaryDirectory(prefix="fasttun-bench-") as name:
        yield Path(name)
