"""A running tunnel seen from outside.

    snapshot    a tunnel as one JSON document     server, client   the control socket that answers with it
    metrics     the same for Prometheus           web              the page and the metrics over HTTP
    capture, filter, local, pcapng                packets of a running tunnel
    handshakes, stream                            those that pass by no engine; a capture over the control socket

`Observers` opens and closes what a running tunnel offers. Not for: showing it (fasttun/cli).
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Observers"]

log = logging.getLogger("fasttun")


class Observers:
    """The control socket of a tunnel, and with `metrics` ("ADDR:PORT") the HTTP server.

    `open` binds, with the rights there are at set-up; `start` begins to answer; `close` ends all. A control socket
    that cannot be made is logged, since the tunnel works without; an address that cannot be had is an error.
    """

    def __init__(self, tunnel: Any, *, metrics: str | None = None) -> None:
        from . import stream
        from .server import ControlServer

        self._control = ControlServer(tunnel)
        stream.register(self._control, tunnel)
        self._web = None
        if metrics is not None:
            from .web import WebServer

            self._web = WebServer(tunnel, metrics)

    def open(self) -> None:
        """ConfigurationError or EndpointError for the address of the metrics."""
        try:
            self._control.open()
        except OSError as error:
            log.debug("no control socket, so fasttun status will not see this tunnel: %s", error)
        if self._web is not None:
            self._web.open()
            log.info("metrics and status page on http://%s/", self._web.address)

    def start(self) -> None:
        """Begins to answer, in threads of its own."""
        self._control.start()
        if self._web is not None:
            self._web.start()

    def close(self) -> None:
        """Ends everything. May be called twice, and before `open`."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._control.close)
            if self._web is not None:
                stack.callback(self._web.close)

    def __enter__(self) -> Observers:
        try:
            self.open()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()
