"""Guards of what makes the loop fast: the ratio to the pure-Python tunnel, and system calls per packet, counted.

Ratios of medians taken in turn, with room for a busy machine: a fall below is a defect, not noise.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from pathlib import Path

import pytest
from support.tunnels import Pipe, bind_udp, ip_packet, settled

from fasttun import Forwarder

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import loop


@pytest.mark.alone
@pytest.mark.parametrize(("direction", "least"), [("outbound", 2.5), ("inbound", 1.5)])
def test_the_loop_stays_far_ahead_of_pure_python(direction: str, least: float) -> None:
    pairs = [[loop.packets_per_second(tunnel, direction, 64, 0.3) for tunnel in loop.TUNNELS] for _ in range(5)]
    assert statistics.median(ours / theirs for ours, theirs in pairs) >= least, pairs


def test_a_burst_costs_a_few_system_calls() -> None:
    packets = [ip_packet("10.7.0.2", "10.7.0.1", bytes(44)) for _ in range(32)]
    with contextlib.ExitStack() as stack:
        inside, outside = (stack.enter_context(Pipe.make()) for _ in range(2))
        server, client = (stack.enter_context(bind_udp()) for _ in range(2))
        listener = stack.enter_context(Forwarder(listen=True, tun_fd=inside.fd, udp_fd=server.fileno()))
        sender = stack.enter_context(
            Forwarder(server="127.0.0.1", port=server.getsockname()[1], framing="raw", tun_fd=outside.fd,
                      udp_fd=client.fileno()))
        for _ in range(20):
            for packet in packets:
                outside.send(packet)
            for _ in packets:
                assert len(inside.receive()) == 64
        out, into = settled(sender), settled(listener)
    assert out.outbound.packets_out == into.inbound.packets_out == 640
    # One packet a call needs two calls a packet on each side (read and send, receive and write), and a poll.
    for stats in (out, into):
        assert sum(stats.system_calls.values()) <= 640, stats.system_calls


def test_one_packet_a_call_is_what_it_says() -> None:
    with contextlib.ExitStack() as stack:
        pipe = stack.enter_context(Pipe.make())
        udp, server = (stack.enter_context(bind_udp()) for _ in range(2))
        sender = stack.enter_context(
            Forwarder(server="127.0.0.1", port=server.getsockname()[1], framing="raw", tun_fd=pipe.fd,
                      udp_fd=udp.fileno(), batch=False))
        for _ in range(50):
            pipe.send(ip_packet("10.7.0.2", "10.7.0.1", bytes(44)))
        stats = settled(sender)
    assert stats.outbound.packets_out == 50
    assert stats.system_calls["sendmmsg"] >= 50
    assert stats.system_calls["read"] >= 50
