"""The laws of `diff`."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from caxev.core.diff import diff
from caxev.core.model import Aspect, snapshot_of
from tests import strategies as make


@make.few
@given(make.snapshots())
def test_nothing_lies_between_a_look_and_itself(snapshot: dict[Aspect, str]) -> None:
    """``diff(run, a, a) == ()``."""
    assert diff("run", snapshot, dict(snapshot)) == ()


@make.few
@given(make.snapshots(), make.snapshots())
def test_the_events_lead_from_one_look_to_the_other(
    before: dict[Aspect, str], after: dict[Aspect, str]
) -> None:
    """``replay(a, diff(run, a, b)) == b``."""
    assert make.replay(before, diff("run", before, after)) == after


@make.few
@given(make.snapshots(), make.snapshots())
def test_an_event_is_a_change_of_one_aspect(
    before: dict[Aspect, str], after: dict[Aspect, str]
) -> None:
    """Each aspect makes one event at most, which says truly what was and what is."""
    events = diff("run", before, after)
    assert len({event.aspect for event in events}) == len(events)
    for event in events:
        assert event.before == before.get(event.aspect)
        assert event.after == after.get(event.aspect)
        assert event.before != event.after
        assert (event.status is None) == (event.aspect not in after)
        assert event.run == "run"


@make.few
@given(make.snapshots(), make.snapshots(), make.snapshots())
def test_a_look_left_out_hides_no_end_state(
    one: dict[Aspect, str], two: dict[Aspect, str], three: dict[Aspect, str]
) -> None:
    """However many looks lie between, the same state is reached: scan and stream agree."""
    by_way = make.replay(make.replay(one, diff("run", one, two)), diff("run", two, three))
    assert by_way == make.replay(one, diff("run", one, three))


@make.few
@given(make.snapshots(), st.randoms())
def test_the_order_makes_no_event(snapshot: dict[Aspect, str], random: Any) -> None:
    """Aspects in another order are the same look."""
    items = list(snapshot.items())
    assert diff("run", snapshot, dict(random.sample(items, len(items)))) == ()


@make.few
@given(make.documents, st.randoms())
def test_the_order_of_tags_and_copies_makes_no_event(document: dict[str, Any], random: Any) -> None:
    """A `$pull` and a `$push` of the same entry are no event."""
    keyed = {(e["type"], e["host"], e.get("pax_version")): e for e in document.get("data", [])}
    data, tags = list(keyed.values()), document.get("tags", [])
    before = {**document, "data": data}
    after = {
        **document,
        "data": random.sample(data, len(data)),
        "tags": random.sample(tags, len(tags)),
    }
    assert diff("run", snapshot_of(before), snapshot_of(after)) == ()
