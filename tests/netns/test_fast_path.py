"""The fast path in real namespaces: what the kernel carries, what it leaves to the loop, and that nothing remains."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
from support.netns import Lab, Namespace, wait_until
from support.transfer import transfer
from support.tunnels import COOKIE, assert_balanced, checksum, ip_packet, pi, settled, stun_success

from fasttun import Forwarder
from fasttun.fastpath import bpf

pytestmark = pytest.mark.netns

NEAR = ("10.7.0.1/24", "fd07::1/64")
FAR = ("10.7.0.2/24", "fd07::2/64")
ATTRIBUTE = b"\xfa\x57\0\0"


@contextlib.contextmanager
def tunnel(ns: Namespace, **keywords: object) -> Iterator[Forwarder]:
    forwarder = Forwarder(fast_path=keywords.pop("fast_path", True), **keywords)  # type: ignore[arg-type]
    with ns.enter():
        forwarder.start()
    try:
        if forwarder.config.fast_path:
            assert forwarder.stats().offloads["fast-path"] == "on"
        yield forwarder
    finally:
        forwarder.stop()
    assert_balanced(forwarder.stats())


def reaches(ns: Namespace, host: str, timeout: float = 10) -> None:
    wait_until(lambda: ns.run(["ping", "-n", "-c1", "-W1", host], check=False).returncode == 0, timeout, 0.05,
               f"{ns.name} pings {host}")


def carried(forwarder: Forwarder) -> tuple[int, int]:
    """Packets that the kernel has carried, outbound and inbound."""
    forwarder.stats()
    assert forwarder._fast_path is not None
    found = forwarder._fast_path.carried
    return found.outbound[0], found.inbound[0]


def in_use(*forwarders: Forwarder) -> None:
    """Waits until each has a peer whose packets the kernel carries."""
    for forwarder in forwarders:
        fast_path = forwarder._fast_path
        assert fast_path is not None
        wait_until(lambda fast_path=fast_path: fast_path.peers, 5, what="a peer on the fast path")
        fast_path.sync()  # addresses learned this moment


@contextlib.contextmanager
def joined(
    lab: Lab, outer: str = "v4", **keywords: object
) -> Iterator[tuple[Forwarder, Forwarder, Namespace, Namespace]]:
    a, b, link = lab.pair()
    with tunnel(a, listen=True, address=NEAR, **keywords) as listener, \
            tunnel(b, server=getattr(link.a, outer), address=FAR, **keywords) as client:
        reaches(b, "10.7.0.1")
        reaches(b, "fd07::1")
        yield listener, client, a, b


@contextlib.contextmanager
def socket_peer(ns: Namespace) -> Iterator[tuple[socket.socket, list[bytes]]]:
    """A UDP socket that says it has a fast path, and the packets that it receives."""
    with ns.enter():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", 0))
    sock.settimeout(0.05)
    packets: list[bytes] = []
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                data, origin = sock.recvfrom(65536)
                if data[4:8] != COOKIE:
                    packets.append(data)
                elif data[20:] == ATTRIBUTE:
                    success = stun_success(data[8:20])
                    sock.sendto(success[:2] + b"\0\x04" + success[4:] + ATTRIBUTE, origin)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield sock, packets
    finally:
        ended.set()
        thread.join(5)
        sock.close()


def programs(ns: Namespace, device: str, kind: int) -> int:
    """How many programs are on the device."""
    with ns.enter():
        return bpf.attached(socket.if_nametoindex(device), kind)


def test_the_kernel_carries_both_families_and_every_packet_is_counted(lab: Lab) -> None:
    with joined(lab) as (listener, client, a, b):
        in_use(listener, client)
        loops = [sum(f.stats().system_calls.values()) for f in (listener, client)]
        before = carried(client)
        for host in ("10.7.0.1", "fd07::1"):
            transfer(b, a, host)
        transfer(a, b, "10.7.0.2")
        wait_until(lambda: settled(listener) and settled(client))
        outbound, inbound = (now - then for now, then in zip(carried(client), before, strict=True))
        assert outbound > 24_000
        assert inbound > 12_000
        assert [sum(f.stats().system_calls.values()) for f in (listener, client)] < [then + 400 for then in loops]
        near, far = listener.stats(), client.stats()
        assert (far.outbound.packets_out, far.outbound.bytes_out) == (near.inbound.packets_in, near.inbound.bytes_in)
        assert (near.outbound.packets_out, near.outbound.bytes_out) == (far.inbound.packets_in, far.inbound.bytes_in)
        for stats in (near, far):
            [peer] = stats.peers
            assert peer.inbound_packets == stats.inbound.packets_out
            assert peer.outbound_bytes == stats.outbound.bytes_out
            assert peer.silent_s < 2


@pytest.mark.parametrize("fast", ["listener", "client"])
def test_one_side_alone_goes_through_the_loops(lab: Lab, fast: str) -> None:
    """A peer that cannot finish what the kernel leaves to it gets no such packet."""
    a, b, link = lab.pair()
    with tunnel(a, listen=True, address=NEAR, fast_path=fast == "listener") as listener, \
            tunnel(b, server=link.a.v4, address=FAR, fast_path=fast == "client") as client:
        reaches(b, "10.7.0.1")
        transfer(b, a, "10.7.0.1")
        transfer(a, b, "fd07::2")
        assert carried(listener if fast == "listener" else client) == (0, 0)


@pytest.mark.parametrize("options", [{}, {"tun_offload": False}, {"udp_gro": False}], ids=["all", "no vnet", "no GRO"])
def test_the_loop_finishes_what_the_kernel_has_sent(lab: Lab, options: dict[str, object]) -> None:
    """One side's fast path rests, as while somebody captures: the other goes on sending frames and sums undone."""
    with joined(lab, **options) as (listener, client, a, b):
        in_use(listener, client)
        with listener.through_the_loop():
            before = carried(listener), carried(client)
            for host in ("10.7.0.1", "fd07::1"):
                transfer(b, a, host)
            udp(b, a, "10.7.0.1", 200)
            transfer(a, b, "10.7.0.2")
            assert carried(listener) == before[0]
            assert carried(client)[0] - before[1][0] > 24_000
        assert not listener.stats().inbound.dropped


