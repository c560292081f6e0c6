"""Runs one tunnel from set-up to undo: signals, readiness, counters, exit status.

A signal, and the tunnel's own end, is a byte in one pipe that the main thread reads: nothing is interrupted
half-way. So a signal during set-up waits until that is complete, and then undoes it; only the look-up of the
server's name, which can take long and changes nothing, is left at once.
Not for: forwarding (`fasttun.forwarder`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .. import log, notify
from ..observe import Observers
from . import report

if TYPE_CHECKING:
    from ..config import TunnelConfig
    from ..privileges import Account

__all__ = ["serve"]

_log = logging.getLogger(__name__)
_report = logging.getLogger(log.REPORT)

_ENDED = 0
"""The byte for the tunnel's own end; the others are signal numbers."""
_STOP = (signal.SIGINT, signal.SIGTERM)
_CAUGHT = (*_STOP, signal.SIGHUP, signal.SIGUSR1)


class _Interrupted(Exception):
    """A stop signal came while nothing was set up yet."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Signals:
    """Signals and ends as bytes in a pipe. Main thread only, save `post_end`.

    `alive`: whether the service manager's watchdog is to be told, while `next` waits, that all is well.
    """

    alive: Callable[[], bool] = staticmethod(lambda: True)

    def __enter__(self) -> _Signals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # set_wakeup_fd asks for it
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, lambda *_: None) for number in _CAUGHT}
        self._ends_with_terminal = self._former[signal.SIGHUP] is not signal.SIG_IGN and _terminal_is_there()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._writer.close()
        self._reader.close()

    def next(self) -> int:
        """Wait for the next byte: a signal's number or `_ENDED`."""
        interval_s = notify.watchdog_interval_s()
        while interval_s is not None and not select.select([self._reader], [], [], interval_s)[0]:
            if self.alive():
                notify.alive()
        return self._reader.recv(1)[0]

    def terminal_went(self) -> bool:
        """Whether a SIGHUP means that whoever could end this is gone; never so under nohup."""
        return self._ends_with_terminal and not _terminal_is_there()

    def post_end(self) -> None:
        """Make `next` return `_ENDED`. From any thread."""
        with contextlib.suppress(OSError):
            self._writer.send(bytes([_ENDED]))


class _Watched(threading.Thread):
    """Runs `call` and posts its end; `error` is what it raised."""

    def __init__(self, signals: _Signals, call: Callable[[], object]) -> None:
        super().__init__(name="fasttun-watch", daemon=True)
        self.error: BaseException | None = None
        self._signals, self._call = signals, call
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error
        finally:
            self._signals.post_end()


def serve(
    config: TunnelConfig, *, account: Account | None = None, factory: Callable[..., Any] | None = None,
    encrypted: bool = False, metrics: str | None = None,
) -> int:
    """Be the tunnel until SIGINT, SIGTERM or an error. Returns the exit status, raises FasttunError.

    `account`: the user to become once set up. `factory`: in place of `Forwarder.from_config`.
    `encrypted`: without it a warning says that the tunnel is open. `metrics`: ADDR:PORT of the status page.
    """
    with _Signals() as signals:
        try:
            _look_up(config, signals)
        except _Interrupted as stop:
            return 128 + stop.number
        return _Service(config, account, factory or _forwarder(), signals, encrypted, metrics).run()


def _forwarder() -> Callable[..., Any]:
    from ..forwarder import Forwarder  # with it come the compiled core and netlink

    return Forwarder.from_config


