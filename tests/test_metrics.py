"""Metrics: what a scrape shows, who may scrape, and the rules and the board made of them."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import trio
import trio.testing
from attrs import frozen
from cattrs.errors import BaseValidationError
from click.exceptions import Exit
from click.testing import CliRunner
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as families

from caxev import Denied, GiveUp, Job, Retry, RootAway, copy
from caxev.cli import cli
from caxev.cli.errors import report_errors
from caxev.config import ConfigError
from caxev.core.ledger import Done, Failed, Hindered, Interrupted, Postponed, Surprise
from caxev.core.reasons import REASONS, is_failure, reason
from caxev.engine import sampling
from caxev.metrics import COPIES_REGISTRY
from caxev.metrics_server import Login, MetricsAddress, MetricsServer
from tests import engine
from tests.conftest import Database as Named
from tests.grafana import board_of
from tests.sinks import certificate as certificate_in

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "caxev.rules.yml"
BOARD = DEPLOY / "grafana" / "caxev.json"
TOKEN: Final = {"CAXEV_METRICS_TOKEN": "of a scrape"}
HERE = ("127.0.0.1", 0)


@contextmanager
def served(server: MetricsServer) -> Iterator[str]:
    server.begin()
    try:
        kind = "http" if server._certificate is None else "https"
        yield f"{kind}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.close()


def scrape(url: str, context: ssl.SSLContext | None = None, **headers: str) -> str:
    with urlopen(Request(url, headers=headers), timeout=30, context=context) as got:
        body: bytes = got.read()
        return body.decode()


def refused(url: str, context: ssl.SSLContext | None = None, **headers: str) -> int:
    with pytest.raises(HTTPError) as error:
        scrape(url, context, **headers)
    error.value.close()
    return error.value.code


# -- who may scrape -------------------------------------------------------------------------------


def test_a_token_or_a_password_is_asked_for() -> None:
    """Neither another one, nor none, gets an answer; on loopback it is for who has set one."""
    login = {**TOKEN, "CAXEV_METRICS_PASSWORD": "secret"}
    basic = "Basic " + b64encode(b"caxev:secret").decode()
    wrong = "Basic " + b64encode(b"caxev:Secret").decode()
    with served(MetricsServer(MetricsAddress(0), login)) as url:
        assert refused(url) == 401
        for header in ("Bearer of", "Bearer", wrong, "Basic ???", "Digest of a scrape"):
            assert refused(url, Authorization=header) == 401
        for header in ("Bearer of a scrape", basic):
            assert "# HELP caxev_leading" in scrape(url, Authorization=header)


def test_an_address_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the addresses that a listener serves, the one whose port must change."""
    with served(MetricsServer(MetricsAddress(0), {})) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(Exit), report_errors(debug=lambda: False):
            MetricsServer(MetricsAddress(port), {})
    assert f"127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_a_renewed_token_counts_at_once(tmp_path: Path) -> None:
    """The file is read at each scrape; while it cannot be, the former token counts."""
    file = tmp_path / "token"
    file.write_text("old\n")
    with served(MetricsServer(MetricsAddress(0), {"CAXEV_METRICS_TOKEN_FILE": str(file)})) as url:
        scrape(url, Authorization="Bearer old")
        file.write_text("new\n")
        assert refused(url, Authorization="Bearer old") == 401
        file.unlink()
        scrape(url, Authorization="Bearer new")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "db1.example.org"])
def test_elsewhere_metrics_need_tls_and_a_login(host: str, tmp_path: Path) -> None:
    """Each of the two alone is refused, before anything is served."""
    certificate = made(tmp_path)
    with pytest.raises(ConfigError, match="need TLS"):
        MetricsServer(MetricsAddress(0, host), TOKEN)
    with pytest.raises(ConfigError, match="need a login"):
        MetricsServer(MetricsAddress(0, host, certificate.pem, certificate.key), {})
    MetricsAddress(0, host, certificate.pem, certificate.key).check(Login.load(TOKEN))
    MetricsAddress(0, "::1").check(Login())


@frozen
class Certificate:
    """A certificate in a file, and its key in another."""

    pem: Path
    key: Path

    @property
    def trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.pem))


