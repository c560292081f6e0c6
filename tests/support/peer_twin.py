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
PROOF_NS = 8 * 10**9  # how long a claimant's answer counts
SCAN_NS = 10**8  # between two searches of a full table for silent peers

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
    asked_ns: int | None = None  # as an owner, by a limit of its own


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
    claimed_ns: dict[Endpoint, int] = field(default_factory=dict)
    proven: dict[Address, tuple[Endpoint, int]] = field(default_factory=dict)
    scanned_ns: int = 0
    _lives: int = 0

    def expired(self, endpoint: Endpoint, now: int) -> bool:
        return now - self.peers[endpoint].heard_ns > self.expiry_ns

    def forget(self, endpoint: Endpoint) -> None:
        for address in self.peers.pop(endpoint).addresses:
            del self.owner[address]
            del self.life[address]
            self.proven.pop(address, None)

    def hear(self, endpoint: Endpoint, framing: str, now: int) -> None:
        peer = self.peers[endpoint]
        peer.heard_ns = now
        peer.checks = 0
        if peer.framing != "raw":
            peer.framing = framing

    def admit(self, endpoint: Endpoint, address: Address, framing: str, now: int) -> tuple[int, list[Endpoint]]:
        """(0 or the reason below zero, whom to ask). Asking counts only once `asked` is called."""
        if address in self.owner:
            owner = self.owner[address]
            if owner == endpoint:
                self.hear(endpoint, framing, now)
                return 0, []
            if not self.expired(owner, now):
                who, when = self.proven.get(address, (None, 0))
                if who == endpoint and now - when <= PROOF_NS and self.mute(owner, now):
                    return (0 if self._move(address, endpoint, now) else FULL), []
                return UNPROVEN, self._whom_to_ask(address, endpoint, now)
            self.forget(owner)
        full = len(self.owner) == self.addresses_max or (
            endpoint not in self.peers and len(self.peers) == self.peers_max)
        if full and now - self.scanned_ns >= SCAN_NS:
            self.scanned_ns = now
            for other in [other for other in self.peers if self.expired(other, now)]:
                self.forget(other)
        if len(self.owner) == self.addresses_max:
            return FULL, []
        if endpoint not in self.peers:
            if len(self.peers) == self.peers_max:
                return FULL, []
            self.peers[endpoint] = Peer(now)
        if len(self.peers[endpoint].addresses) >= MAX_ADDRESSES:
            return FULL, []
        self._give(address, endpoint)
        self.hear(endpoint, framing, now)
        return 0, []

    def _give(self, address: Address, endpoint: Endpoint) -> None:
        self.peers[endpoint].addresses.add(address)
        self.owner[address] = endpoint
        self._lives += 1
        self.life[address] = self._lives

    def mute(self, endpoint: Endpoint, now: int) -> bool:
        owner = self.peers[endpoint]
        return (owner.checks >= 2 and now - owner.first_check_ns >= self.patience_ns
                and now - owner.last_check_ns >= self.patience_ns // 3)

    def _whom_to_ask(self, address: Address, claimant: Endpoint, now: int) -> list[Endpoint]:
        def may_be_asked(asked_ns: int | None) -> bool:
            return asked_ns is None or now - asked_ns >= self.patience_ns // 5

        endpoint = self.owner[address]
        owner = self.peers[endpoint]
        wanted = []
        if (owner.checks == 0 or (owner.checks == 1 and now - owner.last_check_ns >= self.patience_ns // 3)) \
                and may_be_asked(owner.asked_ns):
            wanted.append(endpoint)
        if owner.checks and now - owner.first_check_ns >= self.patience_ns // 5 \
                and may_be_asked(self.claimed_ns.get(claimant)):
            wanted.append(claimant)
        return wanted

    def _move(self, address: Address, to: Endpoint, now: int) -> bool:
        """Whether there was room for it."""
        if to not in self.peers:
            if len(self.peers) == self.peers_max:
                return False
            self.peers[to] = Peer(now)
        if len(self.peers[to].addresses) >= MAX_ADDRESSES:
            return False
        former, life = self.owner[address], self.life[address]
        self.peers[former].addresses.remove(address)
        self._give(address, to)
        self.life[address] = life  # it has moved, it was not learned anew
        self.proven.pop(address, None)
        self.hear(to, "raw", now)
        if not self.peers[former].addresses:
            self.forget(former)
        return True

    def asked(self, whom: Endpoint, address: Address, now: int, transaction: bytes) -> Check:
        if whom != self.owner[address]:
            self.claimed_ns[whom] = now
        else:
            owner = self.peers[whom]
            owner.asked_ns = now
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
        owner = self.owner[check.address]
        if owner == by:
            self.hear(by, "raw", now)
        elif self.mute(owner, now):
            self._move(check.address, by, now)
        else:
            self.proven[check.address] = by, now
        return True

    def lookup(self, address: Address, now: int) -> Endpoint | None:
        endpoint = self.owner.get(address)
        if endpoint is None and len(self.peers) == 1:
            endpoint = next(iter(self.peers))
        return None if endpoint is None or self.expired(endpoint, now) else endpoint
