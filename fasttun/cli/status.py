"""`fasttun status [NAME]`: the running tunnels, as a table for people or as JSON.

Not for: what is in the documents (`fasttun.observe.snapshot`), a live view (`top`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from ..errors import StateError
from .report import size

__all__ = ["ago", "status"]


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="The documents as JSON, one a line (docs/status-schema.md).")
@click.option("--watch", is_flag=False, flag_value="1", metavar="[S]", help="Again every S seconds (1), with rates.")
def status(name: str | None, as_json: bool, watch: str | None) -> int:
    """Show the running tunnels, or the one of that NAME."""
    interval_s = _seconds(watch)
    before: dict[int, dict[str, Any]] = {}
    while True:
        found = _documents(name)
        if as_json:
            for document in found:
                click.echo(json.dumps(document))
        else:
            if interval_s and sys.stdout.isatty():
                click.clear()
            for document in found:
                for line in _lines(document, before.get(document["pid"])):
                    click.echo(line)
        if not interval_s:
            return 0
        sys.stdout.flush()
        before = {document["pid"]: document for document in found}
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
    from ..observe.client import choose, running

    if name is not None:
        return [choose(name).ask()]
    try:
        found = running()
    except PermissionError as error:
        raise StateError(f"{error.filename} is not readable: ask as the user that runs the tunnels") from None
    if not found:
        raise StateError("no tunnel is running")
    return [one.ask() for one in found]


def ago(seconds: float | None) -> str:
    """A span of time in one unit, or "never"."""
    if seconds is None:
        return "never"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _lines(now: dict[str, Any], before: dict[str, Any] | None) -> Iterator[str]:
    mode = "WireGuard" if now["mode"] == "wireguard" else "plain, not encrypted"
    yield click.style(now["name"], bold=True) + f"  {mode}, up {ago(now['uptime_s'])[:-4]}, process {now['pid']}"
    addresses = ", ".join(address for address in now["device"]["addresses"] if not address.startswith("fe80"))
    yield f"  inside    {addresses or 'no address'}, MTU {now['device']['mtu']}"
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
    yield from _peers(now)


def _peers(now: dict[str, Any]) -> Iterator[str]:
    wireguard = now["mode"] == "wireguard"
    heads = ["peer", "inside", *(["endpoint", "handshake"] if wireguard else ["heard"]), "received", "sent"]
    rows = []
    for peer in now["peers"]:
        last = peer.get("silent_s")
        if wireguard:
            last = now["time"] - peer["last_handshake"] if peer["last_handshake"] else None
        rows.append([peer["id"], ", ".join(peer["addresses"]) or "–", *([peer["endpoint"] or "–"] if wireguard else []),
                     ago(last), size(peer["rx_bytes"]), size(peer["tx_bytes"])])
    if not rows:
        yield "  no peers"
        return
    widths = [max(len(row[at]) for row in [heads, *rows]) for at in range(len(heads))]
    for number, row in enumerate([heads, *rows]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield "  " + (click.style(line, dim=True) if number == 0 else line)
