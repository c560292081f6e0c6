"""The engine's allowed IPs (fasttun/_native/allowedips.pxd) against plain dictionaries and `ipaddress`."""

from __future__ import annotations

import ipaddress
import random
import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fasttun._testing import AllowedIPs

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAPPED = bytes(10) + b"\xff\xff"


def packed(address: Address) -> bytes:
    return MAPPED + address.packed if address.version == 4 else address.packed


def prefix(network: Network) -> tuple[bytes, int]:
    return packed(network.network_address), network.prefixlen + (96 if network.version == 4 else 0)


def net(text: str) -> Network:
    return ipaddress.ip_network(text)


def lookup(table: AllowedIPs, text: str) -> int:
    return table.lookup(packed(ipaddress.ip_address(text)))


def filled(*rows: tuple[str, int]) -> AllowedIPs:
    table = AllowedIPs()
    for text, peer in rows:
        table.insert(*prefix(net(text)), peer)
    return table


class Twin:
    """Asks every prefix."""

    def __init__(self) -> None:
        self.owner: dict[Network, int] = {}

    def lookup(self, address: Address) -> int:
        holding = [n for n in self.owner if n.version == address.version and address in n]
        return self.owner[max(holding, key=lambda n: n.prefixlen)] if holding else -1


# Few distinct bits, so that prefixes nest, collide and meet the addresses asked for.
def values(width: int) -> st.SearchStrategy[int]:
    few = st.lists(st.integers(0, width - 1), max_size=3).map(lambda bits: sum(1 << b for b in set(bits)))
    return st.one_of(few, few.map(lambda value: value ^ ((1 << width) - 1)), st.integers(0, (1 << width) - 1))


def network4(value: int, bits: int) -> Network:
    return IPv4Network((value, bits), strict=False)


def network6(value: int, bits: int) -> Network:
    return IPv6Network((value, bits), strict=False)


MAPPED_SPACE = IPv6Network("::ffff:0:0/96")
NETWORKS = st.one_of(
    st.builds(network4, values(32), st.sampled_from([0, 1, 7, 8, 9, 15, 16, 24, 31, 32]) | st.integers(0, 32)),
    st.builds(network6, values(128), st.sampled_from([0, 1, 64, 95, 96, 97, 127, 128]) | st.integers(0, 128)).filter(
        lambda n: not (n.prefixlen >= 96 and n.network_address in MAPPED_SPACE)),
)
ADDRESSES = st.one_of(
    values(32).map(IPv4Address), values(128).map(IPv6Address).filter(lambda a: a not in MAPPED_SPACE))
PEERS = st.integers(0, 5) | st.sampled_from([63, 64, 100000])


