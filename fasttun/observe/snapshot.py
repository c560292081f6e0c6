"""A running tunnel as one JSON document, version 1: docs/status-schema.md describes every field.

Holds no secret: public keys only. Rates are the reader's to make, of two documents.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from typing import Any

from .._version import __version__
from ..errors import FasttunError
from ..stats import Bursts, DirectionStats, PeerStats, WireGuardPeer

__all__ = ["SCHEMA", "snapshot"]

SCHEMA = 1


def snapshot(tunnel: Any) -> dict[str, Any]:
    """The document for a `Forwarder` or a `WireGuard`, running or stopped."""
    stats = tunnel.stats()
    return {
        "schema": SCHEMA,
        "version": __version__,
        "pid": os.getpid(),
        "time": time.time(),
        "mode": tunnel.mode,
        "name": _name(tunnel),
        "running": tunnel.running,
        "uptime_s": round(stats.uptime_s, 3),
        "device": {"name": _name(tunnel), "mtu": tunnel.mtu, "addresses": _addresses(tunnel),
                   "routes": [str(network) for network in tunnel.routes]},
        "local_port": tunnel.local_port,
        "offloads": dict(stats.offloads),
        "aead": stats.aead or None,
        "workers": [{"cpu_s": seconds} for seconds in tunnel.worker_cpu_s()],
        "outbound": _direction(stats.outbound),
        "inbound": _direction(stats.inbound),
        "system_calls": dict(stats.system_calls),
        "errors": dict(stats.errors),
        "control_drops": dict(stats.control_drops),
        "events_lost": stats.events_lost,
        "peers": [_wireguard(peer) if isinstance(peer, WireGuardPeer) else _plain(peer) for peer in stats.peers],
    }


def _name(tunnel: Any) -> str:
    return str(tunnel.device.name) if tunnel.device is not None else getattr(tunnel, "name", "descriptor")


def _addresses(tunnel: Any) -> list[str]:
    with contextlib.suppress(FasttunError, OSError):
        if tunnel.device is not None:
            return [str(address) for address in tunnel.device.addresses()]
    return []


def _direction(direction: DirectionStats) -> dict[str, Any]:
    return {
        "packets_in": direction.packets_in, "bytes_in": direction.bytes_in, "packets_out": direction.packets_out,
        "bytes_out": direction.bytes_out, "drops": dict(direction.drops),
        "bursts_in": _bursts(direction.bursts_in), "bursts_out": _bursts(direction.bursts_out),
    }


def _bursts(bursts: Bursts) -> dict[str, Any]:
    return {"calls": list(bursts.calls), "packets": bursts.packets}


def _plain(peer: PeerStats) -> dict[str, Any]:
    return {
        "id": str(peer.endpoint),
        "endpoint": str(peer.endpoint),
        "addresses": [str(address) for address in peer.addresses],
        "framing": peer.framing,
        "silent_s": None if math.isinf(peer.silent_s) else round(peer.silent_s, 3),
        "rx_packets": peer.inbound_packets, "rx_bytes": peer.inbound_bytes,
        "tx_packets": peer.outbound_packets, "tx_bytes": peer.outbound_bytes,
        "round_trip_s": peer.round_trip_s, "loss": peer.loss,
    }


def _wireguard(peer: WireGuardPeer) -> dict[str, Any]:
    return {
        "id": str(peer.public_key),
        "endpoint": str(peer.endpoint) if peer.endpoint is not None else None,
        "addresses": [str(network) for network in peer.allowed_ips],
        "last_handshake": peer.last_handshake or None,
        "persistent_keepalive": peer.persistent_keepalive,
        "preshared_key": peer.preshared_key is not None,
        "queued": peer.queued,
        "rx_packets": peer.rx_packets, "rx_bytes": peer.rx_bytes, "rx_expected": peer.rx_expected,
        "tx_packets": peer.tx_packets, "tx_bytes": peer.tx_bytes,
        "round_trip_s": peer.round_trip_s, "loss": peer.loss,
    }
