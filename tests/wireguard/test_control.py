"""The control socket: its file, hostile and slow clients, and the real `wg` at the other end."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from support.fake_device import FakeDevice, peer
from support.netns import wait_until

from fasttun.endpoint import Endpoint
from fasttun.errors import ConfigurationError, DeviceError, EndpointError, StateError
from fasttun.wireguard.control import MAX_CLIENTS, ControlSocket
from fasttun.wireguard.keys import PresharedKey, PrivateKey, PublicKey

OK = b"errno=0\n\n"
PATIENCE_S = 0.3


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "wireguard"


@pytest.fixture
def control(device: FakeDevice, directory: Path) -> Iterator[ControlSocket]:
    with ControlSocket(device, "wg0", directory=str(directory), patience_s=PATIENCE_S) as control:
        yield control


def connect(control: ControlSocket) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(control.path)
    sock.settimeout(5)
    return sock


def answered(sock: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n\n"):
        piece = sock.recv(65536)
        assert piece, f"ended after {data!r}"
        data += piece
    return data


def ask(control: ControlSocket, request: bytes) -> bytes:
    with connect(control) as sock:
        sock.sendall(request)
        return answered(sock)


def ended(sock: socket.socket) -> bool:
    """Whether the other side has closed, after whatever it still said."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


# ------------------------------------------------------------------------------------------- the file


def test_its_file_is_its_owners_alone_and_goes_with_it(device: FakeDevice, directory: Path) -> None:
    before = os.umask(0)
    try:
        with ControlSocket(device, "wg0", directory=str(directory)) as control:
            assert control.path == str(directory / "wg0.sock")
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            status = os.stat(control.path)
            assert stat.S_ISSOCK(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o600
    finally:
        os.umask(before)
    assert list(directory.iterdir()) == []
    control.close()


def test_what_a_dead_process_left_is_replaced(device: FakeDevice, directory: Path) -> None:
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(directory / "wg0.sock"))
    with ControlSocket(device, "wg0", directory=str(directory)) as control:
        assert ask(control, b"get=1\n\n") == OK


def test_a_living_one_is_not_replaced(control: ControlSocket, device: FakeDevice, directory: Path) -> None:
    with pytest.raises(DeviceError, match=r"wg0\.sock.*serves wg0") as caught:
        ControlSocket(FakeDevice(), "wg0", directory=str(directory)).open()
    assert caught.value.errno == errno.EADDRINUSE
    assert ask(control, b"get=1\n\n") == OK


def test_a_living_one_that_has_no_time_is_not_replaced(directory: Path) -> None:
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as other, contextlib.ExitStack() as stack:
        other.bind(str(directory / "wg0.sock"))
        other.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(5):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(directory / "wg0.sock"))
        with pytest.raises(DeviceError):
            ControlSocket(FakeDevice(), "wg0", directory=str(directory)).open()


def test_a_file_that_is_no_socket_is_left_alone(device: FakeDevice, directory: Path) -> None:
    directory.mkdir()
    (directory / "wg0.sock").write_text("precious")
    with pytest.raises(DeviceError, match="no socket") as caught:
        ControlSocket(device, "wg0", directory=str(directory)).open()
    assert caught.value.errno == errno.EEXIST
    assert (directory / "wg0.sock").read_text() == "precious"


def test_another_process_of_the_same_name_keeps_its_file(device: FakeDevice, directory: Path) -> None:
    first = ControlSocket(device, "wg0", directory=str(directory))
    first.open()
    os.unlink(first.path)
    with ControlSocket(device, "wg0", directory=str(directory)) as second:
        first.close()
        assert ask(second, b"get=1\n\n") == OK


