"""Why something that came from outside was not taken: one error, with a reason that is a counter's name.

`Interface.consume` turns it into a `Drop`; only the building blocks below it raise it.
"""

from __future__ import annotations

from ..errors import FasttunError

__all__ = ["Refused"]


class Refused(FasttunError):
    """A message, key or counter is not acceptable. `reason`: a short fixed name, never data from the wire."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
