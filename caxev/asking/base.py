"""Acts: what people ask of runs. A step is a write to one run, a plan sums steps up. Pure.

Steps take the time from `utcnow` and the rest from their arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

from attrs import Factory, define, evolve, field, frozen

from caxev.config import Sites
from caxev.core.amounts import size
from caxev.core.clock import utcnow
from caxev.core.errors import Ambiguous, ConfigError, NothingToDo
from caxev.core.history import Deed, HistoryRow, of_run
from caxev.core.model import Aspect, Copy, CopyKey, Run, RunId
from caxev.core.registry import Registry
from caxev.core.update import RunUpdate

if TYPE_CHECKING:
    from caxev.database import SiteRecord

T = TypeVar("T")
_REASONS: Final = 3
"""Reasons that a plan names, the most frequent."""


@frozen
class DataChoice:
    """The type and version of a run's data; without a version, any."""

    kind: str
    version: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.version or ''}".rstrip()

    def means(self, kind: str, version: str | None) -> bool:
        """Return whether data of that type and version is meant."""
        return kind == self.kind and self.version in (None, version)

    def copies(self, run: Run, host: str) -> list[Copy]:
        """Return the run's copies of this data at a host, in the order of its entries."""
        return [one for one in run.copies if one.host == host and self.means(one.type, one.version)]

    def entries(self, run: Run, host: str) -> list[Copy]:
        """Return the run's entries of this data at a host: of derived data one for each version."""
        # Old programs left double entries, of which the first counts: reversed, so that it is the
        # last to be put into the dict.
        found = {one.key: one for one in reversed(self.copies(run, host))}
        return [*reversed(found.values())]

    def copy(self, run: Run, host: str) -> Copy | None:
        """Return the run's copy of this data at a host, if there is one.

        Raises `Ambiguous` if there are several versions: none is guessed.
        """
        found = self.copies(run, host)
        versions = sorted({one.version or "none" for one in found})
        if len(versions) > 1:
            raise Ambiguous(
                f"{host} has several versions ({', '.join(versions)}): choose one by --version"
            )
        return found[0] if found else None


@frozen
class ActContext:
    """All that decides about an act, beside the run: the sites, their listeners, and who asks.

    `sites` have the markers of their directories, `records` are what the database knows of each.
    `registry` returns a site's handlers, and raises `ConfigError` if they cannot be loaded here.
    `by` is the person (user@host), `request` the id of the request that this is part of, if any.
    """

    sites: Sites
    registry: Callable[[str], Registry]
    by: str
    records: Mapping[str, SiteRecord] = Factory(dict)
    request: str | None = None

    @property
    def active(self) -> frozenset[str]:
        """The sites for which a listener acts."""
        return frozenset(site for site, record in self.records.items() if record.active)

    def away(self, site: str) -> Mapping[str, str]:
        """Return the directories of a site that its listener reports as away, and why."""
        # Only a running listener knows: this may be another machine.
        record = self.records.get(site)
        return record.away if record is not None and record.active else {}

    def row(
        self, run: Run, aspect: Aspect | None, what: str, reason: str = "", *, source: str = ""
    ) -> HistoryRow:
        """Return the row of history about what the person asks for, of this aspect of the run."""
        site = aspect.host if isinstance(aspect, CopyKey) else ""
        target = site if source else ""
        deed = Deed(what=what, source=source, target=target, reason=reason, by=self.by)
        return HistoryRow(at=utcnow(), site=site, deed=deed, aspect=aspect, **of_run(run))


@frozen
class Step:
    """A write to a run, or the reason why there is none.

    `what` is the data concerned, `size` its bytes. `state` is what comes of the write, or the
    reason; `planned` what would come of it, for a dry run. `ok`: whether the person gets what was
    asked for; None: neither. `row` goes to the history with the write.
    """

    run: Run
    what: str
    state: str
    update: RunUpdate | None = None
    planned: str = field(default=Factory(lambda self: f"would be {self.state}", takes_self=True))
    ok: bool | None = field(default=Factory(lambda self: self.update is not None, takes_self=True))
    size: int | None = field(default=None, kw_only=True)
    row: HistoryRow | None = field(default=None, kw_only=True)

    @property
    def why(self) -> str:
        """Why there is no write, in the same words for all runs."""
        return self.state.replace(str(self.run), "it")

    @property
    def as_planned(self) -> Step:
        """The step as a dry run shows it."""
        return self if self.update is None else evolve(self, state=self.planned)

    def failed(self, why: str) -> Step:
        """Return the step that was not made, for this reason."""
        return evolve(self, update=None, state=why, ok=False)


