"""The handshake against `noiseprotocol`, byte for byte in both roles, and against tampering."""

from __future__ import annotations

import hashlib
import hmac
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttun.wireguard import tai64n
from fasttun.wireguard.keys import PresharedKey, PrivateKey, PublicKey
from fasttun.wireguard.messages import Initiation, Response
from fasttun.wireguard.noise import (
    CONSTRUCTION,
    IDENTIFIER,
    INITIAL_CHAIN,
    INITIAL_TRANSCRIPT,
    InitiatorHandshake,
    hmac_blake2s,
    kdf1,
    kdf2,
    kdf3,
    open_initiation,
)
from fasttun.wireguard.refusal import Refused

connection = pytest.importorskip("noise.connection")

TIMESTAMP = tai64n.stamp(1_700_000_000.5)
MACS = bytes(32)


class Side:
    def __init__(self) -> None:
        self.static = PrivateKey.generate()
        self.ephemeral = PrivateKey.generate()


def begin(ours: Side, theirs: PublicKey, sender: int = 7):
    static_static = ours.static.exchange(theirs)
    return InitiatorHandshake.begin(ours.static, theirs, static_static, sender, TIMESTAMP, ephemeral=ours.ephemeral)


def oracle(side: Side, preshared: PresharedKey, remote: PublicKey | None):
    """The same handshake by noiseprotocol; `remote` is given to the initiator only."""
    noise = connection.NoiseConnection.from_name(CONSTRUCTION)
    noise.set_prologue(IDENTIFIER)
    noise.set_psks(psk=preshared.to_bytes())
    keypair = connection.Keypair
    noise.set_keypair_from_private_bytes(keypair.STATIC, side.static.to_bytes())
    noise.set_keypair_from_private_bytes(keypair.EPHEMERAL, side.ephemeral.to_bytes())
    if remote is None:
        noise.set_as_responder()
    else:
        noise.set_as_initiator()
        noise.set_keypair_from_public_bytes(keypair.REMOTE_STATIC, bytes(remote))
    with pytest.warns(UserWarning, match="ephemeral keypairs"):
        noise.start_handshake()
    return noise


def data_keys(noise) -> tuple[bytes, bytes]:
    protocol = noise.noise_protocol
    return protocol.cipher_state_encrypt.k, protocol.cipher_state_decrypt.k


@pytest.fixture(params=["without a preshared key", "with a preshared key"])
def preshared(request):
    return PresharedKey.none() if request.param.startswith("without") else PresharedKey.generate()


def test_initial_values_are_the_known_ones():
    """As every implementation has them: HASH(CONSTRUCTION) and HASH(that || IDENTIFIER)."""
    assert INITIAL_CHAIN.hex() == "60e26daef327efc02ec335e2a025d2d016eb4206f87277f52d38d1988b78cd36"
    assert INITIAL_TRANSCRIPT.hex() == "2211b361081ac566691243db458ad5322d9c6c662293e8b70ee19c65ba079ef3"


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200))
def test_hmac_and_kdf_agree_with_the_standard_library(key, data):
    def reference(key: bytes, data: bytes) -> bytes:
        return hmac.new(key, data, hashlib.blake2s).digest()

    assert hmac_blake2s(key, data) == reference(key, data)
    secret = reference(key, data)
    first = reference(secret, b"\1")
    second = reference(secret, first + b"\2")
    third = reference(secret, second + b"\3")
    assert kdf1(key, data) == first
    assert kdf2(key, data) == (first, second)
    assert kdf3(key, data) == (first, second, third)


def test_as_initiator_byte_for_byte(preshared):
    ours, theirs = Side(), Side()
    twin = oracle(ours, preshared, theirs.static.public)
    responder = oracle(theirs, preshared, None)

    handshake, initiation = begin(ours, theirs.static.public)
    assert initiation.encode()[8:] == bytes(twin.write_message(TIMESTAMP))
    assert bytes(responder.read_message(initiation.encode()[8:])) == TIMESTAMP
    answer = bytes(responder.write_message())
    twin.read_message(answer)
    keys = handshake.finish(Response(9, 7, answer[:32], answer[32:]), ours.static, preshared)
    assert (bytes(keys.send), bytes(keys.receive)) == data_keys(twin)
    assert (bytes(keys.receive), bytes(keys.send)) == data_keys(responder)


def test_as_responder_byte_for_byte(preshared):
    ours, theirs = Side(), Side()
    initiator = oracle(theirs, preshared, ours.static.public)
    twin = oracle(ours, preshared, None)

    first = bytes(initiator.write_message(TIMESTAMP))
    twin.read_message(first)
    received = open_initiation(ours.static, Initiation.parse(b"\1\0\0\0\7\0\0\0" + first + MACS))
    assert received.remote == theirs.static.public
    assert received.verify(ours.static.exchange(received.remote)) == TIMESTAMP
    response, keys = received.respond(9, preshared, ephemeral=PrivateKey(ours.ephemeral.to_bytes()))
    assert (response.sender, response.receiver) == (9, 7)
    second = response.encode()[12:]
    assert second == bytes(twin.write_message())
    initiator.read_message(second)
    assert (bytes(keys.send), bytes(keys.receive)) == data_keys(twin)
    assert (bytes(keys.receive), bytes(keys.send)) == data_keys(initiator)


