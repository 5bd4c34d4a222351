"""The counters of a listener, for Prometheus. `metrics_server` serves it if a port is given.

Counters and histograms are moved on when something ends. All that describes a state (`STATES`,
`COPIES`) is looked up when somebody asks for it, by whoever registered with `Sampled.source`, so
that it costs nothing meanwhile. Every label has few values: handlers, lanes, sites, directories and
reasons, but no run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from attrs import define, field
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from caxev.core.reasons import FAILURES

changes: Final = Counter("caxev_changes_total", "Changes read from the stream", ["site"])
reactions: Final = Counter(
    "caxev_reactions_due_total", "Reactions that became due", ["site", "handler"]
)
outcomes: Final = Counter(
    "caxev_reactions_total", "Attempts at reactions", ["site", "handler", "outcome"]
)
attempt_seconds: Final = Histogram(
    "caxev_attempt_seconds",
    "How long attempts at reactions took",
    ["site", "handler"],
    buckets=(0.01, 0.1, 1, 10, 60, 600, 3600, 21600),
)
failures: Final = Counter(
    "caxev_failures_total",
    "Attempts that failed, whether or not they are repeated",
    ["site", "handler", "reason"],
)
link_bytes: Final = Counter(
    "caxev_link_bytes_total",
    "Bytes sent over the link to or from another site, by transfers that were completed",
    ["site", "peer", "handler"],
)
link_seconds: Final = Counter(
    "caxev_link_seconds_total",
    "Seconds for which links to other sites were used",
    ["site", "peer", "handler"],
)
link_attempts: Final = Counter(
    "caxev_link_attempts_total",
    "Transfers and readings over the link to another site; `reason` is `done` or why it failed",
    ["site", "peer", "handler", "reason"],
)
gaps: Final = Counter("caxev_history_gaps_total", "Gaps of history made up by a scan", ["site"])
leading: Final = Gauge("caxev_leading", "1 while this process acts for the site", ["site"])
helping: Final = Gauge("caxev_helping", "1 while this process helps the listener", ["site"])
skew: Final = Gauge(
    "caxev_clock_skew_seconds", "How far this machine's clock is ahead of the database's", ["site"]
)
tasks: Final = Gauge("caxev_tasks", "Tasks that live in the listener", ["site"])
troubled: Final = Gauge("caxev_database_trouble", "1 while the database is unreachable", ["site"])
troubled_since: Final = Gauge(
    "caxev_database_trouble_since_timestamp_seconds",
    "Since when the database is not reached, in seconds since 1970; 0 while it is",
    ["site"],
)
database_errors: Final = Counter(
    "caxev_database_errors_total", "Errors of the database that were waited out", ["site", "kind"]
)
undelivered: Final = Gauge(
    "caxev_alarms_undelivered", "Alarms that a sink did not take", ["site", "sink"]
)
latency: Final = Histogram(
    "caxev_latency_seconds",
    "From a change to the start of its handler",
    ["site"],
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5, 30, 300, 3600),
)
patrolled: Final = Counter("caxev_patrol_bytes_total", "Bytes read again by the patrol", ["site"])
rotten: Final = Counter(
    "caxev_patrol_failures_total", "Copies that the patrol could not read or found bad", ["site"]
)


def begin(site: str, handlers: Iterable[str]) -> None:
    """Show what is counted at a site from 0 on.

    To Prometheus a series that begins at 12 has not risen: it would miss the first failures.
    """
    for counter in (changes, gaps):
        counter.labels(site)
    for handler in handlers:
        attempt_seconds.labels(site, handler)
        for why in FAILURES:
            failures.labels(site, handler, why)


# -- what is looked up when it is asked for -------------------------------------------------------

Samples = Mapping[str, Mapping[tuple[str, ...], float]]
"""By a metric's name, the value for each set of labels, in the order of the metric."""


@define(eq=False)
class Sampled(Collector):
    """Metrics that are looked up at each scrape. `families` has the help and labels of each."""

    families: Mapping[str, tuple[str, Sequence[str]]]
    _sources: dict[object, Callable[[], Samples]] = field(init=False, factory=dict)

    @contextmanager
    def source(self, look_up: Callable[[], Samples]) -> Iterator[None]:
        """Ask `look_up` at each scrape while the block lasts. It is called in another thread."""
        key = object()
        self._sources[key] = look_up
        try:
            yield
        finally:
            del self._sources[key]

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Return all metrics without values."""
        return self._filled([])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Ask all sources, and return the metrics with their values."""
        return self._filled([look_up() for look_up in tuple(self._sources.values())])

    def _filled(self, found: Sequence[Samples]) -> Iterator[GaugeMetricFamily]:
        for name, (help_text, labels) in self.families.items():
            family = GaugeMetricFamily(name, help_text, labels=labels)
            for samples in found:
                for values, value in samples.get(name, {}).items():
                    family.add_metric(values, value)
            yield family


STATES: Final = Sampled(
    {
        "caxev_build_info": ("1, with the versions of this process", ("version", "python")),
        "caxev_configuration_info": (
            "1, with the digests of sites.json and of the handlers that a site uses",
            ("site", "configuration", "handlers"),
        ),
        "caxev_ledger_reactions": (
            "Reactions in the ledger: due, waiting (due later) or failed",
            ("site", "lane", "state"),
        ),
        "caxev_ledger_oldest_seconds": (
            "For how long the oldest of these reactions has been due",
            ("site", "lane", "state"),
        ),
        "caxev_reactions_running": ("Reactions that are claimed now", ("site", "lane")),
        "caxev_lane_workers": ("Reactions of a lane that can run at once", ("site", "lane")),
        "caxev_stream_age_seconds": ("Since when the change stream has not answered", ("site",)),
        "caxev_stream_lag_seconds": ("How old the changes are that are recorded now", ("site",)),
        "caxev_collection_documents": (
            "Documents in one of caxev's collections, of all sites",
            ("site", "collection"),
        ),
        "caxev_collection_bytes": (
            "Size of one of caxev's collections, uncompressed",
            ("site", "collection"),
        ),
        "caxev_directory_free_bytes": (
            "Bytes that can still be written to a directory's file system",
            ("site", "directory"),
        ),
        "caxev_directory_size_bytes": (
            "Bytes that a directory's file system can hold",
            ("site", "directory"),
        ),
        "caxev_directory_away": ("1 while a directory's disk is missing", ("site", "directory")),
        "caxev_open_files": ("Files and connections that are open", ("site",)),
        "caxev_open_files_allowed": ("Files and connections that may be open", ("site",)),
        "caxev_alarms": ("Active alarms", ("site", "severity")),
        "caxev_helper_running": (
            "Reactions that the helpers on a host have claimed now",
            ("site", "host", "lane"),
        ),
        "caxev_helper_joined_timestamp_seconds": (
            "When the first of the helpers on a host joined, in seconds since 1970",
            ("site", "host"),
        ),
        "caxev_helper_seen_seconds": (
            "For how long a helper on a host has not renewed its lease",
            ("site", "host"),
        ),
    }
)
REGISTRY.register(STATES)

COPIES: Final = Sampled(
    {
        "caxev_copies": ("Copies of all runs at all sites", ("host", "type", "status")),
        "caxev_copies_bytes": ("Size of the copies that have one", ("host", "type", "status")),
        "caxev_jobs": ("Jobs of unfinished copies by state", ("host", "type", "state")),
    }
)
COPIES_REGISTRY: Final = CollectorRegistry()
"""Apart from all others: to count the copies of all runs takes the database some time."""
COPIES_REGISTRY.register(COPIES)
