"""The order of the demo: hosts, tunnel, ping, file; the same encrypted and by the pure-Python tunnel; a table.

What `fasttun top` and `fasttun status` show stands between: of traffic of its own, so that it costs no figure.

Nothing remains afterwards, however it ends: the hosts have no names, the file has none either, and the
programs die with this process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TextIO, cast

from .display import display, rate, size
from .hosts import Host, HostError, Program, requirements, two_hosts

__all__ = ["Outcome", "run"]

INNER = ("10.7.0.1", "10.7.0.2")  # the client, which sends; the listener, which receives
PURE_PYTHON_MTU = 1500 - 20 - 8 - 4  # IPv4, UDP, packet information
PORT = 7000
PINGS = 10
BASELINE_LIMIT_S = 120.0
SPARE_BYTES = 64 << 20  # what must stay free on the disk
LOOK_TRAFFIC_S = 10.0  # at most; it ends when there has been a look
WIDEST_LOOK, NARROWEST_LOOK, LOOK_INDENT = 100, 40, 4  # columns
LOOK_LINES = 20

_HERE = Path(__file__).resolve().parent
_TRANSFER = (sys.executable, "-I", str(_HERE / "transfer.py"))


@dataclass(frozen=True)
class Outcome:
    """One tunnel's run. `sent_bytes` is less than the file only where the time limit cut it."""

    tunnel: str
    sent_bytes: int
    packets: int
    seconds: float
    ping_min_ms: float
    ping_avg_ms: float
    sha256: str

    @property
    def bits_per_second(self) -> float:
        return self.sent_bytes * 8 / self.seconds


@dataclass(frozen=True)
class _Contender:
    name: str
    start: Callable[[Host, Host, TextIO], list[Program]]
    limit_s: float
    look: bool = False


def run(
    out: TextIO,
    size_bytes: int = 1 << 30,
    *,
    baseline: bool = True,
    plain: bool = False,
    baseline_limit_s: float = BASELINE_LIMIT_S,
) -> list[Outcome]:
    """Shows it all on `out` and returns what was measured, fasttun first. Main thread only.

    The second is the encrypted tunnel, where PyNaCl is there.
    baseline: also through the pure-Python tunnel, for at most `baseline_limit_s`; plain: no progress bar.
    HostError: not root, a program or space is missing, a tunnel failed, or the two hashes differ.
    """
    requirements()
    encrypted = importlib.util.find_spec("nacl") is not None
    contenders = [_Contender("fasttun", _start_fasttun, 3600, look=not encrypted)]
    if encrypted:
        contenders.append(_Contender("fasttun, encrypted", _start_encrypted, 3600, look=True))
    else:
        print("The encrypted tunnel is left out: pip install 'fasttun[wireguard]'", file=out)
    if baseline:
        contenders.append(_Contender("pure Python", _start_pure_python, baseline_limit_s))
    with _terminated_as_exit():
        print(
            "Two hosts on this machine: client 198.51.100.1 and listener 198.51.100.2, network namespaces\n"
            "joined by one virtual cable.",
            file=out,
            flush=True,
        )
        with _random_file(size_bytes) as file:
            print(
                f"A file of {size(size_bytes)} of random bytes goes from the client to the listener.",
                file=out,
            )
            outcomes = [_one(out, contender, file, size_bytes, plain) for contender in contenders]
        _table(out, outcomes)
    return outcomes


def _one(out: TextIO, contender: _Contender, file: BinaryIO, size_bytes: int, plain: bool) -> Outcome:
    print(f"\n{contender.name}", file=out, flush=True)
    with two_hosts(names=("client", "listener")) as (client, listener):
        programs = contender.start(client, listener, out)
        echoes = _ping(client, programs)
        print(
            f"  ping {INNER[1]}: {echoes['received']} of {echoes['sent']} answered, "
            f"min/avg {echoes['min_ms']:.3f}/{echoes['avg_ms']:.3f} ms",
            file=out,
            flush=True,
        )
        outcome = _send(out, contender, client, listener, programs, file, size_bytes, echoes, plain)
        if contender.look:
            _look_at(out, client, listener)
        for program in reversed(programs):
            program.stop()
        return outcome


