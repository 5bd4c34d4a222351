"""``python -m tests.bench NAME [--json] [--quick] ...``: each measures us beside its peers.

A benchmark is a module here with a `main`, which is given its options by name, and, where it has
options of its own, an `add_options` that adds them to a parser.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

NAMES = ("engine", "backlog", "transfer", "checksum", "stray", "tape", "scale", "web", "work")


def options_of(name: str, benchmark: ModuleType) -> argparse.ArgumentParser:
    prog = f"python -m tests.bench {name}"
    parser = argparse.ArgumentParser(
        prog, description=benchmark.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="end with one object")
    parser.add_argument("--quick", action="store_true", help="small numbers: does it run at all?")
    if hasattr(benchmark, "add_options"):
        benchmark.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="NAME --help tells of them")
    given = parser.parse_args(arguments)
    benchmark = importlib.import_module(f"tests.bench.{given.name}")
    benchmark.main(**vars(options_of(given.name, benchmark).parse_args(given.options)))


if __name__ == "__main__":
    main()
