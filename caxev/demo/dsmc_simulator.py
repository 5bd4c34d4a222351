"""A simulator of ``dsmc``, IBM's tape client, for the demo and the tests: it is not the real one.

It has the command line, output and return codes that caxev uses, as far as public sources document
them, and keeps its "tapes" in a directory. It does not use caxev, and no module imports it: it runs
as a program, by ``archive.command`` of sites.json. Its environment::

    DSMC_SIMULATOR_TAPES    the directory that holds the tapes
    DSMC_SIMULATOR_FAULTS   a file with a fault a line, each for the next command that it fits:
                            ``restore hang``
    DSMC_SIMULATOR_CHANCE   the probability, 0 to 1, of a fault in any command, by
    DSMC_SIMULATOR_SEED     this seed and how many commands there were
    DSMC_SIMULATOR_REFUSED  a file with the name of a directory a line, of which nothing is taken
                            while it is in there: no backup of it gets any further than the login
    DSMC_SIMULATOR_DELAY    seconds that a tape takes to be mounted
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random
from typing import Any, NoReturn

EVERYWHERE = ("unreachable", "hang", "truncated", "killed")
FAULTS = {
    "incremental": (*EVERYWHERE, "lost", "media", "changed", "quota", "wrong-byte", "question"),
    "restore": (*EVERYWHERE, "lost", "media", "partial", "wrong-byte", "question"),
    "query": (*EVERYWHERE, "lost"),
}
"""The faults of each command."""

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
MESSAGES = {
    "lost": "ANS1029E Communication with the IBM Storage Protect server is lost.",
    "media": "ANS1312E Server media mount not possible.",
    "path": "ANS1063E The specified path is not a valid file system or logical volume name.",
    "quota": "ANS1311E Server out of data storage space.",
    "refused": "ANS1353E Session rejected: Unknown or incorrect ID entered",
    "unreachable": "ANS1017E Session rejected: TCP/IP connection failure.",
}
KNOWN = """
    absolute dateformat timeformat numberformat optfile servername subdir filesonly inactive
    filelist preservepath followsymbolic replace latest
