"""Majority among the copies of the same data. Pure.

Handlers check it before they trust a copy. Data that sites make by their own jobs differ from site
to site, so only copies of one `producer` are compared. Each copy has one vote, by the digests of
its own reading. A copy that contradicts its own entry has none, since it has certainly changed.
Entries of the same bytes share one vote; only sites show which those are, so callers pass that
(`caxev.copies.storage.same_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

from caxev.core.model import ERROR, TRANSFERRED, Copy, CopyKey, Run

DISPUTED = "disputed"
"""The field of an ``error`` entry that contradicts other copies, but not its own digests."""

KEPT = ("creation_place", "pax_hash", "size")
"""Fields about the production of derived data, which every copy of it inherits."""

VOUCHED = "vouched"
"""The field of an entry that a person has checked and found right."""

Same: TypeAlias = "Callable[[Copy, Copy], bool]"
"""Whether two entries of the same data share their bytes."""


def at_one_host(one: Copy, other: Copy) -> bool:
    """Return whether two entries are at one host, which is all that is known without the sites."""
    return one.host == other.host


def same_data(one: Copy, key: CopyKey) -> bool:
    """Return whether `one` is a copy of the data of `key`, at any host."""
    return (one.type, one.version) == (key.type, key.version)


def producer(one: Copy) -> str | None:
    """Return the site whose job made this data, or None if it is the same everywhere."""
    # A copy inherits the field; the original entry has its job instead.
    made_here = one.source is None and one.job is not None
    return one.producer or (one.host if made_here else None)


def coming_from(source: Copy) -> dict[str, object]:
    """Return the fields of a copy's entry that describe its source."""
    made_by = producer(source)
    kept = source.having(*(KEPT if source.version is not None else ()))
    return {
        "source": source.host,
        "source_manifest": source.manifest,
        "source_checksum": source.checksum,
        **({} if made_by is None else {"producer": made_by}),
        **{name: value for name, value in kept.fields.items() if value is not None},
    }


def agree(one: Copy, other: Copy) -> bool:
    """Return whether two copies are the same, by manifest or, if one lacks it, by checksum."""
    # Not by checksum if both have manifests: names of files do not enter cax's checksum.
    if one.manifest and other.manifest:
        return one.manifest == other.manifest
    return one.checksum is not None and one.checksum == other.checksum


def is_disputed(one: Copy) -> bool:
    """Return whether a copy contradicts others, and it is undecided which is right."""
    return one.status == ERROR and one.disputed


def voters(run: Run, key: CopyKey, same: Same) -> tuple[Copy, ...]:
    """Return the copies of this data that have a vote, in the order of the run.

    Several entries of the same bytes have one vote: that of the vouched entry, else that of this
    key, else the first.
    """
    # Two votes for the same bytes could outvote an independent copy.
    mine = run.copy(key)
    whose = None if mine is None else producer(mine)
    able = [
        one for one in run.copies if same_data(one, key) and producer(one) == whose and _able(one)
    ]
    found: list[Copy] = []
    # The best entry first, since the first of those that share their bytes gets the vote.
    for one in sorted(able, key=lambda one: (not one.vouched, one is not mine)):
        if not any(same(one, other) for other in found):
            found.append(one)
    return tuple(sorted(found, key=able.index))


def _able(one: Copy) -> bool:
    has_digest = one.manifest is not None or one.checksum is not None
    return has_digest and (one.status == TRANSFERRED or is_disputed(one))


def at_odds(run: Run, key: CopyKey, same: Same) -> bool:
    """Return whether the copies of this data contradict one another."""
    # All against the first is enough: if they agree with it they agree with one another.
    those = voters(run, key, same)
    return any(not agree(those[0], one) for one in those[1:])


def majority(
    run: Run, key: CopyKey, without: Collection[str] = (), *, same: Same
) -> tuple[Copy, ...]:
    """Return the copies on which more than half of all agree; empty if there is no majority.

    If a person vouched for a copy, those that agree with it. The hosts `without` have no vote.
    """
    those = [one for one in voters(run, key, same) if one.host not in without]
    for one in those:
        party = tuple(other for other in those if other is one or agree(one, other))
        if one.vouched or (2 * len(party) > len(those) and not any(o.vouched for o in those)):
            return party
    return ()
