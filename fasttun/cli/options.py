"""Flags that several commands have. Not for: those of one command, which stand with it."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["METRICS", "METRICS_ATTRIBUTES"]

METRICS: Final = "--metrics"
METRICS_ATTRIBUTES: Final[dict[str, Any]] = {
    "metavar": "ADDR:PORT",
    "help": "Serve a status page and Prometheus metrics there, such as 127.0.0.1:9586.",
}
