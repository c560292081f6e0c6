"""`fasttun demo`: the file arrives, both tunnels are compared, and nothing remains however it ends."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.netns import wait_until

from fasttun.cli import main
from fasttun.demo import hosts, show

ROOT = Path(__file__).resolve().parents[2]
MARK = "FASTTUN_TEST_MARK"


class Demo:
    """A running `fasttun demo` whose processes and temporary files can be told from others'."""

    def __init__(self, directory: Path, *flags: str, **environment: str) -> None:
        self.directory, self._mark = directory, uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fasttun", "demo", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, MARK: self._mark, "TMPDIR": str(directory), "PYTHONUNBUFFERED": "1", "COLUMNS": "80",
                 **environment},
        )

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if text in line:
                return
        raise AssertionError(f"no {text!r} in {seen}, {self.process.communicate()}")

    def processes(self) -> set[int]:
        """All that it started and that still run."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"{MARK}={self._mark}".encode() in (entry / "environ").read_bytes():
                        found.add(int(entry.name))
                except OSError:
                    pass  # it ended meanwhile
        return found

    def assert_nothing_remains(self) -> None:
        wait_until(lambda: not self.processes(), what=f"end of all processes of {self.process.pid}")
        assert list(self.directory.iterdir()) == []


@pytest.fixture
def named_namespaces_untouched() -> Iterator[None]:
    def ours() -> set[str]:
        return {name for name in os.listdir("/run/netns") if not name.startswith("ft")}

    before = ours() if os.path.isdir("/run/netns") else set()
    yield
    assert (ours() if os.path.isdir("/run/netns") else set()) == before


@pytest.mark.netns
@pytest.mark.usefixtures("named_namespaces_untouched")
def test_sends_the_file_through_both_tunnels(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--size", "8M")
    out, errors = demo.process.communicate(timeout=60)
    assert (demo.process.returncode, errors) == (0, ""), out
    sent = re.findall(r"^  sent      8 MiB, SHA-256 ([0-9a-f]{64})$", out, re.MULTILINE)
    received = re.findall(r"^  received  8 MiB, SHA-256 ([0-9a-f]{64})$", out, re.MULTILINE)
    assert len(sent) == 3
    assert sent == received
    assert len(set(sent)) == 1  # one file for all tunnels
    assert len(re.findall(r"^  ping 10\.7\.0\.2: 10 of 10 answered", out, re.MULTILINE)) == 3
    assert len(re.findall(r"^  100 % +8 MiB +[\d,]+ packets +[\d.]+ Gbit/s$", out, re.MULTILINE)) == 3
    assert re.search(r"^fasttun is [\d.]+ times as fast as the pure-Python tunnel\.$", out, re.MULTILINE)
    assert "\x1b" not in out
    demo.assert_nothing_remains()


@pytest.mark.netns
def test_shows_top_and_status_while_traffic_flows(tmp_path: Path) -> None:
    """One frame of top as on a narrow terminal, with rates and a graph; then status; both after what is measured."""
    demo = Demo(tmp_path, "--size", "100K", "--no-baseline", COLUMNS="64")
    out, errors = demo.process.communicate(timeout=60)
    assert (demo.process.returncode, errors) == (0, ""), out
    device = f"demo{demo.process.pid}"
    before, _, looked = out.partition(f"  listener $ fasttun top {device} ")
    assert before.count("the same on both sides") == 2
    top, _, status = looked.partition(f"  listener $ fasttun status {device}\n")
    assert max(map(len, top.splitlines()[1:])) <= 64
    assert re.search(r"^    inbound +[\d.]+ [MG]bit/s +[\d,]+ packets/s", top, re.MULTILINE)
    assert re.search(r"[▁▂▃▄▅▆▇█]{5,}$", top, re.MULTILINE)
    assert re.search(rf"^    {device}  WireGuard, up ", status, re.MULTILINE)
    assert re.search(r"^      inbound   \d{4,} packets, [\d.]+ [MG]B", status, re.MULTILINE)
    assert "\x1b" not in out


@pytest.mark.netns
def test_names_the_extra_where_rich_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ModuleNotFoundError('No module named rich')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    (tmp_path / "files").mkdir()
    demo = Demo(tmp_path / "files", "--size", "100K", "--no-baseline", PYTHONPATH=path)
    out, errors = demo.process.communicate(timeout=60)
    assert (demo.process.returncode, errors) == (0, ""), out
    assert re.search(r"\$ fasttun top .*\n    fasttun: .*needs rich: pip install 'fasttun\[rich\]'\n  listener \$", out)
    assert re.search(r"^    demo\d+  WireGuard, up ", out, re.MULTILINE)


@pytest.mark.netns
def test_without_baseline(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--size", "100K", "--no-baseline")
    out, errors = demo.process.communicate(timeout=60)
    assert (demo.process.returncode, errors) == (0, ""), out
    assert "pure" not in out
    assert out.count("SHA-256") == 4


@pytest.mark.netns
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
@pytest.mark.usefixtures("named_namespaces_untouched")
def test_nothing_remains_when_it_is_ended_early(tmp_path: Path, number: int, status: int) -> None:
    demo = Demo(tmp_path, "--size", "512M")
    demo.read_until("ping")
    assert len(demo.processes()) >= 3  # itself and two tunnels
    demo.process.send_signal(number)
    _, errors = demo.process.communicate(timeout=20)
    assert demo.process.returncode == status
    assert "Traceback" not in errors
    demo.assert_nothing_remains()


@pytest.mark.netns
def test_limit_cuts_the_baselines_file_and_says_so() -> None:
    out = io.StringIO()
    outcomes = show.run(out, 64 << 20, baseline_limit_s=0.05)
    assert [outcome.tunnel for outcome in outcomes] == ["fasttun", "fasttun, encrypted", "pure Python"]
    assert outcomes[0].sent_bytes == 64 << 20
    assert outcomes[1].sent_bytes == 64 << 20
    assert 0 < outcomes[2].sent_bytes < 64 << 20
    assert "stopped after 0.05 s, at " in out.getvalue()
    assert outcomes[0].sha256 == outcomes[1].sha256 != outcomes[2].sha256


@pytest.mark.netns
def test_packets_are_those_of_the_wire_not_of_the_offload() -> None:
    size_bytes = 32 << 20
    plain, encrypted = show.run(io.StringIO(), size_bytes, baseline=False)
    assert plain.packets >= size_bytes / 1472
    assert encrypted.packets >= size_bytes / 1420


@pytest.mark.netns
def test_says_when_what_arrived_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path(show.__file__).with_name("transfer.py")
    lying = tmp_path / "transfer.py"
    lying.write_text(
        "import hashlib, runpy, sys\n"
        "if sys.argv[1] == 'receive':\n"
        "    hashlib.sha256 = lambda: hashlib.new('sha256', b'one byte more')\n"
        f"runpy.run_path({str(original)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(show, "_TRANSFER", (sys.executable, "-I", str(lying)))
    with pytest.raises(hosts.HostError, match="what arrived is not what was sent"):
        show.run(io.StringIO(), 1 << 20, baseline=False)


@pytest.mark.netns
def test_asks_for_space_before_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(hosts.HostError, match=r"has 1 MiB free, the file needs 1 GiB .*--size"):
        show.run(io.StringIO())


def test_needs_root_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["demo"]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors == "fasttun: making network namespaces needs root: run it with sudo\n"


@pytest.mark.parametrize("size", ["", "0", "-1", "8x", "1.5G", "2000000G"])
def test_refuses_what_is_no_size(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--size", size]) == 2
    assert "--size" in capsys.readouterr().err
