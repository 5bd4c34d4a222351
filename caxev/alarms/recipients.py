"""The recipients of a site's alarms: a notifier for each sink of sites.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

from caxev.alarms.base import Notifier
from caxev.alarms.email import EmailNotifier
from caxev.alarms.manager import Recipient
from caxev.alarms.webhook import WebhookNotifier
from caxev.config import ConfigError, Sink
from caxev.config.alarms import ALARMS, Installed
from caxev.config.plugins import entry_points
from caxev.core.errors import one_line

_OURS: Final[Mapping[str, Callable[[Any], Notifier]]] = {
    "email": EmailNotifier.of,
    "webhook": WebhookNotifier.of,
}


def recipients(site: str, sinks: Iterable[Sink]) -> list[Recipient]:
    """Return a recipient for each sink. Raises `ConfigError` with site, sink and what to do.

    Secrets are read here, so that a missing one is reported at the start.
    """
    return [_recipient(site, sink) for sink in sinks]


def _recipient(site: str, sink: Sink) -> Recipient:
    try:
        make = _maker(sink)
        notifier = make()
    except ConfigError as error:
        raise ConfigError(f"site {site!r}: alarms: {sink.name!r}: {error.summary}") from error
    return Recipient(sink.rule(resolves=notifier.resolves), notifier, make)


def _maker(sink: Sink) -> Callable[[], Notifier]:
    if not isinstance(sink, Installed):
        return partial(_OURS[sink.kind], sink)
    try:
        (point,) = entry_points(group=ALARMS, name=sink.kind)
        return partial(point.load(), sink.options)
    except Exception as error:
        raise ConfigError(f"kind {sink.kind!r} cannot be loaded: {one_line(error)}") from error
