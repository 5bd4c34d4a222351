"""Run ``caxev alarms``: list active alarms and failed deliveries, test the sinks, clear alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from caxev.asking.listeners import clear_alarm
from caxev.cli.command import command, listing
from caxev.cli.options import as_text, options
from caxev.cli.output import Column, Parts, columns, print_line, show
from caxev.cli.plans import with_hint
from caxev.cli.runs import shown_by_name
from caxev.cli.values import SITE
from caxev.config import Site
from caxev.core.alarms import Alarm, AlarmState, Severity, urgency

if TYPE_CHECKING:
    from caxev.database import Database


@listing("caxev alarms", "caxev alarms test --site lngs", "caxev alarms clear 3f9ac0d1")
@click.option("--site", type=SITE, help="Only alarms of this site.")
@click.option("--all", "everything", is_flag=True, help="Also alarms that have ended.")
def alarms(site: str | None, everything: bool) -> None:
    """List the active alarms, and the sinks to which they could not be delivered.

    The most severe come first. `clear` ends an alarm by hand, `test` tries the sinks.
    """

    async def find(database: Database) -> list[dict[str, Any]]:
        found = [one for one in await database.alarms(site) if everything or one.active]
        names = {one.alarm.run for one in found} - {""}
        return alarm_rows(found, {name: await shown_by_name(database, name) for name in names})

    show(_ALARMS, options().with_database(find), empty="no alarm is active")


_ALARMS = columns(
    "id",
    "site",
    "severity",
    Column("since", minor=1),
    Column("over", "ENDED", minor=2),
    Column("summary", "ALARM"),
    "why",
    Column("undelivered", "NOT DELIVERED"),
)


def alarm_rows(found: Sequence[AlarmState], runs: Mapping[str, Parts]) -> list[dict[str, Any]]:
    """Return a row for each alarm, the worst first; `runs` are those that alarms are about."""
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


@command("caxev alarms test --site lngs", group=alarms)
@click.option("--site", type=SITE, required=True, help="The site whose `alarms` are tested.")
def test(site: str) -> None:
    """Send a test alarm to each sink of a site, from this machine.

    The table shows which sinks accepted it. Its end is not sent: at PagerDuty, resolve it by
    hand.
    """
    import trio

    rows = trio.run(_tried, options().sites().get(site))
    # A site without sinks fails, too: nobody would hear of an alarm.
    failed = not rows or not all(row["ok"] for row in rows)
    show(_TESTED, rows, empty=f"{site} has no `alarms` in sites.json", failed=failed)


_TESTED = columns("sink", "kind", "ok", "why")


async def _tried(site: Site) -> list[dict[str, Any]]:
    import trio

    from caxev.alarms.manager import try_send
    from caxev.alarms.recipients import recipients

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


@command("caxev alarms clear 3f9ac0d1", group=alarms, output=as_text)
@click.argument("alarm", metavar="ID")
def clear(alarm: str) -> None:
    """End an alarm that nothing clears by itself.

    The site's listener does it, or the next one if none runs.
    """
    asked = options().with_asker(clear_alarm, alarm)
    line = f"{asked['site']}: requested to clear: {asked['summary']}"
    print_line(with_hint(line, asked))
