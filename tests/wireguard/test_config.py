"""wg-quick's format: what people have written works unchanged, and what is wrong is named with file, line and field."""

from __future__ import annotations

import contextlib
import logging
import random
import subprocess
import time
from ipaddress import ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttun import Config
from fasttun.errors import ConfigurationError
from fasttun.wireguard.config import PeerConfig, config_path, interface_name
from fasttun.wireguard.keys import PresharedKey, PrivateKey

KEY, PSK = PrivateKey(bytes(range(1, 33))), PresharedKey(bytes(range(32)))
PEER, OTHER = PrivateKey(b"p" * 32).public, PrivateKey(b"o" * 32).public

EVERYTHING = f"""\ufeff# a comment\r
[interface]\r
privatekey = {KEY.to_base64()}  # and one here
Address=10.0.0.1/24 fd00::1/64
ADDRESS = 10.1.0.1
ListenPort = 51820
FwMark = 0xca6c
DNS = 1.1.1.1, 2606:4700:4700::1111,example.org
MTU=1400
Table = off
PreUp = true
PostUp = iptables -A FORWARD -i %i -j ACCEPT; iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE
PostUp = echo a=b
PreDown=true
PostDown = true
SaveConfig = true

[Peer]
# Name = alice
PublicKey = {PEER}
PresharedKey={PSK.to_base64()}
AllowedIPs = 10.0.0.2/24,fd00::2, 10.0.0.9
AllowedIPs =
AllowedIPs = 192.168.0.0/16
Endpoint = [2001:db8::1%eth0]:51820
PersistentKeepalive = 25
[PEER]
PublicKey = {OTHER}
Endpoint = vpn.example.org:1
PersistentKeepalive = off
"""


def test_everything_is_read() -> None:
    config = Config.parse(EVERYTHING)
    assert config == Config(
        private_key=KEY, listen_port=51820, fwmark=0xCA6C,
        address=(ip_interface("10.0.0.1/24"), ip_interface("fd00::1/64"), ip_interface("10.1.0.1/32")),
        dns=("1.1.1.1", "2606:4700:4700::1111", "example.org"), mtu=1400, table="off", pre_up=("true",),
        post_up=("iptables -A FORWARD -i %i -j ACCEPT; iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE",
                 "echo a=b"),
        pre_down=("true",), post_down=("true",), save_config=True,
        peers=(
            PeerConfig(PEER, PSK, (ip_network("10.0.0.0/24"), ip_network("fd00::2/128"), ip_network("10.0.0.9/32"),
                                   ip_network("192.168.0.0/16")), "[2001:db8::1%eth0]:51820", 25, "alice"),
            PeerConfig(OTHER, endpoint="vpn.example.org:1"),
        ))
    assert Config.parse(config.text()) == config
    assert Config.parse("") == Config()


