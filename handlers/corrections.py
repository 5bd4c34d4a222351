"""Fields of a run are computed from versioned tables, so that processing finds its inputs.

`correct` reacts to the fields that the site's ``corrections`` wait for, and sets the field of each
that the run lacks; the version that was used is kept in the run as
``processor.correction_versions.<name>``. A value that stands without a version is somebody else's
and is left alone; one of another version than is wanted now is computed anew.

A table is a collection beside the runs. Each row says for which runs it is:

| field | value |
| --- | --- |
| `version` | a text |
| `from`, `until` | the first run and the first that it is no longer for: both by start (UTC) or \
both by number; absent: no limit |
| `value` | what the field becomes: a number, a text, a list, an object; or instead |
| `function` | an expression (`caxev.core.expressions`), or a list of them and of numbers |
| `creation_time` | UTC; of two rows that fit, the later counts |

cax's tables are read as well. A row of theirs has a ``calculation_time``, which is its version if
it names none, and a ``function``, or a ``correction``: a list of ``{min, max, value}``, each for
the runs from number `min` on and before `max`. cax multiplied what a function gave by a unit that
stood in its code, so such a row is used only if the correction gives its `factor`. A row that
cannot be understood, or that names what is not known here (``pmt``, ``v``), is refused: no older
one is taken in its place.

Expressions know `t` (the run's start, seconds since 1970), `run_number`, and the last name of each
field in ``when`` that holds a number or a time. The version is the one that the correction
names, or else that of the row that was made last.

Safe to repeat: all fields are set in one update that expects the versions that were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from attrs import frozen

from caxev import CORRECTION_INPUTS, FieldIs, GiveUp, Job, Result, Retry, Run, RunUpdate, Skip, on
from caxev import field as on_field
from caxev.config import Correction, Site
from caxev.core.expressions import ExpressionError, evaluate
from caxev.core.model import as_utc, field_of

LATER = 6 * 3600.0
"""Seconds after which a table is looked at again that had nothing for the run."""
Row = Mapping[str, Any]


@frozen
class Wanted:
    """A correction that the run lacks, or may have of another version."""

    correction: Correction
    version: str | None


@on(on_field(CORRECTION_INPUTS), aliases=("AddGains", "AddDriftVelocity", "SetNeuralNetwork"))
async def correct(job: Job) -> Result:
    """Compute the fields of ``corrections`` from their tables."""
    plan = plan_corrections(job.run, job.site)
    if isinstance(plan, Skip):
        return plan
    fields: dict[str, Any] = {}
    expected: list[FieldIs] = []
    failed: list[Retry | GiveUp] = []
    for wanted in plan:
        one = wanted.correction
        try:
            row = row_for(job.run, one, await job.table(one.table))
            version = version_of(one, row)
            if version == wanted.version:
                continue
            fields |= {one.field: value_of(job.run, one, row), one.version_field: version}
        except (Retry, GiveUp) as error:
            failed.append(error)
            continue
        expected.append(FieldIs(one.version_field, wanted.version))
        if wanted.version is None:
            expected.append(FieldIs(one.field))
    update = RunUpdate.set_fields(job.run, *expected, **fields)
    if not failed:
        return update if fields else Skip("it has these corrections already")
    if fields:  # one that cannot be had keeps no other back
        await job.update(update)
    raise _worst(failed)


def _worst(failed: Sequence[Retry | GiveUp]) -> Retry | GiveUp:
    """What to raise of several, one at least: what a person must repair comes first."""
    return next((error for error in failed if isinstance(error, GiveUp)), failed[0])


def plan_corrections(run: Run, site: Site) -> list[Wanted] | Skip:
    """Decide which corrections this run may lack. Pure."""
    why: list[str] = []
    plan: list[Wanted] = []
    for one in site.correcting():
        version = field_of(run.document, one.version_field)
        missing = [path for path in one.when if field_of(run.document, path) is None]
        if missing:
            why.append(f"{one.name} waits for {', '.join(missing)}")
        elif version is None and field_of(run.document, one.field) is not None:
            why.append(f"{one.field} is there, and not from a table")
        elif one.version is not None and version == one.version:
            why.append(f"{one.name} is of {version} already")
        else:
            plan.append(Wanted(one, version))
    return plan or Skip("; ".join(why) or f"corrections of {site.name} names none")


def row_for(run: Run, correction: Correction, rows: Sequence[Row]) -> Row:
    """Find the row of a table that is for this run. Raises `Retry` if there is none. Pure."""
    made = sorted(rows, key=_made)
    version = correction.version
    if version is None:  # the newest: it must be known of every row whether it is that
        version = [version_of(correction, row) for row in made][-1] if made else None
    fits = [row for row in made if _version(row) == version and _is_for(run, row)]
    if not fits:
        why = f"table {correction.table} has no row of version {version or 'any'} for {run}"
        raise Retry(why, after=LATER)
    return fits[-1]


def _made(row: Row) -> datetime:
    made = as_utc(row.get("creation_time")) or as_utc(row.get("calculation_time"))
    return made or datetime.min.replace(tzinfo=UTC)


def version_of(correction: Correction, row: Row) -> str:
    """Return the version of a row. Raises `GiveUp` for a row that is of none. Pure."""
    if (version := _version(row)) is not None:
        return version
    raise GiveUp(
        f"row {row.get('_id')} of {correction.table} has no version, so nothing says whether it "
        "is the newest: give it one (a text), or take it out"
    )


def _version(row: Row) -> str | None:
    """A row's version: that of cax's is its time, if it names none."""
    version = row.get("version")
    if version is None and (made := as_utc(row.get("calculation_time"))) is not None:
        return str(made.replace(tzinfo=None))  # as cax wrote it
    return version if isinstance(version, str) else None


def _is_for(run: Run, row: Row) -> bool:
    for name, passed in (("from", True), ("until", False)):
        if (limit := row.get(name)) is not None and _passed(run, limit) is not passed:
            return False
    return "correction" not in row or _range_for(run, row) is not None


def _range_for(run: Run, row: Row) -> Row | None:
    """The range of one of cax's rows that the run's number is in. Raises `GiveUp` for no such."""
    ranges = row["correction"]
    for one in ranges if isinstance(ranges, list) else (ranges,):
        if not isinstance(one, Mapping) or not _is_range(one):
            raise GiveUp(f"row {row.get('_id')}: {one!r} is no {{min, max, value}}")
        if run.number is not None and one["min"] <= run.number < one["max"]:
            return one
    return None


def _is_range(one: Mapping[str, Any]) -> bool:
    return one.get("value") is not None and all(_is_number(one.get(k)) for k in ("min", "max"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _passed(run: Run, limit: object) -> bool | None:
    """Whether the run is not before a limit; None where it has nothing to compare with it."""
    if (moment := as_utc(limit)) is not None:
        return None if run.start is None else run.start >= moment
    if isinstance(limit, int | float):
        return None if run.number is None else run.number >= limit
    raise GiveUp(f"a row's limit is {limit!r}, neither a time nor a run's number")


def value_of(run: Run, correction: Correction, row: Row) -> Any:
    """Compute what a row says for this run. Raises `GiveUp` if it says nothing. Pure."""
    given = [name for name in ("value", "function", "correction") if row.get(name) is not None]
    if len(given) != 1:
        said = " and ".join(given) or "neither value nor function"
        raise GiveUp(f"{_named(correction, row)} has {said}: it must have one of them")
    if given == ["value"]:
        return row["value"]
    if given == ["correction"]:
        return (_range_for(run, row) or {}).get("value")
    if correction.factor is None and row.get("calculation_time") is not None:
        raise GiveUp(
            f"{_named(correction, row)} is of cax, which multiplied its value by a unit: say by "
            f"which, as factor of {correction.name} in sites.json"
        )
    return _computed(run, correction, row)


def _computed(run: Run, correction: Correction, row: Row) -> Any:
    names, function = inputs(run, correction), row["function"]
    factor = 1.0 if correction.factor is None else correction.factor
    try:
        if isinstance(function, list):
            return [_evaluated(one, names) * factor for one in function]
        return _evaluated(function, names) * factor
    except ExpressionError as error:
        raise GiveUp(f"the function of {_named(correction, row)}: {error}") from error


def _named(correction: Correction, row: Row) -> str:
    return f"row {row.get('_id')} of {correction.table} ({version_of(correction, row)})"


def _evaluated(function: object, names: Mapping[str, float]) -> float:
    if isinstance(function, int | float) and not isinstance(function, bool):
        return float(function)
    if not isinstance(function, str):
        raise ExpressionError(f"{function!r} is neither a number nor a text")
    return evaluate(function, names)


def inputs(run: Run, correction: Correction) -> dict[str, float]:
    """Return the numbers that expressions may name. Pure."""
    names: dict[str, float] = {}
    for path in correction.when:
        value = field_of(run.document, path)
        if (moment := as_utc(value)) is not None:
            value = moment.timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool):
            names[path.rpartition(".")[2]] = float(value)
    if run.start is not None:
        names["t"] = run.start.timestamp()
    if run.number is not None:
        names["run_number"] = float(run.number)
    return names
