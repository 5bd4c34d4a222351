"""Corrections: expressions, which row of a table is a run's, and what is written to the run."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from attrs import evolve
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from pymongo import MongoClient

from caxev import FieldIs, GiveUp, Job, Retry, RunUpdate, Skip
from caxev.config import Correction, Site
from caxev.config.corrections import read_corrections
from caxev.config.errors import Problems
from caxev.core.expressions import ExpressionError, evaluate
from caxev.core.model import Event, Field, Run
from caxev.core.registry import Registry, recorded
from caxev.handlers import corrections
from tests import engine
from tests.conftest import Database as Named

START = datetime(2016, 11, 11, 14, 34, tzinfo=UTC)
DRIFT = Correction("AddDriftVelocity", "processor.DEFAULT.drift_velocity_liquid", "drift")
GAINS = Correction("AddGains", "processor.DEFAULT.gains", "gains", ("start", "end"))
SITE = Site(name="lngs", corrections=(DRIFT, GAINS))


def run_of(**fields: Any) -> Run:
    document = {"_id": ObjectId(), "number": 5000, "name": "161111_1434", "start": START}
    return Run.from_document({**document, **fields})


def row(version: Any = "v1", **fields: Any) -> dict[str, Any]:
    return {"_id": ObjectId(), "version": version, **fields}


class Tables:
    """The ports of a job that needs tables, and keeps what is written."""

    def __init__(self, **tables: list[dict[str, Any]]) -> None:
        self.tables = tables
        self.written: list[RunUpdate] = []

    async def table(self, name: str) -> list[dict[str, Any]]:
        return self.tables.get(name, [])

    async def update(self, update: RunUpdate, *, now: datetime, deed: Any = None) -> Run:
        self.written.append(update)
        return run_of()


async def corrected(run: Run, ports: Tables, site: Site = SITE) -> Any:
    event = Event(run.id, Field("end"), None, "ab")
    return await corrections.correct(Job(run, event, site=site, ports=ports))  # type: ignore[arg-type]


# -- configuration --------------------------------------------------------------------------------


def test_corrections_are_read() -> None:
    """What is not named has its default; keys that begin with x_ are passed over."""
    given = {"name": "AddGains", "field": "processor.x", "table": "gains", "x_by": "me"}
    assert read_corrections([given]) == (Correction("AddGains", "processor.x", "gains"),)
    assert read_corrections([{**given, "version": None}])[0].version is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": "a.b"}, "name must be a name of letters"),
        ({"field": "data.0.status"}, "field must be a dotted path"),
        ({"field": "$x"}, "field must be"),
        ({"table": "system.users"}, "table must be the name of a collection"),
        ({"when": []}, "when must be a list"),
        ({"version": 3}, "version must be a text, not 3"),
        ({"tabel": "x"}, "did you mean 'table'?"),
    ],
)
def test_wrong_corrections_are_told(change: dict[str, Any], line: str) -> None:
    """What is wrong is named with the correction, the key, the value and what it must be."""
    given = {"name": "AddGains", "field": "processor.x", "table": "gains", **change}
    with pytest.raises(Problems) as wrong:
        read_corrections([given])
    assert any(line in one for one in wrong.value.lines)


def test_corrections_are_one_to_a_field() -> None:
    """Two of one name or field, an item that is none, and one that lacks a key are told."""
    given = {"name": "AddGains", "field": "processor.x", "table": "gains"}
    with pytest.raises(Problems, match=r"two have the field 'processor.x'; two have the name"):
        read_corrections([given, given])
    with pytest.raises(Problems, match=r"no\. 1: must be an object"):
        read_corrections([3])
    with pytest.raises(Problems, match="'AddGains': table is missing"):
        read_corrections([{"name": "AddGains", "field": "processor.x"}])
    with pytest.raises(ValueError):  # noqa: PT011  # the caller says which key
        read_corrections({})


# -- expressions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.5e-4", 1.5e-4),
        ("2 * t + 1", 7.0),
        ("-t ** 2", -9.0),
        ("exp(0) + log(1) + sqrt(4) + Max(1, 2) - Abs(-1)", 4.0),
        ("1 if t < 2 else 5", 5.0),
        ("Piecewise((1, t < 2), (2, (t >= 2) & (t < 4)), (3, True))", 2.0),
        ("Piecewise((1, (t < 2) | ~(t > 2)), (t * 10, 1 < t <= 3 and not t == 2))", 30.0),
        ("Piecewise((1, Ne(t, 3)), (2, Eq(t, 3)), (3, True))", 2.0),
        ("Piecewise((1, And(t > 1, t < 3, True)), (2, Or(Eq(t, 1), Not(t < 3))))", 2.0),
        ("cos(pi) + log(E)", 0.0),
    ],
)
def test_expressions_have_their_value(text: str, value: float) -> None:
    """Arithmetic, the usual functions, conditions and sympy's pieces, by the names given."""
    assert evaluate(text, {"t": 3}) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no expression"),
        ("1 +", "no expression"),
        ("x", "'x' is not known"),
        ("__import__('os')", "not to be used"),
        ("t.real", "not to be used"),
        ("(lambda: 1)()", "not to be used"),
        ("[1, 2]", "not to be used"),
        ("'a' * 9", "not to be used"),
        ("True", "not to be used"),
        ("t < 2", "not to be used"),
        ("1 if t else 2", "no condition"),
        ("Piecewise(1, 2)", "no (value, condition)"),
        ("Piecewise((1, Eq(t)))", "no condition"),
        ("Piecewise((1, Not(t < 1, t < 2)))", "no condition"),
        ("Piecewise((1, And(t < 4, t)))", "no condition"),
        ("Eq(t, 3) + And(True)", "not to be used"),
        ("Piecewise((1, t < 0))", "no piece"),
        ("1 / 0", "no value"),
        ("log(0)", "no value"),
        ("exp(1000)", "no value"),
        ("9 ** 9 ** 9 ** 9", "no value"),
        ("(-8) ** 0.5", "not a real number"),
        ("1e308 * 10", "its value is inf"),
        ("-" * 50_000 + "1", "nested too deeply"),
        ("(" * 5_000 + "1" + ")" * 5_000, ""),
        ("1" * 200_000, "characters"),
    ],
)
def test_expressions_reach_nothing_else(text: str, why: str) -> None:
    """What is not arithmetic, or has no value, is refused in one line; nothing is executed."""
    with pytest.raises(ExpressionError) as refused:
        evaluate(text, {"t": 3})
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.text(max_size=40))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    """Whatever stands in a table, there is a finite number or an `ExpressionError`."""
    with suppress(ExpressionError):
        assert math.isfinite(evaluate(text, {"t": 1.0}))


