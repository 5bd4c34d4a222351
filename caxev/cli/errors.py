"""Report errors as one line on stderr and an exit code.

Every exception of a command ends here. A traceback is shown only at ``--log-level debug``.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import click

from caxev.core.errors import Ambiguous, ConfigError, GiveUp, NoSuchRun, NothingToDo, Retry
from caxev.core.escapes import escaped

FAILED: Final = 1
USAGE: Final = 2  # click's own
CONFIGURATION: Final = 3
DATABASE: Final = 4
NO_SUCH_RUN: Final = 5
INTERRUPTED: Final = 130

EPILOG: Final = """\b
Exit codes:
  0    done
  1    something failed, or nothing was found
  2    the command line is wrong
  3    the configuration is wrong: sites.json, a site's or handler's name, an address
  4    the database: unreachable, denies access, is not a replica set, or of a newer caxev
  5    no such run
  130  interrupted
  143  ended by SIGTERM; a listener only by the second one
"""


@contextmanager
def report_errors(*, debug: Callable[[], bool]) -> Iterator[None]:
    """Turn an exception of the block into a line on stderr and an exit code."""
    try:
        yield
    except click.UsageError as usage:
        if isinstance(usage, click.exceptions.NoArgsIsHelpError):  # it prints the help by itself
            raise
        command = usage.ctx.command_path if usage.ctx is not None else "caxev"
        line = re.sub(r"(?<!\.)\.$", "", _line(usage.format_message()))  # but not of "..."
        click.echo(f"caxev: {line} (see {command} --help)", err=True)
        raise click.exceptions.Exit(usage.exit_code) from None
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise  # click has its own messages and exit codes for these
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as raised:  # noqa: BLE001  # the last
        error = leaf(raised)
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise error from None  # click ends quietly if the reader of a pipe has gone
        if debug():
            from loguru import logger

            logger.opt(exception=raised).debug("where it happened")
        line, code = meaning(error)
        if line:
            with suppress(OSError):  # stderr may be closed; the exit code remains
                click.echo(f"caxev: {line}", err=True)
        raise click.exceptions.Exit(code) from None


def leaf(error: BaseException) -> BaseException:
    """Return the first error inside the exception groups of trio's nurseries."""
    # One line has room for one error, and the others mostly follow from the first.
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def meaning(error: BaseException) -> tuple[str, int]:
    """Return the line about this error for a person, and the exit code."""
    if isinstance(error, KeyboardInterrupt):  # the user knows
        return "", INTERRUPTED
    if isinstance(error, ConfigError):
        return _line(error.summary), CONFIGURATION
    if isinstance(error, NoSuchRun):
        return _line(str(error)), NO_SUCH_RUN
    if isinstance(error, Ambiguous):
        return _line(str(error)), USAGE
    if isinstance(error, NothingToDo | GiveUp | Retry):
        return _line(str(error)), FAILED
    if _is_database_error(error):
        return _line(str(error)), DATABASE
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _line(f"{where}{error.strerror}"), FAILED
    return (
        f"unexpected {type(error).__name__}: {_line(str(error))}; --log-level debug shows where",
        FAILED,
    )


def _is_database_error(error: BaseException) -> bool:
    # An exception can only come from a module that is imported already. Importing the module here
    # would take longer than most commands do.
    return any(
        (cls.__module__, cls.__name__) == ("caxev.database.client", "DatabaseError")
        for cls in type(error).__mro__
    )


def _line(text: str) -> str:
    return escaped(" ".join(text.split()))
