"""Files of a copy on their way into a catalogue and out of it, a few at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from attrs import define, field

from caxev import failpoints
from caxev.core.errors import Damaged, GiveUp, Retry
from caxev.files import Confined, Meter, Report, Seen, join, local, name_in, place_file
from caxev.limited import rows_limited
from caxev.rucio.connection import AVAILABLE, RucioSession, batches, differences
from caxev.rucio.files import Checked
from caxev.rucio.names import Did
from caxev.rucio.orders import Download
from caxev.rucio.storage import Row, Storage, adler32_of, row_of
from caxev.threads import side_by_side


@define(eq=False)
class Sending:
    """Uploads the files of a copy to one RSE, and registers them in the catalogue."""

    rucio: RucioSession
    storage: Storage
    root: Confined
    dataset: Did
    report: Report

    def send(self, files: Sequence[Checked], *, known: bool) -> None:
        """Bring files there. Afterwards each is AVAILABLE, and the storage has confirmed its bytes.

        `known`: some of them may have been registered before.
        """
        rse, client = self.storage.rse, self.rucio.client
        # Only a deterministic RSE derives a file's path from its name, so that an attempt after a
        # crash finds the file again.
        if not self.storage.settings.get("deterministic", True):
            raise GiveUp(f"{rse} is not deterministic: it cannot be an entrance")
        scope, names = self.dataset.scope, {one.name: one for one in files}
        dids = [Did(scope, name) for name in names]
        rows = {row["name"]: row for row in (self.rucio.replicas(dids) if known else ())}
        # Rucio itself does not compare: it accepts other bytes for a name without an error.
        if bad := differences({name: names[name] for name in rows}, rows.values()):
            raise GiveUp(f"{scope}:{bad[0]}")
        state = {name: row["states"].get(rse) for name, row in rows.items()}
        new = [one for one in files if state.get(one.name) is None]
        # Registered before they are sent, as copying: a crash leaves no file in the storage that
        # the catalogue does not know.
        for some in batches(new):
            client.add_replicas(rse, [{**self._row(one, "C"), **_sums(one)} for one in some])
            failpoints.point("rucio.register")
        meter = Meter(self.report, sum(one.size for one in files))
        unsent = {one.name for one in new}
        for some in batches(files):
            side_by_side(lambda one: self._bring(one, one.name in unsent, meter), some)
            failpoints.point("rucio.sent")
            # Only after the storage has confirmed every file of the batch.
            lacking = [one for one in some if state.get(one.name) != AVAILABLE]
            if lacking:
                client.update_replicas_states(rse, [self._row(one, "A") for one in lacking])
                failpoints.point("rucio.available")

    def _row(self, one: Checked, state: str) -> Row:
        return {**row_of(Did(self.dataset.scope, one.name)), "state": state}

    def _bring(self, one: Checked, is_new: bool, meter: Meter) -> None:
        did = Did(self.dataset.scope, one.name)
        pfn = self.storage.pfn(did)
        # A file that an earlier attempt sent is compared, and sent again only if it differs.
        if is_new or self.storage.difference(pfn, one) is not None:
            self.storage.send(did, one, self.root)
            failpoints.point("rucio.file")
            # By the storage's own checksum: that the upload succeeded does not prove its bytes.
            why = self.storage.difference(pfn, one)
            if why is not None:
                raise Retry(f"{one.name} at {self.storage.rse} {why} after it was brought there")
        meter.add(one.size)


def _sums(one: Checked) -> Row:
    return {"bytes": one.size, "adler32": one.adler32, "md5": one.md5}


@define(eq=False)
class Fetching:
    """Downloads files of a dataset, each from the first of its replicas that gives it whole.

    Rucio's library writes only to `private`; verified files are then moved to `partial`.
    """

    rucio: RucioSession
    partial: Confined
    private: Confined
    order: Download
    files: Sequence[Checked]
    meter: Meter
    _rows: Mapping[str, Row] = field(init=False)
    _by_path: Mapping[bytes, Checked] = field(init=False)
    _storages: dict[str, Storage] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        rows = rows_limited(
            self.rucio.client.list_replicas(
                [row_of(self.order.dataset)], rse_expression=self.order.rse
            )
        )
        self._rows = {row["name"]: row for row in rows}
        self._by_path = {one.path: one for one in self.files}
        for rse in {rse for row in self._rows.values() for rse in row["rses"]}:
            self._storages[rse] = self.rucio.storage(rse)

    def fetch(self, seen: Seen) -> None:
        """Download one file; its modification time marks it as complete.

        Raises `Damaged` if every replica is bad, `Retry` if one cannot be had.
        """
        one = self._by_path[seen.path]
        failed: list[Damaged | Retry] = []
        for rse, pfn in self._sources(one):
            if (error := self._fetched(seen, rse, pfn)) is None:
                failpoints.point("files.file")
                self.meter.add(one.size)
                return
            failed.append(error)
        where = f" at {self.order.rse}" if self.order.rse else ""
        lacking = f"no replica is available{where}"
        why = f"{one.name}: {'; '.join(error.why for error in failed) or lacking}"
        is_bad = failed and all(isinstance(error, Damaged) for error in failed)
        raise Damaged(why) if is_bad else Retry(why)

    def _sources(self, one: Checked) -> list[tuple[str, str]]:
        pfns = self._rows.get(one.name, {}).get("pfns", {})
        ordered = sorted(pfns.items(), key=lambda item: item[1].get("priority", 0))
        return [(source["rse"], pfn) for pfn, source in ordered]

    def _fetched(self, seen: Seen, rse: str, pfn: str) -> Damaged | Retry | None:
        """Download the file from one RSE; returns why that failed, or None."""
        one, path = self._by_path[seen.path], join(self.partial, seen.path)
        staged = name_in(self.private, one.path)
        try:
            self._storages[rse].fetch(pfn, staged)
            with local(path, "write"):
                why = one.differs(os.path.getsize(staged), adler32_of(staged))
                if why is None:
                    # Time before name: under its name a file with this time counts as complete.
                    os.utime(staged, ns=(seen.mtime_ns, seen.mtime_ns))
                    place_file(staged, path, is_lock=not one.path)
        except (Retry, GiveUp):
            raise
        except Exception as error:  # noqa: BLE001  # any storage's library; another may give it
            return Retry(f"{rse}: {str(error) or type(error).__name__}")
        else:
            return None if why is None else Damaged(f"{rse}: {why}")
        finally:
            with suppress(FileNotFoundError):
                os.unlink(staged)
