#!/usr/bin/env python3
"""A tunnel under a bad network for as long as wanted, and then its books: sudo python tests/adversity/soak.py

Two hosts and a router between them, all network namespaces. On the router a proxy loses, doubles, reorders,
cuts, flips and injects datagrams; meanwhile cables, TUN devices and outer addresses come and go. At the end
    in = out + drops, to the packet, on both sides; what TCP carried is intact; memory is flat.
Prints a line a minute, the totals at the end; the status is 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from support.netns import Lab, Namespace, missing, wait_until
from support.node import Node, assert_counted
from support.udp_proxy import Faults, UdpProxy

CLIENT, SERVER = "10.7.0.2", "10.7.0.1"
BLOCK = 64 * 1024
GROWTH_KIB = 1024
"""Allowed of resident memory, from a fifth of the time to the end: less than one buffer that is not given back."""


class Traffic:
    """TCP blocks with their hash, client to server, and a trickle of UDP both ways. Threads of their own."""

    def __init__(self, client: Namespace, server: Namespace, seed: int) -> None:
        self.client, self.server = client, server
        self.counts: Counter[str] = Counter()
        self.ended = threading.Event()
        self._random = random.Random(seed)
        self._threads = [threading.Thread(target=self._in, args=(ns, work)) for ns, work in (
            (server, self._take_blocks), (client, self._give_blocks), (client, self._trickle_to_server),
            (server, self._trickle_to_client))]
        self.failed: list[BaseException] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join(30)

    def _in(self, ns: Namespace, work: Callable[[], None]) -> None:
        try:
            with ns.enter():
                work()
        except BaseException as error:
            self.failed.append(error)

    def _take_blocks(self) -> None:
        with socket.create_server(("0.0.0.0", 5000)) as door:
            door.settimeout(0.5)
            while not self.ended.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = door.accept()
                    with connection:
                        connection.settimeout(3)
                        self._take_from(connection)

    def _take_from(self, connection: socket.socket) -> None:
        while not self.ended.is_set():
            parts = bytearray()
            while len(parts) < BLOCK + 32:
                part = connection.recv(BLOCK + 32 - len(parts))
                if not part:
                    return
                parts += part
            right = hashlib.sha256(parts[:BLOCK]).digest() == parts[BLOCK:]
            self.counts["TCP blocks intact" if right else "TCP blocks BROKEN"] += 1

    def _give_blocks(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(OSError), socket.create_connection((SERVER, 5000), timeout=2) as connection:
                connection.settimeout(3)
                self.counts["TCP connections"] += 1
                while not self.ended.wait(0.01):
                    block = self._random.randbytes(BLOCK)
                    connection.sendall(block + hashlib.sha256(block).digest())
            self.ended.wait(0.1)

    def _trickle_to_server(self) -> None:
        self._trickle(SERVER, random.Random(1))

    def _trickle_to_client(self) -> None:
        self._trickle(CLIENT, random.Random(2))

    def _trickle(self, to: str, chance: random.Random) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while not self.ended.wait(0.02):
                for number in range(8):
                    with contextlib.suppress(OSError):  # the device is down for the moment
                        sock.sendto(struct.pack("!I", number) + bytes(chance.randrange(0, 1400)), (to, 5001))
                        self.counts["UDP datagrams"] += 1


class Soak:
    """`run()` for so many seconds; the lines it ends with are in `report`, what does not hold in `broken`."""

    def __init__(self, seconds: float, seed: int, *, every_s: float = 3.0,
                 say: Callable[[str], None] = lambda text: print(text, flush=True)) -> None:
        self.seconds, self.every_s, self.say = seconds, every_s, say
        self.chance = random.Random(seed)
        self.events: Counter[str] = Counter()
        self.report: list[str] = []
        self.broken: list[str] = []

    def run(self) -> None:
        with Lab() as lab:
            self.client, _, self.server, self.near, self.far = lab.routed()
            self.router = self.near.b.ns
            with Node(self.server, listen=True, address=f"{SERVER}/24") as listener, \
                    UdpProxy((self.far.b.v4, 1234), listen=(self.near.b.v4, 1234), ns=self.router,
                             seed=1, lifetime_s=self.seconds + 120) as self.proxy, \
                    Node(self.client, server=self.near.b.v4, address=f"{CLIENT}/24", mtu=1400) as client:
                self._reaches()
                self.traffic = Traffic(self.client, self.server, 3)
                self.traffic.start()
                try:
                    self._misbehave({"listener": listener, "client": client})
                finally:
                    self.traffic.stop()
                self._heal()
                self._reaches()
                self._books({"listener": listener, "client": client})

    def _misbehave(self, nodes: dict[str, Node]) -> None:
        start = time.monotonic()
        said = 0
        warm: dict[str, int] = {}
        moments = [self._faults, self._rebind, self._roam, self._cable, self._device_of_client,
                   self._device_of_server, self._mute, self._stray]
        turn = 0
        while (passed := time.monotonic() - start) < self.seconds:
            if passed > self.seconds / 5 and not warm:
                warm = {name: node.rss_kib() for name, node in nodes.items()}
            if turn % len(moments) == 0:
                self.chance.shuffle(moments)
            moments[turn % len(moments)]()
            turn += 1
            if passed // 60 > said:
                said = int(passed // 60)
                memory = ", ".join(f"{name} {node.rss_kib()} KiB" for name, node in nodes.items())
                self.say(f"{said} min: {dict(self.traffic.counts)}; {memory}")
            time.sleep(self.chance.uniform(0.3, 1) * self.every_s)
        for name, node in nodes.items():
            now = node.rss_kib()
            self.report.append(
                f"{name}: resident {warm.get(name, now)} KiB after a fifth of the time, {now} KiB at the end")
            if now - warm.get(name, now) > GROWTH_KIB:
                self.broken.append(f"{name}: memory has grown by {now - warm[name]} KiB")

    # ---------------------------------------------------------------------------- what may happen

    def _faults(self) -> None:
        def some(most: float) -> float:
            return self.chance.choice((0.0, self.chance.random() * most))

        for side in ("to_server", "to_client"):
            setattr(self.proxy, side, Faults(
                lose=some(0.1), duplicate=some(0.1), truncate=some(0.02), corrupt=some(0.02),
                inject=some(0.05), reorder=some(0.1)))
        self.events["fault mixes"] += 1

    def _rebind(self) -> None:
        self.proxy.rebind()
        self.events["NAT rebindings"] += 1

    def _roam(self) -> None:
        """The client's host gets another outer address, and loses the old one."""
        network = self.near.a.v4.rpartition(".")[0]
        new = f"{network}.{self.chance.randrange(10, 250)}"
        self.client.ip("address", "flush", "dev", self.near.a.device, "scope", "global")
        self.client.ip("address", "add", f"{new}/24", "dev", self.near.a.device)
        self.events["changes of address"] += 1

    def _cable(self) -> None:
        self.router.down(self.near.b.device)
        time.sleep(self.chance.random())
        self.router.up(self.near.b.device)
        self.events["cables out and in"] += 1

    def _device_of_client(self) -> None:
        self._device(self.client)

    def _device_of_server(self) -> None:
        self._device(self.server)

    def _device(self, host: Namespace) -> None:
        host.down("tun0")
        time.sleep(self.chance.random() / 2)
        host.up("tun0")
        self.events["TUN devices down and up"] += 1

    def _mute(self) -> None:
        before = self.proxy.to_server, self.proxy.to_client
        self.proxy.to_server = self.proxy.to_client = Faults(lose=1.0)
        time.sleep(self.chance.random() * 2)
        self.proxy.to_server, self.proxy.to_client = before
        self.events["silences"] += 1

    def _stray(self) -> None:
        """Claims of the client's address from ports where nobody answers."""
        header = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, 253, 0))
        header += socket.inet_aton(CLIENT) + socket.inet_aton(SERVER)
        total = sum(struct.unpack("!10H", header))
        header[10:12] = struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
        for _ in range(20):
            with contextlib.suppress(OSError):
                self.proxy.inject(bytes(header) + bytes(8), stray=True)
        self.events["strays"] += 20

    def _heal(self) -> None:
        self.proxy.to_server = self.proxy.to_client = Faults()

    # --------------------------------------------------------------------------------- the books

    def _reaches(self) -> None:
        wait_until(lambda: self.client.run(
            ["ping", "-c1", "-W1", "-i0.2", SERVER], check=False).returncode == 0, 20, 0.2, "ping through the tunnel")

    def _books(self, nodes: dict[str, Node]) -> None:
        time.sleep(0.5)
        for name, node in nodes.items():
            stats = node.stop()
            for direction in ("outbound", "inbound"):
                d = stats[direction]
                drops = {reason: count for reason, count in d["drops"].items() if count}
                self.report.append(f"{name} {direction}: {d['packets_in']} in = {d['packets_out']} out "
                                   f"+ {sum(drops.values())} dropped {drops}")
            self.report.append(f"{name}: errors survived {stats['errors']}")
            try:
                assert_counted(stats)
            except AssertionError as error:
                self.broken.append(f"{name}: {error}")
        self.report.append(f"traffic: {dict(self.traffic.counts)}")
        self.report.append(f"events: {dict(self.events)}")
        self.report.append(f"proxy: {dict(self.proxy.counts)}")
        if self.traffic.failed:
            self.broken.append(f"traffic: {self.traffic.failed[0]!r}")
        if self.traffic.counts["TCP blocks BROKEN"]:
            self.broken.append("TCP blocks were broken")
        if not self.traffic.counts["TCP blocks intact"]:
            self.broken.append("no TCP block went through")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=os.getpid())
    given = parser.parse_args()
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    print(f"{given.seconds:.0f} s, seed {given.seed}", flush=True)
    soak = Soak(given.seconds, given.seed)
    soak.run()
    for line in soak.report:
        print(line)
    for line in soak.broken:
        print("BROKEN", line)
    print("all holds" if not soak.broken else "it does not hold")
    return 1 if soak.broken else 0


if __name__ == "__main__":
    sys.exit(main())
