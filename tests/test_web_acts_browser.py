"""Logging in and acting in a real browser: with a keyboard, on a small screen, without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import browser as launched
from tests.browser import visit
from tests.mongod import Cluster
from tests.oidc import CLIENT, SECRET, OidcSimulator, provider
from tests.page import Page, serving
from tests.test_web_acts import NAME, OPTIONS, grant
from tests.test_web_acts import server as server  # noqa: PLC0414  # a fixture
from tests.test_web_browser import COLOURS, serious

pytestmark = [pytest.mark.replicaset, pytest.mark.browser]
HEADERS = {"X-User": "anna", "X-Groups": "operators"}
SMALL = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


@pytest.fixture(scope="module")
def page(mongod: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    environ, directory = grant(mongod, NAME), tmp_path_factory.mktemp("acts")
    with serving(directory, mongod.uri, NAME, *OPTIONS, environ=environ) as made:
        made.ready()
        yield made


def test_an_act_by_keyboard_on_a_small_screen(page: Page, server: Any, browser: Any) -> None:
    """From the run's page to what came of it, without a pointer; nothing scrolls sideways."""
    errors: list[str] = []
    run = server.runs_new.find_one({"number": 1})["_id"]
    shown = visit(
        browser, f"{page.address}/runs/{run}", errors, viewport=SMALL, extra_http_headers=HEADERS
    )
    for wanted in ("Act", "Comment"):
        for _ in range(40):
            shown.keyboard.press("Tab")
            if shown.evaluate("document.activeElement.textContent") == wanted:
                break
        shown.keyboard.press("Enter")
    shown.wait_for_url("**/acts/comment?**")
    shown.focus("input[name=text]")
    shown.keyboard.type("the gate was open; <b>")
    shown.keyboard.press("Enter")
    shown.wait_for_selector("#h-plan")
    assert shown.evaluate("document.documentElement.scrollWidth") <= SMALL["width"]
    assert "'the gate was open; <b>'" in shown.inner_text(".command code")
    shown.focus("form[method=post] button")
    shown.keyboard.press("Enter")
    shown.wait_for_selector("text=added")
    assert shown.evaluate("document.documentElement.scrollWidth") <= SMALL["width"]
    (comment,) = server.runs_new.find_one({"number": 1})["comments"]
    assert (comment["text"], comment["user"]) == ("the gate was open; <b>", "anna")
    assert errors == []


def test_acts_fit_and_are_accessible(page: Page, server: Any, browser: Any) -> None:
    """Nothing scrolls sideways, and axe-core finds no serious fault: a form, and plans."""
    from axe_playwright_python.sync_playwright import Axe

    del server
    more = {"color_scheme": "light", "bypass_csp": True, "extra_http_headers": HEADERS}
    shown = visit(browser, page.address, [], **more)
    long = "x" * 300
    for path in (
        "copy?run=1-3", "tag?run=1-3&word=good", f"comment?run=1-3&text={long}",
        "rm?run=1-3&site=lngs&why=x", "release?run=1&site=lngs&all=yes",
    ):  # fmt: skip
        shown.goto(f"{page.address}/acts/{path}")
        for width in (360, 800, 1600):
            shown.set_viewport_size({"width": width, "height": 900})
            assert shown.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
        assert serious(Axe().run(shown), path) == []
        shown.emulate_media(color_scheme="dark")
        assert serious(Axe().run(shown, options=COLOURS), path) == []
        shown.emulate_media(color_scheme="light")
    shown.context.close()


def test_an_act_without_scripts(page: Page, server: Any, browser: Any) -> None:
    """From a filter of the runs, with plain forms."""
    shown = visit(
        browser,
        f"{page.address}/runs?run=1-2&status=transferred",
        [],
        java_script_enabled=False,
        extra_http_headers=HEADERS,
    )
    shown.click(".acts summary")
    shown.click(".acts >> text=Delete")
    shown.select_option("select[name=site]", "lngs")
    shown.fill("input[name=why]", "too much")
    shown.click("text=Show the plan")
    assert "by hand: caxev rm --run=1-2" in shown.inner_text(".command")
    shown.context.close()


def test_who_is_no_operator_sees_no_act(page: Page, server: Any, browser: Any) -> None:
    """The links are there for operators alone."""
    run = server.runs_new.find_one({"number": 1})["_id"]
    reader = {**HEADERS, "X-Groups": "others"}
    for headers, wanted in ((HEADERS, True), (reader, False)):
        shown = visit(browser, f"{page.address}/runs/{run}", [], extra_http_headers=headers)
        assert shown.is_visible(".acts") is wanted
        shown.context.close()


@pytest.fixture
def idp() -> Iterator[OidcSimulator]:
    with provider() as made:
        # Another site than the page's, to a browser: 127.0.0.1 is not localhost.
        made.issuer = made.issuer.replace("127.0.0.1", "localhost")
        made.user |= {"groups": ["operators"]}
        yield made


def test_a_log_in_crosses_sites(
    mongod: Cluster, idp: OidcSimulator, browser: Any, tmp_path: Any
) -> None:
    """The browser sends the strict cookie after the way back, and after another site's link."""
    errors: list[str] = []
    options = ("--auth", "oidc", "--issuer", idp.issuer, "--client-id", CLIENT)
    environ = {"CAXEV_OIDC_CLIENT_SECRET": SECRET}
    with serving(tmp_path, mongod.uri, NAME, *options, environ=environ) as page:
        page.ready()
        shown = visit(browser, f"{page.address}/runs?run=1", errors)
        shown.click("text=Log in")
        shown.wait_for_url("**/runs?run=1")
        assert "anna, reader" in shown.inner_text("footer")
        link = f'<a href="{page.address}/failures">there</a>'
        shown.route("http://elsewhere.example/", lambda one: one.fulfill(
            body=link, content_type="text/html"
        ))  # fmt: skip
        shown.goto("http://elsewhere.example/")
        shown.click("a")
        shown.wait_for_selector("footer >> text=anna, reader")
        shown.click("text=Log out")
        shown.wait_for_selector("text=You are logged out.")
        shown.goto(page.address)
        shown.wait_for_selector("text=You are not logged in.")
        shown.context.close()
    assert [one for one in errors if "401" not in one] == []