def test_udp_of_every_size_and_fragments(lab: Lab) -> None:
    with joined(lab) as (listener, client, _, b):
        in_use(listener, client)
        for address, sizes in (("10.7.0.1", (0, 1, 1444, 1445, 4000, 60000)), ("fd07::1", (0, 1, 1424, 1425, 4000))):
            for payload in sizes:
                b.run(["ping", "-n", "-c1", "-W2", "-s", str(payload), address])
        assert carried(client)[0] >= 11


def test_the_datagrams_are_those_of_the_wire_format(lab: Lab) -> None:
    """A peer that is only a socket sees the packet, whole and alone, from the listener's address and port."""
    a, b, link = lab.pair()
    with tunnel(a, listen=True, address=NEAR) as listener, socket_peer(b) as (peer, packets):
        peer.sendto(ip_packet("10.7.0.9", "10.7.0.1"), (link.a.v4, listener.local_port))
        in_use(listener)
        a.run(["ping", "-n", "-c1", "-W1", "-s", "100", "-p", "5a", "10.7.0.9"], check=False)
        assert carried(listener)[0] >= 1
        [packet] = [each for each in packets if each[9] == 1 and each[20] == 8]  # the ICMP echo request
        assert len(packet) == 128 == struct.unpack_from("!H", packet, 2)[0]
        assert packet[12:20] == socket.inet_aton("10.7.0.1") + socket.inet_aton("10.7.0.9")
        assert packet[-50:] == b"\x5a" * 50


def test_what_is_not_the_peers_comes_to_the_loop(lab: Lab) -> None:
    """A stranger, a packet cut short, one with a length too many, and a datagram in fragments."""
    a, b, link = lab.pair()
    with tunnel(a, listen=True, address=NEAR) as listener, socket_peer(b) as (peer, _), socket_peer(b) as (stranger, _):
        to = (link.a.v4, listener.local_port)
        good = ip_packet("10.7.0.9", "10.7.0.1", b"x" * 40)
        peer.sendto(good, to)
        in_use(listener)
        peer.sendto(good, to)
        wait_until(lambda: carried(listener)[1] == 1, what="the peer's own packet on the fast path")
        for data, sock in ((good, stranger), (good[:-1], peer), (good + b"x", peer), (b"\x45" + bytes(30), peer),
                           (pi(good), peer), (ip_packet("10.7.0.1", "10.7.0.1"), peer),
                           (ip_packet("::ffff:10.7.0.9", "fd07::1"), peer)):
            sock.sendto(data, to)
        peer.sendto(ip_packet("10.7.0.9", "10.7.0.1", b"y" * 3000), to)  # two outer fragments
        wait_until(lambda: listener.stats().inbound.dropped >= 6, what="the loop sees them")
        assert carried(listener)[1] == 1
        assert listener.stats().inbound.drops["unproven"] == 1
        assert listener.stats().inbound.drops["martian"] == 2
        assert [str(each) for each in listener.peers[0].addresses] == ["10.7.0.9"]


