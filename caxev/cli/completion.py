"""Run ``caxev completion``: print the script that switches on completion in a shell.

It makes the shell run ``caxev`` with what was typed so far; `values` has what is then offered.
"""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

from caxev.cli.options import example

_FILES: Final = {
    "bash": "~/.bash_completion",
    "zsh": "~/.zshrc, after compinit",
    "fish": "~/.config/fish/completions/caxev.fish",
}


@click.command(
    epilog=example(
        "caxev completion bash >> ~/.bash_completion",
        "caxev completion zsh >> ~/.zshrc",
        "caxev completion fish > ~/.config/fish/completions/caxev.fish",
    )
)
@click.argument("shell", type=click.Choice([*_FILES]))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete commands, options, sites, handlers and tags.

    Put it where the shell reads it at its start, and open a new shell.
    """
    from caxev.cli import cli

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "caxev", "_CAXEV_COMPLETE").source())
