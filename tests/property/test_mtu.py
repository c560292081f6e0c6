"""MTU arithmetic against a twin that builds the datagram with scapy and measures it."""

from __future__ import annotations

import logging

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fasttun.mtu import inner_mtu, overhead

logging.getLogger("scapy").setLevel(logging.ERROR)
scapy = pytest.importorskip("scapy.all")

OUTER = st.sampled_from([4, 6])
FRAMING = st.sampled_from(["raw", "pi"])


def datagram_length(inner_length: int, outer_version: int, framing: str) -> int:
    """Bytes on the wire, counted. OverflowError or struct.error when a length field cannot hold it."""
    information = b"\0\0\x08\0" if framing == "pi" else b""
    outer = scapy.IP() if outer_version == 4 else scapy.IPv6()
    packet = bytes(outer / scapy.UDP(sport=1234, dport=1234) / (information + bytes(inner_length)))
    # What the receiver will believe: the length fields, not the buffer.
    if outer_version == 4:
        assert int.from_bytes(packet[2:4], "big") == len(packet)
    else:
        assert 40 + int.from_bytes(packet[4:6], "big") == len(packet)
    return len(packet)


def fits(inner_length: int, path_mtu: int, outer_version: int, framing: str) -> bool:
    try:
        return datagram_length(inner_length, outer_version, framing) <= path_mtu
    except Exception:
        return False


@given(st.integers(0, 4000), OUTER, FRAMING)
def test_overhead_is_what_the_headers_add(length: int, outer_version: int, framing: str) -> None:
    assert datagram_length(length, outer_version, framing) == length + overhead(outer_version, framing)


@given(st.integers(68, 70000), OUTER, FRAMING)
@example(1500, 4, "raw")
@example(1500, 6, "pi")
@example(65535, 4, "raw")
@example(65536, 4, "raw")
@example(65575, 6, "raw")
@example(65576, 6, "raw")
def test_the_inner_mtu_fits_and_one_byte_more_does_not(path_mtu: int, outer_version: int, framing: str) -> None:
    largest = inner_mtu(path_mtu, outer_version, framing)
    assert fits(largest, path_mtu, outer_version, framing)
    assert not fits(largest + 1, path_mtu, outer_version, framing)
