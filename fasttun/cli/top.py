"""`fasttun top [NAME]`: a running tunnel, live, by rich: moving graphs, rates, drops, peers, processor time.

Keys: q quits, s sorts the peers anew, the arrows choose a peer for a graph of its own, p pauses. Not for: the documents
(`fasttun.observe.snapshot`), nor what they say of round trips and loss (docs/status-schema.md).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .report import size
from .status import ago, quality

if TYPE_CHECKING:
    from rich.console import Console, OverflowMethod, RenderableType
    from rich.table import Table

__all__ = ["View", "top", "view"]

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII = " .,:;=+*#"
"""The same where the terminal's encoding has no blocks."""
SORTS = ("received", "sent", "name")
Row = tuple[dict[str, Any], float, float]
"""A peer, and the bytes a second from and to it."""
_HEIGHT_BESIDE_PEERS = 12
_PEER_HEIGHT = 2
_WIDTH_FOR_QUALITY = 76
_KEY = re.compile("\x1b[\\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
"""One key: a terminal's control sequence, or a character."""
_UP, _DOWN = ("\x1b[A", "\x1bOA", "k"), ("\x1b[B", "\x1bOB", "j")


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
    seen = View()
    looks, due = 0, 0.0
    plain = console.is_terminal and console.is_dumb_terminal  # where Live shows nothing before its end
    with _keys() as keys, Live(console=console, screen=console.is_terminal and not plain, auto_refresh=False) as live:
        while True:
            if not seen.paused and time.monotonic() >= due:  # a key in between takes no look of its own
                history.append(one.ask())
                looks += 1
                due = time.monotonic() + interval
            shown = view(list(history), console, seen)
            if plain:
                console.print(shown)
            else:
                live.update(shown, refresh=True)
            if looks == count:
                return 0
            pressed = keys(interval if seen.paused else max(0.0, due - time.monotonic()))
            if not all(seen.take(key, _peers(list(history), seen.sort)) for key in pressed):
                return 0


@dataclass
class View:
    """What a person has chosen to see."""

    sort: str = SORTS[0]
    paused: bool = False
    peer: str | None = None
    """The `id` of the peer with a graph of its own."""

    def take(self, key: str, rows: list[Row]) -> bool:
        """Act on a key, with the peers in the order shown; whether to go on."""
        if key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key == "p":
            self.paused = not self.paused
        elif key in _DOWN or key in _UP:
            self._move(1 if key in _DOWN else -1, [row[0]["id"] for row in rows])
        return key not in ("q", "\x03", "\x1b")

    def _move(self, step: int, ids: list[str]) -> None:
        """To the next peer, or past the first one back to none."""
        at = (ids.index(self.peer) if self.peer in ids else -1) + step
        self.peer = ids[min(at, len(ids) - 1)] if at >= 0 and ids else None


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], list[str]]]:
    """A function that waits so many seconds for keys, and gives those that were pressed."""
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios
    import tty

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def wait(wait_s: float) -> list[str]:
        # Not sys.stdin.read: what its buffer holds, select does not see.
        if not select.select([stdin], [], [], wait_s)[0]:
            return []
        return _KEY.findall(os.read(stdin, 256).decode(errors="replace")) or ["q"]  # nothing: it was hung up

    tty.setcbreak(stdin)
    try:
        yield wait
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _no_keys(wait_s: float) -> list[str]:
    time.sleep(wait_s)
    return []


def view(history: list[dict[str, Any]], console: Console, seen: View) -> RenderableType:
    """What stands on the screen after these documents, for the console's size."""
    from rich.console import Group
    from rich.text import Text

    now = history[-1]
    cut: OverflowMethod = "crop" if console.options.ascii_only else "ellipsis"

    def line(text: str, style: str = "") -> Text:
        return Text(text, style=style, overflow=cut, no_wrap=True)

    mode = "WireGuard" if now["mode"] == "wireguard" else "plain"
    lines: list[RenderableType] = [
        line(f"{now['name']}  {mode}  MTU {now['device']['mtu']}  up {ago(now['uptime_s'])[:-4]}"
             f"  workers {_workers(history)}" + ("  paused" if seen.paused else ""), "bold")]
    for direction, colour in (("inbound", "blue"), ("outbound", "green")):
        rates = [8 * rate for rate in _rates(history, direction, "bytes_out")]
        packets = _rates(history, direction, "packets_out")
        lines.append(line(f"{direction:8} {_bits(rates[-1] if rates else 0.0):>12}  "
                          f"{packets[-1] if packets else 0:>9,.0f} packets/s  "
                          f"{size(now[direction]['bytes_out']):>8} in all"))
        lines += [line(row, colour) for row in _graph(rates, console, 3)]
    rows = _peers(history, seen.sort)
    room = console.height - _HEIGHT_BESIDE_PEERS
    chosen = next((row for row in rows if row[0]["id"] == seen.peer), None)
    if chosen is not None:
        room -= 1 + _PEER_HEIGHT
    lines.append(line("dropped  " + (", ".join(_drops(history)) or "nothing")))
    lines.append(_table(now, rows, max(1, room), seen.peer, cut, console.width))
    if chosen is not None:
        both = [8 * rate for rate in _peer_rates(history, chosen[0]["id"])]
        lines.append(line(f"{chosen[0]['id']}  {_bits(both[-1] if both else 0.0)}, both ways"))
        lines += [line(row, "magenta") for row in _graph(both, console, _PEER_HEIGHT)]
    arrows = "up/down" if console.options.ascii_only else "↑↓"
    lines.append(line(f"q quit  s sort ({seen.sort})  {arrows} graph of a peer  p pause", "dim"))
    return Group(*lines)


