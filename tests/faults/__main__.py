"""`python -m tests.faults NAME`: play a campaign.

Progress goes to stderr, a line a round; with ``--json`` the last line on stdout is one object. The
exit status is 1 where something was lost, doubled, accepted though corrupt, late, or has grown.
"""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import field, frozen

from tests.faults.campaign import Ground, play, say, told
from tests.faults.cax import SITES as BESIDE_CAX
from tests.faults.cax import beside_cax
from tests.faults.cax_bridge import GET_IT, NotCax, checked
from tests.faults.clocks import SITES as WRONG
from tests.faults.clocks import clocks
from tests.faults.crash import Place, crash
from tests.faults.database import FAULTS, Fronted, database
from tests.faults.deletion import SITES as DELETING
from tests.faults.deletion import deletion
from tests.faults.documents import documents_campaign
from tests.faults.fuzz import fuzz
from tests.faults.hostile import ALL, hostile
from tests.faults.kill import kill
from tests.faults.paths import TRIED, paths
from tests.faults.races import races
from tests.faults.real_cax import TEMPLATE as CAX_TEMPLATE
from tests.faults.real_cax import AtGranSasso, beside_real_cax
from tests.faults.rucio import rucio
from tests.faults.scenes import SCENES
from tests.faults.soak import soak
from tests.faults.takeover import takeover
from tests.faults.tape import TEMPLATE, TapeGround, tape
from tests.faults.transfers import FAULTS as ON_THE_WAY
from tests.faults.transfers import transfers
from tests.faults.update import PAUSE, update
from tests.mongod import Cluster

MEGABYTE = 1_000_000
Figures = Awaitable[Mapping[str, Any]]


@frozen
class Campaign:
    """What the command line knows of a campaign: its options, and how it is played on a ground."""

    help: str
    rounds: int
    play: Callable[[Ground, Namespace], Figures]
    options: Callable[[ArgumentParser], object] = lambda _: None
    server: Callable[[Path], Cluster] = Cluster
    sites: Mapping[str, Mapping[str, Any]] | None = None
    world: Mapping[str, Any] = field(factory=dict)
    """Further arguments of `play`."""


def _real_cax_options(parser: ArgumentParser) -> None:
    parser.add_argument("--cax", type=Path, required=True, metavar="DIR", help=GET_IT)
    parser.add_argument("--runs", type=int, default=30, help="in all")


def _with_helpers(parser: ArgumentParser) -> None:
    parser.add_argument("--helpers", type=int, default=0, help="of each listener")


def _crash_options(parser: ArgumentParser) -> None:
    _with_helpers(parser)
    parser.add_argument("--points", type=int, help="only so many points, chosen by the seed")
    parser.add_argument("--only", default="", help="only points in whose name this stands")
    parser.add_argument("--together", action="store_true", help="kill at all sites in one round")
    told = "; ".join(f"{name}: {scene.help}" for name, scene in SCENES.items())
    parser.add_argument(
        "--scene", nargs="+", default=(), choices=SCENES, help=f"only these of: {told}"
    )
    parser.add_argument(
        "--known",
        nargs="+",
        default=(),
        choices=SCENES,
        help="of these only look which points there are: they were tried before",
    )


def _crash(given: Namespace) -> dict[str, Any]:
    """Play the scenes one after another; `rounds` are dealt to them, points are killed at once."""
    names, met = given.scene or [*SCENES], set[Place]()
    total: dict[str, Any] = {}
    played = [name for name in names if name not in given.known]
    for name in names:
        rounds = len(range(played.index(name), given.rounds, len(played))) if name in played else 0
        scene = SCENES[name]
        if (why := scene.lacks()) is not None:
            say(f"scene {name} is left out: {why}")
            continue
        say(f"scene {name}: {scene.help}")
        figures = play(
            lambda ground: crash(
                ground,
                rounds=rounds,  # noqa: B023  # played at once
                seed=given.seed,
                points=given.points if name in played else 0,  # noqa: B023
                only=given.only,
                together=given.together,
                act=scene.act,  # noqa: B023
                met=met,
            ),
            helpers=given.helpers,
            sites=scene.sites,
            **scene.options,
        )
        missed = figures["handlers_missed"]
        total = {key: total.get(key, type(value)()) + value for key, value in figures.items()}
        total["handlers_missed"] = missed
    if given.scene:  # the others are for the other handlers
        del total["handlers_missed"]
    return total


def _update_options(parser: ArgumentParser) -> None:
    parser.add_argument("--lease", type=float, default=15.0)
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds between two runs")


def _documents(ground: Ground, given: Namespace) -> Figures:
    if given.fuzz:
        say(f"{fuzz(given.fuzz, given.seed)} documents through the model: nothing raised")
    return documents_campaign(ground, rounds=given.rounds, seed=given.seed)


