"""A simulator of cax 5.2.1, as far as others on the same collection notice it.

It does what cax is known to do to runs and files, round after round, each task over all runs:

- it claims a copy by adding its entry whether there is one or not (the filter is the run's id), and
  names no source in it;
- it writes straight to the final name, and goes on with what is there by length alone;
- it takes the last entry of a host for the host's copy;
- when a copy has come it is ``verifying``, and at its own host ``transferred`` with its SHA-512,
  which nobody compares; when it fails it is ``error``;
- at its own host it takes out every entry that is ``error``, and any that has not come to its end a
  day after it was made; raw files stay;
- a copy whose checksum is not the master's is deleted with its entry if two copies are good;
- raw data of the age of ``purge`` days is deleted with its entry if three copies are good.

What it takes out is the entry as it has read it, so it misses one that has changed meanwhile.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from attrs import define, field
from pymongo import MongoClient
from pymongo.collection import Collection

from caxev.core.model import (
    ERROR,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
)

Document = dict[str, Any]
DAY: Final = timedelta(days=1)
BLOCK: Final = 1 << 16


class Dies(BaseException):
    """The process ends while it copies: its entry stays as it is."""


def dirhash(top: Path) -> str:
    """The checksum of a directory: SHA-512 over the sorted hexadecimal SHA-512 of its files."""
    files = (path for path in top.rglob("*") if path.is_file())
    digests = sorted(hashlib.sha512(path.read_bytes()).hexdigest() for path in files)
    return hashlib.sha512("".join(digests).encode()).hexdigest()


@define(eq=False)
class Cax:
    """One cax, at the site `here`, with the raw directories of all sites as it reaches them.

    `copies` says whether it brings a run's data to a host. `meddle` is called before each file that
    it copies, with the run's name, the target's host and the file at both ends; it may raise, as
    the way may, or `Dies`. By run and host, `taken_out` counts the entries that it took out, and
    `failed` the copies that broke off.
    """

    uri: str
    database: str
    here: str
    directories: Mapping[str, Path]
    master: str
    upload: Sequence[str] = ()
    download: Sequence[str] = ()
    purge: float | None = None
    copies: Callable[[Document, str], bool] = lambda *_: True
    meddle: Callable[[str, str, Path, Path], None] = lambda *_: None
    taken_out: Counter[tuple[Any, str]] = field(init=False, factory=Counter)
    failed: Counter[tuple[Any, str]] = field(init=False, factory=Counter)
    rounds: int = field(init=False, default=0)
    trouble: BaseException | None = field(init=False, default=None)
    _ends: threading.Event = field(init=False, factory=threading.Event)

    def run(self, pause: float) -> None:
        """Play rounds until `end` is called. Blocks."""
        try:
            while not self._ends.is_set():
                self.round()
                self._ends.wait(pause)
        except BaseException as error:
            self.trouble = error
            raise

    def end(self) -> None:
        """Have `run` return after this round."""
        self._ends.set()

    def round(self) -> None:
        """Do every task once, each over all runs."""
        with MongoClient[Document](self.uri, tz_aware=True) as client:
            runs = client[self.database]["runs_new"]
            for task in (
                self._push,
                self._retry_stalled,
                self._retry_bad_checksum,
                self._pull,
                self._add_checksum,
                self._purge,
            ):
                for row in list(runs.find({}, {"_id": 1}).sort("start", -1)):
                    run = runs.find_one(row)
                    if run is not None and run.get("data"):
                        task(runs, run)
        self.rounds += 1

    # -- copying ----------------------------------------------------------------------------

    def _last(self, run: Document, host: str, status: str | None = None) -> Document | None:
        found = [
            one
            for one in run["data"]
            if (one["type"], one["host"]) == ("raw", host) and status in (None, one["status"])
        ]
        return found[-1] if found else None

    def _push(self, runs: Collection[Document], run: Document) -> None:
        source = self._last(run, self.here, TRANSFERRED)
        for host in self.upload:
            if source is None or self._last(run, host) is not None:
                continue
            if self.copies(run, host):
                self._copy(runs, run, source, host)
                return

    def _pull(self, runs: Collection[Document], run: Document) -> None:
        if self._is_old(run) or not self.copies(run, self.here):
            return
        for host in self.download:
            source = self._last(run, host, TRANSFERRED)
            if source is not None and self._last(run, self.here) is None:
                self._copy(runs, run, source, self.here)
                return

    def _copy(self, runs: Collection[Document], run: Document, source: Document, host: str) -> None:
        old = Path(source["location"])
        entry: Document = {
            "type": "raw",
            "host": host,
            "status": TRANSFERRING,
            "location": str(self.directories[host] / old.name),
            "checksum": None,
            "creation_time": datetime.now(UTC),
        }
        runs.update_one({"_id": run["_id"]}, {"$push": {"data": entry}})
        try:
            self._move(run["name"], host, old, Path(entry["location"]))
            status = VERIFYING
        except Dies:
            return
        except OSError:
            self.failed[run["_id"], host] += 1
            status = ERROR
        self._set(runs, run, entry, status=status)

    def _move(self, name: str, host: str, old: Path, new: Path) -> None:
        """Copy as rsync does that is to append: what is there is taken for right."""
        # 5.2.1 means to append, but asks by `is`, which no text of its configuration meets: its
        # rsync compares. To append is the harder case.
        for file in sorted(path for path in old.rglob("*") if path.is_file()):
            target = new / file.relative_to(old)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.meddle(name, host, file, target)
            have = target.stat().st_size if target.exists() else 0
            with file.open("rb") as reading, target.open("ab") as writing:
                reading.seek(have)
                while block := reading.read(BLOCK):
                    writing.write(block)

    @staticmethod
    def _set(runs: Collection[Document], run: Document, entry: Document, **fields: object) -> None:
        """Change the entry that still is what it was."""
        which = {"_id": run["_id"], "data": {"$elemMatch": entry}}
        runs.update_one(which, {"$set": {f"data.$.{name}": v for name, v in fields.items()}})

    # -- at its own host --------------------------------------------------------------------

    def _own(self, run: Document) -> Iterator[Document]:
        return (one for one in run["data"] if one.get("host") == self.here)

    def _add_checksum(self, runs: Collection[Document], run: Document) -> None:
        for entry in self._own(run):
            if entry["status"] == VERIFYING:
                place = Path(entry["location"])
                found = {"status": TRANSFERRED, "checksum": dirhash(place)}
                lost = {"status": ERROR, "checksum": None}
                self._set(runs, run, entry, **(found if place.is_dir() else lost))

    def _retry_stalled(self, runs: Collection[Document], run: Document) -> None:
        for entry in self._own(run):
            made = entry.get("creation_time")
            if made is None or entry["status"] in (TRANSFERRED, VERIFYING):
                continue
            if entry["status"] == ERROR or datetime.now(UTC) - made > DAY:
                self._take_out(runs, run, entry)

    def _retry_bad_checksum(self, runs: Collection[Document], run: Document) -> None:
        wanted = self._master(run)
        for entry in self._own(run):
            differs = wanted is not None and entry.get("checksum") != wanted
            if entry["status"] == TRANSFERRED and differs and self._good(run) > 1:
                shutil.rmtree(entry["location"], ignore_errors=True)
                self._take_out(runs, run, entry)

    def _purge(self, runs: Collection[Document], run: Document) -> None:
        for entry in self._own(run):
            if entry["status"] == TRANSFERRED and self._is_old(run) and self._good(run) >= 3:
                shutil.rmtree(entry["location"], ignore_errors=True)
                self._take_out(runs, run, entry)

    def _is_old(self, run: Document) -> bool:
        age = datetime.now(UTC) - run["start"]
        return self.purge is not None and age > timedelta(days=self.purge)

    def _master(self, run: Document) -> str | None:
        master = self._last(run, self.master, TRANSFERRED)
        return None if master is None else master.get("checksum")

    def _good(self, run: Document) -> int:
        wanted = self._master(run)
        raw = (one for one in run["data"] if one["type"] == "raw")
        return sum(one["status"] == TRANSFERRED and one.get("checksum") == wanted for one in raw)

    def _take_out(self, runs: Collection[Document], run: Document, entry: Document) -> None:
        done = runs.update_one({"_id": run["_id"]}, {"$pull": {"data": entry}})
        self.taken_out[run["_id"], entry["host"]] += done.modified_count
