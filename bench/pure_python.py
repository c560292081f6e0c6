#!/usr/bin/env python3
"""The baseline: a TUN-to-UDP tunnel in pure Python that behaves as lametun, a 130-line tunnel in Go, does.

It is what fasttun is measured against and interoperates with, and it is meant for nothing else: whoever sends
it one datagram becomes its peer, one bad packet ends it, and what it carries is in clear text.

    pure_python.py -listen                        the side with the known address
    pure_python.py -server 198.51.100.7           the other one
    ip addr add 10.7.0.1/24 dev tun0 && ip link set tun0 mtu 1468 up     on both, by hand, as for lametun

As with lametun: the device has packet information, so each datagram is 4 bytes of flags and EtherType, then
the IP packet; the socket is IPv4 and is bound to the port on both sides; the peer is the server that was
named, and after that always the last sender of any datagram; packets before a peer is known are dropped;
any error of a read or a write is printed and ends the program (with status 0). Unlike lametun it prints a
line for each packet only with --verbose.

One file, standard library only. The two loops take plain descriptors, so they run without root over a
socketpair in place of the device.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence

BUFFER_BYTES = 2048  # lametun's; a longer packet is cut off

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TUN = 0x0001
_IFREQ_BYTES = 40


class Peer:
    """Where packets go: the last sender of any datagram, None before the first. Shared by the two loops."""

    __slots__ = ("address",)

    def __init__(self, address: tuple[str, int] | None = None) -> None:
        self.address = address


def open_tun(name: str) -> int:
    """Descriptor of the TUN device `name`, created if need be, with packet information. OSError."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH", os.fsencode(name), _IFF_TUN).ljust(_IFREQ_BYTES, b"\0")
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def udp_to_tun(sock: socket.socket, tun_fd: int, peer: Peer, verbose: bool = False) -> None:
    """Inbound loop: each datagram is one write to `tun_fd`, its sender is the new peer. Ends by OSError."""
    buffer = bytearray(BUFFER_BYTES)
    view = memoryview(buffer)
    receive, write = sock.recvfrom_into, os.write
    while True:
        length, peer.address = receive(buffer)
        if verbose:
            print(f"Writing {length} bytes to the tun device.", flush=True)
        write(tun_fd, view[:length])


def tun_to_udp(tun_fd: int, sock: socket.socket, peer: Peer, verbose: bool = False) -> None:
    """Outbound loop: each packet is one datagram to the peer. Ends by OSError, or EOFError."""
    buffer = bytearray(BUFFER_BYTES)
    buffers = [buffer]
    view = memoryview(buffer)
    read, send = os.readv, sock.sendto
    while True:
        length = read(tun_fd, buffers)
        if length == 0:
            raise EOFError("end of input")
        if verbose:
            print(f"Read {length} bytes from the tun device.", flush=True)
        address = peer.address
        if address is None:
            if verbose:
                print("UDP connection to server has not been established yet.", flush=True)
            continue
        send(view[:length], address)


def forward(tun_fd: int, sock: socket.socket, peer: Peer, verbose: bool = False) -> None:
    """Both loops, a thread each; returns when the first has ended, its error printed."""
    ended = threading.Event()

    def end_with(direction: str, loop: Callable[[], None]) -> None:
        try:
            loop()
        except (OSError, EOFError) as error:
            print(f"error {direction}: {error}", file=sys.stderr, flush=True)
        finally:
            ended.set()

    for direction, loop in (
        ("from UDP to the tun device", lambda: udp_to_tun(sock, tun_fd, peer, verbose)),
        ("from the tun device to UDP", lambda: tun_to_udp(tun_fd, sock, peer, verbose)),
    ):
        threading.Thread(target=end_with, args=(direction, loop), daemon=True).start()
    ended.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A tunnel as lametun's, in pure Python.", allow_abbrev=False)
    parser.add_argument("-listen", "--listen", action="store_true", help="this machine is the server")
    parser.add_argument("-server", "--server", default="", metavar="HOST", help="the server to connect to")
    parser.add_argument("-port", "--port", type=int, default=1234, help="the UDP port, on both sides")
    parser.add_argument("-device", "--device", default="tun0", help="the TUN device's name")
    speech = parser.add_mutually_exclusive_group()
    speech.add_argument("-verbose", "--verbose", action="store_true", help="a line for each packet")
    speech.add_argument("-quiet", "--quiet", action="store_true", help="no line for each packet (default)")
    given = parser.parse_args(arguments)

    listening = "true" if given.listen else "false"
    print(f"listen:{listening} server:{given.server} dev:{given.device} port:{given.port}", flush=True)
    if given.listen and given.server:
        print("Cannot listen and set server flag", file=sys.stderr)
        return 1
    if not given.listen and not given.server:
        print("You must specify the server or mark this host to listen", file=sys.stderr)
        return 1

    try:
        tun_fd = open_tun(given.device)
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", given.port))
        peer = Peer((socket.gethostbyname(given.server), given.port) if given.server else None)
    except (OSError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        forward(tun_fd, sock, peer, given.verbose)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    os._exit(main())  # a loop's thread may still be inside a read, or hold the lock of stdout
