"""Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    """Return the path of a Chromium that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A running browser. Skips the test if none is installed."""
    found = executable()
    if found is None:
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with pytest.MonkeyPatch.context() as patched:
        # Once a test has run a listener, asyncio's own maker makes loops that belong to trio.
        patched.setattr(asyncio, "new_event_loop", asyncio.SelectorEventLoop)
        with sync_playwright() as playwright:
            # Root, as in a container, has no sandbox.
            running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            try:
                yield running
            finally:
                running.close()


def visit(browser: Browser, address: str, errors: list[str], **context: Any) -> Any:
    """Open a page in a context of its own, and note what goes wrong there."""
    page = browser.new_context(**context).new_page()
    page.on("console", lambda one: errors.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda one: errors.extend(_failure(one)))
    page.goto(address)
    return page


def _failure(request: Any) -> Iterator[str]:
    # A browser that leaves a page gives up what it still reads there.
    if request.failure != "net::ERR_ABORTED":
        yield f"{request.url}: {request.failure}"
