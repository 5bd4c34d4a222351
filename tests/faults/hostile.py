"""An attacker writes in the data directories, at random moments, while a site is at work there.

He may write whatever the confined account of another site may write (`tests.faults.attacker`). In
each round a site pulls, reads, processes, brings to tape and back, deletes and sets aside; whatever
comes of that, nothing outside may be read, written, run or erased.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from shutil import rmtree, which
from time import monotonic
from typing import Any, Final

from attrs import define, evolve, field

from caxev import transfer
from caxev.batch.base import End, JobSpec
from caxev.batch.folder import INPUT, OUTPUT, Folder
from caxev.batch.runner import run_here
from caxev.batch.work import take_stock
from caxev.batch.work import withdraw as cancel
from caxev.config import ArchiveOptions, Permission, Site, jobs_directory
from caxev.core.errors import GiveUp, Retry
from caxev.core.model import CopyKey
from caxev.files import digest_tree, empty_quarantine, erase
from caxev.files.erasing import set_aside
from caxev.files.identity import identity
from caxev.files.resolved import remove
from caxev.handlers.permissions import apply as give
from caxev.tape.base import Reach
from caxev.tape.steps import Data, Outcome, back_up, compare, recall
from caxev.transfer import Route
from tests import sshd as servers
from tests.attacks import SECRET, Watched
from tests.faults.attacker import Attacker, Beside, make_above, write
from tests.faults.campaign import ROOT, Problem, Tally, say_round
from tests.places import vouched
from tests.test_files import quiet

SIMULATOR: Final = ROOT / "caxev" / "demo" / "dsmc_simulator.py"
FILES: Final = {"one": b"1" * 3000, "two": b"2" * 70_000, "below/three": b"3"}
CARELESS: Final = 'find -L "$1" -type f -exec cat {} + > "$2"; echo done >> "$2"'
"""A job's program that follows every link that it meets."""
CHANCES: Final = (0.01, 0.05, 0.25)
"""How likely the hook strikes at an event: in each round one of these."""


@define
class Place:
    """A site, another on its machine, one that SSH reaches, and an archive.

    Nobody strikes at `far`: there the attacker's account and ours would see one root alone.
    """

    base: Path
    here: Site
    there: Site
    far: Site
    tape: Site
    random: Random
    said: list[str] = field(factory=list)

    @property
    def shared(self) -> list[str]:
        """Where the attacker may write."""
        found = [*self.here.roots, *self.there.roots]
        return [*found, *(self.tape.roots if self.tape.method == "directory" else ())]

    def raw(self, name: str) -> str:
        return f"{self.here.dir_raw}/{name}"

    def lay(self, root: str | None, name: str = "run", *, flat: bool = False) -> str:
        """Put a good copy where one is to be worked on, through no link."""
        assert root is not None
        copy = f"{root}/{name}"
        with suppress(OSError):
            remove(vouched(copy))
            for file, content in FILES.items():
                if flat and "/" in file:
                    continue
                make_above(root, f"{copy}/{file}")
                write(f"{copy}/{file}", content)
        return copy


def pull(place: Place) -> object:
    """Fetch a copy, by the file system or by SFTP."""
    there = place.random.choice((place.there, place.far))
    final = place.raw(f"new-{place.random.randint(0, 3)}")
    return transfer.pull(Route(place.here, there, final, f"{there.dir_raw}/run"), report=quiet)


def rsync(place: Place) -> object:
    """Fetch a copy by rsync, which goes by names."""
    final = place.raw(f"new-{place.random.randint(0, 3)}")
    route = Route(place.here, evolve(place.far, method="rsync"), final, f"{place.far.dir_raw}/run")
    return transfer.pull(route, report=quiet)


def push(place: Place) -> object:
    """Bring a copy to a directory of the other site on this machine."""
    final = f"{place.there.dir_raw}/new-{place.random.randint(0, 3)}"
    return transfer.push(Route(place.here, place.there, place.raw("run"), final), report=quiet)


