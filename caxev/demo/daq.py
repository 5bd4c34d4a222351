"""A stand-in for the DAQ: raw runs as XENON1T's event builder wrote them.

A run is a directory named by the run, with `XENON1T-<run>-<first>-<last>-<n>.zip` files of up to
1000 events each (one member an event, named by its number), `pax_info.json` and
`trigger_monitor_data.zip`. The demo, the tests and the fault campaigns call `write_run` and insert
what `run_document` makes of it. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from array import array
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

from attrs import frozen

EVENTS_PER_FILE: Final = 1000
EVENT_BYTES: Final = 5000

_CHANNELS: Final = 248
HEADER: Final = struct.Struct(
    "<QIHH"
)  # time (ns since 1970), event number, channel, samples of the pulse
_BASELINE: Final = 16000
_PULSE: Final = array(
    "H", (_BASELINE - round(9000 * t / 60 * math.exp(1 - t / 60)) for t in range(400))
).tobytes()
_MEMBER_OVERHEAD: Final = 76 + 2 * 5  # bytes of a zip's two headers for a member, and its name


@frozen
class RawRun:
    """A run on disk: `path` is its directory, `events` how many were built."""

    number: int
    name: str
    path: Path
    events: int
    start: datetime
    end: datetime


def write_run(
    directory: Path, number: int, *, size_bytes: int, seed: int, start: datetime
) -> RawRun:
    """Write a run of about `size_bytes` into a new directory ``directory/YYMMDD_HHMM``.

    `start` (UTC) names it, so two runs need starts a minute apart; `FileExistsError` if not. The
    size is met within a few per cent from 100 kB up.
    """
    name = run_name(start)
    # At least one: a run without events is never processed.
    events = max(1, round(size_bytes / EVENT_BYTES))
    run = RawRun(number, name, directory / name, events, start, start + timedelta(hours=1))
    run.path.mkdir(parents=True)
    _write_info(run)
    _write_monitor(run)
    length = max(HEADER.size, size_bytes // events - _MEMBER_OVERHEAD)
    noise = Random(f"{seed} {number}")  # noqa: S311  # no secret
    build = partial(_event, noise, length, int(start.timestamp()) * 1_000_000_000)
    for first in range(0, events, EVENTS_PER_FILE):
        _write_events(run, range(first, min(first + EVENTS_PER_FILE, events)), build)
    return run


def run_name(start: datetime) -> str:
    """Return the name of a run that was started at that time (UTC)."""
    return f"{start.astimezone(UTC):%y%m%d_%H%M}"


def run_document(run: RawRun) -> dict[str, Any]:
    """Return the run as the DAQ inserts it into the runs database, without copies."""
    # With the fields that cax's tasks and processing look for; their values are not real.
    return {
        "number": run.number,
        "name": run.name,
        "detector": "tpc",
        "start": run.start,
        "end": run.end,
        "source": {"type": "Rn220"},
        "tags": [],
        "trigger": {"events_built": run.events, "status": "processed"},
        "reader": {
            "self_trigger": True,
            "ini": {
                "name": "Rn220_stable",
                "write_mode": 2,
                "trigger_config_override": {"Zip": {"events_per_file": EVENTS_PER_FILE}},
            },
        },
        "processor": {
            "DEFAULT": {
                "gains": [2.5e6] * _CHANNELS,
                "drift_velocity_liquid": 1.44e-4,  # cm/ns
                "electron_lifetime_liquid": 452e3,  # ns
            }
        },
        "data": [],
    }


def data_entry(run: RawRun, host: str, status: str) -> dict[str, Any]:
    """Return the entry in ``data`` for the copy that the DAQ wrote at site `host`."""
    return {
        "type": "raw",
        "host": host,
        "status": status,
        "location": str(run.path),
        "checksum": None,
        "creation_time": run.end,
        "creation_place": host,
    }


def _write_info(run: RawRun) -> None:
    info = {
        "run_number": run.number,
        "pax_version": "6.8.0",
        "file_builder_name": "pax",
        "timestamp": run.start.timestamp(),
        "configuration": {"pax": {"tpc_name": "XENON1T", "events_per_file": EVENTS_PER_FILE}},
    }
    (run.path / "pax_info.json").write_text(json.dumps(info, sort_keys=True))


def _write_monitor(run: RawRun) -> None:
    """Write the trigger's monitor file, whose members are named ``<kind>=<index>``."""
    seconds = max(1, run.events // EVENTS_PER_FILE)
    with zipfile.ZipFile(run.path / "trigger_monitor_data.zip", "w") as file:
        for second in range(seconds):
            pulses = array("I", (100 + (second + channel) % 7 for channel in range(_CHANNELS)))
            name = f"count_of_all_pulses={second}"
            file.writestr(_member(run, name), pulses.tobytes(), zipfile.ZIP_DEFLATED)


def _write_events(run: RawRun, numbers: range, build: Callable[[int], bytes]) -> None:
    """Write one event file, under a temporary name until it is complete."""
    # As the event builder does it: a copy that is read too early has a ``temp.zip``.
    name = f"XENON1T-{run.number}-{numbers[0]:09d}-{numbers[-1]:09d}-{len(numbers):09d}.zip"
    building = run.path / "temp.zip"
    with zipfile.ZipFile(building, "w", zipfile.ZIP_STORED) as file:
        for number in numbers:
            file.writestr(_member(run, str(number)), build(number))
    building.rename(run.path / name)


def _event(random: Random, length: int, start: int, number: int) -> bytes:
    """Return an event of `length` bytes: a header, a pulse in one channel, and noise.

    `start` is that of the run, in ns since 1970.
    """
    header = HEADER.pack(start + number * 10_000_000, number, number % _CHANNELS, len(_PULSE) // 2)
    return (header + _PULSE + random.randbytes(length))[:length]


def _member(run: RawRun, name: str) -> zipfile.ZipInfo:
    # The members' times are the run's, so that the same arguments give the same bytes.
    start = run.start.astimezone(UTC)
    return zipfile.ZipInfo(
        name, (start.year, start.month, start.day, start.hour, start.minute, start.second)
    )
