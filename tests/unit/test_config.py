"""TunnelConfig: every rule, and that each message names the field and what to do."""

from __future__ import annotations

import dataclasses
import ipaddress

import pytest

from fasttun import ConfigurationError, TunnelConfig


def client(**fields: object) -> TunnelConfig:
    return TunnelConfig(server="198.51.100.7", **fields)  # type: ignore[arg-type]


def listener(**fields: object) -> TunnelConfig:
    return TunnelConfig(listen=True, **fields)  # type: ignore[arg-type]


def refused(field: str, *words: str, **fields: object) -> None:
    """TunnelConfig(**fields) fails, and says so: the field first, then the problem, then the way out."""
    with pytest.raises(ConfigurationError) as caught:
        TunnelConfig(**fields)  # type: ignore[arg-type]
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.field == field
    assert error.problem
    assert error.hint
    text = str(error)
    assert text == f"{field}: {error.problem}; {error.hint}"
    assert "\n" not in text
    for word in words:
        assert word in text


def test_the_defaults_are_those_of_the_article():
    config = listener()
    assert (config.port, config.device, config.mtu, config.framing, config.workers) == (
        1234, "tun0", None, "auto", 1)
    assert (config.address, config.route, config.allow, config.server) == ((), (), (), None)
    assert config.tun_offload
    assert config.udp_gso
    assert config.udp_gro
    assert config.batch


def test_it_is_immutable_and_comparable():
    config = listener(address="10.7.0.1/24")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]
    assert config == listener(address=["10.7.0.1/24"])
    assert hash(config) == hash(listener(address=["10.7.0.1/24"]))


# ------------------------------------------------------------------------------------------- roles


def test_one_role_exactly():
    refused("listen", "server", listen=True, server="198.51.100.7")
    refused("listen", "neither", "server")


def test_a_descriptor_may_stand_for_the_role():
    assert TunnelConfig(udp_fd=5).server is None


@pytest.mark.parametrize("server", ["", " ", "\t"])
def test_an_empty_server(server):
    refused("server", "empty", server=server)


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("port", [0, -1, 65536, 70000])
def test_port_out_of_range(port):
    refused("port", str(port), "1 to 65535", listen=True, port=port)


@pytest.mark.parametrize("port", ["http", "", None, 1.5, b"1"])
def test_port_that_is_no_number(port):
    refused("port", "whole number", "1 to 65535", listen=True, port=port)


@pytest.mark.parametrize("port", [1, 65535, "1234"])
def test_port_within_range(port):
    assert listener(port=port).port == int(port)


@pytest.mark.parametrize("mtu", [0, -1, 575, 65536])
def test_mtu_out_of_range(mtu):
    refused("mtu", str(mtu), "576 to 65535", "auto", listen=True, mtu=mtu)


@pytest.mark.parametrize(("given", "kept"), [(None, None), ("auto", None), (576, 576), (65535, 65535),
                                              ("1400", 1400)])
def test_mtu_within_range(given, kept):
    assert listener(mtu=given).mtu == kept


def test_mtu_below_what_ipv6_needs():
    refused("mtu", "1279", "1280", "fd00::1/64", listen=True, mtu=1279, address="fd00::1/64")
    refused("mtu", "1280", "fd00:1::/64", listen=True, mtu=1279, route="fd00:1::/64")
    assert listener(mtu=1280, address="fd00::1/64").mtu == 1280
    assert listener(mtu=576, address="10.7.0.1/24").mtu == 576


@pytest.mark.parametrize(("workers", "word"), [(0, "1 to 64"), (65, "1 to 64"), ("two", "whole number")])
def test_workers(workers, word):
    refused("workers", word, listen=True, workers=workers)


@pytest.mark.parametrize("microseconds", [-1, 1001, "x"])
def test_busy_poll(microseconds):
    refused("busy_poll_us", "0 to 1000", listen=True, busy_poll_us=microseconds)


