"""The command that does the same as a form, as it is typed. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from caxev.core.selection import Selection


def option(name: str, value: str) -> str:
    """Return an option with its value, in one word: the value may begin with a dash."""
    return f"--{name}={value}"


def selecting(selection: Selection) -> list[str]:
    """Return the options that select runs."""
    return [option(name, one) for name, texts in selection.texts().items() for one in texts]


def typed(words: Iterable[str]) -> str:
    """Return words as a shell takes them: whatever is in them, on one line, and printable."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # bash, zsh and others read escapes between these.
    return f"$'{''.join(map(_escaped, word))}'"


def _escaped(character: str) -> str:
    if character in "'\\":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
