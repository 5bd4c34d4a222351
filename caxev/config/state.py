"""The directories in which nobody but a site's listener may write.

Other sites may write in a site's data directories, so nothing that is trusted, followed or executed
lies there. Jobs, logs, files that come back from tape to be compared and the output of foreign
programs lie in the site's state directory. `caxev.files.private` makes and checks it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Final

from caxev.config.sites import Site, Sites, archive_between

# A site's name may hold anything; as a directory's it must be one visible component of a path.
_UNPLAIN: Final = re.compile(r"^\.+|[^A-Za-z0-9+_.-]")


def state_directory(site: Site, environ: Mapping[str, str] | None = None) -> str:
    """Return the site's state directory: below ``state`` of sites.json, or by the environment.

    In the environment it is ``CAXEV_STATE``, systemd's ``STATE_DIRECTORY``, or the user's own
    directory for state.
    """
    environ = os.environ if environ is None else environ
    systemd = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    home = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111  # kept as text
    return _below(site.state or environ.get("CAXEV_STATE") or systemd or f"{home}/caxev", site)


def jobs_directory(site: Site, kind: str) -> str:
    """Return the directory in which jobs that make data of that type keep their files.

    The nodes of a batch system must see it.
    """
    how = {"processed": site.processing, "minitrees": site.minitrees}[kind]
    if how is not None and how.directory is not None:
        return f"{_below(how.directory, site)}/{kind}"
    return f"{state_directory(site)}/jobs/{kind}"


def private_directories(site: Site, sites: Sites) -> Iterator[tuple[str, str]]:
    """Yield each directory in which only this site's listener may write, after its key."""
    yield "state", state_directory(site)
    for key, how in (("processing", site.processing), ("minitrees", site.minitrees)):
        if how is not None and how.directory is not None:
            yield f"{key}: directory", _below(how.directory, site)
    if site.dir_tsm is not None:
        yield "dir_tsm", site.dir_tsm
    places = (archive_between(site, there).scratch for there in sites.values())
    for path in sorted({place for place in places if place is not None}):
        yield "archive: scratch", path


def _below(base: str, site: Site) -> str:
    """Return the site's own directory in one that several sites may be given."""
    return f"{base.rstrip('/')}/{_UNPLAIN.sub('_', site.name)}"