# -- which row ------------------------------------------------------------------------------------


def test_the_row_is_that_of_the_runs_time() -> None:
    """From its first moment on and until, but not at, its end; by number as by time."""
    before, later = START - timedelta(days=1), START + timedelta(days=1)
    rows = [
        row(value="old", until=START),
        row(value="now", **{"from": START, "until": later}),
        row(value="new", **{"from": later}),
    ]
    for offset, value in ((-1, "old"), (0, "now"), (23.9, "now"), (24, "new")):
        run = run_of(start=START + timedelta(hours=offset))
        assert corrections.row_for(run, DRIFT, rows)["value"] == value
    numbered = [row(value=1, until=5000), row(value=2, **{"from": 5000, "until": 5001})]
    assert corrections.row_for(run_of(), DRIFT, numbered)["value"] == 2
    with pytest.raises(Retry, match="no row"):
        corrections.row_for(run_of(number=5001), DRIFT, numbered)
    with pytest.raises(Retry, match="no row"):  # a run without number is in no such row
        corrections.row_for(run_of(number=0), DRIFT, numbered)
    assert before < START


def test_the_newest_version_counts_unless_one_is_named() -> None:
    """The version is that of the row made last; of two rows that fit, the later one counts."""
    rows = [
        row("v2", value=2, creation_time=START + timedelta(1)),
        row("v1", value=1, creation_time=START),
        row("v2", value=22, creation_time=START + timedelta(2)),
    ]
    assert corrections.row_for(run_of(), DRIFT, rows)["value"] == 22
    fixed = Correction("AddDriftVelocity", DRIFT.field, "drift", version="v1")
    assert corrections.row_for(run_of(), fixed, rows)["value"] == 1


def test_a_limit_that_is_none_is_named() -> None:
    """A row whose limit is neither time nor number is a person's to repair."""
    with pytest.raises(GiveUp, match="'soon'"):
        corrections.row_for(run_of(), DRIFT, [row(value=1, until="soon")])


# -- cax's own tables -----------------------------------------------------------------------------

NET = Correction("SetNeuralNetwork", "processor.net", "neural_network")
LIFETIME = Correction("AddElectronLifetime", "processor.lifetime", "purity", factor=1000)


