"""Logging: one place that decides where it goes and how it looks.

Modules log with loguru's ``logger``; the standard library's logging (pymongo, asyncssh) is caught
here. Each attempt at a reaction is logged with its run, its event and its handler.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from loguru import logger

if TYPE_CHECKING:
    from loguru import Record

ROTATE_AT: Final = "20 MB"
KEEP: Final = 10

_CONTEXT: Final = ("site", "handler", "run", "event")


class _Caught(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level: str | int = record.levelname
        try:
            logger.level(record.levelname)
        except ValueError:
            level = record.levelno
        logger.opt(exception=record.exc_info).log(level, "{}: {}", record.name, record.getMessage())


def _format(record: Record) -> str:
    context = " ".join(f"{{extra[{name}]}}" for name in _CONTEXT if name in record["extra"])
    middle = f"<cyan>{context}</cyan> | " if context else ""
    return (
        "<green>{time:YYYY-MM-DD HH:mm:ss.SSS!UTC}</green> <level>{level: <7}</level> "
        + middle
        + "{message}\n{exception}"
    )


def configure(level: str, *, file: str | None = None, as_json: bool = False) -> None:
    """Log to stderr and, where `file` is given, to that file too, which is rotated.

    Variables are never shown in tracebacks: they may hold a password.
    """
    logger.remove()
    common: dict[str, Any] = {
        "level": level,
        "format": "{message}" if as_json else _format,
        "serialize": as_json,
        "backtrace": False,
        "diagnose": False,
    }
    # loguru itself colours what goes to a terminal, whatever NO_COLOR says.
    colours = False if os.environ.get("NO_COLOR") else None
    logger.add(sys.stderr, colorize=colours, **common)
    if file is not None:
        logger.add(file, rotation=ROTATE_AT, retention=KEEP, **common)
    logging.basicConfig(handlers=[_Caught()], level=logging.WARNING, force=True)
