"""The filter of `fasttun capture`: the loop's verdict against slow twins, and against libpcap's where tcpdump is."""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.netns import wait_until
from support.tunnels import Pipe, bind_udp, checksum, ip_packet

from fasttun._core import Engine, PeerTable
from fasttun.errors import ConfigurationError
from fasttun.observe.filter import compile_filter
from fasttun.observe.handshakes import matches

V4 = ["10.7.0.1", "10.7.0.2", "10.7.1.1", "192.168.5.9", "0.0.0.0", "255.255.255.255"]
V6 = ["fd07::1", "fd07::2", "fd08::1", "::", "::ffff:10.7.0.1"]
NET4 = ["10.7.0.0/24", "10.7.0.0/31", "10.0.0.0/9", "0.0.0.0/0"]
NET6 = ["fd07::/16", "fd07::/127", "fc00::/7", "::/0", "::ffff:0:0/96"]
PORTS = [0, 53, 80, 443, 65535]
PROTOCOLS = [1, 6, 17, 33, 44, 47, 58, 132, 136, 253]


class Loop:
    """A running engine whose every outbound packet has nowhere to go; `verdicts` are what its filter takes."""

    def __init__(self) -> None:
        self.pipe, self.sock = Pipe.make(), bind_udp()
        self.engine = Engine(PeerTable(), tun_fd=self.pipe.fd, udp_fd=self.sock.fileno(), mtu=1500)
        self._thread = threading.Thread(target=self.engine.run)
        self._thread.start()

    def close(self) -> None:
        self.engine.stop()
        self._thread.join(10)
        self.pipe.close()
        self.sock.close()

    def _done(self) -> int:
        """Packets that were dropped, which they are after the filter has seen them."""
        return sum(self.engine.counters()["outbound"]["drops"].values())

    def verdicts(self, clauses: Any, packets: list[bytes]) -> list[bool]:
        before = self._done()
        self.engine.capture_start(clauses=clauses)
        for packet in packets:
            self.pipe.send(packet)
        wait_until(lambda: self._done() == before + len(packets), interval=0.0005)
        self.engine.capture_stop()
        taken = [data for _, _, _, _, data in self.engine.capture_read()[0]]
        found = []
        for packet in packets:
            found.append(bool(taken) and taken[0] == packet)
            if found[-1]:
                taken.pop(0)
        assert taken == []
        return found


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with contextlib.closing(Loop()) as loop:
        yield loop


# --------------------------------------------------------------------------------------- the twin in Python


@dataclass(frozen=True)
class Primitive:
    """One term as it was drawn, which the twin judges without its text."""

    negated: bool
    version: int
    protocol: int
    side: str
    kind: str
    value: str

    @property
    def text(self) -> str:
        first = {4: "ip", 6: "ip6"}.get(self.version) or \
            {6: "tcp", 17: "udp", 1: "icmp", 58: "icmp6"}.get(self.protocol) or \
            (f"proto {self.protocol}" if self.protocol >= 0 else "")
        rest = f"{self.side} {self.kind} {self.value}" if self.kind else ""
        return " ".join(f"{'not' if self.negated else ''} {first} {rest}".split())

    def judge(self, packet: bytes) -> bool:
        return self._holds(packet) != self.negated

    def _holds(self, packet: bytes) -> bool:
        if packet[0] >> 4 == 4:
            version, protocol, transport = 4, packet[9], packet[(packet[0] & 15) * 4:]
            ends = {"src": ipaddress.ip_address(packet[12:16]), "dst": ipaddress.ip_address(packet[16:20])}
            first = struct.unpack("!H", packet[6:8])[0] % 8192 == 0
        else:
            version, protocol, transport = 6, packet[6], packet[40:]
            ends = {"src": ipaddress.ip_address(packet[8:24]), "dst": ipaddress.ip_address(packet[24:40])}
            first = True
        if self.version not in (0, version) or self.protocol not in (-1, protocol):
            return False
        asked = [self.side] if self.side else ["src", "dst"]
        if self.kind in ("host", "net"):
            network = ipaddress.ip_network(self.value)
            return any(ends[side].version == network.version and ends[side] in network for side in asked)
        if self.kind == "port":
            if not first or protocol not in (6, 17, 33, 132, 136) or len(transport) < 4:
                return False
            ports = dict(zip(("src", "dst"), struct.unpack("!HH", transport[:4]), strict=True))
            return any(ports[side] == int(self.value) for side in asked)
        return True


@st.composite
def primitives(draw: st.DrawFn) -> Primitive:
    first = draw(st.sampled_from(["", "version", "protocol"]))
    kind = draw(st.sampled_from(["", "host", "net", "port"] if first else ["host", "net", "port"]))
    version = draw(st.sampled_from([4, 6])) if first == "version" else 0
    value = ""
    if kind == "host":
        value = draw(st.sampled_from({0: V4 + V6, 4: V4, 6: V6}[version]))
    elif kind == "net":
        value = draw(st.sampled_from({0: NET4 + NET6, 4: NET4, 6: NET6}[version]))
    elif kind == "port":
        value = str(draw(st.sampled_from(PORTS)))
    return Primitive(
        negated=draw(st.booleans()), version=version,
        protocol=draw(st.sampled_from(PROTOCOLS)) if first == "protocol" else -1,
        side=draw(st.sampled_from(["", "src", "dst"])) if kind else "", kind=kind, value=value)


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """A packet that the loop takes: any options, fragment, and as short as its header allows."""
    version = draw(st.sampled_from([4, 6]))
    ends = [draw(st.sampled_from(V4 if version == 4 else V6)) for _ in range(2)]
    body = struct.pack("!HH", *(draw(st.sampled_from(PORTS)) for _ in range(2))) + bytes(16)
    protocol = draw(st.sampled_from(PROTOCOLS))
    body = body[:draw(st.sampled_from([0, 3, 4, 20]))]
    if version == 6:
        return ip_packet(*ends, body, protocol=protocol)
    flags = draw(st.sampled_from([0, 0, 0x4000, 0x2000, 0x2001, 0x1fff, 0x00b9]))
    packet = bytearray(ip_packet(*ends, body, protocol=protocol, flags=flags))
    if draw(st.booleans()):  # four bytes of options
        packet[0] = 0x46
        packet[2:4] = struct.pack("!H", len(packet) + 4)
        packet[10:12] = bytes(2)
        packet[20:20] = b"\1\1\1\1"
        packet[10:12] = struct.pack("!H", checksum(bytes(packet[:24])))
    return bytes(packet)


