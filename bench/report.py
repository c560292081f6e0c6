"""From the end-to-end benchmark's JSON to what people read: the README's table, docs/benchmark.md, two pictures.

    python -m bench.report                    the newest complete bench/results/*.json
    python -m bench.report FILE [--check]     --check: print, write nothing

Medians over the rounds; a ratio is the median of the rounds' own ratios, tunnel : reference in one round.
Measures nothing, needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
REFERENCE, BASELINE = "veth", "pure-python"
OURS, ENCRYPTED, FAST_PATH = "fasttun", "fasttun-wireguard", "fasttun-fast-path"
BOTH_WAYS = ("up", "down")
BUSY_BELOW_IDLE = 0.95


class ReportError(Exception):
    """The JSON or the README is not what it has to be."""


class Results:
    """The samples of one run, by kind of link, tunnel and round."""

    def __init__(self, data: dict[str, Any]) -> None:
        if data.get("schema") != 1:
            raise ReportError(f"schema {data.get('schema')!r}, this reads 1")
        self.data = data
        self._samples: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        for sample in data["samples"]:
            self._samples.setdefault((sample["link"], sample["tunnel"]), {})[sample["round"]] = sample["values"]

    def idle(self) -> float | None:
        """Median share of the machine that was free before the measures."""
        shares = [sample["idle"] for sample in self.data["samples"] if "idle" in sample]
        return statistics.median(shares) if shares else None

    def short(self, link: str) -> list[str]:
        """The tunnels that have fewer rounds over this kind of link than the run was to have: it was ended early."""
        return [name for name in self.tunnels()
                if 0 < len(self._samples.get((link, name), ())) < self.data["settings"]["rounds"]]

    def links(self) -> list[str]:
        return [link for link in self.data["settings"]["links"] if any(key[0] == link for key in self._samples)]

    def tunnels(self) -> list[str]:
        """Those that were measured at least once, in the order of a round."""
        return [name for name in self.data["tunnels"] if any(key[1] == name for key in self._samples)]

    def title(self, tunnel: str) -> str:
        return str(self.data["tunnels"][tunnel])

    def rounds(self, link: str, tunnel: str, keys: Sequence[str]) -> dict[int, float]:
        """Per round the mean of those of `keys` that were measured (both directions of one measure, say)."""
        found = {}
        for round_, values in self._samples.get((link, tunnel), {}).items():
            present = [values[key] for key in keys if key in values]
            if present:
                found[round_] = statistics.fmean(present)
        return found

    def median(self, link: str, tunnel: str, keys: Sequence[str]) -> float | None:
        rounds = self.rounds(link, tunnel, keys)
        return statistics.median(rounds.values()) if rounds else None

    def ratio(self, link: str, tunnel: str, reference: str, keys: Sequence[str]) -> float | None:
        """Median over the rounds that have both."""
        ours, theirs = self.rounds(link, tunnel, keys), self.rounds(link, reference, keys)
        ratios = [ours[round_] / theirs[round_] for round_ in ours if theirs.get(round_)]
        return statistics.median(ratios) if ratios else None


@dataclass(frozen=True)
class Column:
    head: str
    keys: tuple[str, ...]
    divisor: float = 1.0


def tcp_keys(congestion: str, streams: int, what: str = "bps") -> tuple[str, ...]:
    return tuple(f"tcp_{congestion}_{streams}_{direction}_{what}" for direction in BOTH_WAYS)


def measured_congestions(results: Results) -> list[str]:
    """The congestion controls that the kernel had; at least one name, and the first is what tables compare by."""
    return [name for name, absent in results.data["congestion"].items() if not absent] or ["cubic"]


def columns(results: Results) -> list[Column]:
    """What the table shows, TCP by the first congestion control; a column without any figure is left out."""
    congestion = measured_congestions(results)[0]
    wanted = [Column(f"TCP {congestion} {streams}, Gbit/s", tcp_keys(congestion, streams), 1e9) for streams in (1, 4)]
    wanted += [
        Column("UDP 64 B, kpps", ("udp_64_pps",), 1e3),
        Column("UDP 1400 B, kpps", ("udp_1400_pps",), 1e3),
        Column("iperf3 -u 64 B, kpps", ("iperf_udp_64_pps",), 1e3),
        Column("ping min, µs", ("ping_min_us",)),
        Column("ping avg, µs", ("ping_avg_us",)),
        Column("ping under load, µs", ("ping_loaded_avg_us",)),
        Column("CPU s/GB, processes", tcp_keys(congestion, 1, "cpu_s_per_gb")),
        Column("CPU s/GB, machine", tcp_keys(congestion, 1, "system_cpu_s_per_gb")),
        Column("RSS, MiB", ("rss_kib",), 1024),
    ]
    return _with_figures(results, wanted)


def _with_figures(results: Results, wanted: Iterable[Column]) -> list[Column]:
    names, links = results.tunnels(), results.links()
    return [
        column
        for column in wanted
        if any(results.median(link, name, column.keys) is not None for link in links for name in names)
    ]


def number(value: float | None) -> str:
    """Three digits at most, for nobody can measure more here; – for nothing measured."""
    if value is None:
        return "–"
    if value >= 99.5:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


LINK_TITLES = {
    "whole": "The veth pair carries a UDP segmentation frame whole (its default)",
    "split": "`tx-udp-segmentation off`, as on a network card without that feature",
    "cut": "No segmentation of UDP or of tunnels at all (`tx-udp*-segmentation off`)",
}


def table(results: Results, *, compared: bool = True) -> str:
    """Markdown: a table for each kind of link; with `compared` also the tables of ratios."""
    data, settings = results.data, results.data["settings"]
    machine = data["machine"]
    changed = " with changes" if data.get("uncommitted") else ""
    shown = columns(results)
    congestion = measured_congestions(results)[0]
    stream = tcp_keys(congestion, 1)
    parts = [
        f"Measured {data['date'][:10]} on {machine['cores']} cores of {machine['cpu']} "
        f"({machine['architecture']}), Linux {data['kernel']}, commit {data['commit'] or 'none'}{changed}: "
        f"two network namespaces, one veth pair, inner MTU {settings['inner_mtu']} (bare veth 1500), "
        f"medians of {settings['rounds']} round{'s' if settings['rounds'] != 1 else ''} of "
        f"{settings['seconds']} s with all tunnels in turn."
    ]
    for link in results.links():
        heads = ["", *(column.head for column in shown), "× veth", "× pure Python"]
        rows = [heads, ["---", *("---:" for _ in heads[1:])]]
        for name in results.tunnels():
            figures = [results.median(link, name, column.keys) for column in shown]
            if all(figure is None for figure in figures):
                continue
            cells = [
                number(figure / column.divisor if figure is not None else None)
                for figure, column in zip(figures, shown, strict=True)
            ]
            ratios = [number(results.ratio(link, name, other, stream)) for other in (REFERENCE, BASELINE)]
            emphasis = "**" if name in (OURS, ENCRYPTED) else ""
            rows.append([f"{emphasis}{results.title(name)}{emphasis}", *cells, *ratios])
        parts.append(f"**{LINK_TITLES.get(link, link)}**")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if compared:
        parts += _controls(results)
        parts += _asked(results)
    for link in results.links() if compared else ():
        parts.append(_compared(results, link, shown, OURS, results.tunnels()))
        if ENCRYPTED in results.tunnels():
            others = [name for name in results.tunnels() if name.startswith("wireguard-go")]
            parts.append(_compared(results, link, shown, ENCRYPTED, others))
    parts.append(_notes(results, congestion))
    return "\n\n".join(parts)


def _compared(results: Results, link: str, shown: Sequence[Column], ours: str, others: Sequence[str]) -> str:
    """Our figure over each other tunnel's, a median of the rounds' own ratios."""
    chosen = [column for column in shown if column.head != "ping min, µs"]
    rows = [[f"{results.title(ours)}: its figure", *(_short(column.head) for column in chosen)]]
    rows.append(["---", *("---:" for _ in chosen)])
    for name in others:
        ratios = [results.ratio(link, ours, name, column.keys) for column in chosen]
        if name != ours and any(ratio is not None for ratio in ratios):
            rows.append([f"over {results.title(name)}", *map(number, ratios)])
    kind = {"whole": "link as it is", "split": "link without UDP segmentation"}.get(link, f"link {link}")
    return f"**{results.title(ours)} as ratios, {kind}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _short(head: str) -> str:
    """A column's head without its unit, but whole where the words after the comma tell two columns apart."""
    return head if head.startswith("CPU") else head.split(",")[0]


