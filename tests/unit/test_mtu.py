"""MTU arithmetic at its corners, and the route's MTU as this machine's loopback gives it."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

import pytest
from support.netns import Lab

from fasttun.errors import EndpointError
from fasttun.mtu import address_mtu, inner_mtu, overhead, path_mtu


@pytest.mark.parametrize(
    ("outer_version", "framing", "inner"), [(4, "raw", 1472), (4, "pi", 1468), (6, "raw", 1452), (6, "pi", 1448)]
)
def test_ethernet(outer_version: int, framing: str, inner: int) -> None:
    assert inner_mtu(1500, outer_version, framing) == inner
    assert overhead(outer_version, framing) == 1500 - inner


@pytest.mark.parametrize(
    ("outer_version", "framing", "inner"), [(4, "raw", 65507), (4, "pi", 65503), (6, "raw", 65527), (6, "pi", 65523)]
)
def test_no_datagram_is_longer_than_its_length_fields(outer_version: int, framing: str, inner: int) -> None:
    assert inner_mtu(1 << 20, outer_version, framing) == inner


@pytest.mark.parametrize(("outer_version", "framing"), [(5, "raw"), (0, "raw"), (4, "auto"), (6, "")])
def test_nonsense_is_refused(outer_version: int, framing: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        overhead(outer_version, framing)
    with pytest.raises(ValueError, match="must be"):
        inner_mtu(1500, outer_version, framing)


def test_a_path_too_small() -> None:
    assert inner_mtu(29, 4, "raw") == 1
    with pytest.raises(ValueError, match="28 bytes"):
        inner_mtu(28, 4, "raw")


def test_loopback() -> None:
    with open("/sys/class/net/lo/mtu") as file:
        loopback = int(file.read())
    assert path_mtu(ip_address("127.0.0.1")) == min(loopback, 65535)  # IPv4 has no longer packets
    assert path_mtu(ip_address("::ffff:127.0.0.1")) == min(loopback, 65535)
    assert address_mtu(ip_address("127.0.0.1")) == loopback


def test_no_such_address_here() -> None:
    with pytest.raises(EndpointError, match=r"198\.51\.100\.7") as caught:
        address_mtu(ip_address("198.51.100.7"))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def datagrams_sent() -> list[int]:
    """UDP datagrams that this thread's network namespace has sent, by family."""
    with open("/proc/thread-self/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith("Udp:"))
    with open("/proc/thread-self/net/snmp6") as file:
        six = dict(line.split() for line in file)
    return [int(values[names.index("OutDatagrams")]), int(six["Udp6OutDatagrams"])]


@pytest.mark.netns
def test_the_routes_mtu_counts(lab: Lab) -> None:
    near, _, cable = lab.pair(mtu=1400)
    near.ip("route", "add", "198.51.100.0/24", "via", cable.b.v4, "mtu", "1300")
    near.ip("route", "add", "2001:db8::/32", "via", cable.b.v6, "mtu", "1290")
    with near.enter():
        sent = datagrams_sent()
        assert path_mtu(ip_address(cable.b.v4)) == 1400
        assert path_mtu(ip_address(cable.b.v6)) == 1400
        assert path_mtu(ip_address("198.51.100.7")) == 1300
        assert path_mtu(ip_address("2001:db8::7")) == 1290
        assert address_mtu(ip_address(cable.a.v4)) == address_mtu(ip_address(cable.a.v6)) == 1400
        link_local = next(
            entry["local"]
            for entry in near.ip_json("address", "show", cable.a.device)[0]["addr_info"]
            if entry["scope"] == "link"
        )
        assert address_mtu(ip_address(f"{link_local}%{cable.a.device}")) == 1400
        assert path_mtu(ip_address("fe80::1"), socket.if_nametoindex(cable.a.device)) == 1400
        assert path_mtu(ip_address(f"fe80::1%{cable.a.device}")) == 1400
        assert datagrams_sent() == sent


@pytest.mark.netns
def test_what_path_mtu_discovery_learnt_counts(lab: Lab) -> None:
    client, _, _, _, far = lab.routed(mtu=1280)
    with client.enter():
        assert path_mtu(ip_address(far.b.v4)) == 1500
        client.run(["ping", "-c1", "-W1", "-M", "do", "-s", "1400", far.b.v4], check=False)
        assert path_mtu(ip_address(far.b.v4)) == 1280


@pytest.mark.netns
@pytest.mark.parametrize("host", ["198.51.100.7", "2001:db8::7"])
def test_no_route(lab: Lab, host: str) -> None:
    with lab.namespace().enter(), pytest.raises(EndpointError, match="ip route get") as caught:
        path_mtu(ip_address(host))
    assert caught.value.errno == errno.ENETUNREACH
    assert host in str(caught.value)