@pytest.mark.parametrize("_", range(8))
def test_of_those_that_start_at_once_one_gets_it(device: FakeDevice, directory: Path, _: int) -> None:
    opened: list[ControlSocket] = []
    refused: list[DeviceError] = []

    def start() -> None:
        control = ControlSocket(device, "wg0", directory=str(directory))
        try:
            control.open()
        except DeviceError as error:
            refused.append(error)
        else:
            opened.append(control)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for control in opened:
        control.close()
    assert (len(opened), len(refused)) == (1, 3)


def test_its_removal_is_told_once_and_ends_the_listening(device: FakeDevice, directory: Path) -> None:
    told: list[str] = []
    with ControlSocket(device, "wg0", directory=str(directory), on_removed=lambda: told.append("gone")) as control:
        (directory / "other").touch()
        (directory / "other").unlink()
        with connect(control) as sock:
            time.sleep(0.05)
            assert told == []
            os.unlink(control.path)
            wait_until(lambda: told, what="on_removed")
            sock.sendall(b"get=1\n\n")
            assert answered(sock) == OK, "who was there is still served"
        (directory / "wg0.sock").touch()
        (directory / "wg0.sock").unlink()
        time.sleep(0.05)
    assert told == ["gone"]


def test_the_directorys_removal_counts_too(device: FakeDevice, directory: Path) -> None:
    told = threading.Event()
    with ControlSocket(device, "wg0", directory=str(directory), on_removed=told.set):
        shutil.rmtree(directory)
        assert told.wait(3)


def test_a_descriptor_that_is_handed_over(device: FakeDevice, directory: Path) -> None:
    directory.mkdir()
    path = str(directory / "given.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = os.dup(listener.fileno())
    with ControlSocket(device, "wg0", directory="/nonexistent", listen_fd=fd) as control:
        assert control.path == path
        assert ask(control, b"get=1\n\n") == OK
    assert not os.path.exists(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_descriptor_that_is_no_listening_socket(device: FakeDevice, directory: Path) -> None:
    a, b = socket.socketpair()
    with a, b, open(os.devnull) as null:
        for fd in (a.fileno(), null.fileno(), 999):
            with pytest.raises(DeviceError):
                ControlSocket(device, "wg0", directory=str(directory), listen_fd=fd).open()
        os.fstat(a.fileno())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "wg 0", "x" * 16, "a\0"])
def test_names_that_are_none(device: FakeDevice, name: str) -> None:
    with pytest.raises(ConfigurationError, match="name"):
        ControlSocket(device, name)


def test_a_directory_that_is_too_long_for_a_socket(device: FakeDevice, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="shorter"):
        ControlSocket(device, "wg0", directory=str(tmp_path / ("d" * 100))).open()


def test_its_life_cycle(device: FakeDevice, directory: Path) -> None:
    control = ControlSocket(device, "wg0", directory=str(directory))
    control.close()
    with pytest.raises(StateError):
        control.open()
    control = ControlSocket(device, "wg0", directory=str(directory))
    with pytest.raises(StateError):
        control.start()
    control.open()
    with connect(control) as sock:
        sock.sendall(b"get=1\n\n")
        control.start()
        assert answered(sock) == OK, "it has waited"
    with pytest.raises(StateError):
        control.start()
    descriptors = len(os.listdir("/proc/self/fd"))
    control.close()
    control.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors - 3


# ---------------------------------------------------------------------------------------- its clients


def test_many_transactions_on_one_connection(control: ControlSocket, device: FakeDevice) -> None:
    with connect(control) as sock:
        for number in range(1, 50):
            sock.sendall(b"set=1\nfwmark=%d\n\n" % number)
            assert answered(sock) == OK
            sock.sendall(b"get=1\n\n")
            assert answered(sock) == b"fwmark=%d\n%s" % (number, OK)
        sock.sendall(b"set=1\nfwmark=x\n\nset=1\nfwmark=5\n\nget=1\n\n")
        everything = b"errno=-22\n\n" + OK + b"fwmark=5\n" + OK
        data = b""
        while len(data) < len(everything):
            data += sock.recv(65536)
        assert data == everything


