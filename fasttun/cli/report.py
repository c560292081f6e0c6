"""A tunnel's counters in words: the summary at exit, and the fuller report that SIGUSR1 asks for."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..stats import WireGuardPeer

if TYPE_CHECKING:
    from ..stats import DirectionStats, PeerStats, Stats

__all__ = ["Line", "counters", "size", "summary"]

Line = tuple[str, dict[str, Any]]
"""What a person reads, and the same as fields for the JSON log."""


def summary(stats: Stats) -> Iterator[Line]:
    """One line a direction: packets, bytes, drops by reason."""
    yield _direction("outbound", stats.outbound)
    yield _direction("inbound", stats.inbound)


def counters(stats: Stats) -> Iterator[Line]:
    """The summary, every peer, and how the loop fares."""
    yield from summary(stats)
    for peer in stats.peers:
        yield _wireguard_peer(peer) if isinstance(peer, WireGuardPeer) else _peer(peer)
    calls, errors = dict(stats.system_calls), dict(stats.errors)
    text = f"up {stats.uptime_s:.0f} s; system calls: {_listed(calls) or 'none'}"
    if errors:
        text += f"; survived: {_listed(errors)}"
    if stats.offloads:
        text += "; " + ", ".join(f"{name} {state}" for name, state in stats.offloads.items())
    if stats.aead:
        text += f"; sealed by {stats.aead}"
    if stats.events_lost:
        text += f"; events lost: {stats.events_lost}"
    yield (
        text,
        {
            "uptime_s": round(stats.uptime_s, 3),
            "system_calls": calls,
            "errors": errors,
            "offloads": dict(stats.offloads),
            "events_lost": stats.events_lost,
            "aead": stats.aead,
        },
    )


def _direction(name: str, direction: DirectionStats) -> Line:
    drops = {reason: count for reason, count in direction.drops.items() if count}
    passed = f"{_packets(direction.packets_out)}, {size(direction.bytes_out)}"
    text = f"{name}: {passed}; dropped {direction.dropped}"
    if drops:
        text += f" ({_listed(drops)})"
    fields = dataclasses.asdict(direction)
    fields["drops"] = drops
    return text, {"direction": name, **fields}


def _peer(peer: PeerStats) -> Line:
    inside = ", ".join(map(str, peer.addresses)) or "no address seen inside yet"
    silent = "never heard" if math.isinf(peer.silent_s) else f"heard {peer.silent_s:.1f} s ago"
    text = (
        f"peer {peer.endpoint} ({inside}), {peer.framing}, {silent}: "
        f"to it {_packets(peer.outbound_packets)}, {size(peer.outbound_bytes)}; "
        f"from it {_packets(peer.inbound_packets)}, {size(peer.inbound_bytes)}"
    )
    return text, {
        "peer": str(peer.endpoint),
        "addresses": [str(address) for address in peer.addresses],
        "framing": peer.framing,
        "silent_s": None if math.isinf(peer.silent_s) else round(peer.silent_s, 3),
        "outbound_packets": peer.outbound_packets,
        "outbound_bytes": peer.outbound_bytes,
        "inbound_packets": peer.inbound_packets,
        "inbound_bytes": peer.inbound_bytes,
    }


def _wireguard_peer(peer: WireGuardPeer) -> Line:
    age = time.time() - peer.last_handshake
    session = f"last handshake {age:.0f} s ago" if peer.last_handshake else "no handshake yet"
    networks = ", ".join(map(str, peer.allowed_ips)) or "no allowed IPs"
    text = (
        f"peer {peer.public_key} at {peer.endpoint or 'no endpoint yet'} ({networks}), {session}: "
        f"to it {_packets(peer.tx_packets)}, {size(peer.tx_bytes)}; "
        f"from it {_packets(peer.rx_packets)}, {size(peer.rx_bytes)}"
    )
    return text, {
        "peer": str(peer.public_key),
        "endpoint": str(peer.endpoint) if peer.endpoint else None,
        "allowed_ips": [str(network) for network in peer.allowed_ips],
        "last_handshake": round(peer.last_handshake, 3),
        "outbound_packets": peer.tx_packets,
        "outbound_bytes": peer.tx_bytes,
        "inbound_packets": peer.rx_packets,
        "inbound_bytes": peer.rx_bytes,
    }


def _packets(count: int) -> str:
    return f"{count} packet" if count == 1 else f"{count} packets"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def size(count_bytes: int) -> str:
    """Bytes in decimal units, three digits: 999 B, 1.18 MB."""
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    if unit == "B":
        return f"{count_bytes} B"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
