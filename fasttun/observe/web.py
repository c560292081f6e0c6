"""HTTP on one address: /metrics for Prometheus, / the status page, /status.json what the page shows.

Read-only, and open to whoever reaches the address. On a loopback address it answers to addresses and localhost
only, so that no page of the web can read it under a name that it makes point here (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from ..errors import ConfigurationError, EndpointError
from .metrics import exposition
from .snapshot import snapshot

__all__ = ["WebServer"]

PATIENCE_S = 5.0
CLIENTS = 16
"""Connections at a time; more are closed."""
_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
           "frame-ancestors 'none'")

log = logging.getLogger("fasttun")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 4 * CLIENTS
    tunnel: Any

    def __init__(self, *arguments: Any) -> None:
        self._room = threading.BoundedSemaphore(CLIENTS)
        super().__init__(*arguments)

    def server_bind(self) -> None:
        """Without asking a resolver for this host's name, as HTTPServer does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not to standard error: whoever hangs up early is no defect."""
        log.debug("status page: a request from %s failed", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE_S
    server: _Server
    server_version = f"fasttun/{__version__}"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not self._is_for_us():
            self.send_error(421, explain="ask by address, as the server is bound to")
        elif path == "/metrics":
            self._send(*exposition(self.server.tunnel))
        elif path == "/status.json":
            self._send("application/json", json.dumps(snapshot(self.server.tunnel)).encode())
        elif path == "/":
            self._send("text/html; charset=utf-8", files(__package__).joinpath("page.html").read_bytes())
        else:
            self.send_error(404)

    def _is_for_us(self) -> bool:
        """Whether the Host header, which every browser sends, names no other host than this."""
        if not ipaddress.ip_address(self.server.server_name).is_loopback:
            return True
        try:
            host = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
            return host == "localhost" or bool(ipaddress.ip_address(host))
        except ValueError:
            return False

    def _send(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
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
