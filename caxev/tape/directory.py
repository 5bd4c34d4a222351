"""Method ``directory``: a file system that moves its files to tape itself (HSM), or any other.

The folders are in the archive's ``dir_raw``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from attrs import evolve

from caxev.config import Site
from caxev.core.errors import GiveUp
from caxev.files import confine, copy_file, local, look, printable
from caxev.tape.base import Reach, Stored, Transcript
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
        transcript: Transcript,
    ) -> None:
        """Copy everything that is staged; with `again` existing files are removed first."""
        del files
        route = Route(
            _with(reach.here, staged),
            # A hard link would share its bytes with the source: no second copy at all.
            evolve(reach.there, hard_links=False),
            staged,
            folder,
            min_free=reach.there.min_free,
            again=again,
        )
        Local().push(route, report=lambda done, _total: transcript.at(done))

    def get(
        self,
        reach: Reach,
        folder: str,
        files: Sequence[Stored],
        target: str,
        transcript: Transcript,
    ) -> None:
        """Copy the files one by one."""
        real = confine(folder, reach.there.roots)
        for one in files:
            source = os.fsencode(os.path.join(real, one.name))
            with local(source, "read"):
                try:
                    copy_file(source, os.fsencode(os.path.join(target, one.name)))
                except FileNotFoundError as exc:
                    raise GiveUp(f"{printable(source)} is not there") from exc
            transcript.at(transcript.done + one.size)

    def listed(self, reach: Reach, folder: str, transcript: Transcript) -> list[Stored]:
        """List one folder."""
        del transcript
        real = confine(folder, reach.there.roots)
        if not os.path.isdir(real):
            return []
        return [Stored(os.fsdecode(s.path), s.size) for s in look(real) if s.kind == "file"]

    def folders(
        self, reach: Reach, above: Collection[str], transcript: Transcript
    ) -> Mapping[str, list[Stored]]:
        """List all folders, which are in one directory."""
        del above
        base = reach.there.dir_raw
        if base is None or not os.path.isdir(base):
            raise GiveUp(f"{reach.there.name} has no dir_raw that is there")
        names = sorted(entry.name for entry in os.scandir(base) if entry.is_dir())
        paths = [f"{base.rstrip('/')}/{name}" for name in names if not name.startswith(".")]
        return {path: self.listed(reach, path, transcript) for path in paths}

    def check(self, reach: Reach, transcript: Transcript) -> str:
        """Check the directory."""
        del transcript
        return Local().check(reach.here, reach.there)


def _with(site: Site, staged: str) -> Site:
    """Return the site with the staging directory as one of its own."""
    return evolve(site, dir_raw=os.path.dirname(staged))
