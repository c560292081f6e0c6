"""Guards of what makes the loop fast: the ratio to the pure-Python tunnel, and system calls per packet, counted.

Ratios of medians taken in turn, with room for a busy machine: a fall below is a defect, not noise.
"""

from __future__ import annotations

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
    with Pipe.make() as inside, bind_udp() as server, Pipe.make() as outside, bind_udp() as client:
        with Forwarder(listen=True, tun_fd=inside.fd, udp_fd=server.fileno()) as listener, \
                Forwarder(server="127.0.0.1", port=server.getsockname()[1], framing="raw", tun_fd=outside.fd,
                          udp_fd=client.fileno()) as sender:
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
    with Pipe.make() as pipe, bind_udp() as udp, bind_udp() as server:
        with Forwarder(server="127.0.0.1", port=server.getsockname()[1], framing="raw", tun_fd=pipe.fd,
                       udp_fd=udp.fileno(), batch=False) as sender:
            for _ in range(50):
                pipe.send(ip_packet("10.7.0.2", "10.7.0.1", bytes(44)))
            stats = settled(sender)
    assert stats.outbound.packets_out == 50
    assert stats.system_calls["sendmmsg"] >= 50
    assert stats.system_calls["read"] >= 50
