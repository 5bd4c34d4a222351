"""Alarms: what is told to whom and when; on real servers: that it arrives, and is never lost."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define, evolve
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from pymongo import MongoClient

from caxev import Denied, GiveUp, Job, aio, tag
from caxev.alarms import manager as manager_module
from caxev.alarms.base import DeliveryFailed
from caxev.alarms.email import EmailNotifier
from caxev.alarms.health import Descriptors, Health, HealthMonitor, health_alarms
from caxev.alarms.manager import AlarmManager, Recipient
from caxev.alarms.recipients import recipients
from caxev.alarms.webhook import WebhookNotifier
from caxev.cli import cli
from caxev.config import ConfigError, Email, Settings, Sites, Webhook, load_sites
from caxev.config.alarms import read_alarms
from caxev.core import alarms, ledger
from caxev.core.alarms import (
    Alarm,
    AlarmState,
    DeliveryRule,
    Severity,
    cleared,
    delivered,
    delivery_failed,
    forgettable,
    messages,
    next_delivery,
    raised,
    together,
)
from caxev.core.clock import clock, utcnow
from caxev.database import Database, Lease, Request, open_database
from caxev.engine import settling
from tests import engine, sinks
from tests import strategies as make
from tests.conftest import Database as Named
from tests.test_cli import untouched

NOW = make.EPOCH
HOUR = timedelta(hours=1)
DAY = timedelta(hours=24)
FULL = Alarm("lngs", "disk /data", "the disk is full", Severity.CRITICAL, details={"more": "0 B"})


@pytest.fixture
def web() -> Iterator[sinks.Web]:
    with sinks.web() as server:
        yield server


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "CAXEV_WEBHOOK_TOKEN", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def days() -> Iterator[Any]:
    """A function that lets so many days pass."""

    def later(days: float) -> None:
        clock.ahead += timedelta(days=days)

    yield later
    clock.ahead = timedelta()


# -- the life of an alarm -----------------------------------------------------------------------

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["raise", "clear", "tell", "fail", "wait"]), st.floats(0, 40)),
    max_size=60,
)


@given(ACTIONS, st.booleans())
def test_an_alarm_is_told_once_a_day_and_its_end_once(
    actions: list[tuple[str, float]], resolves: bool
) -> None:
    """Between two tellings lies `repeat`, or the word that it was over; that is told once.

    And what stands is never forgotten, nor due to nobody.
    """
    rule = DeliveryRule("mail", repeat=DAY, resolves=resolves)
    state: AlarmState | None = None
    now, said = NOW, []
    for action, hours in actions:
        now += timedelta(hours=hours)
        if action == "raise":
            state = raised(state, FULL, now)
        elif state is None:
            continue
        elif action == "clear":
            state = cleared(state, now)
        else:
            due = next_delivery(state, rule)
            assert due is not None or not state.active
            if due is not None and due.at <= now and action == "tell":
                said.append((now, due.over))
                state = delivered(state, "mail", now, over=due.over)
            elif due is not None and due.at <= now and action == "fail":
                state = delivery_failed(state, "mail", "down", now, jitter=0.5)
        if forgettable(state, [rule], now):
            assert not state.active
            state = None
    for (before, was_over), (then, over) in pairwise(said):
        assert not (over and was_over)
        assert over or was_over or then - before >= DAY
    assert resolves or not any(over for _, over in said)


def test_what_cannot_be_told_is_told_later_and_later() -> None:
    """A sink that is down: the alarm stays due, after longer and longer times, up to an hour."""
    rule, state, now, waits = DeliveryRule("mail"), raised(None, FULL, NOW), NOW, []
    for _ in range(12):
        state = delivery_failed(state, "mail", "connection refused", now, jitter=0.5)
        due = next_delivery(state, rule)
        assert due is not None
        waits.append((due.at - now).total_seconds())
        now = due.at
    assert waits == sorted(waits)
    assert (waits[0] < 300, waits[-1]) == (True, 3600)
    assert state.undelivered == {"mail": "connection refused"}
    assert not delivered(state, "mail", now, over=False).undelivered


def test_what_comes_and_goes_is_one_alarm() -> None:
    """An end is told only after a while; until then a new beginning is nothing new."""
    rule = DeliveryRule("mail", calm=timedelta(minutes=5))
    state = delivered(raised(None, FULL, NOW), "mail", NOW, over=False)
    state = cleared(state, NOW + HOUR)
    due = next_delivery(state, rule)
    assert due == (NOW + HOUR + timedelta(minutes=5), True)
    state = raised(state, FULL, NOW + HOUR)
    assert next_delivery(state, rule) == (NOW + DAY, False)


def test_who_was_told_that_it_is_over_hears_at_once_that_it_is_not() -> None:
    """After word of its end a new beginning is new; a sink without such word waits for its day."""
    state = cleared(delivered(raised(None, FULL, NOW), "mail", NOW, over=False), NOW + HOUR)
    told = raised(delivered(state, "mail", NOW + HOUR, over=True), FULL, NOW + 2 * HOUR)
    assert next_delivery(told, DeliveryRule("mail")) == (NOW + 2 * HOUR, False)
    undelivered = raised(state, FULL, NOW + 2 * HOUR)
    assert next_delivery(undelivered, DeliveryRule("mail", resolves=False)) == (NOW + DAY, False)


def test_a_sink_is_told_only_of_what_is_bad_enough() -> None:
    """A sink for errors hears of no warning; of one that became an error it does."""
    rule = DeliveryRule("pager", severity=Severity.ERROR)
    state = raised(None, evolve(FULL, severity="warning"), NOW)
    assert next_delivery(state, rule) is None
    assert next_delivery(raised(state, FULL, NOW + HOUR), rule) == (NOW, False)


def test_what_happened_is_told_once_to_each() -> None:
    """Something that cannot be over is told, not again, and is forgotten; later it is new."""
    rule, gap = DeliveryRule("mail"), alarms.gap("lngs", "code 286")
    state = raised(None, gap, NOW)
    assert not forgettable(state, [rule], NOW)
    state = delivered(state, "mail", NOW, over=False)
    assert next_delivery(state, rule) is None
    assert next_delivery(raised(state, gap, NOW + HOUR), rule) is None
    assert next_delivery(raised(state, gap, NOW + DAY), rule) == (NOW + DAY, False)
    assert not forgettable(state, [rule], NOW + HOUR)
    assert forgettable(state, [rule], NOW + DAY)


def test_many_at_once_are_one_message() -> None:
    """A few alarms are told one by one; a thousand are one message that names the worst."""
    few = [raised(None, evolve(FULL, key=str(i), severity="error"), NOW) for i in range(5)]
    assert [len(batch) for batch in messages(few)] == [1] * 5
    worst = raised(None, evolve(FULL, key="worst", summary="the worst"), NOW + HOUR)
    (batch,) = messages([*few * 200, worst])
    alarm = together(batch)
    assert alarm.key == "worst"
    assert alarm.summary == "the worst (and 1000 more: caxev alarms --site lngs)"
    assert alarm.details["also"].endswith("980 more")


def test_no_text_breaks_a_line() -> None:
    """What stands in names of files is shown escaped, and can be stored."""
    alarm = Alarm("lngs", "k", "bad\r\nBcc: x \udcff", details={"file": "a\x00b\nc", "none": None})
    assert alarm.summary == "bad Bcc: x \\udcff"
    assert alarm.details == {"file": "a\\x00b\nc"}


# -- sites.json ---------------------------------------------------------------------------------


def test_alarms_of_sites_json(tmp_path: Path) -> None:
    """Each address with its defaults: TLS wherever a password or another machine is involved."""
    entries: list[Any] = [
        {"email": {"to": ["a@b.org"]}},
        {"email": {"name": "all", "to": ["c@d.org"], "host": "smtp.d.org", "user": "caxev"}},
        {"webhook": {"shape": "pagerduty", "severity": "critical", "repeat": 1, "x_note": "me"}},
    ]
    first, second, pager = _sites(tmp_path, entries).get("lngs").alarms
    assert first == _email("a@b.org", host="localhost", port=25, security="none")
    assert isinstance(second, Email)
    assert (second.security, second.port, second.from_) == ("starttls", 587, None)
    assert (pager.name, pager.severity, pager.repeat) == ("webhook", Severity.CRITICAL, 1.0)
    assert pager.rule(resolves=True).repeat == HOUR


def _email(*to: str, host: str = "127.0.0.1", **more: Any) -> Email:
    return Email(name="email", to=to, host=host, **more)


def _sites(tmp_path: Path, entries: Any) -> Sites:
    file = tmp_path / "sites.json"
    file.write_text(json.dumps([{"name": "lngs", "alarms": entries}]))
    return load_sites(file)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"email": {}}, "alarms must be addresses of people"),
        ([{"email": {}, "webhook": {}}], "alarms must be addresses of people"),
        ([{"emial": {}}], "alarms: 'emial': unknown kind (did you mean 'email'?)"),
        ([{"pigeon": {}}], "alarms: 'pigeon': unknown kind (known: email, webhook)"),
        ([{"email": {}}], "alarms: 'email': to is missing"),
        ([{"email": {"to": "a@b"}}], "'email': to must be addresses, as"),
        ([{"email": {"to": ["a@b\nBcc: c@d"]}}], "'email': to must be addresses, as"),
        ([{"email": {"to": ["a@b"], "hsot": "x"}}], "unknown key 'hsot' (did you mean 'host'?"),
        ([{"email": {"to": ["a@b"], "user": "u", "security": "none"}}], "go in the clear"),
        ([{"email": {"to": ["a@b"], "severity": "bad"}}], "one of warning, error, critical"),
        ([{"email": {"to": ["a@b"], "repeat": 0}}], "'email': repeat must be a number of hours"),
        ([{"webhook": {"url": "https://a"}}], "'webhook': shape is missing"),
        ([{"webhook": {"shape": "json"}}], "'webhook': url is missing"),
        ([{"webhook": {"shape": "json", "url": "ftp://a"}}], "url must be an address that"),
        ([{"webhook": {"shape": "json", "url": "https://u:p@a"}}], "url must be an address that"),
        ([{"webhook": {"shape": "json", "url": "https://a:9d9"}}], "url must be an address that"),
        ([{"webhook": {"shape": "slack", "secret": "hook-url"}}], "secret must be the name of"),
        ([{"email": {"to": ["a@b"]}}] * 2, "2 of them are called 'email'"),
    ],
)
def test_mistakes_in_alarms(tmp_path: Path, entries: Any, message: str) -> None:
    """Each mistake is a line that names site, kind and key, and says what should stand there."""
    with pytest.raises(ConfigError) as raised_:
        _sites(tmp_path, entries)
    assert message in str(raised_.value)
    assert "site 'lngs'" in str(raised_.value)


def test_an_installed_kind_of_sink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It gets its own keys; name, severity and repeat are as for every sink."""
    point = EntryPoint("pigeon", "tests.test_alarms:Pigeon", "caxev.alarms")
    for module in ("caxev.config.alarms", "caxev.alarms.recipients"):
        monkeypatch.setattr(f"{module}.entry_points", lambda **_: [point])
    entries = [{"pigeon": {"loft": 5, "repeat": 2}}, {"pigeon": {"name": "two", "loft": None}}]
    one, two = recipients("lngs", _sites(tmp_path, entries).get("lngs").alarms)
    assert one.rule == DeliveryRule("pigeon", repeat=2 * HOUR, resolves=False)
    assert (one.notifier, two.name, two.notifier) == (
        Pigeon({"loft": 5}),
        "two",
        Pigeon({"loft": None}),
    )