def _controls(results: Results) -> list[str]:
    """One table more when several congestion controls were measured: they beside each other, both links."""
    names = measured_congestions(results)
    wanted = [
        Column(f"{name} {streams}", tcp_keys(name, streams), 1e9) for streams in (1, 4) for name in names
    ]
    shown = _with_figures(results, wanted) if len(names) > 1 else []
    if not shown:
        return []
    heads = ["", *(f"{column.head}, {link}" for link in results.links() for column in shown)]
    rows = [heads, ["---", *("---:" for _ in heads[1:])]]
    for name in results.tunnels():
        figures = [results.median(link, name, column.keys) for link in results.links() for column in shown]
        if any(figure is not None for figure in figures):
            rows.append([results.title(name), *(number(None if one is None else one / 1e9) for one in figures)])
    return ["**TCP by congestion control and streams, Gbit/s**", "\n".join(f"| {' | '.join(row)} |" for row in rows)]


@dataclass(frozen=True)
class Asked:
    """One goal: `ours` : `reference` over `link`, or a figure of `ours` alone (reference None, over divisor)."""

    goal: str
    keys: tuple[str, ...]
    ours: str
    reference: str | None
    limit: float
    at_least: bool = True
    link: str = "whole"
    divisor: float = 1.0
    fast_path: bool = False  # the fast path is measured by this goal too


