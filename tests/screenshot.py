"""Take the picture of the page that README opens with: ``python -m tests.screenshot FILE``.

The demo's sites take runs; the picture is taken while these move. The picture is made of few
colours, so that the file is small.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from pymongo import MongoClient

from caxev.demo.play import BIRTH, PROTECTED
from caxev.demo.world import SITES, World
from tests.browser import browser, visit

RUNS: Final = 8
SIZE: Final = 60_000_000
LARGEST: Final = 200_000
"""Bytes that the picture may have."""


def main(target: Path) -> None:
    """Take the picture."""
    with (
        tempfile.TemporaryDirectory(prefix="caxev-picture-") as directory,
        World(Path(directory), SITES, tape=True) as world,
        MongoClient[dict[str, Any]](world.mongod.uri) as client,
        browser() as running,
    ):
        runs = client[world.settings.database][world.settings.collection]
        for site in world.listening:
            world.listen(site)
        address = world.serve_page()
        assert address is not None
        errors: list[str] = []
        page = visit(
            running, address.partition("/login")[0], errors, viewport={"width": 1280, "height": 900}
        )
        page.wait_for_selector(f".sites tr.good >> nth={len(world.listening) - 1}", timeout=120_000)
        for number in range(1, RUNS + 1):
            document = world.take_run(BIRTH, number, SIZE, number)
            runs.insert_one({**document, "tags": [{"name": PROTECTED}]})
        page.wait_for_selector("#progress tbody tr .bar >> nth=2", timeout=120_000)
        time.sleep(0.5)
        page.screenshot(path=target)
        assert errors == [], errors
    assert target.stat().st_size <= LARGEST, f"{target} has {target.stat().st_size} bytes"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