def read(place: Place) -> object:
    """Read a copy for its digests."""
    return digest_tree(vouched(place.raw("run")), sha512=True, report=quiet).to_rows()


def process(place: Place) -> object:
    """Run a job whose program follows links, and publish its result, or withdraw it."""
    home = jobs_directory(place.here, "processed")
    name = f"job.{place.random.getrandbits(40):x}"
    work = Folder(Path(home)).work(name)
    made = f"made-{place.random.randint(0, 3)}"
    view, output = str(work / INPUT / "run"), str(work / OUTPUT / made)
    spec = JobSpec(
        name=name,
        argv=("sh", "-c", CARELESS, "sh", view, output),
        run=1,
        key=CopyKey("processed", "here", "v1"),
        input=place.raw("run"),
        view=view,
        output=output,
        roots=place.here.roots,
    )
    try:
        ended = run_here(home, spec)
        final = f"{place.here.dir_processed}/v1/{made}"
        stock = take_stock(home, name, final, place.here.roots, ended.how is End.DONE)
    finally:
        cancel("local", home, name)
    if stock.size is None:
        raise Retry(f"{ended.why} {stock.problem} {stock.last_words}")
    return stock


def archive(place: Place) -> object:
    """Bring a copy to tape, compare what the tape has, and bring it back."""
    reach, roots = Reach(place.here, place.tape), place.here.roots
    name = f"run-{place.random.randint(0, 3)}"
    base = place.here.dir_tsm if place.tape.method == "tsm" else place.tape.dir_raw
    data = Data(name, f"{base}/{name}")
    source = place.lay(place.here.dir_raw, name, flat=True)
    manifest = back_up(reach, source, data, False)
    place.said.append(manifest.transcript)
    data = evolve(data, expected=manifest.get())
    steps: tuple[Callable[[], Outcome[Any]], ...] = (
        lambda: compare(reach, data),
        lambda: recall(reach, data, place.raw(f"back-{name}"), roots),
    )
    for step in steps:
        outcome = step()
        place.said.append(outcome.transcript)
        outcome.get()
    return None


def delete(place: Place) -> object:
    """Erase a copy."""
    copy = place.lay(place.here.dir_raw, "old")
    erase(copy, place.here.roots, identity(vouched(copy)))
    return None


def judge(place: Place) -> object:
    """Set files aside, and empty the quarantine."""
    copy = place.lay(place.here.dir_raw, "doubtful")
    some = [b"one", b"below/three"] if place.random.random() < 0.5 else [b""]
    where = set_aside(copy, place.here.roots, some, None, identity(vouched(copy)))
    empty_quarantine(where, place.here.roots)
    return None


def permit(place: Place) -> object:
    """Give a copy its permissions."""
    acl = "u:65534:rX" if which("setfacl") else None
    give(place.raw("run"), place.here.roots, Permission(0o750, acl=acl))
    return None


def careless(place: Place) -> object:
    """Write and read by name, as nobody should: with this the campaign must fail."""
    for number in range(100):
        copy = Path(place.lay(place.here.dir_raw, f"careless-{number}"))
        with suppress(OSError), (copy / "one").open("r+b", 0) as file:
            file.write(b"written")
    return None


DEEDS: Final[dict[str, Callable[[Place], object]]] = {
    one.__name__: one for one in (pull, rsync, push, read, process, archive, delete, judge, permit)
}
ALL: Final = {**DEEDS, "careless": careless}


