"""Who gets in to the page: by a proxy, by a simulated OpenID provider, and who does not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from html import unescape
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

import pytest
import trio
from attrs import define, field
from joserfc.jwk import RSAKey
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from trio.testing import MockClock

from caxev.cli.options import requester
from caxev.core.selection import EVERY
from caxev.web.auth.forms import PublicAddress, read_form
from caxev.web.auth.gate import Gate
from caxev.web.auth.oidc import BELIEVED, OidcLogin
from caxev.web.auth.options import OidcOptions
from caxev.web.auth.people import Membership, Person, PersonRole
from caxev.web.auth.sessions import LoginSession, Sessions, SignedCookie
from caxev.web.export import MOST_EXPORTS, RunsExport
from caxev.web.hub import Hub
from caxev.web.stream import ADMITTED, EventStream
from tests.mongod import Cluster
from tests.oidc import CLIENT, SECRET, OidcSimulator, provider
from tests.page import Answer, Page, serving
from tests.test_cli import Caxev, caxev

__all__ = ["caxev"]

# On one worker, since all of them share two pages.
pytestmark = [pytest.mark.replicaset, pytest.mark.xdist_group("web-login")]
PROXY = ("--auth", "proxy", "--user-header", "X-User", "--groups-header", "X-Groups")
GROUPS = ("--operator", "--operator-group", "xenon/operators", "--reader-group", "xenon")
EMPTY = "page_of_nothing"
"""A database without runs: who gets in does not depend on them."""
PATHS = ("/", "/runs", "/failures", "/api/v1/now", "/events?view=now", "/metrics", "/no")


@define
class Visitor:
    """A browser as far as cookies go: it keeps them, and sends strict ones only from our pages."""

    page: Page
    cookies: dict[str, Any] = field(factory=dict)

    def get(self, path: str, *, elsewhere: bool = False, **headers: Any) -> Answer:
        site = "cross-site" if elsewhere else "same-origin"
        sent = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", **headers}
        return self._kept(self.page.get(path, **self._with_cookies(sent, elsewhere=elsewhere)))

    def post(self, path: str, fields: Any, **headers: str) -> Answer:
        return self._kept(self.page.post(path, fields, **self._with_cookies(headers)))

    def _with_cookies(self, headers: dict[str, str], *, elsewhere: bool = False) -> dict[str, str]:
        sent = [
            f"{name}={one.value}"
            for name, one in self.cookies.items()
            if not (elsewhere and one["samesite"].lower() == "strict")
        ]
        return {**headers, **({"cookie": "; ".join(sent)} if sent else {})}

    def _kept(self, answer: Answer) -> Answer:
        for text in answer.headers.get_all("set-cookie", []):
            for name, one in SimpleCookie(text).items():
                self.cookies[name] = one
                if one["max-age"] == "0":
                    del self.cookies[name]
        return answer


@pytest.fixture(scope="module")
def proxied(mongod: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page behind a proxy on this machine."""
    trusted = (*PROXY, *GROUPS, "--trust", "127.0.0.1/32")
    directory = tmp_path_factory.mktemp("proxied")
    environ = {
        "CAXEV_MONGO_OPERATOR_URI": mongod.uri,
        "CAXEV_METRICS_TOKEN_FILE": str(directory / "token"),
    }
    with serving(directory, mongod.uri, EMPTY, *trusted, environ=environ) as page:
        yield page


def test_a_proxy_names_people(proxied: Page) -> None:
    """Groups give the role; who is in none, and who is not named, does not get in."""
    for path in PATHS:
        assert proxied.get(path).status == 401, path
        assert proxied.get(path, x_user="eve", x_groups="other").status == 403, path
    reader = proxied.get("/", x_user="anna", x_groups="all, xenon")
    assert (reader.status, "anna, reader" in reader.text) == (200, True)
    operator = proxied.get("/", x_user="zo\xc3\xab", x_groups="xenon/operators")
    assert "zo\xeb, operator" in operator.text
    for name in ("", "x" * 201, "a\x1bb"):
        assert proxied.get("/", x_user=name, x_groups="xenon").status in (401, 403), name
    assert proxied.get("/healthz").status in (200, 503)
    assert proxied.get("/static/page.css").status == 200


