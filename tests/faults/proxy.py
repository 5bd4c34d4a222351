"""A proxy on loopback that campaigns break connections with: it cuts, stalls, and flips bytes."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal

from attrs import define, field

from caxev.config import load_sites
from caxev.demo.world import World

Way = Literal["there", "back"]
Meddler = Callable[[Way, int, bytes], bytes]
"""Is given the way, how many bytes of a connection have gone it before, and the next ones; returns
what goes on instead. It may call `Proxy.cut` or `Proxy.stall`."""

_CHUNK: Final = 1 << 16
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST


@define(eq=False)
class Proxy:
    """Passes connections on to a port of this machine, until it is told otherwise.

    What it is told concerns the connections whose first bytes hold `only`; the others always pass.
    """

    to: int
    only: bytes = b""
    meddle: Meddler | None = None
    port: int = field(init=False)
    cuts: bool = field(init=False, default=False)
    _passes: threading.Event = field(init=False, factory=threading.Event)
    _open: set[socket.socket] = field(init=False, factory=set)
    _server: socket.socket = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._passes.set()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._server.getsockname()[1]
        self._thread(self._accept)

    # -- what a campaign asks for -------------------------------------------------------------

    def cut(self) -> None:
        """Reset every connection, and each new one, until `repair`."""
        self.cuts = True
        self.reset()

    def stall(self) -> None:
        """Pass nothing on and close nothing, until `repair`."""
        self._passes.clear()

    def repair(self) -> None:
        """Pass everything on again. What was stalled goes on, or breaks if it was cut."""
        self.cuts = False
        self._passes.set()

    def reset(self) -> None:
        """Reset every connection there is; new ones pass."""
        for one in list(self._open):
            _reset(one)

    def close(self) -> None:
        """End."""
        self._server.close()
        self.cut()
        self._passes.set()

    # -- threads ------------------------------------------------------------------------------

    @staticmethod
    def _thread(function: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=function, args=args, daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self._thread(self._serve, self._server.accept()[0])

    def _serve(self, client: socket.socket) -> None:
        """Connect to where it goes, when it has said something (or the server must speak first)."""
        greeting = b""
        try:
            if self.only:
                greeting = client.recv(_CHUNK)
            server = socket.create_connection(("127.0.0.1", self.to))
        except OSError:
            _reset(client)
            return
        concerned = self.only in greeting
        if concerned:
            if self.cuts:
                _reset(client)
                _reset(server)
                return
            self._open |= {client, server}
        back = self._thread(self._pump, server, client, "back", concerned, b"")
        self._pump(client, server, "there", concerned, greeting)
        back.join()
        self._open -= {client, server}
        client.close()
        server.close()

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        way: Way,
        concerned: bool,
        data: bytes,
    ) -> None:
        done = 0
        try:
            data = data or source.recv(_CHUNK)
            while data:
                if concerned:
                    went = len(data)
                    data = self.meddle(way, done, data) if self.meddle else data
                    done += went
                    self._passes.wait()
                target.sendall(data)
                data = source.recv(_CHUNK)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            _reset(source)
            _reset(target)


def _reset(one: socket.socket) -> None:
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextmanager
def proxied(uri: str) -> Iterator[tuple[Proxy, str]]:
    """A way to the database at `uri`, a replica set of one, that can be cut and stalled."""
    found = re.search(r"(?:127\.0\.0\.1|localhost):(\d+)", uri)
    assert found is not None
    proxy = Proxy(int(found[1]))
    uri = uri.replace(found[0], f"127.0.0.1:{proxy.port}")
    uri = re.sub(r"replicaSet=[^&]*", "directConnection=true", uri)
    try:
        yield proxy, uri
    finally:
        proxy.close()


def front_ssh(world: World, **fields: Any) -> dict[str, Proxy]:
    """Put a proxy before each site's SSH server, in sites.json; `fields` are added to each site.

    Do it before any listener is started.
    """
    file, known = world.directory / "sites.json", world.directory / "keys" / "known_hosts"
    entries = json.loads(file.read_text())
    proxies = {entry["name"]: Proxy(entry["port"]) for entry in entries}
    lines = known.read_text()
    for entry in entries:
        port = proxies[entry["name"]].port
        same = [line for line in lines.splitlines() if f"]:{entry['port']} " in line]
        lines += "".join(f"{line.replace(str(entry['port']), str(port), 1)}\n" for line in same)
        entry.update(port=port, **fields)
    known.write_text(lines)
    file.write_text(json.dumps(entries))
    world.sites = load_sites(file)
    return proxies
