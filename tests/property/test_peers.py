"""The peer table against a slow twin, over chance and over the attacks that it claims to withstand."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.peer_twin import FULL, STRANGER, UNPROVEN, Check, PeerTwin

from fasttun import ConfigurationError, StateError
from fasttun._core import PeerTable

MS = 1_000_000
S = 1000 * MS
START = 10**18
"""Far ahead of this machine's clock, which `peers()` reads: there nobody has expired yet."""

INNER = [ipaddress.ip_address(text) for text in (
    "10.7.0.2", "10.7.0.3", "10.7.0.4", "fd07::2", "fd07::3", "fe80::1", "::a07:2", "10.7.0.5", "10.7.0.6")]


def endpoint(number: int, host: str = "192.0.2.1") -> tuple[object, int, int]:
    return ipaddress.ip_address(host), 1000 + number, 0


ENDPOINTS = [
    endpoint(0), endpoint(1), endpoint(0, "192.0.2.2"), endpoint(0, "2001:db8::1"),
    (ipaddress.ip_address("fe80::1"), 1000, 2), (ipaddress.ip_address("fe80::1"), 1000, 3),
]


class TableAgainstTwin(RuleBasedStateMachine):
    """Every step goes to both; what they say and whom they know must be the same."""

    @initialize(peers=st.integers(1, 5), addresses=st.integers(1, 7), patience=st.sampled_from([500, 1000]))
    def make(self, peers: int, addresses: int, patience: int) -> None:
        self.now = START
        self.table = PeerTable(family=int(socket.AF_INET6), peers=peers, addresses=addresses,
                               expiry_s=20.0, patience_s=patience / 1000)
        self.twin = PeerTwin(peers, addresses, 20 * S, patience * MS)
        self.checks: list[Check] = []

    @rule(ms=st.sampled_from([1, 50, 99, 100, 166, 167, 199, 200, 333, 334, 500, 999, 1000, 4000, 4295, 8590,
                              19999, 20000, 20001]))
    def wait(self, ms: int) -> None:
        self.now += ms * MS

    @rule(whose=st.integers(0, len(ENDPOINTS) - 1), address=st.integers(0, len(INNER) - 1),
          framing=st.sampled_from(["raw", "pi"]))
    def packet(self, whose: int, address: int, framing: str) -> None:
        self.send(ENDPOINTS[whose], INNER[address], framing)

    @rule(whose=st.integers(0, len(ENDPOINTS) - 1), address=st.integers(0, len(INNER) - 1),
          count=st.integers(2, 12), every_ms=st.sampled_from([100, 250, 400, 1100]), answered=st.booleans())
    def stream(self, whose: int, address: int, count: int, every_ms: int, answered: bool) -> None:
        """Someone goes on sending, as a client that came back does; the owner may answer what it is asked."""
        for _ in range(count):
            known = len(self.checks)
            self.send(ENDPOINTS[whose], INNER[address], "raw")
            if answered and len(self.checks) > known:
                self.answer_from(self.checks[-1], self.checks[-1].to)
            self.now += every_ms * MS

    @rule(which=st.integers(0, 30), delay_ms=st.sampled_from([0, 20, 400, 1200, 5000, 9000]),
          by=st.one_of(st.none(), st.integers(0, len(ENDPOINTS) - 1)), owner_speaks=st.booleans())
    def answer(self, which: int, delay_ms: int, by: int | None, owner_speaks: bool) -> None:
        if self.checks:
            self.now += delay_ms * MS
            check = self.checks[-1 - which % len(self.checks)]
            if owner_speaks and check.address in self.twin.owner:
                self.send(self.twin.owner[check.address], check.address, "raw")
            self.answer_from(check, check.to if by is None else ENDPOINTS[by])

    @rule(by=st.integers(0, len(ENDPOINTS) - 1), transaction=st.binary(min_size=12, max_size=12),
          entry=st.one_of(st.none(), st.integers(0, 8)))
    def guess(self, by: int, transaction: bytes, entry: int | None) -> None:
        if entry is not None:
            transaction = entry.to_bytes(4, "little") + transaction[4:]
        assert self.table.check_answered(ENDPOINTS[by], transaction, self.now) is False

    @rule(which=st.integers(0, 30), bit=st.integers(0, 95))
    def forge(self, which: int, bit: int) -> None:
        if self.checks:
            check = self.checks[-1 - which % len(self.checks)]
            forged = bytearray(check.transaction)
            forged[bit // 8] ^= 1 << bit % 8
            assert self.table.check_answered(check.to, bytes(forged), self.now) is False

    def send(self, whose: object, address: object, framing: str) -> None:
        verdict, sent = self.table.admit(whose, address, framing, self.now)
        expected, whom = self.twin.admit(whose, address, framing, self.now)
        assert min(verdict, 0) == expected
        asked = [to for to, _ in sent]
        # The claimants' limit is kept by hash: two endpoints may share one, then fewer are sent, never more.
        assert set(asked) <= set(whom)
        for lacking in set(whom) - set(asked):
            assert lacking != self.twin.owner[address]
            assert any(other != lacking and self.now - then < self.twin.patience_ns // 5
                       for other, then in self.twin.claimed_ns.items())
        for to, transaction in sent:
            self.checks.append(self.twin.asked(to, address, self.now, transaction))

    def answer_from(self, check: Check, by: object) -> None:
        if self.twin.life.get(check.address, check.life) != check.life:
            return  # forgotten and learned again: whether in the same row, the twin cannot know
        expected = self.twin.answer(check, by, self.now)
        assert self.table.check_answered(by, check.transaction, self.now) == expected

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "table"):
            return
        known = {peer["endpoint"]: (peer["framing"], set(peer["addresses"])) for peer in self.table.peers()}
        assert known == {whose: (peer.framing, peer.addresses) for whose, peer in self.twin.peers.items()}
        for address in INNER:
            assert self.table.lookup(address, self.now) == self.twin.lookup(address, self.now)


