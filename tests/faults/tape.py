"""Backups to simulated tapes that fail in every way there is, at random.

Every run must end on tape, verified, or parked with what the archive's client said; and nothing
wrong may be taken for right, on tape or back on disk. Every tenth run is refused at first: its
reaction must wait, with the code and the text of the refusal, and when the refusal is lifted the
run must end as the others do.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import trio
from attrs import define, field

from caxev.config import Site
from caxev.core.clock import utcnow
from caxev.core.model import (
    ERROR,
    TRANSFERRED,
    Copy,
    CopyKey,
    Run,
    RunId,
    new_id,
)
from caxev.core.update import RunUpdate
from caxev.demo.world import TAPE
from caxev.files import safe_name
from caxev.files.roots import MARKER_PREFIX
from caxev.tape.base import Reach
from caxev.tape.steps import Data, recall
from tests.faults.campaign import (
    BIRTH,
    UNSETTLED,
    Born,
    End,
    Ground,
    Problem,
    Tally,
    digest_of,
    say,
    say_round,
)

TEMPLATE: Final = Path(__file__).with_suffix(".json")
SIZE: Final = 200_000
ON_TAPE: Final = CopyKey("raw", TAPE)
REFUSED: Final = 10
"""One run in so many is refused until all of these wait for that to be lifted."""
BACK: Final = "chicago"
"""The site that has its copies from tape alone."""
REFUSAL: Final = "ANS1353E Session rejected: Unknown or incorrect ID entered"
PATIENCE: Final = 480.0
"""Seconds for one run after those before it: what fails is tried again later and later."""
_REASON: Final = re.compile(
    r"AN[A-Z]\d{4}[A-Z]|return code|signal|sign of life|question|breaks off"
)


@define(eq=False)
class TapeGround(Ground):
    """A ground with a tape archive, to which only flat runs go."""

    odd: bool = False
    refused: set[str] = field(factory=set)
    """The names of runs that the archive does not take at first."""
    refuses: bool = False
    _taken: Iterator[int] = field(factory=count)

    @property
    def refused_file(self) -> Path:
        return self.world.directory / "refused"

    def _write(self, number: int, size: int, odd: bool) -> dict[str, Any]:
        document = super()._write(number, size, odd)
        if self.refuses and next(self._taken) % REFUSED == 0:
            self.refused.add(Path(document["data"][0]["location"]).name)
            self.refused_file.write_text("".join(f"{name}\n" for name in self.refused))
        return document

    async def finish(self, runs: Sequence[Born], end: End | None) -> list[Problem]:
        """Wait as any ground does, and look at what is left over as well."""
        return [*await super().finish(runs, end), *self.left_over()]

    def judged(self, one: Run, born: Born, end: End) -> list[Problem]:
        """Compare as any ground does, and read what is on tape as well. Blocks."""
        return [*super().judged(one, born, end), *self.on_tape(one, born)]

    def on_tape(self, one: Run, born: Born) -> Iterator[Problem]:
        """Read a run's copy on tape, if it is said to be good. Blocks."""
        copy = one.copy(ON_TAPE)
        if copy is None or copy.status != TRANSFERRED or copy.location is None:
            return
        with tempfile.TemporaryDirectory(prefix="caxev-tape-") as directory:
            here = Site(name="reader", dir_raw=directory, dir_tsm=directory)
            reach = Reach(here, self.world.sites.get(TAPE))
            data = Data(safe_name(copy.location), copy.location)
            outcome = recall(reach, data, f"{directory}/back", [directory])
            if outcome.failed is not None:
                yield Problem("lost", f"{one}: on tape: {outcome.failed}")
            elif digest_of(f"{directory}/back") != born.digest:
                yield Problem("corrupt_accepted", f"{one}: on tape: the bytes differ")

    def left_over(self) -> Iterator[Problem]:
        """Say what is left in the directories for staging and comparing."""
        for site in self.world.listening:
            for path in self.world.dir_of(site, "dir_tsm").rglob("*"):
                if path.name != ".caxev-restored" and not path.name.startswith(MARKER_PREFIX):
                    yield Problem("lost", f"left over: {path}")


async def asked(ground: Ground, runs: Sequence[Born]) -> End:
    """Ask for what is on tape to be read again, and wait for the answer."""
    ids = [born.id for born in runs]
    for run in (await ground.database.runs(ids)).values():
        update = RunUpdate.ask(run, _found(run), new_id(), utcnow())
        await ground.database.update_run(update, utcnow())

    async def answered() -> bool:
        return all(map(_answered, (await ground.database.runs(ids)).values()))

    await ground.until(answered, "what is on tape was not read again")
    return ground.wanted