@define
class Pigeon:
    options: Any
    resolves: bool = False

    async def send(self, alarm: Alarm, *, over: bool) -> None:
        """Do nothing."""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["email", "webhook", "to", "host", "name", "x"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(JSON)
def test_no_value_breaks_the_reading(value: object) -> None:
    """Whatever stands there, it is read or refused in words."""
    for given_ in (value, [value], [{"email": value}], [{"webhook": value}]):
        with suppress(ValueError):
            assert isinstance(read_alarms(given_), tuple)


def test_a_missing_secret_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without password, key or address nothing is made, and the message says what to set."""
    for sink, name in (
        (_email("a@b.org", host="smtp.b.org", user="caxev"), "CAXEV_SMTP_PASSWORD"),
        (Webhook(name="pager", shape="pagerduty", url="https://x", secret="PAGER"), "PAGER"),
        (Webhook(name="slack", shape="slack", secret="SLACK"), "SLACK"),
    ):
        with pytest.raises(ConfigError, match=f"site 'lngs': alarms: '{sink.name}': .*{name}_FILE"):
            recipients("lngs", [sink])


def test_a_password_that_smtp_cannot_send_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes ASCII alone, and its error holds the password."""
    monkeypatch.setenv("CAXEV_SMTP_PASSWORD", "gehëim")
    with pytest.raises(ConfigError, match="not ASCII") as raised_:
        recipients("lngs", [_email("a@b.org", host="smtp.b.org", user="caxev")])
    assert "geh" not in repr(raised_.value) + repr(raised_.value.__cause__)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("hooks.slack.com/services/geheim", "is not an address"),
        ("https://geheim\u2100.org/", "is not an address"),  # Python's own message repeats it
        ("https://hooks.slack.com:geheim/", "is not an address"),
        ("https://caxev:geheim@hooks.slack.com/services/", "without a user"),
    ],
)
def test_a_secret_address_that_will_not_do_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, url: str, why: str
) -> None:
    """It is told at the start what is wrong with it, in a line that does not show it."""
    monkeypatch.setenv("SLACK", url)
    with pytest.raises(ConfigError, match=f"SLACK .*{why}") as raised_:
        recipients("lngs", [Webhook(name="slack", shape="slack", secret="SLACK")])
    assert "geheim" not in repr(raised_.value) + repr(raised_.value.__cause__)
    assert "\n" not in str(raised_.value)


