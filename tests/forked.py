"""Call a function in a process of its own that has imported everything already: a fork of ours."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable


def forked(function: Callable[[], object]) -> int:
    """Call a function in a fork, which leads a session; the exit status, of a signal negative."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # we may have threads: it needs none
        child = os.fork()
    if child == 0:
        try:
            os.setsid()
            function()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # nothing of it may go on in the test's own code
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def armed(point: str) -> None:
    """In a fork: be killed at a failpoint, ``NAME:N``, that code calls by name."""
    from caxev import failpoints

    failpoints.ARMED, failpoints._AT = True, frozenset({point})  # type: ignore[misc]
