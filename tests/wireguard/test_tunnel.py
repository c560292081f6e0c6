"""`WireGuard`: two whole devices on loopback, socketpairs in place of their TUNs; and one against a device in Python.

Not for: single packets (test_engine), timers by a simulated clock (test_interface), real TUNs (netns/).
"""

from __future__ import annotations

import asyncio
import base64
import copy
import ipaddress
import logging
import os
import socket
import threading
import time
import traceback
from dataclasses import replace

import pytest
from support.netns import wait_until
from support.tunnels import Pipe, assert_balanced, bind_udp, descriptors, ip_packet, settled, threads
from support.wireguard import at, ends, exchange, inner, networks, pair_of_configs

import fasttun
from fasttun.endpoint import Endpoint
from fasttun.errors import ConfigurationError, DeviceError, EndpointError, StateError
from fasttun.wireguard import keypairs, timers
from fasttun.wireguard.config import Config, PeerConfig
from fasttun.wireguard.cookies import CookieGenerator
from fasttun.wireguard.host import Host
from fasttun.wireguard.interface import Interface
from fasttun.wireguard.keys import PresharedKey, PrivateKey, PublicKey
from fasttun.wireguard.outputs import Send
from fasttun.wireguard.software import SoftwareTunnel
from fasttun.wireguard.tunnel import WireGuard

A, B, C = "10.9.0.1", "10.9.0.2", "10.9.0.3"
LOW_ORDER = PublicKey(bytes(32))


@pytest.fixture
def hasty(monkeypatch):
    """A life of minutes in a second: handshakes may follow each other at once, and sessions are renewed."""
    monkeypatch.setattr(timers, "REKEY_TIMEOUT", 0.1)
    monkeypatch.setattr(timers, "REKEY_TIMEOUT_JITTER_MAX", 0.01)
    monkeypatch.setattr(keypairs, "REKEY_AFTER_TIME", 0.25)


def handshakes(tunnel: WireGuard) -> float:
    """When the last one was; packets may be faster than the news of the first."""
    return wait_until(lambda: tunnel.peers[0].last_handshake)


def public(tunnel: WireGuard) -> PublicKey:
    assert tunnel.private_key is not None
    return tunnel.private_key.public


# ---------------------------------------------------------------------------------- the whole way

def test_a_handshake_and_packets_both_ways():
    heard = {"a": [], "b": []}
    with ends(a={"on_handshake": heard["a"].append}, b={"on_handshake": heard["b"].append}) as pair:
        exchange(pair)
        for length in (20, 21, 100, 1419, 1420):
            pair.far.send(inner(B, A, length))
            assert pair.near.receive() == inner(B, A, length)
            pair.near.send(inner("fd09::1", "fd09::2", max(length, 40)))
            assert pair.far.receive() == inner("fd09::1", "fd09::2", max(length, 40))
        wait_until(lambda: heard["a"] and heard["b"])
        (there,), (here,) = heard["a"], heard["b"]
        assert there.public_key == public(pair.b)
        assert here.public_key == public(pair.a)
        assert there.endpoint == at(pair.b)
        assert abs(here.last_handshake - time.time()) < 5
        for tunnel in (pair.a, pair.b):
            stats = settled(tunnel)
            assert_balanced(stats)
            assert stats.inbound.dropped == stats.outbound.dropped == 0
            assert stats.control_drops == {}
            assert stats.aead
            (peer,) = stats.peers
            # 148 and 92 bytes of handshake, and the rest in data messages.
            assert peer.rx_bytes > 148 if tunnel is pair.a else 92
            assert peer.queued == 0


def test_packets_before_the_session_wait_for_it_in_order():
    with ends(introduce=False) as pair:
        pair.b.update_peer(public(pair.a), endpoint=at(pair.a))
        for number in range(100):
            pair.far.send(ip_packet(B, A, bytes([number])))
        assert [pair.near.receive()[20] for _ in range(100)] == list(range(100))
        assert settled(pair.b).outbound.dropped == 0


def test_a_side_without_an_endpoint_says_so_and_waits_for_the_other():
    with ends() as pair:
        pair.near.send(ip_packet(A, B))
        wait_until(lambda: pair.a.stats().outbound.drops["no_endpoint"] == 1)
        exchange(pair)


