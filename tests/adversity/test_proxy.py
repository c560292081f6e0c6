"""A tunnel through a proxy that breaks the wire: it survives, its books balance, what TCP carries is intact."""

from __future__ import annotations

import hashlib
import socket
import threading
import time

import pytest
from adversity.soak import Soak
from support.netns import Lab, wait_until
from support.node import Node, assert_counted
from support.tunnels import Pipe, assert_balanced, bind_udp, ip_packet, pi, settled
from support.udp_proxy import Faults, UdpProxy

from fasttun import Forwarder

CHAOS = Faults(lose=0.1, duplicate=0.1, truncate=0.1, corrupt=0.1, inject=0.2, reorder=0.2)


def packets(source: str, destination: str, count: int) -> list[bytes]:
    return [ip_packet(source, destination, number.to_bytes(4, "big") * (1 + number % 300)) for number in range(count)]


@pytest.mark.parametrize("faults", [
    Faults(lose=0.3), Faults(duplicate=0.5), Faults(reorder=0.5), Faults(truncate=0.5), Faults(corrupt=0.5),
    Faults(inject=0.5), CHAOS], ids=["lose", "duplicate", "reorder", "truncate", "corrupt", "inject", "chaos"])
def test_what_comes_out_is_what_went_in_or_nothing(faults):
    """One datagram at a time through the faults; no packet of another length, no more of one than were sent."""
    count = 400
    with Pipe.make() as near, Pipe.make() as far, bind_udp() as udp, \
            Forwarder(listen=True, tun_fd=near.fd, udp_fd=udp.fileno()) as listener, \
            UdpProxy(udp.getsockname(), seed=11) as proxy, \
            Forwarder(server=proxy.address[0], port=proxy.address[1], tun_fd=far.fd, framing="raw") as client:
        client.wait_peer(5)
        proxy.to_server = faults
        sent = packets("10.7.0.2", "10.7.0.1", count)
        got = []
        near.app.setblocking(False)
        for packet in sent:
            far.send(packet)
            time.sleep(0.0005)
            got += drain(near)
        time.sleep(0.15)
        got += drain(near)
        stats = settled(listener)
        got += drain(near)
        assert len(got) == stats.inbound.packets_out
        assert listener.running
        assert client.running
        assert settled(client).outbound.packets_out == count
        assert stats.inbound.packets_in == proxy.counts["to_server sent"] - greetings(client)
    assert_balanced(listener.stats())
    assert_balanced(client.stats())
    counts = proxy.counts
    known = set(sent)
    whole = [packet for packet in got if packet in known]
    others = len(got) - len(whole)
    # A flipped bit in the payload passes: no checksum covers it at this layer. Nothing else may be changed.
    assert others <= counts["to_server corrupted"]
    assert all(len(packet) == int.from_bytes(packet[2:4], "big") for packet in got)
    lost = counts["to_server lost"] + counts["to_server truncated"] + counts["to_server corrupted"]
    assert count - lost <= len(whole) <= count + counts["to_server duplicated"]
    if faults.reorder == 0:
        order = [sent.index(packet) for packet in whole]
        assert order == sorted(order)


def drain(pipe: Pipe) -> list[bytes]:
    got = []
    while True:
        try:
            got.append(pipe.app.recv(70000))
        except BlockingIOError:
            return got


def greetings(client: Forwarder) -> int:
    """Datagrams of the client's that are no packets. Its greeting was answered before the faults began."""
    return 1 if client.peers else 0


