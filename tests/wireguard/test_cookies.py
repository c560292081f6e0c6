"""mac1, mac2, cookie replies; the limiter of sources and the meter of load, by a simulated clock."""

from __future__ import annotations

from hashlib import blake2s
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl import bindings

from fasttun.endpoint import Endpoint
from fasttun.wireguard.cookies import CookieChecker, CookieGenerator, source_bytes
from fasttun.wireguard.keys import PrivateKey
from fasttun.wireguard.load import MAX_BACKLOG, MAX_PER_SECOND, LoadMeter
from fasttun.wireguard.messages import CookieReply
from fasttun.wireguard.ratelimiter import BURST, RateLimiter
from fasttun.wireguard.refusal import Refused

HERE = Endpoint(ip_address("192.0.2.1"), 51820)
RESPONDER = PrivateKey.generate().public
MESSAGE = b"\1\0\0\0\x44\x33\x22\x11" + bytes(108)


@pytest.fixture
def checker():
    return CookieChecker(RESPONDER)


@pytest.fixture
def generator():
    return CookieGenerator(RESPONDER)


def test_mac1_is_as_the_paper_writes_it(checker, generator):
    datagram = generator.add_macs(MESSAGE, 0.0)
    key = blake2s(b"mac1----" + bytes(RESPONDER)).digest()
    assert checker.mac1_key == key
    assert datagram[116:132] == blake2s(MESSAGE, key=key, digest_size=16).digest()
    assert datagram[132:] == bytes(16)
    assert checker.check_mac1(datagram)
    assert not CookieChecker(PrivateKey.generate().public).check_mac1(datagram)


@given(st.integers(0, 131), st.integers(1, 255))
def test_mac1_covers_every_byte(position, change):
    datagram = bytearray(CookieGenerator(RESPONDER).add_macs(MESSAGE, 0.0))
    datagram[position] ^= change
    assert not CookieChecker(RESPONDER).check_mac1(bytes(datagram))


def give_cookie(checker, generator, now: float = 0.0, source: Endpoint = HERE) -> CookieReply:
    datagram = generator.add_macs(MESSAGE, now)
    assert not checker.check_mac2(datagram, source, now)
    reply = CookieReply.parse(checker.create_reply(datagram, source, now).encode())
    assert reply.receiver == 0x11223344
    generator.consume_reply(reply, now)
    return reply


def test_a_cookie_is_sealed_as_the_paper_writes_it(checker, generator):
    datagram = generator.add_macs(MESSAGE, 0.0)
    reply = checker.create_reply(datagram, HERE, 0.0)
    key = blake2s(b"cookie--" + bytes(RESPONDER)).digest()
    cookie = bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(reply.cookie, datagram[116:132], reply.nonce, key)
    generator.consume_reply(reply, 0.0)
    second = generator.add_macs(MESSAGE, 0.0)
    assert second[132:] == blake2s(second[:132], key=cookie, digest_size=16).digest()


def test_a_cookie_is_good_for_its_address_and_port_only(checker, generator):
    give_cookie(checker, generator)
    datagram = generator.add_macs(MESSAGE, 1.0)
    assert checker.check_mac2(datagram, HERE, 1.0)
    assert not checker.check_mac2(datagram, Endpoint(HERE.host, HERE.port + 1), 1.0)
    assert not checker.check_mac2(datagram, Endpoint(ip_address("192.0.2.2"), HERE.port), 1.0)
    assert not checker.check_mac2(datagram, Endpoint(ip_address("2001:db8::1"), HERE.port), 1.0)


def test_the_source_has_the_port_in_it():
    assert source_bytes(HERE) == bytes([192, 0, 2, 1, 0xCA, 0x6C])
    assert len(source_bytes(Endpoint(ip_address("2001:db8::1"), 1))) == 18