def test_neither_side_loses_a_packet_while_sessions_are_renewed(hasty):
    done: list[float] = []
    with ends(b={"on_handshake": lambda peer: done.append(time.monotonic())}) as pair:
        exchange(pair)
        lost = {"a": set(range(400)), "b": set(range(400))}
        twice = []

        def take(pipe, who) -> None:
            while lost[who]:
                number = int.from_bytes(pipe.receive()[20:24], "big")
                if number not in lost[who]:
                    twice.append(number)
                lost[who].discard(number)

        takers = [threading.Thread(target=take, args=(pair.near, "a")),
                  threading.Thread(target=take, args=(pair.far, "b"))]
        for taker in takers:
            taker.start()
        for number in range(400):
            pair.far.send(ip_packet(B, A, number.to_bytes(4, "big")))
            pair.near.send(ip_packet(A, B, number.to_bytes(4, "big")))
            time.sleep(0.004)
        for taker in takers:
            taker.join(6)
        assert lost == {"a": set(), "b": set()}
        assert not twice
        assert len(done) >= 3
        for tunnel in (pair.a, pair.b):
            assert_balanced(settled(tunnel))


def test_data_is_answered_by_one_keepalive_and_keepalives_by_none(monkeypatch):
    monkeypatch.setattr(timers, "KEEPALIVE_TIMEOUT", 0.2)
    with ends() as pair:
        exchange(pair, both=False)
        wait_until(lambda: pair.a.peers[0].tx_packets == 1)
        time.sleep(0.8)
        # b: the packet that began it all; a: its keepalive in answer. Nothing after that.
        assert pair.a.peers[0].tx_packets == pair.b.peers[0].rx_packets == 1
        assert pair.b.peers[0].tx_packets == pair.a.peers[0].rx_packets == 1
        assert pair.near.silent(0)
        assert pair.far.silent(0)


def test_persistent_keepalive_makes_the_session_and_keeps_it():
    with ends() as pair:
        pair.b.update_peer(public(pair.a), persistent_keepalive=1)
        wait_until(lambda: pair.a.peers[0].last_handshake)
        wait_until(lambda: pair.a.peers[0].rx_packets >= 2, 3)
        assert pair.b.peers[0].persistent_keepalive == 1
        pair.b.update_peer(public(pair.a), persistent_keepalive=0)
        exchange(pair)
        assert pair.near.silent(0)


def test_a_flood_of_handshake_messages_keeps_nobody_waiting(monkeypatch):
    """More of them come than can be worked off; what else the control side does must get its turn."""
    monkeypatch.setattr(timers, "REKEY_TIMEOUT", 0.5)
    heard: list[float] = []
    with ends(a={"on_handshake": lambda peer: heard.append(time.monotonic())}, introduce=False) as pair, \
            bind_udp() as sock:
        generator = CookieGenerator(public(pair.a))
        messages = [generator.add_macs(b"\1\0\0\0" + os.urandom(112), 0.0) for _ in range(200)]
        there = ("127.0.0.1", pair.a.listen_port)
        done = threading.Event()

        def flood() -> None:
            while not done.is_set():
                for message in messages:
                    sock.sendto(message, there)

        floods = [threading.Thread(target=flood) for _ in range(2)]
        for thread in floods:
            thread.start()
        try:
            wait_until(lambda: pair.a.stats().control_drops.get("cookie-needed", 0) > 100)
            started = time.monotonic()
            pair.b.update_peer(public(pair.a), endpoint=at(pair.a), persistent_keepalive=1)
            wait_until(lambda: heard, 15)
            assert pair.a.stats().control_drops["cookie-needed"] > 200
        finally:
            done.set()
            for thread in floods:
                thread.join()
        assert heard[0] - started < 12  # two attempts, the first of which brings a cookie, and those that were lost
        exchange(pair)


def test_a_handshake_that_raises_in_its_callback_harms_nobody(caplog):
    def fail(peer: object) -> None:
        raise ValueError("not mine to know")

    with ends(a={"on_handshake": fail}, b={"on_handshake": fail}, sweep=False) as pair:
        exchange(pair)
        wait_until(lambda: "on_handshake raised" in caplog.text)
        exchange(pair, b"still there")


# ------------------------------------------------------------------------------- keys, live

def test_another_private_key_ends_the_sessions():
    with ends() as pair:
        exchange(pair)
        fresh = PrivateKey.generate()
        old = public(pair.a)
        pair.a.set_private_key(fresh)
        assert pair.a.private_key == fresh
        assert fresh.to_bytes() != bytes(32)  # the caller's own is not wiped with it
        pair.far.send(ip_packet(B, A, b"under the old key"))
        wait_until(lambda: pair.a.stats().inbound.drops["unknown_index"] == 1)
        time.sleep(0.05)  # the timestamps of two handshakes, coarse on purpose, must differ
        pair.b.remove_peer(old)
        pair.b.add_peer(PeerConfig(fresh.public, allowed_ips=networks(f"{A}/32"), endpoint=str(at(pair.a))))
        exchange(pair, b"under the new key")
        pair.a.set_private_key(None)
        assert pair.a.private_key is None
        pair.far.send(ip_packet(B, A, b"for nobody"))
        wait_until(lambda: pair.a.stats().inbound.drops["unknown_index"] == 2)
        assert pair.near.silent(0.02)


