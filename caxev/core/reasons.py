"""Why attempts fail, in a few words for counting. Pure.

Messages name runs, files and machines; as labels of a metric they would have no bound.
"""

from __future__ import annotations

import re
from typing import Final

from caxev.core.errors import Damaged, Denied, GiveUp, Retry, RootAway
from caxev.core.ledger import Failed, Hindered, Interrupted, Outcome, Postponed, Surprise

DONE: Final = "done"
_BY_TEXT: Final = (
    ("closed", r"the link to .* (opens in|has closed)"),
    ("disk_full", r"no space left|disk (is )?full|bytes are free|quota|min_free"),
    ("disk_away", r"is its disk mounted|not the disk that it was|has not responded for"),
    ("refused", r"permission|denied|host key|authenticat|not allowed|login"),
    ("timeout", r"timed out|no progress for|in time|no answer"),
    ("connection", r"connect|unreachable|reset by peer|broken pipe|no route|network"),
    ("content", r"checksum|manifest|damaged|differ|digest|not what"),
    ("missing", r"no such file|is gone|does not exist|not there|no longer"),
    ("changed", r"changed meanwhile|changes while"),
)
_PATTERNS: Final = tuple((name, re.compile(text, re.IGNORECASE)) for name, text in _BY_TEXT)
OTHER: Final = {
    "given_up": (Failed, GiveUp),
    "refused": (Hindered, Denied),
    "interrupted": (Interrupted,),
    "postponed": (Postponed, Retry),
    "unexpected": (Surprise, BaseException),
}
"""By class, for messages that fit no pattern."""
REASONS: Final = frozenset({DONE, *OTHER, *(name for name, _ in _PATTERNS)})
"""All that can be returned."""
FAILURES: Final = REASONS - {DONE, "interrupted"}
"""Those of attempts that have failed."""


def reason(of: Outcome | BaseException) -> str:
    """Return the reason of an outcome, or of an error that a transfer has raised."""
    match of:
        case RootAway():
            return "disk_away"
        case Hindered() if of.root or of.host:
            return "disk_away"
        case Damaged():
            return "content"
        case Surprise() | Interrupted():
            return _by_class(of)
    text = getattr(of, "why", None) or str(of)
    found = (name for name, pattern in _PATTERNS if pattern.search(text))
    return next(found, None) or _by_class(of)


def is_failure(outcome: Outcome) -> bool:
    """Return whether an attempt has failed: not if it was cut short, or only waits for a time."""
    if isinstance(outcome, Postponed):
        return outcome.after is None
    return isinstance(outcome, Failed | Surprise | Hindered)


def _by_class(of: Outcome | BaseException) -> str:
    return next((name for name, kinds in OTHER.items() if isinstance(of, kinds)), DONE)
