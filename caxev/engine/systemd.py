"""Notify systemd: readiness, status, watchdog (sd_notify(3))."""

from __future__ import annotations

import os
import socket

from loguru import logger


def notify(message: str) -> None:
    """Tell systemd how we are (sd_notify(3)); nothing where it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address)
            sock.sendall(message.encode())
        except OSError as error:
            logger.debug("systemd is not told: {}", error)