def test_the_first_answer_to_a_peer_that_has_lost_its_sessions_arrives():
    with ends() as pair:
        config = pair.b.config().peers[0]
        for number in range(10):
            exchange(pair, bytes([number]))
            time.sleep(0.05)
            pair.b.remove_peer(config.public_key)
            pair.b.add_peer(config)


def test_the_same_private_key_again_changes_nothing():
    with ends() as pair:
        exchange(pair)
        before = handshakes(pair.a)
        pair.a.set_private_key(pair.a.private_key)
        exchange(pair, b"as before")
        assert handshakes(pair.a) == before


def test_a_peer_that_we_become_is_removed():
    with ends() as pair:
        exchange(pair)
        pair.a.set_private_key(pair.b.private_key)
        assert pair.a.peers == ()
        pair.far.send(ip_packet(B, A))
        assert pair.near.silent()
        with pytest.raises(ConfigurationError):
            pair.a.add_peer(PeerConfig(public(pair.b)))


def test_a_changed_preshared_key_reaches_the_next_handshake(hasty):
    first, second = PresharedKey.generate(), PresharedKey.generate()
    with ends(pair_of_configs(preshared=first)) as pair:
        exchange(pair)
        before = handshakes(pair.b)
        pair.a.update_peer(public(pair.b), preshared_key=second)
        # The session goes on, and with it the packets; only its renewal fails.
        deadline = time.monotonic() + 5
        while not pair.b.stats().control_drops.get("handshake-not-authentic"):
            exchange(pair)
            assert time.monotonic() < deadline
        assert handshakes(pair.b) == before
        pair.b.update_peer(public(pair.a), preshared_key=copy.copy(second))
        deadline = time.monotonic() + 5
        while handshakes(pair.b) == before:
            exchange(pair)
            assert time.monotonic() < deadline
        assert [tunnel.peers[0].preshared_key == second for tunnel in (pair.a, pair.b)] == [True, True]
        assert second.to_bytes() != bytes(32)
        pair.a.update_peer(public(pair.b), preshared_key=None)
        assert pair.a.peers[0].preshared_key is None


def test_a_wrong_preshared_key_lets_nothing_through():
    first, second = pair_of_configs(preshared=PresharedKey.generate())
    second = replace(second, peers=(replace(second.peers[0], preshared_key=None),))
    with ends((first, second)) as pair:
        pair.far.send(ip_packet(B, A))
        wait_until(lambda: pair.b.stats().control_drops.get("handshake-not-authentic") == 1)
        assert pair.near.silent(0.02)
        assert pair.a.peers[0].last_handshake == pair.b.peers[0].last_handshake == 0


def test_a_stranger_and_a_wrong_key_get_no_answer():
    with ends() as pair, bind_udp() as sock:
        stranger = Interface(PrivateKey.generate())
        peer = stranger.add_peer(public(pair.a), endpoint=at(pair.a))
        (hello,) = stranger.need_handshake(peer, 0.0, time.time())
        sock.sendto(hello.datagram, ("127.0.0.1", pair.a.listen_port))
        wait_until(lambda: pair.a.stats().control_drops == {"unknown-peer": 1})
        # Made for another public key: not even mac1 is right.
        peer = stranger.add_peer(PrivateKey.generate().public, endpoint=at(pair.a))
        (hello,) = stranger.need_handshake(peer, 0.0, time.time())
        sock.sendto(hello.datagram, ("127.0.0.1", pair.a.listen_port))
        wait_until(lambda: pair.a.stats().control_drops == {"unknown-peer": 1, "bad-mac1": 1})
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(2000)


def test_own_low_order_and_known_keys_are_no_new_peers():
    with ends() as pair:
        for key in (public(pair.a), public(pair.b)):
            with pytest.raises(ConfigurationError, match="public_key"):
                pair.a.add_peer(PeerConfig(key))
        pair.a.add_peer(PeerConfig(LOW_ORDER, allowed_ips=networks("10.9.9.0/24"), endpoint="127.0.0.1:9"))
        pair.near.send(ip_packet(A, "10.9.9.1"))
        wait_until(lambda: pair.a.stats().control_drops.get("low-order-key"))
        exchange(pair)


