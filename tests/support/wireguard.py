"""WireGuard without root: an engine on a socketpair and loopback, and its peers played in plain Python.

Every byte that the engine sends is opened, and every byte that it gets is made, by `fasttun.wireguard.keypairs`.
Below that, whole devices: `ends` for two on loopback, `running` for one on a host of a `Lab`.
Not for: namespaces themselves (support/netns.py).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface, ip_network
from typing import Any

from fasttun._core import NEWS_FLAGS, Engine, SessionTable
from fasttun.wireguard.config import Config, PeerConfig
from fasttun.wireguard.keypairs import Keypair, padded_length
from fasttun.wireguard.keys import PresharedKey, PrivateKey
from fasttun.wireguard.noise import TransportKeys
from fasttun.wireguard.tunnel import WireGuard

from .netns import Namespace, wait_until
from .tunnels import Pipe, assert_balanced, bind_udp, descriptors, ip_packet, threads

__all__ = [
    "INNER", "NEWS_FLAGS", "OVERHEAD", "Device", "Ends", "Remote", "at", "ends", "exchange", "flags", "host_configs",
    "inner", "lost", "networks", "pair_of_configs", "reaches", "running",
]

OVERHEAD = 32
"""Bytes of a data message around its packet: header and tag (paper §5.4.6)."""


def networks(*texts: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(map(ip_network, texts))


def inner(source: str, destination: str, length: int = 60, fill: bytes = b"x") -> bytes:
    """An IP packet of exactly `length` bytes."""
    header = 40 if ":" in source else 20
    return ip_packet(source, destination, (fill * length)[: length - header])


def flags(value: int) -> set[str]:
    """News flags by name."""
    return {name for name, bit in NEWS_FLAGS.items() if value & bit}


class Device:
    """A session table with a running engine, and nothing of the protocol. A context manager.

    At its end the counters must balance, to the packet.
    """

    def __init__(self, *, mtu: int = 1420, host: str = "127.0.0.1", engine_mtu: int | None = None,
                 start: bool = True, **options: Any) -> None:
        self.mtu = mtu
        self.pipe = Pipe.make()
        self.sock = bind_udp(host)
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE: no losses but the wanted
        self.table = SessionTable(family=int(self.sock.family), mtu=mtu)
        self.engine = Engine(self.table, tun_fd=self.pipe.fd, udp_fd=self.sock.fileno(),
                             mtu=engine_mtu or mtu, **options)
        self.remotes: list[Remote] = []
        self._thread = threading.Thread(target=self.engine.run)
        if start:
            self.start()

    def start(self) -> None:
        """For what must meet the loop in one burst: send it before."""
        self._thread.start()

    @property
    def address(self) -> Any:
        return self.sock.getsockname()[:2]

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()
        self._thread.join(10)
        alive = self._thread.is_alive()
        for remote in self.remotes:
            remote.sock.close()
        self.sock.close()
        self.pipe.close()
        assert not alive
        self.assert_balanced(queued=0)

    def counters(self) -> dict[str, Any]:
        return self.engine.counters()

    @property
    def drops(self) -> dict[str, int]:
        """Of both directions, without zeros. Reasons of both are told apart by `out_`."""
        counters = self.engine.counters()
        found = {f"out_{name}": count for name, count in counters["outbound"]["drops"].items() if count}
        return found | {name: count for name, count in counters["inbound"]["drops"].items() if count}

    def expect_drop(self, reason: str, count: int = 1) -> None:
        """Waits until exactly this was dropped and nothing else."""
        wait_until(lambda: sum(self.drops.values()) >= count, what=f"{reason} {count}: {self.drops}")
        assert self.drops == {reason: count}

    def assert_balanced(self, queued: int = 0) -> None:
        """in = out + drops, and what waits."""
        counters = self.engine.counters()
        for name, waiting in (("outbound", queued), ("inbound", 0)):
            direction = counters[name]
            total = direction["packets_out"] + sum(direction["drops"].values()) + waiting
            assert direction["packets_in"] == total, (name, direction)

    def send(self, packet: bytes) -> None:
        """From the host behind the device."""
        self.pipe.send(packet)

    def news(self) -> list[tuple[int, set[str], int, Any, int]]:
        return [(number, flags(value), *rest) for number, value, *rest in self.table.take()[1]]


class Remote:
    """A peer on a socket of its own, with sessions made by hand instead of by a handshake."""

    _indices = itertools.count(0x1000, 0x1357)

    def __init__(self, device: Device, *allowed: str, host: str = "127.0.0.1", known: bool = True,
                 index: int | None = None, session: bool = True, **options: Any) -> None:
        self.device = device
        self.table = device.table
        self.sock = bind_udp(host)
        self.number = self.table.add_peer()
        for network in networks(*allowed):
            self.table.allow(self.number, network)
        if known:
            self.table.set_endpoint(self.number, self.endpoint)
        device.remotes.append(self)
        if session:
            self.keypair = self.session(index, **options)

    @property
    def endpoint(self) -> tuple[Any, int, int]:
        host, port = self.sock.getsockname()[:2]
        return ip_address(host), port, 0

    def session(self, index: int | None = None, *, activate: bool = True, confirm: bool = False,
                age_s: float = 0.0, counter: int = 0) -> Keypair:
        """A new session, as a handshake leaves it; our half of it."""
        index = next(self._indices) if index is None else index
        send, receive = os.urandom(32), os.urandom(32)
        keypair = Keypair(TransportKeys(bytearray(send), bytearray(receive)), local_index=index ^ 0xffff_ffff,
                          remote_index=index, created=time.monotonic(), initiator=False)
        self.table.install(self.number, index, keypair.local_index, receive, send, age_s=age_s, counter=counter)
        if activate:
            self.table.activate(index, confirm)
        return keypair

    def sealed(self, packet: bytes, *, counter: int | None = None, keypair: Keypair | None = None,
               pad: bool = True) -> bytes:
        """The data message around `packet`."""
        keypair = keypair or self.keypair
        if counter is not None:
            keypair.send_counter = counter
        if pad:
            packet = packet.ljust(padded_length(len(packet), self.device.mtu), b"\0")
        return keypair.seal(packet, keypair.created)

    def send_raw(self, datagram: bytes, sock: socket.socket | None = None) -> None:
        (sock or self.sock).sendto(datagram, self.device.address)

    def send(self, packet: bytes, **how: Any) -> None:
        self.send_raw(self.sealed(packet, **how))

    def receive_raw(self, timeout: float = 5) -> bytes:
        self.sock.settimeout(timeout)
        return self.sock.recv(70000)

    def receive(self, keypair: Keypair | None = None, timeout: float = 5) -> bytes:
        """The inner packet with its padding of the next data message; Refused unless it is all right."""
        keypair = keypair or self.keypair
        return keypair.open(self.receive_raw(timeout), keypair.created)

    def silent(self, seconds: float = 0.05) -> bool:
        return not select.select([self.sock], [], [], seconds)[0]

    def counters(self) -> dict[str, Any]:
        return self.table.peer_counters(self.number)


# ------------------------------------------------------------------------------------ whole devices


class Ends:
    """Two running `WireGuard`s that know each other; a at 10.9.0.1 and fd09::1, b at .2 and ::2."""

    def __init__(self, a: WireGuard, b: WireGuard, near: Pipe, far: Pipe) -> None:
        self.a, self.b, self.near, self.far = a, b, near, far


def pair_of_configs(*, preshared: PresharedKey | None = None, keepalive: int = 0) -> tuple[Config, Config]:
    """Two configurations that know each other's keys and inner addresses, but no endpoints."""
    a, b = PrivateKey.generate(), PrivateKey.generate()
    return (
        Config(private_key=a, peers=(PeerConfig(
            b.public, preshared, networks("10.9.0.2/32", "fd09::2/128"), persistent_keepalive=keepalive),)),
        Config(private_key=b, peers=(PeerConfig(
            a.public, preshared, networks("10.9.0.1/32", "fd09::1/128")),)),
    )


