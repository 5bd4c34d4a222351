"""Deliver a site's alarms to people: by mail, or by HTTP to Slack, PagerDuty or a program.

`listener` makes one `AlarmManager` for its site, which collects alarms and delivers them to each
sink of the site's ``alarms``. A sink implements `Notifier`. `caxev.core.alarms` defines what an
alarm is and when it is delivered.

An entry point of the group ``caxev.alarms`` adds a kind of sink: a callable that takes the sink's
object in sites.json (without ``name``, ``severity`` and ``repeat``), returns a `Notifier`, and may
raise `ConfigError`.

Why not `apprise`? Version 2.3.0 was tried in place of `email` and `webhook` on local servers. It
has PagerDuty's dedup key and resolve, and checks certificates. But it reads an answer of any size
(400 MB took 785 MB of memory; ours stops at 1 kB), returns no reason for a failure, repeats a mail
to the recipients that have it as long as one other is refused (3 attempts, 3 mails), logs
PagerDuty's key and Slack's address at level DEBUG, leaves ``<!channel>`` in an alarm's text to
notify everybody, rejects a certificate that the machine trusts by ``SSL_CERT_FILE``, replaces our
bearer token by a password from ``~/.netrc``, and posts to PagerDuty's and Slack's own hosts only.
Retries, deadlines and reading secrets again would remain ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Final

from caxev.alarms.base import DeliveryFailed, Notifier
from caxev.alarms.email import EmailNotifier
from caxev.alarms.health import (
    Descriptors,
    Health,
    HealthMonitor,
    descriptors,
    health_alarms,
    lacks_files,
    of_gone_directories,
)
from caxev.alarms.manager import AlarmManager, Recipient, try_send
from caxev.alarms.webhook import WebhookNotifier
from caxev.config import ConfigError, Sink
from caxev.config.alarms import ALARMS, Installed
from caxev.core.errors import one_line

__all__ = [
    "AlarmManager",
    "DeliveryFailed",
    "Descriptors",
    "EmailNotifier",
    "Health",
    "HealthMonitor",
    "Notifier",
    "Recipient",
    "WebhookNotifier",
    "descriptors",
    "health_alarms",
    "lacks_files",
    "of_gone_directories",
    "recipients",
    "try_send",
]

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
