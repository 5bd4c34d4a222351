"""Nobody gets in: rights at the database, TLS, and secrets that show nowhere."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_plus

import psutil
import pytest
import trio.testing
from attrs import evolve
from pymongo import MongoClient
from pymongo.errors import AutoReconnect, OperationFailure

from caxev import ELSEWHERE, GONE, HERE, CopyKey, Job, RunUpdate, aio, copy, tag
from caxev.config import ConfigError, Settings
from caxev.core.model import CopyIs
from caxev.database import (
    Database,
    DatabaseError,
    Lease,
    LeaseKeeper,
    NotAuthorized,
    Request,
    Unreachable,
    is_transient,
    open_database,
)
from caxev.database.client import Client, connect, credentials
from caxev.engine.listener import prepare
from caxev.files import Manifest
from caxev.files.manifest import Item
from caxev.testing.mongod import find_mongod
from tests import engine
from tests.certificates import SUBJECT, Certificates, make_certificates
from tests.conftest import Database as Named
from tests.engine import run_document
from tests.mongod import Cluster
from tests.sshd import free_port
from tests.test_cli import Caxev, assert_one_line, caxev

__all__ = ["caxev"]

pytestmark = [pytest.mark.replicaset, pytest.mark.xdist_group("security")]

PASSWORD = "p/ss:w@rd %41 of lngs"
SECRETS = {
    "MONGO_PASSWORD": PASSWORD,
    "CAXEV_SMTP_PASSWORD": "smtp/9f: 3kq%41geheim",
    "CAXEV_SLACK_URL": "http://127.0.0.1:9/services/T0/B0/slackgeheim7w",
    "CAXEV_WEBHOOK_TOKEN": "webhook-geheim-2m",
    "CAXEV_PAGERDUTY_KEY": "pagerduty-geheim-5x",
    "RUCIO_PASSWORD": "rucio/ge: heim%41-8z",
}
REFUSED = {"CAXEV_SLACK_URL": "https://hook:hook-geheim-4v@127.0.0.1:9/services/T0/B0/geheim-6w"}
"""A secret of which no use is made, for it may show where an address is shown."""
Admin = MongoClient[dict[str, Any]]


class Secured(NamedTuple):
    """A server that asks for TLS and a login, and the files that clients need."""

    server: Cluster
    files: Certificates

    @property
    def address(self) -> str:
        return self.server.address


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A replica set with --auth and --tlsMode requireTLS."""
    try:
        find_mongod()
    except ConfigError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("secured")
    files = make_certificates(directory)
    options = [
        "--tlsMode=requireTLS",
        f"--tlsCertificateKeyFile={files.server}",
        f"--tlsCAFile={files.authority}",
        "--tlsAllowConnectionsWithoutCertificates",
        "--setParameter=authenticationMechanisms=SCRAM-SHA-256,MONGODB-X509",
        "--setParameter=scramSHA256IterationCount=5000",  # fewer are not taken
    ]
    query = f"&tls=true&tlsCAFile={files.authority}"
    with Cluster(directory, options=options, auth=True, query=query) as server:
        yield Secured(server, files)


@pytest.fixture
def admin(secured: Secured) -> Iterator[Admin]:
    with MongoClient[dict[str, Any]](secured.server.uri) as client:
        yield client


@pytest.fixture
def named(secured: Secured, admin: Admin) -> Iterator[Named]:
    """A database of the test's own, by the address that a site uses: its login is elsewhere."""
    name = f"test_{os.urandom(6).hex()}"
    yield Named(f"mongodb://caxev_lngs@{secured.address}&authSource=admin", name)
    admin.drop_database(name)
    for database, user in (("admin", "caxev_lngs"), ("$external", SUBJECT)):
        if admin[database].command("usersInfo", user)["users"]:
            admin[database].command("dropUser", user)
    if admin.admin.command("rolesInfo", "caxev_site")["roles"]:
        admin.admin.command("dropRole", "caxev_site")


def granted(
    caxev: Caxev, secured: Secured, named: Named, monkeypatch: pytest.MonkeyPatch, *options: str
) -> None:
    """As the administrator does it."""
    monkeypatch.setenv("CAXEV_MONGO_URI", secured.server.uri)
    monkeypatch.setenv("CAXEV_DATABASE", named.name)
    monkeypatch.setenv("NEW_PASSWORD", PASSWORD)
    assert caxev("db", "init").code == 0
    answer = caxev("db", "grants", "--site", "lngs", "--apply", *options)
    assert answer.code == 0, answer
    assert PASSWORD not in answer.out + answer.err


