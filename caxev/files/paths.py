"""Decide which paths may be touched, and show paths of any bytes to people.

Pure except for `confine` and its kin, which resolve links and look for the root's marker.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from blake3 import blake3

from caxev.core.errors import GiveUp
from caxev.core.escapes import escaped
from caxev.files.confined import Confined, P, beside, join, parent
from caxev.files.roots import check_root

RESERVED: Final = ".caxev-"
"""The prefix of our own files beside copies. No run, copy or file in a copy may have it."""
PART_PREFIX: Final = f"{RESERVED}part-"
ORIGIN_PREFIX: Final = f"{RESERVED}from-"
LOCK_PREFIX: Final = f"{RESERVED}lock-"
LONGEST_NAME: Final = 255 - len(f"{RESERVED}moved-")
"""The longest name of a copy, in bytes, that leaves room for any prefix of ours."""


def confine(path: str, roots: Sequence[str]) -> Confined:
    """Return the real path of a copy, which need not exist, strictly inside one of `roots`.

    Symbolic links are resolved on both sides. Raises `GiveUp` for a path that is empty, relative,
    ``n/a``, contains a NUL byte, leads out of every root, or is one of our own files; `RootAway`
    if the root's disk is not mounted.
    """
    real = confine_own(path, roots)
    # If roots are nested, only the names below the innermost are checked: a site's own state
    # directory may be such a root.
    check_names(real[len(root_of(real, roots)) :], _shown(path))
    return real


def confine_own(path: str, roots: Sequence[str]) -> Confined:
    """As `confine`, but also for our own files beside the copies."""
    if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
        raise GiveUp(f"{_shown(path)} is not an absolute path")
    real = os.path.realpath(path)
    leads = f" leads to {_shown(real)}, which" if real != os.path.normpath(path) else ""
    inside_of = " or ".join(map(_shown, roots)) or "any directory of this site (it has none)"
    return _held(real, roots, f"{_shown(path)}{leads} is not inside {inside_of}")


def confine_entry(path: str, roots: Sequence[str]) -> Confined:
    """As `confine_own`, but if the copy is a link return its own path, not its target's."""
    name = own_name(path)
    if not path.startswith("/") or "\0" in path:
        raise GiveUp(f"{_shown(path)} is not an absolute path")
    real = os.path.join(os.path.realpath(os.path.dirname(path.rstrip("/"))), name)
    if not os.path.islink(real):
        return confine_own(real, roots)
    return _held(real, roots, f"{_shown(real)} is not inside any directory of this site")


def _held(real: str, roots: Sequence[str], why: str) -> Confined:
    """Return a resolved path strictly inside one of `roots`. Raises `GiveUp`, `RootAway`."""
    path = os.fsencode(real)
    holding = [root for root in roots if _holds(root, path)]
    for root in holding:
        check_root(root)
    if not holding:
        raise GiveUp(why)
    return Confined(path)


def _holds(root: str, path: bytes) -> bool:
    is_path = os.path.isabs(root) and "\0" not in root
    return is_path and inside(path, real_root(root))


def root_of(path: Confined, roots: Sequence[str]) -> Confined:
    """Return the innermost of these roots, resolved, that holds a path confined to them."""
    return Confined(max((real_root(root) for root in roots if _holds(root, path)), key=len))


def real_root(root: str) -> bytes:
    """Return the resolved path of a root."""
    return os.fsencode(os.path.realpath(root))


def inside(real: bytes, root: bytes) -> bool:
    """Return whether the resolved path `real` is strictly inside the resolved directory `root`."""
    return real != root and real.startswith(root.rstrip(b"/") + b"/")


def check_names(path: bytes, shown: str) -> None:
    """Raise `GiveUp` if a component of a path would be taken for one of our own files."""
    if any(name.startswith(RESERVED.encode()) for name in path.split(b"/")):
        raise GiveUp(
            f"{shown} is refused: names that begin with {RESERVED} are for caxev's own files; "
            "rename it"
        )


def safe_name(location: str) -> str:
    """Return the last component of a location. Raises `GiveUp` if no copy may have that name."""
    name = own_name(location)
    if (size := len(os.fsencode(name))) > LONGEST_NAME:
        raise GiveUp(
            f"{_shown(location)} is refused: its name has {size} bytes, and with our prefixes a "
            f"disk holds names of up to {LONGEST_NAME}; rename it"
        )
    check_names(os.fsencode(name), _shown(location))
    return name


def own_name(location: str) -> str:
    """As `safe_name`, but also for our own files beside the copies."""
    name = location.rstrip("/").rpartition("/")[2] if isinstance(location, str) else ""
    if name in {"", ".", ".."} or "\0" in name:
        raise GiveUp(f"{_shown(location)} ends in no usable name")
    return name


def partial_path(final: P) -> P:
    """Return the hidden sibling to which a copy is written before it is published as `final`."""
    safe_name(os.fsdecode(final))
    return beside(final, PART_PREFIX)


def origin_path(final: P) -> P:
    """Return the file beside a partial that names the content of the partial's source."""
    safe_name(os.fsdecode(final))
    return beside(final, ORIGIN_PREFIX)


def lock_path(directory: Confined) -> Confined:
    """Return the file beside a directory that its writer locks."""
    # Hashed: the directory's name may have a prefix already, and be too long for another.
    name = blake3(os.path.basename(directory)).hexdigest()[:32]
    return join(parent(directory), f"{LOCK_PREFIX}{name}".encode())


def printable(path: bytes) -> str:
    """Return a path on one line, with everything unprintable escaped by a backslash."""
    return escaped(path.replace(b"\\", rb"\\").decode(errors="backslashreplace"))


def shown(path: str) -> str:
    """Return a path of this machine as messages show it."""
    return printable(os.fsencode(path))


def _shown(path: object) -> str:
    if not isinstance(path, str):
        return repr(path)
    return repr(path) if path in {"", "n/a"} else printable(path.encode(errors="surrogateescape"))


def link_problem(path: bytes, target: bytes) -> str | None:
    """Return why the link at `path` in a tree, pointing to `target`, is refused; None: it is not.

    A target must be relative, with ``..`` only at its beginning, no more often than there are
    directories above the link inside the tree. A tree whose links all pass never leads out of
    itself.
    """
    # A `..` after a name is refused even if it seems to stay inside: the name could itself be a
    # link, and `..` then is the parent of what it points to.
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
    """Return a link's target relative to the link if it is inside the tree at `top`; else as is."""
    root = top.rstrip(b"/")
    if {b".", b".."}.intersection(target.split(b"/")):
        return target
    if target.rstrip(b"/") != root and not target.startswith(root + b"/"):
        return target
    return b"../" * path.count(b"/") + (target.removeprefix(root).strip(b"/") or b".")