def of_cax(days: float, version: str | None = None, **fields: Any) -> dict[str, Any]:
    """A row as cax's users wrote it, calculated so many days after the run."""
    given = {} if version is None else {"version": version}
    return {"_id": ObjectId(), "calculation_time": START + timedelta(days), **given, **fields}


def ranges(*parts: tuple[int, int, object]) -> list[dict[str, object]]:
    return [{"min": low, "max": high, "value": value} for low, high, value in parts]


async def test_ranges_of_a_row_of_cax() -> None:
    """The range that the run's number is in, its first and not its last included; else it waits."""
    newest = of_cax(2, "v2", correction=ranges((0, 5000, "old.net"), (5000, 5001, "new.net")))
    rows = [newest, of_cax(1, "v1", correction=ranges((0, 9000, "former.net")))]
    site = Site(name="lngs", corrections=(NET,))
    update = await corrected(run_of(), Tables(neural_network=rows), site)
    assert update.fields == {NET.field: "new.net", NET.version_field: "v2"}
    for number in (5001, 0):
        with pytest.raises(Retry, match="no row of version v2"):
            corrections.row_for(run_of(number=number), NET, rows)


async def test_a_function_of_a_row_of_cax() -> None:
    """The newest by `calculation_time`, its version too; times what was in cax's code."""
    rows = [of_cax(1, "v1", function="1"), of_cax(2, function="t / t + 2"), row(value=7)]
    site = Site(name="lngs", corrections=(LIFETIME,))
    update = await corrected(run_of(), Tables(purity=rows), site)
    assert update.fields == {
        LIFETIME.field: 3000.0,
        LIFETIME.version_field: "2016-11-13 14:34:00",
    }


@pytest.mark.parametrize(
    ("correction", "newest", "why"),
    [
        (evolve(LIFETIME, factor=None), of_cax(2, function="1"), "say by which, as factor of Add"),
        (LIFETIME, of_cax(2, function="v + 1"), "'v' is not known here"),
        (LIFETIME, of_cax(2, function="pmt * t"), "'pmt' is not known here"),
        (LIFETIME, of_cax(2), "neither value nor function"),
        (LIFETIME, of_cax(2, function="1", value=1), "has value and function"),
        (LIFETIME, of_cax(2, correction=ranges((0, 9000, None))), "is no {min, max, value}"),
        (LIFETIME, of_cax(2, correction={"min": 1}), "is no {min, max, value}"),
        (LIFETIME, of_cax(2, correction=[{"min": 1, "max": "9", "value": 1}]), "is no {min"),
        (LIFETIME, row(None, function="1"), "has no version"),
        (LIFETIME, row(2.5, function="1"), "has no version"),
    ],
)
async def test_a_row_that_is_not_understood_is_refused(
    correction: Correction, newest: dict[str, Any], why: str
) -> None:
    """No older row is taken in the place of one that is half understood."""
    older = [of_cax(1, "v1", function="1"), of_cax(0, "v0", value=1)]
    site = Site(name="lngs", corrections=(correction,))
    with pytest.raises(GiveUp, match=re.escape(why)):
        await corrected(run_of(), Tables(purity=[*older, newest]), site)


def test_a_version_that_is_named_needs_no_other() -> None:
    """Where a site wants one version, rows of none are nobody's concern."""
    fixed = evolve(LIFETIME, version="v1")
    rows = [of_cax(1, "v1", function="1"), row(None, function="2")]
    assert corrections.row_for(run_of(), fixed, rows)["function"] == "1"


# -- what is written ------------------------------------------------------------------------------


async def test_xenon1ts_three_are_configuration() -> None:
    """A function of time, a list of functions and a file by intervals are set with versions."""
    network = Correction("SetNeuralNetwork", "processor.NeuralNet|PosRecNeuralNet.file", "nn")
    site = Site(name="lngs", corrections=(DRIFT, GAINS, network))
    tables = Tables(
        drift=[row(function="Piecewise((1e-4, t < 0), (1e-4 + 1e-9 * (end - t), True))")],
        gains=[row("g7", function=[2e6, "2e6 + run_number"])],
        nn=[row("n2", value="tensorflow_nn.json", until=5001)],
    )
    run = run_of(end=START + timedelta(seconds=1000))
    gains_and_time = Site(name="lngs", corrections=(*site.corrections[1:], drift_with_end()))
    update = await corrected(run, tables, gains_and_time)
    assert update.fields == {
        "processor.DEFAULT.gains": [2e6, 2_005_000.0],
        "processor.NeuralNet|PosRecNeuralNet.file": "tensorflow_nn.json",
        "processor.DEFAULT.drift_velocity_liquid": pytest.approx(1.01e-4),
        "processor.correction_versions.AddGains": "g7",
        "processor.correction_versions.SetNeuralNetwork": "n2",
        "processor.correction_versions.AddDriftVelocity": "v1",
    }
    assert FieldIs("processor.DEFAULT.gains") in update.expect
    assert FieldIs("processor.correction_versions.AddGains") in update.expect


