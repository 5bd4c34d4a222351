"""What a listener counts, for Prometheus. `listener` serves it if a port is given."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram, MetricsHandler

from caxev.http_server import SmallServer

changes: Final = Counter("caxev_changes_total", "Changes read from the stream", ["site"])
reactions: Final = Counter(
    "caxev_reactions_due_total", "Reactions that became due", ["site", "handler"]
)
outcomes: Final = Counter(
    "caxev_reactions_total", "Attempts at reactions", ["site", "handler", "outcome"]
)
running: Final = Gauge("caxev_running", "Reactions running now", ["site", "lane"])
gaps: Final = Counter("caxev_history_gaps_total", "Gaps of history made up by a scan", ["site"])
leading: Final = Gauge("caxev_leading", "1 while this process acts for the site", ["site"])
skew: Final = Gauge(
    "caxev_clock_skew_seconds", "How far this machine's clock is ahead of the database's", ["site"]
)
tasks: Final = Gauge("caxev_tasks", "Tasks that live in the listener", ["site"])
troubled: Final = Gauge("caxev_database_trouble", "1 while the database is unreachable", ["site"])
troubled_since: Final = Gauge(
    "caxev_database_trouble_since_seconds",
    "Since when the database is not reached, in seconds since 1970; 0 while it is",
    ["site"],
)
database_errors: Final = Counter(
    "caxev_database_errors_total", "Errors of the database that were waited out", ["site", "kind"]
)
alarms: Final = Gauge("caxev_alarms", "Active alarms", ["site"])
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


class MetricsServer(SmallServer):
    """Serves the metrics on every path. Raises OSError if the address is taken."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, MetricsHandler)
