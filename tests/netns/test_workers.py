"""Several workers on one listener: packets of one flow keep their order, and every packet is counted once."""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time

import pytest
from support.netns import Lab, wait_until

from fasttun import Forwarder

pytestmark = pytest.mark.netns

CLIENTS = 3
FLOWS = 4
PACKETS = 4000


def test_flows_keep_their_order_and_the_counters_are_exact(lab: Lab) -> None:
    hub = lab.namespace("hub")
    ends = []
    for number in range(CLIENTS):
        host = lab.namespace(f"c{number}")
        ends.append((host, lab.link(hub, host).a.v4))
    with hub.enter():
        listener = Forwarder(listen=True, address="10.7.0.1/24", workers=2)
        listener.start()
    processes = []
    try:
        for number, (host, server) in enumerate(ends):
            processes.append(host.popen([sys.executable, "-m", "fasttun", "--server", server, "--workers", "2",
                                         "--address", f"10.7.0.{number + 2}/24"]))
        for number, (host, _) in enumerate(ends):
            wait_until(lambda: host.run(["ping", "-c1", "-W1", "10.7.0.1"], check=False).returncode == 0,  # noqa: B023
                       15, what=f"client {number}")
        assert len({worker.name for worker in threading.enumerate() if worker.name.startswith("fasttun-")}) >= 2
        with hub.enter():
            sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sink.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
            sink.bind(("10.7.0.1", 7000))
            sink.settimeout(3)
        last: dict[tuple[str, int], int] = {}
        disordered = []
        received = 0

        def receive() -> None:
            nonlocal received
            while True:
                try:
                    data, sender = sink.recvfrom(2048)
                except TimeoutError:
                    return
                (sequence,) = struct.unpack_from("!I", data)
                if sequence <= last.get(sender, -1):
                    disordered.append((sender, sequence, last[sender]))
                last[sender] = sequence
                received += 1

        thread = threading.Thread(target=receive)
        thread.start()
        for host, _ in ends:
            host.popen([sys.executable, "-c", SENDER, str(FLOWS), str(PACKETS)])
        thread.join(60)
        sink.close()
        assert not thread.is_alive()
        assert not disordered, disordered[:5]
        assert len(last) == CLIENTS * FLOWS
        assert received > CLIENTS * FLOWS * PACKETS / 2
        time.sleep(0.2)
        listener.stop()
        stats = listener.stats()
        assert stats.inbound.packets_in == stats.inbound.packets_out + stats.inbound.dropped
        assert stats.outbound.packets_in == stats.outbound.packets_out + stats.outbound.dropped
        assert sum(peer.inbound_packets for peer in stats.peers) == stats.inbound.packets_out + sum(
            stats.inbound.drops[name] for name in ("tun_down", "tun_full", "tun_refused"))
        assert stats.inbound.packets_out >= received
    finally:
        listener.stop()


SENDER = """
import socket, struct, sys
flows, packets = map(int, sys.argv[1:])
socks = []
for _ in range(flows):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect(("10.7.0.1", 7000))
    socks.append(s)
for sequence in range(packets):
    data = struct.pack("!I", sequence).ljust(64 + sequence % 3, b".")
    for s in socks:
        s.send(data)
"""
