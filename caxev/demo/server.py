"""A site's SSH server for the demo: SFTP only, keys only, on a free port of 127.0.0.1.

Runs as its own process, as each site's server would::

    python -m caxev.demo.server --directory D --host-key F --authorized-keys F --port-file F

and ends when its standard input does, so it cannot outlive the demo, or on SIGTERM. Paths are
absolute, or relative to D; what the user may read and write, a client may.

`caxev.transfer.ssh` is our side of SSH, and the only other part that knows asyncssh. This is the
other end of the wire, which real sites have from OpenSSH.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import asyncssh

HOST = "127.0.0.1"


def make_key(path: Path) -> str:
    """Write a new ed25519 private key, readable by its owner only; return its public line.

    The line is for an authorized-keys file. Raises `FileExistsError` if there is a file.
    """
    key = asyncssh.generate_private_key("ssh-ed25519")
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.export_private_key())
    return key.export_public_key().decode().strip()


def known_hosts_line(port: int, public: str) -> str:
    """Return the known-hosts line for the server on that port, from `make_key`'s public line."""
    return f"[{HOST}]:{port} {public}"


async def serve(directory: Path, host_key: Path, authorized_keys: Path, port_file: Path) -> None:
    """Serve until standard input ends or SIGTERM comes.

    `port_file` appears, complete, once connections are accepted; it holds the port, in decimal.
    """
    os.chdir(directory)
    stop = _stop_event()
    async with await asyncssh.listen(
        HOST,
        0,
        server_host_keys=[str(host_key)],
        authorized_client_keys=str(authorized_keys),
        password_auth=False,
        kbdint_auth=False,
        sftp_factory=True,
        allow_pty=False,
        agent_forwarding=False,
    ) as server:
        _publish(port_file, str(server.get_port()))
        await stop.wait()


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is the demo's to act on

    def wait_for_end_of_input() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    return stop


def _publish(path: Path, text: str) -> None:
    building = path.with_name(path.name + ".tmp")
    building.write_text(text)
    building.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(prog="python -m caxev.demo.server")
    for name in ("--directory", "--host-key", "--authorized-keys", "--port-file"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args(arguments)
    atexit.register(gc.freeze)  # nothing is left to be collected when the process ends
    os.nice(10)  # it stands for another machine: the listeners' processor is not its to take
    paths = (given.directory, given.host_key, given.authorized_keys, given.port_file)
    asyncio.run(serve(*(path.absolute() for path in paths)))


if __name__ == "__main__":
    main()
