"""The command line: words become a configuration, errors become one line and an exit status.

Exit status: 0 done, 1 a device, a name or the system failed, 2 bad use, 128 + N ended by signal N before
the tunnel was set up. Nothing in the package imports this. Not for: anything a script would want to call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

__all__ = ["main"]

_DEBUG = "FASTTUN_DEBUG"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (None: this process's own) and return the exit status.

    Raises nothing, save with FASTTUN_DEBUG=1 in the environment: then the error itself.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = _run(words)
    except BrokenPipeError:
        _forget(sys.stdout)
        return 1  # the reader, `head` for one, had enough
    except SystemExit as stop:  # click's own way out of the same
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _tell(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget(sys.stdout)
        return 1
    except OSError:
        _forget(sys.stdout)
    try:
        sys.stderr.flush()
    except OSError:  # a terminal that has hung up: what was to be said there changes nothing about the work
        _forget(sys.stderr)
    return status


def _run(words: list[str]) -> int:
    from .command import fasttun, go_style  # click takes its time: not before it is needed

    result = fasttun.main(go_style(words), prog_name="fasttun", standalone_mode=False)
    return result if isinstance(result, int) else 0


def _tell(error: Exception) -> int:
    """Write the one line for `error`; its exit status."""
    import click

    from ..errors import ConfigurationError, FasttunError
    from . import lines

    if os.environ.get(_DEBUG, "") not in ("", "0"):
        raise error
    if isinstance(error, click.exceptions.Abort):
        return 130
    if isinstance(error, ConfigurationError):
        text, status = lines.configuration(error), 2
    elif isinstance(error, click.UsageError):
        text, status = lines.usage(error), 2
    elif isinstance(error, (FasttunError, click.ClickException)):
        text, status = str(error), 1
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("fasttun"):
        text, status = f"{error.name} is missing: the installation is not complete; reinstall fasttun", 1
    elif isinstance(error, ImportError) and "pip install" in str(error):  # an extra that is not there
        text, status = str(error), 1
    elif isinstance(error, OSError):
        text, status = lines.system(error), 1
    else:
        what = f"{type(error).__name__}: {error}"
        text, status = f"internal error: {what}; please report it, with what {_DEBUG}=1 shows", 1
    lines.write_error(text)
    return status


def _forget(stream: TextIO) -> None:
    """Keep the interpreter's own flush at exit from complaining about a pipe or terminal that is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
