"""The command line. `main` is the console script ``caxev``.

One module for each group of commands. `command` makes a function a command, `options` holds the
options that all have, `selection` those that select runs, `values` the types of values. `plans`
shows what a command is about to do, and has `caxev.asking` do it; `output` prints tables, `errors`
has the exit codes. Commands import what is heavy when they run, so that ``caxev --help`` is quick.
"""

from __future__ import annotations

import logging
import re
import sys
from importlib import import_module
from typing import Any, Final

import click

from caxev import __version__
from caxev.cli.errors import EPILOG, report_errors
from caxev.cli.options import CommandGroup, GlobalOptions, example, global_options

# The summaries are repeated here, because taking them from the commands would import every module
# for ``caxev --help``.
GROUPS: Final = {
    "Act for a site": {
        "listen": ("caxev.cli.listen:listen", "React to changes of the runs database."),
        "work": ("caxev.cli.work:work", "Help a site's listener, on another machine."),
    },
    "See what is going on": {
        "status": ("caxev.cli.status:status", "Show the sites, a run, or which copies there are."),
        "runs": ("caxev.cli.run_list:runs", "Find runs: list them, or where their files are."),
        "explain": ("caxev.cli.explain:explain", "Show what a run waits for, and why."),
        "holds": ("caxev.cli.hold:holds", "List the copies that somebody holds."),
        "reactions": ("caxev.cli.reactions:reactions", "List what is pending, running or failed."),
        "history": ("caxev.cli.history:history", "List what happened to runs and at sites."),
        "top": ("caxev.cli.top:top", "Show what all sites do, live in the terminal."),
        "web": ("caxev.cli.web:web", "Serve a page that shows all sites and runs, live."),
        "alarms": ("caxev.cli.alarms:alarms", "List the alarms; test that they are delivered."),
    },
    "Request work": {
        "copy": ("caxev.cli.copy:copy", "Copy runs to another site, and watch."),
        "requests": ("caxev.cli.requests:requests", "List, watch, cancel, resume requests."),
        "rm": ("caxev.cli.rm:rm", "Delete copies of runs, if enough others are good."),
        "hold": ("caxev.cli.hold:hold", "Keep copies, although rules would delete them."),
        "release": ("caxev.cli.hold:release", "End holds, so that the rules apply again."),
        "retry": ("caxev.cli.reactions:retry", "Try failed reactions again."),
        "replay": ("caxev.cli.replay:replay", "Run the reactions for existing runs again."),
        "tag": ("caxev.cli.annotate:tag", "Add tags to runs, or remove them."),
        "comment": ("caxev.cli.annotate:comment", "Add a comment to runs."),
        "vouch": ("caxev.cli.vouch:vouch", "Decide which copy is right if no majority does."),
    },
    "Work on the files of a site": {
        "verify": ("caxev.cli.verify:verify", "Check that copies match the database."),
        "register": ("caxev.cli.register:register", "Add an entry for files that exist already."),
        "mv": ("caxev.cli.mv:mv", "Move a copy to another directory of its site."),
        "stray": (
            "caxev.cli.stray:stray",
            "Find files without an entry, and entries without files.",
        ),
    },
    "Tape and Rucio": {
        "tape": ("caxev.cli.tape:tape", "Make, restore, list and compare backups on tape."),
        "rucio": ("caxev.cli.rucio:rucio", "Upload, fetch and check data in the catalogue."),
    },
    "Set up": {
        "sites": ("caxev.cli.sites:sites", "Check sites.json and the connections between sites."),
        "handlers": ("caxev.cli.handlers:handlers", "List the handlers and what triggers them."),
        "db": ("caxev.cli.db:db", "Prepare the database: indexes, users and their rights."),
        "backup": ("caxev.cli.backup:backup", "Write caxev's own collections to a file."),
        "restore": ("caxev.cli.backup:restore", "Write a back-up to the database again."),
        "completion": ("caxev.cli.completion:completion", "Switch on completion in your shell."),
        "man": ("caxev.cli.man:man", "Write manual pages, made from the help of each command."),
        "demo": ("caxev.cli.demo:demo", "Try it all on this machine: three sites, tape, database."),
    },
    "Started by other programs": {
        "receive": ("caxev.cli.batch:receive", "The remote end of a transfer over SSH.")
    },
}
"""The import path of each command and its line in ``--help``, grouped by what people want."""
COMMANDS: Final = {
    **{name: path for group in GROUPS.values() for name, (path, _) in group.items()},
    "batch": "caxev.cli.batch:batch",  # hidden: only batch systems start it
}


_EMPTY: Final = re.compile("--[a-z0-9-]+=")
"""An option without its value."""


class Caxev(CommandGroup):
    """The group: imports a command when it is called, and reports its errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of `COMMANDS`."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is no such command."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        width = max(map(len, COMMANDS))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                rows = [(name.ljust(width), summary) for name, (_, summary) in commands.items()]
                formatter.write_dl(rows)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **more: Any,
    ) -> click.Context:
        """Read the options before the command's name; their errors are one line as well."""
        with report_errors(debug=lambda: False):
            # A shell's variable that is not set: as a path it would be the present directory.
            if not more.get("resilient_parsing"):
                for word, before in zip(args, ["caxev", *args], strict=False):
                    if not word or _EMPTY.fullmatch(word):
                        what = (word or before).rstrip("=")
                        raise click.UsageError(f"what follows {what} is empty: give a value")
            return super().make_context(info_name, args, parent, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and turn its errors into one line and an exit code."""
        options = ctx.ensure_object(GlobalOptions)
        with report_errors(debug=lambda: options.debug):
            return super().invoke(ctx)


@click.group(
    cls=Caxev,
    epilog="\n\n".join(
        (example("caxev demo", "caxev listen --site lngs", "caxev status --run 123"), EPILOG)
    ),
    params=[*global_options()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="caxev")
def cli() -> None:
    """Move, verify, process and delete an experiment's runs, driven by changes of its database.

    At each site a listener follows the runs database. One change triggers the next step: a run is
    copied to other sites, verified there, processed, put on tape, and deleted when enough good
    copies remain. The commands below show what happens, and ask the listeners to do more.

    `caxev COMMAND --help` explains a command, with examples. The options below may stand before or
    after the command.
    """


def main() -> None:
    """Run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A name may contain characters that the terminal's encoding lacks.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.captureWarnings(True)  # a driver's warnings go where the log goes
    cli(prog_name="caxev")