# ------------------------------------------------------------------------------------ peers, live

class Scripted:
    """A WireGuard device in Python on a socket of its own, which answers only when the test wants it to."""

    def __init__(self, other: WireGuard) -> None:
        self.sock = bind_udp()
        self.key = PrivateKey.generate()
        self.interface = Interface(copy.copy(self.key))
        self.peer = self.interface.add_peer(public(other), endpoint=at(other))
        self.tunnel = SoftwareTunnel(self.interface)
        self.there = ("127.0.0.1", other.listen_port)
        self.source = Endpoint(ipaddress.ip_address("127.0.0.1"), other.listen_port)

    @property
    def config(self) -> PeerConfig:
        host, port = self.sock.getsockname()
        return PeerConfig(self.key.public, allowed_ips=networks(f"{C}/32"), endpoint=f"{host}:{port}")

    def receive(self) -> bytes:
        return self.sock.recv(2000)

    def take(self, datagram: bytes) -> list[object]:
        return self.tunnel.receive(datagram, self.source, time.monotonic(), time.time())

    def send(self, outputs: list[object], sock: socket.socket | None = None) -> None:
        for output in outputs:
            if isinstance(output, Send):
                (sock or self.sock).sendto(output.datagram, self.there)

    def packet(self, packet: bytes) -> list[object]:
        return self.tunnel.send(self.peer, packet, time.monotonic(), time.time())

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def test_a_peer_removed_while_its_handshake_is_under_way():
    with ends() as pair, Scripted(pair.a) as other:
        pair.a.add_peer(other.config)
        pair.near.send(ip_packet(A, C, b"waits"))
        initiation = other.receive()
        pair.a.remove_peer(other.key.public)
        other.send(other.take(initiation))
        wait_until(lambda: pair.a.stats().control_drops == {"unknown-index": 1})
        stats = settled(pair.a)
        assert stats.outbound.drops["no_session"] == 1
        assert_balanced(stats)
        assert [peer.public_key for peer in pair.a.peers] == [public(pair.b)]
        # The same peer again is another: the old answer does not count for it, a new handshake does.
        pair.a.add_peer(other.config)
        other.send(other.take(initiation))
        wait_until(lambda: pair.a.stats().control_drops == {"unknown-index": 1})
        pair.near.send(ip_packet(A, C, b"arrives"))
        other.send(other.take(other.receive()))
        assert other.take(other.receive())[-1].packet == ip_packet(A, C, b"arrives")
        exchange(pair)


def test_an_answer_to_a_peer_that_came_back_is_of_the_old_one():
    with ends() as pair, Scripted(pair.a) as other:
        pair.a.add_peer(other.config)
        pair.near.send(ip_packet(A, C))
        answer = other.take(other.receive())
        pair.a.remove_peer(other.key.public)
        pair.a.add_peer(other.config)
        other.send(answer)
        wait_until(lambda: pair.a.stats().control_drops == {"unknown-index": 1})
        assert pair.a.peers[1].last_handshake == 0


def test_a_cookie_reply_does_not_move_the_peer():
    with ends() as pair, Scripted(pair.a) as other, bind_udp() as elsewhere:
        pair.a.add_peer(other.config)
        pair.near.send(ip_packet(A, C))
        initiation = other.receive()
        home = pair.a.peers[1].endpoint
        checker = other.interface._checker
        assert checker is not None
        reply = checker.create_reply(initiation, other.source, time.monotonic()).encode()
        elsewhere.sendto(reply, other.there)
        elsewhere.sendto(b"\3\0\0\0" + bytes(60), other.there)
        wait_until(lambda: pair.a.stats().control_drops == {"unknown-index": 1})
        assert pair.a.peers[1].endpoint == home
        assert pair.a.peers[1].rx_bytes == 0


def test_a_replayed_initiation_from_elsewhere_does_not_move_the_peer():
    with ends() as pair, Scripted(pair.a) as other, bind_udp() as elsewhere:
        pair.a.add_peer(other.config)
        hello = other.packet(ip_packet(C, A, b"hello"))
        other.send(hello)
        other.send(other.take(other.receive()))
        assert pair.near.receive() == ip_packet(C, A, b"hello")
        home = pair.a.peers[1].endpoint
        other.send(hello, elsewhere)
        wait_until(lambda: pair.a.stats().control_drops == {"initiation-replayed": 1})
        assert pair.a.peers[1].endpoint == home
        # What is authentic and new does.
        other.send(other.packet(ip_packet(C, A, b"moved")), elsewhere)
        assert pair.near.receive() == ip_packet(C, A, b"moved")
        assert pair.a.peers[1].endpoint.port == elsewhere.getsockname()[1]
        pair.near.send(ip_packet(A, C, b"there?"))
        assert other.take(elsewhere.recv(2000))[-1].packet == ip_packet(A, C, b"there?")


