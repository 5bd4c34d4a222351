"""Rule files: which replicas of which runs are wanted where, and for how long. Pure.

The handler `rucio_rules` and ``caxev rucio rules`` read a file with `load_rules`, ask `wishes_for`
what it means for one run, and `changes` what is to be done about the rules that there are.

A file is a list of objects. cax's files load unchanged, and mean the same for every run:

=========================  =================================================================
key                        value
=========================  =================================================================
``run_nb``                 ``"5200, 5205-5210"``: numbers and ranges, both ends included
``run_name``               ``"161111_1434, 161201_0000-161231_2359"``, or ``"all"``
``run_nb_exclude``,        the same forms; what they name is left out
``run_name_exclude``
``detector_type``          a detector, a list of them, or names with commas between them
``source_type``            a source, likewise
``destination_rse``        a list of RSEs; ``"random: A, B"`` is one of those
``destination_livetime``   for each of these, ``-1`` for ever, or seconds (a number or a text)
``remove_rse``             a list of RSEs that are to give their replicas up
``verification_only``      true or null: only look; nothing is set and nothing is removed
``version``,               not looked at
``destination_condition``
=========================  =================================================================

Without ``run_nb`` and ``run_name`` a rule is for all runs; with both, for runs that either names.
To these caxev adds, for what cax called complex rules:

=========================  =================================================================
``name``                   what the rule is called in messages
``priority``               a whole number, 0 if absent: where two rules speak of one RSE, the
                           higher decides, then the first in the file
``tags``, ``tags_exclude`` a tag or a list: the run has one of them, or none
``data_type``              a type or a list, as ``"raw"``
``after``, ``before``      a moment in UTC: the run was started then or later, or earlier
``min_copies``,            how many good copies of the data there are at other hosts
``max_copies``
=========================  =================================================================

What the site's ``rucio_upload_rse`` and ``rucio_transfer`` name is wanted for ever, where no rule
says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from attrs import evolve, field, fields, frozen

from caxev.config import ConfigError, nearest
from caxev.config.json_file import parse, repeats
from caxev.core.model import TRANSFERRED, CopyKey, Run
from caxev.limited import CONFIGURATION, read_limited
from caxev.rucio.names import taken_at

Range = tuple[int, int]
Names = tuple[str, ...]

_RSE: Final = re.compile(r"[A-Z0-9]+(?:[_-][A-Z0-9]+)*")
_RUN_NAME: Final = re.compile(r"\d{6}_\d{4}")
_RANDOM: Final = re.compile(r"random\s*:(.*)", re.DOTALL)
ENDED: Final = "ENDED"
"""The state of a rule that an entry remembers and the catalogue has no more."""
SLACK: Final = timedelta(minutes=1)
"""By so much a rule's end may be off before it is set anew."""
GIVEN_UP: Final = timedelta(hours=1)
"""After this time Rucio takes a rule away that was given up."""


@frozen
class Destination:
    """Where replicas are wanted: at one of `rses`; for `lifetime` seconds, None: for ever."""

    rses: Names
    lifetime: int | None = None


