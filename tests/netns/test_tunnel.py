"""Traffic through real TUN devices: families, many clients, roaming, the edges of the MTU, and what breaks."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.netns import End, Lab, Namespace, wait_until
from support.node import Node, assert_counted
from support.tunnels import assert_balanced, ip_packet, settled
from support.udp_proxy import UdpProxy

from fasttun import DeviceError, Forwarder

pytestmark = pytest.mark.netns

PURE_PYTHON = Path(__file__).resolve().parents[2] / "bench" / "pure_python.py"
NEAR = ("10.7.0.1/24", "fd07::1/64")
FAR = ("10.7.0.2/24", "fd07::2/64")


def pings(ns: Namespace, host: str, *options: str) -> bool:
    return ns.run(["ping", "-n", "-c1", "-W1", *options, host], check=False).returncode == 0


def reaches(ns: Namespace, host: str, timeout: float = 10) -> None:
    wait_until(lambda: pings(ns, host), timeout, 0.05, f"{ns.name} pings {host}")


@contextlib.contextmanager
def tunnel(ns: Namespace, **keywords: object) -> Iterator[Forwarder]:
    """A running Forwarder on that host, in this process; its books must balance at the end."""
    forwarder = Forwarder(**keywords)  # type: ignore[arg-type]
    with ns.enter():
        forwarder.start()
    try:
        yield forwarder
    finally:
        forwarder.stop()
    assert_balanced(forwarder.stats())


@contextlib.contextmanager
def joined(lab: Lab, outer: str = "v4", mtu: int | None = None,
           **keywords: object) -> Iterator[tuple[Forwarder, Forwarder, End, End]]:
    """Two hosts on a cable and a tunnel between them: listener, client, and the cable's ends."""
    a, b, link = lab.pair(mtu=mtu)
    bind = {"bind": getattr(link.a, outer)} if mtu else {}
    with tunnel(a, listen=True, address=NEAR, **bind, **keywords) as listener, \
            tunnel(b, server=getattr(link.a, outer), address=FAR, **keywords) as client:
        client.wait_peer(5)
        reaches(b, "10.7.0.1")
        yield listener, client, link.a, link.b


def snmp(ns: Namespace, name: str) -> int:
    """A counter of /proc/net/snmp or snmp6 of that host, such as FragCreates or Ip6FragCreates."""
    with ns.enter():
        if name.startswith("Ip6"):
            text = Path("/proc/thread-self/net/snmp6").read_text()
            return int(dict(line.split() for line in text.splitlines())[name])
        names, values = (line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()[:2])
        return int(values[names.index(name)])


def listening(ns: Namespace, port: int) -> bool:
    return f":{port} " in ns.run(["ss", "-Hlnt", f"sport = {port}"]).stdout


# ------------------------------------------------------------------------------------------ traffic


@pytest.mark.parametrize("outer", ["v4", "v6"])
@pytest.mark.parametrize("offload", [True, False])
def test_both_families_inside_both_families_outside(lab, outer, offload):
    with joined(lab, outer, tun_offload=offload, udp_gso=offload, udp_gro=offload) as (listener, client, a, b):
        for ns, v4, v6 in ((b.ns, "10.7.0.1", "fd07::1"), (a.ns, "10.7.0.2", "fd07::2")):
            for host in (v4, v6):
                ns.run(["ping", "-n", "-c3", "-i0.05", "-W1", host])
                ns.run(["ping", "-n", "-c2", "-i0.05", "-W1", "-s", "1200", host])
        peer = listener.wait_peer(5)
        assert str(peer.endpoint.host) == getattr(b, outer)
        assert peer.framing == "raw"
        assert {"10.7.0.2", "fd07::2"} <= {str(address) for address in peer.addresses}
    for forwarder in (listener, client):
        stats = forwarder.stats()
        assert stats.inbound.dropped == 0
        # A listener's kernel may have sent a router solicitation before the first client came.
        assert stats.outbound.dropped == (stats.outbound.drops["no_peer"] if forwarder is listener else 0) <= 3
        assert stats.inbound.packets_out >= 16


