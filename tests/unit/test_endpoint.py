"""Endpoints as text and socket addresses, names, and the sockets that a tunnel opens."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from support.netns import Lab

from fasttun import endpoint as endpoint_module
from fasttun.endpoint import SOCKET_BUFFER, Endpoint, open_udp, resolve
from fasttun.errors import EndpointError

LO = socket.if_nametoindex("lo")

# ------------------------------------------------------------------------------------------------ Endpoint


@pytest.mark.parametrize(
    ("host", "scope_id", "text"),
    [
        ("198.51.100.7", 0, "198.51.100.7:1234"),
        ("2001:db8::1", 0, "[2001:db8::1]:1234"),
        ("fe80::1", LO, "[fe80::1%lo]:1234"),
        ("fe80::1", 999999, "[fe80::1%999999]:1234"),
    ],
)
def test_text(host: str, scope_id: int, text: str) -> None:
    assert str(Endpoint(ip_address(host), 1234, scope_id)) == text


@pytest.mark.parametrize(
    ("host", "scope_id", "family", "expected"),
    [
        ("198.51.100.7", 0, socket.AF_INET, ("198.51.100.7", 9)),
        ("198.51.100.7", 0, socket.AF_INET6, ("::ffff:198.51.100.7", 9, 0, 0)),
        ("2001:db8::1", 0, socket.AF_INET6, ("2001:db8::1", 9, 0, 0)),
        ("fe80::1", 3, socket.AF_INET6, ("fe80::1", 9, 0, 3)),
    ],
)
def test_sockaddr_and_back(host: str, scope_id: int, family: int, expected: tuple[Any, ...]) -> None:
    endpoint = Endpoint(ip_address(host), 9, scope_id)
    assert endpoint.sockaddr(family) == expected
    assert Endpoint.from_sockaddr(expected) == endpoint


def test_a_scope_in_the_text_of_an_address_is_taken_as_its_number() -> None:
    assert Endpoint.from_sockaddr(("fe80::1%lo", 9, 0, LO)) == Endpoint(ip_address("fe80::1"), 9, LO)


def test_ipv6_does_not_go_through_an_ipv4_socket() -> None:
    with pytest.raises(EndpointError, match=r"\[2001:db8::1\]:9") as caught:
        Endpoint(ip_address("2001:db8::1"), 9).sockaddr(socket.AF_INET)
    assert caught.value.errno == errno.EAFNOSUPPORT


# ------------------------------------------------------------------------------------------------ resolve

GetAddrInfo = Callable[..., list[tuple[Any, ...]]]


def answer(*hosts: str) -> GetAddrInfo:
    def getaddrinfo(_host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET6, 2, 17, "", (host, port, 0, 0))
            if ":" in host
            else (socket.AF_INET, 2, 17, "", (host, port))
            for host in hosts
        ]

    return getaddrinfo


@pytest.mark.parametrize(
    ("found", "order"),
    [
        (["2001:db8::1", "2001:db8::2", "192.0.2.1"], ["2001:db8::1", "192.0.2.1", "2001:db8::2"]),
        (["192.0.2.1", "192.0.2.2", "2001:db8::1"], ["192.0.2.1", "2001:db8::1", "192.0.2.2"]),
        (["192.0.2.1", "192.0.2.1", "192.0.2.2"], ["192.0.2.1", "192.0.2.2"]),
        (
            ["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"],
            ["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"],
        ),
    ],
)
def test_families_take_turns(monkeypatch: pytest.MonkeyPatch, found: list[str], order: list[str]) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", answer(*found))
    assert resolve("vpn.example.org", 77) == [Endpoint(ip_address(host), 77) for host in order]


@pytest.mark.parametrize(
    ("literal", "endpoint"),
    [
        ("192.0.2.1", Endpoint(ip_address("192.0.2.1"), 5)),
        ("2001:db8::1", Endpoint(ip_address("2001:db8::1"), 5)),
        ("fe80::1%lo", Endpoint(ip_address("fe80::1"), 5, LO)),
        ("fe80::1%7", Endpoint(ip_address("fe80::1"), 5, 7)),
    ],
)
def test_literals_need_no_resolver(monkeypatch: pytest.MonkeyPatch, literal: str, endpoint: Endpoint) -> None:
    def no_resolver(*_: Any, **__: Any) -> Any:
        raise AssertionError("the resolver was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_resolver)
    assert resolve(literal, 5) == [endpoint]


def test_a_scope_that_does_not_exist() -> None:
    with pytest.raises(EndpointError, match="no interface nosuch0") as caught:
        resolve("fe80::1%nosuch0", 5)
    assert caught.value.errno == errno.ENODEV


def test_localhost() -> None:
    assert {endpoint.host for endpoint in resolve("localhost", 5)} <= {ip_address("127.0.0.1"), ip_address("::1")}


@pytest.mark.parametrize(
    ("code", "text", "hint"),
    [
        (socket.EAI_NONAME, "Name or service not known", "spelling"),
        (socket.EAI_AGAIN, "Temporary failure in name resolution", "try again"),
    ],
)
def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch, code: int, text: str, hint: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(code, text)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(EndpointError) as caught:
        resolve("vpn.example.org", 5)
    assert caught.value.errno == code
    for part in ("vpn.example.org", text, hint):
        assert part in str(caught.value)


@pytest.mark.parametrize("host", ["", "a" * 64 + ".example", "nul\0.example", "two..dots"])
def test_what_is_no_name_at_all(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    real = socket.getaddrinfo

    def only_local(name: Any, *arguments: Any, **options: Any) -> Any:
        name.encode("idna")  # as the real one does first; then no query leaves this machine
        if not name:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(name, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_local)
    with pytest.raises(EndpointError, match="IP address"):
        resolve(host, 5)


# ------------------------------------------------------------------------------------------------ open_udp


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


def test_one_socket_for_both_families(peer: socket.socket) -> None:
    with open_udp(bind=None, port=0, family=socket.AF_INET6) as sock:
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert sock.family == socket.AF_INET6
        port = sock.getsockname()[1]
        sock.sendto(b"out", Endpoint(ip_address("127.0.0.1"), peer.getsockname()[1]).sockaddr(sock.family))
        data, source = peer.recvfrom(10)
        assert (data, source) == (b"out", ("127.0.0.1", port))
        peer.sendto(b"back", source)
        data, source = sock.recvfrom(10)
        assert Endpoint.from_sockaddr(source) == Endpoint(ip_address("127.0.0.1"), peer.getsockname()[1])
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six:
            six.sendto(b"six", ("::1", port))
            assert sock.recv(10) == b"six"


def test_without_ipv6_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def old_kernel(family: int = -1, *arguments: Any, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *arguments, **options)

    monkeypatch.setattr(socket, "socket", old_kernel)
    with open_udp(bind=None, port=0, family=socket.AF_INET6) as sock:
        assert sock.family == socket.AF_INET
        assert sock.getsockname()[0] == "0.0.0.0"
    with pytest.raises(EndpointError, match="no IPv6") as caught:
        open_udp(bind="::1", port=0, family=socket.AF_INET6)
    assert caught.value.errno == errno.EAFNOSUPPORT


@pytest.mark.parametrize(
    ("bind", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6), ("0.0.0.0", socket.AF_INET)]
)
def test_bind(bind: str, family: int) -> None:
    with open_udp(bind=bind, port=0, family=family) as sock:
        assert sock.family == family
        assert sock.getsockname()[0] == bind
        assert sock.getsockname()[1] != 0


def test_bind_and_family_must_agree() -> None:
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1.*family") as caught:
        open_udp(bind="127.0.0.1", port=0, family=socket.AF_INET6)
    assert caught.value.errno == errno.EAFNOSUPPORT


def test_bind_takes_no_names() -> None:
    with pytest.raises(EndpointError, match="localhost"):
        open_udp(bind="localhost", port=0, family=socket.AF_INET)


def test_a_port_in_use() -> None:
    with open_udp(bind="127.0.0.1", port=0, family=socket.AF_INET) as first:
        port = first.getsockname()[1]
        with pytest.raises(EndpointError) as caught:
            open_udp(bind="127.0.0.1", port=port, family=socket.AF_INET)
    assert caught.value.errno == errno.EADDRINUSE
    assert caught.value.subject == f"127.0.0.1:{port}"
    assert f"--port {port + 1 if port < 65535 else port - 1}" in caught.value.hint


def test_a_port_in_use_by_ipv4_alone_is_seen_by_the_socket_for_both(peer: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 0))
        with pytest.raises(EndpointError) as caught:
            open_udp(bind=None, port=other.getsockname()[1], family=socket.AF_INET6)
    assert caught.value.errno == errno.EADDRINUSE


def test_an_address_of_someone_else() -> None:
    with pytest.raises(EndpointError, match="ip address") as caught:
        open_udp(bind="198.51.100.7", port=0, family=socket.AF_INET)
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_several_sockets_share_a_port() -> None:
    with open_udp(bind="127.0.0.1", port=0, family=socket.AF_INET, reuse_port=True) as first:
        port = first.getsockname()[1]
        with open_udp(bind="127.0.0.1", port=port, family=socket.AF_INET, reuse_port=True) as second:
            assert second.getsockname() == first.getsockname()


@pytest.mark.parametrize(
    ("bind", "family"), [(None, socket.AF_INET6), ("::1", socket.AF_INET6), (None, socket.AF_INET)]
)
def test_path_mtu_discovery_wants_but_does_not_insist(bind: str | None, family: int) -> None:
    with open_udp(bind=bind, port=0, family=family) as sock:
        assert sock.getsockopt(socket.IPPROTO_IP, 10) == 1  # IP_MTU_DISCOVER, IP_PMTUDISC_WANT
        if family == socket.AF_INET6:
            assert sock.getsockopt(socket.IPPROTO_IPV6, 23) == 1


class Unprivileged(socket.socket):
    """A socket of a process without CAP_NET_ADMIN."""

    def setsockopt(self, level: int, option: int, *value: Any) -> None:  # type: ignore[override]
        if level == socket.SOL_SOCKET and option in (32, 33):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        super().setsockopt(level, option, *value)


def buffers(sock: socket.socket) -> tuple[int, int]:
    return tuple(sock.getsockopt(socket.SOL_SOCKET, option) // 2 for option in (socket.SO_RCVBUF, socket.SO_SNDBUF))  # type: ignore[return-value]


def limits() -> tuple[int, int]:
    found = []
    for name in ("rmem_max", "wmem_max"):
        with open(f"/proc/sys/net/core/{name}") as file:
            found.append(min(int(file.read()), SOCKET_BUFFER))
    return (found[0], found[1])


def test_buffers_without_privilege_are_as_large_as_allowed_and_that_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoint_module, "_told_capped", False)
    monkeypatch.setattr(socket, "socket", Unprivileged)
    with caplog.at_level(logging.INFO, "fasttun"):
        for _ in range(2):
            with open_udp(bind="127.0.0.1", port=0, family=socket.AF_INET) as sock:
                assert buffers(sock) == limits()
    told = [record for record in caplog.records if "net.core.rmem_max=7340032" in record.getMessage()]
    assert len(told) == (min(limits()) < SOCKET_BUFFER)
    assert all(record.levelno == logging.INFO for record in told)


@pytest.mark.netns
def test_buffers_with_privilege_ignore_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "fasttun"),
        open_udp(bind="127.0.0.1", port=0, family=socket.AF_INET) as sock,
    ):
        assert buffers(sock) == (SOCKET_BUFFER, SOCKET_BUFFER)
    assert not caplog.records


@pytest.mark.netns
def test_bind_to_a_link_local_address(lab: Lab) -> None:
    near, far, cable = lab.pair()

    def link_local(end: Any) -> str:
        return next(
            str(entry["local"])
            for entry in end.ns.ip_json("address", "show", end.device)[0]["addr_info"]
            if entry["scope"] == "link"
        )

    with near.enter():
        mine = open_udp(bind=f"{link_local(cable.a)}%{cable.a.device}", port=0, family=socket.AF_INET6)
        (server,) = resolve(f"{link_local(cable.b)}%{cable.a.device}", 1234)
        with pytest.raises(EndpointError, match="needs its interface"):
            open_udp(bind=link_local(cable.a), port=0, family=socket.AF_INET6)
    with far.enter():
        theirs = open_udp(bind=None, port=1234, family=socket.AF_INET6)
    with mine, theirs:
        theirs.settimeout(5)
        mine.sendto(b"hello", server.sockaddr(mine.family))
        data, source = theirs.recvfrom(10)
        assert data == b"hello"
        assert str(Endpoint.from_sockaddr(source).host) == link_local(cable.a)
        assert Endpoint.from_sockaddr(source).scope_id != 0
