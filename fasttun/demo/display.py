"""How the demo shows a transfer as it goes: a progress bar on a terminal with rich, plain lines elsewhere.

Also the wording of sizes and rates. Knows nothing of tunnels.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Protocol, TextIO

_LINE_INTERVAL_S = 1.0


class Display(Protocol):
    """A context manager; `update` may be called as often as the caller likes."""

    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def update(self, done_bytes: int, packets: int, seconds: float) -> None: ...


def display(out: TextIO, total_bytes: int, *, plain: bool) -> Display:
    """The bar if `out` is a terminal, rich is there and `plain` is not asked for."""
    if not plain and out.isatty():
        try:
            return _Bar(out, total_bytes)
        except ImportError:
            pass
    return _Lines(out, total_bytes)


def size(number: float) -> str:
    """1073741824 → "1 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def rate(done_bytes: float, seconds: float) -> str:
    """Gbit/s, with as many digits as mean something."""
    return f"{done_bytes * 8 / max(seconds, 1e-9) / 1e9:.2f} Gbit/s"


class _Lines:
    def __init__(self, out: TextIO, total_bytes: int) -> None:
        self._out, self._total, self._shown_s = out, total_bytes, 0.0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, done_bytes: int, packets: int, seconds: float) -> None:
        if seconds - self._shown_s < _LINE_INTERVAL_S and done_bytes < self._total:
            return
        self._shown_s = seconds
        percent = 100 * done_bytes // max(1, self._total)
        print(
            f"  {percent:3d} %  {size(done_bytes):>9}  {packets:>9,} packets  {rate(done_bytes, seconds)}",
            file=self._out,
            flush=True,
        )


class _Bar:
    def __init__(self, out: TextIO, total_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress: Any = Progress(
            TextColumn(" "),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[packets]:>9,} packets"),
            TextColumn("{task.fields[rate]}"),
            console=Console(file=out or sys.stdout),
        )
        self._task = self._progress.add_task("", total=total_bytes, packets=0, rate="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done_bytes: int, packets: int, seconds: float) -> None:
        self._progress.update(
            self._task, completed=done_bytes, packets=packets, rate=rate(done_bytes, seconds)
        )