@contextlib.contextmanager
def ends(configs: tuple[Config, Config] | None = None, *, a: dict[str, Any] | None = None,
         b: dict[str, Any] | None = None, introduce: bool = True, sweep: bool = True) -> Iterator[Ends]:
    """Both running; with `introduce` b knows where a is. Afterwards no thread and no descriptor is left.

    sweep: look for descriptors; not where logged tracebacks keep what they name alive.
    """
    before = set(descriptors())
    first, second = configs or pair_of_configs()
    with Pipe.make() as near, Pipe.make() as far, \
            WireGuard(first, tun_fd=near.fd, **(a or {})) as one, \
            WireGuard(second, tun_fd=far.fd, **(b or {})) as two:
        if introduce:
            two.update_peer(first.private_key.public, endpoint=at(one))  # type: ignore[union-attr]
        yield Ends(one, two, near, far)
    left = {fd: what for fd, what in descriptors().items() if fd not in before}
    assert not left or not sweep
    assert not threads()


def at(tunnel: WireGuard, host: str = "127.0.0.1") -> Any:
    """Where the tunnel is reached on loopback."""
    from fasttun.endpoint import Endpoint

    return Endpoint(ip_address(host), tunnel.listen_port)


def exchange(pair: Ends, note: bytes = b"ping", *, timeout: float = 5, both: bool = True) -> None:
    """A packet each way must arrive as it was; what is older and still waits is passed over."""
    there = ip_packet("10.9.0.2", "10.9.0.1", note)
    back = ip_packet("10.9.0.1", "10.9.0.2", note)
    pair.far.send(there)
    _await(pair.near.receive, there, timeout)
    if both:
        pair.near.send(back)
        _await(pair.far.receive, back, timeout)


