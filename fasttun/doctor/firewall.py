"""Reads this host's packet filters, nftables and iptables, and guesses what they do with a new UDP datagram.

A guess: rules are followed as far as they speak of protocol, port, interface lo and connection state; what else
they match on is taken as unknown, and a verdict that hangs on it is unsure.
Not for: changing rules, NAT, bridges, or filters on the way.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Chain", "Packet", "Rule", "Verdict", "judge", "parse_iptables", "parse_nft", "read"]

_PATIENCE_S = 5.0
_UDP = ("udp", 17)
_DEPTH = 16
"""Jumps that nft follows (NFT_JUMP_STACK_SIZE, linux/netfilter/nf_tables.h)."""


@dataclass(frozen=True)
class Packet:
    """A new datagram from or to anywhere. hook: "input" or "output". versions: of IP, any of which may be hit."""

    hook: str
    port: int
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """verdict: accept, drop, return, jump, goto, or "" for none; target: of a jump. text: as the tool shows it.

    fits: whether the packet matches; None when that cannot be told.
    """

    text: str
    verdict: str
    target: str = ""
    terms: tuple[tuple[str, bool, tuple[Any, ...]], ...] = ()
    """(what, whether it must be so, values): what is protocol, dport, interface, state, other."""

    def fits(self, packet: Packet) -> bool | None:
        sure: bool | None = True
        for what, positive, values in self.terms:
            held = _holds(what, values, packet)
            if held is None:
                sure = None
            elif held is not positive:
                return False
        return sure


@dataclass(frozen=True)
class Chain:
    """hook: "" for one that is only jumped to. tool: how rules are added, as "nft inet filter input"."""

    name: str
    tool: str
    versions: tuple[int, ...]
    hook: str
    policy: str
    rules: tuple[Rule, ...]
    group: str
    """The table: jumps stay within it."""


@dataclass(frozen=True)
class Verdict:
    """drops: whether the packet is lost. unsure: a rule that could not be judged may let it pass."""

    drops: bool
    unsure: bool = False
    where: str = ""
    tool: str = ""


def _holds(what: str, values: tuple[Any, ...], packet: Packet) -> bool | None:
    if what == "protocol":
        return any(value in _UDP or value == "all" for value in values)
    if what == "dport":
        return any(low <= packet.port <= high for low, high in values)
    if what == "interface":
        return False if set(values) == {"lo"} else None
    if what == "state":
        return "new" in {str(value).lower() for value in values}
    return None


def judge(chains: Sequence[Chain], packet: Packet) -> Verdict:
    """What becomes of `packet`: the first chain on its hook that drops it decides."""
    worst = Verdict(False)
    for chain in chains:
        if chain.hook != packet.hook or not set(chain.versions) & set(packet.versions):
            continue
        verdict, unsure, where = _walk(chain, chains, packet, 0)
        if verdict == "":
            verdict, where = chain.policy, f"the policy of {chain.tool.replace('nft ', 'nft chain ')} {_plain(chain)}"
        if verdict == "drop":
            found = Verdict(True, unsure, where.strip(), chain.tool)
            if not unsure:
                return found
            worst = found
    return worst


def _plain(chain: Chain) -> str:
    return "" if chain.tool.startswith("nft ") else chain.name


def _walk(chain: Chain, chains: Sequence[Chain], packet: Packet, depth: int) -> tuple[str, bool, str]:
    """(accept, drop or "" for neither; whether an unknown rule may have decided otherwise; where)."""
    unsure = False
    for rule in chain.rules:
        fits = rule.fits(packet)
        if fits is False or not rule.verdict:
            continue
        verdict, where = rule.verdict, f"{chain.tool.split()[0]} rule “{rule.text}” in {chain.name}"
        if verdict in ("jump", "goto"):
            below = next((c for c in chains if c.group == chain.group and c.name == rule.target), None)
            if below is None or depth >= _DEPTH:
                unsure = True
                continue
            verdict, doubt, where = _walk(below, chains, packet, depth + 1)
            unsure = unsure or doubt
            if verdict == "" and rule.verdict == "goto" and fits:
                return "", unsure, where
        if verdict == "return" and fits:
            return "", unsure, where
        if verdict in ("accept", "drop"):
            if fits:
                return verdict, unsure, where
            unsure = unsure or verdict == "accept"  # a drop of some packets only is none of this one
    return "", unsure, ""


# ------------------------------------------------------------------------------------------------------- the tools


def read() -> tuple[list[Chain], list[str]]:
    """All chains of this network namespace, and why a tool told nothing. Neither tool there: both empty."""
    chains: list[Chain] = []
    reasons: list[str] = []
    for words, parse in (
        (["nft", "-j", "list", "ruleset"], parse_nft),
        (["iptables-save"], lambda text: parse_iptables(text, 4)),
        (["ip6tables-save"], lambda text: parse_iptables(text, 6)),
    ):
        program = shutil.which(words[0], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if program is None:
            continue
        try:
            done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=_PATIENCE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{words[0]}: {error}")
            continue
        if done.returncode or (os.geteuid() != 0 and not done.stdout.strip()):
            said = (done.stderr.strip().splitlines() or ["failed"])[-1]
            reasons.append(f"{words[0]} may not be asked by this user: run the doctor with sudo" if os.geteuid()
                           else f"{words[0]}: {said}")
            continue
        try:
            chains += parse(done.stdout) or [_NOTHING]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reasons.append(f"{words[0]}'s output is not understood ({type(error).__name__})")
    return chains, reasons


_NOTHING = Chain("", "", (4, 6), "", "accept", (), "")
"""Stands for a tool that has answered: there are no rules."""
_VERSIONS = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
_XT = "xt"
"""iptables' own matches, which nft cannot tell: tables that hold one are iptables-save's to read."""


def parse_nft(text: str) -> list[Chain]:
    """The filter chains in `nft -j list ruleset` (libnftables-json(5)). ValueError or KeyError for other text."""
    chains: dict[tuple[str, str, str], dict[str, Any]] = {}
    rules: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in json.loads(text or '{"nftables": []}')["nftables"]:
        if "chain" in entry:
            chain = entry["chain"]
            chains[chain["family"], chain["table"], chain["name"]] = chain
        elif "rule" in entry:
            rule = entry["rule"]
            rules.setdefault((rule["family"], rule["table"], rule["chain"]), []).append(rule)
    foreign = {key[:2] for key, many in rules.items() if any(_XT in e for rule in many for e in rule["expr"])}
    return [
        Chain(key[2], "nft " + " ".join(key), _VERSIONS[key[0]], chain.get("hook", ""), chain.get("policy", "accept"),
              tuple(_nft_rule(rule) for rule in rules.get(key, ())), "nft " + " ".join(key[:2]))
        for key, chain in sorted(chains.items(), key=lambda item: item[1].get("prio", 0))
        if key[0] in _VERSIONS and key[:2] not in foreign and chain.get("type", "filter") == "filter"
    ]


def _nft_rule(rule: Mapping[str, Any]) -> Rule:
    verdict = target = ""
    terms: list[tuple[str, bool, tuple[Any, ...]]] = []
    shown: list[str] = []
    for expression in rule["expr"]:
        ((kind, body),) = expression.items()
        if kind == "match":
            terms += _nft_match(body)
            shown.append(_nft_text(body))
        elif kind in ("accept", "drop", "return"):
            verdict = kind
        elif kind == "reject":
            verdict = "drop"
        elif kind in ("jump", "goto"):
            verdict, target = kind, body["target"]
        elif kind in ("limit", "quota", "connlimit", "fib"):
            terms.append(("other", True, ()))
        elif kind in ("vmap", "queue"):  # where it leads is not followed: it may let the packet pass
            verdict = "accept"
            terms.append(("other", True, ()))
    text = " ".join([*shown, verdict, target]).strip()
    return Rule(text, verdict, target, tuple(terms))


def _nft_match(body: Mapping[str, Any]) -> Iterator[tuple[str, bool, tuple[Any, ...]]]:
    left, positive = body["left"], body.get("op", "==") != "!="
    values = tuple(_listed(body["right"]))
    payload, meta = left.get("payload", {}), left.get("meta", {})
    if payload.get("protocol") in ("udp", "tcp", "icmp", "icmpv6", "sctp", "udplite"):
        yield "protocol", True, (payload["protocol"],)
    if payload.get("field") == "dport":
        ranges = tuple(_range(value) for value in values)
        yield ("dport", positive, ranges) if None not in ranges else ("other", True, ())
    elif meta.get("key") == "l4proto" or payload.get("field") in ("protocol", "nexthdr"):
        yield "protocol", positive, values
    elif meta.get("key") in ("iifname", "iif", "oifname", "oif"):
        yield "interface", positive, values
    elif left.get("ct", {}).get("key") == "state":
        yield "state", positive, values
    elif meta.get("key") == "nfproto":
        yield "other", True, ()
    else:
        yield "other", True, ()


def _listed(right: Any) -> Iterable[Any]:
    if isinstance(right, dict) and "set" in right:
        right = right["set"]
    return right if isinstance(right, list) else [right]


def _range(value: Any) -> tuple[int, int] | None:
    if isinstance(value, dict) and "range" in value:
        low, high = value["range"]
        return (low, high) if isinstance(low, int) and isinstance(high, int) else None
    return (value, value) if isinstance(value, int) else None


def _nft_text(body: Mapping[str, Any]) -> str:
    left = body["left"]
    ((kind, what),) = left.items() if isinstance(left, dict) and len(left) == 1 else ((("", left)),)
    words = kind
    if isinstance(what, dict):
        words = f"{what.get('protocol', kind)} {what.get('field') or what.get('key', '')}"
    right = body["right"] if isinstance(body["right"], (str, int)) else json.dumps(body["right"])
    return f"{words} {right}".strip()


_IPTABLES_VERDICTS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}
_NO_VERDICT = frozenset({"LOG", "NFLOG", "MARK", "CONNMARK", "TRACE", "AUDIT", "SET", "CLASSIFY", "NOTRACK", "CT"})


def parse_iptables(text: str, version: int) -> list[Chain]:
    """The chains of table filter in `iptables-save`'s output; `version`: 4 or 6. ValueError for other text."""
    policies: dict[str, str] = {}
    rules: dict[str, list[Rule]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif table == "filter" and line.startswith(":"):
            name, policy = line[1:].split()[:2]
            policies[name] = policy
        elif table == "filter" and line.startswith("-A "):
            words = shlex.split(line)
            rules.setdefault(words[1], []).append(_iptables_rule(words[2:]))
    tool = "iptables" if version == 4 else "ip6tables"
    return [
        Chain(name, tool, (version,), name.lower() if name in ("INPUT", "OUTPUT", "FORWARD") else "",
              policy.lower() if policy != "-" else "", tuple(rules.get(name, ())), tool)
        for name, policy in policies.items()
    ]


def _iptables_rule(words: list[str]) -> Rule:
    terms: list[tuple[str, bool, tuple[Any, ...]]] = []
    verdict = target = ""
    text = " ".join(words)
    positive = True
    while words:
        option = words.pop(0)
        if option == "!":
            positive = False
            continue
        if option in ("-m", "--match", "--comment", "--reject-with", "--log-prefix", "--log-level"):
            words[:1] = []
            continue
        value = words.pop(0) if words and not words[0].startswith("-") and words[0] != "!" else ""
        if option in ("-j", "-g"):
            verdict, target = _iptables_verdict(option, value)
        elif option == "-p":
            terms.append(("protocol", positive, (int(value) if value.isdecimal() else value,)))
        elif option in ("--dport", "--dports", "--destination-port", "--destination-ports"):
            terms.append(("dport", positive, tuple(_colon_range(part) for part in value.split(","))))
        elif option in ("-i", "-o"):
            terms.append(("interface", positive, (value,)))
        elif option in ("--ctstate", "--state"):
            terms.append(("state", positive, tuple(value.split(","))))
        elif terms[-1:] != [("other", True, ())]:
            terms.append(("other", True, ()))
        positive = True
    return Rule(text, verdict, target, tuple(terms))


def _iptables_verdict(option: str, value: str) -> tuple[str, str]:
    if value in _NO_VERDICT:
        return "", ""
    if value in _IPTABLES_VERDICTS:
        return _IPTABLES_VERDICTS[value], ""
    return ("jump" if option == "-j" else "goto"), value


def _colon_range(text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    return int(low or 0), int(high or 65535) if colon else int(low)
