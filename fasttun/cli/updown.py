"""`fasttun up FILE|NAME`, `fasttun down NAME|FILE`: a tunnel from a wg-quick file, and its end.

`up` makes a child that sets the tunnel up with the terminal still its own, so that hooks can ask and errors can
be read; only then it leaves the terminal, and the parent ends with its exit status.
Not for: what is set up around the device (`fasttun.wireguard.quick`), the device (`fasttun.wireguard.tunnel`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import logging.handlers
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import log, notify
from ..errors import ConfigurationError, DeviceError, FasttunError, StateError
from ..observe import Observers
from . import report
from .instance import Instance
from .options import METRICS, METRICS_ATTRIBUTES
from .serve import _Interrupted, _Signals, _Watched

if TYPE_CHECKING:
    from ..wireguard.config import Config
    from ..wireguard.journal import Journal
    from ..wireguard.quick import Quick
    from ..wireguard.tunnel import WireGuard

__all__ = ["down", "up"]

_CAP_NET_ADMIN = 12  # linux/capability.h
_PR_SET_DUMPABLE = 4  # linux/prctl.h
_SYSLOG = "/dev/log"
_KERNEL_PATIENCE_S = 2.0

_log = logging.getLogger(__name__)
_report = logging.getLogger(log.REPORT)

_verbose = click.option("-v", "--verbose", count=True, help="Say more.")
_quiet = click.option("-q", "--quiet", count=True, help="Warnings and errors only; twice: errors only.")
_log_format = click.option(
    "--log-format", type=click.Choice(log.FORMATS), default="text", help="Log lines on stderr (text)."
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("target", metavar="FILE|NAME")
@click.option("-f", "--foreground", is_flag=True, help="Stay, log to stderr, tell systemd when it is up.")
@click.option(METRICS, **METRICS_ATTRIBUTES)
@_verbose
@_quiet
@_log_format
def up(target: str, foreground: bool, metrics: str | None, verbose: int, quiet: int, log_format: str) -> int:
    """Bring a tunnel up from a wg-quick file: device, keys, peers, addresses, routes, DNS, hooks.

    FILE is a path whose last part is NAME.conf; NAME alone stands for /etc/wireguard/NAME.conf. Returns once
    the tunnel is up; a process in the background keeps it up, until `fasttun down NAME`.
    """
    log.configure(log_format, verbose - quiet)
    _check_privileges()
    _hide_memory()
    name, path, config = _find(target)
    if foreground:
        return _Service(name, path, config, metrics).run(lambda: notify.ready(f"{name} is up"), in_background=False)
    return _in_background(
        lambda tell: _Service(name, path, config, metrics).run(tell, in_background=True), verbose - quiet)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("target", metavar="NAME|FILE")
@_verbose
@_quiet
@_log_format
def down(target: str, verbose: int, quiet: int, log_format: str) -> int:
    """Take a tunnel down that `fasttun up` brought up, and wait until all is undone.

    Also takes away what a killed one has left.
    """
    log.configure(log_format, verbose - quiet)
    name = _name_in(target)
    _check_privileges()
    instance = Instance(name)
    with instance.end() as was_up:
        errors, left = _clean(name, instance)
        if not was_up and not left:
            raise StateError(f"{name} is not up (by fasttun up)")
    if errors:
        raise FasttunError("; ".join(errors))
    return 0


# ----------------------------------------------------------------------------------------------- names and files


def _find(target: str) -> tuple[str, Path, Config]:
    """The interface's name, its file, and what that says. Raises FasttunError."""
    from ..wireguard.config import Config, config_path, interface_name

    try:
        path = config_path(target)
        name = interface_name(path)
        path = path.resolve()
        return name, path, Config.read(path)
    except ConfigurationError as error:  # its field is a line of the file, and no flag
        raise FasttunError(str(error)) from None


