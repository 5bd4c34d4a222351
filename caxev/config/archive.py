"""How a tape archive is reached: ``archive`` of a site's entry in sites.json.

`archive_between` gives the outcome to `caxev.tape`. Options for everyone are in the entry of the
tape site. Options of one machine, such as the client's option file, are in the entry of its site;
they override the others. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from attrs import evolve, field, frozen

from caxev.config.values import (
    Duration,
    Kind,
    absolute,
    check,
    filled,
    listed,
    mapped,
    matching,
    printable,
)

ARCHIVES: Final = "caxev.tape"
"""The entry point group in which others name archives of their own; see `caxev.tape`."""
PATIENCE: Final = 6 * 3600.0


def _word(value: Any) -> str:
    check(not any(map(str.isspace, printable(value))))
    return str(value)


def _path(value: Any) -> str:
    return str(absolute()(printable(value)))


# The client's output must stay in the language that is parsed.
_VARIABLE: Final = matching("(?!(LC_ALL|LANG|LANGUAGE)$)[A-Za-z_][A-Za-z0-9_]*")
_Path = Annotated[str, Kind("an absolute path", _path)]


@frozen
class ArchiveOptions:
    """How the client of a tape system is run. None: the other site's options decide."""

    command: Annotated[
        tuple[str, ...] | None, Kind('a list of words, as ["dsmc"]', listed(printable, 1))
    ] = None
    """The words that start the client; by default ``["dsmc"]``."""
    server: Annotated[str | None, Kind("a name without spaces", _word)] = None
    """The client's option ``-servername``."""
    optfile: _Path | None = None
    """The client's option ``-optfile``."""
    scratch: _Path | None = None
    """The directory to which copies are restored, to be compared or to come back. Nobody else may
    write there. By default ``.caxev-restored`` in ``dir_tsm``, or else below ``state``."""
    environment: Annotated[
        Mapping[str, str],
        Kind("texts by the names of variables (not LANG or LC_ALL)", mapped(_VARIABLE, printable)),
    ] = field(factory=dict, hash=False)
    """Variables for the client, as ``{"DSM_DIR": "/opt/tivoli/tsm/client/ba/bin"}``. Those that
    either site names are set."""
    patience: Duration | None = None
    """After this time without a sign of life (no line, no byte read or written) the client is
    killed and tried again; by default ``6h``. A tape may have to be fetched."""

    def over(self, other: ArchiveOptions) -> ArchiveOptions:
        """These options, and the other's for those that are None here."""
        both = {**other.environment, **self.environment}
        return filled(evolve(self, environment=both), other)
