"""Options of both `caxev listen` and `caxev work`, and the checks of a site."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from loguru import logger

from caxev.cli.command import Decorator, needs, together
from caxev.cli.options import GlobalOptions
from caxev.cli.sites import catalogue_problems, private_problems
from caxev.config import ConfigError, Sites, private_directories
from caxev.core.registry import Registry
from caxev.files import is_bare, not_private
from caxev.finite import Finite

if TYPE_CHECKING:
    from caxev.engine.metrics_push import PushAddress
    from caxev.engine.options import Options
    from caxev.metrics_server import MetricsAddress


def runs_for_years(*, lease: float, least: float, what: str) -> Decorator:
    """Add the options of a process that acts for a site, as one argument `running`."""
    return together(
        "running",
        dict,
        click.option(
            "--lease",
            "lease_time",
            type=Finite(least, 3600),
            default=lease,
            show_default=True,
            metavar="SECONDS",
            help=what,
        ),
        click.option(
            "--grace",
            type=Finite(0, 86400),
            default=10.0,
            show_default=True,
            metavar="SECONDS",
            help="How long running reactions may continue after SIGTERM.",
        ),
        *_METRICS,
    )


_METRICS = (
    click.option(
        "--metrics-port",
        type=click.IntRange(1, 65535),
        metavar="N",
        help="Serve metrics for Prometheus on this port, of loopback.",
    ),
    click.option(
        "--metrics-address",
        metavar="HOST",
        help="Serve metrics at this address; other than loopback it needs TLS and a login.",
    ),
    click.option(
        "--metrics-certificate",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Serve metrics by TLS, with this certificate (PEM).",
    ),
    click.option(
        "--metrics-key",
        type=click.Path(dir_okay=False, path_type=Path),
        help="The key of that certificate, if it is in a file of its own.",
    ),
    click.option(
        "--metrics-push",
        metavar="URL",
        help="Push metrics to this collector by OTLP: https://otel.example.org/v1/metrics",
    ),
    click.option(
        "--metrics-push-every",
        type=Finite(1, 86400),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="How often metrics are pushed.",
    ),
    needs("--metrics-address --metrics-certificate --metrics-key", "--metrics-port"),
    needs("--metrics-key", "--metrics-certificate"),
    needs("--metrics-push-every", "--metrics-push"),
)


def process_options(
    given: GlobalOptions, site: str, registry: Registry, running: dict[str, Any], **more: Any
) -> Options:
    """Return the options of a process, checked. Raises `ConfigError` if it could not run."""
    from caxev.engine.options import Options

    sites = given.sites()
    found = Options(
        site=sites.get(site),
        sites=sites,
        settings=given.settings(),
        registry=registry,
        handler_files=given.handlers,
        reread=partial(_reread, given, site),
        metrics=metrics_address(running),
        metrics_push=push_address(running),
        **running,
        **more,
    )
    check_private(site, sites)
    return found


def metrics_address(running: dict[str, Any]) -> MetricsAddress | None:
    """Take the options about metrics out of these; return where to serve them, if anywhere.

    Raises `ConfigError` if they may not be served there.
    """
    from caxev.metrics_server import LOOPBACK, Login, MetricsAddress

    names = ("port", "address", "certificate", "key")
    port, host, certificate, key = (running.pop(f"metrics_{name}") for name in names)
    if port is None:
        return None
    found = MetricsAddress(port, host or LOOPBACK, certificate, key)
    found.check(Login.load())
    return found


def push_address(running: dict[str, Any]) -> PushAddress | None:
    """Take the options about pushing out of these; return where to push, if anywhere.

    Raises `ConfigError` if metrics cannot be pushed there.
    """
    from caxev.engine.metrics_push import PushAddress

    url, every = running.pop("metrics_push"), running.pop("metrics_push_every")
    if url is None:
        return None
    found = PushAddress(url, every)
    found.check()
    return found


def check_private(site: str, sites: Sites) -> None:
    """Raise `ConfigError` if no process can run for the site.

    A disk that is not mounted is no reason: reactions that need it wait.
    """
    here = sites.get(site)
    problems = [*private_problems(here, sites, bare=False), *catalogue_problems(here, sites)]
    if problems:
        raise ConfigError("; ".join(problems))
    # At boot a process may start before its disks are mounted. It must not fail for that.
    for key, path in private_directories(here, sites):
        if is_bare(path):
            logger.warning("{}: {}; reactions that need it wait", key, not_private(path))


def _reread(given: GlobalOptions, site: str) -> Sites:
    """Read sites.json again, and check it as at the start."""
    # An error leaves the process with what it has: see the caller.
    sites = given.reread()
    check_private(site, sites)
    return sites
