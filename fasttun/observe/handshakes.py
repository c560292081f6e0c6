"""What a tunnel's control thread sends, for a capture of outer packets: handshake messages, a client's greetings.

They do not pass the loop, so they are no business of its ring: `HandshakeTap` stands beside the engines as one
more source, with a small queue of its own. Those received do pass the loop. `KeyQueue` holds the handshakes' keys
on their way into a capture that was asked to have them.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from .._core import SIDES
from .local import header_checksum

if TYPE_CHECKING:
    from ..endpoint import Endpoint
    from .filter import Clause

__all__ = ["HandshakeTap", "KeyQueue", "datagram_packet", "matches"]

Address = IPv4Address | IPv6Address
Record = tuple[int, bool, bool, int, bytes]

QUEUE = 1024
"""Messages; some 150 KiB. A tunnel sends that many only under a flood of handshakes."""
KEYS = 16384
"""Texts; some 4 MiB. A reader that lets more wait goes without the rest."""
_UDP = 17
_WITH_PORTS = (6, 17, 33, 132, 136)


class HandshakeTap:
    """Has the faces of an `Engine` that a capture uses, and is called with each message that was sent."""

    def __init__(self) -> None:
        self._queue: deque[Record] = deque()
        self._missed = 0
        self._wanted = False
        self._snap_length = 0
        self._local_port = 0
        self._clauses: Sequence[Clause] = ()

    def __call__(self, at_ns: int, datagram: bytes, remote: Endpoint, local: Address | None) -> None:
        """Queues the message as an outer packet, if the filter lets it through; counts it if there is no room."""
        if not self._wanted:
            return
        packet = datagram_packet(datagram, local, self._local_port, remote.host, remote.port)
        if not matches(self._clauses, packet):
            return
        if len(self._queue) >= QUEUE:
            self._missed += 1
        else:
            self._queue.append((at_ns, True, True, len(packet), packet[:self._snap_length]))

    def capture_start(self, *, inner: bool = True, outer: bool = False, snap_length: int = 262144,
                      clauses: Iterable[Clause] = (), local_port: int = 0) -> None:
        """As `Engine.capture_start`; `inner` is nothing to it."""
        self._queue.clear()
        self._missed, self._snap_length, self._local_port = 0, snap_length, local_port
        self._clauses = tuple(clauses)
        self._wanted = outer

    def capture_stop(self) -> None:
        """As `Engine.capture_stop`."""
        self._wanted = False

    def capture_read(self, limit: int = 1024) -> tuple[list[Record], int]:
        """As `Engine.capture_read`."""
        return [self._queue.popleft() for _ in range(min(limit, len(self._queue)))], self._missed


class KeyQueue:
    """Texts of a key log that wait for the capture. `add` in the tunnel's threads, `take` in the capture's."""

    def __init__(self) -> None:
        self._texts: deque[str] = deque()

    def add(self, text: str) -> None:
        """Not one more than KEYS."""
        if len(self._texts) < KEYS:
            self._texts.append(text)

    def take(self) -> Iterator[str]:
        """What there is, each once."""
        while self._texts:
            yield self._texts.popleft()


def datagram_packet(data: bytes, local: Address | None, local_port: int, remote: Address, port: int) -> bytes:
    """The IP packet around a UDP datagram to `remote`, without UDP checksum; zeros for a local address not known."""
    size = len(data) + 8
    udp = struct.pack("!HHHH", local_port, port, size, 0)
    mapped = remote.ipv4_mapped if isinstance(remote, IPv6Address) else None
    to = (mapped or remote).packed
    from_ = local.packed[-len(to):] if local is not None else bytes(len(to))
    if len(to) == 16:
        return struct.pack("!IHBB", 6 << 28, size, _UDP, 64) + from_.rjust(16, b"\0") + to + udp + data
    header = struct.pack("!BBHHHBBH", 0x45, 0, size + 20, 0, 0x4000, 64, _UDP, 0) + from_ + to
    return header[:10] + header_checksum(header) + header[12:] + udp + data


def matches(clauses: Sequence[Clause], packet: bytes) -> bool:
    """Whether a filter lets an IP packet through: what the loop decides by fasttun/_native/capture.pxd."""
    holds = True
    for clause in clauses:
        holds = holds and _holds(clause, packet) != clause[5]
        if clause[6]:
            if holds:
                return True
            holds = True
    return not clauses


def _holds(clause: Clause, packet: bytes) -> bool:
    network, port, version, protocol, sides, _, _ = clause
    sixth = packet[:1] and packet[0] >> 4 == 6
    if len(packet) < (40 if sixth else 20) or not (sixth or packet[0] >> 4 == 4):
        return False
    at, size, here = (8, 16, packet[6]) if sixth else (12, 4, packet[9])
    if (version and version != (6 if sixth else 4)) or (protocol >= 0 and protocol != here):
        return False
    chosen = [number for number, side in enumerate((SIDES["source"], SIDES["destination"])) if sides & side]
    if network is not None:
        kind = IPv6Address if sixth else IPv4Address
        addresses = [kind(packet[at + size * number:at + size * (number + 1)]) for number in chosen]
        if not any(address in network for address in addresses):
            return False
    if port < 0:
        return True
    transport = 40 if sixth else (packet[0] & 15) * 4
    first = sixth or not (packet[6] & 0x1F or packet[7])
    if not first or here not in _WITH_PORTS or transport + 4 > len(packet):
        return False
    return any(struct.unpack_from("!H", packet, transport + 2 * number)[0] == port for number in chosen)
