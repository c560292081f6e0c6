"""Whole interfaces over a simulated network and a simulated clock: hours of it, lossy and out of order."""

from __future__ import annotations

import heapq
import itertools
import random
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttun.endpoint import Endpoint
from fasttun.errors import ConfigurationError
from fasttun.wireguard import Interface, PresharedKey, PrivateKey, PublicKey
from fasttun.wireguard.indices import IndexTable
from fasttun.wireguard.load import LoadMeter
from fasttun.wireguard.messages import CookieReply, Initiation
from fasttun.wireguard.outputs import (
    Drop,
    DropQueue,
    EndpointLearned,
    HandshakeDone,
    InstallKeypair,
    RemoveKeypair,
    Send,
)
from fasttun.wireguard.software import MAX_QUEUED, Received, SoftwareTunnel

WALL = 1_700_000_000.0


def endpoint(n: int, port: int = 51820) -> Endpoint:
    return Endpoint(ip_address(f"192.0.2.{n}"), port)


def ip_packet(payload: bytes) -> bytes:
    return struct.pack(">BBHIII", 0x45, 0, 20 + len(payload), 0, 0, 0) + b"\0" * 4 + payload


class Node:
    """An interface with its tunnel at one endpoint, and the one peer it talks to."""

    def __init__(self, network: Network, where: Endpoint, **keywords) -> None:
        self.network = network
        self.where = where
        self.interface = Interface(PrivateKey.generate(), **keywords)
        self.tunnel = SoftwareTunnel(self.interface)
        self.peer = None
        self.received: list[bytes] = []
        self.done = 0
        self.sent: list[tuple[float, bytes]] = []
        network.nodes.append(self)

    @property
    def public(self) -> PublicKey:
        return self.interface.private_key.public

    @property
    def drops(self):
        return self.tunnel.drops

    def know(self, other: Node, *, with_endpoint: bool = True, **keywords) -> None:
        where = other.where if with_endpoint else None
        self.peer = self.interface.add_peer(other.public, endpoint=where, **keywords)

    def send(self, payload: bytes) -> None:
        self.take(self.tunnel.send(self.peer, ip_packet(payload), self.network.now, self.network.wall))

    def take(self, outputs) -> None:
        for output in outputs:
            if isinstance(output, Send):
                self.sent.append((self.network.now, output.datagram))
                self.network.carry(output.datagram, self.where, output.endpoint)
            elif isinstance(output, Received):
                self.received.append(output.packet[20:])
            elif isinstance(output, HandshakeDone):
                self.done += 1

    def count(self, kind: int, *, keepalive: bool | None = None) -> int:
        return sum(
            datagram[0] == kind and (keepalive is None or (len(datagram) == 32) == keepalive)
            for _, datagram in self.sent
        )


class Network:
    """Delivers datagrams by endpoint after a delay; `lossy` and `delay` may change at any time."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.nodes: list[Node] = []
        self.loss = 0.0
        self.jitter = 0.0
        self._under_way: list[tuple[float, int, bytes, Endpoint, Endpoint]] = []
        self._order = itertools.count()

    @property
    def wall(self) -> float:
        return WALL + self.now

    def carry(self, datagram: bytes, source: Endpoint, destination: Endpoint) -> None:
        if self.random.random() < self.loss:
            return
        arrival = self.now + 0.01 + self.random.uniform(0, self.jitter)
        heapq.heappush(self._under_way, (arrival, next(self._order), datagram, source, destination))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            deadlines = [node.interface.next_deadline() for node in self.nodes]
            due = min((deadline for deadline in deadlines if deadline is not None), default=end)
            arrival = self._under_way[0][0] if self._under_way else end
            step = min(due, arrival)
            if step >= end:
                self.now = end
                return
            self.now = max(self.now, step)
            if arrival <= due:
                _, _, datagram, source, destination = heapq.heappop(self._under_way)
                for node in self.nodes:
                    if node.where == destination:
                        node.take(node.tunnel.receive(datagram, source, self.now, self.wall))
            else:
                for node in self.nodes:
                    node.take(node.tunnel.tick(self.now, self.wall))


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def pair(network):
    """Two that know each other; the second learns the first's endpoint."""
    a, b = Node(network, endpoint(1)), Node(network, endpoint(2))
    a.know(b)
    b.know(a, with_endpoint=False)
    return a, b


