"""The addresses of the forms with which an operator acts on selected runs. Pure.

Every page has them. Readers' browsers hide them, and the gate refuses readers who follow them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import urlencode

from caxev.core.model import Run
from caxev.core.selection import NumberRange, Selection, glob_of
from caxev.web.acts.offers import RUN_OFFERS, without_copy
from caxev.web.listing import BadFilter


class ActLink(NamedTuple):
    """A link to an act."""

    title: str
    address: str


def links(selection: Selection, *, one: bool = False) -> list[ActLink]:
    """Return the links to what can be done to these runs; to `one` run, more than to several."""
    try:
        texts = without_copy(selection).texts()
    except BadFilter:
        return []
    query = urlencode(texts, doseq=True)
    return [
        ActLink(offer.title, f"/acts/{offer.name}?{query}")
        for offer in RUN_OFFERS
        if one or not offer.about_one
    ]


def links_of(run: Run) -> list[ActLink]:
    """Return the links to what can be done to one run."""
    try:
        return links(naming([run]), one=True)
    except BadFilter:
        return []


def naming(runs: Iterable[Run]) -> Selection:
    """Return the selection that names these runs: by their numbers, or else by their names.

    Raises `BadFilter` if there are none, or if some cannot be named: without any condition a
    selection means all runs. Addresses and forms keep no spaces around a name.
    """
    found = list(runs)
    detectors = tuple(dict.fromkeys(run.detector for run in found if run.detector))
    # A selection of several means each number, or name, of each of them.
    each = {run.detector for run in found}, {run.number or run.name for run in found}
    if len(each[0]) > 1 and ("" in each[0] or len(found) < len(each[0]) * len(each[1])):
        raise BadFilter(
            "these runs are of several detectors, which cannot be named together: narrow them by "
            "site and handler, or give caxev retry for each --detector"
        )
    numbers = [run.number for run in found if run.number is not None]
    names = [glob_of(run.name) for run in found if run.name and run.name == run.name.strip()]
    if numbers and len(numbers) == len(found):
        return Selection(numbers=tuple(_ranges(sorted(set(numbers)))), detectors=detectors)
    if names and len(names) == len(found):
        return Selection(names=tuple(names), detectors=detectors)
    raise BadFilter("these runs cannot be named: some are gone, or have neither number nor name")


def _ranges(numbers: Iterable[int]) -> Iterator[NumberRange]:
    last: NumberRange | None = None
    for number in numbers:
        if last is not None and number == last.last + 1:
            last = NumberRange(last.first, number)
            continue
        if last is not None:
            yield last
        last = NumberRange(number, number)
    if last is not None:
        yield last
