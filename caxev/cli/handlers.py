"""Run ``caxev handlers``: list the handlers, what triggers them, and which sites enable them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from caxev.cli.command import command
from caxev.cli.options import options
from caxev.cli.output import Column, columns, show
from caxev.cli.values import SITE
from caxev.config import BY_METHOD, DEFAULT_HANDLERS, ConfigError, Sites, load_handlers
from caxev.core.registry import (
    CopyFieldTrigger,
    CopyTrigger,
    FieldTrigger,
    Handler,
    TagTrigger,
    Trigger,
    by_name,
    recorded,
)


@command("caxev handlers", "caxev handlers --site lngs --handlers my_handlers.py")
@click.option("--site", type=SITE, help="Include this site's own handlers.")
def handlers(*, site: str | None) -> None:
    """List the handlers: what triggers each, and what it does.

    With --site, also the site's own handlers, and which of all it enables.
    """
    if site is not None:
        registry = options().registry(site)
        rows = [_handler_row(one, one in registry.enabled) for one in registry.handlers.values()]
    else:
        rows = [_handler_row(one, None) for one in _all_handlers(options().handlers)]
    columns = _HANDLERS if site is None else (*_HANDLERS, Column("enabled", "ENABLED"))
    show(columns, rows, empty="there are no handlers")


def handlers_by_site(files: Iterable[str], known: Sites) -> list[dict[str, Any]]:
    """Return a row for each handler, with the `sites` that enable it."""
    here = {site.name: known.here(site.name) for site in known.values() if site.listener}
    return [
        {
            **_handler_row(one, None),
            "sites": [name for name, site in here.items() if site.wants(one)],
        }
        for one in _all_handlers(files)
    ]


def _all_handlers(files: Iterable[str]) -> list[Handler]:
    load_handlers(BY_METHOD, files, default=DEFAULT_HANDLERS)
    try:
        return list(by_name(recorded).values())
    except ValueError as error:
        raise ConfigError(str(error)) from error


_HANDLERS = columns(
    "handler",
    Column("lane", minor=1),
    "triggers",
    Column("aliases", minor=2),
    Column("module", minor=3),
    "does",
)


def _handler_row(handler: Handler, enabled: bool | None) -> dict[str, Any]:
    return {
        "handler": handler.name,
        "lane": handler.lane,
        "triggers": [in_words(trigger) for trigger in handler.triggers],
        "aliases": list(handler.aliases),
        "module": handler.module,
        "does": handler.summary,
        "enabled": enabled,
    }


def in_words(trigger: Trigger) -> str:
    """Return a trigger in words: ``raw copy here becomes transferred``."""
    match trigger:
        case CopyTrigger(status=status, type=type_, host=host):
            return f"{_copy(type_, host)} is {_either(status)}"
        case CopyFieldTrigger(name, type_, host, gone):
            how = "is removed" if gone else "is set or changed"
            return f"{_either(name)} of {_copy(type_, host)} {how}"
        case FieldTrigger(path):
            return f"field {_either(path)} is set or changed"
        case TagTrigger(name=name, gone=gone):
            which = "any tag" if "*" in name else f"tag {_either(name)}"
            return f"{which} is {'removed' if gone else 'added'}"
        case _:
            return "the run is new"


def _copy(kinds: Iterable[str], hosts: Iterable[str]) -> str:
    where = f" at {_either(hosts)}" if hosts else ""
    where = where.replace(" at here", " here").replace(" at elsewhere", " elsewhere")
    return f"{_either(kinds)} copy{where}".lstrip()


def _either(names: Iterable[str]) -> str:
    return " or ".join(sorted(name.strip("<>") for name in names))