def made(directory: Path) -> Certificate:
    pem, _ = certificate_in(directory)
    return Certificate(pem, directory / "key.pem")


def test_metrics_are_served_with_tls(tmp_path: Path) -> None:
    """Nobody is answered without it, and a renewed certificate counts for the next scrape."""
    old = made(tmp_path)
    trusting = old.trusted
    with served(MetricsServer(MetricsAddress(0, "127.0.0.1", old.pem, old.key), TOKEN)) as url:
        assert "caxev_leading" in scrape(url, trusting, Authorization="Bearer of a scrape")
        assert refused(url, trusting) == 401
        with pytest.raises((URLError, OSError)):
            scrape(url.replace("https", "http"))
        new = made(tmp_path)
        with pytest.raises(URLError, match="CERTIFICATE_VERIFY_FAILED"):
            scrape(url, trusting)
        assert "caxev_leading" in scrape(url, new.trusted, Authorization="Bearer of a scrape")


def test_a_wrong_certificate_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    """It names both files."""
    good = made(tmp_path)
    good.key.write_text("no key")
    with pytest.raises(ConfigError, match=r"certificate\.pem with the key in .*key\.pem"):
        MetricsServer(MetricsAddress(0, "127.0.0.1", good.pem, good.key), TOKEN)


def test_a_listener_refuses_to_serve_metrics_openly(tmp_path: Path) -> None:
    """Before it does anything; the message names the option and no secret."""
    sites = tmp_path / "sites.json"
    sites.write_text('[{"name": "lngs"}]')
    env = {"CAXEV_MONGO_URI": "mongodb://127.0.0.1:1/?replicaSet=a", "CAXEV_SITES": str(sites)}
    command = ["listen", "--site", "lngs", "--metrics-address", "0.0.0.0"]
    said = CliRunner().invoke(cli, [*command, "--metrics-port", "9"], env={**env, **TOKEN})
    assert said.exit_code == 3, said.output
    assert "--metrics-certificate" in said.output
    assert "of a scrape" not in said.output
    said = CliRunner().invoke(cli, command, env=env)
    assert said.exit_code == 2, said.output
    assert "--metrics-port" in said.output
    # A key alone would be forgotten, and the password go without TLS.
    alone = ["listen", "--site", "lngs", "--metrics-port", "9", "--metrics-key", str(sites)]
    said = CliRunner().invoke(cli, alone, env=env)
    assert said.exit_code == 2, said.output
    assert "--metrics-certificate" in said.output


def test_open_metrics_are_served_to_who_asks() -> None:
    """In the format that Prometheus prefers, which its own parser reads."""
    with served(MetricsServer(MetricsAddress(0), {})) as url:
        text = scrape(url, Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    assert "caxev_changes" in {family.name for family in open_metrics(text)}  # type: ignore[no-untyped-call]


# -- reasons --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "wanted"),
    [
        (Failed("write failed: No space left on device"), "disk_full"),
        (Postponed("less than min_free would be left at /data"), "disk_full"),
        (Retry("SSH: Connection refused by chicago:22"), "connection"),
        (Postponed("no progress for 900 s"), "timeout"),
        (Denied("the host key of chicago is not in known_hosts"), "refused"),
        (Hindered("quota of user"), "disk_full"),
        (Hindered("any", root="/data"), "disk_away"),
        (RootAway("any"), "disk_away"),
        (GiveUp("file a: its digest differs"), "content"),
        (Surprise("ValueError: Connection"), "unexpected"),
        (ValueError("x"), "unexpected"),
        (Interrupted("the listener was stopped"), "interrupted"),
        (Failed("x"), "given_up"),
        (Done("fine"), "done"),
    ],
)
def test_a_reason_is_one_of_a_few(of: Any, wanted: str) -> None:
    """Whatever the message names, so that a label has a bound."""
    assert reason(of) == wanted
    assert wanted in REASONS


def test_what_waits_has_not_failed() -> None:
    """Nor what was cut short: only what is an attempt, or needs a person, is a failure."""
    failed: list[Any] = [Postponed("x"), Failed("x"), Surprise("x"), Hindered("x")]
    assert all(is_failure(one) for one in failed)
    assert not any(is_failure(one) for one in (Done(), Postponed("x", 5.0), Interrupted()))


