"""Paths that lead out: refused at both ends by every way of moving copies, and by what plans them.

The attacks stand in `tests.attacks`; whoever takes a path from the database tries them all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from caxev import transfer
from caxev.core.errors import GiveUp, Retry
from caxev.core.model import CopyKey
from caxev.engine.workers import Workers
from caxev.files import confine
from caxev.files.digest import digest_copy
from caxev.files.paths import link_problem, within_tree
from caxev.handlers import transfer as reactions
from caxev.transfer import Route
from caxev.transfer.carrying import TransferPlan
from tests import sshd as servers
from tests.attacks import SECRET
from tests.faults.paths import DEEDS, MOVED, Deed, Place, over_ssh, placed, problems
from tests.test_files import quiet
from tests.test_handlers import ALL, LNGS, NOW, TRIGGER, entry, run_of


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    with servers.running(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return placed(tmp_path, method="local")


@pytest.fixture
def sftp(tmp_path: Path, ssh: servers.Server) -> Place:
    return over_ssh(tmp_path, ssh)


def attacked(place: Place, deed: Deed, every: int = 1) -> None:
    """`every`: how many deeds share the attacks between them; each is still tried by one."""
    every_attack = place.attacks(deed)
    assert len(every_attack) >= 40
    given = every_attack[DEEDS.index(deed) % every :: every]
    assert list(problems(place, deed, given)) == []
    assert place.tried == len(given)
    assert place.harmed() == []


@pytest.mark.parametrize("deed", DEEDS)
def test_no_path_leads_out_on_one_machine(local: Place, deed: Deed) -> None:
    """Pulling and pushing between directories of one machine, moving there and deleting."""
    attacked(local, deed)


@pytest.mark.sshd
@pytest.mark.parametrize("deed", MOVED)
def test_no_path_leads_out_over_ssh(sftp: Place, deed: Deed) -> None:
    """Pulling and pushing over SSH: the far end is not trusted to look."""
    attacked(sftp, deed, every=len(MOVED))


def test_what_is_confined_lies_inside(tmp_path: Path) -> None:
    """`confine` refuses an attack or returns a path whose bytes are those of the site."""
    place = placed(tmp_path)
    for attack in place.against_here:
        try:
            real = confine(attack.path, place.here.roots)
        except GiveUp:
            continue
        assert attack.kept, attack
        assert real.startswith(os.fsencode(place.here.roots[0] + "/"))


def test_the_attacks_would_be_noticed(tmp_path: Path) -> None:
    """What reads or writes outside is found by the watch that the other tests rely on."""
    place = placed(tmp_path)
    out = Path(place.against_here[0].path)
    assert SECRET in (out / "secret").read_bytes()
    leak = Path(place.here.roots[0]) / "leak"
    leak.write_bytes((out / "secret").read_bytes())
    assert place.watched.leaked(leak.parent)
    (out / "new").touch()
    assert not place.watched.untouched


def test_what_is_planned_lies_inside(tmp_path: Path) -> None:
    """Whatever another site's entry names, the copy is planned in our own directory, or not."""
    place = placed(tmp_path)
    base = f"{LNGS.dir_raw}/"
    for attack in place.against_there:
        run = run_of(entry("xenon", location=attack.path))
        try:
            key = CopyKey("raw", "xenon")
            plan = reactions.plan_pull(run, key, LNGS, ALL, trigger=TRIGGER, now=NOW)
        except GiveUp:
            continue
        if isinstance(plan, TransferPlan):
            assert plan.location.startswith(base)
            name = plan.location.removeprefix(base)
            assert name not in {"", ".", ".."}
            assert not {"/", "\0"}.intersection(name)


def test_what_is_verified_lies_inside(tmp_path: Path) -> None:
    """A copy whose entry names a place outside is not read."""
    place = placed(tmp_path)
    for attack in place.against_here:
        if not attack.kept:
            with pytest.raises((GiveUp, Retry)):
                digest_copy(attack.path, place.here.roots, False, report=quiet)


@pytest.mark.parametrize("mask", [0o000, 0o077])
async def test_modes_are_set_and_not_inherited(local: Place, mask: int) -> None:
    """Whatever the listener's umask, and the modes of the source: a copy is 0644 and 0755."""
    near, far = (Path(site.roots[0]) for site in (local.here, local.there))
    prepare(near / "run")
    there = Route(local.here, local.there, str(near / "run"), str(far / "copy"))
    back = Route(local.here, local.there, str(near / "again"), str(far / "run"))
    prepare(far / "run")
    before = os.umask(mask)
    try:
        async with Workers() as workers:
            await workers.run(transfer.push, there)
            await workers.run(transfer.pull, back)
    finally:
        os.umask(before)
    for copy in (far / "copy", near / "again"):
        assert modes_below(copy) == {("directory", 0o755), ("file", 0o644)}


def prepare(run: Path) -> None:
    (run / "deep" / "er").mkdir(parents=True, mode=0o700)
    (run / "data").chmod(0o600)
    (run / "script").touch(mode=0o777)


def modes_below(top: Path) -> set[tuple[str, int]]:
    paths = (top, *top.rglob("*"))
    kinds = ("file", "directory")
    return {(kinds[path.is_dir()], stat.S_IMODE(path.stat().st_mode)) for path in paths}


@pytest.mark.parametrize(
    ("path", "target", "expected"),
    [
        (b"a", b"/raw/run/b", b"b"),
        (b"sub/deep/a", b"/raw/run/b/c", b"../../b/c"),
        (b"a", b"/raw/run", b"."),
        (b"sub/a", b"/raw/run/", b"../."),
        (b"a", b"/raw/run2/b", b"/raw/run2/b"),
        (b"a", b"/raw/run/../b", b"/raw/run/../b"),
        (b"a", b"/etc/passwd", b"/etc/passwd"),
    ],
)
def test_an_absolute_link_within_a_tree(path: bytes, target: bytes, expected: bytes) -> None:
    """It becomes a relative one that may be kept; one that leads out stays what it is, refused."""
    inner = within_tree(b"/raw/run", path, target)
    assert inner == expected
    assert (link_problem(path, inner) is None) is (inner != target)