def _name_in(target: str) -> str:
    from ..wireguard.config import config_path, interface_name

    try:
        return interface_name(config_path(target))
    except ConfigurationError as error:
        raise FasttunError(str(error)) from None


def _check_privileges() -> None:
    with open("/proc/self/status") as file:
        capabilities = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    if not capabilities >> _CAP_NET_ADMIN & 1:
        raise FasttunError(f"this needs root: sudo fasttun {' '.join(sys.argv[1:])}")


# ---------------------------------------------------------------------------------------------------- the service


class _SetUpSignals(_Signals):
    def check(self) -> None:
        """Leave a set-up that a stop signal came for."""
        while select.select([self._reader], [], [], 0)[0]:
            number = self.next()
            if number in (signal.SIGINT, signal.SIGTERM):
                raise _Interrupted(number)


class _Service:
    """One tunnel from set-up to undo, in this process.

    It stays root: hooks, the firewall and the resolver's program are root's, at the end as at the beginning.
    """

    def __init__(self, name: str, path: Path, config: Config, metrics: str | None = None) -> None:
        self._name = name
        self._path = path
        self._metrics = metrics
        self._config = config

    def run(self, tell: Callable[[], object], *, in_background: bool) -> int:
        """Be the tunnel until a signal or an error ends it; `tell` once it is up. The exit status; FasttunError."""
        instance, signals = Instance(self._name), _SetUpSignals()
        with signals, instance.claim():
            errors, _ = _clean(self._name, instance)
            for text in errors:
                _log.warning("left from before: %s", text)
            if _exists(self._name):
                raise DeviceError(
                    "create", self._name, errno.EEXIST, "end what made it, or use another name",
                    "an interface of this name exists already",
                )
            from ..wireguard.journal import Journal

            journal = Journal(instance.state, config=self._path)
            try:
                self._live(journal, signals, tell, in_background)
            except _Interrupted as stop:
                return 128 + stop.number
            finally:
                journal.hooks = False  # PostDown has run, or PostUp has failed, and then wg-quick runs none either
                if journal.changes or journal.errors:
                    journal.save()
                else:
                    journal.remove()
        if journal.errors:
            raise FasttunError("; ".join(journal.errors))
        return 0

    def _live(
        self, journal: Journal, signals: _SetUpSignals, tell: Callable[[], object], in_background: bool
    ) -> None:
        from ..wireguard.control import ControlSocket
        from ..wireguard.quick import Quick
        from ..wireguard.tunnel import WireGuard

        try:
            quick = Quick(self._name, self._config, path=self._path, journal=journal)
            quick.pre_up()
            signals.check()
            tunnel = WireGuard(self._config, name=self._name, mtu=quick.mtu())
            ended = None
            with tunnel:
                signals.check()
                with Observers(tunnel, metrics=self._metrics), \
                        ControlSocket(tunnel, self._name, on_removed=signals.post_end):
                    quick.apply(tunnel)
                    try:
                        ended = self._serve(tunnel, quick, signals, tell, in_background)
                    finally:
                        notify.stopping("undoing what was set up")
                        journal.errors += quick.pre_down(tunnel)
                        journal.errors += quick.undo()
            journal.errors += quick.post_down()
        except ConfigurationError as error:
            raise FasttunError(f"{self._path}: {error}") from None
        if ended is not None:
            raise ended

    def _serve(
        self, tunnel: WireGuard, quick: Quick, signals: _SetUpSignals, tell: Callable[[], object],
        in_background: bool,
    ) -> BaseException | None:
        """Wait for a stop signal or the tunnel's own end; what ended it."""
        peers = len(tunnel.peers)
        _log.info(
            "%s (%s) is up, on UDP port %d, with %d peer%s", self._name,
            ", ".join([*map(str, self._config.address), f"MTU {tunnel.mtu}"]), tunnel.listen_port, peers,
            "" if peers == 1 else "s",
        )
        tell()
        watch = _Watched(signals, tunnel.wait)
        signals.alive = lambda: tunnel.running
        while (number := signals.next()) not in (signal.SIGINT, signal.SIGTERM):
            if number == signal.SIGUSR1:
                for text, fields in report.counters(tunnel.stats()):
                    _report.info("%s", text, extra=fields)
            elif number == signal.SIGHUP:
                if not in_background and signals.terminal_went():
                    break
                self._reload(tunnel, quick)
            else:
                break
        if tunnel.running:
            return None
        watch.join()
        return watch.error


    def _reload(self, tunnel: WireGuard, quick: Quick) -> None:
        """Take the changed file over. What is wrong with it is told, and all goes on as before."""
        from ..wireguard.config import Config
        from ..wireguard.reload import take_over

        notify.reloading()
        try:
            config = Config.read(self._path)
            taken = take_over(tunnel, self._config, config)
        except FasttunError as error:
            where = "" if str(self._path) in str(error) else f"{self._path}: "
            _log.error("SIGHUP: %s%s; everything goes on as before", where, error)
        else:
            self._config = config
            _log.info("SIGHUP: %s: %s", self._path, taken)
            for text in quick.follow(tunnel, config):
                _log.warning("SIGHUP: %s", text)
        notify.ready(f"{self._name} is up")


