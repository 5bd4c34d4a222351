"""Render templates as HTML, with values from the database as text.

Names are any bytes: each value is escaped twice, what is not printable as people read it in a
terminal, and what means something in HTML. Lengths are limited, so that no name can push a page
aside.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from hashlib import blake2b
from typing import Any, Final, TypeAlias
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from caxev import __version__
from caxev.core.amounts import lasting, size
from caxev.core.escapes import escaped
from caxev.core.model import (
    DELETING,
    ERROR,
    MOVING,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    RunId,
)
from caxev.database import id_text
from caxev.web import drawing
from caxev.web.acts.command_line import typed

Parts: TypeAlias = dict[str, str]
"""The parts of a view as HTML, by the ids of their elements."""

LONGEST: Final = 160
"""Characters of a text that are shown..."""
LONGEST_LINE: Final = 2000
"""...and of a line of a document."""

MARKS: Final = {
    TRANSFERRED: ("good", "check"),
    VERIFYING: ("busy", "lens"),
    TRANSFERRING: ("busy", "arrow"),
    MOVING: ("busy", "arrow"),
    REQUESTED: ("wait", "clock"),
    DELETING: ("wait", "bin"),
    ERROR: ("bad", "cross"),
    "done": ("good", "check"),
    "running": ("busy", "arrow"),
    "pending": ("wait", "clock"),
    "sent": ("wait", "clock"),
    "failed": ("bad", "cross"),
    "critical": ("bad", "cross"),
    "warning": ("warn", "warn"),
    "deleted": ("off", "bin"),
    "verified": ("good", "check"),
    "repaired": ("good", "check"),
    "found damaged": ("bad", "cross"),
    "begun": ("busy", "arrow"),
}
"""The colour and the icon of each status."""
LIGHTS: Final = {"good": "check", "warn": "warn", "bad": "cross", "off": "dash"}


def shown(value: object, longest: int = LONGEST) -> str:
    """Return a value as text that is printable and not too long."""
    text = escaped(str(value))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _finalize(value: Any) -> Any:
    if value is None:
        return Markup('<span class="none">&ndash;</span>')
    return value if isinstance(value, Markup | jinja2.Undefined) else shown(value)


def time(moment: datetime | None) -> Markup | None:
    """Return a time: UTC, to the second, which the browser shows as "12 s ago"."""
    if moment is None:
        return None
    utc = moment.astimezone(UTC)
    text = f"{utc:%Y-%m-%d %H:%M:%S}"
    return Markup('<time datetime="{}Z" title="{} UTC">{}</time>').format(
        f"{utc:%Y-%m-%dT%H:%M:%S}", text, text
    )


def date(moment: datetime | None) -> Markup | None:
    """Return a time long ago: the date itself, UTC, to the minute."""
    return _fixed(moment, "%Y-%m-%d %H:%M")


def stamp(moment: datetime | None) -> Markup | None:
    """Return a time in a history: date and time, UTC, to the second."""
    return _fixed(moment, "%Y-%m-%d %H:%M:%S")


def _fixed(moment: datetime | None, form: str) -> Markup | None:
    if moment is None:
        return None
    utc = moment.astimezone(UTC)
    return Markup('<time datetime="{}Z" data-fixed="yes">{}</time>').format(
        f"{utc:%Y-%m-%dT%H:%M:%S}", f"{utc:{form}}"
    )


def mark(status: object) -> tuple[str, str]:
    """Return the colour and the icon of a status."""
    return MARKS.get(str(status), ("off", "dash"))


def icon(name: str) -> Markup:
    """Return an icon of the sprite; the text beside it has the same meaning."""
    return Markup(
        '<svg class="icon" aria-hidden="true" focusable="false">'
        '<use href="/static/icons.svg#{}"></use></svg>'
    ).format(name)


def element_id(*parts: object) -> str:
    """Return an id for an element that is about something whose name may be any text."""
    name = "\0".join(str(part) for part in parts)
    return "x" + blake2b(name.encode("utf-8", "backslashreplace"), digest_size=6).hexdigest()


def segment(value: object) -> Markup:
    """Return a text as one part of a path, in its whole length."""
    return Markup(quote(str(value).encode("utf-8", "surrogateescape"), safe=""))  # noqa: S704


def run_path(run: RunId) -> str:
    """Return a run's id as addresses have it."""
    return str(run) if type(run).__name__ == "ObjectId" else id_text(run)


def run_segment(run: RunId) -> Markup:
    """Return a run's id as one part of a path."""
    return segment(run_path(run))


def plain(value: Any) -> Any:
    """Return what JSON has no form for: times as UTC, all else as text."""
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
    return str(value)


def number(value: int | None) -> str | None:
    """Return a whole number with commas between thousands."""
    return None if value is None else f"{value:,}"


@cache
def environment() -> jinja2.Environment:
    """Return the templates, with what they use."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("caxev.web"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    made.filters.update(
        time=time,
        shown=shown,
        typed=typed,
        stamp=stamp,
        date=date,
        size=size,
        lasting=lasting,
        mark=mark,
        segment=segment,
        whole=escape,
        number=number,
        run_segment=run_segment,
    )
    made.globals.update(
        icon=icon, element_id=element_id, version=__version__, lights=LIGHTS, bar=drawing.bar
    )
    return made


def render(template: str, **values: Any) -> str:
    """Return a template with these values, as HTML."""
    return environment().get_template(template).render(values)


def lines(text: str) -> Markup:
    """Return a text of several lines, each printable, escaped for HTML."""
    return Markup("\n").join(shown(line, LONGEST_LINE) for line in text.splitlines())