# the ordinary course


def test_packets_wait_for_the_handshake_and_arrive_in_order(network, pair):
    a, b = pair
    for n in range(10):
        a.send(bytes([n]))
    assert a.count(1) == 1
    network.run(1.0)
    assert b.received == [bytes([n]) for n in range(10)]
    assert (a.done, b.done) == (1, 1)
    assert b.peer.endpoint == a.where
    assert a.peer.last_handshake_wall == pytest.approx(network.wall, abs=2.0)
    b.send(b"back")
    network.run(1.0)
    assert a.received == [b"back"]
    assert a.count(4, keepalive=True) == 0
    assert sum(a.drops.values()) + sum(b.drops.values()) == 0


def test_the_queue_is_bounded_and_its_oldest_go(network, pair):
    a, b = pair
    for n in range(MAX_QUEUED + 5):
        a.send(n.to_bytes(2, "big"))
    network.run(1.0)
    assert b.received == [n.to_bytes(2, "big") for n in range(5, MAX_QUEUED + 5)]
    assert a.drops["queue-full"] == 5


def test_without_data_the_initiator_confirms_by_a_keepalive(network, pair):
    a, b = pair
    a.take(a.tunnel.carry_out(a.interface.need_handshake(a.peer, network.now, network.wall), network.now, network.wall))
    network.run(1.0)
    assert a.count(4, keepalive=True) == 1
    assert b.peer.keypairs.next is None
    assert b.peer.keypairs.current is not None


def test_the_responder_does_not_send_before_it_is_confirmed(network, pair):
    a, b = pair
    a.send(b"x")
    initiation = a.sent[-1][1]
    outputs = b.tunnel.receive(initiation, a.where, network.now, network.wall)
    assert b.peer.keypairs.current is None
    assert b.peer.keypairs.next is not None
    b.peer.timers.stop()
    assert [type(output) for output in outputs] == [EndpointLearned, Send]


def test_an_hour_of_traffic_renews_the_session_every_two_minutes(network, pair):
    a, b = pair
    for second in range(3600):
        a.send(second.to_bytes(2, "big"))
        b.send(second.to_bytes(2, "big"))
        network.run(1.0)
    network.run(1.0)
    assert a.received[-3600 + 10:] == b.received[-3600 + 10:]
    assert len(a.received) == len(b.received) == 3600
    assert 27 <= a.done <= 31
    assert a.done == b.done
    assert a.count(1) == a.done  # only the initiator renews, and never in vain
    assert b.count(1) <= 1
    assert not +a.drops
    assert b.drops == {"no-endpoint": 1}  # its first packet, before it heard of the other


def test_one_way_traffic_is_answered_by_keepalives_only(network, pair):
    a, b = pair
    for _ in range(600):
        a.send(b"x")
        network.run(1.0)
    assert len(b.received) == 600
    assert 35 <= b.count(4, keepalive=True) <= 61
    assert b.count(4, keepalive=False) == 0


