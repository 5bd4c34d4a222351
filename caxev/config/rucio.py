"""The object ``rucio`` of a site of method ``rucio``: how the catalogue is reached and arranged.

`caxev.rucio` goes by it. The server's address is the site's ``hostname``, the account its
``rucio_account``, a proxy its ``grid_cert``. Passwords do not belong here: `RUCIO_PASSWORD` and
Rucio's own ``rucio.cfg`` have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

from attrs import Factory, evolve, field, frozen

from caxev.config.values import (
    Kind,
    check,
    expanded,
    mapped,
    match,
    matching,
    one_of,
    printable,
    whole,
)

DETECTORS: Final[Mapping[str, str]] = {"muon_veto": "mv"}
"""The short names of detectors, as cax had them."""


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

_part: Final = matching("[A-Za-z0-9][A-Za-z0-9_.-]*")


def _address(value: Any) -> tuple[str, int]:
    host, port = match("(?s)(.+):([0-9]+)", value).groups()
    return host.strip("[]"), whole(1, 65535)(int(port))


def _detectors(value: Any) -> dict[str, str]:
    return {**DETECTORS, **mapped(printable, _part)(value)}


def read_time(value: Any) -> datetime:
    """Read an ISO 8601 time, UTC if it has no offset."""
    # The author's time zone is not known; all times of runs are UTC.
    time = datetime.fromisoformat(value)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _periods(value: Any) -> tuple[Period, ...]:
    names, times = zip(*value.items(), strict=True)  # ValueError if there are none
    begins = [read_time(time) for time in times[1:]]
    # A run without a period could have no scope: the first period begins with time itself.
    check(times[0] is None and begins == sorted({*begins}))
    return tuple(map(Period, map(_part, names), (None, *begins)))


_Text = Annotated[str | None, Kind("a text", printable)]
_Path = Annotated[str | None, Kind("a path", printable)]
_Seconds = Annotated[int, Kind("a whole number of seconds", whole())]


@frozen
class Catalogue:
    """How a Rucio catalogue is reached, and how runs are named in it.

    Values that are None are taken from ``rucio.cfg``.
    """

    auth_type: Annotated[
        str | None, one_of("userpass", "x509", "x509_proxy", "gss", "ssh", "oidc")
    ] = None
    """How the client proves who it is."""
    username: _Text = None
    """The user's name, for ``userpass``."""
    auth_host: Annotated[str | None, Kind("a URL", printable)] = None
    """The address of the server for authentication; by default the site's ``hostname``."""
    ca_cert: _Path = None
    """The file with the certificates that are trusted."""
    home: _Path = None
    """The directory whose ``etc/rucio.cfg`` is read, as ``RUCIO_HOME``."""
    timeout: _Seconds = 60
    """Seconds until a request is given up."""
    ask_after: _Seconds = 60
    """Seconds until a server that is away, or a rule that is not OK, is asked again."""
    experiment: Annotated[str, Kind("a text of letters, digits, '_', '.' and '-'", _part)] = "xe1t"
    """The beginning of every scope."""
    periods: Annotated[
        tuple[Period, ...],
        Kind(
            'science runs and when each began, as {"SR000": null, "SR001": "2017-02-02 17:40"}',
            _periods,
        ),
    ] = FIRST_PERIODS
    """The science runs in the order of time, each with its first moment (UTC); by default
    XENON1T's."""
    detectors: Annotated[
        Mapping[str, str], Kind('short names of detectors, as {"muon_veto": "mv"}', _detectors)
    ] = field(default=Factory(lambda: {**DETECTORS}), hash=False)
    """Short names of detectors in scopes."""
    rules: _Path = None
    """The rule file; by default what ``rucio_transfer`` names is wanted forever."""
    messages: Annotated[
        tuple[str, int] | None, Kind('host and port, as "127.0.0.1:9201"', _address)
    ] = None
    """The address at which this site takes the messages of Rucio's daemon hermes."""

    def resolved(self, base: Path) -> Catalogue:
        """Return the same with paths below `base` if they are relative."""
        return evolve(
            self,
            ca_cert=at(base, self.ca_cert),
            home=at(base, self.home),
            rules=at(base, self.rules),
        )


def at(base: Path, path: str | None) -> str | None:
    """Return a path of sites.json as seen from the directory of that file."""
    return None if path is None else str(base / expanded(path))
