"""Forwarder over socketpairs and loopback, without root: its life cycle, its threads, what it counts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.netns import wait_until
from support.tunnels import (
    COOKIE,
    Client,
    Pipe,
    assert_balanced,
    bind_udp,
    descriptors,
    in_thread,
    ip_packet,
    pi,
    settled,
    stun_request,
    stun_success,
    threads,
)

import fasttun.forwarder
from fasttun import (
    ConfigurationError,
    DeviceError,
    EndpointError,
    Forwarder,
    PeerStats,
    StateError,
    TunnelConfig,
)
from fasttun._core import Engine, PeerTable, SessionTable

OUT = ip_packet("10.7.0.1", "10.7.0.2", b"outbound")
IN = ip_packet("10.7.0.2", "10.7.0.1", b"inbound")


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    with Pipe.make() as pipe:
        yield pipe


@pytest.fixture
def udp() -> Iterator[socket.socket]:
    with bind_udp() as sock:
        yield sock


@pytest.fixture
def listener(pipe: Pipe, udp: socket.socket) -> Forwarder:
    """Not started. Reached at `udp`'s address, its host's network at `pipe`."""
    return Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno())


@pytest.fixture
def peer(udp: socket.socket) -> Iterator[Client]:
    with Client(udp.getsockname()) as client:
        yield client


@contextlib.contextmanager
def client_of(server: socket.socket, **fields: object) -> Iterator[tuple[Forwarder, Pipe]]:
    """A running client of `server`, by its address, on a socket of its own."""
    host, port = server.getsockname()[:2]
    with Pipe.make() as pipe, Forwarder(server=host, port=port, tun_fd=pipe.fd, **fields) as tunnel:  # type: ignore[arg-type]
        yield tunnel, pipe


# --------------------------------------------------------------------------------------- life cycle


def test_two_tunnels_carry_packets_both_ways(pipe, udp, listener):
    with listener, client_of(udp) as (client, far):
        heard = client.wait_peer(5)
        assert (str(heard.endpoint.host), heard.endpoint.port) == udp.getsockname()
        far.send(IN)
        assert pipe.receive() == IN
        known = listener.wait_peer(5)
        assert [str(address) for address in known.addresses] == ["10.7.0.2"]
        assert known.endpoint.port == client.local_port
        pipe.send(OUT)
        assert far.receive() == OUT
        assert client.mtu >= 1280
    for stats in (listener.stats(), client.stats()):
        assert_balanced(stats)
        assert (stats.inbound.packets_out, stats.outbound.packets_out) == (1, 1)
        assert stats.inbound.dropped == stats.outbound.dropped == 0
    assert listener.stats().inbound.bytes_out == len(IN)
    assert listener.stats().outbound.bytes_out == len(OUT)


def test_it_starts_once(listener):
    listener.start()
    assert listener.running
    with pytest.raises(StateError, match="running"):
        listener.start()
    listener.stop()
    assert not listener.running
    with pytest.raises(StateError, match="closed"):
        listener.start()


def test_stop_may_be_called_twice_and_before_start(listener):
    listener.stop()
    listener.stop()
    assert listener.wait(0)
    with pytest.raises(StateError):
        listener.start()


def test_what_needs_a_started_tunnel_says_so(listener):
    with pytest.raises(StateError, match="not started"):
        listener.wait(0)
    with pytest.raises(StateError, match="not started"):
        asyncio.run(listener.wait_closed())
    with pytest.raises(StateError):
        listener.wait_peer(0.1)
    assert listener.peers == ()
    assert listener.local_port == 0
    assert listener.stats().inbound.packets_in == 0


def test_wait_says_whether_it_has_ended(listener):
    with listener:
        before = time.monotonic()
        assert listener.wait(0.1) is False
        assert time.monotonic() - before >= 0.1
    assert listener.wait() is True


def test_the_context_manager_stops_on_an_error_too(listener):
    with pytest.raises(ZeroDivisionError), listener:
        raise ZeroDivisionError
    assert not listener.running
    assert threads() == []


def test_close_from_another_thread_ends_a_blocked_run_at_once(listener):
    with in_thread(listener) as ended:
        wait_until(lambda: listener.running)
        time.sleep(0.05)
        before = time.monotonic()
        listener.close()
        wait_until(lambda: ended, 1)
        assert time.monotonic() - before < 0.3
    assert ended == [None]


def test_many_threads_may_stop_it_at_once(listener):
    listener.start()
    stoppers = [threading.Thread(target=listener.stop) for _ in range(8)]
    for thread in stoppers:
        thread.start()
    for thread in stoppers:
        thread.join(5)
    assert listener.wait(5)
    wait_until(lambda: threads() == [])


def test_on_peer_may_stop_it(pipe, udp, peer):
    tunnel = Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), on_peer=lambda _: tunnel.stop())
    with in_thread(tunnel) as ended:
        wait_until(lambda: tunnel.running)
        peer.send(IN)
        wait_until(lambda: ended, 5)
    assert ended == [None]
    wait_until(lambda: threads() == [])


def test_a_stop_that_comes_during_start_is_obeyed(pipe, udp):
    """The other thread's stop() returns; start() takes down what it has just set up."""

    def stop_elsewhere() -> None:
        thread = threading.Thread(target=tunnel.stop)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()

    before = descriptors()
    tunnel = Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), before_threads=stop_elsewhere)
    tunnel.run()
    assert not tunnel.running
    assert threads() == []
    assert descriptors() == before


def test_a_failure_in_start_undoes_all(pipe, udp):
    def fail() -> None:
        raise PermissionError("no")

    before = descriptors()
    tunnel = Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), before_threads=fail)
    with pytest.raises(PermissionError):
        tunnel.start()
    assert threads() == []
    assert descriptors() == before
    assert os.get_blocking(pipe.fd)
    with pytest.raises(StateError, match="did not start: PermissionError"):
        tunnel.wait(0)
    tunnel.stop()


