"""Paths that lead out: refused at both ends by every way of moving copies, and by what plans them.

The attacks stand in `tests.attacks`; whoever takes a path from the database tries them all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from attrs import define, evolve

from caxev import movers
from caxev.config import Site
from caxev.files import confine
from caxev.job import GiveUp, Retry
from caxev.model import CopyKey
from caxev.movers import Route
from caxev.workers import Workers
from handlers import checksum, transfer
from tests import sshd as servers
from tests.attacks import SECRET, Attack, Watched, attacks
from tests.test_files import quiet
from tests.test_handlers import ALL, LNGS, NOW, TRIGGER, entry, run_of

Deed = Literal["pull from", "pull to", "push from", "push to", "read"]
DEEDS: tuple[Deed, ...] = ("pull from", "pull to", "push from", "push to", "read")


@define
class Place:
    """Two sites below one directory, what lies outside of both, and the attacks on either."""

    here: Site
    there: Site
    watched: Watched
    against_here: list[Attack]
    against_there: list[Attack]

    def do(self, deed: Deed, path: str) -> object:
        route = Route(
            self.here, self.there, f"{self.here.roots[0]}/run", f"{self.there.roots[0]}/run"
        )
        match deed:
            case "pull from":
                fresh = f"{self.here.roots[0]}/new-{os.urandom(4).hex()}"
                route = evolve(route, remote_path=path, local_path=fresh)
                return movers.pull(route, report=quiet)
            case "pull to":
                return movers.pull(evolve(route, local_path=path), report=quiet)
            case "push from":
                fresh = f"{self.there.roots[0]}/new-{os.urandom(4).hex()}"
                route = evolve(route, local_path=path, remote_path=fresh)
                return movers.push(route, report=quiet)
            case "push to":
                return movers.push(evolve(route, remote_path=path), report=quiet)
            case "read":
                return movers.manifest(evolve(route, remote_path=path), report=quiet)

    def attacks(self, deed: Deed) -> list[Attack]:
        return self.against_here if deed in ("pull to", "push from") else self.against_there


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    with servers.running(tmp_path_factory.mktemp("sshd")) as server:
        yield server


def placed(base: Path, **there: Any) -> Place:
    """Lay out sites, secrets and traps."""
    roots = [base / name for name in ("here", "there")]
    for root in roots:
        (root / "run").mkdir(parents=True)
        (root / "run" / "data").write_bytes(b"what anybody may have")
    watched = Watched(base / "outside")
    traps = [attacks(root, watched.outside) for root in roots]
    sites = [Site(name=root.name, dir_raw=str(root)) for root in roots]
    return Place(sites[0], evolve(sites[1], **there), watched, *traps)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return placed(tmp_path, method="local")


@pytest.fixture
def sftp(tmp_path: Path, ssh: servers.Server) -> Place:
    end = ssh.endpoint
    place = placed(tmp_path, method="sftp", hostname=end.host, port=end.port, username=end.username)
    here = evolve(place.here, identity=end.identity, known_hosts=end.known_hosts)
    return evolve(place, here=here)


def attacked(place: Place, deed: Deed, every: int = 1) -> None:
    """Try attacks: each is refused for good, or leads to something inside.

    `every`: how many deeds share the attacks between them; each is still tried by one.
    """
    tried = place.attacks(deed)
    assert len(tried) >= 40
    for attack in tried[DEEDS.index(deed) % every :: every]:
        try:
            place.do(deed, attack.path)
        except (GiveUp, Retry) as error:
            refused = isinstance(error, GiveUp)
            kept = attack.kept  # a name that the disk does not take may be refused for now
        else:
            refused, kept = False, attack.kept
        assert refused or kept, f"{attack}: {deed} {attack.path!r} was not refused"
        assert place.watched.untouched, attack
    for site in (place.here, place.there):
        assert not place.watched.leaked(Path(site.roots[0]))


@pytest.mark.parametrize("deed", DEEDS)
def test_no_path_leads_out_on_one_machine(local: Place, deed: Deed) -> None:
    """Pulling and pushing between directories of one machine."""
    attacked(local, deed)


@pytest.mark.sshd
@pytest.mark.parametrize("deed", DEEDS)
def test_no_path_leads_out_over_ssh(sftp: Place, deed: Deed) -> None:
    """Pulling and pushing over SSH: the far end is not trusted to look."""
    attacked(sftp, deed, every=int(os.environ.get("CAXEV_ATTACKS_EVERY", len(DEEDS))))


def test_what_is_confined_lies_inside(tmp_path: Path) -> None:
    """`confine` refuses an attack or returns a path whose bytes are those of the site."""
    place = placed(tmp_path)
    for attack in place.against_here:
        try:
            real = confine(attack.path, place.here.roots)
        except GiveUp:
            continue
        assert attack.kept, attack
        assert real.startswith(place.here.roots[0] + "/")


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
            plan = transfer.plan_pull(run, key, LNGS, ALL, trigger=TRIGGER, now=NOW)
        except GiveUp:
            continue
        if isinstance(plan, transfer.Plan):
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
                checksum.digest_copy(attack.path, place.here.roots, False, report=quiet)


@pytest.mark.parametrize("mask", [0o000, 0o077])
@pytest.mark.parametrize("way", ["pull", "push"])
async def test_modes_are_set_and_not_inherited(
    local: Place, mask: int, way: Literal["pull", "push"]
) -> None:
    """Whatever the listener's umask, and the modes of the source: a copy is 0644 and 0755."""
    near, far = (Path(site.roots[0]) for site in (local.here, local.there))
    source, target = (far, near) if way == "pull" else (near, far)
    prepare(source / "run")
    ends = (target / "copy", source / "run")
    local_end, remote_end = ends if way == "pull" else ends[::-1]
    route = Route(local.here, local.there, str(local_end), str(remote_end))
    before = os.umask(mask)
    try:
        async with Workers() as workers:
            await workers.run(movers.pull if way == "pull" else movers.push, route)
    finally:
        os.umask(before)
    assert modes_below(target / "copy") == {("directory", 0o755), ("file", 0o644)}


def prepare(run: Path) -> None:
    (run / "deep" / "er").mkdir(parents=True, mode=0o700)
    (run / "data").chmod(0o600)
    (run / "script").touch(mode=0o777)


def modes_below(top: Path) -> set[tuple[str, int]]:
    paths = (top, *top.rglob("*"))
    kinds = ("file", "directory")
    return {(kinds[path.is_dir()], stat.S_IMODE(path.stat().st_mode)) for path in paths}
