"""A small collaboration on one machine: a database, SSH servers, and listeners as real processes.

`World` lays it out in one directory and starts and stops its processes. The demo shows it, the
fault campaigns break it. Everything in it listens on loopback, and ends with the process that made
it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

from attrs import define, field

from caxev import aio
from caxev.config import Settings, Sites, load_sites
from caxev.config.loading import read_sites
from caxev.config.settings import OPERATOR_URI
from caxev.database import open_database, run
from caxev.demo import daq
from caxev.demo.server import known_hosts_line, make_key
from caxev.engine.root_markers import init_roots
from caxev.testing.mongod import ReplicaSet, start_with_us

STARTS: Final = 30.0
"""Seconds that a server may take to start."""
LEAVES: Final = 20.0
"""Seconds that a process may take to end when asked."""
FIRST_START: Final = datetime(2016, 11, 11, 14, 34, tzinfo=UTC)

TAPE: Final = "tsm-server"
"""The name of the tape archive in cax."""
SITES: Final = Path(__file__).with_name("sites.json")
"""The sites of the demo: in a checkout a link to the example at its root."""
SIMULATOR: Final = Path(__file__).with_name("dsmc_simulator.py")


@define(eq=False)
class World:
    """The sites of a sites.json, brought to life below `directory`.

    Host names, ports, keys and directories of the file are replaced by those of this machine, and
    the client of a tape archive by a simulator. With `tape` the first site is given such an
    archive. Use it as a context manager: on leaving, every process that it started has ended.
    `server` makes the database in a directory, `dsmc` is the program of the simulator.
    """

    directory: Path
    template: Path
    data: Path | None = None
    server: Callable[[Path], ReplicaSet] = ReplicaSet
    dsmc: Path = SIMULATOR
    tape: bool = field(default=False, kw_only=True)
    mongod: ReplicaSet = field(init=False)
    sites: Sites = field(init=False)
    listeners: dict[str, subprocess.Popen[bytes]] = field(init=False, factory=dict)
    _servers: dict[str, subprocess.Popen[bytes]] = field(init=False, factory=dict)
    _stack: ExitStack = field(init=False, factory=ExitStack)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.mongod = stack.enter_context(self.server(self._made("mongod")))
            given = read_sites(self.template)
            entries = given.sites
            if self.tape:
                add_tape(entries)
            reached = [entry for entry in entries if entry.get("method") != "tsm"]
            ports = self._start_servers(reached, stack)
            self._direct(entries, reached, ports)
            file = self.directory / "sites.json"
            file.write_text(json.dumps(given.document, indent=2))
            self.sites = load_sites(file)
            # In a thread, because there may be a trio loop in this one.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(run, self._mark_directories).result()
            # Registered last, so that it runs first: listeners leave before their servers end.
            stack.callback(self.stop_listeners)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def listening(self) -> list[str]:
        """The names of the sites that a listener can be started for."""
        return [site.name for site in self.sites.values() if site.listener]

    @property
    def settings(self) -> Settings:
        return Settings.load(mongo_uri=self.mongod.uri, environ={})

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables of caxev commands in this world."""
        # Those of a real installation, which this shell may have, must not count here.
        return {
            "CAXEV_MONGO_USER": "",
            OPERATOR_URI: "",
            "CAXEV_MONGO_URI": self.mongod.uri,
            "CAXEV_SITES": str(self.directory / "sites.json"),
            "CAXEV_DATABASE": self.settings.database,
            "CAXEV_COLLECTION": self.settings.collection,
        }

    def _made(self, *names: str) -> Path:
        path = self.directory.joinpath(*names)
        path.mkdir(parents=True, exist_ok=True)
        return path

    async def _mark_directories(self) -> None:
        """Do what ``caxev sites init`` does, for each site."""
        async with aio.loop(), open_database(self.settings) as database:
            for name in self.listening:
                await init_roots(database, self.sites.get(name), self.sites, force=False)

    def dir_of(self, site: str, key: str) -> Path:
        """Return a base directory of a site, made if need be."""
        path = (self.data or self.directory) / site / key.removeprefix("dir_")
        path.mkdir(parents=True, exist_ok=True)
        return path

    # -- SSH servers ------------------------------------------------------------------------

    def _start_servers(self, entries: Sequence[Mapping[str, Any]], stack: ExitStack) -> list[int]:
        keys = self._made("keys")
        public = [make_key(keys / entry["name"]) for entry in entries]
        hosts = [make_key(keys / f"{entry['name']}.host") for entry in entries]
        (keys / "authorized").write_text("\n".join(public) + "\n")
        # All are started before the first is waited for, so that they start side by side.
        started = [self._start_server(entry["name"], stack) for entry in entries]
        ports = [_port_in(file, process) for file, process in started]
        lines = [known_hosts_line(port, host) for port, host in zip(ports, hosts, strict=True)]
        (keys / "known_hosts").write_text("\n".join(lines) + "\n")
        return ports

    def _start_server(self, name: str, stack: ExitStack) -> tuple[Path, subprocess.Popen[bytes]]:
        keys = self.directory / "keys"
        port_file = keys / f"{name}.port"
        command = [sys.executable, "-m", "caxev.demo.server"]
        command += ["--directory", str(self._made(name)), "--port-file", str(port_file)]
        command += ["--host-key", str(keys / f"{name}.host")]
        command += ["--authorized-keys", str(keys / "authorized")]
        log = stack.enter_context((self._made("logs") / f"{name}.sshd.log").open("wb"))
        # Its standard input is a pipe that we hold: it ends with us, even if we are killed.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log)  # noqa: S603  # our own module
        stack.callback(end, process)
        self._servers[name] = process
        return port_file, process

    def restart_server(self, name: str) -> int:
        """Kill a site's SSH server and start another one; returns its new port."""
        self._servers[name].kill()
        self._servers[name].wait()
        # Without its port file, or `_port_in` would read the former server's port.
        (self.directory / "keys" / f"{name}.port").unlink()
        return _port_in(*self._start_server(name, self._stack))

    def _direct(
        self, entries: list[dict[str, Any]], reached: list[dict[str, Any]], ports: list[int]
    ) -> None:
        """Let the entries name what is here."""
        keys = self.directory / "keys"
        for entry in entries:
            if entry not in reached:
                entry["archive"] = {**self._simulator(entry["name"]), **entry.get("archive", {})}
        for entry, port in zip(reached, ports, strict=True):
            entry.update(
                hostname="127.0.0.1",
                port=port,
                identity=str(keys / entry["name"]),
                known_hosts=str(keys / "known_hosts"),
                state=str(self.directory / "state"),
            )
            for key in [key for key in entry if key.startswith("dir_")]:
                if entry[key] is not None:
                    entry[key] = str(self.dir_of(entry["name"], key))

    def _simulator(self, name: str) -> dict[str, Any]:
        """Return how the simulated tapes of an archive are reached: ``archive`` of its entry."""
        return {
            "command": [sys.executable, "-S", str(self.dsmc)],
            "environment": {"DSMC_SIMULATOR_TAPES": str(self._made(name, "tapes"))},
        }

    # -- listeners --------------------------------------------------------------------------

    def listen(
        self, site: str, *options: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start ``caxev listen --site SITE`` as a process; its log goes to ``logs``.

        It is killed if this process ends without stopping it.
        """
        return self.start(site, "listen", "--site", site, *options, environment=environment)

    def start(
        self, name: str, *command: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command of caxev as the process of that name, as `listen` does."""
        program = [sys.executable, "-m", "caxev", "--log-level", "DEBUG"]
        with (self._made("logs") / f"{name}.log").open("ab") as log:
            self.listeners[name] = start_with_us(
                [*program, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment, **(environment or {})},
            )
        return self.listeners[name]

    def stop_listeners(self) -> dict[str, int]:
        """Ask every listener to leave, and wait; returns their exit statuses."""
        # All are asked before the first is waited for: they leave side by side.
        for process in self.listeners.values():
            ask(process)
        return {site: left(process) for site, process in self.listeners.items()}

    def serve_page(self) -> str | None:
        """Start ``caxev web`` as a process; return a link with which we also act.

        None without the extra ``web``.
        """
        if find_spec("starlette") is None:
            return None
        command = [sys.executable, "-m", "caxev", "web", "--port", "0", "--auth", "link"]
        acting = {"CAXEV_MONGO_OPERATOR_URI": self.mongod.uri, "PYTHONUNBUFFERED": "1"}
        with (self._made("logs") / "web.log").open("ab") as log:
            process = start_with_us(
                [*command, "--operator"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.environment, **acting},
            )
        self._stack.callback(end, process)
        assert process.stdout is not None
        with process.stdout:
            line = process.stdout.readline().decode()
        return line.rpartition(" ")[2].strip() or None

    # -- data -------------------------------------------------------------------------------

    def take_run(self, site: str, number: int, size: int, seed: int) -> dict[str, Any]:
        """Have the simulated DAQ write a run of `size` bytes at a site; returns its document.

        The copy there is ``verifying``, as its digests are not known yet.
        """
        start = FIRST_START + timedelta(hours=number)
        raw = self.dir_of(site, "dir_raw")
        run = daq.write_run(raw, number, size_bytes=size, seed=seed, start=start)
        document = daq.run_document(run)
        document["data"].append(daq.data_entry(run, site, "verifying"))
        return document


def add_tape(entries: list[dict[str, Any]]) -> None:
    """Give the first site of a sites.json a tape archive for backups and recalls.

    This makes enough copies to purge old data there, unless it is tagged ``keep``.
    """
    first = entries[0]
    first["dir_tsm"] = "/data/tsm"
    first |= {"purge": 30, "deletion": {"protect": ["keep"]}}
    first["lanes"] = {"tape": 3, **first.get("lanes", {})}
    for key in ("upload_options", "download_options"):
        first[key] = [*(first.get(key) or ()), TAPE]
    entries.append({"name": TAPE, "method": "tsm"})


def end(process: subprocess.Popen[bytes]) -> int:
    """End a process that we started: ask, wait, then kill; returns its exit status."""
    # The SSH server ends with its standard input, even if no signal reaches it.
    if process.stdin is not None:
        process.stdin.close()
    ask(process)
    return left(process)


def ask(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end. A listener that is asked twice leaves at once, so ask once."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


def left(process: subprocess.Popen[bytes], within: float = LEAVES) -> int:
    """Wait for a process that was asked to end, kill it if it does not; returns its exit status."""
    try:
        return process.wait(within)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _port_in(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + STARTS
    while not file.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the SSH server of {file.stem} ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the SSH server of {file.stem} did not start in {STARTS:.0f} s")
        time.sleep(0.02)
    return int(file.read_text())
