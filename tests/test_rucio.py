"""The catalogue with a real Rucio server: from a run that was taken to its copy somewhere else."""

from __future__ import annotations

import filecmp
import importlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import trio
from attrs import define, evolve, field
from pymongo import MongoClient

from caxev import CopyKey, Denied, GiveUp, Retry, Run, RunUpdate
from caxev.cli.errors import NO_SUCH_RUN
from caxev.cli.sites import catalogue_problems
from caxev.config import BY_METHOD, DEFAULT_HANDLERS, Sites, load_handlers, load_sites
from caxev.copies.deletion import intent
from caxev.copies.retention import DeletionPlan, DeletionWish, plan
from caxev.core.clock import utcnow
from caxev.core.errors import Damaged
from caxev.core.ledger import State
from caxev.core.registry import Registry, recorded
from caxev.database import Database, Request
from caxev.engine.options import Options
from caxev.files import digest_tree
from caxev.handlers import rucio as reactions
from caxev.handlers.rucio import plan_upload
from caxev.rucio import client as rucio
from caxev.rucio import rule_files
from caxev.rucio.changes import Wishes
from caxev.rucio.connection import connected
from caxev.rucio.errors import OverQuota, meaning_of
from caxev.rucio.files import stored_as
from caxev.rucio.messages import Messages
from caxev.rucio.names import Did, names_of
from caxev.rucio.orders import DatasetState, Download, Settlement, Upload, Verdict
from caxev.rucio.rules import WantedReplica
from tests import engine
from tests.conftest import Database as Named
from tests.places import vouched
from tests.rucio_server import ACCOUNT, PASSWORD, RSES, RucioServer, rucio_server  # noqa: F401  # a fixture
from tests.test_cli import Caxev, caxev, online  # noqa: F401  # fixtures

pytestmark = [pytest.mark.rucio, pytest.mark.xdist_group("rucio")]
IN_RUCIO = CopyKey("raw", "rucio-catalogue")
FIRST = datetime(2017, 3, 1, tzinfo=UTC)
_numbers = count(1)


def nobody(_done: int, _total: int) -> None:
    """Take a report."""


# -- what the client does -------------------------------------------------------------------------


