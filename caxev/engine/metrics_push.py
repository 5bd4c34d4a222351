"""Push the metrics to a collector of OpenTelemetry, by OTLP over HTTP.

`listener` starts it if an address is given. It pushes what a scrape shows: the same registry, read
in a thread of its own. A push that fails is not repeated, since the next one has newer values of
all that it had.
"""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from itertools import pairwise
from threading import Thread
from typing import Any, Final
from urllib.parse import urlsplit

from attrs import frozen
from loguru import logger
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from caxev import __version__
from caxev.config import ConfigError
from caxev.config.settings import secret

TOKEN: Final = "CAXEV_OTLP_TOKEN"  # noqa: S105  # a variable's name
PATIENCE: Final = 10.0
"""Seconds that a collector may take to answer."""
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


@frozen
class PushAddress:
    """The collector that metrics are pushed to, every so many seconds."""

    url: str
    every: float = 60.0

    def check(self, environ: Mapping[str, str] | None = None) -> None:
        """Raise `ConfigError` unless metrics can be pushed there."""
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"metrics cannot be pushed to {self.url!r}: name an http(s) address")
        is_open = parts.scheme == "http" and parts.hostname not in _LOOPBACK
        if _token(environ) is not None and is_open:
            raise ConfigError(f"{self.url} would get {TOKEN} without TLS: name an https address")
        _messages()


def _token(environ: Mapping[str, str] | None) -> str | None:
    """Return the token for the collector. Raises `ConfigError` if no header can hold it."""
    token = secret(TOKEN, environ)
    # The error of http.client would hold it, and reach the log.
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ConfigError(f"{TOKEN} is not one line of printable ASCII")
    return token


class MetricsPush:
    """Pushes the metrics until the process ends."""

    def __init__(self, address: PushAddress, environ: Mapping[str, str] | None = None) -> None:
        self.address = address
        self.environ = environ
        self.started = time.time_ns()
        self._failed = False

    def begin(self) -> None:
        """Start to push."""
        Thread(target=self._push_for_ever, name="push", daemon=True).start()

    def _push_for_ever(self) -> None:
        while True:
            time.sleep(self.address.every)
            try:
                self.push()
            except (OSError, HTTPException, ConfigError) as error:
                # Once, not every minute: a collector may be away for days.
                level = "DEBUG" if self._failed else "WARNING"
                logger.log(level, "metrics are not pushed to {}: {}", self.address.url, error)
                self._failed = True
            else:
                self._failed = False

    def push(self) -> None:
        """Push once. Raises OSError or HTTPException if it fails, `ConfigError`."""
        headers = {"Content-Type": "application/x-protobuf", "User-Agent": f"caxev/{__version__}"}
        if (token := _token(self.environ)) is not None:
            headers["Authorization"] = f"Bearer {token}"
        body = exported(REGISTRY, self.started, time.time_ns())
        request = urllib.request.Request(self.address.url, body, headers)  # noqa: S310  # checked
        # Not followed to another address: the token is for this one.
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=PATIENCE) as answer:
            answer.read(1 << 16)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any) -> None:
        """Follow no redirection: it becomes an error."""


def exported(registry: CollectorRegistry, started: int, now: int) -> bytes:
    """Return all metrics as an export request; times in nanoseconds since 1970."""
    service, common, _ = _messages()
    request = service.ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    about = {
        "service.name": "caxev",
        "service.version": __version__,
        "service.instance.id": socket.gethostname(),
    }
    resource.resource.attributes.extend(_attributes(common, about))
    scope = resource.scope_metrics.add()
    scope.scope.name = "caxev"
    for family in registry.collect():
        if family.samples:
            _add(scope.metrics.add(), family, started, now)
    return bytes(request.SerializeToString())


def _add(metric: Any, family: Metric, started: int, now: int) -> None:
    _, common, kinds = _messages()
    metric.name, metric.description = family.name, family.documentation
    if family.type == "histogram":
        points = metric.histogram.data_points
        metric.histogram.aggregation_temporality = kinds.AGGREGATION_TEMPORALITY_CUMULATIVE
        for labels, samples in _by_labels(family.samples):
            point = points.add(start_time_unix_nano=started, time_unix_nano=now)
            point.attributes.extend(_attributes(common, labels))
            _fill(point, samples)
        return
    if family.type == "counter":
        metric.sum.is_monotonic = True
        metric.sum.aggregation_temporality = kinds.AGGREGATION_TEMPORALITY_CUMULATIVE
    points = metric.sum.data_points if family.type == "counter" else metric.gauge.data_points
    for sample in family.samples:
        # When a counter was begun; OTLP has that in each point.
        if not sample.name.endswith("_created"):
            point = points.add(start_time_unix_nano=started, time_unix_nano=now)
            point.as_double = sample.value
            point.attributes.extend(_attributes(common, sample.labels))


def _fill(point: Any, samples: list[Sample]) -> None:
    """Fill a point of a histogram: OTLP counts each bucket apart, Prometheus all below a bound."""
    below = [0.0]
    for sample in samples:
        if sample.name.endswith("_bucket"):
            below.append(sample.value)
            if sample.labels["le"] != "+Inf":
                point.explicit_bounds.append(float(sample.labels["le"]))
        elif sample.name.endswith("_sum"):
            point.sum = sample.value
        elif sample.name.endswith("_count"):
            point.count = int(sample.value)
    point.bucket_counts.extend(int(more - less) for less, more in pairwise(below))


def _by_labels(samples: Iterable[Sample]) -> Iterator[tuple[dict[str, str], list[Sample]]]:
    found: dict[frozenset[tuple[str, str]], list[Sample]] = {}
    for sample in samples:
        labels = {name: value for name, value in sample.labels.items() if name != "le"}
        found.setdefault(frozenset(labels.items()), []).append(sample)
    for key, ones in found.items():
        yield dict(key), ones


def _attributes(common: Any, labels: Mapping[str, str]) -> Iterator[Any]:
    for name, value in labels.items():
        yield common.KeyValue(key=name, value=common.AnyValue(string_value=value))


def _messages() -> tuple[Any, Any, Any]:
    """Return the modules of OTLP's messages. Raises `ConfigError` if they are not installed."""
    try:
        from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as service
        from opentelemetry.proto.common.v1 import common_pb2 as common
        from opentelemetry.proto.metrics.v1 import metrics_pb2 as kinds
    except ImportError as error:
        raise ConfigError("metrics cannot be pushed: pip install 'caxev[otlp]'") from error
    return service, common, kinds