def drift_with_end() -> Correction:
    return Correction(DRIFT.name, DRIFT.field, DRIFT.table, ("start", "end"))


async def test_what_stands_is_left_unless_its_version_is_old() -> None:
    """Somebody else's value stays; ours is computed anew for another version, and for none else."""
    theirs = {"DEFAULT": {"drift_velocity_liquid": 1.0}}
    tables = Tables(drift=[row("v2", value=2.0)])
    site = Site(name="lngs", corrections=(DRIFT,))
    skip = await corrected(run_of(processor=theirs), tables, site)
    assert isinstance(skip, Skip)
    assert "not from a table" in skip.why
    ours = {**theirs, "correction_versions": {"AddDriftVelocity": "v1"}}
    update = await corrected(run_of(processor=ours), tables, site)
    assert update.fields[DRIFT.field] == 2.0
    assert update.expect == (FieldIs(DRIFT.version_field, "v1"),)
    ours["correction_versions"] = {"AddDriftVelocity": "v2"}
    assert isinstance(await corrected(run_of(processor=ours), tables, site), Skip)


async def test_one_that_fails_keeps_no_other_back() -> None:
    """What can be computed is written; then it is tried again, or a person is told."""
    run = run_of(end=START)
    tables = Tables(drift=[row(value=1.0)])
    with pytest.raises(Retry, match="gains has no row") as again:
        await corrected(run, tables)
    assert again.value.after == corrections.LATER
    assert [update.fields[DRIFT.field] for update in tables.written] == [1.0]
    tables = Tables(gains=[row(value=[1.0])], drift=[row(function="t +")])
    with pytest.raises(GiveUp, match="of drift"):
        await corrected(run, tables)
    assert GAINS.field in tables.written[0].fields


async def test_a_correction_waits_for_its_fields() -> None:
    """Before the run has what it waits for nothing is computed, and the reason says so."""
    skip = await corrected(run_of(), Tables(), Site(name="lngs", corrections=(GAINS,)))
    assert isinstance(skip, Skip)
    assert "AddGains waits for end" in skip.why


def test_only_what_is_configured_triggers() -> None:
    """The fields that fire are those that this site's enabled corrections wait for."""
    (handler,) = (one for one in recorded if one.function is corrections.correct)

    def watched(**fields: Any) -> frozenset[str]:
        sites = engine.sites_of("chicago")
        site = Site(name="lngs", **fields)
        here = type(sites)(sites.path, {"lngs": site}).here("lngs")
        registry = Registry([handler], here)
        assert all(handler.unmet(Field(path), "a", here) is None for path in here_of(here))
        assert handler.unmet(Field("name"), "a", here) is not None
        return registry.watched.run

    assert watched() == frozenset()
    assert watched(corrections=(DRIFT, GAINS)) == {"start", "end"}
    assert watched(corrections=(DRIFT, GAINS), task_list=("AddDriftVelocity",)) == {"start"}
    assert watched(corrections=(DRIFT, GAINS), task_list=("correct",)) == {"start", "end"}
    assert watched(corrections=(DRIFT, GAINS), task_list=("CopyPull",)) == frozenset()


def here_of(here: Any) -> frozenset[str]:
    paths: frozenset[str] = here.correction_inputs
    return paths


@pytest.mark.replicaset
async def test_a_run_that_ends_is_corrected(database: Named) -> None:
    """A listener computes the fields when the run gets its end, from a collection beside it."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["gains"].insert_one(row("g1", function=["run_number", 3]))
    (handler,) = (one for one in recorded if one.function is corrections.correct)
    options = engine.options_for(database, [handler], site_fields={"corrections": (GAINS,)})
    async with engine.opened(database) as db:
        run = await db.insert_run(engine.run_document(7))
        async with engine.listener(db, options):
            seen = Run.from_document({"_id": run})
            await engine.write(db, RunUpdate.set_fields(seen, end=START))

            async def there() -> bool:
                document = (await db.runs([run]))[run].document
                return "processor" in document

            await engine.until(there)
        processor = (await db.runs([run]))[run].document["processor"]
    assert processor == {
        "DEFAULT": {"gains": [7.0, 3.0]},
        "correction_versions": {"AddGains": "g1"},
    }
