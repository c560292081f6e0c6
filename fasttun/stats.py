"""What a running tunnel has counted, as immutable snapshots. Taking one never slows the loop.

Not for: the counters themselves (`fasttun/_native/counters.pxd`) or how they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING

from .endpoint import Endpoint

if TYPE_CHECKING:
    from .wireguard.keys import PresharedKey, PublicKey

__all__ = ["DirectionStats", "PeerStats", "Stats", "WireGuardPeer"]


@dataclass(frozen=True)
class DirectionStats:
    """One direction's packets. Seen from this process: `outbound` is TUN to UDP, `inbound` is UDP to TUN.

    `packets_in == packets_out + sum(drops.values())` whenever the loop is at rest. Bytes are those of the
    inner packets, without framing.
    """

    packets_in: int
    bytes_in: int
    packets_out: int
    bytes_out: int
    drops: Mapping[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Packets dropped, for whatever reason."""
        return sum(self.drops.values())


@dataclass(frozen=True)
class PeerStats:
    """One peer: the outer endpoint, and the inner addresses that were learned behind it."""

    endpoint: Endpoint
    framing: str
    addresses: tuple[IPv4Address | IPv6Address, ...]
    inbound_packets: int
    inbound_bytes: int
    outbound_packets: int
    outbound_bytes: int
    silent_s: float
    """Seconds since a datagram was last accepted from it; `inf` when there was none."""


@dataclass(frozen=True)
class WireGuardPeer:
    """One peer of the WireGuard mode, as `wg show` gives it. Bytes are those of whole datagrams."""

    public_key: PublicKey
    preshared_key: PresharedKey | None
    endpoint: Endpoint | None
    allowed_ips: tuple[IPv4Network | IPv6Network, ...]
    last_handshake: float
    """When a session was last confirmed, seconds since 1970; 0 for never."""
    rx_bytes: int
    tx_bytes: int
    rx_packets: int
    tx_packets: int
    """Data packets and keepalives; `rx_bytes` and `tx_bytes` also count handshakes."""
    persistent_keepalive: int
    """Seconds; 0 when off."""
    queued: int = 0
    """Packets that wait for a session."""


@dataclass(frozen=True)
class Stats:
    """A snapshot of a tunnel: totals over all workers, and every peer."""

    uptime_s: float
    outbound: DirectionStats
    inbound: DirectionStats
    peers: tuple[PeerStats, ...] | tuple[WireGuardPeer, ...]
    system_calls: Mapping[str, int] = field(default_factory=dict)
    """Calls the loop made, by name (`read`, `write`, `sendmmsg`, `recvmmsg`, `poll`)."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """Transient errors that the loop survived, by errno name."""
    offloads: Mapping[str, str] = field(default_factory=dict)
    """`tun`, `udp-gso`, `udp-gro`, `batch`: `on`, or `off: ` and why."""
    events_lost: int = 0
    """Events for `on_peer` that found their ring full; in the WireGuard mode handshake messages."""
    control_drops: Mapping[str, int] = field(default_factory=dict)
    """Handshake messages that were not taken, by reason; empty in the plain mode."""
    aead: str = ""
    """The library that seals and opens (`ipsec-mb`, `evp`); empty in the plain mode."""
