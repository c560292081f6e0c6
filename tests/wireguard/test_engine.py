"""The engine's WireGuard mode, packet by packet: the other end is plain Python, so every byte is checked.

Not for: handshakes and timers (test_interface), whole devices (test_tunnel).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from support.netns import wait_until
from support.tunnels import bind_udp, ip_packet
from support.wireguard import OVERHEAD, Device, Remote, inner, networks

from fasttun.errors import ConfigurationError
from fasttun.wireguard.cookies import CookieChecker, CookieGenerator
from fasttun.wireguard.keypairs import REJECT_AFTER_MESSAGES
from fasttun.wireguard.keys import PrivateKey
from fasttun.wireguard.replay import ReplayWindow

A, B, C = "10.9.0.1", "10.9.0.2", "10.9.0.3"
A6, B6 = "fd09::1", "fd09::2"
WINDOW = 8128


def to_b(length: int = 60) -> bytes:
    return inner(A, B, length)


def from_b(note: bytes = b"") -> bytes:
    return ip_packet(B, A, note)


@pytest.fixture
def device():
    with Device() as device:
        yield device


@pytest.fixture
def b(device):
    return Remote(device, f"{B}/32", f"{B6}/128")


# --------------------------------------------------------------------------------------- outbound

def test_a_data_message_is_as_the_paper_says(device, b):
    device.send(to_b(61))
    datagram = b.receive_raw()
    # §5.4.6: type and three zeros, the receiver's index, a 64-bit counter, all little-endian.
    assert datagram[:16] == struct.pack("<B3xIQ", 4, b.keypair.local_index, 0)
    assert b.keypair.open(datagram, b.keypair.created) == to_b(61) + bytes(3)


@pytest.mark.parametrize("length", [20, 21, 31, 32, 33, 1391, 1392, 1393, 1403, 1404, 1405, 1406, 1407, 1408])
@pytest.mark.parametrize("mtu", [1404, 1408])
def test_padding_fills_16_within_the_mtu_and_never_cuts(length, mtu):
    with Device(mtu=mtu) as device:
        b = Remote(device, f"{B}/32")
        device.send(to_b(length))
        full = -(-length // 16) * 16
        expected = max(length, min(mtu, full))
        assert b.receive() == to_b(length).ljust(expected, b"\0")


def test_padding_follows_a_changed_mtu(device, b):
    device.table.set_mtu(100)
    for length, padded in ((97, 100), (96, 96), (100, 100), (101, 101), (1400, 1400)):
        device.send(to_b(length))
        assert b.receive() == to_b(length).ljust(padded, b"\0")


def test_counters_count_up_from_zero_and_over_2_to_32(device):
    b = Remote(device, f"{B}/32", session=False)
    for start in (0, (1 << 32) - 3):
        keypair = b.session(counter=start)
        for number in range(6):
            device.send(to_b(40 + number))
            datagram = b.receive_raw()
            assert int.from_bytes(datagram[8:16], "little") == start + number
            assert keypair.open(datagram, keypair.created).startswith(to_b(40 + number))


def test_counters_stay_in_order_through_bursts_of_mixed_sizes_and_peers(device, b):
    c = Remote(device, f"{C}/32")
    dice = random.Random(4)
    sent = {B: [], C: []}
    for number in range(200):
        host = dice.choice((B, C))
        packet = ip_packet(A, host, number.to_bytes(2, "big") * dice.choice((1, 8, 40, 600)))
        sent[host].append(packet)
        device.send(packet)
    for remote, host in ((b, B), (c, C)):
        for number, packet in enumerate(sent[host]):
            datagram = remote.receive_raw()
            assert int.from_bytes(datagram[8:16], "little") == number
            assert remote.keypair.open(datagram, remote.keypair.created).startswith(packet)
        assert remote.silent(0.01)


def test_a_session_too_old_neither_sends_nor_receives(device):
    b = Remote(device, f"{B}/32", age_s=180)
    device.send(to_b())
    b.send(from_b())
    device.expect_drop("expired")
    assert b.silent()
    assert b.counters()["queued"] == 1
    assert device.pipe.silent(0)


def test_a_session_ends_in_the_middle_of_its_life(device):
    b = Remote(device, f"{B}/32", age_s=179.7)
    device.send(to_b())
    assert b.receive().startswith(to_b())
    b.send(from_b())
    assert device.pipe.receive() == from_b()
    time.sleep(0.4)
    device.send(to_b())
    b.send(from_b())
    device.expect_drop("expired")
    assert b.silent(0.02)


def test_the_last_counter_is_the_last(device):
    b = Remote(device, f"{B}/32", counter=REJECT_AFTER_MESSAGES - 2)
    for _ in range(4):
        device.send(to_b())
    for _ in range(2):
        b.receive()
    wait_until(lambda: b.counters()["queued"] == 2)
    assert b.silent(0.02)
    b.send(from_b(b"last"), counter=REJECT_AFTER_MESSAGES - 1)
    assert device.pipe.receive() == from_b(b"last")
    # What is beyond must not be taken, authentic or not.
    b.keypair.send_counter = 0
    genuine = b.sealed(from_b(b"beyond"))
    b.send_raw(genuine[:8] + REJECT_AFTER_MESSAGES.to_bytes(8, "little") + genuine[16:])
    b.send_raw(genuine[:8] + b"\xff" * 8 + genuine[16:])
    device.expect_drop("replayed", 2)


def test_longest_prefix_decides_who_gets_a_packet(device, b):
    everyone = Remote(device, "0.0.0.0/0", "::/0")
    some = Remote(device, "10.9.0.0/24", "fd09::/64")
    for remote, host in ((b, B), (some, C), (everyone, "192.0.2.1"), (b, B6), (some, "fd09::3"),
                         (everyone, "2001:db8::1")):
        packet = inner(A6 if ":" in host else A, host, 80)
        device.send(packet)
        assert remote.receive() == packet


def test_ipv6_for_all_is_no_route_for_ipv4(device):
    Remote(device, "::/0")
    device.send(to_b())
    wait_until(lambda: device.drops == {"out_no_peer": 1})


def test_an_allowed_ip_moves_between_two_peers(device, b):
    c = Remote(device)
    b.send(from_b(b"mine"))
    assert device.pipe.receive() == from_b(b"mine")
    device.table.allow(c.number, *networks(f"{B}/32"))
    device.send(to_b())
    assert c.receive().startswith(to_b())
    b.send(from_b())
    device.expect_drop("not_allowed")
    c.send(from_b(b"mine now"))
    assert device.pipe.receive() == from_b(b"mine now")
    device.table.disallow(b.number, *networks(f"{B}/32"))  # not its any more: nothing happens
    assert device.table.lookup(ipaddress.ip_address(B)) == c.number
    device.table.disallow(c.number, *networks(f"{B}/32"))
    assert device.table.lookup(ipaddress.ip_address(B)) is None


def test_what_is_no_network_leaves_the_table_usable(device, b):
    class Broken:
        network_address = ipaddress.ip_address(B)

    for call in (device.table.allow, device.table.disallow):
        with pytest.raises(AttributeError):
            call(b.number, Broken())
    device.send(to_b())  # hangs where a lock was left behind
    b.receive()


def test_malformed_packets_from_the_host_are_counted(device, b):
    for packet in (b"\x45", b"\x00" * 40, to_b()[:-1], to_b() + b"\0", b"\x60" + bytes(39 + 1)):
        device.send(packet)
    wait_until(lambda: device.drops == {"out_malformed": 5})
    assert b.silent(0.02)


def test_a_peer_without_endpoint_is_counted_not_queued(device):
    b = Remote(device, f"{B}/32", known=False)
    device.send(to_b())
    wait_until(lambda: device.drops == {"out_no_endpoint": 1})
    b.send(from_b())  # now it is known
    device.pipe.receive()
    device.send(to_b())
    assert b.receive().startswith(to_b())


def test_an_endpoint_of_the_other_family_is_not_reachable(device):
    b = Remote(device, f"{B}/32", known=False)
    assert device.table.set_endpoint(b.number, (ipaddress.ip_address("2001:db8::1"), 9, 0)) is False
    device.send(to_b())
    wait_until(lambda: device.drops == {"out_no_endpoint": 1})


def test_several_peers_in_a_burst_each_get_their_own(device):
    remotes = [Remote(device, f"10.9.1.{number}/32") for number in range(40)]
    for round_ in range(3):
        for number in range(40):
            device.send(ip_packet(A, f"10.9.1.{number}", bytes([number, round_])))
    for number, remote in enumerate(remotes):
        for round_ in range(3):
            assert remote.receive()[20:22] == bytes([number, round_])
        assert remote.silent(0)


def test_group_by_group_offload_seals_each_datagram(b):
    with Device(udp_gso=True, udp_gro=True) as device:
        device.sock.setsockopt(socket.IPPROTO_UDP, 104, 1)  # UDP_GRO
        b = Remote(device, f"{B}/32")
        c = Remote(device, f"{C}/32")
        packets = [inner(A, host, length, bytes([number])) for number, (host, length) in enumerate(
            [(B, 1400)] * 50 + [(B, 900)] + [(C, 1400)] * 3 + [(B, 40), (C, 40), (B, 41)])]
        for packet in packets:
            device.send(packet)
        for remote, host in ((b, B), (c, C)):
            for packet in (packet for packet in packets if packet[16:20] == socket.inet_aton(host)):
                assert remote.receive().startswith(packet)
        # The other way as one message of many segments, one of them forged, one replayed.
        datagrams = [b.sealed(inner(B, A, 500, bytes([number]))) for number in range(30)]
        datagrams[7] = datagrams[7][:40] + bytes([datagrams[7][40] ^ 1]) + datagrams[7][41:]
        datagrams[9] = datagrams[8]
        b.sock.setsockopt(socket.IPPROTO_UDP, 103, len(datagrams[0]))  # UDP_SEGMENT
        b.send_raw(b"".join(datagrams))
        for number in range(30):
            if number not in (7, 9):
                assert device.pipe.receive() == inner(B, A, 500, bytes([number]))
        assert device.drops == {"forged": 1, "replayed": 1}


# ---------------------------------------------------------------------------------------- inbound

def test_padding_is_cut_by_the_packets_own_length(device, b):
    for packet in (from_b(b"1"), from_b(bytes(100)), ip_packet(B6, A6, b"six"), ip_packet(B6, A6)):
        b.send(packet)
        assert device.pipe.receive() == packet
        b.send(packet + bytes(300), pad=False)
        assert device.pipe.receive() == packet


def test_out_of_order_within_the_window_is_taken_once(device, b):
    twin = ReplayWindow()
    dice = random.Random(7)
    taken = refused = 0
    newest = 20000
    script = [newest, newest - WINDOW + 1, newest - WINDOW, newest - WINDOW - 1, 0, newest, newest + 1]
    for _ in range(400):
        newest += dice.choice((0, 0, 0, 1, 2, 63, 64, 65, 900))
        script.append(max(0, newest - dice.choice((0, 1, 2, 64, 127, WINDOW - 1, WINDOW, WINDOW + 1, 10000))))
    script += [1 << 40, (1 << 40) - WINDOW + 1, (1 << 40) - WINDOW, newest]
    for counter in script:
        b.send(from_b(counter.to_bytes(8, "big")), counter=counter)
        if twin.check(counter):
            twin.mark(counter)
            taken += 1
            assert device.pipe.receive() == from_b(counter.to_bytes(8, "big"))
        else:
            refused += 1
    assert taken > 100
    assert refused > 50
    device.expect_drop("replayed", refused)
    assert device.pipe.silent(0.02)


def test_a_forged_packet_does_not_use_up_its_counter(device, b):
    genuine = b.sealed(from_b(b"genuine"), counter=1000)
    # The index is not under the tag; the counter, the packet and the tag are.
    for at in (8, 15, 16, 40, len(genuine) - 16, len(genuine) - 1):
        forged = bytearray(genuine)
        forged[at] ^= 0x10
        b.send_raw(bytes(forged))
    wait_until(lambda: sum(device.drops.values()) == 6)
    assert device.drops["forged"] + device.drops.get("replayed", 0) == 6
    b.send_raw(genuine)
    assert device.pipe.receive() == from_b(b"genuine")
    b.send(from_b(b"older"), counter=999)  # a forged counter far ahead must not have moved the window
    assert device.pipe.receive() == from_b(b"older")
    assert device.pipe.silent(0.02)


def test_each_kind_of_bad_datagram_has_its_reason(device, b):
    genuine = b.sealed(from_b())
    cases = {
        "malformed": [
            b"\4", b"\4\0\0\0", genuine[:31], b"\4\0\0\1" + genuine[4:], b"\4\1\0\0" + genuine[4:], b"\0" * 64,
            b"\5" + genuine[1:], b"\1\0\0\0" + bytes(143), b"\1\0\0\0" + bytes(145), b"\2\0\0\0" + bytes(87),
            b"\3\0\0\0" + bytes(61), from_b(), os.urandom(31),
        ],
        "unknown_index": [genuine[:4] + b"\xee\xee\xee\xee" + genuine[8:], b"\4\0\0\0" + bytes(28)],
        "forged": [genuine[:-1], genuine + b"\0", genuine[:32], genuine[:16] + bytes(16)],
        "oversized": [genuine + bytes(2000), genuine[:16] + bytes(65507 - 16), bytes(9001)],
    }
    expected = dict.fromkeys(cases, 0)
    for reason, datagrams in cases.items():
        for datagram in datagrams:
            b.send_raw(datagram)
            expected[reason] += 1
            wait_until(lambda: sum(device.drops.values()) == sum(expected.values()), what=f"{device.drops}")
            assert {name: expected[name] for name in expected if expected[name]} == device.drops, datagram[:40]
    b.send_raw(b"")
    wait_until(lambda: device.drops["malformed"] == expected["malformed"] + 1)
    assert device.pipe.silent(0.02)
    assert b.silent(0)
    b.send_raw(genuine)
    assert device.pipe.receive() == from_b()


def test_what_is_inside_must_be_a_packet(device, b):
    packets = [b"\0", b"\x45", bytes(40), b"\x45" + bytes(19), b"\x60" + bytes(38), from_b()[:19],
               from_b(bytes(50))[:-1], b"\x46" + from_b()[1:], from_b()[:10] + b"\0\0" + from_b()[12:],
               ip_packet(B6, A6, bytes(50))[:-1]]
    for packet in packets:
        b.send(packet, pad=False)
    device.expect_drop("malformed", len(packets))
    assert device.pipe.silent(0.02)


def test_an_inner_source_that_is_not_the_peers_is_refused(device, b):
    c = Remote(device, f"{C}/32", "10.9.0.0/24")
    refused = [(b, ip_packet(C, A)), (b, ip_packet("192.0.2.1", A)), (b, ip_packet("fd09::3", A6)),
               (c, ip_packet(B, A)), (c, ip_packet(B6, A6)), (b, ip_packet(f"::ffff:{B}", A6)),
               (b, ip_packet(f"::{B}", A6))]
    for remote, packet in refused:
        remote.send(packet)
    device.expect_drop("not_allowed", len(refused))
    for remote, packet in ((b, ip_packet(B, A)), (b, ip_packet(B6, A6)), (c, ip_packet(C, A)),
                           (c, ip_packet("10.9.0.77", A))):
        remote.send(packet)
        assert device.pipe.receive() == packet


def test_an_ipv6_packet_does_not_pass_for_the_ipv4_address_that_it_spells():
    with Device() as device:
        b = Remote(device, "0.0.0.0/0")
        # The IPv4 packet first: what was found for it must not count for the other.
        for packet in (from_b(), ip_packet(f"::ffff:{B}", A6), from_b()):
            b.send(packet)
        assert device.pipe.receive() == from_b()
        assert device.pipe.receive() == from_b()
        device.expect_drop("not_allowed")


def test_an_ipv6_packet_does_not_go_to_the_ipv4_address_that_it_spells(device, b):
    spelled = ip_packet(A6, f"::ffff:{B}")
    for packet in (to_b(), spelled, to_b(61)):  # nor by what was found for the IPv4 packet just before
        device.send(packet)
    assert b.receive().startswith(to_b())
    assert b.receive().startswith(to_b(61))
    Remote(device, "::/0")
    device.send(spelled)
    device.expect_drop("out_no_peer", 2)


def test_a_keepalive_goes_nowhere_and_has_no_answer(device, b):
    b.send(b"")
    wait_until(lambda: b.counters()["rx_packets"] == 1)
    assert b.counters()["rx_bytes"] == OVERHEAD
    assert device.pipe.silent()
    assert b.silent()
    assert device.drops == {}
    (news,) = device.news()
    assert news[1] == {"heard", "first"}
    b.send(b"")
    wait_until(lambda: b.counters()["rx_packets"] == 2)
    assert device.news()[0][1] == {"heard"}


def test_a_keepalive_of_ours_is_32_bytes(device, b):
    device.table.keepalive(b.number)
    datagram = b.receive_raw()
    assert len(datagram) == OVERHEAD
    assert b.keypair.open(datagram, b.keypair.created) == b""
    assert b.silent(0.02)
    device.send(to_b())
    assert int.from_bytes(b.receive_raw()[8:16], "little") == 1
    # A keepalive is no packet of anybody's.
    wait_until(lambda: device.counters()["outbound"]["packets_out"] == 1)
    assert device.counters()["control_out"] == 1


def test_what_one_peer_sends_under_anothers_index_is_forged(device, b):
    c = Remote(device, f"{C}/32")
    stolen = b.sealed(ip_packet(C, A))
    c.send_raw(stolen[:4] + c.keypair.remote_index.to_bytes(4, "little") + stolen[8:])
    device.expect_drop("forged")


def test_indices_that_share_a_bucket_are_told_apart(device):
    same = [0x0000_1234 + (number << 14) for number in range(8)]
    remotes = [Remote(device, f"10.9.2.{number}/32", index=index) for number, index in enumerate(same)]
    device.table.remove_keypair(same[3])
    for number, remote in enumerate(remotes):
        remote.send(ip_packet(f"10.9.2.{number}", A, bytes([number])))
        if number != 3:
            assert device.pipe.receive() == ip_packet(f"10.9.2.{number}", A, bytes([number]))
    device.expect_drop("unknown_index")


def test_three_sessions_of_a_peer_all_receive_and_one_sends(device, b):
    older = b.keypair
    current = b.session()
    coming = b.session(activate=False)
    for keypair in (older, current, older):
        b.send(from_b(), keypair=keypair)
        assert device.pipe.receive() == from_b()
    device.send(to_b())
    assert b.receive(current).startswith(to_b())
    forged = bytearray(b.sealed(from_b(), keypair=coming))
    forged[-1] ^= 1
    b.send_raw(bytes(forged))
    device.expect_drop("forged")
    device.send(to_b())
    assert b.receive(current).startswith(to_b())
    # Its first packet confirms it, and the answer already goes under it: the peer may have lost the others.
    b.send(from_b(), keypair=coming)
    assert device.pipe.receive() == from_b()
    device.send(to_b())
    assert b.receive(coming).startswith(to_b())
    device.table.remove_keypair(older.remote_index)
    b.send(from_b(), keypair=older)
    wait_until(lambda: device.drops == {"forged": 1, "unknown_index": 1})
    device.table.remove_keypair(coming.remote_index)
    device.send(to_b())  # nothing to send under: it waits, and does not go under an older key
    wait_until(lambda: b.counters()["queued"] == 1)
    assert b.silent(0.02)
    device.table.remove_keypair(12345)  # not there
    device.table.activate(12345, True)


def test_an_older_session_that_is_first_heard_late_does_not_send(device, b):
    late = b.session(activate=False)
    current = b.session()
    b.send(from_b(), keypair=late)
    assert device.pipe.receive() == from_b()
    device.send(to_b())
    assert b.receive(current).startswith(to_b())


# ---------------------------------------------------------------------------------------- roaming

def test_authentic_data_moves_the_peer(device, b):
    with bind_udp() as elsewhere:
        b.send_raw(b.sealed(from_b()), elsewhere)
        device.pipe.receive()
        device.send(to_b())
        elsewhere.settimeout(5)
        assert b.keypair.open(elsewhere.recv(2000), b.keypair.created).startswith(to_b())
        assert b.counters()["endpoint"][1] == elsewhere.getsockname()[1]
        assert device.news()[-1][3][1] == elsewhere.getsockname()[1]
        b.send_raw(b.sealed(b""))  # a keepalive is enough to come back
        wait_until(lambda: b.counters()["endpoint"] == b.endpoint)


def test_only_authentic_data_moves_the_peer(device, b):
    genuine = b.sealed(from_b())
    expired = b.session(activate=False, age_s=200)
    old = b.sealed(from_b(), counter=5)
    b.send_raw(genuine)
    b.send_raw(old)
    for _ in range(2):
        device.pipe.receive()
    forged = bytearray(b.sealed(from_b()))
    forged[-1] ^= 1
    with bind_udp() as elsewhere:
        for datagram in (genuine, old, bytes(forged), b"\3\0\0\0" + bytes(60), b"\1\0\0\0" + bytes(144),
                         b.sealed(from_b(), keypair=expired), b""):
            b.send_raw(datagram, elsewhere)
        wait_until(lambda: sum(device.drops.values()) == 5)
        assert device.drops == {"replayed": 2, "forged": 1, "expired": 1, "malformed": 1}
        assert b.counters()["endpoint"] == b.endpoint
        device.send(to_b())
        b.receive()
        # Authentic, though what is inside is refused: it does prove where the peer is.
        b.send_raw(b.sealed(ip_packet(C, A)), elsewhere)
        wait_until(lambda: b.counters()["endpoint"][1] == elsewhere.getsockname()[1])


def test_a_replay_in_the_same_burst_does_not_move_the_peer():
    with Device(start=False) as device, bind_udp() as elsewhere:
        b = Remote(device, f"{B}/32")
        genuine = b.sealed(from_b())
        b.send_raw(genuine)
        b.send_raw(genuine, elsewhere)
        device.start()
        assert device.pipe.receive() == from_b()
        device.expect_drop("replayed")
        assert b.counters()["endpoint"] == b.endpoint


def test_an_endpoint_can_be_set_at_any_time(device, b):
    with bind_udp() as elsewhere:
        elsewhere.settimeout(5)
        device.table.set_endpoint(b.number, (ipaddress.ip_address("127.0.0.1"), elsewhere.getsockname()[1], 0))
        device.send(to_b())
        b.keypair.open(elsewhere.recv(2000), b.keypair.created)


def test_both_families_on_one_socket():
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sock, Device(host="::1") as device:
        six = Remote(device, f"{B}/32", host="::1")
        six.send(from_b())
        assert device.pipe.receive() == from_b()
        device.send(to_b())
        assert six.receive().startswith(to_b())


# ------------------------------------------------------------------------------------------ queue

def test_what_waits_for_a_session_goes_first_and_in_order(device):
    b = Remote(device, f"{B}/32", session=False)
    packets = [ip_packet(A, B, number.to_bytes(2, "big") * (1 + number * 5)) for number in range(100)]
    for packet in packets:
        device.send(packet)
    wait_until(lambda: b.counters()["queued"] == 100)
    device.assert_balanced(queued=100)
    assert device.news()[0][1] == {"waiting"}
    keypair = b.session(confirm=True)
    for number, packet in enumerate(packets):
        datagram = b.receive_raw()
        assert int.from_bytes(datagram[8:16], "little") == number
        assert keypair.open(datagram, keypair.created).startswith(packet)
    assert b.silent(0.02)  # no keepalive on top: data has confirmed the session
    assert b.counters()["queued"] == 0
    assert "sent" in device.news()[0][1]


def test_a_packet_does_not_overtake_those_that_wait(device):
    b = Remote(device, f"{B}/32", session=False)
    device.send(ip_packet(A, B, b"1"))
    device.send(ip_packet(A, B, b"2"))
    wait_until(lambda: b.counters()["queued"] == 2)
    keypair = b.session(activate=False)
    b.send(from_b(), keypair=keypair)  # confirmed, before the control side has had the queue sent
    device.pipe.receive()
    device.send(ip_packet(A, B, b"3"))
    wait_until(lambda: device.counters()["outbound"]["packets_in"] == 3)
    device.table.activate(keypair.remote_index, False)
    assert [b.receive(keypair)[20:21] for _ in range(3)] == [b"1", b"2", b"3"]


def test_a_session_without_data_is_confirmed_by_a_keepalive(device):
    b = Remote(device, f"{B}/32", session=False)
    b.session(confirm=True)
    assert len(b.receive_raw()) == OVERHEAD
    b.session(confirm=False)
    assert b.silent()


def test_a_queue_keeps_the_newest_128(device):
    b = Remote(device, f"{B}/32", session=False)
    for number in range(200):
        device.send(ip_packet(A, B, number.to_bytes(2, "big")))
    wait_until(lambda: device.drops == {"out_queue_full": 72})
    device.assert_balanced(queued=128)
    keypair = b.session()
    assert [int.from_bytes(b.receive(keypair)[20:22], "big") for _ in range(128)] == list(range(72, 200))
    assert b.silent(0.02)


def test_dropping_a_queue_is_counted_at_once(device):
    b = Remote(device, f"{B}/32", session=False)
    for _ in range(5):
        device.send(to_b())
    wait_until(lambda: b.counters()["queued"] == 5)
    device.table.drop_queue(b.number)
    wait_until(lambda: device.drops == {"out_no_session": 5})
    device.assert_balanced()
    b.session()
    assert b.silent(0.02)


def test_a_removed_peers_queue_is_counted_and_given_back(device):
    for _ in range(20):
        b = Remote(device, f"{B}/32", session=False)
        for _ in range(128):
            device.send(to_b())
        wait_until(lambda number=b.number: device.table.peer_counters(number)["queued"] == 128)
        device.table.remove_peer(b.number)
    wait_until(lambda: device.drops == {"out_no_session": 20 * 128})
    device.assert_balanced()


def test_silent_peers_leave_room_for_others(device):
    silent = [Remote(device, f"10.9.3.{number}/32", session=False) for number in range(12)]
    for _ in range(130):
        for number in range(12):
            device.send(ip_packet(A, f"10.9.3.{number}"))
    wait_until(lambda: device.counters()["outbound"]["packets_in"] == 12 * 130)
    assert min(remote.counters()["queued"] for remote in silent) > 40
    b = Remote(device, f"{B}/32", session=False)
    for number in range(20):
        device.send(ip_packet(A, B, bytes([number])))
    wait_until(lambda: b.counters()["queued"] == 20)
    keypair = b.session()
    assert [b.receive(keypair)[20] for _ in range(20)] == list(range(20))
    device.assert_balanced(queued=sum(remote.counters()["queued"] for remote in silent))
    for remote in silent:
        device.table.drop_queue(remote.number)
    wait_until(lambda: device.drops.get("out_no_session", 0) > 0)


def test_more_that_waits_than_one_turn_of_the_loop_takes():
    """Every queue is flushed, wherever the loop's memory for one turn ends."""
    with Device(burst_packets=16) as device:
        remotes = [Remote(device, f"10.9.4.{number}/32", session=False) for number in range(60)]
        for number in range(60):
            for count in range(1 + number % 3):
                device.send(ip_packet(A, f"10.9.4.{number}", bytes([number, count])))
        wait_until(lambda: sum(remote.counters()["queued"] for remote in remotes) == 120)
        keypairs = [remote.session(activate=False) for remote in remotes]
        for keypair in keypairs:
            device.table.activate(keypair.remote_index, True)
        for number, (remote, keypair) in enumerate(zip(remotes, keypairs, strict=True)):
            for count in range(1 + number % 3):
                assert remote.receive(keypair)[20:22] == bytes([number, count])


