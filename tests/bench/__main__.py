"""``python -m tests.bench NAME [--json]``: each benchmark measures us beside a peer."""

from __future__ import annotations

import argparse
import importlib

NAMES = ("engine",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--quick", action="store_true", help="small numbers: does it run at all?")
    given = parser.parse_args()
    importlib.import_module(f"tests.bench.{given.name}").main(as_json=given.json, quick=given.quick)


if __name__ == "__main__":
    main()
