"""What is done around a WireGuard device: in namespaces, on a plain TUN device that stands in for it.

wg-quick itself is asked for the right answer where it is installed: same file, same host, same result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.netns import Lab, Namespace, assert_unchanged, snapshot

from fasttun.device import TunDevice
from fasttun.errors import ConfigurationError, DeviceError, StateError
from fasttun.wireguard.changes import Firewall, PolicyRule, SourceMark
from fasttun.wireguard.config import Config
from fasttun.wireguard.dns import NameServers
from fasttun.wireguard.journal import Journal
from fasttun.wireguard.quick import HookError, Quick, run_hooks

KEY = "wKgTa1Nf7vJ5zj0Xc1Lk3yqHk9Jb3w0ZQmJ0oZ1cG2E="
PEER = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
OTHER = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw="

FULL = f"""
[Interface]
PrivateKey = {KEY}
Address = 10.9.0.2/24, fd09::2/64
[Peer]
PublicKey = {PEER}
AllowedIPs = 0.0.0.0/0, ::/0, 10.9.0.3/32, 192.168.77.0/24
Endpoint = 198.51.100.7:51820
"""


def config(text: str, **changes: Any) -> Config:
    return dataclasses.replace(Config.parse(text), **changes)


class StandIn:
    """A TUN device with the addresses of a configuration, and the few names of `WireGuard` that count here."""

    def __init__(self, name: str, config: Config, mtu: int | None = None) -> None:
        self.name = name
        self._config = config
        self.fwmark = config.fwmark
        self.running = True
        self.device = TunDevice.open(name)
        self.device.configure(addresses=config.address, mtu=mtu)

    def set_fwmark(self, fwmark: int) -> None:
        self.fwmark = fwmark

    def config(self) -> Config:
        return dataclasses.replace(self._config, fwmark=self.fwmark, listen_port=40404)

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close()


@pytest.fixture
def host(lab: Lab) -> Iterator[Namespace]:
    """A host with a network and a default route, the test's thread inside it."""
    ns, _, link = lab.pair()
    ns.ip("route", "add", "default", "via", link.b.v4)
    ns.ip("-6", "route", "add", "default", "via", link.b.v6)
    with ns.enter():
        yield ns


def rules(ns: Namespace, version: int = 4) -> list[str]:
    return [" ".join(line.split()) for line in ns.ip(f"-{version}", "rule", "show").splitlines()]


def routes(ns: Namespace, version: int = 4, table: str = "main") -> set[str]:
    found = ns.ip_json(f"-{version}", "route", "show", "dev", "wg0", "table", table)
    return {entry["dst"] for entry in found if entry["dst"] != "fe80::/64"}


def firewall(ns: Namespace) -> str:
    return ns.run(["nft", "-s", "list", "ruleset"]).stdout


def leads_to(ns: Namespace, target: str, *words: str) -> str:
    return str(ns.ip_json("route", "get", target, *words)[0]["dev"])


def tools(directory: Path, *names: str) -> Path:
    """A directory with just these programs, for PATH."""
    directory.mkdir(exist_ok=True)
    for name in names:
        path = shutil.which(name)
        assert path is not None, name
        (directory / name).symlink_to(path)
    return directory


# ------------------------------------------------------------------------------------------------ default route


@pytest.mark.netns
def test_a_default_route_takes_all_but_the_tunnels_own_datagrams_and_the_local_network(host: Namespace) -> None:
    host.sysctl("net.ipv4.conf.all.src_valid_mark", 0)
    before = snapshot(host)
    cfg = config(FULL)
    with StandIn("wg0", cfg) as tunnel:
        up = snapshot(host)
        quick = Quick("wg0", cfg)
        quick.apply(tunnel)
        assert tunnel.fwmark == 51820
        for target, near in (("203.0.113.5", "10.99.0.2"), ("2001:db8::5", "fd99::2")):
            assert leads_to(host, target) == "wg0"
            assert leads_to(host, target, "mark", "51820") == "eth0"
            assert leads_to(host, near) == "eth0"
        assert host.sysctl("net.ipv4.conf.all.src_valid_mark") == "1"
        assert routes(host) == {"10.9.0.0/24", "192.168.77.0/24"}, "10.9.0.3 is covered by the address"
        assert quick.undo() == []
        assert host.sysctl("net.ipv4.conf.all.src_valid_mark") == "0"
        assert firewall(host) == ""
        assert snapshot(host).rules == up.rules
        assert quick.undo() == []
    assert_unchanged(host, before)