def test_an_endpoint_that_the_user_sets_holds(hasty):
    """What the peer had sent from elsewhere just before must not win over it."""
    with ends() as pair, Scripted(pair.a) as other, bind_udp() as elsewhere:
        elsewhere.settimeout(5)
        pair.a.add_peer(other.config)
        other.send(other.packet(ip_packet(C, A)))
        other.send(other.take(other.receive()))
        pair.near.receive()
        target = Endpoint(ipaddress.ip_address("127.0.0.1"), elsewhere.getsockname()[1])
        for _ in range(20):
            other.send(other.packet(ip_packet(C, A)))
            pair.near.receive()
            pair.a.update_peer(other.key.public, endpoint=target)
            pair.near.send(ip_packet(A, C))
            elsewhere.recv(2000)
        time.sleep(0.25)
        assert pair.a.peers[1].endpoint == target


def test_peers_added_and_removed_live_leave_the_others_alone():
    with ends() as pair, Scripted(pair.a) as other:
        exchange(pair)
        before = handshakes(pair.a)
        pair.a.add_peer(other.config)
        pair.near.send(ip_packet(A, C, b"for c"))
        other.send(other.take(other.receive()))
        assert other.take(other.receive())[-1].packet == ip_packet(A, C, b"for c")
        pair.a.remove_peer(other.key.public)
        pair.a.remove_peer(other.key.public)  # not there
        exchange(pair, b"as before")
        assert handshakes(pair.a) == before
        other.send(other.packet(ip_packet(C, A, b"gone")))
        wait_until(lambda: pair.a.stats().inbound.drops["unknown_index"] == 1)
        pair.a.replace_peers()
        assert pair.a.peers == ()
        pair.near.send(ip_packet(A, B))
        wait_until(lambda: pair.a.stats().outbound.drops["no_peer"] == 1)


def test_an_allowed_ip_moves_and_goes():
    with ends() as pair, Scripted(pair.a) as other:
        exchange(pair)
        pair.a.add_peer(replace(other.config, allowed_ips=()))
        pair.a.update_peer(other.key.public, allowed_ips=networks(f"{B}/32", f"{C}/32"))
        assert [peer.allowed_ips for peer in pair.a.peers] == [networks("fd09::2/128"), networks(f"{B}/32", f"{C}/32")]
        pair.far.send(ip_packet(B, A))
        wait_until(lambda: pair.a.stats().inbound.drops["not_allowed"] == 1)
        pair.a.update_peer(public(pair.b), allowed_ips=networks(f"{B}/32"), replace_allowed_ips=True)
        assert [peer.allowed_ips for peer in pair.a.peers] == [networks(f"{B}/32"), networks(f"{C}/32")]
        exchange(pair, b"back again")
        pair.a.update_peer(public(pair.b), remove_allowed_ips=networks(f"{B}/32", f"{C}/32"))
        assert [peer.allowed_ips for peer in pair.a.peers] == [(), networks(f"{C}/32")]
        pair.near.send(ip_packet(A, B))
        wait_until(lambda: pair.a.stats().outbound.drops["no_peer"] == 1)
        with pytest.raises(KeyError):
            pair.a.update_peer(PrivateKey.generate().public, persistent_keepalive=1)


def test_a_peer_by_name_and_a_name_that_is_none():
    first, second = pair_of_configs()
    with ends((first, second), introduce=False) as pair:
        pair.b.remove_peer(public(pair.a))
        pair.b.add_peer(PeerConfig(public(pair.a), allowed_ips=networks(f"{A}/32"),
                                   endpoint=f"localhost:{pair.a.listen_port}"))
        exchange(pair)
        for wrong in ("localhost", "localhost:0", "localhost:70000", ":1", "a:b"):
            with pytest.raises(ConfigurationError, match="Endpoint"):
                pair.b.add_peer(PeerConfig(PrivateKey.generate().public, endpoint=wrong))
        with pytest.raises(EndpointError):
            pair.b.add_peer(PeerConfig(PrivateKey.generate().public, endpoint="no.such.host.invalid:1"))
        assert len(pair.b.peers) == 1


# ---------------------------------------------------------------------------------- socket, live

