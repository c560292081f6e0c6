"""Real TUN devices in namespaces of their own: made, attached to, configured, and put back exactly.

What is there is judged by the `ip` program, not by fasttun's own netlink code.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from support.netns import Lab, Namespace, assert_unchanged, snapshot, wait_until

from fasttun import device as device_module
from fasttun.device import TunDevice
from fasttun.errors import DeviceError, StateError

pytestmark = pytest.mark.netns

V4 = ip_interface("10.7.0.1/24")
V6 = ip_interface("fd07::1/64")
NOBODY = 65534


@pytest.fixture
def host(lab: Lab) -> Iterator[Namespace]:
    """One host without a network, the test's thread inside it."""
    ns = lab.namespace()
    with ns.enter():
        yield ns


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def link(ns: Namespace, name: str) -> dict[str, Any]:
    return ns.ip_json("address", "show", "dev", name)[0]


def addresses(ns: Namespace, name: str) -> set[str]:
    return {
        f"{entry['local']}/{entry['prefixlen']}" for entry in link(ns, name)["addr_info"] if entry["scope"] != "link"
    }


def routes(ns: Namespace, name: str) -> set[str]:
    found = ns.ip_json("-4", "route", "show", "dev", name) + ns.ip_json("-6", "route", "show", "dev", name)
    return {entry["dst"] for entry in found if not entry["dst"].startswith("fe80")}


def features(ns: Namespace) -> list[str]:
    """tun0's offloads as they are, without what was once requested."""
    lines = ns.run(["ethtool", "-k", "tun0"]).stdout.splitlines()
    return [line.partition("[")[0].strip() for line in lines]


def persistent(ns: Namespace, *options: str, up: bool = False) -> None:
    """tun0, made by hand. `up`: and used once, so that it has the link-local address that the first
    carrier brings, which stays when the carrier goes.
    """
    ns.ip("tuntap", "add", "dev", "tun0", "mode", "tun", *options)
    if up:
        ns.up("tun0")
        with open("/dev/net/tun", "rb+", buffering=0) as queue:
            flags = 0x1001 | (0x100 if "multi_queue" in options else 0)
            fcntl.ioctl(queue, device_module.TUNSETIFF, struct.pack("16sH22x", b"tun0", flags))
            wait_until(lambda: any(entry["scope"] == "link" for entry in link(ns, "tun0")["addr_info"]))
        wait_until(lambda: "NO-CARRIER" in link(ns, "tun0")["flags"])
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------------ created


def test_created_device_carries_packets_and_vanishes(host: Namespace) -> None:
    before, open_before = snapshot(host), descriptors()
    with TunDevice.open("tun0") as device:
        assert device.created
        assert device.index == socket.if_nametoindex("tun0")
        device.configure(addresses=[V4, V6], routes=[ip_network("10.8.0.0/16"), ip_network("fd08::/32")], mtu=1400)
        assert addresses(host, "tun0") == {"10.7.0.1/24", "fd07::1/64"}
        assert routes(host, "tun0") == {"10.7.0.0/24", "10.8.0.0/16", "fd07::/64", "fd08::/32"}
        assert link(host, "tun0")["mtu"] == device.mtu() == 1400
        (six,) = (entry for entry in link(host, "tun0")["addr_info"] if entry["local"] == "fd07::1")
        assert six["nodad"]
        assert {V4, V6} <= set(device.addresses())
        assert not device.needs_admin_to_close
        (fd,) = device.fds
        assert not os.get_blocking(fd)
        for target, version in (("10.8.1.2", 4), ("fd08::9", 6)):
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                # IPv6 in particular is usable at once: no duplicate address detection.
                sock.sendto(b"x" * 33, (target, 9))
            wait_until(lambda version=version: next_packet(fd)[0] >> 4 == version)
    assert_unchanged(host, before)
    assert descriptors() == open_before


def next_packet(fd: int) -> bytes:
    """The next packet with our port 9 in it, else one zero byte. Without packet information before it."""
    try:
        packet = os.read(fd, 65535)
    except BlockingIOError:
        return b"\0"
    header = 20 if packet[0] >> 4 == 4 else 40
    return packet if packet[header + 2 : header + 4] == b"\0\x09" else b"\0"