@pytest.mark.parametrize("failure", [DeviceError("open", "tun0", errno.EPERM), KeyboardInterrupt()])
def test_whoever_waits_is_told_why_the_start_failed(listener, failure):
    ended = []

    def fail():
        waiter.start()
        wait_until(lambda: waiting.is_set())
        raise failure

    def wait():
        waiting.set()
        try:
            listener.wait(5)
        except Exception as error:
            ended.append(error)

    waiting, waiter = threading.Event(), threading.Thread(target=wait)
    listener._before_threads = fail
    with pytest.raises(type(failure)):
        listener.start()
    waiter.join(5)
    (told,) = ended
    assert told is failure or (isinstance(told, StateError) and "did not start: KeyboardInterrupt" in str(told))
    with pytest.raises(type(told)):
        listener.wait(0)


def test_a_failure_after_the_threads_are_there_ends_them(pipe, udp, monkeypatch):
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "fasttun-watch":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = descriptors()
    with pytest.raises(RuntimeError):
        Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno()).start()
    assert threads() == []
    gc.collect()
    assert descriptors() == before


def test_from_a_configuration(pipe, udp, peer):
    config = TunnelConfig(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno())
    with Forwarder.from_config(config) as tunnel:
        assert tunnel.config is config
        peer.send(IN)
        assert pipe.receive() == IN


def test_bad_configurations_are_refused_before_anything_is_opened():
    with pytest.raises(ConfigurationError, match="listen"):
        Forwarder()


# ------------------------------------------------------------------------------------------ asyncio


def test_async_with_and_wait_closed(listener):
    async def main() -> float:
        async with listener as tunnel:
            assert tunnel is listener
            waiting = [asyncio.create_task(tunnel.wait_closed()) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in waiting)
            before = time.monotonic()
            await asyncio.to_thread(tunnel.stop)
            await asyncio.gather(*waiting)
            return time.monotonic() - before

    assert asyncio.run(main()) < 0.5
    assert threads() == []


def test_wait_closed_can_be_cancelled_and_asked_again(listener):
    async def main() -> None:
        async with listener as tunnel:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(tunnel.wait_closed(), 0.05)
            assert tunnel.running
        await tunnel.wait_closed()

    asyncio.run(main())


def test_wait_closed_survives_its_event_loop(listener):
    """The loop is closed while a waiter is registered; the tunnel's end must not trip over it."""

    async def main() -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(listener.wait_closed(), 0.01)

    listener.start()
    asyncio.run(main())
    listener.stop()
    assert listener.wait(0)


def test_wait_closed_raises_what_ended_the_tunnel(pipe, listener):
    async def main() -> None:
        async with listener as tunnel:
            pipe.app.close()
            await asyncio.wait_for(tunnel.wait_closed(), 5)

    with pytest.raises(DeviceError):
        asyncio.run(main())
    assert threads() == []


def test_cancelling_the_start_leaves_nothing_behind(pipe, udp):
    started = threading.Event()
    go_on = threading.Event()

    def hold() -> None:
        started.set()
        assert go_on.wait(5)

    tunnel = Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), before_threads=hold)

    async def main() -> None:
        async def use() -> None:
            async with tunnel:
                pytest.fail("it was cancelled before")

        task = asyncio.create_task(use())
        await asyncio.to_thread(started.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    before = descriptors()
    asyncio.run(main())
    assert tunnel.wait(5)
    assert threads() == []
    assert descriptors() == before


# -------------------------------------------------------------------------------------- descriptors


def test_the_callers_descriptors_stay_as_they_were(pipe, udp, peer):
    udp.setblocking(True)
    gro = udp.getsockopt(17, 104)
    with Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno()):
        peer.send(IN)
        assert pipe.receive() == IN
        assert not os.get_blocking(pipe.fd)
    assert os.get_blocking(pipe.fd)
    assert os.get_blocking(udp.fileno())
    assert udp.getsockopt(17, 104) == gro == 0
    assert udp.getsockopt(socket.IPPROTO_IP, 8) == 0, "IP_PKTINFO"
    peer.send(b"mine again")
    assert udp.recv(100) == b"mine again"
    pipe.send(OUT)
    assert pipe.tunnel.recv(2000) == OUT


def test_a_non_blocking_descriptor_stays_so(pipe, udp):
    pipe.tunnel.setblocking(False)
    with Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno()):
        pass
    assert not os.get_blocking(pipe.fd)


def test_closing_the_callers_descriptors_does_not_disturb_it(pipe, udp, listener, peer):
    with listener:
        address = udp.getsockname()
        pipe.tunnel.close()
        udp.close()
        peer.sock.sendto(IN, address)
        assert pipe.receive() == IN


def test_the_end_of_the_tuns_stand_in_ends_the_tunnel(pipe, listener):
    with in_thread(listener) as ended:
        wait_until(lambda: listener.running)
        pipe.app.close()
        wait_until(lambda: ended, 5)
    assert isinstance(ended[0], DeviceError)
    assert isinstance(ended[0], OSError)
    assert ended[0].errno == errno.EPIPE
    assert ended[0].hint
    assert not listener.running
    assert_balanced(listener.stats())


@pytest.mark.parametrize("batch", [True, False])
def test_an_empty_datagram_is_not_the_end(batch, listener, udp, peer):
    app, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with app, tun, Forwarder(listen=True, tun_fd=tun.fileno(), udp_fd=udp.fileno(), batch=batch) as tunnel:
        peer.send(IN)
        app.settimeout(5)
        assert app.recv(2000) == IN
        app.send(b"")
        app.send(OUT)
        assert peer.receive() == OUT
        assert settled(tunnel).outbound.drops["malformed"] == 1
    assert_balanced(tunnel.stats())


def test_the_end_is_noticed_by_a_write_too(pipe, listener, peer):
    """With unread packets in the pipe, and more coming: the kernel then says ECONNRESET first."""
    with listener:
        for _ in range(5):
            peer.send(IN)
        settled(listener)
        pipe.send(OUT)
        pipe.app.close()
        for _ in range(5):
            peer.send(IN)
        with pytest.raises(DeviceError):
            listener.wait(5)
    assert_balanced(listener.stats())


