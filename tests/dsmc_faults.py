"""The simulator of ``dsmc`` with faults, as a program.

Beside the environment of the simulator it has::

DSMC_SIMULATOR_FAULTS   a file with a fault a line, each for the next command that it fits:
                        ``restore hang``
DSMC_SIMULATOR_CHANCE   the probability, 0 to 1, of a fault in any command, by
DSMC_SIMULATOR_SEED     this seed and how many commands there were
DSMC_SIMULATOR_REFUSED  a file with the name of a directory a line, of which nothing is taken
                        while it is in there: no backup of it gets any further than the login
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, TypeVar

    from caxev.demo.dsmc_simulator import Client, Stopped, say

    T = TypeVar("T")
else:
    # Beside caxev and not of it: run without site-packages, the program starts sooner.
    sys.path.insert(0, str(Path(__file__).parents[1] / "caxev" / "demo"))
    from dsmc_simulator import Client, Stopped, say

PROGRAM = Path(__file__)
EVERYWHERE = ("unreachable", "hang", "truncated", "killed")
FAULTS = {
    "incremental": (*EVERYWHERE, "lost", "media", "changed", "quota", "wrong-byte", "question"),
    "restore": (*EVERYWHERE, "lost", "media", "partial", "wrong-byte", "question"),
    "query": (*EVERYWHERE, "lost"),
}
"""The faults of each command."""
MESSAGES = {
    "lost": "ANS1029E Communication with the IBM Storage Protect server is lost.",
    "media": "ANS1312E Server media mount not possible.",
    "path": "ANS1063E The specified path is not a valid file system or logical volume name.",
    "quota": "ANS1311E Server out of data storage space.",
    "refused": "ANS1353E Session rejected: Unknown or incorrect ID entered",
    "unreachable": "ANS1017E Session rejected: TCP/IP connection failure.",
}


def flip(path: Path, mask: int = 0xFF) -> None:
    """Change a byte in the middle of a file; two changes with other masks do not make it good."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1) or b"\0"
        file.seek(path.stat().st_size // 2)
        file.write(bytes([byte[0] ^ mask]))


def hang() -> NoReturn:
    """Do nothing for ever."""
    while True:
        time.sleep(3600)


class FaultyClient(Client):
    """One call of the client, which may have a fault."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(arguments)
        self.fault = self._fault()
        if self.fault:
            with (self.tapes.directory / "struck").open("a") as struck:
                struck.write(f"{self.command} {self.fault}\n")

    def _fault(self) -> str:
        refused = Path(os.environ.get("DSMC_SIMULATOR_REFUSED", os.devnull))
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
            from random import Random

            random = Random(f"{os.environ.get('DSMC_SIMULATOR_SEED')} {self.tapes.serial()}")
            if random.random() < chance:
                return random.choice(FAULTS[self.command])
        return ""

    def log_in(self) -> None:
        if self.fault in ("path", "refused", "unreachable"):
            say(MESSAGES[self.fault])
            raise Stopped(12)

    def strike(self) -> None:
        """Let the command's fault happen, if it is one of those in the middle."""
        if self.fault == "hang":
            hang()
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "truncated":
            raise Stopped(0)
        if self.fault == "question":
            say("--- User Action is Required ---\nFile exists. Select an appropriate action")
            say("  1. Replace this object\n  2. Skip this object\n  A. Abort this operation")
            sys.stdout.write("Action [1,2,A] : ")
            sys.stdout.flush()
            hang()
        if self.fault in ("lost", "media", "quota"):
            say(MESSAGES[self.fault])
            raise Stopped(12)

    def each(self, items: Sequence[T], act: Callable[[T], object]) -> Sequence[T]:
        if self.fault == "media":
            self.strike()
        done = []
        for number, item in enumerate(items):
            if number == len(items) // 2 and not self._survives(item):
                continue
            act(item)
            done.append(item)
            if number == len(items) // 2 and self.fault == "wrong-byte":
                self._flip(item)
        if not items:
            self.strike()
        return done

    def _survives(self, item: Any) -> bool:
        """Let the fault happen to the item in the middle; returns False if it is left out."""
        path = item[0] if self.command == "restore" else item
        if self.fault == "changed":
            say(f"ANS1228E Sending of object '{path}' failed.")
            say(f"ANS4037E Object '{path}' changed during processing.\nObject skipped.")
            return False
        if self.fault == "partial":
            say(f"ANS1228E Sending of object '{path}' failed.")
            return False
        if self.command == "restore" and self.fault in ("hang", "killed", "lost"):
            self._place_half(*item)  # in the midst of a file
        self.strike()
        return True

    def _flip(self, item: Any) -> None:
        """Make a byte of the item wrong: on tape, or of what was restored."""
        if self.command == "restore":
            flip(Path(self.words[-1]) / Path(item[0]).name, 0x55)
            return
        with self.tapes.index() as index:
            flip(self.tapes.objects / index["files"][str(item)][-1]["object"])

    def _place_half(self, path: str, version: dict[str, Any]) -> None:
        new = self.place(path, version, Path(self.words[-1]))
        os.truncate(new, version["size"] // 2)
        os.utime(new)


if __name__ == "__main__":
    sys.exit(FaultyClient(sys.argv[1:]).run())