def test_all_queues_are_flushed_when_the_loop_finds_them_together():
    """The loop's memory for one turn is full exactly after one peer's last packet; the next peer's turn comes."""
    with Device(burst_packets=4) as device:
        remotes = [Remote(device, f"10.9.5.{number}/32", session=False) for number in range(40)]
        for number in range(40):
            device.send(ip_packet(A, f"10.9.5.{number}", bytes([number])))
        wait_until(lambda: sum(remote.counters()["queued"] for remote in remotes) == 40)
        with _busy(device):
            keypairs = [remote.session() for remote in remotes]
        for number, (remote, keypair) in enumerate(zip(remotes, keypairs, strict=True)):
            assert remote.receive(keypair)[20] == number


class _busy:
    """Keeps the loop busy with packets for nobody, so that it comes to the work late."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._done = threading.Event()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        packet = ip_packet(A, "192.0.2.9")
        while not self._done.is_set():
            self._device.send(packet)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


@pytest.mark.parametrize("length", [1421, 9001, 65507])
def test_an_oversized_packet_before_any_handshake_does_no_harm(length):
    with Device(engine_mtu=65535) as device:
        b = Remote(device, f"{B}/32", session=False)
        device.pipe.app.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        device.send(to_b())
        device.send(to_b(length))
        device.send(to_b(61))
        wait_until(lambda: device.counters()["outbound"]["packets_in"] == 3)
        slot = 1472
        kept = 2 + (length <= slot)
        assert b.counters()["queued"] == kept
        assert device.drops == ({} if kept == 3 else {"out_too_big": 1})
        keypair = b.session()
        for expected in (60, length, 61) if kept == 3 else (60, 61):
            assert b.receive(keypair).startswith(to_b(expected))


def test_an_oversized_packet_under_a_session_is_sent_or_counted():
    with Device(engine_mtu=65535) as device:
        b = Remote(device, f"{B}/32")
        b.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        device.pipe.app.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for length in (9001, 65507 - OVERHEAD):
            device.send(to_b(length))
            assert b.receive() == to_b(length)
        device.send(to_b(65507 - OVERHEAD + 1))
        device.send(to_b(65535))
        wait_until(lambda: device.drops == {"out_too_big": 2})


# --------------------------------------------------------------------------------- handshake messages

def initiation(key: PrivateKey, body: bytes | None = None) -> bytes:
    generator = CookieGenerator(key.public)
    return generator.add_macs((b"\1\0\0\0" + os.urandom(112))[:116] if body is None else body, 0.0)


def in_chunks(device: Device, remote: Remote, messages: list[bytes]) -> None:
    """Sends handshake messages no faster than the loop takes them: a socket's buffer holds few."""
    before = device.counters()["control_in"]
    for start in range(0, len(messages), 100):
        chunk = messages[start:start + 100]
        for message in chunk:
            remote.send_raw(message)
        before += len(chunk)
        wait_until(lambda: device.counters()["control_in"] == before, interval=0.001)  # noqa: B023