@pytest.mark.parametrize("field", ["tun_fd", "udp_fd"])
def test_a_closed_descriptor_is_named(field, pipe, udp):
    number = fcntl.fcntl(0, fcntl.F_DUPFD, 200)
    os.close(number)
    fields = {"tun_fd": pipe.fd, "udp_fd": udp.fileno(), field: number}
    with pytest.raises((DeviceError, EndpointError), match=f"{field} {number}.*EBADF"):
        Forwarder(listen=True, **fields).start()


def test_a_udp_fd_that_is_no_socket(pipe):
    before = descriptors()
    with open(os.devnull) as file, pytest.raises(EndpointError, match=r"udp_fd.*ENOTSOCK"):
        Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=file.fileno()).start()
    gc.collect()
    assert descriptors() == before


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_udp_fd_that_keeps_no_datagrams(kind, pipe):
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    with one, two, pytest.raises(EndpointError, match="datagram socket"):
        Forwarder(tun_fd=pipe.fd, udp_fd=one.fileno()).start()


def test_an_unconnected_udp_fd_needs_a_role(pipe, udp):
    with pytest.raises(ConfigurationError, match="connected"):
        Forwarder(tun_fd=pipe.fd, udp_fd=udp.fileno()).start()


@pytest.mark.parametrize("make", [Engine, PeerTable, SessionTable])
def test_no_engine_or_table_exists_without_its_memory(make, pipe):
    """`__new__` alone gives a whole object or none, and a second `__init__` changes nothing."""
    if make is Engine:
        with pytest.raises(TypeError):
            Engine.__new__(Engine)
    else:
        whole = make.__new__(make)
        assert whole.notify_fd >= 0
        assert whole.events_lost == 0 if make is PeerTable else True


def test_nothing_leaks():
    def once() -> None:
        with Pipe.make() as near, bind_udp() as udp:
            listener = Forwarder(listen=True, tun_fd=near.fd, udp_fd=udp.fileno())
            with listener, client_of(udp) as (client, far):
                client.wait_peer(5)
                far.send(IN)
                near.receive()

    once()
    before = descriptors()
    for _ in range(5):
        once()
    assert descriptors() == before
    assert threads() == []


def test_a_stopped_tunnel_that_is_kept_holds_no_descriptors(pipe, udp):
    before = descriptors()
    tunnels = []
    for _ in range(3):
        tunnels.append(Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno()))
        tunnels[-1].start()
        tunnels[-1].stop()
    assert descriptors() == before
    assert [tunnel.stats().uptime_s > 0 for tunnel in tunnels] == [True] * 3


