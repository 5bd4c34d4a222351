"""A simulator of ``dsmc``, IBM's tape client, for the demo and the tests: it is not the real one.

It has the command line, output and return codes that caxev uses, as far as public sources document
them, and keeps its "tapes" in the directory that ``DSMC_SIMULATOR_TAPES`` names. It does not use
caxev, and no module imports it: it runs as a program, by ``archive.command`` of sites.json. The
tests have a version of it that fails as they want.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

TYPE_CHECKING = False  # without `typing`, and what few commands need, the program starts sooner
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")

BANNER = """\
IBM Storage Protect
Command Line Backup-Archive Client Interface
  Client Version 8, Release 1, Level 25.0 (simulated)
  Client date/time: {now}
(c) Copyright IBM Corp. 1990, 2024. All Rights Reserved.

Node Name: SIMULATOR
"""
SESSION = """\
Session established with server SIMULATED: Linux/x86_64
  Server Version 8, Release 1, Level 21.000
  Server date/time: {now}  Last access: {now}
"""
KNOWN = """
    absolute dateformat timeformat numberformat optfile servername subdir filesonly inactive
    filelist preservepath followsymbolic replace latest
"""


class Stopped(Exception):
    """The command ends here, with this return code."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Tapes:
    """Versions of files by their paths, the oldest first, and the bytes of each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.objects = directory / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def index(self) -> Iterator[dict[str, Any]]:
        """Read what is there; written back at the end. One client at a time."""
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.directory / "index.json"
            index = json.loads(file.read_text()) if file.exists() else {"serial": 0, "files": {}}
            before = json.dumps(index)
            yield index
            # By a rename: a client that is killed here leaves the old index.
            if (text := json.dumps(index)) != before:
                (new := file.with_suffix(".new")).write_text(text)
                new.replace(file)

    def serial(self) -> int:
        """Count this command."""
        with self.index() as index:
            index["serial"] += 1
            return int(index["serial"])

    def store(self, path: Path) -> None:
        """Send a file: its newest version from now on."""
        # The bytes before the index, so that it never names an object that is incomplete.
        name = f"{self.serial()}"
        copy(path, self.objects / name)
        status = path.stat()
        version = {
            "object": name,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "time": _now(),
            "active": True,
        }
        with self.index() as index:
            versions = index["files"].setdefault(str(path), [])
            for former in versions:
                former["active"] = False
            versions.append(version)


class Client:
    """One call of the client."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.words = [word for word in arguments if not word.startswith("-")]
        pairs = [word[1:].partition("=") for word in arguments if word.startswith("-")]
        self.options = {name: value or "yes" for name, _, value in pairs}
        self.tapes = Tapes(Path(os.environ["DSMC_SIMULATOR_TAPES"]))
        self.command = self.words.pop(0) if self.words else ""

    def run(self) -> int:
        """Run the command; returns its return code."""
        now = _now()
        say(BANNER.format(now=now))
        if unknown := self.options.keys() - set(KNOWN.split()):
            say(f"ANS1036S Invalid option '{min(unknown)}' found in the options")
            return 12
        if (optfile := self.options.get("optfile")) and not os.access(optfile, os.R_OK):
            say(f"ANS1035S Options file '{optfile}' could not be found, or it cannot be read.")
            return 12
        action = {"incremental": self.incremental, "restore": self.restore, "query": self.query}
        try:
            self.log_in()
            say(SESSION.format(now=now))
            if self.command not in action:
                say(f"ANS1138E The '{self.command}' command is not valid.")
                return 12
            return action[self.command]()
        except Stopped as stopped:
            return stopped.status

    def log_in(self) -> None:
        """Begin a session with the server."""

    def each(self, items: Sequence[T], act: Callable[[T], object]) -> Sequence[T]:
        """Act on each item in turn; returns those on which that succeeded."""
        for item in items:
            act(item)
        return items

    # -- incremental ------------------------------------------------------------------------

    def incremental(self) -> int:
        top = Path(self.words[0])
        volume = str(top)
        say(f"\nIncremental backup of volume '{volume}/'")
        files = sorted(path for path in top.iterdir() if path.is_file())
        self._expire(top, {str(path) for path in files})
        todo = [path for path in files if self._changed(path)]
        sent = self.each(todo, self._send)
        failed = len(todo) - len(sent)
        if failed:
            say(f"ANS1802E Incremental backup of '{volume}/*' finished with {failed} failure(s)\n")
        else:
            say(f"Successful incremental backup of '{volume}/*'\n")
        counts = {
            "inspected": len(files) + 1,
            "backed up": len(sent),
            "updated": 0,
            "rebound": 0,
            "deleted": 0,
            "expired": 0,
            "failed": failed,
            "encrypted": 0,
            "grew": 0,
        }
        amount = sum(path.stat().st_size for path in sent)
        summary([(f"objects {name}", f"{count:,}") for name, count in counts.items()], amount)
        return 4 if failed else 0

    def _send(self, path: Path) -> None:
        self.tapes.store(path)
        say(f"Normal File-->{path.stat().st_size:>20,} {path} [Sent]")

    def _changed(self, path: Path) -> bool:
        with self.tapes.index() as index:
            versions = index["files"].get(str(path), [])
        status = path.stat()
        # As the real client: unchanged files are skipped, unless -absolute is given.
        same = [
            one
            for one in versions
            if one["active"]
            and (one["size"], one["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        ]
        return not same or "absolute" in self.options

    def _expire(self, top: Path, there: set[str]) -> None:
        # As the real client: a file that is gone from the disk becomes inactive on tape.
        with self.tapes.index() as index:
            for path, versions in index["files"].items():
                if str(Path(path).parent) == str(top) and path not in there:
                    for version in versions:
                        version["active"] = False

    # -- restore ----------------------------------------------------------------------------

    def restore(self) -> int:
        say("Restore function invoked.\n")
        lines = Path(self.options["filelist"]).read_text().splitlines()
        wanted, target = [shlex.split(line)[0] for line in lines if line], Path(self.words[0])
        found = []
        with self.tapes.index() as index:
            for path in wanted:
                versions = [
                    one
                    for one in index["files"].get(path, [])
                    if one["active"] or "latest" in self.options
                ]
                if not versions:
                    say(f"ANS1345E No objects on the server match '{path}'")
                else:
                    found.append((path, versions[-1]))
        if len(found) < len(wanted) or not found:
            say("ANS1302E No objects on server match query")
            return 12
        say("ANS1247I Waiting for files from the server...")
        done = self.each(found, lambda one: self._bring(*one, target))
        failed, amount = len(found) - len(done), sum(version["size"] for _, version in done)
        say("\nRestore processing finished.\n")
        rows = [("objects restored", f"{len(done):,}"), ("objects failed", f"{failed:,}")]
        summary(rows, amount)
        return 12 if failed else 0

    def _bring(self, path: str, version: dict[str, Any], target: Path) -> None:
        new = self.place(path, version, target)
        say(f"Restoring      {version['size']:>14,} {path} --> {new} [Done]")

    def place(self, path: str, version: dict[str, Any], target: Path) -> Path:
        """Write a file from tape into a directory; returns its path."""
        target.mkdir(parents=True, exist_ok=True)
        new = target / Path(path).name
        if new.exists() and self.options.get("replace") != "all":
            say(f"ANS4035W File '{new}' currently exists; skipped.")
            raise Stopped(4)
        copy(self.tapes.objects / version["object"], new)
        os.utime(new, ns=(version["mtime_ns"], version["mtime_ns"]))
        return new

    # -- query ------------------------------------------------------------------------------

    def query(self) -> int:
        if self.words[:1] == ["session"]:
            say("IBM Storage Protect Server Connection Information\n")
            say("Home Server Name........: SIMULATED\nServer Type.............: Linux/x86_64")
            say("Server Version..........: Ver. 8, Rel. 1, Lev. 21.0\n")
            say("Node Name...............: SIMULATOR\nUser Name...............: root")
            return 0
        if self.words[:1] not in (["backup"], ["ba"]):
            say("ANS1138E The 'query' command must be followed by a subcommand")
            return 12
        rows = list(self._rows(self.words[1]))
        if not rows:
            say("ANS1092W No files matching search criteria were found")
            return 8
        say(f"{'Size':>15}{'Backup Date':>19}{'Mgmt Class':>26}{'A/I':>14} File")
        say(f"{'----':>15}{'-----------':>19}{'----------':>26}{'---':>14} ----")
        self.each(rows, say)
        return 0

    def _rows(self, pattern: str) -> Iterator[str]:
        with self.tapes.index() as index:
            files = index["files"]
        for path, versions in sorted(files.items()):
            deep = self.options.get("subdir") == "yes"
            if fnmatchcase(path, pattern) and (deep or path.count("/") == pattern.count("/")):
                for one in reversed(versions):
                    if one["active"] or "inactive" in self.options:
                        state = "A" if one["active"] else "I"
                        size = f"{one['size']:>15,}  B  {one['time']}"
                        yield f"{size}{'STANDARD':>21}{state:>14}  {path}"


def _now() -> str:
    """Return the time as dsmc prints it: the machine's local one."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")


def summary(rows: Sequence[tuple[str, str]], amount: int) -> None:
    """Print the counts at the end."""
    more = (("bytes transferred", size_words(amount)),)
    for name, value in (*rows, *more):
        say(f"{f'Total number of {name}:':<34}{value:>12}")
    say(f"{'Data transfer time:':<34}{'0.01 sec':>12}")
    say(f"{'Network data transfer rate:':<34}{'254,743.14 KB/sec':>12}")
    say(f"{'Aggregate data transfer rate:':<34}{'79,174.32 KB/sec':>12}")
    say(f"{'Elapsed processing time:':<34}{'00:00:01':>12}")


def size_words(amount: int) -> str:
    """Return a number of bytes as the client prints it."""
    value, unit = float(amount), "B"
    for unit in ("B", "KB", "MB", "GB"):  # noqa: B007
        if value < 1024:  # noqa: PLR2004
            break
        value /= 1024
    return f"{amount}  B" if unit == "B" else f"{value:.2f} {unit}"


def copy(old: Path, new: Path) -> None:
    """Copy a file's bytes."""
    from shutil import copyfile

    copyfile(old, new)


def say(text: str) -> None:
    """Print a text at once, as its reader waits for it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(Client(sys.argv[1:]).run())
