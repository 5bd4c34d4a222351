"""The words that messages about the configuration share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from caxev.core.errors import ConfigError

_LONG: Final = 60  # characters of a value that are shown


class Problems(ValueError):
    """The errors in a value of several parts, a line each, for a message after the key's name."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = list(lines)
        super().__init__("; ".join(self.lines))


def failed(file: Path, problems: Sequence[str]) -> ConfigError:
    """Return the error that reports all problems of a file, the first of them in its first line."""
    if len(problems) == 1:
        return ConfigError(f"{file}: {problems[0]}")
    return ConfigError(f"{file}: {len(problems)} problems, the first: {problems[0]}", problems)


def shown(value: object) -> str:
    """Return a value as it is in the file, cut to one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` was probably meant to be."""
    names = {name.lower(): name for name in known}
    # 0.6 is difflib's own cutoff: "stfp" finds "sftp", and "qqq" finds nothing.
    close = get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return names[close[0]] if close else None


def known_names(word: str, known: Iterable[str]) -> str:
    """Return, in brackets, the name that `word` was probably meant to be, and all known ones."""
    names = list(known)
    return f"({hint(word, names)} known: {', '.join(names) or 'none'})".replace("( ", "(")


def hint(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a question that names the nearest known word, or else what to do instead."""
    guess = nearest(word, known)
    return f"did you mean {guess!r}?" if guess else otherwise