def test_a_server_by_its_link_local_address(lab):
    a, b, link = lab.pair()
    found = next(address["local"] for entry in a.ip_json("address", "show", "dev", link.a.device)
                 for address in entry["addr_info"] if address["scope"] == "link" and address["family"] == "inet6")
    with tunnel(a, listen=True, address=NEAR), \
            tunnel(b, server=f"{found}%{link.b.device}", address=FAR) as client:
        assert client.mtu == 1452
        assert str(client.wait_peer(5).endpoint.host) == found
        reaches(b, "10.7.0.1")
        a.run(["ping", "-n", "-c2", "-i0.05", "-W1", "10.7.0.2"])


def test_hosts_without_ipv6(lab):
    a, b, link = lab.pair()
    for ns in (a, b):
        ns.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        ns.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
    with tunnel(a, listen=True, address=NEAR[0]), tunnel(b, server=link.a.v4, address=FAR[0]) as client:
        client.wait_peer(5)
        reaches(b, "10.7.0.1")


def test_three_clients_on_one_listener(lab):
    hub = lab.namespace("hub")
    hub.forward()
    spokes = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(tunnel(hub, listen=True, address=NEAR))
        for number in range(2, 5):
            spoke = lab.namespace(f"s{number}")
            link = lab.link(hub, spoke)
            client = stack.enter_context(tunnel(
                spoke, server=link.a.v4 if number != 3 else link.a.v6,
                address=[f"10.7.0.{number}/24", f"fd07::{number}/64"]))
            client.wait_peer(5)
            spokes.append(spoke)
        for number, spoke in enumerate(spokes, 2):
            reaches(spoke, "10.7.0.1")
            reaches(spoke, "fd07::1")
            hub.run(["ping", "-n", "-c2", "-i0.05", "-W1", f"10.7.0.{number}"])
        for number, spoke in enumerate(spokes, 2):
            for other in range(2, 5):
                if other != number:
                    spoke.run(["ping", "-n", "-c2", "-i0.05", "-W1", f"10.7.0.{other}"])
                    spoke.run(["ping", "-n", "-c2", "-i0.05", "-W1", f"fd07::{other}"])
        assert len(listener.peers) == 3
        before = settled(listener).outbound.drops["no_peer"]
        assert not pings(hub, "10.7.0.77")
        assert settled(listener).outbound.drops["no_peer"] > before, "nobody's address goes to nobody"


def test_clients_do_not_see_each_other_without_forwarding(lab):
    hub = lab.namespace("hub")
    with contextlib.ExitStack() as stack:
        stack.enter_context(tunnel(hub, listen=True, address=NEAR))
        spokes = []
        for number in (2, 3):
            spoke = lab.namespace(f"s{number}")
            link = lab.link(hub, spoke)
            stack.enter_context(tunnel(spoke, server=link.a.v4, address=f"10.7.0.{number}/24"))
            reaches(spoke, "10.7.0.1")
            spokes.append(spoke)
        assert not pings(spokes[0], "10.7.0.3")


# ------------------------------------------------------------------------------------------ roaming


def test_a_client_whose_address_changes_is_followed(lab):
    with joined(lab) as (listener, _, a, b):
        network = b.v4.rpartition(".")[0]
        b.ns.ip("address", "del", f"{b.v4}/24", "dev", b.device)
        b.ns.ip("address", "add", f"{network}.77/24", "dev", b.device)
        start = time.monotonic()
        wait_until(lambda: pings(b.ns, "10.7.0.1", "-W0.2"), 8, 0.01)
        assert time.monotonic() - start < 6
        peer = next(peer for peer in listener.peers if ipaddress.ip_address("10.7.0.2") in peer.addresses)
        assert str(peer.endpoint.host) == f"{network}.77"
        a.ns.run(["ping", "-n", "-c2", "-i0.05", "-W1", "10.7.0.2"])


def test_a_nat_that_rebinds_is_followed(lab):
    client_ns, router, server_ns, near, far = lab.routed()
    with tunnel(server_ns, listen=True, address=NEAR) as listener, \
            UdpProxy((far.b.v4, 1234), listen=(near.b.v4, 1234), ns=router) as nat, \
            tunnel(client_ns, server=near.b.v4, address=FAR):
        reaches(client_ns, "10.7.0.1")
        for _ in range(2):
            before = nat.source_ports
            nat.rebind()
            assert not before & nat.source_ports
            start = time.monotonic()
            wait_until(lambda: pings(client_ns, "10.7.0.1", "-W0.2"), 8, 0.01)
            assert time.monotonic() - start < 6
            assert {peer.endpoint.port for peer in listener.peers
                    if ipaddress.ip_address("10.7.0.2") in peer.addresses} == nat.source_ports