@define(eq=False)
class Bench:
    """A catalogue, two sites' directories, and runs that no other test has."""

    server: RucioServer
    directory: Path
    sites: Sites = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.set_sites()

    def set_sites(self, **catalogue_fields: Any) -> None:
        entries = [
            self.server.site(**catalogue_fields),
            {
                "name": "lngs",
                "dir_raw": self.made("lngs"),
                "upload_options": ["rucio-catalogue"],
                "master": ["raw"],
            },
            {
                "name": "chicago",
                "dir_raw": self.made("chicago"),
                "download_options": ["rucio-catalogue"],
            },
        ]
        file = self.directory / "sites.json"
        file.write_text(json.dumps(entries))
        self.sites = load_sites(file)

    def made(self, name: str) -> str:
        (self.directory / name).mkdir(exist_ok=True)
        return str(self.directory / name)

    @property
    def there(self) -> Any:
        return self.sites.get("rucio-catalogue")

    def run(self, *names: str, size: int = 1000) -> Run:
        """Take a run of these files; small ones, each of its own bytes."""
        number = next(_numbers)
        start = FIRST + timedelta(minutes=number)
        path = self.directory / "lngs" / f"{start:%y%m%d_%H%M}"
        for name in names or ("XENON1T-0.zip", "XENON1T-1.zip", "pax_info.json"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(os.urandom(size + number))
        document = {
            "_id": number,
            "number": number,
            "name": path.name,
            "detector": "tpc",
            "start": start,
            "source": {"type": "Kr83m"},
            "user": "shifter",
            "data": [
                {
                    "type": "raw",
                    "host": "lngs",
                    "status": "verifying",
                    "location": str(path),
                    "checksum": None,
                }
            ],
        }
        return Run.from_document(document)

    def order(self, run: Run, **fields: Any) -> Upload:
        location = run.copies[0].location
        assert location is not None
        return Upload(
            here=self.sites.get("lngs"),
            there=self.there,
            names=names_of(run, IN_RUCIO, self.there.rucio),
            location=location,
            manifest=digest_tree(vouched(location), sha512=False, report=nobody).digest,
            checksum=None,
            metadata={"run_number": run.number, "campaign": "SR001"},
            **fields,
        )

    def fetch(self, order: Upload, **fields: Any) -> Path:
        target = self.directory / "chicago" / order.names.dataset.scope
        wanted = Download(
            here=self.sites.get("chicago"),
            there=self.there,
            dataset=order.names.dataset,
            location=str(target),
            taken=FIRST,
            **fields,
        )
        rucio.download(wanted, report=nobody)
        return target

    def settle(self, order: Upload, *always: str, **fields: Any) -> DatasetState:
        wishes = Wishes(
            tuple(WantedReplica((rse,), fields.get("lifetime"), "a test") for rse in always),
            dict.fromkeys(fields.get("remove", ()), "a test"),
        )
        return rucio.settle(
            Settlement(
                self.there,
                order.names.dataset,
                "a run",
                wishes,
                fields.get("remembered", ()),
                fields.get("files"),
            ),
            report=nobody,
        )


@pytest.fixture
def bench(
    rucio_server: RucioServer,  # noqa: F811  # the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    """A bench with the password where the library's user has it, and no other way to log in."""
    monkeypatch.setenv("RUCIO_PASSWORD", PASSWORD)
    for name in ("RUCIO_CLIENT_PROXY", "X509_USER_PROXY", "RUCIO_CLIENT_CERT"):
        monkeypatch.delenv(name, raising=False)
    return Bench(rucio_server, tmp_path)


def test_an_upload_is_whole_closed_and_described(bench: Bench) -> None:
    """Every file is available at the entrance, attached, under one rule; nothing is made twice."""
    order = bench.order(bench.run("a.zip", "below/b.zip", "below/further/c.json"))
    read, found = rucio.upload(order, report=nobody)
    assert [one.name for one in read.files] == ["a.zip", "below/b.zip", "below/further/c.json"]
    assert (found.rses, [one.state for one in found.rules]) == (("DISK1",), ["OK"])
    client, dataset = bench.server.client, order.names.dataset
    assert client.get_did(*dataset)["open"] is False
    assert client.get_metadata(*dataset)["run_number"] == order.metadata["run_number"]
    parents = [Did(row["scope"], row["name"]) for row in client.list_parent_dids(*dataset)]
    assert parents == [order.names.run]
    before = bench.server.counts()
    assert rucio.upload(order, report=nobody)[1] == found
    assert bench.server.counts() == before


def test_what_was_fetched_is_what_was_brought(bench: Bench) -> None:
    """Byte by byte, directories and all; the catalogue alone is enough to know what to fetch."""
    run = bench.run("a.zip", "below/b.zip")
    order = bench.order(run)
    rucio.upload(order, report=nobody)
    assert same(Path(order.location), bench.fetch(order))


def test_a_catalogue_lists_up_to_a_limit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it lists without end is not taken in."""
    order = bench.order(bench.run("a.zip", "b.zip"))
    rucio.upload(order, report=nobody)
    monkeypatch.setattr("caxev.limited.ROWS", 1)
    with (
        pytest.raises(Retry, match="more than 1 rows"),
        connected(order.there, "listing") as session,
    ):
        session.files(order.names.dataset)


def same(one: Path, other: Path) -> bool:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    there = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert files == there
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in files)


def _half_way(bench: Bench, order: Upload, rows: Mapping[str, Any]) -> None:
    client = bench.server.client
    client.add_replicas("DISK1", [*rows.values()])
    name = next(iter(rows))
    target = bench.server.path(order.names.dataset.scope, name)
    target.parent.mkdir(parents=True)
    target.write_bytes((Path(order.location) / name).read_bytes())
    client.update_replicas_states("DISK1", [{**_did(order, name), "state": "A"}])


def _attached(bench: Bench, order: Upload, rows: Mapping[str, Any]) -> None:
    client = bench.server.client
    client.add_dataset(*order.names.dataset)
    client.add_replicas("DISK1", [*rows.values()])
    client.attach_dids(*order.names.dataset, [_did(order, name) for name in rows])
    client.close(*order.names.dataset)


def _did(order: Upload, name: str) -> dict[str, str]:
    return {"scope": order.names.dataset.scope, "name": name}


BREAKS: dict[str, Callable[[Bench, Upload, Mapping[str, Any]], None]] = {
    "names only": lambda bench, order, rows: bench.server.client.add_dataset(*order.names.dataset),
    "registered": lambda bench, order, rows: bench.server.client.add_replicas(
        "DISK1", [*rows.values()]
    ),
    "one available, not attached": _half_way,
    "attached, not sent": _attached,
}
"""Where a former upload can have broken off."""


@pytest.mark.parametrize("where", BREAKS)
def test_an_upload_that_broke_off_goes_on(bench: Bench, where: str) -> None:
    """Whatever of it is there, it ends whole: replicas, attachments, rule, closed."""
    order = bench.order(bench.run())
    read = rucio.read_copy(order.here, order.location, order.names, report=nobody)
    rows = {
        one.name: {
            **_did(order, one.name),
            "bytes": one.size,
            "adler32": one.adler32,
            "md5": one.md5,
            "state": "C",
        }
        for one in read.files
    }
    bench.server.client.add_scope(ACCOUNT, order.names.dataset.scope)
    BREAKS[where](bench, order, rows)
    _, found = rucio.upload(order, report=nobody)
    assert found.rses == ("DISK1",)
    verdict = rucio.verify(bench.there, order.names.dataset, read.files, True, report=nobody)
    assert verdict == Verdict(good=("DISK1",))
    assert bench.server.client.get_did(*order.names.dataset)["open"] is False


def test_threads_may_share_a_storage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has settings of its own: Rucio's library writes into those that it is given."""
    from rucio.rse.protocols.posix import Default

    begin = Default.__init__

    def begin_slowly(self: Any, *args: Any, **options: Any) -> None:
        sleep(0.01)
        begin(self, *args, **options)

    monkeypatch.setattr(Default, "__init__", begin_slowly)
    there = bench.server.home / "disk1" / "shared"
    there.write_bytes(b"x")
    with connected(bench.there, "test") as connection, ThreadPoolExecutor(8) as pool:
        storage = connection.storage(RSES[0])
        found = [*pool.map(storage.stat, [f"file://localhost:0{there}"] * 64)]
    assert all(one is not None for one in found)


def test_bytes_that_are_wrong_at_the_storage_are_brought_again(bench: Bench) -> None:
    """A replica counts by what the storage tells of it, and not because a row exists."""
    order = bench.order(bench.run())
    read, _ = rucio.upload(order, report=nobody)
    bad = bench.server.path(order.names.dataset.scope, "XENON1T-1.zip")
    bad.write_bytes(bad.read_bytes()[::-1])
    verdict = rucio.verify(bench.there, order.names.dataset, read.files, True, report=nobody)
    assert verdict.good == ()
    assert verdict.replicas == (("DISK1", "XENON1T-1.zip"),)
    assert "XENON1T-1.zip at DISK1 has ADLER32" in verdict.bad[0]
    rucio.upload(order, report=nobody)
    verdict = rucio.verify(bench.there, order.names.dataset, read.files, True, report=nobody)
    assert verdict.good == ("DISK1",)


def test_bad_replicas_at_several_rses_are_declared(bench: Bench) -> None:
    """Each at its own RSE; one that the catalogue does not know is named."""
    order = bench.order(bench.run())
    read, _ = rucio.upload(order, report=nobody)
    bench.settle(order, *RSES)
    bench.server.replicate()
    dataset = order.names.dataset
    wrong = [("DISK1", "XENON1T-0.zip"), ("DISK2", "XENON1T-1.zip")]
    for rse, name in wrong:
        bench.server.path(dataset.scope, name, rse).write_bytes(b"bad")
    verdict = rucio.verify(bench.there, dataset, read.files, True, report=nobody)
    assert (verdict.good, sorted(verdict.replicas)) == (("DISK3",), wrong)
    assert rucio.declare_bad(bench.there, dataset, verdict.replicas) is None
    with connected(bench.there, "test") as session:
        states = {row["name"]: row["states"] for row in session.replicas([dataset])}
    assert [states[name][rse] for rse, name in wrong] == ["BAD", "BAD"]
    why = rucio.declare_bad(bench.there, dataset, [("DISK3", "no-such-file")])
    assert why is not None
    assert "no-such-file" in why


def test_the_catalogue_has_both_checksums_right(bench: Bench) -> None:
    """An MD5 that is not the file's is told, though the ADLER32 is the same."""
    order = bench.order(bench.run("a.zip"))
    read, _ = rucio.upload(order, report=nobody)
    (one,) = read.files
    other = evolve(one, md5="0" * 32)
    verdict = rucio.verify(bench.there, order.names.dataset, (other,), False, report=nobody)
    assert verdict.bad == (f"a.zip has MD5 {one.md5}, not {'0' * 32} in the catalogue",)


def test_a_download_takes_another_replica_for_a_bad_one(bench: Bench) -> None:
    """A file whose bytes are wrong at one RSE comes from the next; from one alone it does not."""
    order = bench.order(bench.run())
    rucio.upload(order, report=nobody)
    bench.settle(order, "DISK1", "DISK2")
    bench.server.replicate()
    bench.server.path(order.names.dataset.scope, "XENON1T-0.zip").write_bytes(b"bad")
    with pytest.raises(Damaged, match=r"XENON1T-0\.zip: DISK1: has 3 bytes"):
        bench.fetch(order, rse="DISK1")
    assert same(Path(order.location), bench.fetch(order))


def test_other_bytes_never_get_a_name_that_is_taken(bench: Bench) -> None:
    """Rucio itself would take them without a word; what it has stays as it was."""
    run = bench.run()
    read, _ = rucio.upload(bench.order(run), report=nobody)
    (Path(bench.order(run).location) / "pax_info.json").write_bytes(b"other")
    with pytest.raises(GiveUp, match=r"pax_info\.json has \d+ bytes, not 5 in the catalogue"):
        rucio.upload(bench.order(run), report=nobody)
    dataset = bench.order(run).names.dataset
    verdict = rucio.verify(bench.there, dataset, read.files, True, report=nobody)
    assert verdict.good == ("DISK1",)


def test_a_copy_that_is_not_what_the_database_says_is_not_brought(bench: Bench) -> None:
    """The bytes are compared with the entry's manifest as they are read for the catalogue."""
    order = bench.order(bench.run())
    (Path(order.location) / "XENON1T-0.zip").write_bytes(b"rot")
    before = bench.server.counts()
    with pytest.raises(GiveUp, match="is not what the database says"):
        rucio.upload(order, report=nobody)
    assert bench.server.counts() == before


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / "link").symlink_to("a.zip"), "no link"),
        (lambda path: (path / "empty").mkdir(), "no empty directory"),
        (lambda path: (path / "of Saturday").touch(), "no file named"),
        (lambda path: (path / ("a" * 251)).touch(), "no file named"),
    ],
)
def test_what_a_catalogue_cannot_hold(
    bench: Bench, spoil: Callable[[Path], None], reason: str
) -> None:
    """Links, empty directories and names that Rucio refuses are told before anything is brought."""
    order = bench.order(bench.run("a.zip"))
    spoil(Path(order.location))
    before = bench.server.counts()
    with pytest.raises(GiveUp, match=reason):
        rucio.upload(order, report=nobody)
    assert bench.server.counts() == before