def _table(now: dict[str, Any], rows: list[Row], room: int, chosen: str | None, cut: OverflowMethod,
           screen: int) -> Table:
    """As many peers as there is room for, the chosen one among them."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=True, padding=(0, 1, 0, 0))
    wireguard = now["mode"] == "wireguard"
    narrow = screen < _WIDTH_FOR_QUALITY
    for head, width in (("peer", 0), ("inside", 0), ("handshake" if wireguard else "heard", 9),
                        *(() if narrow else (("rtt", 7), ("lost", 5))), ("received/s", 11), ("sent/s", 11)):
        table.add_column(head, justify="right" if width else "left", no_wrap=True, overflow=cut, header_style="dim",
                         min_width=None if narrow or not width else width)
    if not narrow:  # what is left for the two that may be long
        left = screen - sum(column.min_width or 0 for column in table.columns) - len(table.columns)
        who_width = max((len(row[0]["id"][:11] if wireguard else row[0]["id"]) + 2 for row in rows), default=4)
        table.columns[0].max_width = min(who_width, left - 8)
        table.columns[1].max_width = left - table.columns[0].max_width
    ids = [row[0]["id"] for row in rows]
    first = max(0, ids.index(chosen) - room + 1) if chosen in ids else 0
    for peer, received, sent in rows[first:first + room]:
        last = peer.get("silent_s")
        if wireguard:
            last = now["time"] - peer["last_handshake"] if peer["last_handshake"] else None
        who = peer["id"][:10] + ("" if cut == "crop" else "…") if wireguard else peer["id"]
        mark = ("> " if peer["id"] == chosen else "  ") if chosen is not None else ""
        table.add_row(mark + who, ", ".join(peer["addresses"]), ago(last), *(() if narrow else quality(peer)),
                      _bits(8 * received), _bits(8 * sent), style="bold" if peer["id"] == chosen else "")
    return table


def _drops(history: list[dict[str, Any]]) -> list[str]:
    """The reasons, the most frequent first: how many so far, and a second where it goes on."""
    now, before = history[-1], history[-2] if len(history) > 1 else history[-1]
    found = []
    for direction in ("inbound", "outbound"):
        for reason, count in now[direction]["drops"].items():
            fresh = (count - before[direction]["drops"].get(reason, 0)) / _gap(before, now)
            if count:
                found.append((count, f"{direction} {reason} {count:,}" + (f" ({fresh:,.0f}/s)" if fresh > 0 else "")))
    return [text for _, text in sorted(found, reverse=True)]


def _gap(before: dict[str, Any], now: dict[str, Any]) -> float:
    """Seconds between two documents."""
    return max(1e-3, float(now["time"] - before["time"]))


def _rates(history: list[dict[str, Any]], direction: str, field: str) -> list[float]:
    return [max(0.0, (now[direction][field] - before[direction][field]) / _gap(before, now))
            for before, now in itertools.pairwise(history)]


def _peer_rates(history: list[dict[str, Any]], peer_id: str) -> list[float]:
    """Bytes a second to and from one peer; 0 where it was not there."""
    totals = [next((peer["rx_bytes"] + peer["tx_bytes"] for peer in one["peers"] if peer["id"] == peer_id), None)
              for one in history]
    return [max(0.0, (total - earlier) / _gap(before, now)) if total is not None and earlier is not None else 0.0
            for (before, now), (earlier, total) in zip(
                itertools.pairwise(history), itertools.pairwise(totals), strict=True)]


def _graph(values: list[float], console: Console, height: int) -> list[str]:
    """The last values as columns of block characters, the newest on the right, the highest to the top."""
    width, blocks = console.width, ASCII if console.options.ascii_only else BLOCKS
    shown = values[-width:]
    peak = max(shown, default=0.0) or 1.0
    levels = [round(value / peak * 8 * height) for value in shown]
    return ["".join(blocks[min(8, max(0, level - 8 * row))] for level in levels).rjust(width)
            for row in reversed(range(height))]


def _bits(value: float) -> str:
    for unit in ("bit/s", "kbit/s", "Mbit/s", "Gbit/s"):
        if value < 999.5 or unit == "Gbit/s":
            break
        value /= 1000
    return f"{value:.{0 if value >= 99.5 or unit == 'bit/s' else 1 if value >= 9.95 else 2}f} {unit}"


def _workers(history: list[dict[str, Any]]) -> str:
    """Each worker's share of a processor, over two seconds: the kernel counts in hundredths of one."""
    now = history[-1]
    before = next((one for one in reversed(history) if now["time"] - one["time"] >= 2), history[0])
    if before is now:
        return "-"
    gap = _gap(before, now)
    return " ".join(f"{100 * (one['cpu_s'] - other['cpu_s']) / gap:.0f}%"
                    for one, other in zip(now["workers"], before["workers"], strict=False)) or "-"


def _peers(history: list[dict[str, Any]], sort: str) -> list[Row]:
    now = history[-1]
    before = history[-2] if len(history) > 1 else now
    gap = _gap(before, now)
    known = {peer["id"]: peer for peer in before["peers"]}

    def rate(peer: dict[str, Any], field: str) -> float:
        return max(0.0, (int(peer[field]) - int(known.get(peer["id"], peer)[field])) / gap)

    rows = [(peer, rate(peer, "rx_bytes"), rate(peer, "tx_bytes")) for peer in now["peers"]]
    if sort == "name":
        return sorted(rows, key=lambda row: str(row[0]["id"]))
    return sorted(rows, key=lambda row: -row[1 if sort == "received" else 2])
