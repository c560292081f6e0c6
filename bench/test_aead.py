"""What sealing and opening a data packet cost in each back end of the AEAD: batches of 64 under one key.

    pytest bench/test_aead.py --benchmark-enable

`ns_per_packet` in the extra information is the figure, the median of the rounds; each round is `TIMES` batches.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from fasttun import _testing

BATCH = 64
TIMES = 50
ROUNDS = 41


@pytest.mark.parametrize("length", [64, 512, 1420])
@pytest.mark.parametrize("operation", ["seal", "open"])
@pytest.mark.parametrize("backend", _testing.aead_backends())
def test_aead(benchmark: Any, backend: str, operation: str, length: int) -> None:
    key = _testing.AeadKey(bytes(range(32)), backend)
    spent_s: list[float] = []

    def work() -> int:
        seconds, good = key.repeat(length, BATCH, TIMES, operation == "open")
        spent_s.append(seconds)
        return good

    assert benchmark.pedantic(work, rounds=ROUNDS, warmup_rounds=2) == BATCH * TIMES
    benchmark.extra_info["ns_per_packet"] = round(statistics.median(spent_s) / TIMES / BATCH * 1e9)
