"""The acts that the page offers: their fields, and what these mean.

A field has the name of the command's option, so that what a form holds is the command's line, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from attrs import evolve, field, frozen

from caxev.asking.annotations import CommentRuns, TagRuns
from caxev.asking.archives import BringRaw
from caxev.asking.base import Act, DataChoice
from caxev.asking.copies import CopyData, WithdrawCopies
from caxev.asking.deletions import DeleteCopies, Terms, WithdrawDeletions
from caxev.asking.holding import HoldCopies, Keep, ReleaseCopies
from caxev.asking.readings import ReadCopies
from caxev.asking.vouching import VouchFor
from caxev.core.clock import utcnow
from caxev.core.model import TRANSFERRED
from caxev.core.moments import moment_at, read_length, read_moment
from caxev.core.selection import EVERY, CopyPattern, Selection
from caxev.web.acts.command_line import option, selecting
from caxev.web.listing import BadFilter

Values: TypeAlias = Mapping[str, str]


@frozen
class ActField:
    """A field of a form: an option of the command, or with `is_argument` what it is about.

    `kind`: "text", "site" or "flag". An option that is not needed may be left empty.
    """

    name: str
    label: str
    kind: str = "text"
    needed: bool = False
    hint: str = ""
    is_argument: bool = False

    def words(self, value: str) -> list[str]:
        """Return the words of the command with these values."""
        if self.is_argument:
            return ["--", value]
        return [f"--{self.name}"] if self.kind == "flag" else [option(self.name, value)]


@frozen
class Offer:
    """An act that is offered under a name. `make` makes it of the form's values.

    `command` is the command's name, with what the page always asks of it. `about_one`: it is about
    one run. `is_grave`: it is marked as what cannot be undone. `pattern` returns what the copies
    must be that it is about, if the runs are only those that have one.
    """

    name: str
    title: str
    words: str
    command: tuple[str, ...]
    fields: tuple[ActField, ...]
    make: Callable[[Values], Act] | None = None
    about_one: bool = False
    is_grave: bool = False
    always: tuple[str, ...] = ()
    pattern: Callable[[Values], CopyPattern] = field(default=lambda _: CopyPattern())

    def missing(self, values: Values) -> list[ActField]:
        """Return the fields that are needed and empty."""
        return [one for one in self.fields if one.needed and not values.get(one.name)]

    def runs(self, selection: Selection, values: Values) -> Selection:
        """Return the runs of a selection that it is about."""
        found = self.pattern(values)
        parts = {"type": found.type, "version": found.version, "host": found.host}
        return selection.with_copy(**parts, status=found.status)

    def line(self, selection: Selection, values: Values) -> list[str]:
        """Return the command that does the same, in words."""
        given = [one for one in self.fields if values.get(one.name)]
        given.sort(key=lambda one: one.is_argument)  # nothing but arguments may follow ``--``
        said = [word for one in given for word in one.words(values[one.name])]
        chosen = selection != EVERY or "handler" in values
        always = ("--all",) if self.name == "retry" and not chosen else self.always
        return ["caxev", *self.command, *selecting(selection), *always, *said]


SITE: Final = ActField("site", "Site", "site", needed=True)
TYPE: Final = ActField("type", "Data", hint="raw")
VERSION: Final = ActField("version", "Version")
WHY: Final = ActField("why", "Reason", hint="for a talk")
REASON: Final = evolve(WHY, needed=True, hint="")
KEEP: Final = (
    ActField("keep-for", "Keep for", hint="14d"),
    ActField("keep-until", "Keep until (UTC)", hint="2026-12-24"),
    WHY,
)
TO_AND_FROM: Final = (
    ActField("to", "To", "site", needed=True),
    ActField("from", "From", "site"),
    TYPE,
    VERSION,
)


def _data(values: Values) -> DataChoice:
    return DataChoice(values.get("type") or "raw", values.get("version") or None)


def _keep(values: Values) -> Keep:
    length, until = values.get("keep-for"), values.get("keep-until")
    try:
        return Keep.of(
            read_length(length) if length else None,
            moment_at(read_moment(until), utcnow()) if until else None,
            values.get("why") or None,
        )
    except ValueError as error:
        raise BadFilter(str(error)) from None


def _copy(values: Values) -> tuple[DataChoice, str | None, str, Keep]:
    source = values.get("from") or None
    if source == values["to"]:
        raise BadFilter(f"the copy is from {source} to {source}")
    return _data(values), source, values["to"], _keep(values)


def _at(values: Values) -> tuple[str, DataChoice]:
    return values["site"], _data(values)


def _good(values: Values) -> CopyPattern:
    kind, version, host = (values.get(name) or None for name in ("type", "version", "site"))
    return CopyPattern(type=kind, version=version, host=host, status=TRANSFERRED)


def _there(values: Values) -> CopyPattern:
    data = _data(values)
    return CopyPattern(type=data.kind, version=data.version, host=values["site"])


ACTS: Final = (
    Offer(
        "copy",
        "Copy",
        "Copy to another site, and keep it there.",
        ("copy",),
        (*TO_AND_FROM, *KEEP),
        lambda values: CopyData(*_copy(values)),
        always=("--no-wait",),
    ),
    Offer(
        "withdraw",
        "Withdraw a copy",
        "Withdraw the request for a copy that no listener has begun.",
        ("copy",),
        TO_AND_FROM,
        lambda values: WithdrawCopies(*_copy(values)),
        about_one=True,
        always=("--cancel",),
    ),
    Offer(
        "hold",
        "Hold",
        "Keep copies at a site, although its rules would delete them.",
        ("hold",),
        (SITE, TYPE, VERSION, *KEEP),
        lambda values: HoldCopies(*_at(values), _keep(values)),
    ),
    Offer(
        "release",
        "Release",
        "End your holds of copies at a site: its rules apply to them again.",
        ("release",),
        (SITE, TYPE, VERSION, ActField("all", "Those of other people, too", "flag")),
        lambda values: ReleaseCopies(*_at(values), bool(values.get("all"))),
    ),
    Offer(
        "verify",
        "Verify",
        "Have good copies read again by their sites, and compared.",
        ("verify",),
        (evolve(SITE, needed=False), evolve(TYPE, hint=""), VERSION),
        lambda values: ReadCopies(_good(values)),
        always=("--deep",),
        pattern=_good,
    ),
    Offer(
        "recall",
        "Bring back from tape",
        "Bring raw data back from tape to a site, and keep it there.",
        ("tape", "get"),
        (ActField("archive", "Archive", "archive", needed=True), SITE),
        lambda values: BringRaw((values["archive"],), values["site"], held=True),
    ),
    Offer(
        "tag",
        "Add a tag",
        "Add a tag: handlers react to it.",
        ("tag", "add"),
        (ActField("word", "Tag", needed=True, is_argument=True),),
        lambda values: TagRuns(values["word"]),
    ),
    Offer(
        "untag",
        "Remove a tag",
        "Remove a tag: handlers react to it.",
        ("tag", "rm"),
        (ActField("word", "Tag", needed=True, is_argument=True),),
        lambda values: TagRuns(values["word"], remove=True),
    ),
    Offer(
        "comment",
        "Comment",
        "Add a comment, which is kept with your name.",
        ("comment",),
        (ActField("text", "Comment", needed=True, is_argument=True),),
        lambda values: CommentRuns(values["text"]),
    ),
    Offer(
        "vouch",
        "Vouch",
        "Decide that a site's copy is right: the others are compared with it, and repaired.",
        ("vouch",),
        (SITE, TYPE, VERSION, REASON),
        lambda values: VouchFor(*_at(values), values["why"]),
        about_one=True,
        is_grave=True,
    ),
    Offer(
        "rm",
        "Delete",
        "Delete copies at a site, once its listener has found enough others good.",
        ("rm",),
        (SITE, TYPE, VERSION, REASON),
        lambda values: DeleteCopies(*_at(values), Terms(why=values["why"])),
        is_grave=True,
        pattern=_there,
    ),
    Offer(
        "keep",
        "Withdraw a deletion",
        "Withdraw the deletion of copies, while the files are still there.",
        ("rm",),
        (SITE, TYPE, VERSION),
        lambda values: WithdrawDeletions(*_at(values)),
        always=("--cancel",),
        pattern=_there,
    ),
)
LISTENER_ACTS: Final = (
    Offer(
        "retry",
        "Retry",
        "Try failed reactions again, as if they had never been tried.",
        ("retry",),
        (evolve(SITE, needed=False), ActField("handler", "Handler")),
    ),
    Offer(
        "replay",
        "Replay",
        "Run the reactions for runs as they are now, if they are missing.",
        ("replay",),
        (
            evolve(SITE, needed=False),
            ActField("handler", "Handler"),
            ActField("force", "Those that are done, too", "flag"),
        ),
    ),
)
REQUEST: Final = ActField("request", "Request", needed=True, is_argument=True)
REQUEST_ACTS: Final = (
    Offer(
        "cancel",
        "Cancel a request",
        "Withdraw of a request what nobody has begun. The rest is finished.",
        ("requests", "cancel"),
        (REQUEST,),
    ),
    Offer(
        "resume",
        "Resume a request",
        "Do what is missing of a request: it was withdrawn, has failed, or was never written.",
        ("requests", "resume"),
        (REQUEST,),
        always=("--no-wait",),
    ),
)
RUN_OFFERS: Final = (*LISTENER_ACTS, *ACTS)
OFFERS: Final[Mapping[str, Offer]] = {one.name: one for one in (*RUN_OFFERS, *REQUEST_ACTS)}


def without_copy(selection: Selection) -> Selection:
    """Return the same runs by conditions that every command has: none about `copy`.

    Raises `BadFilter` if there are none.
    """
    if selection.copy.is_empty:
        return selection
    if selection.unverified_for is not None or selection.fewer_than is not None:
        raise BadFilter(
            "unverified-for and fewer-than do not go with host, type, version or status"
        )
    return evolve(selection, has=(*selection.has, selection.copy), copy=CopyPattern())
