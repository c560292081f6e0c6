"""What a datagram is, and what of it comes out: a running tunnel against a slow twin, over any bytes."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.netns import wait_until
from support.tunnels import COOKIE, Client, Pipe, assert_balanced, bind_udp, checksum, ip_packet, pi, stun_request

from fasttun import Forwarder

MTU = 1500
RECEIVE_MAX = 2048  # bytes of a receive slot without UDP_GRO, at this MTU
READ_MAX = 2048 - 128  # bytes of a slot for a packet from the TUN


# ---------------------------------------------------------------------------------------- the twin


def well_formed(packet: bytes) -> int:
    """4 or 6 when it is one whole packet: RFC 791 §3.1 with its checksum, RFC 8200 §3; else 0."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        header = (packet[0] & 15) * 4
        if header < 20 or header > len(packet) or int.from_bytes(packet[2:4], "big") != len(packet):
            return 0
        return 4 if checksum(packet[:header]) == 0 else 0
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        return 6 if 40 + int.from_bytes(packet[4:6], "big") == len(packet) else 0
    return 0


def is_host(source: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether one host can have it: docs/design.md, "Peer learning", 1."""
    if source.version == 4:
        first = source.packed[0]
        return first not in (0, 127) and first < 224
    return not (source.is_multicast or source.is_unspecified or source.is_loopback
                or source.ipv4_mapped is not None or (source.packed[:12] == bytes(12)))


@dataclass(frozen=True)
class Fate:
    """What becomes of a datagram that a listener gets from its only client."""

    kind: str
    """delivered, malformed, martian, oversized, or control: then it is no packet and is not counted."""
    packet: bytes = b""


def fate(datagram: bytes) -> Fate:
    if len(datagram) > RECEIVE_MAX:
        return Fate("oversized")
    packet = datagram
    if len(datagram) < 20:
        return Fate("malformed")
    if datagram[0] >> 4 not in (4, 6):
        if datagram[:4] in (b"\0\0\x08\0", b"\0\0\x86\xdd"):
            packet = datagram[4:]
        elif datagram[0] <= 1 and datagram[4:8] == COOKIE:
            return Fate("control")
        else:
            return Fate("malformed")
    version = well_formed(packet)
    if not version:
        return Fate("malformed")
    raw = packet[12:16] if version == 4 else packet[8:24]
    return Fate("delivered", packet) if is_host(ipaddress.ip_address(raw)) else Fate("martian")


# ------------------------------------------------------------------------------------- what is sent

addresses4 = st.one_of(
    st.sampled_from(["10.7.0.2", "0.0.0.0", "0.1.2.3", "127.0.0.1", "223.255.255.255", "224.0.0.1", "255.255.255.255",
                     "126.0.0.1", "128.0.0.1", "1.0.0.0"]).map(ipaddress.ip_address),
    st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address))
addresses6 = st.one_of(
    st.sampled_from(["fd07::2", "::", "::1", "::2", "::10.7.0.2", "::ffff:10.7.0.2", "::fffe:10.7.0.2", "ff02::1",
                     "fe80::1", "64:ff9b::10.7.0.2", "0:0:0:1::", "::1:0:0", "::8000:0:1"]).map(ipaddress.ip_address),
    st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address))


@st.composite
def packets4(draw: st.DrawFn) -> bytes:
    options = draw(st.binary(max_size=40).map(lambda data: data[: len(data) // 4 * 4]))
    payload = draw(st.binary(max_size=64)) + bytes(draw(st.sampled_from([0, 0, 0, 500, 1300])))
    header = bytearray(struct.pack(
        "!BBHHHBBH", 0x45 + len(options) // 4, draw(st.integers(0, 255)), 20 + len(options) + len(payload),
        draw(st.integers(0, 65535)), draw(st.integers(0, 65535)), draw(st.integers(0, 255)),
        draw(st.integers(0, 255)), 0))
    header += draw(addresses4).packed + ipaddress.ip_address("10.7.0.1").packed + options
    header[10:12] = struct.pack("!H", checksum(bytes(header)))
    return bytes(header) + payload


@st.composite
def packets6(draw: st.DrawFn) -> bytes:
    payload = draw(st.binary(max_size=64)) + bytes(draw(st.sampled_from([0, 0, 0, 500, 1300])))
    return struct.pack("!IHBB", 6 << 28 | draw(st.integers(0, 2**28 - 1)), len(payload), draw(st.integers(0, 255)),
                       draw(st.integers(0, 255))) + draw(addresses6).packed + ipaddress.ip_address("fd07::1").packed \
        + payload


packets = st.one_of(packets4(), packets6())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good packet with something wrong: a flipped bit, cut, longer, or with the other kind's EtherType."""
    packet = draw(packets)
    datagram = bytearray(draw(st.sampled_from([packet, pi(packet), b"\0\0\x86\xdd" + packet, b"\0\0\x08\0" + packet])))
    what = draw(st.integers(0, 3))
    if what == 0:
        bit = draw(st.integers(0, min(len(datagram), 48) * 8 - 1))
        datagram[bit // 8] ^= 1 << bit % 8
    elif what == 1:
        del datagram[draw(st.integers(0, len(datagram))):]
    elif what == 2:
        datagram += draw(st.binary(min_size=1, max_size=8))
    return bytes(datagram)


stun_like = st.builds(
    lambda head, cookie, rest: head + cookie + rest,
    st.sampled_from([b"\0\1\0\0", b"\1\1\0\0", b"\1\1\0\x0c", b"\0\1\0\4", b"\0\2\0\0", b"\1\x11\0\0", b"\2\1\0\0"]),
    st.sampled_from([COOKIE, b"\0\0\0\0", COOKIE[:3] + b"\0"]), st.binary(max_size=60))

datagrams = st.one_of(
    packets, packets.map(pi), damaged(), stun_like, st.binary(max_size=80),
    st.binary(max_size=60).map(lambda data: b"\0\0\x08\0" + data),
    st.integers(2047, 2060).map(lambda size: ip_packet("10.7.0.2", "10.7.0.1", bytes(size - 20))))


# ------------------------------------------------------------------------------------------ inbound


@dataclass
class Rig:
    """A running listener with nothing between it and the test."""

    pipe: Pipe
    peer: Client
    tunnel: Forwarder
    in_before: int = 0
    out_before: int = 0

    def handle(self, sent: list[bytes]) -> tuple[list[bytes], Counter[str]]:
        """The packets that came out of these datagrams, and how many were dropped for which reason."""
        before = self.tunnel.stats().inbound
        self.peer.sock.setblocking(False)
        for datagram in sent:
            self.peer.send(datagram)
        # One packet more that nobody can mistake: what came before it has been dealt with.
        end = ip_packet("10.7.0.2", "10.7.0.1", b"the end of this example" + len(sent).to_bytes(2, "big"))
        self.peer.send(end)
        out = []
        while (packet := self.pipe.receive()) != end:
            out.append(packet)
        wait_until(lambda: balanced(self.tunnel), interval=0.0005)
        after = self.tunnel.stats().inbound
        drops = Counter({reason: after.drops[reason] - before.drops[reason] for reason in after.drops})
        assert after.packets_out - before.packets_out == len(out) + 1
        return out, +drops


def balanced(tunnel: Forwarder) -> bool:
    stats = tunnel.stats()
    return all(d.packets_in == d.packets_out + d.dropped for d in (stats.inbound, stats.outbound))


@contextlib.contextmanager
def rigged(**fields: object) -> Iterator[Rig]:
    with Pipe.make() as pipe, bind_udp() as udp, Client(udp.getsockname()) as peer:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        with Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), mtu=MTU, **fields) as tunnel:  # type: ignore[arg-type]
            yield Rig(pipe, peer, tunnel)
        assert_balanced(tunnel.stats())


