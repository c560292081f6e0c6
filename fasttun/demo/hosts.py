"""Two hosts on one machine: network namespaces joined by a veth pair, and programs that run in them.

For the demo and the benchmarks; tests have their own. The namespaces have no name: they live by a
descriptor of this process and by the programs inside, so even after `kill -9` of all of them nothing
remains to clean up.

Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN), `ip` (iproute2), `nsenter` and `setpriv` (util-linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

from fasttun.errors import FasttunError

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_STOP_TIMEOUT_S = 5.0
_OUTPUT_SHOWN_BYTES = 65_536


class HostError(FasttunError):
    """The two hosts cannot be made here, or a program in one of them failed."""


class Program:
    """A program that runs in a host until it ends or is stopped; its output goes to a file without a name."""

    def __init__(self, process: subprocess.Popen[bytes], title: str, log: BinaryIO) -> None:
        self.process, self.title, self._log = process, title, log

    @property
    def pid(self) -> int:
        return self.process.pid

    def running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        """What it has written so far, stdout and stderr together, the first 64 KiB."""
        return os.pread(self._log.fileno(), _OUTPUT_SHOWN_BYTES, 0).decode(errors="replace")

    def check(self) -> None:
        """HostError with the end of its output, unless it still runs."""
        if not self.running():
            last = " | ".join(self.output().strip().splitlines()[-3:])
            raise HostError(f"{self.title} ended with status {self.process.returncode}: {last or 'no output'}")

    def stop(self) -> int:
        """Asks with SIGTERM, insists with SIGKILL after 5 s; the exit status. May be called again."""
        if self.running():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


class Host:
    """One network namespace and the programs in it.

    Start programs from the main thread: they die with the thread that started them.
    """

    def __init__(self, name: str, outer: str) -> None:
        self.name, self.outer = name, outer
        self._programs: list[Program] = []
        self._files: list[BinaryIO] = []
        self._namespace_fd = _new_network_namespace()
        self.namespace = f"/proc/{os.getpid()}/fd/{self._namespace_fd}"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs `arguments` in this host, and that dies with this process."""
        return ["nsenter", f"--net={self.namespace}", "setpriv", "--pdeathsig", "KILL", *arguments]

    def run(
        self, *arguments: str, stdin: str | None = None, check: bool = True, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end. HostError with its stderr if it fails and `check` is set."""
        try:
            done = subprocess.run(
                self.command(arguments),
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise HostError(f"{self.name}: {arguments[0]} did not end within {timeout_s:g} s") from error
        if check and done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise HostError(f"{self.name}: {' '.join(arguments)}: {said}")
        return done

    def ip(self, *lines: str) -> None:
        """`ip` commands without the word ip, in order, as one batch; the first failure is a HostError."""
        self.run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")

    def start(self, *arguments: str, title: str | None = None, env: Mapping[str, str] | None = None) -> Program:
        """Starts a program that `close` will stop; its output goes to a file of its own."""
        title = title or os.path.basename(arguments[0])
        log = self._file()
        process = subprocess.Popen(
            self.command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
        program = Program(process, f"{title} on {self.name}", log)
        self._programs.append(program)
        return program

    def file(self, text: str) -> str:
        """The path of a file in memory that holds `text`, for programs in this host until `close`."""
        file = self._file()
        file.write(text.encode())
        file.flush()
        return f"/proc/{os.getpid()}/fd/{file.fileno()}"

    def _file(self) -> BinaryIO:
        file = os.fdopen(os.memfd_create("fasttun"), "w+b")
        self._files.append(file)
        return file

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts a program whose stdout is a pipe of text lines; the caller stops it."""
        return subprocess.Popen(
            self.command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        """Stops all programs and lets the namespace go. May be called again."""
        for program in reversed(self._programs):
            program.stop()
        self._programs.clear()
        for file in self._files:
            file.close()
        self._files.clear()
        if self._namespace_fd >= 0:
            os.close(self._namespace_fd)
            self._namespace_fd = -1


@contextlib.contextmanager
def two_hosts(
    *,
    names: tuple[str, str] = ("left", "right"),
    outer: tuple[str, str] = ("198.51.100.1", "198.51.100.2"),
    prefix: int = 24,
    device: str = "eth0",
) -> Iterator[tuple[Host, Host]]:
    """Two hosts whose `device`s are the ends of one veth pair, addresses `outer`; closed at the end.

    IPv6 is off in them, so that no router solicitation enters a tunnel unasked.
    """
    requirements()
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, address in zip(names, outer, strict=True):
            host = Host(name, address)
            stack.callback(host.close)
            hosts.append(host)
        left, right = hosts
        for host in hosts:
            host.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6 2>/dev/null || true")
        left.ip(f"link add {device} type veth peer name {device} netns {right.namespace}")
        for host in hosts:
            host.ip("link set lo up", f"addr add {host.outer}/{prefix} dev {device}", f"link set {device} up")
        yield left, right


def requirements() -> None:
    """HostError that says what is missing, if two hosts cannot be made on this machine."""
    if os.geteuid() != 0:
        raise HostError("making network namespaces needs root: run it with sudo")
    if not os.path.exists("/dev/net/tun"):
        raise HostError("/dev/net/tun is missing: modprobe tun")
    for program, package in (("ip", "iproute2"), ("nsenter", "util-linux"), ("setpriv", "util-linux")):
        if shutil.which(program) is None:
            raise HostError(f"the program {program} is missing: install {package}")


def _new_network_namespace() -> int:
    """Descriptor of a new network namespace, made in a thread so that this one stays here. HostError."""
    result: list[int] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            result.append(-ctypes.get_errno())
            return
        result.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not result or result[0] < 0:
        reason = os.strerror(-result[0]) if result else "no answer"
        raise HostError(f"no network namespace can be made here: unshare: {reason}")
    return result[0]