@settings(max_examples=150)
@given(st.lists(st.lists(primitives(), min_size=1, max_size=4), min_size=1, max_size=4),
       st.lists(packets(), min_size=1, max_size=12))
def test_the_loop_decides_as_the_twin(loop: Loop, expression: list[list[Primitive]], given_: list[bytes]) -> None:
    text = " or ".join(" and ".join(primitive.text for primitive in terms) for terms in expression)
    expected = [any(all(primitive.judge(packet) for primitive in terms) for terms in expression) for packet in given_]
    clauses = compile_filter(text)
    assert loop.verdicts(clauses, given_) == expected, text
    assert [matches(clauses, packet) for packet in given_] == expected, text


@given(st.binary(max_size=60), st.lists(primitives(), min_size=1, max_size=3))
def test_anything_can_be_asked_about_any_bytes(packet: bytes, terms: list[Primitive]) -> None:
    """Of less than a header nothing holds, and so all that is denied does."""
    verdict = matches(compile_filter(" and ".join(term.text for term in terms)), packet)
    if len(packet) < 20:
        assert verdict == all(term.negated for term in terms)


# ------------------------------------------------------------------------------------------ libpcap's verdict


def corpus() -> list[bytes]:
    found = []
    for ends in (("10.7.0.1", "10.7.0.2"), ("10.7.0.2", "192.168.5.9"), ("fd07::1", "fd07::2"), ("fd08::1", "fd07::1")):
        for protocol in (1, 6, 17, 58, 132, 253):
            if (protocol == 58) == (":" in ends[0]) or protocol not in (1, 58):
                for ports in ((80, 50000), (50000, 443), (53, 53)):
                    found.append(ip_packet(*ends, struct.pack("!HH", *ports) + bytes(16), protocol=protocol))
    for flags in (0x2000, 0x2001, 0x00b9):
        found.append(ip_packet("10.7.0.1", "10.7.0.2", struct.pack("!HH", 80, 80) + bytes(16), protocol=6, flags=flags))
    return found


@pytest.mark.parametrize("expression", [
    "tcp", "udp port 53", "not tcp", "icmp or icmp6", "ip6", "ip and not host 10.7.0.1", "src host 10.7.0.1",
    "dst net 10.7.0.0/24 and tcp", "tcp port 80", "not tcp port 80", "tcp port 80 or udp port 443",
    "net fd07::/16 and not port 443", "proto 132", "src port 50000 and not udp", "net 0.0.0.0/0", "net ::/0",
    "host fd07::1 and tcp dst port 443", "not not udp",
])
def test_libpcap_agrees(loop: Loop, tmp_path: Path, expression: str) -> None:
    tcpdump = shutil.which("tcpdump")
    if tcpdump is None:
        pytest.skip("needs tcpdump (apt install tcpdump)")
    given_ = corpus()
    path = tmp_path / "corpus.pcap"
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101) + b"".join(
        struct.pack("<IIII", number, 0, len(packet), len(packet)) + packet for number, packet in enumerate(given_)))
    done = subprocess.run([tcpdump, "-r", str(path), "-w", "-", "--", expression], capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr
    chosen, at = set(), 24
    while at < len(done.stdout):
        number, _, length, _ = struct.unpack_from("<IIII", done.stdout, at)
        chosen.add(number)
        at += 16 + length
    expected = [number in chosen for number in range(len(given_))]
    assert loop.verdicts(compile_filter(expression), given_) == expected
    assert True in expected
    assert False in expected


# ------------------------------------------------------------------------------------------------ bad filters


@pytest.mark.parametrize(("text", "problem"), [
    ("or tcp", "before or after 'or'"), ("tcp and", "before or after 'and'"), ("not", "after 'not'"),
    ("host", "after 'host'"), ("host 10.7.0.0/24", "say net"), ("host example", "not an address"),
    ("port 65536", "up to 65535"), ("port http", "not a number"), ("proto 256", "up to 255"),
    ("src 10.7.0.1", "stand before"), ("(tcp)", "not known"), ("tcp udp", "not known"), ("net 10.7.0.0/33", "address"),
    ("ip host fd07::1", "not of IPv4"), ("ip6 net 10.7.0.0/24", "not of IPv6"),
])
def test_bad_filters_are_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as caught:
        compile_filter(text)
    assert caught.value.field == "filter"
    assert caught.value.hint


def test_too_many_terms_are_refused(loop: Loop) -> None:
    with pytest.raises(ConfigurationError, match="65 terms"):
        loop.engine.capture_start(clauses=compile_filter(" and ".join(["tcp"] * 65)))
    loop.engine.capture_start(clauses=compile_filter(" and ".join(["tcp"] * 64)))
    loop.engine.capture_stop()


def test_no_terms_take_everything(loop: Loop) -> None:
    assert all(loop.verdicts(compile_filter(""), corpus()))