def test_nobody_else_names_people(mongod: Cluster, tmp_path: Path) -> None:
    """Headers from another address than the proxy's are refused."""
    options = (*PROXY, "--trust", "127.0.0.2", "--trust", "::1", *GROUPS)
    environ = {"CAXEV_MONGO_OPERATOR_URI": mongod.uri}
    with serving(tmp_path, mongod.uri, EMPTY, *options, environ=environ) as page:
        for path in PATHS:
            answer = page.get(
                path, x_user="anna", x_groups="xenon/operators", x_forwarded_for="127.0.0.2"
            )
            assert (answer.status, "anna" in answer.text) == (403, False), path


def test_who_is_not_let_in_sees_nothing_of_the_page(proxied: Page) -> None:
    """What is wrong with an address that needs no log-in is no page with the database's."""
    for path in ("/static/no", "/static/no/no", "/login", "/login/callback"):
        answer = proxied.get(path)
        assert (answer.status, "mongodb" in answer.text) == (404, False), path
    assert "mongodb" in proxied.get("/no", x_user="anna", x_groups="xenon").text


def test_metrics_need_a_log_in_while_their_secret_cannot_be_read(proxied: Page) -> None:
    """Its file is missing, as while it is renewed."""
    assert proxied.get("/metrics", authorization="Bearer x").status == 401
    assert proxied.get("/metrics", x_user="anna", x_groups="xenon").status == 200
    token = proxied.log.with_name("token")
    token.write_text("x")
    try:
        assert proxied.get("/metrics", authorization="Bearer x").status == 200
    finally:
        token.unlink()


def test_a_session_is_bound_to_who_the_proxy_names(proxied: Page) -> None:
    """A session's cookie gives nobody another name or role; it is strict and for our eyes only."""
    anna = Visitor(proxied)
    anna.get("/", x_user="anna", x_groups="xenon/operators")
    (cookie,) = anna.cookies.values()
    assert cookie["httponly"]
    assert (cookie["samesite"].lower(), cookie["path"]) == ("strict", "/")
    assert "set-cookie" not in anna.get("/", x_user="anna", x_groups="xenon/operators").headers
    later = anna.get("/", x_user="bert", x_groups="xenon")
    assert "bert, reader" in later.text
    assert anna.get("/").status == 401


def test_a_link_elsewhere_keeps_the_session(proxied: Page) -> None:
    """A strict cookie does not come with another site's link: the page asks once more by itself."""
    anna = Visitor(proxied)
    headers: dict[str, Any] = {"x_user": "anna", "x_groups": "xenon"}
    anna.get("/", **headers)
    before = dict(anna.cookies)
    answer = anna.get("/runs?tag=%22%3Cb", elsewhere=True, **headers)
    assert 'content="0; url=/runs?tag=%22%3Cb"' in answer.text
    assert anna.cookies == before
    away = anna.get("//evil.example/", elsewhere=True, **headers)
    assert "evil" not in away.text


def test_what_does_not_go_together_is_refused(caxev: Caxev) -> None:
    """One line, and the status of a wrong command line."""
    for given, word in (
        (["--auth", "proxy"], "--trust"),
        (["--auth", "proxy", "--trust", "x", "--user-header", "X"], "no address"),
        (["--auth", "proxy", "--trust", "::1", "--user-header", "X", "--operator-group", "o"],
         "--groups-header"),
        (["--trust", "127.0.0.1"], "--trust needs --auth=proxy"),
        (["--auth", "oidc", "--issuer", "https://iam.example.org"], "--client-id"),
        (["--address", "caxev.example.org"], "https://"),
        (["--address", "https://[caxev"], "https://"),
        (["--operator"], "--operator-group"),
        (["--auth", "link"], "--operator"),
        (["--auth", "link", "--operator", "--host", "0.0.0.0"], "loopback"),
        (["--auth", "link", "--operator", "--operator-group", "o"], "--auth=proxy or --auth=oidc"),
    ):  # fmt: skip
        answer = caxev("web", *given, "--mongo-uri", "mongodb://x")
        assert (answer.code, word in answer.err) == (2, True), (given, answer)


