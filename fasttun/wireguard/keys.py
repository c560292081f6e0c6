"""Private, public and preshared keys as values: base64 in and out, and never in a log.

A secret's `repr` shows nothing, it cannot be pickled, it compares in constant time, and `wipe` overwrites it.
The overwriting is as good as Python allows: libsodium is handed short-lived copies that are only freed.
Not for: files of keys, nor ephemeral use of keys in a handshake (`noise`).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from typing import TYPE_CHECKING, NoReturn

from nacl import bindings
from nacl.exceptions import CryptoError

from ..errors import ConfigurationError
from .refusal import Refused

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["KEY_LENGTH", "PresharedKey", "PrivateKey", "PublicKey", "wipe"]

KEY_LENGTH = 32
"""Bytes of every key (paper §5.4)."""

_ENCODED_LENGTH = 44


def wipe(secret: bytearray | None) -> None:
    """Overwrite `secret` with zeros in place."""
    if secret is not None:
        secret[:] = bytes(len(secret))


def _decode(field: str, text: str) -> bytes:
    """The 32 bytes of `text`. The error never repeats it: a mistyped private key is still nearly one."""
    hint = "expected 44 characters of base64, as `wg genkey` prints them"
    stripped = text.strip()
    if len(stripped) != _ENCODED_LENGTH:
        raise ConfigurationError(field, f"has {len(stripped)} characters", hint)
    try:
        data = base64.b64decode(stripped.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ConfigurationError(field, "is not base64", hint) from None
    # Unused bits of the last character must be zero, or one key would have four spellings.
    if len(data) != KEY_LENGTH or base64.b64encode(data).decode("ascii") != stripped:
        raise ConfigurationError(field, "is not 32 bytes of base64", hint)
    return data


def _checked(field: str, data: bytes | bytearray) -> bytes | bytearray:
    if len(data) != KEY_LENGTH:
        raise ConfigurationError(field, f"has {len(data)} bytes", f"expected {KEY_LENGTH}")
    return data


class PublicKey:
    """A Curve25519 point. Hashable; its `repr` shows it in short, `str` whole."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        """`data`: 32 bytes. ConfigurationError otherwise."""
        self._data = bytes(_checked("public key", data))

    @classmethod
    def from_base64(cls, text: str) -> Self:
        """ConfigurationError when `text` is not 32 bytes of base64."""
        return cls(_decode("public key", text))

    def __bytes__(self) -> bytes:
        return self._data

    def __str__(self) -> str:
        return base64.b64encode(self._data).decode("ascii")

    def __repr__(self) -> str:
        text = str(self)
        return f"<PublicKey {text[:4]}…{text[39:43]}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PublicKey):
            return NotImplemented
        return hmac.compare_digest(self._data, other._data)

    def __hash__(self) -> int:
        return hash(self._data)


class _Secret:
    """What private and preshared keys share: a bytearray that is overwritten by `wipe`."""

    __slots__ = ("_data",)
    _field = "key"
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: bytes | bytearray) -> None:
        """`data`: 32 bytes, copied. ConfigurationError otherwise."""
        self._data = bytearray(_checked(self._field, data))

    @classmethod
    def from_base64(cls, text: str) -> Self:
        """ConfigurationError, which does not repeat the text, when it is not 32 bytes of base64."""
        return cls(_decode(cls._field, text))

    def to_base64(self) -> str:
        """The secret as text. A method, not `str()`, so that no formatting shows it by accident."""
        return base64.b64encode(self._data).decode("ascii")

    def to_bytes(self) -> bytes:
        """The secret as bytes."""
        return bytes(self._data)

    def wipe(self) -> None:
        """Overwrite the key with zeros; the object is of no use afterwards. May be called again."""
        wipe(self._data)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, _Secret):
            return NotImplemented
        return hmac.compare_digest(self._data, other._data)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is not pickled")

    def __copy__(self) -> Self:
        return type(self)(self._data)

    def __deepcopy__(self, memo: object) -> Self:
        return type(self)(self._data)


class PrivateKey(_Secret):
    """A Curve25519 scalar, clamped when it comes in (RFC 7748 §5), so any 32 bytes but zeros will do."""

    __slots__ = ("_public",)
    _field = "private key"

    def __init__(self, data: bytes | bytearray) -> None:
        """`data`: 32 bytes, copied and clamped. ConfigurationError for another length, or all zeros."""
        super().__init__(data)
        if not any(self._data):
            raise ConfigurationError(self._field, "is all zeros", "make one with `fasttun genkey`")
        self._data[0] &= 248
        self._data[31] = (self._data[31] & 127) | 64
        self._public: PublicKey | None = None

    @classmethod
    def generate(cls) -> Self:
        """A new key from the system's random source."""
        return cls(os.urandom(KEY_LENGTH))

    @property
    def public(self) -> PublicKey:
        """The public key that belongs to it; computed once."""
        if self._public is None:
            self._public = PublicKey(bindings.crypto_scalarmult_base(bytes(self._data)))
        return self._public

    def exchange(self, public: PublicKey) -> bytes:
        """DH(private, public), paper §5.4.

        Refused("low-order-key") when the result is all zeros: such a point would make the secret known.
        """
        try:
            return bindings.crypto_scalarmult(bytes(self._data), bytes(public))
        except CryptoError:
            raise Refused("low-order-key") from None


class PresharedKey(_Secret):
    """The optional symmetric secret Q (paper §5.2). No key and 32 zero bytes are the same thing."""

    __slots__ = ()
    _field = "preshared key"

    @classmethod
    def generate(cls) -> Self:
        """A new key from the system's random source."""
        return cls(os.urandom(KEY_LENGTH))

    @classmethod
    def none(cls) -> Self:
        """The value that the handshake mixes in when no key is configured."""
        return cls(bytes(KEY_LENGTH))

    def __bool__(self) -> bool:
        """False when all zeros, that is, when there is no preshared key."""
        return not hmac.compare_digest(self._data, bytes(KEY_LENGTH))
