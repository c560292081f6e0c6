"""What a running tunnel has counted, as immutable snapshots. Taking one never slows the loop.

Not for: the counters themselves (`fasttun/_native/counters.pxd`) or how they are shown.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any

from .endpoint import Endpoint

if TYPE_CHECKING:
    from .wireguard.keys import PresharedKey, PublicKey

__all__ = ["BURST_LIMITS", "Bursts", "DirectionStats", "LossWindow", "PeerStats", "Stats", "WireGuardPeer"]

BURST_LIMITS = tuple(1 << bits for bits in range(13))
"""Packets a call, the upper bound of each bucket of `Bursts.calls` but the last, which has none."""


@dataclass(frozen=True)
class Bursts:
    """How many packets one system call carried. Calls that carried none are not among them."""

    calls: tuple[int, ...] = (0,) * (len(BURST_LIMITS) + 1)
    """By size: up to 1, 2, 4, ... 4096 packets (`BURST_LIMITS`), each above the one before; then more."""
    packets: int = 0
    """Of all these calls, in the socket's case datagrams."""

    @property
    def count(self) -> int:
        """All calls."""
        return sum(self.calls)

    @classmethod
    def total(cls, many: Iterable[tuple[Sequence[int], int]]) -> Bursts:
        """Of several workers."""
        counted = list(many)
        return cls(tuple(map(sum, zip(*(calls for calls, _ in counted), strict=True))) or cls().calls,
                   sum(packets for _, packets in counted))


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
    bursts_in: Bursts = Bursts()
    """Of the calls that took packets: from the TUN, or from the socket."""
    bursts_out: Bursts = Bursts()
    """Of the calls that handed packets on."""

    @classmethod
    def total(cls, many: Sequence[Mapping[str, Any]], packets: int = 0, size: int = 0) -> DirectionStats:
        """Of several workers' counters, and of `packets` and their bytes that passed outside of these."""
        drops: Counter[str] = Counter()
        for one in many:
            drops.update(one["drops"])
        return cls(
            packets_in=packets + sum(one["packets_in"] for one in many),
            bytes_in=size + sum(one["bytes_in"] for one in many),
            packets_out=packets + sum(one["packets_out"] for one in many),
            bytes_out=size + sum(one["bytes_out"] for one in many),
            drops=dict(drops),
            bursts_in=Bursts.total(one["bursts_in"] for one in many),
            bursts_out=Bursts.total(one["bursts_out"] for one in many),
        )

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
    round_trip_s: float | None = None
    """Of the last greeting that the server has answered; None on a listener, and from a server that answers none."""
    loss: float | None = None
    """Share, 0 to 1, of the last 32 greetings that had no answer; None as above."""


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
    rx_expected: int = 0
    """Packets that it has sent, by their counters, up to the last that came: less `rx_packets`, those lost."""
    round_trip_s: float | None = None
    """From our last handshake initiation that was answered to its response; None when we have begun none."""
    loss: float | None = None
    """Share, 0 to 1, of the packets sent to us in the last half minute that did not come; None without any."""


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


class LossWindow:
    """The share of packets lost lately, of two counters that are looked at now and then. Not for threads."""

    LENGTH_S = 30.0
    """How far back the share reaches, or to the last look before that."""
    STEP_S = 1.0

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int, int]] = deque([(float("-inf"), 0, 0)])

    def loss(self, now: float, expected: int, received: int) -> float | None:
        """From 0 to 1; None when none was expected. now: seconds, monotonic."""
        looks = self._looks
        while len(looks) > 1 and looks[1][0] <= now - self.LENGTH_S:
            looks.popleft()
        _, expected_before, received_before = looks[0]
        if now - looks[-1][0] >= self.STEP_S:
            looks.append((now, expected, received))
        fresh = expected - expected_before
        if fresh <= 0:
            return None
        return min(1.0, max(0.0, 1 - (received - received_before) / fresh))