@pytest.fixture(scope="module", params=["batch", "one by one"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with rigged(udp_gro=False, batch=request.param == "batch") as rig:
        yield rig


@pytest.fixture(scope="module")
def gro_rig() -> Iterator[Rig]:
    with rigged(udp_gro=True) as rig:
        yield rig


@settings(max_examples=250)
@given(sent=st.lists(datagrams, max_size=12))
def test_inbound_only_whole_packets_come_out_bit_for_bit(rig, sent):
    fates = [fate(datagram) for datagram in sent]
    # A table of 8,192 addresses and 1,024 of one peer: an example at a time cannot fill it, all of them could.
    out, drops = rig.handle(sent)
    wanted = [one.packet for one in fates if one.kind == "delivered"]
    if drops.pop("table_full", 0):
        assert Counter(out) <= Counter(wanted)
    else:
        assert out == wanted
        assert drops == +Counter(one.kind for one in fates if one.kind in ("malformed", "martian", "oversized"))


@settings(max_examples=100)
@given(one=packets, count=st.integers(1, 30), last=packets)
def test_inbound_datagrams_that_the_kernel_joins_are_parted_again(gro_rig, one, count, last):
    """UDP_GRO hands over runs of equal size in one buffer; a shorter one may end the run."""
    sent = [one] * count + [last]
    out, _ = gro_rig.handle(sent)
    wanted = [datagram for datagram in sent if fate(datagram).kind == "delivered"]
    assert out == wanted or len(gro_rig.tunnel.peers[0].addresses) >= 1024


@settings(max_examples=200)
@given(noise=st.lists(st.binary(max_size=300), max_size=10))
def test_inbound_noise_does_no_harm(rig, noise):
    out, _ = rig.handle(noise)
    assert all(well_formed(packet) for packet in out)


# ----------------------------------------------------------------------------------------- outbound


@settings(max_examples=250)
# An empty message is the end of a SOCK_SEQPACKET socket to whoever reads it, and is left out.
@given(frames=st.lists(st.one_of(packets, damaged().filter(len), st.binary(min_size=1, max_size=80),
                                 st.integers(1918, 1925).map(
                                     lambda size: ip_packet("10.7.0.1", "10.7.0.2", bytes(size - 20)))),
                       max_size=12),
       as_pi=st.booleans())
def test_outbound_only_whole_packets_go_out_bit_for_bit(frames, as_pi, pi_rig, raw_rig):
    rig = pi_rig if as_pi else raw_rig
    end = ip_packet("10.7.0.1", "10.7.0.2", b"the end of this example")
    before = rig.tunnel.stats().outbound
    for frame in [*frames, end]:
        rig.pipe.send(frame)
    out = []
    framed = pi if as_pi else bytes
    while (datagram := rig.peer.receive()) != framed(end):
        out.append(datagram)
    wanted = [frame for frame in frames if len(frame) <= READ_MAX and well_formed(frame)]
    assert out == [framed(frame) for frame in wanted]
    wait_until(lambda: balanced(rig.tunnel), interval=0.0005)
    after = rig.tunnel.stats().outbound
    assert after.packets_in - before.packets_in == len(frames) + 1
    assert after.drops["malformed"] - before.drops["malformed"] == len(frames) - len(wanted)


@pytest.fixture(scope="module")
def pi_rig() -> Iterator[Rig]:
    with rigged(framing="pi") as rig:
        rig.peer.send(pi(ip_packet("10.7.0.2", "10.7.0.1")))
        rig.pipe.receive()
        yield rig


@pytest.fixture(scope="module")
def raw_rig() -> Iterator[Rig]:
    with rigged(framing="raw", udp_gso=False) as rig:
        rig.peer.send(ip_packet("10.7.0.2", "10.7.0.1"))
        rig.pipe.receive()
        yield rig


# --------------------------------------------------------------------------------------------- STUN


def mapped_address(response: bytes) -> tuple[str, int]:
    """A reader of XOR-MAPPED-ADDRESS from the text of RFC 8489 §14.2 alone."""
    at = 20
    while at < len(response):
        kind, size = struct.unpack_from("!HH", response, at)
        if kind == 0x0020:
            family, port = struct.unpack_from("!xBH", response, at + 4)
            raw = response[at + 8:at + 4 + size]
            mask = response[4:20]
            host = ipaddress.ip_address(bytes(a ^ b for a, b in zip(raw, mask, strict=False)))
            assert host.version == {1: 4, 2: 6}[family]
            return str(host), port ^ 0x2112
        at += 4 + (size + 3) // 4 * 4
    raise AssertionError("no XOR-MAPPED-ADDRESS")


RFC5769_TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")
RFC5769_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74002400046e0001ff"
    "80290008932ff9b151263b36000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249"
    "c1b571a280280004e57a3bcf")
"""RFC 5769 §2.1: a Binding request with SOFTWARE, PRIORITY, USERNAME, MESSAGE-INTEGRITY and FINGERPRINT."""
RFC5769_IPV4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96")
"""RFC 5769 §2.2: the IPv4 response, 192.0.2.1 port 32853."""
RFC5769_IPV6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179"
    "bc25f4b5bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c")
