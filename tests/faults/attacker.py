"""An attacker who may write whatever the confined account of another site may write.

It does so at random moments: as a process of its own, which `hostile` tells where, and as an audit
hook of the process that it attacks, just before that opens, renames, links or lists something. Like
an account in a chroot it never gets out itself: it goes by descriptors and follows no link.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Final, Self

from attrs import define, field

from caxev.files.resolved import directory_of, open_resolved, remove, rename
from tests.places import vouched

HUGE: Final = 1 << 26
"""Bytes of a file that is nothing but a hole."""
PAUSE: Final = 0.02
"""Seconds between two strikes of the process, at most."""
PLANTED: Final = (
    ".caxev-part-{name}",
    ".caxev-part-{name}.tape",
    ".caxev-gone-{name}",
    ".caxev-moved-{name}",
    ".caxev-quarantine",
    ".caxev-quarantine/{name}",
    ".caxev-restored",
    ".caxev-jobs",
    ".caxev-jobs/groups/{name}.1/0.json",
    ".caxev-jobs/names/{name}",
    "caxev.py",
    "json.py",
)
"""What may be taken for ours by its name."""
WATCHED: Final = frozenset(
    {"open", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir"}
    | {"os.listdir", "os.scandir", "os.chmod", "os.truncate", "os.utime", "shutil.rmtree"}
    | {"subprocess.Popen", "os.posix_spawn"}
)
"""Python's own events at which the hook may strike."""


@define
class Attacker:
    """Strikes below `roots`; its links and programs lead to `outside`. `strikes` are counted."""

    outside: Path
    random: Random
    roots: Sequence[str] = ()
    strikes: int = 0
    names: Sequence[str] = ("run",)
    chance: float = 0.0
    _striking: bool = field(init=False, default=False)

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Strike, by chance, before something is done; more often than not at that very place."""
        if event not in WATCHED or self._striking or not self.roots:
            return
        if self.random.random() < self.chance:
            paths = (one for one in arguments if isinstance(one, str | bytes | os.PathLike))
            near = next(map(os.fsdecode, paths), None)
            self.strike(near if self.random.random() < 0.7 else None)

    def strike(self, near: str | None = None) -> None:
        """Do one thing, at or above `near` if that is below a root."""
        self._striking = True
        try:
            path = self._place(near)
            way = self.random.choice(WAYS)
            with suppress(OSError):
                way(self, path)
                self.strikes += 1
        finally:
            self._striking = False

    def _place(self, near: str | None) -> str:
        root = self.random.choice(self.roots)
        for one in self.roots:
            if near is not None and near.startswith(f"{one}/"):
                steps = near[len(one) + 1 :].split("/")
                return f"{one}/{'/'.join(steps[: self.random.randint(1, len(steps))])}"
        if self.random.random() < 0.3:
            name = self.random.choice(self.names)
            return f"{root}/{self.random.choice(PLANTED).format(name=name)}"
        found = list(_below(root))
        return self.random.choice(found) if found else f"{root}/{self.random.choice(self.names)}"

    # -- ways -------------------------------------------------------------------------------

    def link_to_file(self, path: str) -> None:
        self._put(path, lambda at, name: os.symlink(self.outside / "secret", name, dir_fd=at))

    def link_to_directory(self, path: str) -> None:
        self._put(path, lambda at, name: os.symlink(self.outside / "run", name, dir_fd=at))

    def link_to_nothing(self, path: str) -> None:
        target = self.outside / f"made-{self.random.randint(0, 9)}"
        self._put(path, lambda at, name: os.symlink(target, name, dir_fd=at))

    def fifo(self, path: str) -> None:
        self._put(path, lambda at, name: os.mkfifo(name, dir_fd=at))

    def directory(self, path: str) -> None:
        self._put(path, lambda at, name: os.mkdir(name, dir_fd=at))

    def huge(self, path: str) -> None:
        self._write(path, b"")
        descriptor = open_resolved(vouched(path), os.O_WRONLY)
        os.truncate(descriptor, HUGE)
        os.close(descriptor)

    def program(self, path: str) -> None:
        touch = f"touch {self.outside}/ran"
        row = json.dumps({"argv": ["/bin/sh", "-c", touch], "how": "done", "exit": 0, "why": ""})
        shell = f"#!/bin/sh\n{touch}\n"
        module = f"import os; os.system({touch!r})\n"
        self._write(path, self.random.choice((row, shell, module)).encode())

    def gone(self, path: str) -> None:
        remove(vouched(path))

    def aside(self, path: str) -> None:
        rename(vouched(path), vouched(f"{path}.{self.random.randint(0, 9)}"))

    def swap(self, path: str) -> None:
        other = self._place(None)
        aside = f"{path}.swapped"
        rename(vouched(path), vouched(aside))
        rename(vouched(other), vouched(path))
        rename(vouched(aside), vouched(other))

    def _put(self, path: str, make: Callable[[int, bytes], object]) -> None:
        """Have something else stand there, at once; what did stands beside it."""
        self._above(path)
        with directory_of(vouched(path)) as (directory, name):
            fresh = b".new-" + name[:100]
            with suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=directory)
            make(directory, fresh)
            with suppress(OSError):
                os.rename(name, name[:100] + b".old", src_dir_fd=directory, dst_dir_fd=directory)
            os.rename(fresh, name, src_dir_fd=directory, dst_dir_fd=directory)

    def _write(self, path: str, content: bytes) -> None:
        self._above(path)
        write(path, content)

    def _above(self, path: str) -> None:
        make_above(next(one for one in self.roots if path.startswith(f"{one}/")), path)


WAYS: Final = (
    Attacker.link_to_file,
    Attacker.link_to_directory,
    Attacker.link_to_directory,
    Attacker.link_to_nothing,
    Attacker.fifo,
    Attacker.directory,
    Attacker.huge,
    Attacker.program,
    Attacker.gone,
    Attacker.aside,
    Attacker.swap,
)


def write(path: str, content: bytes) -> None:
    """Write a file, through no link. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with os.fdopen(open_resolved(vouched(path), flags, 0o755), "wb") as file:
        file.write(content)