CAMPAIGNS: Final = {
    "cax": Campaign(
        "cax at one site, with its retries and its purge, and caxev at two",
        5,
        lambda ground, given: beside_cax(
            ground, rounds=given.rounds, seed=given.seed, runs=given.runs
        ),
        lambda parser: parser.add_argument("--runs", type=int, default=3, help="of each kind"),
        sites=BESIDE_CAX,
    ),
    "real-cax": Campaign(
        "the real cax 5.2.1 at one site, with its retries and its purge, and caxev at two",
        1,
        lambda ground, given: beside_real_cax(
            ground, source=given.cax, runs=given.runs, seed=given.seed
        ),
        _real_cax_options,
        world={"template": CAX_TEMPLATE, "kind": AtGranSasso},
    ),
    "deletion": Campaign(
        "races for the last copies, and a corrupt master",
        100,
        lambda ground, given: deletion(ground, rounds=given.rounds, seed=given.seed),
        sites=DELETING,
    ),
    "clocks": Campaign(
        "listeners whose clocks are wrong, and are set while they work",
        10,
        lambda ground, given: clocks(ground, rounds=given.rounds, seed=given.seed, runs=given.runs),
        lambda parser: parser.add_argument("--runs", type=int, default=8, help="a round's runs"),
        sites=WRONG,
    ),
    "kill": Campaign(
        "kill -9 during the transfer of a large run",
        10,
        lambda ground, given: kill(
            ground, rounds=given.rounds, size=int(given.size_mb * MEGABYTE), seed=given.seed
        ),
        lambda parser: parser.add_argument("--size-mb", type=float, default=500.0),
    ),
    "takeover": Campaign(
        "kill -9 the leader of two listeners",
        3,
        lambda ground, given: takeover(ground, rounds=given.rounds, seed=given.seed),
        lambda parser: parser.add_argument("--lease", type=float, default=15.0),
    ),
    "update": Campaign(
        "a site that is moved to another version and back while runs come",
        3,
        lambda ground, given: update(ground, rounds=given.rounds, pause=given.pause),
        _update_options,
    ),
    "database": Campaign(
        "everything that can happen to the database",
        50,
        lambda ground, given: database(
            ground, rounds=given.rounds, seed=given.seed, only=tuple(given.only)
        ),
        lambda parser: parser.add_argument(
            "--only", nargs="+", default=(), choices=sorted(FAULTS), help="only these"
        ),
        Fronted,
    ),
    "documents": Campaign(
        "hostile and broken runs among good ones",
        5,
        _documents,
        lambda parser: parser.add_argument(
            "--fuzz", type=int, default=0, help="first, so many through the model alone"
        ),
    ),
    "transfers": Campaign(
        "what disks and networks do to copies on their way",
        24,
        lambda ground, given: transfers(
            ground, rounds=given.rounds, seed=given.seed, only=tuple(given.only)
        ),
        lambda parser: parser.add_argument(
            "--only", nargs="+", default=(), choices=sorted(ON_THE_WAY), help="only these"
        ),
    ),
    "races": Campaign(
        "several that want the same",
        20,
        lambda ground, given: races(ground, rounds=given.rounds, seed=given.seed),
        _with_helpers,
    ),
    "tape": Campaign(
        "everything that can go wrong with a tape archive",
        100,
        lambda ground, given: tape(
            ground, rounds=given.rounds, seed=given.seed, chance=given.chance
        ),
        lambda parser: parser.add_argument(
            "--chance", type=float, default=0.15, help="of a fault in each command"
        ),
        world={"template": TEMPLATE, "kind": TapeGround},
    ),
    "rucio": Campaign(
        "kill -9 of Rucio's server during uploads",
        3,
        lambda ground, given: rucio(ground, rounds=given.rounds, seed=given.seed),
    ),
    "soak": Campaign(
        "mixed load for long, after which nothing has grown",
        0,
        lambda ground, given: soak(
            ground, seconds=60 * given.minutes, seed=given.seed, rounds=given.rounds
        ),
        lambda parser: parser.add_argument(
            "--minutes", type=float, default=2.0, help="how long, where no rounds are given"
        ),
    ),
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tests.faults", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, one in CAMPAIGNS.items():
        one.options(_command(commands, name, one.help, one.rounds))
    _crash_options(
        _command(commands, "crash", "kill -9 at every crash point, and at random moments", 20)
    )
    _command(
        commands, "hostile", "an attacker who writes in the data directories meanwhile", 500
    ).add_argument("--only", nargs="+", default=(), choices=sorted(ALL), help="only these")
    _command(commands, "paths", "every attack by a path, a deed by one way in a round", len(TRIED))
    return parser


def _command(commands: Any, name: str, what: str, rounds: int) -> ArgumentParser:
    """Add a campaign, with the options that each has."""
    command: ArgumentParser = commands.add_parser(
        name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("--rounds", type=int, default=rounds, help="how many rounds")
    command.add_argument("--seed", type=int, default=1, help="what is chosen at random")
    command.add_argument("--json", action="store_true", help="print the figures on stdout")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line above."""
    given = _parser().parse_args(arguments)
    if given.name == "paths":
        return told(paths(rounds=given.rounds, seed=given.seed), as_json=given.json)
    if given.name == "hostile":
        played = hostile(rounds=given.rounds, seed=given.seed, only=given.only)
        return told(played, as_json=given.json)
    if given.name == "crash":
        return told(_crash(given), as_json=given.json)
    one = CAMPAIGNS[given.name]
    if given.name == "real-cax":
        try:
            given.cax = checked(given.cax)
        except NotCax as error:
            sys.exit(str(error))
    figures = play(
        lambda ground: one.play(ground, given),
        lease_time=getattr(given, "lease", 2.0),
        helpers=getattr(given, "helpers", 0),
        server=one.server,
        sites=one.sites,
        **one.world,
    )
    return told(figures, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
