"""Operations on a catalogue, as functions that run in a worker process.

The handlers for Rucio and ``caxev rucio`` call `upload`, `settle`, `verify`,
`download` and the rest with a `Site` of method ``rucio``; each opens a connection of its own.

Errors: `Retry` for what may pass (a server that is away), `OverQuota` if there is no room,
`GiveUp` for what a person must repair, all in Rucio's own words; see `caxev.rucio.errors`.

Everything here is idempotent: a name exists once in the catalogue. If a call is killed, the next
one continues: it sends files that the catalogue knows and the storage element lacks, and attaches
those that are there but not attached.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from attrs import evolve

from caxev import failpoints
from caxev.config import Site, state_directory
from caxev.core.clock import utcnow
from caxev.core.errors import Damaged, GiveUp, Retry
from caxev.files import (
    Manifest,
    Meter,
    Moved,
    Plan,
    Report,
    StagedCopy,
    check_expected,
    confine,
    landing,
)
from caxev.limited import no_file_over, rows_limited
from caxev.rucio.changes import ENDED, Changes, RuleState, changes
from caxev.rucio.connection import RucioSession, connected
from caxev.rucio.files import Checked, Digested, digest_for_catalogue, seen_of
from caxev.rucio.moving import Fetching, Sending
from caxev.rucio.names import CopyNames, Did
from caxev.rucio.orders import DatasetState, Download, Settlement, Upload, Verdict
from caxev.rucio.storage import row_of
from caxev.threads import side_by_side


def check(there: Site) -> str:
    """Reach the server and log in. Returns its version and our account."""
    with connected(there, "reaching the server") as rucio:
        who = rucio.client.whoami()
        version = rucio.client.ping().get("version", "of unknown version")
        return f"Rucio {version} knows us as {who.get('account')}"


def upload(order: Upload, *, report: Report) -> tuple[Digested, DatasetState]:
    """Bring a copy into the catalogue, at its entrance RSE: whole, attached, under a rule, closed.

    When this returns, every file is AVAILABLE there, and the storage itself has confirmed its size
    and checksum. The digests that were read of the copy are returned, too.
    """
    entrance = order.there.rucio_upload_rse
    if entrance is None:
        raise GiveUp(f"{order.there.name} names no rucio_upload_rse in sites.json")
    root = confine(order.location, order.here.roots)
    with connected(order.there, f"upload of {order.names.dataset}") as rucio:
        # First, so that the copy is not read if the server is down or the RSE does not exist.
        storage = rucio.storage(entrance)
        sha512 = order.manifest is None
        read = digest_for_catalogue(root, order.names, sha512=sha512, report=report)
        _check_digest(order, read.manifest)
        is_new = rucio.make(order.names)
        sending = Sending(rucio, storage, root, order.names.dataset, report)
        sending.send(read.files, known=not is_new)
        rucio.attach(order.names.dataset, read.files)
        # Without a rule Rucio may delete the files again.
        if not any(one.rse == entrance for one in rucio.rules(order.names.dataset)):
            rucio.add_rule(order.names.dataset, entrance, None)
            failpoints.point("rucio.rule")
        rucio.describe(order.names, order.metadata)
        # Closed last: others take a closed dataset for a complete one.
        rucio.close(order.names.dataset)
        failpoints.point("rucio.close")
        found = rucio.look(order.names.dataset)
    if entrance not in found.rses:
        raise Retry(f"{order.names.dataset} is not yet AVAILABLE at {entrance}")
    return read, found


def _check_digest(order: Upload, manifest: Manifest) -> None:
    wanted, is_so = order.manifest, manifest.digest
    if wanted is None:
        wanted, is_so = order.checksum, manifest.cax_checksum() or ""
    if wanted != is_so:
        raise Damaged(f"{order.location} is not what the database says: {is_so}, not {wanted}")


def look(there: Site, dataset: Did) -> DatasetState:
    """Return the state of a dataset, and change nothing."""
    with connected(there, f"looking at {dataset}") as rucio:
        return rucio.look(dataset)


def settle(order: Settlement, *, report: Report) -> DatasetState:
    """Make the rules of a dataset those that are wanted, and return its state afterwards.

    Idempotent: no rule is made twice, and the end of an existing one is moved. A rule is deleted
    only after another RSE's replicas have been compared with `files` in this call.
    """
    with connected(order.there, f"rules of {order.dataset}") as rucio:
        todo = changes(
            order.wishes,
            rucio.rules(order.dataset),
            order.remembered,
            run_name=order.run_name,
            now=utcnow(),
        )
        # Rules are added before any is deleted, so that no replica goes before its successor is
        # requested.
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


def _give_up(rucio: RucioSession, order: Settlement, todo: Changes, report: Report) -> Changes:
    """Delete the rules to give up, if another RSE is proven to have and keep all files."""
    if not todo.remove:
        return todo
    going = {one.rse for one in todo.remove}
    proof = Verdict(unseen=("its files' checksums are unknown",))
    if order.files is not None:
        proof = rucio.verify(order.dataset, order.files, report, without=going)
    # A replica that only a rule with an end keeps would leave none.
    lasting = rucio.look(order.dataset).lasting - going
    if lasting.isdisjoint(proof.good):
        lacking = f"no rule without an end keeps what {', '.join(proof.good) or 'no RSE'} has"
        why = "; ".join((*proof.bad, *proof.unseen)) or lacking
        raise Retry(f"{order.dataset} stays at {', '.join(sorted(going))}: {why}")
    for one in todo.remove:
        rucio.client.delete_replication_rule(one.id, purge_replicas=True)
        failpoints.point("rucio.rule")
    return todo


def _ended(remembered: Iterable[RuleState], standing: Iterable[RuleState]) -> Iterator[RuleState]:
    there = {one.rse for one in standing}
    return (evolve(one, state=ENDED) for one in remembered if one.rse not in there)


def verify(
    there: Site, dataset: Did, files: tuple[Checked, ...], deep: bool, *, report: Report
) -> Verdict:
    """Compare the files that the catalogue has with those that it must have.

    With `deep` the storage of every RSE that has all of it is asked for sizes and checksums.
    """
    with connected(there, f"comparing {dataset}") as rucio:
        return rucio.verify(dataset, files, report, deep=deep)


def read_copy(here: Site, location: str, names: CopyNames, *, report: Report) -> Digested:
    """Read a copy at this site, for the digests that its files must have in the catalogue."""
    root = confine(location, here.roots)
    return digest_for_catalogue(root, names, sha512=False, report=report)


def datasets(there: Site) -> tuple[Did, ...]:
    """Return every dataset in the scopes of the catalogue's experiment."""
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


