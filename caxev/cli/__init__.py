"""The command line. `main` is the console script ``caxev``.

One module for each group of commands; `options` holds what all of them share, `output` how tables
are printed, `errors` the exit codes. Commands import what is heavy when they run, so that
``caxev --help`` is quick.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any, Final

import click

from caxev import __version__
from caxev.cli.errors import EPILOG, told
from caxev.cli.options import State, example, global_options

COMMANDS: Final = {
    "listen": ("caxev.cli.listen:listen", "Listen for a site: react to what happens to runs."),
    "copy": ("caxev.cli.copy:copy", "Have one copy of a run made, and watch it."),
    "register": ("caxev.cli.register:register", "Tell the database of a copy that is there."),
    "mv": ("caxev.cli.mv:mv", "Move a copy's files to another directory of its site."),
    "verify": ("caxev.cli.verify:verify", "See whether copies are what the database says."),
    "stray": ("caxev.cli.stray:stray", "Files nobody knows, and copies without files."),
    "rm": ("caxev.cli.rm:rm", "Have a copy of a run deleted, if enough others are good."),
    "vouch": ("caxev.cli.vouch:vouch", "Say which copy is right where no majority decides."),
    "tape": ("caxev.cli.tape:tape", "Backups on tape: make, restore, list and compare them."),
    "replay": ("caxev.cli.replay:replay", "Fire the reactions to runs as they are now again."),
    "rucio": ("caxev.cli.rucio:rucio", "Data in the Rucio catalogue: bring, fetch, check it."),
    "status": ("caxev.cli.status:status", "How the sites are, or where copies are."),
    "explain": ("caxev.cli.explain:explain", "What each handler makes of a run, and why."),
    "reactions": ("caxev.cli.reactions:reactions", "Which reactions are open, running or failed."),
    "retry": ("caxev.cli.reactions:retry", "Try failed reactions again."),
    "alarms": ("caxev.cli.alarms:alarms", "What people are told of; a test that it reaches them."),
    "sites": ("caxev.cli.admin:sites", "Check sites.json, and the ways between the sites."),
    "handlers": ("caxev.cli.admin:handlers", "Which handlers there are."),
    "db": ("caxev.cli.admin:db", "Look after the database."),
    "receive": ("caxev.cli.receive:receive", "The far end of a transfer, started over SSH."),
    "batch": ("caxev.cli.batch:batch", "What runs beside a job, started by a batch system."),
    "demo": ("caxev.cli.demo:demo", "Three sites, a database and a DAQ on this machine."),
}
"""Where each command is, and what ``--help`` says of it."""


class Caxev(click.Group):
    """The group: imports a command when it is called, and tells its errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of `COMMANDS`."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None where there is no such command."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for an unknown one, name the nearest."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from caxev.config.errors import nearest

            guess = nearest(args[0], COMMANDS)
            hint = f" Did you mean {guess!r}?" if guess else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; whatever it raises becomes one line and an exit code."""
        options = ctx.ensure_object(State)
        with told(debug=lambda: options.debug):
            return super().invoke(ctx)


@click.group(
    cls=Caxev,
    epilog="\n\n".join((example("caxev listen --site lngs", "caxev status --run 123"), EPILOG)),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@global_options(hidden=False)
@click.version_option(__version__, prog_name="caxev")
def cli() -> None:
    """React to changes of the runs database: one transfer finishing triggers the next step.

    These options may stand before or after the command.
    """


def main() -> None:
    """Run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name may hold what the terminal's encoding does not.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.captureWarnings(True)  # a driver's warnings go where the log goes
    cli(prog_name="caxev")