def test_nonsense_is_answered_and_ends_the_connection(control: ControlSocket) -> None:
    with connect(control) as sock:
        sock.sendall(b"hello\n")
        assert answered(sock) == b"errno=-71\n\n"
        assert ended(sock)
    assert ask(control, b"get=1\n\n") == OK


def test_a_request_that_never_ends_is_given_up(control: ControlSocket) -> None:
    with connect(control) as slow:
        slow.sendall(b"set=1\nfwm")
        start = time.monotonic()
        assert ask(control, b"get=1\n\n") == OK
        assert time.monotonic() - start < PATIENCE_S / 2, "nobody waits for it"
        assert ended(slow)
        assert PATIENCE_S * 0.8 < time.monotonic() - start < PATIENCE_S + 2


def test_bytes_now_and_then_do_not_lengthen_the_time(control: ControlSocket) -> None:
    with connect(control) as slow, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        slow.sendall(b"set=1\n")
        start = time.monotonic()
        while time.monotonic() - start < PATIENCE_S * 4:
            slow.sendall(b"fwmark=1\n")
            time.sleep(0.02)
        pytest.fail("still listened to")


def test_between_requests_there_is_no_hurry(control: ControlSocket) -> None:
    with connect(control) as idle:
        for _ in range(2):
            time.sleep(PATIENCE_S * 1.5)
            idle.sendall(b"get=1\n\n")
            assert answered(idle) == OK


def test_who_does_not_read_its_answers_blocks_nobody_and_is_dropped(
    control: ControlSocket, device: FakeDevice
) -> None:
    for number in range(4000):
        key = PublicKey(number.to_bytes(32, "big"))
        device.by_key[key] = peer(key)
    with connect(control) as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.sendall(b"get=1\n\n" * 2000)
        start = time.monotonic()
        assert ask(control, b"set=1\nfwmark=3\n\n") == OK
        assert time.monotonic() - start < 2
        time.sleep(PATIENCE_S * 2)
        assert ended(greedy)


def test_the_longest_silent_makes_room(control: ControlSocket) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(control)) for _ in range(MAX_CLIENTS)]
        for client in clients[1:]:
            client.sendall(b"get=1\n\n")
            assert answered(client) == OK
        assert ask(control, b"get=1\n\n") == OK
        assert ended(clients[0])
        clients[1].sendall(b"get=1\n\n")
        assert answered(clients[1]) == OK


def test_a_flood_of_connections_is_survived(control: ControlSocket) -> None:
    for _ in range(300):
        with connect(control) as sock:
            sock.send(b"set=1\n")
    assert ask(control, b"get=1\n\n") == OK


def test_close_does_not_wait_for_clients(device: FakeDevice, directory: Path) -> None:
    control = ControlSocket(device, "wg0", directory=str(directory))
    control.open()
    control.start()
    with connect(control) as sock:
        sock.sendall(b"set=1\nfwm")
        start = time.monotonic()
        control.close()
        assert time.monotonic() - start < 1
        assert ended(sock)


def test_it_sleeps_while_nothing_happens(control: ControlSocket) -> None:
    assert ask(control, b"get=1\n\n") == OK
    with connect(control) as sock:
        sock.sendall(b"get=1\n\n")
        assert answered(sock) == OK
        (thread,) = (t for t in threading.enumerate() if t.name == "wg0-control")
        path = f"/proc/self/task/{thread.native_id}/status"

        def switches() -> int:
            return sum(int(line.split()[1]) for line in Path(path).read_text().splitlines() if "ctxt_switches" in line)

        time.sleep(0.1)
        before = switches()
        time.sleep(0.5)
        assert switches() - before <= 1


# --------------------------------------------------------------------------------------- the real `wg`

OWN = PrivateKey(bytes(range(32)))
A, B = PublicKey(bytes([0xA1]) * 32), PublicKey(bytes([0xB2]) * 32)
SECRET = PresharedKey(bytes(range(100, 132)))


