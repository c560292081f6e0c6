#!/usr/bin/env python3
"""Two tunnel ends in one process, without root: sockets that the script opens stand in for the TUN devices.

    python examples/descriptors.py

A tunnel takes any descriptor that gives and takes one IP packet a call, and any UDP socket: so it can be
tested, or put between two simulated hosts, without touching the system.
"""

import socket
import struct

import fasttun


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def packet(source: str, destination: str, text: str) -> bytes:
    """An IPv4 packet of an experimental protocol (RFC 3692)."""
    payload = text.encode()
    header = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, 253, 0))
    header += socket.inet_aton(source) + socket.inet_aton(destination)
    header[10:12] = struct.pack("!H", checksum(bytes(header)))
    return bytes(header) + payload


def main() -> None:
    here, here_tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there, there_tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    port = udp.getsockname()[1]

    with here, here_tun, there, there_tun, udp, \
            fasttun.Forwarder(listen=True, tun_fd=there_tun.fileno(), udp_fd=udp.fileno()) as listener, \
            fasttun.Forwarder(server="127.0.0.1", port=port, tun_fd=here_tun.fileno()) as client:
        client.wait_peer(timeout=5)
        here.send(packet("10.7.0.2", "10.7.0.1", "ping"))
        print("there came:", there.recv(2048)[20:].decode())
        there.send(packet("10.7.0.1", "10.7.0.2", "pong"))
        print("here came:", here.recv(2048)[20:].decode())
        peer = listener.wait_peer(timeout=5)
        print(f"{peer.addresses[0]} is behind UDP port {peer.endpoint.port}")
    stats = client.stats()
    print(f"out {stats.outbound.packets_out}, in {stats.inbound.packets_out}, "
          f"dropped {stats.outbound.dropped + stats.inbound.dropped}")


if __name__ == "__main__":
    main()
