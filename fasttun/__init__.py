"""fasttun joins Linux hosts into one private network: a TUN-to-UDP tunnel with a Cython core.

    import fasttun
    with fasttun.Forwarder(server="198.51.100.7", address="10.7.0.2/24") as tunnel:
        tunnel.wait_peer(timeout=10)
        print(tunnel.stats())

The names below load what they need on first use, so that `import fasttun` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import TunnelConfig
    from .endpoint import Endpoint
    from .errors import ConfigurationError, DeviceError, EndpointError, FasttunError, StateError
    from .forwarder import Forwarder
    from .stats import DirectionStats, PeerStats, Stats, WireGuardPeer
    from .wireguard.config import Config, PeerConfig
    from .wireguard.tunnel import WireGuard

__all__ = [
    "Config", "ConfigurationError", "DeviceError", "DirectionStats", "Endpoint", "EndpointError", "FasttunError",
    "Forwarder", "PeerConfig", "PeerStats", "StateError", "Stats", "TunnelConfig", "WireGuard", "WireGuardPeer",
    "__version__",
]

_HOME = {
    "ConfigurationError": "errors", "DeviceError": "errors", "EndpointError": "errors",
    "FasttunError": "errors", "StateError": "errors", "Forwarder": "forwarder", "TunnelConfig": "config",
    "Endpoint": "endpoint", "DirectionStats": "stats", "PeerStats": "stats", "Stats": "stats",
    "WireGuardPeer": "stats", "Config": "wireguard.config", "PeerConfig": "wireguard.config",
    "WireGuard": "wireguard.tunnel",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
