"""The command that does the same as a form, as it is typed. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import Final

from caxev.core.selection import Selection

_OPTION: Final = re.compile("--[a-z-]+")


def option(name: str, value: str) -> str:
    """Return an option with its value, in one word: the value may begin with a dash."""
    return f"--{name}={value}"


def selecting(selection: Selection) -> list[str]:
    """Return the options that select runs."""
    return [option(name, one) for name, texts in selection.texts().items() for one in texts]


def typed(words: Iterable[str]) -> str:
    """Return words quoted for a shell, on one line and printable."""
    return " ".join(map(_word, words))


def _word(word: str) -> str:
    # As people type it: --why='a talk', not '--why=a talk'.
    name, sign, value = word.partition("=")
    return f"{name}={_quoted(value)}" if sign and _OPTION.fullmatch(name) else _quoted(word)


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