"""RFC 5769 §2.3: the IPv6 response, 2001:db8:1234:5678:11:2233:4455:6677 port 32853."""


def test_the_reader_reads_the_vectors_of_the_rfc():
    assert mapped_address(RFC5769_IPV4) == ("192.0.2.1", 32853)
    assert mapped_address(RFC5769_IPV6) == ("2001:db8:1234:5678:11:2233:4455:6677", 32853)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("outer", ["own family", "dual"])
def test_a_request_is_answered_with_the_senders_address(host, outer):
    with Pipe.make() as pipe, contextlib.ExitStack() as stack:
        if outer == "dual":
            udp = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
            udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            udp.bind(("::", 0))
        else:
            udp = stack.enter_context(bind_udp(host))
        with Client((host, udp.getsockname()[1]), bind_udp(host)) as peer, \
                Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno()):
            for request in (stun_request(bytes(range(12))), RFC5769_REQUEST):
                peer.send(request)
                response = peer.receive()
                assert response[:2] == b"\1\1"
                assert int.from_bytes(response[2:4], "big") == len(response) - 20 == (12 if host == "127.0.0.1" else 24)
                assert response[4:20] == request[4:20]
                assert mapped_address(response) == (host, peer.port)
            assert pipe.silent()


@pytest.mark.parametrize("request_", [
    stun_request()[:-1], stun_request() + b"\0\0\0\0", b"\0\1\0\4" + stun_request()[4:],
    b"\0\1\0\2" + stun_request()[4:] + b"xx", b"\0\2\0\0" + stun_request()[4:], b"\0\x11\0\0" + stun_request()[4:],
    b"\1\1\0\0" + stun_request()[4:], b"\0\1\0\0\0\0\0\0" + stun_request()[8:]])
