"""The kernel as the judge of split and join: a TUN device with all offloads, and nothing but the helpers behind it.

Not for the engine: a few lines of Python read a frame, split it, join the packets and write them back.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from support import flows, netns, twins
from support.twins import UDP, Packet

from fasttun import _testing

pytestmark = pytest.mark.netns

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x1, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO, TUN_F_USO = 0x01, 0x02 | 0x04 | 0x08, 0x20 | 0x40
SOL_UDP, UDP_SEGMENT = 17, 103
V4, V6 = ("10.7.0.2", "10.7.0.1"), ("fd07::2", "fd07::1")


@contextmanager
def tun(lab: netns.Lab) -> Iterator[tuple[int, bool]]:
    """A configured device, in whose namespace the caller then is: its descriptor, and whether USO is on."""
    host = lab.namespace("judge")
    with host.enter():
        fd = os.open("/dev/net/tun", os.O_RDWR)
        try:
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"ftjudge", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
            uso = True
            try:
                fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO | TUN_F_USO)
            except OSError:
                uso = False
                fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO)
            host.ip("link", "set", "ftjudge", "up", "mtu", "1500")
            host.ip("addr", "add", f"{V4[0]}/24", "dev", "ftjudge")
            host.ip("addr", "add", f"{V6[0]}/64", "dev", "ftjudge", "nodad")
            yield fd, uso
        finally:
            os.close(fd)


def family_of(addresses: tuple[str, str]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET


@pytest.mark.parametrize("addresses", [V4, V6])
@pytest.mark.parametrize(("size", "count"), [(100, 64), (1000, 60), (1400, 30), (1, 5)])
def test_kernel_takes_joined_udp(lab: netns.Lab, addresses: tuple[str, str], size: int, count: int) -> None:
    with tun(lab) as (fd, uso), socket.socket(family_of(addresses), socket.SOCK_DGRAM) as receiver:
        if not uso:
            return  # a kernel below 6.2: the engine does not join UDP there either
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        receiver.bind((addresses[0], 5201))
        receiver.settimeout(2)
        us, peer = (socket.inet_pton(family_of(addresses), address) for address in addresses)
        head = Packet(version=4 if addresses is V4 else 6, protocol=UDP, source=peer, destination=us)
        packets = [
            replace(
                head,
                identification=index,
                payload=flows.contents(size if index < count - 1 else (size + 1) // 2, 4 * index + 1),
            )
            for index in range(count)
        ]
        ((header, frame),) = _testing.join([packet.build() for packet in packets])
        os.write(fd, header + frame)
        assert [receiver.recv(65535) for _ in packets] == [packet.payload for packet in packets]


@pytest.mark.parametrize("addresses", [V4, V6])
@pytest.mark.parametrize("size", [1, 1000, 1400])
def test_kernels_udp_frames_are_split(lab: netns.Lab, addresses: tuple[str, str], size: int) -> None:
    with tun(lab) as (fd, uso), socket.socket(family_of(addresses), socket.SOCK_DGRAM) as sender:
        sender.setsockopt(SOL_UDP, UDP_SEGMENT, size)
        data = flows.contents(size * 20 + size // 3, 9)
        sender.sendto(data, (addresses[1], 9))
        received: list[twins.Packet] = []
        while sum(len(packet.payload) for packet in received) < len(data):
            assert select.select([fd], [], [], 2)[0]
            read = os.read(fd, 70000)
            if (read[19] if read[10] >> 4 == 4 else read[16]) != UDP:
                continue
            assert not uso or read[1] == twins.GSO_UDP_L4
            for packet in _testing.split(read[:10], read[10:], 1500):
                assert twins.checksums_hold(packet)
                received.append(twins.parse(packet))
        assert b"".join(packet.payload for packet in received) == data
        assert {len(packet.payload) for packet in received[:-1]} == {size}


def reflected(packet: bytes) -> bytes:
    """Source and destination exchanged, which leaves every checksum as it is."""
    if packet[0] >> 4 == 4:
        return packet[:12] + packet[16:20] + packet[12:16] + packet[20:]
    return packet[:8] + packet[24:40] + packet[8:24] + packet[40:]


def reflect(fd: int, stop: threading.Event, joined: list[int], errors: list[BaseException]) -> None:
    try:
        while not stop.is_set():
            if not select.select([fd], [], [], 0.05)[0]:
                continue
            read = os.read(fd, 70000)
            packets = [reflected(packet) for packet in _testing.split(read[:10], read[10:], 1500)]
            for header, frame in _testing.join(packets):
                joined.append(len(frame))
                os.write(fd, header + frame)
    except BaseException as error:  # reported by the test
        errors.append(error)


@pytest.mark.parametrize("addresses", [V4, V6])
def test_tcp_crosses_split_and_join(lab: netns.Lab, addresses: tuple[str, str]) -> None:
    """The host talks to itself through a mirror behind the TUN: the kernel's frames, split, joined, given back."""
    data = flows.contents(20_000_000, 5)
    digests: list[bytes] = []
    joined: list[int] = []
    errors: list[BaseException] = []
    stop = threading.Event()

    def receive(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            digest = hashlib.sha256()
            while part := connection.recv(1 << 18):
                digest.update(part)
            digests.append(digest.digest())

    with tun(lab) as (fd, _):
        mirror = threading.Thread(target=reflect, args=(fd, stop, joined, errors))
        mirror.start()
        try:
            with socket.create_server((addresses[0], 7000), family=family_of(addresses)) as listener:
                receiver = threading.Thread(target=receive, args=(listener,), daemon=True)
                receiver.start()
                with socket.create_connection((addresses[1], 7000), timeout=10) as connection:
                    connection.sendall(data)
                receiver.join(20)
        finally:
            stop.set()
            mirror.join(5)
    assert not errors
    assert digests == [hashlib.sha256(data).digest()]
    assert max(joined) > 30_000
