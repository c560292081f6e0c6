"""The doctor on machines that are sick for real: each fault is made in a namespace, and must be named.

A healthy pair must have no finding but ok, save the clock, which is this machine's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.netns import Lab, Namespace
from support.node import Node

pytestmark = pytest.mark.netns
PYTHON = sys.executable


def doctor(ns: Namespace, *flags: str, status: int | None = None) -> dict[str, dict[str, Any]]:
    """The findings by name, as `--json` tells them; checks the exit status against them."""
    done = ns.run([PYTHON, "-m", "fasttun", "doctor", "--json", *flags], check=False)
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    found = {finding["name"]: finding for finding in document["findings"]}
    failed = any(finding["status"] == "fail" for finding in found.values())
    assert done.returncode == (1 if failed else 0), done.stderr
    assert status is None or done.returncode == status, found
    return found


def said(finding: dict[str, Any]) -> str:
    return f"{finding['seen']} | {finding['mend']}"


@pytest.fixture
def pair(lab: Lab) -> tuple[Namespace, Namespace, str]:
    """A client, a host that listens on port 1234, and its address."""
    client, server, link = lab.pair()
    start(server)
    return client, server, link.b.v4


def start(ns: Namespace) -> subprocess.Popen[str]:
    """`fasttun --listen`, ready."""
    command = ns.popen([PYTHON, "-m", "fasttun", "--listen", "--address", "10.7.0.1/24"])
    assert command.stderr is not None
    assert "listens" in command.stderr.readline()
    return command


def test_a_healthy_pair_is_well(pair: tuple[Namespace, Namespace, str]) -> None:
    client, server, host = pair
    there = doctor(server, status=0)
    here = doctor(client, "--server", host, status=0)
    for found in (there, here):
        assert {f["status"] for name, f in found.items() if name != "clock"} <= {"ok", "skipped"}, found
        assert found["clock"]["status"] in ("ok", "warning")
    for name in ("reachable", "routing loop", "path mtu", "nat"):
        assert here[name]["status"] == "ok"
        assert there[name]["status"] == "skipped"
    assert here["path mtu"]["seen"].startswith("1500 bytes (measured): 1472 inside")
    assert here["nat"]["seen"].startswith("none")


def test_a_free_port_is_free_and_one_of_fasttun_is_no_trouble(lab: Lab) -> None:
    ns = lab.namespace()
    assert doctor(ns)["port"]["seen"] == "UDP port 1234 is free"
    command = start(ns)
    found = doctor(ns)["port"]
    assert found["status"] == "ok"
    assert f"process {command.pid}" in found["seen"]


def test_a_taken_port_has_its_holder_named(lab: Lab) -> None:
    ns = lab.namespace()
    code = "import socket; s = socket.socket(2, 2); s.bind(('0.0.0.0', 1500)); print(flush=True); input()"
    holder = ns.popen([PYTHON, "-c", code], stdin=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    found = doctor(ns, "--port", "1500", status=1)["port"]
    assert found["status"] == "fail"
    assert f"process {holder.pid}" in found["seen"]
    assert "--port 1501" in found["mend"]


@pytest.mark.parametrize("rule", ["-p udp --dport 1234 -j DROP", "-p udp -m multiport --dports 53,1200:1300 -j REJECT"])
def test_an_iptables_drop_is_named_on_the_listener(lab: Lab, rule: str) -> None:
    ns = lab.namespace()
    ns.run(["iptables", "-A", "INPUT", *rule.split()])
    found = doctor(ns, status=1)["firewall"]
    assert found["status"] == "fail"
    assert "looks like" in found["seen"]
    assert rule.split()[-1] in found["seen"] or "drop" in found["seen"]
    assert "1234" in found["mend"]
    assert doctor(ns, "--port", "4321")["firewall"]["status"] == "ok"


NFT_POLICY = """table inet filter {
    chain input {
        type filter hook input priority 0; policy drop;
        ct state established,related accept
        iifname "lo" accept
        tcp dport 22 accept
        %s
    }
}
"""


@pytest.mark.parametrize(
    ("rule", "status"),
    [("", "fail"), ("udp dport 1234 accept", "ok"), ("udp dport { 53, 1200-1300 } accept", "ok"),
     ("udp dport 1235 accept", "fail"), ("ip saddr 10.0.0.0/8 udp dport 1234 accept", "warning"),
     ("meta l4proto udp accept", "ok")],
)  # fmt: skip
def test_an_nft_policy_that_drops_is_named(lab: Lab, rule: str, status: str) -> None:
    ns = lab.namespace()
    ns.run(["nft", "-f", "-"], input=NFT_POLICY % rule)
    found = doctor(ns)["firewall"]
    assert found["status"] == status, found
    if status != "ok":
        assert "the policy of nft chain inet filter input" in found["seen"]
        assert "nft insert rule inet filter input udp dport 1234 accept" in found["mend"]


def test_the_mending_of_the_firewall_mends(lab: Lab) -> None:
    ns = lab.namespace()
    ns.run(["nft", "-f", "-"], input=NFT_POLICY % "udp dport 1000-2000 drop")
    found = doctor(ns, status=1)["firewall"]
    assert "udp dport" in found["seen"]
    ns.run(found["mend"].partition(": ")[2].split())
    assert doctor(ns, status=0)["firewall"]["status"] == "ok"


def test_a_firewall_at_the_server_leaves_the_client_without_answer(pair: tuple[Namespace, Namespace, str]) -> None:
    client, server, host = pair
    server.run(["iptables", "-I", "INPUT", "-p", "udp", "--dport", "1234", "-j", "DROP"])
    found = doctor(client, "--server", host, status=1)
    assert found["reachable"]["status"] == "fail"
    assert "does not answer" in found["reachable"]["seen"]
    assert "dport 1234 accept" in found["reachable"]["mend"]
    assert found["path mtu"]["status"] == "skipped"


def test_a_firewall_on_the_client_is_named(pair: tuple[Namespace, Namespace, str]) -> None:
    client, _, host = pair
    client.run(["iptables", "-A", "OUTPUT", "-p", "udp", "--dport", "1234", "-j", "DROP"])
    found = doctor(client, "--server", host, status=1)
    assert "refuses to send" in found["reachable"]["seen"]
    assert found["firewall"]["status"] == "fail"


def test_a_port_where_nobody_listens_is_refused(pair: tuple[Namespace, Namespace, str]) -> None:
    client, _, host = pair
    found = doctor(client, "--server", f"{host}:1235", status=1)["reachable"]
    assert "refused" in found["seen"]


def test_no_route_is_named(lab: Lab) -> None:
    found = doctor(lab.namespace(), "--server", "198.51.100.7", status=1)
    assert "no way to" in found["reachable"]["seen"]
    assert found["routing loop"]["status"] == "skipped"


@pytest.mark.parametrize("icmp", [True, False], ids=["told", "black hole"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_narrow_path_is_measured(lab: Lab, icmp: bool, version: int) -> None:
    client, router, server, _, far = lab.routed(mtu=1360)
    if not icmp:
        router.run(["iptables", "-A", "OUTPUT", "-p", "icmp", "--icmp-type", "fragmentation-needed", "-j", "DROP"])
        router.run(["ip6tables", "-A", "OUTPUT", "-p", "icmpv6", "--icmpv6-type", "packet-too-big", "-j", "DROP"])
    host = far.b.v4 if version == 4 else far.b.v6
    with Node(server, listen=True, address="10.7.0.1/24"):
        found = doctor(client, "--server", host if version == 4 else f"[{host}]:1234", status=0)["path mtu"]
    inner = 1360 - (28 if version == 4 else 48)
    assert found["seen"].startswith(f"1360 bytes (measured): {inner} inside"), found
    if icmp:
        assert "ICMP says" in found["seen"]
    else:
        assert "no ICMP" in found["seen"]
        assert f"--mtu {inner}" in found["mend"]


def test_nat_is_named(lab: Lab) -> None:
    client, router, server, near, far = lab.routed()
    router.run(["iptables", "-t", "nat", "-A", "POSTROUTING", "-o", far.a.device, "-j", "MASQUERADE"])
    with Node(server, listen=True, address="10.7.0.1/24"):
        found = doctor(client, "--server", far.b.v4, status=0)["nat"]
    assert f"{near.a.v4}:" in found["seen"]
    assert f"appears as {far.a.v4}:" in found["seen"]


def test_a_route_that_covers_the_server_is_named(pair: tuple[Namespace, Namespace, str]) -> None:
    client, _, host = pair
    client.ip("tuntap", "add", "dev", "tun7", "mode", "tun")
    client.up("tun7")
    client.ip("route", "add", f"{host}/32", "dev", "tun7")
    found = doctor(client, "--server", host, status=1)["routing loop"]
    assert found["status"] == "fail"
    assert "tun7" in found["seen"]
    assert f"ip route add {host}" in found["mend"]


def test_wg_quicks_way_around_the_tunnel_is_no_loop(pair: tuple[Namespace, Namespace, str]) -> None:
    client, _, host = pair
    client.ip("tuntap", "add", "dev", "wg0", "mode", "tun")
    client.up("wg0")
    client.ip("route", "add", "default", "dev", "wg0", "table", "51820")
    client.ip("rule", "add", "not", "fwmark", "51820", "table", "51820")
    found = doctor(client, "--server", host)["routing loop"]
    assert found["status"] == "ok", found
    assert "0xca6c" in found["seen"]


def test_a_missing_tun_device_is_named(lab: Lab) -> None:
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$0" -m fasttun doctor --json', PYTHON],
        capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}["tun"]
    assert "does not exist" in found["seen"]
    assert "--device /dev/net/tun --cap-add NET_ADMIN" in found["mend"]


def test_a_forbidden_tun_device_and_no_rights_are_named(lab: Lab) -> None:
    """As a container without --device: the node is there and may not be opened, and CAP_NET_ADMIN is gone."""
    drop = "mount -t tmpfs -o nodev none /dev/net && mknod -m 0666 /dev/net/tun c 10 200 &&"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c",
         f'{drop} exec setpriv --bounding-set -net_admin --inh-caps -net_admin "$0" -m fasttun doctor --json', PYTHON],
        capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[2])
    assert done.returncode == 1, done.stderr
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    for name in ("tun", "capabilities"):
        assert found[name]["status"] == "fail"
        assert "--cap-add NET_ADMIN" in said(found[name])


def test_without_root_it_looks_at_what_it_may(pair: tuple[Namespace, Namespace, str]) -> None:
    client, server, host = pair
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs", PYTHON,
               "-m", "fasttun", "doctor", "--json", "--server", host]
    done = client.run(command, check=False, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert found["capabilities"]["status"] == "warning"
    assert "sudo" in found["capabilities"]["mend"]
    assert found["firewall"]["status"] == "skipped"
    assert "run the doctor with sudo" in found["firewall"]["seen"]
    assert found["path mtu"]["seen"].startswith("1500 bytes (measured)")
    small = int(server.sysctl("net.core.rmem_max")) if os.path.exists("/proc/sys/net/core/rmem_max") else 0
    if 0 < small < 7 << 20:
        assert found["buffers"]["status"] == "warning"
        assert f"net.core.rmem_max={7 << 20}" in found["buffers"]["mend"]


def test_a_strict_reverse_path_filter_of_a_router_is_named(lab: Lab) -> None:
    ns = lab.namespace()
    ns.sysctl("net.ipv4.conf.all.rp_filter", 1)
    assert doctor(ns)["reverse path"]["status"] == "ok"
    ns.forward()
    found = doctor(ns)["reverse path"]
    assert found["status"] == "warning"
    assert "rp_filter=2" in found["mend"]
    assert doctor(ns)["forwarding"]["seen"] == "packets between networks are passed on"


KEY = "YAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
PUBLIC = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="


def test_a_wireguard_listener_between_networks_needs_forwarding(lab: Lab, tmp_path: Path) -> None:
    ns = lab.namespace()
    file = tmp_path / "wg0.conf"
    file.write_text(f"[Interface]\nPrivateKey = {KEY}\nListenPort = 51820\nAddress = 10.7.0.1/24\n"
                    f"[Peer]\nPublicKey = {PUBLIC}\nAllowedIPs = 10.7.0.2/32, 192.168.5.0/24\n")
    file.chmod(0o600)
    found = doctor(ns, "--config", str(file))
    assert found["forwarding"]["status"] == "warning"
    assert "net.ipv4.ip_forward=1" in found["forwarding"]["mend"]
    assert found["port"]["seen"] == "UDP port 51820 is free"


def test_a_wireguard_clients_mtu_and_keepalive_are_judged(lab: Lab, tmp_path: Path) -> None:
    """The server is one that answers greetings, so that the path is measured."""
    client, _router, server, _near, far = lab.routed(mtu=1400, masquerade=True)
    file = tmp_path / "wg0.conf"
    file.write_text(f"[Interface]\nPrivateKey = {KEY}\nAddress = 10.7.0.2/24\nMTU = 1420\n"
                    f"[Peer]\nPublicKey = {PUBLIC}\nAllowedIPs = 10.7.0.0/24\nEndpoint = {far.b.v4}:1234\n")
    file.chmod(0o600)
    with Node(server, listen=True, address="10.7.0.1/24"):
        found = doctor(client, "--config", str(file), status=1)
    assert found["path mtu"]["status"] == "fail"
    assert found["path mtu"]["mend"] == "set MTU = 1340"
    assert found["nat"]["status"] == "warning"
    assert "PersistentKeepalive = 25" in found["nat"]["mend"]


def test_a_silent_wireguard_server_is_no_failure_and_icmp_still_tells_the_mtu(lab: Lab, tmp_path: Path) -> None:
    client, _router, server, _near, far = lab.routed(mtu=1400)
    file = tmp_path / "wg0.conf"
    file.write_text(f"[Interface]\nPrivateKey = {KEY}\nAddress = 10.7.0.2/24\n"
                    f"[Peer]\nPublicKey = {PUBLIC}\nAllowedIPs = 10.7.0.0/24\nEndpoint = {far.b.v4}:51820\n")
    file.chmod(0o600)
    code = "import socket; s = socket.socket(2, 2); s.bind(('0.0.0.0', 51820)); print(flush=True); input()"
    silent = server.popen([PYTHON, "-c", code], stdin=subprocess.PIPE)
    assert silent.stdout is not None
    silent.stdout.readline()
    found = doctor(client, "--config", str(file), status=0)
    assert "neither proof nor trouble" in found["reachable"]["seen"]
    assert found["path mtu"]["seen"].startswith("1400 bytes (as ICMP and the route tell")
