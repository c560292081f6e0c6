"""The manual page: whole, from the flags as they are, and sound to the tools that read such pages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from fasttun.cli import manual
from fasttun.cli.command import fasttun

PAGE = manual.page("9.9", "2026-01-02")


def rendered(tmp_path: Path) -> str:
    program = shutil.which("mandoc")
    file = tmp_path / "fasttun.1"
    file.write_text(PAGE)
    if program is not None:
        words = [program, "-T", "ascii", "-O", "width=100", str(file)]
    elif shutil.which("groff"):
        words = ["groff", "-man", "-Tascii", "-rLL=100n", str(file)]
    else:
        pytest.skip("neither mandoc nor groff here (apt install mandoc)")
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return re.sub(r"\x1b\[[0-9;]*m", "", re.sub(".\b", "", text))


def test_the_linter_finds_nothing(tmp_path: Path) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("no mandoc here (apt install mandoc)")
    file = tmp_path / "fasttun.1"
    file.write_text(PAGE)
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "all", str(file)], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


def test_every_flag_of_every_command_is_there(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    words = set(re.findall(r"--[a-z][a-z-]*", text))
    context = click.Context(fasttun, info_name="fasttun")
    for command in [fasttun, *(fasttun.get_command(context, name) for name in fasttun.list_commands(context))]:
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert set(parameter.opts) & (words | set(re.findall(r"(?<!\S)-\w", text))), parameter.opts
    for name in fasttun.list_commands(context):
        assert re.search(rf"^   {name}\b", text, re.M), name


def test_the_parts_come_in_mans_order(tmp_path: Path) -> None:
    titles = re.findall(r"^\.SH (.*)", PAGE, re.M)
    assert titles == ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS", "EXAMPLES", "SIGNALS",
                      "EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"]
    assert PAGE.startswith('.TH FASTTUN 1 2026-01-02 "fasttun 9.9" "User Commands"\n')
    assert "sudo fasttun --listen --address 10.7.0.1/24" in rendered(tmp_path)


def test_roffs_own_signs_are_escaped() -> None:
    assert manual._escape(r".a\b-c") == r"\&.a\eb\-c"
    assert manual._escape("'a") == r"\&'a"
    assert all(line.startswith((".TP", ".SH", ".SS", ".TH", ".nf", ".fi", ".br", ".B ", ".BR ", ".I ", ".PP"))
               for line in PAGE.splitlines() if line.startswith((".", "'")))


def test_the_date_is_the_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert ".TH FASTTUN 1 1970-01-01 " in manual.page()
