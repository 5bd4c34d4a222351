"""The page of many runs and sites: its first answer, its memory, and how soon viewers see a change.

A database has runs with copies at many sites, and `caxev web` shows them. Viewers follow the list
of runs by server-sent events while runs change at a given rate; a few of them are timed, from
before the write to the arrival of the changed row, and the others only read what they get. One is
a Chromium: it is timed to the moment at which the changed row stands in its document. Afterwards
the viewers idle, and the database's own counters show what they cost.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import psutil
from attrs import define, field
from bson import ObjectId
from pymongo import MongoClient
from rich.console import Console
from rich.table import Table

from caxev.web.listing import row_id
from tests.browser import browser, visit
from tests.mongod import Cluster
from tests.page import Page, serving

RUNS, QUICK_RUNS = 100_000, 2_000
VIEWERS, QUICK_VIEWERS = 200, 20
RATE, QUICK_RATE = 100, 20
SECONDS, QUICK_SECONDS = 30.0, 4.0
SITES: Final = 100
TIMED: Final = 5
"""Viewers whose rows are timed: to time all would take the processor that the page needs."""
PASS: Final = 3600.0
"""Seconds that reading all runs may take."""
LOADS: Final = 20
IDLE: Final = 10.0
SHOWN: Final = 50
"""Runs on the page that the Chromium shows."""
OBSERVE: Final = """() => {
  window.seen = {};
  const note = (changes) => {
    for (const one of changes)
      for (const row of one.addedNodes) if (row.id) window.seen[row.id] ??= Date.now();
  };
  new MutationObserver(note).observe(document.querySelector("tbody"), { childList: true });
}"""
BATCH: Final = 5_000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, help=f"how many runs (default {RUNS:,})")
    parser.add_argument("--viewers", type=int, help=f"how many viewers (default {VIEWERS})")
    parser.add_argument("--rate", type=int, help=f"changes a second (default {RATE})")


def main(
    *, as_json: bool, quick: bool, runs: int | None, viewers: int | None, rate: int | None
) -> None:
    number = runs or (QUICK_RUNS if quick else RUNS)
    watching = viewers or (QUICK_VIEWERS if quick else VIEWERS)
    pace = rate or (QUICK_RATE if quick else RATE)
    seconds = QUICK_SECONDS if quick else SECONDS
    with (
        tempfile.TemporaryDirectory(prefix="caxev-web-") as root,
        Cluster(Path(root) / "mongod") as mongod,
        MongoClient[dict[str, Any]](mongod.uri) as client,
    ):
        collection = client.run.runs_new
        fill(collection, number)
        began = time.monotonic()
        with serving(Path(root), mongod.uri, "run", sites=sites_file(Path(root))) as page:
            page.ready(PASS)
            figures = {"runs": number, "sites": SITES, "ready_s": time.monotonic() - began}
            figures |= {"ready_cpu_s": used(page), "ready_mb": memory(page)}
            figures |= first_answers(page)
            figures |= watched(page, collection, watching, pace, int(pace * seconds))
    figures = {name: round(value, 3) for name, value in figures.items()}
    table = Table("figure", "value", title="caxev web")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    Console(stderr=as_json).print(table)
    if as_json:
        print(json.dumps(figures))


def sites_file(directory: Path) -> Path:
    """A sites.json of as many sites."""
    file = directory / "sites.json"
    file.write_text(
        json.dumps([{"name": f"site{n}", "hostname": "localhost"} for n in range(SITES)])
    )
    return file


def fill(collection: Any, number: int) -> None:
    """Add so many runs, each with copies at four sites."""
    now = datetime.now(UTC)
    for start in range(0, number, BATCH):
        collection.insert_many(
            [document(n, now) for n in range(start + 1, min(start + BATCH, number) + 1)],
            ordered=False,
        )


def document(n: int, now: datetime) -> dict[str, Any]:
    entry = {"type": "raw", "status": "transferred", "status_since": now, "source": f"site{n % 7}"}
    return {
        "_id": ObjectId(),
        "number": n,
        "name": f"run_{n}",
        "detector": "tpc",
        "start": now,
        "raw_size_byte": 10**9,
        "tags": [],
        "data": [{**entry, "host": f"site{(n * k) % SITES}"} for k in (1, 3, 7, 11)],
    }


def first_answers(page: Page) -> dict[str, float]:
    """How long pages take, in milliseconds, and the memory of the process."""
    figures: dict[str, float] = {}
    names = ("runs", "failures", "links", "storage", "sites", "requests")
    for name, path in (("now", "/"), *((name, f"/{name}") for name in names)):
        times = []
        for _ in range(LOADS):
            began = time.monotonic()
            assert page.get(path).status == 200
            times.append(1000 * (time.monotonic() - began))
        figures |= {f"{name}_ms_p50": statistics.median(times), f"{name}_ms_max": max(times)}
    counted = page.until(lambda: "were counted" in page.get("/storage").text, PASS)
    assert counted
    return {**figures, "memory_mb": memory(page)}


def memory(page: Page) -> float:
    # The first process only watches over the one that serves.
    process = psutil.Process(page.process.pid)
    family = [process, *process.children(recursive=True)]
    return max(one.memory_info().rss for one in family) / 1e6


@define
class Viewers:
    """Open connections that are read until told to stop; the first few are timed."""

    page: Page
    number: int
    written: dict[str, float] = field(factory=dict)
    seen: list[float] = field(factory=list)
    alive: int = 0
    _stop: Event = field(factory=Event)

    def read(self) -> None:
        """Read until asked to stop."""
        host, port = self.page.address.removeprefix("http://").split(":")
        with selectors.DefaultSelector() as selector:
            for n in range(self.number):
                one = socket.create_connection((host, int(port)))
                one.sendall(f"GET /events?view=runs HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                selector.register(one, selectors.EVENT_READ, n < TIMED)
            while not self._stop.is_set():
                for key, _ in selector.select(0.2):
                    assert isinstance(key.fileobj, socket.socket)
                    data = key.fileobj.recv(1 << 20)
                    if not data:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                    elif key.data:
                        self._note(data)
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
                self.alive += 1

    def _note(self, data: bytes) -> None:
        now, text = time.monotonic(), data.decode(errors="replace")
        for piece in text.split('"id":"')[1:]:
            at = self.written.get(piece.partition('"')[0])
            if at is not None:
                self.seen.append(now - at)

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = Thread(target=self.read)
        thread.start()
        try:
            self.page.until(
                lambda: f"caxev_web_viewers {self.number}.0" in self.page.get("/metrics").text
            )
            yield
        finally:
            self._stop.set()
            thread.join()


def watched(page: Page, collection: Any, number: int, rate: int, changes: int) -> dict[str, float]:
    """How soon viewers see a change, in milliseconds, and what it costs."""
    ids = [one["_id"] for one in collection.find({}, {"_id": 1}).limit(changes)]
    shown = [one["_id"] for one in collection.find({}, {"_id": 1}).sort("_id", -1).limit(SHOWN)]
    # Spread among the others, those that the Chromium shows.
    for place, one in enumerate(shown):
        ids[(place * len(ids)) // len(shown)] = one
    viewers = Viewers(page, number)
    with viewers.watching(), chromium(page) as rows:
        cpu, began = used(page), time.monotonic()
        change(collection, ids, rate, viewers.written)
        took, spent = time.monotonic() - began, used(page) - cpu
        page.until(lambda: len(viewers.seen) >= 0.9 * TIMED * len(ids))
        in_chromium = page.until(lambda: rows(viewers.written, 0.9 * len(shown)))
        time.sleep(1.0)
        before = queries(collection)
        time.sleep(IDLE)
        idle = queries(collection) - before
        figures = {"memory_watched_mb": memory(page)}
    cuts, cells = (statistics.quantiles(one, n=100) for one in (viewers.seen, in_chromium))
    return {
        "viewers": number,
        "viewers_kept": viewers.alive,
        "changes_per_s": len(ids) / took,
        "seen_ms_p50": 1000 * cuts[49],
        "seen_ms_p95": 1000 * cuts[94],
        "seen_ms_max": 1000 * max(viewers.seen),
        "chromium_cells": len(in_chromium),
        "chromium_ms_p50": 1000 * cells[49],
        "chromium_ms_p95": 1000 * cells[94],
        "chromium_ms_max": 1000 * max(in_chromium),
        "cpu_of_one_core": spent / took,
        **figures,
        "queries_while_idle": idle,
    }


@contextmanager
def chromium(page: Page) -> Iterator[Callable[[Mapping[str, float], float], list[float] | None]]:
    """A Chromium that shows the newest runs.

    Returns a function that returns how many seconds passed from each write to the row in the
    document, by when they were written; None before so many rows have changed.
    """
    with browser() as running:
        shown = visit(running, f"{page.address}/runs", [])
        shown.wait_for_selector('#live[data-state="on"]')
        shown.evaluate(OBSERVE)

        def seen(written: Mapping[str, float], least: float) -> list[float] | None:
            # Both clocks are this machine's; `written` has the monotonic one.
            ahead = time.time() - time.monotonic()
            rows: dict[str, float] = shown.evaluate("window.seen")
            found = [at / 1000 - ahead - written[row] for row, at in rows.items() if row in written]
            return found if len(found) >= least else None

        yield seen


def change(collection: Any, ids: Sequence[ObjectId], rate: int, written: dict[str, float]) -> None:
    """Change runs at a rate, each once."""
    began = time.monotonic()
    for n, one in enumerate(ids):
        time.sleep(max(began + n / rate - time.monotonic(), 0.0))
        written[row_id(one)] = time.monotonic()
        collection.update_one({"_id": one}, {"$set": {"data.0.status": "error"}})


def queries(collection: Any) -> int:
    """How many queries the runs collection has been asked, by the database's own counters."""
    totals = collection.database.client.admin.command("top")["totals"]
    found: int = totals[collection.full_name]["queries"]["count"]
    return found


def used(page: Page) -> float:
    """Seconds of the processor that the page has used."""
    process = psutil.Process(page.process.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)
