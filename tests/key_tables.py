"""The tables of keys in caxev/config/README.md, rendered from the classes that read them.

``python -m tests.key_tables`` writes them anew, between the comments that name a class, and the
keys if not all are meant.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import attrs
from attrs import Factory

from tests.config_keys import CLASSES, Key, documented

README: Final = Path(__file__).parents[1] / "caxev" / "config" / "README.md"
_TABLE: Final = re.compile(r"(<!-- keys of (\w+)(?:: ([\w ]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_BY_NAME: Final = {cls.__name__: cls for cls in CLASSES.values()}


def rendered(text: str) -> str:
    """Return the text with each of its tables as the code has it now."""
    return _TABLE.sub(lambda found: f"{found[1]}{_table(found[2], found[3])}{found[4]}", text)


def shown(text: str) -> list[tuple[str, str]]:
    """Return each key that the text has a table for, with its class."""
    return [
        (name, key.name)
        for _begin, name, chosen, _end in _TABLE.findall(text)
        for key in _keys(name, chosen)
    ]


def _keys(name: str, chosen: str | None) -> list[Key]:
    known = {key.name: key for key in documented(_BY_NAME[name])}
    return [known[one] for one in (chosen.split() if chosen else known)]


def _table(name: str, chosen: str | None) -> str:
    rows = ["| key | value | meaning | default |", "| --- | --- | --- | --- |"]
    for key in _keys(name, chosen):
        text = key.text.replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{key.name}` | {key.must} | {text} | {_default(key.default)} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    """Show a default as JSON; nothing if it follows from other keys, as the meaning has it."""
    if value is attrs.NOTHING:
        return "required"
    if isinstance(value, Factory):  # type: ignore[arg-type]  # a class, though typed as a function
        if value.takes_self:
            return ""
        value = value.factory()
    if attrs.has(type(value)):
        return "`{}`"
    try:
        return f"`{json.dumps(value, default=dict)}`".replace(".0`", "`")
    except (TypeError, ValueError):
        return ""


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
