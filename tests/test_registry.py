"""Which handlers an event concerns."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from math import nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given

from caxev import ELSEWHERE, GONE, HERE, PASSIVE, Job, copy, copy_field, field, new_run, on, tag
from caxev.config import Site, Sites, load_handlers
from caxev.config.handlers import doubtful_triggers
from caxev.core.model import (
    YES,
    Aspect,
    CopyField,
    CopyKey,
    Event,
    Existence,
    Field,
    Tag,
    Watched,
)
from caxev.core.registry import Handler, Here, Registry, Trigger, recorded
from tests import strategies as make


def here(*tasks: str) -> Here:
    """A site as triggers see it, with such a ``task_list``."""

    def wants(handler: Handler) -> bool:
        return not tasks or not {handler.name, *handler.aliases}.isdisjoint(tasks)

    return Here("lngs", frozenset({"tape"}), frozenset({"start"}), wants)


async def react(job: Job) -> None:
    """React. And so on."""


def handler(*triggers: Trigger, name: str = "react", aliases: tuple[str, ...] = ()) -> Handler:
    return Handler(react, triggers, name, aliases=aliases)


def test_who_reports_progress_has_no_timeout() -> None:
    """Unless it asks for one: a transfer may take a night."""
    copied = copy("transferred")
    assert Handler(react, (copied,)).timeout == 3600
    assert Handler(react, (copied,), stall=60).timeout is None
    assert Handler(react, (copied,), stall=60, timeout=600).timeout == 600


def fires(trigger: Trigger, aspect: Aspect, value: str | None) -> bool:
    return bool(Registry([handler(trigger)], here()).wanting(Event("run", aspect, None, value)))


@pytest.mark.parametrize(
    ("host", "at"),
    [
        (HERE, {"lngs"}),
        (ELSEWHERE, {"tape", "chicago"}),
        (PASSIVE, {"tape"}),
        ("chicago", {"chicago"}),
        ((HERE, PASSIVE), {"lngs", "tape"}),
        (None, {"lngs", "tape", "chicago"}),
    ],
)
def test_hosts(host: str | tuple[str, ...] | None, at: set[str]) -> None:
    """HERE, ELSEWHERE, PASSIVE, a name, several of them, or any host."""
    trigger = copy("transferred", host=host)
    everywhere = ("lngs", "tape", "chicago")
    assert {h for h in everywhere if fires(trigger, CopyKey("raw", h), "transferred@1")} == at


def test_statuses_and_types() -> None:
    """A copy triggers by its status, without its time, and by its type."""
    trigger = copy(("error", "transferred"), type=("raw", "minitrees"))
    assert fires(trigger, CopyKey("raw", "lngs"), "error@1478822400000")
    assert fires(trigger, CopyKey("minitrees", "lngs", "v1"), "transferred")
    assert not fires(trigger, CopyKey("raw", "lngs"), "verifying")
    assert not fires(trigger, CopyKey("processed", "lngs", "v1"), "error")
    assert not fires(trigger, CopyKey("raw", "lngs"), None)


def test_gone() -> None:
    """GONE is the status of what is no longer there, of a copy, a tag or a run."""
    raw = CopyKey("raw", "lngs")
    assert fires(copy(GONE, host=HERE), raw, None)
    assert not fires(copy(GONE), raw, "transferred")
    assert fires(tag("x", gone=True), Tag("x"), None)
    assert not fires(tag("x", gone=True), Tag("x"), YES)
    assert not fires(tag("x"), Tag("x"), None)
    assert fires(new_run(), Existence(), YES)
    assert not fires(new_run(), Existence(), None)


def test_any_tag() -> None:
    """`*` is any tag; any other name is only itself."""
    assert fires(tag("*"), Tag("whatever"), YES)
    assert fires(tag(("a", "b")), Tag("b"), YES)
    assert not fires(tag("a"), Tag("*"), YES)


@given(make.aspects)
def test_one_kind_of_aspect_meets_one_kind_of_trigger(aspect: Aspect) -> None:
    """What is about a copy never triggers what waits for a tag or a run, and so on."""
    assume("." not in getattr(aspect, "field", ""))  # `copy_field` refuses such names
    triggers: dict[type, Trigger] = {
        CopyKey: copy("transferred"),
        Tag: tag("*"),
        Existence: new_run(),
        Field: field(getattr(aspect, "path", "")),
        CopyField: copy_field(getattr(aspect, "field", "")),
    }
    value = "transferred" if isinstance(aspect, CopyKey) else YES
    met = [kind for kind, trigger in triggers.items() if fires(trigger, aspect, value)]
    assert met == [type(aspect)]


@given(make.aspects, make.statuses)
def test_it_fires_or_says_why_not(aspect: Aspect, status: str) -> None:
    """`unmet` gives a reason exactly for what a site's registry does not want."""
    one = handler(copy("error", type="raw", host=HERE), tag("x"))
    reason = one.unmet(aspect, status, here())
    wanted = Registry([one], here()).wanting(Event("run", aspect, None, status))
    assert (reason is None) == (wanted == (one,))
    assert reason is None or reason


