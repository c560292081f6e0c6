"""invite, revoke, peers: file and running tunnel agree, and the guest's file works."""

from __future__ import annotations

import ipaddress
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zxingcpp
from PIL import Image
from support.fake_device import FakeDevice

from fasttun.cli import main, people
from fasttun.errors import DeviceError
from fasttun.wireguard.config import Config
from fasttun.wireguard.control import ControlSocket
from fasttun.wireguard.keys import PrivateKey

HOST = PrivateKey.generate()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(people, "SOCKETS", tmp_path / "sockets")
    file = tmp_path / "wg7.conf"
    file.write_text(f"[Interface]\nPrivateKey = {HOST.to_base64()}\nAddress = 10.7.0.1/24, fd07::1/64\n"
                    "ListenPort = 51820\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def device(path: Path) -> Iterator[FakeDevice]:
    """A running tunnel that remembers what it was told."""
    device = FakeDevice()
    device.set_private_key(HOST)
    with ControlSocket(device, "wg7", directory=str(people.SOCKETS)):
        yield device


def invite(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["invite", *words, "--config", str(path)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_guest_gets_a_file_that_fits_the_hosts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = invite(path, capsys, "alice", "--endpoint", "vpn.example.org", "--dns", "10.7.0.1")
    assert status == 0
    assert "does not run" in err
    guest, host = Config.parse(out), Config.read(path)
    (member,) = host.peers
    (server,) = guest.peers
    assert guest.private_key is not None
    assert member.public_key == guest.private_key.public
    assert server.public_key == HOST.public
    assert member.preshared_key == server.preshared_key is not None
    assert [str(address) for address in guest.address] == ["10.7.0.2/32", "fd07::2/128"]
    assert member.allowed_ips == tuple(address.network for address in guest.address)
    assert server.endpoint == "vpn.example.org:51820"
    assert server.persistent_keepalive == 25
    assert [str(network) for network in server.allowed_ips] == ["10.7.0.0/24", "fd07::/64"]
    assert guest.dns == ("10.7.0.1",)
    assert member.name == "alice"
    assert guest.private_key.to_base64() not in path.read_text()
    # The next one needs no endpoint, and gets other keys and addresses.
    status, out, _ = invite(path, capsys, "bob", "--allowed-ips", "0.0.0.0/0,::/0", "--no-psk", "--keepalive", "0")
    second = Config.parse(out)
    assert [str(address) for address in second.address] == ["10.7.0.3/32", "fd07::3/128"]
    assert second.peers[0].endpoint == "vpn.example.org:51820"
    assert second.peers[0].preshared_key is None
    assert [str(network) for network in second.peers[0].allowed_ips] == ["0.0.0.0/0", "::/0"]


def test_the_running_tunnel_is_told(path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str]) -> None:
    assert invite(path, capsys, "alice", "--endpoint", "192.0.2.1")[0] == 0
    (member,) = Config.read(path).peers
    (live,) = device.peers
    assert (live.public_key, live.preshared_key, live.allowed_ips) == (
        member.public_key, member.preshared_key, member.allowed_ips)
    assert main(["peers", "--config", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["running"]
    assert answer["peers"][0]["name"] == "alice"
    assert main(["peers", "--config", str(path)]) == 0
    assert re.search(rf"alice +{re.escape(str(member.public_key))} +10\.7\.0\.2/32.* never ", capsys.readouterr().out)
    assert main(["revoke", "alice", "--config", str(path)]) == 0
    assert device.peers == ()
    assert Config.read(path).peers == ()


def test_a_refusal_puts_the_file_back(path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_text()
    device.fails["add_peer"] = DeviceError("add", "peer", 12)
    status, out, err = invite(path, capsys, "alice", "--endpoint", "192.0.2.1")
    assert status == 1
    assert out == ""
    assert "nothing was changed" in err
    assert path.read_text() == before


def test_files_of_secrets_are_private(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "alice.conf"
    assert invite(path, capsys, "alice", "--endpoint", "[2001:db8::1]:4500", "--output", str(target))[0] == 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert Config.read(target).peers[0].endpoint == "[2001:db8::1]:4500"


def test_a_qr_code_holds_the_guests_file(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "alice.png"
    status, out, _ = invite(path, capsys, "alice", "--endpoint", "192.0.2.1", "--png", str(picture), "--no-qr")
    assert status == 0
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    with Image.open(picture) as image:
        (code,) = zxingcpp.read_barcodes(image)
    read = code.text
    assert read == out
    assert ipaddress.ip_address(Config.parse(read).address[0].ip)
    status, out, _ = invite(path, capsys, "bob", "--qr")
    assert status == 0
    assert "█" in out or "▀" in out


@pytest.mark.parametrize(("words", "wrong"), [
    (("a#b",), "name"), (("alice", "--allowed-ips", "10.7"), "--allowed-ips"),
])
def test_bad_use(path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], wrong: str) -> None:
    before = path.read_text()
    status, _, err = invite(path, capsys, *words, "--endpoint", "192.0.2.1")
    assert status == 2
    assert wrong in err
    assert path.read_text() == before