def test_only_a_right_mac1_gets_to_the_control_side(device, b):
    ours, other = PrivateKey.generate(), PrivateKey.generate()
    right = initiation(ours)
    b.send_raw(right)  # no key yet: none is for us
    wait_until(lambda: device.counters()["bad_mac1"] == 1)
    device.table.set_mac1_key(CookieChecker(ours.public).mac1_key)
    response = CookieGenerator(ours.public).add_macs(b"\2\0\0\0" + os.urandom(56), 0.0)
    wrong = [initiation(other), right[:-1], *(bytes(right[:at] + bytes([right[at] ^ 1]) + right[at + 1:])
             for at in (4, 115, 116, 131)), response[:60] + bytes(32), bytes(4)]
    for datagram in wrong:
        b.send_raw(datagram)
    wait_until(lambda: device.counters()["bad_mac1"] == 1 + 6 and device.drops == {"malformed": 2})
    assert device.table.take()[0] == []
    b.send_raw(right)
    b.send_raw(response)
    b.send_raw(right[:-1] + b"\7")  # mac2 is not the engine's to check
    got = []
    wait_until(lambda: got.extend(device.table.take()[0]) or len(got) == 3)
    assert [message[0] for message in got] == [right, response, right[:-1] + b"\7"]
    assert {message[1] for message in got} == {b.endpoint}
    device.table.set_mac1_key(None)
    b.send_raw(right)
    wait_until(lambda: device.counters()["bad_mac1"] == 8)
    counters = device.counters()
    assert counters["control_in"] == 11
    assert counters["inbound"]["packets_in"] == 2