class Act:
    """Something that a person asks of runs. Subclasses are frozen values, made of plain values.

    They have `step` if it is one write for each run, or else `steps`.
    """

    kind: ClassVar[str] = ""
    """The name of such requests in the database; empty: they are not kept."""

    @property
    def what(self) -> str:
        """The data concerned, in words, of a run for which nothing is written."""
        raise NotImplementedError

    @property
    def words(self) -> str:
        """The act in words, for the list of requests."""
        return f"{self.kind}: {self.what}"

    @property
    def place(self) -> str | None:
        """The site about whose files it is, if it is about one: it notes what it shares."""
        return None

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run. Raises as `steps`."""
        raise NotImplementedError

    def steps(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Decide about a run: return what is written together, or steps without a write.

        Raises `NothingToDo` or `ConfigError` with the rule that is against it.
        """
        return [self.step(run, context)]

    def tried(self, run: Run, context: ActContext) -> list[Step]:
        """Decide about one of several runs: the rule against it becomes the `state` of a step."""
        try:
            return list(self.steps(run, context))
        except (NothingToDo, ConfigError) as why:
            return [self.refusal(run, why)]

    def refusal(self, run: Run, why: Exception) -> Step:
        """Return the step of a run for which nothing is written, for this reason."""
        return Step(run, self.what, str(why), ok=False)


@frozen
class AtSite(Act):
    """An act about a site's copies of some data."""

    site: str
    data: DataChoice

    @property
    def what(self) -> str:
        return f"{self.data.kind} at {self.site}"

    @property
    def place(self) -> str:
        return self.site


class RequestedAct(Act):
    """An act whose steps only request: listeners do the rest. The entries of copies show how far.

    Others are done once they are written. Each step leaves the id of the request in the entry.
    """

    def state_of(self, run: Run, request: str) -> str | None:
        """Return how far the run is: `DONE`, `FAILED`, or the status of what is pending.

        None if nothing of the request is left: it was withdrawn, or never written.
        """
        raise NotImplementedError

    def withdrawals(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Return the steps that take back what no listener has begun of `context.request`."""
        raise NotImplementedError

    def size_of(self, run: Run, request: str) -> int:
        """Return the bytes that the request is about, as far as they are known."""
        raise NotImplementedError


DONE: Final = "done"
FAILED: Final = "failed"


@define
class ActPlan:
    """The effect of an act: counts and bytes by what is done, counts by why nothing is.

    `runs` are the ids of those that need a write.
    """

    done: Counter[str] = field(factory=Counter)
    kept: Counter[str] = field(factory=Counter)
    bytes: int = 0
    runs: list[RunId] = field(factory=list)

    def add(self, what: str, size: int | None = None, why_not: str | None = None) -> None:
        """Count a run: what is done with it, or why nothing is."""
        if why_not is None:
            self.done[what] += 1
            self.bytes += size or 0
        else:
            self.kept[why_not] += 1

    def add_steps(self, run: Run, steps: Iterable[Step]) -> None:
        """Count the steps of a run."""
        writes = False
        for one in steps:
            self.add(one.what, one.size, None if one.update is not None else one.why)
            writes = writes or one.update is not None
        if writes:
            self.runs.append(run.id)

    @property
    def number(self) -> int:
        """How many steps are made."""
        return self.done.total()

    @property
    def words(self) -> str:
        """The plan in one line, such as ``500 runs, 1.2 TB: raw from lngs to chicago``."""
        kept = self.kept.total()
        amount = f", {size(self.bytes)}" if self.bytes else ""
        what = "; ".join(one for one, _ in self.done.most_common(_REASONS)) or "nothing"
        line = f"{counted(self.number)}{amount}: {what}"
        if not kept:
            return line
        why = "; ".join(f"{count}: {one}" for one, count in self.kept.most_common(_REASONS))
        return f"{line}. Not {counted(kept)} ({why}{'; ...' if len(self.kept) > _REASONS else ''})"


def counted(number: int, noun: str = "run") -> str:
    """Return how many there are: ``1 run``, ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def pages(items: Iterable[T], size: int = 1000) -> Iterator[tuple[T, ...]]:
    """Split items into pages: of as many runs as one request to a listener names, or of `size`."""
    some = tuple(items)
    return (some[start : start + size] for start in range(0, len(some), size))
