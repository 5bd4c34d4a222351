"""The address of the database and the user: from the environment and the command line.

Secrets are never in a file of ours, in ``argv`` or in a message. `secret` looks for them in the
environment, in a file that the environment names, and among systemd's credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote_plus, unquote_plus

from attrs import evolve, field, frozen

from caxev.config.values import expanded
from caxev.core.errors import ConfigError
from caxev.limited import SECRET, read_limited

URI: Final = "CAXEV_MONGO_URI"
OPERATOR_URI: Final = "CAXEV_MONGO_OPERATOR_URI"
EXAMPLE: Final = "mongodb://user@host1,host2:27017/run?replicaSet=runs"
PASSWORDLESS: Final = ("mongodb-x509", "mongodb-aws", "mongodb-oidc", "gssapi")
HISTORY_DAYS: Final = 730.0
"""Days for which history is kept, unless CAXEV_HISTORY_DAYS is set."""
LONGEST: Final = 36500
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]\s]+)(:(?P<port>[0-9]+))?")
_SECRET: Final = re.compile(
    r"(.*_)?(PASSWORD|TOKEN|SECRET|KEY)(_FILE)?"
    r"|CAXEV_(MONGO_URI|MONGO_OPERATOR_URI|MONGO_USER|SLACK_URL(_FILE)?)|CREDENTIALS_DIRECTORY"
)
"""Names of variables that hold secrets, or the places of secrets."""
# Anything else must be percent-encoded: the driver would split the address at another place.
_QUOTED: Final = re.compile(r"([^%:@/\s]|%[0-9A-Fa-f]{2})*")


def secret(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return a secret by its name, such as ``MONGO_PASSWORD``; None if there is none.

    It is looked for in the variable of that name, in the file that ``<name>_FILE`` names, and in
    systemd's credential of the name in lower case. Raises `ConfigError` if a file that is named
    cannot be read.
    """
    environ = os.environ if environ is None else environ
    if environ.get(name):
        return environ[name]
    if environ.get(f"{name}_FILE"):
        return _read(expanded(environ[f"{name}_FILE"]), f"{name}_FILE")
    if environ.get("CREDENTIALS_DIRECTORY"):
        # systemd's names of credentials are lower case by custom; the directory may hold others.
        credential = Path(environ["CREDENTIALS_DIRECTORY"]) / name.lower()
        return _read(credential, "systemd credential") if credential.exists() else None
    return None


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a program that is not ours: without caxev's secrets. Pure.

    Left out are passwords, tokens, secrets and keys by their names, and the places of such.
    """
    return {name: value for name, value in environ.items() if not _SECRET.fullmatch(name)}


def _read(path: Path, what: str) -> str:
    try:
        value = read_limited(path, SECRET).decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        message = f"{what} {path} cannot be read: {why}"
        raise ConfigError(message) from None  # a decoding error holds the secret
    if not value:
        raise ConfigError(f"{what} {path} is empty: write the secret into it")
    return value


class Address(NamedTuple):
    """The parts of a database's address, percent-encoded."""

    scheme: str
    user: str | None
    password: str | None
    hosts: str
    rest: str

    @classmethod
    def of(cls, uri: str) -> Address:
        """Take an address apart. Raises `ConfigError`, which does not show the address."""
        scheme, found, tail = uri.strip().partition("://")
        if not found or scheme not in {"mongodb", "mongodb+srv"}:
            raise _bad("it does not begin with mongodb:// or mongodb+srv://")
        authority, rest = _cut(tail)
        login, at, hosts = authority.rpartition("@")
        user, colon, password = login.partition(":")
        address = cls(scheme, user if at else None, password if colon else None, hosts, rest)
        address.check()
        return address

    def check(self) -> None:
        """Raise `ConfigError` if a part is not usable."""
        # A / or ? in a password that is not encoded ends the hosts too early: the @ is in the rest.
        login_cut = "@" in (self.rest if self.user is None else self.rest.partition("?")[0])
        if login_cut or not self._login_is_quoted():
            raise _bad("its user and password must be percent-encoded (@ is %40, : is %3A)")
        if self.user == "":
            raise _bad("there is no user before the @")
        if not all(_is_host(host) for host in self.hosts.split(",")):
            raise _bad("its hosts must be HOST or HOST:PORT, with commas between them")

    def _login_is_quoted(self) -> bool:
        given = (self.user or "", self.password or "")
        return all(_QUOTED.fullmatch(part) or part == "%s" for part in given)

    @property
    def needs_password(self) -> bool:
        mechanism = re.search(r"[?&]authmechanism=([^&]*)", self.rest.lower())
        if self.user is None or (mechanism and mechanism[1] in PASSWORDLESS):
            return False
        return self.password in {None, "", "%s"}  # %s: as cax wrote it

    def __str__(self) -> str:
        login = "" if self.user is None else self.user
        if self.password is not None:
            login += f":{self.password}"
        return f"{self.scheme}://{login}{'@' if login else ''}{self.hosts}{self.rest}"

    @property
    def safe(self) -> str:
        """The address without password and options, for messages."""
        user = f"{unquote_plus(self.user)}@" if self.user else ""
        return f"{self.scheme}://{user}{self.hosts}{self.rest.partition('?')[0].rstrip('/')}"


