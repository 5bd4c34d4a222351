"""Parser of the output of ``dsmc``, which decides whether a command succeeded. Pure.

`tsm` runs the client and passes its output here. Formats vary by version, and output may end
anywhere, so a command counts as a success only if everything agrees: the return code, the
messages, the counts at the end, their last line, and the order of all lines. An unknown line after
the work has begun is a failure.

Samples are in tests/dsmc_samples.py. IBM's return codes: 0 success; 4 some files were left out;
8 at least a warning; 12 at least an error. A query that finds nothing ends with 8 and ANS1092W.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from attrs import frozen

from caxev.tape.base import Stored

# Lenient about what varies between versions; the order of all lines is checked below.
_MESSAGE: Final = re.compile(r"\b(AN\w\d{4}\w)\b[\s:]*(.*)")
_TOTAL: Final = re.compile(r"Total number of (?:objects )?([a-z ]+):\s*(\S.*)")
_COUNT: Final = re.compile(r"\d{1,3}(?:,\d{3})*|\d+")
_ENTRY: Final = re.compile(
    r"\s*(\d{1,3}(?:,\d{3})*|\d+)\s+B\s+(\S+\s+\d{1,2}:\d{2}:\d{2}(?: [AP]M)?)\s+(\S+)\s+([AI])"
    r"(?:\s+(/.*))?"
)
_SENT: Final = re.compile(r"Normal File-->\s+([\d,]+) .*\[Sent\]")
_FILE: Final = re.compile(
    r"(?:Restoring\s|(?:Retry # ?\d+\s+)?(?:[A-Z][A-Za-z]* (?:File|Link)|[A-Z][a-z]+)-->).*"
)
_FILE_DONE: Final = re.compile(r".*(?:\[Sent\]|\[Done\]|\sChanged)")
_MESSAGE_DONE: Final = re.compile(r".*[.*]")
_FIGURE: Final = re.compile(
    r"([A-Z][A-Za-z -]*):\s+[\d,.:]+\s*(?:%|sec|B|[KMGTP]B(?:/sec)?|[KMGTP]?B/sec)?"
)
_INTERRUPTED: Final = re.compile(r"processing interrupted", re.IGNORECASE)
_ELAPSED: Final = re.compile(r"Elapsed processing time:\s+\d+:\d{2}:\d{2}")
_COLUMNS: Final = re.compile(r"\s*Size\s+Backup Date\s+Mgmt Class\s+A/I\s+File")
_RULE: Final = re.compile(r"\s*-+(?:\s+-+)+\s*")
_DETAIL: Final = re.compile(r"\s+(?:Modified|Compression Type|Encryption Type|Media Class):?\s.*")
_PATH: Final = re.compile(r"\s+(/.*)")
_ROW: Final = re.compile(r"([A-Z][A-Za-z ]*[a-z])\.+: (.+)")
_QUESTION: Final = re.compile(r"--- User Action is Required ---|Action \[[^\]]*\] :")
_HARMLESS: Final = frozenset({"ANS1278W"})
"""Warnings that do not concern the files that were backed up or restored."""
NOTHING_FOUND: Final = "ANS1092W"
OK, WARNING = 0, 8


@frozen
class Message:
    """A message of the client: its code, such as ``ANS1029E``, and its text on one line."""

    code: str
    text: str

    @property
    def severity(self) -> str:
        """``I``, ``W``, ``E`` or ``S``; any other letter counts as worse than these."""
        return self.code[-1]

    @property
    def is_trouble(self) -> bool:
        return self.severity != "I" and self.code not in _HARMLESS

    def __str__(self) -> str:
        return f"{self.code} {self.text}".strip()


@frozen
class ClientRun:
    """One run of the client: its return code and its output.

    `status` is negative if a signal ended it. `totals` are the counts by name, such as ``failed``.
    `ended` means that the last line of the counts is there.
    """

    status: int
    lines: tuple[str, ...]
    messages: tuple[Message, ...]
    totals: Mapping[str, int]
    ended: bool

    @classmethod
    def of(cls, status: int, lines: Iterable[str]) -> ClientRun:
        """Parse the output; accepts any text."""
        kept = tuple(line.rstrip() for line in lines)
        last = [line for line in kept if line]
        return cls(
            status,
            kept,
            tuple(_messages(kept)),
            dict(_totals(kept)),
            bool(last) and _ELAPSED.fullmatch(last[-1]) is not None,
        )

    @property
    def trouble(self) -> Message | None:
        """The most severe message that is not mere information, the first of equals."""
        # A letter that we do not know is found at -1, and so ranks above all others.
        found = [message for message in self.messages if message.is_trouble]
        return max(found, key=lambda one: "WES".find(one.severity) % 4, default=None)

    @property
    def interrupted(self) -> bool:
        """Whether the client reports that it was interrupted."""
        return any(_INTERRUPTED.search(line) for line in self.lines)

    @property
    def ending(self) -> str:
        """The end for people: the most severe message and the return code."""
        how = (
            f"return code {self.status}" if self.status >= 0 else f"ended by signal {-self.status}"
        )
        return f"{self.trouble} ({how})" if self.trouble else how


def asks(line: str) -> bool:
    """Return whether the client asks a question in this line, and so would wait forever."""
    return _QUESTION.search(line) is not None


def _messages(lines: Iterable[str]) -> Iterator[Message]:
    """Yield every message, joined from its wrapped lines; any text may precede its code."""
    code, text = "", ""
    for line in lines:
        match = None if _names_a_file(line) else _MESSAGE.search(line)
        if match is None and line.strip() and code and not _begins(line):
            text += f" {line.strip()}"
            continue
        if code:
            yield Message(code, text.strip())
        code, text = match.groups() if match else ("", "")
    if code:
        yield Message(code, text.strip())


def _names_a_file(line: str) -> bool:
    """Return whether the line names a file, in which a message's code has no meaning."""
    return any(known.fullmatch(line) for known in (_FILE, _ENTRY, _PATH))