TableAgainstTwin.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTableAgainstTwin = TableAgainstTwin.TestCase


# ------------------------------------------------------------------------------ what the rule claims

OWNER, CLAIMANT, THIRD = endpoint(0), endpoint(1), endpoint(2)
A, B = INNER[0], INNER[1]


class Scene:
    """A table with OWNER at A, and a clock. `listening`: who answers checks."""

    def __init__(self, *, listening: Iterable[object] = (), **options: object) -> None:
        self.table = PeerTable(family=int(socket.AF_INET), **options)  # type: ignore[arg-type]
        self.now = START
        self.listening = set(listening)
        self.checked: list[tuple[int, object]] = []
        assert self.send(OWNER, A) >= 0

    def send(self, whose: object, address: object, framing: str = "raw") -> int:
        verdict, checks = self.table.admit(whose, address, framing, self.now)
        for to, transaction in checks:
            self.checked.append((self.now, to))
            if to in self.listening:
                assert self.table.check_answered(to, transaction, self.now + 20 * MS)
        return verdict

    def until_asked(self, claimant: object) -> bytes:
        """Claims A for `claimant` until he is asked; the transaction."""
        while True:
            _, checks = self.table.admit(claimant, A, "raw", self.now)
            for to, transaction in checks:
                if to == claimant:
                    return transaction
            self.now += 50 * MS

    def flood(self, senders: Iterable[object], seconds: float, every_ms: float = 100) -> None:
        """Claims of A from the senders in turn."""
        senders = list(senders)
        end = self.now + int(seconds * S)
        count = 0
        while self.now < end:
            self.send(senders[count % len(senders)], A)
            count += 1
            self.now += int(every_ms * MS)

    @property
    def holder(self) -> object:
        return self.table.lookup(A, self.now)


def test_a_stray_datagram_moves_nothing_and_asks_the_owner_alone():
    scene = Scene()
    assert scene.send(CLAIMANT, A) == UNPROVEN
    assert scene.holder == OWNER
    assert [whom for _, whom in scene.checked] == [OWNER]


@pytest.mark.parametrize("silence_s", [0.5, 1, 2, 30, 179])
def test_a_single_stray_datagram_never_moves_an_address(silence_s):
    scene = Scene(listening=[CLAIMANT])
    scene.now += int(silence_s * S)
    assert scene.send(CLAIMANT, A) == UNPROVEN
    assert scene.holder == OWNER
    scene.now += 500 * MS
    assert scene.holder == OWNER


def test_it_takes_three_claims_over_a_second_at_least():
    scene = Scene(listening=[CLAIMANT])
    scene.now += 10 * S
    start = scene.now
    while scene.holder == OWNER:
        scene.send(CLAIMANT, A)
        scene.now += 10 * MS
    asked = [whom for _, whom in scene.checked]
    assert asked[:2] == [OWNER, CLAIMANT], "the owner first"
    assert asked.count(OWNER) == 2
    assert S <= scene.now - start < 1.1 * S


def test_a_sender_that_backs_off_needs_few_claims():
    """TCP's retransmissions come at 0.2, 0.6, 1.4 s: the third finds its way, and is not dropped itself."""
    scene = Scene(listening=[CLAIMANT])
    start = scene.now
    verdicts = []
    for at_ms in (0, 1, 200, 600, 1400):
        scene.now = start + at_ms * MS
        verdicts.append(scene.send(CLAIMANT, A))
    assert verdicts[:4] == [UNPROVEN] * 4
    assert verdicts[4] >= 0
    assert scene.holder == CLAIMANT