def _look_up(config: TunnelConfig, signals: _Signals) -> None:
    """Ask for the server's address before anything is set up, where a stop signal can end the waiting."""
    if config.server is None or _is_address(config.server):
        return
    from .. import endpoint

    server, port = config.server, config.port
    look_up = _Watched(signals, lambda: endpoint.resolve(server, port))
    while (number := signals.next()) != _ENDED:
        if number in _STOP:
            raise _Interrupted(number)
    look_up.join()
    if look_up.error is not None:
        raise look_up.error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Service:
    def __init__(
        self, config: TunnelConfig, account: Account | None, factory: Callable[..., Any], signals: _Signals,
        encrypted: bool, metrics: str | None,
    ) -> None:
        self._config = config
        self._encrypted = encrypted
        self._account = account
        self._signals = signals
        self._forwarder = factory(config, before_threads=self._before_threads)
        self._observers = Observers(self._forwarder, metrics=metrics)

    def run(self) -> int:
        forwarder = self._forwarder
        stats = None
        try:
            with contextlib.closing(self._observers), forwarder:
                self._observers.start()
                self._announce()
                watch = _Watched(self._signals, forwarder.wait)
                self._signals.alive = self._is_alive
                self._until_end()
                notify.stopping("undoing what was set up")
                forwarder.stop()
                watch.join()
                stats = forwarder.stats()
                if watch.error is not None:
                    raise watch.error
        finally:
            if stats is not None:
                _say(_log, report.summary(stats))
        return 0

    def _before_threads(self) -> None:
        """What needs the rights that there are now; then gives them up, if asked."""
        self._observers.open()
        if self._account is not None:
            self._drop_privileges(self._account)

    def _drop_privileges(self, account: Account) -> None:
        from .. import privileges

        device = self._forwarder.device
        keep = device is not None and device.needs_admin_to_close
        privileges.drop(account, keep_net_admin=keep)
        _log.debug("now user %s%s", account.name, ", with CAP_NET_ADMIN for the undo" if keep else "")

    def _announce(self) -> None:
        text, fields = _opening(self._config, self._forwarder)
        _log.info("%s", text, extra=fields)
        if not self._encrypted:
            _log.warning(
                "packets are neither encrypted nor authenticated: "
                "anyone on the path can read this tunnel and send into it; --key encrypts"
            )
        notify.ready(text)

    def _until_end(self) -> None:
        while (number := self._signals.next()) != _ENDED and number not in _STOP:
            if number == signal.SIGUSR1:
                _say(_report, report.counters(self._forwarder.stats()))
            elif number == signal.SIGHUP:
                if self._signals.terminal_went():
                    return
                self._reload()

    def _is_alive(self) -> bool:
        """The workers run, and the tables that they share are not held for ever: reading them returns."""
        self._forwarder.stats()
        return bool(self._forwarder.running)

    def _reload(self) -> None:
        notify.reloading()
        if self._config.server is None:
            _log.info("SIGHUP: a listener has no server to look up")
        else:
            _log.info("SIGHUP: looking %s up again", self._config.server)
            self._forwarder.resolve_again()
        notify.ready()


def _opening(config: TunnelConfig, forwarder: Any) -> report.Line:
    """What this tunnel is, in one line."""
    name = forwarder.device.name if forwarder.device is not None else config.device
    addresses = [str(address) for address in config.address]
    fields: dict[str, Any] = {
        "mode": "listen" if config.listen else "server",
        "device": name,
        "address": addresses,
        "mtu": forwarder.mtu,
    }
    text = f"{name} ({', '.join([*addresses, f'MTU {forwarder.mtu}'])})"
    if config.listen:
        fields["port"] = forwarder.local_port
        text += f" listens on UDP port {forwarder.local_port}"
        if config.bind:
            text += f" of {config.bind}"
        if config.allow:
            fields["allow"] = [str(network) for network in config.allow]
            text += f" for {', '.join(fields['allow'])}"
    else:
        fields["endpoint"] = _server_endpoint(config, forwarder)
        text += f" to {fields['endpoint']}"
    return text, fields


def _server_endpoint(config: TunnelConfig, forwarder: Any) -> str:
    peers = forwarder.peers
    return str(peers[0].endpoint) if peers else f"{config.server} port {config.port}"


def _say(logger: logging.Logger, lines: Iterable[report.Line]) -> None:
    for text, fields in lines:
        logger.info("%s", text, extra=fields)


def _terminal_is_there() -> bool:
    """Whether the process has a controlling terminal, which a hang-up takes away (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