@frozen
class Rule:
    """One object of a rule file. An empty condition lets every run pass."""

    label: str
    numbers: tuple[Range, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    not_numbers: tuple[Range, ...] = ()
    not_names: tuple[tuple[str, str], ...] = ()
    detectors: Names = ()
    sources: Names = ()
    types: Names = ()
    tags: Names = ()
    not_tags: Names = ()
    after: datetime | None = None
    before: datetime | None = None
    min_copies: int = 0
    max_copies: int | None = None
    destinations: tuple[Destination, ...] = ()
    remove: Names = ()
    only_verify: bool = False
    priority: int = 0

    def unmet(self, run: Run, key: CopyKey) -> str | None:
        """Why this rule does not speak of that copy; None where it does."""
        for met, why in self._conditions(run, key):
            if not met:
                return why
        return None

    def _conditions(self, run: Run, key: CopyKey) -> Iterator[tuple[bool, str]]:
        number, name = run.number or 0, run.name
        chosen = not (self.numbers or self.names)
        chosen = chosen or _within(number, self.numbers) or _within(name, self.names)
        yield chosen, "run_nb and run_name do not name it"
        yield not _within(number, self.not_numbers), "run_nb_exclude names it"
        yield not _within(name, self.not_names), "run_name_exclude names it"
        yield _one_of(run.detector, self.detectors), f"the detector is {run.detector or 'unknown'}"
        source = source_of(run)
        yield _one_of(source, self.sources), f"the source is {source or 'unknown'}"
        yield _one_of(key.type, self.types), f"the type is {key.type}"
        tagged = not self.tags or not {*self.tags}.isdisjoint(run.tags)
        yield tagged, f"it has no tag {' or '.join(self.tags)}"
        yield {*self.not_tags}.isdisjoint(run.tags), "tags_exclude names one of its tags"
        taken = taken_at(run)
        late = self.after is None or (taken is not None and taken >= self.after)
        yield late, "it was started before the time of 'after'"
        early = self.before is None or (taken is not None and taken < self.before)
        yield early, "it was started at or after the time of 'before'"
        copies = good_copies(run, key)
        many = self.max_copies is None or copies <= self.max_copies
        yield copies >= self.min_copies and many, f"it has {copies} good copies elsewhere"


def source_of(run: Run) -> str:
    """A run's ``source.type``; no text where it has none."""
    source = run.document.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    return kind if isinstance(kind, str) else ""


def good_copies(run: Run, key: CopyKey) -> int:
    """How many good copies of that data the run has at hosts other than the key's."""
    same = (one for one in run.copies if (one.type, one.version) == (key.type, key.version))
    return len({one.host for one in same if one.status == TRANSFERRED and one.host != key.host})


def _within(value: Any, ranges: Iterable[tuple[Any, Any]]) -> bool:
    return any(first <= value <= last for first, last in ranges)


def _one_of(value: str, names: Names) -> bool:
    return not names or value in names


# -- what is wanted of one copy -------------------------------------------------------------------


class Wanted(NamedTuple):
    """A replica at one of `rses` is wanted, by the rule called `rule`; see `Destination`."""

    rses: Names
    lifetime: int | None
    rule: str


@frozen
class Wishes:
    """What is wanted of one copy: replicas, RSEs without (and by which rule), or only a look."""

    keep: tuple[Wanted, ...] = ()
    remove: Mapping[str, str] = field(factory=dict)
    only_verify: str | None = None


def wishes_for(
    rules: Sequence[Rule], run: Run, key: CopyKey, *, always: Iterable[str] = ()
) -> Wishes:
    """What the rules, and `always` below them, want of that copy. Pure."""
    keep: list[Wanted] = []
    remove: dict[str, str] = {}
    spoken: set[str] = set()
    for rule in sorted(rules, key=lambda one: -one.priority):
        if rule.unmet(run, key) is not None:
            continue
        if rule.only_verify:
            return Wishes(only_verify=rule.label)
        fresh = [one for one in rule.destinations if spoken.isdisjoint(one.rses)]
        keep += [Wanted(one.rses, one.lifetime, rule.label) for one in fresh]
        spoken.update(rse for one in fresh for rse in one.rses)
        remove |= {rse: rule.label for rse in rule.remove if rse not in spoken}
        spoken.update(rule.remove)
    keep += [Wanted((rse,), None, "sites.json") for rse in always if rse not in spoken]
    return Wishes(tuple(keep), remove)


# -- what is to be done about it ------------------------------------------------------------------


@frozen
class Standing:
    """A replication rule as the catalogue has it, or as an entry remembers one that has ended.

    `state` is Rucio's: OK, REPLICATING, STUCK, SUSPENDED, ...; `ENDED` for one that is remembered.
    `done`, `waiting` and `stuck` count files; `error` is what Rucio says of those that are stuck.
    """

    id: str
    rse: str
    state: str
    created: datetime
    expires: datetime | None = None
    done: int = 0
    waiting: int = 0
    stuck: int = 0
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.state == "OK"

    def to_row(self) -> dict[str, Any]:
        """As it stands in an entry's ``rule_info``."""
        return {one.name: getattr(self, one.name) for one in fields(Standing)}

    @classmethod
    def from_row(cls, row: object) -> Standing | None:
        """The inverse of `to_row`; None for what is no such row, as cax's texts."""
        if not isinstance(row, Mapping):
            return None
        known: dict[str, Any] = {
            one.name: row[one.name] for one in fields(Standing) if one.name in row
        }
        try:
            return cls(**known)
        except TypeError:
            return None

    def __str__(self) -> str:
        until = f" until {self.expires:%Y-%m-%d %H:%M}" if self.expires else ""
        left = f" ({self.waiting + self.stuck} files to go)" if not self.ok else ""
        why = f": {self.error}" if self.error else ""
        return f"{self.rse} {self.state}{until}{left}{why}"


@frozen
class Changes:
    """What makes the rules that there are into those that are wanted.

    `add`: RSE and lifetime in seconds; `expire`: a rule's id and its new lifetime from now, None:
    for ever; `remove`: the rules to be given up, each once another RSE's replicas were compared;
    `kept`: why others stay.
    """

    add: tuple[tuple[str, int | None], ...] = ()
    expire: tuple[tuple[str, int | None], ...] = ()
    remove: tuple[Standing, ...] = ()
    kept: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.expire or self.remove)

    def __str__(self) -> str:
        lines = [f"add {rse}{_for(lifetime)}" for rse, lifetime in self.add]
        lines += [f"change the end of {rule}{_for(lifetime)}" for rule, lifetime in self.expire]
        lines += [f"remove {one.rse}" for one in self.remove]
        return "; ".join([*lines, *self.kept]) or "nothing"


