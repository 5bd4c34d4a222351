"""How people are told of alarms.

`listener` makes one `Desk` for its site, where alarms come together and from which each sink of the
site's ``alarms`` is told; `Notifier` is what a sink must be able to do. What an alarm is, and when
whom to tell, `caxev.core.alarms` says.

A kind of one's own is named by an entry point of the group ``caxev.alarms``: a callable that
takes what stands in sites.json (without ``name``, ``severity`` and ``repeat``) and returns a
`Notifier`. It may raise `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Final

from caxev.alarms.base import Notifier, Undelivered
from caxev.alarms.email import Mail
from caxev.alarms.health import (
    Descriptors,
    Pulse,
    Vitals,
    ailments,
    descriptors,
    gone_directories,
    lacks_files,
)
from caxev.alarms.manager import Addressee, Desk, attempted
from caxev.alarms.webhook import Hook
from caxev.config import ConfigError, Sink
from caxev.config.alarms import ALARMS
from caxev.core.errors import one_line

__all__ = [
    "Addressee",
    "Descriptors",
    "Desk",
    "Hook",
    "Mail",
    "Notifier",
    "Pulse",
    "Undelivered",
    "Vitals",
    "addressees",
    "ailments",
    "attempted",
    "descriptors",
    "gone_directories",
    "lacks_files",
]

_OURS: Final[Mapping[str, Callable[[Any], Notifier]]] = {"email": Mail.of, "webhook": Hook.of}


def addressees(site: str, sinks: Iterable[Sink]) -> list[Addressee]:
    """Make what tells each of these sinks. Raises `ConfigError` naming site, sink and what to do.

    Secrets are looked for here, so that one that is missing is found at the start.
    """
    return [_addressee(site, sink) for sink in sinks]


def _addressee(site: str, sink: Sink) -> Addressee:
    try:
        make = partial(_OURS.get(sink.kind) or _foreign(sink.kind), sink.options)
        notifier = make()
    except ConfigError as error:
        raise ConfigError(f"site {site!r}: alarms: {sink.name!r}: {error.summary}") from error
    return Addressee(sink.rule(resolves=notifier.resolves), notifier, make)


def _foreign(kind: str) -> Callable[[Any], Notifier]:
    try:
        (point,) = entry_points(group=ALARMS, name=kind)
        make: Callable[[Any], Notifier] = point.load()
    except Exception as error:
        raise ConfigError(f"kind {kind!r} cannot be loaded: {one_line(error)}") from error
    return make