def test_who_has_the_link_acts(mongod: Cluster, tmp_path: Path) -> None:
    """The one who started it, in their name; everybody else reads, and no other link is of use."""
    environ = {"CAXEV_MONGO_OPERATOR_URI": mongod.uri}
    options = ("--auth", "link", "--operator")
    with serving(tmp_path, mongod.uri, EMPTY, *options, environ=environ) as page:
        key = page.link.rpartition("=")[2]
        anybody, me = Visitor(page), Visitor(page)
        for wrong in ("", "?key=", f"?key={key[:-1]}", "?key=%ff", f"?KEY={key}"):
            assert anybody.get(f"/login{wrong}").status == 403, wrong
        assert (anybody.get("/").status, anybody.cookies) == (200, {})
        assert "read only" in anybody.get("/").text
        assert anybody.get("/acts/tag?run=1&word=x").status == 403
        assert 'content="0; url=/"' in me.get(page.link.removeprefix(page.address)).text
        (cookie,) = me.cookies.values()
        assert (cookie["samesite"].lower(), cookie["httponly"]) == ("strict", True)
        assert f"{requester()}, operator" in unescape(me.get("/").text)
        assert me.get("/acts/tag?word=x").status == 200
        forged = {"word": "x", "token": "x"}
        assert me.post("/acts/tag", forged).status == 403
        assert key not in page.log.read_text()


# -- OpenID Connect -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator() -> Iterator[OidcSimulator]:
    with provider() as made:
        yield made


@pytest.fixture
def idp(simulator: OidcSimulator) -> OidcSimulator:
    """The provider, honest, and with anna before it."""
    simulator.user = {"sub": "u1", "preferred_username": "anna", "groups": ["xenon"]}
    simulator.lies = {}
    simulator.secret = SECRET
    return simulator


@pytest.fixture(scope="module")
def served(
    simulator: OidcSimulator, mongod: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """The page whose people log in at the simulator."""
    directory = tmp_path_factory.mktemp("oidc")
    (directory / "caxev_oidc_client_secret").write_text(f"{SECRET}\n")
    options = ("--auth", "oidc", "--issuer", simulator.issuer, "--client-id", CLIENT, *GROUPS)
    environ = {"CREDENTIALS_DIRECTORY": str(directory), "CAXEV_MONGO_OPERATOR_URI": mongod.uri}
    with serving(directory, mongod.uri, EMPTY, *options, environ=environ) as made:
        yield made
    assert "Traceback" not in made.log.read_text()


@pytest.fixture
def page(served: Page, idp: OidcSimulator) -> Page:
    del idp
    return served


def log_in(visitor: Visitor, path: str = "/") -> Answer:
    """Follow the links and redirects of a log-in; return what the provider's way back leads to."""
    begun = visitor.get(f"/login?next={quote(path)}")
    assert begun.status == 302
    return visitor.get(way_back(begun, visitor.page), elsewhere=True)


def way_back(begun: Answer, page: Page) -> str:
    with_code = sent_to(begun.headers["location"])
    assert with_code.startswith(f"{page.address}/login/callback?")
    parts = urlsplit(with_code)
    return f"{parts.path}?{parts.query}"


def sent_to(address: str) -> str:
    """Ask the provider; return where it sends the browser."""
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(address))
    at = Page(origin, None, Path())  # type: ignore[arg-type]
    return str(at.get(address.removeprefix(origin)).headers["location"])