def test_a_key_of_another_length_is_refused(device, b):
    with pytest.raises(ConfigurationError):
        device.table.set_mac1_key(bytes(31))
    with pytest.raises(ConfigurationError):
        device.table.install(b.number, 1, 2, bytes(31), bytes(32))
    with pytest.raises(ConfigurationError):
        device.table.install(b.number, 1, 2, bytes(32), bytes(33))


def test_a_full_ring_is_counted_and_the_loop_goes_on(device, b):
    key = PrivateKey.generate()
    device.table.set_mac1_key(CookieChecker(key.public).mac1_key)
    message = initiation(key)
    in_chunks(device, b, [message] * 5000)
    assert device.table.messages_lost == 5000 - 4096
    b.send(from_b())
    assert device.pipe.receive() == from_b()
    got, backlog = [], 1
    while backlog:
        messages, _, backlog, _ = device.table.take(64)
        got += messages
    assert len(got) == 4096
    b.send_raw(message)
    wait_until(lambda: device.table.take()[0])


def test_cookie_replies_leave_the_ring_to_handshakes(device, b):
    """A cookie reply has no mac1: whoever can send a datagram can make one."""
    key = PrivateKey.generate()
    device.table.set_mac1_key(CookieChecker(key.public).mac1_key)
    in_chunks(device, b, [b"\3\0\0\0" + os.urandom(60)] * 300)
    in_chunks(device, b, [initiation(key)] * 200)
    messages = device.table.take(4096)[0]
    assert sum(message[0][0] == 1 for message in messages) == 200
    assert 0 < sum(message[0][0] == 3 for message in messages) <= 64
    assert device.table.messages_lost == 300 - sum(message[0][0] == 3 for message in messages)