def test_a_client_that_moves_is_followed(lab: Lab) -> None:
    a, b, link = lab.pair()
    with tunnel(a, listen=True, address=NEAR) as listener:
        with tunnel(b, server=link.a.v4, address=FAR[0]) as client:
            reaches(b, "10.7.0.1")
            in_use(listener, client)
            transfer(b, a, "10.7.0.1", 1 << 20)
        started = time.monotonic()
        with tunnel(b, server=link.a.v4, address=FAR[0]) as client:
            reaches(b, "10.7.0.1")
            assert time.monotonic() - started < 6
            in_use(client)
            wait_until(lambda: carried(listener)[1] > 0 and b.run(
                ["ping", "-n", "-c1", "-W1", "10.7.0.1"]).returncode == 0)
            before = carried(listener)
            transfer(b, a, "10.7.0.1", 1 << 20)
            assert carried(listener)[1] - before[1] > 500


def test_many_clients_and_between_them(lab: Lab) -> None:
    """Two clients behind one listener: each has its own way, and the listener's host forwards between them."""
    a, b, _ = lab.pair()
    c = lab.namespace("c")
    first = lab.link(a, b)
    second = lab.link(a, c)
    a.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
    with tunnel(a, listen=True, address="10.7.0.1/24") as listener, \
            tunnel(b, server=first.a.v4, address="10.7.0.2/24") as one, \
            tunnel(c, server=second.a.v4, address="10.7.0.3/24") as other:
        for ns in (b, c):
            reaches(ns, "10.7.0.1")
        in_use(one, other)
        fast_path = listener._fast_path
        assert fast_path is not None
        wait_until(lambda: fast_path.peers == 2)
        reaches(b, "10.7.0.3")
        before = carried(listener)
        transfer(b, c, "10.7.0.3")
        after = carried(listener)
        assert after[1] - before[1] > 12_000


def test_a_host_behind_the_listener(lab: Lab) -> None:
    """What came through the fast path is forwarded to a device that segments nothing itself."""
    a, b, link = lab.pair()
    inside = lab.namespace("inside")
    lan = lab.link(a, inside)
    a.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
    inside.run(["ip", "route", "add", "10.7.0.0/24", "via", lan.a.v4])
    a.run(["ethtool", "-K", lan.a.device, "tso", "off", "gso", "off", "tx", "off"])
    with tunnel(a, listen=True, address="10.7.0.1/24") as listener, \
            tunnel(b, server=link.a.v4, address="10.7.0.2/24", route=f"{lan.b.v4}/32") as client:
        reaches(b, lan.b.v4)
        in_use(listener, client)
        transfer(b, inside, lan.b.v4)
        transfer(inside, b, "10.7.0.2")
        assert carried(listener)[1] > 12_000


def echo(source: str, destination: str) -> bytes:
    """An ICMP echo request that a kernel answers."""
    body = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + b"x" * 20
    return ip_packet(source, destination, body[:2] + struct.pack("!H", checksum(body)) + body[4:], protocol=1)


def test_the_answer_to_a_new_peer_is_not_the_only_known_ones(lab: Lab) -> None:
    """It comes before the programs can know the new one."""
    a, b, link = lab.pair()
    with tunnel(a, listen=True, address=NEAR[0]) as listener, socket_peer(b) as (first, to_first), \
            socket_peer(b) as (second, to_second):
        to = (link.a.v4, listener.local_port)
        first.sendto(echo("10.7.0.2", "10.7.0.1"), to)
        in_use(listener)
        second.sendto(echo("10.7.0.3", "10.7.0.1"), to)
        wait_until(lambda: to_second, 2, what="the answer")
        assert {packet[16:20] for packet in to_first} == {socket.inet_aton("10.7.0.2")}
        assert {packet[16:20] for packet in to_second} == {socket.inet_aton("10.7.0.3")}


