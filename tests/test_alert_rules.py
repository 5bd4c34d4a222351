"""Each alert of deploy/prometheus is provoked at a real listener, and fires on what it shows then.

The listener's own metrics are scraped while it is in trouble. promtool plays them to the rules as
they are, in the rules' own time: hours are not waited for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import trio
from attrs import define, field, frozen
from prometheus_client.parser import text_string_to_metric_families as families

from caxev.testing.mongod import start_with_us
from tests import engine
from tests.conftest import Database as Named
from tests.engine import run_document
from tests.faults.clocks import WallClocks, library
from tests.mongod import Cluster
from tests.sshd import free_port

RULES = Path(__file__).parents[1] / "deploy" / "prometheus" / "caxev.rules.yml"
READ_BY_RULES = set(re.findall(r"\bcaxev_\w+", RULES.read_text()))
RUNS = 12
DISK = 64 << 20
SKEW = 60
AGE = "caxev_stream_age_seconds"
LONGEST = 120
"""Minutes that promtool plays."""
IDLE = 40.0
"""Seconds that are more than a stream without changes takes to answer."""

Key = tuple[str, frozenset[tuple[str, str]]]


@frozen
class Scrape:
    """What a listener shows of what the rules read, and when (by the monotonic clock)."""

    values: Mapping[Key, float]
    at: float

    def value(self, name: str, **labels: str) -> float | None:
        found = [
            value
            for (one, has), value in self.values.items()
            if one == name and labels.items() <= dict(has).items()
        ]
        return sum(found) if found else None


def scraped(port: int) -> Scrape | None:
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=240) as got:
            text = got.read().decode()
    except (URLError, OSError):
        return None
    return Scrape(
        {
            (one.name, frozenset(one.labels.items())): one.value
            for family in families(text)
            for one in family.samples
            if one.name in READ_BY_RULES
        },
        time.monotonic(),
    )


@define
class Played:
    """What promtool is to play: series with one value a minute, and which alert fires then."""

    cases: list[dict[str, Any]] = field(factory=list)

    def fires(self, alert: str, values: Mapping[Key, str], *, at: str) -> None:
        """An alert fires at a time if series have these values."""
        self._add(alert, values, at, [{"labels": "{}", "value": 1}])

    def silent(self, alert: str, values: Mapping[Key, str], *, at: str) -> None:
        """An alert does not fire."""
        self._add(alert, values, at, [])

    def _add(self, alert: str, values: Mapping[Key, str], at: str, samples: list[Any]) -> None:
        where = f'{{alertname="{alert}",alertstate="firing",site="lngs"}}'
        expr = f"count(ALERTS{where}) > 0"
        series = [
            {"series": name + "{" + ",".join(f'{k}="{v}"' for k, v in labels) + "}", "values": one}
            for (name, labels), one in values.items()
        ]
        self.cases.append(
            {
                "name": f"{alert} {'fires' if samples else 'is silent'} at {at}",
                "interval": "1m",
                "input_series": series,
                "promql_expr_test": [{"expr": expr, "eval_time": at, "exp_samples": samples}],
            }
        )

    def check(self, file: Path) -> None:
        """Play all of it."""
        rules = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": self.cases}
        file.write_text(json.dumps(rules))
        ended = subprocess.run(
            ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr


def age(scrape: Scrape) -> float:
    return scrape.value(AGE) or 0.0


def free(scrape: Scrape) -> float:
    return scrape.value("caxev_directory_free_bytes") or 0.0


def steady(scrape: Scrape) -> dict[Key, str]:
    return {key: f"{value}x{LONGEST}" for key, value in scrape.values.items()}


def rising(before: Scrape, after: Scrape, minutes: int) -> dict[Key, str]:
    """From one scrape to the next in so many minutes, evenly, and on like that."""
    return {
        key: f"{old}{(after.values[key] - old) / minutes:+}x{LONGEST}"
        for key, old in before.values.items()
        if key in after.values
    }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "caxev", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def listener(
    database: Named, directory: Path, port: int, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A listener for lngs, whose data are in `disk`."""
    where = {
        "CAXEV_MONGO_URI": database.uri,
        "CAXEV_DATABASE": database.name,
        "CAXEV_SITES": str(directory / "sites.json"),
    }
    command = [sys.executable, "-m", "caxev", "listen", "--site", "lngs", "--lease", "1"]
    command += ["--metrics-port", str(port)]
    with (directory / "log").open("ab") as log:
        process = start_with_us(
            command, env={**os.environ, **where, **environment}, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def seen(port: int, wanted: Callable[[Scrape], Any]) -> Scrape:
    """Wait until the listener shows that."""
    with trio.fail_after(engine.PATIENCE):
        while True:
            found = await trio.to_thread.run_sync(scraped, port)
            if found is not None and wanted(found):
                return found
            await trio.sleep(0.25)


@pytest.mark.replicaset
async def test_each_alert_fires_on_what_a_listener_shows(
    mongod: Cluster, database: Named, tmp_path: Path, disk: Path
) -> None:
    """A clock that is wrong, failures, a disk that fills, a stream that hangs, no listener."""
    found = library()
    if shutil.which("promtool") is None or found is None:
        pytest.skip("promtool or libfaketime is missing (Debian: prometheus, faketime)")
    port = free_port()
    clocks = WallClocks(found, tmp_path / "clocks")
    clocks.set("lngs", f"+{SKEW}")
    (tmp_path / "sites.json").write_text(json.dumps([{"name": "lngs", "dir_raw": str(disk)}]))
    (disk / "before").write_bytes(bytes(DISK * 6 // 10))
    async with engine.opened(database) as db:
        with listener(database, tmp_path, port, **clocks.environment("lngs")):
            skewed = await seen(port, lambda one: one.value("caxev_clock_skew_seconds"))
        with listener(database, tmp_path, port) as process:
            fresh = await seen(port, free)  # the disk is known before there is a run
            # Their paths are not in the site's directory, so that no checksum can be taken.
            for number in range(1, RUNS + 1):
                await db.insert_run(run_document(number, ("raw", "lngs", "transferred")))
            calm = await seen(
                port, lambda one: one.value("caxev_ledger_reactions", state="failed") == RUNS
            )
            (disk / "more").write_bytes(bytes(DISK * 2 // 10))
            fuller = await seen(port, lambda one: free(one) < free(calm))
            mongod.members[0].signal(signal.SIGSTOP)
            try:
                hangs = await seen(port, lambda one: age(one) > IDLE / 4)
                late = await seen(port, lambda one: age(one) > IDLE)
            finally:
                mongod.members[0].signal(signal.SIGCONT)
        assert process.returncode == -signal.SIGKILL
    assert scraped(port) is None

    skew = skewed.value("caxev_clock_skew_seconds")
    assert skew is not None
    assert abs(skew - SKEW) < SKEW / 2
    played = Played()
    played.fires("CaxevClockSkew", steady(skewed), at="6m")
    played.silent("CaxevClockSkew", steady(calm), at="6m")
    played.fires("CaxevReactionsFailed", steady(calm), at="16m")
    played.fires("CaxevManyFailures", rising(fresh, calm, 60), at="2h")

    played.fires("CaxevDiskFullWithinADay", rising(calm, fuller, 60), at="60m")
    played.silent("CaxevDiskFullWithinADay", steady(calm), at="60m")

    # As it grew between two scrapes, so it goes on; an idle stream answers before that.
    minute = 60 * (age(late) - age(hangs)) / (late.at - hangs.at)
    slope = {key: f"{value}{minute:+}x60" for key, value in hangs.values.items() if key[0] == AGE}
    played.fires("CaxevStreamLate", slope, at="15m")
    played.silent("CaxevStreamLate", slope, at="5m")
    played.silent("CaxevStreamLate", steady(calm), at="15m")

    gone = {key: f"{value}x10 stale" for key, value in calm.values.items()}
    played.fires("CaxevNoListener", gone, at="15m")
    played.silent("CaxevNoListener", steady(calm), at="15m")
    played.check(tmp_path / "played.yml")