@pytest.mark.parametrize(
    ("trigger", "aspect", "value", "reason"),
    [
        (copy("error", host=HERE), CopyKey("raw", "x"), "error", "the host is x, not here"),
        (copy(GONE), CopyKey("raw", "x"), "error", "the status is error, not gone"),
        (copy("error"), CopyKey("raw", "x"), None, "the status is gone, not error"),
        (copy("error", type="raw"), CopyKey("a", "x"), "error", "the type is a, not raw"),
        (copy("error"), Tag("x"), YES, "not a copy"),
        (tag(("b", "a")), Tag("x"), YES, "the tag is 'x', not a or b"),
        (tag("x"), Tag("x"), None, "the tag is not there"),
        (tag("x", gone=True), Tag("x"), YES, "the tag is still there"),
        (new_run(), Existence(), None, "the run is gone"),
        (new_run(), Tag("x"), YES, "not about the run itself"),
    ],
)
def test_reasons(trigger: Trigger, aspect: Aspect, value: str | None, reason: str) -> None:
    """A reason names what is, and what would be needed."""
    assert handler(trigger).unmet(aspect, value, here()) == reason


def test_on_records_and_returns_the_function() -> None:
    """The decorated function is the function; what was recorded says how to run it."""
    before = len(recorded)
    decorated = on(new_run(), name="greet", lane="tape", aliases=["Greet"], exclusive=True)(react)
    (made,) = recorded[before:]
    del recorded[before:]
    assert decorated is react
    assert (made.name, made.lane, made.aliases, made.exclusive) == (
        "greet",
        "tape",
        ("Greet",),
        True,
    )
    assert (made.summary, made.module) == ("React. And so on.", __name__)


def test_on_needs_a_trigger() -> None:
    """A handler that nothing can trigger is a mistake."""
    with pytest.raises(TypeError, match="at least one trigger"):
        on()


def test_on_refuses_what_is_no_trigger() -> None:
    """A trigger that was not called, or no parentheses at all: neither may wait for an event."""
    for forgotten in (new_run, react):
        with pytest.raises(TypeError, match=rf"{forgotten.__name__}.* is no trigger: write @on"):
            on(forgotten)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": timedelta(hours=1)},
        {"timeout": "60"},
        {"timeout": 0},
        {"timeout": nan},
        {"stall": timedelta(minutes=5)},
        {"stall": -1.0},
        {"attempts": "3"},
        {"attempts": 0},
        {"attempts": 2.5},
        {"name": 5},
        {"name": ""},
        {"lane": None},
        {"lane": "broken \ud800"},
    ],
    ids=str,
)
def test_on_refuses_an_option_that_an_attempt_cannot_have(options: dict[str, Any]) -> None:
    """The module is not loaded, with the option's name: the first attempt would be too late."""
    before = len(recorded)
    ((name, value),) = options.items()
    with pytest.raises(TypeError, match=re.escape(f"{name}={value!r} is no ")):
        on(new_run(), **options)(react)
    assert len(recorded) == before


def test_a_copys_field_has_no_dots() -> None:
    """A snapshot has an entry's own fields: a path into one would never fire."""
    with pytest.raises(ValueError, match=r"'job\.id'.*without a dot"):
        copy_field("holds", "job.id")


@pytest.mark.parametrize("options", [{"needs": [5]}, {"aliases": [None]}, {"decide": "later"}])
def test_on_refuses_names_and_decisions_that_are_none(options: dict[str, Any]) -> None:
    """A listener would end at its start, or decide nothing."""
    with pytest.raises(TypeError):
        on(new_run(), **options)(react)


def test_one_alias_or_key_may_stand_alone() -> None:
    """A text is one name, and not its letters."""
    made = Handler(react, (new_run(),), aliases="Greet", needs="patrol")
    assert (made.aliases, made.needs) == (("Greet",), ("patrol",))


def test_a_decision_is_no_coroutine_function() -> None:
    """Nobody would await it: the handler would run each time."""

    async def decide(job: Job) -> None: ...

    with pytest.raises(TypeError, match=r"is async: write `def`"):
        on(new_run(), decide=decide)


def test_on_needs_a_coroutine_function() -> None:
    """The error names the function, its file and line, and what to write; nothing is recorded."""

    def plain(job: Job) -> None: ...

    async def stream(job: Job) -> AsyncIterator[int]:
        yield 1

    before = len(recorded)
    for function, what in ((plain, "is not async: write `async def plain"), (stream, "yields")):
        with pytest.raises(TypeError, match=what) as error:
            on(new_run())(function)  # type: ignore[type-var]
        line = function.__code__.co_firstlineno
        assert f"{function.__name__} ({__file__}, line {line})" in str(error.value)
    assert len(recorded) == before


