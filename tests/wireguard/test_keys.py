"""Keys as values: encodings, clamping, secrecy, and points of low order."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttun.errors import ConfigurationError
from fasttun.wireguard.keys import PresharedKey, PrivateKey, PublicKey, wipe
from fasttun.wireguard.refusal import Refused

# Points whose multiples are all zero (https://cr.yp.to/ecdh.html#validate)
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    ((1 << 255) - 20).to_bytes(32, "little"),
    ((1 << 255) - 19).to_bytes(32, "little"),
    ((1 << 255) - 18).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]


def test_the_base_point_is_as_rfc_7748_says():
    """RFC 7748 §6.1: nine times the scalar, both ways, through another implementation's arithmetic."""
    x25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.x25519")
    ours, theirs = PrivateKey.generate(), PrivateKey.generate()
    other = x25519.X25519PrivateKey.from_private_bytes(theirs.to_bytes())
    assert other.public_key().public_bytes_raw() == bytes(theirs.public)
    point = x25519.X25519PublicKey.from_public_bytes(bytes(ours.public))
    assert ours.exchange(theirs.public) == other.exchange(point)


@pytest.mark.parametrize("kind", [PrivateKey, PresharedKey])
def test_base64_goes_round(kind):
    key = kind.generate()
    text = key.to_base64()
    assert len(text) == 44
    assert kind.from_base64(text) == key
    assert kind.from_base64(f" {text}\n") == key
    assert kind.generate() != key


def test_public_base64_goes_round_and_is_hashable():
    key = PrivateKey.generate().public
    assert PublicKey.from_base64(str(key)) == key
    assert {key: 1}[PublicKey(bytes(key))] == 1
    assert key != PrivateKey.generate().public


@given(st.binary(min_size=32, max_size=32).filter(any))
def test_any_scalar_is_clamped(data):
    scalar = PrivateKey(data).to_bytes()
    assert scalar[0] & 7 == 0
    assert scalar[31] & 0xC0 == 0x40
    assert scalar[1:31] == data[1:31]
    assert scalar[0] | 7 == data[0] | 7
    assert scalar[31] & 0x3F == data[31] & 0x3F


@pytest.mark.parametrize("kind", [PrivateKey, PresharedKey, PublicKey])
@pytest.mark.parametrize(
    "text", ["", "A" * 43 + "=", "a" * 44, "!" * 43 + "=", "A" * 42 + "==", "ä" * 44, "A" * 100, "A" * 42 + "B="]
)
def test_bad_base64_is_refused_without_repeating_it(kind, text):
    if kind is not PrivateKey and text == "A" * 43 + "=":
        assert kind.from_base64(text)._data == bytes(32)
        return
    with pytest.raises(ConfigurationError) as caught:
        kind.from_base64(text)
    assert len(text) < 40 or text not in str(caught.value)
    assert caught.value.__cause__ is None


@given(st.text(max_size=60))
def test_any_text_is_a_key_or_a_configuration_error(text):
    try:
        PresharedKey.from_base64(text)
    except ConfigurationError:
        return
    assert len(text.strip()) == 44


@pytest.mark.parametrize("kind", [PrivateKey, PresharedKey])
def test_a_secret_shows_nothing(kind):
    key = kind.generate()
    shown = f"{key} {key!r} {key!s} {[key]} {ConfigurationError('key', f'{key}')}"
    assert key.to_base64() not in shown
    assert key.to_bytes().hex() not in shown
    assert repr(key.to_bytes()) not in shown
    with pytest.raises(TypeError):
        pickle.dumps(key)
    with pytest.raises(TypeError):
        hash(key)


@pytest.mark.parametrize("kind", [PrivateKey, PresharedKey])
def test_wiping_overwrites_in_place(kind):
    key = kind.generate()
    twin, deep = copy.copy(key), copy.deepcopy(key)
    inside = key._data
    key.wipe()
    key.wipe()
    assert inside == bytes(32)
    assert any(twin.to_bytes())
    assert twin == deep
    wipe(None)


def test_keys_of_different_kinds_are_not_equal():
    data = bytes(range(32))
    assert PresharedKey(data) != PrivateKey(data)
    assert PublicKey(data) != PresharedKey(data)


@pytest.mark.parametrize("length", [0, 31, 33])
@pytest.mark.parametrize("kind", [PrivateKey, PresharedKey, PublicKey])
def test_another_length_is_refused(kind, length):
    with pytest.raises(ConfigurationError):
        kind(b"\1" * length)


def test_zero_keys():
    with pytest.raises(ConfigurationError):
        PrivateKey(bytes(32))
    assert not PresharedKey.none()
    assert PresharedKey.generate()


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_a_low_order_point_is_refused_where_the_secret_would_be_zero(point):
    with pytest.raises(Refused, match="low-order-key"):
        PrivateKey.generate().exchange(PublicKey(point))
