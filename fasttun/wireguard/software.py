"""The data packets of an `Interface` in plain Python: for tests and for reading, not for speed.

Shows what a host owes the interface: it queues, seals, opens, and reports. The engine does the same in C.
Not for: allowed IPs (the caller names the peer), sockets, clocks.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from ..endpoint import Endpoint
from .interface import Interface
from .keypairs import Keypair, padded_length
from .messages import TYPE_DATA, DataHeader, message_type
from .outputs import ActivateKeypair, Drop, DropQueue, InstallKeypair, Output, RemoveKeypair, Send, SendKeepalive
from .peer import Peer
from .refusal import Refused

__all__ = ["MAX_QUEUED", "Received", "SoftwareTunnel", "trim"]

MAX_QUEUED = 128
"""Packets that wait for a handshake, for each peer; the oldest is dropped for the newest."""


@dataclass(frozen=True)
class Received:
    """An inner packet that came from `peer`, without its padding."""

    peer: Peer
    packet: bytes


def trim(packet: bytes) -> bytes:
    """An inner packet without its padding, by its own IP header. Refused("bad-inner-packet")."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        length = int.from_bytes(packet[2:4], "big")
        least = 20
    elif version == 6 and len(packet) >= 40:
        length = 40 + int.from_bytes(packet[4:6], "big")
        least = 40
    else:
        raise Refused("bad-inner-packet")
    if not least <= length <= len(packet):
        raise Refused("bad-inner-packet")
    return packet[:length]


class SoftwareTunnel:
    """Carries out an interface's outputs. Every call returns what is left for the caller.

    That is: `Send`, also for sealed data; `Received`; and news such as `HandshakeDone`. `drops` counts the rest.
    """

    def __init__(self, interface: Interface, mtu: int = 1420) -> None:
        self.interface = interface
        self.mtu = mtu
        self.drops: Counter[str] = Counter()
        self._keypairs: dict[int, tuple[Peer, Keypair]] = {}
        self._queues: dict[Peer, deque[bytes]] = {}

    def send(self, peer: Peer, packet: bytes, now: float, wall: float) -> list[Output | Received]:
        """Send an inner packet, or queue it until there is a session."""
        if len(packet) > self.mtu:
            self.drops["too-big"] += 1
            return []
        queue = self._queues.setdefault(peer, deque())
        if len(queue) >= MAX_QUEUED:
            queue.popleft()
            self.drops["queue-full"] += 1
        queue.append(packet)
        keypair = peer.keypairs.current
        if keypair is None or not keypair.can_send(now):
            return self._carry_out(self.interface.need_handshake(peer, now, wall), now, wall)
        return self._flush(peer, keypair, now, wall)

    def receive(self, datagram: bytes, source: Endpoint, now: float, wall: float) -> list[Output | Received]:
        """Take in any datagram."""
        try:
            if message_type(datagram) == TYPE_DATA:
                return self._receive_data(datagram, source, now, wall)
        except Refused as refused:
            self.drops[refused.reason] += 1
            return []
        return self._carry_out(self.interface.consume(datagram, source, now, wall), now, wall)

    def tick(self, now: float, wall: float) -> list[Output | Received]:
        """Do what is due by the interface's timers."""
        return self._carry_out(self.interface.tick(now, wall), now, wall)

    def carry_out(self, outputs: list[Output], now: float, wall: float) -> list[Output | Received]:
        """Carry out what a direct call on the interface returned."""
        return self._carry_out(outputs, now, wall)

    def _receive_data(self, datagram: bytes, source: Endpoint, now: float, wall: float) -> list[Output | Received]:
        entry = self._keypairs.get(DataHeader.parse(datagram).receiver)
        if entry is None:
            raise Refused("unknown-index")
        peer, keypair = entry
        packet = keypair.open(datagram, now)
        news = self.interface.data_received(keypair.local_index, source, now, wall, keepalive=not packet)
        left = self._carry_out(news, now, wall)
        if packet:
            try:
                left.append(Received(peer, trim(packet)))
            except Refused as refused:
                self.drops[refused.reason] += 1
        return left

    def _carry_out(self, outputs: list[Output], now: float, wall: float) -> list[Output | Received]:
        left: list[Output | Received] = []
        for output in outputs:
            if isinstance(output, InstallKeypair):
                self._keypairs[output.keypair.local_index] = (output.peer, output.keypair)
            elif isinstance(output, ActivateKeypair):
                flush = self._keepalive if output.confirm else self._flush
                left += flush(output.peer, output.keypair, now, wall)
            elif isinstance(output, RemoveKeypair):
                self._keypairs.pop(output.keypair.local_index, None)
            elif isinstance(output, SendKeepalive):
                left += self._keepalive(output.peer, output.keypair, now, wall)
            elif isinstance(output, DropQueue):
                self.drops["no-session"] += len(self._queues.pop(output.peer, ()))
            elif isinstance(output, Drop):
                self.drops[output.reason] += 1
            else:
                left.append(output)
        return left

    def _keepalive(self, peer: Peer, keypair: Keypair, now: float, wall: float) -> list[Output | Received]:
        if self._queues.get(peer):
            return self._flush(peer, keypair, now, wall)
        assert peer.endpoint is not None  # the interface asks for none without
        return [Send(keypair.seal(b"", now), peer.endpoint, peer)]

    def _flush(self, peer: Peer, keypair: Keypair, now: float, wall: float) -> list[Output | Received]:
        queue = self._queues.get(peer)
        left: list[Output | Received] = []
        if not queue or peer.endpoint is None:
            return left
        while queue and keypair.can_send(now):
            packet = queue.popleft()
            padded = packet.ljust(padded_length(len(packet), self.mtu), b"\0")
            left.append(Send(keypair.seal(padded, now), peer.endpoint, peer))
        return left + self._carry_out(self.interface.data_sent(peer, now, wall), now, wall)
