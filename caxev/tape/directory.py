"""Method ``directory``: a file system that keeps its files on tape by itself (HSM), or any other.

The folders lie in the archive's ``dir_raw``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from attrs import evolve

from caxev.config import Site
from caxev.core.errors import GiveUp
from caxev.files import confine, copy_file, local, look, printable
from caxev.tape.base import Reach, Stored, Talk
from caxev.transfer import Route
from caxev.transfer.local import Local


class Directory:
    """A directory as an archive; see `caxev.tape.base.Archive`."""

    def folder(self, reach: Reach, name: str) -> str | None:
        """Return ``<dir_raw>/<name>`` of the archive."""
        base = reach.there.dir_raw
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
        """Copy all that is staged; with `again` what is there is taken away first."""
        del files
        route = Route(
            _with(reach.here, staged),
            evolve(reach.there, hard_links=False),
            staged,
            folder,
            min_free=reach.there.min_free,
            again=again,
        )
        Local().push(route, report=lambda done, _total: talk.at(done))

    def get(
        self, reach: Reach, folder: str, files: Sequence[Stored], target: str, talk: Talk
    ) -> None:
        """Copy file by file."""
        real = confine(folder, reach.there.roots)
        for one in files:
            source = os.fsencode(os.path.join(real, one.name))
            with local(source, "read"):
                try:
                    copy_file(source, os.fsencode(os.path.join(target, one.name)))
                except FileNotFoundError as exc:
                    raise GiveUp(f"{printable(source)} is not there") from exc
            talk.at(talk.done + one.size)

    def listed(self, reach: Reach, folder: str, talk: Talk) -> list[Stored]:
        """Look into one folder."""
        del talk
        real = confine(folder, reach.there.roots)
        if not os.path.isdir(real):
            return []
        return [Stored(os.fsdecode(s.path), s.size) for s in look(real) if s.kind == "file"]

    def folders(
        self, reach: Reach, above: Collection[str], talk: Talk
    ) -> Mapping[str, list[Stored]]:
        """Look into all folders, which lie in one directory."""
        del above
        base = reach.there.dir_raw
        if base is None or not os.path.isdir(base):
            raise GiveUp(f"{reach.there.name} has no dir_raw that is there")
        names = sorted(entry.name for entry in os.scandir(base) if entry.is_dir())
        paths = [f"{base.rstrip('/')}/{name}" for name in names if not name.startswith(".")]
        return {path: self.listed(reach, path, talk) for path in paths}

    def check(self, reach: Reach, talk: Talk) -> str:
        """Say which directory it is."""
        del talk
        return Local().check(reach.here, reach.there)


def _with(site: Site, staged: str) -> Site:
    """The site, so that what is staged lies in one of its directories."""
    return evolve(site, dir_raw=os.path.dirname(staged))
