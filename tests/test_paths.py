"""Paths that lead out: refused at both ends by every way of moving copies, and by what plans them.

The attacks stand in `tests.attacks`; whoever takes a path from the database tries them all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from attrs import define, evolve

from caxev import movers
from caxev.config import Site
from caxev.files import confine, digest_tree
from caxev.job import GiveUp, Retry
from caxev.model import CopyKey
from caxev.movers import Route
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


def placed(base: Path, **there: object) -> Place:
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


def attacked(place: Place, deed: Deed) -> None:
    """Try all attacks: each is refused for good, or leads to something inside."""
    tried = place.attacks(deed)
    assert len(tried) >= 40
    for attack in tried:
        try:
            place.do(deed, attack.path)
        except GiveUp as refused:
            assert "\n" not in refused.why, attack
        except Retry as error:  # a name that the disk does not take, at most
            assert attack.kept, (attack, error)
        else:
            assert attack.kept, f"{attack} was not refused"
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
    attacked(sftp, deed)


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


@pytest.mark.parametrize("read", [checksum.digest_copy])
def test_what_is_verified_lies_inside(tmp_path: Path, read: Callable[..., object]) -> None:
    """A copy whose entry names a place outside is not read."""
    place = placed(tmp_path)
    for attack in place.against_here:
        if not attack.kept:
            with pytest.raises((GiveUp, Retry)):
                read(attack.path, place.here.roots, False, report=quiet)


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o777])
@pytest.mark.parametrize("way", ["pull", "push"])
def test_modes_are_set_and_not_inherited(
    local: Place, mask: int, way: Literal["pull", "push"]
) -> None:
    """Whatever the umask, and the modes of the source: a copy is 0644 and 0755."""
    run = Path((local.there if way == "pull" else local.here).roots[0]) / "run"
    (run / "deep" / "er").mkdir(parents=True, mode=0o700)
    (run / "data").chmod(0o600)
    (run / "script").touch(mode=0o777)
    target = Path((local.here if way == "pull" else local.there).roots[0]) / "copy"
    before = os.umask(mask)
    try:
        move = movers.pull if way == "pull" else movers.push
        pair = (str(target), str(run)) if way == "pull" else (str(run), str(target))
        move(Route(local.here, local.there, *pair), report=quiet)
    finally:
        os.umask(before)
    assert digest_tree(str(target), sha512=False, report=quiet).digest
    for path in (target, *target.rglob("*")):
        wanted = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
