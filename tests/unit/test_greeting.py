"""The client's schedule against a simulated clock: hours in milliseconds, no sockets, no sleeps."""

from __future__ import annotations

import ipaddress
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from fasttun.endpoint import Endpoint
from fasttun.plain.greeting import KEEPALIVE_S, SILENCE_S, Greeter

A = Endpoint(ipaddress.ip_address("2001:db8::1"), 1234)
B = Endpoint(ipaddress.ip_address("192.0.2.1"), 1234)
C = Endpoint(ipaddress.ip_address("192.0.2.2"), 1234)
START = 1000.0


@dataclass
class World:
    """Calls the greeter when it asks to be called, and answers as `answers(endpoint, now)` says.

    speaks: times at which the server sends something by itself, whoever asks.
    """

    greeter: Greeter
    answers: Callable[[Endpoint, float], bool] = lambda endpoint, now: False
    speaks: list[float] = field(default_factory=list)
    now: float = START
    heard: float = -math.inf
    greetings: list[tuple[float, Endpoint]] = field(default_factory=list)
    moves: list[tuple[float, Endpoint]] = field(default_factory=list)
    resolutions: list[float] = field(default_factory=list)
    calls: int = 0

    def run(self, until: float) -> None:
        while self.now < until:
            for time in [time for time in self.speaks if time <= self.now]:
                self.speaks.remove(time)
                self.heard = max(self.heard, time)
            step = self.greeter.poll(self.now, self.now - self.heard)
            self.calls += 1
            assert step.wait_s > 0, "a wait of nothing is a busy loop"
            if step.move_to is not None:
                assert step.greet, "a new address is greeted at once"
                assert step.move_to == self.greeter.current
                self.moves.append((self.now, step.move_to))
            if step.resolve:
                self.resolutions.append(self.now)
            if step.greet:
                self.greetings.append((self.now, self.greeter.current))
                if self.answers(self.greeter.current, self.now):
                    self.heard = self.now + 0.01
                    self.speaks.append(self.heard)
                    self.greeter.answered()
            # The caller may sleep shorter, never longer: a packet or an event wakes it.
            self.now += step.wait_s
            coming = [time for time in self.speaks if time < self.now]
            if coming:
                self.now = max(min(coming), self.now - step.wait_s) + 1e-6

    def gaps(self) -> list[float]:
        times = [time for time, _ in self.greetings]
        return [round(b - a, 6) for a, b in pairwise(times)]


def world(*addresses: Endpoint, resolvable: bool = True, **fields: object) -> World:
    return World(Greeter(addresses or (A,), START, resolvable=resolvable), **fields)  # type: ignore[arg-type]


def test_the_first_greeting_goes_out_at_once():
    w = world()
    w.run(START + 0.01)
    assert w.greetings == [(START, A)]


def test_a_mute_server_is_greeted_less_and_less_often_and_never_given_up():
    w = world()
    w.run(START + 3600)
    assert w.gaps()[:5] == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert set(w.gaps()[5:]) == {4.0}
    assert w.calls <= len(w.greetings) + 1, "nothing else wakes the thread"
    assert w.resolutions == [], "what was never heard is not a server that moved"
    assert w.moves == []


def test_an_answering_server_is_greeted_once_a_keepalive_for_hours():
    w = world(answers=lambda endpoint, now: True)
    w.run(START + 6 * 3600)
    assert all(gap == pytest.approx(KEEPALIVE_S, abs=0.1) for gap in w.gaps())
    assert len(w.greetings) == pytest.approx(6 * 3600 / KEEPALIVE_S, rel=0.01)
    assert w.resolutions == []
    assert w.moves == []
    assert w.calls <= 3 * len(w.greetings)


def test_traffic_stands_in_for_greetings():
    """A lametun server answers no greeting but sends packets: that is enough, and it is left in peace."""
    w = world(A, B, speaks=[START + 0.5 + second for second in range(1800)])
    w.run(START + 1790)
    assert all(time < START + 1 for time, _ in w.greetings)
    assert w.moves == []
    assert w.resolutions == []


def test_a_lametun_server_with_nothing_to_say_is_not_left():
    """It has spoken and then is idle for an hour: that is no reason to try another address."""
    w = world(A, B, speaks=[START + 0.5 + second for second in range(60)])
    w.run(START + 3600)
    assert w.moves == []
    assert w.greeter.current == A


