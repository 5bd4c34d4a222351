"""The types of options' values: what the shell completes, and what is refused as unknown.

A misspelt value must not look like an empty result: it is an error that names the nearest known
one, in every command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from caxev.cli.options import GlobalOptions
from caxev.config import BY_METHOD, ConfigError, load_handlers
from caxev.config.data_types import CAX, DataTypes
from caxev.config.errors import known_names
from caxev.core import model
from caxev.core.clock import utcnow
from caxev.core.history import What
from caxev.core.moments import is_length, moment_at, read_length, read_moment
from caxev.core.registry import recorded
from caxev.core.selection import CONDITIONS, MOST, CopyPattern, SelectionError

_COMPLETION: Final = 2.0
_PATIENCE: Final = 10.0
"""Seconds to wait for the database's known values, in a completion and in a command."""


class Read(click.ParamType):  # type: ignore[type-arg]  # not generic in older clicks
    """A value that `read` makes of a text; its ValueError becomes click's error."""

    def __init__(self, name: str, read: Callable[[str], object]) -> None:
        self.name = name
        self.read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value. Raises click's error."""
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _moment(text: str) -> datetime:
    return moment_at(read_moment(text), utcnow())


def _time(text: str) -> datetime:
    if is_length(text):
        raise ValueError(f"{text!r} is no time: write 2026-12-24 or 2026-12-24T18:00")
    return _moment(text)


class Known(click.ParamType):  # type: ignore[type-arg]  # not generic in older clicks
    """A text with completion: `values` returns candidates for the options given so far.

    `check` raises an error for a value that nobody knows; it is called when all options are read.
    """

    def __init__(
        self,
        name: str,
        values: Callable[[GlobalOptions], Iterable[str]] = lambda _options: (),
        check: Callable[[GlobalOptions, str], object] | None = None,
    ) -> None:
        self.name = name
        self.values = values
        self.check = check

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the values that begin with what was typed; none if anything fails."""
        del param
        with suppress(Exception):  # a message would break into the line that the user types
            known = self.values(ctx.find_root().ensure_object(GlobalOptions))
            return [CompletionItem(one) for one in sorted({*known}) if one.startswith(incomplete)]
        return []


class ConditionType(Known):
    """A value of the condition `name` of `caxev.core.selection`: refused unless it can be read."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text. Raises click's error."""
        try:
            CONDITIONS[self.name].read_all([value])
        except SelectionError as error:
            self.fail(str(error), param, ctx)
        return str(value)


def check_known(context: click.Context) -> None:
    """Raise an error for the first value of a command's options that nobody knows."""
    options = context.find_root().ensure_object(GlobalOptions)
    for parameter in context.command.params:
        check = getattr(parameter.type, "check", None)
        value = context.params.get(parameter.name or "")
        for one in value if isinstance(value, tuple) else (value,):
            if check is not None and one is not None:
                check(options, one)


def _handlers(options: GlobalOptions) -> Iterable[str]:
    """Return the names and aliases of all sites' handlers."""
    modules: set[str] = set()
    with suppress(ConfigError):  # without sites.json there are those that come with caxev
        modules = {module for site in options.sites().values() for module in site.handlers}
    # The handlers of all sites: the command may name another site than this machine's.
    load_handlers((*BY_METHOD, *sorted(modules)), options.handlers)
    return [name for handler in recorded for name in (handler.name, *handler.aliases)]


def known_values(options: GlobalOptions, path: str, patience: float = _PATIENCE) -> list[str]:
    """Return the texts that runs have in a field. Reads every run, or an index. Blocks."""
    from caxev.database.blocking import known_values as known

    return known(options.settings(), path, patience)


def _check_status(options: GlobalOptions, status: str) -> None:
    # cax and Rucio have statuses of their own: ask the database before refusing one.
    if status not in _STATUSES:
        known = dict.fromkeys([*_STATUSES, *known_values(options, "data.status")])
        _require(status, [*known], "no copy has the status")


