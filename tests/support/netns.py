"""Network namespaces for tests: two or more "hosts" on one machine, taken away again whatever happens.

Uses the `ip` program (iproute2), not fasttun's own netlink code, so that it can judge it.

    with Lab() as lab:
        a, b, link = lab.pair()                  # two hosts, one cable, IPv4 and IPv6
        a.run(["ping", "-c1", link.b.v4])
        with b.enter():                          # this thread is now on host b
            sock = socket.socket(...)
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "End",
    "Lab",
    "Link",
    "Namespace",
    "Snapshot",
    "assert_unchanged",
    "missing",
    "snapshot",
    "sweep",
    "wait_until",
]

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_PROJECT = Path(__file__).resolve().parents[2]
_counter = itertools.count()


def missing() -> str:
    """Why namespaces with TUN devices cannot be used here, or "" when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun (modprobe tun)"
    try:
        done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10)
    except OSError:
        return "needs the ip program (apt install iproute2)"
    return f"ip netns: {done.stderr.strip()}" if done.returncode else ""


def wait_until(predicate: Callable[[], T], timeout: float = 5.0, interval: float = 0.01, what: str = "") -> T:
    """Return the predicate's first true value; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout} s: {what or predicate!r} (last value {value!r})")
        time.sleep(interval)


def _ip(*words: str, timeout: float = 20) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _setns(fd: int) -> None:
    if sys.version_info >= (3, 12):
        os.setns(fd, _CLONE_NEWNET)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Namespace:
    """One host. Made by `Lab.namespace`; dead after the lab's end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._processes: list[subprocess.Popen[str]] = []

    def __repr__(self) -> str:
        return f"Namespace({self.name!r})"

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        full = dict(os.environ)
        full["PYTHONPATH"] = os.pathsep.join(
            [str(_PROJECT), str(_PROJECT / "tests"), *filter(None, [full.get("PYTHONPATH")])]
        )
        full.update(env or {})
        return full

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        check: bool = True,
        timeout: float = 30,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, output captured as text. `check`: AssertionError with the output unless 0."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout,
            input=input,
            env=self._environment(env),
        )
        if check and done.returncode:
            words = " ".join(map(str, command))
            raise AssertionError(f"{self.name}: {words}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def popen(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start in the background; `.pid` is the command's own. stdout and stderr are pipes unless given.

        Whatever still runs at the lab's end is killed, and its pipes are closed.
        """
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *map(str, command)],
            text=True,
            env=self._environment(env),
            **options,
        )
        self._processes.append(process)
        return process

    def python(
        self, code: str, *arguments: str, check: bool = True, timeout: float = 30, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run Python source in a new interpreter, `fasttun` and `support` importable."""
        return self.run([sys.executable, "-c", code, *arguments], check=check, timeout=timeout, **options)

    def ip(self, *words: str) -> str:
        """`ip` in this namespace; its output. RuntimeError with the message when it fails."""
        return _ip("-n", self.name, *words)

    def ip_json(self, *words: str) -> list[dict[str, Any]]:
        out = _ip("-n", self.name, "-j", "-d", *words)
        return [entry for entry in json.loads(out or "[]") if entry]

    @contextlib.contextmanager
    def enter(self) -> Iterator[Namespace]:
        """Move the calling thread here; back at the end. Sockets keep the namespace they were made in."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
            finally:
                os.close(there)
            try:
                yield self
            finally:
                _setns(home)
        finally:
            os.close(home)

    def sysctl(self, name: str, value: int | str | None = None) -> str:
        """Read, or write, a `net.…` setting of this namespace (dots or slashes)."""
        path = "/proc/sys/" + (name if "/" in name else name.replace(".", "/"))
        with self.enter():  # /proc/sys/net shows the reader's own namespace
            if value is not None:
                with open(path, "w") as file:
                    file.write(str(value))
            with open(path) as file:
                return file.read().strip()

    def down(self, device: str) -> None:
        self.ip("link", "set", device, "down")

    def up(self, device: str) -> None:
        self.ip("link", "set", device, "up")

    def devices(self) -> set[str]:
        return {entry["ifname"] for entry in self.ip_json("link", "show")}

    def forward(self) -> None:
        """Make this host a router for both families."""
        self.sysctl("net.ipv4.ip_forward", 1)
        self.sysctl("net.ipv6.conf.all.forwarding", 1)

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            try:
                process.wait(10)
            finally:
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            for pid in map(int, _ip("netns", "pids", self.name).split()):
                if pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class End:
    """One end of a cable."""

    ns: Namespace
    device: str
    addresses: tuple[str, ...]

    def _first(self, version: int) -> str:
        for text in self.addresses:
            if ip_interface(text).version == version:
                return str(ip_interface(text).ip)
        raise LookupError(f"{self.ns.name} {self.device} has no IPv{version} address")

    @property
    def v4(self) -> str:
        return self._first(4)

    @property
    def v6(self) -> str:
        return self._first(6)

    def down(self) -> None:
        """Cable out at this end: the other end loses its carrier, this one its IPv6 addresses."""
        self.ns.down(self.device)

    def up(self) -> None:
        """Cable in again, with all addresses of the start."""
        self.ns.up(self.device)
        for text in self.addresses:
            _add_address(self.ns, self.device, text)

    def mtu(self, value: int) -> None:
        self.ns.ip("link", "set", self.device, "mtu", str(value))


@dataclass(frozen=True)
class Link:
    a: End
    b: End


def _add_address(ns: Namespace, device: str, text: str) -> None:
    options = ["nodad"] if ip_interface(text).version == 6 else []
    ns.ip("address", "replace", text, "dev", device, *options)


@dataclass
class Lab:
    """A set of namespaces. A context manager: at its end processes, devices and namespaces are gone."""

    namespaces: list[Namespace] = field(default_factory=list)
    _links: int = 0

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def namespace(self, label: str = "") -> Namespace:
        """A new host, its loopback up."""
        name = f"ft{os.getpid()}-{next(_counter)}{label}"
        _ip("netns", "add", name)
        ns = Namespace(name)
        self.namespaces.append(ns)
        ns.ip("link", "set", "lo", "up")
        return ns

    def link(
        self,
        a: Namespace,
        b: Namespace,
        a_addresses: Sequence[str] | None = None,
        b_addresses: Sequence[str] | None = None,
        *,
        a_device: str | None = None,
        b_device: str | None = None,
        mtu: int | None = None,
        up: bool = True,
    ) -> Link:
        """A veth cable between two hosts.

        Addresses: CIDR texts; None = one of each family, 10.99.N.1/24 and fd99:N::1/64 at a, .2 and ::2 at b.
        Device names: None = eth0, eth1, … as each host's first free one.
        """
        number = self._links
        self._links += 1
        if a_addresses is None:
            a_addresses = (f"10.99.{number}.1/24", f"fd99:{number:x}::1/64")
        if b_addresses is None:
            b_addresses = (f"10.99.{number}.2/24", f"fd99:{number:x}::2/64")
        a_device = a_device or self._free_name(a)
        b_device = b_device or self._free_name(b, taken={a_device} if a is b else set())
        a.ip("link", "add", a_device, "type", "veth", "peer", "name", b_device, "netns", b.name)
        ends = End(a, a_device, tuple(a_addresses)), End(b, b_device, tuple(b_addresses))
        for end in ends:
            end.ns.sysctl(f"net/ipv6/conf/{end.device}/accept_dad", 0)
            end.ns.sysctl(f"net/ipv6/conf/{end.device}/router_solicitations", 0)
            if mtu is not None:
                end.mtu(mtu)
            if up:
                end.up()
        return Link(*ends)

    @staticmethod
    def _free_name(ns: Namespace, taken: set[str] | None = None) -> str:
        used = ns.devices() | (taken or set())
        return next(name for name in map("eth{}".format, itertools.count()) if name not in used)

    def pair(self, *, mtu: int | None = None) -> tuple[Namespace, Namespace, Link]:
        """Two hosts with one cable."""
        a, b = self.namespace("a"), self.namespace("b")
        return a, b, self.link(a, b, mtu=mtu)

    def routed(
        self, *, mtu: int | None = None, masquerade: bool = False
    ) -> tuple[Namespace, Namespace, Namespace, Link, Link]:
        """client – router – server, default routes through the router.

        Returns the hosts and the cables (client, router) and (router, server). `mtu` is the second cable's.
        `masquerade`: the router hides the client behind its own address (needs the nft program).
        """
        client, router, server = self.namespace("client"), self.namespace("router"), self.namespace("server")
        near = self.link(client, router)
        far = self.link(router, server, mtu=mtu)
        router.forward()
        for host, gateway in ((client, near.b), (server, far.a)):
            host.ip("route", "add", "default", "via", gateway.v4)
            host.ip("-6", "route", "add", "default", "via", gateway.v6)
        if masquerade:
            router.run(
                ["nft", "-f", "-"],
                input="table inet nat {\n chain post {\n type nat hook postrouting priority 100\n"
                f'oifname "{far.a.device}" masquerade random\n }}\n}}\n',
            )
        return client, router, server, near, far

    def close(self) -> None:
        """Kill what runs inside, remove everything. May be called twice."""
        problems = []
        while self.namespaces:
            ns = self.namespaces.pop()
            try:
                ns._end()
            except Exception as error:
                problems.append(error)
            try:
                _ip("netns", "delete", ns.name)
            except Exception as error:
                problems.append(error)
        if problems:
            raise problems[0]


def sweep() -> None:
    """Remove namespaces whose test process was killed before it could."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/run/netns"):
            match = re.match(r"ft(\d+)-", name)
            if match and not os.path.exists(f"/proc/{match[1]}"):
                with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                    _ip("netns", "delete", name)


