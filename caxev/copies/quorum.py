"""Which copies of the same data say the same, and what most of them say.

Handlers ask before they believe a copy. Data that sites make by jobs of their own differ from site
to site: only copies of what one `producer` has made are compared. Each copy whose digests are its
own reading has one voice; one that is not what its own entry said before has none: it has changed,
and that much is certain. Entries of the same bytes have one voice together: which do, sites know,
so callers pass it (`caxev.copies.deletion.same_bytes`). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeAlias

from caxev.core.model import ERROR, TRANSFERRED, Copy, CopyKey, Run

DISPUTED = "disputed"
"""The field of an entry in ``error`` that contradicts others, but nothing that it said before."""

KEPT = ("creation_place", "pax_hash", "size")
"""Fields of a processed copy that are those of all its copies."""

VOUCHED = "vouched"
"""The field of an entry that a person has looked at and found to be right."""

Same: TypeAlias = "Callable[[Copy, Copy], bool]"
"""Whether two entries of the same data are of the same bytes."""


def at_one_host(one: Copy, other: Copy) -> bool:
    """Whether two entries are at one host, as far as can be known without its site."""
    return one.host == other.host


def same_data(one: Copy, key: CopyKey) -> bool:
    """Whether that is a copy of this data, wherever it is."""
    return (one.type, one.version) == (key.type, key.version)


def producer(one: Copy) -> str | None:
    """The site whose job has made what this is a copy of; None where it is the same at all."""
    known = one.fields.get("producer")
    if isinstance(known, str):
        return known
    return one.host if one.source is None and isinstance(one.fields.get("job"), Mapping) else None


def coming_from(source: Copy) -> dict[str, object]:
    """What the entry of a copy says of the one that it is made from."""
    made_by = producer(source)
    return {
        "source": source.host,
        "source_manifest": source.manifest,
        "source_checksum": source.checksum,
        **({} if made_by is None else {"producer": made_by}),
        **{name: source.fields[name] for name in _kept(source)},
    }


def _kept(source: Copy) -> Iterator[str]:
    """What every copy of derived data says of how that was made, wherever it is."""
    if source.version is not None:
        yield from (name for name in KEPT if source.fields.get(name) is not None)


def agree(one: Copy, other: Copy) -> bool:
    """Whether two copies say the same content; where not both have a manifest, by checksum."""
    if one.manifest and other.manifest:
        return one.manifest == other.manifest
    return one.checksum is not None and one.checksum == other.checksum


def is_disputed(one: Copy) -> bool:
    """Whether it contradicts others, and it is open who is right."""
    return one.status == ERROR and bool(one.fields.get(DISPUTED))


def voters(run: Run, key: CopyKey, same: Same) -> tuple[Copy, ...]:
    """Return the copies of this data that have a voice, in the order of the run.

    Of several entries of the same bytes it is one: that which a person vouches for, else that of
    this very key, else the first.
    """
    mine = run.copy(key)
    whose = None if mine is None else producer(mine)
    able = [
        one for one in run.copies if same_data(one, key) and producer(one) == whose and _able(one)
    ]
    found: list[Copy] = []
    for one in sorted(able, key=lambda one: (not one.fields.get(VOUCHED), one is not mine)):
        if not any(same(one, other) for other in found):
            found.append(one)
    return tuple(sorted(found, key=able.index))


def _able(one: Copy) -> bool:
    has_digest = one.manifest is not None or one.checksum is not None
    return has_digest and (one.status == TRANSFERRED or is_disputed(one))


def at_odds(run: Run, key: CopyKey, same: Same) -> bool:
    """Whether the copies of this data contradict one another."""
    those = voters(run, key, same)
    return any(not agree(those[0], one) for one in those[1:])


def majority(
    run: Run, key: CopyKey, without: Collection[str] = (), *, same: Same
) -> tuple[Copy, ...]:
    """The copies that say what more than half of all say; none where there is no such half.

    Where a person vouches for a copy, they are those that say what it says. The hosts `without`
    have no voice.
    """
    those = [one for one in voters(run, key, same) if one.host not in without]
    for one in those:
        party = tuple(other for other in those if other is one or agree(one, other))
        if one.fields.get(VOUCHED) or (2 * len(party) > len(those) and not _vouched(those)):
            return party
    return ()


def _vouched(those: Iterable[Copy]) -> bool:
    return any(one.fields.get(VOUCHED) for one in those)