def test_a_receiving_initiator_renews_before_the_session_ends(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(1.0)
    for second in range(1, 600):
        network.run(0.5)
        b.send(second.to_bytes(2, "big"))
        network.run(0.5)
    assert len(a.received) == 599
    times = [now for now, datagram in a.sent if datagram[0] == 1]
    assert len(times) >= 3


def test_keepalives_do_not_answer_keepalives(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(60.0)
    assert b.count(4, keepalive=True) == 1
    quiet = len(a.sent) + len(b.sent)
    network.run(3600.0)
    assert len(a.sent) + len(b.sent) == quiet


def test_keys_are_wiped_after_nine_silent_minutes(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(100.0)
    keys = a.peer.keypairs.current.keys
    network.run(430.0)
    assert any(keys.send)
    network.run(60.0)
    assert keys.send == keys.receive == bytes(32)
    for node in pair:
        assert node.peer.keypairs.clear() == []
        assert len(node.interface._indices) == 0
    a.send(b"again")
    network.run(1.0)
    assert b.received == [b"x", b"again"]


def test_persistent_keepalive_keeps_a_tunnel_for_an_hour(network, pair):
    a, b = pair
    a.take(a.tunnel.carry_out(
        a.interface.set_persistent_keepalive(a.peer, 25, network.now, network.wall), network.now, network.wall
    ))
    network.run(3600.0)
    assert a.count(4, keepalive=True) in range(130, 180)
    assert b.peer.keypairs.current.can_send(network.now)
    assert 20 <= a.done <= 31
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(a.sent)]
    assert max(gaps) <= 25.01
    with pytest.raises(ConfigurationError):
        a.interface.set_persistent_keepalive(a.peer, 65536, network.now, network.wall)


def test_a_dead_peer_is_tried_for_ninety_seconds(network, pair):
    a, b = pair
    b.where = endpoint(99)
    a.send(b"x")
    network.run(3600.0)
    assert a.count(1) == 18
    assert a.drops["no-session"] == 1
    assert len(a.interface._indices) == 0


def test_a_peer_that_restarted_is_found_again(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(1.0)
    network.nodes.remove(b)
    reborn = Node(network, b.where)
    reborn.interface.set_private_key(PrivateKey(b.interface.private_key.to_bytes()))
    reborn.know(a, with_endpoint=False)
    for _ in range(20):
        a.send(b"y")
        network.run(1.0)
    assert reborn.done == 1
    assert len(reborn.received) >= 3
    assert reborn.drops["unknown-index"] >= 10


@pytest.mark.parametrize(("gap_s", "refused"), [
    (0.005, "initiation-replayed"), (0.019, "initiation-flood"), (0.025, None)])
def test_a_peer_removed_and_added_again(network, pair, gap_s, refused):
    """Too soon for the other side's defence against replay and floods, it has its session with the first retry."""
    a, b = pair
    a.send(b"x")
    network.run(gap_s)
    a.take(a.interface.remove_peer(a.peer))
    a.know(b)
    a.send(b"y")
    network.run(1.0)
    assert dict(b.drops) == ({refused: 1} if refused else {})
    assert (b.received[-1:] == [b"y"]) == (refused is None)
    network.run(4.5)  # REKEY_TIMEOUT and its jitter
    assert b.received[-1] == b"y"


def test_crossing_initiations_lead_to_a_session_at_once(network):
    a, b = Node(network, endpoint(1)), Node(network, endpoint(2))
    a.know(b)
    b.know(a)
    a.send(b"from a")
    b.send(b"from b")
    network.run(1.0)
    assert (a.received, b.received) == ([b"from b"], [b"from a"])
    for _ in range(300):
        a.send(b"a")
        b.send(b"b")
        network.run(1.0)
    assert len(a.received) == len(b.received) == 301


@pytest.mark.parametrize("seed", range(4))
def test_two_hours_over_a_lossy_reordering_network(seed):
    network = Network(seed)
    a, b = Node(network, endpoint(1)), Node(network, endpoint(2))
    preshared = PresharedKey.generate()
    a.know(b, preshared_key=PresharedKey(preshared.to_bytes()))
    b.know(a, preshared_key=preshared)
    network.loss, network.jitter = 0.2, 0.5
    sent = 0
    for _ in range(1800):
        network.run(network.random.choice([0.1, 0.3, 4.0, 12.0]))
        (a if network.random.random() < 0.5 else b).send(sent.to_bytes(4, "big"))
        sent += 1
    network.run(30.0)
    received = a.received + b.received
    assert len(received) == len(set(received))  # nothing twice
    assert len(received) > 0.72 * sent
    assert a.done > 20
    for node in (a, b):
        assert len(node.interface._indices) <= 4
        assert len(node.tunnel._keypairs) <= 3
        assert not set(+node.drops) - {"unknown-index", "no-session", "queue-full"}


def test_a_session_from_the_other_side_ends_our_own_attempt(network, pair):
    a, b = pair
    b.interface.set_endpoint(b.peer, a.where)
    network.loss = 1.0
    a.send(b"lost")
    attempt = a.peer.handshake
    network.loss = 0.0
    b.send(b"x")
    network.run(1.0)
    assert a.peer.handshake is None
    assert attempt._ephemeral.to_bytes() == bytes(32)
    assert len(a.interface._indices) == 1
    assert a.interface.consume(b.sent[-1][1], b.where, network.now, network.wall) == [Drop("data-not-expected")]


def test_the_last_minute_wish_is_made_once_a_session(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(1.0)
    index = a.peer.keypairs.current.local_index
    network.run(164.5)

    def receive() -> list:
        return a.interface.data_received(index, b.where, network.now, network.wall, keepalive=True)

    assert [type(output) for output in receive()] == [Send]
    a.peer.timers.stop()  # so that only the note of it keeps a second one back
    assert receive() == []


def test_hundreds_of_peers_have_one_next_deadline(network):
    hub = Node(network, endpoint(1))
    spokes = []
    for n in range(2, 102):
        spoke = Node(network, endpoint(n))
        spoke.know(hub)
        hub.know(spoke)
        spokes.append(spoke)
    for spoke in spokes:
        spoke.send(b"x")
    network.run(700.0)
    assert hub.done == 100
    assert hub.interface.next_deadline() is None
    assert len(hub.interface._wake_ups) == 0


# mistakes others shipped


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_an_oversized_datagram_before_any_handshake(network, pair, first):
    a, _ = pair
    for length in (0, 1, 3, 4, 31, 33, 1 << 11, 65507, 65535):
        datagram = bytes([first, 0, 0, 0]).ljust(length, b"\0")[:length]
        outputs = a.interface.consume(datagram, endpoint(9), network.now, network.wall)
        assert [type(output) for output in outputs] == [Drop]
        assert a.tunnel.receive(datagram, endpoint(9), network.now, network.wall) == []
    a.send(bytes(65000))
    assert a.drops["too-big"] == 1
    assert a.count(1) == 0


def cookie_replies(network, victim: Node, peer: Node) -> CookieReply:
    datagram = victim.sent[-1][1]
    return peer.interface._checker.create_reply(datagram, victim.where, network.now)


def test_a_cookie_reply_is_no_reason_to_roam(network, pair):
    a, b = pair
    network.loss = 1.0
    a.send(b"x")
    reply = cookie_replies(network, a, b)
    before = a.peer.timers.next_deadline()
    assert a.interface.consume(reply.encode(), endpoint(66), network.now, network.wall) == []
    assert a.peer.endpoint == b.where
    assert a.peer.timers.next_deadline() == before
    network.run(6.0)
    assert a.sent[-1][1][-16:] != bytes(16)  # but it counts


@pytest.mark.parametrize("both", [True, False])
def test_a_changed_preshared_key_reaches_the_handshake(network, pair, both):
    a, b = pair
    a.send(b"x")
    network.run(1.0)
    new = PresharedKey.generate()
    a.interface.set_preshared_key(a.peer, PresharedKey(new.to_bytes()))
    if both:
        b.interface.set_preshared_key(b.peer, new)
    for _ in range(200):
        a.send(b"y")
        network.run(1.0)
    assert (a.done > 1) == both
    assert (a.drops["handshake-not-authentic"] > 0) == (not both)


def test_a_preshared_key_changed_while_the_handshake_is_under_way(network, pair):
    a, b = pair
    a.send(b"x")
    old, new = a.peer.preshared_key, PresharedKey.generate()
    b.interface.set_preshared_key(b.peer, PresharedKey(new.to_bytes()))
    a.interface.set_preshared_key(a.peer, new)
    network.run(1.0)
    assert b.received == [b"x"]
    assert old.to_bytes() == bytes(32)


def test_a_low_order_public_key_never_gets_a_session(network):
    a = Node(network, endpoint(1))
    a.peer = a.interface.add_peer(PublicKey(bytes(32)), endpoint=endpoint(2))
    a.send(b"x")
    network.run(200.0)
    assert a.sent == []
    assert a.drops["low-order-key"] >= 1
    assert len(a.interface._indices) == 0


def test_our_own_public_key_is_no_peer(network, pair):
    a, b = pair
    with pytest.raises(ConfigurationError, match="own"):
        a.interface.add_peer(a.public)
    key = PrivateKey(b.interface.private_key.to_bytes())
    a.send(b"x")
    network.run(1.0)
    outputs = a.interface.set_private_key(key)  # a becomes what was its peer
    assert a.interface.peers == {}
    assert {type(output) for output in outputs} == {RemoveKeypair, DropQueue}
    assert a.peer.removed


def test_a_peer_removed_while_its_handshake_is_under_way(network, pair):
    a, b = pair
    a.send(b"x")
    response = next(
        output.datagram
        for output in b.interface.consume(a.sent[-1][1], a.where, network.now, network.wall)
        if isinstance(output, Send)
    )
    handshake, peer = a.peer.handshake, a.peer
    a.take(a.tunnel.carry_out(a.interface.remove_peer(peer), network.now, network.wall))
    assert handshake._ephemeral.to_bytes() == bytes(32)
    assert len(a.interface._indices) == 0
    assert a.interface.consume(response, b.where, network.now, network.wall) == [Drop("unknown-index")]
    assert a.interface.need_handshake(peer, network.now, network.wall) == []
    assert a.interface.data_sent(peer, network.now, network.wall) == []
    assert a.interface.remove_peer(peer) == []
    assert a.interface.tick(network.now + 1000, network.wall) == []
    assert a.interface.next_deadline() is None
    a.know(b)  # and may come back
    network.run(10.0)
    a.send(b"again")
    network.run(10.0)
    assert b.received == [b"again"]


def test_a_removed_peer_is_unknown_to_late_data(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(1.0)
    index = b.peer.keypairs.current.local_index
    outputs = b.interface.remove_peer(b.peer)
    assert [type(output) for output in outputs] == [RemoveKeypair, DropQueue]
    assert outputs[0].keypair.keys.send == bytes(32)
    assert b.interface.data_received(index, a.where, network.now, network.wall, keepalive=False) == []


def test_colliding_indices_keep_sessions_apart(network):
    draws = itertools.cycle([7, 7, 7, 8, 8, 9, 10, 11])
    hub = Node(network, endpoint(1), indices=IndexTable(lambda: next(draws)))
    spokes = [Node(network, endpoint(n)) for n in (2, 3, 4)]
    for spoke in spokes:
        spoke.know(hub)
        hub.know(spoke)
        spoke.send(bytes([spokes.index(spoke)]))
    network.run(1.0)
    assert sorted(hub.received) == [b"\0", b"\1", b"\2"]
    indices = {peer.keypairs.current.local_index for peer in hub.interface.peers.values()}
    assert len(indices) == 3


# roaming, replay, floods


def test_authentic_data_moves_the_endpoint(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(1.0)
    a.where = endpoint(50, 4444)
    b.send(b"lost")
    network.run(1.0)
    a.send(b"here")
    network.run(1.0)
    b.send(b"found")
    network.run(1.0)
    assert b.peer.endpoint == a.where
    assert a.received == [b"found"]


def test_forged_data_moves_nothing(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(1.0)
    genuine = a.sent[-1][1]
    for datagram in (genuine, genuine[:-1] + b"\0", genuine[:8] + (99).to_bytes(8, "little") + genuine[16:]):
        b.take(b.tunnel.receive(datagram, endpoint(66), network.now, network.wall))
    assert b.peer.endpoint == a.where
    assert b.drops["replayed"] + b.drops["data-not-authentic"] == 3


def test_a_replayed_initiation_is_refused(network, pair):
    a, b = pair
    a.send(b"x")
    initiation = a.sent[-1][1]
    network.run(1.0)
    outputs = b.interface.consume(initiation, endpoint(66), network.now, network.wall)
    assert outputs == [Drop("initiation-replayed")]
    assert b.peer.endpoint == a.where
    assert b.peer.keypairs.next is None


def test_a_clock_set_back_does_not_shut_us_out(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(200.0)
    now = network.now
    outputs = a.interface.need_handshake(a.peer, now, WALL - 1e6)
    (sent,) = (output for output in outputs if isinstance(output, Send))
    assert any(isinstance(o, InstallKeypair) for o in b.interface.consume(sent.datagram, a.where, now, WALL))


def test_initiations_of_one_peer_are_limited(network, pair):
    a, b = pair
    taken = []
    for step in range(10):
        a.peer.timers.stop()
        now = network.now + step * 0.0041
        (sent,) = a.interface.need_handshake(a.peer, now, WALL + step)
        taken.append(isinstance(b.interface.consume(sent.datagram, a.where, now, WALL)[0], Drop))
    assert taken == [False, True, True, True, True, False, True, True, True, True]


def test_strangers_are_refused(network, pair):
    b = pair[1]
    stranger = Node(network, endpoint(3))
    stranger.know(b)
    stranger.send(b"x")
    network.run(1.0)
    assert b.drops == {"unknown-peer": 1}
    assert b.sent == []
    assert len(b.interface._indices) == 0


def test_a_wrong_mac1_is_refused_before_anything_else(network, pair):
    a, b = pair
    a.send(b"x")
    datagram = bytearray(a.sent[-1][1])
    datagram[50] ^= 1
    now, wall = network.now, network.wall
    assert b.interface.consume(bytes(datagram), a.where, now, wall, backlog=10**6) == [Drop("bad-mac1")]


def test_under_load_a_cookie_is_asked_for_and_then_taken(network):
    a = Node(network, endpoint(1))
    b = Node(network, endpoint(2), load=LoadMeter(max_per_second=0))
    a.know(b)
    b.know(a, with_endpoint=False)
    a.send(b"x")
    network.run(4.0)
    assert b.received == []
    assert b.count(3) == 1
    assert b.peer.endpoint is None
    network.run(4.0)  # the retry carries mac2
    assert b.received == [b"x"]
    assert b.drops["cookie-needed"] == 1


def test_under_load_one_source_is_limited(network, pair):
    a, b = pair
    now, wall, reasons = network.now, network.wall, []
    (sent,) = a.interface.need_handshake(a.peer, now, wall)
    reply, _ = b.interface.consume(sent.datagram, a.where, now, wall, backlog=512)
    a.interface.consume(reply.datagram, b.where, now, wall)
    for step in range(8):
        a.peer.timers.stop()
        (sent,) = a.interface.need_handshake(a.peer, now, wall + step)
        outputs = b.interface.consume(sent.datagram, a.where, now, wall, backlog=512)
        reasons += [output.reason for output in outputs if isinstance(output, Drop)]
    assert reasons.count("rate-limited") == 3


# configuration


def test_another_private_key_ends_all_sessions_and_the_same_one_none(network, pair):
    a, b = pair
    a.send(b"x")
    network.run(1.0)
    old = a.interface.private_key
    assert a.interface.set_private_key(PrivateKey(old.to_bytes())) == []
    assert a.peer.keypairs.current is not None
    a.take(a.tunnel.carry_out(a.interface.set_private_key(PrivateKey.generate()), network.now, network.wall))
    assert a.peer.keypairs.current is None
    assert old.to_bytes() == bytes(32)
    b.interface.remove_peer(b.peer)
    b.know(a, with_endpoint=False)
    network.run(10.0)
    a.send(b"y")
    network.run(1.0)
    assert b.received == [b"x", b"y"]


def test_without_a_private_key_nothing_is_taken_or_begun(network, pair):
    a, b = pair
    b.interface.set_private_key(None)
    assert b.interface.mac1_key is None
    a.send(b"x")
    network.run(1.0)
    assert b.drops == {"no-private-key": 1}
    b.interface.set_endpoint(b.peer, a.where)
    b.send(b"x")
    assert b.drops["no-private-key"] == 2


def test_a_peer_is_added_once(pair):
    a, b = pair
    with pytest.raises(ConfigurationError, match="already"):
        a.interface.add_peer(b.public)


def test_secrets_are_not_in_any_repr(network, pair):
    a, b = pair
    a.send(b"x")
    outputs = b.interface.consume(a.sent[-1][1], a.where, network.now, network.wall)
    keys = b.peer.keypairs.next.keys
    shown = repr(outputs) + repr(b.peer) + repr(b.interface) + repr(a.peer.handshake)
    for secret in (bytes(keys.send), bytes(keys.receive), b.interface.private_key.to_bytes()):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


# fuzz


@given(st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda kind, body: bytes([kind, 0, 0, 0]) + body, st.integers(1, 4),
        st.sampled_from([28, 60, 88, 144]).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    ),
))
def test_random_bytes_are_dropped(datagram):
    network = Network()
    a = Node(network, endpoint(1))
    outputs = a.interface.consume(datagram, endpoint(9), 0.0, WALL)
    assert [type(output) for output in outputs] == [Drop]
    assert a.tunnel.receive(datagram, endpoint(9), 0.0, WALL) == []


@given(st.data())
def test_a_mutated_message_with_a_right_mac1_never_raises(data):
    """mac1's key is public: an attacker gets this far with any content."""
    network = Network()
    a, b = Node(network, endpoint(1)), Node(network, endpoint(2))
    a.know(b)
    b.know(a)
    a.send(b"x")
    datagram = a.sent[-1][1]
    if data.draw(st.booleans()):
        (_, datagram) = (b.take(b.tunnel.receive(datagram, a.where, 1000.0, WALL)), b.sent[-1][1])
        target, sender, source = a, b, b.where
    else:
        target, sender, source = b, a, a.where
    content = bytearray(datagram[:-32])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    changed = sender.peer.cookies.add_macs(bytes(content), 1000.0)
    outputs = target.interface.consume(changed, source, 1000.0, WALL)
    assert all(isinstance(output, Drop) for output in outputs) or bytes(content) == datagram[:-32] or (
        content[8:] == datagram[8:-32]  # the sender's index is not part of the transcript
    )


def test_initiations_carry_fresh_ephemerals_and_growing_timestamps(network, pair):
    a, b = pair
    b.where = endpoint(99)
    a.send(b"x")
    network.run(60.0)
    messages = [Initiation.parse(datagram) for _, datagram in a.sent]
    assert len({message.ephemeral for message in messages}) == len(messages) > 5
    assert len({message.sender for message in messages}) == len(messages)


@pytest.mark.benchmark(group="handshake")
def test_responder_handshakes(benchmark):
    """One core answers at least a thousand initiations a second; each comes from another peer."""
    rounds = 300
    hub = Interface(PrivateKey.generate(), load=LoadMeter(max_per_second=10**9))
    datagrams = []
    for _ in range(rounds):
        spoke = Interface(PrivateKey.generate())
        peer = spoke.add_peer(hub.private_key.public, endpoint=endpoint(1))
        hub.add_peer(spoke.private_key.public)
        (sent,) = spoke.need_handshake(peer, 0.0, WALL)
        datagrams.append(sent.datagram)
    waiting = iter(datagrams)

    def answer() -> None:
        assert isinstance(hub.consume(next(waiting), endpoint(2), 0.0, WALL)[-1], Send)

    benchmark.pedantic(answer, rounds=rounds - 1, iterations=1)
