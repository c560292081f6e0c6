"""The doctor's readers, on texts of the tools; its flags, its exit status, its lines. No root needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.tunnels import bind_udp, stun_success

from fasttun.doctor import CHECKS, OK, Finding, Question, contact, document, examine, worst
from fasttun.doctor.firewall import Packet, judge, parse_iptables, parse_nft

TO_PORT = Packet("input", 1234, (4,))

SAVED = """*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:ufw-user-input - [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -j ufw-user-input
{rule}
COMMIT
"""


@pytest.mark.parametrize(
    ("rule", "drops", "unsure"),
    [
        ("", True, False),
        ("-A INPUT -p udp -m udp --dport 1234 -j ACCEPT", False, False),
        ("-A ufw-user-input -p udp -m udp --dport 1234 -j ACCEPT", False, False),
        ("-A ufw-user-input -p udp -m udp --dport 1234 -j RETURN", True, False),
        ("-A ufw-user-input -p tcp -m tcp --dport 1234 -j ACCEPT", True, False),
        ("-A INPUT -p udp -m multiport --dports 53,1000:2000 -j ACCEPT", False, False),
        ("-A INPUT -p udp -m udp ! --dport 53 -j ACCEPT", False, False),
        ("-A INPUT -p udp -m udp ! --dport 1234 -j ACCEPT", True, False),
        ("-A INPUT -s 10.0.0.0/8 -p udp -j ACCEPT", True, True),
        ("-A INPUT -i eth0 -j ACCEPT", True, True),
        ('-A INPUT -p udp -m comment --comment "let -j DROP in" -j ACCEPT', False, False),
        ("-A INPUT -j LOG --log-prefix x", True, False),
    ],
)
def test_iptables_rules_are_followed(rule: str, drops: bool, unsure: bool) -> None:
    verdict = judge(parse_iptables(SAVED.format(rule=rule), 4), TO_PORT)
    assert (verdict.drops, verdict.unsure) == (drops, unsure)
    if drops:
        assert "policy of iptables INPUT" in verdict.where


def test_a_drop_of_some_packets_only_is_not_taken_for_one_of_all() -> None:
    text = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m limit --limit 5/sec -p udp -j DROP\nCOMMIT\n"
    assert not judge(parse_iptables(text, 4), TO_PORT).drops


def test_the_other_family_and_hook_are_left_out() -> None:
    chains = parse_iptables(SAVED.format(rule=""), 6)
    assert not judge(chains, TO_PORT).drops
    assert judge(chains, Packet("input", 1234, (6,))).drops
    assert not judge(chains, Packet("output", 1234, (6,))).drops


def test_nft_jumps_and_gotos_are_followed() -> None:
    def rule(chain: str, *expr: dict[str, object]) -> dict[str, object]:
        return {"rule": {"family": "inet", "table": "t", "chain": chain, "expr": list(expr)}}

    base = {"family": "inet", "table": "t"}
    dport = {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}},
                       "right": {"set": [53, {"range": [1200, 1300]}]}}}
    text = json.dumps({"nftables": [
        {"metainfo": {"version": "1"}},
        {"chain": base | {"name": "in", "type": "filter", "hook": "input", "prio": 0, "policy": "accept"}},
        {"chain": base | {"name": "below"}},
        rule("in", dport, {"jump": {"target": "below"}}),
        rule("below", {"counter": {"packets": 0, "bytes": 0}}, {"reject": None}),
    ]})
    verdict = judge(parse_nft(text), TO_PORT)
    assert verdict.drops
    assert "in below" in verdict.where
    assert not judge(parse_nft(text), Packet("input", 1199, (4,))).drops
    assert parse_nft("") == []


@pytest.mark.parametrize("flags", [["--server", "a:b"], ["--server", "[::1"], ["--server", "host:0"], ["--server", ""],
                                   ["--port", "70000"], ["--port", "x"], ["--server", "h:1", "--port", "2"],
                                   ["--config", "/no/such/wg0.conf"], ["--nonsense"], ["word"]])  # fmt: skip
def test_bad_use_is_status_2_and_one_line(flags: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "fasttun", "doctor", *flags], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("fasttun: ")
    assert done.stderr.count("\n") == 1


def test_the_answer_tells_whom_the_server_sees() -> None:
    with bind_udp() as server:
        import threading

        def answer() -> None:
            request, sender = server.recvfrom(2048)
            server.sendto(stun_success(request[8:20], ("198.51.100.9", 4321)), sender)

        thread = threading.Thread(target=answer)
        thread.start()
        found = Question("127.0.0.1", server.getsockname()[1], timeout_s=2).contact
        thread.join()
    assert found is not None
    assert found.answered
    assert str(found.mapped) == "198.51.100.9:4321"


def test_a_greeting_has_the_size_asked_for() -> None:
    for size in (20, 24, 28, 1472):
        request, transaction = contact._request(size)
        assert len(request) == size
        assert request[8:20] == transaction
        assert int.from_bytes(request[2:4], "big") == size - 20


def test_a_check_that_is_denied_its_look_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(ask: Question) -> Finding:
        raise PermissionError(13, "Permission denied", "/proc/x")

    monkeypatch.setitem(CHECKS, "port", denied)
    found = list(examine(Question()))
    assert [finding.name for finding in found] == list(CHECKS)
    (port,) = (finding for finding in found if finding.name == "port")
    assert port.status == "skipped"
    assert "/proc/x" in port.seen


def test_the_worst_counts_and_the_document_is_complete() -> None:
    many = [Finding("a", "ok", "x"), Finding("b", "skipped", "x"), Finding("c", "warning", "x", "y")]
    assert [worst(many[:1]), worst(many[:2]), worst(many), worst([*many, Finding("d", "fail", "z")])] == [
        OK, "ok", "warning", "fail"]
    told = document(Question("h", 7), many)
    assert {"schema", "version", "server", "port", "worst", "findings"} == set(told)
    assert told["findings"][2] == {"name": "c", "status": "warning", "seen": "x", "mend": "y"}
    json.dumps(told)


@pytest.mark.parametrize("columns", ["80", "40", "200"])
def test_lines_fit_the_terminal(columns: str) -> None:
    done = subprocess.run([sys.executable, "-m", "fasttun", "doctor", "--server", "192.0.2.1.invalid"],
                          capture_output=True, text=True, env={**os.environ, "COLUMNS": columns})
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    words = max(len(word) for word in done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= max(60, int(columns), 23 + words)
    assert "FAIL     reachable" in done.stdout
