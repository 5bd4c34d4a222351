"""What old programs leave on the same collection is met by real listeners, on real files.

Each test stands at the state that cax leaves; `tests.faults.cax` has a cax that runs beside.
"""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from caxev import ERROR, TRANSFERRED, TRANSFERRING, CopyField, CopyKey
from caxev.copies.deletion import intent
from caxev.copies.retention import DeletionPlan, DeletionWish, plan
from caxev.core.clock import utcnow
from caxev.core.model import FormerCopy, Watched
from caxev.database import Request
from tests import engine
from tests.conftest import Database as Named
from tests.faults.deletion import harm
from tests.test_life import Lab, lab

pytestmark = pytest.mark.replicaset

DAY = timedelta(days=1)
RAW = CopyKey("raw", "chicago")


async def made_by_cax(three: Lab, host: str, **fields: Any) -> dict[str, Any]:
    """The entry of a good copy that no caxev has ever touched."""
    found = await three.entry(host)
    known = ("type", "host", "status", "location", "checksum")
    return {name: found[name] for name in known} | {"creation_time": utcnow() - 2 * DAY, **fields}


def as_cax(named: Named, run: Any, change: dict[str, Any], **which: Any) -> None:
    """Write to a run as cax does: whatever stands there."""
    with MongoClient[dict[str, Any]](named.uri) as client:
        found = client[named.name]["runs_new"].update_one({"_id": run, **which}, change)
    assert found.modified_count == 1


def given_up(found: list[FormerCopy]) -> list[str | None]:
    return [one.trigger for one in found]


async def test_what_was_given_up_is_not_pushed_for_an_entry_that_was_taken_out(
    database: Named, tmp_path: Path
) -> None:
    """However often cax takes it out; when a person asks for another try, it is pushed."""
    keys: dict[str, Any] = {"lngs": {"upload_options": ("chicago",)}}
    async with lab(database, tmp_path, **keys) as three:
        three.path("chicago").write_text("somebody's own")
        run = await three.take("lngs")
        await three.listen("lngs")
        await three.becomes(run, "chicago", status=ERROR)
        as_cax(database, run, {"$pull": {"data": {"host": "chicago"}}})

        async def failed() -> list[str]:
            reactions = await three.database.reactions(
                "lngs", run=run, state="failed", handler="push"
            )
            return sorted(str(reaction.event) for reaction, _ in reactions)

        async def both() -> bool:
            return await failed() == ["raw at chicago: gone", "raw at lngs: transferred"]

        await three.until(both)
        await three.settled()
        after = await three.run(run)
        assert after.copy(RAW) is None
        assert given_up(list(after.given_up(RAW))) == ["lngs: push: raw at lngs"]
        assert three.path("chicago").read_text() == "somebody's own"

        three.path("chicago").unlink()
        request = Request("retry", (run,), "push")
        await three.database.add_request("lngs", request, "test", utcnow())
        await three.becomes(run, "chicago", status="verifying")
        assert not await failed()


async def test_a_copy_that_was_good_meanwhile_is_pushed_again(
    database: Named, tmp_path: Path
) -> None:
    """What was given up before it became good is of a former life."""
    keys: dict[str, Any] = {"lngs": {"upload_options": ("chicago",)}}
    async with lab(database, tmp_path, **keys) as three:
        former: dict[str, Any] = {
            "type": "raw",
            "host": "chicago",
            "trigger": "lngs: push: raw at chicago",
        }
        rows = [{**former, "pax_version": None, "date": utcnow() - DAY}]
        run = await three.take("lngs", "chicago", given_up=rows)
        as_cax(
            database,
            run,
            {"$set": {"data.$.status_since": utcnow() - DAY / 2}},
            **{"data.host": "chicago"},
        )
        await three.listen("lngs")
        await three.settled()
        three.path("chicago").rename(tmp_path / "elsewhere")
        as_cax(database, run, {"$pull": {"data": {"host": "chicago"}}})
        await three.becomes(run, "chicago", status="verifying")


