"""Runs the code blocks of a documentation page as its reader would, and compares what the page shows.

The convention, in the pages' Markdown:

- A ```console block is a terminal's transcript. A line that starts with `NAME# ` or `NAME$ ` is a command, typed
  into the shell of that name; `> ` continues it; the lines up to the next prompt are its output. `host#` is root's
  shell on the machine, `a#` root's in the network namespace a, `a$` the shell there of the user that the page
  makes with setpriv (UID 1000). Each shell lives for the whole run: directories, variables and jobs stay.
- A block of any language with a title is a file of that name in the working directory, which all shells share.
- `…` in an output line stands for any text, alone on a line for any lines. What differs from run to run by nature
  (VOLATILE) is compared without its value. All other output must be the shown one. A command of which no output
  is shown prints nothing and succeeds; where output is shown, that decides.
- A reader types more slowly than a program: for some seconds after a command that ends with `&`, what fails is
  tried again.
- Two comments, on the line before a block: with <!-- test: skip REASON --> it is not run; with
  <!-- test: numbers vary --> only the words of its output are compared, each number is as good as another.

Nothing else is set up: shells start in an empty directory on a machine that has an own network (no interface but a
loopback that is down), own processes, an empty /run and an empty /etc/wireguard.

    python tests/support/transcript.py PAGE…     runs the pages, one after the other on the same machine, and
                                                 writes what was really printed into them where it differs
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Block", "Machine", "Step", "blocks", "matches", "steps"]

COMMAND_TIMEOUT_S = 20.0
PATIENCE_S = 15.0
WORK = "/run/work"

FENCE = re.compile(r"^ {0,3}(?P<fence>`{3,})(?P<language>[a-z]*)(?: (?P<rest>.*))?$")
TITLE = re.compile(r'title="([^"]+)"')
SKIP = re.compile(r"<!-- test: skip (?P<reason>.+) -->")
NUMBERS = re.compile(r"<!-- test: numbers vary -->")
PROMPT = re.compile(r"^(?P<shell>[a-z][a-z0-9]*)(?P<mark>[#$]) (?P<command>.*)$")

VOLATILE = [
    (re.compile(r"\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b"), "MAC"),
    (re.compile(r"\b\d{4}-\d\d-\d\dT[\d:.]+Z"), "TIME"),
    (re.compile(r"(?<= = )[\d.]+(/[\d.]+){2,3} ms"), "TIMES"),                               # ping's last line
    (re.compile(r"\b\d\d:\d\d:\d\d(\.\d+)?\b"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? ?(ns|us|µs|ms|s)\b"), "DURATION"),
    (re.compile(r"^\d+(?=: [\w@.-]+: <)"), "INDEX"),                                          # ip link
    (re.compile(r"(?<=@if)\d+"), "INDEX"),
    (re.compile(r"(?<=\bid )\d+"), "ID"),                                                     # tcpdump
    (re.compile(r"(?<=\bseq )\d+"), "SEQ"),
    (re.compile(r"(?<=[.:])(3[2-9]|[4-6]\d)\d{3}(?=[ :,]|$)"), "PORT"),                       # an ephemeral one
    (re.compile(r"(?<=\bport )(3[2-9]|[4-6]\d)\d{3}\b"), "PORT"),
    (re.compile(r"\bfe80::[0-9a-f:]+"), "LINK-LOCAL"),
    (re.compile(r"[A-Za-z0-9+/]{43}="), "KEY"),
    (re.compile(r"\b(process|pid|PID) \d+"), r"\1 PID"),
]


@dataclass(frozen=True)
class Block:
    """A fenced block. `line`: of its fence, from 1. `skip`: why it is not run, or ""."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    skip: str
    numbers_vary: bool = False


@dataclass(frozen=True)
class Step:
    """A command and what the page shows of it. `start`, `end`: the output's lines in the page, as a slice."""

    page: Path
    line: int
    shell: str
    root: bool
    command: str
    shown: str
    start: int
    end: int
    numbers_vary: bool = False

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}: {self.shell}{'#' if self.root else '$'} {self.command}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text().splitlines()
    fence, start, before, words = "", 0, "", {"language": "", "rest": ""}
    for number, line in enumerate(lines, 1):
        found = FENCE.match(line)
        if not fence and found:
            fence, start, words = found["fence"], number, found.groupdict()
            before = next((text for text in reversed(lines[: number - 1]) if text.strip()), "")
        elif fence and line.strip() == fence:
            title, skip = TITLE.search(words["rest"] or ""), SKIP.search(before)
            yield Block(page, start, words["language"] or "", title[1] if title else "",
                        "\n".join(lines[start : number - 1]) + "\n", skip["reason"] if skip else "",
                        NUMBERS.search(before) is not None)
            fence = ""
    assert not fence, f"{page}:{start}: the block does not end"


def steps(block: Block) -> list[Step]:
    """The commands of a console block."""
    found: list[Step] = []
    lines = block.text.splitlines()
    number = 0
    while number < len(lines):
        prompt = PROMPT.match(lines[number])
        assert prompt, f"{block.page}:{block.line + number + 1}: starts with no prompt: {lines[number]}"
        first, command = number, prompt["command"]
        number += 1
        while number < len(lines) and lines[number].startswith("> "):
            command += "\n" + lines[number][2:]
            number += 1
        start = number
        while number < len(lines) and not PROMPT.match(lines[number]):
            number += 1
        found.append(Step(block.page, block.line + first + 1, prompt["shell"], prompt["mark"] == "#", command,
                          "".join(line + "\n" for line in lines[start:number]),
                          block.line + start, block.line + number, block.numbers_vary))
    return found


