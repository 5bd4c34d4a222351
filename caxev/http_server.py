"""A small HTTP server that no sender can exhaust: few connections, each for a short time.

`rucio.messages` takes a catalogue's messages by it, `listener` serves metrics. What is beyond the
limits is let go at once, so that idle or slow senders take neither memory nor descriptors from
transfers.
"""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from time import monotonic
from typing import Any, Final

from loguru import logger

MOST: Final = 8
"""Connections that are served at once."""
PATIENCE: Final = 30.0
"""Seconds in which a request must have come and been answered."""


class SmallServer(ThreadingHTTPServer):
    """Serves one address, in threads of its own. Use `begin`, and `close` at the end."""

    daemon_threads = True
    block_on_close = False
    patience = PATIENCE

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._since: dict[Any, float] = {}
        self._guard = Lock()
        super().__init__(address, handler)

    def begin(self) -> None:
        """Serve from now on."""
        Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        """Serve nobody any more."""
        self.shutdown()
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection."""
        with self._guard:
            if len(self._since) >= MOST:
                logger.debug("{} is let go: {} connections are served", client_address, MOST)
                return False
            self._since[request] = monotonic()
            return True

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, which makes room for another."""
        with self._guard:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Let those go that take too long; called ten times a second."""
        limit = monotonic() - self.patience
        with self._guard:
            for request, since in self._since.items():
                if since < limit:
                    # Its thread wakes from reading or writing, and closes it.
                    _halt(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong with a connection."""
        del request
        logger.opt(exception=True).debug("a request of {} ended", client_address)


def _halt(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("a connection was gone already: {}", error)


class Quiet(BaseHTTPRequestHandler):
    """A request that is logged, if at all, where all is."""

    def answer(self, status: int, body: bytes = b"", kind: str = "text/plain") -> None:
        """Answer with this."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base's own name
        """Log for whoever looks for it."""
        logger.debug("{}", format % args)
