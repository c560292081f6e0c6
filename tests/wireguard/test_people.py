"""invite, revoke, peers: file and running tunnel agree, and the guest's file works."""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zxingcpp
from PIL import Image
from support.fake_device import FakeDevice
from support.netns import Lab, missing, wait_until

from fasttun.cli import main, people
from fasttun.errors import DeviceError
from fasttun.wireguard.config import Config, PeerConfig
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
    guests = [path.parent / "alice.conf", path.parent / "alice.png"]
    status, out, err = invite(path, capsys, "alice", "--endpoint", "192.0.2.1", "--output", str(guests[0]),
                              "--png", str(guests[1]))
    assert status == 1
    assert out == ""
    assert "nothing was changed" in err
    assert path.read_text() == before
    assert not any(guest.exists() for guest in guests)


def test_a_reader_that_went_leaves_no_peer(
    path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("click.echo", gone)
        patch.setattr("fasttun.cli._forget", lambda _: None)
        assert invite(path, capsys, "alice", "--endpoint", "192.0.2.1")[0] == 1
    assert path.read_text() == before
    assert device.peers == ()


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


def test_a_guest_whose_file_cannot_be_written_is_not_let_in(
        path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_text()
    status, _, _ = invite(path, capsys, "alice", "--endpoint", "192.0.2.1", "--output", str(tmp_path / "no" / "where"))
    assert status == 1
    assert path.read_text() == before


def test_a_name_is_no_command_to_the_terminal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(path.read_text() + f"[Peer]\n# Name = \x1b]0;x\x07bob\nPublicKey = {HOST.public}\n")
    assert main(["peers", "--config", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["revoke", str(HOST.public), "--config", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(("words", "wrong"), [
    (("a#b",), "name"), ((" ",), "name"), (("a\nb",), "name"), (("alice", "--allowed-ips", "10.7"), "--allowed-ips"),
    (("alice", "--endpoint", "host:99999"), "--endpoint"), (("alice", "--endpoint", "a b"), "--endpoint"),
    (("alice", "--endpoint", "a\\1:70000"), "--endpoint"), (("alice", "--endpoint", "a\\1"), "--endpoint"),
    (("alice", "--keepalive", "70000"), "--keepalive"),
    (("alice", "--allowed-ips", ",".join(f"fd00:{number:x}::/64" for number in range(300)), "--qr"), "--qr"),
])
def test_bad_use(path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], wrong: str) -> None:
    before = path.read_text()
    status, _, err = invite(path, capsys, "--endpoint", "192.0.2.1", *words)
    assert status == 2
    assert wrong in err
    assert path.read_text() == before


@pytest.mark.parametrize("option", ["--output", "--png"])
def test_a_guests_file_that_cannot_be_written_leaves_no_peer(
    option: str, path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    before = path.read_text()
    status, out, _ = invite(path, capsys, "alice", "--endpoint", "192.0.2.1", option, str(path.parent / "no" / "file"))
    assert status == 1
    assert out == ""
    assert path.read_text() == before
    assert device.peers == ()


def test_a_refused_revocation_puts_the_file_back(
    path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    invite(path, capsys, "alice", "--endpoint", "192.0.2.1")
    before = path.read_text()
    device.fails["remove_peer"] = DeviceError("remove", "peer", 12)
    assert main(["revoke", "alice", "--config", str(path)]) == 1
    assert path.read_text() == before


def test_peers_that_are_not_in_the_file_count(
    path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    other = PrivateKey.generate().public
    networks = (ipaddress.ip_network("10.7.0.2/32"), ipaddress.ip_network("fd07::2/128"))
    device.add_peer(PeerConfig(other, allowed_ips=networks))
    status, out, _ = invite(path, capsys, "alice", "--endpoint", "192.0.2.1")
    assert status == 0
    assert [str(address) for address in Config.parse(out).address] == ["10.7.0.3/32", "fd07::3/128"]
    assert main(["peers", "--config", str(path), "--json"]) == 0
    rows = {row["public_key"]: row for row in json.loads(capsys.readouterr().out)["peers"]}
    assert rows[str(other)]["allowed_ips"] == ["10.7.0.2/32", "fd07::2/128"]
    assert (rows[str(other)]["name"], rows[str(other)]["saved"]) == (None, False)
    assert [row["name"] for row in rows.values() if row["saved"]] == ["alice"]
    before = path.read_text()
    assert main(["revoke", str(other), "--config", str(path)]) == 0
    assert [str(entry.public_key) for entry in device.peers] == [str(Config.read(path).peers[0].public_key)]
    assert path.read_text() == before


def test_a_link_is_named_as_the_link(path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = path.rename(path.with_name("office.conf"))
    path.symlink_to(elsewhere)
    assert invite(path, capsys, "alice", "--endpoint", "192.0.2.1")[0] == 0
    assert len(device.peers) == 1
    assert path.is_symlink()
    assert Config.read(elsewhere).peers[0].name == "alice"


def test_a_device_that_is_not_ours_is_told_of(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = invite(path, capsys, "alice", "--endpoint", "192.0.2.1", "--interface", "lo")
    assert status == 0
    assert "wg syncconf lo" in err


def test_an_answer_that_breaks_off_changes_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people.SOCKETS.mkdir()
    before = path.read_text()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(people.SOCKETS / "wg7.sock"))
        server.listen()

        def answer() -> None:
            for said in (b"listen_port=1\nerrno=0\n\n", b"", b""):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        status, out, err = invite(path, capsys, "alice", "--endpoint", "192.0.2.1")
        thread.join(5)
    assert status == 1
    assert out == ""
    assert "broke off" in err
    assert path.read_text() == before


def test_the_port_of_a_listener_without_one_is_the_running_ones(
    path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text(path.read_text().replace("ListenPort = 51820\n", ""))
    device.listen_port = 40404
    _, out, err = invite(path, capsys, "alice", "--endpoint", "2001:db8::7")
    assert Config.parse(out).peers[0].endpoint == "[2001:db8::7]:40404"
    assert "no ListenPort" in err


def test_without_an_endpoint_the_outgoing_address_is_told(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "_outgoing_address", lambda: "192.168.1.5")
    _, out, err = invite(path, capsys, "alice")
    assert Config.parse(out).peers[0].endpoint == "192.168.1.5:51820"
    assert "private address" in err
    assert "# Endpoint" not in path.read_text()


def _photographed(text: str) -> str:
    """What a phone reads of the half blocks, white where the terminal draws and black elsewhere."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines() if "█" in line]
    image = Image.new("L", (max(map(len, rows)), 2 * len(rows)))
    for y, row in enumerate(rows):
        for x, block in enumerate(row):
            image.putpixel((x, 2 * y), 255 * (block in "█▀"))
            image.putpixel((x, 2 * y + 1), 255 * (block in "█▄"))
    (code,) = zxingcpp.read_barcodes(image.resize((image.width * 6, image.height * 6), Image.Resampling.NEAREST))
    return code.text


@pytest.mark.parametrize("terminal", [False, True])
def test_the_code_on_the_terminal_holds_the_guests_file(
    terminal: bool, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    words = ("alice", "--endpoint", "vpn.example.org", "--dns", "10.7.0.1, lan", "--allowed-ips", "0.0.0.0/0,::/0")
    status, out, _ = invite(path, capsys, *words, *([] if terminal else ["--qr"]))
    assert status == 0
    begin = min(out.index(mark) for mark in ("█", "\x1b") if mark in out)
    assert _photographed(out) == out[:begin]
    assert Config.parse(out[:begin]).dns == ("10.7.0.1", "lan")
    # Its colours are its own: on a bright terminal it would be a negative.
    assert all(line.startswith("\x1b[97;40m") for line in out[begin:].splitlines()) == terminal


def test_a_missing_library_is_named_before_anything_is_done(
    path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "segno", None)
    before = path.read_text()
    status, _, err = invite(path, capsys, "alice", "--endpoint", "192.0.2.1", "--qr")
    assert status == 1
    assert "pip install 'fasttun[qr]'" in err
    assert path.read_text() == before
    assert device.peers == ()
    assert invite(path, capsys, "alice", "--endpoint", "192.0.2.1", "--no-qr")[0] == 0


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_on_a_terminal_shows_keys_whole(
    rich: bool, path: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    invite(path, capsys, "alice", "--endpoint", "192.0.2.1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    if not rich:
        monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert main(["peers", "--config", str(path)]) == 0
    out = capsys.readouterr().out
    assert str(Config.read(path).peers[0].public_key) in out
    assert ("\x1b[1m" in out or len(out.splitlines()) > 2) == rich


@pytest.mark.netns
def test_a_guest_comes_in_and_is_shut_out(tmp_path: Path) -> None:
    """From end to end: the commands, a real tunnel, and another implementation that takes the printed file."""
    if missing() or not (shutil.which("wg") and shutil.which("wireguard-go")):
        pytest.skip(missing() or "needs wg and wireguard-go")
    from support.wireguard_go import Go

    file = tmp_path / "wg0.conf"
    file.write_text(f"[Interface]\nPrivateKey = {HOST.to_base64()}\nAddress = 10.7.0.1/24, fd07::1/64\n"
                    "ListenPort = 51820\n")
    file.chmod(0o600)
    with Lab() as lab:
        a, b, link = lab.pair()
        # A /run of its own: nothing of the control socket is seen outside.
        holder = a.popen(["unshare", "--mount", "--propagation", "private", "sh", "-c",
                          "mount -t tmpfs tmpfs /run && echo && exec sleep 120"])
        assert holder.stdout is not None
        holder.stdout.readline()

        def run(*words: str) -> str:
            return a.run(["nsenter", f"--target={holder.pid}", "--mount", "--", "env",
                          "FASTTUN_RUNTIME_DIR=/run/fasttun", sys.executable, "-m", "fasttun", *words]).stdout

        def reached() -> list[str]:
            return [inside for inside in ("10.7.0.1", "fd07::1")
                    if b.run(["ping", "-c1", "-W1", inside], check=False).returncode == 0]

        run("up", str(file))
        guest = Config.parse(run("invite", "alice", "--config", str(file), "--endpoint", link.a.v4))
        with Go(b, guest) as go:
            b.ip("route", "add", "10.7.0.0/24", "dev", go.device)
            b.ip("route", "add", "fd07::/64", "dev", go.device)
            wait_until(lambda: len(reached()) == 2, 10)
            (row,) = json.loads(run("peers", "--config", str(file), "--json"))["peers"]
            assert row["name"] == "alice"
            assert row["endpoint"].startswith(f"{link.b.v4}:")
            assert time.time() - row["last_handshake"] < 60
            assert min(row["rx_bytes"], row["tx_bytes"]) > 0
            run("revoke", "alice", "--config", str(file))
            assert reached() == []
            run("down", str(file))
            run("up", str(file))
            assert reached() == []
        run("down", str(file))
