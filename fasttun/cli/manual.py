"""The manual page, man(7), from the same click commands as `--help`.

    python -m fasttun.cli.manual > fasttun.1

Not for: the how-tos (docs/).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator

import click

from .._version import __version__
from .group import SectionedGroup

__all__ = ["page"]

_SOURCE_WIDTH = 70

_TAIL = """\
.SH EXIT STATUS
.TP
.B 0
Done; a tunnel was ended by a signal and all is undone.
.TP
.B 1
A device, a name or the system failed; \\fBdoctor\\fR: a check failed.
.TP
.B 2
Bad use: a flag, a value or a file that cannot work, named in one line.
.TP
.B 128+N
Ended by signal N before the tunnel was set up.
.SH ENVIRONMENT
.TP
.B NO_COLOR
Not empty: no colours.
.TP
.B FASTTUN_DEBUG
1: an error shows where in the program it came from.
.TP
.B FASTTUN_RUNTIME_DIR
Where running tunnels keep the socket that \\fBstatus\\fR asks.
.TP
.B NOTIFY_SOCKET\\fR, \\fBWATCHDOG_USEC
Of the service manager, see
.BR sd_notify (3).
.SH FILES
.TP
.I /etc/wireguard/NAME.conf
What \\fBup\\fR NAME reads, as
.BR wg\\-quick (8)
does.
.TP
.I /etc/fasttun/NAME.conf
Flags of the service fasttun@NAME.
.TP
.I /run/fasttun
Sockets of the running tunnels, those of root.
.SH SEE ALSO
.BR ip (8),
.BR wg (8),
.BR wg\\-quick (8),
.BR systemd.service (5)
"""


def page(version: str = __version__, date: str | None = None) -> str:
    """The whole page. `date`: ISO; by default SOURCE_DATE_EPOCH, else today."""
    from .command import fasttun

    if date is None:
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        date = time.strftime("%Y-%m-%d", time.gmtime(float(epoch) if epoch else None))
    context = click.Context(fasttun, info_name="fasttun")
    lines = [
        f'.TH FASTTUN 1 {date} "fasttun {version}" "User Commands"',
        ".SH NAME",
        r"fasttun \- join Linux hosts into one private network",
        *_synopsis(context),
        ".SH DESCRIPTION",
        *_prose(_help(fasttun)),
        *_flags(fasttun, context),
        ".SH COMMANDS",
        *_commands(fasttun, context),
        *_epilogue(fasttun.epilog or ""),
    ]
    return "\n".join(lines) + "\n" + _TAIL


def _synopsis(context: click.Context) -> Iterator[str]:
    yield ".SH SYNOPSIS"
    for words in (r"\fB\-\-listen\fR", r"\fB\-\-server\fR \fIHOST\fR"):
        yield rf"\fBfasttun\fR {words} [\fIFLAGS\fR]"
        yield ".br"
    yield r"\fBfasttun\fR \fICOMMAND\fR [\fIFLAGS\fR] [\fIARGUMENTS\fR]"


def _flags(group: SectionedGroup, context: click.Context) -> Iterator[str]:
    yield ".SH OPTIONS"
    sections: dict[str, list[click.Parameter]] = {}
    for parameter in group.get_params(context):
        sections.setdefault(getattr(parameter, "section", "Other"), []).append(parameter)
    other = sections.pop("Other", [])
    for title, many in [*sections.items(), ("Other", other)]:
        yield f'.SS "{_escape(title)}"'
        yield from _options(many, context)


def _options(parameters: list[click.Parameter], context: click.Context) -> Iterator[str]:
    for parameter in parameters:
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            yield ".TP"
            yield _marked(record[0])
            yield from _filled(record[1])


def _commands(group: SectionedGroup, parent: click.Context) -> Iterator[str]:
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        if command is None or command.hidden:
            continue
        context = click.Context(command, info_name=name, parent=parent)
        usage = " ".join(command.collect_usage_pieces(context))
        yield f'.SS "{_escape(f"{name} {usage}".strip())}"'
        yield from _prose(_help(command))
        yield from _options(command.get_params(context), context)
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                found = command.get_command(context, below)
                if found is not None and not found.hidden:
                    yield ".TP"
                    yield rf"\fB{_escape(f'{name} {below}')}\fR"
                    yield from _filled(found.get_short_help_str(200))


def _epilogue(text: str) -> Iterator[str]:
    """Each block of the help's end: "Title:" and what is under it as written, or "Title: words" as prose."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        rows = [row for row in block.splitlines() if row.strip() != "\b"]
        title, colon, rest = rows[0].partition(":") if rows else ("", "", "")
        if not colon:
            continue
        yield f".SH {_escape(title.upper())}"
        if rest.strip():
            yield from _filled(" ".join([rest.strip(), *map(str.strip, rows[1:])]))
        else:
            yield from _as_written(rows[1:])


def _help(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").partition("\f")[0]


def _prose(text: str) -> Iterator[str]:
    for at, block in enumerate(re.split(r"\n\s*\n", text)):
        rows = block.splitlines()
        if at:
            yield ".PP"
        if rows and rows[0].strip() == "\b":
            yield from _as_written(rows[1:])
        else:
            yield from _filled(" ".join(map(str.strip, rows)))


def _filled(text: str) -> Iterator[str]:
    """Prose, in short source lines."""
    yield from map(_escape, textwrap.wrap(text, _SOURCE_WIDTH, break_long_words=False, break_on_hyphens=False))


def _as_written(rows: list[str]) -> Iterator[str]:
    yield ".nf"
    yield from map(_escape, rows)
    yield ".fi"


def _marked(flags: str) -> str:
    r"""`-v, --verbose N` with the flags bold and the rest italic."""
    words = [rf"\fB{_escape(word)}\fR" if word.startswith("-") else rf"\fI{_escape(word)}\fR" for word in flags.split()]
    return " ".join(words).replace(r",\fR", r"\fR,")


def _escape(text: str) -> str:
    """Roff's own signs out of a line: backslash, a hyphen that is to be typed, a dot or quote at the start."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace('"', r"\(dq")
    return rf"\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    sys.stdout.write(page())
