"""The words of the control protocol: what each line means, what is refused and how, and that nothing breaks it."""

from __future__ import annotations

import errno
import logging
import random
from ipaddress import ip_address, ip_network
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fake_device import FakeDevice, peer

from fasttun.endpoint import Endpoint
from fasttun.errors import EndpointError, StateError
from fasttun.wireguard.keys import PresharedKey, PrivateKey, PublicKey
from fasttun.wireguard.uapi import MAX_LINE, MAX_REQUEST, Get, ProtocolError, Requests, Set, answer

OWN = PrivateKey(bytes(range(32)))
A, B, C = (PublicKey(bytes([number]) * 32) for number in (0xA1, 0xB2, 0xC3))
SECRET = bytes(range(100, 132))
OK = b"errno=0\n\n"


def hexed(key: PublicKey | PrivateKey | PresharedKey) -> str:
    return (bytes(key) if isinstance(key, PublicKey) else key.to_bytes()).hex()


def requests(data: bytes) -> list[Get | Set | ProtocolError]:
    """All that the stream holds; ends at a fatal error."""
    found: list[Get | Set | ProtocolError] = []
    reader = Requests()
    reader.feed(data)
    while True:
        try:
            request = reader.next()
        except ProtocolError as error:
            found.append(error)
            if error.fatal:
                return found
        else:
            if request is None:
                return found
            found.append(request)


def said(device: FakeDevice, *lines: str) -> bytes:
    """The answer to one set transaction."""
    (request,) = requests("\n".join(["set=1", *lines, "", ""]).encode())
    return request.answer() if isinstance(request, ProtocolError) else answer(request, device)


def done(device: FakeDevice, *lines: str) -> None:
    assert said(device, *lines) == OK


def got(device: FakeDevice) -> list[str]:
    text = answer(Get(), device).decode()
    assert text.endswith("errno=0\n\n")
    return text.splitlines()[:-2]


def refused(device: FakeDevice, *lines: str) -> int:
    """The positive errno; nothing has been changed."""
    device.calls.clear()
    reply = said(device, *lines).decode()
    assert device.calls == []
    assert reply.startswith("errno=-")
    assert reply.endswith("\n\n")
    return int(reply[7:])


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


# ------------------------------------------------------------------------------------------------ get


def test_an_empty_device_says_nothing_but_that_it_is_well(device: FakeDevice) -> None:
    assert answer(Get(), device) == OK


def test_get_says_everything_in_wireguard_gos_order(device: FakeDevice) -> None:
    device.private_key, device.listen_port, device.fwmark = OWN, 51820, 0xCA6C
    device.by_key[A] = peer(
        A,
        preshared_key=PresharedKey(SECRET),
        endpoint=Endpoint(ip_address("2001:db8::1"), 51821),
        allowed_ips=(ip_network("10.0.0.2/32"), ip_network("fd00::/64")),
        last_handshake=1700000000.25,
        tx_bytes=11,
        rx_bytes=2**40,
        persistent_keepalive=25,
    )
    device.by_key[B] = peer(B)
    assert got(device) == [
        f"private_key={hexed(OWN)}",
        "listen_port=51820",
        "fwmark=51820",
        f"public_key={hexed(A)}",
        f"preshared_key={SECRET.hex()}",
        "protocol_version=1",
        "endpoint=[2001:db8::1]:51821",
        "last_handshake_time_sec=1700000000",
        "last_handshake_time_nsec=250000000",
        "tx_bytes=11",
        f"rx_bytes={2**40}",
        "persistent_keepalive_interval=25",
        "allowed_ip=10.0.0.2/32",
        "allowed_ip=fd00::/64",
        f"public_key={hexed(B)}",
        f"preshared_key={'00' * 32}",
        "protocol_version=1",
        "last_handshake_time_sec=0",
        "last_handshake_time_nsec=0",
        "tx_bytes=0",
        "rx_bytes=0",
        "persistent_keepalive_interval=0",
    ]


def test_what_one_device_says_another_takes(device: FakeDevice) -> None:
    device.private_key, device.listen_port = OWN, 4000
    device.by_key[A] = peer(A, preshared_key=PresharedKey(SECRET), endpoint=Endpoint(ip_address("192.0.2.1"), 9),
                            allowed_ips=(ip_network("0.0.0.0/0"), ip_network("::/0")), persistent_keepalive=7)
    taken = [line for line in got(device) if not line.startswith(("tx_", "rx_", "last_"))]
    other = FakeDevice()
    done(other, *taken)
    assert got(other) == got(device)


