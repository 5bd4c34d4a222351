"""Run ``caxev demo``: three sites, real servers and a stand-in DAQ, until all is copied."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import click

from caxev.finite import Finite

MEGABYTE: Final = 1_000_000


@click.command()
@click.option(
    "--runs",
    type=click.IntRange(1, 10_000),
    default=5,
    show_default=True,
    help="How many runs the DAQ takes.",
)
@click.option(
    "--size-mb", type=Finite(0, 1e6), default=20.0, show_default=True, help="Megabytes in each run."
)
@click.option(
    "--sites",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A changed copy of the example's sites.json, to be tried.",
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
@click.option("--keep", is_flag=True, help="Leave it running until Ctrl-C.")
@click.option("--open", "opening", is_flag=True, help="Open the page in a browser, and keep it.")
def demo(
    *, runs: int, size_mb: float, sites: Path | None, as_json: bool, keep: bool, opening: bool
) -> None:
    """Try caxev on this machine: runs are taken, copied, verified, processed and put on tape.

    Starts a MongoDB, three SSH servers, three listeners and a simulated tape, all on loopback
    and in a temporary directory, and removes everything at the end. The first run is lost on
    disk and comes back from tape, then it is purged with a proof, and its history is shown.
    The page at the address that it prints shows all of it live. Anybody who opens it by that link
    can act, as the commands do: copy, verify, delete.

    Example:  caxev demo --runs 5 --size-mb 20
    """
    import webbrowser

    from rich.console import Console

    from caxev.demo.play import play
    from caxev.demo.world import SITES

    summary, is_complete = play(
        Console(stderr=as_json),
        runs,
        int(size_mb * MEGABYTE),
        keep=keep or opening,
        sites=sites or SITES,
        opened=webbrowser.open if opening else None,
    )
    if as_json:
        sys.stdout.write(json.dumps(summary) + "\n")
    sys.exit(0 if is_complete else 1)