def test_a_created_device_closes_without_netlink_and_so_without_root(
    host: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = TunDevice.open("tun0", vnet_header=True)
    device.configure(addresses=[V4, V6], routes=[ip_network("10.8.0.0/16")], mtu=1400)

    def refused() -> Any:
        raise OSError(errno.EPERM, "not allowed any more")

    monkeypatch.setattr(device_module, "netlink", refused)
    assert not device.needs_admin_to_close
    device.close()
    assert not caplog.records
    assert host.devices() == {"lo"}


def test_name_pattern(host: Namespace) -> None:
    with TunDevice.open("ft%d") as first, TunDevice.open("ft%d") as second:
        assert (first.name, second.name) == ("ft0", "ft1")
        second.configure(addresses=[V4], mtu=None)
        assert addresses(host, "ft1") == {"10.7.0.1/24"}
        assert not addresses(host, "ft0")


def test_configure_can_leave_it_down(host: Namespace) -> None:
    with TunDevice.open("tun0") as device:
        device.configure(addresses=[V4], mtu=None, up=False)
        assert "UP" not in link(host, "tun0")["flags"]
        with pytest.raises(DeviceError) as caught:
            device.configure(routes=[ip_network("10.8.0.0/16")], mtu=None, up=False)
        assert caught.value.errno == errno.ENETDOWN
        assert "up first" in caught.value.hint


def test_what_is_asked_twice_is_added_once(host: Namespace) -> None:
    with TunDevice.open("tun0") as device:
        for _ in range(2):
            # The connected network is asked for as a route, too.
            device.configure(addresses=[V4, V4], routes=[V4.network, V4.network], mtu=1400)
        assert addresses(host, "tun0") == {"10.7.0.1/24"}
        assert routes(host, "tun0") == {"10.7.0.0/24"}


def test_multi_queue(host: Namespace) -> None:
    before = snapshot(host)
    with TunDevice.open("tun0", queues=3) as device:
        assert len(set(device.fds)) == 3
        data = link(host, "tun0")["linkinfo"]["info_data"]
        assert data["multi_queue"]
        assert data["numqueues"] == 3
        assert all(not os.get_blocking(fd) for fd in device.fds)
    assert_unchanged(host, before)


def test_queues_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="queues"):
        TunDevice.open("tun0", queues=0)


@pytest.mark.parametrize("wanted", [False, True])
def test_vnet_header(host: Namespace, wanted: bool) -> None:
    with TunDevice.open("tun0", vnet_header=wanted) as device:
        device.configure(addresses=[V4], mtu=None)
        assert device.vnet_header is wanted
        assert link(host, "tun0")["linkinfo"]["info_data"]["vnet_hdr"] is wanted
        assert {"csum", "tso4", "tso6", "ecn"} <= device.offloads if wanted else not device.offloads
        assert ("tcp-segmentation-offload: on" in features(host)) is wanted
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x" * 33, ("10.7.0.2", 9))
        offset = device_module.VNET_HEADER_LENGTH if wanted else 0
        lengths: list[int] = []

        def arrived() -> bool:
            try:
                frame = os.read(device.fds[0], 65535)
            except BlockingIOError:
                return False
            lengths.append(len(frame) if frame[offset] == 0x45 else 0)
            return 20 + 8 + 33 + offset in lengths

        wait_until(arrived)


