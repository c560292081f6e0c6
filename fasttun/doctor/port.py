"""Checks of the listener's UDP port: free, or who has it; and firewalls on this host that drop it.

Not for: reading firewalls' rules (`firewall`), or asking from outside (`path`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from . import firewall
from .finding import FAIL, OK, SKIPPED, WARNING, Finding, Question

__all__ = ["CHECKS", "filtered", "free"]

_OURS = ("fasttun", "fasttun-wg")


def free(ask: Question) -> Finding:
    """The listener's port can be bound, or is fasttun's already."""
    name = "port"
    if not ask.listens:
        return Finding(name, SKIPPED, "a client takes any port")
    error = _bind(ask.port)
    if error is None:
        return Finding(name, OK, f"UDP port {ask.port} is free")
    if error.errno in (errno.EACCES, errno.EPERM):
        status = FAIL if os.geteuid() == 0 else WARNING
        return Finding(name, status, f"UDP port {ask.port} may not be bound by this user",
                       "ports below 1024 need root: run it with sudo, or take another --port")
    if error.errno != errno.EADDRINUSE:
        return Finding(name, FAIL, f"UDP port {ask.port} cannot be bound: {error.strerror}", "take another --port")
    holders = list(_holders(ask.port))
    who = ", ".join(f"{words} (process {pid})" for pid, words in holders)
    if holders and all(any(Path(word).name in _OURS for word in words.split()) for _, words in holders):
        return Finding(name, OK, f"UDP port {ask.port} is held by {who}")
    if not who:
        who = "the kernel (a WireGuard interface?), or a process that this user may not see"
    other = ask.port + 1 if ask.port < 65535 else ask.port - 1
    return Finding(name, FAIL, f"UDP port {ask.port} is taken by {who}",
                   f"end that, or use --port {other} on both sides; ss -lunp 'sport = {ask.port}' shows it")


def _bind(port: int) -> OSError | None:
    """Why the port cannot be had in either family; None when it can."""
    for family, host in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                return error
    return None


def _holders(port: int) -> Iterator[tuple[int, str]]:
    """(process, its first words) of each process with a socket on the port, as far as this user may see."""
    inodes = {f"socket:[{inode}]" for inode in _inodes(port)}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            for link in (entry / "fd").iterdir():
                if os.readlink(link) in inodes:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    yield int(entry.name), b" ".join(words[:3]).decode(errors="replace").strip()[:60]
                    break


def _inodes(port: int) -> Iterator[str]:
    for table in ("udp", "udp6"):
        with contextlib.suppress(OSError), open(f"/proc/thread-self/net/{table}") as file:
            for line in file:
                found = re.match(r"\s*\d+: [0-9A-F]+:([0-9A-F]{4}) ", line)
                if found and int(found[1], 16) == port:
                    yield line.split()[9]


def filtered(ask: Question) -> Finding:
    """Whether the rules of this host's firewall look as if they dropped the tunnel's datagrams."""
    name = "firewall"
    packet = _packet(ask)
    way = f"UDP to port {ask.port}" + ("" if ask.listens else f" of {ask.server}")
    rules, reasons = firewall.read()
    if not rules:
        return Finding(name, SKIPPED, "; ".join(reasons) or "neither nft nor iptables-save is there to ask")
    verdict = firewall.judge(rules, packet)
    if verdict.drops:
        mend = "let it in, before that rule" if ask.listens else "let it out, before that rule"
        return Finding(name, WARNING if verdict.unsure else FAIL, f"looks like {verdict.where} drops {way}",
                       f"as root, {mend}: {_opening(verdict.tool, ask)}")
    return Finding(name, OK, f"no rule here looks as if it dropped {way}")


def _packet(ask: Question) -> firewall.Packet:
    if ask.listens:
        return firewall.Packet("input", ask.port, (4, 6))
    contact = ask.contact
    version = contact.endpoint.host.version if contact is not None and contact.endpoint is not None else 4
    return firewall.Packet("output", ask.port, (version,))


def _opening(tool: str, ask: Question) -> str:
    if tool.startswith("nft "):
        return f"nft insert rule {tool[4:]} udp dport {ask.port} accept"
    chain = "INPUT" if ask.listens else "OUTPUT"
    return f"{tool} -I {chain} -p udp --dport {ask.port} -j ACCEPT"


CHECKS = {"port": free, "firewall": filtered}
