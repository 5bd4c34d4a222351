"""Which processes listen, with which version and configuration, and in what these differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from caxev import __version__
from caxev.cli.sites import process_rows
from caxev.cli.status import site_rows
from caxev.config import Sites, load_sites
from caxev.core.processes import Process, differing, disagreements, unlike_listener
from caxev.engine.options import Options
from caxev.engine.presence import KEY
from tests import engine
from tests.conftest import Database as Named

KEYS = st.dictionaries(st.sampled_from(["a.x", "a.y", "b.x", "b.y", "c.x"]), st.sampled_from("12"))


@given(KEYS, KEYS)
def test_what_differs_is_found_from_both_sides(one: dict[str, str], other: dict[str, str]) -> None:
    """Nothing differs from itself, and either side names the same keys."""
    assert differing(one, one) == []
    assert differing(one, other) == differing(other, one)
    assert bool(differing(one, other)) == (one != other)


def test_a_site_that_only_one_file_has_is_one_difference() -> None:
    """And a key that only one of them has is a difference, too."""
    assert differing({"a.x": "1", "b.x": "1", "b.y": "1"}, {"a.x": "2", "a.y": "1"}) == [
        "a.x",
        "a.y",
        "b",
    ]


def test_who_reports_no_configuration_differs_from_nobody() -> None:
    """One that does is compared, of one's own site, too; a helper compares itself."""
    mine = Process("a:1", "lngs", configuration="1", keys={"a.x": "1"})
    others = [Process("b:1", "chicago"), evolve(mine, owner="a:2", configuration="2")]
    assert disagreements(mine, others) == {"lngs": ["the order of sites"]}
    helper = evolve(mine, owner="a:3", lanes=("transfer",), keys={"a.x": "2"}, configuration="3")
    assert disagreements(helper, [mine, helper]) == {"lngs": ["a.x"]}, "a helper is compared"
    assert disagreements(mine, [helper]) == {}, "and reports it itself"


def test_a_helper_must_be_the_program_that_its_listener_is() -> None:
    """A stand-by need not: it may be updated first, and takes over with all of its own."""
    mine = Process("a:1", "lngs", version="1", handlers="x")
    helper = evolve(mine, owner="a:2", lanes=("transfer",))
    newer = evolve(mine, owner="a:3", version="2", handlers="y")
    assert unlike_listener(helper, [mine, evolve(newer, site="chicago")]) == ""
    assert unlike_listener(helper, [newer]) == "version 1, and not 2; other handlers"
    assert unlike_listener(mine, [newer]) == unlike_listener(helper, [helper]) == ""


def sites_of(path: Path, purge: int, *, layout: int | None = None) -> Sites:
    entries = [{"name": "lngs", "purge": purge}, {"name": "chicago"}, {"name": "stockholm"}]
    path.write_text(json.dumps(entries, indent=layout))
    return load_sites(path)


def test_the_layout_of_a_file_is_no_difference(tmp_path: Path) -> None:
    """A key's digest is that of its value."""
    file = tmp_path / "sites.json"
    former, same, other = (
        sites_of(file, 5),
        sites_of(file, 5, layout=4),
        sites_of(file, 6),
    )
    assert differing(former.keys, same.keys) == []
    assert differing(former.keys, other.keys) == ["lngs.purge"]


def listening(database: Named, site: str, sites: Sites) -> Options:
    return evolve(engine.options_for(database, [], site=site), site=sites.get(site), sites=sites)


@pytest.mark.replicaset
async def test_a_site_with_another_file_raises_a_warning(database: Named, tmp_path: Path) -> None:
    """It names the keys; `sites diff` shows each process, and `status` who stands by."""
    ours = sites_of(tmp_path / "ours.json", 5)
    theirs = sites_of(tmp_path / "theirs.json", 6)
    async with (
        engine.opened(database) as db,
        engine.listener(db, listening(database, "lngs", ours), "a:1"),
    ):

        async def there(*owners: str) -> bool:
            return {one.owner for one in await db.processes()} == set(owners)

        async def warnings() -> list[Any]:
            found = [one for one in await db.alarms("chicago") if one.alarm.key == KEY]
            return [one for one in found if one.active]

        await engine.until(lambda: there("a:1"))
        assert await warnings() == []
        async with engine.listener(db, listening(database, "chicago", theirs), "b:1"):
            (warning,) = await engine.until(warnings)
            assert warning.alarm.details["lngs"] == "lngs.purge"
            async with engine.listener(db, listening(database, "chicago", theirs), "b:2"):
                await engine.until(lambda: there("a:1", "b:1", "b:2"))
                rows = {row["owner"]: row for row in await process_rows(db, ours)}
                assert [rows[one]["role"] for one in sorted(rows)] == [
                    "listens",
                    "listens",
                    "stands by",
                ]
                assert rows["a:1"]["differs"] == []
                assert rows["b:2"]["differs"] == ["lngs.purge"]
                states = {row["site"]: row for row in await site_rows(db, {"lngs": True})}
                assert (states["lngs"]["standby"], states["chicago"]["standby"]) == (0, 1)
                assert states["chicago"]["version"] == __version__
                assert states["chicago"]["configuration"] == rows["b:1"]["configuration"]
                assert states["chicago"]["handlers"] == rows["b:1"]["handlers"]
        # Who has left is not there any more.
        with trio.fail_after(engine.PATIENCE):
            assert await there("a:1")
