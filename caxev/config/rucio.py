"""The object ``rucio`` of a site of method ``rucio``: how the catalogue is reached and arranged.

`caxev.config.sites` reads it with the site, `caxev.rucio` goes by it. The server's address is
the site's ``hostname``, the account its ``rucio_account``, a proxy its ``grid_cert``. Passwords
never stand here: `RUCIO_PASSWORD` and Rucio's own ``rucio.cfg`` are for that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from attrs import Factory, evolve, field, frozen

from caxev.config.errors import Problems, read_keys

AUTH_TYPES: Final = ("userpass", "x509", "x509_proxy", "gss", "ssh", "oidc")
"""The ways in which a Rucio client proves who it is."""
DETECTORS: Final[Mapping[str, str]] = {"muon_veto": "mv"}
"""The short names of detectors, as cax had them."""
_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@frozen
class Period:
    """A science run: its name, and its first moment (UTC), None for the first of all."""

    name: str
    begins: datetime | None = None


FIRST_PERIODS: Final = (
    Period("SR000"),
    Period("SR001", datetime(2017, 2, 2, 17, 40, tzinfo=UTC)),
)
"""The science runs of XENON1T, as cax had them."""


@frozen
class Catalogue:
    """How a Rucio catalogue is reached, and how runs are named in it.

    `auth_type`, `username`, `auth_host` and `ca_cert` go before what ``rucio.cfg`` says; `home`
    is the directory whose ``etc/rucio.cfg`` counts (as ``RUCIO_HOME``). `timeout`: seconds for one
    question; `ask_after`: seconds until a server that is away is asked again, and a rule that is
    not OK is first looked at again.
    `experiment` begins every scope; `periods` are the science runs in the order of time,
    `detectors` the short names that detectors have in scopes. `rules`: the rule file, None: what
    ``rucio_transfer`` names. `messages`: the address at which Rucio's hermes is listened to.
    """

    auth_type: str | None = None
    username: str | None = None
    auth_host: str | None = None
    ca_cert: str | None = None
    home: str | None = None
    timeout: int = 60
    ask_after: int = 60
    experiment: str = "xe1t"
    periods: tuple[Period, ...] = FIRST_PERIODS
    detectors: Mapping[str, str] = field(default=Factory(lambda: {**DETECTORS}), hash=False)
    rules: str | None = None
    messages: tuple[str, int] | None = None

    def resolved(self, base: Path) -> Catalogue:
        """The same with paths below `base` where they are relative."""

        def at(path: str | None) -> str | None:
            return None if path is None else str(base / Path(path).expanduser())

        return evolve(self, ca_cert=at(self.ca_cert), home=at(self.home), rules=at(self.rules))


def _sure(fits: object) -> None:
    if not fits:
        raise ValueError


def _text(value: Any) -> str:
    _sure(isinstance(value, str) and value and value.isprintable())
    return str(value)


def _part(value: Any) -> str:
    _sure(isinstance(value, str) and _PART.fullmatch(value))
    return str(value)


def _auth_type(value: Any) -> str:
    _sure(value in AUTH_TYPES)
    return str(value)


def _seconds(value: Any) -> int:
    _sure(isinstance(value, int) and not isinstance(value, bool) and value > 0)
    return int(value)


def _address(value: Any) -> tuple[str, int]:
    _sure(isinstance(value, str))
    host, colon, port = value.rpartition(":")
    _sure(host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16)
    return host.strip("[]"), int(port)


def _detectors(value: Any) -> dict[str, str]:
    _sure(isinstance(value, dict))
    return {**DETECTORS, **{_text(name): _part(short) for name, short in value.items()}}


def _periods(value: Any) -> tuple[Period, ...]:
    """Read ``{"SR000": null, "SR001": "2017-02-02 17:40"}``: the first begins with time itself."""
    _sure(isinstance(value, dict) and value)
    periods = tuple(Period(_part(name), _time(begins)) for name, begins in value.items())
    begins = [period.begins for period in periods[1:] if period.begins is not None]
    _sure(periods[0].begins is None and len(begins) == len(periods) - 1)
    _sure(begins == sorted(set(begins)))
    return periods


def _time(value: Any) -> datetime | None:
    if value is None:
        return None
    _sure(isinstance(value, str))
    time = datetime.fromisoformat(value)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


_READ: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "auth_type": (f"one of {', '.join(AUTH_TYPES)}, or null", _auth_type),
    "username": ("a text or null", _text),
    "auth_host": ("a URL or null", _text),
    "ca_cert": ("a path or null", _text),
    "home": ("a path or null", _text),
    "timeout": ("a whole number of seconds or null", _seconds),
    "ask_after": ("a whole number of seconds or null", _seconds),
    "experiment": ("a text of letters, digits, '_', '.' and '-'", _part),
    "periods": (
        'science runs and when each began, as {"SR000": null, "SR001": "2017-02-02 17:40"}',
        _periods,
    ),
    "detectors": ('short names of detectors, as {"muon_veto": "mv"}, or null', _detectors),
    "rules": ("a path or null", _text),
    "messages": ('host and port, as "127.0.0.1:9201", or null', _address),
}


def read_catalogue(value: Any) -> Catalogue:
    """Read a site's ``rucio``.

    Raises ValueError where it is no object, `Problems` where its inner values are wrong.
    """
    if not isinstance(value, dict):
        raise ValueError  # noqa: TRY004  # what every reader of a value raises
    secrets = [key for key in value if "password" in key.lower() and not key.startswith("x_")]
    others = {key: inner for key, inner in value.items() if key not in secrets}
    known, problems = read_keys(others, _READ)
    problems += [
        f"{key!r}: a secret does not stand in this file: set RUCIO_PASSWORD" for key in secrets
    ]
    if problems:
        raise Problems(problems)
    return Catalogue(**known)
