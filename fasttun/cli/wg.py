"""`fasttun wg NAME`, or `fasttun-wg NAME`: a WireGuard device that `wg`, `wg-quick` and `ip` set up.

Keeps wireguard-go's conventions: it goes to the background once the device is there and its control socket
answers; WG_TUN_FD and WG_UAPI_FD hand descriptors over; LOG_LEVEL; it ends when the device is deleted, when the
control socket's file is removed, or by SIGTERM. Not for: configuration files (`fasttun up`).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from .. import log, notify
from .._version import __version__
from ..errors import ConfigurationError, DeviceError
from ..observe import Observers
from . import report
from .options import METRICS, METRICS_ATTRIBUTES
from .serve import _Signals, _Watched
from .updown import _hide_memory, _in_background

if TYPE_CHECKING:
    from ..privileges import Account
    from ..wireguard.control import ControlSocket
    from ..wireguard.tunnel import WireGuard

__all__ = ["main", "wg"]

_SILENT = -3
_LEVELS = {"silent": _SILENT, "error": -2, "verbose": 1, "debug": 1}
"""LOG_LEVEL as a count of -v less -q; anything else is `error`, as for wireguard-go."""
_DELETED = (errno.EBADFD, errno.ENODEV)
"""How a device that was deleted ends the loop."""

_log = logging.getLogger(__name__)
_report = logging.getLogger(log.REPORT)

_HELP = """\b
Environment:
  WG_TUN_FD               the device: this open descriptor of /dev/net/tun
  WG_UAPI_FD              the control socket: this listening descriptor
  WG_PROCESS_FOREGROUND   1: stay in the foreground
  LOG_LEVEL               silent, error (the default) or verbose

\b
Then, for example:
  wg set NAME private-key FILE listen-port 51820
  wg set NAME peer PUBLICKEY endpoint HOST:51820 allowed-ips 10.7.0.0/24
  ip address add 10.7.0.1/24 dev NAME && ip link set NAME up
For wg-quick: WG_QUICK_USERSPACE_IMPLEMENTATION=fasttun-wg wg-quick up NAME
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_HELP)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; tell systemd when it is up.")
@click.option("--user", metavar="NAME", help="Become this user once set up; ports below 1024 are then out of reach.")
@click.option(METRICS, **METRICS_ATTRIBUTES)
@click.version_option(__version__, message="fasttun %(version)s")
@click.argument("name", metavar="NAME")
def wg(name: str, foreground: bool, user: str | None, metrics: str | None) -> int:
    """Make the WireGuard device NAME, which the programs wg, wg-quick and ip then set up.

    Returns once it is there; a process in the background keeps it, until it is deleted (ip link del NAME).
    """
    verbosity = _LEVELS.get(os.environ.get("LOG_LEVEL", ""), _LEVELS["error"])
    log.configure("text", verbosity)
    if verbosity == _SILENT:
        logging.disable()
    _check(name)
    device = _Device(name, _descriptor("WG_TUN_FD"), _descriptor("WG_UAPI_FD"), _account(user), metrics)
    if foreground or os.environ.get("WG_PROCESS_FOREGROUND") == "1":
        return device.run(lambda: notify.ready(f"{name} is there"))
    return _in_background(device.run, verbosity)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `fasttun-wg`: takes the name alone, as WG_QUICK_USERSPACE_IMPLEMENTATION must."""
    from . import main as fasttun

    return fasttun(["wg", *(sys.argv[1:] if arguments is None else arguments)])


def _check(name: str) -> None:
    from ..wireguard.control import check_name

    try:
        check_name(name)
    except ConfigurationError as error:  # its field is the argument, and no flag
        raise click.UsageError(f"{error.problem}; {error.hint}") from None


def _descriptor(variable: str) -> int | None:
    """The number in the environment, which no child shall find there again."""
    text = os.environ.pop(variable, "")
    if not text:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise click.UsageError(f"{variable}: {text!r} is not the number of a descriptor")
    return int(text)


def _account(name: str | None) -> Account | None:
    if name is None:
        return None
    from .. import privileges

    return privileges.find(name)


class _Device:
    """One device from set-up to end, in this process."""

    def __init__(self, name: str, tun_fd: int | None, uapi_fd: int | None, account: Account | None,
                 metrics: str | None) -> None:
        self._name = name
        self._tun_fd = tun_fd
        self._uapi_fd = uapi_fd
        self._account = account
        self._metrics = metrics
        self._control: ControlSocket | None = None

    def run(self, tell: Callable[[], object]) -> int:
        """Be the device until something ends it; `tell` once `wg` can reach it. The exit status; FasttunError."""
        from ..wireguard.tunnel import WireGuard

        _hide_memory()
        with _Signals() as signals:
            tunnel = WireGuard(
                name=self._name, tun_fd=self._tun_fd, configure=False,
                before_threads=lambda: self._listen(tunnel, signals),
            )  # fmt: skip
            self._observers = Observers(tunnel, metrics=self._metrics)
            try:
                with tunnel:
                    assert self._control is not None
                    self._control.start()
                    self._observers.start()
                    tell()
                    _log.info("%s is there, its control socket is %s", tunnel.name, self._control.path)
                    error = _until_end(tunnel, signals)
                    notify.stopping()
            finally:
                self._observers.close()
                if self._control is not None:
                    self._control.close()
        if error is not None:
            raise error
        return 0

    def _listen(self, tunnel: WireGuard, signals: _Signals) -> None:
        """The last that may need privileges; then they go."""
        from ..wireguard.control import ControlSocket

        self._control = ControlSocket(tunnel, tunnel.name, listen_fd=self._uapi_fd, on_removed=signals.post_end)
        self._control.open()
        self._observers.open()
        if self._account is not None:
            from .. import privileges

            privileges.drop(self._account, keep_net_admin=True)  # for fwmark


def _until_end(tunnel: WireGuard, signals: _Signals) -> BaseException | None:
    """Wait for a stop signal, the device's deletion or the control socket's; the error if it was one."""
    watch = _Watched(signals, tunnel.wait)
    while (number := signals.next()) in (signal.SIGUSR1, signal.SIGHUP):
        if number == signal.SIGHUP and signals.terminal_went():
            break
        if number == signal.SIGUSR1:
            for text, fields in report.counters(tunnel.stats()):
                _report.info("%s", text, extra=fields)
    if watch.is_alive():
        return None
    watch.join()
    if isinstance(watch.error, DeviceError) and watch.error.errno in _DELETED:
        _log.info("%s was deleted", tunnel.name)
        return None
    return watch.error
