"""Every attack of `tests.attacks` against everything that takes a path from the database."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from attrs import define, evolve

from caxev import movers
from caxev.config import Site
from caxev.job import GiveUp, Retry
from caxev.movers import Route
from tests import sshd as servers
from tests.attacks import Attack, Watched, attacks
from tests.faults.campaign import Problem, Tally, say_round
from tests.test_files import quiet

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


def over_ssh(base: Path, server: servers.Server, method: str = "sftp") -> Place:
    """Lay out the same, with an SSH server between the two."""
    end = server.endpoint
    place = placed(base, method=method, hostname=end.host, port=end.port, username=end.username)
    here = evolve(place.here, identity=end.identity, known_hosts=end.known_hosts)
    return evolve(place, here=here)


def problems(place: Place, deed: Deed, every: int = 1) -> Iterator[str]:
    """Try attacks; say which were not refused for good, or led to something outside.

    `every`: how many deeds share the attacks between them; each is still tried by one.
    """
    for attack in place.attacks(deed)[DEEDS.index(deed) % every :: every]:
        try:
            place.do(deed, attack.path)
        except GiveUp:
            pass
        except Retry as error:
            if not attack.kept:  # such a name may be more than the disk takes
                yield f"{deed}: {attack} is tried again: {error}"
        else:
            if not attack.kept:
                yield f"{deed}: {attack} was not refused"
        if not place.watched.untouched:
            yield f"{deed}: {attack} touched something outside"
            return
    for site in (place.here, place.there):
        if place.watched.leaked(Path(site.roots[0])):
            yield f"{deed}: something from outside is now inside {site.name}"


def paths() -> dict[str, Any]:
    """Try all attacks with every deed, on one machine, by SFTP and by rsync."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="caxev-paths-") as directory:
        keys = Path(directory) / "sshd"
        keys.mkdir()
        with servers.running(keys) as server:
            for deed in DEEDS:
                for method in ("local", "sftp", "rsync"):
                    base = Path(directory) / f"{method}-{deed}"
                    near = method == "local"
                    place = placed(base, method=method) if near else over_ssh(base, server, method)
                    found = [Problem("corrupt_accepted", what) for what in problems(place, deed)]
                    tally.add(found)
                    tally.faults += len(place.attacks(deed))
                    say_round(f"{deed}, {method}: {len(place.attacks(deed))} attacks", found, 0.0)
    row = tally.row()
    return {"attacks": row["faults"], "outside": row["corrupt_accepted"]}