# -------------------------------------------------------------------------------- control and threads

def test_numbers_that_are_not_there_raise_key_error(device):
    table = device.table
    number = table.add_peer()
    table.remove_peer(number)
    endpoint = (ipaddress.ip_address(A), 9, 0)
    calls = [(table.remove_peer,), (table.set_endpoint, endpoint), (table.allow, *networks("10.0.0.0/8")),
             (table.keepalive,), (table.install, 1, 1, bytes(32), bytes(32)), (table.drop_queue,),
             (table.peer_counters,)]
    for wrong in (number, -1, 16, 1 << 30):
        for call, *rest in calls:
            with pytest.raises(KeyError):
                call(wrong, *rest)
    assert table.lookup(ipaddress.ip_address("10.0.0.1")) is None


def test_a_removed_peers_allowed_ips_are_nobodys(device, b):
    device.table.remove_peer(b.number)
    assert device.table.lookup(ipaddress.ip_address(B)) is None
    assert device.table.lookup(ipaddress.ip_address(B6)) is None
    device.send(to_b())
    wait_until(lambda: device.drops == {"out_no_peer": 1})


def test_news_of_sent_and_received_tell_which_was_later(device, b):
    b.send(from_b())
    device.pipe.receive()
    device.send(to_b())
    b.receive()
    (news,) = device.news()
    assert news[:2] == (b.number, {"sent", "received", "heard", "first", "sent_last"})
    assert news[2] == b.keypair.remote_index
    assert news[4] == 1
    device.send(to_b())
    b.receive()
    b.send(from_b())
    device.pipe.receive()
    (news,) = device.news()
    assert news[1] == {"sent", "received", "heard"}
    assert news[4] == 2
    assert device.news() == []