def test_offloads_step_down_where_the_kernel_refuses(host: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.ioctl

    def older_kernel(fd: Any, request: int, *arguments: Any) -> Any:
        if request == device_module.TUNSETOFFLOAD and arguments[0] & 0x60:
            raise OSError(errno.EINVAL, "no USO")
        return real(fd, request, *arguments)

    monkeypatch.setattr(device_module.fcntl, "ioctl", older_kernel)
    with TunDevice.open("tun0", vnet_header=True) as device:
        assert device.offloads == {"csum", "tso4", "tso6", "ecn"}


def test_kernel_without_vnet_header_or_queues(host: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.ioctl

    def old_kernel(fd: Any, request: int, *arguments: Any) -> Any:
        if request == device_module.TUNGETFEATURES:
            return struct.pack("I", device_module.IFF_TUN | device_module.IFF_NO_PI)
        return real(fd, request, *arguments)

    monkeypatch.setattr(device_module.fcntl, "ioctl", old_kernel)
    with TunDevice.open("tun0", vnet_header=True) as device:
        assert not device.vnet_header
        assert device.offloads == frozenset()
    with pytest.raises(DeviceError, match="workers 1"):
        TunDevice.open("tun0", queues=2)
    assert host.devices() == {"lo"}


# ------------------------------------------------------------------------------------------------ attached


@pytest.mark.parametrize("vnet_header", [False, True])
@pytest.mark.parametrize("was_up", [False, True])
def test_attached_device_is_put_back_exactly(host: Namespace, was_up: bool, vnet_header: bool) -> None:
    persistent(host, up=was_up)
    host.ip("address", "add", "10.9.0.1/24", "dev", "tun0")
    host.ip("address", "add", "fd09::1/64", "dev", "tun0")
    if was_up:
        host.ip("route", "add", "10.10.0.0/16", "dev", "tun0", "metric", "7", "mtu", "1300")
        host.ip("route", "add", "fd0a::/32", "dev", "tun0", "table", "55")
    before, open_before = snapshot(host), descriptors()
    offloads = features(host)
    with TunDevice.open("tun0", vnet_header=vnet_header) as device:
        assert not device.created
        device.configure(
            addresses=[V4, V6, ip_interface("10.9.0.1/24")],
            routes=[ip_network("10.8.0.0/16"), ip_network("fd08::/32")],
            mtu=1400,
        )
        assert addresses(host, "tun0") == {"10.7.0.1/24", "fd07::1/64", "10.9.0.1/24", "fd09::1/64"}
        assert {"10.8.0.0/16", "fd08::/32"} <= routes(host, "tun0")
        assert device.needs_admin_to_close
        assert device.vnet_header is vnet_header
    assert_unchanged(host, before)
    assert descriptors() == open_before
    assert features(host) == offloads


def test_what_existed_already_stays(host: Namespace) -> None:
    persistent(host, up=True)
    host.ip("address", "add", str(V4), "dev", "tun0")
    host.ip("address", "add", str(V6), "dev", "tun0")
    host.ip("route", "add", "10.8.0.0/16", "dev", "tun0")
    before = snapshot(host)
    with TunDevice.open("tun0") as device:
        device.configure(addresses=[V4, V6], routes=[ip_network("10.8.0.0/16")], mtu=1500)
        assert not device.needs_admin_to_close
    assert_unchanged(host, before)


def test_an_mtu_that_turns_ipv6_off_is_put_back_with_its_addresses(host: Namespace) -> None:
    persistent(host, up=True)
    host.ip("address", "add", "fd09::1/64", "dev", "tun0")
    host.ip("route", "add", "fd0b::/64", "dev", "tun0")
    host.ip("route", "add", "fd0a::/32", "via", "fd09::2", "dev", "tun0", "metric", "77")
    before = snapshot(host)
    with TunDevice.open("tun0") as device:
        device.configure(addresses=[V4], mtu=900)
        assert not [entry for entry in link(host, "tun0")["addr_info"] if entry["family"] == "inet6"]
    assert_unchanged(host, before)


def test_packet_header_flags_of_an_attached_device_come_back(host: Namespace) -> None:
    persistent(host, "pi", "vnet_hdr")
    before = snapshot(host)
    assert link(host, "tun0")["linkinfo"]["info_data"]["pi"]
    with TunDevice.open("tun0") as device:
        data = link(host, "tun0")["linkinfo"]["info_data"]
        assert (data["pi"], data["vnet_hdr"], device.vnet_header) == (False, False, False)
    assert_unchanged(host, before)


def test_one_queue_of_a_multi_queue_device(host: Namespace) -> None:
    persistent(host, "multi_queue")
    before = snapshot(host)
    with TunDevice.open("tun0") as device:
        assert len(device.fds) == 1
        device.configure(addresses=[V4], mtu=None)
    with TunDevice.open("tun0", queues=2) as device:
        assert len(device.fds) == 2
    assert_unchanged(host, before)


def test_a_routed_host_keeps_its_way_when_attached_goes_down_again(lab: Lab) -> None:
    near, _, cable = lab.pair()
    persistent(near)
    near.ip("route", "add", "default", "via", cable.b.v4)
    before = snapshot(near)
    with near.enter():
        device = TunDevice.open("tun0")
        device.configure(addresses=[V4], routes=[ip_network("0.0.0.0/1")], mtu=1400)
    device.close()  # from outside: the changes are taken back in the namespace they were made in
    assert_unchanged(near, before)


AS_NOBODY = """
import os, sys
from fasttun.device import TunDevice
from fasttun.errors import DeviceError
from fasttun.netlink import netlink
with netlink() as warm:  # the interpreter's own files may be root's: import everything now
    warm.get_links()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    device = TunDevice.open("tun0", vnet_header={vnet_header})
    device.configure({arguments})
except DeviceError as error:
    print(error.errno, error)
else:
    print("open", device.created, device.needs_admin_to_close, device.mtu())
    device.close()
"""


def as_nobody(host: Namespace, arguments: str = "mtu=None", *, vnet_header: bool = False) -> str:
    code = AS_NOBODY.format(arguments=arguments, vnet_header=vnet_header)
    return host.python(code).stdout.strip()


@pytest.mark.parametrize("vnet_header", [False, True])
def test_an_ordinary_user_attaches_to_their_own_device(host: Namespace, vnet_header: bool) -> None:
    persistent(host, "user", str(NOBODY), up=True)
    host.ip("address", "add", str(V4), "dev", "tun0")
    before = snapshot(host)
    assert as_nobody(host, vnet_header=vnet_header) == "open False False 1500"
    assert as_nobody(host, "mtu=1500, addresses=['10.7.0.1/24']", vnet_header=vnet_header).startswith("open")
    assert_unchanged(host, before)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("mtu=1400", "ip link set tun0 mtu 1400"),
        ("mtu=None, addresses=['10.7.0.2/24']", "ip address add 10.7.0.2/24 dev tun0"),
        ("mtu=None, routes=['10.8.0.0/16']", "ip route add 10.8.0.0/16 dev tun0"),
    ],
)
def test_an_ordinary_user_is_told_what_needs_root(host: Namespace, arguments: str, command: str) -> None:
    persistent(host, "user", str(NOBODY), up=True)
    before = snapshot(host)
    said = as_nobody(host, arguments)
    assert said.startswith(f"{errno.EPERM} ")
    assert command in said
    assert_unchanged(host, before)