def goals(congestion: str) -> list[Asked]:
    """What the project set out for, in the order of the table that asked for it."""
    stream, cpu = tcp_keys(congestion, 1), tcp_keys(congestion, 1, "cpu_s_per_gb")
    ping = ("ping_avg_us",)
    one_call, split = "fasttun-one-call", "link without UDP segmentation"
    return [
        Asked("TCP 1 stream over lametun (Go)", stream, OURS, "lametun", 15, fast_path=True),
        Asked("TCP 1 stream over wireguard-go of Debian", stream, OURS, "wireguard-go", 12, fast_path=True),
        Asked("TCP 1 stream over wireguard-go of 2025", stream, OURS, "wireguard-go-2025", 3.5, fast_path=True),
        Asked("TCP 1 stream over kernel VXLAN", stream, OURS, "vxlan", 0.75, fast_path=True),
        Asked("64-byte UDP from iperf3 over one packet a call", ("iperf_udp_64_pps",), OURS, one_call, 1.6),
        Asked("64-byte UDP by sendmmsg over kernel VXLAN", ("udp_64_pps",), OURS, "vxlan", 2),
        Asked(f"TCP 1 stream over wireguard-go of 2025, {split}", stream, OURS, "wireguard-go-2025", 3, link="split",
              fast_path=True),
        Asked("ping, idle, over one packet a call", ping, OURS, one_call, 0.6, at_least=False, fast_path=True),
        Asked("ping, idle, with --busy-poll over kernel VXLAN", ping, "fasttun-busy-poll", "vxlan", 4, at_least=False,
              fast_path=True),
        Asked("CPU seconds per GB (processes) over one packet a call", cpu, OURS, one_call, 0.1, at_least=False),
        Asked("memory, MiB", ("rss_kib",), OURS, None, 64, at_least=False, divisor=1024),
    ]  # fmt: skip