def settings(named: Named, **environ: str) -> Settings:
    return Settings.load(mongo_uri=named.uri, database=named.name, environ=environ)


@pytest.fixture
def site(caxev: Caxev, secured: Secured, named: Named, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a site's listener is given, whose user has been made."""
    granted(caxev, secured, named, monkeypatch)
    return settings(named, MONGO_PASSWORD=PASSWORD)


# -- rights -----------------------------------------------------------------------------------


def insert(admin: Admin, named: Named, number: int, *copies: tuple[str, str, str], **f: Any) -> Any:
    document = engine.run_document(number, *copies, **f)
    return admin[named.name]["runs_new"].insert_one(document).inserted_id


def options_of(site: Settings, *handlers: Any, **options: Any) -> Any:
    named = Named("mongodb://unused/", site.database)
    return evolve(engine.options_for(named, handlers, **options), settings=site)


async def test_a_site_needs_no_more_than_it_is_granted(
    site: Settings, named: Named, admin: Admin
) -> None:
    """Everything that a listener does is done by a user with that role, and nothing is refused."""
    told: list[str] = []

    async def claims(job: Job) -> RunUpdate:
        files = Manifest([Item(b"x", "file", 1)])
        await job.store_manifest(files.digest, files.to_rows())
        assert await job.load_manifest(files.digest)
        key = CopyKey("raw", "lngs")
        source = CopyIs(CopyKey("raw", "chicago"), {"status": "transferred"})
        run = await job.update(RunUpdate.add_copy(job.run, key, "transferring", source))
        mine = run.copy(key)
        assert mine is not None
        return RunUpdate.change_copy(run, mine, "transferred")

    async def drops(job: Job) -> RunUpdate:
        assert job.copy is not None
        return RunUpdate.remove_copy(job.run, job.copy, tombstone={"by": "test"})

    async def tells(job: Job) -> None:
        told.append(str(job.event))

    handlers = (
        engine.handler(claims, copy("transferred", host=ELSEWHERE)),
        engine.handler(drops, copy("transferred", host=HERE)),
        engine.handler(tells, copy(GONE, host=HERE), tag("go")),
    )
    options = options_of(site, *handlers)
    async with aio.loop(), open_database(site) as db:
        await prepare(db)  # may not make the indexes, and says so
        with pytest.raises(NotAuthorized):
            await db.create_indexes()
        first = insert(admin, named, 1, ("raw", "chicago", "transferred"))
        async with engine.listener(db, options, "one"):
            await engine.until(lambda: "raw at lngs: gone" in told)
            ledger = {"_id": "lngs"}
            gone = {"$set": {"expires": datetime(2000, 1, 1, tzinfo=UTC)}}
            admin[named.name]["caxev_ledger"].update_one(ledger, gone)
        # Another process takes over, and its place in the stream is lost.
        lost = {"$set": {"position": {"token": {"_data": "82"}, "start": None}}}
        admin[named.name]["caxev_ledger"].update_one({"_id": "lngs"}, lost)
        async with engine.listener(db, options, "two"):
            insert(admin, named, 2, tags=[{"name": "go"}])
            await engine.until(lambda: "tag 'go': yes" in told)
            again = Request("replay", (first,), force=True)
            await db.add_request("lngs", again, "me", Job.now())
            await engine.until(lambda: told.count("raw at lngs: gone") == 2)
            admin[named.name]["runs_new"].delete_one({"_id": first})
        record = await db.site_record("lngs")
        assert record is not None
        assert len(record.gaps) == 1
        assert not await db.reactions(state="failed")


BEYOND: tuple[Callable[[Any], Any], ...] = (
    lambda db: db["runs_new"].insert_one({}),
    lambda db: db["runs_new"].delete_one({}),
    lambda db: db["runs_new"].drop(),
    lambda db: db["runs_new"].rename("mine"),
    lambda db: db["runs_new"].create_index("x"),
    lambda db: db["other"].insert_one({}),
    lambda db: db["caxev_ledger"].drop(),
    lambda db: db["caxev_ledger"].create_index("x"),
    lambda db: db.client["another"]["x"].find_one(),
    lambda db: db.client["local"]["oplog.rs"].find_one(),
    lambda db: db.client.admin["system.users"].find_one(),
    lambda db: db.client.admin.command("createUser", "me", pwd="x", roles=["root"]),
    lambda db: db.client.admin.command("replSetStepDown", 1),
    lambda db: db.client.admin.command("killAllSessions", []),
    lambda db: db.client.admin.command("shutdown"),
    lambda db: db.client.drop_database(db.name),
)
"""What a site may not do."""


def test_a_site_can_do_nothing_else(site: Settings) -> None:
    """Adding, deleting, dropping, indexes, other databases, users and the server itself."""
    with MongoClient[dict[str, Any]](site.mongo_uri) as client:
        for number, deed in enumerate(BEYOND):
            with pytest.raises(OperationFailure) as refused:
                deed(client[site.database])
            assert refused.value.code == 13, number


def test_granting_again_brings_up_to_date(
    site: Settings, caxev: Caxev, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second --apply changes the password and leaves one user with one role."""
    monkeypatch.setenv("NEW_PASSWORD", "another")
    assert caxev("db", "grants", "--site", "lngs", "--apply").code == 0
    with MongoClient[dict[str, Any]](site.mongo_uri) as client, pytest.raises(OperationFailure):
        client[site.database]["runs_new"].find_one()


def test_indexes_need_no_administrator(
    caxev: Caxev, secured: Secured, named: Named, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user of `db grants --init` makes every index, and can write nothing."""
    monkeypatch.setenv("CAXEV_MONGO_URI", secured.server.uri)
    monkeypatch.setenv("CAXEV_DATABASE", named.name)
    monkeypatch.setenv("NEW_PASSWORD", PASSWORD)
    assert caxev("db", "grants", "--init", "--apply").code == 0
    uri = f"mongodb://caxev_init:{quote_plus(PASSWORD)}@{secured.address}&authSource=admin"
    try:
        answer = caxev("db", "init", "--json", "--mongo-uri", uri)
        assert answer.code == 0, answer
        assert {row["state"] for row in answer.rows} == {"made"}
        with MongoClient[dict[str, Any]](uri) as client:
            there = client[named.name]
            for name in ("runs_new", "caxev_ledger", "another"):
                with pytest.raises(OperationFailure, match="not authorized"):
                    there[name].insert_one({})
    finally:
        admin.admin.command("dropUser", "caxev_init")
        admin.admin.command("dropRole", "caxev_init")


# -- people -----------------------------------------------------------------------------------

LOOKING = (
    ("status",),
    ("status", "--run", "1"),
    ("status", "--totals"),
    ("explain", "--run", "1", "--site", "lngs"),
    ("reactions", "--pending"),
    ("alarms",),
    ("holds",),
    ("rm", "--run", "1", "--site", "lngs", "--dry-run"),
)
"""Commands that write nothing."""
HOSTS = ("lngs", "chicago", "depot", "stockholm")
_AT = ("--run", "1", "--site", "lngs")
ASKING = (
    (("copy", "--run", "1", "--to", "stockholm", "--no-wait"), "update", "runs_new"),
    (("hold", "--run", "1", "--site", "depot"), "update", "runs_new"),
    (("verify", "--deep", *_AT), "update", "runs_new"),
    (("rm", *_AT), "update", "runs_new"),
    (("tag", "add", "good", "--run", "1"), "update", "runs_new"),
    (("tag", "add", "fine", "--run", "1-5"), "insert", "caxev_requests"),
    (("replay", *_AT), "insert", "caxev_requests"),
    (("replay", "--run", "1-5", "--site", "lngs"), "insert", "caxev_requests"),
)
"""Commands that ask for something, with the first right that they need."""
_X = {"x": 1}
FORBIDDEN: Mapping[str, Callable[[Any], object]] = {
    "add a run": lambda there: there["runs_new"].insert_one({}),
    "delete a run": lambda there: there["runs_new"].delete_one({}),
    "drop the runs": lambda there: there["runs_new"].drop(),
    "write a reaction": lambda there: there["caxev_ledger"].insert_one({}),
    "change a reaction": lambda there: there["caxev_ledger"].update_one({}, {"$set": _X}),
    "delete a reaction": lambda there: there["caxev_ledger"].delete_one({}),
    "delete a request": lambda there: there["caxev_requests"].delete_one({}),
    "change history": lambda there: there["caxev_history"].update_one({}, {"$set": _X}),
    "delete history": lambda there: there["caxev_history"].delete_one({}),
    "write a manifest": lambda there: there["caxev_manifests"].insert_one({}),
    "delete a manifest": lambda there: there["caxev_manifests"].delete_one({}),
    "write elsewhere": lambda there: there["another"].insert_one({}),
    "read elsewhere": lambda there: there.client["admin"]["system.users"].find_one(),
    "make a user": lambda there: there.command("createUser", "x", pwd="x", roles=[]),
}
"""What neither a reader nor an operator may do."""


@pytest.fixture
def people(
    caxev: Caxev,
    secured: Secured,
    named: Named,
    admin: Admin,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dict[str, str]]:
    """The addresses of a reader and of an operator, beside a run at three sites."""
    granted(caxev, secured, named, monkeypatch)
    sites = [{"name": one, "dir_raw": f"/{one}"} for one in HOSTS]
    Path("sites.json").write_text(json.dumps(sites))
    good = {"type": "raw", "status": "transferred", "manifest": "b3:0", "checksum": "ab"}
    data = [{**good, "host": one, "location": f"/{one}/run"} for one in HOSTS[:3]]
    admin[named.name]["runs_new"].insert_one({**run_document(1), "data": data})
    found = {}
    for role in ("reader", "operator"):
        assert caxev("db", "grants", f"--{role}", f"a_{role}", "--apply").code == 0
        login = f"caxev_a_{role}:{quote_plus(PASSWORD)}"
        found[role] = f"mongodb://{login}@{secured.address}&authSource=admin"
    try:
        yield found
    finally:
        for role in found:
            admin.admin.command("dropUser", f"caxev_a_{role}")
            admin.admin.command("dropRole", f"caxev_{role}")


def test_a_reader_may_look_and_an_operator_ask(caxev: Caxev, people: dict[str, str]) -> None:
    """A refusal names the right that is missing, and not the command as the server repeats it."""
    for uri in people.values():
        for args in LOOKING:
            answer = caxev(*args, "--mongo-uri", uri)
            assert answer.code in {0, 1}, answer
            assert "denied" not in answer.err
    for args, right, collection in ASKING:
        answer = caxev(*args, "--mongo-uri", people["reader"])
        assert_one_line(answer, 4, f"lacks the right {right!r} on ", f".{collection}; ")
        assert not re.search("lsid|signature|clusterTime", answer.err)
    for args, _, _ in ASKING:
        answer = caxev(*args, "--mongo-uri", people["operator"])
        assert "denied" not in answer.err, (args, answer)
        assert answer.code == 0, (args, answer)


async def test_of_an_upsert_the_right_that_is_missing_is_named(
    people: dict[str, str], named: Named
) -> None:
    """`caxev register --create` needs to insert runs; an operator, or a site, may update them."""
    operator = Settings(mongo_uri=people["operator"], database=named.name)
    async with aio.loop(), open_database(operator) as db:
        with pytest.raises(NotAuthorized, match=r"lacks the right 'insert' on .*runs_new"):
            await db.new_run("161111_1434", "tpc", {})


def test_what_no_person_may_do(people: dict[str, str], named: Named) -> None:
    """Neither by a role of its own nor by that of the other."""
    for role, uri in people.items():
        with MongoClient[dict[str, Any]](uri) as client:
            for name, deed in FORBIDDEN.items():
                with pytest.raises(OperationFailure) as refused:
                    deed(client[named.name])
                assert refused.value.code == 13, (role, name)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give one of --site, --reader, --operator and --init"),
        (("--reader", "me", "--operator", "me"), "give one of"),
        (("--reader", "lngs"), "lngs is the name of another user"),
        (("--operator", "init"), "init is the name of another user"),
        (("--operator", ""), "--operator is empty"),  # not the user caxev_init
    ],
    ids=str,
)
def test_who_gets_rights_is_one(caxev: Caxev, args: tuple[str, ...], words: str) -> None:
    """A person has no name that a site's user has."""
    Path("sites.json").write_text(json.dumps([{"name": "lngs"}]))
    answer = caxev("db", "grants", *args, "--mongo-uri", "mongodb://localhost/")
    assert (answer.code, words in answer.err) == (2, True), answer