def test_two_handlers_of_one_name() -> None:
    """The error names both places and what to do: the ledger could not tell them apart."""
    place = r"test_registry\.py, line \d+"
    with pytest.raises(ValueError, match=f"'react'.*{place}, and in .*{place}.*name="):
        Registry([handler(new_run()), handler(tag("x"))], here())


def test_task_list_enables_by_name_or_alias() -> None:
    """A handler that the site does not want is known, and wants nothing."""
    one, two = handler(new_run(), name="one", aliases=("One",)), handler(new_run(), name="two")
    for tasks, enabled in [((), [one, two]), (("One",), [one]), (("two",), [two]), (("x",), [])]:
        registry = Registry([one, two], here(*tasks))
        assert list(registry.wanting(Event("run", Existence(), None, YES))) == enabled
        assert set(registry.handlers) == {"one", "two"}


@given(make.snapshots())
def test_owed_is_what_a_first_look_would_fire(snapshot: dict[Aspect, str]) -> None:
    """`triggered` names the aspects for which an event of now would want the handler."""
    one = handler(copy("transferred", host=(HERE, ELSEWHERE)), tag("*"))
    registry = Registry([one], here())
    wanted = [
        (aspect, value, one)
        for aspect, value in snapshot.items()
        if one in registry.wanting(Event("run", aspect, None, value))
    ]
    assert list(registry.triggered(snapshot)) == wanted


def test_fields() -> None:
    """A field of the run triggers by its path, one of a copy by its name, type and host."""
    assert fires(field("end", "trigger.events_built"), Field("trigger.events_built"), "ab")
    assert not fires(field("end"), Field("start"), "ab")
    assert not fires(field("end"), Field("end"), None)
    assert not fires(field("end"), Tag("end"), YES)
    asked = copy_field("check_asked", host=HERE, type="raw")
    assert fires(asked, CopyField("raw", "lngs", None, "check_asked"), "ab")
    assert not fires(asked, CopyField("raw", "chicago", None, "check_asked"), "ab")
    assert not fires(asked, CopyField("processed", "lngs", "v1", "check_asked"), "ab")
    assert not fires(asked, CopyField("raw", "lngs", None, "job_ended"), "ab")
    assert not fires(asked, CopyField("raw", "lngs", None, "check_asked"), None)
    assert not fires(asked, CopyKey("raw", "lngs"), "transferred")
    gone = copy_field("check_asked", host=HERE, type="raw", gone=True)
    assert fires(gone, CopyField("raw", "lngs", None, "check_asked"), None)
    assert not fires(gone, CopyField("raw", "lngs", None, "check_asked"), "ab")
    assert not fires(gone, CopyField("raw", "chicago", None, "check_asked"), None)


def test_triggers_are_asked_once_for_a_field_whatever_is_in_it() -> None:
    """Each run has other digests: to ask all triggers for each was a tenth of a first look."""
    registry = Registry([handler(field("trigger"))], here())
    for number in range(100):
        event = Event("run", Field("trigger"), None, f"{number:016x}")
        assert registry.wanting(event) == registry.enabled
    assert not registry.wanting(Event("run", Field("trigger"), "0", None))
    assert registry._wanting.cache_info().misses == 2


def test_only_fields_of_enabled_handlers_are_watched() -> None:
    """What nobody here waits for is not looked at."""
    handlers = [
        handler(field("end"), copy_field("a", "b"), name="one"),
        handler(field("start"), copy_field("c"), name="other"),
    ]
    everything = Registry(handlers, here()).watched
    assert everything == Watched(frozenset({"end", "start"}), frozenset("abc"))
    few = Registry(handlers, here("one")).watched
    assert few == Watched(frozenset({"end"}), frozenset("ab"))
    assert few <= everything
    assert not everything <= few


def test_nearly_known_names_are_reported() -> None:
    """A trigger on a misspelt status never fires; what others may write is nobody's mistake."""
    names = ("lngs", "chicago")
    sites = Sites(Path("sites.json"), {name: Site(name=name) for name in names})
    triggers = (
        copy(("transfered", "error", "RSEreupload", GONE), type="raw", host=(HERE, "chicgo")),
        copy_field("holds", type=("rawr", "<primary>"), host="tsm-server"),
        tag("transfered"),
    )
    found = [line.partition(": ")[2] for line in doubtful_triggers([handler(*triggers)], sites)]
    assert found == [
        "unknown host 'chicgo' (did you mean 'chicago'?)",
        "unknown status 'transfered' (did you mean 'transferred'?)",
        "unknown type 'rawr' (did you mean 'raw'?)",
    ]
    load_handlers()
    assert [*doubtful_triggers(recorded, sites)] == []
