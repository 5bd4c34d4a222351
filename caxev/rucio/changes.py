"""Wanted replicas of one copy, and the changes to its replication rules. Pure.

The handler `rucio_rules` and ``caxev rucio rules`` call `wishes_for` to apply rule files
(`caxev.rucio.rules`) to a run, and `changes` to compare the result with the existing replication
rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from attrs import field, fields, frozen

from caxev.core.entry import Entry
from caxev.core.model import CopyKey, Run
from caxev.rucio.rules import Rule, WantedReplica, Words

ENDED: Final = "ENDED"
"""The state of a rule that an entry records and the catalogue no longer has."""
SLACK: Final = timedelta(minutes=1)
"""Maximum deviation of a rule's end before it is set again."""
GIVEN_UP: Final = timedelta(hours=1)
"""Time after which Rucio removes a rule that was given up."""


@frozen
class Wishes:
    """The wishes for one copy: replicas, RSEs without one (by which rule), or only a comparison."""

    keep: tuple[WantedReplica, ...] = ()
    remove: Mapping[str, str] = field(factory=dict)
    only_verify: str | None = None


def wishes_for(
    rules: Sequence[Rule], run: Run, key: CopyKey, *, always: Iterable[str] = ()
) -> Wishes:
    """Return the wishes of the rules for a copy; RSEs in `always` have lowest priority. Pure."""
    keep: list[WantedReplica] = []
    remove: dict[str, str] = {}
    spoken: set[str] = set()  # RSEs about which an earlier rule has decided
    for rule in sorted(rules, key=lambda one: -one.priority):
        if rule.unmet(run, key) is not None:
            continue
        if rule.verification_only:
            return Wishes(only_verify=rule.label)
        fresh = [one for one in rule.wanted if spoken.isdisjoint(one.rses)]
        keep += fresh
        spoken.update(rse for one in fresh for rse in one.rses)
        remove |= {rse: rule.label for rse in rule.remove_rse if rse not in spoken}
        spoken.update(rule.remove_rse)
    keep += [WantedReplica((rse,), None, "sites.json") for rse in always if rse not in spoken]
    return Wishes(tuple(keep), remove)


# -- changes --------------------------------------------------------------------------------------


@frozen
class RuleState:
    """A replication rule in the catalogue, or an ended one that an entry records.

    `state` is Rucio's: OK, REPLICATING, STUCK, SUSPENDED, ...; `ENDED` for an ended one.
    `done`, `waiting` and `stuck` count files; `error` is Rucio's reason for those that are stuck.
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

    def stays(self, now: datetime) -> bool:
        """Return whether it was not given up: then its end is in the next hour."""
        # By our clock, and that end is by the catalogue's.
        return self.expires is None or self.expires > now + GIVEN_UP + SLACK

    def to_row(self) -> dict[str, Any]:
        """Return the form in an entry's ``rule_info``."""
        return {one.name: getattr(self, one.name) for one in fields(RuleState)}

    @classmethod
    def from_row(cls, row: object) -> RuleState | None:
        """Read the form of `to_row`; None for anything else, such as cax's texts."""
        if not isinstance(row, Mapping):
            return None
        known: dict[str, Any] = {
            one.name: row[one.name] for one in fields(RuleState) if one.name in row
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


def recorded_in(entry: Entry) -> tuple[RuleState, ...]:
    """Return the rules that an entry records in ``rule_info``; cax's texts contain none."""
    rows = map(RuleState.from_row, entry.rule_info)
    return tuple(row for row in rows if row is not None)


@frozen
class Changes:
    """The changes from the existing rules to the wanted ones.

    `add`: RSE and lifetime in seconds; `expire`: a rule's id and its new lifetime from now, None:
    forever; `remove`: rules to delete, each after another RSE's replicas were compared; `kept`:
    why others stay.
    """

    add: tuple[tuple[str, int | None], ...] = ()
    expire: tuple[tuple[str, int | None], ...] = ()
    remove: tuple[RuleState, ...] = ()
    kept: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.expire or self.remove)

    def __str__(self) -> str:
        lines = [f"add {rse}{_for(lifetime)}" for rse, lifetime in self.add]
        lines += [f"change the end of {rule}{_for(lifetime)}" for rule, lifetime in self.expire]
        lines += [f"remove {one.rse}" for one in self.remove]
        return "; ".join([*lines, *self.kept]) or "nothing"


def _for(lifetime: int | None) -> str:
    return " forever" if lifetime is None else f" for {lifetime} s"


def changes(
    wishes: Wishes,
    standing: Sequence[RuleState],
    remembered: Sequence[RuleState],
    *,
    run_name: str,
    now: datetime,
) -> Changes:
    """Return the necessary changes. Pure and idempotent: afterwards there are none.

    A lifetime counts from the creation of the rule: applying the rules again does not extend it,
    and an expired rule is not created again. If several RSEs are suitable, one that has a rule is
    chosen, else one by the run's name.
    """
    if wishes.only_verify is not None:
        return Changes()
    # Ended rules count as made, so that an expired replica is not requested again forever.
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


def choose(rses: Words, taken: Sequence[str], run_name: str) -> str:
    """Choose an RSE: one that has a rule, else a random one, always the same for a run."""
    for rse in rses:
        if rse in taken:
            return rse
    # By a hash of the run's name: every site and every repetition chooses the same one.
    digest = hashlib.sha256("\0".join([run_name, *rses]).encode()).digest()
    return rses[int.from_bytes(digest[:8], "big") % len(rses)]


def _end(rule: RuleState, lifetime: int | None) -> datetime:
    if lifetime is None:
        return datetime.max.replace(tzinfo=UTC)
    return rule.created + timedelta(seconds=lifetime)


def _new_end(
    rule: RuleState, lifetime: int | None, now: datetime
) -> Iterator[tuple[str, int | None]]:
    if lifetime is None:
        if rule.expires is not None:
            yield rule.id, None
        return
    # A rule that should have ended by now ends now; after that its end is not moved any more.
    end = max(_end(rule, lifetime), now)
    if rule.expires is None or (abs(rule.expires - end) > SLACK and rule.expires > now):
        yield rule.id, max(0, round((end - now).total_seconds()))


def _removals(
    wishes: Wishes, standing: Sequence[RuleState], now: datetime
) -> tuple[tuple[RuleState, ...], tuple[str, ...]]:
    named = [one for one in standing if one.rse in wishes.remove]
    going = [one for one in named if one.stays(now)]
    lasting = [one for one in standing if one not in named and one.ok and one.expires is None]
    # Nothing goes before another RSE has everything forever, or the last replica might go.
    if lasting or not going:
        return tuple(going), ()
    return (), tuple(f"{one.rse} stays: no other RSE has all of it forever" for one in going)