# -- a scrape of a listener -----------------------------------------------------------------------


async def fail(job: Job) -> None:
    """Fail for a reason with a name."""
    raise GiveUp(f"{job.run}: No space left on device")


async def wait(job: Job) -> None:
    """Wait for an hour."""
    raise Retry("later", after=3600.0)


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in families(text)
        for one in family.samples
    }


@pytest.mark.replicaset
async def test_a_scrape_shows_what_the_site_owes(database: Named, tmp_path: Path) -> None:
    """By lane, with reasons; the directories, the collections and the configuration."""
    good = copy("transferred", host="lngs")
    # Names that no other test's handlers have: in this process all count together.
    handlers = [
        engine.handler(fail, good, lane="tape", name="scraped_fail"),
        engine.handler(wait, good, name="scraped_wait"),
    ]
    options = engine.options_for(database, handlers, site_fields={"dir_processed": str(tmp_path)})
    server = MetricsServer(MetricsAddress(0), {})
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(1, ("raw", "lngs", "transferred")))
        with served(server) as url:
            async with engine.listener(db, options):
                found: dict[Any, float] = {}

                def value(name: str, **labels: str) -> float | None:
                    return found.get((name, frozenset({"site": "lngs", **labels}.items())))

                async def settled() -> bool:
                    text = await trio.to_thread.run_sync(scrape, url)
                    found.update(values(text))
                    waiting = value("caxev_ledger_reactions", lane="default", state="waiting")
                    failed = value("caxev_ledger_reactions", lane="tape", state="failed")
                    # What a reaction led to is counted once the database has it.
                    counted = value(
                        "caxev_failures_total", handler="scraped_fail", reason="disk_full"
                    )
                    alarms = value("caxev_alarms", severity="error")
                    # Collected before the ledger is: a scrape may see the one without the other.
                    attempts = value("caxev_attempt_seconds_count", handler="scraped_wait")
                    size = value("caxev_directory_size_bytes", directory=str(tmp_path))
                    return waiting == failed == counted == alarms == attempts == 1 and bool(size)

                await engine.until(settled)
                assert value("caxev_ledger_reactions", lane="tape", state="due") == 0
                assert value("caxev_ledger_oldest_seconds", lane="tape", state="failed") is not None
                assert (
                    value("caxev_failures_total", handler="scraped_wait", reason="postponed") == 0
                )
                # There from the start, so that the first is a rise; other tests count here, too.
                assert value("caxev_history_gaps_total") is not None
                assert value("caxev_directory_away", directory=str(tmp_path)) == 0
                assert value("caxev_collection_documents", collection="ledger")
                assert value("caxev_collection_bytes", collection="ledger")
                assert value("caxev_lane_workers", lane="tape") == 1
                age = value("caxev_stream_age_seconds")
                assert age is not None
                assert age < 60

                copies = values(await trio.to_thread.run_sync(scrape, f"{url}/copies"))
                key = {"host": "lngs", "type": "raw", "status": "transferred"}
                assert copies["caxev_copies", frozenset(key.items())] == 1
        assert not values(generate_latest(COPIES_REGISTRY).decode())


@pytest.mark.replicaset
async def test_a_scrape_reads_no_run(database: Named) -> None:
    """An idle site asks the runs collection nothing, however often it is scraped."""
    server = MetricsServer(MetricsAddress(0), {})
    async with engine.opened(database) as db:
        with served(server) as url:
            async with engine.listener(db, engine.options_for(database, [])):

                async def shown() -> bool:
                    return "caxev_collection_documents{" in await trio.to_thread.run_sync(
                        scrape, url
                    )

                await engine.until(shown)
                await trio.sleep(1)  # for what a listener does at its start
                before = await queries(db)
                for _ in range(5):
                    await trio.to_thread.run_sync(scrape, url)
                assert await queries(db) == before


async def queries(db: Any) -> int:
    """How often the runs collection was read, but for the change stream."""
    stats: list[dict[str, Any]] = [{"$collStats": {"latencyStats": {}}}]

    async def ask() -> int:
        rows = await (await db._runs.aggregate(stats)).to_list(None)
        return int(rows[0]["latencyStats"]["reads"]["ops"])

    # Each asking is a read itself.
    return int(await db._call(ask)) - _asked()


