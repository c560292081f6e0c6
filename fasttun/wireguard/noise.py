"""The handshake: Noise_IKpsk2 with Curve25519, ChaCha20-Poly1305 and BLAKE2s (paper §5.4.1 to §5.4.5).

The messages in the order in which they are made:

    initiator                                  responder
    InitiatorHandshake.begin      ── 1 ──▶     open_initiation      who is it?
                                               ReceivedInitiation.verify     the timestamp
    InitiatorHandshake.finish     ◀── 2 ──     ReceivedInitiation.respond
    TransportKeys                              TransportKeys

Nothing here knows peers, indices, MACs (`cookies`), time, or when to shake hands (`timers`).
The names C, H, T and Q of the paper are chain, transcript, key and preshared key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2s

from nacl import bindings
from nacl.exceptions import CryptoError

from .keys import PresharedKey, PrivateKey, PublicKey, wipe
from .messages import Initiation, Response
from .refusal import Refused

__all__ = [
    "CONSTRUCTION", "IDENTIFIER", "INITIAL_CHAIN", "INITIAL_TRANSCRIPT", "InitiatorHandshake", "ReceivedInitiation",
    "TransportKeys", "hmac_blake2s", "kdf1", "kdf2", "kdf3", "mix_hash", "open_initiation",
]

CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"

_ZERO_NONCE = bytes(12)
_BLOCK_PAD = bytes(32)
_INNER_PAD = bytes(x ^ 0x36 for x in range(256))
_OUTER_PAD = bytes(x ^ 0x5C for x in range(256))


def hmac_blake2s(key: bytes, data: bytes) -> bytes:
    """HMAC-BLAKE2s of a 32-byte `key` (RFC 2104). Written out: the standard module takes twice as long."""
    block = key + _BLOCK_PAD
    return blake2s(block.translate(_OUTER_PAD) + blake2s(block.translate(_INNER_PAD) + data).digest()).digest()


def kdf1(key: bytes, data: bytes) -> bytes:
    """KDF_1 of the paper's §5.4: HKDF with one output."""
    return hmac_blake2s(hmac_blake2s(key, data), b"\x01")


def kdf2(key: bytes, data: bytes) -> tuple[bytes, bytes]:
    """KDF_2: HKDF with two outputs."""
    secret = hmac_blake2s(key, data)
    first = hmac_blake2s(secret, b"\x01")
    return first, hmac_blake2s(secret, first + b"\x02")


