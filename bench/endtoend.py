"""End to end: every tunnel between two network namespaces over one veth pair, in rounds, into one JSON file.

    sudo python -m bench.endtoend                       all tunnels, three rounds, both kinds of link
    sudo python -m bench.endtoend --quick --only fasttun,pure-python
    python -m bench.report                              the table and the pictures from the newest JSON

Each tunnel runs once a round, so a slow minute of the machine hits all alike: compare medians and ratios of
one file, never single figures or two files. Each kind of link is measured: "whole", where the veth pair
carries a UDP segmentation frame as one piece, and "split", where it is cut first, as on a network card
without that feature. On request "cut", where frames of UDP tunnels, such as VXLAN's, are cut as well.

This file is the order of events and the JSON; the tunnels are in tunnels.py, the measures in measure.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from bench import measure
from bench.tunnels import INNER_MTU, LINK_DEVICE, Tunnel, all_tunnels, first_line, lacks, wait_for
from fasttun.demo.hosts import Host, HostError, requirements, two_hosts

SCHEMA = 1
RESULTS = Path(__file__).resolve().with_name("results")
LINKS = ("whole", "split", "cut")
USUAL_LINKS = LINKS[:2]
MEASURES = ("ping", "udp", "iperf-udp", "tcp", "load")


def main(arguments: Sequence[str] | None = None) -> int:
    given = _options(arguments)
    try:
        requirements()
        if problem := lacks("iperf3", "ping", "ethtool", "gcc", "ss"):
            raise HostError(f"{problem}: run bench/install-peers.sh")
        tunnels = _chosen(given)
    except HostError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    missing = {tunnel.name: reason for tunnel in tunnels if (reason := tunnel.missing())}
    for name, reason in missing.items():
        print(f"bench: missing: {name}: {reason}", file=sys.stderr)
    present = [tunnel for tunnel in tunnels if tunnel.name not in missing]
    congestions = _congestions(given.congestion)
    result = _header(given, tunnels, missing, congestions)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with measure.workspace() as directory:
            udp_load = measure.compile_udp_load(directory)
            for round_ in range(1, given.rounds + 1):
                for link in given.links:
                    for tunnel in present:
                        _one(result, tunnel, link, round_, given, congestions, udp_load)
        result["complete"] = True
    except HostError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if result["samples"]:
            given.output.write_text(json.dumps(result, indent=1) + "\n")
            print(f"bench: wrote {given.output}", file=sys.stderr)
    # A peer that failed is a row of the report; fasttun's own failure is the run's.
    return int(any(failure["tunnel"].startswith("fasttun") for failure in result["failures"]))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.endtoend", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, help="rounds (default 3)")
    parser.add_argument("--seconds", type=int, help="length of each TCP and UDP measure (default 2)")
    parser.add_argument("--only", default="", metavar="NAMES", help="tunnels, by comma")
    parser.add_argument("--measures", default=",".join(MEASURES), metavar="NAMES", help=f"of {','.join(MEASURES)}")
    parser.add_argument("--links", default=",".join(USUAL_LINKS), metavar="NAMES",
                        help=f"of {','.join(LINKS)} (default {','.join(USUAL_LINKS)})")
    parser.add_argument("--congestion", default="cubic,bbr", metavar="NAMES", help="TCP congestion controls")
    parser.add_argument(
        "--peer-binary",
        action="append",
        default=[],
        metavar="PATH",
        help="one more wireguard-go executable; may be given several times",
    )
    parser.add_argument("--quick", action="store_true", help="one round of one second, one kind of link, cubic only")
    parser.add_argument("--output", type=Path, help="default: bench/results/DATE.json")
    given = parser.parse_args(arguments)
    given.rounds = given.rounds or (1 if given.quick else 3)
    given.seconds = given.seconds or (1 if given.quick else 2)
    if given.rounds < 1 or given.seconds < 1:
        parser.error("--rounds and --seconds: 1 or more")
    for name, known in (("measures", MEASURES), ("links", LINKS)):
        chosen = [part for part in getattr(given, name).split(",") if part]
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: unknown: {', '.join(sorted(unknown))}")
        setattr(given, name, chosen)
    if given.quick:
        given.links, given.congestion = given.links[:1], "cubic"
    if given.output is None:
        given.output = RESULTS / f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
    return given


def _chosen(given: argparse.Namespace) -> list[Tunnel]:
    tunnels = all_tunnels(given.peer_binary)
    names = [name for name in given.only.split(",") if name]
    known = [tunnel.name for tunnel in tunnels]
    if unknown := [name for name in names if name not in known]:
        raise HostError(f"--only: unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [tunnel for tunnel in tunnels if not names or tunnel.name in names]


def _congestions(wanted: str) -> dict[str, str | None]:
    """Each congestion control that was asked for, with the reason where the kernel has none."""
    answer: dict[str, str | None] = {}
    for name in filter(None, wanted.split(",")):
        with contextlib.suppress(FileNotFoundError):  # built in, or not to be had
            subprocess.run(["modprobe", "-q", f"tcp_{name}"], capture_output=True, check=False)
        available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
        answer[name] = None if name in available else "this kernel does not have it"
        if answer[name]:
            print(f"bench: missing: TCP {name}: {answer[name]}", file=sys.stderr)
    return answer


def _header(
    given: argparse.Namespace,
    tunnels: list[Tunnel],
    missing: dict[str, str],
    congestions: dict[str, str | None],
) -> dict:
    versions = {tunnel.name: tunnel.version() for tunnel in tunnels if tunnel.name not in missing}
    return {
        "schema": SCHEMA,
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "architecture": platform.machine(),
            "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        },
        "kernel": platform.release(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version}
        | {"iperf3": first_line("iperf3", "--version"), "gcc": first_line("gcc", "--version")},
        "settings": {
            "rounds": given.rounds,
            "seconds": given.seconds,
            "inner_mtu": INNER_MTU,
            "links": given.links,
            "measures": given.measures,
            "udp_windows": list(measure.UDP_WINDOWS),
            "loss_allowed": measure.LOSS_ALLOWED,
        },
        "tunnels": {tunnel.name: tunnel.title for tunnel in tunnels},
        "missing": missing,
        "congestion": congestions,
        "failures": [],
        "samples": [],
    }


def _one(
    result: dict,
    tunnel: Tunnel,
    link: str,
    round_: int,
    given: argparse.Namespace,
    congestions: dict[str, str | None],
    udp_load: Path,
) -> None:
    """One tunnel, one round: a fresh pair of hosts, all measures, one sample; a failure is recorded."""
    begin = time.monotonic()
    idle = _idle_share()
    values: dict[str, float] = {}
    failures: list[str] = []
    try:
        with two_hosts(names=("listener", "client"), device=LINK_DEVICE) as hosts:
            _prepare_link(hosts, link)
            try:
                tunnel.start(hosts)
                _wait_until_it_carries(tunnel, hosts)
                _measure(values, failures, tunnel, hosts, given, congestions, udp_load)
            finally:
                tunnel.stop()
    except HostError as error:
        failures.append(str(error))
    for reason in failures:
        result["failures"].append({"tunnel": tunnel.name, "link": link, "round": round_, "reason": reason})
        print(f"bench: {tunnel.name}: {reason}", file=sys.stderr)
    if values:
        result["samples"].append({"tunnel": tunnel.name, "link": link, "round": round_, "idle": idle, "values": values})
    took_s = time.monotonic() - begin
    print(f"{round_}/{given.rounds} {link:5} {tunnel.name:20} {_line(values)} ({took_s:.0f} s)", flush=True)


def _prepare_link(hosts: tuple[Host, Host], link: str) -> None:
    switches = {
        "tx-udp-segmentation": link == "whole",
        "tx-udp_tnl-segmentation": link != "cut",
        "tx-udp_tnl-csum-segmentation": link != "cut",
    }
    words = [word for name, on in switches.items() for word in (name, "on" if on else "off")]
    for host in hosts:
        host.run("ethtool", "-K", LINK_DEVICE, *words)


def _wait_until_it_carries(tunnel: Tunnel, hosts: tuple[Host, Host]) -> None:
    wait_for(
        lambda: hosts[1].run("ping", "-c", "1", "-W", "1", tunnel.addresses[0], check=False).returncode == 0,
        f"{tunnel.name}: an answer to ping",
        tunnel.check,
    )


def _measure(
    values: dict[str, float],
    failures: list[str],
    tunnel: Tunnel,
    hosts: tuple[Host, Host],
    given: argparse.Namespace,
    congestions: dict[str, str | None],
    udp_load: Path,
) -> None:
    route = measure.Route(hosts, tunnel.addresses, tuple(tunnel.programs))

    def take(prefix: str, function: Callable[..., dict[str, float]], *arguments: object, **options: object) -> None:
        try:
            values.update({f"{prefix}_{key}": value for key, value in function(route, *arguments, **options).items()})
        except HostError as error:
            failures.append(f"{prefix}: {error}")
        tunnel.check()

    seconds = given.seconds
    wanted = [name for name in given.measures if name in (tunnel.measures or MEASURES)]
    if "ping" in wanted:
        take("ping", measure.ping, count=100 * seconds, interval_s=0.01)
    if "udp" in wanted:
        for payload_bytes in (64, 1400):
            take(
                f"udp_{payload_bytes}",
                measure.udp_closed_loop,
                udp_load,
                seconds=1.5 * seconds,
                payload_bytes=payload_bytes,
            )
    if not {"iperf-udp", "tcp", "load"} & set(wanted):
        return
    with measure.iperf_server(route):
        if "iperf-udp" in wanted:
            take("iperf_udp_64", measure.iperf_udp, seconds=seconds)
        for congestion in (name for name, absent in congestions.items() if not absent and "tcp" in wanted):
            for streams in (1, 4):
                for direction in ("up", "down"):
                    take(
                        f"tcp_{congestion}_{streams}_{direction}",
                        measure.tcp,
                        seconds=seconds,
                        streams=streams,
                        down=direction == "down",
                        congestion=congestion,
                    )
        if "load" in wanted:
            take("ping_loaded", measure.ping_under_load, seconds=seconds)
    if (peak := route.peak_rss_kib()) is not None:
        values["rss_kib"] = peak


def _idle_share(over_s: float = 0.25) -> float:
    """How much of all cores nobody used just now, 0 to 1: less than about 0.95 spoils what comes next."""

    def ticks() -> list[int]:
        return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]

    before = ticks()
    time.sleep(over_s)
    spent = [after - earlier for after, earlier in zip(ticks(), before, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent))


def _line(values: dict[str, float]) -> str:
    parts = []
    for key, label, unit in (
        ("tcp_cubic_1_up_bps", "TCP", 1e9),
        ("tcp_cubic_4_up_bps", "×4", 1e9),
        ("udp_64_pps", "64 B kpps", 1e3),
        ("ping_avg_us", "ping µs", 1),
    ):
        if key in values:
            parts.append(f"{label} {values[key] / unit:.3g}")
    return ", ".join(parts) or "nothing measured"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(RESULTS.parent), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
