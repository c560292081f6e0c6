"""wg-quick's configuration format: a file is a `Config`, and a `Config` is a file again.

Everything that wg-quick(8) and wg(8) name is read, in any order and case. Not for: editing a file in place
(`store`), nor for carrying out what it says (`tunnel`, `quick`).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from .keys import PresharedKey, PrivateKey, PublicKey

__all__ = ["Config", "PeerConfig"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


@dataclass(frozen=True)
class PeerConfig:
    public_key: PublicKey
    preshared_key: PresharedKey | None = None
    allowed_ips: tuple[Network, ...] = ()
    endpoint: str | None = None
    persistent_keepalive: int = 0
    name: str | None = None


@dataclass(frozen=True)
class Config:
    private_key: PrivateKey | None
    listen_port: int | None = None
    fwmark: int = 0
    address: tuple[Interface, ...] = ()
    dns: tuple[str, ...] = ()
    mtu: int | None = None
    table: str = "auto"
    pre_up: tuple[str, ...] = ()
    post_up: tuple[str, ...] = ()
    pre_down: tuple[str, ...] = ()
    post_down: tuple[str, ...] = ()
    save_config: bool = False
    peers: tuple[PeerConfig, ...] = field(default=())