_ASKED = iter(range(1_000_000))


def _asked() -> int:
    return next(_ASKED)


def test_figures_are_kept_for_as_long_as_they_are_dear() -> None:
    """20 times as long as they took; while they are not to be had there are none."""
    trio.run(_keep, clock=trio.testing.MockClock(autojump_threshold=0))


async def _keep() -> None:
    asked = []

    async def look_up() -> sampling.Rows:
        asked.append(trio.current_time())
        await trio.sleep(2.0)
        return {"caxev_copies": {}}

    async def hang() -> sampling.Rows:
        await trio.sleep(60.0)
        return {}

    kept = sampling.Kept(look_up, limit=5.0)
    assert await kept.get() == await kept.get() == {"caxev_copies": {}}
    await trio.sleep(39.0)
    await kept.get()
    assert len(asked) == 1
    await trio.sleep(2.0)
    await kept.get()
    assert len(asked) == 2
    assert await sampling.Kept(hang, limit=5.0).get() == {}


# -- rules and board ------------------------------------------------------------------------------


def names_of_series() -> set[str]:
    """All names of series that a scrape can show."""
    found = set()
    for text in (generate_latest().decode(), generate_latest(COPIES_REGISTRY).decode()):
        for name, kind in re.findall(r"^# TYPE (caxev_\w+) (\w+)", text, re.MULTILINE):
            ends = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
            found |= {name + end for end in ends}
    return found


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bcaxev_\w+", expression))


def labels_of() -> dict[str, set[str]]:
    from prometheus_client import REGISTRY

    from caxev.metrics import COPIES, STATES

    found = {
        name: set(labels) for one in (COPIES, STATES) for name, (_, labels) in one.families.items()
    }
    for collector in set(REGISTRY._collector_to_names):
        if hasattr(collector, "_labelnames"):
            for name in REGISTRY._collector_to_names[collector]:
                found[name] = {*collector._labelnames, "le"}
    return found


def expressions() -> list[str]:
    board = json.loads(BOARD.read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [*found, *re.findall(r"expr: (?:\|\n)?((?:.+\n)(?: {10,}.+\n)*)", RULES.read_text())]


@pytest.mark.parametrize("expression", expressions())
def test_expressions_are_about_metrics_that_there_are(expression: str) -> None:
    """By name and labels, in the board as in the rules."""
    assert named(expression) or "up{" in expression
    assert named(expression) <= names_of_series()
    for name, selected in re.findall(r"\b(caxev_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]", selected)) <= labels_of()[name]


def test_the_board_is_one_by_grafana_s_schema() -> None:
    """By the names and types of its fields; and what is none is refused."""
    document = json.loads(BOARD.read_text())
    board = board_of(document)
    assert 8 <= len(board.uid) <= 40
    assert [panel.title for panel in board.panels if not panel.targets] == []
    panel = {**document["panels"][0], "id": "1"}
    wrongs: list[dict[str, Any]] = [{"uid": 5}, {"panel": []}, {"panels": [panel]}]
    for wrong in wrongs:
        with pytest.raises(BaseValidationError):
            board_of({**document, **wrong})


def test_the_board_can_be_imported() -> None:
    """Each panel has a number of its own, a place that no other has, and the chosen source."""
    board = json.loads(BOARD.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (place["x"] + right, place["y"] + down)
        for place in (panel["gridPos"] for panel in panels)
        for right in range(place["w"])
        for down in range(place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "site"}


@pytest.mark.parametrize("command", [["check", "rules"], ["test", "rules"]], ids=lambda one: one[0])
def test_promtool_accepts_the_rules(command: list[str]) -> None:
    """Their syntax, and when each fires and when not."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    file = RULES if command[0] == "check" else RULES.with_suffix(".test.yml")
    said = subprocess.run([promtool, *command, file], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def test_each_rule_is_tested_for_firing_and_for_silence() -> None:
    """By the unit tests of the rules."""
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    tests = RULES.with_suffix(".test.yml").read_text()
    quiet = set(re.findall(r"\{eval_time: \w+, alertname: (\w+)\}", tests))
    loud = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:", tests))
    assert set(alerts) == quiet == loud
