"""The scripts in examples/ do what their first lines say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.netns import Lab, Namespace, assert_unchanged, snapshot, wait_until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def test_there_are_three_and_all_are_run_here():
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert scripts == ["connect.py", "descriptors.py", "listen.py"]
    for name in scripts:
        text = (EXAMPLES / name).read_text()
        assert f"python examples/{name}" in text.split('"""')[1], "its first lines say how to run it"


@pytest.mark.parametrize("name", ["connect.py", "listen.py"])
def test_help_needs_no_root(name):
    done = run(name, "--help")
    assert done.returncode == 0
    assert "--port" in done.stdout


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=20,
        env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_descriptors():
    done = run("descriptors.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.fullmatch(
        r"there came: ping\nhere came: pong\n10\.7\.0\.2 is behind UDP port \d+\nout 1, in 1, dropped 0\n",
        done.stdout)


class Script:
    """A running example; its lines as they come."""

    def __init__(self, ns: Namespace, name: str, *arguments: str) -> None:
        self.process = ns.popen([sys.executable, EXAMPLES / name, *arguments])
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def says(self, pattern: str) -> None:
        wait_until(lambda: any(re.search(pattern, line) for line in list(self.lines)), 10, what=pattern)

    def interrupt(self) -> str:
        """Ctrl-C; what it wrote to stderr."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(10) == 0
        self._reader.join(5)
        assert self.process.stderr is not None
        return self.process.stderr.read()


@pytest.mark.netns
def test_listen_and_connect(lab: Lab):
    a, b, link = lab.pair()
    before = snapshot(a), snapshot(b)
    listener = Script(a, "listen.py", "10.7.0.1/24", "--allow", "10.99.0.0/16")
    listener.says(r"tun0 listens on UDP port 1234")
    client = Script(b, "connect.py", link.a.v4, "10.7.0.2/24")
    client.says(rf"{re.escape(link.a.v4)}:1234 answers; the MTU is 1472")
    wait_until(lambda: b.run(["ping", "-c1", "-W1", "10.7.0.1"], check=False).returncode == 0)
    listener.says(rf"10\.7\.0\.2 is at {re.escape(link.b.v4)}:\d+|fe80::\S+ is at {re.escape(link.b.v4)}:\d+")
    client.says(r"out \d+\.\d Mbit/s, in \d+\.\d Mbit/s")
    assert client.interrupt() == ""
    assert listener.interrupt() == ""
    assert re.search(r"out \d+ packets, in \d+ packets, dropped \d+", "".join(listener.lines))
    for ns, was in zip((a, b), before, strict=True):
        assert_unchanged(ns, was)