def test_descriptors_above_1023(pipe, udp, peer):
    """select() cannot take them; a server with many connections has them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip("needs a hard limit of 3000 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3000, hard))
    filling = []
    told: list[PeerStats] = []
    try:
        while not filling or filling[-1] < 1100:
            filling.append(os.dup(0))
        with Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), on_peer=told.append):
            peer.send(IN)
            assert pipe.receive() == IN
            wait_until(lambda: told)
    finally:
        for fd in filling:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ------------------------------------------------------------------------------- connected sockets


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connected_socket_needs_no_role(host):
    with Pipe.make() as near, Pipe.make() as far, bind_udp(host) as one, bind_udp(host) as two:
        one.connect(two.getsockname())
        two.connect(one.getsockname())
        with Forwarder(tun_fd=near.fd, udp_fd=one.fileno()) as left, \
                Forwarder(tun_fd=far.fd, udp_fd=two.fileno()) as right:
            assert left.wait_peer(5).endpoint.port == two.getsockname()[1]
            right.wait_peer(5)
            near.send(OUT)
            assert far.receive() == OUT
            far.send(IN)
            assert near.receive() == IN
        assert_balanced(left.stats())


@pytest.mark.parametrize("role", [{"listen": True}, {"server": "127.0.0.1"}, {}])
def test_a_connected_socket_takes_any_role(role):
    with Pipe.make() as pipe, Client(("127.0.0.1", 9)) as peer, \
            bind_udp(connect=peer.sock.getsockname()) as udp:
        peer.to = udp.getsockname()
        with Forwarder(tun_fd=pipe.fd, udp_fd=udp.fileno(), **role) as tunnel:
            peer.send(IN)
            assert pipe.receive() == IN
            assert tunnel.wait_peer(5).endpoint.port == peer.port
            pipe.send(OUT)
            while (datagram := peer.receive())[4:8] == COOKIE:
                pass
            assert datagram == OUT
            tunnel.resolve_again()


@pytest.mark.parametrize("role", [{"listen": True}, {"server": "127.0.0.1"}, {}])
def test_on_peer_is_told_of_a_connected_sockets_peer(role):
    told: list[PeerStats] = []
    with Pipe.make() as pipe, Client(("127.0.0.1", 9)) as peer, \
            bind_udp(connect=peer.sock.getsockname()) as udp:
        peer.to = udp.getsockname()
        with Forwarder(tun_fd=pipe.fd, udp_fd=udp.fileno(), on_peer=told.append, **role):
            peer.send(IN)
            wait_until(lambda: told)
        assert [one.endpoint.port for one in told] == [peer.port]


@pytest.mark.parametrize("role", [{}, {"listen": True}, {"server": "127.0.0.1"}])
def test_a_unix_datagram_pair_as_the_wire(role):
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two, Pipe.make() as near, Pipe.make() as far, \
            Forwarder(tun_fd=near.fd, udp_fd=one.fileno(), framing="raw", **role) as left, \
            Forwarder(tun_fd=far.fd, udp_fd=two.fileno(), framing="raw", **role) as right:
        assert left.stats().offloads["udp-gso"].startswith("off")
        for number in range(200):
            packet = ip_packet("10.7.0.1", "10.7.0.2", bytes([number]))
            near.send(packet)
            assert far.receive() == packet
        far.send(IN)
        assert near.receive() == IN
        assert settled(left).peers[0].inbound_packets == 1
        assert settled(right).inbound.packets_out == 200
        time.sleep(0.3)  # a greeting that cannot be sent must not end the watcher
        assert threads().count("fasttun-watch") == 2
    assert_balanced(left.stats())
    assert_balanced(right.stats())


def test_a_full_wire_pushes_back_and_loses_nothing():
    """EAGAIN: the tunnel stops reading the TUN until there is room, so the sender blocks instead."""
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two, Pipe.make() as near, Forwarder(tun_fd=near.fd, udp_fd=one.fileno(), framing="raw") as left:
        sent = 0
        near.app.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while sent < 20000:
                near.send(ip_packet("10.7.0.1", "10.7.0.2", sent.to_bytes(4, "big")))
                sent += 1
        assert 0 < sent < 20000, "the wire never became full"
        calls = left.stats().system_calls
        time.sleep(0.2)
        assert left.stats().system_calls == calls, "it spins while it waits for room"
        two.settimeout(5)
        got = [int.from_bytes(two.recv(2000)[20:], "big") for _ in range(sent)]
        assert got == list(range(sent))
    assert_balanced(left.stats())


def test_what_is_unsent_at_the_end_is_counted():
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two, Pipe.make() as near, Forwarder(tun_fd=near.fd, udp_fd=one.fileno(), framing="raw") as left:
        near.app.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                near.send(OUT)
    stats = left.stats()
    assert_balanced(stats)
    assert stats.outbound.drops["unsent"] > 0


def test_a_refused_port_is_survived_and_counted(pipe):
    with bind_udp() as nobody:
        gone = nobody.getsockname()
    with bind_udp(connect=gone) as udp, \
            Forwarder(tun_fd=pipe.fd, udp_fd=udp.fileno(), framing="raw") as tunnel:
        for _ in range(30):
            pipe.send(OUT)
            time.sleep(0.003)
        wait_until(lambda: tunnel.stats().errors.get("ECONNREFUSED", 0) > 3)
        assert tunnel.running
        with bind_udp() as back:
            back.close()
            revived = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            revived.bind(gone)
            with revived:
                revived.settimeout(5)
                revived.connect(udp.getsockname())
                settled(tunnel)
                pipe.send(OUT)
                while (datagram := revived.recv(2000))[4:8] == COOKIE:
                    pass
                assert datagram == OUT
                revived.send(IN)
                assert pipe.receive() == IN
    stats = tunnel.stats()
    assert_balanced(stats)
    assert stats.outbound.packets_in == 31


def test_a_server_that_is_not_there_yet_is_survived(pipe):
    with bind_udp() as nobody:
        gone = nobody.getsockname()
    with Forwarder(server=gone[0], port=gone[1], tun_fd=pipe.fd) as tunnel:
        for _ in range(20):
            pipe.send(OUT)
            time.sleep(0.002)
        with pytest.raises(TimeoutError):
            tunnel.wait_peer(0.1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late, Pipe.make() as far:
            late.bind(gone)
            with Forwarder(listen=True, tun_fd=far.fd, udp_fd=late.fileno()):
                tunnel.wait_peer(8)
                pipe.send(OUT)
                assert far.receive() == OUT
    assert_balanced(tunnel.stats())


# ----------------------------------------------------------------------------------------- framing


def test_the_answer_has_the_framing_of_the_question(pipe, listener, udp):
    with listener, Client(udp.getsockname()) as raw, Client(udp.getsockname()) as lametun:
        raw.send(ip_packet("10.7.0.2", "10.7.0.1"))
        lametun.send(pi(ip_packet("10.7.0.3", "10.7.0.1")))
        assert {pipe.receive(), pipe.receive()} == {
            ip_packet("10.7.0.2", "10.7.0.1"), ip_packet("10.7.0.3", "10.7.0.1")}
        for peer, address, frame in ((raw, "10.7.0.2", bytes), (lametun, "10.7.0.3", pi)):
            packet = ip_packet("10.7.0.1", address, b"x" * 100)
            pipe.send(packet)
            assert peer.receive() == frame(packet)
        assert {str(peer.addresses[0]): peer.framing for peer in listener.peers} == {
            "10.7.0.2": "raw", "10.7.0.3": "pi"}


def test_packet_information_for_ipv6(pipe, listener, peer):
    with listener:
        peer.send(pi(ip_packet("fd07::2", "fd07::1", b"x")))
        assert pipe.receive() == ip_packet("fd07::2", "fd07::1", b"x")
        pipe.send(ip_packet("fd07::1", "fd07::2", b"y"))
        assert peer.receive() == b"\0\0\x86\xdd" + ip_packet("fd07::1", "fd07::2", b"y")


def test_raw_sticks(pipe, listener, peer):
    """A client that alternates until it hears us must not be followed back and forth."""
    with listener:
        for datagram in (pi(IN), IN, pi(IN), pi(IN)):
            peer.send(datagram)
            assert pipe.receive() == IN
        assert [known.framing for known in listener.peers] == ["raw"]
        pipe.send(OUT)
        assert peer.receive() == OUT


def test_a_fixed_framing_is_obeyed_both_kinds_are_read(pipe, udp, peer):
    with Forwarder(listen=True, framing="pi", tun_fd=pipe.fd, udp_fd=udp.fileno()):
        peer.send(IN)
        assert pipe.receive() == IN
        pipe.send(OUT)
        assert peer.receive() == pi(OUT)


def client_against(server: Client, tunnel_pipe: Pipe, **fields: object) -> Forwarder:
    host, port = server.sock.getsockname()
    return Forwarder(server=host, port=port, tun_fd=tunnel_pipe.fd, **fields)  # type: ignore[arg-type]


def test_a_client_tries_both_framings_until_the_server_speaks(pipe):
    with Client(("127.0.0.1", 9)) as lametun, client_against(lametun, pipe) as tunnel:
        lametun.to = ("127.0.0.1", tunnel.local_port)
        got = []
        for _ in range(6):
            pipe.send(OUT)
            while (datagram := lametun.receive())[4:8] == COOKIE:
                pass
            got.append(datagram)
        assert {OUT, pi(OUT)} == set(got)
        assert got.count(OUT) == 3
        lametun.send(pi(IN))
        assert pipe.receive() == IN
        for _ in range(4):
            pipe.send(OUT)
            while (datagram := lametun.receive())[4:8] == COOKIE:
                pass
            assert datagram == pi(OUT)
        assert tunnel.peers[0].framing == "pi"


def test_a_client_sends_raw_to_a_server_that_answers_its_greeting(pipe):
    with Client(("127.0.0.1", 9)) as server, client_against(server, pipe) as tunnel:
        request = server.receive()
        assert request[:8] == b"\x00\x01\x00\x00" + COOKIE
        assert len(request) == 20
        server.to = ("127.0.0.1", tunnel.local_port)
        server.send(stun_success(request[8:], ("127.0.0.1", tunnel.local_port)))
        assert tunnel.wait_peer(5).framing == "raw"
        for _ in range(4):
            pipe.send(OUT)
            assert server.receive() == OUT


def test_only_the_answer_to_the_last_greeting_counts(pipe):
    with Client(("127.0.0.1", 9)) as server, client_against(server, pipe) as tunnel:
        request = server.receive()
        server.to = ("127.0.0.1", tunnel.local_port)
        server.send(stun_success(b"not this one"))
        with Client(server.to) as stranger:
            stranger.send(stun_success(request[8:]))
            stranger.send(IN)
            stranger.send(stun_request())
            assert stranger.silent(), "a client answers its server alone"
        with pytest.raises(TimeoutError):
            tunnel.wait_peer(0.1)
        stats = settled(tunnel)
        assert stats.inbound.drops["stranger"] == 1
        server.send(stun_request())
        while (answer := server.receive())[:2] != b"\x01\x01":
            pass
        assert answer[8:20] == b"transaction!"


# ------------------------------------------------------------------------------- counting and drops


def drops_after(tunnel: Forwarder, peer: Client, *datagrams: bytes) -> dict[str, int]:
    for datagram in datagrams:
        peer.send(datagram)
    wait_until(lambda: tunnel.stats().inbound.packets_in >= len(datagrams))
    stats = settled(tunnel)
    assert_balanced(stats)
    return {reason: count for reason, count in stats.inbound.drops.items() if count}


def test_malformed_datagrams_are_counted(pipe, listener, peer):
    bad = bytearray(IN)
    bad[10] ^= 1
    with listener:
        assert drops_after(
            listener, peer, b"", b"x", bytes(19), bytes(100), IN[:-1], IN + b"x", bytes(bad), b"\x50" + IN[1:],
            pi(IN)[:-1], pi(bytes(bad)), ip_packet("fd07::2", "fd07::1", b"xx")[:-1],
            ip_packet("fd07::2", "fd07::1")[:39],
        ) == {"malformed": 12}
        assert listener.peers == (), "a malformed packet teaches nothing"
        assert pipe.silent()


def test_sources_that_no_host_has_are_martian(pipe, udp, peer):
    sources = ["0.0.0.1", "127.0.0.1", "224.0.0.1", "255.255.255.255", "10.7.0.1"]
    sources6 = ["::", "::1", "ff02::1", "::ffff:10.7.0.2", "fd07::1"]
    with Forwarder(listen=True, address=["10.7.0.1/24", "fd07::1/64"], tun_fd=pipe.fd,
                   udp_fd=udp.fileno()) as tunnel:
        assert drops_after(
            tunnel, peer, *(ip_packet(source, "10.7.0.9") for source in sources),
            *(ip_packet(source, "fd07::9") for source in sources6)) == {"martian": 10}
        assert tunnel.peers == ()
        assert pipe.silent()


def test_allow_is_about_the_outer_address(pipe, udp, peer):
    with Forwarder(listen=True, allow="192.0.2.0/24", tun_fd=pipe.fd, udp_fd=udp.fileno()) as tunnel:
        assert drops_after(tunnel, peer, IN) == {"stranger": 1}
        peer.send(stun_request())
        assert peer.silent()
    with Pipe.make() as other, bind_udp() as sock, Client(sock.getsockname()) as friend, \
            Forwarder(listen=True, allow=["192.0.2.0/24", "127.0.0.0/8"], tun_fd=other.fd, udp_fd=sock.fileno()):
        friend.send(IN)
        assert other.receive() == IN


@pytest.mark.parametrize("gro", [False, True])
def test_an_oversized_datagram_is_counted(pipe, udp, peer, gro):
    with Forwarder(listen=True, mtu=1400, udp_gro=gro, tun_fd=pipe.fd, udp_fd=udp.fileno()) as tunnel:
        huge = ip_packet("10.7.0.2", "10.7.0.1", bytes(9000))
        peer.send(huge)
        if gro:
            assert pipe.receive() == huge, "the receive buffers are large anyway, nothing is lost"
        else:
            assert drops_after(tunnel, peer) == {"oversized": 1}
        peer.send(IN)
        assert pipe.receive() == IN


def test_a_tun_that_is_not_read_is_counted(pipe, listener, peer):
    with listener:
        for number in range(600):
            peer.send(ip_packet("10.7.0.2", "10.7.0.1", number.to_bytes(2, "big") * 300))
            if number % 50 == 49:
                time.sleep(0.005)
        stats = settled(listener)
        assert_balanced(stats)
        assert stats.inbound.packets_in == 600
        assert stats.inbound.drops["tun_full"] > 0
        for number in range(stats.inbound.packets_out):
            assert pipe.receive()[20:22] == number.to_bytes(2, "big")
        assert pipe.silent()
        peer.send(IN)
        assert pipe.receive() == IN


def test_outbound_drops(pipe, listener, peer):
    with listener:
        pipe.send(OUT)
        pipe.send(b"no packet at all, but twenty bytes and more")
        pipe.send(OUT[:-1])
        pipe.send(b"x")
        stats = settled(listener)
        assert_balanced(stats)
        assert {k: v for k, v in stats.outbound.drops.items() if v} == {"no_peer": 1, "malformed": 3}
        assert peer.silent()


def test_bytes_are_those_of_the_inner_packets(pipe, listener, peer):
    with listener:
        peer.send(pi(IN))
        pipe.receive()
        pipe.send(OUT)
        assert len(peer.receive()) == len(OUT) + 4
        stats = settled(listener)
        assert (stats.inbound.bytes_in, stats.inbound.bytes_out) == (len(IN), len(IN))
        assert (stats.outbound.bytes_in, stats.outbound.bytes_out) == (len(OUT), len(OUT))
        known = stats.peers[0]
        assert (known.inbound_packets, known.inbound_bytes) == (1, len(IN))
        assert (known.outbound_packets, known.outbound_bytes) == (1, len(OUT))
        assert known.silent_s < 5


@pytest.mark.parametrize(("gso", "gro", "batch"), [(True, True, True), (False, False, True), (True, True, False)])
def test_a_flood_balances_to_the_packet_and_keeps_its_order(gso, gro, batch):
    count = 3000
    with Pipe.make() as near, bind_udp() as udp, Forwarder(
            listen=True, tun_fd=near.fd, udp_fd=udp.fileno(), udp_gso=gso, udp_gro=gro, batch=batch) as listener:
        with client_of(udp, udp_gso=gso, udp_gro=gro, batch=batch) as (client, far):
            client.wait_peer(5)
            got: list[bytes] = []

            def read() -> None:
                with contextlib.suppress(TimeoutError):
                    while len(got) < count:
                        got.append(near.receive(1))

            reader = threading.Thread(target=read)
            reader.start()
            sizes = [0, 44, 1, 1300, 1300, 700]
            packets = [ip_packet("10.7.0.2", "10.7.0.1", number.to_bytes(4, "big") + bytes(sizes[number % 6]))
                       for number in range(count)]
            for packet in packets:
                far.send(packet)
            reader.join(30)
            sent = settled(client)
            settled(listener)
        assert_balanced(client.stats())
        assert sent.outbound.packets_in == count
    stats = listener.stats()
    assert_balanced(stats)
    assert 100 < len(got) <= stats.inbound.packets_in <= client.stats().outbound.packets_out == count
    position = {packet: number for number, packet in enumerate(packets)}
    order = [position[packet] for packet in got]
    assert order == sorted(order)
    assert len(got) == stats.inbound.packets_out
    if not batch:
        assert client.stats().offloads["udp-gso"].startswith("off")
        assert client.stats().system_calls["read"] >= count


# ------------------------------------------------------------------------------------ peers, events


def test_on_peer_is_told_of_each_peer_once(pipe, udp):
    told: list[PeerStats] = []
    with Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), on_peer=told.append), \
            contextlib.ExitStack() as stack:
        for number in range(3):
            peer = stack.enter_context(Client(udp.getsockname()))
            for _ in range(3):
                peer.send(ip_packet(f"10.7.0.{number + 2}", "10.7.0.1"))
        for _ in range(9):
            pipe.receive()
        wait_until(lambda: len(told) >= 3)
        time.sleep(0.05)
    assert sorted(str(peer.addresses[0]) for peer in told) == ["10.7.0.2", "10.7.0.3", "10.7.0.4"]


def test_a_client_is_told_of_its_server(udp, listener):
    told: list[PeerStats] = []
    with listener, client_of(udp, on_peer=told.append) as (client, _):
        client.wait_peer(5)
        wait_until(lambda: told, 3)
        assert told[0].endpoint.port == udp.getsockname()[1]


def test_a_failing_on_peer_is_logged_and_the_tunnel_goes_on(pipe, udp, caplog):
    def fail(_: PeerStats) -> None:
        raise ZeroDivisionError("in the callback")

    with caplog.at_level(logging.ERROR, "fasttun"), \
            Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), on_peer=fail) as tunnel, \
            Client(udp.getsockname()) as one, Client(udp.getsockname()) as two:
        for peer, address in ((one, "10.7.0.2"), (two, "10.7.0.3")):
            peer.send(ip_packet(address, "10.7.0.1"))
            pipe.receive()
        wait_until(lambda: caplog.text.count("ZeroDivisionError: in the callback") == 2)
        assert tunnel.running


def test_events_that_do_not_fit_are_counted(pipe, udp):
    """on_peer holds the watcher up while 400 peers come: the ring of 256 overflows, and says by how much."""
    told: list[PeerStats] = []
    first, go_on = threading.Event(), threading.Event()

    def slow(peer: PeerStats) -> None:
        told.append(peer)
        first.set()
        assert go_on.wait(10)

    count = 400
    with Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), on_peer=slow) as tunnel, \
            contextlib.ExitStack() as stack:
        for number in range(count):
            peer = stack.enter_context(Client(udp.getsockname()))
            peer.send(ip_packet(f"10.8.{number >> 7}.{(number & 127) + 1}", "10.7.0.1"))
            pipe.receive()
            if number == 0:
                assert first.wait(5)
        assert len(tunnel.peers) == count
        lost = tunnel.stats().events_lost
        assert lost == count - 1 - 256
        go_on.set()
        wait_until(lambda: len(told) == count - lost)
        with Client(udp.getsockname()) as late:
            late.send(ip_packet("10.10.0.1", "10.7.0.1"))
            wait_until(lambda: len(told) == count - lost + 1, what="the ring works again")


def test_a_client_that_moves_is_followed_and_told_of(pipe, udp):
    """The whole rule on the wire: claims, two questions to the mute owner, the claimant's answer, his next packet."""
    told: list[PeerStats] = []
    with Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno(), on_peer=told.append) as tunnel, \
            Client(udp.getsockname()) as old, Client(udp.getsockname()) as new:
        old.send(IN)
        pipe.receive()
        start = time.monotonic()
        while new.silent(0.1):
            new.send(IN)
            pipe.send(OUT)
            assert old.receive()[:1] in (b"\x45", b"\0"), "until it has moved, the old one gets it"
            assert time.monotonic() - start < 4
        assert pipe.silent(), "what is unproven does not come in"
        new.answer_check()
        assert tunnel.peers[0].endpoint.port == old.port, "the owner has its second to answer"
        while pipe.silent(0.1):
            new.send(IN)
            assert time.monotonic() - start < 4
        assert tunnel.peers[0].endpoint.port == new.port, "the packet that moved it came in"
        assert len(tunnel.peers) == 1
        assert 1 <= time.monotonic() - start < 2.5
        while not pipe.silent():
            pipe.receive()
        while not new.silent():
            new.receive()
        while not old.silent():
            old.receive()
        pipe.send(OUT)
        assert new.receive() == OUT
        assert old.silent()
        new.send(IN)
        assert pipe.receive() == IN
        wait_until(lambda: [peer.endpoint.port for peer in told] == [old.port, new.port])
        assert settled(tunnel).inbound.drops["unproven"] > 3
    assert_balanced(tunnel.stats())


