"""Run ``caxev db init`` and ``grants``: what an administrator of the database does once."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from caxev.cli.command import command, together
from caxev.cli.options import CommandGroup, as_json, example, options
from caxev.cli.output import Column, columns, show, show_json, show_lines
from caxev.cli.values import SITE
from caxev.config import ConfigError, Settings, secret

if TYPE_CHECKING:
    from caxev.database.setup import Role


@click.group(cls=CommandGroup, epilog=example("caxev db init", "caxev db grants --site lngs"))
def db() -> None:
    """Prepare the database: indexes, users and their rights."""


@command(
    "caxev db init --dry-run",
    "caxev db init --mongo-uri mongodb://admin@host/run?replicaSet=runs",
    group=db,
    name="init",
)
@click.option("--dry-run", is_flag=True, help="Show what is there and what is missing.")
def db_init(*, dry_run: bool) -> None:
    """Make the collections and indexes that listeners and commands need.

    A listener makes those of caxev's own collections at its start, if its user may. Those of
    the runs are made by this command only: commands on one run, a host or a tag are slow
    without them. It can be repeated.
    """
    made = options().with_database(lambda database: database.init(dry_run=dry_run))
    rows = [
        {
            "collection": one.collection,
            "index": one.index.name,
            "keys": one.index.words,
            "state": one.state,
            "for": one.index.serves,
        }
        for one in made
    ]
    show(_INDEXES, rows, failed=any(one.refused for one in made))


_INDEXES = columns("collection", "index", Column("keys", minor=1), "state", Column("for", minor=2))


_RIGHTS = {
    "site": "{}'s listener",
    "reader": "a reader",
    "operator": "an operator",
    "init": "caxev db init",
}
"""The rights of each kind of user, in words."""


@frozen
class Grantee:
    """Users that get rights: of a listener, of people who look or ask, or who run `db init`."""

    kind: str
    name: str

    @classmethod
    def of(cls, **given: Any) -> Grantee:
        """Take it from the options. Raises click's error."""
        chosen = [(kind, name) for kind, name in given.items() if name]
        if len(chosen) != 1:
            raise click.UsageError("give one of --site, --reader, --operator and --init")
        kind, name = chosen[0]
        taken = {"init"}
        with suppress(ConfigError):  # it is not needed for anything else
            taken |= {*options().sites()}
        # Their users would have one name, and the one made last would have its own rights only.
        if kind in {"reader", "operator"} and name in taken:
            raise click.UsageError(f"{name} is the name of another user: choose another")
        return cls(kind, "init" if kind == "init" else name)

    def role(self, settings: Settings) -> Role:
        """Return the role with these rights."""
        from caxev.database import setup

        roles = {
            "site": setup.site_role,
            "reader": setup.reader_role,
            "operator": setup.operator_role,
            "init": setup.init_role,
        }
        return roles[self.kind](settings)


@command(
    "caxev db grants --site lngs",
    "caxev db grants --site lngs --apply",
    "caxev db grants --operator shifter --apply",
    "caxev db grants --init",
    group=db,
    name="grants",
    output=as_json,
)
@together(
    "grantee",
    Grantee.of,
    click.option("--site", type=SITE, help="The site whose listener's user it is."),
    click.option("--reader", metavar="NAME", help="A person who may look."),
    click.option("--operator", metavar="NAME", help="A person who may look, and ask listeners."),
    click.option("--init", is_flag=True, help="A user that may run only caxev db init."),
)
@click.option("--x509", metavar="SUBJECT", help="A certificate's subject, instead of a password.")
@click.option("--apply", "apply_", is_flag=True, help="Create or update them.")
def db_grants(*, grantee: Grantee, x509: str | None, apply_: bool) -> None:
    """Show, or make, the role and the user of a listener or a person.

    They are made with --apply; otherwise what is printed is for mongosh. The role allows only what
    a listener does, or caxev db init; a reader may look, and an operator also request work. Give
    an administrator's --mongo-uri. The new user's password is read from NEW_PASSWORD, or from the
    file that NEW_PASSWORD_FILE names.
    """
    settings = options().settings()
    role, user = grantee.role(settings), x509 or f"{settings.prefix}{grantee.name}"
    if not apply_:
        _show_grants(role, user, x509=x509 is not None)
        return
    password = None if x509 else secret("NEW_PASSWORD")
    if password is None and x509 is None:
        raise ConfigError(
            f"there is no password for {user}: set NEW_PASSWORD_FILE to a file that holds it"
        )
    options().with_database(
        lambda database: database.grant(user, password, role, x509=x509 is not None)
    )
    rights = _RIGHTS[grantee.kind].format(grantee.name)
    row = {"user": user, "rights": rights, "database": settings.safe_uri}
    show_lines([row], "{user} has the rights of {rights} at {database}".format_map)


def _show_grants(role: Role, user: str, *, x509: bool) -> None:
    from caxev.database.setup import commands

    rows = commands(role, user, None, x509=x509)
    if options().as_json:
        show_json([{"database": name, "command": command} for name, command in rows])
        return
    for name, one in rows:
        click.echo(_in_shell(name, one))


def _in_shell(database: str, command: dict[str, Any]) -> str:
    """Return a command as mongosh takes it; it asks for a password there."""
    # A password on the screen would end up in the terminal's history.
    text = json.dumps(command, indent=2).replace('"pwd": null', '"pwd": passwordPrompt()')
    return f"db.getSiblingDB({json.dumps(database)}).runCommand({text});"
