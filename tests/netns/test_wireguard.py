"""The WireGuard mode between two hosts with real TUN devices: what TCP carries is intact, whatever happens below.

Not for: other implementations (tests/interop), the command and the control socket (test_updown, test_wg_command).
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from netns.test_offloads import refusing_kernel, retransmitted, transfer
from support.netns import Lab, Namespace, wait_until
from support.udp_proxy import Faults, UdpProxy
from support.wireguard import host_configs, lost, reaches, running

from fasttun.wireguard import keypairs, timers
from fasttun.wireguard.config import Config
from fasttun.wireguard.cookies import CookieChecker
from fasttun.wireguard.keys import PrivateKey

__all__ = ["refusing_kernel"]

pytestmark = pytest.mark.netns

SIZE = 6 << 20
A, B, A6, B6 = "10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"


def outer_address(link: Any, outer: int) -> str:
    return f"{link.a.v4}:51820" if outer == 4 else f"[{link.a.v6}]:51820"


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(timers, "REKEY_TIMEOUT", 0.3)
    monkeypatch.setattr(timers, "REKEY_TIMEOUT_JITTER_MAX", 0.01)
    monkeypatch.setattr(timers, "KEEPALIVE_TIMEOUT", 0.3)


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("off", [[], ["tun_offload"], ["udp_gso"], ["udp_gro"], ["tun_offload", "udp_gso", "udp_gro"]],
                         ids=" ".join)
def test_every_switch_carries_the_same_bytes(lab: Lab, off: list[str], outer: int) -> None:
    a, b, link = lab.pair()
    first, second = host_configs(outer_address(link, outer))
    options = dict.fromkeys(off, False)
    with running(a, first, **options) as near, running(b, second, **options) as far:
        reaches(b, A)
        for sender, receiver, host in ((b, a, A), (b, a, A6), (a, b, B), (a, b, B6)):
            transfer(sender, receiver, host, SIZE)
        for tunnel in (near, far):
            for name, state in tunnel.stats().offloads.items():
                switch = "tun_offload" if name == "tun" else name.replace("-", "_")
                assert (state == "on") == (switch not in off), (name, state)


@pytest.mark.parametrize("outer", [4, 6])
def test_what_fits_the_mtu_fits_the_path(lab: Lab, outer: int) -> None:
    a, b, link = lab.pair()
    first, second = host_configs(outer_address(link, outer))
    with running(a, first), running(b, second) as tunnel:
        reaches(b, A)
        assert tunnel.mtu == 1420
        for host, edge in ((A, 1420 - 28), (A6, 1420 - 48)):
            for size in (0, 1, 15, 16, 17, edge - 17, edge - 16, edge - 1, edge):
                b.run(["ping", "-c1", "-W2", "-Mdo", "-s", str(size), host])
            assert b.run(["ping", "-c1", "-W1", "-Mdo", "-s", str(edge + 1), host], check=False).returncode
            b.run(["ping", "-c1", "-W2", "-Mdont" if host == A else "-Mwant", "-s", "5000", host])
    for ns in (a, b):  # no datagram of ours was cut on the way
        counters = ns.run(["nstat", "-asz"]).stdout
        cut = {line.split()[0]: int(line.split()[1]) for line in counters.splitlines() if "FragCreates" in line}
        # Two pings of 5,000 bytes, inside, from each side: 4 fragments over IPv4, 4 over IPv6.
        assert cut["IpFragCreates"] <= 4, cut
        assert cut["Ip6FragCreates"] <= 4, cut


@pytest.mark.parametrize("outer", [4, 6])
def test_a_path_narrower_than_expected_carries_all_in_fragments(lab: Lab, outer: int) -> None:
    client, _, server, _, far = lab.routed(mtu=1280)
    first, second = host_configs(f"{far.b.v4}:51820" if outer == 4 else f"[{far.b.v6}]:51820")
    with running(server, first) as near, running(client, second) as other:
        reaches(client, A)
        assert lost(client, A, 5, 0.05, "-s1392", "-Mdo") <= 1  # by which the path's MTU is found
        transfer(client, server, A, SIZE)
        transfer(server, client, B6, SIZE)
        for tunnel in (near, other):
            assert tunnel.stats().outbound.drops["too_big"] == 0
            assert tunnel.stats().offloads["udp-gso"] == "on"


def test_a_larger_mtu_is_followed_while_it_runs(lab: Lab) -> None:
    a, b, link = lab.pair(mtu=9100)
    first, second = host_configs(outer_address(link, 4))
    with running(a, first), running(b, second) as tunnel:
        reaches(b, A)
        for ns in (a, b):
            ns.ip("link", "set", "wg0", "mtu", "8920")
        b.run(["ping", "-c1", "-W2", "-Mdo", "-s", str(8920 - 28), A])
        transfer(b, a, A, SIZE)
        wait_until(lambda: b.run(["ping", "-c1", A]) and tunnel.mtu == 8920, 5, 0.3)


def test_a_transfer_survives_another_address_and_another_port(lab: Lab) -> None:
    a, b, link = lab.pair()
    first, second = host_configs(outer_address(link, 4))
    with running(a, first) as near, running(b, second) as far:
        reaches(b, A)
        done = threading.Event()
        moves: list[str] = []

        def move() -> None:
            old = link.b.v4
            for number in range(11, 90):
                new = f"10.99.0.{number}"
                b.ip("address", "add", f"{new}/24", "dev", link.b.device)
                b.ip("address", "del", f"{old}/24", "dev", link.b.device)
                with b.enter():
                    far.set_listen_port(0)
                moves.append(new)
                old = new
                if done.wait(0.05):
                    return

        b.sysctl("net.ipv4.conf.all.promote_secondaries", 1)
        mover = threading.Thread(target=move)
        start, first_handshake = near.peers[0].endpoint, far.peers[0].last_handshake
        mover.start()
        try:
            for sender, receiver, host in ((b, a, A), (a, b, B), (b, a, A6), (a, b, B6)):
                transfer(sender, receiver, host, 4 * SIZE)
        finally:
            done.set()
            mover.join()
        assert len(moves) >= 4
        b.run(["ping", "-c1", "-W2", A])
        end = near.peers[0].endpoint
        assert end.host != start.host
        assert end.port != start.port
        # All of it under the first session: a change of address needs no handshake.
        assert far.peers[0].last_handshake == first_handshake


@pytest.mark.parametrize("keepalive", [1, 0])
def test_persistent_keepalive_keeps_a_nat_open(lab: Lab, keepalive: int) -> None:
    client, router, server, _near, far = lab.routed(masquerade=True)
    router.sysctl("net.netfilter.nf_conntrack_udp_timeout", 2)
    router.sysctl("net.netfilter.nf_conntrack_udp_timeout_stream", 2)
    first, second = host_configs(f"{far.b.v4}:51820", keepalive=keepalive)
    with running(server, first), running(client, second):
        reaches(client, A)
        time.sleep(3.5)
        # From outside, to who has said nothing by itself meanwhile.
        answered = server.run(["ping", "-c1", "-W1", B], check=False).returncode == 0
        assert answered == bool(keepalive)
        reaches(client, A)


def test_either_side_restarted_is_reached_again(lab: Lab, hasty: None) -> None:
    a, b, link = lab.pair()
    first, second = host_configs(outer_address(link, 4))
    with running(b, second) as client:
        with running(a, first):
            reaches(b, A)
        with running(a, first):
            before = client.peers[0].last_handshake
            reaches(b, A)  # the listener knows no endpoint: the client must notice
            assert client.peers[0].last_handshake > before
            client.stop()
            with running(b, second):
                reaches(b, A)
                reaches(a, B)


def test_a_wrong_key_gets_nothing_through(lab: Lab) -> None:
    a, b, link = lab.pair()
    first, second = host_configs(outer_address(link, 4))
    with running(a, first) as listener, running(b, replace(second, private_key=PrivateKey.generate())):
        assert lost(b, A, 2, 0.2) == 2
        stats = listener.stats()
        assert stats.control_drops == {"unknown-peer": 1}
        assert stats.peers[0].last_handshake == 0


def test_answers_leave_from_the_address_that_was_asked(lab: Lab) -> None:
    a, b, link = lab.pair()
    a.ip("address", "add", "10.99.0.77/24", "dev", link.a.device)
    first, second = host_configs("10.99.0.77:51820")
    with running(a, first) as listener, running(b, second) as client:
        reaches(b, A)
        transfer(b, a, A, 1 << 20)
        transfer(a, b, B, 1 << 20)
        # An answer from elsewhere would have moved the client's idea of where the listener is.
        assert str(client.peers[0].endpoint) == "10.99.0.77:51820"
        a.ip("address", "del", "10.99.0.77/24", "dev", link.a.device)
        assert lost(a, B, 20, 0.01) == 0
        assert str(client.peers[0].endpoint) == f"{link.a.v4}:51820"
        transfer(b, a, A, 1 << 20)
        assert listener.stats().outbound.drops["send_failed"] == 0


def test_nothing_is_lost_while_sessions_are_renewed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "REKEY_TIMEOUT", 0.1)
    monkeypatch.setattr(keypairs, "REKEY_AFTER_TIME", 0.3)
    done: list[object] = []
    a, b, link = lab.pair()
    first, second = host_configs(outer_address(link, 4))
    with running(a, first), running(b, second, on_handshake=done.append):
        reaches(b, A)
        assert lost(b, A, 1000, 0.002, "-s1300") == 0
        assert len(done) >= 4
        before = retransmitted(b)
        transfer(b, a, A, 8 * SIZE)
        assert retransmitted(b) - before <= 2


FLOOD = """
import random, socket, sys, time
host, port, key = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
from hashlib import blake2s
messages = []
for _ in range(2000):
    body = b"\\1\\0\\0\\0" + random.randbytes(112)
    messages.append(body + blake2s(body, digest_size=16, key=key).digest() + bytes(16))
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((host, port))
end = time.monotonic() + 2.5
sent = 0
print("started", flush=True)
while time.monotonic() < end:
    for message in messages:
        try:
            sock.send(message)
            sent += 1
        except OSError:
            pass