def _look_at(out: TextIO, client: Host, listener: Host) -> None:
    """What `fasttun top` and `fasttun status` say of the listener's tunnel while something flows through it."""
    device = _listener_device()
    with _flowing(client, listener):
        _show(out, listener, "top", device, "--count", "8", "--interval", "0.2")
        _show(out, listener, "status", device)


@contextlib.contextmanager
def _flowing(client: Host, listener: Host) -> Iterator[None]:
    """Traffic from the client to the listener meanwhile."""
    with _talking(listener, "receive", INNER[1], str(PORT + 1)) as receiver:
        next(receiver)  # it listens
        with _talking(client, "flow", INNER[1], str(PORT + 1), str(LOOK_TRAFFIC_S)) as sender:
            next(sender)
            yield


def _show(out: TextIO, host: Host, *words: str) -> None:
    """The command and what it prints, within the terminal's width; in place of that, why it failed."""
    width = min(WIDEST_LOOK, max(NARROWEST_LOOK, shutil.get_terminal_size().columns - LOOK_INDENT))
    print(f"  {host.name:8} $ fasttun {shlex.join(words)}", file=out)
    size = ["env", f"COLUMNS={width}", f"LINES={LOOK_LINES}"]
    done = host.run(*size, sys.executable, "-m", "fasttun", *words, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()[-1:]
    for line in lines:
        print((" " * LOOK_INDENT + line).rstrip(), file=out)
    out.flush()


def _listener_device() -> str:
    """Of this process alone: all tunnels of a machine are found by their devices' names."""
    return f"demo{os.getpid()}"


def _start_fasttun(client: Host, listener: Host, out: TextIO) -> list[Program]:
    programs = []
    for host, arguments in (
        (listener, ["--listen", "--device", _listener_device(), "--address", f"{INNER[1]}/24"]),
        (client, ["--server", listener.outer, "--address", f"{INNER[0]}/24"]),
    ):
        print(f"  {host.name:8} $ fasttun {shlex.join(arguments)}", file=out, flush=True)
        programs.append(host.start(sys.executable, "-m", "fasttun", *arguments, title="fasttun"))
    return programs


def _start_encrypted(client: Host, listener: Host, out: TextIO) -> list[Program]:
    from ..wireguard.keys import PrivateKey

    keys = {host: PrivateKey.generate() for host in (listener, client)}
    print(f"  {'both':8} $ fasttun genkey > KEY; fasttun pubkey < KEY", file=out)
    programs = []
    for host, other, arguments in (
        (listener, client, ["--listen", "--device", _listener_device(), "--address", f"{INNER[1]}/24"]),
        (client, listener, ["--server", listener.outer, "--address", f"{INNER[0]}/24"]),
    ):
        peer = ["--peer", str(keys[other].public)]
        print(f"  {host.name:8} $ fasttun {shlex.join(arguments)} --key KEY {shlex.join(peer)}", file=out, flush=True)
        file = host.file(keys[host].to_base64() + "\n")
        programs.append(
            host.start(sys.executable, "-m", "fasttun", *arguments, "--key", file, *peer, title="fasttun")
        )
    return programs


def _start_pure_python(client: Host, listener: Host, out: TextIO) -> list[Program]:
    programs = []
    for host, arguments in ((listener, ["-listen"]), (client, ["-server", listener.outer])):
        print(f"  {host.name:8} $ pure_python.py {shlex.join(arguments)}", file=out, flush=True)
        programs.append(
            host.start(sys.executable, "-I", str(_HERE / "pure_python.py"), *arguments, title="pure_python")
        )
    for host, address, program in ((listener, INNER[1], programs[0]), (client, INNER[0], programs[1])):
        commands = (f"addr add {address}/24 dev tun0", f"link set tun0 mtu {PURE_PYTHON_MTU} up")
        _until(
            lambda: host.run("ip", "link", "show", "tun0", check=False).returncode == 0,  # noqa: B023
            "the device tun0",
            [program],
        )
        for command in commands:
            print(f"  {host.name:8} $ ip {command}", file=out, flush=True)
        host.ip(*commands)
    return programs


def _ping(client: Host, programs: list[Program]) -> dict[str, Any]:
    _until(lambda: bool(_pinged(client, 1)["received"]), "an answer through the tunnel", programs)
    echoes = _pinged(client, PINGS)
    if not echoes["received"]:
        raise HostError("ping: no answer through the tunnel any more")
    return echoes


def _pinged(client: Host, count: int) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(client.run(*_TRANSFER, "ping", INNER[1], str(count)).stdout))