@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft (apt install nftables)")
def test_through_a_real_nat(lab):
    client_ns, _, server_ns, _, far = lab.routed(masquerade=True)
    with tunnel(server_ns, listen=True, address=NEAR) as listener, \
            tunnel(client_ns, server=far.b.v4, address=FAR) as client:
        client.wait_peer(5)
        reaches(client_ns, "10.7.0.1")
        assert str(listener.wait_peer(5).endpoint.host) == far.a.v4
        server_ns.run(["ping", "-n", "-c2", "-i0.05", "-W1", "10.7.0.2"])


def test_a_stray_datagram_moves_nothing(lab):
    """From the peer's own host, from another port, with the peer's inner address: ten a second for seconds."""
    with joined(lab) as (listener, _, a, b):
        before = listener.peers[0].endpoint
        with b.ns.enter():
            stray = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with stray:
            for _ in range(30):
                stray.sendto(ip_packet("10.7.0.2", "10.7.0.1"), (a.v4, 1234))
                time.sleep(0.1)
        assert [peer.endpoint for peer in listener.peers] == [before], "the owner answers what it is asked"
        b.ns.run(["ping", "-n", "-c2", "-i0.05", "-W1", "10.7.0.1"])
        assert listener.stats().inbound.drops["unproven"] == 30


def test_a_restarted_client_has_its_address_back(lab):
    a, b, link = lab.pair()
    with tunnel(a, listen=True, address=NEAR) as listener:
        for _ in range(2):
            with tunnel(b, server=link.a.v4, address=FAR):
                start = time.monotonic()
                wait_until(lambda: pings(b, "10.7.0.1", "-W0.2"), 8, 0.01)
                assert time.monotonic() - start < 6
        assert len(listener.peers) <= 2


# ---------------------------------------------------------------------------------------------- MTU


@pytest.mark.parametrize(("outer", "framing", "mtu"), [
    ("v4", "auto", 1472), ("v6", "auto", 1452), ("v4", "pi", 1468), ("v6", "pi", 1448)])
def test_a_full_packet_passes_in_one_piece_and_one_byte_more_is_told(lab, outer, framing, mtu):
    with joined(lab, outer, framing=framing) as (listener, client, _, b):
        assert client.mtu == mtu
        assert b.ns.ip_json("link", "show", "tun0")[0]["mtu"] == mtu
        listener_mtu = listener.mtu
        count = "FragCreates" if outer == "v4" else "Ip6FragCreates"
        before = snmp(b.ns, count)
        for host, headers in (("10.7.0.1", 28), ("fd07::1", 48)):
            b.ns.run(["ping", "-n", "-c2", "-i0.05", "-W1", "-M", "do", "-s", str(mtu - headers), host])
            refused = b.ns.run(
                ["ping", "-n", "-c1", "-W1", "-M", "do", "-s", str(mtu - headers + 1), host], check=False)
            assert refused.returncode != 0
            assert str(mtu) in refused.stdout + refused.stderr
        assert snmp(b.ns, count) == before, "a full packet must not be fragmented outside"
        assert listener_mtu >= 1280


def test_a_forwarded_packet_that_is_too_large_is_told(lab):
    """A host behind the client sends 1500 bytes with DF: the client's kernel answers with ICMP, and names 1472."""
    with joined(lab) as (_, client, a, b):
        behind = lab.namespace("behind")
        link = lab.link(b.ns, behind, ["192.168.77.1/24"], ["192.168.77.2/24"])
        b.ns.forward()
        behind.ip("route", "add", "10.7.0.0/24", "via", link.a.v4)
        a.ns.ip("route", "add", "192.168.77.0/24", "dev", "tun0")
        reaches(behind, "10.7.0.1")
        told = behind.run(["ping", "-n", "-c1", "-W1", "-M", "do", "-s", "1472", "10.7.0.1"], check=False).stdout
        assert f"mtu = {client.mtu}" in told


