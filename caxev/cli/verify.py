"""Run ``caxev verify``: compare copies with their entries in the database.

The command reads the files of this machine's site. A copy at another site is read by that site's
listener: the request goes to ``check_asked`` of the entry, and the answer to ``check_answered`` and
``verified_at``, or the status becomes ``error``. If files here are bad, gone or unreadable, this
command asks this site's own listener as well: only its result counts.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from itertools import takewhile
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click
import trio
from attrs import define, field

from caxev.asking.base import ActContext, ActPlan, pages
from caxev.asking.readings import ReadCopies, reading
from caxev.asking.requests import keep, writing
from caxev.cli.command import command
from caxev.cli.interrupts import stop_if_interrupted
from caxev.cli.options import options
from caxev.cli.output import Column, columns, fail_if, print_line, stream
from caxev.cli.plans import asks, confirm_plan
from caxev.cli.runs import copy_cells
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.site_paths import is_here
from caxev.cli.values import SITE
from caxev.config import Site, Sites
from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp, Retry, RootAway
from caxev.core.model import TRANSFERRED, Copy, Run, RunId
from caxev.files import Manifest, confine, digest_tree, scan, steady

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import BulkRequest, Database, RequestPart

Verdict: TypeAlias = tuple[str, str | None]
"""A finding about a copy, and its reason."""
_Manifests: TypeAlias = Mapping[str | None, Manifest | None]
"""Manifests by their digests; None: it is not there."""

BAD: Final = frozenset({"bad", "gone", "unreadable"})
_TOGETHER: Final = 100
"""Runs whose manifests are read at once."""
_SLICE: Final = 0.2
"""Seconds of comparing in one call of a thread: a call for each small copy would cost too much."""
_NAMED: Final = 3
"""How many differences a row names."""


@command(
    "caxev verify --run 123",
    "caxev verify --run 123-130 --deep",
    "caxev verify --site lngs --type raw",
    "caxev verify --site lngs --unverified-for 90d --deep",
)
@selects_runs(required=False, copies=("type", "version"))
@click.option("--site", type=SITE, help="Only copies at this site.")
@click.option("--deep", is_flag=True, help="Read the files and compare their digests.")
@asks
def verify(*, runs: RunChoice, site: str | None, deep: bool, yes: bool) -> None:
    """Check that the files of good copies are there, each of its size.

    Only copies of sites on this machine are checked. With --deep their files are read and
    compared by digest, and the listeners of other sites are asked to read theirs; they answer
    in the entry (caxev status --run N). If a copy here is bad, missing or unreadable, --deep also
    asks this site's listener: when it confirms that, the copy no longer counts. Exit code 1 if
    there is such a copy.
    """
    if not runs.selects and site is None:
        raise click.UsageError("select copies: --site, --run, --name, --tag, --since, ...")
    wanted = runs.narrowed(host=site, status=TRANSFERRED)
    verification = Verification(options().sites(), deep)
    if deep and not wanted.names_one:
        plan, asked = options().with_asker(_planned, wanted)
        confirm_plan(plan, yes=yes)
        if asked:
            request = options().with_asker(keep, ReadCopies(wanted.selection.wanted), asked)
            print_line(
                f"request {request.id}: caxev requests watch {request.id} follows what "
                "other sites read",
                err=True,
            )
            verification.request = request
    stream(_COLUMNS, "there are no such copies", verification.rows, wanted)
    fail_if(verification.any_bad)


_COLUMNS = columns("run", "type", "version", "host", "found", "why", Column("location", minor=1))


async def _planned(asker: Asker, choice: RunChoice) -> tuple[ActPlan, list[RunId]]:
    """Return the copies to read here, and the runs that other sites have to read."""
    plan, asked, now = ActPlan(), [], utcnow()
    async with aclosing(choice.each(asker.database)) as runs:
        async for run in runs:
            copies = [one for one in run.copies if choice.selection.means_copy(one, now)]
            plan.add("read and compared", sum(run.size_of(one) or 0 for one in copies))
            sites = [asker.sites.find(one.host) for one in copies if one.location is not None]
            if any(site is not None and not is_here(site) for site in sites):
                asked.append(run.id)
    return plan, asked


@define
class Verification:
    """How copies are compared. `any_bad`: one was bad, gone or unreadable so far.

    `request` is the request under which other sites are asked, if there is one.
    """

    sites: Sites
    deep: bool
    request: BulkRequest | None = None
    any_bad: bool = field(init=False, default=False)
    _context: ActContext = field(init=False)

    async def rows(
        self, database: Database, choice: RunChoice
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        """Return a row for each copy. Raises `NoSuchRun` if a named run does not exist.

        Raises `NothingToDo` once the request is cancelled.
        """
        asker = options().asker(database)
        name = None if self.request is None else self.request.id
        self._context = await asker.context(ReadCopies(), name)
        self.sites = self._context.sites
        async with nullcontext() if self.request is None else writing(asker, self.request) as now:
            self.request = now
            async with aclosing(self._rows(database, choice)) as rows:
                async for row in rows:
                    yield row

    async def _rows(
        self, database: Database, choice: RunChoice
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        now = utcnow()
        async with aclosing(choice.pages(database)) as found:
            async for page in found:
                for runs in pages(page, _TOGETHER):
                    copies = [
                        (run, copy)
                        for run in runs
                        for copy in run.copies
                        if choice.selection.means_copy(copy, now)
                    ]
                    async with aclosing(self._rows_of(database, copies)) as rows:
                        async for row in rows:
                            yield row

    async def _rows_of(
        self, database: Database, copies: Sequence[tuple[Run, Copy]]
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        waiting = deque(copy for _, copy in copies if self._is_here(copy))
        manifests = await self._manifests(database, waiting)
        verdicts: deque[Verdict] = deque()
        for run, copy in copies:
            if waiting and waiting[0] is copy:
                if not verdicts:
                    verdicts += await self._compared(database, waiting, manifests)
                waiting.popleft()
                found, why = verdicts.popleft()
                # Only the listener changes the status, under its lease, and by its own reading.
                if self.deep and found in BAD:
                    await self._ask(database, run, copy)
            else:
                found, why = await self._elsewhere(database, run, copy)
            self.any_bad = self.any_bad or found in BAD
            yield _row(run, copy, found, why)

    def _is_here(self, copy: Copy) -> bool:
        site = self.sites.find(copy.host)
        return site is not None and copy.location is not None and is_here(site)

    async def _manifests(self, database: Database, copies: Iterable[Copy]) -> _Manifests:
        """Read the manifests of copies; if they are large, only some."""
        found = await database.load_manifests(one.manifest for one in copies if one.manifest)
        return {None: None, **{digest: _manifest(rows) for digest, rows in found.items()}}

    async def _compared(
        self, database: Database, copies: Sequence[Copy], manifests: _Manifests
    ) -> list[Verdict]:
        """Compare copies on this machine with their manifests: the first, and more in its wake."""
        if (digest := copies[0].manifest) is not None and digest not in manifests:
            manifests = {**manifests, digest: _manifest(await database.load_manifest(digest))}
        known = takewhile(lambda one: one.manifest in manifests, copies)
        each = [(one, self.sites.get(one.host), manifests[one.manifest]) for one in known]
        return await trio.to_thread.run_sync(compare_some, each, self.deep)

    async def _elsewhere(self, database: Database, run: Run, copy: Copy) -> Verdict:
        site = self.sites.find(copy.host)
        if site is None:
            return "not checked", "it is not a site of sites.json"
        if copy.location is None:
            return "not checked", "it has no location"
        if not self.deep:
            return "not checked", f"{copy.host} is not this machine: use --deep to ask it"
        return await self._ask(database, run, copy)

    async def _ask(self, database: Database, run: Run, copy: Copy) -> Verdict:
        """Request that the copy's site, or the one responsible for it, reads it again."""
        step = reading(run, copy, self._context)
        assert step.update is not None
        asked = [(step.update, step.row)]
        (fitted,) = await database.write_asked(asked, utcnow(), self._part(run))
        if not fitted:
            return "not checked", "it has just changed: try again"
        return "asked", f"{copy.host} will read it: see caxev status"

    def _part(self, run: Run) -> RequestPart | None:
        from caxev.database import RequestPart

        request = self.request
        if request is None or request.writer is None:
            return None
        return RequestPart(request.id, request.writer, [run.id])