def test_rules_by_source_are_obeyed(lab: Lab) -> None:
    """A listener with two uplinks: what leaves from the one's address goes by the one, as a rule says."""
    a, b, link = lab.pair()
    other = lab.link(a, b)
    b.ip("address", "add", "192.0.2.9/32", "dev", "lo")
    b.ip("route", "add", f"{link.a.v4}/32", "dev", link.b.device, "src", "192.0.2.9")
    a.ip("route", "add", "192.0.2.9/32", "via", other.b.v4)
    a.ip("rule", "add", "from", link.a.v4, "lookup", "100")
    a.ip("route", "add", "192.0.2.9/32", "via", link.b.v4, "table", "100")
    for ns, devices in ((a, (link.a.device, other.a.device)), (b, (link.b.device, other.b.device))):
        for device in ("all", *devices):
            ns.run(["sysctl", "-qw", f"net.ipv4.conf.{device}.rp_filter=0"])
    with tunnel(a, listen=True, address=NEAR[0]) as listener, \
            tunnel(b, server=link.a.v4, bind="192.0.2.9", address=FAR[0]) as client:
        reaches(b, "10.7.0.1")
        in_use(listener, client)
        before = carried(listener), sent_by(a, other.a.device)
        transfer(a, b, "10.7.0.2", 1 << 20)
        assert carried(listener)[0] - before[0][0] > 500
        assert sent_by(a, other.a.device) - before[1] < 10


def sent_by(ns: Namespace, device: str) -> int:
    """Packets that have left by the device."""
    return int(ns.run(["ip", "-j", "-s", "link", "show", device]).stdout.split('"tx":')[1].split('"packets":')[1]
               .split(",")[0])


