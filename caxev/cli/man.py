"""Run ``caxev man``: write a manual page for each command, made from its help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click

from caxev import __version__
from caxev.cli.options import example


@click.command(
    epilog=example(
        "caxev man /usr/local/share/man/man1", "man caxev-copy", "man -M ./share/man caxev"
    )
)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def man(directory: Path) -> None:
    """Write manual pages into DIRECTORY, one for each command, as caxev-copy.1."""
    from caxev.cli import cli

    directory.mkdir(parents=True, exist_ok=True)
    for context in _contexts(click.Context(cli, info_name="caxev")):
        name = _name(context)
        (directory / f"{name}.1").write_text("\n".join([*_page(context), ""]))


def _contexts(context: click.Context) -> Iterator[click.Context]:
    """Yield a command's context and those of all commands below it."""
    yield context
    for name, command in _below(context):
        yield from _contexts(click.Context(command, info_name=name, parent=context))


def _below(context: click.Context) -> Iterator[tuple[str, click.Command]]:
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None and not command.hidden:
                yield name, command


def _name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _page(context: click.Context) -> Iterator[str]:
    """Yield the lines of a page, for troff's macros `man`."""
    command, name = context.command, _name(context)
    yield f'.TH {name.upper()} 1 "" "caxev {__version__}" "caxev"'
    yield from (".SH NAME", _plain(f"{name} - {command.get_short_help_str(200).rstrip('.')}"))
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (".SH SYNOPSIS", f".B {_plain(context.command_path)}", _plain(usage))
    yield from (".SH DESCRIPTION", *_text(command.help or ""))
    records = [param.get_help_record(context) for param in command.get_params(context)]
    yield from _listed("OPTIONS", [record for record in records if record is not None])
    below = [(one, found.get_short_help_str(200)) for one, found in _below(context)]
    yield from _listed("COMMANDS", below)
    if command.epilog:
        yield from (".SH EXAMPLES AND NOTES", *_text(command.epilog))
    others = [f"{name}-{one}" for one, _ in below]
    if context.parent is not None:
        others.insert(0, _name(context.parent))
    if others:
        yield from (".SH SEE ALSO", _plain(", ".join(f"{one}(1)" for one in others)))


def _listed(title: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    if rows:
        yield f".SH {title}"
    for name, meaning in rows:
        yield from (".TP", f".B {_plain(name)}", _plain(" ".join(meaning.split())))


def _text(text: str) -> Iterator[str]:
    """Yield paragraphs; one that begins with a backspace keeps its lines."""
    for paragraph in re.split(r"\n\s*\n", cleandoc(text)):
        lines = paragraph.splitlines()
        if lines and lines[0].strip() == "\b":
            yield from (".PP", ".nf", *map(_plain, lines[1:]), ".fi")
        elif lines:
            yield from (".PP", *(_plain(line.strip()) for line in lines))


def _plain(text: str) -> str:
    """Return a line that troff prints as it is, with escapes and requests quoted."""
    shown = text.replace("\\", r"\e").replace("-", r"\-").replace("~", r"\(ti")
    return rf"\&{shown}" if shown.startswith((".", "'")) else shown
