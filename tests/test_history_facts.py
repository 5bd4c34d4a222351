"""What the shipped handlers leave in the history: findings, repairs, deletions, and who asked."""

from __future__ import annotations

from typing import Any

import pytest

from caxev import CopyKey, Run
from caxev.asking.copies import CopyPath, new_request
from caxev.core.history import HistoryRow, What
from caxev.handlers import checksum, deletion, repair, transfer
from caxev.testing import Lab, lab

pytestmark = pytest.mark.replicaset

PATROL = {"patrol": {"days": 30}}
SITES: dict[str, dict[str, Any]] = {
    "lngs": {"purge": 100, "deletion": {"copies": 1}, **PATROL},
    "chicago": {"download_options": ["lngs"], **PATROL},
}
two = lab(checksum, deletion, repair, transfer, sites=SITES)


async def rows(here: Lab, run: Run, what: str) -> list[HistoryRow]:
    return [row for row in await here.history(run) if row.deed.what == what]


@two
async def test_the_history_of_a_run(here: Lab) -> None:
    """From its first copies to its purge, and of a copy that a person requested."""
    run = await here.new_run(at="lngs", files={"good": b"abc", "bad file": b"defgh"})
    other = await here.new_run(at="chicago", files={"a": b"abc"})
    path = CopyPath(CopyKey("raw", "chicago"), CopyKey("raw", "lngs"))
    await here.update(new_request(other, path, "me@here", here.now(), None))
    await here.settle()
    (brought,) = await rows(here, other, What.TRANSFERRED)
    assert (brought.deed.by, brought.deed.target) == ("me@here", "lngs")
    await copied(here, run)
    await damaged_and_repaired(here, run)
    await purged(here, run)


async def copied(here: Lab, run: Run) -> None:
    """Who made the copies; readings that find nothing new, and waits, leave no further row."""
    made = {row.deed.target: row.deed for row in await rows(here, run, What.TRANSFERRED)}
    assert made.keys() == {"chicago"}
    assert {(one.source, one.bytes) for one in made.values()} == {("lngs", 8)}
    assert {row.site for row in await rows(here, run, What.VERIFIED)} == {*made}
    before = await here.history(run)
    assert {row.deed.what for row in before} == {What.TRANSFERRED, What.VERIFIED}
    assert await here.settle() == await here.reactions()
    assert await here.history(run) == before


async def damaged_and_repaired(here: Lab, run: Run) -> None:
    """The finding, the file's name, the repair and its source."""
    (here.path(run, "chicago") / "bad file").write_bytes(b"deXgh")
    here.later(days=31)
    await here.settle()
    (found,) = await rows(here, run, What.DAMAGED)
    assert (found.site, found.handler, found.deed.files) == ("chicago", "patrol", ("bad file",))
    assert found.deed.reason == "no longer what it was: 1 files: bad file (differs)"
    (repaired,) = await rows(here, run, What.REPAIRED)
    assert (repaired.deed.source, repaired.deed.target) == ("lngs", "chicago")
    assert (repaired.deed.files, repaired.handler) == (("bad file",), "repair")
    assert (here.path(run, "chicago") / "bad file").read_bytes() == b"defgh"
    assert repaired.at >= found.at


async def purged(here: Lab, run: Run) -> None:
    """Marked by a rule, proven by the others, deleted: by whom, on what proof, how many bytes."""
    here.later(days=70)
    await here.settle()
    assert (await here.look(run)).copy(CopyKey("raw", "lngs")) is None
    steps = (What.MARKED, What.PROVEN, What.DELETED)
    marked, proven, gone = [(await rows(here, run, what))[-1] for what in steps]
    assert marked.at <= proven.at <= gone.at
    assert marked.deed.reason == gone.deed.reason == "purge: older than 100 days"
    assert (gone.site, gone.handler, gone.deed.by) == ("lngs", "erase", "lngs: purge")
    assert gone.deed.bytes == 8
    assert {*gone.deed.proof} == {*proven.deed.proof} == {"chicago"}
    assert not await rows(here, run, What.WITHDRAWN)