def test_given_up_at_run_time_it_goes_on_through_the_loop(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with joined(lab) as (listener, client, a, b):
        in_use(listener, client)
        monkeypatch.setattr(bpf, "delete", refuse)
        monkeypatch.setattr(bpf, "update", refuse)
        b.ip("address", "add", "10.7.0.77/24", "dev", "tun0")
        b.run(["ping", "-n", "-c1", "-W1", "-I", "10.7.0.77", "10.7.0.1"], check=False)  # news for the maps
        wait_until(lambda: listener.stats().offloads["fast-path"].startswith("off: given up"), 5)
        assert programs(a, "tun0", bpf.TCX_EGRESS) == 0
        transfer(b, a, "10.7.0.1", 1 << 20)
        transfer(a, b, "10.7.0.2", 1 << 20)
        assert listener.running
        spent = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - spent < 0.25, "nothing spins on a closed descriptor"
    assert [record.levelname for record in caplog.records if "no fast path any more" in record.message] == ["WARNING"]


def test_a_pause_that_fails_is_over_all_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with joined(lab) as (listener, client, _, _b):
        in_use(listener, client)
        fast_path = listener._fast_path
        assert fast_path is not None
        with monkeypatch.context() as patched:
            patched.setattr(fast_path, "sync", Mock(side_effect=OSError(errno.EPERM, "refused")))
            with pytest.raises(OSError, match="refused"), listener.through_the_loop():
                pass
        fast_path.sync()
        assert fast_path.peers == 1


@pytest.mark.parametrize("kind", ["ipv6 outside", "packet information", "small path"])
def test_what_the_kernel_cannot_carry_goes_through_the_loop(lab: Lab, kind: str) -> None:
    a, b, link = lab.pair()
    if kind == "packet information":
        with tunnel(a, listen=True, address=NEAR) as listener, \
                tunnel(b, server=link.a.v4, address=FAR, fast_path=False, framing="pi"):
            reaches(b, "10.7.0.1")
            transfer(b, a, "10.7.0.1", 1 << 20)
            assert carried(listener) == (0, 0)
        return
    keywords: dict[str, object] = {"mtu": 1480} if kind == "small path" else {}
    host = link.a.v6 if kind == "ipv6 outside" else link.a.v4
    with tunnel(a, listen=True, address=NEAR, **keywords) as listener, \
            tunnel(b, server=host, address=FAR, **keywords) as client:
        reaches(b, "10.7.0.1")
        transfer(b, a, "10.7.0.1", 1 << 20)
        assert carried(client) == carried(listener) == (0, 0)


def test_a_capture_sees_every_packet(lab: Lab) -> None:
    with joined(lab) as (listener, client, _, b):
        in_use(listener, client)
        with listener.through_the_loop():
            before = carried(listener)
            b.run(["ping", "-n", "-c5", "-i0.05", "10.7.0.1"])
            assert carried(listener) == before
        in_use(listener)
        b.run(["ping", "-n", "-c5", "-i0.05", "10.7.0.1"])
        assert carried(listener)[1] >= before[1] + 5


def test_a_route_that_changes_is_followed(lab: Lab) -> None:
    """A second cable to the same host: the packets take it once the route does."""
    a, b, link = lab.pair()
    other = lab.link(a, b)
    with tunnel(a, listen=True, address=NEAR, bind=link.a.v4) as listener, \
            tunnel(b, server=link.a.v4, address=FAR, bind=link.b.v4) as client:
        reaches(b, "10.7.0.1")
        in_use(listener, client)
        b.run(["ip", "route", "add", f"{link.a.v4}/32", "via", other.a.v4, "src", link.b.v4])
        a.run(["ip", "route", "add", f"{link.b.v4}/32", "via", other.b.v4, "src", link.a.v4])
        for ns, device in ((a, other.a.device), (b, other.b.device)):
            ns.run(["sysctl", "-qw", f"net.ipv4.conf.{device}.rp_filter=0"])
        wait_until(lambda: programs(b, other.b.device, bpf.TCX_INGRESS) == 1)
        reaches(b, "10.7.0.1")
        before = carried(client)
        transfer(b, a, "10.7.0.1", 4 << 20)
        assert carried(client)[0] - before[0] > 2000


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_remains_on_the_devices(lab: Lab, end: signal.Signals) -> None:
    a, b, link = lab.pair()
    command = [sys.executable, "-m", "fasttun", "--fast-path", "--server", link.a.v4, "--address", FAR[0]]
    with tunnel(a, listen=True, address=NEAR[0]):
        process = b.popen(command)
        reaches(b, "10.7.0.1")
        assert programs(b, link.b.device, bpf.TCX_INGRESS) == 1
        assert programs(b, "tun0", bpf.TCX_EGRESS) == 1
        process.send_signal(end)
        process.communicate(timeout=10)
        wait_until(lambda: programs(b, link.b.device, bpf.TCX_INGRESS) == 0)
    assert programs(a, link.a.device, bpf.TCX_INGRESS) == 0


def test_without_privileges_it_goes_on(lab: Lab) -> None:
    """--user: the programs are on before; peers are learned, and leave, afterwards."""
    a, b, link = lab.pair()
    listener = a.popen([sys.executable, "-m", "fasttun", "--fast-path", "--listen", "--address", NEAR[0],
                        "--user", "nobody"])
    with tunnel(b, server=link.a.v4, address=FAR[0]) as client:
        reaches(b, "10.7.0.1")
        in_use(client)
        wait_until(lambda: b.run(["ping", "-n", "-c1", "-W1", "10.7.0.1"]).returncode == 0)
        status = os.stat(f"/proc/{listener.pid}")
        assert status.st_uid != 0
        assert programs(a, link.a.device, bpf.TCX_INGRESS) == 1
        time.sleep(1.2)
        before = loop_packets(a, listener.pid)
        b.run(["ping", "-n", "-q", "-f", "-c100", "10.7.0.1"])
        assert loop_packets(a, listener.pid) - before < 50
    listener.send_signal(signal.SIGTERM)
    _, errors = listener.communicate(timeout=10)
    assert listener.returncode == 0, errors


def loop_packets(ns: Namespace, pid: int) -> int:
    """Packets that the TUN device's driver has handed to the process: those of the fast path never reach it."""
    return int(ns.run(["cat", "/sys/class/net/tun0/statistics/tx_packets"]).stdout) if pid else 0


def udp(sender: Namespace, receiver: Namespace, host: str, count: int) -> None:
    """Datagrams of many sizes, which must arrive in order and unharmed."""
    rng = random.Random(7)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with receiver.enter():
        there = socket.socket(family, socket.SOCK_DGRAM)
        there.bind((host, 0))
        there.settimeout(5)
    with sender.enter():
        here = socket.socket(family, socket.SOCK_DGRAM)
    with there, here:
        for _ in range(count // 50):
            sent = [rng.randbytes(rng.choice((0, 1, 17, 500, 1000, 1400))) for _ in range(50)]
            for data in sent:
                here.sendto(data, there.getsockname())
            assert [there.recv(2048) for _ in sent] == sent


def test_random_datagrams_arrive_as_they_left(lab: Lab) -> None:
    with joined(lab) as (listener, client, a, b):
        in_use(listener, client)
        for host in ("10.7.0.1", "fd07::1"):
            udp(b, a, host, 500)
        assert carried(client)[0] >= 1000


def test_groups_of_datagrams_keep_their_sizes(lab: Lab) -> None:
    """An application's UDP_SEGMENT: frames of UDP go through the loop."""
    with joined(lab) as (listener, client, a, b):
        in_use(listener, client)
        with a.enter():
            there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            there.bind(("10.7.0.1", 0))
            there.settimeout(5)
        with b.enter():
            here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with there, here:
            here.setsockopt(17, 103, 700)  # SOL_UDP, UDP_SEGMENT
            here.sendto(bytes(range(256)) * 20, there.getsockname())
            got = [there.recv(2048) for _ in range(8)]
            assert [len(each) for each in got] == [700] * 7 + [220]
            assert b"".join(got) == bytes(range(256)) * 20
