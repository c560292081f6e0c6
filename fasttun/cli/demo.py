"""`fasttun demo`: the flags of the demonstration. What it shows is in `fasttun.demo`."""

from __future__ import annotations

import re
import sys

import click

__all__ = ["demo"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)
_LARGEST_BYTES = 1 << 40


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Bytes, with K, M or G (powers of 1024)."""
    match = _SIZE.fullmatch(value.strip())
    number = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if not 1 <= number <= _LARGEST_BYTES:
        raise click.BadParameter(f"{value!r} is no size from 1 byte to 1024G, such as 256M or 1G", ctx, param)
    return number


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--size",
    "size_bytes",
    callback=_size,
    default="1G",
    metavar="BYTES",
    help="Length of the file, with K, M or G (1G).",
)
@click.option("--no-baseline", is_flag=True, help="Without the same run through a pure-Python tunnel.")
@click.option("--plain", is_flag=True, help="Lines instead of a progress bar.")
def demo(size_bytes: int, no_baseline: bool, plain: bool) -> int:
    """Two hosts on this machine, a tunnel between them, a file through it.

    Makes two network namespaces, pings and sends a file through the tunnel, compares the hashes, does the
    same with an encrypted tunnel, shown by top and status, and with one in pure Python, and takes everything
    away again. Needs root.
    """
    from ..demo.show import run

    run(sys.stdout, size_bytes, baseline=not no_baseline, plain=plain)
    return 0