print(sent, flush=True)
"""


@pytest.mark.parametrize("right", [True, False], ids=["right mac1", "wrong mac1"])
def test_a_flood_of_initiations_does_not_starve_the_tunnel(lab: Lab, right: bool) -> None:
    a, b, link = lab.pair()
    stranger = lab.namespace("m")
    road = lab.link(a, stranger)
    first, second = host_configs(outer_address(link, 4))
    key = CookieChecker((first.private_key if right else PrivateKey.generate()).public).mac1_key
    with running(a, first) as listener, running(b, second):
        reaches(b, A)
        flood = stranger.popen([sys.executable, "-c", FLOOD, road.a.v4, "51820", key.hex()])
        assert flood.stdout.readline() == "started\n"
        gone = lost(b, A, 100, 0.01)
        started = time.monotonic()
        transfer(b, a, A, SIZE)
        took = time.monotonic() - started
        assert flood.poll() is None, "the flood was over before the tunnel was measured"
        sent = int(flood.stdout.readline())
        stats = listener.stats()
        assert sent > 20000
        assert gone <= 2
        assert took < 3
        if right:
            assert stats.control_drops["cookie-needed"] > 100
        else:
            assert stats.control_drops.get("bad-mac1", 0) > sent / 4
            assert "cookie-needed" not in stats.control_drops
        # What is new gets in again as soon as it is over.
        newcomer = copy.copy(second.private_key)
        assert newcomer is not None
        reaches(b, A6)


def test_a_file_is_intact_through_a_wire_that_breaks_everything(lab: Lab) -> None:
    client, router, server, near, far = lab.routed()
    first, second = host_configs(f"{near.b.v4}:51820")
    with running(server, first) as listener, running(client, second) as other, \
            UdpProxy((far.b.v4, 51820), listen=(near.b.v4, 51820), ns=router, seed=5) as proxy:
        reaches(client, A)
        proxy.to_server = proxy.to_client = Faults(
            lose=0.005, duplicate=0.02, truncate=0.01, corrupt=0.01, inject=0.05, reorder=0.02)
        timer = threading.Timer(0.3, proxy.rebind)
        timer.start()
        transfer(client, server, A, 1 << 20)
        transfer(server, client, B, 1 << 20)
        timer.join()
        drops = listener.stats().inbound.drops
        assert drops["forged"] > 0
        assert drops["replayed"] > 0
        assert drops["malformed"] + drops["unknown_index"] > 0
        assert other.stats().inbound.drops["forged"] > 0


# ------------------------------------------------------------------------- in a process of its own

NODE = """
import json, sys
from fasttun import WireGuard
from fasttun.wireguard.config import Config
tunnel = WireGuard(Config.parse(sys.stdin.readline().replace("|", chr(10))))
with tunnel:
    print("ready", flush=True)
    sys.stdin.readline()
