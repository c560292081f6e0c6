"""The wording of error lines: which flag is wrong, what is wrong with it, and the way out.

The rules themselves are `fasttun.config`'s; here its field names become flags.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys

import click

from ..errors import ConfigurationError

__all__ = ["configuration", "flag_of", "system", "usage", "write_error"]

_HELP = "see fasttun --help"
_FLAGS = {
    "busy_poll_us": "--busy-poll",
    "tun_offload": "--no-tun-offload",
    "udp_gso": "--no-udp-gso",
    "udp_gro": "--no-udp-gro",
    "batch": "--no-batch",
}


def flag_of(field: str) -> str:
    """The flag that sets a field of `TunnelConfig`; a place in a file (`wg0.conf:3: MTU`) stays what it is."""
    if not re.fullmatch(r"[a-z0-9_]+", field):
        return field
    return _FLAGS.get(field, "--" + field.replace("_", "-"))


def configuration(error: ConfigurationError) -> str:
    """`--flag: problem; hint`, with other fields that the problem mentions written as flags, too."""
    role = error.field == "listen"
    hint = _as_flags(error.hint) if role else error.hint
    return f"{flag_of(error.field)}: {_as_flags(error.problem)}" + (f"; {hint}" if hint else "")


def _as_flags(text: str) -> str:
    return re.sub(r"(?<![-\w'\"])(listen|server)(?![-\w'\"])", r"--\1", text)


def usage(error: click.UsageError) -> str:
    """click's complaint in the same form."""
    if isinstance(error, click.NoSuchOption):
        near = error.possibilities or []
        hint = f"did you mean {' or '.join(sorted(near))}?" if near else _HELP
        return f"{error.option_name}: there is no such flag; {hint}"
    if isinstance(error, click.BadOptionUsage):
        problem = error.message.removesuffix(".")
        for words in (f"Option {error.option_name!r} ", f"Option '{error.option_name}' "):
            problem = problem.removeprefix(words)
        problem = problem.replace("requires an argument", "needs a value")
        return f"{error.option_name}: {problem}; {_HELP}"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{error.param.metavar or error.param.human_readable_name}: is missing; {_HELP}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        flag = max(error.param.opts, key=len)
        return f"{flag}: {error.message.removesuffix('.')}; {_HELP}"
    message = error.format_message().removesuffix(".")
    return message if "; " in message else f"{message}; {_HELP}"


def system(error: OSError) -> str:
    """An error of the system that no part of the package put into words."""
    subject = f"{error.filename}: " if error.filename else ""
    return f"{subject}{os.strerror(error.errno) if error.errno else error}"


def write_error(text: str) -> None:
    """The last line on stderr: `fasttun: …`, or a log record where a program reads the log."""
    text = " ".join(text.split())
    log = sys.modules.get("fasttun.log")  # not loaded: not set up
    if log is not None and log.is_for_machines():
        logging.getLogger("fasttun").error("%s", text)
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed: nobody to be told
        print(f"fasttun: {text}", file=sys.stderr, flush=True)
