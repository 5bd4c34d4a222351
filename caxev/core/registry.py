"""Which handlers there are, and which of them an event concerns. Pure.

A handler's module calls `on`, which only records: the function is returned untouched, so that a
test can call it. The command line makes a `Registry` for its site; `recording` asks it which
handlers want an event.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache, reduce
from math import inf
from operator import or_
from typing import Any, Final, TypedDict, TypeVar, Unpack
from zlib import crc32

import attrs
from attrs import frozen
from attrs.validators import deep_iterable, is_callable, optional

from caxev.core.model import (
    NO_FIELDS,
    YES,
    Aspect,
    CopyField,
    CopyKey,
    Event,
    Existence,
    Field,
    Interest,
    Snapshot,
    Tag,
    Watched,
)

HERE: Final = "<here>"
"""Stands for the site's own name in a trigger."""
ELSEWHERE: Final = "<elsewhere>"
"""Stands for every host but the site's own."""
PASSIVE: Final = "<passive>"
"""Stands for the hosts that have no listener of their own."""
CORRECTION_INPUTS: Final = "<inputs of corrections>"
"""Stands for the fields of a run that the site's ``corrections`` wait for."""
PROCESSING_INPUTS: Final = "<inputs of the processing>"
"""Stands for the fields that a run must have before the site processes it."""
PRIMARY: Final = "<primary>"
"""Stands for the types of data that are made from no other."""
DERIVED: Final = "<derived>"
"""Stands for the types of data that are made from others."""
VERSIONED: Final = "<versioned>"
"""Stands for the types of data that have versions."""
OWN: Final = "<own type>"
"""Stands for the derived types of data that ``types`` of sites.json adds; of `needs`, for the keys
by which a site makes them."""
GONE: Final = "gone"
"""Stands for the status of a copy, or the presence of a tag, that is no longer there."""
OF_FILES: Final = "caxev_handlers"
"""The package of the modules of handler files."""

ASPECTS: Final = 4096
"""Aspects and statuses whose handlers are kept in memory."""

HandlerFunction = Callable[[Any], Awaitable[Any]]
DecisionFunction = Callable[[Any], Any]
ConcernFunction = Callable[[Any, Any], bool]
F = TypeVar("F", bound=HandlerFunction)


@frozen
class Here:
    """The facts that triggers need about the site that this process serves.

    `passive` are the sites without a listener, `correction_inputs` and `processing_inputs` the
    fields of runs that the site's corrections and its processing wait for; `wants` returns whether
    the site has enabled a handler. `types` has the names behind `PRIMARY` and the like.
    """

    name: str
    passive: frozenset[str]
    correction_inputs: frozenset[str]
    wants: Callable[[Handler], bool]
    processing_inputs: frozenset[str] = frozenset()
    types: Mapping[str, frozenset[str]] = attrs.field(factory=dict)


def _set(value: str | Iterable[str] | None) -> frozenset[str]:
    return frozenset((value,) if isinstance(value, str) else value or ())


