"""The page in a real browser: how it looks, follows, and can be used by everybody."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo import MongoClient

from caxev.core.alarms import Alarm, AlarmState
from caxev.core.transcript import packed
from caxev.database.alarms import alarm_id, alarm_row
from tests.browser import browser as launched
from tests.browser import visit
from tests.conftest import Database as Named
from tests.engine import run_document
from tests.page import Page, hostile_names, serving
from tests.test_web import failed

pytestmark = [pytest.mark.replicaset, pytest.mark.browser]
Server = Any
WIDTHS = (360, 800, 1600)
COLOURS = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}
"""The rules of axe-core that a dark scheme may break."""
STATUSES = ("transferred", "verifying", "transferring", "error")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.fixture
def server(database: Named) -> Iterator[Server]:
    """The database as an administrator reaches it."""
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        yield client[database.name]


@pytest.fixture
def page(server: Server, database: Named, tmp_path: Path) -> Iterator[Page]:
    """The page of a small collaboration in which something is wrong."""
    now = datetime.now(UTC)
    for n in range(1, 9):
        copies = [("raw", "lngs", "transferred"), ("raw", "chicago", STATUSES[n % 4])]
        document = run_document(n, *copies, raw_size_byte=10**9)
        document["data"][1] |= {"source": "lngs", "status_since": now}
        server.runs_new.insert_one(document)
        if n < 4:
            note = f"no route to /data/{n} (errno 113)"
            server.caxev_ledger.insert_one(failed(document["_id"], note))
    server.caxev_ledger.insert_one(
        {"_id": "lngs", "kind": "site", "epoch": 1, "owner": "here:1",
         "expires": now + timedelta(hours=1), "streamed": now, "scanned": now,
         "disks": [{"root": "/data/lngs/raw", "free": 12 * 10**9, "size": 10**13}]}
    )  # fmt: skip
    text = packed("wide " * 200 + "\n<b>x")
    row = {"at": now, "site": "lngs", "what": "done", "run": document["_id"], "kept": [text]}
    server.caxev_history.insert_one({"_id": "a", **row, "kept_parts": 1})
    job = {"name": "n.1", "id": "4" * 60, "attempt": 1, "log": "/long" * 40, "submitted": now}
    server.runs_new.update_one({"_id": document["_id"]}, {"$push": {"data": {
        "type": "processed", "host": "lngs", "status": "transferring", "job": job,
    }}})  # fmt: skip
    for owner in ("here:1", "there:1:0123456789ab"):
        server.caxev_ledger.insert_one(
            {"_id": {"process": owner, "s": "lngs"}, "kind": "process", "site": "lngs",
             "owner": owner, "version": "0.1.0", "configuration": "0123456789ab",
             "handlers": "01234567", "keys": [["lngs.purge", "1"]], "seen": now}
        )  # fmt: skip
    state = AlarmState(Alarm("lngs", "disk", "the disk of /data/lngs/raw is full"), now)
    server.caxev_ledger.insert_one({"_id": alarm_id("lngs", "disk"), **alarm_row(state)})
    asked = {"site": "lngs", "kind": "retry", "handler": "pull", "by": "me@host", "at": now}
    server.caxev_requests.insert_one(asked)
    hold = {"by": "you@host", "why": "a talk", "at": now}
    server.runs_new.update_one({"number": 2}, {"$set": {"data.0.holds": [hold]}})
    with serving(tmp_path, database.uri, database.name) as made:
        made.ready()
        yield made


def paths(server: Server) -> list[str]:
    run = server.runs_new.find_one({"number": 3})["_id"]
    views = ["/", "/runs", "/links", "/failures", "/storage", "/alarms", "/sites", "/handlers"]
    views += ["/requests", "/holds", "/sites/lngs", "/sites/lngs/purge", "/failures?site=chicago"]
    last = server.runs_new.find_one({"number": 8})["_id"]
    more = [f"/runs/{run}", f"/runs/{last}", f"/output/{last}"]
    return [*views, *more, "/runs?run=x", "/no"]


def test_every_view_fits_and_is_accessible(page: Page, server: Server, browser: Any) -> None:
    """Nothing scrolls sideways, no error is in the console, and axe-core finds no serious fault."""
    from axe_playwright_python.sync_playwright import Axe

    axe, faults = Axe(), []
    for path in paths(server):
        errors: list[str] = []
        # axe-core is put in by the test, which the page's own policy forbids.
        shown = visit(browser, page.address + path, errors, color_scheme="light", bypass_csp=True)
        for width in WIDTHS:
            shown.set_viewport_size({"width": width, "height": 900})
            wide = shown.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                faults.append(f"{path} is {wide} wide at {width}")
            # What is wrong at one width is mostly wrong at all: ask where most is different.
            if width != 800:
                faults += serious(axe.run(shown), f"{path} at {width}")
        shown.emulate_media(color_scheme="dark")
        faults += serious(axe.run(shown, options=COLOURS), f"{path} in the dark")
        faults += [f"{path}: {one}" for one in errors if "status of 40" not in one]
        shown.context.close()
    assert not faults, "\n".join(faults)


def serious(found: Any, where: str) -> list[str]:
    """What must not be, of what axe-core has found."""
    return [
        f"{where}: {one['id']}: {node['html']}"
        for one in found.response["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:2]
    ]


def test_a_change_is_seen_without_a_reload(page: Page, server: Server, browser: Any) -> None:
    """A row turns, a new run appears on top, and the first view's words follow."""
    errors: list[str] = []
    runs = visit(browser, f"{page.address}/runs", errors)
    now = visit(browser, page.address, errors)
    runs.wait_for_selector('#live[data-state="on"]')
    server.runs_new.update_one({"number": 3}, {"$set": {"data.1.status": "transferred"}})
    runs.wait_for_selector('tr:has-text("161111_0003") td[data-site="chicago"] .good')
    server.runs_new.insert_one(run_document(99, ("raw", "lngs", "verifying")))
    runs.wait_for_selector('tbody tr:first-child:has-text("161111_0099")')
    now.wait_for_selector("text=9 >> visible=true")
    server.caxev_ledger.update_one({"_id": "lngs"}, {"$set": {"expires": datetime.now(UTC)}})
    now.wait_for_selector("tr.bad:has-text('lngs'):has-text('no listener')")
    assert "Somebody has to act" in now.inner_text("#summary")
    assert errors == []