def test_a_proof_outlives_neither_the_owners_word_nor_its_time():
    scene = Scene(listening=[CLAIMANT])
    for _ in range(9):
        scene.send(CLAIMANT, A)
        scene.now += 100 * MS
    assert scene.send(OWNER, A) >= 0
    scene.now += 900 * MS
    assert scene.send(CLAIMANT, A) == UNPROVEN, "the owner has spoken: asked anew from the start"
    scene.listening.clear()
    scene.now += 400 * MS
    assert scene.send(CLAIMANT, A) == UNPROVEN
    scene.now += 9 * S
    assert scene.send(CLAIMANT, A) == UNPROVEN, "his answer was long ago"
    assert scene.holder == OWNER


def test_a_claimant_that_cannot_receive_never_gets_it():
    """Forged outer sources: any number, for ever; the checks go to where the forger does not listen."""
    scene = Scene()
    scene.flood([CLAIMANT], 170)
    assert scene.holder == OWNER
    assert any(whom == CLAIMANT for _, whom in scene.checked), "he was asked, and could not answer"


def test_an_owner_that_answers_keeps_it():
    scene = Scene(listening=[OWNER, CLAIMANT])
    scene.flood([CLAIMANT], 3600, 250)
    assert scene.holder == OWNER
    assert all(whom == OWNER for _, whom in scene.checked), "the claimant is not even asked"
    assert scene.send(CLAIMANT, A) == UNPROVEN


def test_an_owner_that_only_sends_keeps_it():
    """lametun answers no check, but whoever speaks within a second keeps its place."""
    scene = Scene(listening=[CLAIMANT])
    for _ in range(600):
        scene.flood([CLAIMANT], 0.5, 50)
        scene.send(OWNER, A)
    assert scene.holder == OWNER


def test_a_word_of_the_owner_between_question_and_answer_settles_it():
    scene = Scene()
    scene.now += 5 * S
    scene.flood([CLAIMANT], 2)
    transaction = scene.until_asked(CLAIMANT)
    assert scene.send(OWNER, A) >= 0
    assert scene.table.check_answered(CLAIMANT, transaction, scene.now + 10 * MS)
    assert scene.holder == OWNER


@pytest.mark.parametrize("every_ms", [1, 10, 100, 200])
def test_a_restarted_client_has_its_address_within_three_seconds(every_ms):
    scene = Scene(listening=[CLAIMANT])
    start = scene.now
    while scene.holder == OWNER:
        scene.send(CLAIMANT, A)
        scene.now += every_ms * MS
        assert scene.now - start < 3 * S
    assert scene.holder == CLAIMANT
    assert scene.send(CLAIMANT, A) >= 0
    assert [event[0] for event in scene.table.events()] == ["peer", "moved"]
    assert [peer["endpoint"] for peer in scene.table.peers()] == [CLAIMANT], "the empty peer is gone"


def test_all_addresses_of_a_restarted_client_come_along():
    scene = Scene(listening=[CLAIMANT])
    addresses = INNER[:6]
    for address in addresses:
        assert scene.send(OWNER, address) >= 0
    start = scene.now
    while any(scene.table.lookup(address, scene.now) != CLAIMANT for address in addresses):
        for address in addresses:
            scene.send(CLAIMANT, address)
        scene.now += 50 * MS
        assert scene.now - start < 5 * S


def test_the_answer_must_come_from_where_the_question_went():
    scene = Scene()
    scene.now += 5 * S
    scene.flood([CLAIMANT], 2)
    transaction = scene.until_asked(CLAIMANT)
    assert not scene.table.check_answered(THIRD, transaction, scene.now)
    assert not scene.table.check_answered(OWNER, transaction, scene.now)
    assert scene.holder == OWNER
    assert scene.table.check_answered(CLAIMANT, transaction, scene.now)
    assert scene.holder == CLAIMANT


def test_an_answer_is_good_for_seconds_only():
    scene = Scene()
    scene.now += 5 * S
    transaction = scene.until_asked(CLAIMANT)
    assert not scene.table.check_answered(CLAIMANT, transaction, scene.now + 9 * S)
    assert scene.table.lookup(A, scene.now + 9 * S) == OWNER


def test_an_answer_about_one_address_moves_no_other():
    scene = Scene(listening=[CLAIMANT])
    scene.send(OWNER, B)
    while scene.holder == OWNER:
        scene.send(CLAIMANT, A)
        scene.now += 100 * MS
    assert scene.table.lookup(B, scene.now) == OWNER


