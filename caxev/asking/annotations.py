"""Tags and comments that people add to runs. Pure.

A tag that is added or removed is an event, to which handlers react; a comment is none.
"""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from caxev.asking.base import Act, ActContext, Step
from caxev.core.history import What
from caxev.core.model import Run, Tag
from caxev.core.update import RunUpdate


@frozen
class TagRuns(Act):
    """Add a tag, or with `remove` take it away. It is kept with who added it."""

    kind: ClassVar[str] = "tag"
    name: str
    remove: bool = False

    @property
    def what(self) -> str:
        return f"tag {self.name!r}"

    @property
    def words(self) -> str:
        return f"{'remove' if self.remove else 'add'} {self.what}"

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run; one that is as it should be already is left alone."""
        if self.remove is not (self.name in run.tags):
            state = "does not have it" if self.remove else "has it already"
            return Step(run, self.what, state, ok=True)
        if self.remove:
            done, update = "removed", RunUpdate.remove_tag(run, self.name)
        else:
            done, update = "added", RunUpdate.add_tag(run, self.name, user=context.by)
        row = context.row(run, Tag(self.name), What.TAGGED, f"tag {self.name!r} {done}")
        return Step(run, self.what, done, update, row=row)


@frozen
class CommentRuns(Act):
    """Add a comment. It is kept with who wrote it, and when."""

    kind: ClassVar[str] = "comment"
    text: str

    @property
    def what(self) -> str:
        return "comment"

    @property
    def words(self) -> str:
        return f"comment: {self.text}"

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run: nothing is against a comment."""
        row = context.row(run, None, What.COMMENTED, self.text)
        update = RunUpdate.add_comment(run, self.text, context.by)
        return Step(run, self.what, "added", update, row=row)