class Comparison(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = AllowedIPs()
        self.twin = Twin()

    @rule(network=NETWORKS, peer=PEERS)
    def insert(self, network: Network, peer: int) -> None:
        self.table.insert(*prefix(network), peer)
        self.twin.owner[network] = peer

    @rule(data=st.data(), peer=PEERS)
    def move(self, data: st.DataObject, peer: int) -> None:
        if self.twin.owner:
            self.insert(data.draw(st.sampled_from(list(self.twin.owner))), peer)

    @rule(network=NETWORKS, peer=PEERS)
    def remove(self, network: Network, peer: int) -> None:
        mine = self.twin.owner.get(network) == peer
        assert self.table.remove(*prefix(network), peer) == mine
        if mine:
            del self.twin.owner[network]

    @rule(data=st.data(), peer=PEERS, really=st.booleans())
    def remove_known(self, data: st.DataObject, peer: int, really: bool) -> None:
        if self.twin.owner:
            network = data.draw(st.sampled_from(list(self.twin.owner)))
            self.remove(network, self.twin.owner[network] if really else peer)

    @rule(peer=PEERS)
    def remove_peer(self, peer: int) -> None:
        self.table.remove_peer(peer)
        self.twin.owner = {n: p for n, p in self.twin.owner.items() if p != peer}

    @rule(address=ADDRESSES)
    def ask(self, address: Address) -> None:
        assert self.table.lookup(packed(address)) == self.twin.lookup(address)

    @invariant()
    def edges_agree(self) -> None:
        assert len(self.table) == len(self.twin.owner)
        for network in list(self.twin.owner)[-3:]:
            for address in (network[0], network[-1]):
                if address.version == 4 or address not in MAPPED_SPACE:
                    assert self.table.lookup(packed(address)) == self.twin.lookup(address)


Comparison.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestComparison = Comparison.TestCase


@given(st.dictionaries(NETWORKS, PEERS, max_size=200), st.lists(ADDRESSES, max_size=30))
@settings(deadline=None, max_examples=60)
def test_many_prefixes_at_once(owner: dict[Network, int], addresses: list[Address]) -> None:
    table, twin = AllowedIPs(), Twin()
    for network, peer in owner.items():
        table.insert(*prefix(network), peer)
        twin.owner[network] = peer
    for address in addresses:
        assert table.lookup(packed(address)) == twin.lookup(address)


def test_the_longest_prefix_wins_whatever_the_order() -> None:
    rows = [("0.0.0.0/0", 0), ("10.0.0.0/8", 1), ("10.1.0.0/16", 2), ("10.1.2.3/32", 3)]
    for seed in range(8):
        table = filled(*random.Random(seed).sample(rows, len(rows)))
        assert [lookup(table, a) for a in ("192.0.2.1", "10.2.0.1", "10.1.2.2", "10.1.2.3")] == [0, 1, 2, 3]


def test_the_whole_of_one_family_holds_nothing_of_the_other() -> None:
    assert lookup(filled(("::/0", 1)), "10.0.0.1") == -1
    assert lookup(filled(("0.0.0.0/0", 1)), "2001:db8::1") == -1
    assert lookup(filled(("0.0.0.0/0", 1)), "::") == -1
    both = filled(("::/0", 1), ("0.0.0.0/0", 2))
    assert (lookup(both, "255.255.255.255"), lookup(both, "0.0.0.0"), lookup(both, "::")) == (2, 2, 1)


def test_ipv6_prefixes_around_the_mapped_ones_hold_no_ipv4() -> None:
    table = filled(("::/64", 1), ("::/80", 2), ("::fffe:0:0/95", 3), ("::/96", 4), ("::fffe:0:0/96", 5))
    assert lookup(table, "10.0.0.1") == -1
    assert lookup(table, "::a00:1") == 4
    assert lookup(table, "::fffe:a00:1") == 5
    table.insert(*prefix(net("10.0.0.0/8")), 6)
    assert (lookup(table, "10.0.0.1"), lookup(table, "::a00:1")) == (6, 4)


def test_host_bits_are_ignored() -> None:
    table = AllowedIPs()
    table.insert(packed(ipaddress.ip_address("10.1.2.3")), 96 + 8, 7)
    assert lookup(table, "10.200.0.1") == 7
    assert table.remove(packed(ipaddress.ip_address("10.9.9.9")), 96 + 8, 7)
    assert len(table) == 0
    table.insert(packed(ipaddress.ip_address("10.0.0.1")), 64, 8)
    assert (lookup(table, "10.0.0.1"), lookup(table, "::1")) == (-1, 8), "::/64, an IPv6 one"


def test_a_prefix_moves_and_only_its_owner_can_take_it_away() -> None:
    table = filled(("10.0.0.0/8", 1), ("10.0.0.0/8", 2), ("fd00::/8", 1))
    assert len(table) == 2
    assert not table.remove(*prefix(net("10.0.0.0/8")), 1)
    table.remove_peer(1)
    assert (lookup(table, "10.0.0.1"), lookup(table, "fd00::1")) == (2, -1)
    assert table.remove(*prefix(net("10.0.0.0/8")), 2)
    assert not table.remove(*prefix(net("10.0.0.0/8")), 2)
    assert lookup(table, "10.0.0.1") == -1


def test_an_empty_table_and_peers_it_never_had() -> None:
    table = AllowedIPs()
    assert lookup(table, "10.0.0.1") == lookup(table, "::1") == -1
    assert not table.remove(*prefix(net("0.0.0.0/0")), 0)
    for peer in (-1, 0, 2**31 - 1):
        table.remove_peer(peer)


def test_every_length_of_both_families() -> None:
    table = AllowedIPs()
    for bits in range(33):
        table.insert(*prefix(network4(0x0A010203, bits)), bits)
    for bits in range(129):
        table.insert(*prefix(network6(0x20010DB8 << 96 | 5, bits)), 100 + bits)
    for bits in range(33):
        differs_at = 0x0A010203 ^ (1 << (31 - bits) if bits < 32 else 0)
        assert table.lookup(packed(IPv4Address(differs_at))) == bits
    for bits in range(129):
        differs_at = (0x20010DB8 << 96 | 5) ^ (1 << (127 - bits) if bits < 128 else 0)
        assert table.lookup(packed(IPv6Address(differs_at))) == 100 + bits


def test_sixty_five_thousand_prefixes_load_and_leave_quickly() -> None:
    """10,000 peers with a few networks each; the limit is ten times what it takes here."""
    table = AllowedIPs()
    rows = [(packed(IPv4Address(0x0A000000 + 256 * n)), 96 + 24, n % 10000) for n in range(65536)]
    start = time.perf_counter()
    for row in rows:
        table.insert(*row)
    assert len(table) == 65536
    assert [table.lookup(row[0][:15] + b"\x09") for row in rows[::257]] == [row[2] for row in rows[::257]]
    for peer in range(10000):
        table.remove_peer(peer)
    assert len(table) == 0
    assert time.perf_counter() - start < 1.0
    assert lookup(table, "10.0.0.1") == -1
