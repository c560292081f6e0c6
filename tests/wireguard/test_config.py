"""wg-quick's format: what people have written works unchanged, and what is wrong is named with file, line and field."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import subprocess
import time
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.netns import missing

from fasttun import Config
from fasttun.errors import ConfigurationError
from fasttun.wireguard.config import PeerConfig, check_endpoint, config_path, interface_name, read_sections
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
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = fe80::1%eth0/64", "x.conf:3: AllowedIPs"),
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.0.0.0/255.0.0.0", "x.conf:3: AllowedIPs"),
    ("[Peer]\nEndpoint = [host:1", "x.conf:2: Endpoint"),
    ("[Peer]\nEndpoint = host:no-such-service", "x.conf:2: Endpoint"),
    ("[Peer]\nEndpoint = 2001:db8::1", "x.conf:2: Endpoint"),
    ("[Peer]\nPersistentKeepalive = 2_5", "x.conf:2: PersistentKeepalive"),
    ("[Peer]\nPersistentKeepalive = ٢٥", "x.conf:2: PersistentKeepalive"),
    ("[Interface]\nFwMark = 0o17", "x.conf:2: FwMark"),
    ("[Interface]\nAddress = fe80::1%eth0/64", "x.conf:2: Address"),
    ("[Interface]\nPostUp = a\0b", "x.conf:2: a line: holds a NUL"),
    ("[[Peer]]", r"x.conf:1: \[\[Peer\]\]: is no section"),
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
                 f"PrivateKey = {secret}", f"[Interface]\nMTU = 1420 PrivateKey = {secret}",
                 f"[Interface]\nListenPort = {secret}", f"[Interface]\nAddress = {secret}", f"[{secret}]",
                 f"[Peer]\nEndpoint = {secret}", f"[Peer]\nAllowedIPs = {secret}", f"[Interface]\nTable = a {secret}"):
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
        Config.read(path)
    assert caplog.text.count("chmod 600") == 1
    with pytest.raises(ConfigurationError, match="No such file"):
        Config.read(tmp_path / "none.conf")


def test_a_file_that_others_own_says_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigurationError, match=r"wg0\.conf: Permission denied; only its owner can: run it as root"):
        Config.read(tmp_path / "wg0.conf")


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
        begin = time.process_time()
        assert len(Config.parse(text).peers) == count
        return time.process_time() - begin

    def least(count: int) -> float:
        return min(seconds(count) for _ in range(3))

    keys = [PrivateKey.generate().public for _ in range(4000)]
    assert least(4000) < 40 * max(least(400), 0.005)


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


# What `wg` takes and refuses, as `wg setconf` of wireguard-tools 1.0.20210914 does; checked against the one installed.
LIKE_WG = [
    ("[Interface]\nFwMark = 010\n", True), ("[Interface]\nFwMark = OFF\n", True),
    ("[Interface]\nFwMark = 0X10\n", False), ("[Interface]\nFwMark = -1\n", False),
    ("[Interface]\nFwMark = 0x\n", False), ("[Interface]\nListen Port = 5 1\n", True),
    (f"[ Peer ]\nPublicKey = {PEER}\n", True), (f"[Peer]\nPublicKey = {PEER}\nEndpoint = 2001:db8::1:51820\n", True),
    (f"[Peer]\nPublicKey = {PEER}\nEndpoint = [127.0.0.1]:5\n", True),
    (f"[Peer]\nPublicKey = {PEER}\nEndpoint = 127.0.0.1\n", False),
    (f"[Peer]\nPublicKey = {PEER}\nEndpoint = [::1]\n", False),
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.0.0.2 / 32, 10.0.0.77/24\n", True),
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = 010.0.0.1\n", False),
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.0.0/24\n", False),
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = ::/129\n", False),
    (f"[Peer]\nPublicKey = {PEER}\nPersistentKeepalive = 0025\n", True),
    (f"[Peer]\nPublicKey = {PEER}\nPersistentKeepalive = 65536\n", False),
    (f"[Peer]\nPublicKey = {PEER}\nPublicKey = {OTHER}\n", True), ("[Peer]\nAllowedIPs = ::/0\n", False),
    ("[Interface]\nPrivateKey = abc\n", False), ("[Interface]\nFoo = 1\n", False), ("ListenPort = 1\n", False),
]


@pytest.mark.parametrize(("text", "right"), LIKE_WG)
def test_what_wg_takes_is_taken(text: str, right: bool, tmp_path: Path) -> None:
    if right:
        assert Config.parse(Config.parse(text).text()) == Config.parse(text)
    else:
        with pytest.raises(ConfigurationError):
            Config.parse(text)
    if shutil.which("wg"):
        path = tmp_path / "x.conf"
        path.write_text(text)
        # No such device: it has read the file by the time it says so.
        said = subprocess.run(["wg", "setconf", "no-such-dev", str(path)], capture_output=True, text=True).stderr
        assert ("onfiguration" not in said) == right, said


TWICE = f"[Peer]\nPublicKey = {PEER}\nPresharedKey = {PSK.to_base64()}\nAllowedIPs = 10.0.0.1/32\n" \
        f"PersistentKeepalive = 5\nEndpoint = 127.0.0.1:7\n[Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.0.0.2/32\n"
VALUES = [
    ("[Interface]\nFwMark = 010\nListenPort = 051820\n", Config(fwmark=10, listen_port=51820)),
    (TWICE, Config(peers=(PeerConfig(PEER, PSK, (ip_network("10.0.0.2/32"),), "127.0.0.1:7", 5),))),
    (f"[Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.0.0.1/32\n[Peer]\nPublicKey = {PEER}\nEndpoint = ::1:9\n",
     Config(peers=(PeerConfig(PEER, endpoint="[::1]:9"),))),
    (f"[Peer]\nPublicKey = {OTHER}\nPublicKey = {PEER}\nAllowedIPs = 10.0.0.1\nAllowedIPs = fd00::1\n",
     Config(peers=(PeerConfig(PEER, allowed_ips=(ip_network("10.0.0.1/32"), ip_network("fd00::1/128"))),))),
]


@pytest.mark.parametrize(("text", "meant"), VALUES)
def test_repeated_keys_mean_what_they_mean_to_wg(text: str, meant: Config) -> None:
    assert Config.parse(text) == meant


@pytest.mark.netns
def test_a_device_that_wg_configures_has_what_we_read() -> None:
    if missing() or not (shutil.which("wg") and shutil.which("wireguard-go")):
        pytest.skip(missing() or "needs wg and wireguard-go")
    from support.netns import Lab
    from support.wireguard_go import Go

    with Lab() as lab, Go(lab.pair()[0], Config(private_key=KEY)) as go:
        for text, meant in VALUES:
            go.wg("setconf", go.device, "/dev/stdin", input=text)
            device, *peers = (line.split("\t") for line in go.wg("show", go.device, "dump")[1].splitlines())
            assert int(device[3].replace("off", "0"), 0) == meant.fwmark
            assert meant.listen_port in (None, int(device[2]))
            assert [(row[0], row[1], row[2], row[3], row[7]) for row in peers] == [
                (str(peer.public_key), peer.preshared_key.to_base64() if peer.preshared_key else "(none)",
                 peer.endpoint or "(none)", ",".join(map(str, peer.allowed_ips)) or "(none)",
                 str(peer.persistent_keepalive or "off")) for peer in meant.peers]


def test_a_name_stands_in_its_section_or_directly_above() -> None:
    def names(text: str) -> list[str | None]:
        return [peer.name for peer in Config.parse(text).peers]

    a, b = f"PublicKey = {PEER}\n", f"PublicKey = {OTHER}\n"
    assert names(f"[Peer]\n#name=ann\n{a}[Peer]\n{b}# Name = ben\n") == ["ann", "ben"]
    assert names(f"# Name = ann\n[Peer]\n{a}\n### Name = ben\n# his phone\n[Peer]\n{b}") == ["ann", "ben"]
    assert names(f"[Interface]\n# Name = ann\n[Peer]\n{a}# Name = ben\n[Peer]\n{b}") == ["ann", "ben"]
    # Free between two sections, or part of a section that is switched off: nobody's.
    assert names(f"[Peer]\n{a}\n# Name = who\n\n[Peer]\n{b}") == [None, None]
    assert names(f"[Peer]\n{a}\n#[Peer]\n# Name = who\n#PublicKey = x\n[Peer]\n{b}# Name =\n") == [None, None]


def test_a_file_in_another_encoding_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    text = f"[Interface]\n# B\xfcro\nMTU = 1400\n[Peer]\n# Name = J\xfcrg\nPublicKey = {PEER}\n"
    path.write_bytes(text.encode("latin-1"))
    config = Config.read(path)
    assert config.mtu == 1400
    assert config.peers[0].name == "J�rg"
    config.write(path)
    assert Config.read(path) == config


@pytest.mark.parametrize("config", [
    Config(post_up=("a\nPreDown = b",)), Config(post_up=("iptables -m comment --comment '#1'",)), Config(table="1\n2"),
    Config(peers=(PeerConfig(PEER, name="a\nEndpoint = 192.0.2.1:1"),)), Config(dns=("a#b",)),
    Config(peers=(PeerConfig(PEER, endpoint="host:1\n[Peer]"),)),
])
def test_what_no_line_can_hold_is_not_written(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no line of a file can hold"):
        config.write(tmp_path / "wg0.conf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [
    "host", "host:", ":1", "a b:1", "[::1]", "host:65536", "[::1:2", "a,b:1", "h:\udcff", ""])
def test_an_endpoint_that_is_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^endpoint: "):
        check_endpoint(text)


WORDS = st.text("abcxyz0189._-/=:%$'\"|&;ü ", min_size=1, max_size=30).map(str.strip).filter(bool)
NETWORKS = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1).map(IPv4Address), st.integers(0, 32)),
    st.tuples(st.integers(2**125, 2**126 - 1).map(IPv6Address), st.integers(0, 128)),
).map(lambda pair: f"{pair[0]}/{pair[1]}")
PEERS = st.builds(
    PeerConfig, public_key=st.integers(1, 9).map(lambda seed: PrivateKey(bytes([seed]) * 32).public),
    preshared_key=st.none() | st.just(PSK), endpoint=st.sampled_from([None, "a.b:1", "[fe80::1%x]:65535", "1.2.3.4:5"]),
    allowed_ips=st.lists(NETWORKS.map(lambda text: ip_network(text, strict=False)), unique=True, max_size=3).map(tuple),
    persistent_keepalive=st.integers(0, 65535), name=st.none() | WORDS)
CONFIGS = st.builds(
    Config, private_key=st.none() | st.just(KEY), listen_port=st.none() | st.integers(0, 65535),
    fwmark=st.integers(0, 2**32 - 1), address=st.lists(NETWORKS.map(ip_interface), max_size=3).map(tuple),
    dns=st.lists(st.sampled_from(["1.1.1.1", "fd00::53", "lan", "example.org"]), max_size=3).map(tuple),
    mtu=st.none() | st.integers(68, 65535), table=st.sampled_from(["auto", "off", "7", "main"]),
    pre_up=st.lists(WORDS, max_size=2).map(tuple), post_down=st.lists(WORDS, max_size=2).map(tuple),
    save_config=st.booleans(), peers=st.lists(PEERS, unique_by=lambda peer: peer.public_key, max_size=3).map(tuple))


@given(CONFIGS)
def test_every_configuration_comes_back_from_its_text(config: Config) -> None:
    assert Config.parse(config.text()) == config


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ConfigurationError):
        Config.parse(data.decode("utf-8", "surrogateescape"))


@given(st.lists(st.sampled_from([*EVERYTHING.split("\n"), "", "# x", "[Interface]", "#[Peer]", "\r"]), max_size=40))
def test_sections_never_overlap(lines: list[str]) -> None:
    end = 0
    with contextlib.suppress(ConfigurationError):
        for section in read_sections("\n".join(lines)):
            assert end <= section.first <= section.header < section.end <= len(lines)
            end = section.end