@pytest.mark.parametrize(("host", "headers"), [("10.7.0.1", 28), ("fd07::1", 48)])
@pytest.mark.parametrize("offload", [True, False])
def test_a_packet_larger_than_any_datagram_is_told_by_the_engine(lab, host, headers, offload):
    a, b, link = lab.pair()
    with tunnel(a, listen=True, address=NEAR, mtu=65535, tun_offload=offload), \
            tunnel(b, server=link.a.v4, address=FAR, mtu=65535, tun_offload=offload) as client:
        reaches(b, host)
        told = b.run(["ping", "-n", "-c1", "-W1", "-M", "do", "-s", str(65507 if headers == 28 else 65487), host],
                     check=False)
        assert "65503" in told.stdout + told.stderr, told
        assert settled(client).outbound.drops["too_big"] == 1
        b.run(["ping", "-n", "-c1", "-W2", "-M", "do", "-s", str(65503 - headers), host])
        b.run(["ping", "-n", "-c1", "-W2", "-s", "30000", host])


def test_the_mtu_follows_the_path(lab):
    a, b, link = lab.pair(mtu=1400)
    with tunnel(a, listen=True, bind=link.a.v4, address=NEAR) as listener, \
            tunnel(b, server=link.a.v4, address=FAR) as client:
        assert client.mtu == 1372
        assert listener.mtu == 1372
        reaches(b, "10.7.0.1")
        before = snmp(b, "FragCreates")
        b.run(["ping", "-n", "-c1", "-W1", "-M", "do", "-s", str(1372 - 28), "10.7.0.1"])
        assert snmp(b, "FragCreates") == before


def test_a_path_that_shrinks_while_it_runs_fragments_and_loses_nothing(lab):
    with joined(lab) as (_, _, a, b):
        for end in (a, b):
            end.mtu(1300)
        before = snmp(b.ns, "FragCreates")
        b.ns.run(["ping", "-n", "-c5", "-i0.05", "-W1", "-M", "do", "-s", "1400", "10.7.0.1"])
        assert snmp(b.ns, "FragCreates") > before


# ------------------------------------------------------------------------------------------ adversity


def test_the_tun_device_goes_down_and_up(lab):
    with joined(lab) as (listener, client, a, b):
        a.ns.down("tun0")
        assert not pings(b.ns, "10.7.0.1")
        wait_until(lambda: listener.stats().inbound.drops["tun_down"] > 0)
        assert listener.running
        a.ns.up("tun0")
        reaches(b.ns, "10.7.0.1")
        b.ns.down("tun0")
        time.sleep(0.1)
        b.ns.up("tun0")
        reaches(b.ns, "10.7.0.1")
        assert client.running


