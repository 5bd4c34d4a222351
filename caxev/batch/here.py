"""Jobs as processes of this machine (``system`` is ``local``), run in a worker process.

A job ends with its listener; the next listener runs it again.
"""

from __future__ import annotations

import fcntl

from caxev.batch.base import JobEnd, JobSpec
from caxev.batch.folder import Folder
from caxev.batch.runner import ended_by
from caxev.batch.work import BUSY, check
from caxev.core.errors import Retry


def run_here(home: str, spec: JobSpec) -> JobEnd:
    """Run a job to its end.

    Raises the errors of `check`, and `Retry` while a process of a former attempt still runs, since
    it outlives a listener that was killed. Cancellation kills the job.
    """
    folder = Folder.opened(home)
    check(spec)
    place = folder.place(spec.name)
    if place is None:
        folder.file([spec])
        place = folder.place(spec.name)
    assert place is not None
    # The job inherits the lock with its output, and holds it until its last process has ended.
    with place.file("log").open("ab", buffering=0) as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Retry(f"an earlier process of {spec.name} still runs", after=BUSY) from error
        return ended_by(folder, spec, log)