def test_urgent_news_wakes_the_control_side_and_data_does_not_keep_it_awake(device):
    b = Remote(device, f"{B}/32", session=False)
    device.send(to_b())
    wait_until(lambda: _readable(device.table.notify_fd))
    device.news()
    assert not _readable(device.table.notify_fd)
    for _ in range(50):  # more of the same is not urgent
        device.send(to_b())
    wait_until(lambda: b.counters()["queued"] == 51)
    time.sleep(0.02)
    assert not _readable(device.table.notify_fd)
    keypair = b.session()
    b.send(from_b(), keypair=keypair)  # the first under a key is
    wait_until(lambda: _readable(device.table.notify_fd))


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_peers_come_and_go_while_packets_flow():
    """Nothing is lost from the books, nothing crashes; under AddressSanitizer nothing freed is touched."""
    with Device() as device:
        stay = Remote(device, f"{B}/32")
        stay.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        done = threading.Event()
        failed: list[BaseException] = []

        def guarded(work):
            def run() -> None:
                try:
                    while not done.is_set():
                        work()
                except BaseException as error:
                    failed.append(error)
                    done.set()
            return threading.Thread(target=run)

        sock = bind_udp()
        address = (ipaddress.ip_address("127.0.0.1"), sock.getsockname()[1], 0)
        dice = random.Random(11)

        def churn() -> None:
            numbers = [device.table.add_peer() for _ in range(4)]
            for at, number in enumerate(numbers):
                device.table.allow(number, *networks(f"10.9.6.{at}/32"))
                device.table.set_endpoint(number, address)
                device.table.install(number, 100 + at, 7, bytes(32), bytes(32))
                if dice.random() < 0.7:
                    device.table.activate(100 + at, dice.random() < 0.5)
            device.table.keepalive(numbers[0])
            device.table.remove_keypair(101)
            device.table.drop_queue(numbers[1])
            device.table.peer_counters(numbers[2])
            device.table.take()
            for number in numbers:
                device.table.remove_peer(number)

        def outbound() -> None:
            for at in range(4):
                device.pipe.send(ip_packet(A, f"10.9.6.{at}", b"x" * 50))
            device.pipe.send(to_b())

        def inbound() -> None:
            for at in range(4):
                sock.sendto(struct.pack("<IIQ", 4, 100 + at, 1) + bytes(40), device.address)

        def drain() -> None:
            for end in (sock, stay.sock):
                end.setblocking(False)
                for _ in range(100):
                    try:
                        end.recv(2000)
                    except BlockingIOError:
                        break
            time.sleep(0.001)

        threads = [guarded(work) for work in (churn, outbound, inbound, drain)]
        for thread in threads:
            thread.start()
        done.wait(1.0)
        done.set()
        for thread in threads:
            thread.join(10)
        assert not failed, failed
        stay.sock.settimeout(5)
        assert device.counters()["outbound"]["packets_out"] > 100
        # The socket's buffer may still be full of the others'.
        wait_until(lambda: stay.send(from_b(b"still there")) or not device.pipe.silent(0.02))
        assert device.pipe.receive() == from_b(b"still there")
        sock.close()


