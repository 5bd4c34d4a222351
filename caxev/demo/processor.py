"""A small processor of the demo: from raw events to peaks, and from peaks to a summary.

``python -m caxev.demo.processor peaks RAW OUTPUT`` reads every event of a raw run that `daq` wrote,
finds the peaks in its pulse, and writes one line of JSON for each. ``summary PEAKS OUTPUT`` reads
these and writes one line for each channel: the minitrees' stand-in.
"""

from __future__ import annotations

import json
import sys
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from caxev.demo.daq import HEADER

THRESHOLD: Final = 500
"""Minimum depth of a peak, in counts below the baseline."""


def peaks_in(samples: array[int], baseline: int) -> Iterator[dict[str, int]]:
    """Find the stretches in which the pulse lies below the baseline: left, right, area, height."""
    left: int | None = None
    # The baseline at the end closes a peak that reaches the last sample.
    for place, sample in enumerate([*samples, baseline]):
        if baseline - sample > THRESHOLD:
            left = place if left is None else left
        elif left is not None:
            depths = [baseline - one for one in samples[left:place]]
            yield {"left": left, "right": place, "area": sum(depths), "height": max(depths)}
            left = None


def event_row(data: bytes) -> dict[str, Any]:
    """Read one event: its time (ns), number and channel, and its peaks."""
    time, number, channel, length = HEADER.unpack_from(data)
    pulse = data[HEADER.size : HEADER.size + 2 * length]
    samples = array("H", pulse[: len(pulse) // 2 * 2])  # a short event cuts it off
    baseline = samples[0] if samples else 0
    return {
        "time": time,
        "number": number,
        "channel": channel,
        "peaks": list(peaks_in(samples, baseline)),
    }


def events_of(raw: Path) -> Iterator[dict[str, Any]]:
    """Read every event of a run, in order."""
    for path in sorted(raw.glob("XENON1T-*.zip")):
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                yield event_row(file.read(name))


def write_peaks(raw: Path, output: Path) -> int:
    """Write a line for each event of a run; returns their number."""
    with output.open("w") as file:
        return sum(bool(file.write(json.dumps(row) + "\n")) for row in events_of(raw))


def write_summary(peaks: Path, output: Path) -> int:
    """Write a line for each channel: first event, events, peaks, mean area; returns the number."""
    areas: dict[int, list[int]] = {}
    first: dict[int, int] = {}
    events: dict[int, int] = {}
    with peaks.open() as file:
        for row in map(json.loads, file):
            channel = row["channel"]
            first.setdefault(channel, row["time"])
            events[channel] = events.get(channel, 0) + 1
            areas.setdefault(channel, []).extend(peak["area"] for peak in row["peaks"])
    with output.open("w") as file:
        for channel in sorted(events):
            found = areas[channel]
            row = {"channel": channel, "first": first[channel], "events": events[channel]}
            row |= {"peaks": len(found), "area": fmean(found) if found else 0.0}
            file.write(json.dumps(row) + "\n")
    return len(events)


def main(arguments: list[str]) -> int:
    """Serve the command line; returns 1 if there was nothing to read."""
    what, source, output = arguments
    write = {"peaks": write_peaks, "summary": write_summary}[what]
    count = write(Path(source), Path(output))
    sys.stdout.write(f"{what} of {source}: {count}\n")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