def test_a_server_that_used_to_answer_is_left_when_it_is_mute():
    w = world(A, B, answers=lambda endpoint, now: endpoint == B or now < START + 100)
    w.run(START + 400)
    assert [endpoint for _, endpoint in w.moves] == [B]
    assert w.moves[0][0] < START + 100 + SILENCE_S + 2 * KEEPALIVE_S


def test_every_address_is_tried_in_turn():
    w = world(A, B, C)
    w.run(START + 6)
    assert [endpoint for _, endpoint in w.moves] == [B, C, A]
    greeted = [endpoint for _, endpoint in w.greetings]
    assert greeted[:9] == [A] * 3 + [B] * 3 + [C] * 3
    assert w.moves[0][0] - START < 2, "the other family within two seconds"


def test_the_address_that_answers_is_kept():
    w = world(A, B, answers=lambda endpoint, now: endpoint == B)
    w.run(START + 600)
    assert [endpoint for _, endpoint in w.moves] == [B]
    assert w.greeter.current == B
    assert all(gap == pytest.approx(KEEPALIVE_S, abs=0.1) for gap in w.gaps()[4:])


def test_a_server_fallen_silent_is_resolved_again_and_again():
    w = world(answers=lambda endpoint, now: now < START + 100)
    w.run(START + 400)
    last_heard = w.heard
    assert w.resolutions, "silence must ask the resolver"
    assert last_heard + SILENCE_S <= w.resolutions[0] <= last_heard + SILENCE_S + KEEPALIVE_S
    gaps = [b - a for a, b in pairwise(w.resolutions)]
    assert gaps
    assert all(30 <= gap <= 35 for gap in gaps), "not in a storm"


def test_a_literal_address_is_never_resolved_again():
    w = world(resolvable=False, answers=lambda endpoint, now: now < START + 100)
    w.run(START + 1000)
    assert w.resolutions == []
    assert len(w.greetings) > 100


def test_a_server_back_after_an_hour_is_found_within_seconds():
    w = world(answers=lambda endpoint, now: not START + 100 < now < START + 3700)
    w.run(START + 4000)
    found = next(time for time, _ in w.greetings if time >= START + 3700)
    assert found - (START + 3700) <= 4
    assert w.gaps()[-1] == pytest.approx(KEEPALIVE_S, abs=0.1)


def test_a_new_answer_of_the_resolver_moves_and_greets_at_once():
    w = world(A, answers=lambda endpoint, now: True)
    w.run(START + 50)
    assert w.greeter.replace([B, C], w.now) == B
    assert w.greeter.current == B
    before = len(w.greetings)
    w.run(w.now + 0.001)
    assert [endpoint for _, endpoint in w.greetings[before:]] == [B], \
        "what the old address has said does not vouch for the new one"


def test_an_old_address_that_spoke_does_not_vouch_for_a_new_one():
    w = world(A, answers=lambda endpoint, now: endpoint == A)
    w.run(START + 50)
    w.heard = w.now - 0.1
    w.greeter.replace([B], w.now)
    before = len(w.greetings)
    w.run(w.now + 10)
    assert w.gaps()[before:before + 4] == [0.25, 0.5, 1.0, 2.0]


def test_the_same_answer_of_the_resolver_changes_nothing():
    w = world(A, B, answers=lambda endpoint, now: endpoint == B)
    w.run(START + 50)
    assert w.greeter.replace([C, B, A], w.now) is None
    assert w.greeter.current == B
    before = len(w.greetings)
    w.run(w.now + 100)
    assert all(gap == pytest.approx(KEEPALIVE_S, abs=0.1) for gap in w.gaps()[before - 1:])


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_server_does_there_is_no_storm(seed):
    """At most five greetings in any second and never a wait of nothing, over an hour of chance."""
    chance = random.Random(seed)
    w = world(A, B, C, answers=lambda endpoint, now: chance.random() < 0.3,
              speaks=sorted(START + chance.random() * 3600 for _ in range(chance.randrange(200))))
    while w.now < START + 3600:
        w.run(w.now + chance.random() * 100)
        if chance.random() < 0.1:
            w.greeter.replace(chance.sample([A, B, C], chance.randint(1, 3)), w.now)
    times = [time for time, _ in w.greetings]
    assert all(b - a > 1 for a, b in zip(times, times[5:], strict=False))
    assert all(b - a >= 30 for a, b in pairwise(w.resolutions))
