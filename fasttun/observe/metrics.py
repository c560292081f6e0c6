"""A running tunnel for Prometheus, by prometheus-client with a registry of its own: one snapshot a scrape.

Names follow the Prometheus conventions; contrib/grafana-dashboard.json uses them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..stats import BURST_LIMITS
from .snapshot import snapshot

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["exposition"]


class _Collector:
    def __init__(self, tunnel: Any) -> None:
        self._tunnel = tunnel

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        now = snapshot(self._tunnel)
        info = InfoMetricFamily("fasttun", "What runs.")
        info.add_metric([], {"version": now["version"], "mode": now["mode"], "device": now["name"],
                             "aead": now["aead"] or ""})
        yield info
        yield GaugeMetricFamily("fasttun_uptime_seconds", "Since the tunnel was set up.", now["uptime_s"])
        yield GaugeMetricFamily("fasttun_mtu_bytes", "Largest inner packet.", now["device"]["mtu"])
        directions = (("outbound", now["outbound"]), ("inbound", now["inbound"]))
        for name, field, text in (
            ("fasttun_packets", "packets_out", "Inner packets forwarded."),
            ("fasttun_bytes", "bytes_out", "Bytes of inner packets forwarded."),
        ):
            family = CounterMetricFamily(name, text, labels=["direction"])
            for direction, counted in directions:
                family.add_metric([direction], counted[field])
            yield family
        bursts = HistogramMetricFamily("fasttun_burst_packets", "Packets that one system call carried.",
                                       labels=["direction", "side"])
        for direction, counted in directions:
            for side, field in (("in", "bursts_in"), ("out", "bursts_out")):
                bursts.add_metric([direction, side], *_buckets(counted[field]))
        yield bursts
        drops = CounterMetricFamily("fasttun_drops", "Packets dropped.", labels=["direction", "reason"])
        for direction, counted in directions:
            for reason, count in counted["drops"].items():
                drops.add_metric([direction, reason], count)
        yield drops
        for name, text, label, counts in (
            ("fasttun_system_calls", "Calls that the loop made.", "call", now["system_calls"]),
            ("fasttun_errors", "Transient errors that the loop survived.", "errno", now["errors"]),
            ("fasttun_handshake_drops", "Handshake messages not taken.", "reason", now["control_drops"]),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for key, count in counts.items():
                family.add_metric([key], count)
            yield family
        cpu = CounterMetricFamily("fasttun_worker_cpu_seconds", "Processor time of a worker.", labels=["worker"])
        for number, worker in enumerate(now["workers"]):
            cpu.add_metric([str(number)], worker["cpu_s"])
        yield cpu
        enabled = GaugeMetricFamily("fasttun_offload_enabled", "1 for on.", labels=["offload"])
        for name, state in now["offloads"].items():
            enabled.add_metric([name], float(state == "on"))
        yield enabled
        yield from _peers(now["peers"])


def _buckets(bursts: dict[str, Any]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative counts by upper bound, the last without one; and the sum of what was measured."""
    bounds = [*(f"{limit}.0" for limit in BURST_LIMITS), "+Inf"]
    return list(zip(bounds, itertools.accumulate(bursts["calls"]), strict=True)), bursts["packets"]


def _peers(peers: list[dict[str, Any]]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    for name, field, text in (
        ("fasttun_peer_received_bytes", "rx_bytes", "Bytes from the peer."),
        ("fasttun_peer_sent_bytes", "tx_bytes", "Bytes to the peer."),
        ("fasttun_peer_received_packets", "rx_packets", "Packets from the peer."),
        ("fasttun_peer_sent_packets", "tx_packets", "Packets to the peer."),
    ):
        family = CounterMetricFamily(name, text, labels=["peer"])
        for peer in peers:
            family.add_metric([peer["id"]], peer[field])
        yield family
    age = GaugeMetricFamily("fasttun_peer_handshake_age_seconds", "Since the last handshake.", labels=["peer"])
    round_trip = GaugeMetricFamily("fasttun_peer_round_trip_seconds", "Of the last greeting or handshake answered.",
                                   labels=["peer"])
    loss = GaugeMetricFamily("fasttun_peer_loss_ratio", "Of greetings unanswered, or of data packets lately lost.",
                             labels=["peer"])
    expected = CounterMetricFamily("fasttun_peer_expected_packets", "Packets sent by the peer, by their counters.",
                                   labels=["peer"])
    silent = GaugeMetricFamily("fasttun_peer_silent_seconds", "Since the peer was last heard.", labels=["peer"])
    for peer in peers:
        if peer.get("last_handshake"):
            age.add_metric([peer["id"]], time.time() - peer["last_handshake"])
        if peer.get("silent_s") is not None:
            silent.add_metric([peer["id"]], peer["silent_s"])
        if peer["round_trip_s"] is not None:
            round_trip.add_metric([peer["id"]], peer["round_trip_s"])
        if peer["loss"] is not None:
            loss.add_metric([peer["id"]], peer["loss"])
        if "rx_expected" in peer:
            expected.add_metric([peer["id"]], peer["rx_expected"])
    yield from (round_trip, loss, expected)
    yield age
    yield silent


def exposition(tunnel: Any) -> tuple[str, bytes]:
    """Content type and text of one scrape. ImportError names the extra when prometheus-client is missing."""
    try:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    except ModuleNotFoundError:
        raise ImportError("--metrics needs prometheus-client: pip install 'fasttun[metrics]'") from None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(tunnel))
    return CONTENT_TYPE_LATEST, generate_latest(registry)
