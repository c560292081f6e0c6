"""pytest-benchmark: how many packets a second the loop forwards, beside the pure-Python tunnel.

pytest bench --benchmark-only --benchmark-enable
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.loop import DIRECTIONS, SIZES, TUNNELS, rig

PACKETS = 10_000


@pytest.mark.parametrize("tunnel", TUNNELS)
@pytest.mark.parametrize("packet_bytes", SIZES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loop(benchmark: Any, direction: str, packet_bytes: int, tunnel: str) -> None:
    benchmark.group = f"{direction}, {packet_bytes} bytes"
    with rig(tunnel, direction, packet_bytes) as running:
        benchmark.pedantic(running.transfer, args=(PACKETS,), rounds=7, warmup_rounds=1)
    if benchmark.stats is not None:  # None when benchmarks are disabled
        benchmark.extra_info["packets_per_second"] = round(PACKETS / benchmark.stats.stats.median)