def respond(static: PrivateKey, initiation: Initiation, preshared: PresharedKey):
    received = open_initiation(static, initiation)
    received.verify(static.exchange(received.remote))
    return received.respond(9, preshared)


def test_another_preshared_key_is_refused_and_the_true_response_still_taken():
    ours, theirs, preshared = Side(), Side(), PresharedKey.generate()
    handshake, initiation = begin(ours, theirs.static.public)
    wrong, _ = respond(theirs.static, initiation, PresharedKey.generate())
    with pytest.raises(Refused, match="handshake-not-authentic"):
        handshake.finish(wrong, ours.static, preshared)
    right, keys = respond(theirs.static, initiation, preshared)
    assert handshake.finish(right, ours.static, preshared).send == keys.receive


def test_an_initiation_for_another_is_refused():
    ours, theirs = Side(), Side()
    _, initiation = begin(ours, theirs.static.public)
    with pytest.raises(Refused, match="handshake-not-authentic"):
        open_initiation(PrivateKey.generate(), initiation)


@given(st.integers(8, 115), st.integers(1, 255))
def test_any_changed_byte_of_an_initiation_is_refused(position, change):
    ours, theirs = Side(), Side()
    _, initiation = begin(ours, theirs.static.public)
    changed = bytearray(initiation.encode() + MACS)
    changed[position] ^= change
    if position == 39 and change == 0x80:
        return  # the top bit of a point is ignored (RFC 7748 §5), but is in the transcript
    with pytest.raises(Refused):
        respond(theirs.static, Initiation.parse(bytes(changed)), PresharedKey.none())


@given(st.integers(12, 59), st.integers(1, 255))
def test_any_changed_byte_of_a_response_is_refused(position, change):
    ours, theirs = Side(), Side()
    handshake, initiation = begin(ours, theirs.static.public)
    response, _ = respond(theirs.static, initiation, PresharedKey.none())
    changed = bytearray(response.encode() + MACS)
    changed[position] ^= change
    with pytest.raises(Refused):
        handshake.finish(Response.parse(bytes(changed)), ours.static, PresharedKey.none())


def test_low_order_keys_are_refused_on_both_sides():
    ours, theirs = Side(), Side()
    with pytest.raises(Refused, match="low-order-key"):
        InitiatorHandshake.begin(ours.static, PublicKey(bytes(32)), bytes(32), 1, TIMESTAMP)
    _, initiation = begin(ours, theirs.static.public)
    forged = Initiation(initiation.sender, bytes(32), initiation.static, initiation.timestamp)
    with pytest.raises(Refused, match="low-order-key"):
        open_initiation(theirs.static, forged)
    handshake, _ = begin(Side(), theirs.static.public)
    with pytest.raises(Refused, match="low-order-key"):
        handshake.finish(Response(1, 7, bytes(32), bytes(16)), ours.static, PresharedKey.none())


def test_secrets_are_wiped_and_not_shown():
    ours, theirs = Side(), Side()
    handshake, initiation = begin(ours, theirs.static.public)
    _, keys = respond(theirs.static, initiation, PresharedKey.none())
    shown = f"{keys} {handshake!r}"
    assert keys.send.hex() not in shown
    assert repr(bytes(keys.send)) not in shown
    keys.wipe()
    handshake.wipe()
    assert keys.send == keys.receive == bytes(32)
    assert handshake._chain == bytes(32)
    assert handshake._ephemeral.to_bytes() == bytes(32)


def test_timestamps_are_tai64n_and_whitened():
    assert tai64n.stamp(0.0).hex() == "400000000000000a00000000"
    assert tai64n.stamp(1.999999).hex() == "400000000000000b3b000000"
    assert tai64n.stamp(-5.0) == tai64n.stamp(0.0)


@given(st.floats(0, 1e10), st.floats(0, 1e10))
def test_timestamps_sort_as_time_does(earlier, later):
    earlier, later = sorted((earlier, later))
    first, second = tai64n.stamp(earlier), tai64n.stamp(later)
    assert first <= second
    assert int.from_bytes(first[8:], "big") % (1 << 24) == 0
    assert later - earlier < 2e-2 or first < second
    assert tai64n.NEVER < first < tai64n.later(first)
    assert int.from_bytes(tai64n.later(first)[8:], "big") < 10**9


def test_every_handshake_has_its_own_ephemeral_key():
    ours, theirs = Side(), Side()
    static_static = ours.static.exchange(theirs.static.public)
    seen = {
        InitiatorHandshake.begin(ours.static, theirs.static.public, static_static, 1, os.urandom(12))[1].ephemeral
        for _ in range(5)
    }
    assert len(seen) == 5
