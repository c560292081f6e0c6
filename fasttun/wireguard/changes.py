"""What a tunnel changes on its host outside its own device: policy rules, one sysctl, firewall rules.

Each change is a value that can be undone by whoever reads it back, also after the process that made it was
killed (`journal`). So `undo` is idempotent, and what someone else has taken away already is no error.
Not for: DNS (`dns`), nor what goes with the device by itself, its addresses and routes.
"""

from __future__ import annotations

import errno
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import DeviceError
from ..netlink import code_of, netlink

__all__ = ["RT_TABLE_MAIN", "Change", "Firewall", "PolicyRule", "SourceMark", "family_of", "reported", "run_tool"]

RT_TABLE_MAIN = 254  # linux/rtnetlink.h
_FIB_RULE_INVERT = 2  # linux/fib_rules.h
_ALL_BITS = 0xFFFFFFFF
_NOT_THERE = frozenset({errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT})
_TOOL_PATIENCE_S = 30.0


class Change(Protocol):
    """One change to the host. Its fields are JSON values; fields and log lines hold no secret."""

    def apply(self) -> None:
        """Make it. Raises DeviceError; `undo` is safe also after a failure half-way."""

    def undo(self) -> None:
        """Take it back, if it is there. Raises DeviceError."""


@contextmanager
def reported(operation: str, subject: str, hint: Callable[[int], str] = lambda code: "") -> Iterator[None]:
    """Turn a netlink or system error into a DeviceError with `hint(errno)`."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        code = code_of(error)
        if code is None:
            raise
        raise DeviceError(operation, subject, code, hint(code)) from error


def run_tool(words: list[str], text: str = "") -> str:
    """Run a program of the host with `text` as its input; its output. DeviceError with what it complained of."""
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=_TOOL_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise DeviceError("run", words[0], errno.ETIMEDOUT) from None
    except OSError as error:
        raise DeviceError("run", words[0], error.errno or errno.EIO) from error
    if done.returncode:
        complaint = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
        raise DeviceError("run", " ".join(words), errno.EIO, reason=complaint)
    return done.stdout


def family_of(version: int) -> int:
    """The address family of IP version 4 or 6."""
    return int(socket.AF_INET if version == 4 else socket.AF_INET6)


@dataclass(frozen=True)
class PolicyRule:
    """A rule of the routing policy (ip-rule(8)) that sends packets to `table`.

    fwmark: for packets that do not carry this mark; 0: for all, and the table's default route does not count
    (`suppress_prefixlength 0`). priority: rules are tried in its order, 0 first.
    """

    version: int
    priority: int
    table: int
    fwmark: int

    @staticmethod
    def free_priority(version: int) -> int:
        """Just before the second rule of all, where the kernel itself would put one (net/core/fib_rules.c)."""
        with reported("list the policy rules of", f"IPv{version}"), netlink() as ipr:
            taken = sorted(int(rule.get("FRA_PRIORITY") or 0) for rule in ipr.get_rules(family=family_of(version)))
        return max(0, taken[1] - 1) if len(taken) > 1 else 0

    def _spec(self) -> dict[str, Any]:
        spec = {"family": family_of(self.version), "priority": self.priority, "table": self.table}
        if self.fwmark:
            return spec | {"fwmark": self.fwmark, "fwmask": _ALL_BITS, "flags": _FIB_RULE_INVERT}
        return spec | {"FRA_SUPPRESS_PREFIXLEN": 0}

    def apply(self) -> None:
        with reported("add a policy rule for", f"table {self.table}", _no_ipv6_hint(self.version)), netlink() as ipr:
            ipr.rule("add", **self._spec())

    def undo(self) -> None:
        with reported("remove the policy rule for", f"table {self.table}"), netlink() as ipr:
            try:
                ipr.rule("del", **self._spec())
            except Exception as error:
                if code_of(error) not in _NOT_THERE:
                    raise


def _no_ipv6_hint(version: int) -> Callable[[int], str]:
    def hint(code: int) -> str:
        if version == 6 and code in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EACCES):
            return "IPv6 is off here: turn it on, or take ::/0 out of AllowedIPs"
        return "run it as root" if code == errno.EPERM else ""

    return hint


@dataclass(frozen=True)
class SourceMark:
    """net.ipv4.conf.all.src_valid_mark=1: the reverse path filter then heeds the mark of an incoming packet.

    Without it, a strict filter drops the answers to marked packets, whose way back leads into the tunnel.
    before: the value to put back.
    """

    before: str

    PATH = Path("/proc/sys/net/ipv4/conf/all/src_valid_mark")

    @classmethod
    def now(cls) -> SourceMark:
        """With today's value as the one to put back."""
        return cls(cls._read())

    def apply(self) -> None:
        if self.before != "1":
            self._write("1")

    def undo(self) -> None:
        # Another full tunnel relies on it as well, and found it set already: then it stays.
        if self._read() != self.before and not _marks_are_routed():
            self._write(self.before)

    @classmethod
    def _read(cls) -> str:
        with reported("read", str(cls.PATH)):
            return cls.PATH.read_text().strip()

    def _write(self, value: str) -> None:
        with reported("write", str(self.PATH), _read_only_hint):
            self.PATH.write_text(value)