def test_an_ordinary_user_cannot_bring_it_up(host: Namespace) -> None:
    persistent(host, "user", str(NOBODY))
    assert "ip link set tun0 up" in as_nobody(host)


@pytest.mark.parametrize("owner", [None, "1234"])
def test_an_ordinary_user_without_a_device_is_told_how_to_get_one(host: Namespace, owner: str | None) -> None:
    if owner is not None:
        persistent(host, "user", owner)
    before = snapshot(host)
    said = as_nobody(host)
    assert said.startswith(f"{errno.EPERM} ")
    assert "ip tuntap add dev tun0 mode tun user $USER" in said
    assert_unchanged(host, before)


# ------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("attached", [False, True])
def test_half_way_failure_undoes_the_first_half(host: Namespace, attached: bool) -> None:
    other = TunDevice.open("other0")
    other.configure(addresses=[ip_interface("10.20.0.1/24")], mtu=None)
    if attached:
        persistent(host)
    device = TunDevice.open("tun0")
    before = snapshot(host)
    with pytest.raises(DeviceError) as caught:
        device.configure(
            addresses=[V4, V6],
            routes=[ip_network("10.8.0.0/16"), ip_network("fd08::/32"), ip_network("10.20.0.0/24")],
            mtu=1400,
        )
    assert caught.value.errno == errno.EEXIST
    assert "other0" in caught.value.hint
    assert_unchanged(host, before)
    # Nothing is spoilt: a configuration that works still does.
    device.configure(addresses=[V4], mtu=1400)
    assert addresses(host, "tun0") == {"10.7.0.1/24"}
    device.close()
    other.close()


def test_a_second_configuration_that_fails_leaves_the_first(host: Namespace) -> None:
    with TunDevice.open("tun0") as device:
        device.configure(addresses=[V4], mtu=1400)
        with pytest.raises(DeviceError):
            device.configure(addresses=[V6], mtu=1)
        assert addresses(host, "tun0") == {"10.7.0.1/24"}
        assert device.mtu() == 1400


def test_default_route_clash_suggests_the_halves(lab: Lab) -> None:
    near, _, cable = lab.pair()
    near.ip("route", "add", "default", "via", cable.b.v4)
    with near.enter(), TunDevice.open("tun0") as device:
        with pytest.raises(DeviceError) as caught:
            device.configure(addresses=[V4], routes=[ip_network("0.0.0.0/0")], mtu=None)
        assert "0.0.0.0/1 and 128.0.0.0/1" in caught.value.hint
        assert cable.a.device in caught.value.hint
        device.configure(addresses=[V4], routes=[ip_network("0.0.0.0/1"), ip_network("128.0.0.0/1")], mtu=None)