# -- HTTP ---------------------------------------------------------------------------------------


async def test_pagerduty_gets_an_incident_and_its_end(web: sinks.Web) -> None:
    """Trigger and resolve carry one key, which is never too long."""
    alarm = evolve(FULL, key="k" * 400, run="run 5")
    hook = WebhookNotifier("pagerduty", f"{web.url}/v2/enqueue", "routing")
    await hook.send(alarm, over=False)
    await hook.send(alarm, over=True)
    trigger, resolve = web.bodies
    assert (trigger["event_action"], resolve["event_action"]) == ("trigger", "resolve")
    assert trigger["dedup_key"] == resolve["dedup_key"]
    assert len(trigger["dedup_key"]) <= 255
    assert trigger["routing_key"] == "routing"
    assert trigger["payload"]["severity"] == "critical"
    assert trigger["payload"]["custom_details"] == {"run": "run 5", "more": "0 B"}


async def test_slack_gets_text_that_marks_nothing_up(web: sinks.Web) -> None:
    """One text; what the alarm quotes mentions nobody and links to nothing."""
    hook = WebhookNotifier("slack", f"{web.url}/services/T/B/x", None)
    await hook.send(evolve(FULL, summary="<!channel> & co"), over=False)
    await hook.send(FULL, over=True)
    first, second = [body["text"] for body in web.bodies]
    assert "[lngs] critical: &lt;!channel&gt; &amp; co\nmore: 0 B" in first
    assert second.endswith("[lngs] over: the disk is full")