def test_an_owner_that_answers_is_not_moved(pipe, listener, udp):
    with listener, Client(udp.getsockname()) as owner, Client(udp.getsockname()) as claimant:
        owner.send(IN)
        pipe.receive()
        end = time.monotonic() + 3
        asked = 0
        while time.monotonic() < end:
            claimant.send(IN)
            if not owner.silent(0.05):
                owner.answer_check()
                asked += 1
        assert asked >= 2
        assert claimant.silent(), "he is not even asked"
        assert [peer.endpoint.port for peer in listener.peers] == [owner.port]


def test_keepalives_keep_an_idle_peer(pipe, udp, peer):
    """A client that says nothing but its greetings stays known; one that is mute does not."""
    pipe.tunnel.setblocking(False)
    table = PeerTable(family=int(socket.AF_INET), expiry_s=0.5)
    engine = Engine(table, tun_fd=pipe.fd, udp_fd=udp.fileno())
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        peer.send(IN)
        wait_until(lambda: table.peers())
        for _ in range(10):
            peer.send(stun_request())
            assert peer.receive()[:2] == b"\1\1"
            time.sleep(0.1)
        assert table.expire() == 0
        pipe.send(OUT)
        assert peer.receive() == OUT
        time.sleep(0.6)
        assert table.peers() == []
        pipe.send(OUT)
        assert peer.silent()
        assert table.expire() == 1
    finally:
        engine.stop()
        thread.join(5)
    assert engine.counters()["outbound"]["drops"]["no_peer"] == 1


