"""A WireGuard device that only remembers what it was told: for tests of what drives one.

Follows the live side of `fasttun.wireguard.tunnel.WireGuard`; `calls` has every change in order, by its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any

from fasttun.endpoint import Endpoint, resolve
from fasttun.errors import ConfigurationError
from fasttun.stats import WireGuardPeer
from fasttun.wireguard.keys import PrivateKey, PublicKey

if TYPE_CHECKING:
    from fasttun.wireguard.config import PeerConfig

__all__ = ["FakeDevice", "peer"]

Network = IPv4Network | IPv6Network


def peer(public_key: PublicKey, **fields: Any) -> WireGuardPeer:
    """A peer of which nothing is known but what is given."""
    empty: dict[str, Any] = {
        "preshared_key": None, "endpoint": None, "allowed_ips": (), "last_handshake": 0.0, "rx_bytes": 0,
        "tx_bytes": 0, "rx_packets": 0, "tx_packets": 0, "persistent_keepalive": 0,
    }  # fmt: skip
    return WireGuardPeer(public_key=public_key, **(empty | fields))


class FakeDevice:
    def __init__(self) -> None:
        self.private_key: PrivateKey | None = None
        self.listen_port = 0
        self.fwmark = 0
        self.by_key: dict[PublicKey, WireGuardPeer] = {}
        self.calls: list[str] = []
        self.fails: dict[str, Exception] = {}
        """What the call of that name raises."""

    @property
    def peers(self) -> tuple[WireGuardPeer, ...]:
        return tuple(self.by_key.values())

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def set_private_key(self, private_key: PrivateKey | None, /) -> None:
        self._call("set_private_key")
        self.private_key = private_key

    def set_listen_port(self, port: int, /) -> None:
        self._call("set_listen_port")
        self.listen_port = port

    def set_fwmark(self, fwmark: int, /) -> None:
        self._call("set_fwmark")
        self.fwmark = fwmark

    def add_peer(self, config: PeerConfig, /) -> None:
        self._call("add_peer")
        if config.public_key in self.by_key or (
            self.private_key is not None and self.private_key.public == config.public_key
        ):
            raise ConfigurationError("PublicKey", "is there already, or is this device's own")
        endpoint = None
        if config.endpoint is not None:
            host, _, port = config.endpoint.rpartition(":")
            endpoint = _literal(host.strip("[]"), int(port))
        self.by_key[config.public_key] = peer(
            config.public_key, preshared_key=config.preshared_key, endpoint=endpoint,
            persistent_keepalive=config.persistent_keepalive)  # fmt: skip
        self._allow(config.public_key, config.allowed_ips)

    def remove_peer(self, public_key: PublicKey, /) -> None:
        self._call("remove_peer")
        self.by_key.pop(public_key, None)

    def replace_peers(self) -> None:
        self._call("replace_peers")
        self.by_key.clear()

    def update_peer(
        self,
        public_key: PublicKey,
        /,
        *,
        allowed_ips: Iterable[Network] = (),
        replace_allowed_ips: bool = False,
        remove_allowed_ips: Iterable[Network] = (),
        **given: Any,
    ) -> None:
        self._call("update_peer")
        self.by_key[public_key] = replace(self.by_key[public_key], **given)
        if replace_allowed_ips:
            self.by_key[public_key] = replace(self.by_key[public_key], allowed_ips=())
        self._disallow(public_key, set(remove_allowed_ips))
        self._allow(public_key, allowed_ips)

    def _allow(self, public_key: PublicKey, networks: Iterable[Network]) -> None:
        networks = tuple(networks)
        for other in list(self.by_key):
            self._disallow(other, set(networks))
        entry = self.by_key[public_key]
        self.by_key[public_key] = replace(entry, allowed_ips=entry.allowed_ips + networks)

    def _disallow(self, public_key: PublicKey, networks: set[Network]) -> None:
        entry = self.by_key[public_key]
        kept = tuple(network for network in entry.allowed_ips if network not in networks)
        self.by_key[public_key] = replace(entry, allowed_ips=kept)


def _literal(host: str, port: int) -> Endpoint:
    return resolve(host, port)[0]
