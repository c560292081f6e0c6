"""The configuration file as state: only what changes changes, and a crash leaves it whole."""

from __future__ import annotations

import ipaddress
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fasttun.errors import ConfigurationError
from fasttun.wireguard.config import Config, PeerConfig
from fasttun.wireguard.keys import PresharedKey, PrivateKey
from fasttun.wireguard.store import Store, free_addresses

ALICE, BOB = PrivateKey.generate().public, PrivateKey.generate().public


def written(path: Path, *, peers: str = "") -> Path:
    path.write_text(
        f"# my   server\n[Interface]\nprivatekey={PrivateKey.generate().to_base64()}\nAddress = 10.7.0.1/29 # inside\n"
        f"ListenPort=51820\n\n{peers}")
    path.chmod(0o600)
    return path


def peer(name: str = "carol", *networks: str) -> PeerConfig:
    return PeerConfig(PrivateKey.generate().public, PresharedKey.generate(),
                      tuple(map(ipaddress.ip_network, networks or ("10.7.0.5/32",))), name=name)


TWO = (f"[Peer] # first\n# Name = alice\nPublicKey = {ALICE}\nAllowedIPs = 10.7.0.2/32\n\n"
       f"  [peer]\n  publickey = {BOB} # bob's\n  AllowedIPs = 10.7.0.3/32\n")


def test_what_is_not_touched_stays_byte_for_byte(tmp_path: Path) -> None:
    path = written(tmp_path / "wg0.conf", peers=TWO)
    before = path.read_bytes()
    store, carol = Store(path), peer()
    assert store.add_peer(carol) == before.decode()
    assert path.read_bytes().startswith(before)
    assert Config.read(path).peers[2] == carol
    removed, _ = store.remove_peer("carol")
    assert removed == carol
    assert path.read_bytes().rstrip() == before.rstrip()


def test_a_peer_goes_by_name_or_by_key(tmp_path: Path) -> None:
    path = written(tmp_path / "wg0.conf", peers=TWO)
    store = Store(path)
    store.remove_peer("alice")
    assert [other.public_key for other in store.config().peers] == [BOB]
    assert "bob's" in path.read_text()
    store.remove_peer(str(BOB))
    assert store.config().peers == ()
    with pytest.raises(ConfigurationError, match="is no peer"):
        store.remove_peer("alice")


def test_keys_and_names_are_there_once(tmp_path: Path) -> None:
    store = Store(written(tmp_path / "wg0.conf", peers=TWO))
    with pytest.raises(ConfigurationError, match="is taken"):
        store.add_peer(peer("alice"))
    with pytest.raises(ConfigurationError, match="already"):
        store.add_peer(PeerConfig(BOB))


def test_mode_and_link_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "real.conf")
    link = tmp_path / "wg0.conf"
    link.symlink_to(path)
    path.chmod(0o640)
    Store(link).add_peer(peer())
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Config.read(link).peers
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["real.conf", "wg0.conf"]


def test_an_endpoint_is_remembered(tmp_path: Path) -> None:
    store = Store(written(tmp_path / "wg0.conf", peers=TWO))
    assert store.endpoint() is None
    store.remember_endpoint("vpn.example.org:51820")
    store.remember_endpoint("vpn2.example.org:51820")
    assert store.endpoint() == "vpn2.example.org:51820"
    assert store.path.read_text().count("# Endpoint") == 1
    assert len(store.config().peers) == 2


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "wg0.conf")
    members = [peer(f"p{number}", f"10.8.0.{number}/32") for number in range(12)]

    def add(member: PeerConfig) -> None:
        store = Store(path)
        with store.locked():
            store.add_peer(member)

    threads = [threading.Thread(target=add, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {other.name for other in Config.read(path).peers} == {member.name for member in members}


_CRASH = """
import os, sys
from pathlib import Path
from fasttun.wireguard.store import Store
from fasttun.wireguard.config import PeerConfig
from fasttun.wireguard.keys import PrivateKey
stop_at, seen = int(sys.argv[2]), 0
def watch(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.chmod", "os.chown", "tempfile.mkstemp"):
        seen += 1
        if seen == stop_at:
            os.kill(os.getpid(), 9)
store = Store(Path(sys.argv[1]))
sys.addaudithook(watch)
with store.locked():
    store.add_peer(PeerConfig(PrivateKey.generate().public, name="new"))
os._exit(0)
"""


def test_a_crash_at_any_step_leaves_one_or_the_other(tmp_path: Path) -> None:
    path = written(tmp_path / "wg0.conf", peers=TWO)
    before = path.read_bytes()
    crashed = outcomes = 0
    for step in range(1, 40):
        path.write_bytes(before)
        done = subprocess.run([sys.executable, "-c", _CRASH, str(path), str(step)], check=False, timeout=30)
        text = path.read_bytes()
        names = [other.name for other in Config.parse(text.decode()).peers]
        assert text == before or (text.startswith(before) and names[-1] == "new")
        outcomes |= 1 if text == before else 2
        if done.returncode == 0:
            break
        crashed += 1
    assert crashed >= 4
    assert outcomes == 3


@pytest.mark.parametrize(("taken", "free"), [
    ((), "10.7.0.2/32"), (("10.7.0.2/32",), "10.7.0.3/32"), (("10.7.0.0/24",), "10.7.0.2/32"),
    (("10.7.0.2/31", "10.7.0.4/32"), "10.7.0.5/32"), (("0.0.0.0/0", "10.9.0.0/16"), "10.7.0.2/32")])
def test_a_free_address(taken: tuple[str, ...], free: str) -> None:
    peers = tuple(PeerConfig(PrivateKey.generate().public, allowed_ips=(ipaddress.ip_network(text),)) for text in taken)
    config = Config(address=(ipaddress.ip_interface("10.7.0.1/29"), ipaddress.ip_interface("fd07::1/64")), peers=peers)
    assert [str(address) for address in free_addresses(config)] == [free, "fd07::2/128"]


def test_a_full_network_says_so() -> None:
    peers = tuple(PeerConfig(PrivateKey.generate().public, allowed_ips=(ipaddress.ip_network(f"10.7.0.{last}/32"),))
                  for last in range(2, 7))
    with pytest.raises(ConfigurationError, match=r"10\.7\.0\.0/29 is full"):
        free_addresses(Config(address=(ipaddress.ip_interface("10.7.0.1/29"),), peers=peers))
    with pytest.raises(ConfigurationError, match="Address"):
        free_addresses(Config())


def test_a_file_that_is_wrong_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    path.write_text("[Interface]\nAdress = 10.7.0.1/24\n")
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match=r"wg0\.conf:2: Adress"):
        Store(path).add_peer(peer())
    assert path.read_text() == "[Interface]\nAdress = 10.7.0.1/24\n"
    assert os.listdir(tmp_path) == ["wg0.conf"]