async def test_a_partial_under_the_final_name_is_gone_on_with(
    database: Named, tmp_path: Path
) -> None:
    """A day after it began cax has given it up: what is right of it stays, the rest is brought."""
    async with lab(database, tmp_path) as three:
        run = await three.take("lngs")
        source, left = three.path("lngs"), three.path("chicago")
        left.mkdir()
        (left / "a.zip").write_bytes((source / "a.zip").read_bytes())
        (left / "pax_info.json").write_bytes(b"half")
        kept = (left / "a.zip").stat().st_ino
        entry: dict[str, Any] = {
            "type": "raw",
            "host": "chicago",
            "status": TRANSFERRING,
            "location": str(left),
        }
        entry |= {"checksum": None, "creation_time": utcnow() - DAY}
        as_cax(database, run, {"$push": {"data": entry}})
        await three.listen("lngs", "chicago")
        await three.becomes(run, "chicago", status=TRANSFERRED)
        assert (left / "a.zip").stat().st_ino == kept
        assert (left / "pax_info.json").read_bytes() == (source / "pax_info.json").read_bytes()
        assert (left / "deep" / "b.zip").exists()


async def test_what_another_run_has_there_is_not_gone_on_with(
    database: Named, tmp_path: Path
) -> None:
    """Two runs of one name: the directory is the other's, whoever has left a partial."""
    async with lab(database, tmp_path) as three:
        run = await three.take("lngs")
        theirs = three.path("chicago")
        theirs.mkdir()
        (theirs / "a.zip").write_bytes(b"the muon veto's")
        other: dict[str, Any] = {
            "type": "raw",
            "host": "chicago",
            "status": "error",
            "location": str(theirs),
        }
        other |= {"status_since": utcnow()}
        await three.database.insert_run({**engine.run_document(2), "data": [other]})
        left: dict[str, Any] = {
            "type": "raw",
            "host": "chicago",
            "pax_version": None,
            "location": str(theirs),
        }
        as_cax(database, run, {"$set": {"given_up": [{**left, "date": utcnow()}]}})
        await three.listen("chicago")
        await three.becomes(run, "chicago", status=ERROR)
        assert (theirs / "a.zip").read_bytes() == b"the muon veto's"


async def test_an_error_of_cax_is_made_good(database: Named, tmp_path: Path) -> None:
    """By the site's own listener, from wherever the data is good, though it has no manifest."""
    async with lab(database, tmp_path) as three:
        run = await three.take()
        (three.path("lngs")).mkdir()
        (three.path("lngs") / "a.zip").write_bytes(b"abc")
        left = three.path("chicago")
        left.mkdir()
        (left / "a.zip").write_bytes(b"a")
        failed: dict[str, Any] = {
            "type": "raw",
            "host": "chicago",
            "status": ERROR,
            "location": str(left),
        }
        failed |= {"checksum": None, "creation_time": utcnow()}
        as_cax(database, run, {"$set": {"data": [await made_by_cax(three, "lngs"), failed]}})
        await three.listen("chicago")
        copy = await three.becomes(run, "chicago", status=TRANSFERRED)
        assert copy.source == "lngs"
        assert (left / "a.zip").read_bytes() == b"abc"


async def test_an_entry_beside_a_good_one_goes(database: Named, tmp_path: Path) -> None:
    """The good copy, to whose place something was written, is read again."""
    async with lab(database, tmp_path) as three:
        run = await three.take("lngs", "chicago")
        place = str(three.path("chicago"))
        twice: dict[str, Any] = {
            "type": "raw",
            "host": "chicago",
            "status": ERROR,
            "location": place,
        }
        twice |= {"checksum": None, "creation_time": utcnow()}
        before = utcnow()
        await three.listen("chicago")
        await three.settled()
        as_cax(database, run, {"$push": {"data": twice}})

        async def alone() -> bool:
            return [one.status for one in (await three.run(run)).copies] == [TRANSFERRED] * 2

        await three.until(alone)

        async def read() -> bool:
            copy = await three.copy(run, "chicago")
            return copy is not None and copy.verified_at is not None and copy.verified_at >= before

        await three.until(read)


