"""`--key FILE --peer PUBLICKEY`: the simple command's flags as a WireGuard device.

Not for: configuration files (`fasttun up`), key files of others (`fasttun genkey` makes them).
"""

from __future__ import annotations

import ipaddress
import logging
import os
import stat
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..config import TunnelConfig
    from ..wireguard.config import PeerConfig
    from ..wireguard.keys import PrivateKey
    from ..wireguard.tunnel import WireGuard

__all__ = ["KEEPALIVE_S", "factory"]

_log = logging.getLogger(__name__)

KEEPALIVE_S = 25
"""A client keeps its way through a NAT open; the interval that wg(8) recommends."""
_EVERYTHING = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
_PLAIN_ONLY = {"bind": None, "allow": (), "framing": "auto", "workers": 1, "batch": True,
               "fast_path": False, "tun_fd": None, "udp_fd": None}


def factory(config: TunnelConfig, key: str | None, peers: Sequence[str]) -> Callable[..., WireGuard]:
    """What makes the tunnel, in place of `Forwarder.from_config`. ConfigurationError names the flag to change."""
    if key is None:
        raise ConfigurationError("key", "is missing", "--peer needs --key FILE; make one with fasttun genkey > FILE")
    if not peers:
        raise ConfigurationError("peer", "is missing", "--key needs the other side's public key: --peer PUBLICKEY")
    for field, default in _PLAIN_ONLY.items():
        if getattr(config, field) != default:
            raise ConfigurationError(field, "is of the tunnel without --key", "leave it out")
    if config.server is not None and len(peers) > 1:
        raise ConfigurationError("peer", "is given more than once", "a --server is one peer")
    members = [_peer(text, alone=len(peers) == 1, config=config) for text in peers]
    private = read_key(key)

    def make(config: TunnelConfig, *, before_threads: Callable[[], object] | None = None) -> WireGuard:
        from ..wireguard.config import Config
        from ..wireguard.tunnel import WireGuard

        return WireGuard(
            Config(private_key=private, listen_port=config.port if config.listen else None,
                   address=config.address, mtu=config.mtu, peers=tuple(members)),
            name=config.device, routes=config.route, tun_offload=config.tun_offload, udp_gso=config.udp_gso,
            udp_gro=config.udp_gro, busy_poll_us=config.busy_poll_us, before_threads=before_threads)

    return make


def read_key(path: str) -> PrivateKey:
    """The private key in a file. ConfigurationError, which never repeats it; a warning when others may read it."""
    from ..wireguard.keys import PrivateKey

    try:
        with open(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(256)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ConfigurationError("key", f"{path}: {reason}", "make one with fasttun genkey > FILE") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        _log.warning("%s: others can read this private key; chmod 600 it", path)
    return PrivateKey.from_base64(text)


def _peer(text: str, *, alone: bool, config: TunnelConfig) -> PeerConfig:
    """PUBLICKEY[,CIDR...]: without networks the only peer may have every address."""
    from ..wireguard.config import PeerConfig
    from ..wireguard.keys import PublicKey

    key, *words = text.split(",")
    networks: list[Any] = []
    for word in words:
        try:
            networks.append(ipaddress.ip_network(word.strip(), strict=False))
        except ValueError:
            raise ConfigurationError("peer", f"{word!r} is no network", "as in KEY,10.7.0.2/32") from None
    if not networks and not alone:
        raise ConfigurationError(
            "peer", f"{key} has no address", "with several peers give each its own: --peer KEY,10.7.0.2")
    endpoint = None
    if config.server is not None:
        host = f"[{config.server}]" if ":" in config.server and not config.server.startswith("[") else config.server
        endpoint = f"{host}:{config.port}"
    return PeerConfig(
        public_key=PublicKey.from_base64(key), allowed_ips=tuple(networks) or _EVERYTHING, endpoint=endpoint,
        persistent_keepalive=KEEPALIVE_S if endpoint is not None else 0)