def test_answers_leave_from_the_address_that_was_asked(pipe):
    """This host has many addresses; a client (and its NAT) only knows the one that it wrote to."""
    with bind_udp() as probe:
        port = probe.getsockname()[1]
    with Forwarder(listen=True, port=port, tun_fd=pipe.fd):
        for number, host in enumerate(("127.0.0.2", "127.7.7.7"), 2):
            with bind_udp("127.0.0.1", connect=(host, port)) as peer:
                peer.send(ip_packet(f"10.7.0.{number}", "10.7.0.1"))
                pipe.receive()
                for size in (10, 10, 10, 5):
                    pipe.send(ip_packet("10.7.0.1", f"10.7.0.{number}", bytes(size)))
                assert [len(peer.recv(2000)) for _ in range(4)] == [30, 30, 30, 25]
                peer.send(stun_request())
                assert peer.recv(2000)[:2] == b"\1\1"


def test_an_answered_greeting_is_an_answer_about_the_greeter(listener, udp, peer):
    with listener:
        peer.send(stun_request(b"0123456789ab"))
        assert peer.receive() == stun_success(b"0123456789ab", ("127.0.0.1", peer.port))
        assert listener.peers == (), "a greeting teaches no inner address"
        assert listener.stats().inbound.packets_in == 0, "control is no packet"