async def test_json_carries_all_there_is(web: sinks.Web) -> None:
    """The plain shape has every field, and the token where there is one."""
    await WebhookNotifier("json", web.url, "token").send(FULL, over=False)
    ((_, headers, body),) = web.posts
    assert headers["Authorization"] == "Bearer token"
    assert {"site": "lngs", "key": "disk /data", "state": "raised"}.items() <= body.items()
    assert body["details"] == {"more": "0 B"}


@pytest.mark.parametrize("status", [301, 307, 400, 500])
async def test_a_refused_post_is_not_delivered(web: sinks.Web, status: int) -> None:
    """An error, and a redirect, is a failure; its message holds no secret."""
    web.answers.append(status)
    with pytest.raises(DeliveryFailed, match=str(status)) as raised_:
        await WebhookNotifier("slack", f"{web.url}/services/geheim", "geheim").send(
            FULL, over=False
        )
    assert web.posts == []
    with pytest.raises(DeliveryFailed, match="localhost:1") as refused:
        await WebhookNotifier("slack", "http://caxev:geheim@localhost:1/x", "").send(
            FULL, over=False
        )
    assert "geheim" not in str(refused.value)
    assert "geheim" not in str(raised_.value) + repr(WebhookNotifier("slack", "geheim", "geheim"))


