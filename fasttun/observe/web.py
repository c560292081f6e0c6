"""HTTP on one address: /metrics for Prometheus, / the status page, /status.json what the page shows.

Read-only, and open to whoever reaches the address: 127.0.0.1 unless asked otherwise.
"""

from __future__ import annotations

import ipaddress
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socket import AF_INET, AF_INET6
from typing import Any

from .. import __version__
from ..errors import ConfigurationError, EndpointError
from .metrics import exposition
from .snapshot import snapshot

__all__ = ["WebServer"]

PATIENCE_S = 5.0
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    tunnel: Any


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE_S
    server: _Server
    server_version = f"fasttun/{__version__}"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._send(*exposition(self.server.tunnel))
        elif path == "/status.json":
            self._send("application/json", json.dumps(snapshot(self.server.tunnel)).encode())
        elif path == "/":
            self._send("text/html; charset=utf-8", files(__package__).joinpath("page.html").read_bytes())
        else:
            self.send_error(404)

    def _send(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""


class WebServer:
    """Serves one tunnel on "ADDR:PORT" ("[v6]:PORT"). ConfigurationError here, EndpointError from `open`."""

    def __init__(self, tunnel: Any, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._host = ipaddress.ip_address(host.strip("[]"))
            self._port = int(port)
        except ValueError:
            raise ConfigurationError("metrics", f"{address!r} is not ADDR:PORT", "as in 127.0.0.1:9586") from None
        if not 0 <= self._port <= 65535:
            raise ConfigurationError("metrics", f"port {port} is out of range", "use 0 to 65535")
        self._tunnel = tunnel
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """As bound: with the port that was taken for 0."""
        port = self._server.server_address[1] if self._server is not None else self._port
        return f"[{self._host}]:{port}" if self._host.version == 6 else f"{self._host}:{port}"

    def open(self) -> None:
        """Binds. EndpointError; ImportError when prometheus-client is missing."""
        exposition(self._tunnel)  # now, rather than at the first scrape
        family = AF_INET6 if self._host.version == 6 else AF_INET
        kind = type("_FamilyServer", (_Server,), {"address_family": family})
        try:
            self._server = kind((str(self._host), self._port), _Handler)
        except OSError as error:
            raise EndpointError("bind", self.address, error.errno or 0, "choose another --metrics address") from error
        self._server.tunnel = self._tunnel

    def start(self) -> None:
        """Serves from now on, in a thread."""
        if self._server is not None:
            self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="fasttun-web",
                                            daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends. May be called twice."""
        if self._server is not None:
            if self._thread is not None:
                self._server.shutdown()
                self._thread.join()
            self._server.server_close()
            self._server = self._thread = None