WG_QUICK = """
mount -t tmpfs none /run && mkdir -p /run/wireguard && PATH="$2:$PATH" && {
wg-quick up "$1" && sh -c "$3"; wg-quick down "$1"; }
"""
STATE = """
ip -4 rule; ip -6 rule; ip -4 route show table all dev wg0; ip -6 route show table all dev wg0; ip -br link show wg0
nft -s list ruleset; ip -o address show dev wg0; ip link show dev wg0; sysctl net.ipv4.conf.all.src_valid_mark
"""


def normal(text: str) -> list[str]:
    """Lines in any order (a rule tells its place itself), without link-local addresses, and who made what."""
    text = re.sub(r"wg-quick-|fasttun-| proto (static|boot)| nodad| qlen \d+|\\.*|^\d+: (?=wg0)", "", text, flags=re.M)
    return sorted(" ".join(line.split()) for line in text.splitlines() if "fe80:" not in line)


@pytest.mark.netns
@pytest.mark.parametrize(
    "change",
    [
        (),
        ("0.0.0.0/0, ::/0, 10.9.0.3/32, 192.168.77.0/24", "0.0.0.0/0"),
        ("0.0.0.0/0, ::/0, 10.9.0.3/32, 192.168.77.0/24", "10.20.0.0/16, 10.20.3.0/24, fd20::/48, 10.9.0.0/25"),
        ("[Peer]", "Table = 123\n[Peer]"),
        ("[Peer]", "Table = off\n[Peer]"),
        ("[Peer]", "FwMark = 0x77\nMTU = 1300\n[Peer]"),
        ("198.51.100.7", "[2001:db8::7]"),
    ],
    ids=["full", "v4-only", "some", "table", "off", "mark", "v6"],
)
def test_the_host_looks_as_after_wg_quick(lab: Lab, tmp_path: Path, change: tuple[str, ...]) -> None:
    if not (shutil.which("wg-quick") and shutil.which("wireguard-go")):
        pytest.skip("needs wg-quick and wireguard-go (apt install wireguard-tools wireguard-go)")
    text = FULL.replace(*change) if change else FULL
    (tmp_path / "wg0.conf").write_text(text)
    (tmp_path / "wg0.conf").chmod(0o600)
    states = []
    for by_us in (False, True):
        ns, _, link = lab.pair(mtu=1492)
        for version, gateway in ((4, link.b.v4), (6, link.b.v6)):
            ns.ip(f"-{version}", "route", "add", "default", "via", gateway)
        before = snapshot(ns)
        if by_us:
            cfg = config(text)
            quick = Quick("wg0", cfg)
            with ns.enter(), StandIn("wg0", cfg, quick.mtu()) as tunnel:
                quick.apply(tunnel)
                states.append(ns.run(["sh", "-c", STATE]).stdout)
                quick.undo()
        else:
            done = ns.run(["bash", "-ec", WG_QUICK, "bash", tmp_path / "wg0.conf", tmp_path, STATE])
            states.append(done.stdout)
        assert_unchanged(ns, before)
    theirs, ours = map(normal, states)
    assert ours == theirs


@pytest.mark.netns
def test_a_table_in_use_is_passed_over(host: Namespace) -> None:
    host.ip("route", "add", "203.0.113.0/24", "dev", "eth0", "table", "51820")
    host.ip("-6", "rule", "add", "fwmark", "1", "table", "51821")
    cfg = config(FULL)
    with StandIn("wg0", cfg) as tunnel:
        quick = Quick("wg0", cfg)
        quick.apply(tunnel)
        assert tunnel.fwmark == 51822
        assert routes(host, 6, "51822") == {"default"}
        quick.undo()