def _begins(line: str) -> bool:
    """Return whether a line begins something new, and so does not continue a message."""
    known = ("Total ", "Elapsed ", "Successful ", "Restore processing", "Incremental backup")
    other = line.startswith((*known, "Object skipped")) or _INTERRUPTED.search(line) is not None
    return other or _FILE.fullmatch(line) is not None or _ENTRY.fullmatch(line) is not None


def _totals(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the counts. One that is not a number is left out, and so counts as missing."""
    for line in lines:
        match = _TOTAL.fullmatch(line)
        if match is not None and _COUNT.fullmatch(match[2]):
            yield match[1], int(match[2].replace(",", ""))


def bytes_sent(lines: Iterable[str]) -> int:
    """Sum the bytes that a running backup reports in its lines for each file."""
    found = (_SENT.search(line) for line in lines)
    return sum(int(match[1].replace(",", "")) for match in found if match)


# -- verdicts -----------------------------------------------------------------------------------


def backup_problem(run: ClientRun, files: int) -> str | None:
    """Return why this is no successful backup of so many files, or None if it is."""
    begin, done = "Incremental backup of volume ", "Successful incremental backup of "
    # Inspected, not backed up: files that an earlier attempt sent are only inspected.
    return _problem(run, files, ("inspected", "backed up", "failed"), begin, done)


def restore_problem(run: ClientRun, files: int) -> str | None:
    """Return why this is no successful restore of so many files, or None if it is."""
    begin, done = "Restore function invoked.", "Restore processing finished."
    return _problem(run, files, ("restored", "failed"), begin, done)


def _problem(
    run: ClientRun, files: int, counts: Sequence[str], begin: str, done: str
) -> str | None:
    """Return what is wrong; the first of the `counts` must be that of the files."""
    if run.trouble is not None or run.status not in (OK, WARNING):
        return f"dsmc: {run.ending}"
    if run.interrupted:
        return f"dsmc was interrupted ({run.ending})"
    if run.status == WARNING and not any(one.code in _HARMLESS for one in run.messages):
        return f"dsmc warns of something that it does not name ({run.ending})"
    missing = [name for name in counts if name not in run.totals]
    if missing or not run.ended:
        return f"dsmc's output breaks off: no {missing[0] if missing else 'end of the counts'}"
    if run.totals["failed"]:
        return f"dsmc: {run.totals['failed']} objects failed ({run.ending})"
    if (why := _out_of_order(run.lines, begin, done)) is not None:
        return why
    # More than the files is no fault: the folder itself may be counted as an object.
    found = run.totals[counts[0]]
    return f"dsmc {counts[0]} {found} objects of {files}" if found < files else None


def _out_of_order(lines: Sequence[str], begin: str, done: str) -> str | None:
    """Return which line is out of order or unknown, or None if there is none.

    The order is `begin`, files, `done`, figures, each figure once; messages may come anywhere. The
    lines before `begin` are the client's greeting, which differs between versions.
    """
    # `awaited` has the markers that have not come yet, so that its length is the current phase.
    awaited, kinds = [begin, done], {"file"}
    figures: set[str] = set()
    unfinished: re.Pattern[str] | None = None  # what the rest of a wrapped line ends with
    for line in filter(None, lines):
        kind = _kind(line)
        if unfinished and kind == "other" and not line.startswith((begin, done)):
            unfinished = None if unfinished.fullmatch(line) else unfinished
        elif unfinished is _FILE_DONE:
            return f"dsmc does not say what became of the file before {line!r}"
        elif awaited and line.startswith(awaited[0]):
            del awaited[0]
            kinds = {"file"} if awaited else {"figure"}
            unfinished = None
        elif kind == "message" or (kind in kinds and len(awaited) < len((begin, done))):
            end = _FILE_DONE if kind == "file" else _MESSAGE_DONE
            unfinished = None if kind == "figure" or end.fullmatch(line) else end
            if (name := line.partition(":")[0]) in figures:
                return f"dsmc's counts have {name!r} twice"
            figures |= {name} if kind == "figure" else set()
        elif len(awaited) < len((begin, done)) or kind != "other":
            return f"dsmc wrote a line that is not understood there: {line!r}"
    if awaited:
        return f"dsmc does not say {awaited[0].strip()!r}"
    return None


def _kind(line: str) -> str:
    """Classify a line: ``file``, ``figure``, ``message`` or ``other``."""
    if _FILE.fullmatch(line):
        return "file"
    if _FIGURE.fullmatch(line):
        return "figure"
    return "message" if _MESSAGE.search(line) and not _names_a_file(line) else "other"


def session(run: ClientRun) -> str:
    """Describe the server that answered ``query session`` in one line.

    Raises ValueError with the reason if none did.
    """
    if run.status != OK or run.trouble is not None:
        raise ValueError(f"dsmc: {run.ending}")
    found = filter(None, map(_ROW.fullmatch, run.lines))
    rows = {match[1]: match[2] for match in found}
    wanted = ("Home Server Name", "Server Version", "Node Name")
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise ValueError(f"dsmc's output breaks off: no {missing[0]}")
    return ", ".join(f"{name} {rows[name]}" for name in wanted)


def listing(run: ClientRun) -> list[tuple[str, Stored]]:
    """Return directory and file of each object from ``query backup``, only its newest version.

    Raises ValueError with the reason if the list is not complete.
    """
    codes = {message.code for message in run.messages if message.is_trouble}
    # Only this message means an empty folder: any other failure must not look like one, or data
    # that is on tape would be sent again.
    if run.status == WARNING and codes == {NOTHING_FOUND}:
        return []
    if run.status != OK or run.trouble is not None:
        raise ValueError(f"dsmc: {run.ending}")
    newest: dict[str, tuple[str, Stored]] = {}
    for path, active, stored in _entries(run.lines):
        # If both versions are inactive the order decides: dsmc lists newer versions first.
        if path not in newest or active:
            newest[path] = (path.rpartition("/")[0], stored)
    if not newest:
        raise ValueError("dsmc's list is empty, and it does not say so")
    return list(newest.values())


def _entries(lines: Sequence[str]) -> Iterator[tuple[str, bool, Stored]]:
    rest = _below_heading(lines)
    pending: re.Match[str] | None = None
    for line in rest:
        wrapped = _PATH.fullmatch(line) if pending else None
        entry = None if wrapped else _ENTRY.fullmatch(line)
        if pending is not None and wrapped is not None:
            yield _entry(pending, wrapped[1])
            pending = None
        elif pending is not None:
            raise ValueError(f"dsmc's list breaks off: no name before {line!r}")
        elif entry is not None and entry[5] is None:
            pending = entry
        elif entry is not None:
            yield _entry(entry, entry[5])
        elif line and not (_RULE.fullmatch(line) or _DETAIL.fullmatch(line)):
            raise ValueError(f"dsmc's list has a line that is not understood: {line!r}")
    if pending is not None:
        raise ValueError("dsmc's list breaks off: the last object has no name")


def _below_heading(lines: Sequence[str]) -> Iterator[str]:
    rest = iter(lines)
    for line in rest:
        if _COLUMNS.fullmatch(line):
            return rest
        if _ENTRY.fullmatch(line):
            raise ValueError(f"dsmc's list is out of order: {line!r} is before its heading")
    raise ValueError("dsmc's list has no heading")


def _entry(match: re.Match[str], path: str) -> tuple[str, bool, Stored]:
    size = int(match[1].replace(",", ""))
    name = path.rpartition("/")[2]
    return path, match[4] == "A", Stored(name, size, " ".join(match[2].split()))