@pytest.mark.parametrize(("mtu", "item"), [(1279, V6), (600, ip_network("fd08::/32"))])
def test_ipv6_below_1280_is_refused_before_any_change(host: Namespace, mtu: int, item: Any) -> None:
    with TunDevice.open("tun0") as device:
        before = snapshot(host)
        wanted = {"addresses": [item]} if item is V6 else {"routes": [item]}
        with pytest.raises(DeviceError, match="1280") as caught:
            device.configure(**wanted, mtu=mtu)
        assert caught.value.errno == errno.EINVAL
        assert_unchanged(host, before)
        device.configure(addresses=[V6], mtu=1280)


def test_ipv6_that_is_switched_off_is_named(host: Namespace) -> None:
    host.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
    with TunDevice.open("tun0") as device, pytest.raises(DeviceError, match="disable_ipv6=0"):
        device.configure(addresses=[V6], mtu=None)


@pytest.mark.parametrize("mtu", [67, 65536])
def test_impossible_mtu(host: Namespace, mtu: int) -> None:
    with TunDevice.open("tun0") as device, pytest.raises(DeviceError, match="68 to 65535"):
        device.configure(addresses=[V4], mtu=mtu)


def test_the_same_address_with_another_prefix(host: Namespace) -> None:
    with TunDevice.open("tun0") as device:
        device.configure(addresses=[V6], mtu=None)
        with pytest.raises(DeviceError, match="another prefix length"):
            device.configure(addresses=[ip_interface("fd07::1/48")], mtu=None)


@pytest.mark.parametrize("options", [(), ("multi_queue",)])
def test_a_device_in_use_is_busy(host: Namespace, options: tuple[str, ...]) -> None:
    persistent(host, *options)
    with TunDevice.open("tun0"), pytest.raises(DeviceError, match="--device tun1") as caught:
        TunDevice.open("tun0")
    assert caught.value.errno == errno.EBUSY
    TunDevice.open("tun0").close()


def test_a_created_device_in_use_is_busy(host: Namespace) -> None:
    open_before = descriptors()
    with TunDevice.open("tun9", queues=2), pytest.raises(DeviceError, match="--device tun10"):
        TunDevice.open("tun9", queues=2)
    assert descriptors() == open_before


def test_other_kinds_of_device_are_refused(lab: Lab) -> None:
    near, _, cable = lab.pair()
    near.ip("tuntap", "add", "dev", "tap0", "mode", "tap")
    before = snapshot(near)
    with near.enter():
        for name, kind in ((cable.a.device, "veth"), ("tap0", "tap"), ("lo", "hardware")):
            with pytest.raises(DeviceError, match=kind) as caught:
                TunDevice.open(name)
            assert caught.value.errno == errno.EINVAL
    assert_unchanged(near, before)


def test_more_queues_than_the_device_has(host: Namespace) -> None:
    persistent(host)
    with pytest.raises(DeviceError, match="multi_queue") as caught:
        TunDevice.open("tun0", queues=2)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("path", "hint"), [("/dev/net/no-such-device", "modprobe tun"), ("/dev/net", "")], ids=["missing", "other"]
)
def test_no_clone_device(monkeypatch: pytest.MonkeyPatch, path: str, hint: str) -> None:
    monkeypatch.setattr(device_module, "CLONE_DEVICE", path)
    with pytest.raises(DeviceError) as caught:
        TunDevice.open("tun0")
    assert path in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize("attached", [False, True])
def test_deleted_from_outside(host: Namespace, attached: bool, caplog: pytest.LogCaptureFixture) -> None:
    open_before = descriptors()
    if attached:
        persistent(host)
    device = TunDevice.open("tun0", vnet_header=True)
    device.configure(addresses=[V4, V6], routes=[ip_network("10.8.0.0/16")], mtu=1400)
    host.ip("link", "delete", "tun0")
    with pytest.raises(DeviceError) as caught:
        device.mtu()
    assert caught.value.errno == errno.ENODEV
    assert device.addresses() == ()
    device.close()
    assert host.devices() == {"lo"}
    assert descriptors() == open_before
    assert not caplog.records