def test_the_network_goes_down_and_up(lab):
    with joined(lab) as (listener, client, a, b):
        b.down()
        assert not pings(b.ns, "10.7.0.1")
        assert client.running
        b.up()
        reaches(b.ns, "10.7.0.1")
        a.down()
        assert not pings(b.ns, "10.7.0.1")
        a.up()
        reaches(b.ns, "10.7.0.1")
        assert listener.running
    stats = client.stats()
    assert stats.outbound.drops["send_failed"] > 0
    assert set(stats.errors) <= {"ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "ENODEV", "EINVAL"}, stats.errors


def test_the_peers_port_is_closed_and_opened_again(lab):
    a, b, link = lab.pair()
    with tunnel(b, server=link.a.v4, address=FAR) as client:
        for _ in range(3):
            assert not pings(b, "10.7.0.1", "-W0.2")
        wait_until(lambda: client.running)
        with tunnel(a, listen=True, address=NEAR):
            reaches(b, "10.7.0.1")
        assert not pings(b, "10.7.0.1", "-W0.2")
        with tunnel(a, listen=True, address=NEAR):
            reaches(b, "10.7.0.1")


def test_a_full_queue_of_the_interface_is_survived(lab):
    """A tiny, slow queueing discipline: what it refuses is dropped (ENOBUFS on some kernels), nothing hangs."""
    with joined(lab) as (_, client, _, b):
        b.ns.run(["tc", "qdisc", "add", "dev", b.device, "root", "tbf", "rate", "2mbit", "burst", "3000",
                  "limit", "3000"])
        with b.ns.enter():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            for _ in range(3000):
                with contextlib.suppress(OSError):
                    sock.sendto(bytes(1200), ("10.7.0.1", 9))
        settled(client)
        b.ns.run(["tc", "qdisc", "del", "dev", b.device, "root"])
        reaches(b.ns, "10.7.0.1")
        assert client.running


def test_a_device_that_is_deleted_ends_the_tunnel_with_its_name(lab):
    _, b, link = lab.pair()
    forwarder = Forwarder(server=link.a.v4, address=FAR)
    with b.enter():
        forwarder.start()
    try:
        b.ip("link", "delete", "tun0")
        with pytest.raises(DeviceError) as caught:
            forwarder.wait(5)
        assert caught.value.errno
        assert "deleted" in str(caught.value)
        assert "tun0" in str(caught.value)
        assert not forwarder.running
    finally:
        forwarder.stop()
    assert_balanced(forwarder.stats())
    assert b.devices() == {"lo", link.b.device}


# -------------------------------------------------------------------------------------------- interop


@contextlib.contextmanager
def baseline(ns: Namespace, *flags: str, address: str) -> Iterator[subprocess.Popen[str]]:
    """bench/pure_python.py, set up by hand as its text says."""
    process = ns.popen([sys.executable, PURE_PYTHON, *flags])
    assert process.stdout is not None
    process.stdout.readline()
    wait_until(lambda: "tun0" in ns.devices())
    ns.ip("address", "add", address, "dev", "tun0")
    ns.ip("link", "set", "tun0", "mtu", "1468", "up")
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def iperf(client: Namespace, server: Namespace, host: str, *options: str) -> None:
    """One second of TCP towards `host`; it must carry something."""
    door = server.popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: listening(server, 5201))
    done = client.run(["iperf3", "-c", host, "-t", "1", "-J", *options], timeout=20)
    door.wait(10)
    sums = json.loads(done.stdout)["end"]
    assert sums["sum_received"]["bits_per_second"] > 1e6


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="needs iperf3 (apt install iperf3)")
@pytest.mark.parametrize("role", ["listener", "client"])
def test_the_baseline_as_either_peer(lab, role):
    a, b, link = lab.pair()
    with contextlib.ExitStack() as stack:
        if role == "listener":
            process = stack.enter_context(baseline(a, "-listen", address="10.7.0.1/24"))
            ours = stack.enter_context(tunnel(b, server=link.a.v4, address="10.7.0.2/24", mtu=1468))
        else:
            ours = stack.enter_context(tunnel(a, listen=True, address="10.7.0.1/24", mtu=1468))
            process = stack.enter_context(baseline(b, "-server", link.a.v4, address="10.7.0.2/24"))
        reaches(b, "10.7.0.1")
        a.run(["ping", "-n", "-c3", "-i0.05", "-W1", "10.7.0.2"])
        b.run(["ping", "-n", "-c2", "-i0.05", "-W1", "-M", "do", "-s", str(1468 - 28), "10.7.0.1"])
        assert ours.peers[0].framing == "pi"
        for options in ((), ("-R",)):
            iperf(b, a, "10.7.0.1", *options)
        iperf(a, b, "10.7.0.2")
        assert process.poll() is None


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="needs iperf3 (apt install iperf3)")
@pytest.mark.parametrize(("tun", "gso", "gro", "batch"), [
    (True, True, True, True), (False, True, True, True), (True, False, True, True), (True, True, False, True),
    (False, False, False, False)])
def test_tcp_crosses_with_each_offload_on_and_off(lab, tun, gso, gro, batch):
    with joined(lab, tun_offload=tun, udp_gso=gso, udp_gro=gro, batch=batch) as (listener, client, a, b):
        for options in ((), ("-R",), ("-6",)):
            iperf(b.ns, a.ns, "fd07::1" if "-6" in options else "10.7.0.1", *options)
        offloads = client.stats().offloads
        if batch:
            assert offloads["udp-gso"].startswith("on" if gso else "off")
            assert offloads["udp-gro"].startswith("on" if gro else "off")
    for forwarder in (listener, client):
        assert forwarder.stats().inbound.drops["malformed"] == 0
        assert forwarder.stats().outbound.drops["malformed"] == 0


