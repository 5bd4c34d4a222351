"""Orders to a catalogue, and their outcomes: plain values that cross to worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from attrs import field, frozen

from caxev.config import Site
from caxev.files import Manifest
from caxev.rucio.changes import ENDED, RuleState, Wishes
from caxev.rucio.files import Checked
from caxev.rucio.names import CopyNames, Did


@frozen
class Upload:
    """A copy at `location` of the site `here`, to be brought into the catalogue `there`.

    `manifest` is the digest that it must have; if it is None, `checksum` (cax's SHA-512) must
    fit. `metadata` goes to the dataset.
    """

    here: Site
    there: Site
    names: CopyNames
    location: str
    manifest: str | None
    checksum: str | None
    metadata: Mapping[str, Any] = field(factory=dict)


@frozen
class DatasetState:
    """The state of a dataset: RSEs that have all of it, and the rules, ended ones included.

    `done` is what was changed, in words.
    """

    rses: tuple[str, ...] = ()
    rules: tuple[RuleState, ...] = ()
    done: str = ""

    @property
    def unfinished(self) -> tuple[RuleState, ...]:
        """The rules that are not OK yet."""
        return tuple(one for one in self.rules if not one.ok and one.state != ENDED)

    @property
    def lasting(self) -> frozenset[str]:
        """The RSEs that have all of it and keep it: by a rule without an end."""
        kept = {one.rse for one in self.rules if one.ok and one.expires is None}
        return frozenset(kept.intersection(self.rses))


@frozen
class Settlement:
    """The wishes for a dataset. `remembered`: rules that the entry knows of.

    `files` are what replicas are compared with before others are given up, None: they cannot be.
    """

    there: Site
    dataset: Did
    run_name: str
    wishes: Wishes
    remembered: tuple[RuleState, ...] = ()
    files: tuple[Checked, ...] | None = None


@frozen
class Verdict:
    """The result of comparing a dataset with its files.

    `good`: RSEs whose every replica has the right size and checksum, asked of the storage itself.
    `bad`: a line for each fault, and the replicas concerned as (RSE, name). `unseen`: RSEs that
    could not be asked, and why. `lost`: `bad` names files without any replica, which may be
    temporary.
    """

    good: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    replicas: tuple[tuple[str, str], ...] = ()
    lost: bool = False


@frozen
class Download:
    """A dataset to be fetched to `location` at the site `here`.

    `files`: those that it must hold, None: those of the catalogue. `expected`: the copy's manifest,
    if it is known. Without both, `single` decides whether the copy is one file. `rse`: from there
    alone. `taken`: the time that the files get.
    """

    here: Site
    there: Site
    dataset: Did
    location: str
    taken: datetime
    files: tuple[Checked, ...] | None = None
    expected: Manifest | None = None
    rse: str | None = None
    single: bool = False
