"""Hostile datagrams: at every parser, at the protocol, at a running engine and at a whole device.

Nothing may raise, crash or hang; what is not authentic is never written to the TUN, never answered but by a cookie
reply, and moves no peer. `scripts/sanitize.sh` runs this under AddressSanitizer.
Not for: texts (configuration, control socket).
"""

from __future__ import annotations

import copy
import os
import random
import socket
import time
from ipaddress import ip_address

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.netns import wait_until
from support.tunnels import bind_udp, ip_packet
from support.wireguard import Device, Remote, at, ends, exchange

from fasttun.endpoint import Endpoint
from fasttun.wireguard.cookies import CookieChecker, CookieGenerator
from fasttun.wireguard.interface import Interface
from fasttun.wireguard.keypairs import Keypair
from fasttun.wireguard.keys import PrivateKey
from fasttun.wireguard.load import LoadMeter
from fasttun.wireguard.messages import CookieReply, DataHeader, Initiation, Response, message_type
from fasttun.wireguard.noise import TransportKeys, open_initiation
from fasttun.wireguard.outputs import Drop, Send
from fasttun.wireguard.refusal import Refused
from fasttun.wireguard.software import trim

A, B = "10.9.0.1", "10.9.0.2"
SOURCE = Endpoint(ip_address("192.0.2.7"), 4711)
LENGTHS = {1: 148, 2: 92, 3: 64, 4: 32}
ROUNDS = int(os.environ.get("FASTTUN_FUZZ_ROUNDS", "6000"))
"""Datagrams of each seeded run; for longer runs by hand."""