def test_a_table_has_a_key_of_its_own():
    def transaction() -> bytes:
        table = PeerTable(family=int(socket.AF_INET))
        table.admit(OWNER, A, "raw", START)
        _, ((_, transaction),) = table.admit(CLAIMANT, A, "raw", START + 10 * S)
        return transaction

    assert transaction() != transaction()


def test_a_flood_of_claims_moves_nothing_and_leaves_the_table_as_it_was():
    chance = random.Random(1)
    senders = [endpoint(chance.randrange(50000), f"198.51.100.{number % 250 + 1}") for number in range(2000)]
    scene = Scene(listening=[OWNER], peers=8, addresses=8)
    scene.flood(senders, 20, 1)
    assert scene.holder == OWNER
    assert len(scene.table.peers()) == 1, "claims cost no memory"
    assert len(scene.checked) <= 20 * 5 + 1, "an owner is asked five times a second at most"
    assert scene.send(THIRD, B) >= 0, "there is room for others"


def test_a_flood_of_claims_is_no_amplifier():
    """Even with the owner gone: at most five checks a second to one endpoint, 1,280 in all."""
    scene = Scene()
    scene.now += 10 * S
    senders = [endpoint(number, f"198.51.100.{number % 250 + 1}") for number in range(3000)]
    scene.flood(senders, 10, 0.5)
    for victim in {whom for _, whom in scene.checked}:
        times = [when for when, whom in scene.checked if whom == victim]
        assert all(b - a >= 200 * MS for a, b in pairwise(times))
    assert len(scene.checked) <= 10 * 5 * 256
    assert scene.holder == OWNER


def test_a_full_table_says_so_and_goes_on_for_those_it_knows():
    table = PeerTable(family=int(socket.AF_INET), peers=4, addresses=100)
    for number in range(4):
        assert table.admit(endpoint(number), ipaddress.ip_address(f"10.7.1.{number}"), "raw", START)[0] >= 0
    assert table.admit(endpoint(9), ipaddress.ip_address("10.7.2.1"), "raw", START)[0] == FULL
    assert table.admit(endpoint(0), ipaddress.ip_address("10.7.1.0"), "raw", START)[0] >= 0
    assert table.admit(endpoint(0), ipaddress.ip_address("10.7.2.2"), "raw", START)[0] >= 0
    later = START + 181 * S
    assert table.admit(endpoint(9), ipaddress.ip_address("10.7.2.1"), "raw", later)[0] >= 0, "the silent make room"


def test_a_full_table_is_searched_ten_times_a_second_at_most():
    """Else each datagram that it refuses costs a pass over all peers, under the lock that the loop needs."""
    table = PeerTable(family=int(socket.AF_INET), peers=2, addresses=2, expiry_s=1.0)
    for number in range(2):
        assert table.admit(endpoint(number), INNER[number], "raw", START)[0] >= 0
    full = START + S  # nobody has expired yet; a nanosecond later both have
    assert table.admit(endpoint(9), INNER[2], "raw", full)[0] == FULL
    assert table.admit(endpoint(9), INNER[2], "raw", full + 100 * MS - 1)[0] == FULL
    assert table.admit(endpoint(9), INNER[2], "raw", full + 100 * MS)[0] >= 0


def test_one_sender_cannot_fill_the_table():
    table = PeerTable(family=int(socket.AF_INET))
    base = int(ipaddress.ip_address("10.8.0.0"))
    verdicts = [table.admit(OWNER, ipaddress.ip_address(base + number), "raw", START)[0] for number in range(3000)]
    assert [verdict >= 0 for verdict in verdicts] == [True] * 1024 + [False] * (3000 - 1024)
    assert set(verdicts[1024:]) == {FULL}
    assert table.admit(CLAIMANT, A, "raw", START)[0] >= 0


def test_the_tables_full_size():
    table = PeerTable(family=int(socket.AF_INET))
    base = int(ipaddress.ip_address("10.8.0.0"))
    for number in range(1024):
        for extra in range(8):
            assert table.admit(endpoint(number), ipaddress.ip_address(base + 8 * number + extra), "raw", START)[0] >= 0
    assert table.admit(endpoint(0), A, "raw", START)[0] == FULL
    assert table.admit(endpoint(2000), A, "raw", START)[0] == FULL
    assert len(table.peers()) == 1024
    for number in range(0, 1024, 97):
        assert table.lookup(ipaddress.ip_address(base + 8 * number + 3), START) == endpoint(number)