def _asked(results: Results) -> list[str]:
    """Each goal beside what was measured; ratios within rounds. Nothing when none of it was measured."""
    with_fast_path = FAST_PATH in results.tunnels()
    rows = [["", "asked", "fasttun", *(["fasttun --fast-path"] if with_fast_path else [])]]
    rows.append(["---", *("---:" for _ in rows[0][1:])])
    for goal in goals(measured_congestions(results)[0]):
        measured = [_reached(results, goal, goal.ours)]
        if with_fast_path:
            measured.append(_reached(results, goal, FAST_PATH) if goal.fast_path else "")
        if measured[0] != number(None):
            bound = f"{'≥' if goal.at_least else '≤'} {goal.limit:g}{'×' if goal.reference else ''}"
            rows.append([goal.goal, bound, *measured])
    if len(rows) == 2:
        return []
    return ["**Asked and measured**", "\n".join(f"| {' | '.join(row)} |" for row in rows)]


def _reached(results: Results, goal: Asked, ours: str) -> str:
    """The figure with whether it meets the goal, as the exact figure says and not the rounded one."""
    if goal.reference is None:
        value = results.median(goal.link, ours, goal.keys)
        value = value / goal.divisor if value is not None else None
    else:
        value = results.ratio(goal.link, ours, goal.reference, goal.keys)
    if value is None:
        return number(None)
    met = value >= goal.limit if goal.at_least else value <= goal.limit
    return f"{number(value)}{'×' if goal.reference else ''}, {'met' if met else 'not met'}"


def _notes(results: Results, congestion: str) -> str:
    data = results.data
    loss = 100 * data["settings"]["loss_allowed"]
    lines = [
        f"TCP: mean of both directions; × is the ratio of one {congestion} stream, taken within each round. "
        f"UDP: the highest rate with a loss of at most {loss:g} %, closed loop; iperf3 -u: what arrives of an "
        "open loop. CPU, per GB of one TCP stream: processes are both ends of the tunnel, without what the kernel does "
        "on nobody's account; machine, where given, is all busy time of all cores, the generator's included. "
        "The spread between runs is about a quarter: compare rows, not tables of two days."
    ]
    idle = results.idle()
    if idle is not None and idle < BUSY_BELOW_IDLE:
        lines.append(f"The machine was busy with other work: only {100 * idle:.0f} % idle between measures.")
    for link in results.links():
        if results.short(link):
            names = ", ".join(map(results.title, results.short(link)))
            lines.append(f"Fewer rounds, {LINK_TITLES.get(link, link)}: {names}.")
    lossy = _lossy(results, data["settings"]["loss_allowed"])
    if lossy:
        lines.append(f"Lost more than that at every window: {lossy}.")
    lines += [f"Missing: {results.title(name)} ({reason})." for name, reason in data["missing"].items()]
    lines += [f"Missing: TCP {name} ({reason})." for name, reason in data["congestion"].items() if reason]
    failures = sorted({(failure["tunnel"], failure["reason"]) for failure in data["failures"]})
    lines += [f"Failed: {results.title(name)} ({reason})." for name, reason in failures]
    return "<br>\n".join(lines)


def _lossy(results: Results, allowed: float) -> str:
    found = {
        f"{results.title(name)} ({payload} B)"
        for link in results.links()
        for name in results.tunnels()
        for payload in (64, 1400)
        if (results.median(link, name, (f"udp_{payload}_loss",)) or 0) > allowed
    }
    return ", ".join(sorted(found))


