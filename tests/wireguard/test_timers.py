"""A peer's timers, by a simulated clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttun.wireguard import timers as module
from fasttun.wireguard.timers import PeerTimers, TimerEvent

E = TimerEvent


@pytest.fixture
def timers():
    return PeerTimers(jitter=lambda: 0.25)


def test_the_constants_are_the_papers():
    assert module.REKEY_AFTER_TIME == 120
    assert module.REJECT_AFTER_TIME == 180
    assert module.REKEY_ATTEMPT_TIME == 90
    assert module.REKEY_TIMEOUT == 5
    assert module.KEEPALIVE_TIMEOUT == 10
    assert module.ZERO_KEYS_TIME == 540


def test_nothing_is_due_at_first(timers):
    assert timers.next_deadline() is None
    assert timers.expire(1e9) == []
    assert timers.may_initiate(0.0)


def test_a_handshake_is_retried_with_jitter_until_it_is_given_up(timers):
    timers.handshake_wanted(0.0)
    timers.initiation_sent(0.0)
    tries, now = 1, 0.0
    while True:
        assert timers.next_deadline() == pytest.approx(now + 5.25)
        assert timers.expire(now + 5.2) == []
        now += 5.25
        if (due := timers.expire(now)) != [E.RETRY_HANDSHAKE]:
            break
        tries += 1
        timers.initiation_sent(now)
    assert due == [E.GIVE_UP_HANDSHAKE]
    assert 90.0 <= now < 96.0
    assert tries == 18
    assert timers.next_deadline() == now + 540.0  # what is left of the attempt is wiped


def test_giving_up_also_gives_up_the_keepalive(timers):
    timers.handshake_wanted(0.0)
    timers.initiation_sent(85.0)
    timers.data_received(89.0)
    assert timers.expire(95.0) == [E.GIVE_UP_HANDSHAKE]
    assert timers.expire(300.0) == []


def test_a_new_wish_prolongs_the_attempt(timers):
    timers.handshake_wanted(0.0)
    timers.initiation_sent(85.0)
    timers.handshake_wanted(88.0)
    assert timers.expire(91.0) == [E.RETRY_HANDSHAKE]


def test_two_initiations_are_five_seconds_apart(timers):
    timers.initiation_sent(100.0)
    assert not timers.may_initiate(104.9)
    assert timers.may_initiate(105.0)


def test_a_retry_waits_after_a_response(timers):
    timers.handshake_wanted(0.0)
    timers.initiation_sent(0.0)
    timers.response_sent(3.0)
    assert timers.expire(5.25) == []
    assert timers.next_deadline() == 8.25
    assert timers.expire(8.25) == [E.RETRY_HANDSHAKE]


def test_completion_ends_the_retries(timers):
    timers.initiation_sent(0.0)
    timers.handshake_complete()
    assert timers.next_deadline() is None


def test_data_without_an_answer_leads_to_a_new_handshake(timers):
    timers.data_sent(0.0)
    timers.data_sent(9.0)
    assert timers.next_deadline() == 15.25
    assert timers.expire(15.25) == [E.NEW_HANDSHAKE]
    timers.data_sent(20.0)
    timers.authenticated_received(21.0)
    assert timers.next_deadline() is None


def test_received_data_is_answered_by_one_keepalive(timers):
    timers.data_received(0.0)
    assert timers.expire(9.9) == []
    assert timers.expire(10.0) == [E.SEND_KEEPALIVE]
    assert timers.next_deadline() is None


def test_more_data_in_between_is_answered_by_another(timers):
    timers.data_received(0.0)
    timers.data_received(4.0)
    assert timers.expire(10.0) == [E.SEND_KEEPALIVE]
    assert timers.expire(20.0) == [E.SEND_KEEPALIVE]
    assert timers.next_deadline() is None


def test_sent_data_makes_the_keepalive_needless(timers):
    timers.data_received(0.0)
    timers.data_sent(5.0)
    assert E.SEND_KEEPALIVE not in timers.expire(12.0)


def test_a_keepalive_does_not_ask_for_one(timers):
    timers.authenticated_received(0.0)
    assert timers.next_deadline() is None


def test_keys_are_wiped_540_seconds_after_the_last_session(timers):
    timers.session_derived(0.0)
    timers.response_sent(100.0)
    assert timers.next_deadline() == 640.0
    assert timers.expire(640.0) == [E.ZERO_KEYS]
    assert timers.next_deadline() is None


def test_persistent_keepalive_counts_from_the_last_packet_either_way(timers):
    timers.set_persistent_keepalive(25.0, 0.0)
    assert timers.next_deadline() == 25.0
    timers.authenticated_received(20.0)
    timers.authenticated_sent(30.0)
    assert timers.expire(54.9) == []
    assert timers.expire(55.0) == [E.PERSISTENT_KEEPALIVE]
    assert timers.next_deadline() == 80.0
    timers.set_persistent_keepalive(0.0, 60.0)
    assert timers.next_deadline() is None


def test_stopping_ends_everything(timers):
    timers.initiation_sent(0.0)
    timers.data_sent(0.0)
    timers.data_received(0.0)
    timers.session_derived(0.0)
    timers.stop()
    assert timers.next_deadline() is None
    assert timers.may_initiate(0.0)


def test_real_jitter_is_in_its_bounds():
    delays = set()
    for _ in range(200):
        timers = PeerTimers()
        timers.initiation_sent(0.0)
        delays.add(timers.next_deadline())
    assert len(delays) > 100
    assert min(delays) >= 5.0
    assert max(delays) <= 5.334


CALLS = [
    "handshake_wanted", "initiation_sent", "response_sent", "session_derived", "data_sent", "data_received",
    "authenticated_sent", "authenticated_received",
]


@given(st.lists(st.tuples(st.floats(0, 200), st.sampled_from([*CALLS, "handshake_complete", "expire"])), max_size=60))
def test_nothing_is_due_before_the_deadline_and_never_twice(steps):
    timers, now = PeerTimers(), 0.0
    timers.set_persistent_keepalive(60.0, 0.0)
    for gap, call in steps:
        now += gap
        if call == "handshake_complete":
            timers.handshake_complete()
        elif call == "expire":
            deadline = timers.next_deadline()
            due = timers.expire(now)
            assert len(due) == len(set(due))
            assert not due or now >= deadline
            following = timers.next_deadline()
            assert following is None or following > now
        else:
            getattr(timers, call)(now)