def _found(run: Run) -> Copy:
    copy = run.copy(ON_TAPE)
    assert copy is not None
    return copy


def _answered(run: Run) -> bool:
    found = _found(run)
    return bool(found.asked) and not found.pending


async def tape(ground: Ground, *, rounds: int, seed: int, chance: float) -> dict[str, Any]:
    """Take so many runs, while each command of the client fails with that probability."""
    assert isinstance(ground, TapeGround)
    ground.refuses = True
    faults = {
        "DSMC_SIMULATOR_CHANCE": str(chance),
        "DSMC_SIMULATOR_SEED": str(seed),
        "DSMC_SIMULATOR_REFUSED": str(ground.refused_file),
    }
    started = [ground.listen(site, **faults) for site in ground.world.listening]
    await ground.ready(*started)
    began = trio.current_time()
    runs = [await ground.take(SIZE) for _ in range(rounds)]
    await lifted(ground, runs)
    for born in runs:
        over = partial(_over, ground, born)
        await ground.until(over, f"run {born.number} came to no end", within=PATIENCE)
    tally, parked = Tally(ground.compared), 0
    found = await ground.database.runs([born.id for born in runs])
    for born in runs:
        one = found[born.id]
        problems = await trio.to_thread.run_sync(lambda o, b: list(judge(ground, o, b)), one, born)
        status = getattr(one.copy(ON_TAPE), "status", None)
        parked += status == ERROR
        tally.add(problems)
        if problems or status == ERROR:
            say_round(f"{one}: {status}", problems, trio.current_time() - began)
    tally.faults = _struck(ground)
    seconds = round(trio.current_time() - began, 1)
    refused = len(ground.refused)
    say(f"{rounds} runs, {tally.faults} faults, {parked} parked, {refused} refused, {seconds} s")
    return {**tally.row(), "parked": parked, "refused": refused, "seconds": seconds}


async def lifted(ground: TapeGround, runs: Sequence[Born]) -> None:
    """Lift the refusal when all refused runs have waited for that, and none of them was parked."""
    waited: set[RunId] = set()

    async def all_wait() -> bool:
        async for page in ground.database.hindered(BIRTH):
            waited.update(one.run for one in page if REFUSAL in one.note)
        return len(waited) == len(ground.refused)

    await ground.until(all_wait, "not all refused runs wait for that to be lifted", within=PATIENCE)
    ground.refused_file.unlink()


async def _over(ground: Ground, born: Born) -> bool:
    found = await ground.database.runs([born.id])
    if _unsettled(found[born.id]):
        return False
    reactions = [
        reaction
        for site in ground.world.listening
        for reaction, _ in await ground.database.reactions(site, run=born.id)
    ]
    return not any(reaction.state in UNSETTLED for reaction in reactions)


def _unsettled(one: Run) -> bool:
    """Whether something more must come, whatever the ledger says between two looks."""
    there, back = (one.copy(CopyKey("raw", host)) for host in (TAPE, BACK))
    if there is not None and there.status == ERROR:
        return False
    return any(copy is None or copy.status not in (TRANSFERRED, ERROR) for copy in (there, back))


def judge(ground: TapeGround, one: Run, born: Born) -> Iterator[Problem]:
    """Say what is wrong with a run's end. Blocks."""
    copies = {CopyKey("raw", BIRTH): TRANSFERRED}
    on_tape = one.copy(ON_TAPE)
    if on_tape is not None and on_tape.status == ERROR:
        if not _REASON.search(str(on_tape.fields.get("error"))):
            yield Problem("lost", f"{one}: parked without a reason: {on_tape.fields}")
        copies[on_tape.key] = ERROR
    else:
        copies[ON_TAPE] = TRANSFERRED
    back = one.copy(CopyKey("raw", BACK))
    given_up = back is not None and back.status == ERROR and _REASON.search(str(back.fields))
    if on_tape is not None and on_tape.status == TRANSFERRED and not given_up:
        copies[CopyKey("raw", BACK)] = TRANSFERRED
    yield from ground.judged(one, born, End(copies, End.of(one).tags))


def _struck(ground: Ground) -> int:
    struck = ground.world.directory / TAPE / "tapes" / "struck"
    return len(struck.read_text().splitlines()) if struck.exists() else 0
