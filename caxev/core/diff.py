"""Two snapshots of a run in, the events between them out. Pure.

`recording` calls it with the snapshot that this site stored and the present one. The laws, checked
in tests/test_diff.py:

- ``diff(run, a, a) == ()``;
- the events of ``diff(run, a, b)``, applied to ``a``, lead to ``b``;
- the order of entries in a document makes no event.
"""

from __future__ import annotations

from caxev.core.model import Event, RunId, Snapshot


def diff(run: RunId, before: Snapshot, after: Snapshot) -> tuple[Event, ...]:
    """Return the aspects that differ: those of now in their order, then those that are gone."""
    now = [
        Event(run, aspect, before.get(aspect), value)
        for aspect, value in after.items()
        if before.get(aspect) != value
    ]
    gone = [
        Event(run, aspect, value, None) for aspect, value in before.items() if aspect not in after
    ]
    return (*now, *gone)