def test_wg_reads_what_we_write(tmp_path: Path) -> None:
    config = Config.parse(EVERYTHING)
    path = tmp_path / "wg0.conf"
    config.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Config.read(path) == config
    try:
        stripped = subprocess.run(["wg-quick", "strip", str(path)], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("wg-quick is not installed (Debian: wireguard-tools)")
    assert Config.parse(stripped).peers == tuple(
        PeerConfig(peer.public_key, peer.preshared_key, peer.allowed_ips, peer.endpoint, peer.persistent_keepalive,
                   Config.parse(stripped).peers[number].name)
        for number, peer in enumerate(config.peers))


@pytest.mark.parametrize(("text", "wrong"), [
    ("[Interface]\nPrivateKey = abc", "x.conf:2: PrivateKey: has 3 characters"),
    ("PrivateKey = x", "x.conf:1: PrivateKey: stands before any section"),
    ("[Foo]", r"x.conf:1: \[Foo\]: is no section"),
    ("\n\n[Interface]\nAdress = 1", "x.conf:4: Adress: .*did you mean Address"),
    ("[Interface]\nEndpoint = a:1", r"x.conf:2: Endpoint: is not known in \[Interface\]"),
    ("[Interface]\nAddress", "x.conf:2: Address: has no value"),
    ("[Interface]\nAddress = 10.0.0.256/24", "x.conf:2: Address: .*no address"),
    ("[Interface]\nMTU = 7", "x.conf:2: MTU"),
    ("[Interface]\nListenPort = 65536", "x.conf:2: ListenPort"),
    ("[Interface]\nFwMark = 0x1ffffffff", "x.conf:2: FwMark"),
    ("[Interface]\nSaveConfig = yes", "x.conf:2: SaveConfig"),
    ("[Interface]\nTable = a b", "x.conf:2: Table"),
    ("[Peer]\nAllowedIPs = ::/0", r"x.conf:1: \[Peer\]: has no PublicKey"),
    (f"[Peer]\nPublicKey = {PEER}\n[Peer]\n[Peer]\nPublicKey = {OTHER}", r"x.conf:3: \[Peer\]: has no PublicKey"),
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.0.0.0/33", "x.conf:3: AllowedIPs"),
    ("[Peer]\nEndpoint = 2001:db8::1:51820", "x.conf:2: Endpoint"),
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = ::ffff:10.0.0.0/104", "x.conf:3: AllowedIPs: .*v4-mapped"),
    ("[Peer]\nEndpoint = host:0", "x.conf:2: Endpoint"),
    ("[Peer]\nPersistentKeepalive = -1", "x.conf:2: PersistentKeepalive"),
])
def test_what_is_wrong_is_named(text: str, wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=wrong):
        Config.parse(text, source="x.conf")


def test_no_error_and_no_repr_shows_a_secret() -> None:
    secret = KEY.to_base64()
    for text in (f"[Interface]\nPrivateKey = {secret[:-3]}", f"[Interface]\nPrivateKey {secret}",
                 f"[Interface]\n{secret}", f"[Peer]\nPresharedKey = {secret}x", f"[Interface]\nPrivatKey={secret}",
                 f"PrivateKey = {secret}"):
        with pytest.raises(ConfigurationError) as caught:
            Config.parse(text)
        assert secret[:12] not in str(caught.value)
    assert secret[:12] not in repr(Config.parse(EVERYTHING))
    assert PSK.to_base64()[:12] not in repr(Config.parse(EVERYTHING))


def test_a_readable_file_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "wg0.conf"
    path.write_text(EVERYTHING)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Config.read(path)
    assert "chmod 600" in caplog.text
    with pytest.raises(ConfigurationError, match="No such file"):
        Config.read(tmp_path / "none.conf")


def test_a_failing_disk_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wg0.conf"
    path.write_text("before")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"):
        Config.parse(EVERYTHING).write(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_names_and_paths(tmp_path: Path) -> None:
    assert config_path("wg0", tmp_path) == tmp_path / "wg0.conf"
    assert config_path("./a.conf") == Path("a.conf")
    assert interface_name(Path("/etc/wireguard/my-vpn_1.conf")) == "my-vpn_1"
    for name in ("a.txt", "seventeen-letters.conf", "sp ace.conf", ".conf", "..conf"):
        with pytest.raises(ConfigurationError):
            interface_name(Path(name))


def test_time_grows_with_the_peers_alone() -> None:
    def seconds(count: int) -> float:
        text = "[Interface]\n" + "".join(
            f"[Peer]\nPublicKey = {key}\nAllowedIPs = 10.{number >> 8}.{number & 255}.1/32\n"
            for number, key in enumerate(keys[:count]))
        begin = time.perf_counter()
        assert len(Config.parse(text).peers) == count
        return time.perf_counter() - begin

    keys = [PrivateKey.generate().public for _ in range(4000)]
    seconds(100)
    assert seconds(4000) < 40 * max(seconds(400), 0.005)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        Config.parse(text)


@given(st.integers(0, 2**32))
def test_a_spoilt_file_is_read_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    letters = list(EVERYTHING)
    for _ in range(chance.randrange(1, 20)):
        place = chance.randrange(len(letters))
        match chance.randrange(3):
            case 0:
                letters[place] = chr(chance.randrange(1, 300))
            case 1:
                letters.insert(place, chance.choice("[]=#\n,:/ \0"))
            case _:
                del letters[place:place + chance.randrange(1, 30)]
    try:
        config = Config.parse("".join(letters))
    except ConfigurationError:
        return
    assert Config.parse(config.text()) == config