def test_rules_are_made_once_and_their_ends_moved(bench: Bench) -> None:
    """A lifetime that changes moves the rule's end; done again, there is nothing to do."""
    order = bench.order(bench.run())
    rucio.upload(order, report=nobody)
    first = bench.settle(order, "DISK1", "DISK2")
    assert first.done == "add DISK2 forever"
    assert [str(one) for one in first.unfinished] == ["DISK2 REPLICATING (3 files to go)"]
    assert bench.settle(order, "DISK1", "DISK2").done == "nothing"
    shorter = bench.settle(order, "DISK2", lifetime=86400)
    (rule,) = (one for one in shorter.rules if one.rse == "DISK2")
    assert rule.id in {one.id for one in first.rules}
    assert rule.expires is not None
    assert abs(rule.expires - rule.created - timedelta(days=1)) < timedelta(minutes=1)
    assert bench.settle(order, "DISK2", lifetime=86400).done == "nothing"
    for_ever = bench.settle(order, "DISK2")
    assert [one.expires for one in for_ever.rules] == [None, None]


def test_replicas_are_given_up_only_on_proof(bench: Bench) -> None:
    """Not the last, not while another RSE's bytes are not compared or not right; and once."""
    order = bench.order(bench.run())
    read, _ = rucio.upload(order, report=nobody)
    bench.settle(order, "DISK1", "DISK2")
    stays = bench.settle(order, remove=["DISK1"], files=read.files)
    assert stays.done == "DISK1 stays: no other RSE has all of it forever"
    bench.server.replicate()
    with pytest.raises(Retry, match="checksums are unknown"):
        bench.settle(order, remove=["DISK1"])
    other = bench.server.path(order.names.dataset.scope, "pax_info.json", "DISK2")
    good = other.read_bytes()
    other.write_bytes(b"bad")
    with pytest.raises(Retry, match=r"pax_info\.json at DISK2 has 3 bytes"):
        bench.settle(order, remove=["DISK1"], files=read.files)
    other.write_bytes(good)
    assert bench.settle(order, remove=["DISK1"], files=read.files).done == "remove DISK1"
    assert bench.settle(order, remove=["DISK1"], files=read.files).done == "nothing"


