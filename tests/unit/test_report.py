"""bench/report.py: from the benchmark's JSON to table and pictures. Nothing is measured here."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "report.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_report_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def sample(tunnel: str, round_: int, gbits: float, link: str = "whole", **values: float) -> dict[str, Any]:
    tcp = {
        "tcp_cubic_1_up_bps": gbits * 1e9,
        "tcp_cubic_1_down_bps": gbits * 1e9,
        "udp_64_pps": gbits * 1e5,
        "udp_64_loss": 0.0,
    }
    return {"tunnel": tunnel, "link": link, "round": round_, "values": {**tcp, **values}}


@pytest.fixture
def data() -> dict[str, Any]:
    return {
        "schema": 1,
        "complete": True,
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "A & B <processor>", "cores": 2, "architecture": "x86_64", "memory_mib": 1},
        "kernel": "6.1.0",
        "commit": "0123456789ab",
        "uncommitted": False,
        "settings": {"rounds": 3, "seconds": 2, "inner_mtu": 1428, "links": ["whole", "split"], "loss_allowed": 0.001},
        "tunnels": {"veth": "bare link", "fasttun": "fasttun", "pure-python": "pure Python", "socat": "socat <x>",
                    "lametun": "lametun (Go)"},
        "missing": {"lametun": "not on PATH: lametun"},
        "congestion": {"cubic": None, "bbr": "this kernel does not have it"},
        "failures": [{"tunnel": "socat", "link": "split", "round": 2, "reason": "it ended"}],
        "samples": [
            sample("veth", 1, 40), sample("veth", 2, 10), sample("veth", 3, 20),
            sample("fasttun", 1, 10), sample("fasttun", 2, 9), sample("fasttun", 3, 2),
            sample("pure-python", 1, 1), sample("pure-python", 2, 0.5, rss_kib=12288), sample("pure-python", 3, 0.4),
            sample("socat", 1, 0.25, udp_64_loss=0.5),
            sample("veth", 1, 30, link="split"), sample("fasttun", 1, 3, link="split"),
        ],
    }  # fmt: skip


def cells(table: str, row: str) -> list[list[str]]:
    """The rows of all tables that begin with `row`, as cells."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [line for line in split if line[0] == row]


def test_median_of_rounds_and_ratio_within_rounds(report: ModuleType, data: dict[str, Any]) -> None:
    results = report.Results(data)
    keys = report.tcp_keys("cubic", 1)
    assert results.median("whole", "fasttun", keys) == 9e9
    # 10/40, 9/10, 2/20: the median is 0.25, and not 9/20
    assert results.ratio("whole", "fasttun", "veth", keys) == 0.25
    assert results.ratio("whole", "fasttun", "pure-python", keys) == 10.0
    assert results.ratio("split", "fasttun", "pure-python", keys) is None


def test_directions_are_averaged(report: ModuleType, data: dict[str, Any]) -> None:
    data["samples"] = [sample("fasttun", 1, 4, tcp_cubic_1_down_bps=2e9)]
    assert report.Results(data).median("whole", "fasttun", report.tcp_keys("cubic", 1)) == 3e9


def test_table(report: ModuleType, data: dict[str, Any]) -> None:
    table = report.table(report.Results(data))
    whole, split = cells(table, "")
    assert whole == split  # the same columns in both
    assert whole[1:3] == ["TCP cubic 1, Gbit/s", "UDP 64 B, kpps"]
    assert not any("bbr" in cell or "4, Gbit" in cell for cell in whole)  # what nobody measured has no column
    assert cells(table, "**fasttun**") == [
        ["**fasttun**", "9.00", "900", "–", "0.25", "10.0"],
        ["**fasttun**", "3.00", "300", "–", "0.10", "–"],
    ]
    assert cells(table, "pure Python")[0] == ["pure Python", "0.50", "50.0", "12.0", "0.03", "1.00"]
    assert len(cells(table, "socat <x>")) == 1  # measured over one kind of link
    assert cells(table, "lametun (Go)") == []
    for line in (
        "Missing: lametun (Go) (not on PATH: lametun).",
        "Missing: TCP bbr (this kernel does not have it).",
        "Failed: socat <x> (it ended).",
        "socat <x> (64 B)",
        "Linux 6.1.0, commit 0123456789ab:",
    ):
        assert line in table


