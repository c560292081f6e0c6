"""WireGuard: the protocol without sockets and without a clock, and a device made of it.

Each call is given the time, and answers with what to do, so hours of timers run in milliseconds of test:

    keys        private, public and preshared keys          refusal     why a datagram was not taken
    messages    the four wire formats                       tai64n      timestamps of initiations
    noise       the handshake, Noise_IKpsk2                 cookies     mac1, mac2 and cookie replies
    timers      one peer's timers                           ratelimiter, load   defence against floods
    keypairs    previous, current and next                  indices, replay     receiver indices, replay window
    peer        one peer's whole state                      outputs     what an interface asks its host to do
    interface   `Interface`: a device without sockets       software    its data packets in Python, for tests

And what makes a running device of it:

    host, tunnel    the protocol joined to the engine; `WireGuard`      config, store   wg-quick's files
    uapi, control   the control socket that `wg` speaks to              quick, changes, dns, journal   wg-quick's work

Sources: "WireGuard: Next Generation Kernel Network Tunnel", version of 2020 ("the paper").
Not for: the forwarding of data packets (the engine). The names below load what they need on first use.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("nacl") is None:
    raise ImportError("the WireGuard mode needs PyNaCl: pip install 'fasttun[wireguard]'", name="nacl")

if TYPE_CHECKING:
    from .interface import Interface
    from .keypairs import Keypair
    from .keys import PresharedKey, PrivateKey, PublicKey
    from .peer import Peer

__all__ = ["Interface", "Keypair", "Peer", "PresharedKey", "PrivateKey", "PublicKey"]

_HOME = {
    "Interface": "interface", "Keypair": "keypairs", "Peer": "peer",
    "PresharedKey": "keys", "PrivateKey": "keys", "PublicKey": "keys",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