# ------------------------------------------------------------------------------------------------ set


def test_the_devices_own_lines(device: FakeDevice) -> None:
    done(device, f"private_key={hexed(OWN).upper()}", "listen_port=51820", "fwmark=4294967295")
    assert device.private_key is not None
    assert device.private_key.public == OWN.public
    assert (device.listen_port, device.fwmark) == (51820, 0xFFFFFFFF)
    done(device, f"private_key={'0' * 64}", "listen_port=0", "fwmark=0")
    assert device.private_key is None
    assert (device.listen_port, device.fwmark) == (0, 0)


def test_what_is_not_said_stays(device: FakeDevice) -> None:
    done(device, f"private_key={hexed(OWN)}", "listen_port=5")
    device.calls.clear()
    done(device)
    done(device, f"public_key={hexed(A)}", "persistent_keepalive_interval=5", f"preshared_key={SECRET.hex()}",
         "endpoint=192.0.2.1:1", "allowed_ip=10.0.0.0/8")
    before = device.by_key[A]
    done(device, f"public_key={hexed(A)}")
    assert device.by_key[A] == before
    assert device.calls == ["add_peer", "update_peer"]


def test_a_peer_with_all_its_lines(device: FakeDevice) -> None:
    done(device, f"public_key={hexed(A)}", f"preshared_key={SECRET.hex()}", "endpoint=[fe80::1%1]:65535",
         "persistent_keepalive_interval=65535", "protocol_version=1", "allowed_ip=10.1.2.3/8", "allowed_ip=fd00::1/64")
    entry = device.by_key[A]
    assert entry.preshared_key == PresharedKey(SECRET)
    assert entry.endpoint == Endpoint(ip_address("fe80::1"), 65535, 1)
    assert entry.persistent_keepalive == 65535
    assert entry.allowed_ips == (ip_network("10.0.0.0/8"), ip_network("fd00::/64"))


def test_changes_to_a_peer_that_is_there(device: FakeDevice) -> None:
    done(device, f"public_key={hexed(A)}", f"preshared_key={SECRET.hex()}", "persistent_keepalive_interval=9")
    done(device, f"public_key={hexed(A)}", f"preshared_key={'00' * 32}", "endpoint=192.0.2.7:1",
         "persistent_keepalive_interval=0")
    entry = device.by_key[A]
    assert (entry.preshared_key, entry.persistent_keepalive) == (None, 0)
    assert entry.endpoint == Endpoint(ip_address("192.0.2.7"), 1)


def test_many_peers_each_with_its_own_lines(device: FakeDevice) -> None:
    done(device, f"public_key={hexed(A)}", "allowed_ip=10.0.0.1/32", f"public_key={hexed(B)}",
         "allowed_ip=10.0.0.2/32", "persistent_keepalive_interval=3",
         f"public_key={hexed(A)}", "allowed_ip=10.0.0.3/32")
    assert device.by_key[A].allowed_ips == (ip_network("10.0.0.1"), ip_network("10.0.0.3"))
    assert device.by_key[A].persistent_keepalive == 0
    assert device.by_key[B].allowed_ips == (ip_network("10.0.0.2"),)


