"""The views that follow the state: what each shows, as parts, which are HTML by their ids.

A part is an element that the browser replaces when it has changed. It is made of the state alone,
without waiting; `app` has the views that ask the database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlencode

from attrs import frozen
from markupsafe import Markup, escape

from caxev.core.alarms import urgency
from caxev.core.ledger import State
from caxev.core.model import REQUESTED
from caxev.web.reasons import grouped, normalised
from caxev.web.rendering import Parts, render
from caxev.web.scene import Scene
from caxev.web.state import Open

LISTED: Final = 200
"""Waiting requests that the page lists."""

# -- failures -------------------------------------------------------------------------------------


@frozen
class Failures:
    """Which failed reactions are shown: of a site, a handler and a reason, or (empty) of any."""

    site: str = ""
    handler: str = ""
    reason: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Failures:
        """Return what an address asks for."""
        return cls(*(query.get(name, "").strip() for name in ("site", "handler", "reason")))

    @property
    def given(self) -> dict[str, str]:
        """The conditions by their names."""
        found = {"site": self.site, "handler": self.handler, "reason": self.reason}
        return {name: value for name, value in found.items() if value}

    def address(self, **other: str) -> Markup:
        """Return the address of these failures, with other conditions."""
        # Markup: a long address must not be cut as a long text is.
        query = urlencode({**self.given, **other}, errors="surrogateescape")
        return escape(f"/failures?{query}")

    def means(self, one: Open) -> bool:
        """Return whether a reaction is among them."""
        return (
            self.site in ("", one.reaction.site)
            and self.handler in ("", one.reaction.handler)
            and self.reason in ("", normalised(one.reaction.note))
        )


def failures_parts(scene: Scene, which: Failures) -> Parts:
    """Return failed reactions, grouped by handler and reason, and by what they can be narrowed."""
    failed = scene.state.of_state(State.FAILED)
    meant = [one for one in failed if which.means(one)]
    facets = [
        ("site", "Sites", _facet(meant, which, "site")),
        ("handler", "Handlers", _facet(meant, which, "handler")),
    ]
    html = render(
        "failures_part.html",
        groups=grouped(meant),
        total=len(meant),
        all=len(failed),
        labels=scene.state.label,
        facets=facets,
        which=which,
    )
    return {"groups": html}


def _facet(failed: Iterable[Open], which: Failures, name: str) -> list[tuple[str, int, str]]:
    """Return each value of a field with how many have it, and the address of these."""
    counts = Counter(getattr(one.reaction, name) for one in failed)
    return [(value, n, which.address(**{name: value})) for value, n in counts.most_common()]


# -- alarms, requests, handlers -------------------------------------------------------------------


def alarms_parts(scene: Scene) -> Parts:
    """Return the active alarms, the worst first."""
    alarms = sorted(scene.state.active_alarms(), key=urgency)
    return {"alarms": render("alarms_part.html", alarms=alarms)}


def requests_parts(scene: Scene, bulks: Sequence[Any]) -> Parts:
    """Return what waits for a listener, and copies that were asked for."""
    state = scene.state
    wanted: Counter[str] = Counter()
    for group, number in state.runs.counts.items():
        if group.status == REQUESTED:
            wanted[group.host] += number
    return {
        "waiting": render(
            "requests_waiting.html", requests=state.requests[:LISTED], number=state.waiting
        ),
        "wanted": render("requests_wanted.html", wanted=wanted.most_common(), bulks=bulks),
    }


def handlers_parts(scene: Scene, handlers: Sequence[Mapping[str, Any]]) -> Parts:
    """Return the handlers, where they are enabled, and what they have to do."""
    owed: Counter[tuple[str, State]] = Counter()
    for group, number in scene.state.groups.items():
        owed[group.handler, group.state] += number
    rows = [
        {**one, **{state.value: owed[one["handler"], state] for state in State}} for one in handlers
    ]
    known = {one["handler"] for one in handlers}
    rows += [
        {"handler": name, "lane": "", "triggers": (), "does": "", "sites": (),
         **{state.value: owed[name, state] for state in State}}
        for name in sorted({name for name, _ in owed} - known)
    ]  # fmt: skip
    return {
        "handlers": render(
            "handlers_part.html", rows=rows, sites=sum(map(scene.listens, scene.names))
        )
    }
