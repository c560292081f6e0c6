"""A file by TCP from one host to another, with hashes on both sides."""

from __future__ import annotations

import hashlib
import random
import socket
import threading

from .netns import Namespace

__all__ = ["SIZE", "transfer"]

SIZE = 24 << 20


def transfer(sender: Namespace, receiver: Namespace, host: str, size: int = SIZE) -> None:
    """TCP through the tunnel; both sides' hashes must agree."""
    data = random.Random(size).randbytes(4096 + 7) * (size // 4096)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with receiver.enter():
        server = socket.socket(family, socket.SOCK_STREAM)
        server.bind((host, 5201))
        server.listen(1)
    got = hashlib.sha256()

    def receive() -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(60)
            while chunk := connection.recv(1 << 20):
                got.update(chunk)

    thread = threading.Thread(target=receive)
    thread.start()
    with sender.enter():
        client = socket.socket(family, socket.SOCK_STREAM)
    with client, server:
        client.settimeout(60)
        client.connect((host, 5201))
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        thread.join(60)
    assert not thread.is_alive()
    assert got.hexdigest() == hashlib.sha256(data).hexdigest()
