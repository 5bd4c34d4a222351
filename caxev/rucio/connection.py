"""A connection to a catalogue. Only this module and `storage` know Rucio's client library.

The library is the extra ``caxev[rucio]``, imported with the first connection; `missing` returns
whether it is there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from attrs import define, evolve

from caxev import failpoints
from caxev.config import Site, secret
from caxev.core.errors import GiveUp, Retry
from caxev.files import Meter, Report
from caxev.limited import rows_limited
from caxev.rucio.answers import limited_session
from caxev.rucio.changes import RuleState
from caxev.rucio.errors import is_called, translated
from caxev.rucio.files import Checked
from caxev.rucio.names import CopyNames, Did
from caxev.rucio.orders import DatasetState, Verdict
from caxev.rucio.storage import QUIET, Row, Storage, row_of
from caxev.threads import side_by_side

T = TypeVar("T")

MANY: Final = 500
"""Files in one request."""
AVAILABLE: Final = "AVAILABLE"
_THERE: Final = frozenset({AVAILABLE, "COPYING", "UNAVAILABLE", "TEMPORARY_UNAVAILABLE"})
"""The states of a replica that is there, or on its way."""
_HOME: Final = os.environ.get("RUCIO_HOME")
"""The home of catalogues whose ``rucio.home`` names none."""


def missing() -> str | None:
    """Return what to install before a catalogue can be reached; None if the library is there."""
    if importlib.util.find_spec("rucio") is None:
        return "Rucio's client library is not installed here: pip install 'caxev[rucio]'"
    return None


@contextmanager
def connected(there: Site, what: str) -> Iterator[RucioSession]:
    """Open a connection to the catalogue for a block, and translate its errors into ours."""
    if (why := missing()) is not None:
        raise GiveUp(why)
    with translated(what, float(there.rucio.ask_after)):
        yield RucioSession(_client(there), there)


def _client(there: Site) -> Any:
    settings = there.rucio
    home = settings.home or _HOME
    os.environ.pop("RUCIO_HOME", None)
    os.environ |= {} if home is None else {"RUCIO_HOME": home}
    os.environ["RUCIO_CLIENT_MODE"] = "True"  # else a server's configuration makes it one
    from rucio.client import Client, baseclient
    from rucio.common.config import clean_cached_config

    # A process serves one catalogue after the other: the library would keep the first one's
    # rucio.cfg, and log in to the others with its account and its secrets.
    clean_cached_config()
    # Replaced in the module: the library creates its sessions itself, and another one when its
    # token has expired.
    baseclient.Session = limited_session
    credentials = {
        "username": settings.username,
        "password": secret("RUCIO_PASSWORD"),
        "client_proxy": there.grid_cert,
    }
    try:
        with redirect_stdout(sys.stderr):  # it prints how to log in
            return Client(
                rucio_host=there.hostname,
                auth_host=settings.auth_host or there.hostname,
                account=there.rucio_account,
                ca_cert=settings.ca_cert,
                auth_type=settings.auth_type,
                creds={name: value for name, value in credentials.items() if value is not None},
                timeout=settings.timeout,
                user_agent="caxev",
                logger=QUIET,
            )
    except KeyError as lacking:  # its error if there is no proxy
        how = settings.auth_type or "the login of rucio.cfg"
        raise GiveUp(f"Rucio's client finds no {lacking} for {how}") from lacking
    except EOFError as alone:  # it asks a person, and there is none
        raise Retry("Rucio's client asks a person to log in: do so once with its own") from alone


@define(eq=False)
class RucioSession:
    """A connection to a catalogue, and its operations. Raises Rucio's own errors."""

    client: Any
    there: Site

    def storage(self, rse: str) -> Storage:
        """Return the access to an RSE's storage."""
        token: str = self.client.auth_token or ""
        return Storage(rse, self.client.get_rse(rse), token if token.count(".") == 2 else None)  # noqa: PLR2004  # a JWT has three parts

    # -- names ------------------------------------------------------------------------------

    def make(self, names: CopyNames) -> bool:
        """Create scopes, containers and the dataset, and attach them, as far as they are missing.

        Returns whether the run's scope is new, so that none of its names exists.
        """
        is_new = False
        # A name that exists is no error: another site may create it at the same time.
        if self._exists(names.dataset) is None:
            is_new = self._add_scope(names.dataset.scope)
            unless("DataIdentifierAlreadyExists", self.client.add_dataset, *names.dataset)
            failpoints.point("rucio.dataset")
        for outer, inner in ((names.run, names.dataset), (names.period, names.run)):
            if outer in self._parents(inner):
                continue
            self._add_scope(outer.scope)
            unless("DataIdentifierAlreadyExists", self.client.add_container, *outer)
            failpoints.point("rucio.container")
            unless("DuplicateContent", self.client.attach_dids, *outer, [row_of(inner)])
            failpoints.point("rucio.container")
        return is_new

    def _parents(self, did: Did) -> set[Did]:
        rows = rows_limited(self.client.list_parent_dids(*did))
        return {Did(row["scope"], row["name"]) for row in rows}

    def containers(self, dataset: Did) -> list[Did]:
        """Return the containers that hold the dataset, and those that hold these."""
        found: list[Did] = []
        todo = [dataset]
        while todo:
            new = self._parents(todo.pop()).difference(found)
            found += sorted(new)
            todo += new
        return found

    def _add_scope(self, scope: str) -> bool:
        return unless("Duplicate", self.client.add_scope, self.client.account, scope)

    def _exists(self, did: Did) -> Row | None:
        try:
            found: Row = self.client.get_did(*did)
        except Exception as error:
            if is_called(error, "DataIdentifierNotFound"):
                return None
            raise
        return found

    def describe(self, names: CopyNames, metadata: Mapping[str, Any]) -> None:
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
            unless("UnsupportedOperation", self.client.close, *dataset)

    def attach(self, dataset: Did, files: Sequence[Checked]) -> None:
        """Make the dataset hold these files, and check that it holds no others."""
        content = {row["name"] for row in rows_limited(self.client.list_content(*dataset))}
        names = [one.name for one in files]
        if odd := sorted(content.difference(names)):
            raise GiveUp(f"{dataset} holds {odd[0]!r}, which the copy does not ({len(odd)} such)")
        lacking = [row_of(Did(dataset.scope, name)) for name in names if name not in content]
        # A closed dataset takes no more files: that of an upload which is repeated may be closed.
        if lacking and not (self._exists(dataset) or {}).get("open"):
            self.client.set_status(*dataset, open=True)
        for some in batches(lacking):
            self.client.attach_dids(*dataset, some)
            failpoints.point("rucio.attach")
        # A name that was known before stands for the bytes that it was given first.
        if bad := differences(
            {one.name: one for one in files}, rows_limited(self.client.list_files(*dataset))
        ):
            raise GiveUp(f"{dataset}: {bad[0]} ({len(bad)} such files)")

    # -- files and replicas -----------------------------------------------------------------

    def files(self, dataset: Did) -> tuple[Checked, ...]:
        """Return the dataset's files as the catalogue has them."""
        return tuple(
            Checked(row["name"].encode(), row["name"], row["bytes"], row["adler32"] or "")
            for row in rows_limited(self.client.list_files(*dataset))
        )

    def replicas(self, dids: Sequence[Did]) -> list[Row]:
        """Return the replicas of these files or datasets, in any state."""
        found: list[Row] = []
        for some in batches([row_of(did) for did in dids]):
            found += rows_limited(self.client.list_replicas(some, all_states=True))
        return found

    # -- rules ------------------------------------------------------------------------------

    def rules(self, dataset: Did) -> tuple[RuleState, ...]:
        """Return the dataset's rules, of any account."""
        return tuple(map(self._standing, list(rows_limited(self.client.list_did_rules(*dataset)))))

    def _standing(self, row: Row) -> RuleState:
        error = row.get("error")
        # The list often lacks the reason: this call has the server find it.
        if row["state"] == "STUCK" and not error:
            error = self.client.examine_replication_rule(row["id"]).get("rule_error")
        created = _utc(row["created_at"])
        assert created is not None
        return RuleState(
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
        # The daemon hermes sends messages only about rules that were made with `notify`.
        add, notify = self.client.add_replication_rule, "Y" if self.there.rucio.messages else "N"
        options = {"lifetime": lifetime, "notify": notify}
        unless("DuplicateRule", add, [row_of(dataset)], 1, rse, **options)

    def look(self, dataset: Did) -> DatasetState:
        """Return the state of the dataset."""
        # Rules first: a transfer that ends in between leaves a rule that is not OK, and is asked
        # about again. In the other order all rules were OK, and nobody missed the new replica.
        rules = self.rules(dataset)
        rows = list(rows_limited(self.client.list_dataset_replicas(*dataset, deep=True)))
        rses = sorted(row["rse"] for row in rows if row["length"] and row["state"] == AVAILABLE)
        return DatasetState(tuple(rses), rules)

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
        """Compare the catalogue's files, and with `deep` the storage's, with the right ones."""
        if self._exists(dataset) is None:
            return Verdict(bad=(f"{dataset} is not in the catalogue",))
        wanted = {one.name: one for one in files}
        rows = self.replicas([dataset])
        md5 = {row["name"]: row.get("md5") for row in rows}  # list_files lacks it
        listed = (
            {**row, "md5": md5.get(row["name"])}
            for row in rows_limited(self.client.list_files(*dataset))
        )
        bad = differences(wanted, listed)
        rses = [rse for rse in complete_at({*wanted}, rows) if rse not in {*without}]
        if bad:
            return Verdict(bad=tuple(bad))
        if not rses and (gone := without_replica({*wanted}, rows)):
            return Verdict(bad=tuple(f"{name} is at no RSE any more" for name in gone), lost=True)
        if not rses:
            return Verdict(unseen=("no RSE has all of it",))
        if not deep:
            return Verdict(good=tuple(rses))
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
        meter = Meter(report, total)
        verdict = Verdict()
        for rse in rses:
            try:
                found = self._differences_at(rse, wanted, rows, meter)
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
        return verdict

    def _differences_at(
        self, rse: str, wanted: Mapping[str, Checked], rows: Sequence[Row], meter: Meter
    ) -> list[str | None]:
        storage = self.storage(rse)

        def compare(row: Row) -> str | None:
            why = storage.difference(row["rses"][rse][0], wanted[row["name"]])
            meter.add(wanted[row["name"]].size)
            return why

        return side_by_side(compare, rows)


def differences(wanted: Mapping[str, Checked], rows: Iterable[Row]) -> list[str]:
    """Return how the files of a dataset differ from those that it must have, a line each."""
    listed = {row["name"]: row for row in rows}
    bad = [f"{name} is missing" for name in sorted(wanted.keys() - listed.keys())]
    bad += [f"{name} is not one of the run's" for name in sorted(listed.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & listed.keys()):
        row = listed[name]
        why = wanted[name].differs(row["bytes"], row["adler32"], row.get("md5"))
        bad += [f"{name} {why} in the catalogue"] if why else []
    return bad


def complete_at(files: set[str], rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the RSEs at which all of these files are available."""
    there = {row["name"]: row["states"] for row in rows}
    rses = sorted({rse for states in there.values() for rse in states})
    return tuple(
        rse
        for rse in rses
        if files and all(there.get(name, {}).get(rse) == AVAILABLE for name in files)
    )


def without_replica(files: set[str], rows: Iterable[Row]) -> list[str]:
    """Return the files that have no replica, and none on its way."""
    known = {row["name"] for row in rows if not _THERE.isdisjoint(row["states"].values())}
    return sorted(files - known)


def unless(known: str, function: Callable[..., object], *args: Any, **options: Any) -> bool:
    """Call a function; whether it did something. An error of that name means that it was done."""
    try:
        function(*args, **options)
    except Exception as error:
        if not is_called(error, known):
            raise
        return False
    return True


def _utc(time: datetime | None) -> datetime | None:
    return time if time is None or time.tzinfo else time.replace(tzinfo=UTC)


def batches(items: Sequence[T]) -> Iterator[list[T]]:
    """Cut a sequence into lists for one request each."""
    return (list(items[at : at + MANY]) for at in range(0, len(items), MANY))