def test_no_room_no_rse_no_server_no_password(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may pass is tried again, what a person must repair is given up, in Rucio's own words."""
    order = bench.order(bench.run())
    bench.server.client.set_local_account_limit(ACCOUNT, "DISK3", 10)
    full = evolve(order, there=evolve(bench.there, rucio_upload_rse="DISK3"))
    with pytest.raises(OverQuota, match="not enough quota left"):
        rucio.upload(full, report=nobody)
    nowhere = evolve(order, there=evolve(bench.there, rucio_upload_rse="NOWHERE"))
    with pytest.raises(GiveUp, match="RSE does not exist"):
        rucio.upload(nowhere, report=nobody)
    # Before anything is read: here there is nothing to read.
    unread = evolve(order, location=f"{order.location}-not-there")
    away = evolve(unread, there=evolve(bench.there, hostname="http://127.0.0.1:9"))
    with pytest.raises(Retry, match="Connection refused") as refused:
        rucio.upload(away, report=nobody)
    assert refused.value.after is not None
    monkeypatch.setenv("RUCIO_PASSWORD", "wrong")
    (bench.server.home / "token").unlink(missing_ok=True)
    with pytest.raises(Retry, match="Cannot authenticate") as stranger:
        rucio.check(bench.there)
    assert "wrong" not in str(stranger.value)
    monkeypatch.setenv("RUCIO_PASSWORD", PASSWORD)
    assert rucio.check(bench.there).endswith(f"knows us as {ACCOUNT}")


def test_a_token_that_expired_is_renewed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word; where that is refused, it is tried again later, in Rucio's own words."""
    token = bench.server.home / "token"
    gone = f"{ACCOUNT}-tester-unknown-{'0' * 32}"  # the server answers to it as to an expired one
    token.write_text(gone)
    assert rucio.check(bench.there).endswith(f"knows us as {ACCOUNT}")
    assert token.read_text() != gone
    token.write_text(gone)
    monkeypatch.setenv("RUCIO_PASSWORD", "wrong")
    with pytest.raises(Retry, match=r"CannotAuthenticate: .*Cannot authenticate") as refused:
        rucio.check(bench.there)
    assert not isinstance(refused.value, OverQuota)
    token.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("auth_type", "kind", "reason"),
    [
        ("x509_proxy", GiveUp, "finds no 'client_proxy' for x509_proxy"),
        ("x509", GiveUp, "MissingClientParameter: .*'client_cert'"),
        ("ssh", GiveUp, "MissingClientParameter: .*'ssh_private_key'"),
        ("oidc", Retry, "OIDC authentication failed"),
    ],
)
def test_each_way_to_log_in_says_what_is_lacking(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    auth_type: str,
    kind: type[Exception],
    reason: str,
) -> None:
    """In one line, and nothing of it on stdout, where a command's answer goes."""
    bench.set_sites(rucio={"auth_type": auth_type})
    (bench.server.home / "token").unlink(missing_ok=True)
    with pytest.raises(kind, match=reason) as told:
        rucio.check(bench.there)
    assert "\n" not in str(told.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "kind", "counted"),
    [
        ("CannotAuthenticate", Denied, True),
        ("DatabaseException", Retry, True),
        ("ReplicaUnAvailable", Retry, True),
        ("ServiceUnavailable", Retry, False),
        ("ServerConnectionException", Retry, False),
        ("InsufficientAccountLimit", OverQuota, True),
        ("RSEOverQuota", OverQuota, True),
        ("FullStorage", OverQuota, True),
        ("RSENotFound", GiveUp, None),
        ("AccessDenied", Denied, True),
        ("InvalidReplicationRule", GiveUp, None),
    ],
)
def test_what_an_error_of_rucio_means(name: str, kind: type[Exception], counted: bool) -> None:
    """Its own class and words are told; a server that is away costs no attempt, nor a refusal."""
    theirs = importlib.import_module("rucio.common.exception")
    meaning = meaning_of(getattr(theirs, name)("some words"), "upload of x", 60.0)
    assert type(meaning) is kind
    assert isinstance(meaning, Denied) == (kind in {Denied, OverQuota})  # which has an alarm
    assert str(meaning).startswith(f"upload of x: {name}: ")
    assert "some words" in str(meaning)
    if isinstance(meaning, Retry):
        assert (meaning.after is None) == counted


@pytest.mark.parametrize(
    ("code", "counted"), [(500, True), (502, False), (503, False), (429, False)]
)
def test_a_gateway_without_its_server_is_a_server_that_is_away(code: int, counted: bool) -> None:
    """Rucio's client knows no class for it, and names the status alone."""
    theirs = importlib.import_module("rucio.common.exception")
    words = f"no error information passed (http status code: {code})"
    meaning = meaning_of(theirs.RucioException(words), "upload of x", 60.0)
    assert isinstance(meaning, Retry)
    assert meaning.after == (None if counted else 60.0)


@pytest.mark.parametrize(
    ("name", "args", "kind", "away"),
    [
        ("RucioException", (503, "<html>"), Retry, True),
        ("RucioException", (504, ""), Retry, True),
        ("RucioException", (500, "<html>"), Retry, False),
        ("RucioException", ("503 files",), Retry, False),
        ("RucioException", ("429 files",), Retry, False),
        ("RucioException", (429, "slow down"), Retry, True),
        ("RucioException", ("Error on HTTP 502 : Bad Gateway",), Retry, True),
        ("DestinationNotAccessible", ("(103) Result HTTP/1.1 503 after 1 try",), Retry, True),
        ("RSEOperationNotSupported", ("Unable to remove x: no right to do so",), GiveUp, False),
    ],
)
def test_a_gateway_of_a_storage_may_be_without_its_server(
    name: str, args: tuple[Any, ...], kind: type[Exception], away: bool
) -> None:
    """The same by itself, and as an upload wraps it: by its text, in one of another class."""
    theirs = importlib.import_module("rucio.common.exception")
    error = getattr(theirs, name)(*args)
    wrapped = theirs.RSEOperationNotSupported(f"Unable to remove temporary file x: {error}")
    for one in (error, wrapped) if away else (error,):
        meaning = meaning_of(one, "upload of x", 60.0)
        assert type(meaning) is kind
        assert (getattr(meaning, "after", None) == 60.0) is away


# -- what the listeners do ------------------------------------------------------------------------

SITES = ("lngs", "chicago")
RUNS = 2


@asynccontextmanager
async def collaboration(bench: Bench, database: Named, *sites: str) -> AsyncIterator[Database]:
    """Listeners for these sites in this process, until the block ends."""
    load_handlers(BY_METHOD)
    ours = [one for one in recorded if one.module in {*DEFAULT_HANDLERS, *BY_METHOD}]
    async with engine.opened(database) as db, AsyncExitStack() as stack:
        for name in sites or SITES:
            options = Options(
                site=bench.sites.get(name),
                sites=bench.sites,
                settings=engine.settings_for(database),
                registry=Registry(ours, bench.sites.here(name)),
                lease_time=30.0,
                grace=5.0,
                services=(rule_files.RuleFiles, Messages),
            )
            await stack.enter_async_context(engine.listener(db, options, owner=f"test {name}"))
        yield db


async def settled(db: Database, runs: Sequence[Run], *hosts: str, **fields: Any) -> list[Run]:
    """Wait until each run has a good copy at each host, and these fields at the catalogue."""
    found: list[Run] = []

    async def all_there() -> bool:
        found[:] = (await db.runs([run.id for run in runs])).values()
        return all(is_so(run) for run in found)

    def is_so(run: Run) -> bool:
        good = {one.host for one in run.copies if one.status == "transferred"}
        entry = run.copy(IN_RUCIO)
        has = entry is not None and all(entry.fields.get(n) == v for n, v in fields.items())
        return good >= {*hosts} and (has or not fields)

    with trio.fail_after(300):
        while not await all_there():
            await trio.sleep(0.1)
    return sorted(found, key=lambda run: run.number or 0)


async def rules_known(db: Database, runs: Sequence[Run], number: int = 2) -> None:
    """Wait until every entry tells of so many rules."""

    async def told() -> bool:
        found = await db.runs([run.id for run in runs])
        entries = [run.copy(IN_RUCIO) for run in found.values()]
        return all(e is not None and len(e.fields.get("rule_info", ())) >= number for e in entries)

    with trio.fail_after(300):
        while not await told():
            await trio.sleep(0.1)