@pytest.mark.parametrize("name", ["tun_fd", "udp_fd"])
@pytest.mark.parametrize("fd", [-1, 2**31, "x", 0.5])
def test_descriptors_are_small_numbers(name, fd):
    refused(name, listen=True, **{name: fd})


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("device", ["a" * 16, "ü" * 8, "a b", "a/b", "a:b", ".", "..", "a\n", "a\0"])
def test_device_names_that_the_kernel_refuses(device):
    refused("device", "15", listen=True, device=device)


@pytest.mark.parametrize("device", ["", None, 7])
def test_device_names_that_are_none(device):
    refused("device", "empty", listen=True, device=device)


@pytest.mark.parametrize("device", ["a" * 15, "tun-0.1", "ü" * 7])
def test_device_names_that_the_kernel_takes(device):
    assert listener(device=device).device == device


@pytest.mark.parametrize("framing", ["", "RAW", "ether", None])
def test_framing(framing):
    refused("framing", "auto, raw or pi", listen=True, framing=framing)


@pytest.mark.parametrize("bind", ["", "eth0", "192.0.2.1/24", "192.0.2.256"])
def test_bind(bind):
    refused("bind", "IP address", listen=True, bind=bind)


@pytest.mark.parametrize("bind", ["192.0.2.1", "2001:db8::1", "::", "fe80::1%eth0"])
def test_bind_to_an_address(bind):
    assert listener(bind=bind).bind == bind


# --------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("field", ["address", "route", "allow"])
@pytest.mark.parametrize("value", ["", "x", "10.7.0.1/33", "10.7.0.256/24", "fd00::/129", "10.7.0.0/24,",
                                   ["10.7.0.0/24", "x"], [None]])
def test_what_is_no_cidr(field, value):
    refused(field, "CIDR", listen=True, **{field: value})


@pytest.mark.parametrize("field", ["address", "route", "allow"])
def test_one_or_many(field):
    one = getattr(listener(**{field: "10.7.0.0/24"}), field)
    assert [str(item) for item in one] == ["10.7.0.0/24"]
    many = getattr(listener(**{field: ["10.7.0.0/24", " fd00::/64 ", "10.7.0.0/24"]}), field)
    assert [str(item) for item in many] == ["10.7.0.0/24", "fd00::/64"]
    assert getattr(listener(**{field: None}), field) == ()
    assert getattr(listener(**{field: (text for text in ("10.7.0.0/24",))}), field) == one
    assert getattr(listener(**{field: {"10.7.0.0/24": 1}.keys()}), field) == one


def test_objects_are_taken_as_they_are():
    interface = ipaddress.ip_interface("10.7.0.1/24")
    network = ipaddress.ip_network("192.0.2.0/24")
    config = listener(address=interface, route=network, allow=[network])
    assert (config.address, config.route, config.allow) == ((interface,), (network,), (network,))


def test_an_address_keeps_its_host_and_a_network_loses_it():
    config = listener(address="10.7.0.1/24", route="10.8.0.1/24", allow="192.0.2.77/24")
    assert str(config.address[0]) == "10.7.0.1/24"
    assert str(config.route[0]) == "10.8.0.0/24"
    assert str(config.allow[0]) == "192.0.2.0/24"


# ------------------------------------------------------------------------------------ combinations


def test_allow_is_for_listeners():
    refused("allow", "server", server="198.51.100.7", allow="192.0.2.0/24")


@pytest.mark.parametrize("name", ["tun_fd", "udp_fd"])
def test_descriptors_serve_one_worker(name):
    refused("workers", "workers=1", listen=True, workers=2, **{name: 3})


def test_routes_need_a_device():
    refused("route", "descriptor", listen=True, tun_fd=3, route="10.8.0.0/24")


def test_a_copy_is_validated_again():
    config = client(port=1000)
    assert config.replace(port=2000).port == 2000
    with pytest.raises(ConfigurationError):
        config.replace(port=0)
