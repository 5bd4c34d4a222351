"""Copies that went bad are repaired: what is wrong is brought again from a good copy, no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from caxev import ERROR, TRANSFERRED, VERIFYING, CopyKey, RunUpdate, What
from caxev.database.history import HistorySearch
from tests import engine
from tests.conftest import Database as Named
from tests.test_life import HOSTS, Lab, lab
from tests.test_ssh import flip

pytestmark = pytest.mark.replicaset


async def doubt(three: Lab, run: Any, host: str) -> None:
    """Have a person doubt a copy: it is verified again."""
    now = await three.run(run)
    copy = now.copy(CopyKey("raw", host))
    assert copy is not None
    await engine.write(three.database, RunUpdate.change_copy(now, copy, VERIFYING))


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


async def test_a_flipped_bit_costs_one_file(database: Named, tmp_path: Path) -> None:
    """Found by a re-check, the bad file alone is fetched again, and the copy is good as before."""
    async with lab(database, tmp_path) as three:
        run = await three.take(*HOSTS)
        good = contents(three.path("chicago"))
        flip(three.path("chicago") / "a.zip", 100)
        await three.listen(*HOSTS)
        await doubt(three, run, "chicago")
        copy = await three.becomes(run, "chicago", status=TRANSFERRED, repairs=1)
        assert not copy.checksumproblem
        assert copy.fields["error"] is None
        assert contents(three.path("chicago")) == good
        await three.settled()
        rows = await three.database.history(HistorySearch(runs=[run], what=[What.REPAIRED]))
        (deed,) = (row.deed for row in rows)
        assert deed.files == ("a.zip",)
        assert deed.bytes in {0, len(good["a.zip"])}  # a reflink moves none


async def test_a_damaged_source_is_passed_over(database: Named, tmp_path: Path) -> None:
    """The same file is bad at the first source too: nothing of it is taken.

    The first is read again by its own site, found to be bad and repaired as well.
    """
    async with lab(database, tmp_path) as three:
        run = await three.take(*HOSTS)
        good = contents(three.path("chicago"))
        flip(three.path("chicago") / "a.zip", 100)
        flip(three.path("lngs") / "a.zip", 200)
        await three.listen(*HOSTS)
        await doubt(three, run, "chicago")
        for host in ("chicago", "lngs"):
            await three.becomes(run, host, status=TRANSFERRED, repairs=1)
            assert contents(three.path(host)) == good


async def test_the_first_good_copy_repairs_those_found_bad_before(
    database: Named, tmp_path: Path
) -> None:
    """None was within reach when they were found: they wait for no further event of their own."""
    async with lab(database, tmp_path) as three:
        run = await three.take(*HOSTS)
        good = contents(three.path("lngs"))
        for host in HOSTS:
            flip(three.path(host) / "a.zip", 100)
        await three.listen(*HOSTS)
        await doubt(three, run, "chicago")

        async def all_found() -> bool:
            return all(copy.status == ERROR for copy in (await three.run(run)).copies)

        await three.until(all_found)
        await three.settled()
        for host in HOSTS:
            copy = await three.becomes(run, host, status=ERROR)
            assert "differs" in copy.fields["error"]
            # Nothing is deleted: it is under its name, or the partial that a repair has made of it.
            place = three.path(host)
            assert place.exists() or place.with_name(f".caxev-part-{place.name}").exists()
        for name, content in good.items():
            (three.path("lngs") / name).parent.mkdir(parents=True, exist_ok=True)
            (three.path("lngs") / name).write_bytes(content)
        await doubt(three, run, "lngs")
        for host in HOSTS:
            await three.becomes(run, host, status=TRANSFERRED)
            assert contents(three.path(host)) == good