@pytest.mark.netns
def test_two_full_tunnels_end_in_either_order(host: Namespace) -> None:
    """Each takes its own rules: local networks stay local, and the reverse path filter keeps heeding marks."""
    host.sysctl("net.ipv4.conf.all.src_valid_mark", 0)
    before = snapshot(host)
    first = config(FULL)
    second = config(FULL.replace("10.9.0.", "10.9.1.").replace("fd09:", "fd91:").replace("168.77", "168.78"))
    with StandIn("wg0", first) as one:
        quick_one = Quick("wg0", first)
        quick_one.apply(one)
        with StandIn("wg1", second) as two:
            quick_two = Quick("wg1", second)
            quick_two.apply(two)
            quick_one.undo()
            assert leads_to(host, "10.99.0.2") == "eth0"
            assert leads_to(host, "203.0.113.5") == "wg1"
            assert host.sysctl("net.ipv4.conf.all.src_valid_mark") == "1"
            assert "fasttun-wg0" not in firewall(host)
            assert "fasttun-wg1" in firewall(host)
            quick_two.undo()
    assert_unchanged(host, before)


@pytest.mark.netns
def test_iptables_serves_where_there_is_no_nft(
    host: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("iptables-restore"):
        pytest.skip("needs iptables-restore (apt install iptables)")
    names = [f"{kind}-{end}" for kind in ("iptables", "ip6tables") for end in ("restore", "save")]
    monkeypatch.setenv("PATH", str(tools(tmp_path / "bin", *names)))
    cfg = config(FULL)
    with StandIn("wg0", cfg) as tunnel:
        quick = Quick("wg0", cfg)
        quick.apply(tunnel)
        monkeypatch.undo()
        for program, address in (("iptables-save", "10.9.0.2/32"), ("ip6tables-save", "fd09::2/128")):
            saved = host.run([program]).stdout
            assert re.search(rf"-A PREROUTING -d {address} ! -i wg0 .*! --src-type LOCAL .*-j DROP", saved)
            assert re.search(r"-A POSTROUTING -p udp -m mark --mark 0xca6c .*-j CONNMARK --save-mark", saved)
            assert re.search(r"-A PREROUTING -p udp .*-j CONNMARK --restore-mark", saved)
        host.run(["iptables", "-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "-j", "ACCEPT"])
        assert quick.undo() == []
        left = [line for line in host.run(["iptables-save"]).stdout.splitlines() if line.startswith("-A")]
        assert left == ["-A PREROUTING -p tcp -j ACCEPT"]
        assert "-A" not in host.run(["ip6tables-save"]).stdout


@pytest.mark.netns
def test_without_any_firewall_program_the_package_is_named_and_nothing_stays(
    host: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(host)
    cfg = config(FULL)
    with StandIn("wg0", cfg) as tunnel:
        up = snapshot(host)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            with pytest.raises(DeviceError, match="apt install nftables"):
                Quick("wg0", cfg).apply(tunnel)
        assert snapshot(host).rules == up.rules
    assert_unchanged(host, before)


@pytest.mark.netns
def test_where_ipv6_is_off_the_error_says_what_to_do(host: Namespace) -> None:
    host.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
    host.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
    before = snapshot(host)
    cfg = config(FULL.replace(", fd09::2/64", ""))
    with StandIn("wg0", cfg) as tunnel, pytest.raises(DeviceError, match=r"::/0.*out of AllowedIPs"):
        Quick("wg0", cfg).apply(tunnel)
    assert_unchanged(host, before)


# ------------------------------------------------------------------------------------------------- other routes


@pytest.mark.netns
def test_a_route_that_exists_already_is_an_error_that_says_where(host: Namespace) -> None:
    host.ip("route", "add", "192.168.77.0/24", "dev", "eth0")
    before = snapshot(host)
    cfg = config(FULL.replace("0.0.0.0/0, ::/0, ", "10.44.0.0/16, "))
    with StandIn("wg0", cfg) as tunnel, pytest.raises(DeviceError, match=r"192\.168\.77\.0/24.*ip route show"):
        Quick("wg0", cfg).apply(tunnel)
    assert_unchanged(host, before)


@pytest.mark.netns
def test_routes_leave_a_device_that_stays(host: Namespace) -> None:
    host.ip("tuntap", "add", "dev", "wg0", "mode", "tun")
    cfg = config(FULL, address=())
    before = snapshot(host)
    with StandIn("wg0", cfg) as tunnel:
        quick = Quick("wg0", cfg)
        quick.apply(tunnel)
        assert routes(host) == {"192.168.77.0/24", "10.9.0.3"}
        assert quick.undo() == []
        assert routes(host) == routes(host, 4, "51820") == routes(host, 6, "51820") == set()
    assert_unchanged(host, before)


@pytest.mark.parametrize(("text", "number"), [("main", 254), ("123", 123), ("0x100", 256), ("local", 255)])
def test_a_table_is_a_number_or_a_name(text: str, number: int) -> None:
    assert Quick("wg0", config(FULL, table=text))._table == number


@pytest.mark.parametrize("text", ["nowhere", "0", "-1", "4294967296"])
def test_a_table_that_cannot_be_is_refused_before_anything_is_done(text: str) -> None:
    with pytest.raises(ConfigurationError, match="Table"):
        Quick("wg0", config(FULL, table=text))


# ---------------------------------------------------------------------------------------------------------- MTU


@pytest.mark.netns
@pytest.mark.parametrize(
    ("endpoint", "mtu"),
    [
        (None, 1412),
        ("198.51.100.7:1", 1412),
        ("[2001:db8::7]:1", 1412),
        ("10.77.0.9:1", 1220),
        ("10.99.1.2:1", 1720),
        ("127.0.0.1:1", 8920),
    ],
)
def test_the_mtu_is_that_of_the_way_to_the_endpoint_less_80(lab: Lab, endpoint: str | None, mtu: int) -> None:
    ns, other, link = lab.pair(mtu=1492)
    lab.link(ns, other, mtu=1800)
    ns.ip("route", "add", "default", "via", link.b.v4)
    ns.ip("-6", "route", "add", "default", "via", link.b.v6)
    ns.ip("route", "add", "10.77.0.0/24", "via", link.b.v4, "mtu", "1300")
    line = f"Endpoint = {endpoint}" if endpoint else ""
    with ns.enter():
        assert Quick("wg0", config(FULL.replace("Endpoint = 198.51.100.7:51820", line))).mtu() == mtu


@pytest.mark.netns
def test_the_largest_way_counts_and_one_without_a_route_does_not(lab: Lab) -> None:
    ns, other, _ = lab.pair(mtu=1492)
    lab.link(ns, other, mtu=1800)
    more = f"\n[Peer]\nPublicKey = {OTHER}\nEndpoint = 10.99.1.2:1\n"
    with ns.enter():
        assert Quick("wg0", config(FULL)).mtu() == 1420, "no route at all: Ethernet's"
        assert Quick("wg0", config(FULL + more)).mtu() == 1720
        assert Quick("wg0", config(FULL + more, mtu=1300)).mtu() == 1300


# -------------------------------------------------------------------------------------------------------- hooks


def test_hooks_run_by_bash_in_order_with_the_name_filled_in(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cfg = config(FULL, pre_up=(f"echo 1 %i-%i $INTERFACE >> {out}", f"cat <(echo 2) >> {out}; [[ a == @(a|b) ]]"))
    Quick("wg-7", cfg).pre_up()
    assert out.read_text() == "1 wg-7-wg-7 wg-7\n2\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("exit 7", "PreUp command 2 of wg0 failed with exit status 7"),
        ("false; true", "exit status 1"),
        ("false | true", "exit status 1"),
        ("kill -9 $$", "a signal: Killed"),
    ],
)
def test_a_failing_hook_ends_the_set_up(tmp_path: Path, command: str, says: str) -> None:
    cfg = config(FULL, pre_up=("true", command, f"touch {tmp_path / 'third'}"))
    with pytest.raises(HookError, match=says):
        Quick("wg0", cfg).pre_up()
    assert not (tmp_path / "third").exists()


def test_at_the_end_every_hook_runs_whatever_fails(tmp_path: Path) -> None:
    errors = run_hooks("wg0", "PostDown", ["false", f"touch {tmp_path / 'second'}"], None)
    assert errors == ["PostDown command 1 of wg0 failed with exit status 1"]
    assert (tmp_path / "second").exists()


def test_sh_serves_where_there_is_no_bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttun.wireguard.quick.shutil.which", lambda name: None)
    monkeypatch.setattr("fasttun.wireguard.quick.os.path.exists", lambda path: False)
    out = tmp_path / "out"
    with pytest.raises(HookError):
        Quick("wg0", config(FULL, pre_up=(f"echo ${{BASH_VERSION-none}} > {out}; false; true",))).pre_up()
    assert out.read_text() == "none\n"


@pytest.mark.netns
def test_a_failing_post_up_undoes_everything(host: Namespace, tmp_path: Path) -> None:
    before = snapshot(host)
    seen = tmp_path / "seen"
    cfg = config(FULL, post_up=(f"ip rule > {seen}", "false"), post_down=(f"touch {tmp_path / 'down'}",))
    journal = Journal(tmp_path / "wg0.state")
    with StandIn("wg0", cfg) as tunnel, pytest.raises(HookError, match="PostUp command 2"):
        Quick("wg0", cfg, journal=journal).apply(tunnel)
    assert "lookup 51820" in seen.read_text(), "PostUp comes last"
    assert not (tmp_path / "down").exists(), "as with wg-quick"
    assert journal.changes == []
    assert firewall(host) == ""
    assert_unchanged(host, before)


# ------------------------------------------------------------------------------------------------- name servers

RESOLVCONF = """#!/bin/sh
echo "$@" >> "$LOG"
[ "$1" != -a ] || cat >> "$LOG"
"""


@pytest.fixture
def fake_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a program into PATH that logs its words and its input; gives the log."""

    def make(name: str, script: str = RESOLVCONF) -> Path:
        path, log = tmp_path / name, tmp_path / f"{name}.log"
        path.write_text(script)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("LOG", str(log))
        return log

    return make


@pytest.mark.netns
def test_name_servers_go_to_resolvconf(host: Namespace, fake_tool: Callable[..., Path]) -> None:
    log = fake_tool("resolvconf")
    cfg = config(FULL, dns=("10.9.0.1", "fd09::1", "example.org", "lan"), table="off")
    with StandIn("wg0", cfg) as tunnel:
        quick = Quick("wg0", cfg)
        quick.apply(tunnel)
        expected = "-a wg0 -m 0 -x\nnameserver 10.9.0.1\nnameserver fd09::1\nsearch example.org lan\n"
        assert log.read_text() == expected
        assert quick.undo() == []
    assert log.read_text() == expected + "-d wg0 -f\n"


def test_debians_resolvconf_has_its_own_names(
    tmp_path: Path, fake_tool: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool("resolvconf")
    order = tmp_path / "interface-order"
    order.write_text("# comment\nlo.inet6\ntun*\ntap*\neth*\n")
    monkeypatch.setattr("fasttun.wireguard.dns._INTERFACE_ORDER", order)
    servers = NameServers.of("wg0", ("10.9.0.1",))
    assert servers is not None
    assert servers.record == "tun.wg0"


def test_name_servers_go_to_systemd_resolved(
    tmp_path: Path, fake_tool: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_tool("resolvectl")
    monkeypatch.setattr("fasttun.wireguard.dns._RESOLVED", tmp_path)
    servers = NameServers.of("lo", ("10.9.0.1", "example.org"))
    assert servers is not None
    servers.apply()
    servers.undo()
    assert log.read_text() == "dns lo 10.9.0.1\ndomain lo example.org ~.\nrevert lo\n"
    dataclasses.replace(servers, record="gone0").undo()
    assert "gone0" not in log.read_text()


def test_without_a_resolver_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"wg0.*apt install openresolv"):
        NameServers.of("wg0", ("10.9.0.1",))
    assert NameServers.of("wg0", ("example.org",)) is None, "a search domain alone changes nothing, as with wg-quick"


@pytest.mark.netns
def test_a_resolver_that_refuses_fails_the_set_up(host: Namespace, fake_tool: Callable[..., Path]) -> None:
    log = fake_tool("resolvconf", RESOLVCONF + '[ "$1" != -a ] || { echo no such luck >&2; exit 1; }')
    before = snapshot(host)
    cfg = config(FULL, dns=("10.9.0.1",))
    with StandIn("wg0", cfg) as tunnel, pytest.raises(DeviceError, match="no such luck"):
        Quick("wg0", cfg).apply(tunnel)
    assert log.read_text().endswith("-d wg0 -f\n")
    assert_unchanged(host, before)


# ------------------------------------------------------------------------------------------- SaveConfig, journal


@pytest.mark.netns
def test_save_config_writes_what_runs_and_not_the_chosen_mark(host: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    cfg = config(FULL, save_config=True, pre_down=("ip address add 10.9.9.9/32 dev %i",), mtu=1350)
    with StandIn("wg0", cfg, 1350) as tunnel:
        quick = Quick("wg0", cfg, path=path)
        quick.apply(tunnel)
        host.ip("link", "set", "wg0", "mtu", "1300")
        assert quick.pre_down(tunnel) == []
        quick.undo()
        saved = Config.read(path)
        path.unlink()
        tunnel.running = False
        assert "SaveConfig" in quick.pre_down(tunnel)[-1]
        assert not path.exists(), "a tunnel that has ended knows no peers any more"
    assert (saved.fwmark, saved.listen_port, saved.mtu) == (0, 40404, 1300)
    assert {str(address) for address in saved.address} == {"10.9.0.2/24", "fd09::2/64", "10.9.9.9/32"}


@pytest.mark.netns
def test_what_a_killed_tunnel_left_is_undone_from_its_journal(host: Namespace, tmp_path: Path) -> None:
    host.sysctl("net.ipv4.conf.all.src_valid_mark", 0)
    path = tmp_path / "wg0.state"
    before = snapshot(host)
    cfg = config(FULL)
    tunnel = StandIn("wg0", cfg)
    Quick("wg0", cfg, journal=Journal(path, config=tmp_path / "wg0.conf")).apply(tunnel)
    tunnel.device.close()
    assert snapshot(host).rules != before.rules
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KEY not in path.read_text()
    assert PEER not in path.read_text()

    left = Journal.read(path)
    assert left is not None
    assert left.config == tmp_path / "wg0.conf"
    assert {type(change) for change in left.changes} == {PolicyRule, SourceMark, Firewall}
    assert left.undo() == []
    assert firewall(host) == ""
    assert host.sysctl("net.ipv4.conf.all.src_valid_mark") == "0"
    assert_unchanged(host, before)
    assert json.loads(path.read_text())["changes"] == []


@pytest.mark.netns
def test_undoing_twice_is_no_error(lab: Lab) -> None:
    with lab.namespace().enter():
        for change in (
            PolicyRule(4, 100, 51820, 51820),
            PolicyRule(6, 99, 254, 0),
            Firewall("nft", "wg0", 4, 51820, ("10.9.0.2",)),
            Firewall("nft", "w+=g", 6, 51820, ("fd09::2",)),
        ):
            change.undo()
            change.apply()
            change.undo()
            change.undo()


class Stubborn:
    """A change that will not be undone."""

    def apply(self) -> None:
        pass

    def undo(self) -> None:
        raise DeviceError("undo", "it", 1)


def test_what_cannot_be_undone_is_told_and_the_rest_is_undone() -> None:
    undone = []

    class Willing(Stubborn):
        def undo(self) -> None:
            undone.append(self)

    journal = Journal()
    stubborn = Stubborn()
    for change in (Willing(), stubborn, Willing()):
        journal.make(change)
    errors = journal.undo()
    assert len(errors) == 1
    assert errors[0].startswith("undo it:")
    assert len(undone) == 2
    assert journal.changes == [stubborn]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": 0, "hooks": 1, "errors": [], "changes": [{"kind": "Path"}]}']
)
def test_a_damaged_journal_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wg0.state"
    assert Journal.read(path) is None
    path.write_text(text)
    with pytest.raises(StateError, match=r"wg0\.state is damaged"):
        Journal.read(path)


def test_a_journal_that_another_user_could_write_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "wg0.state"
    journal = Journal(path)
    journal.save()
    assert Journal.read(path) is not None
    path.chmod(0o620)
    with pytest.raises(StateError, match="alone"):
        Journal.read(path)
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        Journal.read(path)