def put_between_markers(text: str, inside: str) -> str:
    """`text` with `inside` between the two markers. ReportError unless each is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"{BEGIN} and {END} have to be there once each, in this order")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{inside}\n{END}{after}"


@dataclass(frozen=True)
class Palette:
    background: str
    text: str
    faint: str
    ours: str
    ours_second: str
    other: str
    other_second: str


LIGHT = Palette("#ffffff", "#1f2328", "#59636e", "#0969da", "#80b8f2", "#8c959f", "#d1d5da")
DARK = Palette("#0d1117", "#f0f6fc", "#9198a1", "#4493f8", "#1f4e8c", "#8b949e", "#3d444d")

WIDTH, MARGIN, LABELS, RIGHT = 580, 14, 262, 100  # narrow, that text stays legible on a phone
ROW, BAR, THIN = 25, 11, 4  # a row's height; the bar of the first kind of link, that of the second
FONT = "-apple-system,BlinkMacSystemFont,'Segoe UI','Noto Sans',Helvetica,Arial,sans-serif"


@dataclass(frozen=True)
class Panel:
    """One quantity of the picture: a figure in the JSON over `divisor` is in `unit`."""

    title: str
    unit: str
    keys: tuple[str, ...]
    divisor: float
    higher_is_better: bool


def panels(results: Results) -> list[Panel]:
    """Throughput, small packets, latency, CPU: of the whole machine where the JSON has it for every bar."""
    congestion = measured_congestions(results)[0]
    system = tcp_keys(congestion, 1, "system_cpu_s_per_gb")
    cpu = ("CPU of the whole machine", system)
    if not any(results.rounds(link, name, system) for link in results.links() for name in results.tunnels()):
        cpu = ("CPU of both ends' processes", tcp_keys(congestion, 1, "cpu_s_per_gb"))
    return [
        Panel(f"TCP, one stream ({congestion})", "Gbit/s", tcp_keys(congestion, 1), 1e9, True),
        Panel("UDP, 64 bytes, without loss", "kpps", ("udp_64_pps",), 1e3, True),
        Panel("Ping, idle, average", "µs", ("ping_avg_us",), 1.0, False),
        Panel(cpu[0], "s/GB", cpu[1], 1.0, False),
    ]


def picture(results: Results, palette: Palette) -> str:
    """An SVG: four panels of horizontal bars from zero, best first; a thin second bar for the second kind of link."""
    links = results.links()
    body: list[str] = []
    top = 34.0
    _text(body, MARGIN, 27, "fasttun and its peers, both ends on one machine", palette.text, size=18, weight=600)
    if len(links) > 1:
        top = _legend(body, top, links, palette)
    shown = panels(results)
    for panel in shown:
        top = _panel(body, top + 20, results, panel, palette)
    machine = results.data["machine"]
    top += 24
    for line in (
        "All scales begin at zero. –: not measured.",
        f"{results.data['date'][:10]}, Linux {results.data['kernel']}, "
        f"medians of {results.data['settings']['rounds']}, {machine['cores']} cores",
        str(machine["cpu"]),
    ):
        _text(body, MARGIN, top, line, palette.faint, size=13)
        top += 18
    height = round(top)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" font-family="{escape(FONT)}">',
            f"<title>{escape(_summary(results, shown, links))}</title>",
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="{palette.background}"/>',
            *body,
            "</svg>\n",
        ]
    )


def _summary(results: Results, shown: Iterable[Panel], links: list[str]) -> str:
    """The picture in words, for those who do not see it."""
    said = []
    for panel in shown:
        figures = [(name, results.median(links[0], name, panel.keys)) for name in results.tunnels()] if links else []
        listed = ", ".join(f"{results.title(name)} {number(value / panel.divisor)}" for name, value in figures if value)
        said.append(f"{panel.title}, {panel.unit}: {listed}.")
    return " ".join(said)


def _legend(body: list[str], top: float, links: list[str], palette: Palette) -> float:
    words = {"whole": "link carries UDP segmentation frames whole", "split": "link without UDP segmentation"}
    for link, fill, thick in zip(links, (palette.other, palette.other_second), (BAR, THIN), strict=False):
        top += 20
        _bar(body, MARGIN, top - 5 - thick / 2, 24, thick, fill)
        _text(body, MARGIN + 34, top, words.get(link, link), palette.faint, size=14)
    return top


def _panel(body: list[str], top: float, results: Results, panel: Panel, palette: Palette) -> float:
    links = results.links()
    rows: list[tuple[str, list[float | None]]] = []
    for name in results.tunnels():
        medians = [results.median(link, name, panel.keys) for link in links]
        rows.append((name, [value / panel.divisor if value is not None else None for value in medians]))
    known = [value for _, values in rows for value in values if value is not None]
    largest = max(known, default=0.0) or 1.0
    sign = -1 if panel.higher_is_better else 1

    def best_first(row: tuple[str, list[float | None]]) -> tuple[bool, float]:
        first = next((value for value in row[1] if value is not None), None)
        return first is None, sign * (first or 0.0)

    _text(body, MARGIN, top + 16, f"{panel.title}, {panel.unit}", palette.text, size=16, weight=600)
    better = "higher is better" if panel.higher_is_better else "lower is better"
    _text(body, WIDTH - MARGIN, top + 16, better, palette.faint, size=13, anchor="end")
    top += 26
    for name, values in sorted(rows, key=best_first):
        ours = name.startswith("fasttun")
        fills = (palette.ours, palette.ours_second) if ours else (palette.other, palette.other_second)
        _text(
            body, LABELS - 10, top + ROW / 2 + 4, results.title(name), palette.ours if ours else palette.text,
            size=14, weight=600 if ours else 400, anchor="end",
        )  # fmt: skip
        y, end = top + (ROW - BAR - THIN - 1) / 2, float(LABELS)
        for value, fill, thick in zip(values, fills, (BAR, THIN), strict=False):
            if value is not None:
                length = max(1.5, (WIDTH - LABELS - RIGHT) * value / largest)
                end = max(end, LABELS + length)
                _bar(body, LABELS, y, length, thick, fill)
            y += thick + 1
        figures = " · ".join(map(number, values)) if any(value is not None for value in values) else "–"
        _text(body, end + 6, top + ROW / 2 + 4, figures, palette.text, size=14)
        top += ROW
    return top


def _bar(body: list[str], x: float, y: float, width: float, height: float, fill: str) -> None:
    body.append(f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="2" fill="{fill}"/>')


def _text(
    body: list[str],
    x: float,
    y: float,
    words: str,
    fill: str,
    *,
    size: int = 13,
    weight: int = 400,
    anchor: str = "start",
) -> None:
    body.append(
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


def newest(directory: Path) -> Path:
    """The newest complete result, by the date in its name. ReportError if there is none."""
    for path in sorted(directory.glob("*.json"), reverse=True):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and data.get("schema") == 1 and data.get("complete"):
            return path
    raise ReportError(f"no complete result in {directory}: run python -m bench.endtoend first")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="default: the newest complete one in bench/results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "img", metavar="DIRECTORY")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmark.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="print the table, write nothing")
    given = parser.parse_args(arguments)
    try:
        source = given.file or newest(ROOT / "bench" / "results")
        results = Results(json.loads(source.read_text()))
        text = table(results)
        if given.check:
            print(text)
            return 0
        readme = put_between_markers(given.readme.read_text(), table(results, compared=False))
    except (ReportError, OSError, ValueError, KeyError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    given.readme.write_text(readme)
    given.page.write_text(f"# Measured side by side\n\n{text}\n")
    given.images.mkdir(parents=True, exist_ok=True)
    for name, palette in (("bench-light.svg", LIGHT), ("bench-dark.svg", DARK)):
        (given.images / name).write_text(picture(results, palette))
    print(f"report: {source} → {given.readme}, {given.page}, {given.images}/bench-{{light,dark}}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
