"""`fasttun status [NAME]`: the running tunnels, as a table for people or as JSON.

Not for: what is in the documents (`fasttun.observe.snapshot`), a live view (`top`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from ..errors import StateError
from .lines import write_error
from .report import size

__all__ = ["ago", "quality", "status"]

_KEY_LENGTH = 44
"""Of a public key in base64."""


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="The documents as JSON, one a line (docs/status-schema.md).")
@click.option("--watch", is_flag=False, flag_value="1", metavar="[S]", help="Again every S seconds (1), with rates.")
def status(name: str | None, as_json: bool, watch: str | None) -> int:
    """Show the running tunnels, or the one of that NAME."""
    interval_s = _seconds(watch)
    before: dict[tuple[int, str], dict[str, Any]] = {}
    while True:
        found = _documents(name)
        if as_json:
            for document in found:
                click.echo(json.dumps(document))
        else:
            if interval_s and sys.stdout.isatty():
                click.clear()
            for document in found:
                earlier = before.get((document["pid"], document["name"]))
                for line in _lines(document, earlier):
                    click.echo(line)
                _show_peers(*_peers(document, earlier))
        if not interval_s:
            return 0
        sys.stdout.flush()
        before = {(document["pid"], document["name"]): document for document in found}
        time.sleep(interval_s)


def _seconds(watch: str | None) -> float:
    if watch is None:
        return 0.0
    try:
        seconds = float(watch)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise click.UsageError(f"--watch: {watch!r} is not a time from 0.1 to 3600 seconds")
    return seconds


def _documents(name: str | None) -> list[dict[str, Any]]:
    """Of all that answer; one that does not is named on standard error. StateError when none does."""
    from ..observe.client import choose, known

    if name is not None:
        return [choose(name).ask()]
    documents, errors = [], []
    for one in known():
        try:
            documents.append(one.ask())
        except StateError as error:
            errors.append(str(error))
    if not documents:
        raise StateError("; ".join(errors))
    for text in errors:
        write_error(text)
    return documents


def ago(seconds: float | None) -> str:
    """A span of time in one unit, or "never"."""
    if seconds is None:
        return "never"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def quality(peer: dict[str, Any]) -> tuple[str, str]:
    """Round trip and loss of a peer, a dash for what is not known."""
    round_trip, loss = peer.get("round_trip_s"), peer.get("loss")
    return (
        "-" if round_trip is None else f"{round_trip * 1e3:.3g} ms" if round_trip < 1 else f"{round_trip:.1f} s",
        "-" if loss is None else f"{loss:.{0 if loss == 0 or loss >= 0.1 else 1}%}".replace("%", " %"),
    )


def _lines(now: dict[str, Any], before: dict[str, Any] | None) -> Iterator[str]:
    mode = "WireGuard" if now["mode"] == "wireguard" else "plain, not encrypted"
    yield click.style(now["name"], bold=True) + f"  {mode}, up {ago(now['uptime_s'])[:-4]}, process {now['pid']}"
    addresses = ", ".join(address for address in now["device"]["addresses"] if not address.startswith("fe80"))
    yield f"  inside    {addresses or 'no address'}, MTU {now['device']['mtu']}"
    if now["device"]["routes"]:
        yield f"  routes    {', '.join(now['device']['routes'])}"
    yield f"  outside   UDP port {now['local_port']}" + (f", sealed by {now['aead']}" if now["aead"] else "")
    for direction in ("inbound", "outbound"):
        counted = now[direction]
        text = f"  {direction:8}  {counted['packets_out']} packets, {size(counted['bytes_out'])}"
        if before is not None:
            gap = max(1e-3, now["time"] - before["time"])
            rate = (counted["bytes_out"] - before[direction]["bytes_out"]) / gap
            packets = (counted["packets_out"] - before[direction]["packets_out"]) / gap
            text += f", {size(round(rate))}/s, {packets:.0f} packets/s"
        drops = ", ".join(f"{reason} {count}" for reason, count in counted["drops"].items() if count)
        yield text + (click.style(f", dropped: {drops}", fg="yellow") if drops else "")
    yield "  offloads  " + ", ".join(f"{name} {state}" for name, state in now["offloads"].items())


def _peers(now: dict[str, Any], before: dict[str, Any] | None) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of the table; with rates when there is an earlier document."""
    wireguard, rates = now["mode"] == "wireguard", before is not None
    heads = ["peer", "inside", *(["endpoint", "handshake"] if wireguard else ["heard"]),
             "rtt", "lost",
             "received", *(["/s"] if rates else []), "sent", *(["/s"] if rates else [])]
    known = {peer["id"]: peer for peer in before["peers"]} if before is not None else {}
    gap = max(1e-3, now["time"] - before["time"]) if before is not None else 1.0
    rows = []
    for peer in now["peers"]:
        last = peer.get("silent_s")
        if wireguard:
            last = now["time"] - peer["last_handshake"] if peer["last_handshake"] else None
        counts = []
        for field in ("rx_bytes", "tx_bytes"):
            counts.append(size(peer[field]))
            if rates:
                counts.append(size(round(max(0, peer[field] - known.get(peer["id"], peer)[field]) / gap)))
        rows.append([peer["id"], ", ".join(peer["addresses"]) or "-", *([peer["endpoint"] or "-"] if wireguard else []),
                     ago(last), *quality(peer), *counts])
    return heads, rows


def _show_peers(heads: list[str], rows: list[list[str]]) -> None:
    """On a terminal that is too narrow, keys are cut and the rest is folded, by rich; else one line a peer."""
    if not rows:
        click.echo("  no peers")
        return
    widths = [max(len(row[at]) for row in [heads, *rows]) for at in range(len(heads))]
    if sys.stdout.isatty() and 2 + sum(widths) + 2 * (len(widths) - 1) > shutil.get_terminal_size().columns:
        with contextlib.suppress(ModuleNotFoundError):
            _show_narrow(heads, rows)
            return
    for number, row in enumerate([heads, *rows]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo("  " + (click.style(line, dim=True) if number == 0 else line))


def _show_narrow(heads: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    table = Table(*heads, box=None, pad_edge=False, header_style="dim")
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = column.header not in ("inside", "endpoint")
    for who, *others in rows:
        cut = len(who) == _KEY_LENGTH and who.endswith("=")
        table.add_row(who[:10] + (".." if console.options.ascii_only else "…") if cut else who, *others)
    sys.stdout.flush()
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