def _read_only_hint(code: int) -> str:
    return "in a container: run it with --sysctl net.ipv4.conf.all.src_valid_mark=1" if code == errno.EROFS else ""


def _marks_are_routed() -> bool:
    with reported("list the policy rules of", "IPv4"), netlink() as ipr:
        return any(
            rule.get("FRA_FWMARK") and rule["flags"] & _FIB_RULE_INVERT for rule in ipr.get_rules(family=socket.AF_INET)
        )


@dataclass(frozen=True)
class Firewall:
    """Rules against leaks beside a default route into `interface`.

    Packets to the tunnel's own addresses that come in by any other interface are dropped, so that nobody on a
    shared network can probe for them or answer in the tunnel's place (CVE-2019-14899). The mark of outgoing UDP
    is remembered in its connection, and put on the answers, for the reverse path filter.
    tool: "nft" or "iptables". addresses: the device's, of IP `version`.
    """

    tool: str
    interface: str
    version: int
    fwmark: int
    addresses: tuple[str, ...]

    @staticmethod
    def find_tool() -> str:
        """The one that is installed, nft before iptables. DeviceError names the package."""
        for tool, program in (("nft", "nft"), ("iptables", "iptables-restore")):
            if shutil.which(program):
                return tool
        raise DeviceError(
            "find", "nft", errno.ENOENT, "a default route needs firewall rules: apt install nftables",
            "neither nft nor iptables-restore is installed",
        )

    def apply(self) -> None:
        if self.tool == "nft":
            run_tool(["nft", "-f", "-"], self._nft_script())
        else:
            run_tool([f"{self._iptables}-restore", "-n"], self._iptables_script())

    def undo(self) -> None:
        if self.tool == "nft":
            run_tool(["nft", "-f", "-"], f"add table {self._table}\ndelete table {self._table}\n")
            return
        script = self._iptables_removal(run_tool([f"{self._iptables}-save"]))
        if script:
            run_tool([f"{self._iptables}-restore", "-n"], script)

    @property
    def _table(self) -> str:
        """Family and name; nft takes fewer characters than an interface name may have."""
        name = re.sub(r"[^\w.-]", lambda match: f"_{ord(match[0]):x}_", self.interface, flags=re.ASCII)
        return f"{'ip' if self.version == 4 else 'ip6'} fasttun-{name}"

    def _nft_script(self) -> str:
        family = self._table.split()[0]
        drops = [
            f'iifname != "{self.interface}" {family} daddr {address} fib saddr type != local drop'
            for address in self.addresses
        ]
        chains = {
            "preraw": ("prerouting", -300, drops),
            "premangle": ("prerouting", -150, ["meta l4proto udp meta mark set ct mark"]),
            "postmangle": ("postrouting", -150, [f"meta l4proto udp meta mark {self.fwmark} ct mark set meta mark"]),
        }
        lines = [f"add table {self._table}", f"delete table {self._table}", f"table {self._table} {{"]
        for chain, (hook, priority, rules) in chains.items():
            lines += [f"chain {chain} {{", f"type filter hook {hook} priority {priority};", *rules, "}"]
        return "\n".join([*lines, "}", ""])

    @property
    def _iptables(self) -> str:
        return "iptables" if self.version == 4 else "ip6tables"

    @property
    def _comment(self) -> str:
        return f'-m comment --comment "fasttun rule for {self.interface}"'

    def _iptables_script(self) -> str:
        lines = ["*raw"]
        lines += [
            f"-I PREROUTING ! -i {self.interface} -d {address} -m addrtype ! --src-type LOCAL {self._comment} -j DROP"
            for address in self.addresses
        ]
        lines += [
            "COMMIT",
            "*mangle",
            f"-I POSTROUTING -p udp -m mark --mark {self.fwmark} {self._comment} -j CONNMARK --save-mark",
            f"-I PREROUTING -p udp {self._comment} -j CONNMARK --restore-mark",
            "COMMIT",
        ]
        return "\n".join([*lines, ""])

    def _iptables_removal(self, saved: str) -> str:
        """Input for iptables-restore that deletes the rules of this interface in the output of iptables-save."""
        lines = []
        found = False
        for line in saved.splitlines():
            if line.startswith("*") or line == "COMMIT":
                lines.append(line)
            elif line.startswith("-A ") and self._comment in line:
                found = True
                lines.append(f"-D{line[2:]}")
        return "\n".join([*lines, ""]) if found else ""
