"""The types of data: the three of cax, and those that ``types`` of sites.json adds. Pure.

A type is made by the DAQ (or any other program), or from another type by the sites' commands. The
attributes of a type decide what happens to its copies; only cax's own rules go by a type's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from keyword import iskeyword
from typing import Annotated, Any, Final

from attrs import Factory, frozen

from caxev.config.errors import Problems, known_names
from caxev.config.reading import read
from caxev.config.values import Flag, Kind, check, match
from caxev.core import registry

RAW: Final = "raw"
PROCESSED: Final = "processed"
UNTRIGGERED: Final = "untriggered"
"""The type of the DAQ's buffer, which is in no table and never touched."""


def _name(value: Any) -> str:
    # It becomes part of keys, and of paths of jobs.
    name = match("[A-Za-z](?:[A-Za-z0-9_]{0,38}[A-Za-z0-9])?", value).string
    check(not iskeyword(name))
    return name


@frozen
class DataType:
    """A type of data, as a row of ``types`` in sites.json."""

    name: Annotated[str, Kind("a name of letters, digits and _", _name)]
    """``type`` of the database's entries. A site gives the directory of such data as ``dir_NAME``,
    and makes such data if its entry has an object ``NAME``, as for ``processing``."""
    source: Annotated[str | None, Kind("the name of a type", _name)] = None
    """The type that it is made from; null: the DAQ or another program makes it, as ``raw``, and it
    has an age (``purge``)."""
    versioned: Flag = Factory(lambda self: self.source is not None, takes_self=True)
    """Whether there may be several versions (``pax_version`` of the entries), each in
    ``pax_<version>/`` below the directory; by default true if it has a ``source``."""
    protected: Flag = Factory(lambda self: self.source is None, takes_self=True)
    """Whether it cannot be made again: then as many good copies remain as ``deletion`` demands, and
    the last one in any case; by default true if it has no ``source``."""

    @property
    def directory(self) -> str:
        """The key of a site's base directory for such data."""
        return f"dir_{self.name}"

    @property
    def purging(self) -> str:
        """The key of the version that a site deletes of such data."""
        return "pax_version_purge" if self.name == PROCESSED else "purge_versions"

    @property
    def making(self) -> str:
        """The key of how a site makes such data."""
        return "processing" if self.name == PROCESSED else self.name


@frozen
class DataTypes:
    """The types of data that one sites.json knows, in the order of their making."""

    own: tuple[DataType, ...] = ()
    """Those that the file adds."""

    @cached_property
    def by_name(self) -> dict[str, DataType]:
        """All types by their names."""
        return {one.name: one for one in (*_OF_CAX, *self.own)}

    @cached_property
    def primary(self) -> frozenset[str]:
        """The names of those that no site makes from others."""
        return self._all(lambda one: one.source is None)

    @cached_property
    def derived(self) -> frozenset[str]:
        """The names of those that are made from others."""
        return self._all(lambda one: one.source is not None)

    @cached_property
    def versioned(self) -> frozenset[str]:
        """The names of those that have versions."""
        return self._all(lambda one: one.versioned)

    @cached_property
    def protected(self) -> frozenset[str]:
        """The names of those that cannot be made again."""
        return self._all(lambda one: one.protected)

    def _all(self, means: Callable[[DataType], bool]) -> frozenset[str]:
        return frozenset(one.name for one in self if means(one))

    @property
    def groups(self) -> dict[str, frozenset[str]]:
        """The names that stand for several types in triggers."""
        return {
            registry.PRIMARY: self.primary,
            registry.DERIVED: self.derived,
            registry.VERSIONED: self.versioned,
            registry.OWN: self.derived & {one.name for one in self.own},
        }

    @property
    def directories(self) -> tuple[str, ...]:
        """The keys of a site's directories: of each type, and of what is staged for tape."""
        return (*(one.directory for one in self.by_name.values()), "dir_tsm")

    @property
    def known(self) -> tuple[str, ...]:
        """The names that entries may have: those of all types, and of the DAQ's buffer."""
        return (*self.by_name, UNTRIGGERED)

    def __iter__(self) -> Iterator[DataType]:
        return iter(self.by_name.values())

    def order(self, name: str) -> tuple[int, str]:
        """Return a key that sorts names of types by the order of their making."""
        names = list(self.by_name)
        return (names.index(name) if name in names else len(names), name)


_OF_CAX: Final = (
    DataType(RAW),
    DataType(PROCESSED, RAW),
    DataType("minitrees", PROCESSED),
)
CAX: Final = DataTypes()
"""The types of data of a file without ``types``."""


def read_types(value: Any, taken: Collection[str] = ()) -> DataTypes:
    """Read the ``types`` of a file; `taken` are keys of sites. Raises `Problems`."""
    if not isinstance(value, list):
        raise Problems(["must be a list of objects with the keys of types"])
    types = DataTypes(read(tuple[DataType, ...], value))
    if problems := [*_problems(types, taken)]:
        raise Problems(problems)
    return types


def _problems(types: DataTypes, taken: Collection[str]) -> Iterator[str]:
    seen = {*CAX.known}
    for one in types.own:
        if one.name in seen:
            yield f"{one.name!r}: is a type of data already; choose another name"
        elif clash := next((key for key in (one.directory, one.making) if key in taken), None):
            yield f"{one.name!r}: {clash!r} is another key of sites; choose another name"
        else:
            yield from (f"{one.name!r}: {line}" for line in _doubts(one, types))
        seen.add(one.name)


def _doubts(one: DataType, types: DataTypes) -> Iterator[str]:
    chain = [one]
    while (name := chain[-1].source) is not None:
        if (source := types.by_name.get(name)) is None:
            if len(chain) == 1:
                known = known_names(name, types.by_name)
                yield f"source must be a type of data, not {name!r} {known}"
            return
        if source in chain:
            if source is one:
                yield f"is made from itself: {' from '.join(each.name for each in (*chain, one))}"
            return
        chain.append(source)
    if one.source in types.versioned and not one.versioned:
        # Each version of its source would make the same copy.
        yield f"must be versioned, as {one.source} is, which it is made from"
