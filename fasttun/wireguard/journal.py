"""What a tunnel has changed on its host, kept in a file as it happens: so that a killed tunnel can be cleaned up.

A change is written down before it is made, and struck out after it is undone. The file holds no secret.
Not for: what a change is (`changes`, `dns`), or who may run (`fasttun.cli.updown`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from ..errors import FasttunError, StateError
from .changes import Change, Firewall, PolicyRule, SourceMark
from .dns import NameServers

__all__ = ["Journal"]

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (PolicyRule, SourceMark, Firewall, NameServers)}

_log = logging.getLogger(__name__)


class Journal:
    """The changes that are in force, the oldest first. One process at a time; the caller sees to that.

    path: the file, or None to keep it in memory only. config: the configuration file of the tunnel.
    hooks: its PreUp and PostUp commands have begun to run. errors: what could not be undone, in words.
    """

    def __init__(self, path: Path | None = None, *, config: Path | None = None) -> None:
        self.path = path
        self.config = config
        self.hooks = False
        self.errors: list[str] = []
        self.changes: list[Change] = []

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """What is written there; None without a file. StateError when it is damaged, or another user's.

        What it names will be done as the reading user, commands of the configuration file among it.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        with open(fd) as file:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise StateError(f"{path} is not this user's alone: remove it, and what the tunnel left")
            text = file.read()
        try:
            entry = json.loads(text)
            journal = cls(path, config=Path(entry["config"]) if entry["config"] else None)
            journal.hooks = bool(entry["hooks"])
            journal.errors = [str(error) for error in entry["errors"]]
            journal.changes = [_change(fields) for fields in entry["changes"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"{path} is damaged ({error!r}): remove it, and what the tunnel left") from None
        return journal

    def make(self, change: Change) -> None:
        """Write `change` down, then make it. What it raises leaves it for `undo`."""
        self.changes.append(change)
        self.save()
        change.apply()

    def note_hooks(self, *, ran: bool) -> None:
        """PreUp or PostUp are about to run; or PostDown has."""
        if self.hooks != ran:
            self.hooks = ran
            self.save()

    def undo(self) -> list[str]:
        """Take everything back, the youngest first. Never raises: logs what fails, goes on, and returns it in words.

        What failed stays in the journal.
        """
        failed: list[Change] = []
        errors = []
        while self.changes:
            change = self.changes.pop()
            try:
                change.undo()
            except (FasttunError, OSError) as error:
                _log.warning("not undone: %s", error)
                errors.append(str(error))
                failed.insert(0, change)
            self.save(failed)
        self.changes = failed
        return errors

    def save(self, also: list[Change] | None = None) -> None:
        """Write the file anew, in one step."""
        if self.path is None:
            return
        text = json.dumps({
            "config": str(self.config) if self.config else None,
            "hooks": self.hooks,
            "errors": self.errors,
            "changes": [_fields(change) for change in [*self.changes, *(also or [])]],
        })
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            file.write(text)
        os.rename(temporary, self.path)

    def remove(self) -> None:
        """The tunnel has left nothing."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


def _fields(change: Change) -> dict[str, Any]:
    assert dataclasses.is_dataclass(change)
    assert not isinstance(change, type)
    return {"kind": type(change).__name__, **dataclasses.asdict(change)}


def _change(fields: dict[str, Any]) -> Change:
    kind = _KINDS[fields.pop("kind")]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    change: Change = kind(**values)
    return change
