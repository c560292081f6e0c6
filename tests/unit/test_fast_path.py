"""The fast path without a kernel: machine code, the maps' values, what the configuration refuses, giving up."""

from __future__ import annotations

import errno
import struct
import sys
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from support.tunnels import checksum

from fasttun import ConfigurationError, Forwarder
from fasttun.config import TunnelConfig
from fasttun.fastpath import bpf, programs
from fasttun.fastpath.assembler import Assembler, Register

little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="bytes as on a little-endian machine")
R = [Register(number) for number in range(11)]


def code(*calls: tuple[Any, ...]) -> str:
    a = Assembler()
    for name, *arguments in calls:
        getattr(a, name)(*arguments)
    return a.code().hex(" ", 8)


# The expected bytes are those of RFC 9669's tables, as `llvm-mc -triple bpfel -show-encoding` prints them.
@little_endian
@pytest.mark.parametrize(("call", "expected"), [
    (("mov", R[1], 7), "b701000007000000"),
    (("mov", R[6], R[1]), "bf16000000000000"),
    (("do", "add", R[2], -16), "07020000f0ffffff"),
    (("do", "div", R[1], R[5]), "3f51000000000000"),
    (("do", "rsh", R[4], 4), "7704000004000000"),
    (("do", "xor", R[4], 0xFFFF), "a7040000ffff0000"),
    (("big_endian", R[1], 16), "dc01000010000000"),
    (("load", 1, R[5], R[2], 9), "7125090000000000"),
    (("load", 2, R[5], R[2], 9), "6925090000000000"),
    (("load", 4, R[5], R[2], 9), "6125090000000000"),
    (("load", 8, R[5], R[2], 9), "7925090000000000"),
    (("store", 4, R[10], -20, R[1]), "631aecff00000000"),
    (("store", 8, R[10], -16, 0), "7a0af0ff00000000"),
    (("map", R[1], 5), "1811000005000000 0000000000000000"),
    (("call", 50), "8500000032000000"),
    (("exit",), "9500000000000000"),
])
def test_instructions(call: tuple[Any, ...], expected: str) -> None:
    assert code(call) == expected


@little_endian
def test_jumps_count_instructions() -> None:
    assert code(("jump_if", R[1], "!=", 6, "end"), ("jump", "end"), ("map", R[1], 3), ("label", "end"),
                ("jump_if", R[1], ">", R[3], "last"), ("label", "last"), ("exit",)) == (
        "5501030006000000 0500020000000000 1811000003000000 0000000000000000 2d31000000000000 9500000000000000")


def test_labels_are_found_once_and_ahead() -> None:
    a = Assembler()
    a.label("here")
    with pytest.raises(ValueError, match="twice"):
        a.label("here")
    a.jump("here")
    with pytest.raises(ValueError, match="goes back"):
        a.code()
    a = Assembler()
    a.jump("nowhere")
    with pytest.raises(ValueError, match="no label"):
        a.code()
    with pytest.raises(ValueError, match="32 bits"):
        a.mov(R[1], 1 << 32)


def test_the_headers_of_a_way() -> None:
    """The outbound program adds the length to the sum and stores it: what must come out is a valid header."""
    way = programs.Way(5, 3, IPv4Address("198.51.100.7"), 1234, IPv4Address("203.0.113.9"), 40000)
    slot, interface, headers, total = struct.unpack("=II28sI", way.target())
    assert (slot, interface) == (5, 3)
    for length in (20, 1472, 65507):
        total_length = struct.unpack("=H", struct.pack("!H", length + 28))[0]
        folded = total + total_length
        folded = (folded & 0xFFFF) + (folded >> 16)
        folded = (folded & 0xFFFF) + (folded >> 16)
        header = bytearray(headers[:20])
        header[2:4] = struct.pack("!H", length + 28)
        header[10:12] = struct.pack("=H", folded ^ 0xFFFF)
        assert checksum(bytes(header)) == 0
    assert headers[0] == 0x45
    assert headers[9] == 17
    assert headers[12:20] == way.local.packed + way.remote.packed
    assert struct.unpack("!HHHH", headers[20:]) == (1234, 40000, 0, 0)
    assert way.source() == struct.pack("=I", 5) + way.remote.packed + way.local.packed + b"\x9c\x40\0\0"


def test_keys_are_those_of_the_peer_table() -> None:
    assert programs.key_of(IPv4Address("10.7.0.1")) == IPv6Address("::ffff:10.7.0.1").packed
    assert programs.key_of(IPv6Address("fd07::1")) == IPv6Address("fd07::1").packed
    assert len(programs.ANY) == programs.KEY_SIZE


@pytest.mark.parametrize(("fields", "words"), [
    ({"udp_fd": 3}, "descriptors"), ({"tun_fd": 3, "listen": True}, "descriptors"),
    ({"listen": True, "framing": "pi"}, "packet information"),
])
def test_what_it_cannot_be_combined_with(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        TunnelConfig(fast_path=True, **fields)  # type: ignore[arg-type]
    assert caught.value.field == "fast_path"


def test_encrypted_tunnels_refuse_it() -> None:
    from fasttun.cli.encrypted import factory

    with pytest.raises(ConfigurationError) as caught:
        factory(TunnelConfig(listen=True, fast_path=True), "key", ["peer"])
    assert caught.value.field == "fast_path"


@pytest.mark.netns
@pytest.mark.parametrize(("code", "words"), [
    (errno.EPERM, "CAP_BPF"), (errno.EINVAL, "Linux 6.6"), (errno.ENOSYS, "Linux 6.6"),
])
def test_a_kernel_without_it_costs_nothing_but_the_fast_path(
    lab: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, words: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, "refused")

    monkeypatch.setattr(bpf, "attach", refuse)
    with lab.namespace().enter(), Forwarder(listen=True, address="10.7.0.1/24", fast_path=True) as tunnel:  # type: ignore[attr-defined]
        found = tunnel.stats().offloads["fast-path"]
        assert found.startswith("off: ")
        assert words in found
        assert tunnel.running
    assert [record.levelname for record in caplog.records if "no fast path" in record.message] == ["WARNING"]