def test_uncommitted_changes_are_named(report: ModuleType, data: dict[str, Any]) -> None:
    data["uncommitted"] = True
    assert "commit 0123456789ab with changes:" in report.table(report.Results(data))


@pytest.mark.parametrize(("idle", "busy"), [([0.99, 0.5, 0.98], False), ([0.99, 0.7, 0.6], True)])
def test_busy_machine_is_named(report: ModuleType, data: dict[str, Any], idle: list[float], busy: bool) -> None:
    for one, share in zip(data["samples"], idle, strict=False):
        one["idle"] = share
    assert ("only 70 % idle" in report.table(report.Results(data))) is busy


def test_pictures_are_well_formed(report: ModuleType, data: dict[str, Any]) -> None:
    drawn = []
    for palette in (report.LIGHT, report.DARK):
        root = ElementTree.fromstring(report.picture(report.Results(data), palette))
        assert root.tag == f"{SVG}svg"
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        texts = [element.text or "" for element in root.iter(f"{SVG}text")]
        assert {"fasttun", "pure Python", "socat <x>", "bare link: 20.0"} <= set(texts)
        assert any("A & B <processor>" in text for text in texts)
        bars = [element for element in root.iter(f"{SVG}rect") if element.get("x") == str(report.LABELS)]
        assert len(bars) == 2 * 4  # two panels: fasttun over both kinds of link, two others over one
        for bar in bars:
            assert 0 <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width - 40
            assert float(bar.attrib["y"]) + float(bar.attrib["height"]) <= height
        longest = max(float(bar.attrib["width"]) for bar in bars)
        assert [round(float(bar.attrib["width"]) / longest, 3) for bar in bars[:2]] == [1.0, 0.333]
        title = root.find(f"{SVG}title")
        assert title is not None
        assert "fasttun 9.00" in (title.text or "")
        drawn.append([element.get("fill") for element in root.iter()])
    assert drawn[0] != drawn[1]


def test_writes_readme_and_pictures_and_again(report: ModuleType, data: dict[str, Any], tmp_path: Path) -> None:
    source, readme, images = tmp_path / "x.json", tmp_path / "README.md", tmp_path / "img"
    source.write_text(json.dumps(data))
    readme.write_text(f"# before\n\n{report.BEGIN}\nold words\n{report.END}\n\nafter\n")
    page = tmp_path / "benchmark.md"
    arguments = [str(source), "--readme", str(readme), "--images", str(images), "--page", str(page)]
    assert report.main(arguments) == 0
    first = readme.read_text()
    assert "| over pure Python |" in page.read_text()
    assert "| over pure Python |" not in first
    assert first.startswith(f"# before\n\n{report.BEGIN}\nMeasured 2026-01-02")
    assert first.endswith(f"{report.END}\n\nafter\n")
    assert "old words" not in first
    assert sorted(path.name for path in images.iterdir()) == ["bench-dark.svg", "bench-light.svg"]
    assert report.main(arguments) == 0
    assert readme.read_text() == first


def test_check_writes_nothing(
    report: ModuleType, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "x.json"
    source.write_text(json.dumps(data))
    arguments = [str(source), "--check", "--readme", str(tmp_path / "absent"), "--images", str(tmp_path / "absent")]
    assert report.main(arguments) == 0
    assert "**fasttun**" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("text", ["", "{begin}", "{end}\n{begin}", "{begin}{begin}{end}"])
def test_readme_without_the_markers_is_left_alone(
    report: ModuleType, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    source, readme = tmp_path / "x.json", tmp_path / "README.md"
    source.write_text(json.dumps(data))
    text = text.format(begin=report.BEGIN, end=report.END)
    readme.write_text(text)
    assert report.main([str(source), "--readme", str(readme), "--images", str(tmp_path / "img"),
                        "--page", str(tmp_path / "page")]) == 1
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text() == text
    assert not (tmp_path / "img").exists()


def test_newest_complete_result_is_taken(report: ModuleType, data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="no complete result"):
        report.newest(tmp_path)
    interrupted = {**copy.deepcopy(data), "complete": False}
    for name, content in (("20260101-000000", data), ("20260102-000000", data), ("20260103-000000", interrupted)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert report.newest(tmp_path).name == "20260102-000000.json"


def test_other_schema_is_refused(report: ModuleType, data: dict[str, Any]) -> None:
    with pytest.raises(report.ReportError, match="schema 2"):
        report.Results({**data, "schema": 2})