def test_wait_peer_gives_up_in_time(listener):
    with listener:
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            listener.wait_peer(0.1)
        assert 0.1 <= time.monotonic() - before < 1


def test_wait_peer_ends_with_the_tunnel(listener):
    with listener:
        threading.Timer(0.1, listener.stop).start()
        with pytest.raises(StateError, match="ended"):
            listener.wait_peer(5)


def test_stats_are_readable_from_many_threads_while_packets_flow(pipe, listener, udp, peer):
    with listener:
        stop = threading.Event()
        failed: list[BaseException] = []

        def read() -> None:
            try:
                while not stop.is_set():
                    stats = listener.stats()
                    assert stats.inbound.packets_out <= stats.inbound.packets_in + 300
                    assert len(listener.peers) <= 1
            except BaseException as error:
                failed.append(error)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(300):
            peer.send(IN)
            pipe.receive()
        listener.stop()
        stop.set()
        for reader in readers:
            reader.join(5)
        assert failed == []


def test_after_stop_the_last_numbers_stay(pipe, listener, peer):
    with listener:
        peer.send(IN)
        pipe.receive()
        listener.wait_peer(5)
    assert listener.stats().inbound.packets_out == 1
    assert listener.stats() is listener.stats()
    assert len(listener.peers) == 1
    assert listener.local_port == 0


def test_an_idle_tunnel_sleeps(listener):
    with listener:
        time.sleep(0.1)
        before = listener.stats().system_calls
        used = time.process_time()
        time.sleep(0.5)
        assert listener.stats().system_calls == before
        assert time.process_time() - used < 0.05


# ---------------------------------------------------------------------------------- names, signals


