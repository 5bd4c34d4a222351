"""Notify systemd: readiness, status, watchdog (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from typing import Final

import trio
from loguru import logger

_ALIVE: Final = "WATCHDOG=1"
_unsent: Final[list[str]] = []


def notify(message: str) -> None:
    """Send a message to systemd; does nothing if the process was started otherwise.

    Never waits for systemd: the last message that could not be sent goes with the next one.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # An abstract socket: its name begins with a null byte.
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        # Inside: there may be no descriptor left, and nobody ends for that.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(address)
            sock.send("\n".join((*_unsent, message)).encode())
            _unsent.clear()
    except OSError as error:
        if message != _ALIVE:
            _unsent[:] = [message]
        logger.debug("systemd is not notified: {}", error)


async def keep_watchdog(every: float) -> None:
    """Report to systemd that this process is alive, until cancelled.

    Also while the database is unreachable: a restart would only cut transfers short.
    """
    while True:
        notify(_ALIVE)
        await trio.sleep(every)
