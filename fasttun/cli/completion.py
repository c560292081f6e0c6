"""`fasttun completion bash|zsh|fish`: the script with which a shell completes fasttun's words.

The script asks fasttun itself, by click's protocol, so that it knows every flag of this version.
Not for: installing it where the shell looks (the packages do).
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["SHELLS", "VARIABLE", "completion", "script"]

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_FASTTUN_COMPLETE"
"""What click derives from the program's name and looks for in the environment."""


def script(shell: str) -> str:
    """The completion script for one of SHELLS."""
    from .command import fasttun

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(fasttun, {}, "fasttun", VARIABLE)
    return made.source_template % made.source_vars()  # source() would start bash to ask its version


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script with which a shell completes fasttun's commands and flags.

    \b
    bash  fasttun completion bash > ~/.local/share/bash-completion/completions/fasttun
    zsh   fasttun completion zsh > DIRECTORY/_fasttun, one of those in $fpath
    fish  fasttun completion fish > ~/.config/fish/completions/fasttun.fish
    """
    click.echo(script(shell))