async def replayed(db: Database, site: str, **request: Any) -> None:
    """Have a site fire again, and wait until all of that is done."""
    handler = request.get("handler")
    await db.add_request(site, Request("replay", **request), "tests", utcnow())

    async def all_paid() -> bool:
        if (await db.waiting(site))[0]:
            return False
        now = [reaction for reaction, _ in await db.reactions(site, handler=handler)]
        return not any(
            reaction.state == "running" or reaction.due <= utcnow()
            for reaction in now
            if reaction.state != "failed"
        )

    with trio.fail_after(300):
        while not await all_paid():
            await trio.sleep(0.1)


def verified(bench: Bench, run: Run) -> Verdict:
    """What the storage of every RSE says of a run, compared with what is at lngs."""
    order = bench.order(run)
    read = rucio.read_copy(order.here, order.location, order.names, report=nobody)
    return rucio.verify(bench.there, order.names.dataset, read.files, True, report=nobody)


@pytest.mark.replicaset
async def test_runs_go_in_are_replicated_and_come_out(bench: Bench, database: Named) -> None:
    """Byte by byte what they were; done again there is no new name, replica or rule."""
    bench.set_sites(rucio_transfer=["DISK2"], rucio={"ask_after": 3600})
    runs = [bench.run("XENON1T-0.zip", "pax_info.json", size=300) for _ in range(RUNS)]
    async with collaboration(bench, database) as db:
        for run in runs:
            await db.insert_run(dict(run.document))
        await settled(db, runs, "lngs", "chicago", "rucio-catalogue")
        await rules_known(db, runs)
        await trio.to_thread.run_sync(bench.server.replicate)
        await replayed(db, "lngs", handler="rucio_rules", force=True)
        found = await settled(db, runs, *SITES, "rucio-catalogue", rse=["DISK1", "DISK2"])
        names = [bench.order(run).names for run in runs]
        scopes = {did.scope for one in names for did in (one.period, one.dataset)}
        before = await trio.to_thread.run_sync(bench.server.counts, scopes)
        for run in found:  # so that the rules are looked at again, though nothing has changed
            entry = run.copy(IN_RUCIO)
            assert entry is not None
            await db.update_run(RunUpdate.note(run, entry, rules=None), utcnow())
        for site in SITES:
            await replayed(db, site, force=True)
        again = await settled(db, runs, *SITES, "rucio-catalogue", rse=["DISK1", "DISK2"])
    assert await trio.to_thread.run_sync(bench.server.counts, scopes) == before
    verdicts = await trio.to_thread.run_sync(lambda: [verified(bench, run) for run in runs])
    assert verdicts == [Verdict(good=("DISK1", "DISK2"))] * RUNS
    assert [run.document["data"] for run in again] == [run.document["data"] for run in found]
    for run in found:
        entry, copy = run.copy(IN_RUCIO), run.copy(CopyKey("raw", "chicago"))
        assert entry is not None
        assert copy is not None
        assert copy.location is not None
        assert [(row["rse"], row["state"]) for row in entry.fields["rule_info"]] == [
            ("DISK1", "OK"),
            ("DISK2", "OK"),
        ]
        assert entry.location == f"xe1t_SR001_{run.name}_tpc:raw"
        assert (copy.manifest, copy.checksum) == (entry.manifest, entry.checksum)
        assert same(bench.directory / "lngs" / run.name, Path(copy.location))


