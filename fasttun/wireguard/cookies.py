"""mac1, mac2 and cookie replies (paper §5.4.4, §5.4.7): cheap proof before costly work.

`CookieChecker` is the side that receives handshake messages, `CookieGenerator` the side that sends them.
Not for: deciding whether there is too much load (`load`).
"""

from __future__ import annotations

import hmac
import os
from hashlib import blake2s

from nacl import bindings
from nacl.exceptions import CryptoError

from ..endpoint import Endpoint
from .keys import PublicKey, wipe
from .messages import MAC_LENGTH, CookieReply
from .refusal import Refused

__all__ = ["COOKIE_LATENCY", "COOKIE_REFRESH_TIME", "CookieChecker", "CookieGenerator", "source_bytes"]

COOKIE_REFRESH_TIME = 120.0
"""Seconds for which the checker's secret, and so a cookie, is good (paper §5.4.7)."""
COOKIE_LATENCY = 5.0
"""Seconds by which the generator stops using a cookie earlier, since it was on the way for a while."""

_LABEL_MAC1 = b"mac1----"
_LABEL_COOKIE = b"cookie--"
_NONCE_LENGTH = 24
_SENDER = slice(4, 8)


def _mac(key: bytes | bytearray, data: bytes) -> bytes:
    """MAC of the paper's §5.4: keyed BLAKE2s with 16 bytes of output."""
    return blake2s(data, digest_size=MAC_LENGTH, key=key).digest()


def _mac1_key(responder: PublicKey) -> bytes:
    return blake2s(_LABEL_MAC1 + bytes(responder)).digest()


def _cookie_key(responder: PublicKey) -> bytes:
    return blake2s(_LABEL_COOKIE + bytes(responder)).digest()


def source_bytes(source: Endpoint) -> bytes:
    """What a cookie is bound to: the outer address and the port, both as on the wire."""
    return source.host.packed + source.port.to_bytes(2, "big")


class CookieChecker:
    """Checks the MACs of what is sent to `responder` and hands out cookies."""

    def __init__(self, responder: PublicKey) -> None:
        self._mac1_key = _mac1_key(responder)
        self._cookie_key = _cookie_key(responder)
        self._secret = bytearray(32)
        self._secret_until: float | None = None

    @property
    def mac1_key(self) -> bytes:
        """The 32-byte key of mac1, for checking it elsewhere. Not secret: it follows from the public key."""
        return self._mac1_key

    def check_mac1(self, datagram: bytes) -> bool:
        """Whether the sender knows our public key. `datagram`: a whole initiation or response."""
        expected = _mac(self._mac1_key, datagram[: -2 * MAC_LENGTH])
        return hmac.compare_digest(expected, datagram[-2 * MAC_LENGTH : -MAC_LENGTH])

    def check_mac2(self, datagram: bytes, source: Endpoint, now: float) -> bool:
        """Whether the sender has had a cookie of ours, at that address and port, that is still good."""
        if self._secret_until is None or now >= self._secret_until:
            return False
        expected = _mac(self._cookie(source), datagram[:-MAC_LENGTH])
        return hmac.compare_digest(expected, datagram[-MAC_LENGTH:])

    def create_reply(self, datagram: bytes, source: Endpoint, now: float) -> CookieReply:
        """The answer to an initiation or response whose mac1 is right. `now`: seconds, monotonic."""
        if self._secret_until is None or now >= self._secret_until:
            self._secret[:] = os.urandom(32)
            self._secret_until = now + COOKIE_REFRESH_TIME
        nonce = os.urandom(_NONCE_LENGTH)
        mac1 = datagram[-2 * MAC_LENGTH : -MAC_LENGTH]
        sealed = bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(
            self._cookie(source), mac1, nonce, self._cookie_key
        )
        return CookieReply(int.from_bytes(datagram[_SENDER], "little"), nonce, sealed)

    def _cookie(self, source: Endpoint) -> bytes:
        return _mac(self._secret, source_bytes(source))

    def wipe(self) -> None:
        """Overwrite the secret; no cookie handed out so far is good any more."""
        wipe(self._secret)
        self._secret_until = None


class CookieGenerator:
    """Appends the MACs to what is sent to `responder`, with its cookie if it asked for one."""

    def __init__(self, responder: PublicKey) -> None:
        self._mac1_key = _mac1_key(responder)
        self._cookie_key = _cookie_key(responder)
        self._cookie = bytearray(MAC_LENGTH)
        self._cookie_until: float | None = None
        self._last_mac1: bytes | None = None

    def add_macs(self, message: bytes, now: float) -> bytes:
        """`message` with mac1 and mac2; mac2 is zero without a fresh cookie (paper §5.4.4)."""
        mac1 = _mac(self._mac1_key, message)
        self._last_mac1 = mac1
        message += mac1
        if self._cookie_until is None or now >= self._cookie_until:
            return message + bytes(MAC_LENGTH)
        return message + _mac(self._cookie, message)

    def consume_reply(self, reply: CookieReply, now: float) -> None:
        """Keep the cookie for the next message. Each message's mac1 is good for one reply.

        Refused("cookie-unexpected") when none is due, Refused("cookie-not-authentic") when it is not for
        the last message sent.
        """
        if self._last_mac1 is None:
            raise Refused("cookie-unexpected")
        try:
            cookie = bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
                reply.cookie, self._last_mac1, reply.nonce, self._cookie_key
            )
        except CryptoError:
            raise Refused("cookie-not-authentic") from None
        self._cookie[:] = cookie
        self._cookie_until = now + COOKIE_REFRESH_TIME - COOKIE_LATENCY
        self._last_mac1 = None

    def wipe(self) -> None:
        """Forget the cookie."""
        wipe(self._cookie)
        self._cookie_until = self._last_mac1 = None
