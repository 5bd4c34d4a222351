"""The only module that knows Rucio's client library. Its functions run in a worker process.

The handlers in `caxev.handlers.rucio` and ``caxev rucio`` call `upload`, `settle`, `verify`,
`download` and the rest with a `Site` of method ``rucio``; each opens a connection of its own. The
library is the extra ``caxev[rucio]``, imported with the first connection; `missing` says whether it
is there.

Errors: `Retry` for what may pass (a server that is away), `OverQuota` where there is no room,
`GiveUp` for what a person must repair, all in Rucio's own words; see `caxev.rucio.errors`.

Everything here can be done again, and is then found done: what has a name in the catalogue has it
once. Killed anywhere, the next call goes on: files that the catalogue knows and the storage element
has not are sent, those that are there and not attached are attached.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from copy import deepcopy
from datetime import UTC, datetime
from threading import Lock
from time import monotonic
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from attrs import define, evolve, field, frozen

from caxev import failpoints
from caxev.config import Site, secret, state_directory
from caxev.core.clock import utcnow
from caxev.core.errors import Damaged, GiveUp, Retry
from caxev.files import (
    Manifest,
    Moved,
    Report,
    Seen,
    StagedCopy,
    check_expected,
    confine,
    join,
    landing,
    local,
    name_in,
    pinned,
    place_file,
)
from caxev.limited import rows_limited
from caxev.rucio.answers import limited_session
from caxev.rucio.changes import ENDED, GIVEN_UP, Changes, Standing, Wishes, changes
from caxev.rucio.errors import is_called, translated
from caxev.rucio.files import Checked, Digested, digest_for_catalogue, seen_of
from caxev.rucio.names import Did, Names

T = TypeVar("T")
R = TypeVar("R")
Row = dict[str, Any]

AT_ONCE: Final = 4
"""Files that are moved or looked at side by side."""
MANY: Final = 500
"""Files in one question."""
_AVAILABLE: Final = "AVAILABLE"
_CHUNK: Final = 1 << 20
_quiet: Final = logging.getLogger("caxev.rucio")


def missing() -> str | None:
    """Why there is no catalogue to be had from here; None where the library is there."""
    if importlib.util.find_spec("rucio") is None:
        return "Rucio's client library is not installed here: pip install 'caxev[rucio]'"
    return None


# -- what is asked for, and what comes of it ------------------------------------------------------


@frozen
class Upload:
    """A copy at `location` of the site `here`, to be brought into the catalogue `there`.

    `manifest` is the digest that it must have; where it is None, `checksum` (cax's SHA-512) must
    fit. `metadata` goes to the dataset.
    """

    here: Site
    there: Site
    names: Names
    location: str
    manifest: str | None
    checksum: str | None
    metadata: Mapping[str, Any] = field(factory=dict)


@frozen
class Found:
    """How a dataset stands: RSEs that have all of it, and the rules, those that ended among them.

    `done` says what was changed, in words.
    """

    rses: tuple[str, ...] = ()
    rules: tuple[Standing, ...] = ()
    done: str = ""

    @property
    def unfinished(self) -> tuple[Standing, ...]:
        """The rules that are not OK yet."""
        return tuple(one for one in self.rules if not one.ok and one.state != ENDED)

    @property
    def lasting(self) -> frozenset[str]:
        """The RSEs that have all of it and keep it: by a rule without an end."""
        kept = {one.rse for one in self.rules if one.ok and one.expires is None}
        return frozenset(kept.intersection(self.rses))


@frozen
class Settlement:
    """What is wanted of a dataset. `remembered`: rules that the entry knows of.

    `files` are what replicas are compared with before others are given up, None: they cannot be.
    """

    there: Site
    dataset: Did
    run_name: str
    wishes: Wishes
    remembered: tuple[Standing, ...] = ()
    files: tuple[Checked, ...] | None = None


@frozen
class Verdict:
    """What came of comparing a dataset with its files.

    `good`: RSEs whose every replica has the right size and checksum, asked of the storage itself.
    `bad`: what is not as it must be, a line each, and the replicas concerned as (RSE, name).
    `unseen`: RSEs that could not be asked, and why.
    """

    good: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    replicas: tuple[tuple[str, str], ...] = ()


@frozen
class Download:
    """A dataset to be fetched to `location` at the site `here`.

    `files`: what it must hold, None: what the catalogue says. `expected`: the copy's manifest,
    where it is known. Without both, `single` says that the copy is one file. `rse`: from there
    alone. `taken`: the time that the files get.
    """

    here: Site
    there: Site
    dataset: Did
    location: str
    taken: datetime
    files: tuple[Checked, ...] | None = None
    expected: Manifest | None = None
    rse: str | None = None
    single: bool = False


# -- what can be done -----------------------------------------------------------------------------


def check(there: Site) -> str:
    """Reach the server and be known to it: its version, and as whom."""
    with connected(there, "reaching the server") as rucio:
        who = rucio.client.whoami()
        version = rucio.client.ping().get("version", "of unknown version")
        return f"Rucio {version} knows us as {who.get('account')}"


def upload(order: Upload, *, report: Report) -> tuple[Digested, Found]:
    """Bring a copy into the catalogue, at its entrance RSE: whole, attached, under a rule, closed.

    When this returns every file is AVAILABLE there and the storage itself has told the right size
    and checksum. What was read of the copy is returned with it.
    """
    entrance = order.there.rucio_upload_rse
    if entrance is None:
        raise GiveUp(f"{order.there.name} names no rucio_upload_rse in sites.json")
    root = confine(order.location, order.here.roots)
    with connected(order.there, f"upload of {order.names.dataset}") as rucio:
        # First, so that a server that is away, or no such RSE, costs no reading.
        storage = rucio.storage(entrance)
        sha512 = order.manifest is None
        read = digest_for_catalogue(root, order.names, sha512=sha512, report=report)
        _check_digest(order, read.manifest)
        is_new = rucio.make(order.names)
        sending = _Sending(rucio, storage, root, order.names.dataset, report)
        sending.send(read.files, known=not is_new)
        rucio.attach(order.names.dataset, read.files)
        if not any(one.rse == entrance for one in rucio.rules(order.names.dataset)):
            rucio.add_rule(order.names.dataset, entrance, None)
            failpoints.point("rucio.rule")
        rucio.describe(order.names, order.metadata)
        rucio.close(order.names.dataset)
        failpoints.point("rucio.close")
        found = rucio.look(order.names.dataset)
    if entrance not in found.rses:
        raise Retry(f"{order.names.dataset} is not yet AVAILABLE at {entrance}", after=60.0)
    return read, found


def _check_digest(order: Upload, manifest: Manifest) -> None:
    wanted, is_so = order.manifest, manifest.digest
    if wanted is None:
        wanted, is_so = order.checksum, manifest.cax_checksum() or ""
    if wanted != is_so:
        raise Damaged(f"{order.location} is not what the database says: {is_so}, not {wanted}")


def look(there: Site, dataset: Did, *, report: Report) -> Found:
    """See how a dataset stands, and change nothing."""
    del report
    with connected(there, f"looking at {dataset}") as rucio:
        return rucio.look(dataset)


def settle(order: Settlement, *, report: Report) -> Found:
    """Make the rules of a dataset what is wanted, and see how it stands then.

    Done again it finds nothing to do: no rule is made twice, an end is moved and not made anew. A
    rule is given up only once another RSE's replicas have been compared, just then, with `files`.
    """
    with connected(order.there, f"rules of {order.dataset}") as rucio:
        todo = changes(
            order.wishes,
            rucio.rules(order.dataset),
            order.remembered,
            run_name=order.run_name,
            now=utcnow(),
        )
        for rse, lifetime in todo.add:
            rucio.add_rule(order.dataset, rse, lifetime)
            failpoints.point("rucio.rule")
        for rule, lifetime in todo.expire:
            rucio.client.update_replication_rule(rule, {"lifetime": lifetime})
            failpoints.point("rucio.rule")
        todo = _give_up(rucio, order, todo, report)
        found = rucio.look(order.dataset)
    return evolve(
        found, rules=(*found.rules, *_ended(order.remembered, found.rules)), done=str(todo)
    )


def _give_up(rucio: _Rucio, order: Settlement, todo: Changes, report: Report) -> Changes:
    """Give up the rules that are to go, if another RSE has proof of all of it."""
    if not todo.remove:
        return todo
    going = {one.rse for one in todo.remove}
    proof = None
    if order.files is not None:
        proof = rucio.verify(order.dataset, order.files, report, without=going)
    if proof is None or not proof.good:
        why = (
            "; ".join((*proof.bad, *proof.unseen)) if proof else "its files' checksums are unknown"
        )
        raise Retry(f"{order.dataset} stays at {', '.join(sorted(going))}: {why}", after=3600.0)
    for one in todo.remove:
        rucio.client.delete_replication_rule(one.id, purge_replicas=True)
        failpoints.point("rucio.rule")
    return todo


def _ended(remembered: Iterable[Standing], standing: Iterable[Standing]) -> Iterator[Standing]:
    there = {one.rse for one in standing}
    return (evolve(one, state=ENDED) for one in remembered if one.rse not in there)


def verify(
    there: Site, dataset: Did, files: tuple[Checked, ...], deep: bool, *, report: Report
) -> Verdict:
    """Compare what the catalogue has with what the files must be.

    With `deep` the storage of every RSE that has all of it is asked for sizes and checksums.
    """
    with connected(there, f"comparing {dataset}") as rucio:
        return rucio.verify(dataset, files, report, deep=deep)


def read_copy(here: Site, location: str, names: Names, *, report: Report) -> Digested:
    """Read a copy at this site for what its files must be in the catalogue."""
    root = confine(location, here.roots)
    return digest_for_catalogue(root, names, sha512=False, report=report)


def files_of(there: Site, dataset: Did, *, report: Report) -> tuple[Checked, ...]:
    """What the catalogue says of a dataset's files."""
    del report
    with connected(there, f"listing {dataset}") as rucio:
        return rucio.files(dataset)


def datasets(there: Site, *, report: Report) -> tuple[Did, ...]:
    """Every dataset in the scopes of the catalogue's experiment."""
    del report
    prefix = f"{there.rucio.experiment}_"
    with connected(there, "listing the catalogue") as rucio:
        scopes = sorted(
            scope for scope in rows_limited(rucio.client.list_scopes()) if scope.startswith(prefix)
        )
        listed = rucio.client.list_dids
        return tuple(
            Did(scope, name)
            for scope in scopes
            for name in list(rows_limited(listed(scope, {}, did_type="dataset")))
        )


def declare_bad(
    there: Site, dataset: Did, replicas: Sequence[tuple[str, str]], *, report: Report
) -> None:
    """Tell the catalogue that these replicas, (RSE, name), are bad: it makes them anew itself."""
    del report
    with connected(there, f"declaring bad replicas of {dataset}") as rucio:
        wanted = {*replicas}
        pfns = [
            pfn
            for row in rucio.replicas([dataset])
            for rse, those in row["rses"].items()
            if (rse, row["name"]) in wanted
            for pfn in those[:1]
        ]
        if pfns:
            rucio.client.declare_bad_file_replicas(pfns, "caxev: the checksum differs")


def give_up(there: Site, dataset: Did, *, report: Report) -> Found:
    """Take all rules away, so that the catalogue deletes every replica of the dataset."""
    del report
    with connected(there, f"giving up {dataset}") as rucio:
        for one in rucio.rules(dataset):
            if one.expires is None or one.expires > utcnow() + GIVEN_UP:
                rucio.client.delete_replication_rule(one.id, purge_replicas=True)
                failpoints.point("rucio.rule")
        return rucio.look(dataset)


def download(order: Download, *, report: Report) -> Moved:
    """Fetch a dataset. Every file is compared by its ADLER32; the copy gets its name when whole."""
    began = monotonic()
    final = confine(order.location, order.here.roots)
    with connected(order.there, f"download of {order.dataset}") as rucio:
        files = order.files or rucio.files(order.dataset)
        if order.single and len(files) == 1:
            files = (evolve(files[0], path=b""),)
        source = seen_of(files, int(order.taken.timestamp()) * 1_000_000_000)
        check_expected(source, order.expected, str(order.dataset))
        arrival = StagedCopy(
            final,
            order.here.roots,
            source,
            order.expected,
            order.here.min_free,
            whole_files=True,
            report=report,
        )
        total = sum(one.size for one in files)
        if arrival.stands():
            return Moved(total, 0, len(files), monotonic() - began)
        with arrival.opened() as todo, landing(state_directory(order.here), final) as private:
            failpoints.point("files.prepare")
            wanted = {piece.file.path: piece.file for piece in todo.pieces}
            counter = _Counter(report, total, total - sum(one.size for one in wanted.values()))
            fetching = _Fetching(rucio, arrival.partial, private, order, files, counter)
            side_by_side(fetching.fetch, wanted.values())
            arrival.finish(todo)
            arrival.publish()
    return Moved(total, counter.added, len(files), monotonic() - began)


# -- the connection -------------------------------------------------------------------------------


@contextmanager
def connected(there: Site, what: str) -> Iterator[_Rucio]:
    """Open a connection to the catalogue for a block; its errors are ours inside of it."""
    if (why := missing()) is not None:
        raise GiveUp(why)
    with translated(what, float(there.rucio.ask_after)):
        yield _Rucio(_client(there), there)


def _client(there: Site) -> Any:
    settings = there.rucio
    if settings.home is not None:
        os.environ["RUCIO_HOME"] = settings.home
    os.environ["RUCIO_CLIENT_MODE"] = "True"  # else a server's configuration makes it one
    from rucio.client import Client, baseclient

    # By name: the library makes a session of its own, and another one when its token has expired.
    baseclient.Session = limited_session
    credentials = {
        "username": settings.username,
        "password": secret("RUCIO_PASSWORD"),
        "client_proxy": there.grid_cert,
    }
    try:
        with redirect_stdout(sys.stderr):  # where it tells a person how to log in
            return Client(
                rucio_host=there.hostname,
                auth_host=settings.auth_host or there.hostname,
                account=there.rucio_account,
                ca_cert=settings.ca_cert,
                auth_type=settings.auth_type,
                creds={name: value for name, value in credentials.items() if value is not None},
                timeout=settings.timeout,
                user_agent="caxev",
                logger=_quiet,
            )
    except KeyError as lacking:  # as it says that there is no proxy
        how = settings.auth_type or "what rucio.cfg says"
        raise GiveUp(f"Rucio's client finds no {lacking} for {how}") from lacking
    except EOFError as alone:  # it asks a person, and there is none
        raise Retry("Rucio's client asks a person to log in: do so once with its own") from alone


@define(eq=False)
class _Rucio:
    """A connection, and what is done over it. Raises Rucio's own errors."""

    client: Any
    there: Site

    def storage(self, rse: str) -> _Storage:
        """What is needed to reach an RSE's storage."""
        token: str = self.client.auth_token or ""
        return _Storage(rse, self.client.get_rse(rse), token if token.count(".") == 2 else None)  # noqa: PLR2004  # a JWT has three parts

    # -- names ------------------------------------------------------------------------------

    def make(self, names: Names) -> bool:
        """Make scopes, containers and the dataset, and put one into the other, as far as need be.

        Returns whether the run's scope is new, so that none of its names is taken.
        """
        is_new = False
        if self._exists(names.dataset) is None:
            is_new = self._add_scope(names.dataset.scope)
            _unless("DataIdentifierAlreadyExists", self.client.add_dataset, *names.dataset)
            failpoints.point("rucio.dataset")
        for outer, inner in ((names.run, names.dataset), (names.period, names.run)):
            if outer in {_did(row) for row in rows_limited(self.client.list_parent_dids(*inner))}:
                continue
            self._add_scope(outer.scope)
            _unless("DataIdentifierAlreadyExists", self.client.add_container, *outer)
            failpoints.point("rucio.container")
            _unless("DuplicateContent", self.client.attach_dids, *outer, [_row(inner)])
            failpoints.point("rucio.container")
        return is_new

    def _add_scope(self, scope: str) -> bool:
        return _unless("Duplicate", self.client.add_scope, self.client.account, scope)

    def _exists(self, did: Did) -> Row | None:
        try:
            found: Row = self.client.get_did(*did)
        except Exception as error:
            if is_called(error, "DataIdentifierNotFound"):
                return None
            raise
        return found

    def describe(self, names: Names, metadata: Mapping[str, Any]) -> None:
        """Set the dataset's and the run container's metadata, what is new of it."""
        for did in (names.dataset, names.run):
            has = self.client.get_metadata(*did)
            new = {key: value for key, value in metadata.items() if has.get(key) != value}
            if new:
                self.client.set_metadata_bulk(*did, new)

    def close(self, dataset: Did) -> None:
        """Close the dataset: it is complete."""
        found = self._exists(dataset)
        if found is not None and found.get("open"):
            _unless("UnsupportedOperation", self.client.close, *dataset)

    def attach(self, dataset: Did, files: Sequence[Checked]) -> None:
        """See to it that the dataset holds these files, and no others."""
        content = {row["name"] for row in rows_limited(self.client.list_content(*dataset))}
        names = [one.name for one in files]
        if odd := sorted(content.difference(names)):
            raise GiveUp(f"{dataset} holds {odd[0]!r}, which the copy does not ({len(odd)} such)")
        lacking = [_row(Did(dataset.scope, name)) for name in names if name not in content]
        if lacking and not (self._exists(dataset) or {}).get("open"):
            self.client.set_status(*dataset, open=True)
        for some in _batches(lacking):
            self.client.attach_dids(*dataset, some)
            failpoints.point("rucio.attach")
        # A name that was known before stands for the bytes that it was given first.
        if bad := _unlike(
            {one.name: one for one in files}, rows_limited(self.client.list_files(*dataset))
        ):
            raise GiveUp(f"{dataset}: {bad[0]} ({len(bad)} such files)")

    # -- files and replicas -----------------------------------------------------------------

    def files(self, dataset: Did) -> tuple[Checked, ...]:
        """What the catalogue says of the dataset's files."""
        return tuple(
            Checked(row["name"].encode(), row["name"], row["bytes"], row["adler32"] or "")
            for row in rows_limited(self.client.list_files(*dataset))
        )

    def replicas(self, dids: Sequence[Did], rse: str | None = None) -> list[Row]:
        """The replicas of these files or datasets, in whatever state."""
        found: list[Row] = []
        for some in _batches([_row(did) for did in dids]):
            found += rows_limited(
                self.client.list_replicas(some, all_states=True, rse_expression=rse)
            )
        return found

    # -- rules ------------------------------------------------------------------------------

    def rules(self, dataset: Did) -> tuple[Standing, ...]:
        """The dataset's rules, whoever made them."""
        return tuple(map(self._standing, list(rows_limited(self.client.list_did_rules(*dataset)))))

    def _standing(self, row: Row) -> Standing:
        error = row.get("error")
        if row["state"] == "STUCK" and not error:
            error = self.client.examine_replication_rule(row["id"]).get("rule_error")
        created = _utc(row["created_at"])
        assert created is not None
        return Standing(
            id=row["id"],
            rse=row["rse_expression"],
            state=row["state"],
            created=created,
            expires=_utc(row["expires_at"]),
            done=row["locks_ok_cnt"],
            waiting=row["locks_replicating_cnt"],
            stuck=row["locks_stuck_cnt"],
            error=str(error) if error else None,
        )

    def add_rule(self, dataset: Did, rse: str, lifetime: int | None) -> None:
        """Ask for a replica at an RSE, unless that has been asked for."""
        add, notify = self.client.add_replication_rule, "Y" if self.there.rucio.messages else "N"
        options = {"lifetime": lifetime, "notify": notify}
        _unless("DuplicateRule", add, [_row(dataset)], 1, rse, **options)

    def look(self, dataset: Did) -> Found:
        """How the dataset stands."""
        rows = list(rows_limited(self.client.list_dataset_replicas(*dataset, deep=True)))
        rses = sorted(row["rse"] for row in rows if row["length"] and row["state"] == _AVAILABLE)
        return Found(tuple(rses), self.rules(dataset))

    # -- comparing --------------------------------------------------------------------------

    def verify(
        self,
        dataset: Did,
        files: Sequence[Checked],
        report: Report,
        *,
        deep: bool = True,
        without: Iterable[str] = (),
    ) -> Verdict:
        """Compare the catalogue, and with `deep` the storage, with what the files must be."""
        if self._exists(dataset) is None:
            return Verdict(bad=(f"{dataset} is not in the catalogue",))
        wanted = {one.name: one for one in files}
        rows = self.replicas([dataset])
        md5 = {row["name"]: row.get("md5") for row in rows}  # which list_files does not tell
        listed = (
            {**row, "md5": md5.get(row["name"])}
            for row in rows_limited(self.client.list_files(*dataset))
        )
        bad = _unlike(wanted, listed)
        rses = [rse for rse in _complete({*wanted}, rows) if rse not in {*without}]
        if bad or not deep:
            return Verdict(() if bad else tuple(rses), tuple(bad))
        return self._compared(rses, wanted, rows, report)

    def _compared(
        self,
        rses: Sequence[str],
        wanted: Mapping[str, Checked],
        rows: Sequence[Row],
        report: Report,
    ) -> Verdict:
        """Ask the storage of each of these RSEs, which have all files, what it has."""
        total = len(rses) * sum(one.size for one in wanted.values())
        counter = _Counter(report, total)
        verdict = Verdict()
        for rse in rses:
            try:
                storage = self.storage(rse)
                asked = [(storage, row["rses"][rse][0], wanted[row["name"]]) for row in rows]
                found = side_by_side(lambda one: _wrong(*one, counter), asked)
            except Exception as error:  # noqa: BLE001  # any storage's library; the others may do
                verdict = evolve(verdict, unseen=(*verdict.unseen, f"{rse}: {error}"))
                continue
            wrong = {row["name"]: why for row, why in zip(rows, found, strict=True) if why}
            good = verdict.good if wrong else (*verdict.good, rse)
            lines = tuple(f"{name} at {rse} {why}" for name, why in sorted(wrong.items()))
            replicas = tuple((rse, name) for name in sorted(wrong))
            verdict = evolve(
                verdict,
                good=good,
                bad=(*verdict.bad, *lines),
                replicas=(*verdict.replicas, *replicas),
            )
        if not rses:
            return evolve(verdict, unseen=("no RSE has all of it",))
        return verdict


def _unlike(wanted: Mapping[str, Checked], rows: Iterable[Row]) -> list[str]:
    """How the files that a dataset has differ from those that it must have, a line each."""
    listed = {row["name"]: row for row in rows}
    bad = [f"{name} is missing" for name in sorted(wanted.keys() - listed.keys())]
    bad += [f"{name} is not one of the run's" for name in sorted(listed.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & listed.keys()):
        row = listed[name]
        why = wanted[name].differs(row["bytes"], row["adler32"], row.get("md5"))
        bad += [f"{name} {why} in the catalogue"] if why else []
    return bad


def _wrong(storage: _Storage, pfn: str, wanted: Checked, counter: _Counter) -> str | None:
    """Why what is stored there is not the file; None where it is."""
    found = storage.stat(pfn)
    counter.add(wanted.size)
    if found is None:
        return "is not there"
    return wanted.differs(found.get("filesize"), found.get("adler32"), found.get("md5"))


def _complete(files: set[str], rows: Sequence[Row]) -> tuple[str, ...]:
    """The RSEs at which each of these files is available."""
    there = {row["name"]: row["states"] for row in rows}
    rses = sorted({rse for states in there.values() for rse in states})
    return tuple(
        rse
        for rse in rses
        if files and all(there.get(name, {}).get(rse) == _AVAILABLE for name in files)
    )


def _unless(known: str, function: Callable[..., object], *args: Any, **options: Any) -> bool:
    """Call it; whether it did something. An error of that name says that it was done before."""
    try:
        function(*args, **options)
    except Exception as error:
        if not is_called(error, known):
            raise
        return False
    return True


def _row(did: Did) -> Row:
    return {"scope": did.scope, "name": did.name}


def _did(row: Row) -> Did:
    return Did(row["scope"], row["name"])


def _utc(time: datetime | None) -> datetime | None:
    return time if time is None or time.tzinfo else time.replace(tzinfo=UTC)


def _batches(items: Sequence[T]) -> Iterator[list[T]]:
    return (list(items[at : at + MANY]) for at in range(0, len(items), MANY))


# -- storage --------------------------------------------------------------------------------------


@define(eq=False)
class _Storage:
    """The storage behind an RSE, by Rucio's own protocols. Any thread may call."""

    rse: str
    settings: Row
    token: str | None = field(repr=False)

    @contextmanager
    def _protocol(self, operation: str, scheme: str | None = None) -> Iterator[Any]:
        from rucio.rse import rsemanager

        # Rucio writes the token into the settings and takes it out again: threads need their own.
        protocol = rsemanager.create_protocol(
            deepcopy(self.settings),
            operation,
            scheme=scheme,
            auth_token=self.token,
            logger=_quiet.log,
        )
        protocol.connect()
        try:
            yield protocol
        finally:
            protocol.close()

    def pfn(self, did: Did) -> str:
        """Where a file is, or will be, in this storage."""
        with self._protocol("read") as protocol:
            name: str = protocol.lfns2pfns(_row(did))[str(did)]
            return name

    def stat(self, pfn: str) -> Row | None:
        """Size and checksums of a file, as the storage has them now; None where there is none."""
        with self._protocol("read", urlsplit(pfn).scheme) as protocol:
            try:
                found: Row = protocol.stat(pfn)
            except Exception as error:
                if isinstance(error, FileNotFoundError) or is_called(error, "SourceNotFound"):
                    return None
                raise
        return found

    def send(self, did: Did, one: Checked, root: str) -> None:
        """Bring a file there, in place of whatever has its name. A temporary name until whole."""
        from rucio.rse import rsemanager

        with pinned(join(os.fsencode(root), one.path)) as name:
            directory, file = os.path.split(os.fsdecode(name))
            rsemanager.upload(
                self.settings,
                {
                    **_row(did),
                    "filename": file,
                    "adler32": one.adler32,
                    "md5": one.md5,
                    "filesize": one.size,
                },
                source_dir=directory,
                delete_existing=True,
                auth_token=self.token,
                logger=_quiet.log,
            )

    def fetch(self, pfn: str, path: bytes) -> None:
        """Bring a file here."""
        with self._protocol("read", urlsplit(pfn).scheme) as protocol:
            protocol.get(pfn, os.fsdecode(path))


@define(eq=False)
class _Sending:
    """Brings the files of a copy to one RSE, and makes them known to the catalogue."""

    rucio: _Rucio
    storage: _Storage
    root: str
    dataset: Did
    report: Report

    def send(self, files: Sequence[Checked], *, known: bool) -> None:
        """Afterwards each is AVAILABLE, and the storage has told that it is what it must be.

        `known`: some of them may have been registered before.
        """
        rse, client = self.storage.rse, self.rucio.client
        if not self.storage.settings.get("deterministic", True):
            raise GiveUp(f"{rse} is not deterministic: it cannot be an entrance")
        rows = {row["name"]: row for row in self._known(files)} if known else {}
        self._compare(rows, files)
        state = {name: row["states"].get(rse) for name, row in rows.items()}
        new = [one for one in files if state.get(one.name) is None]
        for some in _batches(new):
            client.add_replicas(rse, [self._registered(one) for one in some])
            failpoints.point("rucio.register")
        counter = _Counter(self.report, sum(one.size for one in files))
        names = {one.name for one in new}
        for some in _batches(files):
            side_by_side(lambda one: self._bring(one, one.name in names, counter), some)
            failpoints.point("rucio.sent")
            lacking = [one for one in some if state.get(one.name) != _AVAILABLE]
            if lacking:
                client.update_replicas_states(rse, [self._available(one) for one in lacking])
                failpoints.point("rucio.available")

    def _known(self, files: Sequence[Checked]) -> list[Row]:
        return self.rucio.replicas([Did(self.dataset.scope, one.name) for one in files])

    def _compare(self, rows: Mapping[str, Row], files: Iterable[Checked]) -> None:
        """A name stands for one content for ever: Rucio would take other bytes without a word."""
        for one in files:
            row = rows.get(one.name)
            why = one.differs(row["bytes"], row["adler32"], row.get("md5")) if row else None
            if why is not None:
                raise GiveUp(f"{self.dataset.scope}:{one.name} {why} in the catalogue")

    def _registered(self, one: Checked) -> Row:
        sums = {"bytes": one.size, "adler32": one.adler32, "md5": one.md5}
        return {**_row(Did(self.dataset.scope, one.name)), **sums, "state": "C"}

    def _available(self, one: Checked) -> Row:
        return {**_row(Did(self.dataset.scope, one.name)), "state": "A"}

    def _bring(self, one: Checked, is_new: bool, counter: _Counter) -> None:
        did = Did(self.dataset.scope, one.name)
        pfn = self.storage.pfn(did)
        if is_new or _wrong(self.storage, pfn, one, _Counter.silent()) is not None:
            self.storage.send(did, one, self.root)
            failpoints.point("rucio.file")
            why = _wrong(self.storage, pfn, one, _Counter.silent())
            if why is not None:
                raise Retry(f"{one.name} at {self.storage.rse} {why} after it was brought there")
        counter.add(one.size)


@define(eq=False)
class _Fetching:
    """Brings files of a dataset here, each from the first of its replicas that gives it whole.

    Rucio's library writes to `private` alone; what it has brought there goes on to `partial`.
    """

    rucio: _Rucio
    partial: bytes
    private: bytes
    order: Download
    files: Sequence[Checked]
    counter: _Counter
    _rows: Mapping[str, Row] = field(init=False)
    _by_path: Mapping[bytes, Checked] = field(init=False)
    _storages: dict[str, _Storage] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        rows = rows_limited(
            self.rucio.client.list_replicas(
                [_row(self.order.dataset)], rse_expression=self.order.rse
            )
        )
        self._rows = {row["name"]: row for row in rows}
        self._by_path = {one.path: one for one in self.files}
        for rse in {rse for row in self._rows.values() for rse in row["rses"]}:
            self._storages[rse] = self.rucio.storage(rse)

    def fetch(self, seen: Seen) -> None:
        """Bring one file. Its time says that it is whole."""
        one = self._by_path[seen.path]
        failed: list[str] = []
        for rse, pfn in self._sources(one):
            if (why := self._fetched(seen, rse, pfn)) is None:
                failpoints.point("files.file")
                self.counter.add(one.size)
                return
            failed.append(f"{rse}: {why}")
        where = f" at {self.order.rse}" if self.order.rse else ""
        raise Retry(f"{one.name}: {'; '.join(failed) or f'no replica is available{where}'}")

    def _sources(self, one: Checked) -> list[tuple[str, str]]:
        pfns = self._rows.get(one.name, {}).get("pfns", {})
        ordered = sorted(pfns.items(), key=lambda item: item[1].get("priority", 0))
        return [(source["rse"], pfn) for pfn, source in ordered]

    def _fetched(self, seen: Seen, rse: str, pfn: str) -> str | None:
        """Bring the file from there; why it did not come, None where it did."""
        one, path = self._by_path[seen.path], join(self.partial, seen.path)
        staged = name_in(self.private, one.path)
        try:
            self._storages[rse].fetch(pfn, staged)
            with local(path, "write"):
                why = one.differs(os.path.getsize(staged), _adler32(staged))
                if why is None:
                    os.utime(staged, ns=(seen.mtime_ns, seen.mtime_ns))
                    place_file(staged, path, is_lock=not one.path)
        except (Retry, GiveUp):
            raise
        except Exception as error:  # noqa: BLE001  # any storage's library; another may give it
            return str(error) or type(error).__name__
        else:
            return why
        finally:
            with suppress(FileNotFoundError):
                os.unlink(staged)


def _adler32(path: bytes) -> str:
    value = 1
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            value = zlib.adler32(chunk, value)
    return f"{value:08x}"


@define(eq=False)
class _Counter:
    """Counts bytes from any thread and reports them."""

    report: Report
    total: int
    done: int = 0
    added: int = 0
    _lock: Lock = field(factory=Lock)

    @classmethod
    def silent(cls) -> _Counter:
        """One that tells nobody."""
        return cls(lambda _done, _total: None, 0)

    def add(self, count: int) -> None:
        """So many bytes more."""
        with self._lock:
            self.added += count
            self.done += count
            self.report(self.done, self.total)


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call it for each, a few at a time; their results in order. The first error is raised."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
