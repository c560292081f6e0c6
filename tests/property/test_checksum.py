"""The checksum in each of its variants, against RFC 1071 word by word."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import twins

from fasttun import _testing

VARIANTS = _testing.checksum_variants()
DATA = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda n, seed: random.Random(seed).randbytes(n), st.integers(0, 3000), st.integers(0, 1 << 20)
    ),
    st.builds(
        lambda n, byte: bytes([byte]) * n, st.integers(0, 3000), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])
    ),
)


def test_best_variant_is_in_use_and_scalar_is_always_there() -> None:
    assert _testing.checksum_variant() == VARIANTS[0]
    assert "scalar" in VARIANTS
    with pytest.raises(ValueError, match="no such"):
        _testing.checksum(b"", "such")


@pytest.mark.parametrize("variant", VARIANTS)
def test_rfc_1071_example(variant: str) -> None:
    assert _testing.checksum(bytes.fromhex("0001f203f4f5f6f7"), variant) == 0xDDF2


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=150)
@given(data=DATA, misalignment=st.integers(0, 15))
def test_sum_is_the_twins(variant: str, data: bytes, misalignment: int) -> None:
    assert _testing.checksum(data, variant, misalignment=misalignment) == twins.ones_sum(data)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=150)
@given(data=DATA)
def test_fused_copy_copies_and_sums(variant: str, data: bytes) -> None:
    assert _testing.copy_checksum(data, variant) == (data, twins.ones_sum(data))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("byte", [b"\x00", b"\x80", b"\xff"])
@pytest.mark.parametrize("length", [131071, 131072, 131073 + 128, 3 << 20])
def test_no_lane_overflows_on_long_extremes(variant: str, byte: bytes, length: int) -> None:
    words = length // 2 * int.from_bytes(byte * 2, "big") + (length % 2) * (byte[0] << 8)
    expected = (words - 1) % 65535 + 1 if words else 0
    assert _testing.checksum(byte * length, variant) == expected
    assert _testing.copy_checksum(byte * length, variant)[1] == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_length_around_the_vectors(variant: str) -> None:
    data = random.Random(1).randbytes(700)
    for length in range(len(data)):
        assert _testing.checksum(data[:length], variant) == twins.ones_sum(data[:length]), length


@settings(max_examples=150)
@given(DATA, st.integers(0, (1 << 64) - 1))
def test_initial_value_loses_no_carry(data: bytes, initial: int) -> None:
    # A sum is in memory order: its 16-bit words count as the machine would load them.
    words = initial.to_bytes(8, sys.byteorder)
    assert _testing.checksum(data, None, initial) == twins.ones_sum(words + data)


@settings(max_examples=200)
@given(
    st.sampled_from([4, 16]).flatmap(lambda n: st.tuples(*[st.binary(min_size=n, max_size=n)] * 2)),
    st.integers(0, 255),
    st.integers(0, 65535),
)
def test_pseudo_header(addresses: tuple[bytes, bytes], protocol: int, length: int) -> None:
    source, destination = addresses
    assert _testing.pseudo_header(source + destination, protocol, length) == twins.ones_sum(
        twins.pseudo_header(source, destination, protocol, length)
    )