def _for(lifetime: int | None) -> str:
    return " for ever" if lifetime is None else f" for {lifetime} s"


def changes(
    wishes: Wishes,
    standing: Sequence[Standing],
    remembered: Sequence[Standing],
    *,
    run_name: str,
    now: datetime,
) -> Changes:
    """What is to be done. Pure; done, it leaves nothing to do.

    A lifetime counts from when the rule was made: looked at again it is not prolonged, and a rule
    that has come to its end is not made anew. Of several RSEs that would do, one that has a rule
    is taken, else one by the run's name.
    """
    if wishes.only_verify is not None:
        return Changes()
    there = {one.rse: one for one in standing}
    ended = {one.rse: one for one in remembered if one.rse not in there}
    add: list[tuple[str, int | None]] = []
    expire: list[tuple[str, int | None]] = []
    for wanted in wishes.keep:
        rse = choose(wanted.rses, [*there, *ended], run_name)
        if rse in there:
            expire += _new_end(there[rse], wanted.lifetime, now)
        elif rse not in ended or _end(ended[rse], wanted.lifetime) > now:
            add.append((rse, wanted.lifetime))
    remove, kept = _removals(wishes, standing, now)
    return Changes(tuple(add), tuple(expire), remove, kept)


def choose(rses: Names, taken: Sequence[str], run_name: str) -> str:
    """One of the RSEs: that which was taken already, else by chance, the same for a run always."""
    for rse in rses:
        if rse in taken:
            return rse
    digest = hashlib.sha256("\0".join([run_name, *rses]).encode()).digest()
    return rses[int.from_bytes(digest[:8], "big") % len(rses)]


def _end(rule: Standing, lifetime: int | None) -> datetime:
    if lifetime is None:
        return datetime.max.replace(tzinfo=UTC)
    return rule.created + timedelta(seconds=lifetime)


def _new_end(
    rule: Standing, lifetime: int | None, now: datetime
) -> Iterator[tuple[str, int | None]]:
    if lifetime is None:
        if rule.expires is not None:
            yield rule.id, None
        return
    # What should have ended by now ends now, and is then left to end.
    end = max(_end(rule, lifetime), now)
    if rule.expires is None or (abs(rule.expires - end) > SLACK and rule.expires > now):
        yield rule.id, max(0, round((end - now).total_seconds()))


