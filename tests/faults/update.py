"""A site that is moved to another version and back by ``deploy/install``, while runs come.

The site has a leader and a stand-by, on two machines as far as `deploy/install` is concerned: each
has versions of its own. They are updated one after the other, then moved back, while the other
sites keep the first version. The versions are checkouts of this one, with other version numbers.

Then runs come for as long again while nothing is installed: what a reaction waits for in that time
is the machine's doing, not the installation's.

Stand-ins: systemctl, because systemd is not PID 1 here: the campaign does what it is asked for; and
Python's venv and pip, because packages need an index: a checkout's `caxev` is copied.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from attrs import define, field, frozen

from caxev import __version__
from caxev.core.clock import utcnow
from caxev.database import HistorySearch
from caxev.demo.world import ask, left
from tests.faults.campaign import Born, Ground, Listener, Problem, Tally, say_round

ROOT: Final = Path(__file__).parents[2]
SITE: Final = "chicago"
SIZE: Final = 100_000
PAUSE: Final = 2.0
"""Seconds between two runs."""
PROMPT: Final = "seen"
"""A handler whose lane is never full, and that needs no worker process."""
STOPS: Final = 40.0
"""Seconds that a listener may take to leave, as TimeoutStopSec of its unit has it."""
NEW: Final = "99.0"
VENV: Final = f"""\
#!/bin/sh
# python -m venv PLACE
mkdir -p "$3/bin" "$3/lib"
cat >"$3/bin/pip" <<END
#!/bin/sh
case " \\$* " in *" -r "*) exit 0 ;; esac
for project; do :; done
cp -rLp "\\$project/caxev" "$3/lib/"
END
cat >"$3/bin/caxev" <<END
#!/bin/sh
PYTHONSAFEPATH=1 PYTHONPATH="$3/lib" exec {sys.executable} -m caxev "\\$@"
END
chmod +x "$3/bin/pip" "$3/bin/caxev"
"""
SYSTEMCTL: Final = """\
#!/bin/sh
[ "$1" = restart ] || exit 0
asked=$(mktemp "$CAXEV_HOME/asked.XXXXXX")
while [ ! -e "$asked.done" ]; do sleep 0.05; done
exit "$(cat "$asked.done")"
"""


@frozen
class Waits:
    """Longest times in seconds: of `PROMPT`, and of all handlers."""

    prompt: float = 0.0
    all: float = 0.0

    def __or__(self, other: Waits) -> Waits:
        return Waits(max(self.prompt, other.prompt), max(self.all, other.all))


@define(eq=False)
class Machine:
    """One of the site's machines: where its versions are installed, and its listener."""

    ground: Ground
    home: Path
    taken: list[Born]
    listener: Listener | None = field(init=False, default=None)

    @property
    def library(self) -> str:
        """The modules of the version that is switched to, by a path that stays this version's."""
        return os.path.realpath(self.home / "current" / "lib")

    async def start(self) -> None:
        """Start the listener of the version that is switched to."""
        self.listener = listener = self.ground.listen(
            SITE, PYTHONSAFEPATH="1", PYTHONPATH=self.library
        )

        async def there() -> bool:
            return listener.said("standing by") or await self.ground.leading(listener)

        await self.ground.until(there, f"the listener of {self.home.name} does not get ready")

    async def restart_as_asked(self) -> None:
        """Do what systemctl would, for ever; a run comes when the old listener has left."""
        while True:
            for asked in self.home.glob("asked.??????"):
                done = asked.with_name(f"{asked.name}.done")
                if not done.exists():
                    if self.listener is not None:
                        ask(self.listener.process)
                        await trio.to_thread.run_sync(left, self.listener.process, STOPS)
                        await _take(self.ground, self.taken)
                    await self.start()
                    status = done.with_suffix(".new")
                    status.write_text("0")
                    status.rename(done)  # which is read as soon as it is there
            await trio.sleep(0.05)

    async def install(self, *words: str) -> None:
        """Run ``deploy/install``. Raises RuntimeError if it fails."""
        tools = self.home.parent / "tools"
        environment = {
            **os.environ,
            **self.ground.world.environment,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CAXEV_HOME": str(self.home),
            "CAXEV_PYTHON": str(tools / "python"),
        }
        ended = await trio.run_process(
            ["sh", str(ROOT / "deploy" / "install"), *words, SITE],
            env=environment,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        if ended.returncode:
            raise RuntimeError(ended.stderr.decode())


async def update(
    ground: Ground, *, rounds: int, pause: float = PAUSE, control: bool = True
) -> dict[str, Any]:
    """Move the site to the new version and back, so many times.

    A run comes every `pause` s, and one at each change of listeners.

    Returns how long a reaction waited at most: `prompt_s`, of those that never wait for a worker,
    and `longest_s`, of all. With `control` each round has a second phase of the same load, without
    installations, and `control_s` is the longest wait in it. If that alone is above the lease, the
    lanes were full, and `longest_s` says nothing.
    """
    tally = Tally(ground.compared)
    old, new = await trio.to_thread.run_sync(_versions, ground.world.directory / "versions")
    taken, waits, calm = list[Born](), Waits(), Waits()
    machines = [Machine(ground, old.parent / name, taken) for name in ("one", "two")]
    await ground.ready(*[ground.listen(site) for site in ground.world.listening if site != SITE])
    async with trio.open_nursery() as nursery:
        for machine in machines:
            machine.home.mkdir()
            nursery.start_soon(machine.restart_as_asked)
            await machine.install(str(old))
        for number in range(rounds):
            start = trio.current_time()
            problems = list[Problem]()

            async def installations(found: list[Problem] = problems) -> None:
                found += await _there_and_back(ground, machines, new)

            load = partial(_under_load, ground, taken, pause, problems)
            waits |= await load(installations)
            took = trio.current_time() - start
            if control:
                calm |= await load(partial(trio.sleep, took))
            tally.add(problems)
            tally.faults += 2 * len(machines)
            say_round(f"{number + 1}. to {NEW} and back", problems, trio.current_time() - start)
        nursery.cancel_scope.cancel()
    lease = ground.lease_time
    late = waits.prompt > lease or waits.all > lease >= calm.all
    figures = {"lease_s": lease, "prompt_s": waits.prompt, "longest_s": waits.all}
    return {**tally.row(), **figures, "control_s": calm.all, "late": int(late)}


async def _under_load(
    ground: Ground,
    taken: list[Born],
    pause: float,
    problems: list[Problem],
    act: Callable[[], Awaitable[None]],
) -> Waits:
    """Take runs during `act`, and have them come to their end; return the longest waits.

    What is wrong then is added to `problems`.
    """
    began = utcnow()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_take_on, ground, taken, pause)
        await act()
        nursery.cancel_scope.cancel()
    problems += [*await ground.finish(taken, None), *ground.ended()]
    waited = await _longest_waits(ground, began)
    await ground.forget(taken)
    taken.clear()
    return waited