def test_people_log_in_at_a_provider(page: Page) -> None:
    """From the page that was wanted, to the provider, and back; then the session counts."""
    visitor = Visitor(page)
    for path in PATHS:
        assert visitor.get(path).status == 401, path
    door = visitor.get("/runs?tag=x&run=3").text
    (link,) = re.findall(r'href="(/login[^"]*)"', door)
    begun = visitor.get(unescape(link))
    assert visitor.cookies["caxev_login"]["samesite"].lower() == "lax"
    back = visitor.get(way_back(begun, page), elsewhere=True)
    assert 'content="0; url=/runs?tag=x&amp;run=3"' in back.text
    assert [*visitor.cookies] == ["caxev_session"]
    assert visitor.cookies["caxev_session"]["samesite"].lower() == "strict"
    assert "anna, reader" in visitor.get("/runs").text
    # Its link elsewhere: known again as soon as a page of ours asks.
    assert "anna" not in visitor.get("/", elsewhere=True).text
    assert visitor.get("/login?next=/runs").headers["location"] == "/runs"


def test_claims_give_the_role(page: Page, idp: OidcSimulator) -> None:
    """Groups of the ID token or of the userinfo; a name that is missing is the subject's."""
    visitor = Visitor(page)
    idp.user = {"sub": "u7", "groups": ["xenon/operators"]}
    log_in(visitor)
    assert "u7, operator" in visitor.get("/").text
    idp.user, idp.lies = {"sub": "u8"}, {"userinfo": {"groups": "xenon"}}
    log_in(other := Visitor(page))
    assert "u8, reader" in other.get("/").text
    for groups in ([], ["xenon/operators/x"], {"xenon": 1}, [["xenon"]], None):
        idp.lies = {"userinfo": {"groups": groups}}
        assert log_in(nobody := Visitor(page)).status == 403, groups
        assert nobody.get("/").status == 401


def test_a_renewed_secret_counts_for_the_next_log_in(page: Page, idp: OidcSimulator) -> None:
    """Without a restart; while it cannot be read the former one is used."""
    file = page.log.with_name("caxev_oidc_client_secret")
    try:
        file.write_text("")
        assert log_in(Visitor(page)).status == 200
        idp.secret = "renewed"
        file.write_text(idp.secret)
        assert log_in(Visitor(page)).status == 200
    finally:
        file.write_text(SECRET)
    assert "is empty" in page.log.read_text()


def lies() -> Mapping[str, Mapping[str, Any]]:
    return {
        "another issuer": {"claims": {"iss": "http://127.0.0.1:1"}},
        "for another client": {"claims": {"aud": "other"}},
        "passed on to us": {"claims": {"aud": "other", "azp": CLIENT}},
        "another log-in": {"claims": {"nonce": "x"}},
        "too old": {"claims": {"exp": 1}},
        "another key": {"key": RSAKey.generate_key(2048, {"kid": "one"})},
        "a key of no secret": {"alg": "HS256"},
        "no signature": {"alg": "none"},
        "no token": {"no id_token": True},
        "two people": {"userinfo": {"sub": "u2"}},
        "a refusal": {"error": "access_denied"},
    }


def test_a_false_log_in_is_refused(page: Page, idp: OidcSimulator) -> None:
    """Whatever is wrong with the provider's answer, nobody gets in, and a page says so."""
    for name, lie in lies().items():
        idp.lies = dict(lie)
        visitor = Visitor(page)
        answer = log_in(visitor)
        assert (answer.status, visitor.get("/").status) in ((403, 401), (503, 401)), name
        assert "caxev_session" not in visitor.cookies, name
    idp.lies = {}
    log_in(visitor)
    assert visitor.get("/").status == 200


def test_a_code_is_used_by_who_asked_for_it(page: Page) -> None:
    """Another browser's way back, a second use, and a forged state are refused."""
    visitor, other = Visitor(page), Visitor(page)
    back = way_back(visitor.get("/login"), page)
    assert other.get(back, elsewhere=True).status == 403
    assert visitor.get(re.sub("state=[^&]*", "state=x", back), elsewhere=True).status == 403
    assert log_in(visitor).status == 200
    assert visitor.get(back, elsewhere=True).status == 403
    assert other.get("/").status == 401


