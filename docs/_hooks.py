"""What mkdocs does beyond its configuration: the command's page from `--help`, links that leave the site, prompts.

Not part of the site itself (mkdocs.yml excludes it).
"""

from __future__ import annotations

import os
import re
from typing import Any

COMMANDS = "<!-- the commands -->"
OUTSIDE = {"../README.md#how-fast": "benchmark.md", "../README.md": "index.md"}
"""Links of the pages that are also read in the repository, and where they lead on the site."""


def on_startup(**_: Any) -> None:
    """Transcripts tell commands from output by the prompts of these pages, `a# ` and the like."""
    from pygments.lexers.shell import BashSessionLexer

    BashSessionLexer._ps1rgx = re.compile(r"^(\w+[#$] )(.*\n?)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    for link, there in OUTSIDE.items():
        markdown = markdown.replace(f"]({link})", f"]({there})")
    return markdown.replace(COMMANDS, _commands()) if COMMANDS in markdown else markdown


def _commands() -> str:
    """A section for each command, subcommands too, with what its `--help` prints."""
    import click

    os.environ["NO_COLOR"] = "1"
    from fasttun.cli.command import fasttun

    parts: list[str] = []

    def add(command: click.Command, context: click.Context, level: int) -> None:
        parts.append(f"{'#' * level} {context.command_path}\n\n```text\n{command.get_help(context).strip()}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                below = command.get_command(context, name)
                assert below is not None
                if not below.hidden:
                    add(below, click.Context(below, info_name=name, parent=context, max_content_width=80), 3)

    add(fasttun, click.Context(fasttun, info_name="fasttun", max_content_width=80), 2)
    return "\n".join(parts)
