"""Where the package's log lines go and what they look like: text for people, JSON for machines.

Set up by the command line alone; a library user's own logging configuration is never touched.
Not for: counters (`fasttun.stats`), and not for the packet path, which logs nothing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TextIO

__all__ = ["FORMATS", "REPORT", "configure", "is_for_machines", "level_of"]

FORMATS = ("text", "json")

REPORT = "fasttun.report"
"""Name of the logger for what the user asked to see: shown at INFO whatever -q says."""

_ROOT = "fasttun"
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""syslog(3) priorities, for the `<N>` prefix that the journal reads (sd-daemon(3))."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def level_of(verbosity: int) -> int:
    """The level for the count of -v less that of -q: 0 INFO, above DEBUG, -1 WARNING, below ERROR."""
    if verbosity > 0:
        return logging.DEBUG
    return {0: logging.INFO, -1: logging.WARNING}.get(verbosity, logging.ERROR)


def configure(form: str = "text", verbosity: int = 0, stream: TextIO | None = None) -> None:
    """Send the package's log to `stream` (None: stderr). May be called again: the last call holds."""
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a closed terminal ends no tunnel
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter(_prefix_for(target)))
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.setLevel(level_of(verbosity))
    root.propagate = False
    logging.getLogger(REPORT).setLevel(logging.INFO)


def is_for_machines() -> bool:
    """Whether a program reads the log (JSON, or the journal), so that every line must come through it."""
    formatters = [handler.formatter for handler in logging.getLogger(_ROOT).handlers]
    return any(
        isinstance(f, _JsonFormatter) or (isinstance(f, _TextFormatter) and f.prefix == "journal") for f in formatters
    )


def _prefix_for(stream: TextIO) -> str:
    """`journal`, `terminal` or `file`: who reads the stream decides what a line needs besides its text."""
    try:
        status = os.fstat(stream.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
            return "journal"
        return "terminal" if stream.isatty() else "file"
    except (OSError, ValueError, AttributeError):
        return "file"


def _utc(seconds: float) -> str:
    """RFC 3339, UTC, microseconds."""
    whole, fraction = divmod(int(seconds * 1_000_000), 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{fraction:06d}Z"


def _one_line(text: str) -> str:
    """Control characters escaped: what comes from outside (a name, a path) cannot forge a second line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _failure(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    error = record.exc_info[1]
    return f"{type(error).__name__}: {error}"


class _TextFormatter(logging.Formatter):
    """`fasttun: message`; warnings and errors say so; a file gets the time, the journal has its own."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if failure := _failure(record):
            message += f": {failure}"
        if record.levelno >= logging.WARNING:
            message = f"{record.levelname.lower()}: {message}"
        elif record.levelno < logging.INFO:
            message = f"{record.name}: {message}"
        message = _one_line(message)
        if self.prefix == "journal":
            return f"<{_PRIORITIES.get(record.levelno, 6)}>{message}"
        if self.prefix == "file":
            return f"{_utc(record.created)[:19]}Z fasttun: {message}"
        return f"fasttun: {message}"


class _JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, then the `extra` fields; `error` for an exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if failure := _failure(record):
            entry["error"] = failure
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in entry:
                entry[name] = value
        return json.dumps(entry, default=str)