def _check_host(options: GlobalOptions, host: str) -> None:
    sites = options.sites()
    # The database may have copies at hosts that sites.json no longer names.
    if host not in sites and host not in known_values(options, "data.host"):
        sites.get(host)  # raises an error that names the nearest


def _check_not_tag(options: GlobalOptions, tag: str) -> None:
    # A misspelt tag that runs must lack would not show: all of them lack it.
    _require(tag, sorted(known_values(options, "tags.name")), "no run has the tag")


def _require(value: str, known: Sequence[str], words: str) -> None:
    if value not in known:
        raise click.UsageError(f"{words} {value!r} {known_names(value, known)}")


def _check_pattern(options: GlobalOptions, text: str) -> None:
    pattern = CopyPattern.read(text)
    if pattern.type is not None:
        _check_type(options, pattern.type)
    if pattern.host is not None:
        _check_host(options, pattern.host)
    if pattern.status is not None:
        _check_status(options, pattern.status)
    if pattern.version is not None:
        _check_version(options, pattern.version)


def _check_version(options: GlobalOptions, version: str) -> None:
    _require(version, sorted(known_values(options, "data.pax_version")), "no copy has the version")


def types_of(options: GlobalOptions) -> DataTypes:
    """Return the types of data of sites.json; if it cannot be read, those of cax."""
    with suppress(ConfigError):
        return options.sites().types
    return CAX


def _check_type(options: GlobalOptions, name: str) -> None:
    _require(name, types_of(options).known, "there is no type")


def _patterns(options: GlobalOptions) -> Iterable[str]:
    return [f"{kind}@{site}" for kind in types_of(options).by_name for site in options.sites()]


_STATUSES: Final = (
    model.REQUESTED,
    model.TRANSFERRING,
    model.VERIFYING,
    model.TRANSFERRED,
    model.ERROR,
    model.DELETING,
    model.MOVING,
)
_EVENTS: Final = [one.value for one in What]
_PATHS: Final = {"detector": "detector", "source": "source.type"}
"""The fields whose values the shell completes from the runs."""


def condition_type(name: str) -> ConditionType:
    """Return the type of the values of a condition."""
    path = _PATHS.get(name)
    if path is None:
        return ConditionType(name)
    return ConditionType(name, lambda known: known_values(known, path, _COMPLETION))


RUN_NUMBER: Final = click.IntRange(1, MOST)
MOMENT: Final = Read("time", _moment)
"""A time, UTC: ``2016-11-11``, ``2016-11-11T14:34``, or ``7d`` (ago)."""
TIME: Final = Read("time", _time)
"""A time, UTC, and not how long ago it was."""
LENGTH: Final = Read("length", read_length)
"""A length of time such as ``36h``, ``14d`` or ``2w``."""
WHAT: Final = Known(
    "event",
    lambda _options: _EVENTS,
    lambda _options, one: _require(one, _EVENTS, "there is no event"),
)
SITE: Final = Known("site", lambda known: known.sites(), lambda known, one: known.sites().get(one))
PLACE: Final = Known("site", lambda known: known.sites())
"""A site, or something else."""
HOST: Final = Known("host", lambda known: known.sites(), _check_host)
HANDLER: Final = Known("handler", _handlers)
TAG: Final = ConditionType("tag", lambda known: known_values(known, "tags.name", _COMPLETION))
NOT_TAG: Final = ConditionType("not-tag", TAG.values, _check_not_tag)
PATTERN: Final = ConditionType("has", _patterns, _check_pattern)
"""A copy that a run must have, or lack."""
STATUS: Final = Known("status", lambda _options: _STATUSES, _check_status)
VERSION: Final = Known(
    "version", lambda known: known_values(known, "data.pax_version", _COMPLETION), _check_version
)
DATA_TYPE: Final = Known("type", lambda known: types_of(known).known, _check_type)
