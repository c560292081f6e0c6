"""What goes wrong with tunnels in practice, looked for on this machine, each finding with its mending.

    for finding in examine(Question(server="198.51.100.7")):
        print(finding.status, finding.name, finding.seen, finding.mend)

A check is a function from `Question` to `Finding` that changes nothing; those that lack a right say so.
Not for: the screen (`fasttun.cli.doctor`), or the tunnel itself, which never calls this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._version import __version__
from . import host, path, port
from .finding import FAIL, OK, SKIPPED, STATUSES, WARNING, Finding, Question

__all__ = ["CHECKS", "FAIL", "OK", "SCHEMA", "SKIPPED", "WARNING", "Finding", "Question", "document", "examine",
           "worst"]

SCHEMA = 1
"""Of `document`: raised when a field changes its meaning or goes."""
CHECKS = {**host.CHECKS, **port.CHECKS, **path.CHECKS}
"""By the name that the finding has."""


def examine(question: Question) -> Iterator[Finding]:
    """Every check's finding, in order, as it comes. A check that the system denies its look is skipped."""
    for name, check in CHECKS.items():
        try:
            yield check(question)
        except OSError as error:
            yield Finding(name, SKIPPED, f"could not look: {error}")


def worst(findings: list[Finding]) -> str:
    """fail, warning or ok: the worst of what was found; a check left out is no trouble."""
    found = {finding.status for finding in findings}
    return next((status for status in (FAIL, WARNING) if status in found), OK)


def document(question: Question, findings: list[Finding]) -> dict[str, Any]:
    """The findings for programs: schema, version, server, port, worst, findings (name, status, seen, mend)."""
    assert all(finding.status in STATUSES for finding in findings)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "server": question.server,
        "port": question.port,
        "worst": worst(findings),
        "findings": [vars(finding) for finding in findings],
    }