@pytest.mark.replicaset
async def test_a_rule_file_that_changes_is_applied(
    bench: Bench, database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a listener runs, and after it did not; one in error is told and changes nothing."""
    monkeypatch.setattr(rule_files, "EVERY", 0.05)
    file = bench.directory / "rules.json"
    bench.set_sites(rucio={"rules": str(file), "ask_after": 3600})

    def wanted(**rses: int) -> str:
        return json.dumps([{"destination_rse": [*rses], "destination_livetime": rses}])

    file.write_text(wanted(DISK1=-1))
    run = stored(database, bench, bench.run())

    async def rule_at(db: Database, rse: str, *, ends: bool) -> None:
        async def there() -> bool:
            entry = (await db.runs([run.id]))[run.id].copy(IN_RUCIO)
            assert entry is not None
            found = {row["rse"]: row["expires"] for row in entry.fields["rule_info"]}
            return rse in found and (found[rse] is not None) == ends

        await engine.until(there)

    async with collaboration(bench, database, "lngs") as db:
        await rule_at(db, "DISK1", ends=False)
        file.write_text("no rules")
        file.write_text(wanted(DISK1=-1, DISK2=-1))
        await rule_at(db, "DISK2", ends=False)
    file.write_text(wanted(DISK1=-1, DISK2=86400))
    async with collaboration(bench, database, "lngs") as db:
        await rule_at(db, "DISK2", ends=True)
    dataset = Did.of(f"xe1t_SR001_{run.name}_tpc:raw")
    rules = await trio.to_thread.run_sync(
        lambda: list(bench.server.client.list_did_rules(*dataset))
    )
    assert sorted(one["rse_expression"] for one in rules) == ["DISK1", "DISK2"]


async def waits_for_long(db: Database) -> bool:
    """Whether nobody will ask for the rules by himself within the time that a test has."""
    reactions = [reaction for reaction, _ in await db.reactions("lngs", handler="rucio_rules")]
    late = utcnow() + timedelta(minutes=10)
    return all(d.state is State.PENDING and d.due > late for d in reactions)


@pytest.mark.replicaset
async def test_a_rule_that_became_ok_is_told_by_a_message(bench: Bench, database: Named) -> None:
    """By Rucio's own hermes: nobody asks meanwhile, and the entry says it before its due time."""
    address = f"127.0.0.1:{bench.server.messages}"
    bench.set_sites(rucio_transfer=["DISK2"], rucio={"messages": address})
    run = stored(database, bench, bench.run())
    async with collaboration(bench, database, "lngs") as db:
        await rules_known(db, [run])
        await engine.until(partial(waits_for_long, db))
        await trio.to_thread.run_sync(bench.server.replicate)
        await trio.to_thread.run_sync(bench.server.deliver)
        await settled(db, [run], "lngs", "rucio-catalogue", rse=["DISK1", "DISK2"])


@pytest.mark.replicaset
async def test_a_rule_that_is_stuck_is_told(bench: Bench, database: Named) -> None:
    """In the entry, and as an alarm, which is over once the rule is OK."""
    bench.set_sites(rucio_transfer=["DISK2"], rucio={"ask_after": 1})
    run = stored(database, bench, bench.run())
    dataset = Did.of(f"xe1t_SR001_{run.name}_tpc:raw")

    def fail() -> None:
        client = bench.server.client
        files = list(client.list_files(*dataset))
        failed = [{"scope": f["scope"], "name": f["name"], "state": "U"} for f in files]
        client.update_replicas_states("DISK2", failed)

    async with collaboration(bench, database, "lngs") as db:

        async def standing() -> list[Any]:
            return [one for one in await db.alarms("lngs") if one.active]

        await rules_known(db, [run])
        await trio.to_thread.run_sync(fail)
        (alarm,) = [one.alarm for one in await engine.until(standing)]
        assert f"{dataset} is stuck" in alarm.summary
        assert "DISK2 STUCK (3 files to go)" in alarm.details["why"]
        await trio.to_thread.run_sync(bench.server.replicate)
        await trio.to_thread.run_sync(bench.server.repair)
        await settled(db, [run], "lngs", "rucio-catalogue", rse=["DISK1", "DISK2"])

        async def over() -> bool:
            return not await standing()

        await engine.until(over)


@pytest.mark.replicaset
async def test_an_unchanged_rule_file_asks_for_nothing(bench: Bench, database: Named) -> None:
    """Not in the next process either; nor does one that is in error or away."""
    file = bench.directory / "rules.json"
    bench.set_sites(rucio={"rules": str(file)})
    run = stored(database, bench, bench.run())
    site = bench.sites.get("lngs")
    async with engine.opened(database) as db:
        taken = await db.acquire("lngs", "a test", 60.0, utcnow())
        assert taken is not None
        lease = taken[0]

        async def asked_for() -> list[Any]:
            files = rule_files.RuleFiles(db, lease, site, bench.sites)
            await files.catch_up()
            await files.catch_up()
            found = []
            while (one := await db.next_request("lngs")) is not None:
                found.append(one.runs)
                await db.finish_request(lease, one)
            return found

        assert await asked_for() == []
        file.write_text("[]")
        assert await asked_for() == [(run.id,)]
        assert await asked_for() == []
        file.write_text("[{}, 1]")
        assert await asked_for() == []
        file.write_text("[{}]")
        assert await asked_for() == [(run.id,)]


def test_only_who_applies_the_rules_needs_their_file(bench: Bench) -> None:
    """Who fetches from a catalogue is not kept from that by an error in its rule file."""
    (bench.directory / "rules.json").write_text("[{}, 1]")
    bench.set_sites(rucio={"rules": "rules.json"})
    assert not list(catalogue_problems(bench.sites.get("chicago"), bench.sites))
    (problem,) = catalogue_problems(bench.sites.get("lngs"), bench.sites)
    assert "rules.json: rule 2" in problem


# -- the command line -----------------------------------------------------------------------------


def stored(database: Named, bench: Bench, run: Run, *others: str, **fields: Any) -> Run:
    """A run that is in the catalogue and at lngs, and whose document says so; `others` have it too.

    `fields` go into the catalogue's entry, which does not say that it was compared.
    """
    order = bench.order(run)
    read, found = rucio.upload(order, report=nobody)
    entry = {
        "type": "raw",
        "host": "rucio-catalogue",
        "status": "transferred",
        "location": str(order.names.dataset),
        "manifest": read.manifest.digest,
        "source": "lngs",
        "source_name": run.name,
        "rse": list(found.rses),
        "rule_info": [one.to_row() for one in found.rules],
        **fields,
    }
    here = {**run.document["data"][0], "status": "transferred", "manifest": order.manifest}
    data = [here, entry]
    for host in others:
        place = bench.directory / host / run.name
        shutil.copytree(here["location"], place)
        data.append({**here, "host": host, "location": str(place)})
    document = {**run.document, "data": data}
    rows = [one.to_row() for one in read.files]
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].insert_one(document)
        key = {"m": stored_as(read.manifest.digest), "last": True}
        part = {"_id": key, "m": key["m"], "part": 0, "items": rows}
        client[database.name]["caxev_manifests"].insert_one(part)
    return Run.from_document(document)


@pytest.mark.replicaset
def test_what_the_commands_tell(bench: Bench, database: Named, online: Caxev) -> None:  # noqa: F811  # the fixture
    """Where a run is, what is wanted of it, whether it is whole; and it can be had from there."""
    bench.set_sites()  # in place of the usual ones
    run = stored(database, bench, bench.run())
    (number,) = [str(run.number)]
    place = f"xe1t_SR001_{run.name}_tpc:raw"
    assert place in online("rucio", "locate", "--run", number, "--rse", "DISK1").out
    assert online("rucio", "locate", "--run", number, "--copies", "2").out == "no such run\n"
    wanted = online("rucio", "rules", "--dry-run", "--run", number, "--json")
    assert json.loads(wanted.out)[0]["change"] == "nothing"
    assert online("rucio", "check", "--deep", "--run", number).out == "0 differences\n"
    target = bench.directory / "fetched"
    target.mkdir()
    assert online("rucio", "get", "--run", number, "--to", str(target)).code == 0
    assert same(bench.directory / "lngs" / run.name, target / run.name)
    bench.server.path(place.partition(":")[0], "pax_info.json").write_bytes(b"bad")
    found = online("rucio", "check", "--deep", "--repair", "--run", number)
    assert (found.code, "pax_info.json at DISK1 has 3 bytes" in found.out) == (1, True)
    assert "will be uploaded again" in found.out
    (row,) = json.loads(online("rucio", "locate", "--run", number, "--json").out)
    assert row["status"] == "RSEreupload"


def ruled(bench: Bench, site: str, **fields: Any) -> None:
    """Give a site further keys in sites.json."""
    file = bench.directory / "sites.json"
    entries = json.loads(file.read_text())
    entries = [{**one, **(fields if one["name"] == site else {})} for one in entries]
    file.write_text(json.dumps(entries))
    bench.sites = load_sites(file)