def make_above(root: str, path: str) -> None:
    """Make what is missing between a root and a path in it, through no link. Raises OSError."""
    steps = path[len(root) + 1 :].split("/")[:-1]
    for count in range(1, len(steps) + 1):
        with (
            suppress(FileExistsError),
            directory_of(vouched("/".join([root, *steps[:count]]))) as one,
        ):
            os.mkdir(one[1], dir_fd=one[0])


def _below(root: str) -> Iterator[str]:
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            yield f"{directory}/{name}"


@define(eq=False)
class Beside:
    """An attacker as a process of its own. Use it as a context manager."""

    outside: Path
    seed: int
    strikes: int = field(init=False, default=0)
    _process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", __name__, str(self.outside), str(self.seed)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:
            pass

    @contextmanager
    def striking(self, roots: Sequence[str]) -> Iterator[None]:
        """Have it strike below these for the length of the block."""
        self._tell(roots)
        try:
            yield
        finally:
            self._tell(())

    def _tell(self, roots: Sequence[str]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(roots) + "\n")
        self._process.stdin.flush()
        self.strikes = int(self._process.stdout.readline())


def main(outside: str, seed: str) -> None:
    """Strike where standard input names, a list of roots a line, until it ends."""
    attacker = Attacker(Path(outside), Random(int(seed)))
    while True:
        pause = attacker.random.random() * PAUSE if attacker.roots else None
        if select.select([0], [], [], pause)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            attacker.roots = json.loads(line)
            sys.stdout.write(f"{attacker.strikes}\n")
            sys.stdout.flush()
        elif attacker.roots:
            attacker.strike()


if __name__ == "__main__":
    main(*sys.argv[1:])