def test_allowed_ips_are_added_replaced_moved_and_taken_away(device: FakeDevice) -> None:
    def of(key: PublicKey) -> set[str]:
        return {str(network) for network in device.by_key[key].allowed_ips}

    done(device, f"public_key={hexed(A)}", "allowed_ip=10.0.0.0/8", "allowed_ip=fd00::/8", f"public_key={hexed(B)}")
    done(device, f"public_key={hexed(A)}", "allowed_ip=10.1.0.0/16")
    assert of(A) == {"10.0.0.0/8", "10.1.0.0/16", "fd00::/8"}
    done(device, f"public_key={hexed(B)}", "allowed_ip=10.1.0.0/16")
    assert (of(A), of(B)) == ({"10.0.0.0/8", "fd00::/8"}, {"10.1.0.0/16"})
    done(device, f"public_key={hexed(A)}", "allowed_ip=-10.0.0.1/8", "allowed_ip=-10.1.0.0/16", "allowed_ip=-::/0")
    assert (of(A), of(B)) == ({"fd00::/8"}, {"10.1.0.0/16"}), "only its own"
    done(device, f"public_key={hexed(A)}", "allowed_ip=192.0.2.0/24", "replace_allowed_ips=true", "allowed_ip=::/0")
    assert of(A) == {"::/0"}, "replaces what was said before it, too"
    done(device, f"public_key={hexed(A)}", "replace_allowed_ips=true")
    assert of(A) == set()
    done(device, f"public_key={hexed(A)}", "allowed_ip=-10.0.0.0/8", "allowed_ip=10.0.0.0/8")
    done(device, f"public_key={hexed(B)}", "allowed_ip=10.2.0.0/16", "allowed_ip=-10.2.0.0/16")
    assert (of(A), of(B)) == ({"10.0.0.0/8"}, {"10.1.0.0/16"}), "the last word counts"


def test_remove_update_only_and_replace_peers(device: FakeDevice) -> None:
    done(device, f"public_key={hexed(A)}", "update_only=true", "allowed_ip=10.0.0.0/8")
    assert device.by_key == {}
    done(device, f"public_key={hexed(A)}", "remove=true")
    done(device, f"public_key={hexed(A)}", f"public_key={hexed(B)}")
    done(device, f"public_key={hexed(A)}", "persistent_keepalive_interval=5", "update_only=true")
    assert device.by_key[A].persistent_keepalive == 5
    done(device, f"public_key={hexed(A)}", "remove=true", "allowed_ip=10.0.0.0/8")
    assert set(device.by_key) == {B}
    done(device, f"public_key={hexed(B)}", "remove=true", f"public_key={hexed(B)}", "allowed_ip=10.0.0.0/8")
    assert device.by_key[B].allowed_ips == (ip_network("10.0.0.0/8"),), "removed and made anew"
    done(device, "replace_peers=true", f"public_key={hexed(C)}")
    assert set(device.by_key) == {C}


def test_the_devices_own_key_as_a_peer_is_passed_over(device: FakeDevice) -> None:
    done(device, f"private_key={hexed(OWN)}", f"public_key={hexed(OWN.public)}", "allowed_ip=10.0.0.0/8",
         f"public_key={hexed(A)}")
    assert set(device.by_key) == {A}


# -------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "line",
    [
        "private_key=", f"private_key={'0' * 63}", f"private_key={'0' * 65}", f"private_key={'g' * 64}",
        "listen_port=", "listen_port=65536", "listen_port=-1", "listen_port=+1", "listen_port= 1", "listen_port=1_0",
        "listen_port=٣", "fwmark=4294967296", "fwmark=0x10", "fwmark=off", "replace_peers=false", "replace_peers=",
        "replace_peers=1", "errno=0", "get=1", "set=1", "remove=true", "allowed_ip=10.0.0.0/8", "PRIVATE_KEY=00",
        "read=x", "__init__=x", "_to=x",
    ],
)  # fmt: skip
def test_bad_lines_about_the_device(device: FakeDevice, line: str) -> None:
    assert refused(device, "fwmark=1", line) == errno.EINVAL


@pytest.mark.parametrize(
    "line",
    [
        "public_key=", f"public_key={'z' * 64}", f"public_key={'a' * 62}", f"preshared_key={'0' * 66}",
        "remove=false", "update_only=TRUE", "replace_allowed_ips=1", "protocol_version=2", "protocol_version=",
        "persistent_keepalive_interval=65536", "persistent_keepalive_interval=off", "listen_port=1", "private_key=",
        "endpoint=", "endpoint=192.0.2.1", "endpoint=192.0.2.1:", "endpoint=192.0.2.1:0", "endpoint=192.0.2.1:65536",
        "endpoint=example.org:1", "endpoint=localhost:1", "endpoint=[192.0.2.1]:1", "endpoint=2001:db8::1:1",
        "endpoint=[::1]", "endpoint=[::1%nosuchdevice]:1", "endpoint=[::1]:1 ", "endpoint=192.0.2.01:5",
        "endpoint=[::1%]:1", "endpoint=:5", f"endpoint=[::1%{'9' * 30}]:1", "endpoint=1:5",
        "allowed_ip=", "allowed_ip=-", "allowed_ip=10.0.0.0", "allowed_ip=10.0.0.0/33", "allowed_ip=::/129",
        "allowed_ip=10.0.0.0/255.0.0.0", "allowed_ip=10.0.0/8", "allowed_ip=fe80::%1/64", "allowed_ip=--10.0.0.0/8",
        "allowed_ip=10.0.0.0/-1", "allowed_ip=10.0.0.0/8/8", "allowed_ip=/8", "allowed_ip=5/8",
        "allowed_ip=::ffff:0:0/96", "allowed_ip=::ffff:10.0.0.1/128", "rx_bytes=0", "last_handshake_time_sec=1",
    ],
)  # fmt: skip
def test_bad_lines_about_a_peer(device: FakeDevice, line: str) -> None:
    assert refused(device, "fwmark=1", f"public_key={hexed(A)}", line) == errno.EINVAL


