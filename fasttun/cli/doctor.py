"""`fasttun doctor`: what stands in a tunnel's way here, and how to mend it.

Exit status: 0 no failure (warnings may be), 1 a failure, 2 bad use. Not for: the checks (`fasttun.doctor`).
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ..config import DEFAULT_PORT
from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..doctor import Finding, Question

__all__ = ["doctor"]

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "fail": ("FAIL", "red"), "skipped": ("–", "")}
_LEAST_WIDTH = 60


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--server", metavar="HOST[:PORT]", help="Look as a client of this host; without it, as a listener.")
@click.option("--port", metavar="N", type=click.IntRange(1, 65535), help=f"UDP port of the listener ({DEFAULT_PORT}).")
@click.option("--config", metavar="FILE|NAME", help="A wg-quick file: its port, its first endpoint, its networks.")
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON document (schema 1).")
def doctor(server: str | None, port: int | None, config: str | None, as_json: bool) -> int:
    """Look for what goes wrong with tunnels in practice, and say how to mend it. Changes nothing.

    Device, capabilities, port, firewall, way to the server, its MTU, NAT, routes, sysctls, clock, kernel.
    Without root it looks at what it may.
    """
    question = _question(server, port, config)
    from ..doctor import document, examine, worst

    findings: list[Finding] = []
    for finding in examine(question):
        findings.append(finding)
        if not as_json:
            for line in _lines(finding):
                click.echo(line)
    if as_json:
        click.echo(json.dumps(document(question, findings), ensure_ascii=False))
    return 1 if worst(findings) == "fail" else 0


def _question(server: str | None, port: int | None, path: str | None) -> Question:
    from ..doctor import Question

    host, named = _host_port(server) if server is not None else (None, None)
    if named is not None and port is not None and named != port:
        raise ConfigurationError("port", f"{port}, and --server says {named}", "name the port once")
    port = named if port is None else port
    if path is None:
        return Question(host, port or DEFAULT_PORT)
    from ..wireguard.config import Config, config_path

    config = Config.read(config_path(path))
    endpoint = next((peer.endpoint for peer in config.peers if peer.endpoint), None)
    if host is None and endpoint is not None and config.listen_port is None:
        host, named = _host_port(endpoint)
        port = port or named
    return Question(host, port or config.listen_port or DEFAULT_PORT, config)


def _host_port(text: str) -> tuple[str, int | None]:
    """HOST, HOST:PORT, ADDRESS6, [ADDRESS6], [ADDRESS6]:PORT."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        colon, number = rest[:1], rest[1:]
        sound = bool(bracket) and (not rest or colon == ":")
    elif text.count(":") > 1:
        return text, None
    else:
        host, colon, number = text.partition(":")
        sound = True
    if not sound or not host.strip() or (colon and not (number.isdecimal() and 0 < int(number) < 65536)):
        raise ConfigurationError("server", f"{text!r} is not a host with a port", "as in 198.51.100.7:1234")
    return host, int(number) if colon else None


def _lines(finding: Finding) -> Iterator[str]:
    """One finding, the mending below it, within the terminal's width."""
    text, colour = _MARKS[finding.status]
    width = max(_LEAST_WIDTH, shutil.get_terminal_size().columns)
    lead = f"{text:8} {finding.name:13} "
    indent = " " * len(lead)
    rows = textwrap.wrap(finding.seen, width - len(lead), break_long_words=False, break_on_hyphens=False) or [""]
    yield click.style(f"{text:8}", fg=colour or None, bold=finding.status == "fail") + lead[8:] + rows[0]
    yield from (indent + row for row in rows[1:])
    if finding.mend and finding.status != "ok":
        mend = textwrap.wrap(finding.mend, width - len(lead) - 2, break_long_words=False, break_on_hyphens=False)
        yield from (f"{indent}{'→ ' if at == 0 else '  '}{row}" for at, row in enumerate(mend))
