"""The names of a run's data in the catalogue. Pure.

A copy of a run is one dataset in a scope of that run. A container holds the run's datasets, and a
container for each science run holds those::

    xe1t_SR001:xe1t_SR001_data                       the science run
      xe1t_SR001:xe1t_SR001_170301_1200_tpc          the run
        xe1t_SR001_170301_1200_tpc:raw               its raw data, the files of which are in
        xe1t_SR001_170301_1200_tpc:<path of a file>  the same scope
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

from attrs import frozen

from caxev.config import Catalogue
from caxev.core.errors import GiveUp
from caxev.core.model import CopyKey, Run

_RUN_NAME: Final = re.compile(r"\d{6}_\d{4}")
_NAME: Final = re.compile(r"[A-Za-z0-9][/A-Za-z0-9._-]*")
LONGEST: Final = 250
"""Maximum length of a name, by Rucio's usual schema."""


class Did(NamedTuple):
    """A data identifier: a file, a dataset or a container by its scope and name."""

    scope: str
    name: str

    def __str__(self) -> str:
        return f"{self.scope}:{self.name}"

    @classmethod
    def of(cls, location: str | None) -> Did:
        """Read an entry's ``scope:name``. Raises `GiveUp`."""
        scope, _, name = (location or "").partition(":")
        if not scope or not name or ":" in name:
            raise GiveUp(f"{location!r} is no place in a catalogue: it is not scope:dataset")
        return cls(scope, name)


@frozen
class CopyNames:
    """The names of one copy: its dataset, the run's container, and that of the science run."""

    dataset: Did
    run: Did
    period: Did
    campaign: str

    def file(self, path: bytes) -> Did:
        """Return the name of a file of the copy. Raises `GiveUp` if no catalogue can hold it."""
        try:
            name = path.decode("ascii")
        except UnicodeDecodeError:
            name = ""
        if len(name) > LONGEST or not _NAME.fullmatch(name):
            raise GiveUp(f"a catalogue can hold no file named {path!r}")
        return Did(self.dataset.scope, name)


def names_of(
    run: Run, key: CopyKey, catalogue: Catalogue, location: str | None = None
) -> CopyNames:
    """Return the names of a copy of this type and version. Raises `GiveUp` without a run's time.

    One that has a `location` keeps its dataset.
    """
    taken = taken_at(run)
    if taken is None:
        raise GiveUp(f"{run} has no start and no name like 161111_1434: it can have no scope")
    begun = (one for one in catalogue.periods if one.begins is None or one.begins <= taken)
    campaign = [one.name for one in begun][-1]  # the science run that has begun last
    # A scope must follow Rucio's schema: an odd name is replaced by the start time.
    name = run.name if _RUN_NAME.fullmatch(run.name) else f"{taken:%y%m%d_%H%M}"
    detector = catalogue.detectors.get(run.detector, run.detector) or "tpc"
    basic = f"{catalogue.experiment}_{campaign}"
    scope = f"{basic}_{name}_{detector}"
    dataset = key.type if key.version is None else f"{key.type}_pax_{key.version}"
    known = Did(scope, dataset) if location is None else Did.of(location)
    return CopyNames(known, Did(basic, known.scope), Did(basic, f"{basic}_data"), campaign)


def taken_at(run: Run) -> datetime | None:
    """Return when the run was started, UTC: by its ``start``, else by its name."""
    if run.start is not None:
        return run.start.astimezone(UTC)
    try:
        return datetime.strptime(run.name, "%y%m%d_%H%M").replace(tzinfo=UTC)
    except ValueError:
        return None
