"""`python -m tests.faults NAME`: play a campaign.

Progress goes to stderr, a line a round; with ``--json`` the last line on stdout is one object. The
exit status is 1 where something was lost, doubled, accepted though corrupt, or late.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.faults import transfers
from tests.faults.campaign import play, say
from tests.faults.crash import crash
from tests.faults.database import FAULTS, Fronted, database
from tests.faults.documents import documents_campaign
from tests.faults.fuzz import fuzz
from tests.faults.kill import kill
from tests.faults.takeover import takeover

MEGABYTE = 1_000_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    one = commands.add_parser("crash", help="kill -9 at every crash point, and at random moments")
    _shared(one, rounds=20)
    one.add_argument("--points", type=int, help="only so many points, chosen by the seed")
    one.add_argument("--only", default="", help="only points in whose name this stands")
    one.add_argument("--together", action="store_true", help="kill at all sites in one round")
    one = commands.add_parser("kill", help="kill -9 during the transfer of a large run")
    _shared(one, rounds=10)
    one.add_argument("--size-mb", type=float, default=500.0)
    one = commands.add_parser("takeover", help="kill -9 the leader of two listeners")
    _shared(one, rounds=3)
    one.add_argument("--lease", type=float, default=15.0)
    one = commands.add_parser("database", help="everything that can happen to the database")
    _shared(one, rounds=50)
    one.add_argument("--only", nargs="+", default=(), choices=sorted(FAULTS), help="only these")
    one = commands.add_parser("documents", help="hostile and broken runs among good ones")
    _shared(one, rounds=5)
    one.add_argument("--fuzz", type=int, default=0, help="first, so many through the model alone")
    one = commands.add_parser("transfers", help="what disks and networks do to copies")
    _shared(one, rounds=24)
    one.add_argument("--only", nargs="+", default=(), choices=sorted(transfers.FAULTS))
    return parser


def _shared(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line above."""
    given = _parser().parse_args(arguments)
    match given.name:
        case "crash":
            return play(
                lambda ground: crash(
                    ground,
                    rounds=given.rounds,
                    seed=given.seed,
                    points=given.points,
                    only=given.only,
                    together=given.together,
                ),
                as_json=given.json,
            )
        case "kill":
            size = int(given.size_mb * MEGABYTE)
            return play(
                lambda ground: kill(ground, rounds=given.rounds, size=size, seed=given.seed),
                as_json=given.json,
            )
        case "transfers":
            return play(
                lambda ground: transfers.transfers(
                    ground, rounds=given.rounds, seed=given.seed, only=tuple(given.only)
                ),
                as_json=given.json,
            )
        case "documents":
            if given.fuzz:
                say(f"{fuzz(given.fuzz, given.seed)} documents through the model: nothing raised")
            return play(
                lambda ground: documents_campaign(ground, rounds=given.rounds, seed=given.seed),
                as_json=given.json,
            )
        case "database":
            return play(
                lambda ground: database(
                    ground, rounds=given.rounds, seed=given.seed, only=tuple(given.only)
                ),
                as_json=given.json,
                server=Fronted,
            )
        case _:
            return play(
                lambda ground: takeover(ground, rounds=given.rounds),
                lease=given.lease,
                as_json=given.json,
            )


if __name__ == "__main__":
    sys.exit(main())