def declare_bad(there: Site, dataset: Did, replicas: Iterable[tuple[str, str]]) -> str | None:
    """Declare these replicas, (RSE, name), bad, so that the catalogue makes them again.

    Returns what it has not taken, and why.
    """
    # Not by their addresses: Rucio accepts those at one RSE and drops the others.
    rows = [{**row_of(Did(dataset.scope, name)), "rse": rse} for rse, name in replicas]
    with connected(there, f"declaring bad replicas of {dataset}") as rucio:
        failed = rucio.client.declare_bad_file_replicas(rows, "caxev: the checksum differs")
    return "; ".join(f"{rse}: {', '.join(map(str, why))}" for rse, why in failed.items()) or None


def standing_rules(there: Site, dataset: Did) -> frozenset[str]:
    """Return the ids of the dataset's rules that have not been deleted."""
    with connected(there, f"rules of {dataset}") as rucio:
        return frozenset(one.id for one in rucio.rules(dataset) if one.stays(utcnow()))


def containers_with_rules(there: Site, dataset: Did) -> list[Did]:
    """Return the containers of a dataset whose rules keep its replicas, too."""
    with connected(there, f"rules above {dataset}") as rucio:
        return [
            one
            for one in rucio.containers(dataset)
            if any(rule.stays(utcnow()) for rule in rucio.rules(one))
        ]


def give_up(there: Site, dataset: Did, rules: Collection[str]) -> int:
    """Delete these rules, so that the catalogue deletes every replica that no other one keeps.

    Returns how many others there are.
    """
    with connected(there, f"giving up {dataset}") as rucio:
        standing = [one.id for one in rucio.rules(dataset) if one.stays(utcnow())]
        for one in rules:
            if one in standing:
                rucio.client.delete_replication_rule(one, purge_replicas=True)
                failpoints.point("rucio.rule")
        return len({*standing}.difference(rules))


def download(order: Download, *, report: Report) -> Moved:
    """Download a dataset, with the ADLER32 of every file compared; its name appears at the end."""
    final = confine(order.location, order.here.roots)
    with connected(order.there, f"download of {order.dataset}") as rucio:
        files = order.files or rucio.files(order.dataset)
        if not files:
            raise GiveUp(f"{order.dataset} holds no file any more")
        # A dataset of one file may be a directory with one file, or the file itself.
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
        meter = Meter.of(source, report)

        def fill(todo: Plan) -> None:
            with landing(state_directory(order.here), final) as private:
                wanted = {piece.file.path: piece.file for piece in todo.pieces}
                meter.done = meter.total - sum(one.size for one in wanted.values())
                fetching = Fetching(rucio, arrival.partial, private, order, files, meter)
                # By any protocol: Rucio's library writes as long as a storage sends.
                with no_file_over(max((one.size for one in wanted.values()), default=0)):
                    side_by_side(fetching.fetch, wanted.values())

        return arrival.made(meter, fill, lambda: None)  # its content is in the catalogue forever
