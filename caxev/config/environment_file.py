"""The service's settings for commands given by hand: /etc/caxev/caxev.env.

systemd gives the file to a listener as ``EnvironmentFile=``. A command that a person gives falls
back to it, as it does to /etc/caxev/sites.json.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Final

from caxev.config.settings import URI
from caxev.core.errors import ConfigError
from caxev.limited import SECRET, read_limited

PLACE: Final = Path("/etc/caxev/caxev.env")
_OURS: Final = re.compile(r"(CAXEV|MONGO)_[A-Z0-9_]+")
_OF_DATABASE: Final = re.compile(r"MONGO_.*|CAXEV_(MONGO_.*|DATABASE|COLLECTION)")
"""The names of variables that are about one database, and about no other."""


def use_environment_file(
    *, own_database: bool, environ: MutableMapping[str, str] | None = None, file: Path | None = None
) -> None:
    """Set those variables of the service's file that are not set; none if it cannot be read.

    If the user names another database (`own_database`, or by the environment), everything about
    the service's is left out: its password must not be offered to another server. Raises
    `ConfigError` for a line that is no assignment; no message shows a value.
    """
    environ = os.environ if environ is None else environ
    file = PLACE if file is None else file
    try:
        text = read_limited(file, SECRET).decode()
    except OSError:
        return  # it is missing, or for the service's user alone
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    skipped = own_database or bool(environ.get(URI))
    for name, value in _assignments(file, text):
        if _OURS.fullmatch(name) and not (skipped and _OF_DATABASE.fullmatch(name)):
            environ.setdefault(name, value)


def _assignments(file: Path, text: str) -> Iterator[tuple[str, str]]:
    """Return names and values, as both systemd and a shell read them: one in a line."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(("#", ";")):
            continue
        try:
            (word,) = shlex.split(line)
            name, found, value = word.partition("=")
        except ValueError:  # an open quote, or several words; the error may show a secret
            found = ""
        if not found:
            raise ConfigError(f"{file}, line {number}: it should be NAME=value or NAME='value'")
        yield name, value
