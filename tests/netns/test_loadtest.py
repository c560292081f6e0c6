"""`fasttun bench` through real tunnels: its figures against iperf3's, both modes, and whom it answers."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from netns.test_capture import FASTTUN, pair, runtime
from support.netns import Lab, Namespace, wait_until

__all__ = ["runtime"]

pytestmark = pytest.mark.netns


@contextlib.contextmanager
def serving(ns: Namespace, *words: str) -> Iterator[subprocess.Popen[str]]:
    process = ns.popen([*FASTTUN, "bench", "--serve", *words])
    wait_until(lambda: ":5204 " in ns.run(["ss", "-Hlnt"]).stdout or process.poll() is not None, 10)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]


def bench(ns: Namespace, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return ns.run([*FASTTUN, "bench", *words], check=check, timeout=60)


def iperf3(a: Namespace, b: Namespace, *words: str) -> float:
    """Bits a second that arrived at the other side."""
    server = a.popen(["iperf3", "-s", "-1", "-B", "10.7.0.1"])
    try:
        wait_until(lambda: ":5201 " in a.run(["ss", "-Hlnt"]).stdout, 10)
        done = b.run(["iperf3", "-J", "-c", "10.7.0.1", "-t", "1", *words])
    finally:
        server.wait(10)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"])


@pytest.mark.parametrize("mode", ["plain", "wireguard"])
def test_figures_are_like_iperf3s(lab: Lab, tmp_path: Path, mode: str) -> None:
    """Within a factor of three: a machine with other work gives no better figures to either."""
    if shutil.which("iperf3") is None:
        pytest.skip("needs iperf3 (apt install iperf3)")
    plot = tmp_path / "out.svg"
    pytest.importorskip("matplotlib")
    with pair(lab, tmp_path, mode) as (a, b):
        with serving(a, "tun0"):
            document: dict[str, Any] = json.loads(bench(b, "tun1", "--seconds", "0.5", "--json", "--plot",
                                                        str(plot)).stdout)
        expected = {"up": iperf3(a, b), "down": iperf3(a, b, "-R")}
    assert (document["tunnel"], document["local"], document["peer"]) == ("tun1", "10.7.0.2", "10.7.0.1")
    for one in document["tcp"]:
        assert 1 / 3 < one["bits_per_s"] / expected[one["way"]] < 3, (one, expected)
    for one in document["udp"]:
        assert one["received"] > 0
        assert one["loss"] < 0.9
        assert one["bits_per_s"] < 3 * expected[one["way"]]
        assert 1200 < one["size"] < 1500, "whole packets of the tunnel's MTU"
    idle = document["rtt"][0]
    assert idle["load"] == "idle"
    assert idle["received"] > 0.9 * idle["sent"]
    assert 10 < idle["min_us"] < 20_000
    assert plot.stat().st_size > 1000


def test_the_table_and_no_peer_but_the_inner_one(lab: Lab, tmp_path: Path) -> None:
    with pair(lab, tmp_path, "plain") as (a, b), serving(a, "tun0"):
        table = bench(b, "tun1", "--seconds", "0.2").stdout
        assert re.match(r"tun1, 10\.7\.0\.2 to 10\.7\.0\.1, 0\.2 s each\n", table)
        assert len(table.splitlines()) == 10
        assert re.search(r"^  TCP  up    1 stream +\d+\.\d\d [GMk]bit/s$", table, re.M)
        assert re.search(r"^  RTT  idle +[\d.]+ / [\d.]+ / [\d.]+ ms", table, re.M)
        for outside in ("10.99.0.1", "10.7.0.9"):
            done = bench(b, "--peer", outside, check=False)
            assert done.returncode == 1
            assert re.search(r"(Connection refused|No route|does not answer|unreachable)", done.stderr), done.stderr
            assert "`fasttun bench --serve`" in done.stderr


def test_the_tunnel_that_breaks_is_told(lab: Lab, tmp_path: Path) -> None:
    with pair(lab, tmp_path, "plain") as (a, b), serving(a, "tun0") as server:
        process = b.popen([*FASTTUN, "bench", "tun1", "--seconds", "20"])
        wait_until(lambda: ":5204" in b.run(["ss", "-Hnt", "state", "established"]).stdout, 10)
        server.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=15)
        assert process.returncode == 1
        assert err.startswith("fasttun: 10.7.0.1: ")
        assert "Traceback" not in err