"""


class Fault(Exception):
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

    def store(self, path: Path, *, wrong: bool) -> None:
        """Send a file: its newest version from now on."""
        # The bytes before the index, so that it never names an object that is incomplete.
        name = f"{self.serial()}"
        shutil.copyfile(path, self.objects / name)
        if wrong:
            flip(self.objects / name)
        status = path.stat()
        version = {
            "object": name,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
            "active": True,
        }
        with self.index() as index:
            versions = index["files"].setdefault(str(path), [])
            for former in versions:
                former["active"] = False
            versions.append(version)


def flip(path: Path, mask: int = 0xFF) -> None:
    """Change a byte in the middle of a file; two changes with other masks do not make it good."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1) or b"\0"
        file.seek(path.stat().st_size // 2)
        file.write(bytes([byte[0] ^ mask]))


class Client:
    """One call of the client."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.words = [word for word in arguments if not word.startswith("-")]
        pairs = [word[1:].partition("=") for word in arguments if word.startswith("-")]
        self.options = {name: value or "yes" for name, _, value in pairs}
        self.tapes = Tapes(Path(os.environ["DSMC_SIMULATOR_TAPES"]))
        self.command = self.words.pop(0) if self.words else ""
        self.fault = self._fault()
        if self.fault:
            with (self.tapes.directory / "struck").open("a") as struck:
                struck.write(f"{self.command} {self.fault}\n")

    def _fault(self) -> str:
        refused = Path(os.environ.get("DSMC_SIMULATOR_REFUSED", "/nonexistent"))
        names = refused.read_text().splitlines() if refused.exists() else []
        if self.command == "incremental" and Path(self.words[0]).name in names:
            return "refused"
        planned = os.environ.get("DSMC_SIMULATOR_FAULTS")
        # Planned faults come before random ones.
        if planned and Path(planned).exists():
            with Path(planned).open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                lines = file.read().splitlines()
                mine = next((one for one in lines if one.split()[:1] == [self.command]), None)
                # Removed under the lock: each planned fault strikes once, however many clients run.
                if mine is not None:
                    lines.remove(mine)
                    file.seek(0)
                    file.truncate()
                    file.write("".join(f"{line}\n" for line in lines))
                    return mine.split()[1]
        chance = float(os.environ.get("DSMC_SIMULATOR_CHANCE", "0"))
        if chance and self.command in FAULTS:
            random = Random(f"{os.environ.get('DSMC_SIMULATOR_SEED')} {self.tapes.serial()}")  # noqa: S311  # noise
            if random.random() < chance:
                return random.choice(FAULTS[self.command])
        return ""

    def run(self) -> int:
        """Run the command; returns its return code."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        say(BANNER.format(now=now))
        if unknown := self.options.keys() - set(KNOWN.split()):
            say(f"ANS1036S Invalid option '{min(unknown)}' found in the options")
            return 12
        if (optfile := self.options.get("optfile")) and not os.access(optfile, os.R_OK):
            say(f"ANS1035S Options file '{optfile}' could not be found, or it cannot be read.")
            return 12
        if self.fault in ("path", "refused", "unreachable"):
            say(MESSAGES[self.fault])
            return 12
        say(SESSION.format(now=now))
        action = {"incremental": self.incremental, "restore": self.restore, "query": self.query}
        if self.command not in action:
            say(f"ANS1138E The '{self.command}' command is not valid.")
            return 12
        try:
            return action[self.command]()
        except Fault as fault:
            return fault.status

    def strike(self) -> None:
        """Let the command's fault happen, if it is one of those in the middle."""
        if self.fault == "hang":
            hang()
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "truncated":
            raise Fault(0)
        if self.fault == "question":
            say("--- User Action is Required ---\nFile exists. Select an appropriate action")
            say("  1. Replace this object\n  2. Skip this object\n  A. Abort this operation")
            say("Action [1,2,A] : ", end="")
            hang()
        if self.fault in ("lost", "media", "quota"):
            say(MESSAGES[self.fault])
            raise Fault(12)

    def mount(self) -> None:
        time.sleep(float(os.environ.get("DSMC_SIMULATOR_DELAY", "0")))

    # -- incremental ------------------------------------------------------------------------

    def incremental(self) -> int:
        top = Path(self.words[0])
        volume = str(top)
        say(f"\nIncremental backup of volume '{volume}/'")
        files = sorted(path for path in top.iterdir() if path.is_file())
        self._expire(top, {str(path) for path in files})
        todo = [path for path in files if self._changed(path)]
        if self.fault == "media":
            self.strike()
        middle, sent, failed, amount = len(todo) // 2, 0, 0, 0
        self.mount()
        for number, path in enumerate(todo):
            if number == middle:
                if self.fault == "changed":
                    say(f"ANS1228E Sending of object '{path}' failed.")
                    say(f"ANS4037E Object '{path}' changed during processing.\nObject skipped.")
                    failed += 1
                    continue
                self.strike()
            self.tapes.store(path, wrong=self.fault == "wrong-byte" and number == middle)
            size = path.stat().st_size
            say(f"Normal File-->{size:>20,} {path} [Sent]")
            sent, amount = sent + 1, amount + size
        if not todo:
            self.strike()
        if failed:
            say(f"ANS1802E Incremental backup of '{volume}/*' finished with {failed} failure(s)\n")
        else:
            say(f"Successful incremental backup of '{volume}/*'\n")
        counts = {
            "inspected": len(files) + 1,
            "backed up": sent,
            "updated": 0,
            "rebound": 0,
            "deleted": 0,
            "expired": 0,
            "failed": failed,
            "encrypted": 0,
            "grew": 0,
        }
        summary([(f"objects {name}", f"{count:,}") for name, count in counts.items()], amount)
        return 4 if failed else 0

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
        wanted, target = self._wanted()
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
        if self.fault == "media":
            self.strike()
        say("ANS1247I Waiting for files from the server...")
        self.mount()
        middle, done, amount = len(found) // 2, 0, 0
        for number, (path, version) in enumerate(found):
            if number == middle:
                if self.fault in ("hang", "killed", "lost"):  # in the midst of a file
                    self._place(path, version, target, part=True)
                self.strike()
                if self.fault == "partial":
                    say(f"ANS1228E Sending of object '{path}' failed.")
                    continue
            new = self._place(path, version, target)
            if self.fault == "wrong-byte" and number == middle:
                flip(new, 0x55)
            say(f"Restoring      {version['size']:>14,} {path} --> {new} [Done]")
            done, amount = done + 1, amount + version["size"]
        failed = len(found) - done
        say("\nRestore processing finished.\n")
        rows = [("objects restored", f"{done:,}"), ("objects failed", f"{failed:,}")]
        summary(rows, amount)
        return 12 if failed else 0

    def _wanted(self) -> tuple[list[str], Path]:
        if "filelist" in self.options:
            lines = Path(self.options["filelist"]).read_text().splitlines()
            return [shlex.split(line)[0] for line in lines if line], Path(self.words[0])
        with self.tapes.index() as index:
            top = self.words[0].rstrip("/")
            paths = [path for path in index["files"] if path.startswith(f"{top}/")]
        target = Path(self.words[1])
        return paths, target if self.options.get("preservepath") == "none" else target / Path(
            top
        ).name

    def _place(
        self, path: str, version: dict[str, Any], target: Path, *, part: bool = False
    ) -> Path:
        target.mkdir(parents=True, exist_ok=True)
        new = target / Path(path).name
        if new.exists() and self.options.get("replace") != "all":
            say(f"ANS4035W File '{new}' currently exists; skipped.")
            raise Fault(4)
        source = self.tapes.objects / version["object"]
        if part:
            new.write_bytes(source.read_bytes()[: version["size"] // 2])
        else:
            shutil.copyfile(source, new)
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
        for number, row in enumerate(rows):
            if number == len(rows) // 2:
                self.strike()
            say(row)
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


def say(text: str, end: str = "\n") -> None:
    """Print a text at once, as its reader waits for it."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def hang() -> NoReturn:
    """Do nothing for ever."""
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    sys.exit(Client(sys.argv[1:]).run())