async def test_nobody_there() -> None:
    """A closed port, for mail and for HTTP: a failure in words."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(DeliveryFailed, match="refused"):
            await WebhookNotifier("json", f"http://127.0.0.1:{port}/geheim", None).send(
                FULL, over=False
            )
        mail = EmailNotifier(_email("a@b.org", port=port), None)
        with pytest.raises(DeliveryFailed, match="refused"):
            await mail.send(FULL, over=False)


# -- mail ---------------------------------------------------------------------------------------


def _mail(
    port: int, *to: str, user: str | None = None, password: str | None = None
) -> EmailNotifier:
    return EmailNotifier(_email(*to, port=port, user=user, from_="caxev@lngs.org"), password)


async def test_mail_arrives() -> None:
    """Subject, text, both recipients; the end of an alarm is in the same thread."""
    with sinks.post() as server:
        mail = _mail(server.port, "a@b.org", "c@d.org")
        await mail.send(evolve(FULL, summary="run 5: Lücke"), over=False)
        await mail.send(FULL, over=True)
    first, second = server.mails
    assert first["Subject"] == "[lngs] critical: run 5: Lücke"
    assert (first["To"], first["From"]) == ("a@b.org, c@d.org", "caxev@lngs.org")
    assert first.get_content().splitlines() == ["run 5: Lücke", "", "more: 0 B"]
    assert first["References"] == second["References"]
    assert second["Subject"].startswith("[lngs] over: ")


async def test_mail_with_starttls_and_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password goes over TLS only, to a server that is trusted; it is in no message."""
    trusted, context = sinks.certificate(tmp_path)
    with sinks.post("geheim", context) as server:
        mail = _mail(server.port, "a@b.org", user="caxev", password="geheim")
        with pytest.raises(DeliveryFailed, match="certificate verify failed"):
            await mail.send(FULL, over=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        await mail.send(FULL, over=False)
        wrong = _mail(server.port, "a@b.org", user="caxev", password="geheimer")
        with pytest.raises(DeliveryFailed, match="refused the login") as raised_:
            await wrong.send(FULL, over=False)
    assert len(server.mails) == 1
    assert server.logins[0] == ("caxev", "geheim")
    assert "geheim" not in str(raised_.value) + repr(wrong)


async def test_no_password_without_tls() -> None:
    """A server that offers no STARTTLS gets neither password nor mail."""
    with sinks.post() as server:
        mail = _mail(server.port, "a@b.org", user="caxev", password="geheim")
        with pytest.raises(DeliveryFailed, match="STARTTLS"):
            await mail.send(FULL, over=False)
    assert (server.mails, server.logins) == ([], [])


async def test_refused_recipients() -> None:
    """One of two refused: the other has it, and that is all one can do. All refused: a failure."""
    with sinks.post() as server:
        server.refused.add("gone@b.org")
        await _mail(server.port, "a@b.org", "gone@b.org").send(FULL, over=False)
        with pytest.raises(DeliveryFailed, match=r"refuses mail for gone@b\.org \(550"):
            await _mail(server.port, "gone@b.org").send(FULL, over=False)
    assert len(server.mails) == 1


# -- vitals -------------------------------------------------------------------------------------


def _alarmed(pulse: Health) -> dict[str, bool]:
    return {key: alarm is not None for key, alarm in health_alarms("lngs", pulse)}


def test_what_ails_a_listener() -> None:
    """A short trouble is none; what is neither full nor free enough stays as it is."""
    well = {"database": False, "stream": False, "clock": False, "open files": False}
    assert _alarmed(Health()) == well
    for used, wanted in ((19, True), (15, None), (14, False)):
        assert _alarmed(Health(files=Descriptors(used, 20))).get("open files") == wanted
    for skew, is_wrong in ((5.0, False), (-5.0, False), (5.1, True), (-20.0, True)):
        assert _alarmed(Health(skew=skew))["clock"] == is_wrong
    assert "database" not in _alarmed(Health("since noon", troubled=10))
    assert _alarmed(Health("since noon", troubled=400))["database"]
    assert _alarmed(Health(behind=3600))["stream"]
    assert "stream" not in _alarmed(Health(behind=400))
    for free, wanted in ((99, True), (101, None), (200, False)):
        seen = _alarmed(Health(free={"/data": free}, min_free=100))
        assert seen.get("disk /data") == wanted
    # Two directories on one disk: a former process, or this one before, named it by the other.
    two = _alarmed(Health(free={"/data": 50}, away={"/data": None, "/same": None}, min_free=100))
    assert (two["disk /data"], two["disk /same"]) == (True, False)
    away = _alarmed(Health(away={"/data": "not mounted", "/other": None}))
    assert (away["root /data"], away["root /other"]) == (True, False)


def test_old_batches_after_an_outage_are_no_alarm() -> None:
    """The stream is late only where it stays late."""
    manager = AlarmManager(None, Lease("lngs", 1, "me"), [])  # type: ignore[arg-type]  # not used
    behind = [3600.0] * 4 + [0.0] + [3600.0] * 5
    watching = HealthMonitor("lngs", lambda: Health(behind=behind.pop(0)), manager)
    for _ in range(9):
        watching.check()
        assert manager.active == []
    watching.check()
    assert [one.alarm.key for one in manager.active] == ["stream"]


# -- the manager -----------------------------------------------------------------------------------


def _recipient(web: sinks.Web, name: str = "json", **rule: Any) -> Recipient:
    return Recipient(DeliveryRule(name, **rule), WebhookNotifier("json", f"{web.url}/{name}", None))


def _received(web: sinks.Web) -> list[tuple[str, str]]:
    return [(body["summary"], body["state"]) for body in web.bodies]


async def _lease(db: Database, owner: str = "me") -> Lease:
    taken = await db.acquire("lngs", owner, 0.01, utcnow())
    assert taken is not None
    return taken[0]


async def _manager(db: Database, lease: Lease, *found: Recipient) -> AlarmManager:
    manager = AlarmManager(db, lease, list(found))
    await manager.open()
    return manager


@pytest.mark.replicaset
async def test_a_restart_tells_nothing_twice(database: Named, web: sinks.Web, days: Any) -> None:
    """What was told stands in the database: the next process tells it again only a day later."""
    to = _recipient(web)
    async with engine.opened(database) as db:
        lease = await _lease(db)
        manager = await _manager(db, lease, to)
        manager.raise_(FULL)
        await manager.leave(deliver=True)
        for wanted in (1, 1):
            manager = await _manager(db, lease, to)
            manager.raise_(FULL)
            await manager.leave(deliver=True)
            assert len(web.posts) == wanted
        days(1)
        await manager.leave(deliver=True)
        assert len(web.posts) == 2
        manager.clear(FULL.key)
        await manager.leave(deliver=True)
        days(0.1)
        manager = await _manager(db, lease, to)
        await manager.leave(deliver=True)
        await manager.leave(deliver=True)
        assert _received(web)[2:] == [("the disk is full", "over")]
        assert await db.alarms() == []


@pytest.mark.replicaset
async def test_a_sink_that_is_down_is_told_later(
    database: Named, web: sinks.Web, days: Any
) -> None:
    """It is tried again, also by the next process; other sinks are not told twice meanwhile."""
    down, up = _recipient(web, "down"), _recipient(web, "up")
    async with engine.opened(database) as db:
        lease = await _lease(db)
        manager = await _manager(db, lease, down, up)
        manager.raise_(FULL)
        web.answers.append(500)
        await manager.deliver(down)
        await manager.leave(deliver=True)
        assert [path for path, _, _ in web.posts] == ["/up"]
        (kept,) = await db.alarms("lngs")
        assert kept.undelivered == {"down": f"127.0.0.1:{web.port} answered 500 status 500"}
        days(0.1)
        manager = await _manager(db, lease, down, up)
        await manager.leave(deliver=True)
        assert [path for path, _, _ in web.posts] == ["/up", "/down"]
        assert not (await db.alarms())[0].undelivered


@pytest.mark.replicaset
async def test_a_deposed_process_changes_no_alarm(database: Named, web: sinks.Web) -> None:
    """After a take-over the former process writes nothing."""
    async with engine.opened(database) as db:
        former = await _manager(db, await _lease(db))

        async def lapsed() -> Any:
            return await db.acquire("lngs", "other", 10.0, utcnow())

        await engine.until(lapsed)
        former.raise_(FULL)
        await former.leave(deliver=False)
        assert await db.alarms() == []


async def test_without_a_database_people_are_told_all_the_same(
    web: sinks.Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the database is not reached is told though it cannot be written down."""
    monkeypatch.setattr(manager_module, "GATHER", 0.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        uri = f"mongodb://127.0.0.1:{port}/?replicaSet=x&serverSelectionTimeoutMS=50"
        settings = Settings.load(mongo_uri=uri, environ={})
        async with aio.loop(), open_database(settings) as db, trio.open_nursery() as nursery:
            manager = AlarmManager(db, Lease("lngs", 1, "me"), [_recipient(web)])
            nursery.start_soon(manager.run)
            watching = HealthMonitor("lngs", lambda: Health("since noon", troubled=400), manager)
            watching.check()
            await engine.until(lambda: web.posts)
            nursery.cancel_scope.cancel()
    assert _received(web) == [("lngs: the runs database is unreachable", "raised")]


async def test_there_is_an_end_to_single_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number, further alarms are one; what cannot end is not told one by one."""
    monkeypatch.setattr(manager_module, "MOST", 10)
    manager = AlarmManager(None, Lease("lngs", 1, "me"), [])  # type: ignore[arg-type]  # not used
    for number in range(100):
        manager.raise_(evolve(FULL, key=str(number)))
    assert len(manager.active) == 11
    assert "crowded" in {one.alarm.key for one in manager.active}
    for number in range(100):
        manager.clear(str(number))
    manager._forget()  # as often as something changes
    assert manager.active == []


def _failed(event: str, why: str = "the disk is full") -> Alarm:
    key = alarms.PARKED + json.dumps(["lngs", "7", event, "process"])
    return Alarm("lngs", key, f"process has failed ({event})", run="run 7", details={"why": why})


@pytest.mark.replicaset
async def test_reactions_that_failed_for_one_cause_have_one_alarm(database: Named) -> None:
    """It stands until the last of them is done, or has another cause, or a person ends it."""
    one, two, three = map(_failed, ("one", "two", "three"))
    other = _failed("two", "the network is down")
    async with engine.opened(database) as db:
        manager = await _manager(db, await _lease(db))

        def state() -> list[str]:
            return [found.alarm.key for found in manager.active]

        for alarm in (one, two, three, two):
            manager.raise_(alarm)
        manager.clear(one.key)
        assert state() == [one.key]
        manager.raise_(other)
        assert state() == [one.key, other.key]
        manager.clear(three.key)
        assert state() == [other.key]
        manager.clear(other.key)
        assert state() == []
        for alarm in (one, two, three):
            manager.raise_(alarm)
        await manager.clear_and_keep(one.key)
        assert state() == []


# -- the engine ---------------------------------------------------------------------------------


def _site_with(database: Named, web: sinks.Web, *found: Any, **more: Any) -> Any:
    options = engine.options_for(database, found)
    sink = Webhook(name="json", shape="json", url=web.url)
    return evolve(options, site=evolve(options.site, alarms=(sink,), **more))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "GATHER", 0.0)
    monkeypatch.setattr(manager_module, "PAUSE", 0.0)
    monkeypatch.setattr(alarms, "CALM", timedelta())


@pytest.mark.replicaset
async def test_a_failed_reaction_is_told_until_it_is_done(
    database: Named, web: sinks.Web, quick: None
) -> None:
    """Parked: told once, though the listener restarts. Retried and done: over."""
    hopeless = [True]

    async def process(job: Job) -> None:
        if hopeless:
            raise GiveUp("the disk is read-only")

    options = _site_with(database, web, engine.handler(process, tag("*")))
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(7, tags=[{"name": "odd  \n tag"}]))
        async with engine.listener(db, options):
            await engine.until(lambda: web.posts)
        async with engine.listener(db, options):
            hopeless.clear()
            await db.add_request("lngs", Request("retry"), "me", utcnow())
            await engine.until(lambda: len(web.posts) > 1)
    told, over = web.bodies
    assert told["summary"] == "process has failed for run 7 (tag 'odd \\n tag': yes)"
    assert told["details"]["why"] == "the disk is read-only"
    assert (told["run"], told["state"], over["state"]) == ("run 7", "raised", "over")
    assert over["key"] == told["key"]


