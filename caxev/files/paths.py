"""Which paths may be touched, and how a path made of any bytes is shown to people.

Pure but for `confine`, which asks the file system where links lead, and for the root's marker.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from caxev.core.errors import GiveUp
from caxev.files.roots import check_root

RESERVED: Final = ".caxev-"
"""How the names of our own files beside copies begin. No run, copy or file of one is called so."""
PART_PREFIX: Final = f"{RESERVED}part-"
ORIGIN_PREFIX: Final = f"{RESERVED}from-"
LONGEST_NAME: Final = 255 - len(f"{RESERVED}moved-")
"""Bytes of a copy's name, so that there is room for any prefix of ours before it."""
_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("\\")}


def confine(path: str, roots: Sequence[str]) -> str:
    """The real path of a copy, which need not exist, strictly inside one of the real `roots`.

    Symbolic links are resolved on both sides. Raises `GiveUp` for a path that is empty, relative,
    ``n/a``, holds a NUL byte, leads out of every root, or is that of our own files; `RootAway`
    where the root's disk is not there.
    """
    real = confine_own(path, roots)
    below = [
        real[len(top) :]
        for top in map(os.path.realpath, roots)
        if inside(os.fsencode(real), os.fsencode(top))
    ]
    # Of roots inside one another the innermost counts: the state of a site may be such a root.
    check_names(os.fsencode(min(below, key=len)), _shown(path))
    return real


def confine_own(path: str, roots: Sequence[str]) -> str:
    """As `confine`, for what may be a file of our own beside the copies."""
    if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
        raise GiveUp(f"{_shown(path)} is not an absolute path")
    real = os.path.realpath(path)
    if is_held(real, roots):
        return real
    leads = f" leads to {_shown(real)}, which" if real != os.path.normpath(path) else ""
    raise GiveUp(f"{_shown(path)}{leads} is not inside {_listed(roots)}")


def is_held(real: str, roots: Sequence[str]) -> bool:
    """Whether a resolved path lies strictly inside one of `roots`; see `confine` for `RootAway`."""
    holding = [root for root in roots if _inside(real, root)]
    for root in holding:
        check_root(root)
    return bool(holding)


def _inside(real: str, root: str) -> bool:
    if not os.path.isabs(root) or "\0" in root:
        return False
    return inside(os.fsencode(real), os.fsencode(os.path.realpath(root)))


def inside(real: bytes, root: bytes) -> bool:
    """Whether the resolved path `real` lies strictly inside the resolved directory `root`."""
    return real != root and real.startswith(root.rstrip(b"/") + b"/")


def check_names(path: bytes, shown: str) -> None:
    """Raise `GiveUp` if a part of a path has a name of our own files: it would be taken for one."""
    if any(name.startswith(RESERVED.encode()) for name in path.split(b"/")):
        raise GiveUp(
            f"{shown} is refused: names that begin with {RESERVED} are for caxev's own files; "
            "rename it"
        )


def safe_name(location: str) -> str:
    """The last component of a location, fit to be the name of a copy. Else raises `GiveUp`."""
    name = own_name(location)
    if (size := len(os.fsencode(name))) > LONGEST_NAME:
        raise GiveUp(
            f"{_shown(location)} is refused: its name has {size} bytes, and with our prefixes a "
            f"disk holds names of up to {LONGEST_NAME}; rename it"
        )
    check_names(os.fsencode(name), _shown(location))
    return name


def own_name(location: str) -> str:
    """As `safe_name`, for what may be a file of our own beside the copies."""
    name = location.rstrip("/").rpartition("/")[2] if isinstance(location, str) else ""
    if name in {"", ".", ".."} or "\0" in name:
        raise GiveUp(f"{_shown(location)} ends in no usable name")
    return name


def partial_path(final: str) -> str:
    """Where a copy is written before it is published as `final`: a hidden sibling."""
    directory, name = os.path.split(final)
    return os.path.join(directory, PART_PREFIX + safe_name(name))


def origin_path(final: str) -> str:
    """The file beside a partial that names the content which the partial is made from."""
    directory, name = os.path.split(final)
    return os.path.join(directory, ORIGIN_PREFIX + safe_name(name))


def printable(path: bytes) -> str:
    """A path on one line: what is not plain ASCII or valid UTF-8 is escaped by a backslash."""
    try:
        text = path.decode()
        if text.isprintable() and "\\" not in text:  # as nearly all are
            return text
        return "".join(map(_character, text))
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte in _PLAIN else _escaped(byte) for byte in path)


def _character(character: str) -> str:
    if character == "\\" or not character.isprintable():
        return character.encode("unicode_escape").decode()
    return character


def _escaped(byte: int) -> str:
    return "\\\\" if byte == ord("\\") else f"\\x{byte:02x}"


def _shown(path: object) -> str:
    if not isinstance(path, str):
        return repr(path)
    return repr(path) if path in {"", "n/a"} else printable(path.encode(errors="surrogateescape"))


def _listed(roots: Sequence[str]) -> str:
    return " or ".join(map(_shown, roots)) or "any directory of this site (it has none)"


def link_problem(path: bytes, target: bytes) -> str | None:
    """Why the link at `path` in a tree, pointing to `target`, may not be kept; None: it may.

    A target is relative, and ``..`` stands only at its beginning, no more often than there are
    directories above the link inside the tree. A ``..`` after a name is refused even where it
    seems to stay inside: the name could itself be a link, and then ``..`` means another place.
    A tree whose links all pass this never leads out of itself.
    """
    parts = [part for part in target.split(b"/") if part not in {b"", b"."}]
    if not target or b"\0" in target:
        return "it points nowhere"
    if target.startswith(b"/"):
        return "it points to an absolute path"
    up = next((i for i, part in enumerate(parts) if part != b".."), len(parts))
    if b".." in parts[up:]:
        return "its target has '..' after a name"
    if up > path.count(b"/"):
        return "it leads out of the run"
    return None


def within_tree(top: bytes, path: bytes, target: bytes) -> bytes:
    """A link's target as it holds in every copy of the tree at `top`: relative, if it is inside.

    An absolute target that is not below `top` is returned as it is. Pure.
    """
    root = top.rstrip(b"/")
    if {b".", b".."}.intersection(target.split(b"/")):
        return target
    if target.rstrip(b"/") != root and not target.startswith(root + b"/"):
        return target
    return b"../" * path.count(b"/") + (target.removeprefix(root).strip(b"/") or b".")


def check_link(path: bytes, target: bytes) -> None:
    """Raise `GiveUp` if the link may not be kept; see `link_problem`."""
    problem = link_problem(path, target)
    if problem:
        raise GiveUp(f"link {printable(path)} -> {printable(target)} refused: {problem}")
