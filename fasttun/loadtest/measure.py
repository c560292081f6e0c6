"""The side that asks: runs the measures one after another, and makes a document of them, version 1:

    schema, version, time (s since 1970), tunnel (name or null), peer, local, seconds (of each transfer)
    tcp   one object for each way and number of streams: way, streams, bits_per_s, bytes, seconds
    udp   one for each way: way, bits_per_s, size, sent, received, loss (0 to 1), offered_bits_per_s: of the last
          of up to three transfers, each slower, until at most one datagram in a hundred is lost
    rtt   one for each load ("idle", "up", "down"): load, min_us, avg_us, max_us (null: no answer), sent, received

Up is from this side to the other. Bits are those of the payload. New fields may come; `schema` changes with others.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

from .._version import __version__
from ..errors import StateError
from .generator import Arrived, Echoes, datagram_size, receive_tcp, receive_udp, send_tcp, send_udp
from .wire import LARGEST_DATAGRAM, PATIENCE_S, PORT, VERSION, Lines, patient

__all__ = ["SCHEMA", "Measurement"]

SCHEMA = 1
STREAMS = (1, 4)
WAYS = ("up", "down")
IDLE_S = 1.0
CONNECT_S = 5.0
UDP_SHARE, UDP_LOSS, UDP_TRIES = 0.8, 0.01, 3
"""UDP is offered this share of what TCP has reached; while more than so much is lost, of what UDP itself has."""
_INTERVAL_S = 0.01
_HELLO_EVERY_S = 0.05

Say = Callable[[str], object]


class Measurement:
    """One session with a peer that serves. A context manager: whatever happens, all sockets and threads end.

    StateError when it does not answer, is busy, speaks another version, or falls silent.
    """

    def __init__(self, peer: str, *, tunnel: str | None = None, seconds: float = 3.0, port: int = PORT,
                 say: Say = lambda _: None) -> None:
        self._peer = str(ip_address(peer))
        self._port = port
        self._tunnel = tunnel
        self._seconds = seconds
        self._say = say
        self._undo = contextlib.ExitStack()
        self._stop = threading.Event()
        self._token = b""
        self._rates: dict[str, float] = {}

    def __enter__(self) -> Measurement:
        try:
            with self._explained():
                self._lines = self._connect()
                self._lines.send(bench=VERSION)
                answer = self._lines.receive()
                if answer.get("bench") != VERSION:
                    raise StateError("it speaks another version; use the same fasttun on both sides")
                self._token = bytes.fromhex(answer["token"])
                patient(self._lines.sock, self._seconds + 2 * PATIENCE_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what runs. May be called twice."""
        self._stop.set()
        self._undo.close()

    def run(self) -> dict[str, Any]:
        """All measures; the document. StateError."""
        with self._explained():
            return self._run()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever the other side does, as a StateError that names it."""
        try:
            yield
        except StateError as error:
            raise StateError(f"{self._peer}: {error}") from None
        except (KeyError, TypeError, ValueError):
            raise StateError(f"{self._peer}: the other side does not speak this") from None
        except BlockingIOError:
            raise StateError(f"{self._peer} has fallen silent in the middle of the measurement") from None
        except OSError as error:
            raise StateError(f"{self._peer}: the connection broke: {error.strerror or error}") from None

    def _run(self) -> dict[str, Any]:
        tcp: list[dict[str, Any]] = []
        rtt: list[dict[str, Any]] = []
        self._say("round-trip time, idle")
        with self._echoes("idle", rtt):
            time.sleep(IDLE_S)
        for way in WAYS:
            for streams in STREAMS:
                self._say(f"TCP {way}, {streams} stream{'s' if streams > 1 else ''}")
                with self._echoes(way, rtt) if streams == STREAMS[-1] else contextlib.nullcontext():
                    tcp.append(self._tcp(way, streams))
        udp = []
        for way in WAYS:
            self._say(f"UDP {way}")
            udp.append(self._udp(way))
        self._lines.send(do="bye")
        return {
            "schema": SCHEMA, "version": __version__, "time": time.time(), "tunnel": self._tunnel, "peer": self._peer,
            "local": self._lines.sock.getsockname()[0], "seconds": self._seconds, "tcp": tcp, "udp": udp, "rtt": rtt,
        }

    def _connect(self) -> Lines:
        try:
            sock = socket.create_connection((self._peer, self._port), CONNECT_S)
        except OSError as error:
            why = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise StateError(f"TCP port {self._port}: {why}; is `fasttun bench --serve` running there?") from None
        self._undo.callback(sock.close)
        self._undo.callback(_shut, sock)
        patient(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Lines(sock)

    # --------------------------------------------------------------------------------------------------- measures

    def _tcp(self, way: str, streams: int) -> dict[str, Any]:
        connections = [self._connect() for _ in range(streams)]
        found = [Arrived() for _ in connections]
        errors: list[BaseException] = []

        def work(number: int) -> None:
            lines = connections[number]
            try:
                lines.send(bench=VERSION, token=self._token.hex(), way=way, seconds=self._seconds)
                if way == "up":
                    send_tcp(lines.sock, self._seconds, self._stop)
                    answer = lines.receive()
                    found[number] = Arrived(int(answer["bytes"]), seconds=float(answer["seconds"]))
                else:
                    found[number] = receive_tcp(lines.sock, self._stop)
                    _shut(lines.sock)
            except BaseException as error:
                errors.append(error)

        try:
            self._together([functools.partial(work, number) for number in range(streams)])
        finally:
            for lines in connections:
                _shut(lines.sock)
        for lines in connections:
            lines.sock.close()
        if errors:
            raise errors[0]
        seconds = max(one.seconds for one in found)
        total = Arrived(sum(one.bytes for one in found), seconds=seconds)
        self._rates[way] = max(self._rates.get(way, 0.0), total.bits_per_s)
        return {"way": way, "streams": streams, "bits_per_s": total.bits_per_s, "bytes": total.bytes,
                "seconds": seconds}

    def _together(self, calls: list[Callable[[], object]]) -> None:
        threads = [threading.Thread(target=call, name="fasttun-bench", daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)  # a signal is seen in between

    def _udp(self, way: str) -> dict[str, Any]:
        """The first of some transfers that loses little, each at what the last has brought over."""
        rate = UDP_SHARE * self._rates[way]
        for _ in range(UDP_TRIES):
            found = self._udp_once(way, max(1e4, rate))
            if found["loss"] <= UDP_LOSS:
                break
            rate = UDP_SHARE * found["bits_per_s"]
        return found

    def _udp_once(self, way: str, rate: float) -> dict[str, Any]:
        with self._udp_socket() as sock:
            sock.connect((self._peer, self._port))  # only to learn the way's MTU
            size = min(LARGEST_DATAGRAM, datagram_size(sock))
            self._lines.send(do="udp", way=way, size=size, rate=rate, seconds=self._seconds)
            sock.connect((self._peer, int(self._lines.receive()["port"])))
            if way == "up":
                sent = send_udp(sock, self._token, size, rate, self._seconds, self._stop)
                self._lines.send(do="end")
                answer = self._lines.receive()
                found = Arrived(int(answer["bytes"]), int(answer["packets"]), float(answer["seconds"]))
            else:
                found, sent = self._udp_down(sock, size)
        return {"way": way, "bits_per_s": found.bits_per_s, "size": size, "sent": sent, "received": found.packets,
                "loss": max(0.0, 1 - found.packets / sent) if sent else 0.0, "offered_bits_per_s": rate}

    def _udp_down(self, sock: socket.socket, size: int) -> tuple[Arrived, int]:
        over = threading.Event()
        found: list[Arrived] = []
        thread = threading.Thread(
            target=lambda: found.append(receive_udp(sock, self._token, size, over, self._seconds + PATIENCE_S)),
            name="fasttun-bench-udp", daemon=True)
        thread.start()
        try:
            for _ in range(3):  # the first is enough, and any may be lost
                sock.send(self._token)
                time.sleep(_HELLO_EVERY_S)
            sent = int(self._lines.receive()["sent"])
        finally:
            over.set()
            thread.join()
        return found[0], sent

    @contextlib.contextmanager
    def _echoes(self, load: str, rtt: list[dict[str, Any]]) -> Iterator[None]:
        """Round-trip times while the block runs."""
        self._lines.send(do="echo")
        port = int(self._lines.receive()["port"])
        echoes, over = Echoes(), threading.Event()
        with self._udp_socket() as sock:
            sock.connect((self._peer, port))
            thread = threading.Thread(target=echoes.ask, args=(sock, self._token, _INTERVAL_S, over),
                                      name="fasttun-bench-echo", daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()
        times = echoes.times_us
        rtt.append({"load": load, "min_us": min(times, default=None),
                    "avg_us": sum(times) / len(times) if times else None, "max_us": max(times, default=None),
                    "sent": echoes.sent, "received": len(times)})

    def _udp_socket(self) -> socket.socket:
        return socket.socket(self._lines.sock.family, socket.SOCK_DGRAM)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
