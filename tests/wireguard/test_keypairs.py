"""Sessions: limits, sealing, the replay window, the three places, and indices that collide."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttun.wireguard.indices import IndexTable
from fasttun.wireguard.keypairs import (
    REJECT_AFTER_MESSAGES,
    REKEY_AFTER_MESSAGES,
    Keypair,
    Keypairs,
    padded_length,
)
from fasttun.wireguard.messages import DataHeader
from fasttun.wireguard.noise import TransportKeys
from fasttun.wireguard.refusal import Refused
from fasttun.wireguard.replay import WINDOW, ReplayWindow

aead = pytest.importorskip("cryptography.hazmat.primitives.ciphers.aead")


def keypair(*, initiator: bool = True, created: float = 0.0, index: int = 1) -> Keypair:
    one, other = b"1" * 32, b"2" * 32
    send, receive = (one, other) if initiator else (other, one)
    keys = TransportKeys(bytearray(send), bytearray(receive))
    return Keypair(keys, local_index=index, remote_index=index + 1, created=created, initiator=initiator)


def test_sealing_is_as_another_implementation_does_it():
    ours = keypair()
    ours.send_counter = 0x0102030405060708
    datagram = ours.seal(b"x" * 32, 0.0)
    assert datagram[:16].hex() == "04000000" "02000000" "0807060504030201"
    nonce = bytes(4) + datagram[8:16]
    assert aead.ChaCha20Poly1305(b"1" * 32).decrypt(nonce, datagram[16:], None) == b"x" * 32


@pytest.mark.parametrize("counter", [0, 0xFFFFFFFF, 0x100000000, 1 << 40, REJECT_AFTER_MESSAGES - 1])
def test_counters_have_64_bits(counter):
    ours, theirs = keypair(), keypair(initiator=False)
    ours.send_counter = counter
    datagram = ours.seal(b"packet", 0.0)
    assert DataHeader.parse(datagram).counter == counter
    assert theirs.open(datagram, 0.0) == b"packet"
    assert ours.send_counter == counter + 1
    if counter + 1 < REJECT_AFTER_MESSAGES:
        following = ours.seal(b"another", 0.0)
        assert following[16:] != datagram[16:]
        assert theirs.open(following, 0.0) == b"another"


def test_no_message_is_sent_or_taken_beyond_the_last_counter():
    ours, theirs = keypair(), keypair(initiator=False)
    ours.send_counter = REJECT_AFTER_MESSAGES
    assert not ours.can_send(0.0)
    with pytest.raises(Refused, match="keypair-expired"):
        ours.seal(b"", 0.0)
    assert ours.send_counter == REJECT_AFTER_MESSAGES
    forged = DataHeader(1, REJECT_AFTER_MESSAGES).encode() + bytes(16)
    with pytest.raises(Refused, match="keypair-expired"):
        theirs.open(forged, 0.0)


def test_a_session_ends_after_180_seconds():
    ours, theirs = keypair(created=10.0), keypair(created=10.0, initiator=False)
    first, second = ours.seal(b"", 189.9), ours.seal(b"", 189.9)
    assert theirs.open(first, 189.9) == b""
    with pytest.raises(Refused, match="keypair-expired"):
        theirs.open(second, 190.0)
    with pytest.raises(Refused, match="keypair-expired"):
        ours.seal(b"", 190.0)


def test_only_the_initiator_renews_by_time_but_both_by_messages():
    ours, theirs = keypair(), keypair(initiator=False)
    assert not ours.wants_rekey_after_send(119.9)
    assert ours.wants_rekey_after_send(120.0)
    assert not theirs.wants_rekey_after_send(179.0)
    assert not ours.wants_rekey_after_receive(164.9)
    assert ours.wants_rekey_after_receive(165.0)
    assert not theirs.wants_rekey_after_receive(179.0)
    for pair in (ours, theirs):
        pair.send_counter = REKEY_AFTER_MESSAGES
        assert not pair.wants_rekey_after_send(0.0)
        pair.send_counter = REKEY_AFTER_MESSAGES + 1
        assert pair.wants_rekey_after_send(0.0)


def test_the_limits_are_the_papers():
    assert REKEY_AFTER_MESSAGES == 2**60
    assert REJECT_AFTER_MESSAGES == 2**64 - 2**13 - 1


def test_a_replayed_packet_is_refused_and_a_forged_one_moves_nothing():
    ours, theirs = keypair(), keypair(initiator=False)
    datagram = ours.seal(b"packet", 0.0)
    forged = DataHeader(2, 1 << 50).encode() + datagram[16:]
    with pytest.raises(Refused, match="data-not-authentic"):
        theirs.open(forged, 0.0)
    assert theirs.open(datagram, 0.0) == b"packet"
    with pytest.raises(Refused, match="replayed"):
        theirs.open(datagram, 0.0)


@given(st.lists(st.one_of(st.integers(0, 60), st.integers(0, 40_000), st.integers(0, 2**64 - 1)), max_size=80))
def test_the_window_is_a_set_of_what_came(counters):
    """Against a set, for counters near and far."""
    window, seen, greatest = ReplayWindow(), set(), -1
    for counter in counters:
        expected = counter not in seen and counter > greatest - WINDOW
        assert window.check(counter) == expected
        if expected:
            window.mark(counter)
            assert not window.check(counter)
            seen.add(counter)
            greatest = max(greatest, counter)


def test_the_edge_of_the_window():
    """RFC 6479: the oldest that is still taken, and the one before."""
    assert WINDOW >= 8128
    window = ReplayWindow()
    window.mark(WINDOW + 10)
    assert window.check(11)
    assert not window.check(10)
    window.mark(11)
    assert not window.check(11)
    window.mark(3 * WINDOW + 10)
    assert window.check(3 * WINDOW + 9)


@given(st.integers(0, 3000), st.integers(1280, 1500))
def test_padding_stays_in_the_mtu(length, mtu):
    padded = padded_length(length, mtu)
    assert length <= padded < length + 16
    assert padded % 16 == 0 or padded == max(length, mtu)
    assert padded <= max(length, mtu)


def test_the_initiators_session_is_current_at_once():
    pairs, first, second, third = Keypairs(), keypair(), keypair(), keypair()
    assert pairs.install(first) == []
    assert pairs.install(second) == []
    assert (pairs.previous, pairs.current, pairs.next) == (first, second, None)
    assert pairs.install(third) == [first]


def test_the_responders_session_waits_for_its_confirmation():
    pairs, old, new = Keypairs(), keypair(), keypair(initiator=False)
    pairs.install(old)
    pairs.install(new)
    assert (pairs.previous, pairs.current, pairs.next) == (None, old, new)
    assert pairs.confirm(old) is None
    assert pairs.current is old
    assert pairs.confirm(new) == []
    assert (pairs.previous, pairs.current, pairs.next) == (old, new, None)
    assert pairs.confirm(new) is None


def test_a_second_unconfirmed_session_pushes_out_the_first():
    pairs, old, older, first, second = (Keypairs(), *(keypair(initiator=n < 2) for n in range(4)))
    pairs.install(older)
    pairs.install(old)
    assert pairs.install(first) == [older]
    assert pairs.install(second) == [first]
    assert pairs.confirm(first) is None
    assert pairs.current is old


def test_initiating_with_an_unconfirmed_session_keeps_it_for_receiving():
    pairs, old, unconfirmed, new = Keypairs(), keypair(), keypair(initiator=False), keypair()
    pairs.install(old)
    pairs.install(unconfirmed)
    assert pairs.install(new) == [old]
    assert (pairs.previous, pairs.current, pairs.next) == (unconfirmed, new, None)
    assert pairs.clear() == [unconfirmed, new]
    assert pairs.clear() == []


@given(st.lists(st.sampled_from(["initiator", "responder", "confirm"]), max_size=40))
def test_every_session_is_in_one_place_or_removed_once(steps):
    pairs, alive, indices = Keypairs(), set(), itertools.count()
    for step in steps:
        if step == "confirm":
            if pairs.next is not None:
                alive -= {old.local_index for old in pairs.confirm(pairs.next)}
        else:
            new = keypair(initiator=step == "initiator", index=next(indices))
            alive.add(new.local_index)
            removed = {old.local_index for old in pairs.install(new)}
            assert removed <= alive
            alive -= removed
        places = [pair.local_index for pair in (pairs.previous, pairs.current, pairs.next) if pair]
        assert sorted(places) == sorted(alive)


def test_colliding_indices_are_drawn_again():
    draws = iter([5, 5, 5, 6, 5, 7])
    table: IndexTable[str] = IndexTable(lambda: next(draws))
    assert [table.allocate(name) for name in "abc"] == [5, 6, 7]
    assert [table.get(index) for index in (5, 6, 7, 8)] == ["a", "b", "c", None]
    table.release(5)
    table.release(5)
    assert table.get(5) is None
    assert len(table) == 2
    with pytest.raises(KeyError):
        table.reassign(5, "x")


def test_indices_are_32_bits_and_random():
    table: IndexTable[int] = IndexTable()
    indices = [table.allocate(n) for n in range(1000)]
    assert len(set(indices)) == 1000
    assert max(indices) < 2**32
    assert max(indices) > 2**31


def test_a_keypair_shows_no_key():
    shown = f"{keypair()!r} {keypair()} {Keypairs()!r}"
    assert "1111" not in shown
    assert (b"1" * 32).hex() not in shown
