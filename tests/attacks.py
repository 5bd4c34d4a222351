"""Ways to lead whoever trusts a path out of a site's own directories.

One table for every command that takes a path from the database: `attacks` lays the traps (links
that lead out) in a directory of the test's own, and returns the paths; `Watched` tells afterwards
whether anything outside was touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attrs import define, field, frozen

SECRET: Final = b"nobody may read this"


@frozen
class Attack:
    """A path as the database might name it; `kept`: whether it may lead to something inside."""

    name: str
    path: str
    kept: bool = False

    def __str__(self) -> str:
        return self.name


@define
class Watched:
    """What lies outside: a directory that an attack would read, write or remove."""

    outside: Path
    _before: dict[str, tuple[bytes | str, ...]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        (self.outside / "run").mkdir(parents=True, exist_ok=True)
        (self.outside / "run" / "secret").write_bytes(SECRET)
        (self.outside / "secret").write_bytes(SECRET)
        self._before = self._now()

    def _now(self) -> dict[str, tuple[bytes | str, ...]]:
        found: dict[str, tuple[bytes | str, ...]] = {}
        for directory, names, files in os.walk(self.outside):
            for name in (*names, *files):
                path = Path(directory) / name
                status = path.lstat()
                held = str(path.readlink()) if path.is_symlink() else _content(path)
                found[str(path)] = (held, f"{status.st_mode:o} {status.st_uid}:{status.st_gid}")
        return found

    @property
    def untouched(self) -> bool:
        """Whether all is there, as it was, and nothing more."""
        return self._now() == self._before

    def leaked(self, where: Path) -> bool:
        """Whether a file at or below `where` holds what stands outside."""
        files = [where] if where.is_file() else (p for p in where.rglob("*") if p.is_file())
        return any(SECRET in file.read_bytes() for file in files if not _leads_to(file, self))


def _leads_to(file: Path, watched: Watched) -> bool:
    return file.resolve().is_relative_to(watched.outside.resolve())


def _content(path: Path) -> bytes | str:
    return "directory" if path.is_dir() else path.read_bytes()


def attacks(root: Path, outside: Path) -> list[Attack]:
    """Lay traps in `root`, one of a site's directories, that lead to `outside`; the paths to try.

    Both must be there; `outside` holds ``run`` and ``secret``, as `Watched` makes them.
    """
    return list(_attacks(root, outside))


def _attacks(root: Path, outside: Path) -> Iterator[Attack]:
    up = "../" * 30
    away = str(outside).lstrip("/")
    yield from _climbing(root, outside, up, away)
    yield from _of_links(root, outside)
    yield from _of_names(root, outside)


def _climbing(root: Path, outside: Path, up: str, away: str) -> Iterator[Attack]:
    beside = f"{root}-beside"
    yield Attack("absolute", f"{outside}/run")
    yield Attack("the parent", f"{root}/..")
    yield Attack("the parent's other child", f"{root}/../{outside.name}/run")
    yield Attack("far up and down again", f"{root}/{up}{away}/run")
    yield Attack("up after a name", f"{root}/run/../../{outside.name}/run")
    yield Attack("up through what is not there", f"{root}/none/../../{outside.name}/run")
    yield Attack("dots and slashes", f"{root}/.//.././/{outside.name}//run")
    yield Attack("the root itself", f"{root}")
    yield Attack("the root with a slash", f"{root}/")
    yield Attack("the root with a dot", f"{root}/.")
    yield Attack("the root by way of a name", f"{root}/run/..")
    yield Attack("a name that begins like the root", f"{beside}/run")
    yield Attack("two slashes", f"/{outside}/run")
    yield Attack("the file system's root", "/")
    yield Attack("nothing", "")
    yield Attack("a dot", ".")
    yield Attack("relative", f"{away}/run")
    yield Attack("relative and up", f"{up}{away}/run")
    yield Attack("home", "~/run")
    yield Attack("another's home", "~root/run")
    yield Attack("a variable", "$HOME/run")
    yield Attack("a URL", f"file://{outside}/run")
    yield Attack("host and path", f"localhost:{outside}/run")
    yield Attack("of this process", f"/proc/self/root{outside}/run")
    yield Attack("its directory", f"/proc/self/cwd/{up}{away}/run")


def _of_links(root: Path, outside: Path) -> Iterator[Attack]:
    traps = {
        "link": outside / "run",
        "linked-directory": outside,
        "linked-up": Path(".."),
        "linked-file": outside / "secret",
        "to-nothing": outside / "made-by-an-attack",
        "chain": Path("linked-directory") / "run",
        "here": Path(),
    }
    for name, target in traps.items():
        (root / name).symlink_to(target)
    yield Attack("a link out", f"{root}/link")
    yield Attack("a link out, with a slash", f"{root}/link/")
    yield Attack("through a linked directory", f"{root}/linked-directory/run")
    yield Attack("new, through a linked directory", f"{root}/linked-directory/new")
    yield Attack("through a link upwards", f"{root}/linked-up/{outside.name}/run")
    yield Attack("a link to a file", f"{root}/linked-file")
    yield Attack("a link to nothing", f"{root}/to-nothing")
    yield Attack("a chain of links", f"{root}/chain")
    yield Attack("the root by a link", f"{root}/here/.")
    yield Attack("a link, then up", f"{root}/linked-directory/../{outside.name}/run")


def _of_names(root: Path, outside: Path) -> Iterator[Attack]:
    yield Attack("NUL", f"{root}/run\0")
    yield Attack("NUL before the climb", f"{root}/run\0/../../{outside.name}/run")
    yield Attack("nothing but NUL", "\0")
    yield Attack("newline", f"{root}/run\n{outside}/run", kept=True)
    yield Attack("a newline at the end", f"{root}/run\n", kept=True)
    yield Attack("leading dash", f"{root}/-rf", kept=True)
    yield Attack("an option with a value", f"{root}/--rsync-path=touch {outside}/x", kept=True)
    yield Attack("an option alone", f"-e{outside}/run")
    yield Attack("a command", f"{root}/$(touch {outside.name})", kept=True)
    yield Attack("backticks", f"{root}/`touch x`; rm -rf *", kept=True)
    yield Attack("a pattern", f"{root}/*", kept=True)
    yield Attack("percent", f"{root}/%2e%2e/{outside.name}/run", kept=True)
    yield Attack("backslashes", f"{root}/..\\{outside.name}\\run", kept=True)
    yield Attack("look-alike dots", f"{root}/\u2025/{outside.name}/run", kept=True)
    yield Attack("look-alike slashes", f"{root}/..\u2215{outside.name}\u2215run", kept=True)
    yield Attack("full-width", f"{root}/\uff0e\uff0e/{outside.name}/run", kept=True)
    yield Attack("right to left", f"{root}/\u202enur", kept=True)
    yield Attack("overlong UTF-8", f"{root}/\udcc0\udcae\udcc0\udcae/{outside.name}", kept=True)
    yield Attack("far too long", f"{root}/{'x' * 5000}", kept=True)
    yield Attack("deep", f"{root}/{'x/' * 100}x", kept=True)
