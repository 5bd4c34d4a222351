"""Run ``caxev web``: serve the page that shows all sites and runs, live."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caxev.cli import timeline
from caxev.cli.command import command, needs, together
from caxev.cli.handlers import handlers_by_site
from caxev.cli.options import GlobalOptions, as_text, options
from caxev.cli.output import print_line
from caxev.cli.web_login import LoginChoice, logs_in, public_address
from caxev.config import ConfigError

if TYPE_CHECKING:
    from caxev.web.acts.pages import ActingOptions


@command(
    "caxev web",
    "caxev web --port 9000",
    "caxev web --auth link --operator",
    "caxev web --host 0.0.0.0 --name caxev.example.org --certificate cert.pem --key key.pem",
    output=as_text,
    log=None,
)
@needs("--certificate", "--key")
@needs("--key", "--certificate")
@together(
    "served",
    dict,
    click.option(
        "--host", default="127.0.0.1", show_default=True, help="The address to listen on."
    ),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8765,
        show_default=True,
        help="The port; 0: any that is free.",
    ),
    click.option(
        "--name",
        "names",
        multiple=True,
        metavar="NAME",
        help="A name under which browsers ask for the page, as behind a proxy; may be repeated.",
    ),
    click.option(
        "--address",
        callback=public_address,
        metavar="URL",
        help="How browsers reach the page behind a proxy: https://caxev.example.org",
    ),
    click.option(
        "--certificate",
        type=click.Path(exists=True, path_type=Path),
        help="Serve by TLS, with this certificate (PEM).",
    ),
    click.option(
        "--key", type=click.Path(exists=True, path_type=Path), help="The certificate's key."
    ),
)
@logs_in()
@click.option(
    "--operator",
    is_flag=True,
    help="Let those of --operator-group act, by the database user of CAXEV_MONGO_OPERATOR_URI.",
)
def web(*, served: Mapping[str, Any], login: LoginChoice, operator: bool) -> None:
    """Serve the page: all sites and runs, live, in a browser.

    It shows whether anybody has to act, what moves, what failed and why. It reads the database, and
    writes nothing unless operators act. Without options only this machine reaches it.

    With --auth proxy a proxy names the people who log in (--trust, --user-header), with --auth oidc
    a provider of OpenID Connect does (--issuer, --client-id, CAXEV_OIDC_CLIENT_SECRET_FILE). With
    --operator, members of --operator-group retry, copy, hold, verify, delete and so on in their own
    name. With --auth link only you can, on this machine, by the link that is printed.

    It needs `pip install 'caxev[web]'`.
    """
    given = options()
    given.log("info", lasting=True)
    login.check(served["host"])
    from caxev import database

    try:
        from caxev.web import server
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"the page needs the package {missing.name}: pip install 'caxev[web]'"
        ) from missing
    entered = login.options()
    entrance = entered.entrance if entered is not None else ""
    serving = server.PageOptions(
        settings=given.settings(),
        sites=given.sites(),
        history=timeline.rows,
        handlers=handlers_by_site(given.handlers, given.sites()),
        reread=lambda: (given.reread(), handlers_by_site(given.handlers, given.sites())),
        login=entered,
        acting=_acting(given) if operator else None,
        **served,
        started=lambda address: print_line(f"the page is at {address}{entrance}"),
    )
    database.run(server.serve, serving)


def _acting(given: GlobalOptions) -> ActingOptions:
    from caxev.web.acts.pages import ActingOptions

    for site in given.sites().values():
        # Loaded now, so that the first act does not wait for it, and with it all pages.
        with suppress(ConfigError):
            given.registry(site.name)
    return ActingOptions(given.operator_settings(), given.registry)