def placed(base: Path, random: Random, server: servers.Server) -> Place:
    """Lay out the sites of a round."""
    for name in ("here/raw", "here/processed", "there/raw", "far/raw", "tsm", "tapes", "archive"):
        (base / name).mkdir(parents=True)
    end = server.endpoint
    here = Site(
        name="here",
        dir_raw=str(base / "here/raw"),
        dir_processed=str(base / "here/processed"),
        dir_tsm=str(base / "tsm"),
        state=str(base / "state"),
        identity=end.identity,
        known_hosts=end.known_hosts,
    )
    there = Site(name="there", method="local", dir_raw=str(base / "there/raw"))
    far = Site(
        name="far",
        dir_raw=str(base / "far/raw"),
        hostname=end.host,
        port=end.port,
        username=end.username,
    )
    options = ArchiveOptions(
        command=(sys.executable, "-S", str(SIMULATOR)),
        environment={"DSMC_SIMULATOR_TAPES": str(base / "tapes")},
    )
    method = random.choice(("tsm", "directory"))
    tape = Site(name="tape", method=method, dir_raw=str(base / "archive"), archive=options)
    return Place(base, here, there, far, tape, random)


def at_work(place: Place, deeds: Sequence[str], done: Counter[str]) -> Iterator[Problem]:
    """Do the deeds in any order, each with a copy that is good when it begins."""
    for name in place.random.sample(deeds, len(deeds)):
        for root in (place.here.dir_raw, place.there.dir_raw, place.far.dir_raw):
            place.lay(root)
        try:
            result = ALL[name](place)
        except (GiveUp, Retry) as error:
            place.said.append(str(error))
            done[f"{name} refused"] += 1
        except Exception as error:  # noqa: BLE001  # whatever he has brought about
            place.said.append(str(error))
            yield Problem("lost", f"{name}: {type(error).__name__}: {error}")
        else:
            place.said.append(repr(result))
            done[name] += 1


@contextmanager
def hooked(attacker: Attacker, roots: Sequence[str]) -> Iterator[None]:
    """Let the hook strike below these for the length of the block."""
    attacker.roots, attacker.chance = roots, attacker.random.choice(CHANCES)
    try:
        yield
    finally:
        attacker.roots, attacker.chance = (), 0.0


def outside(place: Place, watched: Watched) -> Iterator[str]:
    """Say what has been read, written, run or erased that is not below the data directories."""
    if not watched.untouched:
        yield "something outside was written, run or erased"
    for root in (*place.shared, str(place.base / "tapes")):
        if _holds_secret(root):
            yield f"something from outside is now in {Path(root).relative_to(place.base)}"
    if any(SECRET.decode() in text for text in place.said):
        yield "something from outside is told"


def _holds_secret(root: str) -> bool:
    return any(
        SECRET in (Path(directory) / name).read_bytes()
        for directory, _, names in os.walk(root)
        for name in names
        if (Path(directory) / name).is_file() and not (Path(directory) / name).is_symlink()
    )


def hostile(*, rounds: int, seed: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Play the rounds; what was done although he was there is counted as `done`.

    With `careless` it ends at once when something has escaped.
    """
    random, tally, done, escaped = Random(seed), Tally({}), Counter[str](), 0
    deeds = list(only or DEEDS)
    with tempfile.TemporaryDirectory(prefix="caxev-hostile-") as directory:
        base = Path(directory)
        (base / "sshd").mkdir()
        watched = Watched(base / "outside")
        attacker = Attacker(watched.outside, Random(seed))
        sys.addaudithook(attacker.heard)
        with servers.running(base / "sshd") as server, Beside(watched.outside, seed) as beside:
            for number in range(rounds):
                place = placed(base / f"{number}", random, server)
                began = monotonic()
                with beside.striking(place.shared), hooked(attacker, place.shared):
                    problems = list(at_work(place, deeds, done))
                found = list(outside(place, watched))
                escaped += len(found)
                tally.compared[f"round {number}"] = set()
                tally.add(problems)
                outcome = [*problems, *(Problem("lost", one) for one in found)]
                say_round(f"round {number}, seed {seed}", outcome, monotonic() - began)
                if found:
                    watched = Watched(watched.outside)
                rmtree(place.base, ignore_errors=True)
                if found and "careless" in deeds:
                    break  # noticed, which is all that it is for
            tally.faults = attacker.strikes + beside.strikes
    return {**tally.row(), "outside": escaped, "done": dict(sorted(done.items()))}