def test_the_control_side_gets_its_turn_under_load(device, b):
    done = threading.Event()

    def flood() -> None:
        while not done.is_set():
            device.pipe.send(to_b(1400))

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        started = time.monotonic()
        for _ in range(200):
            b.counters()
        assert time.monotonic() - started < 2
    finally:
        done.set()
        thread.join()


KEEPER = """
import gc, sys
from fasttun._core import SessionTable

table = SessionTable(family=2, mtu=1420)
numbers = [table.add_peer() for _ in range(3)]
for at, number in enumerate(numbers):
    keys = []
    for _ in range(2):  # masked, so that no other copy of the key is ever made here
        key = bytearray.fromhex(sys.stdin.readline())
        for place in range(32):
            key[place] ^= 0xff
        keys.append(key)
    table.install(number, at + 1, 9, *keys)
    for key in keys:
        key[:] = bytes(32)
for step in (lambda: None, lambda: table.remove_keypair(1), lambda: table.remove_peer(numbers[1]), None):
    if step is None:
        del table
        gc.collect()
    else:
        step()
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_keys_are_wiped_with_their_session_their_peer_and_the_table():
    """Seen from outside: another process searches the memory of the one that had them."""
    secrets = [os.urandom(32) for _ in range(6)]
    with subprocess.Popen([sys.executable, "-c", KEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, bufsize=1) as child:
        for secret in secrets:
            child.stdin.write(bytes(byte ^ 0xff for byte in secret).hex() + "\n")
        found = []
        for _ in range(4):
            assert child.stdout.readline() == "ready\n"
            found.append([secret in _memory(child.pid) for secret in secrets])
            child.stdin.write("\n")
    # It can be found at all: without this the rest would prove nothing.
    assert found[0] == [True] * 6
    assert found[1] == [False] * 2 + [True] * 4
    assert found[2] == [False] * 4 + [True] * 2
    assert found[3] == [False] * 6


def _memory(pid: int) -> bytes:
    """Everything that the process can write to."""
    parts = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            first, last = (int(part, 16) for part in span.split("-"))
            if rights.startswith("rw"):
                memory.seek(first)
                with contextlib.suppress(OSError):
                    while part := memory.read(min(last - first, 1 << 22)):
                        parts.append(part)
                        first += len(part)
                        if first >= last:
                            break
    return b"".join(parts)
