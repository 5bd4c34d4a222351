"""Method ``tsm``: IBM's tape system (TSM, Spectrum Protect, Storage Protect), through ``dsmc``.

Data goes there by ``dsmc incremental``, under the path at which it was staged, which is the folder:
``<dir_tsm>/<run>``. Since staging is removed afterwards, the server may count a file as inactive
by the time that it is wanted: the latest version is taken, active or not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final

from caxev.config.archive import PATIENCE
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.tape.base import Reach, Stored, Talk
from caxev.tape.client import converse
from caxev.tape.output import (
    Said,
    asks,
    backup_problem,
    bytes_sent,
    listing,
    restore_problem,
    session,
)

_FORMATS: Final = ("-dateformat=3", "-timeformat=1", "-numberformat=1")
_REFUSED: Final = frozenset(
    {
        "ANS1035S",  # the options file cannot be read
        "ANS1087E",  # access to the file is denied
        "ANS1217E",  # the server's name is not found in the options
        "ANS1025E",  # the user's name or password is refused
        "ANS1353E",  # the session is rejected: unknown node
    }
)
_HOPELESS: Final = frozenset(
    {
        "ANS1036S",  # an option is not valid
        "ANS1051I",
        "ANS1063E",  # the path is not valid
        "ANS1064E",
        "ANS1302E",  # no objects on server match query
        "ANS1345E",  # no objects on the server match
    }
)
"""Messages about what does not change by itself."""
_FORBIDDEN: Final = frozenset('*?[]{}"\n\r\0')


class Tsm:
    """Tape through ``dsmc``; see `caxev.tape.base.Archive`."""

    def folder(self, reach: Reach, name: str) -> str | None:
        """Return ``<dir_tsm>/<name>``, of the site that runs the client, else of the archive."""
        base = reach.here.dir_tsm or reach.there.dir_tsm
        return None if base is None else f"{base.rstrip('/')}/{name}"

    def put(
        self,
        reach: Reach,
        staged: str,
        folder: str,
        files: Sequence[Stored],
        *,
        again: bool,
        talk: Talk,
    ) -> None:
        """Back up; with `again` also what has not changed since it was backed up."""
        if staged != folder:
            raise GiveUp(f"{staged} would be {staged} on tape, not {folder}")
        for name in (folder, *(one.name for one in files)):
            _plain(name)
        more = ("-absolute",) if again else ()
        began = len(talk.said)
        said = _run(
            reach,
            talk,
            "incremental",
            f"{folder}/",
            *more,
            progress=lambda: bytes_sent(talk.said[began:]),
        )
        if (why := backup_problem(said, len(files))) is not None:
            raise _failed(said, why)

    def get(
        self, reach: Reach, folder: str, files: Sequence[Stored], target: str, talk: Talk
    ) -> None:
        """Restore, through a list of names, into `target`."""
        with tempfile.NamedTemporaryFile("w", prefix="caxev-", suffix=".files") as names:
            for one in files:
                names.write(f'"{_plain(f"{folder}/{one.name}")}"\n')
            names.flush()
            said = _run(
                reach,
                talk,
                "restore",
                f"-filelist={names.name}",
                f"{target}/",
                "-preservepath=none",
                "-followsymbolic=yes",
                "-replace=no",
                "-latest",
                progress=lambda: _size(target),
            )
        if (why := restore_problem(said, len(files))) is not None:
            raise _failed(said, why)

    def listed(self, reach: Reach, folder: str, talk: Talk) -> list[Stored]:
        """Query the files of one folder."""
        found = self._query(reach, talk, f"{_plain(folder)}/*")
        return [stored for directory, stored in found if directory == folder]

    def folders(
        self, reach: Reach, above: Collection[str], talk: Talk
    ) -> Mapping[str, list[Stored]]:
        """Query all that lies below these directories."""
        folders: dict[str, list[Stored]] = {}
        for base in above:
            for directory, stored in self._query(reach, talk, f"{_plain(base)}/*", "-subdir=yes"):
                folders.setdefault(directory, []).append(stored)
        return folders

    def _query(
        self, reach: Reach, talk: Talk, what: str, *more: str
    ) -> Sequence[tuple[str, Stored]]:
        said = _run(reach, talk, "query", "backup", what, "-filesonly", "-inactive", *more)
        try:
            return listing(said)
        except ValueError as exc:
            raise _failed(said, str(exc)) from exc

    def check(self, reach: Reach, talk: Talk) -> str:
        """Ask the server who it is."""
        said = _run(reach, talk, "query", "session")
        try:
            return session(said)
        except ValueError as exc:
            raise _failed(said, str(exc)) from exc


def _plain(path: str) -> str:
    """The path, if it is one that means itself to the client. Raises `GiveUp`."""
    if not path.isprintable() or _FORBIDDEN.intersection(path) or ".." in path.split("/"):
        raise GiveUp(f"dsmc cannot be told of the name {path!a}")
    return path


def _run(reach: Reach, talk: Talk, *words: str, progress: Callable[[], int] | None = None) -> Said:
    options = reach.options
    more = [*_FORMATS]
    if options.server is not None:
        more.append(f"-servername={options.server}")
    if options.optfile is not None:
        more.append(f"-optfile={options.optfile}")
    with tempfile.TemporaryDirectory(prefix="caxev-dsmc-") as directory:  # for its logs
        status, lines = converse(
            [*(options.command or ("dsmc",)), *words, *more],
            talk,
            patience=options.patience or PATIENCE,
            environment={"DSM_LOG": directory, **options.environment},
            directory=directory,
            asks=asks,
            progress=progress,
        )
    return Said.of(status, lines)


def _failed(said: Said, why: str) -> GiveUp | Retry:
    codes = {message.code for message in said.messages}
    if _HOPELESS & codes:
        return GiveUp(why)
    return Denied(why) if _REFUSED & codes else Retry(why)


def _size(directory: str) -> int:
    """Bytes in a directory's files."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total