def test_the_silent_are_forgotten_with_their_addresses():
    scene = Scene()
    scene.now += 180 * S
    assert scene.holder == OWNER
    scene.now += 1
    assert scene.holder is None
    assert scene.send(CLAIMANT, A) >= 0, "a free address belongs to the first who sends from it"
    assert scene.holder == CLAIMANT


def test_expire_removes_the_silent_now():
    """With this machine's clock: peers heard long ago, and one heard just now."""
    import time

    now = time.monotonic_ns()
    table = PeerTable(family=int(socket.AF_INET), expiry_s=1.0)
    table.admit(OWNER, A, "raw", max(1, now - 5 * S))
    table.admit(CLAIMANT, B, "raw", now)
    assert table.expire() == 1
    assert [peer["endpoint"] for peer in table.peers()] == [CLAIMANT]
    assert table.expire() == 0


def test_unknown_destinations_go_to_an_only_peer_and_to_nobody_else():
    scene = Scene()
    elsewhere = ipaddress.ip_address("192.168.77.1")
    assert scene.table.lookup(elsewhere, scene.now) == OWNER
    scene.send(CLAIMANT, B)
    assert scene.table.lookup(elsewhere, scene.now) is None
    assert scene.table.lookup(B, scene.now) == CLAIMANT


def test_ipv4_and_its_look_alikes_are_different_addresses():
    """::a07:2 and 10.7.0.2 share their low bits; only the v4-mapped form is the same (and is a martian)."""
    scene = Scene()
    assert scene.send(CLAIMANT, ipaddress.ip_address("::a07:2")) >= 0
    assert scene.holder == OWNER


def test_an_endpoint_that_the_socket_cannot_reach_is_no_peer():
    table = PeerTable(family=int(socket.AF_INET))
    assert table.admit(endpoint(0, "2001:db8::1"), A, "raw", START)[0] == FULL
    assert table.peers() == []
    assert table.admit(OWNER, A, "raw", START)[0] >= 0


def test_raw_sticks_and_an_answered_check_means_raw():
    scene = Scene(listening=[THIRD])
    scene.send(OWNER, A, "pi")
    assert scene.table.peers()[0]["framing"] == "raw"
    scene.send(CLAIMANT, B, "pi")
    framings = {peer["endpoint"]: peer["framing"] for peer in scene.table.peers()}
    assert framings == {OWNER: "raw", CLAIMANT: "pi"}
    for _ in range(40):
        scene.send(THIRD, B, "pi")
        scene.now += 100 * MS
    assert {peer["endpoint"]: peer["framing"] for peer in scene.table.peers()}[THIRD] == "raw"


# -------------------------------------------------------------------------------- the client's table


def test_a_fixed_table_knows_its_server_alone():
    table = PeerTable(family=int(socket.AF_INET), fixed=True)
    assert table.lookup(A, START) is None
    assert table.admit(OWNER, A, "raw", START) == (STRANGER, [])
    table.set_server(*OWNER)
    assert table.admit(CLAIMANT, A, "raw", START) == (STRANGER, [])
    assert table.admit(OWNER, A, "raw", START) == (0, [])
    assert table.lookup(ipaddress.ip_address("203.0.113.9"), START + 10000 * S) == OWNER, "a server never expires"
    assert table.expire() == 0


def test_a_server_that_moved_is_not_yet_heard():
    table = PeerTable(family=int(socket.AF_INET), fixed=True)
    table.set_server(*OWNER)
    assert table.peers()[0]["silent_s"] is None
    table.admit(OWNER, A, "pi", START)
    assert table.peers()[0]["silent_s"] is not None
    assert table.peers()[0]["framing"] == "pi"
    table.set_server(*OWNER)
    assert table.peers()[0]["silent_s"] is not None, "the same address is no move"
    table.set_server(*CLAIMANT)
    assert table.peers()[0]["silent_s"] is None
    assert table.peers()[0]["framing"] == "unknown"
    assert table.admit(OWNER, A, "raw", START) == (STRANGER, [])


def test_what_a_table_refuses():
    with pytest.raises(StateError):
        PeerTable().set_server(*OWNER)
    with pytest.raises(ConfigurationError, match="family"):
        PeerTable(family=int(socket.AF_INET), fixed=True).set_server(*endpoint(0, "2001:db8::1"))
    for options in ({"peers": 0}, {"addresses": 0}, {"peers": 1 << 21},
                    {"allow": [ipaddress.ip_network("10.0.0.0/8")] * 257}):
        with pytest.raises(ConfigurationError):
            PeerTable(**options)
    with pytest.raises(ConfigurationError, match="12 bytes"):
        PeerTable().check_answered(OWNER, b"short", START)
