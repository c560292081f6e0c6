"""Wire formats: offsets as scapy sees them, strict lengths, and nothing but `Refused` for random bytes."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.contrib.wireguard import (
    Wireguard,
    WireguardCookieReply,
    WireguardInitiation,
    WireguardResponse,
    WireguardTransport,
)

from fasttun.wireguard.messages import CookieReply, DataHeader, Initiation, Response, message_type
from fasttun.wireguard.refusal import Refused

INITIATION = Initiation(0x01020304, bytes(range(32)), bytes(range(48)), bytes(range(28)))
RESPONSE = Response(0x01020304, 0x05060708, bytes(range(32)), bytes(range(16)))
COOKIE_REPLY = CookieReply(0x01020304, bytes(range(24)), bytes(range(32)))
DATA = DataHeader(0x01020304, 0x1122334455667788)
MACS = b"m" * 16 + b"n" * 16
WHOLE = {
    1: INITIATION.encode() + MACS, 2: RESPONSE.encode() + MACS, 3: COOKIE_REPLY.encode(), 4: DATA.encode() + b"t" * 16,
}
PARSERS = {1: Initiation, 2: Response, 3: CookieReply, 4: DataHeader}


def test_scapy_reads_an_initiation():
    packet = Wireguard(WHOLE[1])[WireguardInitiation]
    assert packet.sender_index == INITIATION.sender
    assert bytes(packet.unencrypted_ephemeral) == INITIATION.ephemeral
    assert bytes(packet.encrypted_static) == INITIATION.static
    assert bytes(packet.encrypted_timestamp) == INITIATION.timestamp
    assert (bytes(packet.mac1), bytes(packet.mac2)) == (MACS[:16], MACS[16:])


def test_scapy_reads_a_response():
    packet = Wireguard(WHOLE[2])[WireguardResponse]
    assert (packet.sender_index, packet.receiver_index) == (RESPONSE.sender, RESPONSE.receiver)
    assert bytes(packet.unencrypted_ephemeral) == RESPONSE.ephemeral
    assert bytes(packet.encrypted_nothing) == RESPONSE.empty
    assert (bytes(packet.mac1), bytes(packet.mac2)) == (MACS[:16], MACS[16:])


def test_scapy_reads_a_cookie_reply():
    packet = Wireguard(WHOLE[3])[WireguardCookieReply]
    assert packet.receiver_index == COOKIE_REPLY.receiver
    assert bytes(packet.nonce) == COOKIE_REPLY.nonce
    assert bytes(packet.encrypted_cookie) == COOKIE_REPLY.cookie


def test_scapy_reads_a_data_header():
    packet = Wireguard(WHOLE[4])[WireguardTransport]
    assert (packet.receiver_index, packet.counter) == (DATA.receiver, DATA.counter)
    assert bytes(packet.encrypted_encapsulated_packet) == b"t" * 16


@pytest.mark.parametrize(("kind", "length"), [(1, 148), (2, 92), (3, 64), (4, 32)])
def test_lengths_are_exact(kind, length):
    datagram = WHOLE[kind]
    assert len(datagram) == length
    assert message_type(datagram) == kind
    with pytest.raises(Refused, match="bad-length"):
        message_type(datagram[:-1])
    if kind == 4:
        assert message_type(datagram + bytes(1000)) == 4
    else:
        with pytest.raises(Refused, match="bad-length"):
            message_type(datagram + b"\0")


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize("position", [1, 2, 3])
def test_reserved_bytes_are_zero(kind, position):
    datagram = bytearray(WHOLE[kind])
    datagram[position] = 1
    with pytest.raises(Refused, match="bad-type"):
        PARSERS[kind].parse(bytes(datagram))


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_parsing_undoes_encoding(kind):
    message = PARSERS[kind].parse(WHOLE[kind])
    assert message == {1: INITIATION, 2: RESPONSE, 3: COOKIE_REPLY, 4: DATA}[kind]
    for other in {1, 2, 3, 4} - {kind}:
        with pytest.raises(Refused, match="bad-type"):
            PARSERS[other].parse(WHOLE[kind])


datagrams = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda kind, body: bytes([kind, 0, 0, 0]) + body,
        st.integers(0, 6), st.sampled_from([0, 28, 60, 88, 144]).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    ),
)


@given(datagrams)
@example(b"")
@example(bytes(65535))
@example(b"\1\0\0\0" + bytes(65531))
def test_random_bytes_are_a_message_or_refused(datagram):
    for parser in PARSERS.values():
        try:
            message = parser.parse(datagram)
        except Refused:
            continue
        assert datagram.startswith(message.encode())