stats = tunnel.stats()
for direction in (stats.outbound, stats.inbound):
    assert direction.packets_in == direction.packets_out + direction.dropped, direction
print(json.dumps(dict(stats.offloads)), flush=True)
"""


def start(ns: Namespace, config: Config, env: dict[str, str]) -> subprocess.Popen[str]:
    node = ns.popen([sys.executable, "-c", NODE], stdin=subprocess.PIPE, env=env)
    assert node.stdin is not None
    assert node.stdout is not None
    node.stdin.write(config.text().replace("\n", "|") + "\n")
    node.stdin.flush()
    assert node.stdout.readline() == "ready\n", node.stderr.read()
    return node


@pytest.mark.parametrize(("variable", "name"), [("REFUSE_GSO_AFTER", "udp-gso"), ("REFUSE_JOIN_AFTER", "tun")])
def test_an_offload_taken_back_in_mid_transfer_loses_nothing(
    lab: Lab, refusing_kernel: Path, variable: str, name: str
) -> None:
    a, b, link = lab.pair()
    env = {"LD_PRELOAD": str(refusing_kernel), variable: "40"}
    nodes = [start(ns, config, env) for ns, config in zip((a, b), host_configs(outer_address(link, 4)), strict=True)]
    reaches(b, A)
    before = retransmitted(b)
    transfer(b, a, A, 4 * SIZE)
    assert retransmitted(b) - before <= 2
    states = []
    for node in nodes:
        out, errors = node.communicate("end\n", timeout=15)
        assert node.returncode == 0, errors
        states.append(json.loads(out)[name])
    assert [state for state in states if "given up" in state], states
