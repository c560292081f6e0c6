"""One end of a tunnel in a process of its own, so that its memory and its threads are its alone.

    with Node(ns, listen=True, address="10.7.0.1/24") as node:
        node.stats()["inbound"]["packets_in"]
        last = node.stop()

The process is this file, run as a program: keywords of `Forwarder` as JSON in, a JSON line out a command.
Not for tests of the command line.
"""

from __future__ import annotations

import json
import select
import sys
from pathlib import Path
from typing import Any

__all__ = ["Node", "assert_counted"]


class Node:
    """A running `Forwarder(**keywords)` on the host `ns`. Ready when made; a context manager."""

    def __init__(self, ns: Any, **keywords: Any) -> None:
        self._process = ns.popen([sys.executable, __file__, json.dumps(keywords)], stdin=-1)
        self.last: dict[str, Any] | None = None
        ready = self._answer()
        self.mtu: int = ready["mtu"]

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        if self.last is None and self._process.poll() is None:
            self.stop()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def _answer(self, timeout: float = 15) -> dict[str, Any]:
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            raise AssertionError(f"the node ended or hangs: {self._process.stderr.read()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ask(self, command: str) -> dict[str, Any]:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stats(self) -> dict[str, Any]:
        """`Stats` as plain dicts, with `endpoint` and `addresses` as text, and `error`: what ended it or ""."""
        return self._ask("stats")

    def stop(self) -> dict[str, Any]:
        """Stops it; the last counters."""
        if self.last is None:
            self.last = self._ask("stop")
            self._process.wait(10)
        return self.last

    def rss_kib(self) -> int:
        """Resident memory of the process."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS:")).split()[1])


def assert_counted(stats: dict[str, Any]) -> None:
    """in = out + drops, in both directions, to the packet."""
    for name in ("outbound", "inbound"):
        direction = stats[name]
        total = direction["packets_out"] + sum(direction["drops"].values())
        assert direction["packets_in"] == total, f"{name}: {direction}"


def _plain(stats: Any, error: str) -> str:
    def direction(d: Any) -> dict[str, Any]:
        return {"packets_in": d.packets_in, "bytes_in": d.bytes_in, "packets_out": d.packets_out,
                "bytes_out": d.bytes_out, "drops": dict(d.drops)}

    return json.dumps({
        "outbound": direction(stats.outbound), "inbound": direction(stats.inbound), "error": error,
        "system_calls": dict(stats.system_calls), "errors": dict(stats.errors),
        "offloads": dict(stats.offloads), "events_lost": stats.events_lost,
        "peers": [{"endpoint": str(peer.endpoint), "framing": peer.framing,
                   "addresses": [str(address) for address in peer.addresses],
                   "inbound_packets": peer.inbound_packets, "outbound_packets": peer.outbound_packets}
                  for peer in stats.peers]})


def _main() -> None:
    from fasttun import FasttunError, Forwarder

    with Forwarder(**json.loads(sys.argv[1])) as tunnel:
        print(json.dumps({"mtu": tunnel.mtu}), flush=True)
        for command in sys.stdin:
            if command.strip() == "stop":
                break
            error = ""
            try:
                tunnel.wait(0)
            except FasttunError as caught:
                error = str(caught)
            print(_plain(tunnel.stats(), error), flush=True)
    print(_plain(tunnel.stats(), ""), flush=True)


if __name__ == "__main__":
    _main()
