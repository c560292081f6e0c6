"""The end-to-end benchmark's short mode: that it runs and records all it should. No speed is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.netns
def test_quick_run_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    broken = tmp_path / "broken-peer"
    broken.write_text("#!/bin/sh\necho it cannot >&2\nexit 3\n")
    broken.chmod(0o755)
    names = "veth,fasttun,pure-python,absent-peer,broken-peer"
    done = bench("endtoend", "--quick", "--measures", "ping,udp", "--only", names, "--output", str(output),
                 "--peer-binary", str(tmp_path / "absent-peer"), "--peer-binary", str(broken))  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["complete"]
    assert [sample["tunnel"] for sample in result["samples"]] == ["veth", "fasttun", "pure-python"]
    for sample in result["samples"]:
        values = sample["values"]
        assert values["udp_64_pps"] > 1000
        assert values["udp_1400_pps"] > 1000
        assert 0 <= values["udp_64_loss"] <= 1
        assert 0 < values["ping_min_us"] <= values["ping_avg_us"]
    assert {"cpu", "cores", "architecture"} <= set(result["machine"])
    assert result["kernel"]
    assert "absent-peer" in result["missing"]
    if "broken-peer" not in result["missing"]:  # there is a `wg` to configure it with
        [failure] = result["failures"]
        assert failure["tunnel"] == "broken-peer"
        assert "it cannot" in failure["reason"]

    shown = bench("report", "--check", str(output))
    assert shown.returncode == 0, shown.stderr
    for words in ("| **fasttun** |", "| pure Python |", "Missing: absent-peer", "UDP 1400 B"):
        assert words in shown.stdout


@pytest.mark.netns
@pytest.mark.parametrize("flags", [["--only", "nonsense"], ["--measures", "nonsense"], ["--rounds", "0x"]])
def test_unknown_names_are_refused(flags: list[str], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = bench("endtoend", *flags, "--output", str(output))
    assert done.returncode != 0
    assert flags[1] in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def bench(module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", f"bench.{module}", *flags], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
