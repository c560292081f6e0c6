"""Keys of handshakes in the form of Wireshark's `wg.keylog_file`, by which it opens a capture of the outer packets.

Whoever has these lines can read the sessions, and with the static key be this host.
Not for: who may have them and where they go (`fasttun.observe.stream`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .keys import PresharedKey, PrivateKey, PublicKey

__all__ = ["of_device", "of_handshake"]

_KEYS_A_TEXT = 512
"""Public keys: some 37 KiB, so that a text fits into any reader's block."""


def of_device(private_key: PrivateKey, peers: Iterable[PublicKey]) -> Iterator[str]:
    """What opens initiations of both directions, in one or more texts of whole lines; first of all."""
    lines = [f"LOCAL_STATIC_PRIVATE_KEY = {private_key.to_base64()}\n"]
    lines += [f"REMOTE_STATIC_PUBLIC_KEY = {peer}\n" for peer in peers]
    for at in range(0, len(lines), _KEYS_A_TEXT):
        yield "".join(lines[at:at + _KEYS_A_TEXT])


def of_handshake(private_key: PrivateKey, peer: PublicKey, ephemeral: PrivateKey, preshared: PresharedKey) -> str:
    """What opens one handshake and its session, if it comes before the message that was made with `ephemeral`."""
    text = "".join(of_device(private_key, [peer]))
    text += f"LOCAL_EPHEMERAL_PRIVATE_KEY = {ephemeral.to_base64()}\n"
    if preshared:  # of the ephemeral key on the line before
        text += f"PRESHARED_KEY = {preshared.to_base64()}\n"
    return text
