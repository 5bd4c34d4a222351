"""A small HTTP server that no client can exhaust: few connections, each for a short time.

`rucio.messages` receives a catalogue's messages with it, `listener` serves metrics. Connections
beyond the limits are closed at once, so that idle or slow clients take neither memory nor
descriptors from transfers. prometheus_client's own server has no such limits.
"""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from time import monotonic
from typing import Any, Final

from loguru import logger

MOST: Final = 16
"""Connections that are served at once."""
SHARE: Final = MOST // 2
"""Those of one client's address."""
SPARE: Final = MOST // 4
"""Those that are left to addresses which have none yet: a few clients cannot keep others out."""
PATIENCE: Final = 30.0
"""Seconds from the connection to the end of the answer."""


class SmallServer(ThreadingHTTPServer):
    """Serves one address in threads of its own. Call `begin`, and `close` at the end."""

    daemon_threads = True
    block_on_close = False
    patience = PATIENCE

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        # Each connection: its client, and since when it is open.
        self._open: dict[Any, tuple[str, float]] = {}
        self._guard = Lock()
        try:
            super().__init__(address, handler)
        except OSError as error:
            error.filename = f"{address[0]} port {address[1]}"  # what messages begin with
            raise

    def begin(self) -> None:
        """Start to serve."""
        Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more connection."""
        # In the thread that accepts: a refused connection costs no thread of its own.
        with self._guard:
            of_all = len(self._open)
            of_it = sum(client == client_address[0] for client, _ in self._open.values())
            if of_it >= SHARE or of_all >= (MOST - SPARE if of_it else MOST):
                line = "{} is refused: {} connections are open, {} of them its own"
                logger.debug(line, client_address, of_all, of_it)
                return False
            self._open[request] = client_address[0], monotonic()
            return True

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, which makes room for another."""
        with self._guard:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close connections that take too long; called ten times a second."""
        limit = monotonic() - self.patience
        with self._guard:
            for request, (_, since) in self._open.items():
                if since < limit:
                    # Its thread wakes up from reading or writing, and closes it.
                    _halt(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error of a connection."""
        del request
        logger.opt(exception=True).debug("a request of {} ended", client_address)


def _halt(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("a connection was gone already: {}", error)


class Quiet(BaseHTTPRequestHandler):
    """A request handler that logs by loguru, at level DEBUG."""

    def answer(self, status: int, body: bytes = b"", kind: str = "text/plain") -> None:
        """Send an answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base's own name
        """Log a line of the base class."""
        logger.debug("{}", format % args)