def _await(receive: Callable[..., bytes], wanted: bytes, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while (got := receive(timeout=max(0.01, deadline - time.monotonic()))) != wanted:
        assert len(got) >= 20


# --------------------------------------------------------------------------------- between two hosts

INNER = (("10.9.0.1", "fd09::1"), ("10.9.0.2", "fd09::2"))


def host_configs(endpoint: str, *, keepalive: int = 0, preshared: PresharedKey | None = None,
                 **listener: Any) -> tuple[Config, Config]:
    """A listener a on port 51820 and a client b that finds it at `endpoint`, with inner addresses."""
    a, b = PrivateKey.generate(), PrivateKey.generate()
    first, second = (tuple(ip_interface(f"{text}/{'64' if ':' in text else '24'}") for text in end) for end in INNER)
    return (
        Config(private_key=a, listen_port=51820, address=first, peers=(PeerConfig(
            b.public, preshared, networks("10.9.0.2/32", "fd09::2/128")),), **listener),
        Config(private_key=b, address=second, peers=(PeerConfig(
            a.public, preshared, networks("10.9.0.0/24", "fd09::/64"), endpoint, keepalive),)),
    )


@contextlib.contextmanager
def running(ns: Namespace, config: Config, **options: Any) -> Iterator[WireGuard]:
    """A `WireGuard` on the host `ns`; afterwards its books balance."""
    tunnel = WireGuard(config, **options)
    with ns.enter():
        tunnel.start()
    try:
        yield tunnel
    finally:
        tunnel.stop()
    assert_balanced(tunnel.stats())


def reaches(ns: Namespace, host: str, timeout: float = 10) -> None:
    """Waits until `host` answers a ping."""
    wait_until(lambda: ns.run(["ping", "-c1", "-W1", host], check=False).returncode == 0, timeout, what=f"ping {host}")


def lost(ns: Namespace, host: str, count: int, interval_s: float, *options: str) -> int:
    """How many of `count` pings have no answer."""
    done = ns.run(["ping", "-q", "-n", f"-c{count}", f"-i{interval_s}", "-W1", *options, host], check=False, timeout=60)
    found = re.search(r"(\d+) packets transmitted, (\d+) received", done.stdout)
    assert found, done.stdout + done.stderr
    return int(found[1]) - int(found[2])