def _clean(name: str, instance: Instance) -> tuple[list[str], bool]:
    """Take away what the last process of this tunnel has left: what failed, in words, and whether there was any."""
    from ..wireguard.journal import Journal

    journal = Journal.read(instance.state)
    if journal is None:
        return [], False
    errors = journal.errors
    if journal.changes or journal.hooks:
        from ..wireguard.quick import clean_up

        _log.info("taking away what the last fasttun of %s has left", name)
        errors += clean_up(name, journal)
        _wait_until_gone(name)
    journal.remove()
    return list(dict.fromkeys(errors)), True  # what failed once more is told once


def _exists(name: str) -> bool:
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def _wait_until_gone(name: str) -> None:
    """The kernel gives a killed process's lock back before its device is gone."""
    deadline = time.monotonic() + _KERNEL_PATIENCE_S
    while _exists(name) and time.monotonic() < deadline:
        time.sleep(0.01)


def _hide_memory() -> None:
    """No core dump and no debugger of the same user reads the keys (prctl(2), PR_SET_DUMPABLE)."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


# ------------------------------------------------------------------------------------------------- the background


def _in_background(work: Callable[[Callable[[], object]], int], verbosity: int) -> int:
    """Run `work(tell)` in a child until it calls `tell`: 0 then, else the child's exit status."""
    reader, writer = os.pipe()
    child = os.fork()  # no thread has been started yet
    if child == 0:
        os.close(reader)

        def tell() -> None:
            _leave_terminal(verbosity)
            with contextlib.suppress(BrokenPipeError):  # the parent was killed meanwhile
                os.write(writer, b"\n")
            os.close(writer)

        try:
            return work(tell)
        except FasttunError as error:
            _log.log(logging.ERROR if _is_detached() else logging.DEBUG, "%s", error)
            raise
    os.close(writer)
    # Ctrl-C is for the child as well, which undoes first; its status tells how that went.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    with open(reader, "rb") as pipe:
        if pipe.read():
            return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _is_detached() -> bool:
    return os.getsid(0) == os.getpid()


def _leave_terminal(verbosity: int) -> None:
    """A session of its own, nothing of the caller's open, and the log to syslog where there is one."""
    os.setsid()
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    handler: logging.Handler = logging.NullHandler()
    if os.path.exists(_SYSLOG):
        syslog = logging.handlers.SysLogHandler(_SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        syslog.ident = f"fasttun[{os.getpid()}]: "
        handler = syslog
    root: Any = logging.getLogger("fasttun")
    root.handlers[:] = [handler]
    root.setLevel(log.level_of(verbosity))
