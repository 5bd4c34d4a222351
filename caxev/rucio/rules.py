"""Rule files: which replicas of which runs are wanted at which RSE, and for how long. Pure.

A rule file is a list of objects; the fields of `Rule` are their keys, and the docstring below each
is that key's documentation. cax's files load unchanged, and mean the same for every run. For what
cax called complex rules there are ``name``, ``priority``, ``tags``, ``tags_exclude``,
``data_type``, ``after``, ``before``, ``min_copies`` and ``max_copies``.

A rule without ``run_nb`` and ``run_name`` is for all runs; with both, for runs that either names.
If no rule covers an RSE that the site's ``rucio_upload_rse`` or ``rucio_transfer`` names, the data
is wanted there forever. `caxev.rucio.changes` applies rules to a copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from attrs import evolve, field, frozen

from caxev.config.errors import Problems, failed
from caxev.config.json_file import as_list, read_json, repeats
from caxev.config.reading import read
from caxev.config.rucio import read_time
from caxev.config.values import Kind, check, flag, mapped, matching, whole
from caxev.core.model import TRANSFERRED, CopyKey, Run
from caxev.core.selection import source_of
from caxev.rucio.names import taken_at

Words = tuple[str, ...]
Ranges = tuple[tuple[Any, Any], ...]


def _words(value: Any) -> Words:
    """Read a list, or names with commas between them."""
    items = value.split(",") if isinstance(value, str) else value
    check(isinstance(items, list))
    return tuple(item.strip() for item in items if item.strip())


def _ranges(words: Words, one: Callable[[str], Any]) -> Ranges:
    """Read ``A`` and ``A-B``, both ends included."""
    pairs = [[one(end.strip()) for end in word.split("-", 1)] for word in words]
    ranges = tuple((pair[0], pair[-1]) for pair in pairs)
    check(ranges and all(first <= last for first, last in ranges))
    return ranges


def _numbers(value: Any) -> Ranges:
    check(not isinstance(value, bool))
    given = value if isinstance(value, str | list) else [value]
    return _ranges(_words(given if isinstance(given, str) else ",".join(map(str, given))), int)


def _run_names(value: Any) -> Ranges:
    # One range that holds every name, so that "all" needs no case of its own.
    if value == "all":
        return (("", "\U0010ffff"),)
    return _ranges(_words(value), matching(r"\d{6}_\d{4}"))


_rse: Final = matching("[A-Z0-9]+(?:[_-][A-Z0-9]+)*")


def _rses(value: Any) -> Words:
    return tuple(map(_rse, value if isinstance(value, list) else [value]))


def _destination(word: Any) -> Words:
    random = re.fullmatch(r"\s*random\s*:(.*)", word, re.DOTALL)
    names = _rses(list(_words(random[1])) if random else word)
    check(names)
    return names


def _destinations(value: Any) -> tuple[Words, ...]:
    found = tuple(map(_destination, value if isinstance(value, list) else [value]))
    everything = [rse for rses in found for rse in rses]
    # An RSE that is named twice could have two lifetimes.
    check(len(everything) == len({*everything}))
    return found


def _lifetime(value: Any) -> int | None:
    seconds = whole(-1)(int(value) if isinstance(value, str) else value)
    check(seconds != 0)
    return None if seconds == -1 else int(seconds)


_lifetimes: Final = mapped(_destination, _lifetime)


def _verify(value: Any) -> bool:
    return value is None or bool(flag(value))  # null counts as true, as in cax


_NAMES: Final = 'run names and ranges, as "161111_1434, 161201_0000-161231_2359"'
_Numbers = Annotated[
    Ranges, Kind('run numbers and ranges, as "5200, 5205-5210", or null', _numbers)
]
_List = Annotated[Words, Kind("a name, a list of names, or null", _words)]
_Time = Annotated[
    datetime | None, Kind('a moment in UTC, as "2017-02-02 17:40", or null', read_time)
]
_Unused = Annotated[object, Kind("anything", lambda value: value)]


class WantedReplica(NamedTuple):
    """A replica at one of `rses` is wanted, by the rule called `rule`.

    It is wanted for `lifetime` seconds; None: forever.
    """

    rses: Words
    lifetime: int | None
    rule: str


@frozen
class Rule:
    """One object of a rule file. An empty condition lets every run pass."""

    label: str = ""
    """No key: what the rule is called in messages."""
    name: _Unused = None
    """A name for messages."""
    run_nb: _Numbers = ()
    """Numbers of runs and ranges of them, both ends included: ``"5200, 5205-5210"``."""
    run_name: Annotated[Ranges, Kind(f'{_NAMES}, "all", or null', _run_names)] = ()
    """Names of runs, likewise, or ``"all"``."""
    run_nb_exclude: _Numbers = ()
    """Numbers of runs that are left out."""
    run_name_exclude: Annotated[Ranges, Kind(f"{_NAMES}, or null", _run_names)] = ()
    """Names of runs that are left out."""
    detector_type: _List = ()
    """A detector, a list of them, or names with commas between them."""
    source_type: _List = ()
    """A source, likewise."""
    data_type: _List = ()
    """A type of data, likewise, as ``"raw"``."""
    tags: _List = ()
    """The run has one of these tags."""
    tags_exclude: _List = ()
    """The run has none of these tags."""
    after: _Time = None
    """The run was started at this moment (UTC) or later."""
    before: _Time = None
    """The run was started earlier than at this moment (UTC)."""
    min_copies: Annotated[int, Kind("a whole number or null", whole(0))] = 0
    """There are at least so many good copies of the data at other hosts."""
    max_copies: Annotated[int | None, Kind("a whole number or null", whole(0))] = None
    """There are at most so many."""
    destination_rse: Annotated[
        tuple[Words, ...],
        Kind('a list of RSEs, each once, as ["A_DISK", "random: B_DISK, C_DISK"]', _destinations),
    ] = ()
    """RSEs at which the data is wanted; ``"random: A, B"`` is one of those."""
    destination_livetime: Annotated[
        Mapping[Words, int | None],
        Kind('seconds, or -1 forever, for RSEs, as {"A_DISK": -1}', _lifetimes),
    ] = field(factory=dict)
    """For each of these RSEs, ``-1`` forever, or seconds (a number or a text)."""
    remove_rse: Annotated[Words, Kind("a list of RSEs or null", _rses)] = ()
    """RSEs that must give their replicas up."""
    verification_only: Annotated[
        bool, Kind("true, false or null (which means true)", _verify, null=True)
    ] = False
    """True or null: the data is only compared; nothing is set and nothing is removed."""
    priority: Annotated[int, Kind("a whole number or null", whole(-inf))] = 0
    """If two rules cover one RSE, the higher decides, then the first in the file."""
    version: _Unused = None
    """Accepted, unused."""
    destination_condition: _Unused = None
    """Accepted, unused."""

    def __attrs_post_init__(self) -> None:
        problems = [
            f"destination_livetime: {', '.join(rses)!r} is not in destination_rse"
            for rses in self.destination_livetime
            if rses not in self.destination_rse
        ]
        wanted = {rse for rses in self.destination_rse for rse in rses}
        both = sorted(wanted.intersection(self.remove_rse))
        problems += (f"remove_rse: {rse!r} is in destination_rse too" for rse in both)
        if problems:
            raise Problems(problems)

    @property
    def wanted(self) -> Iterator[WantedReplica]:
        """The replicas that it wants, with their lifetimes."""
        for rses in self.destination_rse:
            yield WantedReplica(rses, self.destination_livetime.get(rses), self.label)

    def unmet(self, run: Run, key: CopyKey) -> str | None:
        """Return why this rule does not apply to that copy; None if it does."""
        for met, why in self._conditions(run, key):
            if not met:
                return why
        return None

    def _conditions(self, run: Run, key: CopyKey) -> Iterator[tuple[bool, str]]:
        # The first that is not met is the reason that people are shown.
        number, name = run.number or 0, run.name
        chosen = not (self.run_nb or self.run_name)
        chosen = chosen or _within(number, self.run_nb) or _within(name, self.run_name)
        yield chosen, "run_nb and run_name do not name it"
        yield not _within(number, self.run_nb_exclude), "run_nb_exclude names it"
        yield not _within(name, self.run_name_exclude), "run_name_exclude names it"
        yield (
            _one_of(run.detector, self.detector_type),
            f"the detector is {run.detector or 'unknown'}",
        )
        source = source_of(run) or ""
        yield _one_of(source, self.source_type), f"the source is {source or 'unknown'}"
        yield _one_of(key.type, self.data_type), f"the type is {key.type}"
        tagged = not self.tags or not {*self.tags}.isdisjoint(run.tags)
        yield tagged, f"it has no tag {' or '.join(self.tags)}"
        yield {*self.tags_exclude}.isdisjoint(run.tags), "tags_exclude names one of its tags"
        taken = taken_at(run)
        late = self.after is None or (taken is not None and taken >= self.after)
        yield late, "it was started before the time of 'after'"
        early = self.before is None or (taken is not None and taken < self.before)
        yield early, "it was started at or after the time of 'before'"
        copies = good_copies(run, key)
        many = self.max_copies is None or copies <= self.max_copies
        yield copies >= self.min_copies and many, f"it has {copies} good copies elsewhere"


def good_copies(run: Run, key: CopyKey) -> int:
    """Count the good copies of that data at hosts other than the key's."""
    same = (one for one in run.copies if (one.type, one.version) == (key.type, key.version))
    return len({one.host for one in same if one.status == TRANSFERRED and one.host != key.host})


def _within(value: Any, ranges: Iterable[tuple[Any, Any]]) -> bool:
    return any(first <= value <= last for first, last in ranges)


def _one_of(value: str, names: Words) -> bool:
    return not names or value in names


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read a rule file. Raises `ConfigError` naming the file and each rule and key in error."""
    file = Path(path)
    rules: list[Rule] = []
    problems: list[str] = []
    for place, entry in enumerate(as_list(file, read_json(file, "rules"), "rules"), 1):
        name = entry.get("name") if isinstance(entry, dict) else None
        label = f"rule {place} ({name})" if isinstance(name, str) and name else f"rule {place}"
        problems += (str(repeat) for repeat in repeats(entry, label) if not repeat.same)
        try:
            rules.append(evolve(read(Rule, entry), label=label))
        except Problems as error:
            problems += (f"{label}: {line}" for line in error.lines)
    if problems:
        raise failed(file, problems)
    return tuple(rules)
