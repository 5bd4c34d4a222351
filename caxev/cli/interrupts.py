"""Ctrl-C during long work in a thread of a command."""

from __future__ import annotations

from contextlib import suppress

import trio


def stop_if_interrupted(*_: object) -> None:
    """Raise what ends the command that waits for this thread, such as KeyboardInterrupt.

    Long work in a thread that trio started calls it again and again, as its `report` for example:
    trio waits for such a thread in any case. In any other thread it does nothing.
    """
    with suppress(RuntimeError):
        trio.from_thread.check_cancelled()