def test_what_is_no_request_gets_no_answer(request_, rig):
    rig.peer.send(request_)
    rig.handle([])
    assert rig.peer.silent(0.02)


def test_the_vectors_of_the_rfc_are_taken_as_answers():
    """Attributes before the address, and padding, as in RFC 5769; the client is told how it is seen."""
    with Pipe.make() as pipe, Client(("127.0.0.1", 9)) as server, \
            Forwarder(server="127.0.0.1", port=server.port, tun_fd=pipe.fd) as tunnel:
        for vector in (RFC5769_IPV4, RFC5769_IPV6):
            request = server.receive()
            server.to = ("127.0.0.1", tunnel.local_port)
            # The transaction is ours; what it masks of the IPv6 address changes with it.
            server.send(vector[:8] + request[8:20] + vector[20:])
            tunnel.wait_peer(5)
            assert tunnel.peers[0].framing == "raw"
            break
        assert tunnel.stats().inbound.packets_in == 0


@settings(max_examples=100)
@given(body=st.binary(max_size=120))
def test_any_body_of_an_answer_does_no_harm(client_rig, body):
    server, pipe, tunnel = client_rig
    body = body[: len(body) // 4 * 4]
    for kind in (b"\1\1", b"\0\1"):
        server.send(kind + len(body).to_bytes(2, "big") + COOKIE + b"transaction!" + body)
    server.send(ip_packet("10.7.0.1", "10.7.0.2", body))
    assert pipe.receive() == ip_packet("10.7.0.1", "10.7.0.2", body)
    assert tunnel.running


@pytest.fixture(scope="module")
def client_rig() -> Iterator[tuple[Client, Pipe, Forwarder]]:
    with Pipe.make() as pipe, Client(("127.0.0.1", 9)) as server, \
            Forwarder(server="127.0.0.1", port=server.port, tun_fd=pipe.fd) as tunnel:
        server.to = ("127.0.0.1", tunnel.local_port)
        yield server, pipe, tunnel


def test_a_flood_of_requests_is_answered_a_thousand_times_a_second():
    """The bucket holds 1,000 and gains 1,000 a second; without a limit 6,000 answers would come."""
    with Pipe.make() as pipe, bind_udp() as udp, Client(udp.getsockname()) as peer:
        for sock in (udp, peer.sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        with Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno()) as tunnel:
            start = time.monotonic()
            answers = 0
            peer.sock.setblocking(False)
            for _ in range(60):
                for _ in range(100):
                    peer.send(stun_request())
                time.sleep(0.002)
                answers += drain(peer)
            time.sleep(0.05)
            answers += drain(peer)
            took = time.monotonic() - start
            assert answers <= 1000 + 1000 * took + 20
            if took < 2:
                assert answers >= 900, "the first thousand are answered"
            time.sleep(0.1)
            peer.send(stun_request())
            assert peer.receive()[:2] == b"\1\1", "and it recovers"
            peer.send(ip_packet("10.7.0.2", "10.7.0.1"))
            assert pipe.receive()
            assert tunnel.running


def drain(peer: Client) -> int:
    count = 0
    peer.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while peer.sock.recv(100):
            count += 1
    return count
