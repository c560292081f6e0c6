"""A token bucket for each source of handshakes (paper §5.3), in a bounded table.

Consulted only under load and only after mac2 proved the source, so nobody can use up another's tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv4Address, IPv6Address

__all__ = ["BURST", "HANDSHAKES_PER_SECOND", "MAX_SOURCES", "RateLimiter"]

HANDSHAKES_PER_SECOND = 20
BURST = 5
MAX_SOURCES = 1 << 16
"""Bounds the table to about 15 MB, however many addresses an attacker owns."""

_FULL_AFTER = BURST / HANDSHAKES_PER_SECOND
_IPV6_PREFIX_BYTES = 8  # a /64 is what one subscriber has: its addresses count as one


class RateLimiter:
    """Allows `HANDSHAKES_PER_SECOND` with bursts of `BURST` to each IPv4 address and IPv6 /64."""

    def __init__(self, max_sources: int = MAX_SOURCES) -> None:
        self._max_sources = max_sources
        # source → (tokens, time of the last packet), least recent first
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def allow(self, host: IPv4Address | IPv6Address, now: float) -> bool:
        """Take a token of `host`'s; False when it has none, or when the table is full of busy sources."""
        source = host.packed if host.version == 4 else host.packed[:_IPV6_PREFIX_BYTES]
        self._forget_idle(now)
        bucket = self._buckets.get(source)
        if bucket is None:
            if len(self._buckets) >= self._max_sources:
                return False
            tokens = float(BURST)
        else:
            tokens = min(float(BURST), bucket[0] + (now - bucket[1]) * HANDSHAKES_PER_SECOND)
        allowed = tokens >= 1.0
        self._buckets[source] = (tokens - 1.0 if allowed else tokens, now)
        self._buckets.move_to_end(source)
        return allowed

    def _forget_idle(self, now: float) -> None:
        """Drop buckets that are full again: they say no more than an absent one."""
        while self._buckets:
            source, (_, last) = next(iter(self._buckets.items()))
            if now - last < _FULL_AFTER:
                return
            del self._buckets[source]