def test_only_a_page_of_ours_is_gone_to(page: Page) -> None:
    """After the log-in no other site is opened."""
    for away in ("//evil.example", "https://evil.example", "/\\evil.example", "/\t/evil.example"):
        assert "evil" not in log_in(Visitor(page), away).text, away


def test_a_session_cannot_be_made_up(page: Page) -> None:
    """A cookie that is changed, or of another purpose, is none."""
    visitor = Visitor(page)
    visitor.get("/login")
    log_in(anna := Visitor(page))
    good = anna.cookies["caxev_session"].value
    for value in (visitor.cookies["caxev_login"].value, good[:-1], f"x{good}", "", "a.b.c", "=;"):
        assert page.get("/", cookie=f"caxev_session={value}").status == 401, value
    assert page.get("/", cookie=f"caxev_session={good}").status == 200


def test_people_log_out(page: Page) -> None:
    """By a form of the page alone; afterwards the browser has no session."""
    visitor = Visitor(page)
    log_in(visitor)
    (token,) = re.findall(r'name="token" value="([^"]+)"', visitor.get("/").text)
    for fields, headers in (
        ({}, {}),
        ({"token": "x"}, {}),
        ({"token": token}, {"origin": "https://evil.example"}),
        ({"token": token}, {"origin": "null"}),
        ({"token": token}, {"sec_fetch_site": "same-site"}),
    ):
        assert visitor.post("/login/out", fields, **headers).status == 403, (fields, headers)
    assert visitor.get("/login/out").status == 405
    assert visitor.get("/").status == 200
    kept = visitor.cookies["caxev_session"].value
    assert visitor.post("/login/out", {"token": token}).status == 200
    assert visitor.get("/").status == 401
    assert page.get("/", cookie=f"caxev_session={kept}").status == 401  # a copy of it, too


def test_a_provider_of_no_use(mongod: Cluster, idp: OidcSimulator, tmp_path: Path) -> None:
    """While it is away or calls itself something else the page says so, and then works."""
    options = ("--auth", "oidc", "--issuer", idp.issuer, "--client-id", CLIENT)
    with serving(tmp_path, mongod.uri, EMPTY, *options) as page:
        # A page that kept one of these answers would never get further.
        for lie in ({"issuer": "http://127.0.0.1:1"}, {"token_endpoint": None}, {"status": 500}):
            idp.lies = lie
            assert Visitor(page).get("/login").status == 503, lie
        idp.lies.clear()
        assert Visitor(page).get("/login").status == 302


# -- without a server -----------------------------------------------------------------------------


