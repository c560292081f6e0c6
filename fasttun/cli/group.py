"""A click group that is itself a program: flags in named sections, subcommands loaded when called.

Knows nothing of tunnels.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["LazyCommand", "SectionOption", "SectionedGroup"]


@dataclass(frozen=True)
class LazyCommand:
    """A subcommand that is not imported before it is called. `attribute`: the click command in `module`."""

    module: str
    attribute: str
    help: str

    def load(self) -> click.Command:
        command = getattr(importlib.import_module(self.module), self.attribute)
        assert isinstance(command, click.Command)
        return command


class SectionOption(click.Option):
    """An option that `--help` lists under a heading of its own."""

    def __init__(self, *args: Any, section: str = "Other", **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.section = section


class SectionedGroup(click.Group):
    """Runs by itself, or with one of its `lazy` commands."""

    def __init__(self, *args: Any, lazy: Mapping[str, LazyCommand] | None = None, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.lazy = dict(lazy or {})

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """As click's, and NO_COLOR (no-color.org) holds in this context and those below it."""
        if os.environ.get("NO_COLOR"):
            extra.setdefault("color", False)
        return super().make_context(*args, **extra)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click's, without loading the commands whose names are shown."""
        from click.shell_completion import CompletionItem

        rows = [(name, command.help) for name, command in self.lazy.items()]
        found = [CompletionItem(name, help=text) for name, text in rows if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.lazy:
            return self.lazy[cmd_name].load()
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not ctx.resilient_parsing and name not in self.list_commands(ctx):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"did you mean {near[0]}?" if near else "a host is named with --server; see fasttun --help"
            raise click.UsageError(f"{name}: there is no such command; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        width = max((len(flag) for rows in sections.values() for flag, _ in rows), default=0)
        for title, rows in _last(sections, "Other"):
            with formatter.section(title):
                formatter.write_dl(_padded(rows, width), col_max=width + 2)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.help) for name, command in self.lazy.items()]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def _last(sections: Mapping[str, list[tuple[str, str]]], name: str) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    return sorted(sections.items(), key=lambda item: item[0] == name)


def _padded(rows: list[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """The same first column in each section."""
    return [(flag.ljust(width), text) for flag, text in rows]
