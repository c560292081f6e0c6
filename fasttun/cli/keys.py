"""`fasttun genkey`, `pubkey`, `genpsk`: keys on standard output, as `wg` gives them."""

from __future__ import annotations

import os
import stat
import sys

import click

from ..errors import ConfigurationError

__all__ = ["genkey", "genpsk", "pubkey"]

_LONGEST = 4096
"""Bytes: more than a key with any white space around it."""


def _warn_if_readable() -> None:
    """A secret that goes into a file which others can read is worth a word."""
    try:
        status = os.fstat(sys.stdout.fileno())
    except (OSError, ValueError):
        return
    if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IRWXO:
        click.echo("warning: others can read the file that the key goes to; consider umask 077", err=True)


@click.command()
def genkey() -> None:
    """Print a new private key."""
    from ..wireguard.keys import PrivateKey

    _warn_if_readable()
    click.echo(PrivateKey.generate().to_base64())


@click.command()
def genpsk() -> None:
    """Print a new preshared key."""
    from ..wireguard.keys import PresharedKey

    _warn_if_readable()
    click.echo(PresharedKey.generate().to_base64())


@click.command()
def pubkey() -> None:
    """Read a private key from standard input and print its public key."""
    from ..wireguard.keys import PrivateKey

    words = sys.stdin.buffer.read(_LONGEST).decode("ascii", "replace").split()
    if not words:
        raise ConfigurationError("standard input", "has no key", "as in fasttun pubkey < key")
    if len(words) > 1:
        raise ConfigurationError("standard input", "has more than a key", "give it the private key alone")
    click.echo(str(PrivateKey.from_base64(words[0]).public))
