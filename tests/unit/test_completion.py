"""Completion as the shells do it, and what the command line costs before it does anything.

Each shell gets the printed script and is asked for completions; a shell that is not there is skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from fasttun.cli.command import fasttun

ROOT = Path(__file__).parents[2]
EXTRAS = {"rich", "segno", "prometheus_client", "nacl"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH whose first `fasttun` is this one."""
    shim = tmp_path / "bin" / "fasttun"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m fasttun "$@"\n')
    shim.chmod(0o755)
    return f"{shim.parent}:{os.environ['PATH']}"


def shell(name: str, path: str, code: str, *flags: str) -> str:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"no {name} here (apt install {name})")
    done = subprocess.run([program, *flags, "-c", code], capture_output=True, text=True, timeout=60,
                          env={"PATH": path, "HOME": str(Path(path.partition(":")[0]).parent), "TERM": "dumb"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


CASES = [
    ("fasttun sta", {"status"}),
    ("fasttun d", {"demo", "doctor", "down"}),
    ("fasttun --no-u", {"--no-udp-gso", "--no-udp-gro"}),
    ("fasttun doctor --s", {"--server"}),
    ("fasttun completion ", {"bash", "zsh", "fish"}),
    ("fasttun up --log-format j", {"json"}),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash_completes(path: str, line: str, expected: set[str]) -> None:
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""eval "$(fasttun completion bash)"
        complete -p fasttun >&3
        COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        _fasttun_completion fasttun
        printf '%s\\n' "${{COMPREPLY[@]}}" """
    found = shell("bash", path, f"exec 3>/dev/null; {code}", "--norc").split()
    assert set(found) == expected


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_zsh_completes(path: str, line: str, expected: set[str]) -> None:
    """With the functions of its completion system replaced by ones that print what they are given."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""compdef() {{ : }}
        compadd() {{ for word in ${{(P)${{@[-1]}}}}; do print -r -- $word; done }}
        _describe() {{ for word in ${{(P)2:-}}${{(P)3:-}}; do print -r -- ${{word%%:*}}; done }}
        eval "$(fasttun completion zsh)"
        words=({quoted}) CURRENT={len(words)}
        _fasttun_completion"""
    found = shell("zsh", path, code, "-f").split()
    assert set(found) == expected


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_fish_completes(path: str, line: str, expected: set[str]) -> None:
    code = f"fasttun completion fish | source; complete -C '{line}'"
    found = [row.split("\t")[0] for row in shell("fish", path, code, "--no-config").splitlines()]
    assert set(found) == expected


def test_completing_a_command_loads_none() -> None:
    code = ("import sys, os; os.environ.update(_FASTTUN_COMPLETE='bash_complete', COMP_WORDS='fasttun ', "
            "COMP_CWORD='1')\n"
            "from fasttun.cli import main; main([])\n"
            "print(*[n for n in sys.modules if n.startswith('fasttun.cli.')], file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "plain,doctor" in done.stdout
    assert set(done.stderr.split()) == {"fasttun.cli.command", "fasttun.cli.group", "fasttun.cli.options"}


def test_an_unknown_shell_is_named() -> None:
    done = subprocess.run([sys.executable, "-m", "fasttun", "completion", "tcsh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bash" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("word", "hint"), [("docter", "doctor"), ("stauts", "status"), ("upp", "up"),
                                            ("genkye", "genkey"), ("--liste", "--listen")])  # fmt: skip
def test_a_mistyped_word_is_answered_by_the_close_one(word: str, hint: str) -> None:
    done = subprocess.run([sys.executable, "-m", "fasttun", word], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(rf"did you mean {hint}\b", done.stderr)


@pytest.mark.parametrize("value", ["1", "", None])
def test_no_color_is_honoured(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal: script(1) gives one."""
    env = {key: text for key, text in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm", "COLUMNS": "80"}
    if value is not None:
        env["NO_COLOR"] = value
    command = f"{sys.executable} -m fasttun doctor --server 192.0.2.1.invalid"
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True, env=env,
                          stdin=subprocess.DEVNULL, cwd=ROOT)
    assert "FAIL" in done.stdout
    assert ("\x1b[" in done.stdout) is (not value)


LOADED = "import sys; from fasttun.cli import main; main(sys.argv[1:]); print('LOADED', *sys.modules)"


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["--listen", "--explain"], ["doctor", "--help"],
                                   ["completion", "bash"], ["--listen", "--port", "0"]])  # fmt: skip
def test_words_load_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, cwd=ROOT)
    loaded = {name.partition(".")[0] for name in done.stdout.partition("LOADED")[2].split()}
    assert "fasttun" in loaded, done.stderr
    assert not loaded & EXTRAS
    if "--explain" not in words:  # which asks the kernel
        assert not loaded & {"pyroute2", "asyncio"}


@pytest.mark.netns
def test_a_plain_run_loads_no_extra(lab) -> None:  # type: ignore[no-untyped-def]
    """A listener with its device, until SIGTERM; netlink is its own, the extras are not."""
    ns = lab.namespace()
    code = ("import os, signal, sys, threading; from fasttun.cli import main\n"
            "threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
            "print('STATUS', main(['--listen', '--address', '10.7.0.1/24'])); print('LOADED', *sys.modules)")
    done = ns.python(code)
    assert "STATUS 0" in done.stdout
    loaded = {name.partition(".")[0] for name in done.stdout.partition("LOADED")[2].split()}
    assert not loaded & EXTRAS


@pytest.mark.alone
def test_the_version_is_told_within_150_ms_of_pythons_own_start() -> None:
    def took(*words: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT)
        return time.perf_counter() - started

    took("-m", "fasttun", "--version")
    pairs = [(took("-c", "pass"), took("-m", "fasttun", "--version")) for _ in range(9)]
    more = statistics.median(ours for _, ours in pairs) - statistics.median(bare for bare, _ in pairs)
    assert more <= 0.150, pairs


def test_help_lists_every_command_with_its_line() -> None:
    told = CliRunner().invoke(fasttun, ["--help"]).output
    for name, command in fasttun.lazy.items():
        assert f"{name} " in told
        assert command.help.split()[0] in told
