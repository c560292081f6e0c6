"""The error tree: one root, and below it errors that are also the builtin a caller would expect.

The packet path raises none of these: its faults are counted (see `fasttun.stats`).
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = ["ConfigurationError", "DeviceError", "EndpointError", "FasttunError", "StateError"]


class FasttunError(Exception):
    """Root of fasttun's errors. `hint`: what the user can do about it, or ""."""

    hint: str = ""


class ConfigurationError(FasttunError, ValueError):
    """A value that cannot work, found before any system call. `field`: its name as the caller wrote it."""

    def __init__(self, field: str, problem: str, hint: str = "") -> None:
        self.field = field
        self.problem = problem
        self.hint = hint
        super().__init__(f"{field}: {problem}" + (f"; {hint}" if hint else ""))


class StateError(FasttunError, RuntimeError):
    """A call that does not fit the object's life cycle, such as `start()` twice."""


class _SystemError(FasttunError, OSError):
    """Shared form of the errors that carry an errno: `operation` on `subject` failed."""

    def __init__(self, operation: str, subject: str, code: int, hint: str = "", reason: str = "") -> None:
        self.operation = operation
        self.subject = subject
        self.hint = hint
        text = reason or os.strerror(code)
        name = _errno.errorcode.get(code, "")
        label = f" [{name}]" if name else ""
        OSError.__init__(self, code, text)
        self._message = f"{operation} {subject}: {text}{label}" + (f"; {hint}" if hint else "")

    def __str__(self) -> str:
        return self._message

    @property
    def interface(self) -> str:
        """The interface or name the operation was for (same as `subject`)."""
        return self.subject


class DeviceError(_SystemError):
    """A TUN device, address or route operation failed. Has `errno`, `operation`, `subject`."""


class EndpointError(_SystemError):
    """A name did not resolve, or a UDP socket could not be opened or bound."""