def test_a_name_is_resolved_again_and_followed(pipe, monkeypatch):
    with Client(("127.0.0.1", 9)) as old, Client(("127.0.0.1", 9)) as new:
        addresses = [fasttun.Endpoint(*_endpoint(old))]
        monkeypatch.setattr(fasttun.forwarder, "resolve", lambda host, port: list(addresses))
        told: list[PeerStats] = []
        with Forwarder(server="vpn.example", tun_fd=pipe.fd, framing="raw", on_peer=told.append) as tunnel:
            old.to = new.to = ("127.0.0.1", tunnel.local_port)
            old.answer_check()
            wait_until(lambda: told)
            addresses[:] = [fasttun.Endpoint(*_endpoint(new))]
            tunnel.resolve_again()
            new.answer_check()
            wait_until(lambda: len(told) == 2)
            assert [peer.endpoint.port for peer in told] == [old.port, new.port]
            pipe.send(OUT)
            assert new.receive() == OUT
            assert tunnel.peers[0].endpoint.port == new.port
            monkeypatch.setattr(fasttun.forwarder, "resolve", _fail_to_resolve)
            tunnel.resolve_again()
            time.sleep(0.1)
            pipe.send(OUT)
            while (datagram := new.receive())[4:8] == COOKIE:
                pass
            assert datagram == OUT, "a resolver that fails changes nothing"


def _endpoint(client: Client) -> tuple[object, int]:
    import ipaddress

    host, port = client.sock.getsockname()
    return ipaddress.ip_address(host), port


def _fail_to_resolve(host: str, port: int) -> list[object]:
    raise EndpointError("resolve", host, socket.EAI_AGAIN, reason="no answer")


def test_a_resolver_that_does_not_answer_does_not_hold_up_stop(pipe, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()
    with Client(("127.0.0.1", 9)) as server:
        answer = [fasttun.Endpoint(*_endpoint(server))]
        monkeypatch.setattr(fasttun.forwarder, "resolve", lambda host, port: answer)
        tunnel = Forwarder(server="vpn.example", tun_fd=pipe.fd)
        with tunnel:

            def hang(host: str, port: int) -> list[fasttun.Endpoint]:
                inside.set()
                assert go_on.wait(10)
                return answer

            monkeypatch.setattr(fasttun.forwarder, "resolve", hang)
            tunnel.resolve_again()
            assert inside.wait(5)
            before = time.monotonic()
            tunnel.stop()
            assert time.monotonic() - before < 2
        go_on.set()
        wait_until(lambda: threads() == [])


@pytest.mark.parametrize(("bind", "server"), [("::1", "127.0.0.1"), ("::", "127.0.0.1"), ("127.0.0.1", "::1")])
def test_a_server_of_the_other_family_fails_the_start(bind, server, pipe):
    tunnel = Forwarder(server=server, bind=bind, tun_fd=pipe.fd)
    with pytest.raises(ConfigurationError, match="no address of the socket's family"):
        tunnel.start()
    assert not threads()


def test_a_name_that_does_not_resolve_fails_the_start(pipe, monkeypatch):
    monkeypatch.setattr(fasttun.forwarder, "resolve", _fail_to_resolve)
    with pytest.raises(EndpointError, match=r"vpn\.example"):
        Forwarder(server="vpn.example", tun_fd=pipe.fd).start()


def test_a_taken_port_fails_the_start(pipe):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        other.bind(("::", 0))
        with pytest.raises(EndpointError, match="EADDRINUSE"):
            Forwarder(listen=True, port=other.getsockname()[1], tun_fd=pipe.fd).start()


def test_a_listener_takes_both_families(pipe):
    with bind_udp() as probe:
        port = probe.getsockname()[1]
    with Forwarder(listen=True, port=port, tun_fd=pipe.fd) as tunnel:
        assert tunnel.local_port == port
        with Client(("127.0.0.1", port)) as four, Client(("::1", port), bind_udp("::1")) as six:
            four.send(ip_packet("10.7.0.2", "10.7.0.1"))
            six.send(ip_packet("10.7.0.3", "10.7.0.1"))
            pipe.receive()
            pipe.receive()
            hosts = {str(peer.endpoint.host) for peer in tunnel.peers}
            assert hosts == {"127.0.0.1", "::1"}
            for client, address in ((four, "10.7.0.2"), (six, "10.7.0.3")):
                pipe.send(ip_packet("10.7.0.1", address, b"back"))
                assert client.receive()[20:] == b"back"


SIGNALLED = """
import signal, sys, socket, fasttun
near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
tunnel = fasttun.Forwarder(listen=True, tun_fd=near.fileno(), udp_fd=udp.fileno())
tunnel.start()
print("up", flush=True)
try:
    tunnel.run()
except KeyboardInterrupt:
    print("interrupted", tunnel.running, flush=True)
"""


def test_sigint_ends_run_in_the_main_thread():
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root)})
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        time.sleep(0.1)
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=5)
        assert time.monotonic() - before < 2
        assert out == "interrupted False\n"
        assert process.returncode == 0, err
    finally:
        process.kill()
        process.communicate()


def test_a_signal_handler_may_ask_for_the_peers_at_any_moment(pipe):
    with bind_udp() as udp, Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno()) as tunnel:
        seen = []
        former = signal.signal(signal.SIGALRM, lambda *_: seen.append((tunnel.peers, tunnel.stats())))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                tunnel.stats()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
    assert len(seen) > 10


def test_stop_waits_for_the_stop_that_is_under_way(pipe):
    with bind_udp() as udp:
        tunnel = Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno())
        tunnel.start()
        undone = []
        tunnel._undo.callback(lambda: (time.sleep(0.3), undone.append(True)))
        other = threading.Thread(target=tunnel.stop)
        other.start()
        while tunnel._state == "running":
            time.sleep(0.001)
        tunnel.stop()
        assert undone, "returned before all was put back"
        other.join()


def test_a_watcher_that_fails_ends_the_tunnel(pipe, monkeypatch):
    monkeypatch.setattr(Forwarder, "_watch", lambda self: 1 / 0)
    with bind_udp() as udp, Forwarder(listen=True, tun_fd=pipe.fd, udp_fd=udp.fileno()) as tunnel, \
            pytest.raises(StateError, match="watcher"):
        tunnel.wait(5)