def test_the_secret_is_good_for_120_seconds(checker, generator):
    give_cookie(checker, generator, 1000.0)
    datagram = generator.add_macs(MESSAGE, 1001.0)
    assert checker.check_mac2(datagram, HERE, 1119.9)
    assert not checker.check_mac2(datagram, HERE, 1120.0)
    checker.create_reply(datagram, HERE, 1120.0)  # makes the next secret
    assert not checker.check_mac2(datagram, HERE, 1120.0)


def test_the_generator_stops_using_an_old_cookie(checker, generator):
    give_cookie(checker, generator, 1000.0)
    assert generator.add_macs(MESSAGE, 1114.9)[132:] != bytes(16)
    assert generator.add_macs(MESSAGE, 1115.0)[132:] == bytes(16)


def test_a_reply_is_taken_once_and_only_for_the_last_message(checker, generator):
    with pytest.raises(Refused, match="cookie-unexpected"):
        generator.consume_reply(CookieReply(1, bytes(24), bytes(32)), 0.0)
    reply = give_cookie(checker, generator)
    with pytest.raises(Refused, match="cookie-unexpected"):
        generator.consume_reply(reply, 0.0)
    generator.add_macs(MESSAGE + b"other", 0.0)
    with pytest.raises(Refused, match="cookie-not-authentic"):
        generator.consume_reply(reply, 0.0)


def test_wiping_forgets_cookies(checker, generator):
    give_cookie(checker, generator)
    datagram = generator.add_macs(MESSAGE, 1.0)
    checker.wipe()
    generator.wipe()
    assert not checker.check_mac2(datagram, HERE, 1.0)
    assert generator.add_macs(MESSAGE, 1.0)[132:] == bytes(16)


def test_the_limiter_allows_a_burst_and_then_twenty_a_second():
    limiter = RateLimiter()
    host = ip_address("192.0.2.1")
    assert [limiter.allow(host, 0.0) for _ in range(BURST + 1)] == [True] * BURST + [False]
    allowed = sum(limiter.allow(host, 0.001 * step) for step in range(1, 10_001))
    assert allowed in (199, 200, 201)
    assert limiter.allow(ip_address("192.0.2.2"), 10.0)


def test_the_limiter_counts_an_ipv6_64_as_one():
    limiter = RateLimiter()
    assert sum(limiter.allow(ip_address(f"2001:db8::{n:x}"), 0.0) for n in range(50)) == BURST
    assert limiter.allow(ip_address("2001:db8:0:1::1"), 0.0)


def test_the_limiter_is_bounded_and_forgets_idle_sources():
    limiter = RateLimiter(max_sources=100)
    hosts = [ip_address(0x0A000000 + n) for n in range(150)]
    assert sum(limiter.allow(host, 0.0) for host in hosts) == 100
    assert len(limiter) == 100
    assert limiter.allow(hosts[149], 0.3)
    assert len(limiter) == 1


@given(st.lists(st.floats(0, 0.5), max_size=60))
def test_forgetting_a_source_gives_it_no_extra_tokens(gaps):
    """Against a bucket that is never forgotten."""
    limiter, host, now, tokens = RateLimiter(), ip_address("192.0.2.1"), 0.0, float(BURST)
    for gap in gaps:
        now += gap
        tokens = min(float(BURST), tokens + gap * 20)
        if abs(tokens - 1.0) < 1e-6:
            return  # a matter of rounding
        assert limiter.allow(host, now) == (tokens >= 1.0)
        tokens -= tokens >= 1.0


def test_load_follows_rate_and_backlog():
    meter = LoadMeter()
    assert not any(meter.message(0.0005 * n, 0) for n in range(MAX_PER_SECOND))
    assert meter.message(0.9, 0)
    assert meter.message(1.5, 0)
    assert not meter.message(2.6, 0)
    assert not meter.message(10.0, MAX_BACKLOG - 1)
    assert meter.message(10.0, MAX_BACKLOG)
    assert meter.message(10.9, 0)
    assert not meter.message(11.1, 0)
