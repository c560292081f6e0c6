"""`fasttun top [NAME]`: a running tunnel, live, by rich: moving graphs, rates, peers, processor time.

Keys: q quits, s sorts the peers anew, p pauses. Not for: the documents (`fasttun.observe.snapshot`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .report import size
from .status import ago

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["top", "view"]

BLOCKS = " ▁▂▃▄▅▆▇█"
SORTS = ("received", "sent", "name")
_HEIGHT_BESIDE_PEERS = 13


@click.command()
@click.argument("name", required=False)
@click.option("--interval", default=1.0, show_default=True, type=click.FloatRange(0.1, 60), metavar="S",
              help="Between two looks.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N looks.")
def top(name: str | None, interval: float, count: int | None) -> int:
    """Watch a running tunnel: throughput, packets, drops, peers, processor time."""
    from ..observe.client import choose

    try:
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError:
        raise ImportError("fasttun top needs rich: pip install 'fasttun[rich]'") from None
    one = choose(name)
    history: deque[dict[str, Any]] = deque(maxlen=512)
    console = Console()
    sort, paused, looks = 0, False, 0
    with _keys() as key, Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while count is None or looks < count:
            if not paused:
                history.append(one.ask())
                looks += 1
            live.update(view(list(history), console, SORTS[sort], paused), refresh=True)
            if looks == count:
                break
            pressed = key(interval)
            if pressed in ("q", "\x03", "\x1b"):
                break
            if pressed == "s":
                sort = (sort + 1) % len(SORTS)
            paused = paused != (pressed == "p")
    return 0


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key: it, or ""."""
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios
    import tty

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    tty.setcbreak(stdin)
    try:
        # Not sys.stdin.read: what its buffer holds, select does not see.
        yield lambda wait_s: os.read(stdin, 1).decode(errors="replace") if select.select(
            [stdin], [], [], wait_s)[0] else ""
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _no_keys(wait_s: float) -> str:
    time.sleep(wait_s)
    return ""


def view(history: list[dict[str, Any]], console: Console, sort: str, paused: bool = False) -> RenderableType:
    """What stands on the screen after these documents, for the console's size."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now, width = history[-1], console.width
    mode = "WireGuard" if now["mode"] == "wireguard" else "plain"
    lines: list[RenderableType] = [
        Text(f"{now['name']}  {mode}  MTU {now['device']['mtu']}  up {ago(now['uptime_s'])[:-4]}"
             f"  workers {_workers(history)}" + ("  paused" if paused else ""), style="bold", overflow="ellipsis",
             no_wrap=True)]
    for direction, colour in (("inbound", "blue"), ("outbound", "green")):
        rates = [8 * rate for rate in _rates(history, direction, "bytes_out")]
        packets = _rates(history, direction, "packets_out")
        speed = rates[-1] if rates else 0.0
        dropped = sum(now[direction]["drops"].values())
        lines.append(Text(f"{direction:8} {_bits(speed):>12}  {packets[-1] if packets else 0:>9,.0f} packets/s  "
                          f"{size(now[direction]['bytes_out']):>8}  dropped {dropped:,}", no_wrap=True))
        lines += [Text(line, style=colour, no_wrap=True) for line in _graph(rates, width, 3)]
    table = Table(box=None, pad_edge=False, expand=True)
    wireguard = now["mode"] == "wireguard"
    for head, right in (("peer", False), ("inside", False), ("handshake" if wireguard else "heard", True),
                        ("received/s", True), ("sent/s", True)):
        table.add_column(head, justify="right" if right else "left", no_wrap=True, overflow="ellipsis",
                         header_style="dim")
    room = max(1, console.height - _HEIGHT_BESIDE_PEERS)
    for peer, received, sent in _peers(history, sort)[:room]:
        last = peer.get("silent_s")
        if wireguard:
            last = now["time"] - peer["last_handshake"] if peer["last_handshake"] else None
        who = f"{peer['id'][:10]}…" if wireguard else peer["id"]
        table.add_row(who, ", ".join(peer["addresses"]), ago(last), _bits(8 * received), _bits(8 * sent))
    lines += [table, Text(f"q quit  s sort ({sort})  p pause", style="dim")]
    return Group(*lines)


def _rates(history: list[dict[str, Any]], direction: str, field: str) -> list[float]:
    return [max(0.0, (now[direction][field] - before[direction][field]) / max(1e-3, now["time"] - before["time"]))
            for before, now in itertools.pairwise(history)]


def _graph(values: list[float], width: int, height: int) -> list[str]:
    """The last values as columns of block characters, the newest on the right, the highest to the top."""
    shown = values[-width:]
    peak = max(shown, default=0.0) or 1.0
    levels = [round(value / peak * 8 * height) for value in shown]
    return ["".join(BLOCKS[min(8, max(0, level - 8 * row))] for level in levels).rjust(width)
            for row in reversed(range(height))]


def _bits(value: float) -> str:
    for unit in ("bit/s", "kbit/s", "Mbit/s", "Gbit/s"):
        if value < 999.5 or unit == "Gbit/s":
            break
        value /= 1000
    return f"{value:.{0 if value >= 99.5 or unit == 'bit/s' else 1 if value >= 9.95 else 2}f} {unit}"


def _workers(history: list[dict[str, Any]]) -> str:
    if len(history) < 2:
        return "–"
    before, now = history[-2:]
    gap = max(1e-3, now["time"] - before["time"])
    return " ".join(f"{100 * (one['cpu_s'] - other['cpu_s']) / gap:.0f}%"
                    for one, other in zip(now["workers"], before["workers"], strict=False)) or "–"


def _peers(history: list[dict[str, Any]], sort: str) -> list[tuple[dict[str, Any], float, float]]:
    now = history[-1]
    before = history[-2] if len(history) > 1 else now
    gap = max(1e-3, now["time"] - before["time"])
    known = {peer["id"]: peer for peer in before["peers"]}

    def rate(peer: dict[str, Any], field: str) -> float:
        return max(0.0, (int(peer[field]) - int(known.get(peer["id"], peer)[field])) / gap)

    rows = [(peer, rate(peer, "rx_bytes"), rate(peer, "tx_bytes")) for peer in now["peers"]]
    if sort == "name":
        return sorted(rows, key=lambda row: str(row[0]["id"]))
    return sorted(rows, key=lambda row: -row[1 if sort == "received" else 2])