def _cut(tail: str) -> tuple[str, str]:
    end = re.search(r"[/?]", tail)
    return (tail, "") if end is None else (tail[: end.start()], tail[end.start() :])


def _is_host(host: str) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and (match["port"] is None or 0 < int(match["port"]) < 2**16)


def _bad(why: str) -> ConfigError:
    return ConfigError(
        f"the database's address ({URI} or --mongo-uri) is not usable: {why}; "
        f"it should look like {EXAMPLE}"
    )


def _uri(value: str) -> str:
    return str(Address.of(value))


@frozen
class Settings:
    """How to reach the runs database, and what it is called there.

    `mongo_uri` holds the password and is kept out of ``repr``; `safe_uri` is for messages.
    `prefix` begins the names of caxev's own collections in that database. `history_days` is how
    long what this process adds to the history is kept; 0: forever. `source` loads the settings
    again. Raises `ConfigError` if a value is not usable.
    """

    mongo_uri: str = field(repr=False, converter=_uri)
    database: str = field(default="run")
    collection: str = field(default="runs_new")
    prefix: str = "caxev_"
    history_days: float = field(default=HISTORY_DAYS)
    source: Callable[[], Settings] | None = field(default=None, eq=False, repr=False)

    @database.validator
    def _check_database(self, _attribute: object, value: str) -> None:
        length = len(_utf8("CAXEV_DATABASE or --database", value))
        if not value or length > 63 or re.search(r'[\s/\\."$*<>:|?\0]', value):  # noqa: PLR2004  # MongoDB's limit
            raise ConfigError(
                f"CAXEV_DATABASE or --database is {value!r}: "
                "a database's name has no dots, slashes or spaces"
            )

    @collection.validator
    def _check_collection(self, _attribute: object, value: str) -> None:
        _utf8("CAXEV_COLLECTION or --collection", value)
        if not value or value.startswith(("system.", ".")) or re.search(r"[$\0]", value):
            raise ConfigError(
                f"CAXEV_COLLECTION or --collection is {value!r}: "
                "a collection's name has no $ and does not begin with 'system.'"
            )

    @history_days.validator
    def _check_history_days(self, _attribute: object, value: float) -> None:
        if not 0 <= value <= LONGEST:
            raise ConfigError(
                f"CAXEV_HISTORY_DAYS is {value:g}: give days, 0 (forever) to {LONGEST}"
            )

    @classmethod
    def load(
        cls,
        *,
        mongo_uri: str | None = None,
        database: str | None = None,
        collection: str | None = None,
        environ: Mapping[str, str] | None = None,
        password: str = "MONGO_PASSWORD",  # noqa: S107  # a variable's name
    ) -> Settings:
        """Make settings of arguments, or else environment variables, or else defaults.

        A user without a password gets the one that `secret` finds under the name `password`;
        ``CAXEV_MONGO_USER`` is the user if the address names none.
        """
        environ = os.environ if environ is None else environ
        uri = mongo_uri or environ.get(URI)
        if not uri:
            raise ConfigError(f"no database is named: set {URI} or give --mongo-uri {EXAMPLE}")
        return cls(
            mongo_uri=str(_with_login(Address.of(uri), environ, password)),
            database=database or environ.get("CAXEV_DATABASE") or "run",
            collection=collection or environ.get("CAXEV_COLLECTION") or "runs_new",
            history_days=_days(environ.get("CAXEV_HISTORY_DAYS")),
            source=lambda: cls.load(
                mongo_uri=mongo_uri,
                database=database,
                collection=collection,
                environ=environ,
                password=password,
            ),
        )

    @classmethod
    def of_operators(
        cls, *, database: str | None, collection: str | None, environ: Mapping[str, str]
    ) -> Settings:
        """Make settings of the address with an operator's user, beside another's."""
        if not environ.get(OPERATOR_URI):
            raise ConfigError(f"no operator's user is named: set {OPERATOR_URI} to {EXAMPLE}")
        return cls.load(
            mongo_uri=environ[OPERATOR_URI],
            database=database,
            collection=collection,
            environ={name: one for name, one in environ.items() if name != "CAXEV_MONGO_USER"},
            password="MONGO_OPERATOR_PASSWORD",  # noqa: S106  # a variable's name
        )

    def again(self) -> Settings:
        """Load them again, as a password file may have changed. Raises `ConfigError`."""
        return self if self.source is None else evolve(self.source(), prefix=self.prefix)

    @property
    def safe_uri(self) -> str:
        """The address without password and options, for messages."""
        return Address.of(self.mongo_uri).safe


def _utf8(what: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} is {value!r}, which is not UTF-8") from None


def _days(value: str | None) -> float:
    try:
        return float(value) if value else HISTORY_DAYS
    except ValueError:
        raise ConfigError(f"CAXEV_HISTORY_DAYS is {value!r}: it is a number of days") from None


def _with_login(address: Address, environ: Mapping[str, str], name: str) -> Address:
    user = environ.get("CAXEV_MONGO_USER")
    if address.user is None and user:
        address = address._replace(user=quote_plus(user))
    if not address.needs_password:
        return address
    password = secret(name, environ)
    if password is None:
        raise ConfigError(
            f"there is no password for {address.safe}: set {name}, or {name}_FILE "
            f"to a file that holds it, or give systemd credential {name.lower()}"
        )
    return address._replace(password=quote_plus(password))