# ------------------------------------------------------------------------------------------------ files


def send_file(source: Namespace, destination: Namespace, host: str, size: int, timeout: float = 60) -> None:
    """`size` random bytes over TCP; AssertionError unless they arrive as they were."""
    with destination.enter():
        door = socket.create_server(("0.0.0.0", 0))
    sums: list[str] = []

    def take() -> None:
        with door:
            door.settimeout(timeout)
            connection, _ = door.accept()
            digest = hashlib.sha256()
            with connection:
                connection.settimeout(timeout)
                while part := connection.recv(1 << 20):
                    digest.update(part)
            sums.append(digest.hexdigest())

    taker = threading.Thread(target=take)
    taker.start()
    digest = hashlib.sha256()
    with source.enter():
        connection = socket.create_connection((host, door.getsockname()[1]), timeout=timeout)
    with connection:
        left = size
        while left:
            block = os.urandom(min(left, 1 << 20))
            digest.update(block)
            connection.sendall(block)
            left -= len(block)
    taker.join(timeout)
    assert sums == [digest.hexdigest()]


@pytest.mark.parametrize("outer", ["v4", "v6"])
def test_a_file_of_200_mb_crosses_intact(lab, outer):
    a, b, link = lab.pair()
    with Node(a, listen=True, address=NEAR) as listener, \
            Node(b, server=getattr(link.a, outer), address=FAR) as client:
        reaches(b, "10.7.0.1")
        send_file(b, a, "10.7.0.1", 200 * 1000 * 1000)
        send_file(a, b, "10.7.0.2", 20 * 1000 * 1000)
        for stats in (listener.stop(), client.stop()):
            assert_counted(stats)
            assert not stats["inbound"]["drops"]["malformed"]


def test_a_file_crosses_a_card_without_udp_segmentation(lab):
    """veth carries a UDP GSO packet whole; a card without the feature has it cut by the kernel."""
    a, b, link = lab.pair()
    if shutil.which("ethtool") is None:
        pytest.skip("needs ethtool (apt install ethtool)")
    for end in (link.a, link.b):
        end.ns.run(["ethtool", "-K", end.device, "tx-udp-segmentation", "off"])
    with Node(a, listen=True, address=NEAR), Node(b, server=link.a.v4, address=FAR):
        reaches(b, "10.7.0.1")
        send_file(b, a, "10.7.0.1", 50 * 1000 * 1000)


def test_two_workers_carry_many_flows(lab):
    a, b, link = lab.pair()
    with Node(a, listen=True, address=NEAR, workers=2) as listener, \
            Node(b, server=link.a.v4, address=FAR, workers=2) as client:
        reaches(b, "10.7.0.1")
        failed: list[BaseException] = []

        def one() -> None:
            try:
                send_file(b, a, "10.7.0.1", 5_000_000)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
        for stats in (listener.stop(), client.stop()):
            assert_counted(stats)


def test_the_interface_of_a_link_local_peer_goes_and_the_tunnel_stays(lab):
    hub, near, far = lab.namespace("hub"), lab.namespace("near"), lab.namespace("far")
    first, second = lab.link(hub, near), lab.link(hub, far)
    found = next(address["local"] for entry in hub.ip_json("address", "show", "dev", first.a.device)
                 for address in entry["addr_info"] if address["scope"] == "link" and address["family"] == "inet6")
    with tunnel(hub, listen=True, address=NEAR) as listener, \
            tunnel(near, server=f"{found}%{first.b.device}", address=FAR), \
            tunnel(far, server=second.a.v4, address="10.7.0.3/24"):
        reaches(near, "10.7.0.1")
        reaches(far, "10.7.0.1")
        hub.ip("link", "del", first.a.device)
        hub.run(["ping", "-n", "-c2", "-i0.2", "-W1", "10.7.0.2"], check=False)
        assert listener.running, "the socket's ENODEV is not the TUN's"
        reaches(far, "10.7.0.1")
        assert any(listener.stats().errors.get(name) for name in ("ENODEV", "ENETUNREACH", "EINVAL"))