@pytest.mark.replicaset
def test_locate_takes_its_filters_together(
    bench: Bench,
    database: Named,
    online: Caxev,  # noqa: F811  # the fixture
) -> None:
    """By RSE, number of RSEs, status, time, tag and number; entries, rules, or what is absent."""
    bench.set_sites()
    run, other = stored(database, bench, bench.run()), bench.run()
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        runs.insert_one({**other.document, "start": datetime.now(UTC)})
        runs.update_one({"_id": run.number}, {"$set": {"tags": [{"name": "good"}]}})
    every = ("--run", f"{run.number}-{other.number}")

    def located(*options: str) -> list[int]:
        answer = online("rucio", "locate", *options, "--json")
        assert answer.code == 0
        return [row["run"]["number"] for row in json.loads(answer.out)]

    assert located(*every) == [run.number]
    assert located(*every, "--method", "absent") == [other.number]
    assert located(*every, "--rse", "DISK1", "--copies", "1", "--status", "transferred")
    for unmet in (("--rse", "DISK2"), ("--copies", "2"), ("--status", "error")):
        assert located(*every, *unmet) == []
    assert located("--tag", "good") == [run.number]
    assert located("--tag", "good", "--detector", "tpc") == [run.number]
    assert online("rucio", "locate", "--tag", "good", "--detector", "muon_veto").code == NO_SUCH_RUN
    assert located("--since", "7d") == []
    assert located("--since", "7d", "--method", "absent") == [other.number]
    rules = json.loads(online("rucio", "locate", *every, "--method", "rules", "--json").out)
    assert [row["rule"] for row in rules] == ["DISK1 OK"]
    wrong = online("rucio", "locate", "--run", "2-1")
    assert (wrong.code, "2 is after 1" in wrong.err) == (2, True)


@pytest.mark.replicaset
def test_get_and_put_ask_for_what_is_not_there(
    bench: Bench,
    database: Named,
    online: Caxev,  # noqa: F811  # the fixture
) -> None:
    """A dry run asks for nothing; what was given up, or waits, is tried again; all else stays."""
    bench.set_sites()
    run = stored(database, bench, bench.run())
    number = str(run.number)
    get = ("rucio", "get", "--run", number, "--to", "chicago", "--rse", "DISK1")
    put = ("rucio", "put", "--run", number, "--from", "lngs")
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        for command in (get, (*get[:-1], "DISK2"), put):
            assert online(*command, "--dry-run").code == 0
        (document,) = runs.find()
        assert [one["host"] for one in document["data"]] == ["lngs", "rucio-catalogue"]
        assert online(*get).code == 0
        wish = entry_at(runs, "chicago")
        assert (wish["status"], wish["source"]) == ("requested", "rucio-catalogue")
        assert wish["from_rse"] == "DISK1"
        assert "there already: transferred" in online(*put).out
        for status in ("error", "RSEquota", "RSEreupload"):
            then = {"data.$.status": status, "data.$.trigger": "x"}
            runs.update_one({"data.host": "rucio-catalogue"}, {"$set": then})
            assert "would be requested" in online(*put, "--dry-run").out
            assert entry_at(runs, "rucio-catalogue")["status"] == status
            assert online(*put).code == 0
            again = entry_at(runs, "rucio-catalogue")
            assert (again["status"], again["source"]) == ("requested", "lngs")
            (document,) = runs.find()
            planned = plan_upload(
                Run.from_document(document),
                IN_RUCIO,
                bench.sites.get("lngs"),
                bench.sites,
                name=IN_RUCIO.host,
                trigger="y",
            )
            assert isinstance(planned, reactions.UploadPlan)
    target = bench.directory / "fetched"
    target.mkdir()
    here = ("rucio", "get", "--run", number, "--to", str(target))
    assert online(*here, "--dry-run").code == 0
    answer = online(*here, "--rse", "DISK2")
    assert (answer.code, "no replica is available at DISK2" in answer.out) == (1, True)
    assert list(target.glob("[!.]*")) == []


@pytest.mark.replicaset
def test_check_compares_both_ways(
    bench: Bench,
    database: Named,
    online: Caxev,  # noqa: F811  # the fixture
) -> None:
    """A dataset that no run at all has, two entries for one, and every version of derived data."""
    bench.set_sites()
    run, other = (stored(database, bench, bench.run()) for _ in range(2))
    check = ("rucio", "check", "--run", str(run.number), "--json")
    told = [row["location"] for row in json.loads(online(*check, "--all").out)]
    places = {one: f"xe1t_SR001_{one.name}_tpc:raw" for one in (run, other)}
    assert not {*places.values()}.intersection(told)
    order = bench.order(bench.run("a.root"))
    derived = evolve(order.names, dataset=Did(order.names.dataset.scope, "processed_pax_v1"))
    rucio.upload(evolve(order, names=derived), report=nobody)
    processed = (*check, "--type", "processed")
    told = [row["location"] for row in json.loads(online(*processed, "--all").out)]
    assert str(derived.dataset) in told
    assert json.loads(online(*processed, "--all", "--version", "v2").out) == []
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        entry = {"type": "processed", "host": "rucio-catalogue", "status": "error"}
        versions = [{**entry, "pax_version": one} for one in ("v1", "v2")]
        twice = next(one for one in run.document["data"] if one["host"] == "rucio-catalogue")
        added = {"$push": {"data": {"$each": [*versions, twice]}}}
        runs.update_one({"_id": run.number}, added)
        told = [row["problem"] for row in json.loads(online(*processed).out)]
        assert told == ["the entry is error"] * 2
        (row,) = json.loads(online(*check).out)
        assert row["problem"] == "2 entries for one dataset"
        (row,) = json.loads(online(*check, "--repair").out)
        assert row["repair"] == "one entry is left"
        assert json.loads(online(*check).out) == []
        document = runs.find_one({"_id": run.number})
        assert document is not None
        kept = [(one["type"], one.get("pax_version")) for one in document["data"]]
        assert sorted(kept, key=str).count(("raw", None)) == len(run.document["data"])
        assert kept.count(("processed", "v1")) == kept.count(("processed", "v2")) == 1
        other_place = {**twice, "location": "xe1t_SR001_elsewhere:raw"}
        runs.update_one({"_id": run.number}, {"$push": {"data": other_place}})
        (row,) = json.loads(online(*check, "--repair").out)
        assert row["repair"] == "not repaired: they name several datasets"
        client[database.name]["caxev_manifests"].delete_many({})
        check = ("rucio", "check", "--run", str(other.number), "--json")
        (row,) = json.loads(online(*check, "--repair").out)
        assert "checksums are unknown" in row["problem"]
        assert row["repair"] == "its site compares it"
        document = runs.find_one({"_id": other.number})
        assert document is not None
        assert "check_asked" in document["data"][1]


