"""genkey, pubkey, genpsk: what `wg` would have said, and errors that repeat no secret."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fasttun.wireguard.keys import PresharedKey, PrivateKey


def fasttun(word: str, *, given: bytes = b"", out: int | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "fasttun", word], input=given, stderr=subprocess.PIPE, check=False,
                          stdout=subprocess.PIPE if out is None else out)


def test_keys_are_new_and_whole() -> None:
    one, two = fasttun("genkey"), fasttun("genkey")
    assert (one.returncode, one.stderr) == (0, b"")
    assert one.stdout != two.stdout
    assert PrivateKey.from_base64(one.stdout.decode()).to_base64() == one.stdout.decode().rstrip("\n")
    secret = fasttun("genpsk")
    assert PresharedKey.from_base64(secret.stdout.decode())
    assert secret.stdout != fasttun("genpsk").stdout


def test_wg_finds_the_same_public_key() -> None:
    if shutil.which("wg") is None:
        pytest.skip("wg is not installed (Debian: wireguard-tools)")
    for program in ("wg", "fasttun"):
        key = subprocess.run(["wg", "genkey"], capture_output=True, check=True).stdout if program == "wg" \
            else fasttun("genkey").stdout
        theirs = subprocess.run(["wg", "pubkey"], input=key, capture_output=True, check=True).stdout
        assert fasttun("pubkey", given=key).stdout == theirs


def test_white_space_around_a_key_is_none_of_it() -> None:
    key = PrivateKey.generate()
    for given in (f"{key.to_base64()}", f"\n  {key.to_base64()}\r\n\n"):
        assert fasttun("pubkey", given=given.encode()).stdout.decode() == f"{key.public}\n"


@pytest.mark.parametrize(("given", "wrong"), [
    (b"", "has no key"), (b" \n", "has no key"), (b"SECRETSECRET\n", "private key: has 12 characters"),
    (b"SECRET" * 7 + b"!=\n", "private key"), (b"A" * 43 + b"=", "all zeros"), (b"\xff\xfe\n", "private key"),
    (b"two keys\n", "more than a key"), (b"x" * 100_000, "private key"),
])
def test_what_is_no_key_is_refused(given: bytes, wrong: str) -> None:
    done = fasttun("pubkey", given=given)
    assert (done.returncode, done.stdout) == (2, b"")
    assert wrong in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
    assert b"SECRET" not in done.stderr


@pytest.mark.parametrize("word", ["genkey", "genpsk"])
@pytest.mark.parametrize(("mode", "warned"), [(0o604, True), (0o644, True), (0o600, False), (0o640, False)])
def test_a_file_that_all_can_read_is_warned_of(word: str, mode: int, warned: bool, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.chmod(mode)
    with path.open("wb") as file:
        done = fasttun(word, out=file.fileno())
    assert done.returncode == 0
    assert (b"umask 077" in done.stderr) == warned
    assert len(path.read_text()) == 45