def test_without_apply_the_grants_are_only_shown(caxev: Caxev, secured: Secured) -> None:
    """What is shown is what mongosh takes, and it asks for the password itself."""
    uri = ("--mongo-uri", "mongodb://localhost/")
    shown = caxev("db", "grants", "--site", "lngs", *uri)
    assert shown.code == 0
    pattern = r'db\.getSiblingDB\("admin"\)\.runCommand\((\{.*?\n\})\);\n'
    commands = re.findall(pattern, shown.out, re.DOTALL)
    assert re.sub(pattern, "", shown.out, flags=re.DOTALL) == ""  # JavaScript, and nothing else
    assert "passwordPrompt()" in commands[1]
    read = [json.loads(one.replace("passwordPrompt()", "null")) for one in commands]
    rows = json.loads(caxev("db", "grants", "--site", "lngs", "--json", *uri).out)
    assert [next(iter(row["command"])) for row in rows] == ["createRole", "createUser"]
    assert [row["command"] for row in rows] == read
    answer = caxev("db", "grants", "--site", "lngs", "--apply", *uri)
    assert (answer.code, "NEW_PASSWORD_FILE" in answer.err) == (3, True)
    assert caxev("db", "grants", "--site", "nowhere", *uri).code == 3


def test_what_was_granted_is_json_if_wanted(
    caxev: Caxev, secured: Secured, named: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list, as without --apply, and no line beside it."""
    granted(caxev, secured, named, monkeypatch)
    (row,) = json.loads(caxev("db", "grants", "--site", "lngs", "--apply", "--json").out)
    assert (row["user"], row["rights"]) == ("caxev_lngs", "lngs's listener")
    assert "@" in row["database"]
    assert secured.server.password not in row["database"]


# -- TLS --------------------------------------------------------------------------------------


async def reach(settings: Settings) -> None:
    async with aio.loop(), open_database(settings) as db:
        await db.check()


@pytest.fixture
def certified(
    caxev: Caxev, secured: Secured, named: Named, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """What a site's listener is given, whose certificate is its login."""
    granted(caxev, secured, named, monkeypatch, "--x509", SUBJECT)
    login = "&authMechanism=MONGODB-X509&authSource=$external"
    login += f"&tlsCertificateKeyFile={secured.files.client}"
    return settings(named._replace(uri=f"mongodb://{secured.address}{login}"))


async def test_a_certificate_is_a_login(certified: Settings) -> None:
    """X.509: the certificate's subject is the user, and there is no password."""
    await reach(certified)
    with MongoClient[dict[str, Any]](certified.mongo_uri) as client:
        (who,) = client.admin.command("connectionStatus")["authInfo"]["authenticatedUsers"]
        assert who["user"] == SUBJECT


# -- what is renewed while a listener runs ----------------------------------------------------


async def lets_us_in(db: Database) -> bool:
    try:
        await db.check()
    except DatabaseError as error:
        if not is_transient(error):  # a listener would not wait
            raise
        return False
    return True


async def test_a_password_is_read_again_when_the_login_fails(
    site: Settings, secured: Secured, named: Named, admin: Admin, tmp_path: Path
) -> None:
    """Changed at the server first, in its file later; old connections are gone with a restart."""
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    async with aio.loop(), open_database(settings(named, MONGO_PASSWORD_FILE=str(file))) as db:
        await db.check()
        admin.admin.command("updateUser", "caxev_lngs", pwd="another")
        secured.server.restart(0)
        assert not await lets_us_in(db)
        file.write_text("another")
        await engine.until(lambda: lets_us_in(db))


async def test_a_certificate_is_read_again_when_it_is_refused(
    certified: Settings, secured: Secured, tmp_path: Path
) -> None:
    """One that the server does not take is put right on the disk."""
    file = tmp_path / "client.pem"
    file.write_bytes(make_certificates(tmp_path).client.read_bytes())  # of another authority
    uri = certified.mongo_uri.replace(str(secured.files.client), str(file))
    uri += "&serverSelectionTimeoutMS=500"
    async with aio.loop(), open_database(evolve(certified, mongo_uri=uri)) as db:
        assert not await lets_us_in(db)
        file.write_bytes(secured.files.client.read_bytes())
        await engine.until(lambda: lets_us_in(db))


async def test_a_certificate_that_could_not_be_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the file has not changed since; what is in use stays until then."""
    files, tried = make_certificates(tmp_path), 0
    query = f"tls=true&tlsCAFile={files.authority}&tlsCertificateKeyFile={files.client}"
    uri = f"mongodb://localhost/?replicaSet=caxev&{query}"

    def unreadable_at_first(settings: Settings) -> Client:
        nonlocal tried
        tried += 1
        if tried == 1:
            raise ConfigError("the certificate cannot be read")
        return connect(settings)

    async with aio.loop(), open_database(Settings.load(mongo_uri=uri, environ={})) as db:
        monkeypatch.setattr("caxev.database.connection.connect", unreadable_at_first)
        os.utime(files.client, (0, 0))
        for expected in (1, 2, 2):
            await db.renew_credentials()
            assert tried == expected


async def test_an_old_connection_that_cannot_be_closed_ends_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_certificates(tmp_path)
    query = f"tls=true&tlsCAFile={files.authority}&tlsCertificateKeyFile={files.client}"
    uri = f"mongodb://localhost/?replicaSet=caxev&{query}"

    async def fail() -> None:
        raise AutoReconnect("connection closed")

    async with aio.loop(), open_database(Settings.load(mongo_uri=uri, environ={})) as db:
        monkeypatch.setattr(db._client, "close", fail)
        os.utime(files.client, (0, 0))
        await db.renew_credentials()
        gc.collect()
        await trio.testing.wait_all_tasks_blocked()
        assert db._closing == set()


def test_a_certificate_that_has_become_readable_is_another_one(tmp_path: Path) -> None:
    """Its mode changes neither its size nor its time of modification."""
    file = tmp_path / "client.pem"
    file.touch(mode=0o000)
    found = Settings.load(
        mongo_uri=f"mongodb://localhost/?tlsCertificateKeyFile={file}", environ={}
    )
    before = credentials(found)
    time.sleep(0.05)  # longer than the clock of the file system takes for a step
    file.chmod(0o600)
    assert credentials(found) != before


def test_a_lease_keeper_reports_a_certificate_that_is_gone(tmp_path: Path) -> None:
    """As an error that its watchdog waits out."""
    uri = f"mongodb://localhost/?tls=true&tlsCertificateKeyFile={tmp_path}/gone.pem"
    keeper = LeaseKeeper(Settings.load(mongo_uri=uri, environ={}), Lease("lngs", 1, "me"), 1.0)
    with pytest.raises(ConfigError, match=r"gone\.pem"):
        keeper.renew()


async def test_no_tls_no_answer(site: Settings, secured: Secured) -> None:
    """Without TLS, or with an authority that did not sign the server's certificate: nothing."""
    quick = "&serverSelectionTimeoutMS=1000&authSource=admin"
    plain = f"mongodb://caxev_lngs:x@{secured.server.hosts}/?replicaSet=caxev{quick}"
    for address in (plain, f"{plain}&tls=true"):
        with pytest.raises(Unreachable):
            await reach(evolve(site, mongo_uri=address))


async def test_a_wrong_password_is_told_without_it(named: Named, site: Settings) -> None:
    """Who is refused reads why, and neither the right nor the wrong password."""
    with pytest.raises(NotAuthorized) as refused:
        await reach(settings(named, MONGO_PASSWORD="wrong-and-secret"))
    assert "MONGO_PASSWORD" in str(refused.value)
    chain: BaseException | None = refused.value
    while chain is not None:
        assert "wrong-and-secret" not in f"{chain!r} {chain}"
        chain = chain.__cause__ or chain.__context__


# -- secrets ----------------------------------------------------------------------------------


@pytest.fixture
def planted(named: Named, tmp_path: Path) -> dict[str, str]:
    """The environment of a site with a secret of each kind, some in files, as its unit has them."""
    sinks = [
        {"email": {"to": ["a@b"], "host": "127.0.0.1", "port": free_port(), "user": "caxev"}},
        {"webhook": {"shape": "slack", "name": "slack"}},
        {"webhook": {"shape": "json", "name": "json", "url": "http://127.0.0.1:9/alarm"}},
        {"webhook": {"shape": "pagerduty", "name": "pager", "url": "http://127.0.0.1:9/pager"}},
    ]
    catalogue = {
        "name": "rucio-catalogue",
        "method": "rucio",
        "hostname": "http://127.0.0.1:9",
        "rucio_account": "caxev",
        "rucio_upload_rse": "A_DISK",
        "rucio": {"auth_type": "userpass", "username": "caxev", "rules": "rules.json"},
    }
    lngs = {"name": "lngs", "alarms": sinks, "dir_raw": str(tmp_path / "raw")}
    lngs["upload_options"] = ["rucio-catalogue"]
    (tmp_path / "raw").mkdir()
    (tmp_path / "rules.json").write_text("[]")
    (tmp_path / "sites.json").write_text(json.dumps([lngs, catalogue]))
    environ = {name: value for name, value in os.environ.items() if "MONGO" not in name}
    environ |= {"CAXEV_MONGO_URI": named.uri, "CAXEV_DATABASE": named.name}
    environ |= {"PYTHONFAULTHANDLER": "1"}
    for name, value in SECRETS.items():
        if name.startswith(("MONGO", "CAXEV_SMTP")):
            file = tmp_path / name
            file.touch(mode=0o600)
            file.write_text(value)
            environ[f"{name}_FILE"] = str(file)
        else:
            environ[name] = value
    return environ


def test_a_secret_shows_nowhere(
    site: Settings, named: Named, admin: Admin, tmp_path: Path, planted: dict[str, str]
) -> None:
    """Not in logs at their finest, tracebacks, --json, process lists, or the database.

    Reactions fail, alarms are raised and reach nobody, the catalogue is not there: whatever a
    secret is used for goes wrong, and is told.
    """
    (tmp_path / "broken.py").write_text(BROKEN)
    insert(admin, named, 1, ("raw", "lngs", "transferred"), tags=[{"name": "go"}])
    log = tmp_path / "log"
    command = [sys.executable, "-m", "caxev", "--log-level", "trace", "--log-file", str(log)]
    command += ["--handlers", "broken.py"]
    listed: set[str] = set()

    def run(*args: str, **more: str) -> str:
        with subprocess.Popen(
            [*command, *args],
            cwd=tmp_path,
            env=planted | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            over = threading.Event()
            lister = threading.Thread(target=_list, args=(process.pid, over, listed))
            lister.start()
            try:
                said, _ = process.communicate(timeout=240)
            finally:
                over.set()
                lister.join()
        return said

    said = run("listen", "--site", "lngs", "--once")
    assert "unexpected error" in said
    assert "surprise of a handler" in said
    for sink in ("email", "slack", "json", "pager"):
        assert f"{sink} of 1 alarms could not be delivered" in said
    for args in (
        ("status",),
        ("status", "--run", "1"),
        ("reactions", "--failed"),
        ("alarms",),
        ("rucio", "check", "--run", "1"),
    ):
        said += run(*args, "--json")
    refused = run("listen", "--site", "lngs", "--once", **REFUSED)
    assert "CAXEV_SLACK_URL is not an address without a user" in refused
    said += refused
    database = admin[named.name]
    said += repr([list(database[name].find()) for name in database.list_collection_names()])
    said += log.read_text()
    assert any("caxev worker" in line for line in listed)
    said += "\n".join(listed)
    for name, value in SECRETS.items():
        for shown in {value, quote_plus(value), value.split(maxsplit=1)[0], value[-12:]}:
            assert shown not in said, name
    for shown in ("hook-geheim-4v", "geheim-6w"):
        assert shown not in said


def _list(parent: int, over: threading.Event, listed: set[str]) -> None:
    """Collect the arguments of a process and its children, as anybody can read them."""
    whole = psutil.Process(parent)
    while not over.wait(0.1):
        with suppress(psutil.Error):
            for one in (whole, *whole.children(recursive=True)):
                with suppress(psutil.Error):
                    listed.add("\0".join(one.cmdline()))


BROKEN = """
import os
from caxev import GiveUp, Job, on, tag


@on(tag("go"))
async def broken(job: Job) -> None:
    await job.work(worse)


@on(tag("go"))
async def spent(job: Job) -> None:
    raise GiveUp("an alarm is raised")


def worse(*, report) -> None:
    raise RuntimeError(f"surprise of a handler, {os.getpid()}")
"""
