"""How a site keeps its copies: how often they are read again, and which may be deleted.

These are keys of sites.json; handlers and `caxev.copies.retention` go by them. Pure.
"""

from __future__ import annotations

from typing import Annotated

from attrs import frozen

from caxev.config.values import Count, Days, Flag, Hours, Kind, Rate, SomeDays, listed, read_name


@frozen
class Patrol:
    """How often each copy is read again."""

    days: SomeDays
    """Each copy is read again every so many days."""
    max_rate: Rate | None = None
    """The most bytes a second that are read, as ``"50MB/s"``."""


@frozen
class Deletion:
    """Conditions under which a copy may be deleted here."""

    copies: Count = 2
    """Good copies of raw data that must remain at other sites: with this one three, as in cax."""
    protect: Annotated[tuple[str, ...], Kind("a list of tags", listed(read_name))] = ()
    """Data of runs with one of these tags stays."""
    proof_days: Days = 0.0
    """A reading of another copy counts if it began at most so many days before the deletion was
    decided; 0: only one that answers the deletion's own request does."""
    patience: SomeDays = 7.0
    """After so many days without an answer from the other sites the deletion is given up."""
    when_full: Flag = False
    """If less than ``min_free`` is free, delete the oldest copies that may go, of any age."""


@frozen
class Stalled:
    """When a copy on which nobody works counts as stalled."""

    warn: Hours = 2.0
    """Hours after which an alarm is raised."""
    retry: Hours = 24.0
    """Hours after which the copy is given up and made again."""