@st.composite
def datagrams(draw: st.DrawFn) -> bytes:
    """Anything, but mostly what begins like a message and has about its length."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    kind = draw(st.sampled_from([1, 2, 3, 4, 4]))
    length = max(0, LENGTHS[kind] + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 16, -16, 100])))
    head = draw(st.sampled_from([b"\0\0\0", b"\0\0\0", b"\0\0\0", b"\1\0\0", b"\0\0\xff"]))
    return (bytes([kind]) + head + draw(st.binary(min_size=length, max_size=length)))[:length]


# ---------------------------------------------------------------------------------------- parsers

@given(datagrams())
@example(b"")
def test_a_message_is_refused_or_is_what_it_says(datagram: bytes) -> None:
    try:
        kind = message_type(datagram)
    except Refused:
        kind = 0
    for number, parser in enumerate((Initiation, Response, CookieReply, DataHeader), 1):
        if number == kind:
            message = parser.parse(datagram)
            assert datagram.startswith(message.encode())
        else:
            with pytest.raises(Refused):
                parser.parse(datagram)


@given(st.binary(max_size=120))
@example(b"\x45" + bytes(19))
@example(b"\x60" + bytes(39))
def test_an_inner_packet_is_refused_or_a_part_of_what_came(packet: bytes) -> None:
    try:
        cut = trim(packet)
    except Refused:
        return
    assert packet.startswith(cut)
    assert len(cut) >= (20 if cut[0] >> 4 == 4 else 40)


@given(datagrams(), st.booleans())
def test_a_session_opens_nothing_that_it_has_not_sealed(datagram: bytes, ours: bool) -> None:
    keypair = Keypair(TransportKeys(bytearray(b"s" * 32), bytearray(b"r" * 32)), local_index=1, remote_index=2,
                      created=0.0, initiator=ours)
    with pytest.raises(Refused):
        keypair.open(datagram, 1.0)


OURS, THEIRS = PrivateKey(b"\7" * 32), PrivateKey(b"\10" * 32)


@settings(max_examples=200)
@given(datagrams(), st.booleans(), st.booleans())
def test_the_protocol_takes_nothing_unauthentic(datagram: bytes, right_mac1: bool, loaded: bool) -> None:
    meter = LoadMeter(max_per_second=0 if loaded else 1000)
    interface = Interface(copy.copy(OURS), load=meter)
    peer = interface.add_peer(THEIRS.public, endpoint=Endpoint(ip_address("192.0.2.1"), 1))
    outputs = interface.need_handshake(peer, 0.0, 1.7e9)
    assert isinstance(outputs[0], Send)
    index = outputs[0].datagram[4:8]
    if right_mac1 and len(datagram) >= 64 and datagram[0] in (1, 2):
        # To our handshake under way, and by someone who knows our public key.
        at_ = 4 if datagram[0] == 1 else 8
        datagram = datagram[:at_] + index + datagram[at_ + 4:]
        datagram = CookieGenerator(OURS.public).add_macs(datagram[:-32], 0.0)
    if len(datagram) >= 64 and datagram[0] == 3 and right_mac1:
        datagram = datagram[:4] + index + datagram[8:]
    for output in interface.consume(datagram, SOURCE, 1.0, 1.7e9):
        if isinstance(output, Send):
            assert loaded
            assert output.endpoint == SOURCE
            assert message_type(output.datagram) == 3
        else:
            assert isinstance(output, Drop)
    assert peer.endpoint is not None
    assert peer.endpoint.port == 1
    assert peer.keypairs.current is None
    assert peer.keypairs.next is None
    if len(datagram) == 148 and datagram[0] == 1:
        with pytest.raises(Refused):
            open_initiation(OURS, Initiation.parse(datagram[:1] + b"\0\0\0" + datagram[4:]))


# ---------------------------------------------------------------------------------------- the engine

class Mutator:
    """Datagrams made from genuine ones by a few changes; the same seed makes the same ones."""

    def __init__(self, seed: int, corpus: list[bytes]) -> None:
        self.dice = random.Random(seed)
        self.corpus = corpus

    def datagram(self) -> bytes:
        data = bytearray(self.dice.choice(self.corpus))
        for _ in range(self.dice.choice((1, 1, 1, 2, 3))):
            data = self.dice.choice((
                self.flip, self.flip, self.cut, self.extend, self.number, self.kind, self.splice, self.noise))(data)
        return bytes(data[:65507])

    def flip(self, data: bytearray) -> bytearray:
        if data:
            data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
        return data

    def cut(self, data: bytearray) -> bytearray:
        return data[:self.dice.randrange(len(data) + 1)]

    def extend(self, data: bytearray) -> bytearray:
        return data + self.dice.randbytes(self.dice.choice((1, 2, 15, 16, 100, 2000, 9000)))

    def number(self, data: bytearray) -> bytearray:
        """An index or a counter at one of its edges."""
        value = self.dice.choice((0, 1, (1 << 13) - 1, (1 << 63), (1 << 64) - 1, (1 << 64) - (1 << 13) - 1))
        place, size = self.dice.choice(((4, 4), (8, 8), (8, 4)))
        if len(data) >= place + size:
            data[place:place + size] = value.to_bytes(8, "little")[:size]
        return data

    def kind(self, data: bytearray) -> bytearray:
        if data:
            data[self.dice.randrange(min(4, len(data)))] = self.dice.choice((0, 1, 2, 3, 4, 5, 255))
        return data

    def splice(self, data: bytearray) -> bytearray:
        other = self.dice.choice(self.corpus)
        place = self.dice.randrange(min(len(data), len(other)) + 1)
        return data[:place] + other[place:]

    def noise(self, data: bytearray) -> bytearray:
        start = self.dice.randrange(len(data) + 1)
        data[start:start + 16] = self.dice.randbytes(len(data[start:start + 16]))
        return data


@pytest.mark.parametrize("gro", [False, True], ids=["", "gro"])
@pytest.mark.parametrize("seed", range(2))
def test_an_engine_writes_only_what_is_authentic_and_once(seed: int, gro: bool) -> None:
    key = PrivateKey.generate()
    with Device(udp_gro=gro) as device:
        if gro:
            device.sock.setsockopt(socket.IPPROTO_UDP, 104, 1)  # UDP_GRO
        device.table.set_mac1_key(CookieChecker(key.public).mac1_key)
        remotes = [Remote(device, f"10.9.1.{number}/32", index=1 + (number << 14)) for number in range(3)]
        genuine: set[bytes] = set()
        spare: list[tuple[Remote, bytes]] = []
        corpus = [CookieGenerator(key.public).add_macs(os.urandom(116), 0.0), b"\3\0\0\0" + os.urandom(60)]
        for number, remote in enumerate(remotes):
            for size in (0, 1, 40, 1000):
                packet = ip_packet(f"10.9.1.{number}", A, os.urandom(8) + bytes(size))
                datagram = remote.sealed(packet)
                genuine.add(packet)
                corpus.append(datagram)
                spare.append((remote, datagram))
            stolen = ip_packet(f"10.9.1.{(number + 1) % 3}", A, b"not mine")
            corpus += [remote.sealed(b""), remote.sealed(stolen), remote.sealed(b"\x45", pad=False)]
        mutator = Mutator(seed, corpus)
        written: list[bytes] = []
        sent = 0
        for _ in range(ROUNDS // 20):
            for _ in range(20):  # no more than a socket's buffer surely holds
                sender = mutator.dice.choice(remotes)
                sender.send_raw(mutator.datagram())
                sent += 1
            wait_until(lambda: _received(device) >= sent, interval=0.001, timeout=20)  # noqa: B023
            while not device.pipe.silent(0):
                written.append(device.pipe.receive())
            device.table.take()
        for remote, datagram in spare:  # whatever was sent, the genuine ones are still good, once
            remote.send_raw(datagram)
        for remote in remotes:
            remote.send(ip_packet(f"10.9.1.{remotes.index(remote)}", A, b"the last"))
        last = [ip_packet(f"10.9.1.{number}", A, b"the last") for number in range(3)]
        while not set(last) <= set(written):
            written.append(device.pipe.receive())
        assert sorted(written) == sorted([*genuine, *last])
        drops = device.drops
        assert min(drops.get(name, 0) for name in ("malformed", "unknown_index", "forged", "replayed")) > 10, drops
        assert drops["not_allowed"] <= 3


def _received(device: Device) -> int:
    counters = device.counters()
    return int(counters["inbound"]["packets_in"] + counters["control_in"])


@settings(max_examples=60)
@given(st.lists(st.one_of(datagrams(), st.binary(max_size=64)), max_size=30))
def test_an_engine_takes_any_datagrams(script: list[bytes]) -> None:
    with Device() as device, bind_udp() as sock:
        b = Remote(device, f"{B}/32", index=1)
        for datagram in script:
            sock.sendto(datagram, device.address)
        b.send(ip_packet(B, A, b"genuine"))
        assert device.pipe.receive() == ip_packet(B, A, b"genuine")
        assert b.counters()["endpoint"] == b.endpoint


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=80), max_size=30), st.binary(min_size=1, max_size=80))
def test_an_engine_takes_any_packets_from_the_host_and_under_a_session(outbound: list[bytes], inside: bytes) -> None:
    with Device() as device:
        b = Remote(device, f"{B}/32")
        for packet in outbound:
            if packet:
                device.send(packet)
        b.send(inside, pad=False)
        b.send(ip_packet(B, A, b"genuine"))
        assert device.pipe.receive() in (inside, ip_packet(B, A, b"genuine"))
        device.send(ip_packet(A, B, b"out"))
        while not b.receive().startswith(ip_packet(A, B, b"out")):
            pass


# ------------------------------------------------------------------------------------ whole devices

def test_a_device_survives_all_of_it_and_still_shakes_hands() -> None:
    with ends() as pair, bind_udp() as sock:
        exchange(pair)
        key = pair.a.private_key
        assert key is not None
        stranger = Interface(PrivateKey.generate())
        unknown = stranger.add_peer(key.public, endpoint=at(pair.a))
        hello = stranger.need_handshake(unknown, 0.0, time.time())[0]
        assert isinstance(hello, Send)
        corpus = [hello.datagram, CookieGenerator(key.public).add_macs(b"\2\0\0\0" + os.urandom(56), 0.0),
                  b"\3\0\0\0" + os.urandom(60), b"\4\0\0\0" + os.urandom(60)]
        mutator = Mutator(5, corpus)
        generator = CookieGenerator(key.public)
        there = ("127.0.0.1", pair.a.listen_port)
        home = pair.a.peers[0].endpoint
        for number in range(ROUNDS // 3):
            datagram = mutator.datagram()
            if number % 2 and len(datagram) in (148, 92):  # past mac1, to what is behind it
                datagram = generator.add_macs(datagram[:-32], 0.0)
            sock.sendto(datagram, there)
            if number % 50 == 0:
                exchange(pair, number.to_bytes(2, "big"))
        assert pair.near.silent(0.02)
        assert pair.a.peers[0].endpoint == home
        told = pair.a.stats()
        assert told.control_drops["bad-mac1"] > 50
        assert told.control_drops["handshake-not-authentic"] + told.control_drops["unknown-index"] > 50
        assert pair.a.running
        # New sessions are still made.
        config = pair.b.config().peers[0]
        time.sleep(1.1)  # what the flood has cost in cookies is over
        pair.b.remove_peer(key.public)
        pair.b.add_peer(config)
        exchange(pair, b"afterwards")