def _removals(
    wishes: Wishes, standing: Sequence[Standing], now: datetime
) -> tuple[tuple[Standing, ...], tuple[str, ...]]:
    # What was given up has an end that is near, and stands until then.
    leaving = now + GIVEN_UP + SLACK
    named = [one for one in standing if one.rse in wishes.remove]
    going = [one for one in named if one.expires is None or one.expires > leaving]
    lasting = [one for one in standing if one not in named and one.ok and one.expires is None]
    if lasting or not going:
        return tuple(going), ()
    return (), tuple(f"{one.rse} stays: no other RSE has all of it for ever" for one in going)


# -- reading a file -------------------------------------------------------------------------------


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read a rule file. Raises `ConfigError` naming the file and each rule and key in error."""
    file = Path(path)
    try:
        document = parse(read_limited(file, CONFIGURATION).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"rule file {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"rule file {file} is not JSON: {error}") from error
    if not isinstance(document, list):
        raise ConfigError(f"rule file {file} holds no list of rules: put it in [ and ]")
    problems: list[str] = []
    rules = [_rule(entry, place, problems) for place, entry in enumerate(document, 1)]
    if problems:
        summary = problems[0] if len(problems) == 1 else f"{len(problems)} problems"
        lines = problems if len(problems) > 1 else ()
        raise ConfigError(f"rule file {file}: {summary}", lines)
    return tuple(rules)


def _rule(entry: object, place: int, problems: list[str]) -> Rule:
    if not isinstance(entry, dict):
        problems.append(f"rule {place}: is no object with the rule's keys")
        return Rule(str(place))
    name = entry.get("name")
    label = f"rule {place} ({name})" if isinstance(name, str) and name else f"rule {place}"
    problems.extend(str(repeat) for repeat in repeats(entry, label) if not repeat.same)
    known: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in _READ:
            problems.extend(_unknown(label, key))
        elif value is not None or key == "verification_only":
            attribute, words, read = _READ[key]
            try:
                known[attribute] = read(value)
            except (ValueError, TypeError):
                problems.append(f"{label}: {key} must be {words}, not {_shown(value)}")
    return _with_lifetimes(Rule(label), known, label, problems)


def _with_lifetimes(rule: Rule, known: dict[str, Any], label: str, problems: list[str]) -> Rule:
    lifetimes: dict[Names, int | None] = known.pop("lifetimes", {})
    known.pop("", None)
    destinations: tuple[Names, ...] = known.pop("destinations", ())
    for rses in lifetimes.keys() - {*destinations}:
        where = ", ".join(rses)
        problems.append(f"{label}: destination_livetime: {where!r} is not in destination_rse")
    clash = {rse for rses in destinations for rse in rses}.intersection(known.get("remove", ()))
    problems.extend(f"{label}: remove_rse: {rse!r} is in destination_rse too" for rse in clash)
    made = tuple(Destination(rses, lifetimes.get(rses)) for rses in destinations)
    return evolve(rule, destinations=made, **known)


def _unknown(label: str, key: str) -> list[str]:
    if key.startswith("x_"):
        return []
    guess = nearest(key, [known for known in _READ if known])
    hint = f"did you mean {guess!r}?" if guess else "take it out"
    return [f"{label}: unknown key {key!r} ({hint}; a key of your own begins with x_)"]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  # so that it stays a line


def _words(value: Any) -> Names:
    """Read a list, or names with commas between them."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError
    return tuple(item.strip() for item in items if item.strip())


def _pairs(value: Any, read: Callable[[str], Any]) -> tuple[tuple[Any, Any], ...]:
    pairs = []
    for word in _words([str(value)] if isinstance(value, int) else value):
        first, dash, last = (part.strip() for part in word.partition("-"))
        pair = (read(first), read(last) if dash else read(first))
        if pair[0] > pair[1]:
            raise ValueError
        pairs.append(pair)
    if not pairs:
        raise ValueError
    return tuple(pairs)


