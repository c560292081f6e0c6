"""The engine's replay window (fasttun/_native/replay.pxd) against the slow one, and RFC 6479's cases."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttun._testing import ReplayFilter
from fasttun.wireguard.replay import WINDOW, ReplayWindow

LIMIT = 2**64 - 2**13 - 1
"""REJECT_AFTER_MESSAGES: the first counter that is refused (paper §6.1)."""


class Twin:
    def __init__(self) -> None:
        self.window = ReplayWindow()

    def check(self, counter: int) -> bool:
        return counter < LIMIT and self.window.check(counter)

    def mark(self, counter: int) -> bool:
        if not self.check(counter):
            return False
        self.window.mark(counter)
        return True


# Steps from the greatest counter: small ones, a word's and the window's edges, far away.
STEPS = st.one_of(
    st.integers(-70, 70),
    st.sampled_from([side * (edge + by) for edge in (64, WINDOW, 8192) for by in (-1, 0, 1) for side in (1, -1)]),
    st.integers(-9000, 9000),
    st.integers(0, 2**63),
)
STARTS = st.sampled_from([0, 1, 63, 64, WINDOW, 2**32 - 3, 2**63 - 5, LIMIT - 9000, LIMIT - 2]) | st.integers(0, LIMIT)


@given(STARTS, st.lists(st.tuples(STEPS, st.booleans()), max_size=80))
@settings(max_examples=400, deadline=None)
def test_as_the_slow_twin(start: int, steps: list[tuple[int, bool]]) -> None:
    ours, twin, greatest = ReplayFilter(), Twin(), start
    for step, mark in [(0, True), *steps]:
        counter = min(max(greatest + step, 0), 2**64 - 1)
        assert ours.check(counter) == twin.check(counter)
        if mark:
            assert ours.mark(counter) == twin.mark(counter)
            if counter < LIMIT:
                greatest = max(greatest, counter)


@given(st.integers(0, LIMIT - 30000), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_each_of_a_windowful_in_any_order_once(start: int, seed: int) -> None:
    chance = random.Random(seed)
    ours = ReplayFilter()
    counters = list(range(start, start + WINDOW))
    chance.shuffle(counters)
    assert all(ours.mark(counter) for counter in counters)
    assert not any(ours.mark(counter) or ours.check(counter) for counter in counters)


def test_the_window_is_exactly_as_wide_as_promised() -> None:
    ours = ReplayFilter()
    assert ours.mark(100000)
    assert not ours.check(100000 - WINDOW)
    assert ours.mark(100000 - WINDOW + 1)
    assert not ours.mark(100000 - WINDOW + 1)


def test_check_changes_nothing() -> None:
    ours = ReplayFilter()
    assert ours.mark(5)
    assert ours.check(2**40)
    assert ours.mark(4)


def test_what_is_marked_late_does_not_move_the_window_back() -> None:
    ours = ReplayFilter()
    assert ours.mark(9000)
    assert ours.mark(8000)
    assert not ours.check(9000 - WINDOW)
    assert not ours.check(9000)


@pytest.mark.parametrize("counter", [LIMIT, LIMIT + 1, 2**64 - 1])
def test_the_last_counters_are_refused_and_move_nothing(counter: int) -> None:
    ours = ReplayFilter()
    assert ours.mark(0)
    assert not ours.check(counter)
    assert not ours.mark(counter)
    assert ours.mark(1)


def test_the_greatest_counter_of_all() -> None:
    ours = ReplayFilter()
    assert ours.mark(LIMIT - 1)
    assert not ours.check(LIMIT - 1)
    assert not ours.check(LIMIT)
    assert ours.check(LIMIT - WINDOW)
    assert not ours.check(LIMIT - 1 - WINDOW)


@pytest.mark.parametrize("jump", [64, WINDOW, 8192, 8193, 2**32, 2**62])
def test_a_leap_forgets_no_more_and_no_less_than_what_is_behind_the_window(jump: int) -> None:
    ours = ReplayFilter()
    for counter in range(100):
        assert ours.mark(counter)
    greatest = 99 + jump
    assert ours.mark(greatest)
    for counter in range(max(0, greatest - 9000), greatest):
        assert ours.check(counter) == (counter > greatest - WINDOW and counter > 99)
