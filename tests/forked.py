"""Call a function in a process of its own that has imported everything already: a fork of ours.

`Forked` is a command in such a process. It takes a tenth of the processor time of one that starts
anew. What the test has replaced is replaced there, too.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio
from loguru import logger

from caxev.__main__ import main
from caxev.core.registry import recorded


def forked(function: Callable[[], object]) -> int:
    """Call a function in a fork, which leads a session; the exit status, of a signal negative."""
    child = _fork()
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


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # we may have threads: it needs none
        return os.fork()


def armed(point: str) -> None:
    """In a fork: be killed at a failpoint, ``NAME:N``, that code calls by name."""
    from caxev import failpoints

    failpoints.ARMED, failpoints._AT = True, frozenset({point})  # type: ignore[misc]


class Forked(subprocess.Popen[Any]):
    """As `subprocess.Popen` of ``python -m caxev``, with its arguments and its environment."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], **streams: Any) -> None:
        super().__init__(["caxev", *args], env=env, **streams)

    def _execute_child(self, args: Sequence[str], *given: Any) -> None:
        # As the base class hands them on: the environment, then both ends of each pipe.
        environ, (stdin, _, _, stdout, _, stderr) = given[5], given[9:15]
        self.pid = _fork()
        if self.pid == 0:
            _run(args, environ, (stdin, stdout, stderr))
        self._child_created = True
        self._close_pipe_fds(*given[9:15])  # type: ignore[attr-defined]


def _run(args: Sequence[str], environ: Mapping[str, str], streams: Sequence[int]) -> None:
    code: object = 70
    try:
        for number, one in enumerate(streams):
            if one != -1:
                os.dup2(one, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.argv[:] = args
        sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
        os.environ.clear()
        os.environ.update(environ)
        _forget()
        contextvars.Context().run(main)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  # nothing of it may go on in the test's own code
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(code if isinstance(code, int) else int(code is not None))


def _forget() -> None:
    """Leave the event loops of the test, and what it has recorded and logs."""
    gc.freeze()  # else a collection would copy the memory that we share with the test
    vars(trio._core._run.GLOBAL_RUN_CONTEXT).clear()
    asyncio._set_running_loop(None)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    recorded[:] = [one for one in recorded if one.module.startswith("caxev.handlers.")]
    logger.remove()
    logging.root.handlers.clear()  # pytest's, whose files are closed here