async def seen(three: Lab, run: Any, name: str) -> bool:
    """Whether the listener at lngs has seen this field of its copy as it is now."""
    watched = Watched(copies=frozenset({name}))
    found = await three.database.snapshot("lngs", [run], watched=watched)
    field = CopyField(*RAW._replace(host="lngs"), name)
    return bool(found.before[run].get(field) == found.now[run].get(field))


async def test_a_doubt_is_cleared_by_a_good_reading(database: Named, tmp_path: Path) -> None:
    """Somebody marked a good copy; a bad one would be an error by now."""
    async with lab(database, tmp_path) as three:
        run = await three.take("lngs", "chicago")
        await three.listen("lngs")
        await three.settled()
        await three.note(run, "lngs", checksumproblem=True)
        await three.becomes(run, "lngs", status=TRANSFERRED, checksumproblem=False)
        # A field that goes and comes back before anybody looks is no change.
        await three.until(partial(seen, three, run, "checksumproblem"))
        harm(three.path("lngs"))
        await three.note(run, "lngs", checksumproblem=True)
        await three.becomes(run, "lngs", status=TRANSFERRED, checksumproblem=False, repairs=1)


async def test_a_copy_that_was_pushed_damaged_is_repaired_or_removed(
    database: Named, tmp_path: Path
) -> None:
    """The site that pushed it answers nobody: two that say the same are enough to judge by."""
    async with lab(database, tmp_path) as three:
        run = await three.take("lngs", "chicago", "stockholm")
        harm(three.path("chicago"))
        pushed = await made_by_cax(three, "chicago", status="verifying", checksum=None)
        born = await made_by_cax(three, "stockholm")
        as_cax(database, run, {"$set": {"data": [born, await three.entry("lngs"), pushed]}})
        await three.listen("lngs", "chicago")
        await three.becomes(run, "chicago", status=TRANSFERRED, repairs=1)

        await three.settled()
        now = await three.run(run)
        bad = now.copy(RAW)
        assert bad is not None
        damaged = {"data.$.status": ERROR, "data.$.checksumproblem": True, "data.$.repairs": 3}
        as_cax(database, run, {"$set": damaged}, **{"data.host": "chicago"})
        now, here = await three.run(run), three.sites.get("chicago")
        (bad,) = (one for one in now.copies if one.key == RAW)
        wish = DeletionWish(bad, "test", "pushed damaged", 2, by_entries=True)
        wanted = plan(now, wish, here, three.sites, utcnow())
        assert isinstance(wanted, DeletionPlan), wanted
        await engine.write(three.database, intent(now, wanted, three.sites, utcnow()))
        await three.gone(run, "chicago")
        (stone,) = (await three.run(run)).document["deleted_data"]
        assert (stone["why"], stone["by_entries"]) == ("pushed damaged", True)
        assert not three.path("chicago").exists()


async def test_a_new_copy_proves_what_a_silent_one_cannot(database: Named, tmp_path: Path) -> None:
    """A deletion waits for cax's copy to be read, which nobody does; then another copy comes."""
    async with lab(database, tmp_path) as three:
        run = await three.take("chicago", "stockholm", "lngs")
        data = [await three.entry("chicago"), await made_by_cax(three, "stockholm")]
        as_cax(database, run, {"$set": {"data": data}})
        await three.wants_gone(run, "chicago", keep=1)
        await three.listen("chicago", "lngs")

        async def asked() -> bool:
            copy = await three.copy(run, "stockholm")
            return copy is not None and bool(copy.pending)

        await three.until(asked)
        await three.settled()
        came = await made_by_cax(three, "lngs", status="verifying", checksum=None)
        as_cax(database, run, {"$push": {"data": came}})
        await three.gone(run, "chicago")
