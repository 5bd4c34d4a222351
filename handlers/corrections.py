"""Inputs of the processing, computed from versioned correction tables.

`correct` reacts to the fields that the site's ``corrections`` depend on, and sets the field of
each correction that the run lacks. The run keeps the version used, as
``processor.correction_versions.<name>``. A value without a version was set by someone else and is
never changed; one of an outdated version is computed again.

A table is a collection beside the runs. The fields of a row:

| field | value |
| --- | --- |
| `version` | a text |
| `from`, `until` | the first run and the first that it is no longer for: both by start (UTC) or \
both by number; absent: no limit |
| `value` | what the field becomes: a number, a text, a list, an object; or instead |
| `function` | an expression (`caxev.core.expressions`), or a list of them and of numbers |
| `creation_time` | UTC; of two rows that fit, the later counts |

cax's tables work as well. Their rows have a ``calculation_time``, which is the version of a row
without one, and a ``function``, or a ``correction``: a list of ``{min, max, value}``, each for
the runs from number `min` on and before `max`. cax multiplied the value of a function by a unit in
its code, so such a row is used only if the correction sets `factor`. An invalid row, or one with
unknown names (``pmt``, ``v``), is an error: no older row replaces it.

Expressions know `t` (the run's start, seconds since 1970), `run_number`, and the last name of each
field in ``when`` that holds a number or a time. The version is the one that the correction
names, or else that of the row that was made last.

Safe to repeat: one update sets all fields, and expects the versions that were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeGuard

from caxev import (
    CORRECTION_INPUTS,
    FieldIs,
    GiveUp,
    Job,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    on,
    skip_of,
)
from caxev import field as on_field
from caxev.config import Correction, Site
from caxev.core.entry import as_utc
from caxev.core.expressions import ExpressionError, evaluate
from caxev.core.model import field_of

LATER = 6 * 3600.0
"""Seconds after which a table without a row for the run is read again."""
Row = Mapping[str, Any]


@on(
    on_field(CORRECTION_INPUTS),
    aliases=("AddGains", "AddDriftVelocity", "SetNeuralNetwork"),
    decide=lambda job: skip_of(plan_corrections(job.run, job.site)),
)
async def correct(job: Job) -> Result:
    """Compute the fields of ``corrections`` from their tables."""
    # One update for all fields: a crash leaves either none or all of them, each with its version.
    plan = plan_corrections(job.run, job.site)
    if isinstance(plan, Skip):
        return plan
    fields: dict[str, Any] = {}
    expected: list[FieldIs] = []
    failed: list[Retry | GiveUp] = []
    for one, has in plan:
        try:
            row = row_for(job.run, one, await job.table(one.table))
            version = version_of(one, row)
            if version == has:
                continue
            fields |= {one.field: value_of(job.run, one, row), one.version_field: version}
        except (Retry, GiveUp) as error:
            failed.append(error)
            continue
        expected.append(FieldIs(one.version_field, has))
        if has is None:
            # Someone may have set the field by hand since we read the run: theirs stays.
            expected.append(FieldIs(one.field))
    update = RunUpdate.set_fields(job.run, *expected, **fields)
    if not failed:
        return update if fields else Skip("it has these corrections already")
    if fields:  # a correction that fails must not block the others
        await job.update(update)
    raise _worst(failed)


def _worst(failed: Sequence[Retry | GiveUp]) -> Retry | GiveUp:
    """Choose the error to raise of several, at least one: one that needs a person comes first."""
    return next((error for error in failed if isinstance(error, GiveUp)), failed[0])


def plan_corrections(run: Run, site: Site) -> list[tuple[Correction, str | None]] | Skip:
    """Decide which corrections this run may lack; each with the version that it has. Pure."""
    why: list[str] = []
    plan: list[tuple[Correction, str | None]] = []
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
            plan.append((one, version))
    return plan or Skip("; ".join(why) or f"corrections of {site.name} names none")


def row_for(run: Run, correction: Correction, rows: Sequence[Row]) -> Row:
    """Find the row of a table that is for this run. Raises `Retry` if there is none. Pure."""
    made = sorted(rows, key=_made)
    version = correction.version
    if version is None:
        # Read the version of every row: an invalid one, which raises, might be the newest.
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
    """Return the version of a row. Raises `GiveUp` if it has none. Pure."""
    if (version := _version(row)) is not None:
        return version
    raise GiveUp(
        f"row {row.get('_id')} of {correction.table} has no version, so nothing says whether it "
        "is the newest: give it one (a text), or take it out"
    )


def _version(row: Row) -> str | None:
    """Return a row's version, which for a row of cax may be its time."""
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
    """Return the range of a row of cax that includes the run. Raises `GiveUp` if one is invalid."""
    ranges = row["correction"]
    for one in ranges if isinstance(ranges, list) else (ranges,):
        if not isinstance(one, Mapping) or not _is_range(one):
            raise GiveUp(f"row {row.get('_id')}: {one!r} is no {{min, max, value}}")
        if run.number is not None and one["min"] <= run.number < one["max"]:
            return one
    return None


def _is_range(one: Mapping[str, Any]) -> bool:
    return one.get("value") is not None and all(_is_number(one.get(k)) for k in ("min", "max"))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _passed(run: Run, limit: object) -> bool | None:
    """Return whether the run is at or after a limit; None if it has nothing to compare."""
    if (moment := as_utc(limit)) is not None:
        return None if run.start is None else run.start >= moment
    if isinstance(limit, int | float):
        return None if run.number is None else run.number >= limit
    raise GiveUp(f"a row's limit is {limit!r}, neither a time nor a run's number")


def value_of(run: Run, correction: Correction, row: Row) -> Any:
    """Compute a row's value for this run. Raises `GiveUp` if it defines none. Pure."""
    given = [name for name in ("value", "function", "correction") if row.get(name) is not None]
    if len(given) != 1:
        has = " and ".join(given) or "neither value nor function"
        raise GiveUp(f"{_named(correction, row)} has {has}: it must have one of them")
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
    if _is_number(function):
        return float(function)
    if not isinstance(function, str):
        raise ExpressionError(f"{function!r} is neither a number nor a text")
    return evaluate(function, names)


def inputs(run: Run, correction: Correction) -> dict[str, float]:
    """Return the numbers that expressions can use. Pure."""
    names: dict[str, float] = {}
    for path in correction.when:
        value = field_of(run.document, path)
        if (moment := as_utc(value)) is not None:
            value = moment.timestamp()
        if _is_number(value):
            names[path.rpartition(".")[2]] = float(value)
    if run.start is not None:
        names["t"] = run.start.timestamp()
    if run.number is not None:
        names["run_number"] = float(run.number)
    return names
