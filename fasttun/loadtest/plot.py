"""A measurement's document as a picture, SVG or PNG by the file's name. Needs matplotlib, which is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigurationError

__all__ = ["check", "draw"]

SUFFIXES = (".svg", ".png")
_COLOURS = {"up": "#2a6f97", "down": "#e07a2f"}


def check(path: str) -> None:
    """That `draw` will be able to: ConfigurationError for the name, ImportError without matplotlib."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigurationError("plot", f"{path!r} is neither SVG nor PNG", "use a name in .svg or .png")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigurationError("plot", f"{path!r} is in no directory that there is", "make it first")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("fasttun bench --plot needs matplotlib: pip install 'fasttun[plot]'") from None


def draw(document: dict[str, Any], path: str) -> None:
    """Throughput on the left, round-trip times on the right. OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    throughput, times = figure.subplots(1, 2, width_ratios=[3, 2])
    bars = [(f"TCP {one['way']}\n{one['streams']} stream{'s' if one['streams'] > 1 else ''}", one)
            for one in document["tcp"]]
    bars += [(f"UDP {one['way']}\n{one['loss']:.1%} lost", one) for one in document["udp"]]
    shown = throughput.bar([name for name, _ in bars], [one["bits_per_s"] / 1e6 for _, one in bars],
                           color=[_COLOURS[one["way"]] for _, one in bars])
    throughput.bar_label(shown, fmt="%.0f")
    throughput.set_ylabel("Mbit/s")
    throughput.set_title("Throughput of the payload")
    throughput.tick_params(axis="x", labelsize=8)
    known = [one for one in document["rtt"] if one["avg_us"] is not None]
    middle = [one["avg_us"] / 1000 for one in known]
    spread = [[(one["avg_us"] - one["min_us"]) / 1000 for one in known],
              [(one["max_us"] - one["avg_us"]) / 1000 for one in known]]
    times.errorbar([one["load"] for one in known], middle, yerr=spread, fmt="o", color="#444", capsize=6)
    times.set_yscale("log")
    times.set_ylabel("ms")
    times.set_title("Round-trip time: least, average, most")
    times.margins(x=0.3)
    for axes in (throughput, times):
        axes.spines[["top", "right"]].set_visible(False)
    name = f"{document['tunnel']}, " if document["tunnel"] else ""
    figure.suptitle(f"fasttun {document['version']}: {name}{document['local']} to {document['peer']}")
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.lower().endswith(".svg") else None)