def kdf3(key: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
    """KDF_3: HKDF with three outputs."""
    secret = hmac_blake2s(key, data)
    first = hmac_blake2s(secret, b"\x01")
    second = hmac_blake2s(secret, first + b"\x02")
    return first, second, hmac_blake2s(secret, second + b"\x03")


def mix_hash(transcript: bytes, data: bytes) -> bytes:
    """H := HASH(H || data)."""
    return blake2s(transcript + data).digest()


INITIAL_CHAIN = blake2s(CONSTRUCTION).digest()
INITIAL_TRANSCRIPT = mix_hash(INITIAL_CHAIN, IDENTIFIER)


def _seal(key: bytes, plain: bytes, transcript: bytes) -> bytes:
    return bindings.crypto_aead_chacha20poly1305_ietf_encrypt(plain, transcript, _ZERO_NONCE, key)


def _open(key: bytes, sealed: bytes, transcript: bytes) -> bytes:
    try:
        return bindings.crypto_aead_chacha20poly1305_ietf_decrypt(sealed, transcript, _ZERO_NONCE, key)
    except CryptoError:
        raise Refused("handshake-not-authentic") from None


@dataclass
class TransportKeys:
    """The two keys of one session (paper §5.4.5). `wipe` when they are replaced."""

    send: bytearray = field(repr=False)
    receive: bytearray = field(repr=False)

    def wipe(self) -> None:
        """Overwrite both keys."""
        wipe(self.send)
        wipe(self.receive)


class InitiatorHandshake:
    """The initiator's state between the two messages. Good for one response; a new try is a new object."""

    def __init__(self, sender: int, chain: bytes, transcript: bytes, ephemeral: PrivateKey) -> None:
        self.sender = sender
        self._chain = bytearray(chain)
        self._transcript = transcript
        self._ephemeral = ephemeral

    @classmethod
    def begin(
        cls, static: PrivateKey, remote: PublicKey, static_static: bytes, sender: int, timestamp: bytes,
        *, ephemeral: PrivateKey | None = None,
    ) -> tuple[InitiatorHandshake, Initiation]:
        """Make the first message (paper §5.4.2).

        static_static: `static.exchange(remote)`, which never changes. timestamp: 12 bytes (`tai64n.stamp`).
        ephemeral: a fresh key, taken over; one is drawn here when there is none given. Refused("low-order-key")
        when `remote` is a low-order point.
        """
        ephemeral = ephemeral or PrivateKey.generate()
        public = bytes(ephemeral.public)
        transcript = mix_hash(mix_hash(INITIAL_TRANSCRIPT, bytes(remote)), public)
        chain = kdf1(INITIAL_CHAIN, public)
        chain, key = kdf2(chain, ephemeral.exchange(remote))
        sealed_static = _seal(key, bytes(static.public), transcript)
        transcript = mix_hash(transcript, sealed_static)
        chain, key = kdf2(chain, static_static)
        sealed_timestamp = _seal(key, timestamp, transcript)
        transcript = mix_hash(transcript, sealed_timestamp)
        return cls(sender, chain, transcript, ephemeral), Initiation(sender, public, sealed_static, sealed_timestamp)

    def finish(self, response: Response, static: PrivateKey, preshared: PresharedKey) -> TransportKeys:
        """Take the second message (paper §5.4.3) and derive the session's keys.

        Refused when it is not authentic; the state then stays good for the true response.
        """
        ephemeral = PublicKey(response.ephemeral)
        transcript = mix_hash(self._transcript, response.ephemeral)
        chain = kdf1(bytes(self._chain), response.ephemeral)
        chain = kdf1(chain, self._ephemeral.exchange(ephemeral))
        chain = kdf1(chain, static.exchange(ephemeral))
        chain, temporary, key = kdf3(chain, preshared.to_bytes())
        transcript = mix_hash(transcript, temporary)
        _open(key, response.empty, transcript)
        send, receive = kdf2(chain, b"")
        return TransportKeys(bytearray(send), bytearray(receive))

    def wipe(self) -> None:
        """Overwrite what is secret. To be called when the handshake ends, however it ends."""
        wipe(self._chain)
        self._ephemeral.wipe()


class ReceivedInitiation:
    """The responder's state after the first message. Good for one response."""

    def __init__(self, message: Initiation, remote: PublicKey, chain: bytes, transcript: bytes) -> None:
        self.remote = remote
        """Who claims to have sent it; not proven until `verify`."""
        self._message = message
        self._chain = bytearray(chain)
        self._transcript = transcript

    def verify(self, static_static: bytes) -> bytes:
        """The initiation's timestamp, 12 bytes, once it is authentic.

        The caller compares it with the greatest that the peer has sent (paper §5.1). Refused otherwise.
        """
        chain, key = kdf2(bytes(self._chain), static_static)
        timestamp = _open(key, self._message.timestamp, self._transcript)
        self._chain[:] = chain
        self._transcript = mix_hash(self._transcript, self._message.timestamp)
        return timestamp

    def respond(
        self, sender: int, preshared: PresharedKey, *, ephemeral: PrivateKey | None = None
    ) -> tuple[Response, TransportKeys]:
        """Make the second message (paper §5.4.3) and the session's keys. Only after `verify`.

        ephemeral: as for `begin`; wiped here. Refused("low-order-key") for a low-order ephemeral key of the peer's.
        """
        ephemeral = ephemeral or PrivateKey.generate()
        public = bytes(ephemeral.public)
        transcript = mix_hash(self._transcript, public)
        chain = kdf1(bytes(self._chain), public)
        chain = kdf1(chain, ephemeral.exchange(PublicKey(self._message.ephemeral)))
        chain = kdf1(chain, ephemeral.exchange(self.remote))
        ephemeral.wipe()
        chain, temporary, key = kdf3(chain, preshared.to_bytes())
        transcript = mix_hash(transcript, temporary)
        empty = _seal(key, b"", transcript)
        receive, send = kdf2(chain, b"")
        keys = TransportKeys(bytearray(send), bytearray(receive))
        return Response(sender, self._message.sender, public, empty), keys

    def wipe(self) -> None:
        """Overwrite what is secret. To be called when the handshake ends, however it ends."""
        wipe(self._chain)


def open_initiation(static: PrivateKey, message: Initiation) -> ReceivedInitiation:
    """Find out who sent the first message (paper §5.4.2). Refused when it was not made for `static`."""
    transcript = mix_hash(mix_hash(INITIAL_TRANSCRIPT, bytes(static.public)), message.ephemeral)
    chain = kdf1(INITIAL_CHAIN, message.ephemeral)
    chain, key = kdf2(chain, static.exchange(PublicKey(message.ephemeral)))
    remote = PublicKey(_open(key, message.static, transcript))
    return ReceivedInitiation(message, remote, chain, mix_hash(transcript, message.static))
