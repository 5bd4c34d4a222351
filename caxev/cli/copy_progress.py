"""Describe and display how far a requested copy is, for ``caxev copy``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from attrs import define, field, frozen

from caxev.asking.copies import GONE
from caxev.core.amounts import ReportedProgress
from caxev.core.escapes import escaped
from caxev.core.ledger import Reaction, State, trigger_named
from caxev.core.model import ERROR, REQUESTED, TRANSFERRED, TRANSFERRING, Copy, CopyKey, Run

if TYPE_CHECKING:
    import rich.progress


@frozen
class CopyState:
    """The state of the copy: its status, `words` about it, its progress; `over`: it is final."""

    status: str
    words: str = ""
    progress: ReportedProgress | None = None
    over: bool = False

    @property
    def line(self) -> str:
        parts = (self.status, self.words, str(self.progress or ""))
        return ": ".join(part for part in parts if part)


def copy_state(
    run: Run | None,
    key: CopyKey,
    reactions: Iterable[tuple[Reaction, Any]],
    *,
    seen_as: str | None = None,
    declined: str = "",
) -> CopyState:
    """Return the state of a requested copy, from its run and reactions. Pure.

    `seen_as` is how the site that is to make it saw the copy last; `declined` is why its handlers
    leave it alone, if they do.
    """
    copy = None if run is None else run.copy(key)
    if copy is None:
        return CopyState(GONE, "the request was withdrawn", over=True)
    if copy.status == TRANSFERRED:
        return CopyState(copy.status, over=True)
    if copy.status == ERROR:
        return CopyState(copy.status, copy.error or "", over=True)
    about = [pair for pair in reactions if pair[0].aspect == key]
    # Only these react to the present status: the others belong to an earlier entry of that copy.
    current = [reaction for reaction, _ in about if reaction.event.after == copy.seen_as]
    # A site that has seen a request, and has nothing left to do about it, has declined it.
    if copy.status == REQUESTED and copy.seen_as == seen_as and not current:
        return CopyState(copy.status, declined or "no handler makes this copy", over=True)
    makers = [reaction for reaction, document in about if _makes(copy, reaction, document)]
    words = "; ".join(f"{d.handler} at {d.site}: {d.note}" for d in makers if d.note)
    if {reaction.state for reaction in makers} == {State.FAILED}:
        return CopyState(copy.status, words, over=True)
    known = [ReportedProgress.of(document.get("progress")) for _, document in about]
    moving = [progress for progress in known if progress is not None]
    return CopyState(copy.status, words, ReportedProgress.sum(moving) if moving else None)


def _makes(copy: Copy, reaction: Reaction, document: Mapping[str, Any]) -> bool:
    """Return whether a reaction works on the copy itself, and does not only look after it."""
    if copy.trigger == trigger_named(reaction.site, reaction.handler, reaction.aspect):
        return copy.status == TRANSFERRING
    if reaction.event.after != copy.seen_as:
        return False
    moves = document.get("progress") is not None or reaction.state is State.FAILED
    return copy.status == REQUESTED or moves


@define(eq=False)
class Display:
    """Output for people: a bar on a terminal, plain lines in a pipe; on stderr beside JSON."""

    as_json: bool
    _bar: rich.progress.Progress | None = field(init=False, default=None)

    def print_line(self, line: str) -> None:
        """Print a line."""
        if self._bar is not None:
            self._bar.console.print(escaped(line), highlight=False, markup=False)
        else:
            click.echo(escaped(line), err=self.as_json)

    def show(self, now: CopyState) -> None:
        """Show the state of the copy."""
        if self._bar is None:
            self.print_line(now.line)
            return
        progress, (task,) = now.progress, self._bar.task_ids
        self._bar.update(
            task,
            description=now.status,
            words=escaped(now.words or str(progress or "")),
            completed=0 if progress is None else progress.done,
            total=None if progress is None else progress.total,
        )
        if now.over:
            self.print_line(now.line)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Draw a bar for the length of the block, if this is a terminal."""
        if not (sys.stderr if self.as_json else sys.stdout).isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # Other programs wrote these texts: brackets in them are no mark-up.
        words = TextColumn("{task.fields[words]}", markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), words)
        with Progress(*columns, console=Console(stderr=self.as_json), transient=True) as bar:
            bar.add_task("requested", total=None, words="")
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None
