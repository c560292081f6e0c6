"""Tells the service manager how the process fares: sd_notify(3) over NOTIFY_SOCKET, without libsystemd.

Every call returns whether a message was sent; no service manager, or one that is gone, is no error.
Not for: anything the tunnel's peers see.
"""

from __future__ import annotations

import logging
import os
import socket
import time

__all__ = ["alive", "notify", "ready", "reloading", "status", "stopping", "watchdog_interval_s"]

_log = logging.getLogger(__name__)


def notify(*assignments: str) -> bool:
    """Send `NAME=value` lines as one datagram. Unix sockets only: a path, or `@name` for an abstract one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(1.0)
            channel.connect(address)
            channel.send("\n".join(map(_flat, assignments)).encode())
    except OSError as error:
        _log.debug("NOTIFY_SOCKET: %s", error)
        return False
    return True


def ready(text: str = "") -> bool:
    """Set-up, or the reload begun by `reloading`, is done."""
    return notify("READY=1", *([f"STATUS={text}"] if text else []))


def reloading() -> bool:
    """A reload begins; `ready` ends it. Has the time that Type=notify-reload asks for."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_interval_s() -> float | None:
    """How often `alive` is to be called: half of what the watchdog waits (sd_watchdog_enabled(3)); None without one."""
    for_whom, span_us = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not span_us.isdecimal() or int(span_us) == 0 or for_whom not in ("", str(os.getpid())):
        return None
    return int(span_us) / 2e6


def alive() -> bool:
    """The process does its work: the watchdog waits anew."""
    return notify("WATCHDOG=1")


def stopping(text: str = "") -> bool:
    """The end has begun."""
    return notify("STOPPING=1", *([f"STATUS={text}"] if text else []))


def status(text: str) -> bool:
    """One line for `systemctl status`."""
    return notify(f"STATUS={text}")


def _flat(assignment: str) -> str:
    return assignment.replace("\n", " ")