def _until(
    condition: Callable[[], bool], what: str, programs: list[Program], timeout_s: float = 15.0
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        for program in programs:
            program.check()
        if time.monotonic() > end:
            raise HostError(f"{what} did not come within {timeout_s:g} s")
        time.sleep(0.05)


def _send(
    out: TextIO,
    contender: _Contender,
    client: Host,
    listener: Host,
    programs: list[Program],
    file: BinaryIO,
    size_bytes: int,
    echoes: dict[str, Any],
    plain: bool,
) -> Outcome:
    path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(_talking(listener, "receive", INNER[1], str(PORT)))
        next(receiver)  # it listens
        sender = stack.enter_context(
            _talking(client, "send", INNER[1], str(PORT), path, str(contender.limit_s))
        )
        progress: dict[str, Any] = {}
        last: dict[str, Any] = {}
        with display(out, size_bytes, plain=plain) as shown:
            for progress in sender:
                for program in programs:
                    program.check()
                if "sha256" in progress:
                    break
                last = progress
                shown.update(last["bytes"], last["packets"], last["seconds"])
        received = next(receiver)
    if last["bytes"] < size_bytes:
        print(
            f"  stopped after {contender.limit_s:g} s, at {size(last['bytes'])} of {size(size_bytes)}",
            file=out,
        )
    print(
        f"  sent      {size(last['bytes'])}, SHA-256 {progress['sha256']}\n"
        f"  received  {size(received['bytes'])}, SHA-256 {received['sha256']}",
        file=out,
        flush=True,
    )
    if (received["bytes"], received["sha256"]) != (last["bytes"], progress["sha256"]):
        raise HostError(f"{contender.name}: what arrived is not what was sent")
    print("  the same on both sides", file=out, flush=True)
    return Outcome(
        contender.name,
        last["bytes"],
        last["packets"],
        last["seconds"],
        echoes["min_ms"],
        echoes["avg_ms"],
        received["sha256"],
    )


@contextlib.contextmanager
def _talking(host: Host, *arguments: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The answers of a transfer.py in `host`, as they come; HostError with what it said if it ends early."""
    process = host.popen(*_TRANSFER, *arguments)
    assert process.stdout is not None
    assert process.stderr is not None
    lines, said = process.stdout, process.stderr

    def answers() -> Iterator[dict[str, Any]]:
        for line in lines:
            yield json.loads(line)
        raise HostError(f"{host.name}: {said.read().strip() or 'the transfer ended early'}")

    try:
        yield answers()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        lines.close()
        said.close()


@contextlib.contextmanager
def _random_file(size_bytes: int) -> Iterator[BinaryIO]:
    """A nameless temporary file of random bytes. HostError if the disk has no room for it."""
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    if free < size_bytes + SPARE_BYTES:
        raise HostError(
            f"{directory} has {size(free)} free, the file needs {size(size_bytes)} and "
            f"{size(SPARE_BYTES)} to spare: give a smaller --size, or set TMPDIR"
        )
    with tempfile.TemporaryFile(prefix="fasttun-demo-") as file:
        left = size_bytes
        while left > 0:
            left -= file.write(os.urandom(min(left, 1 << 20)))
        file.flush()
        yield cast("BinaryIO", file)


def _table(out: TextIO, outcomes: list[Outcome]) -> None:
    print(f"\n{'':20}{'file':>9}{'packets':>12}{'seconds':>10}{'rate':>16}{'ping avg':>12}", file=out)
    for one in outcomes:
        print(
            f"{one.tunnel:20}{size(one.sent_bytes):>9}{one.packets:>12,}{one.seconds:>10.2f}"
            f"{rate(one.sent_bytes, one.seconds):>16}{one.ping_avg_ms:>9.3f} ms",
            file=out,
        )
    if outcomes[-1].tunnel == "pure Python":
        ratio = outcomes[0].bits_per_second / outcomes[-1].bits_per_second
        print(f"fasttun is {ratio:.1f} times as fast as the pure-Python tunnel.", file=out)
    out.flush()


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, with status 143, so that the programs are stopped in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