def test_another_port_without_loss_of_the_session():
    with ends() as pair:
        exchange(pair)
        before, port = handshakes(pair.a), pair.a.listen_port
        for round_ in range(5):
            pair.a.set_listen_port(0)
            assert pair.a.listen_port not in (0, port)
            port = pair.a.listen_port
            if round_ % 2:  # b has learned it from a's keepalive, whoever speaks first
                wait_until(lambda: pair.b.peers[0].endpoint.port == port)  # noqa: B023
                pair.far.send(ip_packet(B, A, b"from b"))
                assert pair.near.receive() == ip_packet(B, A, b"from b")
            else:
                pair.near.send(ip_packet(A, B, b"from a"))
                assert pair.far.receive() == ip_packet(A, B, b"from a")
            exchange(pair, bytes([round_]))
        pair.b.set_listen_port(0)
        exchange(pair, b"b too")
        assert handshakes(pair.a) == before
        pair.a.set_listen_port(port)  # the one that it has


def test_a_port_that_is_taken_leaves_all_as_it_was():
    with ends() as pair, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as taken:
        exchange(pair)
        taken.bind(("::", 0))
        port = pair.a.listen_port
        with pytest.raises(EndpointError, match="in use"):
            pair.a.set_listen_port(taken.getsockname()[1])
        for wrong in (-1, 65536):
            with pytest.raises(ConfigurationError):
                pair.a.set_listen_port(wrong)
        assert pair.a.listen_port == port
        exchange(pair, b"as before")


@pytest.mark.netns
def test_the_mark_is_on_the_socket_and_stays_there():
    first, second = pair_of_configs()
    with ends((replace(first, fwmark=0xCA6C), second)) as pair:
        def mark() -> int:
            return int(pair.a._sockets[0].getsockopt(socket.SOL_SOCKET, 36))

        assert pair.a.fwmark == mark() == 0xCA6C
        pair.a.set_fwmark(0xFFFF_FFFF)
        assert mark() & 0xFFFF_FFFF == pair.a.fwmark == 0xFFFF_FFFF
        pair.a.set_listen_port(0)
        assert mark() & 0xFFFF_FFFF == 0xFFFF_FFFF
        pair.a.set_fwmark(0)
        assert pair.a.fwmark == mark() == 0
        with pytest.raises(ConfigurationError):
            pair.a.set_fwmark(1 << 32)


# ------------------------------------------------------------------------------ configuration, state

def test_the_running_configuration_is_the_given_one_and_follows_changes():
    first, second = pair_of_configs(preshared=PresharedKey.generate(), keepalive=21)
    first = replace(first, dns=("192.0.2.53",), post_up=("true",), address=(ipaddress.ip_interface("10.9.0.1/24"),))
    with ends((first, second)) as pair:
        now = pair.a.config()
        assert now == replace(first, listen_port=pair.a.listen_port)
        assert Config.parse(now.text()) == now
        exchange(pair)
        extra = PeerConfig(PrivateKey.generate().public, None, networks("10.8.0.0/16"), "192.0.2.1:9", 5, "alice")
        pair.a.add_peer(extra)
        now = pair.a.config()
        assert now.peers == (replace(first.peers[0], endpoint=str(at(pair.b))), extra)
        assert Config.parse(now.text()) == now
        assert first.private_key.to_bytes() != bytes(32)
    # What it was made from is the caller's, and stays good after the end.
    assert first.private_key.to_bytes() != bytes(32)
    assert first.peers[0].preshared_key.to_bytes() != bytes(32)


def test_calls_before_the_start_and_after_the_end():
    first, _ = pair_of_configs()
    with Pipe.make() as pipe:
        tunnel = WireGuard(replace(first, listen_port=7), tun_fd=pipe.fd)
        calls = [
            lambda: tunnel.set_private_key(None), lambda: tunnel.set_listen_port(0), lambda: tunnel.set_fwmark(0),
            lambda: tunnel.add_peer(PeerConfig(PrivateKey.generate().public)), tunnel.replace_peers,
            lambda: tunnel.remove_peer(first.peers[0].public_key), tunnel.resolve_again,
            lambda: tunnel.update_peer(first.peers[0].public_key),
        ]
        assert tunnel.listen_port == 7
        assert tunnel.private_key == first.private_key
        assert tunnel.peers == ()
        assert tunnel.stats().inbound.packets_in == 0
        assert not tunnel.running
        for call in calls:
            with pytest.raises(StateError):
                call()
        tunnel = WireGuard(first, tun_fd=pipe.fd)
        with tunnel:
            assert tunnel.running
            with pytest.raises(StateError):
                tunnel.start()
        assert not tunnel.running
        for call in calls:
            with pytest.raises(StateError):
                call()
        tunnel.stop()
        assert tunnel.stats().peers == tunnel.peers
        assert [peer.public_key for peer in tunnel.peers] == [first.peers[0].public_key]


