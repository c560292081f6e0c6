"""What the per-packet helpers cost: checksum, split, join. Loops in C, so that Python's own cost is not in it.

    pytest bench/test_kernels.py --benchmark-enable

`ns_per_call` in the extra information is the figure; a benchmark's own time is that of `TIMES` calls.
Not for the loop as a whole (bench/test_loop.py) nor for traffic (bench/endtoend.py).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from fasttun import _testing

TIMES = 2000
LENGTHS = [64, 512, 1400]


def measure(benchmark: Any, call: Callable[[], object], items: int = 1) -> object:
    result = benchmark.pedantic(call, rounds=20, warmup_rounds=2)
    if benchmark.stats:
        benchmark.extra_info["ns_per_call"] = round(benchmark.stats.stats.min / TIMES * 1e9, 1)
        benchmark.extra_info["ns_per_item"] = round(benchmark.stats.stats.min / TIMES / items * 1e9, 1)
    return result


def tcp_packets(count: int, payload: int) -> list[bytes]:
    """IPv4 TCP packets with timestamps that follow one another, checksums right."""
    random.seed(payload)
    options = b"\x01\x01\x08\x0a" + bytes(8)
    packets = []
    for index in range(count):
        data = random.randbytes(payload)
        addresses = bytes([10, 7, 0, 1, 10, 7, 0, 2])
        head = struct.pack("!HHIIBBH", 40000, 5201, 1 + index * payload, 7, 0x80, 0x10, 512)
        length = 32 + payload
        partial = _testing.checksum(addresses + struct.pack("!HH", 6, length) + head + bytes(4) + options + data)
        transport = head + struct.pack("!HH", ~partial & 0xFFFF, 0) + options + data
        ip = struct.pack("!BBHHHBB", 0x45, 0, 20 + length, index, 0x4000, 64, 6)
        checksum = ~_testing.checksum(ip + addresses) & 0xFFFF
        packets.append(ip + struct.pack("!H", checksum) + addresses + transport)
    return packets


@pytest.mark.parametrize("length", LENGTHS)
def test_memcpy(benchmark: Any, length: int) -> None:
    measure(benchmark, lambda: _testing.repeat_memcpy(bytes(length), TIMES))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", _testing.checksum_variants())
def test_checksum(benchmark: Any, variant: str, length: int) -> None:
    measure(benchmark, lambda: _testing.repeat_checksum(bytes(length), TIMES, variant))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", _testing.checksum_variants())
def test_copy_and_checksum(benchmark: Any, variant: str, length: int) -> None:
    measure(benchmark, lambda: _testing.repeat_checksum(bytes(length), TIMES, variant, copy=True))


@pytest.mark.parametrize("packets", [1, 2, 46])
def test_split(benchmark: Any, packets: int) -> None:
    """A TSO frame of packets with 1368 bytes of payload each."""
    ((header, frame),) = _testing.join(tcp_packets(packets, 1368))
    if packets == 1:
        header = struct.pack("=BBHHHH", 0, 0, 0, 0, 0, 0)
    assert measure(benchmark, lambda: _testing.repeat_split(header, frame, TIMES), packets) == packets * TIMES


@pytest.mark.parametrize(("packets", "payload"), [(1, 1368), (2, 1368), (46, 1368), (64, 64), (1, 12)])
def test_join(benchmark: Any, packets: int, payload: int) -> None:
    burst = tcp_packets(packets, payload)
    assert measure(benchmark, lambda: _testing.repeat_join(burst, TIMES), packets) == 1