@pytest.mark.replicaset
def test_rules_are_looked_at_anew_when_a_person_asks(
    bench: Bench,
    database: Named,
    online: Caxev,  # noqa: F811  # the fixture
) -> None:
    """For the runs that are meant; without --apply nothing is written."""
    bench.set_sites()
    run = stored(database, bench, bench.run(), rules="a digest")
    rules = ("rucio", "rules", "--run", str(run.number))
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        assert online(*rules, "--dry-run").code == 0
        assert entry_at(runs, "rucio-catalogue")["rules"] == "a digest"
        assert online(*rules, "--apply").out == "1 runs: requested from lngs\n"
        assert entry_at(runs, "rucio-catalogue")["rules"] is None
        assert client[database.name]["caxev_requests"].count_documents({}) == 1
    assert online("rucio", "rules", "--apply", "--since", "1d").code == NO_SUCH_RUN
    both = online(*rules, "--apply", "--dry-run")
    assert (both.code, "give one of" in both.err) == (2, True)


@pytest.mark.replicaset
def test_giving_a_dataset_up_is_decided_as_any_deletion(
    bench: Bench,
    database: Named,
    online: Caxev,  # noqa: F811  # the fixture
) -> None:
    """Not with too few others, not with a protecting tag, not while it is fetched; then it may."""
    bench.set_sites()
    run = stored(database, bench, bench.run())
    rm = ("rucio", "rm", "--run", str(run.number), "--why", "a test")
    answer = online(*rm)
    assert (answer.code, "2 good copies must remain" in answer.out) == (1, True)
    ruled(bench, "rucio-catalogue", deletion={"copies": 1, "protect": ["keep"]})
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        runs.update_one({}, {"$set": {"tags": [{"name": "keep"}]}})
        answer = online(*rm)
        assert (answer.code, "is tagged keep" in answer.out) == (1, True)
        coming = {"type": "raw", "host": "chicago", "status": "transferring"}
        coming |= {"source": "rucio-catalogue"}
        runs.update_one({}, {"$set": {"tags": []}, "$push": {"data": coming}})
        answer = online(*rm)
        assert (answer.code, "being read" in answer.out) == (1, True)
        runs.update_one({}, {"$pull": {"data": {"host": "chicago"}}})
        assert "would be deleted" in online(*rm, "--dry-run").out
        assert entry_at(runs, "rucio-catalogue")["status"] == "transferred"
        assert online(*rm).code == 0
        assert entry_at(runs, "rucio-catalogue")["status"] == "deleting"
        assert "being deleted already" in online(*rm).out
        cancel = ("rm", "--run", str(run.number), "--site", "rucio-catalogue", "--cancel")
        assert online(*cancel).code == 0
        assert entry_at(runs, "rucio-catalogue")["status"] == "transferred"


def entry_at(runs: Any, host: str) -> dict[str, Any]:
    """The only run's entry of that host."""
    (document,) = runs.find()
    found: dict[str, Any] = next(one for one in document["data"] if one["host"] == host)
    return found


@pytest.mark.replicaset
async def test_what_goes_goes_on_a_proof_that_compared_the_replicas(
    bench: Bench, database: Named
) -> None:
    """A copy on disk, for which the catalogue's counts; then the dataset, for which others do.

    The catalogue's entry does not say that it was ever compared: that is asked for and done first.
    """
    bench.set_sites()
    for name in ("lngs", "rucio-catalogue"):
        ruled(bench, name, deletion={"copies": 2})
    first = stored(database, bench, bench.run(), "chicago")
    second = stored(database, bench, bench.run(), "chicago")
    async with collaboration(bench, database) as db:
        for run, host in ((first, "lngs"), (second, "rucio-catalogue")):
            site = bench.sites.get(host)
            mine = run.copy(CopyKey("raw", host))
            assert mine is not None
            wanted = plan(run, DeletionWish(mine, "me", "a test", 2), site, bench.sites, utcnow())
            assert isinstance(wanted, DeletionPlan), wanted
            now = utcnow()
            assert await db.update_run(intent(run, wanted, bench.sites, now), now) is not None

        async def gone(run: Run, host: str) -> Run | None:
            now = (await db.runs([run.id]))[run.id]
            return now if now.copy(CopyKey("raw", host)) is None else None

        first = await engine.until(lambda: gone(first, "lngs"))
        second = await engine.until(lambda: gone(second, "rucio-catalogue"))
    assert not (bench.directory / "lngs" / first.name).exists()
    compared = first.copy(IN_RUCIO)
    assert compared is not None
    assert compared.verified_at is not None
    (stone,) = first.document["deleted_data"]
    proof = {row["host"]: row["verified_at"] for row in stone["proof"]}
    assert proof.keys() == {"chicago", "rucio-catalogue"}
    # Another reaction may have had it compared once more since.
    assert proof["rucio-catalogue"] <= compared.fields["verified_at"]
    (stone,) = second.document["deleted_data"]
    assert {row["host"] for row in stone["proof"]} == {"lngs", "chicago"}
    assert (stone["by"], stone["why"]) == ("me", "a test")
    dataset = Did.of(f"xe1t_SR001_{second.name}_tpc:raw")
    (rule,) = await trio.to_thread.run_sync(
        lambda: list(bench.server.client.list_did_rules(*dataset))
    )
    assert rule["expires_at"] is not None


@pytest.mark.replicaset
def test_copies_on_disk_are_purged_only_for_a_dataset_that_was_compared(
    bench: Bench,
    database: Named,
    online: Caxev,  # noqa: F811  # the fixture
) -> None:
    """A row in the catalogue is no reason, too few others are none; with both the copy goes."""
    bench.set_sites()
    ruled(bench, "lngs", deletion={"copies": 2})
    run = stored(database, bench, bench.run())
    purge = ("rucio", "purge", "--site", "lngs", "--run", str(run.number))
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        answer = online(*purge)
        assert (answer.code, "never compared: requested" in answer.out) == (1, True)
        assert "check_asked" in entry_at(runs, "rucio-catalogue")
        now = datetime.now(UTC)
        compared = {"data.$.verified_at": now, "data.$.verified_noted": now}
        runs.update_one({"data.host": "rucio-catalogue"}, {"$set": compared})
        answer = online(*purge)
        assert (answer.code, "2 good copies must remain" in answer.out) == (1, True)
        assert entry_at(runs, "lngs")["status"] == "transferred"
        other = {
            **entry_at(runs, "lngs"),
            "host": "chicago",
            "location": f"{bench.made('chicago')}/run",
        }
        runs.update_one({}, {"$push": {"data": other}})
        assert "would be deleted" in online(*purge, "--dry-run").out
        assert entry_at(runs, "lngs")["status"] == "transferred"
        assert online(*purge).code == 0
        assert entry_at(runs, "lngs")["status"] == "deleting"
        assert entry_at(runs, "lngs")["deletion"]["why"] == "caxev rucio purge"