def test_injected_datagrams_are_counted_and_move_nothing():
    with Pipe.make() as near, Pipe.make() as far, bind_udp() as udp, \
            Forwarder(listen=True, tun_fd=near.fd, udp_fd=udp.fileno()) as listener, \
            UdpProxy(udp.getsockname(), seed=3) as proxy, \
            Forwarder(server=proxy.address[0], port=proxy.address[1], tun_fd=far.fd) as client:
        client.wait_peer(5)
        far.send(ip_packet("10.7.0.2", "10.7.0.1", b"first"))
        near.receive()
        owner = listener.peers[0].endpoint
        claim = ip_packet("10.7.0.2", "10.7.0.1", b"I am he")
        for datagram in (b"", b"\0", bytes(2000), claim[:-1], pi(claim)[:-1], claim, pi(claim)):
            proxy.inject(datagram, stray=True)
        proxy.inject(ip_packet("10.7.0.9", "10.7.0.2"), direction="to_client", stray=True)
        wait_until(lambda: listener.stats().inbound.packets_in == 8)
        wait_until(lambda: client.stats().inbound.drops["stranger"] == 1)
        stats = settled(listener)
        assert stats.inbound.drops["unproven"] == 2
        assert stats.inbound.drops["malformed"] == 5
        assert [peer.endpoint for peer in listener.peers] == [owner]
        near.send(ip_packet("10.7.0.1", "10.7.0.2", b"still his"))
        assert far.receive()[20:] == b"still his"


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_a_wire_that_is_mute_one_way_for_a_while(direction):
    with Pipe.make() as near, Pipe.make() as far, bind_udp() as udp, \
            Forwarder(listen=True, tun_fd=near.fd, udp_fd=udp.fileno()) as listener, \
            UdpProxy(udp.getsockname()) as proxy, \
            Forwarder(server=proxy.address[0], port=proxy.address[1], tun_fd=far.fd, framing="raw") as client:
        client.wait_peer(5)
        far.send(ip_packet("10.7.0.2", "10.7.0.1"))
        near.receive()
        setattr(proxy, direction, Faults(lose=1.0))
        for number in range(20):
            far.send(ip_packet("10.7.0.2", "10.7.0.1", bytes([number])))
            near.send(ip_packet("10.7.0.1", "10.7.0.2", bytes([number])))
        settled(listener)
        setattr(proxy, direction, Faults())
        far.send(ip_packet("10.7.0.2", "10.7.0.1", b"again"))
        while near.receive()[20:] != b"again":
            pass
        near.send(ip_packet("10.7.0.1", "10.7.0.2", b"again"))
        while far.receive()[20:] != b"again":
            pass
    assert_balanced(listener.stats())
    assert_balanced(client.stats())


# ----------------------------------------------------------------------------------- with real devices


@pytest.mark.netns
def test_a_file_over_tcp_is_intact_through_all_of_it(lab: Lab):
    client_ns, router, server_ns, near, far = lab.routed()
    size = 1_500_000
    chaos = Faults(lose=0.01, duplicate=0.02, truncate=0.01, corrupt=0.01, inject=0.05, reorder=0.02)
    with Node(server_ns, listen=True, address="10.7.0.1/24") as listener, \
            UdpProxy((far.b.v4, 1234), listen=(near.b.v4, 1234), ns=router, seed=5) as proxy, \
            Node(client_ns, server=near.b.v4, address="10.7.0.2/24", mtu=1400) as client:
        wait_until(lambda: client_ns.run(["ping", "-c1", "-W1", "10.7.0.1"], check=False).returncode == 0, 10)
        proxy.to_server = proxy.to_client = chaos
        with server_ns.enter():
            door = socket.create_server(("10.7.0.1", 0))
        got = hashlib.sha256()
        amount = 0

        def take() -> None:
            nonlocal amount
            with door:
                door.settimeout(60)
                connection, _ = door.accept()
            with connection:
                connection.settimeout(60)
                while part := connection.recv(1 << 18):
                    got.update(part)
                    amount += len(part)

        taker = threading.Thread(target=take)
        taker.start()
        sent = hashlib.sha256()
        start = time.monotonic()
        with client_ns.enter():
            connection = socket.create_connection(("10.7.0.1", door.getsockname()[1]), timeout=60)
        with connection:
            for number in range(size // 50000):
                block = hashlib.sha256(number.to_bytes(4, "big")).digest() * (50000 // 32)
                sent.update(block)
                connection.sendall(block)
                if number == size // 100000:
                    proxy.rebind()
        taker.join(90)
        # TCP's retransmissions back off: a rule of roaming that wants many packets would cost half a minute here.
        assert time.monotonic() - start < 15
        assert amount == size // 50000 * (50000 // 32 * 32)
        assert got.digest() == sent.digest()
        assert {"to_server lost", "to_server truncated", "to_server corrupted", "to_server injected",
                "to_server duplicated", "to_server reordered"} <= set(proxy.counts)
        for stats in (client.stop(), listener.stop()):
            assert_counted(stats)


@pytest.mark.netns
@pytest.mark.slow
def test_a_short_soak():
    """tests/adversity/soak.py is the same for as long as one likes."""
    soak = Soak(15, seed=4, every_s=1.0, say=lambda text: None)
    soak.run()
    assert soak.broken == [], "\n".join(soak.report)
    assert soak.events["changes of address"] > 0
    assert soak.events["cables out and in"] > 0
