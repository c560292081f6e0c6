"""Debian's wireguard-go on a host of a `Lab`, configured by the real `wg`.

Its control socket lies in a mount namespace of its own, so nothing of it is ever seen under the machine's /run.
"""

from __future__ import annotations

from dataclasses import dataclass

from fasttun.wireguard.config import Config

from .netns import Namespace, wait_until

__all__ = ["Go", "Shown"]

_START = 'mount -t tmpfs tmpfs /run && exec wireguard-go -f "$0"'


@dataclass(frozen=True)
class Shown:
    """One peer in `wg show … dump`."""

    endpoint: str
    handshake: int
    """Seconds since 1970, 0 for never."""
    received: int
    sent: int


class Go:
    """A running wireguard-go with `config`'s keys, port, peers and addresses. A context manager."""

    def __init__(self, ns: Namespace, config: Config, *, device: str = "wgo", mtu: int = 1420) -> None:
        self.ns = ns
        self.device = device
        self._process = ns.popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", _START, device],
                                 env={"WG_PROCESS_FOREGROUND": "1"})
        wait_until(lambda: self._process.poll() is not None or not self.wg("show", device, check=False)[0], 10)
        self.set_config(config)
        for address in config.address:
            ns.ip("address", "add", str(address), "dev", device, *(["nodad"] if address.version == 6 else []))
        ns.ip("link", "set", device, "mtu", str(mtu), "up")

    def __enter__(self) -> Go:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=10)

    def wg(self, *words: str, check: bool = True, input: str | None = None) -> tuple[int, str]:
        """The `wg` program: status and output."""
        done = self.ns.run(["nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", "wg", *words], check=check,
                           input=input)
        return done.returncode, done.stdout

    def set_config(self, config: Config) -> None:
        lines = ["[Interface]"]
        if config.private_key is not None:
            lines.append(f"PrivateKey = {config.private_key.to_base64()}")
        if config.listen_port is not None:
            lines.append(f"ListenPort = {config.listen_port}")
        self.wg("setconf", self.device, "/dev/stdin",
                input="\n".join(lines) + "\n" + "\n".join(peer.text() for peer in config.peers))

    def peer(self) -> Shown:
        """The only peer."""
        _, peer = self.wg("show", self.device, "dump")[1].splitlines()
        _key, _shared, endpoint, _allowed, handshake, received, sent, _keepalive = peer.split("\t")
        return Shown(endpoint, int(handshake), int(received), int(sent))