# Values that change by themselves, and the default queue, which Linux attaches at a device's first
# link up and keeps when it is down again, and the mark of an address that the kernel chose.
_VOLATILE = frozenset(
    {
        "stats",
        "stats64",
        "valid_life_time",
        "preferred_life_time",
        "cache",
        "expires",
        "tentative",
        "used",
        "qdisc",
        "stable-privacy",
    }
)


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in sorted(value.items()) if key not in _VOLATILE}
    if isinstance(value, list):
        return [_stable(item) for item in value]
    return value


@dataclass(frozen=True)
class Snapshot:
    """Devices with addresses, routes of all tables, rules: comparable with ==, each entry a JSON text."""

    devices: tuple[str, ...]
    routes: tuple[str, ...]
    rules: tuple[str, ...]

    def difference(self, other: Snapshot) -> str:
        """A readable diff from self to other, "" when equal."""
        mine, theirs = ([*s.devices, *s.routes, *s.rules] for s in (self, other))
        return "\n".join(difflib.unified_diff(mine, theirs, "before", "after", lineterm="", n=0))


def snapshot(ns: Namespace) -> Snapshot:
    """The namespace's devices (flags, MTU, kind), addresses, routes and rules now."""

    def texts(entries: list[dict[str, Any]]) -> tuple[str, ...]:
        return tuple(sorted(json.dumps(_stable(entry), sort_keys=True) for entry in entries))

    return Snapshot(
        devices=texts(ns.ip_json("address", "show")),
        routes=texts(
            ns.ip_json("-4", "route", "show", "table", "all") + ns.ip_json("-6", "route", "show", "table", "all")
        ),
        rules=texts(ns.ip_json("-4", "rule", "show") + ns.ip_json("-6", "rule", "show")),
    )


def assert_unchanged(ns: Namespace, before: Snapshot, timeout: float = 3.0) -> None:
    """The namespace is as in `before`; the kernel's own link watch may take up to a second."""
    deadline = time.monotonic() + timeout
    while difference := before.difference(snapshot(ns)):
        if time.monotonic() > deadline:
            raise AssertionError(f"{ns.name} was not left as it was:\n{difference}")
        time.sleep(0.05)
