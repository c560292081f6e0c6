"""The four messages on the wire (paper §5.4.2, §5.4.3, §5.4.6, §5.4.7): reading and writing, no secrets.

All integers are little-endian. Byte 0 is the type, bytes 1 to 3 are reserved and zero.

    offset   initiation, 148   response, 92   cookie reply, 64   data, 32 and more
         4   sender            sender         receiver           receiver
         8   ephemeral, 32     receiver       nonce, 24          counter, 8
        12                     ephemeral, 32
        16                                                       packet + tag, 16 and more
        32                                    cookie + tag, 32
        40   static + tag, 48
        44                     empty + tag, 16
        60                     mac1, 16
        76                     mac2, 16
        88   timestamp + tag, 28
       116   mac1, 16
       132   mac2, 16

Not for: what the fields mean (`noise`, `cookies`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from .refusal import Refused

__all__ = [
    "COOKIE_REPLY_LENGTH", "DATA_HEADER_LENGTH", "INITIATION_LENGTH", "MAC_LENGTH", "MIN_DATA_LENGTH",
    "RESPONSE_LENGTH", "TAG_LENGTH", "TYPE_COOKIE_REPLY", "TYPE_DATA", "TYPE_INITIATION", "TYPE_RESPONSE",
    "CookieReply", "DataHeader", "Initiation", "Response", "message_type",
]

TYPE_INITIATION = 1
TYPE_RESPONSE = 2
TYPE_COOKIE_REPLY = 3
TYPE_DATA = 4

INITIATION_LENGTH = 148
RESPONSE_LENGTH = 92
COOKIE_REPLY_LENGTH = 64
DATA_HEADER_LENGTH = 16
TAG_LENGTH = 16
MAC_LENGTH = 16
MIN_DATA_LENGTH = DATA_HEADER_LENGTH + TAG_LENGTH
"""A keepalive: a data message around nothing."""

_EXACT_LENGTH = {
    TYPE_INITIATION: INITIATION_LENGTH,
    TYPE_RESPONSE: RESPONSE_LENGTH,
    TYPE_COOKIE_REPLY: COOKIE_REPLY_LENGTH,
}


def message_type(datagram: bytes) -> int:
    """The type, once the reserved bytes and the length fit it. Refused("bad-type" or "bad-length")."""
    if len(datagram) < 4 or datagram[1:4] != b"\0\0\0" or not TYPE_INITIATION <= datagram[0] <= TYPE_DATA:
        raise Refused("bad-type")
    kind = datagram[0]
    if kind == TYPE_DATA:
        if len(datagram) < MIN_DATA_LENGTH:
            raise Refused("bad-length")
    elif len(datagram) != _EXACT_LENGTH[kind]:
        raise Refused("bad-length")
    return kind


def _require(datagram: bytes, kind: int) -> None:
    if message_type(datagram) != kind:
        raise Refused("bad-type")


@dataclass(frozen=True)
class Initiation:
    """First message, initiator to responder (paper §5.4.2). `encode` leaves the two MACs to `cookies`."""

    sender: int
    ephemeral: bytes
    static: bytes
    timestamp: bytes

    _FORMAT: ClassVar = struct.Struct("<II32s48s28s")

    def encode(self) -> bytes:
        """The first 116 bytes; mac1 and mac2 follow."""
        return self._FORMAT.pack(TYPE_INITIATION, self.sender, self.ephemeral, self.static, self.timestamp)

    @classmethod
    def parse(cls, datagram: bytes) -> Initiation:
        """Of a whole datagram with MACs, which are not checked here. Refused when it is not one."""
        _require(datagram, TYPE_INITIATION)
        return cls(*cls._FORMAT.unpack_from(datagram)[1:])


@dataclass(frozen=True)
class Response:
    """Second message, responder to initiator (paper §5.4.3). `encode` leaves the two MACs to `cookies`."""

    sender: int
    receiver: int
    ephemeral: bytes
    empty: bytes

    _FORMAT: ClassVar = struct.Struct("<III32s16s")

    def encode(self) -> bytes:
        """The first 60 bytes; mac1 and mac2 follow."""
        return self._FORMAT.pack(TYPE_RESPONSE, self.sender, self.receiver, self.ephemeral, self.empty)

    @classmethod
    def parse(cls, datagram: bytes) -> Response:
        """Of a whole datagram with MACs, which are not checked here. Refused when it is not one."""
        _require(datagram, TYPE_RESPONSE)
        return cls(*cls._FORMAT.unpack_from(datagram)[1:])


@dataclass(frozen=True)
class CookieReply:
    """Answer of a peer under load (paper §5.4.7)."""

    receiver: int
    nonce: bytes
    cookie: bytes

    _FORMAT: ClassVar = struct.Struct("<II24s32s")

    def encode(self) -> bytes:
        """The whole message, 64 bytes."""
        return self._FORMAT.pack(TYPE_COOKIE_REPLY, self.receiver, self.nonce, self.cookie)

    @classmethod
    def parse(cls, datagram: bytes) -> CookieReply:
        """Refused when it is not one."""
        _require(datagram, TYPE_COOKIE_REPLY)
        return cls(*cls._FORMAT.unpack(datagram)[1:])


@dataclass(frozen=True)
class DataHeader:
    """What is in clear before a sealed packet (paper §5.4.6). `counter`: 64 bits, the nonce."""

    receiver: int
    counter: int

    _FORMAT: ClassVar = struct.Struct("<IIQ")

    def encode(self) -> bytes:
        """16 bytes; the sealed packet follows."""
        return self._FORMAT.pack(TYPE_DATA, self.receiver, self.counter)

    @classmethod
    def parse(cls, datagram: bytes) -> DataHeader:
        """Of a whole datagram. Refused when it is not one."""
        _require(datagram, TYPE_DATA)
        return cls(*cls._FORMAT.unpack_from(datagram)[1:])
