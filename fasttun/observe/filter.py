"""The filter of `fasttun capture`: a small part of pcap-filter(7), as terms that the loop checks by itself.

    expression   conjunction { "or" conjunction }
    conjunction  term { "and" term }
    term         ["not"] primitive
    primitive    "ip" | "ip6" | "tcp" | "udp" | "icmp" | "icmp6" | "proto" NUMBER
                 | ["src" | "dst"] ("host" ADDRESS | "net" NETWORK | "port" NUMBER)

`tcp port 80` is `tcp and port 80`. There are no parentheses: write the cases out with "or".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from .._core import SIDES
from ..errors import ConfigurationError

__all__ = ["Clause", "compile_filter"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Clause = tuple[Network | None, int, int, int, int, bool, bool]

_BOTH = SIDES["source"] | SIDES["destination"]
_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmp6": 58}
_VERSIONS = {"ip": 4, "ip6": 6}
_HINT = "as in 'tcp port 443 and not host 10.7.0.1'"


def compile_filter(text: str) -> list[Clause]:
    """Terms for `Engine.capture_start`; none for an empty text. ConfigurationError (field `filter`) otherwise."""
    clauses: list[Clause] = []
    for conjunction in _split(text.lower().split(), "or"):
        terms = [_term(words) for words in _split(conjunction, "and")]
        clauses += [*terms[:-1], (*terms[-1][:6], True)]
    return clauses


def _split(words: list[str], separator: str) -> Iterator[list[str]]:
    """The parts between separators; an empty one is an error, unless there is nothing at all."""
    if not words:
        return
    part: list[str] = []
    for word in [*words, separator]:
        if word != separator:
            part.append(word)
            continue
        if not part:
            raise _wrong(f"nothing stands before or after {separator!r}")
        yield part
        part = []


def _term(words: list[str]) -> Clause:
    """All that one term says in one clause, so that "not tcp port 80" denies the two together."""
    rest = list(words)
    negated = False
    while rest and rest[0] == "not":
        negated, rest = not negated, rest[1:]
    if not rest:
        raise _wrong("nothing stands after 'not'")
    version, protocol, network, port, sides = 0, -1, None, -1, _BOTH
    if rest[0] in _PROTOCOLS:
        protocol, rest = _PROTOCOLS[rest[0]], rest[1:]
    elif rest[0] in _VERSIONS:
        version, rest = _VERSIONS[rest[0]], rest[1:]
    elif rest[0] == "proto" and len(rest) > 1:
        protocol, rest = _number(rest[1], 255), rest[2:]
    if rest and rest[0] in ("src", "dst"):
        sides, rest = SIDES["source" if rest[0] == "src" else "destination"], rest[1:]
        if not rest or rest[0] not in ("host", "net", "port"):
            raise _wrong("'src' and 'dst' stand before host, net or port")
    if rest and rest[0] in ("host", "net", "port"):
        if len(rest) < 2:
            raise _wrong(f"nothing stands after {rest[0]!r}")
        if rest[0] == "port":
            port = _number(rest[1], 65535)
        else:
            network = _network(rest[1], whole=rest[0] == "host")
            if version not in (0, network.version):
                raise _wrong(f"{rest[1]!r} is not of IPv{version}")
            version = network.version  # ::/0 holds no IPv4 addresses, though the loop keeps those mapped
        rest = rest[2:]
    if rest:
        raise _wrong(f"{rest[0]!r} is not known here")
    return network, port, version, protocol, sides, negated, False


def _network(text: str, *, whole: bool) -> Network:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise _wrong(f"{text!r} is not an address") from None
    if whole and network.num_addresses != 1:
        raise _wrong(f"{text!r} is a network; say net")
    return network


def _number(text: str, limit: int) -> int:
    if not text.isdecimal() or int(text) > limit:
        raise _wrong(f"{text!r} is not a number up to {limit}")
    return int(text)


def _wrong(problem: str) -> ConfigurationError:
    return ConfigurationError("filter", problem, _HINT)
