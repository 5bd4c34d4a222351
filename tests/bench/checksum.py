"""Digests of a tree in the page cache: ours beside sha512sum, b3sum and checksumdir.

checksumdir is what cax takes its checksum with, so ratios are to it: 2 is twice as fast. *manifest*
is a BLAKE3 of each file, *manifest and cax* a SHA-512 as well from the same read. *read* is the
limit: one thread that reads and does nothing else. Contenders take turns in every round, and each
round begins with another one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from attrs import frozen

from caxev.files import Manifest, digest_tree
from tests.places import vouched

T = TypeVar("T")

KIB: Final = 1 << 10
MIB: Final = 1 << 20
PEER: Final = "checksumdir"
_PIECE: Final = 8 * MIB
_MEMORY: Final = Path("/dev/shm")


@frozen
class Work:
    """So many files of so many bytes, in one directory."""

    name: str
    files: int
    size: int

    @property
    def total(self) -> int:
        return self.files * self.size


FULL: Final = (Work("8x128MiB", 8, 128 * MIB), Work("5000x20KiB", 5000, 20 * KIB))
QUICK: Final = (Work("2x4MiB", 2, 4 * MIB), Work("50x20KiB", 50, 20 * KIB))
ROUNDS: Final = 3


# -- what the transfer benchmark needs too --------------------------------------------------------


def make_tree(path: Path, work: Work) -> Path:
    """Fill a new directory with bytes that nothing can compress."""
    path.mkdir(parents=True)
    for number in range(work.files):
        with (path / f"{number:06}").open("wb") as file:
            for start in range(0, work.size, _PIECE):
                file.write(os.urandom(min(_PIECE, work.size - start)))
    return path


@contextmanager
def scratch(need: int) -> Iterator[Path]:
    """A directory for `need` bytes, in memory if they fit in there; removed with all that it holds.

    Raises OSError where there is no room on the disk either.
    """
    fits = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > need
    place = _MEMORY if fits else Path(tempfile.gettempdir())
    if not fits:
        say(f"{_MEMORY} has no room for {need / 1e9:.1f} GB: measured on {place}")
    if shutil.disk_usage(place).free < need:
        raise OSError(f"{place} has no room for {need / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=place) as directory:
        yield Path(directory)


def sums(program: str, path: Path) -> subprocess.Popen[str]:
    """Start a program of coreutils' kind on all files of a tree, by name; see `result`."""
    script = f"find . -type f -print0 | sort -z | xargs -0 -P1 {program}"
    return subprocess.Popen(["sh", "-c", script], cwd=path, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> str:
    """What it has printed. Raises RuntimeError where it failed."""
    printed, _ = process.communicate()
    if process.returncode != 0 or not printed:
        raise RuntimeError(f"{process.args!r} failed with {process.returncode}")
    return printed


def rotated(names: Sequence[T], by: int) -> list[T]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in times.items()}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def nothing(value: object, *, report: object) -> None:
    """A worker's job that does nothing, but for loading what `value` needs."""


def digest(path: str, *, report: Any) -> Manifest:
    """A worker's job: the manifest of a tree."""
    return digest_tree(vouched(path), sha512=False, report=report)


# -- contenders -----------------------------------------------------------------------------------


def _quiet(_done: int, _total: int) -> None:
    pass


def _ours(path: Path, *, sha512: bool) -> Manifest:
    return digest_tree(vouched(path), sha512=sha512, report=_quiet)


def _read(path: Path) -> None:
    buffer = bytearray(2 * MIB)
    for file in path.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def contenders() -> dict[str, Callable[[Path], object]]:
    """Everybody who can run here, by name. Who returns cax's checksum must return the same."""
    from checksumdir import dirhash

    found: dict[str, Callable[[Path], object]] = {
        "manifest": lambda path: _ours(path, sha512=False),
        "manifest and cax": lambda path: _ours(path, sha512=True),
        PEER: lambda path: dirhash(str(path), "sha512"),
        "sha512sum": lambda path: result(sums("sha512sum", path)),
        "read": _read,
    }
    if shutil.which("b3sum"):
        found["b3sum"] = lambda path: result(sums("b3sum", path))
    else:
        say("b3sum is not installed, so its row is left out (Debian: b3sum)")
    return found


def _cax_checksum(answer: object) -> str | None:
    """Return the checksum of cax's kind, if that is what a contender has found out."""
    if isinstance(answer, Manifest):
        return answer.cax_checksum()
    if isinstance(answer, str):
        return answer if "\n" not in answer else None
    return None


def measure(
    everybody: Mapping[str, Callable[[Path], object]], work: Work, path: Path, rounds: int
) -> dict[str, float]:
    """Seconds that each contender takes, medians; raises where two disagree on the digest."""
    times: dict[str, list[float]] = {name: [] for name in everybody}
    answers: set[str | None] = set()
    _read(path)
    for n in range(rounds):
        for name in rotated(list(everybody), n):
            began = time.perf_counter()
            answer = everybody[name](path)
            times[name].append(time.perf_counter() - began)
            answers.add(_cax_checksum(answer))
    if len(answers - {None}) != 1:
        raise AssertionError(f"{work.name}: not one checksum but {answers}")
    return medians(times)


def rows_of(work: Work, seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "work": work.name,
            "name": name,
            "seconds": round(taken, 4),
            "gb_per_s": round(work.total / taken / 1e9, 3),
            "ratio": round(seconds[PEER] / taken, 3),
        }
        for name, taken in sorted(seconds.items(), key=lambda pair: pair[1])
    ]


def main(*, as_json: bool, quick: bool) -> None:
    rows, everybody = [], contenders()
    for work in QUICK if quick else FULL:
        with scratch(work.total) as directory:
            path = make_tree(directory / "tree", work)
            seconds = measure(everybody, work, path, 1 if quick else ROUNDS)
            rows += rows_of(work, seconds)
    _show(rows, as_json=as_json)
    if as_json:
        print(json.dumps({"rows": rows}))


def _show(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    # Not at the top: workers of the transfer benchmark load this module, and are weighed.
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "work", "who", "seconds", "GB/s", f"{PEER} = 1", title="digests in the page cache"
    )
    for row in rows:
        figures = (f"{row['seconds']:.3f}", f"{row['gb_per_s']:.2f}", f"{row['ratio']:.2f}")
        table.add_row(row["work"], row["name"], *figures)
    Console(stderr=as_json).print(table)
