"""The real cax 5.2.1 as a process: its own source from a directory, and what it lacks here.

Nothing of cax is part of this project: `checked` takes a checkout of its tag v5.2.1, and no file of
it is changed. `Cax` runs ``cax`` from there: its ``main``, with its loop over its tasks, its own
configuration file, which it reads again at each use, and real rsync and scp over SSH.

What stands between cax and this machine is written into the process's own directory, and is all of
it:

- Modules that cax imports and that are not installed: `pax` (with a version), `hax`, `sympy`,
  `pytz` and `requests`, which the tasks chosen here never call; `paramiko` and `scp`, which call
  OpenSSH's scp and raise as the real one does.
- ``Collection.update``, which PyMongo 4 has no more: it is ``update_one``.
- `config.mongo_collection`, whose address of the runs database is a constant: it is ours.
- The line of the loop's tasks that v5.2.1 has commented out, ``clear.BufferPurger()``: it is in
  again, as cax purges nothing without it. This is done to the text as it is read.
- The minute that the loop sleeps: `PAUSE`.
- A program `time`, which is a keyword of the shell that cax was run with.
- ssh's configuration, which rsync is given by ``RSYNC_RSH``: ports and keys of the sites.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which
from typing import Any, Final

from attrs import define, field

from caxev.testing.mongod import start_with_us
from tests.sshd import Server, missing

VERSION: Final = "5.2.1"
GET_IT: Final = f"git clone --branch v{VERSION} https://github.com/XENON1T/cax"
PAUSE: Final = 0.3
"""Seconds that cax sleeps between two rounds, which are a minute in life."""
TASKS: Final = (
    *("CopyPush", "CompareChecksums", "RetryStalledTransfer", "RetryBadChecksumTransfer"),
    *("CopyPull", "AddChecksum", "SetPermission", "BufferPurger"),
)
"""All of its loop's tasks but corrections and processing, which need pax and hax."""
SLEEPS: Final = "Sleeping."
"""What it logs at the end of a round."""
BROKEN: Final = "Unexpected copy error"
"""What it logs when a copy fails, but for one by scp."""

MODULES: Final = {
    "pax/__init__.py": '__version__ = "6.8.0"\n',
    "pax/configuration.py": "def load_configuration(name):\n    return {}\n",
    "pax/units.py": "V = us = s = km = 1\n",
    "hax.py": "",
    "sympy/__init__.py": "",
    "sympy/parsing/__init__.py": "",
    "sympy/parsing/sympy_parser.py": "parse_expr = None\n",
    "pytz.py": "utc = None\n",
    "requests.py": "",
    "paramiko.py": """
class util:
    log_to_file = staticmethod(lambda name: None)

class SSHClient:
    def load_system_host_keys(self):
        pass

    def connect(self, server, username, compress, timeout):
        self.there = username + "@" + server

    def get_transport(self):
        return self.there
""",
    "scp.py": """
import os, subprocess

class SCPException(Exception):
    pass

class SCPClient:
    def __init__(self, there):
        self.there = there

    def put(self, here, there, recursive):
        self._copy(here, self.there + ":" + there)

    def get(self, there, here, recursive):
        self._copy(self.there + ":" + there, here)

    def _copy(self, old, new):
        command = ["scp", "-q", "-r", "-F", os.environ["BRIDGE_SSH"], old, new]
        done = subprocess.run(command, stderr=subprocess.PIPE)
        if done.returncode:
            raise SCPException(done.stderr)

    def close(self):
        pass
""",
    "start.py": """
import os, time, types
from pathlib import Path
import pymongo
import cax
from cax import config

pymongo.collection.Collection.update = lambda self, which, change: (
    self.update_one(which, change).raw_result
)
runs = pymongo.MongoClient(os.environ["BRIDGE_URI"])[os.environ["BRIDGE_DATABASE"]]
config.mongo_collection = lambda name="runs_new": runs[name]
file = Path(cax.__file__).with_name("main.py")
source = file.read_text().replace("# clear.BufferPurger(),", "clear.BufferPurger(),")
main = types.ModuleType("cax.main")
exec(compile(source, str(file), "exec"), main.__dict__)
pause = float(os.environ["BRIDGE_PAUSE"])
main.time = types.SimpleNamespace(sleep=lambda minute: time.sleep(pause))
main.main()
""",
    "bin/time": '#!/bin/sh\nexec "$@"\n',
}
_SSH: Final = """\
Host {name}
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {keys}/user_key
    IdentitiesOnly yes
    UserKnownHostsFile {keys}/known_hosts
    HostKeyAlias [127.0.0.1]:{server}
    BatchMode yes
"""


class NotCax(Exception):
    """The directory is no checkout of cax at v5.2.1, or a program that cax calls is missing."""