def connection(
    method: str = "POST", path: str = "/", query: str = "", /, **headers: str
) -> Request:
    """A request with these headers."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    address = {"path": path, "raw_path": path.encode(), "query_string": query.encode()}
    return Request({"type": "http", "method": method, "headers": raw, **address})


async def test_the_provider_is_asked_again() -> None:
    """Who logged in an hour ago goes there and back before the next page; nothing else is done."""
    sessions, address = Sessions.begin(secure=False), PublicAddress("http://127.0.0.1")
    options = OidcOptions("http://127.0.0.1:1", "caxev-page")
    way = OidcLogin(options, Membership(), sessions, address)
    gate = Gate(PlainTextResponse("in"), way, sessions)
    navigation = {"sec-fetch-mode": "navigate", "sec-fetch-site": "same-origin"}
    for age, method, path, headers, wanted in (
        (BELIEVED - 60, "GET", "/runs", navigation, (200, None)),
        (BELIEVED + 1, "GET", "/runs", navigation, (303, "/login?next=%2Fruns%3Frun%3D1")),
        (BELIEVED + 1, "POST", "/runs", navigation, (401, None)),
        (BELIEVED + 1, "POST", "/login/out", navigation, (200, None)),
        (BELIEVED + 1, "GET", "/runs", {"sec-fetch-mode": "cors"}, (401, None)),
    ):
        person = Person("anna", PersonRole.OPERATOR)
        answer = Response()
        sessions.write(answer, LoginSession(person, began=time.time() - age))
        cookie = answer.headers["set-cookie"].partition(";")[0]
        asked = connection(method, path, "run=1", cookie=cookie, **headers)
        assert await _answer(gate, asked) == wanted, (age, method, headers)
        log_in_ = await way.log_in(connection("GET", "/login", "", cookie=cookie))
        # The provider is away: it was asked for.
        assert log_in_.status_code == (303 if age < BELIEVED else 503)


async def _answer(app: Any, request: Request) -> tuple[int, str | None]:
    starts = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            starts.append(message)

    await app(request.scope, request.receive, send)
    found = [v.decode() for name, v in starts[0]["headers"] if name == b"location"]
    return starts[0]["status"], found[0] if found else None


def test_a_stream_ends_and_the_browser_asks_again() -> None:
    """Whoever may not see the page any more hears nothing of it after a while."""
    trio.run(_watch, clock=MockClock(autojump_threshold=0))


async def _watch() -> None:
    hub, sent = Hub(), []

    async def render() -> dict[str, str]:
        return {"now": "<p>"}

    async def send(message: Any) -> None:
        sent.append(message)

    stream = EventStream(hub, "now", render, None, ADMITTED)
    began = trio.current_time()
    await stream({}, trio.sleep_forever, send)
    assert trio.current_time() - began == ADMITTED
    assert (sent[-1].get("more_body", False), hub.viewers) == (False, 0)


def test_a_session_ends_by_itself() -> None:
    """A cookie is good for its time and no longer; under TLS no other host can have set it."""
    for seconds, wanted in ((60, "value"), (-1, None)):
        cookie, answer = SignedCookie("session", seconds, secure=True), Response()
        cookie.write(answer, "value")
        text = answer.headers["set-cookie"]
        assert "; Secure" in text
        assert text.startswith("__Host-caxev_session=")
        assert cookie.read(connection(cookie=text.partition(";")[0])) == wanted
        other = SignedCookie("session", seconds, secure=True)
        assert other.read(connection(cookie=text.partition(";")[0])) is None


@pytest.mark.parametrize(
    ("address", "host", "origin", "good"),
    [
        (PublicAddress(), "127.0.0.1:8765", "http://127.0.0.1:8765", True),
        (PublicAddress(), "127.0.0.1:8765", "https://127.0.0.1:8765", False),
        (PublicAddress(), "127.0.0.1:8765", "http://127.0.0.1:8766", False),
        (PublicAddress(tls=True), "a.example", "https://a.example", True),
        (PublicAddress("https://a.example"), "127.0.0.1:8765", "https://a.example", True),
        (PublicAddress("https://a.example"), "a.example", "http://a.example", False),
        (PublicAddress("https://a.example"), "a.example", "https://a.example.evil.example", False),
        (PublicAddress("https://a.example"), "a.example", "null", False),
    ],
)
def test_a_form_comes_from_the_page_s_own_address(
    address: PublicAddress, host: str, origin: str, good: bool
) -> None:
    """Scheme, name and port, as browsers name them; behind a proxy by --address."""
    with pytest.raises(HTTPException) as refused:
        trio.run(read_form, connection(host=host, origin=origin), address)
    # The next reason is that nobody is logged in.
    assert ("Nothing can be changed" in refused.value.detail) is good


def test_few_lists_are_sent_at_once() -> None:
    """One more is refused, until a browser that takes nothing for long has lost its place."""
    trio.run(_export, clock=MockClock(autojump_threshold=0))


async def _export() -> None:
    limit, sent = trio.CapacityLimiter(MOST_EXPORTS), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("more_body"):
            await trio.sleep_forever()

    one = RunsExport(cast("Any", None), EVERY, limit)
    async with trio.open_nursery() as nursery:
        for _ in range(MOST_EXPORTS):
            nursery.start_soon(one, {}, trio.sleep_forever, send)
        while len(sent) < 2 * MOST_EXPORTS:
            await trio.lowlevel.checkpoint()
        await one({"type": "http"}, trio.sleep_forever, send)
        assert sent[-2]["status"] == 503
    assert limit.available_tokens == MOST_EXPORTS