class Wg:
    """`wg` in a mount namespace of its own, where /run holds the control socket alone; no network."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *words: str, input: str | None = None, fails: str = "") -> str:
        script = 'mount -t tmpfs none /run && mkdir /run/wireguard && mount --bind "$0" /run/wireguard && exec wg "$@"'
        done = subprocess.run(
            ["unshare", "-m", "-n", "sh", "-c", script, str(self.directory), *words],
            input=input, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        if fails:
            assert done.returncode != 0
            assert fails in done.stderr
        else:
            assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def wg(control: ControlSocket, directory: Path) -> Wg:
    if shutil.which("wg") is None:
        pytest.skip("needs the wg program (apt install wireguard-tools)")
    return Wg(directory)


@pytest.mark.netns
def test_wg_shows(wg: Wg, device: FakeDevice) -> None:
    assert wg("show", "interfaces") == "wg0\n"
    assert wg("show") == "interface: wg0\n"
    device.private_key, device.listen_port, device.fwmark = OWN, 51820, 0xCA6C
    device.by_key[A] = peer(
        A, preshared_key=SECRET, endpoint=Endpoint(ip_address("2001:db8::1"), 7), last_handshake=time.time() - 90.5,
        allowed_ips=(ip_network("10.0.0.2/32"), ip_network("fd00::/64")), tx_bytes=1024, rx_bytes=2**33,
        persistent_keepalive=25,
    )  # fmt: skip
    device.by_key[B] = peer(B)
    text = wg("show", "wg0")
    seconds = next(word for word in ("30 seconds", "31 seconds", "32 seconds") if word in text)
    assert text == (
        f"interface: wg0\n  public key: {OWN.public}\n  private key: (hidden)\n  listening port: 51820\n"
        f"  fwmark: 0xca6c\n\npeer: {A}\n  preshared key: (hidden)\n  endpoint: [2001:db8::1]:7\n"
        f"  allowed ips: 10.0.0.2/32, fd00::/64\n  latest handshake: 1 minute, {seconds} ago\n"
        "  transfer: 8.00 GiB received, 1.00 KiB sent\n  persistent keepalive: every 25 seconds\n\n"
        f"peer: {B}\n  allowed ips: (none)\n"
    )
    assert wg("show", "wg0", "transfer") == f"{A}\t{2**33}\t1024\n{B}\t0\t0\n"
    assert wg("show", "wg0", "preshared-keys") == f"{A}\t{SECRET.to_base64()}\n{B}\t(none)\n"
    assert wg("show", "wg0", "private-key") == f"{OWN.to_base64()}\n"
    assert wg("showconf", "wg0") == (
        f"[Interface]\nListenPort = 51820\nFwMark = 0xca6c\nPrivateKey = {OWN.to_base64()}\n\n"
        f"[Peer]\nPublicKey = {A}\nPresharedKey = {SECRET.to_base64()}\nAllowedIPs = 10.0.0.2/32, fd00::/64\n"
        f"Endpoint = [2001:db8::1]:7\nPersistentKeepalive = 25\n\n[Peer]\nPublicKey = {B}\n"
    )


@pytest.mark.netns
def test_wg_sets(wg: Wg, device: FakeDevice, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(OWN.to_base64())
    (tmp_path / "psk").write_text(SECRET.to_base64())
    wg("set", "wg0", "listen-port", "51821", "fwmark", "0x20", "private-key", str(tmp_path / "key"))
    assert (device.listen_port, device.fwmark) == (51821, 0x20)
    assert device.private_key == PrivateKey(OWN.to_bytes())
    wg("set", "wg0", "peer", str(A), "preshared-key", str(tmp_path / "psk"), "endpoint", "192.0.2.9:5",
       "persistent-keepalive", "11", "allowed-ips", "10.0.0.0/8,::/0", "peer", str(B), "allowed-ips", "10.9.0.0/16")
    assert device.by_key[A] == peer(
        A, preshared_key=SECRET, endpoint=Endpoint(ip_address("192.0.2.9"), 5), persistent_keepalive=11,
        allowed_ips=(ip_network("10.0.0.0/8"), ip_network("::/0")))  # fmt: skip
    wg("set", "wg0", "peer", str(B), "allowed-ips", "::/0")
    assert device.by_key[A].allowed_ips == (ip_network("10.0.0.0/8"),)
    assert device.by_key[B].allowed_ips == (ip_network("::/0"),)
    wg("set", "wg0", "peer", str(A), "persistent-keepalive", "off", "preshared-key", "/dev/null", "peer", str(B),
       "remove")
    assert device.by_key == {A: peer(A, endpoint=Endpoint(ip_address("192.0.2.9"), 5),
                                     allowed_ips=(ip_network("10.0.0.0/8"),))}
    wg("set", "wg0", "fwmark", "off", "private-key", "/dev/null")
    assert device.private_key is None
    assert device.fwmark == 0


@pytest.mark.netns
def test_wg_names_the_errors(wg: Wg, device: FakeDevice) -> None:
    device.fails["set_listen_port"] = EndpointError("bind", "*:1", errno.EADDRINUSE)
    wg("set", "wg0", "listen-port", "1", fails="Address already in use")
    device.fails["set_fwmark"] = EndpointError("mark", "the socket", errno.EPERM)
    wg("set", "wg0", "fwmark", "1", fails="Operation not permitted")
    device.fails["add_peer"] = ConfigurationError("PublicKey", "is of low order")
    wg("set", "wg0", "peer", str(A), fails="Invalid argument")
    wg("show", "wg1", fails="Unable to access interface")


@pytest.mark.netns
def test_wg_setconf_addconf_syncconf(wg: Wg, device: FakeDevice) -> None:
    first = (f"[Interface]\nPrivateKey = {OWN.to_base64()}\nListenPort = 4000\n\n[Peer]\nPublicKey = {A}\n"
             "AllowedIPs = 10.0.0.0/8\nEndpoint = [2001:db8::2]:80\n")
    device.by_key[B] = peer(B)
    wg("setconf", "wg0", "/dev/stdin", input=first)
    assert set(device.by_key) == {A}
    assert device.listen_port == 4000
    wg("addconf", "wg0", "/dev/stdin", input=f"[Peer]\nPublicKey = {B}\nAllowedIPs = 10.1.0.0/16\n")
    assert set(device.by_key) == {A, B}
    device.calls.clear()
    wg("syncconf", "wg0", "/dev/stdin", input=first.replace("10.0.0.0/8", "10.2.0.0/16"))
    assert set(device.by_key) == {A}
    assert device.by_key[A].allowed_ips == (ip_network("10.2.0.0/16"),)
    assert device.by_key[A].endpoint == Endpoint(ip_address("2001:db8::2"), 80)
    assert "replace_peers" not in device.calls, "a peer that stays keeps its session"
    assert "remove_peer" in device.calls
    wg("setconf", "wg0", "/dev/stdin", input=wg("showconf", "wg0"))
    assert set(device.by_key) == {A}


@pytest.mark.netns
def test_wg_with_ten_thousand_peers(wg: Wg, device: FakeDevice) -> None:
    keys = [PrivateKey(number.to_bytes(32, "big")).public for number in range(256, 51200, 256)]
    text = "".join(f"[Peer]\nPublicKey = {key}\nAllowedIPs = 10.0.{n}.0/24\n" for n, key in enumerate(keys))
    wg("setconf", "wg0", "/dev/stdin", input=text)
    assert list(device.by_key) == keys
    for number in range(10_000 - len(keys)):
        key = PublicKey(number.to_bytes(32, "big"))
        device.by_key[key] = peer(key)
    start = time.monotonic()
    assert wg("show", "wg0", "peers").count("\n") == 10_000
    assert time.monotonic() - start < 5
