"""Metrics that are pushed to a collector of OpenTelemetry."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from caxev import metrics
from caxev.config import ConfigError
from caxev.engine.metrics_push import MetricsPush, PushAddress
from caxev.http_server import Quiet, SmallServer
from caxev.testing.mongod import start_with_us
from tests import engine
from tests.conftest import Database as Named


class Collector(SmallServer):
    """A collector of OpenTelemetry: takes metrics by OTLP over HTTP."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.taken: list[tuple[str | None, Any]] = []
        super().__init__(("127.0.0.1", 0), _Taking)


class _Taking(Quiet):
    server: Collector

    def do_POST(self) -> None:  # noqa: N802  # the base's own name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/x-protobuf"
        request = ExportMetricsServiceRequest.FromString(body)
        self.server.taken.append((self.headers["Authorization"], request))
        self.send_response(self.server.status)
        self.send_header("Location", url_of(self.server))
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    server.begin()
    yield server
    server.close()


def url_of(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1/metrics"


def pushed(request: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], Any]:
    """The points of a request, by name and labels."""
    (resource,) = request.resource_metrics
    (scope,) = resource.scope_metrics
    return {
        (
            metric.name,
            frozenset((one.key, one.value.string_value) for one in point.attributes),
        ): point
        for metric in scope.metrics
        for point in getattr(metric, metric.WhichOneof("data")).data_points
    }


def test_metrics_are_pushed_as_they_are(tmp_path: Path, collector: Collector) -> None:
    """Counters grow, gauges stand, histograms count each bucket apart; with the token."""
    metrics.changes.labels("otlp").inc(3)
    metrics.leading.labels("otlp").set(1)
    for seconds in (0.003, 0.015, 0.016, 9999.0):
        metrics.latency.labels("otlp").observe(seconds)
    token = tmp_path / "token"
    token.write_text("of a push\n")
    environ = {"CAXEV_OTLP_TOKEN_FILE": str(token)}
    MetricsPush(PushAddress(url_of(collector)), environ).push()
    ((header, request),) = collector.taken
    assert header == "Bearer of a push"
    found, labels = pushed(request), frozenset({("site", "otlp")})
    assert found["caxev_changes", labels].as_double == 3
    assert found["caxev_leading", labels].as_double == 1
    point = found["caxev_latency_seconds", labels]
    assert (point.count, sum(point.bucket_counts)) == (4, 4)
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    counts = dict(zip([*point.explicit_bounds, math.inf], point.bucket_counts, strict=True))
    assert {bound for bound, count in counts.items() if count} == {0.005, 0.02, math.inf}
    assert counts[0.02] == 2
    kinds = {one.name: one for one in request.resource_metrics[0].scope_metrics[0].metrics}
    assert kinds["caxev_changes"].sum.is_monotonic
    assert kinds["caxev_leading"].WhichOneof("data") == "gauge"


@pytest.mark.parametrize("token", ["of\na push", "of a p\xfcsh"])
def test_a_token_that_no_header_holds_is_not_repeated(collector: Collector, token: str) -> None:
    """The library's error would hold it, and end the thread that pushes."""
    push = MetricsPush(PushAddress(url_of(collector)), {"CAXEV_OTLP_TOKEN": token})
    for ask in (push.push, lambda: push.address.check(push.environ)):
        with pytest.raises(ConfigError, match="CAXEV_OTLP_TOKEN") as raised:
            ask()
        assert token not in str(raised.value)


@pytest.mark.parametrize("status", [302, 401, 503])
def test_a_push_that_is_refused_is_an_error(collector: Collector, status: int) -> None:
    """And no redirection is followed."""
    collector.status = status
    with pytest.raises(OSError, match=str(status)):
        MetricsPush(PushAddress(url_of(collector)), {}).push()
    assert len(collector.taken) == 1


@pytest.mark.parametrize(
    ("url", "why"), [("ftp://x/", "http"), ("/v1", "http"), ("http://otel.example.org/", "TLS")]
)
def test_where_metrics_cannot_be_pushed(url: str, why: str) -> None:
    """A token goes by TLS only, but on this machine."""
    with pytest.raises(ConfigError, match=why):
        PushAddress(url).check({"CAXEV_OTLP_TOKEN": "x"})
    PushAddress("http://127.0.0.1:4318/v1/metrics").check({"CAXEV_OTLP_TOKEN": "x"})
    PushAddress("http://otel.example.org/v1/metrics").check({})


@pytest.mark.replicaset
async def test_a_listener_pushes(database: Named, tmp_path: Path, collector: Collector) -> None:
    """By its own process, as long as it runs."""
    sites = tmp_path / "sites.json"
    sites.write_text('[{"name": "lngs"}]')
    where = {"CAXEV_MONGO_URI": database.uri, "CAXEV_DATABASE": database.name}
    environ = {**os.environ, **where, "CAXEV_SITES": str(sites)}

    def leads() -> bool:
        key = ("caxev_leading", frozenset({("site", "lngs")}))
        found = [pushed(request).get(key) for _, request in collector.taken]
        return any(one is not None and one.as_double == 1 for one in found)

    with listener(environ, tmp_path / "log", "--metrics-push", url_of(collector)):
        await engine.until(leads)


@contextmanager
def listener(environ: dict[str, str], log: Path, *words: str) -> Iterator[None]:
    command = [sys.executable, "-m", "caxev", "listen", "--site", "lngs", *words]
    command += ["--metrics-push-every", "1"]
    with log.open("wb") as file:
        process = start_with_us(command, env=environ, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.terminate()
        process.wait()