@pytest.mark.parametrize("line", ["fwmark", "\0", f"fwmark={'0' * MAX_LINE}"])
def test_what_is_no_line(device: FakeDevice, line: str) -> None:
    assert refused(device, "fwmark=1", line) == errno.EPROTO


def test_a_refusal_leaves_the_next_request_alone(device: FakeDevice) -> None:
    first, second, third = requests(b"get=1\nx=y\n\nset=1\nfwmark=x\nfwmark=5\n\nset=1\nfwmark=7\n\n")
    assert isinstance(first, ProtocolError)
    assert isinstance(second, ProtocolError)
    assert (first.answer(), second.answer()) == (b"errno=-22\n\n", b"errno=-22\n\n")
    assert isinstance(third, Set)
    assert third.fwmark == 7


@pytest.mark.parametrize(
    "junk", [b"\n", b"\n\n", b"get=2\n\n", b"hello\n", b"set=1\r\n\r\n", b" get=1\n\n", b"x" * (MAX_LINE + 1)]
)
def test_what_is_no_request_ends_the_conversation(junk: bytes) -> None:
    (error,) = requests(junk)
    assert isinstance(error, ProtocolError)
    assert error.fatal
    assert error.answer() == b"errno=-71\n\n"


def test_a_transaction_has_a_largest_size() -> None:
    reader = Requests()
    piece = b"fwmark=1\n" * 5000
    reader.feed(b"set=1\n")
    fed = 0
    while fed + len(piece) + 6 <= MAX_REQUEST:
        reader.feed(piece)
        assert reader.next() is None
        fed += len(piece)
    reader.feed(piece)
    with pytest.raises(ProtocolError) as caught:
        reader.next()
    assert caught.value.fatal


def test_bytes_may_come_in_any_pieces() -> None:
    stream = f"get=1\n\nset=1\npublic_key={hexed(A)}\nallowed_ip=10.0.0.0/8\n\nset=1\n\n".encode()
    whole = requests(stream)
    assert [type(request) for request in whole] == [Get, Set, Set]
    for seed in range(20):
        cuts = sorted({0, len(stream), *random.Random(seed).choices(range(len(stream)), k=9)})
        reader, found = Requests(), []
        for start, end in pairwise(cuts):
            reader.feed(stream[start:end])
            while (request := reader.next()) is not None:
                found.append(request)
        assert found == whole
        assert not reader


# -------------------------------------------------------------------------------- errors of the device


@pytest.mark.parametrize(
    ("call", "error", "code"),
    [
        ("set_listen_port", EndpointError("bind", "*:1", errno.EADDRINUSE), errno.EADDRINUSE),
        ("set_fwmark", EndpointError("mark", "the socket", errno.EPERM), errno.EPERM),
        ("set_private_key", StateError("the tunnel does not run"), 55),
        ("set_private_key", ZeroDivisionError(), 55),
    ],
)
def test_what_the_device_refuses_is_answered_by_its_errno(
    device: FakeDevice, call: str, error: Exception, code: int
) -> None:
    device.fails[call] = error
    value = OWN.to_bytes().hex() if call == "set_private_key" else "7"
    assert said(device, f"{call[4:]}={value}", f"public_key={hexed(A)}") == b"errno=-%d\n\n" % code
    assert device.by_key == {}


