"""The page as a process of its own, and what tests ask it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPRedirectHandler, Request, build_opener

from attrs import define, field

from caxev.testing.mongod import start_with_us

PATIENCE: Final = 240.0
SITES: Final = Path(__file__).parents[1] / "sites.json"


class Answer(NamedTuple):
    """What the page answered."""

    status: int
    headers: Message
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class _Here(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


@define(eq=False)
class Page:
    """A running ``caxev web``, at `address`; `link` is what it has printed."""

    link: str
    process: subprocess.Popen[bytes]
    log: Path
    events: list[socket.socket] = field(init=False, factory=list)

    @property
    def address(self) -> str:
        return self.link.partition("/login")[0]

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        return self._ask(Request(self.address + path, method=method), headers)

    def post(self, path: str, fields: Any, **headers: str) -> Answer:
        """Send a form, as a page of this address does."""
        body = urlencode(fields, doseq=True).encode()
        sent = Request(self.address + path, body, method="POST")
        return self._ask(sent, {"origin": self.address, **headers})

    def _ask(self, request: Request, headers: Mapping[str, str]) -> Answer:
        """Ask as a browser that follows nothing."""
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with build_opener(_Here).open(request, timeout=PATIENCE) as answer:
                return Answer(answer.status, answer.headers, answer.read().decode())
        except HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read().decode())

    def json(self, path: str) -> Any:
        return self.get(path).json

    def until(self, condition: Callable[[], Any], within: float = PATIENCE) -> Any:
        """Wait for a condition to hold; return what it returned."""
        deadline = time.monotonic() + within
        while not (found := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return found

    def ready(self, within: float = PATIENCE) -> None:
        """Wait until all runs have been read."""
        self.until(lambda: self.get("/healthz").status == 200, within)

    def watch(
        self, view: str = "", last: str | None = None, *, address: str = ""
    ) -> Iterator[tuple[str, Any]]:
        """Follow a view, or an address: the kinds of the events, and their data."""
        host, port = self.address.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
        self.events.append(connection)
        known = f"Last-Event-ID: {last}\r\n" if last else ""
        path = address or f"/events?view={view}"
        ask = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{known}\r\n"
        connection.sendall(ask.encode())
        return _events(connection)

    def leave(self) -> None:
        """Follow nothing more."""
        while self.events:
            with self.events.pop() as connection, suppress(OSError):  # it was closed there
                connection.shutdown(socket.SHUT_RDWR)


def _events(connection: socket.socket) -> Iterator[tuple[str, Any]]:
    kind, number = "", ""
    with connection.makefile("rb") as lines:
        for raw in lines:
            line = raw.decode().rstrip("\r\n")
            if line.startswith("id: "):
                number = line[4:]
            elif line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: ") and kind != "alive":
                yield kind, {**_named(json.loads(line[6:])), "id": number}


def _named(data: Any) -> dict[str, Any]:
    return data if isinstance(data, dict) else {"rows": data}


@contextmanager
def serving(
    directory: Path,
    uri: str,
    database: str,
    *options: str,
    sites: Path = SITES,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Page]:
    """The page of a database, at a free port of loopback."""
    log = directory / "page.log"
    command = [sys.executable, "-m", "caxev", "web", "--port", "0", *options]
    command += ["--mongo-uri", uri, "--database", database, "--config", str(sites)]
    with log.open("wb") as stderr:
        process = start_with_us(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})},
        )  # fmt: skip
    assert process.stdout is not None
    try:
        found = re.search(r"https?://\S+", process.stdout.readline().decode())
        assert found, log.read_text()
        page = Page(found[0], process, log)
        yield page
        page.leave()
    finally:
        process.terminate()
        status = process.wait(PATIENCE)
        process.stdout.close()
    assert status in (0, -15), log.read_text()


def hostile_names() -> Sequence[str]:
    """Names that try to be something else: markup, paths, directions, and too much of it."""
    script = "<script>document.title='owned'</script>"
    return (
        script, "<img src=x onerror=document.title='owned'>", '"><svg onload=alert(1)>',
        "' onmouseover='alert(1)", "</textarea>" + script, "</title>" + script, "--><b>", "]]>",
        "{{ 7 * 7 }}", "{% raw %}", "${7*7}", "javascript:alert(1)", "data:text/html,<b>x",
        "&lt;b&gt;", "&#60;b&#62;", "&amp;amp;", "%3Cscript%3E", "\\u003cscript\\u003e",
        "../../etc/passwd", "..%2f..", "a/b?c=d&e#f", "/runs/../sites", "?view=now", "#", ".", "..",
        "a\nb\r\nSet-Cookie: x=1", "a\0b", "\x1b[31mred\x1b[0m", "\x07\x08\x7f", "\t \u00a0\u2003",
        "\u202eexe.txt", "\u2066left\u2069", "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
        "e\u0301\u0302\u0303" * 40, "\ud7ff\ufffe\uffff", "\U0001f986" * 30, "\ufeffbom",
        "x" * 10_000, "<" * 3_000,
    )  # fmt: skip