@pytest.mark.replicaset
async def test_an_alarm_about_a_refusal_ends_with_its_reason(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another refusal takes its place, and at the start if no reaction waits for it."""
    monkeypatch.setattr(settling, "REFUSED", timedelta())
    monkeypatch.setattr(ledger, "FIRST_DELAY", 0.1)
    reasons = ["the key is refused"]

    async def process(job: Job) -> None:
        raise Denied(reasons[-1])

    options = engine.options_for(database, [engine.handler(process, tag("*"))])
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(7, tags=[{"name": "go"}]))

        async def state() -> list[str]:
            return [one.alarm.key for one in await db.alarms("lngs") if one.active]

        async def only_the_last() -> bool:
            return await state() == [f"refused {reasons[-1]}"]

        async with engine.listener(db, options):
            await engine.until(only_the_last)
            reasons.append("the disk is full")
            await engine.until(only_the_last)
        async with engine.listener(db, options):
            assert await only_the_last()
        manager = await _manager(db, await _lease(db))
        manager.raise_(evolve(FULL, key="refused by nobody"))
        await manager.leave(deliver=False)
        manager = await _manager(db, manager.lease)
        assert [one.alarm.key for one in manager.active] == ["refused the disk is full"]


@pytest.mark.replicaset
async def test_what_is_being_told_when_a_listener_leaves_is_told_once(
    database: Named, web: sinks.Web, quick: None
) -> None:
    """It waits for the sink's answer: without it the next process would tell it again."""

    async def process(job: Job) -> None:
        raise GiveUp("no hope")

    web.after = 1.0
    options = _site_with(database, web, engine.handler(process, tag("*")))
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(7, tags=[{"name": "go"}]))
        async with engine.listener(db, options):
            await engine.until(lambda: web.posts)
        (kept,) = await db.alarms("lngs")
    assert [told.raised is not None for told in kept.deliveries.values()] == [True]
    assert len(web.posts) == 1


