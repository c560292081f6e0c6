"""The kernel's routes through a device, by netlink. Not for: setting them (fasttun/device.py, wireguard/quick.py)."""

from __future__ import annotations

import socket
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING, Any

from .errors import FasttunError

if TYPE_CHECKING:
    from .device import TunDevice

__all__ = ["routes_through"]

_RTN_UNICAST = 1
_RTPROT_KERNEL = 2


def routes_through(device: TunDevice | None) -> tuple[IPv4Network | IPv6Network, ...]:
    """The networks routed into `device`, in any table and by whomever, without those of its own addresses.

    Empty when there is no device, or it is gone.
    """
    if device is None:
        return ()
    from pyroute2 import NetlinkError

    from .netlink import netlink

    def work() -> set[IPv4Network | IPv6Network]:
        with netlink() as ipr:
            return {_network(route) for family in (socket.AF_INET, socket.AF_INET6)
                    for route in ipr.get_routes(family=family, oif=device.index)
                    if route["type"] == _RTN_UNICAST and route["proto"] != _RTPROT_KERNEL
                    and route.get("RTA_OIF") == device.index}

    try:
        found = device._place.run(work)
    except (FasttunError, NetlinkError, OSError):
        return ()
    return tuple(sorted(found, key=lambda network: (network.version, network.network_address.packed,
                                                    network.prefixlen)))


def _network(route: Any) -> IPv4Network | IPv6Network:
    anywhere = "0.0.0.0" if route["family"] == socket.AF_INET else "::"
    return ip_network(f"{route.get('RTA_DST') or anywhere}/{route['dst_len']}")