def test_a_successor_of_the_same_name_is_left_alone(host: Namespace) -> None:
    persistent(host)
    device = TunDevice.open("tun0")
    device.configure(addresses=[V4], mtu=1400)
    host.ip("link", "delete", "tun0")
    persistent(host)
    host.ip("link", "set", "tun0", "mtu", "1400", "up")
    host.ip("address", "add", str(V4), "dev", "tun0")
    before = snapshot(host)
    device.close()
    assert_unchanged(host, before)


def test_what_someone_else_took_back_is_no_error(host: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    persistent(host)
    before = snapshot(host)
    device = TunDevice.open("tun0")
    device.configure(addresses=[V4, V6], routes=[ip_network("10.8.0.0/16")], mtu=1400)
    host.down("tun0")
    host.ip("address", "flush", "dev", "tun0")
    device.close()
    assert_unchanged(host, before)
    assert not caplog.records


def test_after_kill_the_next_start_works(host: Namespace) -> None:
    code = (
        "from fasttun.device import TunDevice\n"
        "device = TunDevice.open('tun0')\n"
        "device.configure(addresses=['10.7.0.1/24'], routes=['10.8.0.0/16'], mtu=1400)\n"
        "print('ready', flush=True)\n"
        "input()\n"
    )
    before = snapshot(host)
    process = host.popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    assert_unchanged(host, before)
    with TunDevice.open("tun0") as device:
        device.configure(addresses=[V4], mtu=None)


# ------------------------------------------------------------------------------------------------ pinning


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("version", [4, 6])
def test_pinned_route_keeps_the_server_outside(lab: Lab, version: int, order: str) -> None:
    client, _, _, near, far = lab.routed()
    server = ip_address(far.b.v4 if version == 4 else far.b.v6)
    halves = ("0.0.0.0/1", "128.0.0.0/1") if version == 4 else ("::/1", "8000::/1")
    before = snapshot(client)
    with client.enter(), TunDevice.open("tun0") as device:
        if order == "before":
            device.pin_route(server)
            assert device.needs_admin_to_close
        device.configure(addresses=[V4, V6], routes=[ip_network(half) for half in halves], mtu=1400)
        if order == "after":
            device.pin_route(server)
        device.pin_route(server)  # a second time is no error
        client.run(["ping", "-c1", "-W2", str(server)])
        way = client.ip_json("route", "get", str(server))[0]
        assert way["dev"] == near.a.device
        assert way["gateway"] == (near.b.v4 if version == 4 else near.b.v6)
        other = client.ip_json("route", "get", "198.51.100.9" if version == 4 else "2001:db8::9")[0]
        assert other["dev"] == "tun0"
    assert_unchanged(client, before)


def test_pinned_route_takes_the_best_way_outside(lab: Lab) -> None:
    """Asked for when the tunnel's route is in place already, as for a server whose name moved."""
    near, far = lab.namespace(), lab.namespace()
    cables = [lab.link(near, far) for _ in range(4)]
    for cable, network, metric in zip(
        cables,
        ("0.0.0.0/0", "198.51.100.0/24", "198.51.100.0/24", "198.51.100.128/25"),
        ("1", "500", "400", "1"),
        strict=True,
    ):
        near.ip("route", "add", network, "via", cable.b.v4, "metric", metric)
    before = snapshot(near)
    with near.enter(), TunDevice.open("tun0") as device:
        device.configure(addresses=[V4], routes=[ip_network("198.51.100.0/26")], mtu=None)
        device.pin_route(ip_address("198.51.100.7"))
        assert near.ip_json("route", "get", "198.51.100.7")[0]["gateway"] == cables[2].b.v4
    assert_unchanged(near, before)


def test_pinned_route_by_a_gateway_outside_every_network(lab: Lab) -> None:
    near, _, cable = lab.pair()
    near.ip("route", "add", "default", "via", "172.31.1.1", "dev", cable.a.device, "onlink")
    near.ip("route", "add", "2001:db8::/32", "via", "fd55::1", "dev", cable.a.device, "onlink")
    before = snapshot(near)
    with near.enter(), TunDevice.open("tun0") as device:
        device.pin_route(ip_address("198.51.100.7"))
        device.pin_route(ip_address("2001:db8::7"))
        device.configure(addresses=[V4], routes=[ip_network("0.0.0.0/1"), ip_network("128.0.0.0/1")], mtu=None)
        assert near.ip_json("route", "get", "198.51.100.7")[0]["gateway"] == "172.31.1.1"
        assert near.ip_json("route", "get", "2001:db8::7")[0]["gateway"] == "fd55::1"
    assert_unchanged(near, before)


def test_pinned_route_to_a_neighbour(lab: Lab) -> None:
    near, _, cable = lab.pair()
    before = snapshot(near)
    with near.enter(), TunDevice.open("tun0") as device:
        # Longer than the cable's own network, so it wins over it.
        device.configure(addresses=[V4], routes=[ip_network("10.99.0.0/28")], mtu=None)
        device.pin_route(ip_address(cable.b.v4))
        device.pin_route(ip_address(cable.b.v6))
        near.run(["ping", "-c1", "-W2", cable.b.v4])
        near.run(["ping", "-c1", "-W2", cable.b.v6])
    assert_unchanged(near, before)


def test_the_users_own_host_route_stays(lab: Lab) -> None:
    client, _, _, near, far = lab.routed()
    client.ip("route", "add", f"{far.b.v4}/32", "via", near.b.v4)
    before = snapshot(client)
    with client.enter(), TunDevice.open("tun0") as device:
        device.pin_route(ip_address(far.b.v4))
        assert not device.needs_admin_to_close
    assert_unchanged(client, before)


def test_pinning_this_machine_does_nothing(host: Namespace) -> None:
    before = snapshot(host)
    with TunDevice.open("tun0") as device:
        device.pin_route(ip_address("127.0.0.1"))
        device.pin_route(ip_address("::1"))
        assert not device.needs_admin_to_close
    assert_unchanged(host, before)


def test_pinning_without_a_way_out(host: Namespace) -> None:
    with TunDevice.open("tun0") as device:
        with pytest.raises(DeviceError) as caught:
            device.pin_route(ip_address("198.51.100.7"))
        assert caught.value.errno == errno.ENETUNREACH
        device.configure(addresses=[V4], routes=[ip_network("0.0.0.0/0")], mtu=None)
        with pytest.raises(DeviceError, match="into tun0 itself"):
            device.pin_route(ip_address("198.51.100.7"))


def test_pinned_route_goes_even_when_the_device_was_deleted(lab: Lab) -> None:
    client, _, _, _, far = lab.routed()
    before = snapshot(client)
    with client.enter(), TunDevice.open("tun0") as device:
        device.pin_route(ip_address(far.b.v4))
        client.ip("link", "delete", "tun0")
    assert_unchanged(client, before)


# ------------------------------------------------------------------------------------------------ life cycle


def test_closed_is_closed(host: Namespace) -> None:
    device = TunDevice.open("tun0")
    device.close()
    device.close()
    calls: list[Callable[[], object]] = [
        device.mtu,
        device.addresses,
        lambda: device.configure(mtu=None),
        lambda: device.pin_route(ip_address("127.0.0.1")),
    ]
    for call in calls:
        with pytest.raises(StateError):
            call()


def test_works_in_threads_and_inside_an_event_loop_and_leaks_nothing(host: Namespace) -> None:
    before = snapshot(host)

    def cycle() -> None:
        with TunDevice.open("tun0") as device:
            device.configure(addresses=[V4, V6], routes=[ip_network("10.8.0.0/16")], mtu=1400)
            assert V4 in device.addresses()
            assert device.mtu() == 1400

    def in_thread() -> None:
        thread = threading.Thread(target=cycle)
        thread.start()
        thread.join()

    async def in_loop() -> None:
        cycle()
        await asyncio.to_thread(cycle)

    def every_way() -> None:
        cycle()
        in_thread()
        asyncio.run(in_loop())

    every_way()
    gc.collect()
    open_before, threads_before = descriptors(), threading.active_count()
    for _ in range(3):
        every_way()
    gc.collect()  # an unclosed socket or loop would warn here, and a warning is an error
    assert descriptors() == open_before
    assert threading.active_count() == threads_before
    assert_unchanged(host, before)


def test_setting_up_is_quick(host: Namespace) -> None:
    """Far below a second, so that a tunnel's start is not felt; usual are 30 ms."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with TunDevice.open("tun0") as device:
            device.configure(addresses=[V4, V6], routes=[ip_network("10.8.0.0/16")], mtu=1400)
            best = min(best, time.perf_counter() - start)
    assert best < 0.5
