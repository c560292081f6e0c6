"""The configuration file as state: only what changes changes, and a crash leaves it whole."""

from __future__ import annotations

import ipaddress
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
def step():
    global seen
    seen += 1
    if seen == stop_at:
        os.kill(os.getpid(), 9)
def watch(event, arguments):
    if event in ("open", "os.rename", "os.chmod", "os.chown", "tempfile.mkstemp"):
        step()
sync = os.fsync
def fsync(handle):
    step()
    sync(handle)
    step()
os.fsync = fsync
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
        assert all(stat.S_IMODE(entry.stat().st_mode) == 0o600 for entry in tmp_path.iterdir())
        outcomes |= 1 if text == before else 2
        if done.returncode == 0:
            break
        crashed += 1
    assert crashed >= 8
    assert outcomes == 3
    # Whoever comes next takes away what the killed have left, once it is old enough to be nobody's.
    left = [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]
    assert left
    os.utime(left[0], (time.time() - 3600,) * 2)
    with Store(path).locked():
        assert not left[0].exists()
        assert all(entry.exists() for entry in left[1:])


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


def test_the_owner_stays(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path = written(tmp_path / "wg0.conf")
    os.chown(path, 1234, 4321)
    Store(path).add_peer(peer())
    assert (path.stat().st_uid, path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (1234, 4321, 0o600)


NEIGHBOURS = (f"# Name = alice\n# her phone\n[Peer]\nPublicKey = {ALICE}\n# until June\n\n# --- laptops ---\n\n"
              f"# Name = bob\n[Peer]\nPublicKey = {BOB}\n#Endpoint = 192.0.2.1:5\n\n# the end\n")


def test_comments_go_with_their_peer_and_no_other(tmp_path: Path) -> None:
    head = written(tmp_path / "wg0.conf").read_text()
    for who, left in (("alice", head + NEIGHBOURS[NEIGHBOURS.index("# ---"):]),
                      ("bob", head + NEIGHBOURS[:NEIGHBOURS.index("# Name = bob")] + "# the end\n")):
        path = written(tmp_path / "wg0.conf")
        path.write_text(head + NEIGHBOURS)
        Store(path).remove_peer(who)
        assert path.read_text() == left


@pytest.mark.parametrize("section", [
    "[ Peer ]\nPublicKey = {key}\n", "[Peer]\n# \u2028[Peer]\nPublic Key = {key}\n",
    "\ufeff[peer]\r\npublickey={key}\r\n",
    "[Peer]\nPublicKey = {key}\n\n[Peer]\nPublicKey = {key}\n", "[Peer]\nPublicKey = {other}\nPublicKey = {key}",
    "[Peer]\n#PublicKey = {other}\nPublicKey = {key} # x", "#  B\udcfcro\n[Peer]\nPublicKey = {key}\n",
])
def test_a_peer_is_out_however_it_was_written(section: str, tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    path.write_bytes(section.format(key=ALICE, other=BOB).encode("utf-8", "surrogateescape"))
    path.chmod(0o600)
    Store(path).remove_peer(str(ALICE))
    assert str(ALICE) not in path.read_text()
    assert Config.read(path).peers == ()


LINES = st.lists(st.sampled_from([
    "", "", "  ", "# note", "# Name = ann", "# Name = ben", "#[Peer]", "#PublicKey = x", "[Interface]", "[Peer]",
    "[peer] # x", "MTU = 1400", "Address = 10.7.0.1/24", f"PublicKey = {ALICE}", f"PublicKey={BOB}",
    "AllowedIPs = 10.7.0.3/32", "\r",
]), max_size=25)


@given(lines=LINES, feed=st.sampled_from(["\n", "\r\n"]), ended=st.booleans())
def test_edits_touch_one_peer_only(
    lines: list[str], feed: str, ended: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = feed.join(lines) + feed * ended
    try:
        config = Config.parse(text)
    except ConfigurationError:
        return
    path = tmp_path_factory.mktemp("store") / "wg0.conf"
    path.write_bytes(text.encode())
    path.chmod(0o600)
    store, carol = Store(path), peer()
    store.add_peer(carol)
    assert path.read_bytes().startswith(text.encode())
    assert store.config() == replace(config, peers=(*config.peers, carol))
    store.remove_peer(str(carol.public_key))
    assert store.config() == config
    assert path.read_bytes().rstrip() == text.encode().rstrip()
    for member in config.peers:
        before = store.text()
        store.remove_peer(str(member.public_key))
        after = store.config()
        assert after == replace(config, peers=tuple(other for other in config.peers if other != member))
        # What is left is the text before, with one stretch or more taken out: nothing is added or moved.
        rest = iter(before.split("\n"))
        assert all(line in rest for line in store.text().split("\n"))
        store.replace(before)


def test_the_remembered_endpoint_is_the_devices(tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    path.write_bytes(f"# Name = vpn\r\n[Interface] # ours\r\nMTU = 1400\r\n\r\n[Peer]\r\nPublicKey = {BOB}\r\n"
                     "#Endpoint = 198.51.100.1:5\r\n".encode())
    path.chmod(0o600)
    store, before = Store(path), path.read_bytes()
    assert store.endpoint() is None
    store.remember_endpoint("vpn.example.org:1")
    store.add_peer(peer(), endpoint="[2001:db8::1]:2")
    assert store.endpoint() == "[2001:db8::1]:2"
    text = path.read_bytes()
    assert text.count(b"\n") == text.count(b"\r\n")
    assert text.replace(b"# Endpoint = [2001:db8::1]:2\r\n", b"").startswith(before)


def test_two_names_of_a_file_share_its_lock(tmp_path: Path) -> None:
    path = written(tmp_path / "real.conf")
    link = tmp_path / "wg0.conf"
    link.symlink_to(path)
    entered = threading.Event()

    def enter() -> None:
        with Store(link).locked():
            entered.set()

    with Store(path).locked():
        other = threading.Thread(target=enter)
        other.start()
        assert not entered.wait(0.2)
    other.join(5)
    assert entered.is_set()


def test_what_runs_is_saved_without_what_people_wrote_being_lost(tmp_path: Path) -> None:
    path = written(tmp_path / "wg0.conf", peers=TWO)
    text = path.read_text().replace(
        "ListenPort=51820\n", "ListenPort=51820 # open in the firewall\nPostUp = a # first\nPostUp = b\n"
        "# Endpoint = vpn.example.org:1\nSaveConfig = true\n")
    path.write_text(text)
    store = Store(path)
    config, carol = store.config(), peer()
    store.save(config)
    assert path.read_text() == text  # nothing has changed
    alice, bob = config.peers
    store.save(replace(config, fwmark=51820, mtu=1400, post_up=("a", "b"), listen_port=51821, peers=(
        replace(alice, name=None, endpoint="192.0.2.9:5", persistent_keepalive=25), replace(carol, name=None))))
    saved = store.config()
    assert saved == replace(config, fwmark=51820, mtu=1400, listen_port=51821, peers=(
        replace(alice, endpoint="192.0.2.9:5", persistent_keepalive=25), replace(carol, name=None)))
    assert store.endpoint() == "vpn.example.org:1"
    assert "PostUp = a # first\nPostUp = b\n" in path.read_text()
    assert "[Peer] # first\n# Name = alice\n" in path.read_text()
    assert str(BOB) not in path.read_text()
    store.save(replace(saved, mtu=None, post_up=("c",), peers=(bob,)))
    assert store.config() == replace(saved, mtu=None, post_up=("c",), peers=(bob,))


def test_a_file_that_is_gone_is_saved(tmp_path: Path) -> None:
    store, config = Store(tmp_path / "wg0.conf"), Config(mtu=1400, peers=(PeerConfig(ALICE, name="a"),))
    store.save(config)
    assert store.config() == config
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_a_file_without_a_device_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    path.write_text(f"[Peer]\nPublicKey = {ALICE}\n\n# Name = a\n[Peer]\nPublicKey = {ALICE}\nEndpoint = a:1\n")
    path.chmod(0o600)
    store = Store(path)
    alice = store.config().peers[0]
    store.save(Config(mtu=1400, peers=(replace(alice, name=None, endpoint="a:2"),)))
    assert store.config() == Config(mtu=1400, peers=(replace(alice, name="a", endpoint="a:2"),))


@pytest.mark.parametrize(("own", "taken", "free"), [
    (["fd07::1/64"], ["fd07::/65"], ["fd07::8000:0:0:0/128"]),
    (["10.7.0.1/24", "10.7.0.1/16"], [], ["10.7.0.2/32", "10.7.0.3/32"]),
    (["10.7.0.0/31"], [], ["10.7.0.1/32"]), (["fd07::/127"], [], ["fd07::1/128"]),
    (["10.7.0.9/24"], ["10.7.0.2/32", "10.7.0.1/32", "10.7.0.3/32", "10.7.0.4/30"], ["10.7.0.8/32"]),
])
def test_free_addresses_at_the_edges(own: list[str], taken: list[str], free: list[str]) -> None:
    config = Config(address=tuple(map(ipaddress.ip_interface, own)))
    assert [str(address) for address in free_addresses(config, map(ipaddress.ip_network, taken))] == free


@pytest.mark.parametrize("own", ["10.7.0.1/32", "fd07::1/128", "10.7.0.2/30"])
def test_no_free_address_at_the_edges(own: str) -> None:
    with pytest.raises(ConfigurationError, match="is full"):
        free_addresses(Config(address=(ipaddress.ip_interface(own),)), [ipaddress.ip_network("10.7.0.1/32")])
