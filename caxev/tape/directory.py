"""Method ``directory``: a file system that moves its files to tape itself (HSM), or any other.

The folders are in the archive's ``dir_raw``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from attrs import evolve

from caxev.core.errors import GiveUp
from caxev.files import confine, confine_own, join, local, look, printable
from caxev.files.incoming import copy_file
from caxev.files.roots import check_root
from caxev.tape.base import Archive, Stored
from caxev.transfer import Route
from caxev.transfer.local import Local


class Directory(Archive):
    """A directory as an archive."""

    def folder(self, name: str) -> str | None:
        """Return ``<dir_raw>/<name>`` of the archive."""
        base = self.reach.there.dir_raw
        return None if base is None else f"{base.rstrip('/')}/{name}"

    def put(self, staged: str, folder: str, files: Sequence[Stored], *, again: bool) -> None:
        """Copy everything that is staged; with `again` existing files are removed first."""
        del files
        here, there = self.reach.here, self.reach.there
        route = Route(
            evolve(here, dir_raw=os.path.dirname(staged)),
            # A hard link would share its bytes with the source: no second copy at all.
            evolve(there, hard_links=False),
            staged,
            folder,
            min_free=there.min_free,
            again=again,
        )
        Local().push(route, report=lambda done, _total: self.transcript.at(done))

    def get(self, folder: str, files: Sequence[Stored], target: str) -> None:
        """Copy the files one by one."""
        real = confine(folder, self.reach.there.roots)
        for one in files:
            source = join(real, os.fsencode(one.name))
            new = confine_own(os.path.join(target, one.name), [target])
            with local(source, "read"):
                try:
                    copy_file(source, new)
                except FileNotFoundError as exc:
                    raise GiveUp(f"{printable(source)} is not there") from exc
            self.transcript.at(self.transcript.done + one.size)

    def listed(self, folder: str) -> list[Stored]:
        """List one folder."""
        real = confine(folder, self.reach.there.roots)
        if not os.path.isdir(real):
            return []
        return [Stored(os.fsdecode(s.path), s.size) for s in look(real) if s.kind == "file"]

    def folders(self, above: Collection[str]) -> Mapping[str, list[Stored]]:
        """List all folders, which are in one directory."""
        del above
        there = self.reach.there
        if there.dir_raw is None:
            raise GiveUp(f"{there.name} has no dir_raw")
        base = next(root for root in there.roots if root == there.dir_raw)
        check_root(base)
        names = sorted(entry.name for entry in os.scandir(base) if entry.is_dir())
        paths = [f"{base.rstrip('/')}/{name}" for name in names if not name.startswith(".")]
        return {path: self.listed(path) for path in paths}

    def check(self) -> str:
        """Check the directory."""
        return Local().check(self.reach.here, self.reach.there)