@pytest.mark.replicaset
async def test_a_failure_whose_alarm_was_lost_is_told_by_the_next_process(
    database: Named, web: sinks.Web, quick: None
) -> None:
    """Killed after a failure and before its alarm was kept: the ledger says what has failed."""

    async def process(job: Job) -> None:
        raise GiveUp("no hope")

    options = _site_with(database, web, engine.handler(process, tag("go")))
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(7, tags=[{"name": "go"}]))
        silent = evolve(options, site=evolve(options.site, alarms=()))
        async with engine.listener(db, silent):

            async def kept() -> Any:
                return await db.alarms()

            await engine.until(kept)
        with MongoClient[dict[str, Any]](database.uri) as client:
            client[database.name]["caxev_ledger"].delete_many({"kind": "alarm"})
        async with engine.listener(db, options):
            await engine.until(lambda: web.posts)
    assert _received(web) == [("process has failed for run 7 (tag 'go': yes)", "raised")]


@pytest.mark.replicaset
async def test_handlers_raise_alarms_and_clear_them(
    database: Named, web: sinks.Web, quick: None
) -> None:
    """Kept before `alarm` returns; over when another reaction to the run says so."""
    kept: list[int] = []

    async def look(job: Job) -> None:
        await job.alarm("odd", f"{job.run} is odd", severity="warning", why="it is odd")
        kept.append(len(await db.alarms("lngs")))

    async def fine(job: Job) -> None:
        await job.all_clear("odd")

    found = [engine.handler(look, tag("odd")), engine.handler(fine, tag("fine"))]
    options = _site_with(database, web, *found)
    async with engine.opened(database) as db, engine.listener(db, options):
        run = await db.insert_run(engine.run_document(7, tags=[{"name": "odd"}]))
        await engine.until(lambda: web.posts and kept)
        assert kept == [1]
        with MongoClient[dict[str, Any]](database.uri) as client:
            client[database.name]["runs_new"].update_one(
                {"_id": run}, {"$push": {"tags": {"name": "fine"}}}
            )
        await engine.until(lambda: len(web.posts) > 1)
    assert _received(web) == [("run 7 is odd", "raised"), ("run 7 is odd", "over")]


