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


QUANTITIES = ("TCP", "UDP", "Ping", "CPU")


def panels(report: ModuleType, root: ElementTree.Element) -> dict[str, dict[str, str]]:
    """Per panel of the picture, by the first word of its title, the figures that stand in a tunnel's row."""
    texts = [(float(one.attrib["x"]), float(one.attrib["y"]), one.text or "") for one in root.iter(f"{SVG}text")]
    heads = sorted((y, text.split()[0].strip(",")) for _, y, text in texts if text.split()[0].strip(",") in QUANTITIES)
    found: dict[str, dict[str, str]] = {name: {} for _, name in heads}
    for x, y, text in texts:
        if x == report.LABELS - 10:
            panel = max(head for head in heads if head[0] < y)[1]
            [figures] = [other for left, height, other in texts if height == y and left > report.LABELS]
            found[panel][text] = figures
    return found


def test_picture_has_each_tunnel_and_quantity(report: ModuleType, data: dict[str, Any]) -> None:
    for number, one in enumerate(data["samples"]):
        if one["tunnel"] != "veth":
            one["values"] |= {"ping_avg_us": 100.0 + number, "tcp_cubic_1_up_cpu_s_per_gb": 0.5 + number}
    root = ElementTree.fromstring(report.picture(report.Results(data), report.LIGHT))
    assert panels(report, root) == {
        "TCP": {"bare link": "20.0 · 30.0", "fasttun": "9.00 · 3.00", "pure Python": "0.50 · –",
                "socat <x>": "0.25 · –"},
        "UDP": {"bare link": "2,000 · 3,000", "fasttun": "900 · 300", "pure Python": "50.0 · –",
                "socat <x>": "25.0 · –"},
        "Ping": {"fasttun": "104 · 111", "pure Python": "107 · –", "socat <x>": "109 · –", "bare link": "–"},
        "CPU": {"fasttun": "4.50 · 11.5", "pure Python": "7.50 · –", "socat <x>": "9.50 · –", "bare link": "–"},
    }
    # Best first, which is at the top the longest bar or the shortest; what was not measured comes last.
    first = [next(iter(rows)) for rows in panels(report, root).values()]
    assert first == ["bare link", "bare link", "fasttun", "fasttun"]
    words = [one.text for one in root.iter(f"{SVG}text")]
    assert words.count("higher is better") == words.count("lower is better") == 2


def test_picture_takes_the_machines_cpu_where_it_was_measured(report: ModuleType, data: dict[str, Any]) -> None:
    for one in data["samples"]:
        one["values"] |= {"tcp_cubic_1_up_system_cpu_s_per_gb": 2.0, "tcp_cubic_1_up_cpu_s_per_gb": 1.0}
    results = report.Results(data)
    root = ElementTree.fromstring(report.picture(results, report.LIGHT))
    assert panels(report, root)["CPU"]["bare link"] == "2.00 · 2.00"
    assert cells(report.table(results), "")[0][3:5] == ["CPU s/GB, processes", "CPU s/GB, machine"]


def test_pictures_are_well_formed(report: ModuleType, data: dict[str, Any]) -> None:
    drawn = []
    for palette in (report.LIGHT, report.DARK):
        root = ElementTree.fromstring(report.picture(report.Results(data), palette))
        assert root.tag == f"{SVG}svg"
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        assert any("A & B <processor>" in (element.text or "") for element in root.iter(f"{SVG}text"))
        bars = [element for element in root.iter(f"{SVG}rect") if element.get("x") == str(report.LABELS)]
        assert len(bars) == 2 * 6  # two panels with figures: two tunnels over both kinds of link, two over one
        for bar in bars:
            assert 0 <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width - 90  # room for the figures
            assert float(bar.attrib["y"]) + float(bar.attrib["height"]) <= height
        longest = max(float(bar.attrib["width"]) for bar in bars)
        # veth 20 and 30, fasttun 9 and 3: from zero, linear
        assert [round(float(bar.attrib["width"]) / longest, 2) for bar in bars[:4]] == [0.67, 1.0, 0.3, 0.1]
        title = root.find(f"{SVG}title")
        assert title is not None
        assert "fasttun 9.00" in (title.text or "")
        drawn.append([element.get("fill") for element in root.iter()])
    assert drawn[0] != drawn[1]


def test_asked_beside_measured(report: ModuleType, data: dict[str, Any]) -> None:
    def one(tunnel: str, round_: int, gbits: float) -> dict[str, Any]:
        return sample(tunnel, round_, gbits, rss_kib=32768)

    data["tunnels"] |= {"vxlan": "VXLAN", "fasttun-fast-path": "fasttun --fast-path"}
    data["samples"] = [
        one("fasttun", 1, 7), one("fasttun", 2, 7.49), one("fasttun", 3, 20),
        one("vxlan", 1, 10), one("vxlan", 2, 10), one("vxlan", 3, 10),
        one("fasttun-fast-path", 1, 11), one("fasttun-fast-path", 2, 12), one("fasttun-fast-path", 3, 9),
    ]  # fmt: skip
    table = report.table(report.Results(data))
    # 0.749 is shown as 0.75, and yet below it; a ratio of medians or of another round would differ
    assert cells(table, "TCP 1 stream over kernel VXLAN") == [
        ["TCP 1 stream over kernel VXLAN", "≥ 0.75×", "0.75×, not met", "1.10×, met"]]
    assert cells(table, "memory, MiB") == [["memory, MiB", "≤ 64", "32.0, met", ""]]
    assert cells(table, "TCP 1 stream over lametun (Go)") == []  # was not measured


def test_second_congestion_control_has_a_table_of_its_own(report: ModuleType, data: dict[str, Any]) -> None:
    data["congestion"]["bbr"] = None
    for one in data["samples"]:
        one["values"]["tcp_bbr_1_up_bps"] = one["values"]["tcp_cubic_1_up_bps"] / 2
    table = report.table(report.Results(data))
    assert not any("bbr" in cell for cell in cells(table, "")[0])
    assert cells(table, "")[2] == ["", "cubic 1, whole", "bbr 1, whole", "cubic 1, split", "bbr 1, split"]
    assert cells(table, "fasttun")[0] == ["fasttun", "9.00", "4.50", "3.00", "1.50"]
    assert "bbr" not in report.table(report.Results(data), compared=False)


@pytest.mark.parametrize("programs", [(), ("one",)])
def test_cpu_is_counted_for_the_machine_and_the_processes(monkeypatch: pytest.MonkeyPatch, programs: Any) -> None:
    spec = importlib.util.spec_from_file_location("bench_measure_under_test", SCRIPT.with_name("measure.py"))
    assert spec is not None
    assert spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, measure)
    spec.loader.exec_module(measure)
    assert 0 < measure.busy_seconds() <= measure.busy_seconds()
    spent = {"processes": iter([1.0, 2.0]), "machine": iter([10.0, 16.0])}
    monkeypatch.setattr(measure, "busy_seconds", lambda: next(spent["machine"]))
    monkeypatch.setattr(measure.Route, "cpu_seconds", lambda self: next(spent["processes"]))
    end = {"sum_received": {"bits_per_second": 8e9, "bytes": 2e9}, "sum_sent": {}}
    monkeypatch.setattr(measure, "_iperf", lambda *_: end)
    values = measure.tcp(measure.Route((), (), programs), seconds=1, streams=1, down=False, congestion="cubic")
    assert values["system_cpu_s_per_gb"] == 3.0
    assert values.get("cpu_s_per_gb") == (0.5 if programs else None)  # a tunnel in the kernel has no process


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