def test_a_port_that_changes_while_the_tunnel_ends_touches_no_descriptor(monkeypatch):
    first, _ = pair_of_configs()
    ended, found = threading.Event(), []
    close, open_socket = Host.close, WireGuard._open_socket

    def slowly_closed(host):
        close(host)
        ended.set()
        time.sleep(0.3)

    def opened_late(tunnel, port):
        sock = open_socket(tunnel, port)
        time.sleep(0.6 if ended.is_set() else 0)
        return sock

    def change():
        ended.wait(5)
        try:
            tunnel.set_listen_port(0)
        except BaseException as error:
            found.append(error)

    monkeypatch.setattr(Host, "close", slowly_closed)
    monkeypatch.setattr(WireGuard, "_open_socket", opened_late)
    with Pipe.make() as pipe:
        tunnel = WireGuard(first, tun_fd=pipe.fd)
        tunnel.start()
        changer = threading.Thread(target=change)
        changer.start()
        tunnel.stop()
        changer.join(5)
    assert [type(error) for error in found] == [StateError]
    assert tunnel.config().private_key == first.private_key


def test_v4_mapped_allowed_ips_are_refused():
    with ends() as pair:
        network = ipaddress.ip_network("::ffff:10.0.0.0/104")
        (before,) = pair.a.peers
        with pytest.raises(ConfigurationError, match="v4-mapped"):
            pair.a.add_peer(PeerConfig(PrivateKey.generate().public, allowed_ips=(network,)))
        with pytest.raises(ConfigurationError, match="v4-mapped"):
            pair.a.update_peer(before.public_key, allowed_ips=(network,), replace_allowed_ips=True)
        assert [peer.allowed_ips for peer in pair.a.peers] == [before.allowed_ips]


@pytest.mark.parametrize("what", ["port", "descriptor", "endpoint", "own key", "twice"])
def test_a_start_that_fails_leaves_nothing(what):
    first, _ = pair_of_configs()
    peer = first.peers[0]
    before = set(descriptors())
    with Pipe.make() as pipe, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as taken:
        taken.bind(("::", 0))
        config = {
            "port": replace(first, listen_port=taken.getsockname()[1]),
            "endpoint": replace(first, peers=(replace(peer, endpoint="no.such.host.invalid:1"),)),
            "own key": replace(first, peers=(replace(peer, public_key=first.private_key.public),)),
            "twice": replace(first, peers=(peer, peer)),
        }.get(what, first)
        tunnel = WireGuard(config, tun_fd=999 if what == "descriptor" else pipe.fd)
        with pytest.raises((EndpointError, ConfigurationError, DeviceError)):
            tunnel.start()
        with pytest.raises(StateError):
            tunnel.start()
    del tunnel  # it keeps the error, and that its traceback
    assert not threads()
    assert set(descriptors()) <= before


def test_a_device_that_goes_away_ends_the_tunnel():
    first, _ = pair_of_configs()
    with Pipe.make() as pipe:
        tunnel = WireGuard(first, tun_fd=pipe.fd)
        tunnel.start()
        pipe.app.close()
        with pytest.raises(DeviceError):
            tunnel.wait(5)
        tunnel.stop()
    assert not threads()


def test_stop_in_the_middle_of_a_handshake():
    first, _ = pair_of_configs()
    with bind_udp() as hole, Pipe.make() as pipe:
        host, port = hole.getsockname()
        config = replace(first, peers=(replace(first.peers[0], endpoint=f"{host}:{port}"),))
        with WireGuard(config, tun_fd=pipe.fd) as tunnel:
            for _ in range(3):
                pipe.send(ip_packet(A, B))
            assert len(hole.recv(2000)) == 148
            wait_until(lambda: tunnel.peers[0].queued == 3)
        stats = tunnel.stats()
        assert stats.outbound.drops["unsent"] == 3
        assert_balanced(stats)


def test_stop_wipes_what_the_tunnel_had():
    with ends() as pair:
        exchange(pair)
        handshakes(pair.a)
        protocol = pair.a._host._protocol
        (peer,) = protocol.peers.values()
        current = peer.keypairs.current
        key = protocol.private_key
    assert key._data == bytes(32)
    assert current.keys.send == current.keys.receive == bytes(32)
    assert peer.static_static is None or peer.static_static == bytes(32)
    assert pair.a._table is None