async def _there_and_back(ground: Ground, machines: list[Machine], new: Path) -> list[Problem]:
    """Install the new version everywhere, then go back."""
    problems = []
    for words, version in (((str(new),), NEW), (("--back",), __version__)):
        for machine in machines:
            await trio.sleep(PAUSE)
            await machine.install(*words)
        if (found := await _versions_at(ground)) != {version}:
            problems.append(Problem("lost", f"{SITE} runs {found}, not {version}"))
    return problems


async def _take_on(ground: Ground, taken: list[Born], pause: float) -> None:
    while True:
        await _take(ground, taken)
        await trio.sleep(pause)


async def _take(ground: Ground, taken: list[Born]) -> None:
    # Whole: a run that is half known would be lost to the comparison.
    with trio.CancelScope(shield=True):
        taken.append(await ground.take(SIZE))


async def _versions_at(ground: Ground) -> set[str]:
    """The versions that processes of the site report; those of others must be the first one."""
    found = await ground.database.processes()
    others = {one.version for one in found if one.site != SITE}
    if others != {__version__}:
        raise RuntimeError(f"the other sites run {others}")
    return {one.version for one in found if one.site == SITE}


async def _longest_waits(ground: Ground, since: datetime) -> Waits:
    """The longest times from an event to the start of a handler at the site."""
    found = Waits()
    async for page in ground.database.history_pages(HistorySearch(site=SITE, since=since)):
        for row in page:
            waited = round(row.waited or 0.0, 2)
            found |= Waits(waited if row.handler == PROMPT else 0.0, waited)
    return found


def _versions(directory: Path) -> tuple[Path, Path]:
    """Make two checkouts, and the tools with which `deploy/install` installs them."""
    tools = directory / "tools"
    tools.mkdir(parents=True)
    for name, text in (("python", VENV), ("systemctl", SYSTEMCTL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return _checkout(directory / "old", __version__), _checkout(directory / "new", NEW)


def _checkout(place: Path, version: str) -> Path:
    # With what is compiled already, or each machine would compile all of it again; not with what
    # somebody is just compiling, which is renamed meanwhile.
    ignore = shutil.ignore_patterns("*.pyc.*")
    shutil.copytree(ROOT / "caxev", place / "caxev", ignore=ignore)
    (place / "deploy").mkdir()
    for lock in ("requirements.lock", "requirements-build.lock"):
        shutil.copy(ROOT / "deploy" / lock, place / "deploy")
    shutil.copy(ROOT / "pyproject.toml", place)
    file = place / "caxev" / "__init__.py"
    text, number = re.subn(r'(?m)^(__version__.*= )".*"$', rf'\1"{version}"', file.read_text())
    assert number == 1
    file.write_text(text)
    git = ["git", "-C", str(place), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", ".", ":!*.pyc"], ["commit", "-qm", version]):
        subprocess.run([*git, *words], check=True)
    return place
