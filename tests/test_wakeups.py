"""What a handler passes over, it comes back to: the end of each reason is an event that it wants.

A decision that finds nothing to do leaves no reaction, and so no timer. Each case here is a reason
that ends by a change of the run, which must bring the handler back.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
from attrs import evolve, field, frozen
from hypothesis import given
from hypothesis import strategies as st

from caxev.config import DEFAULT_HANDLERS, Processing, Site, Sites, load_handlers
from caxev.core.alarms import Alarm
from caxev.core.clock import utcnow
from caxev.core.diff import diff
from caxev.core.entry import NOTED
from caxev.core.job import Job, Skip
from caxev.core.model import REQUESTED, CopyField, CopyKey, Event, Run
from caxev.core.recording import Maker, concerns
from caxev.core.registry import Registry, recorded
from caxev.handlers import alarms
from tests import strategies as make

NOW = make.EPOCH
MODULES = (*DEFAULT_HANDLERS, "caxev.handlers.rucio", "caxev.handlers.rucio_datasets")
VERSION = "v6.8.0"
ASKED: dict[str, Any] = {"check_asked": [{"id": "x", "at": NOW}]}
PLACES = {
    "rucio": "xe1t_SR001_161111_1434_tpc:raw",
    "tape": "/xenon/tsm/161111_1434",
}


def site(name: str, **fields: Any) -> Site:
    directories = {f"dir_{kind}": f"/{name}/{kind}" for kind in ("raw", "processed", "minitrees")}
    return Site(**{"name": name, "method": "sftp", "hostname": name, **directories, **fields})


LNGS = site(
    "lngs",
    upload_options=("rucio",),
    dir_tsm="/lngs/tsm",
    processing=Processing(command=("p",), version=VERSION),
    minitrees=Processing(command=("m",)),
)
CHICAGO = site("chicago", download_options=("lngs", "tape", "rucio"))
IDLE = site("idle")
OTHERS = (
    site("depot", listener=False),
    site("tape", method="tsm", listener=False),
    site("rucio", method="rucio", listener=False, rucio_upload_rse="A"),
)


def entry(host: str, status: str = "transferred", kind: str = "raw", **fields: Any) -> Any:
    folder = kind if kind == "raw" else f"{kind}/pax_{VERSION}"
    place = PLACES.get(host, f"/{host}/{folder}/161111_1434")
    known = {"location": place, "manifest": "b3:1", "checksum": "ab"}
    version = {} if kind == "raw" else {"pax_version": VERSION}
    return {"type": kind, "host": host, "status": status, **known, **version, **fields}


def document(*entries: dict[str, Any], **fields: Any) -> dict[str, Any]:
    inputs = {"gains": [1], "drift_velocity_liquid": 1, "electron_lifetime_liquid": 1}
    ready = {
        "processor": {"DEFAULT": inputs},
        "trigger": {"events_built": 5000},
        "reader": {"ini": {"write_mode": 2}},
    }
    names = {"_id": 1, "number": 1, "name": "161111_1434", "detector": "tpc", "start": utcnow()}
    return {**names, **ready, "data": list(entries), **fields}


def acting(before: dict[str, Any], after: dict[str, Any], here: Site) -> set[str]:
    """The handlers at a site that have something to do when the run has changed so."""
    load_handlers(default=MODULES)
    named = {one.name: one for one in (LNGS, CHICAGO, *OTHERS)} | {here.name: here}
    sites = Sites(Path("sites.json"), named)
    ours = [one for one in recorded if one.module.startswith("caxev.handlers")]
    registry = Registry(ours, sites.here(here.name))
    runs = [Run.from_document(one) for one in (before, after)]
    events = diff(1, *(run.snapshot(registry.watched) for run in runs))
    maker = Maker(registry, sites)
    return {
        handler.name
        for event in events
        if event.status != REQUESTED  # which is answered in any case, be it by a refusal
        for handler, decision in maker.decisions(event, runs[1], utcnow())
        if decision is None
    }


@frozen
class Case:
    """A handler that has nothing to do `before`, and something when it is as `after`."""

    handler: str
    here: Site
    before: dict[str, Any]
    after: dict[str, Any]
    reason: str

    def __str__(self) -> str:
        return f"{self.handler}: {self.reason}"


def case(handler: str, here: Site, before: list[Any], after: list[Any], reason: str) -> Case:
    return Case(handler, here, document(*before), document(*after), reason)


NONE: dict[str, Any] = {"manifest": None, "checksum": None}
BARE = entry("lngs", **NONE)
HELD = entry("lngs", "moving")
REQUEST: dict[str, Any] = {"source": "lngs", "location": None, **NONE}
GOOD = entry("lngs")
ALONE = evolve(LNGS, upload_options=(), processing=None, minitrees=None)
BRINGS = evolve(LNGS, upload_options=("tape", "rucio"))
BACK = "the one that came first is lost"
PURGES = evolve(ALONE, purge=0.0)
HOLD: dict[str, Any] = {"holds": [{"by": "me@host", "at": NOW}]}
SAFE = (entry("chicago"), entry("depot"))
PLACE = {"location": GOOD["location"]}
PURGES_OLD = evolve(LNGS, pax_version_purge=VERSION)
MADE = entry("lngs", kind="processed")
CASES = [
    case("pull", CHICAGO, [BARE], [GOOD], "the source had no digest"),
    case("backup", BRINGS, [BARE], [GOOD], "ours had no digest"),
    case("recheck", LNGS, [{**HELD, **ASKED}], [{**GOOD, **ASKED}], "asked while it was moved"),
    case(
        "recheck",
        LNGS,
        [entry("lngs", "deleting", **ASKED)],
        [{**GOOD, **ASKED}],
        "asked while it was about to go",
    ),
    case(
        "rucio_check",
        LNGS,
        [entry("rucio", "deleting", **ASKED)],
        [entry("rucio", **ASKED)],
        "asked while it was about to go",
    ),
    *(
        case(
            handler,
            ALONE,
            [HELD, entry(host, "requested", **REQUEST)],
            [GOOD, entry(host, "requested", **REQUEST)],
            "requested while the source was moved",
        )
        for handler, host in (("push", "depot"), ("backup", "tape"), ("rucio_upload", "rucio"))
    ),
    *(
        case(handler, CHICAGO, [GOOD, entry(host)], [*lost, entry(host)], BACK)
        for handler, host in (("recall", "tape"), ("rucio_pull", "rucio"))
        for lost in ([], [entry("lngs", "error")])
    ),
    case(
        "rucio_upload",
        LNGS,
        [GOOD, entry("rucio", "transferring")],
        [GOOD],
        "another program died while it brought it there",
    ),
    case(
        "process",
        LNGS,
        [GOOD, entry("lngs", "transferring", "processed")],
        [GOOD],
        "another program died while it made it",
    ),
    case(
        "minitrees",
        LNGS,
        [entry("lngs", kind="processed"), entry("lngs", "transferring", "minitrees")],
        [entry("lngs", kind="processed")],
        "another program died while it made it",
    ),
    Case(
        "process",
        evolve(LNGS, processing=Processing(command=("p",), version=VERSION, inputs=("my.field",))),
        document(GOOD),
        document(GOOD, my={"field": 1}),
        "it lacked a field that the site has named",
    ),
    Case(
        "recall",
        evolve(LNGS, upload_options=("tape",)),
        document(entry("tape", "verifying"), tags=[{"name": "recall"}]),
        document(entry("tape"), tags=[{"name": "recall"}]),
        "tagged before the copy on tape was good",
    ),
    Case(
        "purge_processed",
        evolve(LNGS, pax_version_purge=VERSION, deletion=evolve(LNGS.deletion, protect=("keep",))),
        document(entry("lngs", kind="processed"), tags=[{"name": "keep"}]),
        document(entry("lngs", kind="processed")),
        "it was protected",
    ),
    case(
        "purge",
        PURGES,
        [entry("lngs", **HOLD), *SAFE],
        [entry("lngs", holds=[]), *SAFE],
        "somebody held it",
    ),
    case(
        "purge",
        PURGES,
        [GOOD, *SAFE, entry("tape", "requested", **REQUEST)],
        [GOOD, *SAFE],
        "somebody had requested a copy of it",
    ),
    case(
        "purge_processed",
        PURGES_OLD,
        [entry("lngs", kind="processed", **HOLD)],
        [entry("lngs", kind="processed", holds=[])],
        "somebody held it",
    ),
    *(
        case(
            "purge", PURGES, [GOOD, *SAFE, other], [GOOD, *SAFE, *left], "another was at its place"
        )
        for other, left in (
            (entry("lngs", kind="processed", **PLACE), []),
            (entry("lngs", "moving", "processed", **PLACE), [MADE]),
            (entry("lngs", "error"), []),
        )
    ),
    case(
        "purge_processed",
        PURGES_OLD,
        [MADE, entry("lngs", kind="minitrees", location=MADE["location"])],
        [MADE],
        "another was at its place",
    ),
    case(
        "repair",
        CHICAGO,
        [GOOD, entry("chicago", "error", checksumproblem=True), entry("chicago", "transferring")],
        [GOOD, entry("chicago", "error", checksumproblem=True)],
        "another entry of it was on the way",
    ),
]


@pytest.mark.parametrize("one", CASES, ids=str)
def test_what_was_passed_over_comes_back(one: Case) -> None:
    """There was nothing to do at first sight; the change that ends the reason is an event."""
    assert one.handler not in acting({**one.before, "data": []}, one.before, one.here)
    assert one.handler in acting(one.before, one.after, one.here)


def test_a_doubt_that_comes_back_unseen_is_another() -> None:
    """A reading had ended it before it was raised again, and the site sees only the last."""
    doubt, again = ({"checksumproblem": True, NOTED: at} for at in (NOW, utcnow()))
    assert "recheck" in acting(document({**GOOD, **doubt}), document({**GOOD, **again}), LNGS)


@pytest.mark.parametrize("status", ["transferred", "error"])
def test_what_was_finished_and_taken_out_is_not_made_again(status: str) -> None:
    """Nor what was deleted on purpose: only what a dead program had begun."""
    before = document(GOOD, entry("lngs", status, "processed"))
    assert "process" not in acting(before, document(GOOD), LNGS)
    begun = document(GOOD, entry("lngs", "transferring", "processed"))
    stone = {"type": "processed", "host": "lngs", "pax_version": VERSION, "by": "me"}
    assert "process" not in acting(begun, document(GOOD, deleted_data=[stone]), LNGS)


def test_a_request_is_read_once_at_first_sight() -> None:
    """The request is an event of its own."""
    asked = document({**GOOD, **ASKED})
    load_handlers(default=MODULES)
    recheck = next(one for one in recorded if one.name == "recheck")
    sites = Sites(Path("sites.json"), {one.name: one for one in (LNGS, CHICAGO, *OTHERS)})
    registry, run = Registry([recheck], sites.here("lngs")), Run.from_document(asked)
    events = diff(1, {}, run.snapshot(registry.watched))
    maker = Maker(registry, sites)
    found = [one for event in events for one in maker.decisions(event, run, utcnow())]
    assert [decision for _, decision in found if decision is None] == [None]


@cache
def everything(here: str) -> Maker:
    load_handlers(default=MODULES)
    sites = Sites(Path("sites.json"), {one.name: one for one in (LNGS, CHICAGO, IDLE, *OTHERS)})
    ours = [one for one in recorded if one.module.startswith("caxev.handlers")]
    return Maker(Registry(ours, sites.here(here)), sites)


@make.few
@given(make.run_documents, make.run_documents, st.sampled_from(["lngs", "chicago", "idle"]))
def test_a_run_that_does_not_concern_a_handler_is_skipped(before: Any, now: Any, here: str) -> None:
    """Whatever the event: its decision would find nothing to do either."""
    maker, run = everything(here), Run.from_document(now)
    watched = maker.registry.watched
    for event in diff(1, Run.from_document(before).snapshot(watched), run.snapshot(watched)):
        for handler, decision in maker.decisions(event, run, utcnow()):
            concerned = concerns(handler, run, maker.sites.get(here))
            assert concerned or isinstance(decision, Skip), handler.name


class Cleared(BaseException):
    """An alarm was ended."""


class Alarms:
    """The ports of a job that may end alarms."""

    async def all_clear(self, key: str) -> None:
        raise Cleared(key)


async def test_an_alarm_about_a_bad_copy_ends_when_the_mark_is_removed() -> None:
    """Not only when it is set to false: an upload to a catalogue takes it out of the entry."""
    load_handlers(default=MODULES)
    bad_copy = next(one for one in recorded if one.name == "bad_copy")
    sites = Sites(Path("sites.json"), {one.name: one for one in (LNGS, CHICAGO, *OTHERS)})
    registry = Registry([bad_copy], sites.here("lngs"))
    marked: dict[str, Any] = {"checksumproblem": True}
    before, after = (
        Run.from_document(document(entry("rucio", status, source="lngs", **mark)))
        for status, mark in (("error", marked), ("transferred", {}))
    )
    events = diff(1, *(run.snapshot(registry.watched) for run in (before, after)))
    # An alarm about the run stands: then no decision is asked.
    (event,) = (one for one in events if registry.wanting(one))
    job = Job(after, event, LNGS, sites, ports=cast("Any", Alarms()))
    with pytest.raises(Cleared, match="bad copy"):
        await bad_copy.function(job)


@frozen
class Noted:
    """The ports of a job that may raise and end alarms: those that stand."""

    standing: dict[str, Alarm] = field(factory=dict)

    async def alarm(self, alarm: Alarm) -> None:
        self.standing[alarm.key] = alarm

    async def all_clear(self, key: str) -> None:
        self.standing.pop(key, None)


@pytest.mark.parametrize(
    ("source", "raises"), [(None, True), ("away", True), ("lngs", True), ("chicago", False)]
)
async def test_a_bad_copy_that_nobody_has_put_there_is_everybodys(
    source: str | None, raises: bool
) -> None:
    """Where no listener is; and the alarm names what to do."""
    sites = Sites(Path("sites.json"), {one.name: one for one in (LNGS, CHICAGO, *OTHERS)})
    bad = entry("depot", "error", source=source, checksumproblem=True)
    run = Run.from_document(document(bad))
    event = Event(1, CopyField("raw", "depot", None, "checksumproblem"), None, "x")
    noted = Noted()
    await alarms.bad_copy(Job(run, event, LNGS, sites, ports=cast("Any", noted)))
    assert len(noted.standing) == raises
    for one in noted.standing.values():
        assert "caxev rm --run 1 --type raw --site depot" in one.details["todo"]


async def test_a_request_whose_source_is_lost_is_an_alarm_until_it_has_one() -> None:
    """Not while a bad source can be repaired, or the copy is only on its way."""
    sites = Sites(Path("sites.json"), {one.name: one for one in (LNGS, CHICAGO, *OTHERS)})
    asked = entry("lngs", REQUESTED, source="chicago", location=None)
    noted = Noted()

    async def after(*entries: dict[str, Any], of: str = "chicago") -> int:
        run = Run.from_document(document(*entries))
        event = Event(1, CopyKey("raw", of), None, "x")
        job = Job(run, event, LNGS, sites, ports=cast("Any", noted))
        await alarms.no_source(job)
        return len(noted.standing)

    assert await after(asked, entry("chicago")) == 0
    assert await after(asked, entry("chicago", "error")) == 1
    assert await after(asked, entry("chicago", "error"), entry("depot")) == 0
    assert await after(asked, entry("depot")) == 1
    assert await after(asked, entry("chicago", "transferring")) == 0
    assert await after(asked) == 1
    assert await after(of="lngs") == 0
