"""A loop that ends while others configure it: neither may wait for the other for ever."""

from __future__ import annotations

import socket
import threading
import time

from fasttun._core import Engine, SessionTable


def test_an_engine_ends_while_its_table_is_busy() -> None:
    table = SessionTable(family=int(socket.AF_INET))
    number = table.add_peer()
    done = threading.Event()

    def hammer() -> None:
        while not done.is_set():
            table.peer_counters(number)
            table.drop_queue(number)

    hammers = [threading.Thread(target=hammer, daemon=True) for _ in range(3)]
    for thread in hammers:
        thread.start()
    try:
        for _ in range(200):
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with near, far, udp:
                near.setblocking(False)
                engine = Engine(table, tun_fd=near.fileno(), udp_fd=udp.fileno())
                running = threading.Thread(target=engine.run, daemon=True)
                running.start()
                time.sleep(0)
                engine.stop()
                running.join(10)
                assert not running.is_alive(), "the loop and a caller wait for each other"
    finally:
        done.set()
