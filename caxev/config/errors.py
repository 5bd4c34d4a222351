"""The errors of this package, and the words that its messages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class ConfigError(Exception):
    """Something an operator wrote is wrong. The message's first line says what, and what to do.

    `problems` holds one line for each thing that is wrong; where there are several, the message's
    first line sums them up and the others follow it.
    """

    def __init__(self, summary: str, problems: Sequence[str] = ()) -> None:
        super().__init__(summary, tuple(problems))
        self.summary = summary
        self.problems = tuple(problems) or (summary,)

    def __str__(self) -> str:
        if self.problems == (self.summary,):
            return self.summary
        return "\n".join((self.summary, *(f"  {problem}" for problem in self.problems)))


class Problems(ValueError):
    """What is wrong with a value of several parts, a line each, to stand after the key's name."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be."""
    names = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return names[close[0]] if close else None


def one_line(error: BaseException) -> str:
    """An exception as one line: its class, and the first line of its message."""
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
