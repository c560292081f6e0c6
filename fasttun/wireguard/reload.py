"""A changed file taken over by the tunnel that runs: as `wg syncconf`, peers that stay keep their sessions.

All that can be refused is looked at before the first change.
Not for: routes (`Quick.follow`), what only a new start can change (`later` names it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from .host import KEEP, look_up

if TYPE_CHECKING:
    from ..endpoint import Endpoint
    from ..stats import WireGuardPeer
    from .config import Config, PeerConfig
    from .tunnel import WireGuard

__all__ = ["Taken", "take_over"]

_AT_START = {"address": "Address", "dns": "DNS", "mtu": "MTU", "table": "Table", "pre_up": "PreUp",
             "post_up": "PostUp"}


@dataclass(frozen=True)
class Taken:
    """What came of it. later: settings of the file that have changed and count at the next start."""

    added: int
    removed: int
    changed: int
    later: tuple[str, ...]

    def __str__(self) -> str:
        text = f"peers: {self.added} added, {self.removed} removed, {self.changed} changed"
        return f"{text}; at the next start: {', '.join(self.later)}" if self.later else text


def take_over(tunnel: WireGuard, before: Config, after: Config) -> Taken:
    """Changes the running `tunnel`, which was set up from `before`, to be as `after`.

    A peer that has roamed stays where it is, unless the file now has another endpoint. No PrivateKey, ListenPort
    leaves them as they are. FasttunError, and then, but for a port or mark that is refused, nothing has changed.
    """
    key = after.private_key or tunnel.private_key
    wanted = {peer.public_key: peer for peer in after.peers}
    if key is not None and key.public in wanted:
        raise ConfigurationError("PublicKey", f"{key.public} is this interface's own", "a peer has the other's key")
    given = {peer.public_key: peer.endpoint for peer in before.peers}
    running = {peer.public_key: peer for peer in tunnel.peers}
    found = {peer.public_key: look_up(peer) for peer in after.peers
             if peer.public_key not in running or peer.endpoint != given.get(peer.public_key)}

    later = [name for field, name in _AT_START.items() if getattr(before, field) != getattr(after, field)]
    if after.fwmark != before.fwmark:
        if _is_default_route(before):  # the routing table goes by the mark
            later.append("FwMark")
        else:
            tunnel.set_fwmark(after.fwmark)
    if after.listen_port is not None:
        tunnel.set_listen_port(after.listen_port)
    if after.private_key is not None and after.private_key != tunnel.private_key:
        tunnel.set_private_key(after.private_key)
    removed = [public_key for public_key in running if public_key not in wanted]
    for public_key in removed:
        tunnel.remove_peer(public_key)
    changed = sum(_change(tunnel, running[public_key], peer, found.get(public_key))
                  for public_key, peer in wanted.items() if public_key in running)
    added = [peer for public_key, peer in wanted.items() if public_key not in running]
    for peer in added:
        tunnel.add_peer(peer, at=found[peer.public_key])
    return Taken(len(added), len(removed), changed, tuple(later))


def _is_default_route(config: Config) -> bool:
    return any(network.prefixlen == 0 for peer in config.peers for network in peer.allowed_ips)


def _change(tunnel: WireGuard, now: WireGuardPeer, wanted: PeerConfig, endpoint: Endpoint | None) -> bool:
    """Only what differs, so that no packet finds its peer without an address for a moment; whether there was any."""
    gone = [network for network in now.allowed_ips if network not in wanted.allowed_ips]
    new = [network for network in wanted.allowed_ips if network not in now.allowed_ips]
    secret = KEEP if (now.preshared_key or None) == (wanted.preshared_key or None) else wanted.preshared_key
    interval = KEEP if now.persistent_keepalive == wanted.persistent_keepalive else wanted.persistent_keepalive
    at = KEEP if endpoint is None or endpoint == now.endpoint else endpoint
    if not gone and not new and secret is interval is at is KEEP:
        return False
    tunnel.update_peer(wanted.public_key, preshared_key=secret, endpoint=at, name=wanted.endpoint,
                       persistent_keepalive=interval, allowed_ips=new, remove_allowed_ips=gone)
    return True