def test_a_port_in_use_changes_nothing_else(device: FakeDevice) -> None:
    """`wg` names the key first, but the port is what can fail."""
    device.fails["set_listen_port"] = EndpointError("bind", "*:1", errno.EADDRINUSE)
    assert said(device, f"private_key={hexed(OWN)}", "listen_port=9", "replace_peers=true") == b"errno=-98\n\n"
    assert device.private_key is None
    assert device.calls == ["set_listen_port"]


def test_a_device_that_fails_while_it_is_asked(device: FakeDevice) -> None:
    class Broken(FakeDevice):
        @property
        def peers(self) -> tuple[()]:
            raise RuntimeError("secret detail")

    assert answer(Get(), Broken()) == b"errno=-55\n\n"


def test_no_secret_reaches_the_log_or_a_message(device: FakeDevice, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for line in (f"private_key={'5e' * 31}5", f"preshared_key={'5e' * 33}", f"{'5e' * 32}=x", f"x{'5e' * 40}"):
        reply = requests(f"set=1\npublic_key={hexed(A)}\n{line}\n\n".encode())
        assert isinstance(reply[0], ProtocolError)
        assert "5e" * 21 not in str(reply[0])
    device.fails["set_private_key"] = ValueError("5e" * 32)
    assert said(device, f"private_key={'5e' * 32}") == b"errno=-55\n\n"
    assert "5e5e" not in caplog.text
    assert "5e5e" not in repr(requests(f"set=1\nprivate_key={'5e' * 32}\n\n".encode()))


# ----------------------------------------------------------------------------------------------- fuzz

WORDS = [
    b"get=1\n", b"set=1\n", b"\n", b"\n\n", b"=", b"true", b"-", b"private_key=", b"public_key=", b"preshared_key=",
    b"listen_port=", b"fwmark=", b"replace_peers=true\n", b"remove=true\n", b"update_only=true\n", b"endpoint=",
    b"persistent_keepalive_interval=", b"replace_allowed_ips=true\n", b"allowed_ip=", b"protocol_version=1\n",
    b"ab" * 32, b"00" * 32, b"10.0.0.0/8", b"::/0", b"[::1]:80", b"192.0.2.1:5", b"65535", b"4294967296", b"errno=0",
    OWN.public.__bytes__().hex().encode(), b"[fe80::1%lo]:1", b"\xff\xfe", b"\0",
]  # fmt: skip


def survives(stream: bytes) -> None:
    """Only ProtocolErrors, whole answers, and a device that still answers."""
    device = FakeDevice()
    for request in requests(stream):
        reply = request.answer() if isinstance(request, ProtocolError) else answer(request, device)
        assert reply.endswith(b"\n\n")
        assert reply.count(b"errno=") == 1
        assert b"errno=-55" not in reply, "something was raised that has no errno"
    assert answer(Get(), device).endswith(OK)


@given(st.lists(st.sampled_from(WORDS) | st.binary(max_size=20), max_size=40).map(b"".join))
@example(b"set=1\nendpoint=")
@settings(max_examples=600, deadline=None)
def test_any_words_in_any_order(stream: bytes) -> None:
    survives(b"set=1\n" + stream + b"\n\n")
    survives(stream)


def test_mutations_of_a_good_conversation() -> None:
    good = (
        f"set=1\nprivate_key={hexed(OWN)}\nlisten_port=51820\nfwmark=51820\nreplace_peers=true\npublic_key={hexed(A)}\n"
        f"preshared_key={SECRET.hex()}\nendpoint=[2001:db8::1]:51820\npersistent_keepalive_interval=25\n"
        "replace_allowed_ips=true\nallowed_ip=10.0.0.0/8\nallowed_ip=-fd00::/8\nprotocol_version=1\n"
        f"public_key={hexed(B)}\nupdate_only=true\nremove=true\n\nget=1\n\n"
    ).encode()
    chance = random.Random(20260101)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(len(data))
            kind = chance.randrange(4)
            if kind == 0:
                data[at] = chance.randrange(256)
            elif kind == 1:
                del data[at : at + chance.randrange(1, 12)]
            elif kind == 2:
                data[at:at] = chance.choice(WORDS)
            else:
                data[at:at] = data[chance.randrange(len(data)) :][: chance.randrange(1, 60)]
        survives(bytes(data))
