"""Why reactions failed, with what differs from run to run taken out, so that they can be grouped.

Pure: "no route to /data/7/x (errno 113)" and "no route to /data/8/y (errno 113)" are one reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from attrs import frozen

from caxev.web.state import Open

LONGEST: Final = 200
"""Characters of a reason that identify it."""
_ROUNDS: Final = re.compile(r" \(given up after \d+ (?:attempts|days)\)$")
_PARTS: Final = (
    (re.compile(r"'[^']*'|\"[^\"]*\""), "'…'"),
    (re.compile(r"(?<![\w.])/(?:[^\s:,;()']+/?)+"), "/…"),
    (re.compile(r"\b\d{6}_\d{4}\b"), "…"),
    (re.compile(r"\b[0-9a-f]{8,}\b"), "…"),
    (re.compile(r"\b(?:run|pid|job) \d+\b"), "…"),
    (re.compile(r"\d+(?:\.\d+)?(?: ?[kMGT]?B\b)"), "…"),
    (re.compile(r"\b\d{2,}(?:\.\d+)?\b"), "…"),
)


def normalised(reason: str) -> str:
    """Return a reason without names, paths, sizes and numbers of more than one digit."""
    text = _ROUNDS.sub("", " ".join(reason.split()))
    for pattern, instead in _PARTS:
        text = pattern.sub(instead, text)
    return text[:LONGEST] or "no reason was given"


@frozen
class Group:
    """Failed reactions of one handler for one reason, the newest first."""

    handler: str
    reason: str
    members: tuple[Open, ...]

    @property
    def sites(self) -> list[str]:
        return sorted({one.reaction.site for one in self.members})

    @property
    def newest(self) -> datetime:
        return self.members[0].reaction.due


def grouped(failed: Iterable[Open]) -> list[Group]:
    """Return failed reactions by handler and reason, the largest groups first."""
    found: dict[tuple[str, str], list[Open]] = {}
    for one in failed:
        found.setdefault((one.reaction.handler, normalised(one.reaction.note)), []).append(one)
    groups = [
        Group(handler, reason, tuple(sorted(members, key=lambda o: o.reaction.due, reverse=True)))
        for (handler, reason), members in found.items()
    ]
    return sorted(groups, key=lambda group: (-len(group.members), group.handler, group.reason))
