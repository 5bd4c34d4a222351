"""The project's documents, and what tests look for in them: commands, blocks, tables, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from caxev.cli import cli

ROOT: Final = Path(__file__).parents[1]
NAMES: Final = (
    "README.md",
    "deploy/README.md",
    "deploy/MIGRATING.md",
    "caxev/config/README.md",
    "handlers/README.md",
    "tests/README.md",
)
TEXTS: Final = {name: (ROOT / name).read_text() for name in NAMES if (ROOT / name).exists()}
ALL: Final = "\n".join(TEXTS.values())
LINES: Final = re.MULTILINE | re.DOTALL
"""How the text is searched: ^ and $ match at each line, and . matches a newline."""


def section(name: str, title: str, level: int = 2) -> str:
    """A section's text, without its heading."""
    heading = f"{'#' * level} {re.escape(title)}"
    match = re.search(rf"^{heading}\n(.*?)(?=^#{{1,{level}}} |\Z)", TEXTS[name], LINES)
    assert match, (name, title)
    return match[1]


def blocks(language: str, text: str = ALL) -> list[str]:
    """The code blocks in a language, without their indentation."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, LINES)
    return ["\n".join(line.strip() for line in block.splitlines()) for block in found]


def prose(text: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=LINES)


def file(document: str, name: str) -> str:
    """The contents of a file that the document asks to write: the next block of Python."""
    match = re.search(
        rf"[Ww]rite (?:it|this) to\s+`{name}`.*?^```python\n(.*?)^```$", TEXTS[document], LINES
    )
    assert match, name
    return match[1]


def headed(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The tables, each as its heading and its rows of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in table.splitlines()]
        head, _line, *rest = [[cell.strip() for cell in row] for row in rows]
        yield head, rest


def tables(text: str) -> Iterator[list[list[str]]]:
    """The tables, as rows of cells, without their headings."""
    return (rows for _head, rows in headed(text))


def marked(text: str) -> list[str]:
    """The texts in backquotes."""
    return re.findall(r"`([^`\n]+)`", text)


def typed(text: str = ALL) -> list[str]:
    """The commands in blocks of shell: to be typed as they are."""
    lines = [
        line.partition("  #")[0] for block in blocks("sh", text) for line in block.splitlines()
    ]
    return [line.strip() for line in lines if line.startswith("caxev ")]


def mentioned(text: str = ALL) -> list[str]:
    """The commands in backquotes, which may have placeholders."""
    return [text for text in marked(prose(text)) if text.startswith("caxev ")]


def command_of(line: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words begin with, and the words that are left."""
    command: click.Command = cli
    context = click.Context(cli)
    while line and isinstance(command, click.Group):
        found = command.get_command(context, line[0])
        if found is None and command.invoke_without_command and line[0].startswith("--"):
            break
        assert found is not None, line
        command, line = found, line[1:]
    return command, line


def words_of(line: str) -> list[str]:
    """A command's words behind its first."""
    return shlex.split(line)[1:]


def anchors(text: str) -> set[str]:
    """The names by which links lead to the headings of a document, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=LINES), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