def _numbers(value: Any) -> tuple[Range, ...]:
    if isinstance(value, bool):
        raise ValueError  # noqa: TRY004  # what every reader of a value raises
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return _pairs(value, int)


def _run_name(word: str) -> str:
    if not _RUN_NAME.fullmatch(word):
        raise ValueError
    return word


def _run_names(value: Any) -> tuple[tuple[str, str], ...]:
    return (("", "\U0010ffff"),) if value == "all" else _pairs(value, _run_name)


def _rses(value: Any) -> Names:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and _RSE.fullmatch(name) for name in names):
        raise ValueError
    return tuple(names)


def _destination(word: Any) -> Names:
    random = _RANDOM.fullmatch(word.strip()) if isinstance(word, str) else None
    names = _words(random[1]) if random else (word,)
    if not names:
        raise ValueError
    return _rses(list(names))


def _destinations(value: Any) -> tuple[Names, ...]:
    found = tuple(map(_destination, value if isinstance(value, list) else [value]))
    everything = [rse for rses in found for rse in rses]
    if len(everything) != len(set(everything)):
        raise ValueError
    return found


def _lifetimes(value: Any) -> dict[Names, int | None]:
    if not isinstance(value, dict):
        raise ValueError  # noqa: TRY004  # what every reader of a value raises
    return {_destination(rse): _lifetime(seconds) for rse, seconds in value.items()}


def _lifetime(value: Any) -> int | None:
    seconds = int(value) if isinstance(value, str) else value
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < -1 or seconds == 0:
        raise ValueError
    return None if seconds == -1 else seconds


def _moment(value: Any) -> datetime:
    time = datetime.fromisoformat(value)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError  # noqa: TRY004  # what every reader of a value raises
    return value


def _count(value: Any) -> int:
    if _whole(value) < 0:
        raise ValueError
    return int(value)


def _verify(value: Any) -> bool:
    if value is None:  # as cax took it
        return True
    if not isinstance(value, bool):
        raise ValueError  # noqa: TRY004  # what every reader of a value raises
    return value


def _anything(value: Any) -> Any:
    return value


_NUMBERS: Final = 'run numbers and ranges, as "5200, 5205-5210", or null'
_NAMES: Final = 'run names and ranges, as "161111_1434, 161201_0000-161231_2359", or null'
_LIST: Final = "a name, a list of names, or null"
_TIME: Final = 'a moment in UTC, as "2017-02-02 17:40", or null'
_READ: Final[Mapping[str, tuple[str, str, Callable[[Any], Any]]]] = {
    "version": ("", "", _anything),
    "destination_condition": ("", "", _anything),
    "name": ("", "", _anything),
    "run_nb": ("numbers", _NUMBERS, _numbers),
    "run_nb_exclude": ("not_numbers", _NUMBERS, _numbers),
    "run_name": ("names", f'{_NAMES}, or "all"', _run_names),
    "run_name_exclude": ("not_names", _NAMES, _run_names),
    "detector_type": ("detectors", _LIST, _words),
    "source_type": ("sources", _LIST, _words),
    "data_type": ("types", _LIST, _words),
    "tags": ("tags", _LIST, _words),
    "tags_exclude": ("not_tags", _LIST, _words),
    "after": ("after", _TIME, _moment),
    "before": ("before", _TIME, _moment),
    "min_copies": ("min_copies", "a whole number or null", _count),
    "max_copies": ("max_copies", "a whole number or null", _count),
    "destination_rse": (
        "destinations",
        'a list of RSEs, each once, as ["A_DISK", "random: B_DISK, C_DISK"]',
        _destinations,
    ),
    "destination_livetime": (
        "lifetimes",
        'seconds, or -1 for ever, for RSEs, as {"A_DISK": -1}',
        _lifetimes,
    ),
    "remove_rse": ("remove", "a list of RSEs or null", _rses),
    "verification_only": ("only_verify", "true, false or null (which means true)", _verify),
    "priority": ("priority", "a whole number or null", _whole),
}