@pytest.mark.replicaset
async def test_a_gap_of_history_is_told(database: Named, web: sinks.Web, quick: None) -> None:
    """A stream that cannot go on: the scan makes up for it, and people know."""
    options = _site_with(database, web)
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(1))
        async with engine.listener(db, options):

            async def located() -> Any:
                record = await db.site_record("lngs")
                return record is not None and record.position

            await engine.until(located)
            with MongoClient[dict[str, Any]](database.uri) as client:
                client[database.name]["runs_new"].drop()
            await engine.until(lambda: web.posts)
    assert _received(web)[0] == (
        "lngs: the change stream has a gap; all runs are scanned instead",
        "raised",
    )


# -- the command line ---------------------------------------------------------------------------


@pytest.fixture
def caxev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Named, web: sinks.Web) -> Path:
    """A sites.json whose alarms go to the web server, and to nobody."""
    url = {"shape": "json", "url": web.url}
    (tmp_path / "sites.json").write_text(
        json.dumps([{"name": "lngs", "alarms": [{"webhook": url}]}, {"name": "chicago"}])
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAXEV_MONGO_URI", database.uri)
    monkeypatch.setenv("CAXEV_DATABASE", database.name)
    return tmp_path


def _run(*args: str) -> Result:
    with untouched():
        return CliRunner().invoke(cli, args)


@pytest.mark.replicaset
def test_a_test_goes_to_every_sink(caxev: Path, web: sinks.Web) -> None:
    """`caxev alarms test` sends one to each; where one does not arrive, it says so and fails."""
    said = _run("alarms", "test", "--site", "lngs", "--json")
    assert (said.exit_code, json.loads(said.stdout)[0]["ok"]) == (0, True)
    assert web.bodies[0]["summary"] == "a test of the alarms of lngs: nothing is wrong"
    web.answers.append(503)
    said = _run("alarms", "test", "--site", "lngs")
    assert (said.exit_code, "is unreachable: its gateway answered 503" in said.stdout) == (1, True)
    said = _run("alarms", "test", "--site", "chicago")
    assert (said.exit_code, "has no `alarms`" in said.stdout) == (1, True)


@pytest.mark.replicaset
async def test_alarms_are_listed_and_cleared(
    caxev: Path, database: Named, web: sinks.Web, quick: None
) -> None:
    """What stands, whom it did not reach, in the list and in the status; cleared by a person."""

    async def look(job: Job) -> None:
        await job.alarm("odd", f"{job.run} is odd", why="it is odd")

    async def said(*args: str) -> Any:
        answer = await trio.to_thread.run_sync(_run, *args)
        return json.loads(answer.stdout) if "--json" in args else answer.stdout

    web.answers += [500]
    options = _site_with(database, web, engine.handler(look, tag("odd")))
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(engine.run_document(7, tags=[{"name": "odd"}]))

        async def undelivered() -> Any:
            return any(one.undelivered for one in await db.alarms())

        await engine.until(undelivered)
        (row,) = await said("alarms", "--site", "lngs", "--json")
        assert (row["summary"], row["why"]) == ("run 7 is odd", "it is odd")
        assert row["run"] == {"id": row["run"]["id"], "number": 7, "name": "161111_0007"}
        assert "answered 500" in row["undelivered"][0]
        assert "1, 1 not delivered" in await said("status")
        assert "requested to clear: run 7 is odd" in await said("alarms", "clear", row["id"])

        async def gone() -> Any:
            return not any(one.active for one in await db.alarms())

        await engine.until(gone)
        assert await said("alarms") == "no alarm is active\n"
