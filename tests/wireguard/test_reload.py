"""A changed configuration taken over by a running tunnel: only what differs changes, and all of it or nothing.

Not for: the signal, routes, the file itself (tests/netns/test_updown.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.netns import wait_until
from support.tunnels import bind_udp
from support.wireguard import at, ends, exchange, networks, pair_of_configs

from fasttun import ConfigurationError, WireGuard
from fasttun.errors import EndpointError
from fasttun.wireguard import host
from fasttun.wireguard.config import Config, PeerConfig
from fasttun.wireguard.keys import PresharedKey, PrivateKey, PublicKey
from fasttun.wireguard.reload import Taken, take_over


def other(*allowed: str, **settings: Any) -> PeerConfig:
    return PeerConfig(PrivateKey.generate().public, None, networks(*allowed), **settings)


def allowed(tunnel: WireGuard) -> dict[PublicKey, set[str]]:
    return {peer.public_key: set(map(str, peer.allowed_ips)) for peer in tunnel.peers}


def test_peers_come_change_and_go_and_the_session_goes_on() -> None:
    before, far = pair_of_configs()
    with ends((before, far)) as pair:
        exchange(pair)
        tunnel, (known,) = pair.a, before.peers
        wait_until(lambda: tunnel.peers[0].last_handshake)
        session = tunnel.peers[0].last_handshake, tunnel.peers[0].endpoint
        new = other("10.9.1.0/24", endpoint="127.0.0.1:7", persistent_keepalive=3)
        secret = PresharedKey.generate()
        after = replace(before, peers=(known, new))
        assert take_over(tunnel, before, after) == Taken(1, 0, 0, ())
        assert allowed(tunnel)[new.public_key] == {"10.9.1.0/24"}
        assert (tunnel.peers[0].last_handshake, tunnel.peers[0].endpoint) == session, "it has roamed, and stays"
        exchange(pair, b"on")

        moved = replace(new, allowed_ips=networks("10.9.2.0/24"), preshared_key=secret, persistent_keepalive=0,
                        endpoint="localhost:8")
        wider = replace(known, allowed_ips=(*known.allowed_ips, *networks("10.9.1.0/24")))
        third = replace(before, peers=(wider, moved), address=(), mtu=1280, post_up=("true",), post_down=("true",))
        told = take_over(tunnel, after, third)
        assert str(told) == "peers: 0 added, 0 removed, 2 changed; at the next start: MTU, PostUp"
        assert allowed(tunnel) == {known.public_key: {"10.9.0.2/32", "fd09::2/128", "10.9.1.0/24"},
                                   moved.public_key: {"10.9.2.0/24"}}
        changed = next(peer for peer in tunnel.peers if peer.public_key == moved.public_key)
        assert changed.endpoint is not None
        assert (changed.preshared_key, changed.persistent_keepalive, changed.endpoint.port) == (secret, 0, 8)
        assert tunnel._host is not None
        assert tunnel._host._members[moved.public_key].given == "localhost:8", "looked up again when it is silent"
        exchange(pair, b"still on")

        assert take_over(tunnel, third, third) == Taken(0, 0, 0, ())
        assert take_over(tunnel, third, before) == Taken(0, 1, 1, ("MTU", "PostUp"))
        assert allowed(tunnel) == {known.public_key: {"10.9.0.2/32", "fd09::2/128"}}
        assert tunnel.peers[0].last_handshake == session[0]
        exchange(pair, b"to the end")


def test_port_and_key_change_only_when_they_are_given() -> None:
    before, far = pair_of_configs()
    with ends((before, far)) as pair:
        tunnel, port = pair.a, pair.a.listen_port
        take_over(tunnel, before, replace(before, private_key=None, listen_port=None))
        assert (tunnel.private_key, tunnel.listen_port) == (before.private_key, port)
        with bind_udp() as free:
            wanted = free.getsockname()[1]
        take_over(tunnel, before, replace(before, listen_port=wanted))
        assert tunnel.listen_port == wanted
        pair.b.update_peer(pair.b.peers[0].public_key, endpoint=at(pair.a))
        exchange(pair)
        key = PrivateKey.generate()
        take_over(tunnel, before, replace(before, private_key=key))
        assert tunnel.private_key == key


def test_what_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int) -> Any:
        raise EndpointError("look up", host, 0, reason="no such name")

    before, far = pair_of_configs()
    with ends((before, far)) as pair:
        assert before.private_key is not None
        monkeypatch.setattr(host, "resolve", resolve)
        own = PeerConfig(before.private_key.public)
        for peers, error in (((own,), ConfigurationError),
                             ((other("10.1.0.0/16"), other(endpoint="gone.example:1")), EndpointError),
                             ((replace(before.peers[0], endpoint="gone.example:1"),), EndpointError)):
            with pytest.raises(error):
                take_over(pair.a, before, Config(private_key=None, listen_port=1, peers=peers))
        assert allowed(pair.a) == {before.peers[0].public_key: {"10.9.0.2/32", "fd09::2/128"}}
        assert pair.a.private_key == before.private_key
        exchange(pair)


def test_a_mark_that_routes_go_by_waits_for_the_next_start() -> None:
    before, far = pair_of_configs()
    everything = replace(before, peers=(replace(before.peers[0], allowed_ips=networks("0.0.0.0/0")),))
    with ends((everything, far)) as pair:
        assert take_over(pair.a, everything, replace(everything, fwmark=7)).later == ("FwMark",)
        assert pair.a.fwmark == 0