def _manifest(rows: Sequence[Mapping[str, Any]] | None) -> Manifest | None:
    return None if rows is None else Manifest.from_rows(rows)


def _row(run: Run, copy: Copy, found: str, why: str | None) -> Mapping[str, Any]:
    return {**copy_cells(run, copy.key), "found": found, "why": why, "location": copy.location}


def compare_some(copies: Iterable[tuple[Copy, Site, Manifest | None]], deep: bool) -> list[Verdict]:
    """Compare copies one after the other, as `compare` does, for `_SLICE` seconds: at least one.

    Raises `RootAway` if that is so of the first.
    """
    found: list[Verdict] = []
    end = monotonic() + _SLICE
    for copy, site, known in copies:
        try:
            found.append(compare(copy, site, known, deep))
        except RootAway:
            if found:
                break
            raise
        if monotonic() >= end:
            break
    return found


def compare(copy: Copy, site: Site, known: Manifest | None, deep: bool) -> Verdict:
    """Compare a copy on this machine with its manifest; return the result and the reason.

    Raises `RootAway`.
    """
    assert copy.location is not None
    try:
        with steady():
            path = confine(copy.location, site.roots)
            if not os.path.lexists(path):
                return "gone", "nothing is there"
            if not deep:
                return _compared(known and known.shape(), scan(path))
            sha512 = known is None  # without a manifest there is only cax's checksum, a SHA-512
            found = digest_tree(path, sha512=sha512, report=stop_if_interrupted)
    except RootAway:
        raise  # it concerns every copy on that disk, not only this one
    except GiveUp as error:
        return "bad", error.why
    except Retry as error:
        return "unreadable", error.why
    if known is not None:
        return _compared(known, found)
    if copy.checksum is None:
        return "not compared", "the database has no digest of it yet"
    same = found.cax_checksum() == copy.checksum
    return ("good", None) if same else ("bad", "its checksum differs")


def _compared(known: Manifest | None, found: Manifest) -> Verdict:
    if known is None:
        return "there", "the database has no manifest to compare it with"
    differ = known.differences(found)
    if not differ:
        return "good", None
    more = ", ..." if len(differ) > _NAMED else ""
    return "bad", f"{len(differ)} files: {', '.join(map(str, differ[:_NAMED]))}{more}"