def _tuple(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _other_copy(
    aspect: CopyKey | CopyField, types: frozenset[str], hosts: frozenset[str], here: Here
) -> str | None:
    """Return why a copy is not of these types at these hosts; an empty set allows all."""
    if (
        types
        and aspect.type not in types
        and not any(aspect.type in here.types.get(one, ()) for one in types)
    ):
        return f"the type is {aspect.type}, not {_either(types)}"
    if hosts and not any(_host_is(aspect.host, host, here) for host in hosts):
        return f"the host is {aspect.host}, not {_either(hosts)}"
    return None


@frozen
class CopyTrigger:
    """Trigger on a copy that reaches one of these statuses (`GONE`: it vanishes).

    `host` is a site's name, `HERE`, `ELSEWHERE` or `PASSIVE`, `type` a name, `PRIMARY`, `DERIVED`,
    `VERSIONED` or `OWN`; without `type` or `host`, any. Each may be several: one must match.
    A name that no site or type has is no error: it never fires.
    """

    status: frozenset[str] = attrs.field(converter=_set)
    type: frozenset[str] = attrs.field(converter=_set, default=None, kw_only=True)
    host: frozenset[str] = attrs.field(converter=_set, default=None, kw_only=True)

    def unmet(self, aspect: Aspect, status: str | None, here: Here) -> str | None:
        """Return why this aspect in this status does not trigger; None if it does."""
        if not isinstance(aspect, CopyKey):
            return "not a copy"
        if (other := _other_copy(aspect, self.type, self.host, here)) is not None:
            return other
        if (status or GONE) not in self.status:
            return f"the status is {status or GONE}, not {_either(self.status)}"
        return None


@frozen
class TagTrigger:
    """Trigger on a tag being added (`*`: any tag), or with `gone` removed; of several, on each."""

    name: frozenset[str] = attrs.field(converter=_set)
    gone: bool = attrs.field(default=False, kw_only=True)

    def unmet(self, aspect: Aspect, status: str | None, here: Here) -> str | None:
        """Return why this aspect in this status does not trigger; None if it does."""
        del here
        if not isinstance(aspect, Tag):
            return "not a tag"
        if "*" not in self.name and aspect.tag not in self.name:
            return f"the tag is {aspect.tag!r}, not {_either(self.name)}"
        if (status is None) != self.gone:
            return "the tag is not there" if status is None else "the tag is still there"
        return None


@frozen
class RunTrigger:
    """Trigger on a run's first appearance; for runs that are there already, `caxev replay`."""

    def unmet(self, aspect: Aspect, status: str | None, here: Here) -> str | None:
        """Return why this aspect in this status does not trigger; None if it does."""
        del here
        if not isinstance(aspect, Existence):
            return "not about the run itself"
        return "the run is gone" if status is None else None


@frozen
class FieldTrigger:
    """See `field`."""

    path: frozenset[str] = attrs.field(converter=_set)

    def unmet(self, aspect: Aspect, status: str | None, here: Here) -> str | None:
        """Return why this aspect in this status does not trigger; None if it does."""
        if not isinstance(aspect, Field):
            return "not a field of the run"
        if aspect.path not in self.paths(here):
            return f"the field is {aspect.path}, not {_either(self.paths(here) or self.path)}"
        return "the field is gone" if status is None else None

    def paths(self, here: Here) -> frozenset[str]:
        """Return the paths that are meant at this site."""
        # The site's configuration decides which fields these are, not the handler's module.
        found = self.path
        if CORRECTION_INPUTS in found:
            found = found - {CORRECTION_INPUTS} | here.correction_inputs
        if PROCESSING_INPUTS in found:
            found = found - {PROCESSING_INPUTS} | here.processing_inputs
        # A change below a field is a change of it.
        return frozenset(path for path in found if found.isdisjoint(_above(path)))

    def watched(self, here: Here) -> Watched:
        """Return the fields that this site's snapshots must have for it."""
        return Watched(run=self.paths(here))


@frozen
class CopyFieldTrigger:
    """See `copy_field`."""

    name: frozenset[str] = attrs.field(converter=_set)
    type: frozenset[str] = attrs.field(converter=_set)
    host: frozenset[str] = attrs.field(converter=_set)
    gone: bool = False

    def unmet(self, aspect: Aspect, status: str | None, here: Here) -> str | None:
        """Return why this aspect in this status does not trigger; None if it does."""
        if not isinstance(aspect, CopyField):
            return "not a field of a copy"
        if aspect.field not in self.name:
            return f"the field is {aspect.field}, not {_either(self.name)}"
        if (other := _other_copy(aspect, self.type, self.host, here)) is not None:
            return other
        if (status is None) != self.gone:
            return "the field is gone" if status is None else "the field is still there"
        return None

    def watched(self, here: Here) -> Watched:
        """Return the fields that this site's snapshots must have for it."""
        del here
        return Watched(copies=self.name)


Trigger = CopyTrigger | TagTrigger | RunTrigger | FieldTrigger | CopyFieldTrigger
copy: Final = CopyTrigger
tag: Final = TagTrigger
new_run: Final = RunTrigger


def field(*paths: str) -> FieldTrigger:
    """Trigger on a field of the run being set or changed: ``field("processor.DEFAULT.gains")``.

    A change below the field is one of the field; its removal does not fire. `CORRECTION_INPUTS`
    stands for the fields that the site's ``corrections`` wait for, `PROCESSING_INPUTS` for those
    that its ``processing`` waits for.
    """
    return FieldTrigger(paths)


def copy_field(
    *names: str,
    type: str | Iterable[str] | None = None,  # noqa: A002  # the field's own name
    host: str | Iterable[str] | None = None,
    gone: bool = False,
) -> CopyFieldTrigger:
    """Trigger on a field of a copy's entry being set or changed, or with `gone` removed.

    `type` and `host` are as in `copy`. Raises ValueError for a name with dots: it would never fire.
    """
    if any("." in name for name in names):
        raise ValueError(f"copy_field{names}: name the whole field, without a dot")
    return CopyFieldTrigger(names, type, host, gone)


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _either(names: frozenset[str]) -> str:
    return " or ".join(sorted(name.strip("<>") for name in names))


def _host_is(host: str, wanted: str, here: Here) -> bool:
    if wanted == HERE:
        return host == here.name
    if wanted == ELSEWHERE:
        return host != here.name
    if wanted == PASSIVE:
        return host in here.passive
    return host == wanted


TIMEOUT: Final = 3600.0
"""Seconds that an attempt may take by default, if nothing watches its progress."""


# Refused when the handler is recorded: an attempt with such an option would end the listener.
def _is_name(_handler: object, option: attrs.Attribute[Any], value: object) -> None:
    # It becomes part of keys in the database, which takes no broken text.
    if not isinstance(value, str) or not value or not value.isprintable():
        raise TypeError(f"{option.name}={value!r} is no name")


_are_names: Final = deep_iterable(_is_name)
_callable: Final = optional(is_callable())


def _is_duration(_handler: object, option: attrs.Attribute[float | None], value: object) -> None:
    if value is None or (isinstance(value, int | float) and 0 < value < inf):
        return
    raise TypeError(f"{option.name}={value!r} is no number of seconds above 0 (None: unbounded)")


def _is_count(_handler: object, option: attrs.Attribute[int], value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise TypeError(f"{option.name}={value!r} is no whole number of at least 1")


@frozen
class Handler:
    """One registered reaction: a function, what triggers it, and how it is run.

    `name` is by default the function's. `lane` names the group of workers it shares; sites.json
    sizes it. `stall` bounds the time without `job.progress()` and `timeout` one attempt, both in
    seconds, None: unbounded; with `stall`, `timeout` is None by default. `attempts` is how often it
    is tried before it is parked as failed. `aliases` are further names for ``task_list``. An
    `exclusive` one deletes or replaces the copy: nothing else runs on that copy meanwhile. `needs`
    are keys of sites.json: only sites that give one of them enable it. `decide` is its decision, if
    it has one: a pure function of the job, which returns a `Skip`, a `Wait`, or None to run the
    handler. It is asked before a reaction is recorded. `concerns`, of the run and our site, is
    asked first, once a run: false if `decide` would skip any event of that run.
    """

    function: HandlerFunction = attrs.field(repr=False)
    triggers: tuple[Trigger, ...]
    name: str = attrs.field(
        default=attrs.Factory(lambda self: self.function.__name__, True), validator=_is_name
    )
    lane: str = attrs.field(default="default", validator=_is_name)
    stall: float | None = attrs.field(default=None, validator=_is_duration)
    timeout: float | None = attrs.field(
        default=attrs.Factory(lambda self: TIMEOUT if self.stall is None else None, True),
        validator=_is_duration,
    )
    attempts: int = attrs.field(default=24, validator=_is_count)
    aliases: tuple[str, ...] = attrs.field(converter=_tuple, default=(), validator=_are_names)
    exclusive: bool = False
    needs: tuple[str, ...] = attrs.field(converter=_tuple, default=(), validator=_are_names)
    decide: DecisionFunction | None = attrs.field(default=None, repr=False, validator=_callable)
    concerns: ConcernFunction | None = attrs.field(default=None, repr=False, validator=_callable)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    @property
    def module(self) -> str:
        return self.function.__module__

    @property
    def place(self) -> str:
        """The file and line of the function, for people: ``my_handlers.py, line 3``."""
        return place_of(self.function)

    def unmet(self, aspect: Aspect, status: str | None, here: Here) -> str | None:
        """Return why no trigger fits (the last trigger's reason); None if one does."""
        reason: str | None = "it has no trigger"
        for trigger in self.triggers:
            reason = trigger.unmet(aspect, status, here)
            if reason is None:
                return None
        return reason


class HandlerOptions(TypedDict, total=False):
    """The options of `on`: fields of `Handler`, which has their defaults."""

    name: str
    lane: str
    timeout: float | None
    stall: float | None
    attempts: int
    aliases: Collection[str]
    exclusive: bool
    needs: Collection[str]
    decide: DecisionFunction | None
    concerns: ConcernFunction | None


def _watched(handlers: Iterable[Handler], here: Here) -> Watched:
    triggers = (one for handler in handlers for one in handler.triggers)
    fields = (one for one in triggers if isinstance(one, FieldTrigger | CopyFieldTrigger))
    return reduce(or_, (one.watched(here) for one in fields), NO_FIELDS)


def _interest(handlers: Iterable[Handler], here: Here) -> Interest:
    """Return what concerns a site, whichever of these handlers it enables."""
    every = tuple(handlers)
    triggers = [one for handler in every for one in handler.triggers]
    copies = [one for one in triggers if isinstance(one, CopyTrigger)]
    named = {host for one in copies for host in one.host} - {HERE, ELSEWHERE, PASSIVE}
    hosts = frozenset((named | here.passive) - {here.name})

    def statuses(host: str) -> frozenset[str]:
        found = (
            one.status
            for one in copies
            if not one.host or any(_host_is(host, wanted, here) for wanted in one.host)
        )
        return frozenset().union(*found) - {GONE}

    pairs = frozenset((host, status) for host in hosts for status in statuses(host))
    # A host that no trigger and no site names.
    others = statuses("\0")
    return Interest(_watched(every, here), here.name, hosts, pairs, others)


def place_of(function: Callable[..., Any]) -> str:
    """Return a function's file and line, for people."""
    # A decorator between `on` and the function would hide its place.
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return f"module {function.__module__}"
    return f"{code.co_filename}, line {code.co_firstlineno}"


recorded: list[Handler] = []
"""Every handler recorded by `on` in this process, in the order of recording."""


def on(*triggers: Trigger, **options: Unpack[HandlerOptions]) -> Callable[[F], F]:
    """Record the decorated coroutine function as a handler and return it untouched.

    See `Handler` for the options. Raises TypeError if there is no trigger, or if the function is
    not a coroutine function: calling it would block the listener or do nothing. Raises it also if
    `decide` is one, and for a trigger or an option that is none.
    """
    # A handler without a trigger would be listed and never run.
    if not triggers:
        raise TypeError("on() needs at least one trigger, such as on(copy('transferred'))")
    # `@on`, or `@on(new_run)`: the first would record nothing, the second end the listener.
    for one in triggers:
        if not isinstance(one, Trigger):
            raise TypeError(f"{one!r} is no trigger: write @on(new_run()) or @on(copy('error'))")
    decide = options.get("decide")
    if decide is not None and inspect.iscoroutinefunction(decide):
        raise TypeError(
            f"the decision in {place_of(decide)} is async: write `def`, it must be pure"
        )

    def record(function: F) -> F:
        if (why := _not_async(function)) is not None:
            raise TypeError(why)
        recorded.append(Handler(function, triggers, **options))
        return function

    return record


def _not_async(function: Callable[..., Any]) -> str | None:
    if inspect.iscoroutinefunction(function):
        return None
    name, place = getattr(function, "__name__", repr(function)), place_of(function)
    # A stray `yield` makes a generator, which would never run.
    if inspect.isasyncgenfunction(function):
        return f"the handler {name} ({place}) yields: return a RunUpdate, a Skip or None instead"
    return f"the handler {name} ({place}) is not async: write `async def {name}(job)`"


def by_name(handlers: Iterable[Handler]) -> dict[str, Handler]:
    """Return handlers by name.

    Raises ValueError if two share a name: their reactions would have the same keys.
    """
    found: dict[str, Handler] = {}
    # The name is part of each reaction's key.
    for handler in handlers:
        if handler.name in found:
            raise ValueError(
                f"two handlers are named {handler.name!r}: in {found[handler.name].place}, and in "
                f"{handler.place}; give one of them on(..., name=...)"
            )
        found[handler.name] = handler
    return found


class Registry:
    """The handlers that one site has enabled. Raises ValueError if two share a name."""

    def __init__(self, handlers: Iterable[Handler], here: Here) -> None:
        self.here = here
        self.handlers = by_name(handlers)
        # Disabled handlers stay in `handlers`: the ledger may still hold their reactions.
        self.enabled = tuple(h for h in self.handlers.values() if here.wants(h))
        self.watched = _watched(self.enabled, here)
        self.interest = _interest(self.handlers.values(), here)
        names = "\n".join(sorted(handler.name for handler in self.enabled))
        # The same for the same handlers, in any process: a snapshot names what it was taken with.
        self.id = crc32(names.encode())
        # Runs differ, but not their hosts, types, statuses: most events are like one before.
        self._wanting = lru_cache(ASPECTS)(self._find)

    def wanting(self, event: Event) -> tuple[Handler, ...]:
        """Return the enabled handlers that the event concerns."""
        return self._concerned(event.aspect, event.after)

    def _concerned(self, aspect: Aspect, value: str | None) -> tuple[Handler, ...]:
        # Triggers are about a copy's status, and whether anything else is there: the digest of a
        # field is another one in each run.
        known = value and (value.partition("@")[0] if isinstance(aspect, CopyKey) else YES)
        return self._wanting(aspect, known)

    def _find(self, aspect: Aspect, status: str | None) -> tuple[Handler, ...]:
        return tuple(one for one in self.enabled if one.unmet(aspect, status, self.here) is None)

    def triggered(self, snapshot: Snapshot) -> Iterator[tuple[Aspect, str, Handler]]:
        """Return the aspects of a run, as it is now, with their values and what they trigger."""
        for aspect, value in snapshot.items():
            for handler in self._concerned(aspect, value):
                yield aspect, value, handler
