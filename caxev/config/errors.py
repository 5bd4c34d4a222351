"""The errors of this package, and the words that its messages share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Final

_LONG: Final = 60  # characters of a value that are shown


class Problems(ValueError):
    """What is wrong with a value of several parts, a line each, to stand after the key's name."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def read_keys(
    value: Mapping[str, Any], shapes: Mapping[str, tuple[str, Callable[[Any], Any]]]
) -> tuple[dict[str, Any], list[str]]:
    """Read an object's values, each by its (words, reader) in `shapes`: values, and problems.

    A reader raises ValueError for what it does not take. Null is as not given, and so is an
    unknown key that begins with ``x_``.
    """
    read: dict[str, Any] = {}
    problems: list[str] = []
    for key, given in value.items():
        if key not in shapes:
            problems += unknown_key(key, shapes)
        elif given is not None:
            words, reader = shapes[key]
            try:
                read[key] = reader(given)
            except ValueError:
                problems.append(f"{key} must be {words}, not {shown(given)}")
    return read, problems


def unknown_key(key: str, known: Iterable[str]) -> list[str]:
    """What is wrong with a key that is not known; nothing for one's own."""
    if key.startswith("x_"):
        return []
    guess = nearest(key, known)
    hint = f"did you mean {guess!r}?" if guess else "take it out"
    return [f"unknown key {key!r} ({hint}; a key of your own begins with x_)"]


def shown(value: object) -> str:
    """A value as it stands in the file, cut so that it stays a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be."""
    names = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return names[close[0]] if close else None
