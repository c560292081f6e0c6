"""A slow twin of the peer table (fasttun/_native/peers.pxd), from the rule in docs/design.md, "Peer learning".

Dictionaries and plain scans; the caller's clock in nanoseconds. Not for: STUN, sockets, --allow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FULL", "STRANGER", "UNPROVEN", "Check", "PeerTwin"]

STRANGER, UNPROVEN, FULL = -1, -2, -3
EPOCH_NS = 1 << 32  # an answer counts in the 4.3 s of its check and in the next
MAX_ADDRESSES = 1024  # of one peer

Endpoint = Any
Address = Any


@dataclass
class Peer:
    heard_ns: int
    framing: str = "unknown"
    addresses: set[Address] = field(default_factory=set)
    checks: int = 0
    first_check_ns: int = 0
    last_check_ns: int = 0


@dataclass(frozen=True)
class Check:
    """A question that was sent to `to` about `address`; `life`: of the address in the table."""

    to: Endpoint
    address: Address
    epoch: int
    life: int
    transaction: bytes


@dataclass
class PeerTwin:
    """A learning table. Each packet takes two steps: `admit`, then `asked` if a check was really sent."""

    peers_max: int
    addresses_max: int
    expiry_ns: int
    patience_ns: int
    peers: dict[Endpoint, Peer] = field(default_factory=dict)
    owner: dict[Address, Endpoint] = field(default_factory=dict)
    life: dict[Address, int] = field(default_factory=dict)
    checked_ns: dict[Endpoint, int] = field(default_factory=dict)
    _lives: int = 0

    def expired(self, endpoint: Endpoint, now: int) -> bool:
        return now - self.peers[endpoint].heard_ns > self.expiry_ns

    def forget(self, endpoint: Endpoint) -> None:
        for address in self.peers.pop(endpoint).addresses:
            del self.owner[address]
            del self.life[address]

    def hear(self, endpoint: Endpoint, framing: str, now: int) -> None:
        peer = self.peers[endpoint]
        peer.heard_ns = now
        peer.checks = 0
        if peer.framing != "raw":
            peer.framing = framing

    def admit(self, endpoint: Endpoint, address: Address, framing: str, now: int) -> tuple[int, Endpoint | None]:
        """(0 or the reason below zero, whom to ask). Asking counts only once `asked` is called."""
        if address in self.owner:
            owner = self.owner[address]
            if owner == endpoint:
                self.hear(endpoint, framing, now)
                return 0, None
            if not self.expired(owner, now):
                return UNPROVEN, self._whom_to_ask(address, endpoint, now)
            self.forget(owner)
        if len(self.owner) == self.addresses_max or (
                endpoint not in self.peers and len(self.peers) == self.peers_max):
            for other in [other for other in self.peers if self.expired(other, now)]:
                self.forget(other)
        if len(self.owner) == self.addresses_max:
            return FULL, None
        if endpoint not in self.peers:
            if len(self.peers) == self.peers_max:
                return FULL, None
            self.peers[endpoint] = Peer(now)
        if len(self.peers[endpoint].addresses) >= MAX_ADDRESSES:
            return FULL, None
        self._give(address, endpoint)
        self.hear(endpoint, framing, now)
        return 0, None

    def _give(self, address: Address, endpoint: Endpoint) -> None:
        self.peers[endpoint].addresses.add(address)
        self.owner[address] = endpoint
        self._lives += 1
        self.life[address] = self._lives

    def _whom_to_ask(self, address: Address, claimant: Endpoint, now: int) -> Endpoint | None:
        endpoint = self.owner[address]
        owner = self.peers[endpoint]
        if now - owner.heard_ns < self.patience_ns:
            return None
        if owner.checks == 0:
            whom = endpoint
        elif now - owner.last_check_ns < self.patience_ns // 3:
            return None
        elif owner.checks == 1:
            whom = endpoint
        elif now - owner.first_check_ns < self.patience_ns:
            return None
        else:
            whom = claimant
        last = self.checked_ns.get(whom)
        return None if last is not None and now - last < self.patience_ns // 5 else whom

    def asked(self, whom: Endpoint, address: Address, now: int, transaction: bytes) -> Check:
        self.checked_ns[whom] = now
        if whom == self.owner[address]:
            owner = self.peers[whom]
            if owner.checks == 0:
                owner.first_check_ns = now
            owner.checks += 1
            owner.last_check_ns = now
        return Check(whom, address, now // EPOCH_NS, self.life[address], transaction)

    def answer(self, check: Check, by: Endpoint, now: int) -> bool:
        """`by` sends back the check's transaction: whether it counts as one that was sent there."""
        if by != check.to or self.life.get(check.address) != check.life \
                or now // EPOCH_NS - check.epoch not in (0, 1):
            return False
        endpoint = self.owner[check.address]
        owner = self.peers[endpoint]
        if endpoint == by:
            self.hear(by, "raw", now)
            return True
        if owner.checks < 2 or now - owner.first_check_ns < self.patience_ns:
            return True
        if by not in self.peers:
            if len(self.peers) == self.peers_max:
                return True
            self.peers[by] = Peer(now)
        if len(self.peers[by].addresses) >= MAX_ADDRESSES:
            return True
        life = self.life[check.address]
        owner.addresses.remove(check.address)
        self._give(check.address, by)
        self.life[check.address] = life  # it has moved, it was not learned anew
        self.hear(by, "raw", now)
        if not owner.addresses:
            self.forget(endpoint)
        return True

    def lookup(self, address: Address, now: int) -> Endpoint | None:
        endpoint = self.owner.get(address)
        if endpoint is None and len(self.peers) == 1:
            endpoint = next(iter(self.peers))
        return None if endpoint is None or self.expired(endpoint, now) else endpoint
