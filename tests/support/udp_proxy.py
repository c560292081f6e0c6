"""A UDP proxy that breaks the wire on purpose: it loses, doubles, reorders, cuts, flips, delays and injects.

    with UdpProxy(("10.99.0.2", 1234), listen=("10.99.1.1", 1234), seed=7, ns=router) as proxy:
        proxy.to_server = Faults(lose=0.1, duplicate=0.05)
        ...                      # the client talks to proxy.address
        proxy.rebind()           # its datagrams now come from another port, as after a NAT's reboot
        assert proxy.counts["to_server lost"] > 0

One thread, one random stream a direction: the same datagrams in the same order meet the same faults.
Not a model of a link's rate or queue: use tc for those.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import select
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from .netns import Namespace

__all__ = ["Faults", "UdpProxy"]

Address = tuple[str, int]

_DATAGRAM = 65535
_HOLD_S = 0.05  # how long a held-back datagram waits for a later one to overtake it
_MAX_WAITING = 4096  # datagrams; bounds the memory when a delay meets a flood


@dataclass(frozen=True)
class Faults:
    """What may happen to a datagram: chances from 0 to 1, drawn in this order and independently."""

    lose: float = 0.0
    duplicate: float = 0.0
    truncate: float = 0.0
    """Cut to a random shorter length, 0 included."""
    corrupt: float = 0.0
    """One random bit flipped."""
    inject: float = 0.0
    """A datagram of random bytes follows it, from the same source."""
    reorder: float = 0.0
    """Held back until a later one has passed, or 50 ms."""
    delay_ms: tuple[float, float] = (0.0, 0.0)
    """Between these two, evenly; by itself it may reorder."""


class UdpProxy:
    """Between any number of clients and one server. A context manager; lives `lifetime_s` at most.

    Counts by direction in `counts`: "to_server received", "… sent", "… lost", "… duplicated",
    "… truncated", "… corrupted", "… injected", "… reordered", "… refused" (the socket said no).
    `to_server` and `to_client` may be replaced at any time.
    """

    def __init__(
        self,
        server: Address,
        *,
        listen: Address = ("127.0.0.1", 0),
        seed: int = 0,
        to_server: Faults = Faults(),
        to_client: Faults = Faults(),
        ns: Namespace | None = None,
        lifetime_s: float = 120.0,
    ) -> None:
        self.to_server = to_server
        self.to_client = to_client
        self.counts: Counter[str] = Counter()
        self._ns = ns
        self._server = server
        self._random = {"to_server": random.Random(f"{seed}>"), "to_client": random.Random(f"{seed}<")}
        self._deadline = time.monotonic() + lifetime_s
        self._lock = threading.RLock()
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, str, Any, bytes]] = []
        self._held: dict[str, list[tuple[Any, bytes, float]]] = {"to_server": [], "to_client": []}
        self._sides: dict[Any, socket.socket] = {}  # client's address -> socket towards the server
        self._old: list[socket.socket] = []
        self._front = self._socket(listen[0], listen)
        self.address: Address = self._front.getsockname()[:2]
        self._stop_reader, self._stop_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="udp-proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> UdpProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def source_ports(self) -> set[int]:
        """The ports that the server sees now."""
        with self._lock:
            return {side.getsockname()[1] for side in self._sides.values()}

    def rebind(self) -> None:
        """Send every client's datagrams from a new source port; what the server sends to the old is lost."""
        with self._lock:
            for client, side in list(self._sides.items()):
                self._old.append(side)  # stays open, unread, so that its port is not given out again
                self._sides[client] = self._towards_server()

    def inject(self, payload: bytes, *, direction: str = "to_server", stray: bool = False) -> None:
        """Send a datagram of the test's own, untouched, to the server or every client.

        `stray`: from a source port that no client has, instead of the one that is known.
        """
        with self._lock:
            if direction == "to_client":
                for client in self._sides:
                    if stray:
                        with self._socket(client[0]) as other:
                            other.sendto(payload, client)
                    else:
                        self._front.sendto(payload, client)
            elif stray or not self._sides:
                with self._towards_server() as other:
                    other.send(payload)
            else:
                for side in self._sides.values():
                    side.send(payload)
            self.counts[f"{direction} injected"] += 1

    def close(self) -> None:
        """Stop at once; what waits is gone. May be called twice."""
        with contextlib.suppress(OSError):
            self._stop_writer.send(b"x")
        self._thread.join(10)
        for sock in (self._front, self._stop_reader, self._stop_writer, *self._sides.values(), *self._old):
            sock.close()

    # ----------------------------------------------------------------------------------- the thread

    def _socket(self, host: str, bind: Address | None = None) -> socket.socket:
        family = socket.AF_INET if ip_address(host.partition("%")[0]).version == 4 else socket.AF_INET6
        with self._ns.enter() if self._ns else contextlib.nullcontext():
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE: no losses but the wanted
        if bind is not None:
            sock.bind(bind)
        return sock

    def _towards_server(self) -> socket.socket:
        side = self._socket(self._server[0])
        side.connect(self._server)
        return side

    def _run(self) -> None:
        while (now := time.monotonic()) < self._deadline:
            with self._lock:
                due = self._release(now)
                sides = {side: client for client, side in self._sides.items()}
            timeout = min(0.1, self._deadline - now, *([max(0.0, due - now)] if due is not None else []))
            readable, _, _ = select.select([self._stop_reader, self._front, *sides], [], [], timeout)
            if self._stop_reader in readable:
                return
            with self._lock:
                for sock in readable:
                    self._drain(sock, sides.get(sock))

    def _drain(self, sock: socket.socket, client: Any) -> None:
        for _ in range(64):
            try:
                data, source = sock.recvfrom(_DATAGRAM)
            except BlockingIOError:
                return
            except OSError:  # ECONNREFUSED: the server's port is closed for the moment
                continue
            if sock is self._front:
                if source not in self._sides:
                    self._sides[source] = self._towards_server()
                self._suffer("to_server", source, data)
            elif self._sides.get(client) is sock:
                self._suffer("to_client", client, data)

    def _suffer(self, direction: str, client: Any, data: bytes) -> None:
        faults: Faults = getattr(self, direction)
        chance = self._random[direction]
        counts = self.counts
        counts[f"{direction} received"] += 1
        # One draw per fault whatever came before, so that each datagram takes the same share of the stream.
        lost, doubled, cut, flipped, injected, held = (
            chance.random() < p
            for p in (
                faults.lose,
                faults.duplicate,
                faults.truncate,
                faults.corrupt,
                faults.inject,
                faults.reorder,
            )
        )
        where, how, noise_seed = chance.random(), chance.random(), chance.getrandbits(32)
        delay = (faults.delay_ms[0] + how * (faults.delay_ms[1] - faults.delay_ms[0])) / 1000
        if lost:
            counts[f"{direction} lost"] += 1
            return
        if cut and data:
            data = data[: int(where * len(data))]
            counts[f"{direction} truncated"] += 1
        if flipped and data:
            bit = int(where * len(data) * 8)
            data = data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]
            counts[f"{direction} corrupted"] += 1
        now = time.monotonic()
        if held:
            counts[f"{direction} reordered"] += 1
            self._held[direction].append((client, data, now + _HOLD_S))
        else:
            self._later(now + delay, direction, client, data)
            for held_client, held_data, _ in self._held[direction]:
                self._later(now + delay, direction, held_client, held_data)
            self._held[direction].clear()
        if doubled:
            counts[f"{direction} duplicated"] += 1
            self._later(now + delay, direction, client, data)
        if injected:
            counts[f"{direction} injected"] += 1
            noise = random.Random(noise_seed)
            self._later(now + delay, direction, client, noise.randbytes(noise.randrange(0, 1500)))

    def _later(self, due: float, direction: str, client: Any, data: bytes) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self.counts[f"{direction} lost"] += 1
            return
        heapq.heappush(self._waiting, (due, next(self._order), direction, client, data))

    def _release(self, now: float) -> float | None:
        """Send what is due; when the next one will be."""
        for direction, held in self._held.items():
            while held and held[0][2] <= now:
                client, data, _ = held.pop(0)
                self._later(now, direction, client, data)
        while self._waiting and self._waiting[0][0] <= now:
            _, _, direction, client, data = heapq.heappop(self._waiting)
            side = self._sides.get(client)
            try:
                if direction == "to_client":
                    self._front.sendto(data, client)
                elif side is not None:
                    side.send(data)
            except OSError:
                self.counts[f"{direction} refused"] += 1
            else:
                self.counts[f"{direction} sent"] += 1
        times = [self._waiting[0][0]] if self._waiting else []
        times += [held[0][2] for held in self._held.values() if held]
        return min(times, default=None)
