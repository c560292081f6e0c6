"""How good a tunnel's way is: bursts, round trip, loss, routes; and that the document keeps to its schema."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.netns import Lab, wait_until
from support.tunnels import Client, Pipe, bind_udp, ip_packet, settled
from support.udp_proxy import Faults, UdpProxy
from support.wireguard import at, ends, exchange

from fasttun import Forwarder
from fasttun.endpoint import Endpoint
from fasttun.observe.metrics import exposition
from fasttun.observe.snapshot import snapshot
from fasttun.stats import BURST_LIMITS, Bursts, LossWindow

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs" / "status-schema.json").read_text())


def samples(tunnel: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(exposition(tunnel)[1].decode()) for sample in family.samples}


# ------------------------------------------------------------------------------------------ bursts


def bucket(packets: int) -> int:
    return next((at for at, limit in enumerate(BURST_LIMITS) if packets <= limit), len(BURST_LIMITS))


@pytest.mark.parametrize("waiting", [1, 2, 3, 4, 5, 33, 64])
def test_bursts_are_counted_to_the_packet(waiting: int) -> None:
    """What waits before the tunnel starts comes in one call."""
    server = bind_udp()
    with Pipe.make() as pipe, server, bind_udp(connect=server.getsockname()) as sock:
        for number in range(waiting):
            pipe.send(ip_packet("10.7.0.2", "10.7.0.1", bytes([number])))
        with Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=pipe.fd, udp_gso=False) as tunnel:
            for _ in range(waiting):
                server.recv(2000)
            outbound = settled(tunnel).outbound
            found = samples(tunnel)
    for bursts in (outbound.bursts_in, outbound.bursts_out):
        assert bursts.count == 1
        assert bursts.packets == waiting
        assert bursts.calls[bucket(waiting)] == 1
    name = "fasttun_burst_packets"
    labels = {"direction": "outbound", "side": "in"}
    assert found[f"{name}_sum", tuple(labels.items())] == waiting
    assert found[f"{name}_count", tuple(labels.items())] == 1
    for limit in (*map(float, BURST_LIMITS), math.inf):
        text = "+Inf" if limit == math.inf else str(limit)
        key = tuple(sorted({**labels, "le": text}.items()))
        assert found[f"{name}_bucket", key] == (1 if waiting <= limit else 0), limit


def test_inbound_bursts_are_counted_to_the_packet() -> None:
    server = bind_udp()
    with Pipe.make() as pipe, server, bind_udp(connect=server.getsockname()) as sock:
        for number in range(7):
            server.sendto(ip_packet("10.7.0.1", "10.7.0.2", bytes([number])), sock.getsockname())
        with Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=pipe.fd, udp_gro=False) as tunnel:
            for _ in range(7):
                pipe.receive()
            inbound = settled(tunnel).inbound
    for bursts in (inbound.bursts_in, inbound.bursts_out):
        assert (bursts.calls[3], bursts.count, bursts.packets) == (1, 1, 7)


def test_bursts_of_workers_add_up() -> None:
    assert Bursts.total([]) == Bursts()
    one = ([1] * 14, 5)
    assert Bursts.total([one, one]) == Bursts((2,) * 14, 10)


# -------------------------------------------------------------------------- round trip and loss


def test_loss_is_of_the_last_half_minute() -> None:
    window = LossWindow()
    assert window.loss(0.0, 0, 0) is None
    assert window.loss(10.0, 100, 75) == 0.25
    assert window.loss(20.0, 200, 175) == 0.125
    assert window.loss(45.0, 300, 275) == 0.0
    assert window.loss(46.0, 300, 276) == 0.0  # a late one
    assert window.loss(100.0, 300, 276) is None


def drain(pipe: Pipe) -> None:
    """What waits, and what still comes within a fifth of a second."""
    while not pipe.silent(0.2):
        pipe.receive()


def test_wireguard_loss_is_exact() -> None:
    with ends(introduce=False) as pair, UdpProxy(("127.0.0.1", pair.a.listen_port), seed=3) as proxy:
        key = pair.b.peers[0].public_key
        pair.b.update_peer(key, endpoint=Endpoint(at(pair.a).host, proxy.address[1]))
        exchange(pair)
        (before,) = pair.a.peers
        assert before.loss == 0
        proxy.to_server = Faults(lose=0.3, reorder=0.1)
        for number in range(400):
            pair.far.send(ip_packet("10.9.0.2", "10.9.0.1", number.to_bytes(2, "big")))
        wait_until(lambda: proxy.counts["to_server received"] >= 400, what="all packets at the proxy")
        drain(pair.near)
        proxy.to_server = Faults()
        pair.far.send(ip_packet("10.9.0.2", "10.9.0.1", b"last"))
        drain(pair.near)
        lost = proxy.counts["to_server lost"]
        (after,) = pair.a.peers
        assert 80 < lost < 160
        assert after.rx_expected - after.rx_packets == lost
        assert after.loss is not None
        assert after.loss == pytest.approx(lost / after.rx_expected, abs=1e-9)
        assert pair.b.peers[0].loss == 0  # nothing was lost on the way there
        assert samples(pair.a)["fasttun_peer_loss_ratio", (("peer", str(after.public_key)),)] == after.loss


def test_wireguard_round_trip_is_of_the_handshake() -> None:
    with ends(introduce=False) as pair, UdpProxy(("127.0.0.1", pair.a.listen_port),
                                                 to_client=Faults(delay_ms=(120.0, 120.0))) as proxy:
        pair.b.update_peer(pair.b.peers[0].public_key, endpoint=Endpoint(at(pair.a).host, proxy.address[1]))
        assert pair.b.peers[0].round_trip_s is None
        exchange(pair)
        (begun,), (answered,) = pair.b.peers, pair.a.peers
        assert begun.round_trip_s is not None
        assert 0.12 <= begun.round_trip_s < 0.4
        assert answered.round_trip_s is None
        assert snapshot(pair.b)["peers"][0]["round_trip_s"] == begun.round_trip_s


def test_plain_round_trip_and_loss_are_of_greetings() -> None:
    with Pipe.make() as near, Pipe.make() as far, bind_udp() as sock, \
            Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=near.fd) as listener, \
            UdpProxy(("127.0.0.1", listener.local_port), to_client=Faults(delay_ms=(60.0, 60.0)),
                     to_server=Faults(lose=1.0)) as proxy, \
            Forwarder(server="127.0.0.1", port=proxy.address[1], tun_fd=far.fd) as client:
        wait_until(lambda: proxy.counts["to_server lost"] == 2, what="two greetings lost")
        assert client.peers[0].loss is None
        proxy.to_server = Faults()
        peer = wait_until(lambda: client.peers[0] if client.peers[0].round_trip_s else None, what="an answer")
        assert 0.06 <= peer.round_trip_s < 0.3
        wait_until(lambda: client.peers[0].loss == pytest.approx(2 / 3), what="two of three lost")
        assert all(peer.round_trip_s is None for peer in listener.peers)
        found = samples(client)
        label = (("peer", str(peer.endpoint)),)
        assert found["fasttun_peer_round_trip_seconds", label] == peer.round_trip_s


def test_a_second_answer_is_no_round_trip() -> None:
    with Pipe.make() as far, Client(("127.0.0.1", 1)) as server, \
            Forwarder(server="127.0.0.1", port=server.port, tun_fd=far.fd) as client:
        request, source = server.sock.recvfrom(100)
        answer = b"\x01\x01\x00\x0c" + request[4:20] + bytes.fromhex("0020000800012112e112a643")
        server.sock.sendto(answer, source)
        first = wait_until(lambda: client.peers[0].round_trip_s, what="the answer")
        server.sock.settimeout(0.3)
        server.sock.sendto(answer, source)
        with pytest.raises(socket.timeout):
            server.sock.recv(100)
        assert client.peers[0].round_trip_s == first


# ----------------------------------------------------------------------------------- routes, schema


def check(document: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(json.dumps(document)), SCHEMA)


def test_the_documents_keep_to_the_schema() -> None:
    with ends() as pair, Pipe.make() as pipe, bind_udp() as sock, \
            Forwarder(listen=True, udp_fd=sock.fileno(), tun_fd=pipe.fd) as plain:
        exchange(pair)
        with Client(("127.0.0.1", plain.local_port)) as client:
            client.send(ip_packet("10.7.0.2", "10.7.0.1"))
            pipe.receive()
        documents = [snapshot(pair.a), snapshot(pair.b), snapshot(plain)]
        assert plain.routes == ()
    for document in documents:
        assert document["peers"]
        check(document)
        for broken in (
            {**document, "more": 1}, {**document, "device": {**document["device"], "more": 1}},
            {**document, "peers": [{**document["peers"][0], "more": 1}]}, {**document, "uptime_s": "1"},
            {key: value for key, value in document.items() if key != "mode"},
        ):
            with pytest.raises(jsonschema.ValidationError):
                check(broken)


@pytest.mark.netns
def test_routes_are_the_kernels(lab: Lab) -> None:
    ns = lab.namespace()
    with ns.enter():
        tunnel = Forwarder(listen=True, device="rt0", address="10.7.0.1/24", route=["10.8.0.0/16"])
        tunnel.start()
    try:
        assert [str(network) for network in tunnel.routes] == ["10.8.0.0/16"]
        ns.run(["ip", "route", "add", "192.0.2.0/24", "dev", "rt0", "table", "77"])
        ns.run(["ip", "-6", "route", "add", "fd99::/64", "dev", "rt0"])
        assert snapshot(tunnel)["device"]["routes"] == ["10.8.0.0/16", "192.0.2.0/24", "fd99::/64"]
        check(snapshot(tunnel))
    finally:
        tunnel.stop()
    assert tunnel.routes == ()