def test_what_is_opened_stays_open(page: Page, server: Server, browser: Any) -> None:
    """A change of the page closes nothing that a reader has opened."""
    errors: list[str] = []
    shown = visit(browser, f"{page.address}/failures", errors)
    shown.wait_for_selector('#live[data-state="on"]')
    shown.click("summary")
    run = server.runs_new.find_one({"number": 5})["_id"]
    server.caxev_ledger.insert_one(failed(run, "no route to /data/5 (errno 113)"))
    shown.wait_for_selector("tr:has-text('run 5')")
    assert shown.is_visible("tr:has-text('run 5')")
    assert errors == []


def test_a_reader_is_not_disturbed(page: Page, server: Server, browser: Any) -> None:
    """A change moves no focus; what was typed is there when the reader comes back to the page."""
    errors: list[str] = []
    shown = visit(browser, page.address, errors)
    shown.wait_for_selector('#live[data-state="on"]')
    link = shown.query_selector("#changes a")
    address = link.get_attribute("href")
    link.focus()
    server.runs_new.update_one({"number": 2}, {"$set": {"data.1.status": "error"}})
    shown.wait_for_selector("#changes li:has-text('run 2') >> text=error")
    shown.wait_for_selector(f"#changes a:focus[href='{address}']")
    shown.goto(f"{page.address}/runs")
    shown.fill("input[name=run]", "2-3")
    shown.select_option("select[name=status]", "error")
    shown.focus("select[name=status]")
    shown.evaluate("reload()")
    shown.wait_for_selector("select[name=status]:focus")
    assert shown.input_value("input[name=run]") == "2-3"
    assert shown.input_value("select[name=status]") == "error"
    assert errors == []


def test_it_works_without_javascript(page: Page, server: Server, browser: Any) -> None:
    """Every view has its content, and the form finds runs."""
    errors: list[str] = []
    for path in paths(server):
        shown = visit(browser, page.address + path, errors, java_script_enabled=False)
        assert shown.inner_text("h1").strip(), path
        assert not shown.query_selector("meta[http-equiv=refresh]"), path  # nothing typed is lost
        shown.context.close()
    shown = visit(browser, f"{page.address}/runs", errors, java_script_enabled=False)
    shown.fill("input[name=run]", "2-3")
    shown.click("button")
    assert [row.inner_text().split()[0] for row in shown.query_selector_all("tbody th")] == [
        "3",
        "2",
    ]


def test_it_is_used_by_keyboard(page: Page, browser: Any) -> None:
    """The first stop skips to the content; links and fields are reached, and Enter follows them."""
    shown = visit(browser, page.address, [])
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "Skip to the content"
    for _ in range(3):
        shown.keyboard.press("Tab")
    shown.keyboard.press("Enter")
    shown.wait_for_url("**/runs")


def test_hostile_names_do_nothing(
    page: Page,
    server: Server,
    browser: Any,
    database: Named,
) -> None:
    """Names are shown as text, also where the script puts them in, and nothing in them is run."""
    errors: list[str] = []
    shown = visit(browser, f"{page.address}/runs", errors, viewport={"width": 360, "height": 800})
    shown.wait_for_selector('#live[data-state="on"]')
    names = hostile_names()
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name].runs_new.insert_many(
            {"_id": ObjectId(), "name": name, "tags": [{"name": name}],
             "data": [{"type": name, "host": "lngs", "status": name}]}
            for name in names
        )  # fmt: skip
    shown.wait_for_selector(f"tbody tr >> nth={len(names) - 1}")
    for path in ("/runs", "/"):
        shown.goto(page.address + path)
        assert shown.title() == ("Runs · caxev" if path == "/runs" else "Now · caxev")
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360
    assert errors == []