def test_asyncio():
    first, _ = pair_of_configs()

    async def main() -> None:
        with Pipe.make() as pipe:
            async with WireGuard(first, tun_fd=pipe.fd) as tunnel:
                assert tunnel.running
                waiting = asyncio.ensure_future(tunnel.wait_closed())
                await asyncio.sleep(0.01)
                assert not waiting.done()
            await waiting

    asyncio.run(main())
    assert not threads()


def test_it_is_what_the_package_calls_wireguard():
    assert fasttun.WireGuard is WireGuard


# ------------------------------------------------------------------------------------- secrets

def test_no_secret_is_shown(caplog):
    caplog.set_level(logging.DEBUG)
    shared = PresharedKey.generate()
    first, second = pair_of_configs(preshared=shared)
    texts = []

    def tracebacks(tunnel: WireGuard) -> None:
        """With the local variables of every frame, as some loggers write them."""
        for peer in (PeerConfig(public(pair.b), shared),
                     PeerConfig(PrivateKey.generate().public, shared, endpoint="x")):
            try:
                tunnel.add_peer(peer)
            except ConfigurationError as error:
                texts.append("".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))

    with ends((first, second)) as pair:
        exchange(pair)
        pair.b.update_peer(public(pair.a), endpoint=at(pair.a))
        tracebacks(pair.a)
        handshakes(pair.a)
        (session,) = (peer.keypairs.current for peer in pair.a._host._protocol.peers.values())
        secrets = [first.private_key.to_bytes(), second.private_key.to_bytes(), shared.to_bytes(),
                   bytes(session.keys.send), bytes(session.keys.receive)]
        texts += map(repr, (pair.a, pair.a.config(), pair.a.peers, pair.a.stats(), session, session.keys,
                            pair.a._host, pair.a._host._protocol, pair.a._table, *pair.a._engines))
        texts += map(str, (pair.a, pair.a.config(), pair.a.peers, pair.a.stats()))
    texts.append(caplog.text)
    assert "session with peer" in caplog.text
    assert len(texts) >= 16
    for text in texts:
        for secret in secrets:
            assert base64.b64encode(secret).decode() not in text
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text


def test_a_snapshot_does_not_change():
    shared = PresharedKey.generate()
    with ends(pair_of_configs(preshared=shared)) as pair:
        exchange(pair)
        before = pair.a.peers
        text = repr(before)
        pair.a.update_peer(public(pair.b), preshared_key=None, allowed_ips=networks("10.8.0.0/16"))
        exchange(pair)
        assert repr(before) == text
        assert before[0].preshared_key == shared
        pair.a.remove_peer(public(pair.b))
        assert before[0].preshared_key == shared


# ------------------------------------------------------------------------------------- threads

def test_everything_at_once():
    """Every live call from several threads while packets flow; afterwards the tunnel works as before."""
    with ends() as pair:
        exchange(pair)
        done = threading.Event()
        failed: list[BaseException] = []
        extra = [PrivateKey.generate().public for _ in range(6)]

        def guarded(work):
            def run() -> None:
                try:
                    while not done.is_set():
                        work()
                except BaseException as error:
                    failed.append(error)
                    done.set()
            return threading.Thread(target=run)

        def change_peers() -> None:
            for at_, key in enumerate(extra):
                pair.a.add_peer(PeerConfig(key, allowed_ips=networks(f"10.7.0.{at_}/32"), endpoint="127.0.0.1:9",
                                           persistent_keepalive=at_ % 2))
                pair.near.send(ip_packet(A, f"10.7.0.{at_}"))
            pair.a.update_peer(extra[0], allowed_ips=networks("10.7.0.1/32"), preshared_key=PresharedKey.generate())
            for key in extra:
                pair.a.remove_peer(key)

        def look() -> None:
            pair.a.stats()
            pair.a.config()
            pair.a.peers  # noqa: B018
            pair.a.listen_port  # noqa: B018
            time.sleep(0.001)

        def change_socket() -> None:
            pair.a.set_listen_port(0)
            time.sleep(0.02)

        def talk() -> None:
            pair.near.send(ip_packet(A, B, b"x" * 500))
            pair.far.send(ip_packet(B, A, b"x" * 500))
            for pipe in (pair.near, pair.far):
                while not pipe.silent(0):
                    pipe.receive()

        workers = [guarded(work) for work in (change_peers, look, change_socket, talk)]
        for worker in workers:
            worker.start()
        done.wait(1.5)
        done.set()
        for worker in workers:
            worker.join(10)
        assert not failed, failed
        exchange(pair, b"as before")
        for tunnel in (pair.a, pair.b):
            assert_balanced(settled(tunnel))