def settle(text: str, numbers_vary: bool = False) -> str:
    """The text without what differs from run to run by nature."""
    lines = []
    for line in text.splitlines():
        for pattern, name in VOLATILE:
            line = pattern.sub(name, line)
        if numbers_vary:
            line = re.sub(r" *\b\d[\d.,]*( [kMG]?B\b)?", " N", line)
            line = re.sub(r"(?<=\S) +", " ", line)  # columns are as wide as their numbers
        lines.append(line.rstrip() + "\n")
    return "".join(lines)


def matches(shown: str, real: str, numbers_vary: bool = False) -> bool:
    """Whether a page that shows `shown` tells the truth about `real`."""
    parts = []
    for line in settle(shown, numbers_vary).splitlines():
        if line.strip() == "…":
            parts.append(r"(?:[^\n]*\n)*?")
        else:
            parts.append(r"[^\n]*".join(map(re.escape, line.split("…"))) + r"\n")
    return re.fullmatch("".join(parts), settle(real, numbers_vary)) is not None


@dataclass
class Shell:
    """A bash that takes one command after the other."""

    process: subprocess.Popen[bytes]
    _pending: bytes = field(default=b"", repr=False)

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[str, int]:
        """Output (both streams) and exit status. AssertionError when it takes longer, or the shell has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"eval {shlex.quote(command)} </dev/null; printf '\\036%d\\036\\n' $?\n".encode())
        self.process.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while not (end := re.search(rb"\x1e(\d+)\x1e\n", self._pending)):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"not within {timeout_s:g} s: {command}\n{self._pending.decode(errors='replace')}"
            more = os.read(self.process.stdout.fileno(), 65536)
            assert more, f"the shell has ended: {command}\n{self._pending.decode(errors='replace')}"
            self._pending += more
        output, self._pending = self._pending[: end.start()], self._pending[end.end():]
        return output.decode(errors="replace"), int(end[1])


class Machine:
    """The machine of one run. A context manager; at its end all of its processes and namespaces are gone."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._shells: dict[tuple[str, bool], Shell] = {}
        self._patient_until = 0.0

    def __enter__(self) -> Machine:
        prepare = (
            f"mount -t tmpfs -o mode=755 fasttun-docs /run && mkdir -p -m 755 /run/netns && mkdir -m 1777 {WORK} && "
            "{ [ ! -d /etc/wireguard ] || mount -t tmpfs fasttun-docs /etc/wireguard; } && "
            f"cd {WORK} && exec bash --norc --noprofile"
        )
        host = self._start("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
                           "bash", "--norc", "--noprofile", "-c", prepare)
        self._shells["host", True] = host
        output, status = host.run("pwd")
        assert (output, status) == (f"{WORK}\n", 0), output
        children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text().split()
        self._first = children[0]
        return self

    def __exit__(self, *_: object) -> None:
        for shell in self._shells.values():
            shell.process.kill()
            for pipe in (shell.process.stdin, shell.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            shell.process.wait()

    def _start(self, *words: str) -> Shell:
        root = Path(__file__).resolve().parents[2]
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8", "TERM": "dumb", "HOME": WORK, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        return Shell(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      bufsize=0, env=environment))

    def shell(self, name: str, root: bool = True) -> Shell:
        """The shell of that name; started when it is asked for first."""
        if (name, root) not in self._shells:
            words = ["nsenter", "--target", self._first, "--mount", "--net", "--pid"]
            if name != "host":
                words += ["ip", "netns", "exec", name]
            if not root:
                # The one capability left is for an interpreter that is installed where only root may look.
                words += ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups",
                          "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
            shell = self._shells[name, root] = self._start(*words, "bash", "--norc", "--noprofile")
            output, status = shell.run(f"cd {WORK}")
            assert status == 0, output
        return self._shells[name, root]

    def write(self, name: str, text: str) -> None:
        """A file in the working directory."""
        assert re.fullmatch(r"[\w.-]+", name), f"not a plain file name: {name}"
        Path(f"/proc/{self._first}/root{WORK}", name).write_text(text)

    def perform(self, step: Step) -> tuple[bool, str]:
        """Runs a step: whether the page tells the truth about it, and what was really printed."""
        if step.command.endswith("&"):
            self._patient_until = time.monotonic() + self._patience_s
        while True:
            output, status = self.shell(step.shell, step.root).run(step.command)
            good = matches(step.shown, output, step.numbers_vary) and not (status and not step.shown)
            if good or time.monotonic() >= self._patient_until:
                return good, output if output or not status else f"(status {status})\n"
            time.sleep(0.2)

    def follow(self, pages: Sequence[Path]) -> Iterator[tuple[Step, bool, str]]:
        """All steps of the pages in their order, files written on the way; with what `perform` says of each."""
        for page in pages:
            for block in blocks(page):
                if block.skip:
                    continue
                if block.title:
                    self.write(block.title, block.text)
                elif block.language == "console":
                    for step in steps(block):
                        yield step, *self.perform(step)


def _rewrite(pages: Sequence[Path]) -> int:
    wrong: dict[Path, list[tuple[Step, str]]] = {}
    try:
        with Machine(patience_s=2.0) as machine:
            before = time.monotonic()
            for step, good, output in machine.follow(pages):
                took_s, before = time.monotonic() - before, time.monotonic()
                print(f"{'' if good else 'WRONG '}{took_s:.1f} s {step.where}", file=sys.stderr)
                if not good:
                    print(output, file=sys.stderr)
                    wrong.setdefault(step.page, []).append((step, output))
    finally:
        for page, found in wrong.items():
            lines = page.read_text().splitlines()
            for step, output in reversed(found):
                lines[step.start : step.end] = [line.rstrip() for line in output.splitlines()]
            page.write_text("\n".join(lines) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(_rewrite([Path(name) for name in sys.argv[1:]]))