def checked(directory: Path) -> Path:
    """Return the directory if it is a checkout of cax at v5.2.1 that can run here, absolute."""
    try:
        text = (directory / "cax" / "__init__.py").read_text()
        loop = (directory / "cax" / "main.py").read_text()
    except (OSError, UnicodeError):
        text = loop = ""
    found = re.search(r"__version__ = '(.+)'", text)
    if found is None or "clear.BufferPurger()" not in loop:
        raise NotCax(f"--cax {directory}: not a checkout of cax at v{VERSION}: {GET_IT}")
    if found[1] != VERSION:
        raise NotCax(f"--cax {directory}: cax {found[1]}, not {VERSION}: {GET_IT}")
    if (reason := missing()) is not None:
        raise NotCax(reason)
    for program in ("rsync", "ssh", "scp"):
        if which(program) is None:
            raise NotCax(f"cax calls {program}, which is not installed")
    return directory.resolve()


@define(eq=False)
class Cax:
    """cax at the site `name`, from the checkout `source`, with `home` for all that it writes.

    `sites` is its cax.json; `ports` are those at which SSH reaches the other sites, all of them the
    one `server`. If it ends by itself, `ended` has its last words, once for each time.
    """

    source: Path
    home: Path
    name: str
    uri: str
    database: str
    server: Server
    ports: Mapping[str, int]
    ended: list[str] = field(init=False, factory=list)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _lock: threading.Lock = field(init=False, factory=threading.Lock)

    def __attrs_post_init__(self) -> None:
        for name, text in MODULES.items():
            (self._bridge / name).parent.mkdir(parents=True, exist_ok=True)
            (self._bridge / name).write_text(text)
        (self._bridge / "bin" / "time").chmod(0o755)
        lines = [
            _SSH.format(
                name=name,
                port=port,
                user=getpass.getuser(),
                keys=self.server.directory,
                server=self.server.port,
            )
            for name, port in self.ports.items()
        ]
        self._ssh.write_text("".join(lines))

    @property
    def _bridge(self) -> Path:
        return self.home / "bridge"

    @property
    def _ssh(self) -> Path:
        return self.home / "ssh_config"

    @property
    def _config(self) -> Path:
        return self.home / "cax.json"

    @property
    def log(self) -> str:
        """All that it has logged."""
        file = self.home / "cax.log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def rounds(self) -> int:
        """Rounds that it has ended."""
        return self.log.count(SLEEPS)

    @property
    def purged(self) -> int:
        """Copies that it has purged for their age."""
        return self.log.count("] Purging /")

    @property
    def taken_out(self) -> int:
        """Entries that it has taken out, those of what it has purged among them."""
        return self.log.count("Removed from run database")

    @property
    def failures(self) -> int:
        """Copies that it failed to make."""
        return self.log.count(BROKEN) + self.log.count("scp.SCPException")

    def configure(self, sites: Sequence[Mapping[str, Any]]) -> None:
        """Give it another cax.json, which counts from its next look."""
        new = self._config.with_suffix(".new")
        new.write_text(json.dumps(sites, indent=2))
        new.replace(self._config)

    def start(self) -> None:
        """Start it, unless it runs."""
        with self._lock:
            if self._process is None:
                self._process = self._started()

    def dies(self) -> None:
        """Kill it with all that it has started; `attend` starts another one."""
        with self._lock:
            if self._process is not None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def stop(self) -> None:
        """Kill it with all that it has started, until `start`."""
        self.dies()
        with self._lock:
            self._process = None

    def attend(self) -> None:
        """Start it again if it has ended, as whoever looks after it does."""
        with self._lock:
            if self._process is None or (status := self._process.poll()) is None:
                return
            if status != -signal.SIGKILL:
                self.ended.append(f"cax ended with {status}: {self.said[-500:]}")
            self._process = self._started()

    @property
    def said(self) -> str:
        """What it has written to stderr."""
        return (self.home / "stderr").read_text(errors="replace")

    def once(self) -> str | None:
        """Have another one do every task once; what it said if it failed. Blocks."""
        done = subprocess.run(
            [*self._command, "--once"],
            **self._where,
            capture_output=True,
            check=False,
        )
        return None if done.returncode == 0 else done.stderr.decode(errors="replace")[-500:]

    @property
    def _command(self) -> list[str]:
        start = [sys.executable, "-W", "ignore", str(self._bridge / "start.py")]
        return [*start, "--config", str(self._config), "--log-file", str(self.home / "cax.log")]

    @property
    def _where(self) -> dict[str, Any]:
        return {"cwd": self.home, "env": self._environment, "stdin": subprocess.DEVNULL}

    @property
    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{self._bridge / 'bin'}:{os.environ.get('PATH', '')}",
            "PYTHONPATH": f"{self._bridge}:{self.source}",
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout is not ours
            "HOSTNAME": self.name,
            "MONGO_PASSWORD": "none",
            "RSYNC_RSH": f"ssh -F {self._ssh}",
            "BRIDGE_SSH": str(self._ssh),
            "BRIDGE_URI": self.uri,
            "BRIDGE_DATABASE": self.database,
            "BRIDGE_PAUSE": str(PAUSE),
        }

    def _started(self) -> subprocess.Popen[bytes]:
        with (self.home / "stderr").open("ab") as file:
            return start_with_us(
                self._command,
                **self._where,
                stdout=file,
                stderr=file,
                start_new_session=True,  # with what it starts it is one group, to be killed
            )
