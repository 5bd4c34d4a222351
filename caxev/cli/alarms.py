"""Run ``caxev alarms``: list active alarms and failed deliveries, test the sinks, clear alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from caxev.cli.completion import SITE
from caxev.cli.errors import FAILED, NothingToDo
from caxev.cli.options import as_table, example, global_options, state
from caxev.cli.output import Column, Parts, Table, print_line, show

if TYPE_CHECKING:
    from caxev.config import Site
    from caxev.core.alarms import AlarmState
    from caxev.database import Database


@click.group(
    invoke_without_command=True,
    epilog=example("caxev alarms", "caxev alarms test --site lngs", "caxev alarms clear 3f9ac0d1"),
)
@click.option("--site", type=SITE, help="Only of this site.")
@click.option("--all", "everything", is_flag=True, help="Also those that are over.")
@as_table
@global_options(hidden=True)
@click.pass_context
def alarms(context: click.Context, site: str | None, everything: bool, as_json: bool) -> None:
    """List the active alarms, and the sinks to which they could not be delivered.

    The most severe come first. `clear` ends an alarm by hand, `test` tries the sinks.
    """
    if context.invoked_subcommand is not None:
        return
    options = state()
    options.log("warning")
    if site is not None:
        site = options.sites().get(site).name

    async def find(database: Database) -> list[dict[str, Any]]:
        from caxev.cli.runs import shown_by_name

        found = [one for one in await database.alarms(site) if everything or one.active]
        names = {one.alarm.run for one in found} - {""}
        return alarm_rows(found, {name: await shown_by_name(database, name) for name in names})

    rows = options.with_database(find)
    show(Table(_ALARMS, rows), as_json=as_json, empty="no alarm is active")


_ALARMS = (
    Column("id", "ID"),
    Column("site", "SITE"),
    Column("severity", "SEVERITY"),
    Column("since", "SINCE", minor=1),
    Column("over", "OVER", minor=2),
    Column("summary", "ALARM"),
    Column("why", "WHY"),
    Column("undelivered", "NOT DELIVERED"),
)


def alarm_rows(found: Sequence[AlarmState], runs: Mapping[str, Parts]) -> list[dict[str, Any]]:
    """Return a row for each alarm, the worst first; `runs` are those that alarms are about."""
    from caxev.core.alarms import urgency

    return [_row(one, runs) for one in sorted(found, key=urgency)]


def _row(state: AlarmState, runs: Mapping[str, Parts]) -> dict[str, Any]:
    alarm = state.alarm
    return {
        "id": alarm.id,
        "site": alarm.site,
        "severity": alarm.severity.value,
        "since": state.since,
        "over": state.over,
        "summary": alarm.summary,
        "why": alarm.details.get("why") or alarm.details.get("more"),
        "undelivered": [f"{sink}: {why}" for sink, why in state.undelivered.items()],
        "run": runs.get(alarm.run),
        "key": alarm.key,
        "details": dict(alarm.details),
        "delivered": {sink: last.raised for sink, last in state.deliveries.items()},
    }


# -- test ---------------------------------------------------------------------------------------


@alarms.command("test", epilog=example("caxev alarms test --site lngs"))
@click.option("--site", type=SITE, required=True, help="The site whose `alarms` are tested.")
@as_table
@global_options(hidden=True)
def test(site: str, as_json: bool) -> None:
    """Send a test alarm to each sink of a site, from this machine.

    The table shows which sinks accepted it. Its end is never sent: at PagerDuty, resolve it by
    hand.
    """
    import trio

    options = state()
    options.log("warning")
    rows = trio.run(_tried, options.sites().get(site))
    show(Table(_TESTED, rows), as_json=as_json, empty=f"{site} names no `alarms` in sites.json")
    # A site without sinks fails, too: nobody would hear of an alarm.
    if not all(row["ok"] for row in rows) or not rows:
        raise click.exceptions.Exit(FAILED)


_TESTED = (Column("sink", "SINK"), Column("kind", "KIND"), Column("ok", "OK"), Column("why", "WHY"))


async def _tried(site: Site) -> list[dict[str, Any]]:
    import trio

    from caxev.alarms.manager import try_send
    from caxev.alarms.recipients import recipients
    from caxev.core.alarms import Alarm, Severity

    alarm = Alarm(
        site.name,
        "test",
        f"a test of the alarms of {site.name}: nothing is wrong",
        Severity.WARNING,
        once=True,
    )
    rows: list[dict[str, Any]] = [
        {"sink": sink.name, "kind": sink.kind, "ok": False, "why": None} for sink in site.alarms
    ]

    async def one(row: dict[str, Any], notifier: Any) -> None:
        row["why"] = await try_send(notifier, alarm, over=False)
        row["ok"] = row["why"] is None

    # At the same time: a sink that does not answer must not delay the others' result.
    async with trio.open_nursery() as nursery:
        for row, recipient in zip(rows, recipients(site.name, site.alarms), strict=True):
            nursery.start_soon(one, row, recipient.notifier)
    return rows


# -- clear --------------------------------------------------------------------------------------


@alarms.command("clear", epilog=example("caxev alarms clear 3f9ac0d1"))
@click.argument("alarm", metavar="ID")
@global_options(hidden=True)
def clear(alarm: str) -> None:
    """End an alarm that nothing clears by itself.

    The site's listener does it, or the next one if none runs.
    """
    options = state()
    options.log("warning")
    print_line(options.with_database(lambda database: _clear(database, alarm)))


async def _clear(database: Database, name: str) -> str:
    from caxev.cli.replay import leave, nobody
    from caxev.database import Request

    found = [one.alarm for one in await database.alarms() if one.active]
    alarm = next((alarm for alarm in found if alarm.id == name), None)
    if alarm is None:
        raise NothingToDo(f"no alarm {name!r} is active: caxev alarms lists those that are")
    asked = await leave(database, alarm.site, [Request("clear", alarm=alarm.key)])
    line = f"{alarm.site}: asked to clear: {alarm.summary}"
    return line if asked["listening"] else f"{line}; {nobody(alarm.site)}"
