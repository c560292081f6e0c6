"""`--metrics` of `fasttun up` and `fasttun wg`, as of the tunnel's own command. Not for: what it serves."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import pytest
from support.netns import Lab, wait_until

from fasttun.wireguard.keys import PrivateKey

pytestmark = pytest.mark.netns

FASTTUN = (sys.executable, "-m", "fasttun")
INSIDE = 'mount -t tmpfs none /run && mkdir /run/wireguard && exec "$@"'
"""With a /run of its own: `ip netns exec` has given it a mount namespace."""


@pytest.mark.parametrize("command", ["up", "wg"])
def test_metrics_are_served(lab: Lab, tmp_path: Path, command: str) -> None:
    ns = lab.namespace()
    ns.ip("link", "set", "lo", "up")
    file = tmp_path / "wgm0.conf"
    file.touch(0o600)
    file.write_text(f"[Interface]\nPrivateKey = {PrivateKey.generate().to_base64()}\nAddress = 10.9.0.1/24\n")
    process = ns.popen(
        ["sh", "-c", INSIDE, "sh", *FASTTUN, command, "-f", "--metrics", "127.0.0.1:9586",
         str(file) if command == "up" else "wgm0"], env={"FASTTUN_RUNTIME_DIR": str(tmp_path / "run")})

    def text() -> str:
        with ns.enter():
            try:
                with urllib.request.urlopen("http://127.0.0.1:9586/metrics", timeout=2) as answer:
                    return str(answer.read().decode())
            except OSError:
                assert process.poll() is None
                return ""

    try:
        found = wait_until(text, 15, what="the metrics")
        assert 'device="wgm0"' in found
        assert 'mode="wireguard"' in found
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("command", ["up", "wg"])
def test_a_bad_address_is_named(lab: Lab, tmp_path: Path, command: str) -> None:
    ns = lab.namespace()
    file = tmp_path / "wgm0.conf"
    file.touch(0o600)
    file.write_text(f"[Interface]\nPrivateKey = {PrivateKey.generate().to_base64()}\n")
    done = ns.run(["sh", "-c", INSIDE, "sh", *FASTTUN, command, "-f", "--metrics", "nowhere",
                   str(file) if command == "up" else "wgm0"], check=False,
                  env={"FASTTUN_RUNTIME_DIR": str(tmp_path / "run")})
    assert done.returncode != 0
    assert "metrics" in done.stderr
    assert "Traceback" not in done.stderr
    assert "wgm0" not in ns.devices()
