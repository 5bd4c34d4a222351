"""Tape: what dsmc's output means, what is decided, and what the archives do, on simulated tapes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve
from hypothesis import given
from hypothesis import strategies as st

from caxev import failpoints
from caxev.config import ArchiveOptions, ConfigError, Site, load_sites
from caxev.core.errors import Damaged, Denied, GiveUp, Retry, RootAway
from caxev.files import (
    Confined,
    Item,
    Manifest,
    StagedCopy,
    digest_tree,
    incoming,
    to_nobody,
    writing,
)
from caxev.files.roots import make_marker
from caxev.tape import steps
from caxev.tape.base import Reach, Stored, archive, folder_of, methods
from caxev.tape.output import (
    ClientRun,
    asks,
    backup_problem,
    bytes_sent,
    listing,
    restore_problem,
    session,
)
from caxev.tape.staging import clear, fit_for_tape, name_off_tape, name_on_tape
from caxev.tape.steps import (
    Data,
    Outcome,
    back_up,
    check,
    compare,
    contents,
    holdings,
    recall,
    unstage,
)
from tests import dsmc_faults
from tests.dsmc_samples import (
    BACKUP,
    BANNER,
    DETAIL,
    FAILED_BACKUP,
    INTERRUPTED,
    QUERY,
    QUESTION,
    RESTORE,
    SAMPLES,
    SESSION,
    Sample,
)
from tests.places import vouched
from tests.test_commands import SHM, elsewhere


def client_run(text: str, status: int = 0) -> ClientRun:
    return ClientRun.of(status, (BANNER + text).splitlines())


# -- what dsmc says -------------------------------------------------------------------------------


def test_a_backup_that_went_well() -> None:
    """Return code 0, all counts, none failed, the word for success: it is one."""
    assert backup_problem(client_run(BACKUP), 3000) is None
    assert client_run(BACKUP).totals["inspected"] == 3002
    assert bytes_sent(BACKUP.splitlines()) == 85_113 + 1_758_725


def test_the_counts_of_an_old_client() -> None:
    """Older versions do not count what grew, was tried again or was encrypted."""
    rare = ("encrypted", "grew", "retries")
    lines = [line for line in BACKUP.splitlines() if not any(word in line for word in rare)]
    assert backup_problem(ClientRun.of(0, lines), 3000) is None


def test_a_restore_that_went_well() -> None:
    """Return code 0, the last line of the counts, as many as were wanted."""
    assert restore_problem(client_run(RESTORE), 6491) is None


@pytest.mark.parametrize(
    ("text", "status", "files", "why"),
    [
        (BACKUP, 4, 2, "return code 4"),
        (BACKUP, 8, 2, "warns of something that it does not name"),
        (BACKUP, 12, 2, "return code 12"),
        (BACKUP, -9, 2, "ended by signal 9"),
        (BACKUP, 0, 3003, "inspected 3002 objects of 3003"),
        (FAILED_BACKUP, 4, 2, "ANS1228E Sending of object '/data/c' failed."),
        (FAILED_BACKUP, 0, 2, "ANS1228E"),
        (BACKUP.replace("failed:               0", "failed:               1"), 0, 2, "1 objects"),
        (BACKUP.replace("3,002", "3.002"), 0, 2, "no inspected"),
        (BACKUP.replace("3,002", "30,02"), 0, 2, "no inspected"),
        ("ANS1017E Session rejected: TCP/IP connection failure.", 12, 2, "ANS1017E Session"),
        ("", 0, 2, "no inspected"),
    ],
)
def test_a_backup_that_is_none(text: str, status: int, files: int, why: str) -> None:
    """Any return code but 0, any message of trouble, any count that is not as it must be."""
    assert why in (backup_problem(client_run(text, status), files) or "")


@pytest.mark.parametrize(
    ("text", "status", "why"),
    [
        (RESTORE, 4, "return code 4"),
        (RESTORE.replace("6,491", "6,490"), 0, "restored 6490 objects of 6491"),
        (INTERRUPTED, 12, "ANS1330S This node currently has a pending restartable"),
        (INTERRUPTED, 0, "ANS1330S"),
        (BACKUP, 0, "no restored"),
        (INTERRUPTED + RESTORE.partition("\n")[2], 0, "ANS1330S"),
        (
            RESTORE.replace("[Done]\n", "[Done]\n>>>> Restore Processing Interrupted!! <<<<\n"),
            0,
            "i",
        ),
        (RESTORE.replace("[Done]", "[Skipped]"), 0, "what became of the file"),
        (RESTORE.replace("[Done]\n", "[Done]\nThe drive is on fire.\n"), 0, "drive is on fire"),
        (
            RESTORE.replace("server...\n", "server...\nThe drive is on fire\n"),
            0,
            "drive is on fire",
        ),
        (f"2024-12-17 16:52:58 ANS1029E Lost.\n{RESTORE}", 0, "ANS1029E Lost."),
        (f"12/17/2024 04:52:58 PM ANS1029E Lost.\n{RESTORE}", 0, "ANS1029E Lost."),
        (RESTORE + RESTORE, 0, "not understood there: 'Restore function"),
    ],
)
def test_a_restore_that_is_none(text: str, status: int, why: str) -> None:
    """Interrupted, partial, or the output of another command."""
    assert why in (restore_problem(client_run(text, status), 6491) or "")


def test_a_harmless_warning_is_no_failure() -> None:
    """ANS1278W, with the return code that goes with it, says nothing about what was done."""
    text = "ANS1278W Virtual mount point is a file system. It will be backed up.\n"
    assert backup_problem(client_run(text + BACKUP, 8), 2) is None
    assert backup_problem(client_run("ANS1999W Something else.\n" + BACKUP, 8), 2) is not None


def test_a_message_goes_on_in_the_next_line() -> None:
    """A wrapped message is one; what follows it is none of it."""
    text = "ANS1228E Sending of object\n'/data/a/very/long/name' failed.\nObject skipped.\n"
    (message,) = client_run(text).messages
    assert str(message) == "ANS1228E Sending of object '/data/a/very/long/name' failed."


def test_the_worst_message_is_told() -> None:
    """An error goes before a warning; a severity that nobody knows goes before both."""
    text = "ANS1111W a\nANS2222E b\nANS3333I c\n"
    assert str(client_run(text).trouble) == "ANS2222E b"
    assert str(client_run(f"{text}ANS4444X d\n").trouble) == "ANS4444X d"
    assert client_run("ANS1898I ***** Processed 3,000 files *****").trouble is None


def test_a_question_is_noticed() -> None:
    """It asks even where nobody is there, and waits."""
    assert [asks(line) for line in QUESTION.splitlines()] == [True, False, False, True]
    assert not any(asks(line) for line in (BACKUP + RESTORE + QUERY).splitlines())


def test_a_list() -> None:
    """Size, time and name of each object; details and the heading are passed over."""
    assert listing(client_run(QUERY)) == [("/backup", Stored("x", 4096, "07/12/2020 14:09:12"))]
    assert listing(client_run(DETAIL)) == [
        ("/grid", Stored("0000ABCD", 72_191, "2016-04-01 02:17:31"))
    ]
    wrapped = QUERY.replace("A  /backup/x", "A\n     /backup/x y")
    assert listing(client_run(wrapped)) == [("/backup", Stored("x y", 4096, "07/12/2020 14:09:12"))]


def test_a_list_has_the_newest_version() -> None:
    """The active one; where none is, the first that is listed."""
    row = QUERY.splitlines()[-1]
    older, old = row.replace("4,096", "1,000").replace(" A ", " I "), row.replace(" A ", " I ")
    text = "\n".join([*QUERY.splitlines()[:2], old, older])
    assert [one.size for _, one in listing(client_run(text))] == [4096]
    assert [one.size for _, one in listing(client_run(f"{text}\n{row.replace('4,096', '7')}"))] == [
        7
    ]


def test_nothing_found_is_an_empty_list() -> None:
    """ANS1092W with return code 8, and nothing but that."""
    nothing = "ANS1092W No files matching search criteria were found"
    assert listing(client_run(nothing, 8)) == []
    for text, status in ((nothing, 0), (nothing, 12), ("", 8), ("", 0), (nothing + QUERY, 4)):
        with pytest.raises(ValueError, match="dsmc"):
            listing(client_run(text, status))


@pytest.mark.parametrize(
    "text",
    [
        QUERY.replace("4,096  B", "4.0 KB"),
        QUERY.replace("4,096", "4,09"),
        QUERY.replace(" A  /backup/x", " A"),
        QUERY.replace(" A  /backup/x", " A\n   backup/x"),
        QUERY + "something else\n",
        QUERY + "ANS1029E Communication is lost\n",
        "\n".join(QUERY.splitlines()[:2]),
        QUERY.splitlines()[-1],
    ],
)
def test_a_list_that_is_not_understood(text: str) -> None:
    """A line that could be anything makes the list none."""
    with pytest.raises(ValueError, match="dsmc"):
        listing(client_run(text))


def test_wrapped_lines_are_understood() -> None:
    """A file's line and a message go on in the next; each must come to its end."""
    wrapped = RESTORE.replace("/fs0/x --> /fs1/x", "/fs0/a/long/name -->\n/fs1/a/long/name")
    assert restore_problem(client_run(wrapped), 6491) is None
    message = RESTORE.replace("files from the", "files\nfrom the")
    assert restore_problem(client_run(message), 6491) is None
    cut = wrapped.replace("/fs1/a/long/name [Done]\n", "")
    assert "what became of the file" in (restore_problem(client_run(cut), 6491) or "")


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda one: one.name)
def test_what_a_sample_is(sample: Sample) -> None:
    """Each sample is what it is a sample of, and nothing else; its messages are read."""
    one = client_run(sample.text, sample.status)
    assert {name for name, good in VERDICTS.items() if good(one)} == set(sample.good_as)
    assert [message.code for message in one.messages] == sample.codes.split()
    assert any(asks(line) for line in one.lines) == sample.asks


def _is(read: Callable[[ClientRun], object]) -> Callable[[ClientRun], bool]:
    def good(one: ClientRun) -> bool:
        try:
            read(one)
        except ValueError:
            return False
        return True

    return good


VERDICTS: dict[str, Callable[[ClientRun], bool]] = {
    "backup": lambda one: backup_problem(one, 1) is None,
    "restore": lambda one: restore_problem(one, 1) is None,
    "list": _is(listing),
    "session": _is(session),
}


def test_which_server_answered() -> None:
    """Its name, its version and ours; the greeting's line about the node does not count."""
    text = "Home Server Name SERVER_A, Server Version Ver. 8, Rel. 1, Lev. 4.0, Node Name NODE"
    assert session(client_run(SESSION)) == text
    with pytest.raises(ValueError, match="no Node Name"):
        session(client_run(SESSION.partition("Node Name")[0]))


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


@given(st.data())
def test_lines_in_another_order_are_no_success(data: st.DataObject) -> None:
    """Where what was done, or its end, comes before what it follows from."""
    for text, verdict, done in (
        (BACKUP, "backup", "Successful"),
        (RESTORE, "restore", "processing"),
    ):
        lines = [line for line in lines_of(text) if not line.startswith("ANS")]
        end = next(number for number, line in enumerate(lines) if done in line)
        first = data.draw(st.integers(0, end - 1))
        then = data.draw(st.integers(end, len(lines) - 1))
        lines[first], lines[then] = lines[then], lines[first]
        assert not VERDICTS[verdict](client_run("\n".join(lines)))


@given(st.data())
def test_a_line_that_is_missing_or_foreign_is_noticed(data: st.DataObject) -> None:
    """Without its beginning, its word for the end or a needed count; or with any word between."""
    words = st.text(st.characters(codec="ascii", categories=["L", "P", "S"]), min_size=1)
    needed = ("Incremental", "Successful", "inspected", "backed", "failed", "Elapsed", "Restor")
    for text, verdict in ((BACKUP, "backup"), (RESTORE, "restore")):
        lines = lines_of(text)
        gone = data.draw(st.sampled_from([n for n, line in enumerate(lines) if _has(line, needed)]))
        if not lines[gone].endswith("[Done]"):
            assert not VERDICTS[verdict](client_run("\n".join([*lines[:gone], *lines[gone + 1 :]])))
        place, foreign = data.draw(st.integers(1, len(lines))), data.draw(words)
        lines.insert(place, foreign)
        assert not VERDICTS[verdict](client_run("\n".join(lines)))


def _has(line: str, words: Sequence[str]) -> bool:
    return any(word in line for word in words) and "bytes" not in line


@given(st.integers(0, len(BACKUP) - 4))
def test_a_backup_cut_off_anywhere_is_none(length: int) -> None:
    """Whatever is missing at the end, it is no success, whatever the return code."""
    assert backup_problem(client_run(BACKUP[:length]), 2) is not None


@given(st.integers(0, len(RESTORE) - 4))
def test_a_restore_cut_off_anywhere_is_none(length: int) -> None:
    """The same of a restore."""
    assert restore_problem(client_run(RESTORE[:length]), 6491) is not None


@given(st.text(), st.integers(-20, 20))
def test_any_other_text_is_no_success(text: str, status: int) -> None:
    """Nothing that dsmc did not write passes for what it would have written, and nothing raises."""
    one = ClientRun.of(status, text.splitlines())
    assert backup_problem(one, 1) is not None
    assert restore_problem(one, 1) is not None
    with pytest.raises(ValueError, match="dsmc"):
        listing(one)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20), st.data())
def test_a_list_cut_off_lacks_a_file(sizes: list[int], data: st.DataObject) -> None:
    """Cut off anywhere, it is no list, or one in which the last name is missing."""
    rows = [
        f"{size:>14,}  B  2024-01-01 00:00:00             STANDARD             A  /tsm/r/r_{n:04}"
        for n, size in enumerate(sizes)
    ]
    text = "\n".join(rows)
    cut = data.draw(st.integers(0, len(text) - 1))
    whole = [one for _, one in listing(client_run("\n".join([*HEAD, text])))]
    assert [one.size for one in whole] == sizes
    try:
        found = [one for _, one in listing(client_run("\n".join([*HEAD, text[:cut]])))]
    except ValueError:
        return
    assert whole[-1].name not in [one.name for one in found]


HEAD = QUERY.splitlines()[:2]


# -- what is fit for tape -------------------------------------------------------------------------


def item(path: bytes, kind: Any = "file", digest: int = 0) -> Item:
    return Item(path, kind, 10 if kind == "file" else 0, bytes([digest] * 32))


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([item(b"a", digest=1), item(b"b", digest=2)], None),
        ([], "it holds no file"),
        ([item(b"")], "not a directory"),
        ([item(b"a"), item(b"d", "dir")], "d is a directory"),
        ([item(b"a"), Item(b"l", "link", target=b"a")], "l is a link"),
        ([item(b"a", digest=1), item(b"c", digest=2), item(b"b", digest=1)], "a and b are alike"),
    ],
)
def test_what_goes_to_tape(items: list[Item], why: str | None) -> None:
    """Flat, not empty, no two files alike: cax's rules."""
    problem = fit_for_tape(Manifest(items))
    assert problem is None if why is None else why in (problem or "")


@given(st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1))
def test_a_name_on_tape_leads_back(name: str) -> None:
    """The run's name stands before each file's; a name that is not printable is refused."""
    if name.isprintable():
        assert name_on_tape("161111_1434", name.encode()) == f"161111_1434_{name}"
        assert name_off_tape("161111_1434", f"161111_1434_{name}") == name.encode()
    else:
        with pytest.raises(GiveUp):
            name_on_tape("161111_1434", name.encode())


@pytest.mark.parametrize("name", ["161111_1435_a", "161111_1434_", "a", "161111_1434_a/b", ""])
def test_a_name_of_another_run_is_refused(name: str) -> None:
    """What a tape gives must be of the run that was asked for."""
    with pytest.raises(GiveUp, match="not of 161111_1434"):
        name_off_tape("161111_1434", name)


# -- the steps, on simulated tapes ----------------------------------------------------------------

RUN = "161111_1434"


@define
class Ground:
    """A site with a run, and an archive that it reaches."""

    path: Path
    reach: Reach

    @property
    def source(self) -> Path:
        return self.path / "raw" / RUN

    @property
    def staged(self) -> Path:
        return self.path / "tsm" / RUN

    @property
    def data(self) -> Data:
        return Data(RUN, self.folder, self.manifest)

    @property
    def folder(self) -> str:
        tape = self.reach.there.method == "tsm"
        return str(self.staged if tape else self.path / "archive" / RUN)

    @property
    def manifest(self) -> Manifest:
        return manifest_of(self.source)

    def fault(self, *faults: str) -> None:
        (self.path / "faults").write_text("".join(f"{fault}\n" for fault in faults))

    def back_up(self, *, again: bool = False) -> Outcome[Manifest]:
        return back_up(self.reach, str(self.source), self.data, again)

    def compare(self, data: Data | None = None) -> str | None:
        return compare(self.reach, data or self.data).get()[0]

    def recall(self, data: Data | None = None, target: str = "back") -> Outcome[Any]:
        home = self.path / "raw"
        final = str(home / target / RUN)
        return recall(self.reach, data or self.data, final, [str(home)])

    def restored(self, target: str = "back") -> Path:
        return self.path / "raw" / target / RUN


def manifest_of(path: Path) -> Manifest:
    return digest_tree(vouched(path), sha512=True, report=to_nobody)


def ground_in(path: Path, method: str, **options: Any) -> Ground:
    for name in ("raw", "tsm", "archive", "tapes"):
        (path / name).mkdir()
    (path / "raw" / RUN).mkdir()
    for number, name in enumerate(("one.zip", "two words.zip", "three.json")):
        (path / "raw" / RUN / name).write_bytes(bytes([number]) * (3000 + number))
    return Ground(path, reach_in(path, method, **options))


def reach_in(path: Path, method: str, **options: Any) -> Reach:
    environment = {
        "DSMC_SIMULATOR_TAPES": str(path / "tapes"),
        "DSMC_SIMULATOR_FAULTS": str(path / "faults"),
    }
    settings = ArchiveOptions(
        command=(sys.executable, "-S", str(dsmc_faults.PROGRAM)), environment=environment, **options
    )
    here = Site(name="lngs", dir_raw=str(path / "raw"), dir_tsm=str(path / "tsm"))
    there = Site(name="tape", method=method, dir_raw=str(path / "archive"), archive=settings)
    return Reach(here, there)


@pytest.fixture
def tape(tmp_path: Path) -> Ground:
    """A site that reaches simulated tapes."""
    return ground_in(tmp_path, "tsm")


@pytest.fixture(params=["tsm", "directory"])
def ground(tmp_path: Path, request: pytest.FixtureRequest) -> Ground:
    """A site that reaches an archive of each kind."""
    return ground_in(tmp_path, request.param)


@pytest.mark.tape
def test_there_and_back(ground: Ground) -> None:
    """What was backed up is listed, compares equal and comes back; nothing else is left behind."""
    manifest = ground.back_up().get()
    assert manifest == ground.manifest
    names = {f"{RUN}_{path.name}": path.stat().st_size for path in ground.source.iterdir()}
    found = contents(ground.reach, ground.folder).get()
    assert {one.name: one.size for one in found} == names
    assert check(ground.reach).get()
    above = [str(Path(ground.folder).parent)]
    assert holdings(ground.reach, above).get().keys() == {ground.folder}
    assert ground.compare() is None
    assert not ground.staged.exists()
    assert not list((ground.path / "tsm" / ".caxev-restored").iterdir())
    assert ground.recall().get().digest == manifest.digest
    assert manifest_of(ground.restored()) == ground.manifest
    assert [path.name for path in ground.restored().parent.iterdir()] == [RUN]


@pytest.mark.tape
def test_steps_are_repeatable(ground: Ground) -> None:
    """Done twice, each ends as done once."""
    ground.back_up().get()
    ground.back_up().get()
    assert ground.compare() is None
    assert ground.compare() is None
    ground.recall().get()
    assert "restore" not in ground.recall().transcript
    assert manifest_of(ground.restored()) == ground.manifest


@pytest.mark.tape
def test_staging_takes_no_room(tape: Ground) -> None:
    """What is staged on one file system with the source is the same files by other names."""
    tape.fault("incremental killed")
    assert isinstance(tape.back_up().failed, Retry)
    for path in tape.source.iterdir():
        assert (tape.staged / f"{RUN}_{path.name}").samefile(path)


@pytest.mark.tape
def test_staging_holds_nothing_else(tape: Ground) -> None:
    """What an earlier attempt, or somebody else, has left in staging does not go to tape."""
    tape.staged.mkdir()
    (tape.staged / "stray").write_text("stray")
    (tape.staged / f"{RUN}_one.zip").write_text("half of it")
    tape.back_up().get()
    assert tape.compare() is None
    names = [one.name for one in contents(tape.reach, tape.folder).get()]
    assert sorted(names) == sorted(f"{RUN}_{path.name}" for path in tape.source.iterdir())


PASSING = [
    ("incremental lost", "ANS1029E"),
    ("incremental media", "ANS1312E"),
    ("incremental quota", "ANS1311E"),
    ("incremental changed", "ANS1228E"),
    ("incremental unreachable", "ANS1017E"),
    ("incremental killed", "signal 9"),
    ("incremental truncated", "breaks off"),
    ("incremental question", "asks a question"),
    ("query unreachable", "ANS1017E"),
    ("query lost", "ANS1029E"),
]


@pytest.mark.tape
@pytest.mark.parametrize(("fault", "why"), PASSING)
def test_a_backup_goes_wrong(tape: Ground, fault: str, why: str) -> None:
    """It is told by the code and the text, with all that dsmc wrote; the next one makes it good."""
    tape.fault(*(["query none"] if fault.startswith("query") else []), fault)
    outcome = tape.back_up()
    assert isinstance(outcome.failed, Retry)
    assert why in str(outcome.failed)
    assert "Node Name: SIMULATOR" in outcome.transcript
    tape.back_up().get()
    assert tape.compare() is None


@pytest.mark.tape
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("lost", "ANS1029E"),
        ("media", "ANS1312E"),
        ("partial", "ANS1228E"),
        ("killed", "signal 9"),
        ("truncated", "breaks off"),
        ("question", "asks a question"),
        ("wrong-byte", "differs"),
    ],
)
def test_a_recall_goes_wrong(tape: Ground, fault: str, why: str) -> None:
    """Nothing gets its name; the next one keeps what is right, and makes it good."""
    tape.back_up().get()
    tape.fault(f"restore {fault}")
    outcome = tape.recall()
    assert isinstance(outcome.failed, Damaged if fault == "wrong-byte" else Retry)
    assert why in str(outcome.failed)
    assert not tape.restored().exists()
    outcome = tape.recall()
    assert manifest_of(tape.restored()) == tape.manifest
    if fault in ("lost", "partial", "killed"):
        (restored,) = re.findall(r"objects restored:\s+(\d+)", outcome.transcript)
        assert int(restored) < len(tape.manifest.files)


@pytest.mark.tape
def test_a_wrong_byte_on_tape_is_found(tape: Ground) -> None:
    """It is named, never accepted, and sent again only where that is asked for."""
    tape.fault("incremental wrong-byte")
    tape.back_up().get()
    assert f"1 files: {tape.manifest.files[1].path.decode()} differs" in (tape.compare() or "")
    tape.back_up().get()
    assert "differs" in (tape.compare() or "")
    tape.back_up(again=True).get()
    assert tape.compare() is None


@pytest.mark.tape
def test_two_wrong_bytes_do_not_make_a_right_one(tape: Ground) -> None:
    """One on tape and one on the way back, in the same place."""
    tape.fault("incremental wrong-byte", "restore wrong-byte")
    tape.back_up().get()
    assert "differs" in (tape.compare() or "")


@pytest.mark.tape
def test_a_list_that_breaks_off_is_no_list(tape: Ground) -> None:
    """A file that is not listed is not on tape, whatever the return code."""
    tape.fault("query none", "query truncated")
    assert "lacks" in str(tape.back_up().failed)


@pytest.mark.tape
def test_nothing_on_tape_is_replaced(tape: Ground) -> None:
    """Where the folder holds something else, nothing is sent."""
    tape.back_up().get()
    tape.compare()
    (tape.source / "one.zip").write_bytes(b"another run of that name")
    outcome = tape.back_up()
    assert isinstance(outcome.failed, GiveUp)
    assert "nothing on tape is replaced" in str(outcome.failed)


@pytest.mark.tape
def test_what_is_inactive_is_still_there(tape: Ground) -> None:
    """A later backup of the emptied directory makes files inactive: they come back all the same."""
    tape.back_up().get()
    tape.compare()
    tape.staged.mkdir()
    command = (*(tape.reach.options.command or ()), "incremental", f"{tape.staged}/")
    subprocess.run(command, env={**os.environ, **tape.reach.options.environment}, check=True)
    assert tape.recall().get().digest == tape.manifest.digest


@pytest.mark.tape
def test_a_source_that_is_not_what_it_was(tape: Ground) -> None:
    """It does not go to tape: by its manifest, or where only cax knew it, by its checksum."""
    data = Data(RUN, tape.folder, None, tape.manifest.cax_checksum())
    back_up(tape.reach, str(tape.source), data, False).get()
    assert tape.compare(data) is None
    expected = tape.data
    (tape.source / "one.zip").write_bytes(b"other")
    for one in (data, expected):
        outcome = back_up(tape.reach, str(tape.source), one, False)
        assert isinstance(outcome.failed, GiveUp)


@pytest.mark.tape
def test_what_cax_has_brought_there_comes_back(tape: Ground) -> None:
    """Without a manifest the names are those on tape, and the checksum tells."""
    tape.back_up().get()
    data = Data(RUN, tape.folder, None, tape.manifest.cax_checksum())
    tape.recall(data).get()
    assert manifest_of(tape.restored()) == tape.manifest
    other = tape.recall(evolve(data, checksum="ab" * 64), "other")
    assert "its checksum differs" in str(other.failed)
    assert not tape.restored("other").exists()


SWAPPING = """\
for one in "$RAW"/back/.caxev-part-*; do
    if [ -d "$one" ]; then mv "$one" "$one.aside"; ln -s "$OUT" "$one"; fi
done
exec "$@"
"""


@pytest.mark.tape
def test_a_tape_client_writes_where_nobody_else_may(tmp_path: Path) -> None:
    """It would follow a link that is put in the place of the directory that it restores to."""
    (tmp_path / "outside").mkdir()
    tape = ground_in(tmp_path, "tsm")
    manifest = tape.back_up().get()
    options = tape.reach.there.archive
    assert options.command is not None
    spoilt = evolve(
        options,
        command=("sh", "-c", SWAPPING, "sh", *options.command),
        environment={
            **options.environment,
            "RAW": str(tmp_path / "raw"),
            "OUT": str(tmp_path / "outside"),
        },
    )
    reach = evolve(tape.reach, there=evolve(tape.reach.there, archive=spoilt))
    tape = evolve(tape, reach=reach)
    (tmp_path / "raw" / "back").mkdir()
    assert tape.recall().get().digest == manifest.digest
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.tape
@pytest.mark.parametrize("where", ["dir_tsm", "scratch"])
def test_nothing_is_staged_or_restored_where_others_may_write(
    tape: Ground, tmp_path: Path, where: str
) -> None:
    """What stands there would go to tape, and be taken for what came from there."""
    tape.back_up().get()
    if where == "dir_tsm":
        (tmp_path / "tsm").chmod(0o777)
        outcome = tape.back_up()
    else:
        (tmp_path / "scratch").mkdir()
        (tmp_path / "scratch").chmod(0o777)
        options = ArchiveOptions(scratch=str(tmp_path / "scratch"))
        reach = evolve(tape.reach, here=evolve(tape.reach.here, archive=options))
        outcome = evolve(tape, reach=reach).recall()
    assert isinstance(outcome.failed, Denied)
    assert "others may write" in outcome.failed.why


@pytest.mark.tape
def test_nothing_is_written_in_the_mount_point_of_staging(tape: Ground) -> None:
    """Its marker is not there if its disk is not: all steps wait, and leave it empty."""
    tape.back_up().get()
    disk = tape.path / "tsm"
    marker = make_marker(str(disk), "lngs", "dir_tsm")
    here = evolve(tape.reach.here, markers={str(disk): marker})
    tape = evolve(tape, reach=evolve(tape.reach, here=here))
    disk.rename(tape.path / "disk")
    disk.mkdir()
    steps = (
        tape.back_up(),
        tape.recall(),
        compare(tape.reach, tape.data),
        unstage(tape.reach, RUN),
    )
    for outcome in steps:
        assert isinstance(outcome.failed, RootAway)
        assert outcome.failed.root == str(disk)
    assert list(disk.iterdir()) == []
    disk.rmdir()
    (tape.path / "disk").rename(disk)
    assert tape.compare() is None


@pytest.mark.tape
def test_staging_whose_mount_point_is_root_s_is_waited_for(
    tape: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may write there before its disk is mounted, and that is no fault of the run."""
    if os.geteuid() != 0:
        pytest.skip("only root has directories of root's")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for outcome in (tape.back_up(), tape.recall()):
        assert isinstance(outcome.failed, Denied)
        assert "mount its disk" in outcome.failed.why


@pytest.fixture
def far() -> Iterator[Path]:
    """A directory on another file system than the data."""
    if not elsewhere():
        pytest.skip("there is one file system here")
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        yield Path(directory)


@pytest.mark.tape
def test_a_copy_from_scratch_on_another_file_system_is_read_before_it_is_named(
    tape: Ground, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was compared is not what stands there then: the disk may give something else."""
    tape.back_up().get()
    options = ArchiveOptions(scratch=str(far / "scratch"))
    tape = evolve(tape, reach=evolve(tape.reach, here=evolve(tape.reach.here, archive=options)))
    copy_file = incoming.copy_file

    def spoiling(old: bytes, new: bytes) -> None:
        copy_file(vouched(old), vouched(new))
        if new.endswith(b"one.zip"):
            path = Path(os.fsdecode(new))
            before = path.stat()
            path.write_bytes(bytes([255]) * before.st_size)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with monkeypatch.context() as patched:
        patched.setattr(incoming, "copy_file", spoiling)
        outcome = tape.recall()
    assert isinstance(outcome.failed, Retry)
    assert "the disk gives something else" in outcome.failed.why
    assert not tape.restored().exists()
    tape.recall().get()
    assert manifest_of(tape.restored()) == tape.manifest
    assert [path.name for path in tape.restored().parent.iterdir()] == [RUN]


@pytest.mark.tape
def test_a_copy_from_scratch_leaves_min_free(
    tape: Ground, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch on another file system has room of its own: the data's counts as well."""
    tape.back_up().get()
    options = ArchiveOptions(scratch=str(far / "scratch"))
    here = evolve(tape.reach.here, archive=options, min_free=2 << 30)
    monkeypatch.setattr(StagedCopy, "free", lambda _: 1 << 30)  # scratch has more
    outcome = evolve(tape, reach=evolve(tape.reach, here=here)).recall()
    assert isinstance(outcome.failed, Retry)
    assert "not enough space" in outcome.failed.why
    assert not tape.restored().exists()


@pytest.mark.tape
def test_what_is_not_on_tape_does_not_come_back(ground: Ground) -> None:
    """It is given up, and no directory is left behind under its name."""
    outcome = ground.recall()
    assert isinstance(outcome.failed, GiveUp)
    assert "is not on tape" in str(outcome.failed)
    assert not ground.restored().parent.exists()


@pytest.mark.tape
def test_what_stands_there_is_not_replaced(tape: Ground) -> None:
    """Something else under the name is left as it is."""
    tape.back_up().get()
    tape.restored().mkdir(parents=True)
    (tape.restored() / "mine").write_text("mine")
    assert isinstance(tape.recall().failed, GiveUp)
    assert (tape.restored() / "mine").read_text() == "mine"


@pytest.mark.tape
def test_without_a_digest_nothing_is_taken_for_it(tape: Ground) -> None:
    """It can be fetched, but what stands under its name already is not called this copy."""
    tape.back_up().get()
    data = Data(RUN, tape.folder)
    assert not data.is_known
    assert tape.recall(data).get().digest == tape.manifest.digest
    (tape.restored() / "one.zip").write_bytes(b"other")
    assert "not known whether" in str(tape.recall(data).failed)


def test_scratch_is_cleared_before_another_comparison_fills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the files that the other has restored for lost on tape."""
    ground, cleared = ground_in(tmp_path, "directory"), list[bytes]()

    def clear_locked(path: Confined) -> None:
        if path.count(b".caxev-restored"):
            with pytest.raises(Retry, match="another process"), writing(path, directory=True):
                pass
            cleared.append(path)
        clear(path)

    monkeypatch.setattr(steps, "clear", clear_locked)
    ground.back_up().get()
    assert ground.compare() is None
    assert len(cleared) == 1


def test_a_digest_counts_although_its_manifest_is_lost(tmp_path: Path) -> None:
    """Other data is neither sent nor accepted for want of the list of its files."""
    ground = ground_in(tmp_path, "directory")
    data = evolve(ground.data, expected=None, digest=ground.manifest.digest)
    assert back_up(ground.reach, str(ground.source), data, False).get() == ground.manifest
    assert ground.compare(data) is None
    other = evolve(data, digest="b3:other")
    assert ground.compare(other) == "its manifest differs"
    assert isinstance(ground.recall(other).failed, Damaged)
    assert isinstance(back_up(ground.reach, str(ground.source), other, False).failed, Damaged)


@pytest.mark.parametrize("location", ["/tsm/name", "/tsm//name/", "//tsm/name//"])
def test_a_location_as_cax_wrote_it(location: str) -> None:
    """Slashes twice, and at the end."""
    assert folder_of(location) == "/tsm/name"


@pytest.mark.tape
def test_a_client_that_hangs_is_killed(tmp_path: Path) -> None:
    """Without a sign of life it is killed, and that is told."""
    tape = ground_in(tmp_path, "tsm", patience=2.0)
    tape.staged.mkdir()
    tape.fault("incremental hang")
    with pytest.raises(Retry, match="gave no sign of life for 2 s"):
        archive(tape.reach).put(tape.folder, tape.folder, [], again=False)
    assert not simulators(tmp_path)


@pytest.mark.tape
def test_options_that_cannot_be_read(tmp_path: Path) -> None:
    """The client is told of the file by ``-optfile``; it waits while it cannot read that."""
    tape = ground_in(tmp_path, "tsm", optfile=str(tmp_path / "dsm.opt"))
    outcome = tape.back_up()
    assert isinstance(outcome.failed, Denied)
    assert "ANS1035S" in str(outcome.failed)
    (tmp_path / "dsm.opt").touch()
    tape.back_up().get()


@pytest.mark.tape
def test_a_node_that_is_refused(tape: Ground) -> None:
    """The archive's operator must let it in: that is waited for, and is no fault of the run."""
    tape.fault("incremental refused")
    outcome = tape.back_up()
    assert isinstance(outcome.failed, Denied)
    assert "ANS1353E" in outcome.failed.why
    tape.back_up().get()


@pytest.mark.tape
def test_no_room_to_restore(tape: Ground) -> None:
    """What would not leave enough free is not begun."""
    tape.back_up().get()
    tape.reach = evolve(tape.reach, here=evolve(tape.reach.here, min_free=1 << 62))
    assert "not enough space" in str(tape.recall().failed)


@pytest.mark.tape
@pytest.mark.parametrize("name", ["*", "a?b", 'quo"te', "brace{1}"])
def test_a_name_that_means_something_to_the_client(tape: Ground, name: str) -> None:
    """Wildcards and quotes would name other files: they are refused before anything is sent."""
    (tape.source / name).write_bytes(name.encode())
    outcome = tape.back_up()
    assert isinstance(outcome.failed, GiveUp)
    assert "cannot be given the name" in str(outcome.failed)


_SHELF = """
from caxev.tape.base import Archive, Stored
class RunCache(Archive):
    def folder(self, name): return f"/shelf/{name}"
    def listed(self, folder): return [Stored("box", 1)]
"""


def test_an_archive_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package adds a method by an entry point; no listener is looked for there."""
    (tmp_path / "shelf.py").write_text(_SHELF)
    info = tmp_path / "shelf-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[caxev.tape]\nshelf = shelf:RunCache\n")
    (tmp_path / "sites.json").write_text('[{"name": "cellar", "method": "shelf"}]')
    with pytest.raises(ConfigError, match="method must be"):
        load_sites(tmp_path / "sites.json")
    monkeypatch.syspath_prepend(str(tmp_path))
    cellar = load_sites(tmp_path / "sites.json").get("cellar")
    assert not cellar.listener
    assert "shelf" in methods()
    reach = Reach(Site(name="here"), cellar)
    assert contents(reach, "/shelf/a").get() == [Stored("box", 1)]
    with pytest.raises(GiveUp, match="no archive is reached by 'attic'"):
        archive(Reach(Site(name="here"), Site(name="there", method="attic")))


def simulators(path: Path) -> list[int]:
    """The simulators that work on the tapes there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = str(path).encode() in (process / "environ").read_bytes()
            if ours and dsmc_faults.PROGRAM.name.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


_STEP = """
import sys
from pathlib import Path
from tests.test_tape import ground_in
ground_in(Path(sys.argv[1]), "tsm").back_up()
"""


# -- killed ---------------------------------------------------------------------------------------


def go(ground: Ground) -> None:
    """To tape by way of something left in staging, compared, and back."""
    ground.back_up().get()
    assert ground.compare() is None
    ground.recall().get()


EACH = 5
"""Of so many points one is tried: each takes a whole journey to tape and back."""


@pytest.mark.tape
def test_killed_at_each_point_of_the_steps(tmp_path: Path) -> None:
    """Killed at each fifth of the points that a backup, a comparison and a recall pass.

    The next attempt ends as if nothing had been: the same on tape, back under its name, and
    nothing left over in staging or scratch.
    """
    whole = prepared(tmp_path / "whole")
    points = points_of(partial(go, whole), tmp_path / "points")
    assert len(points) >= 10
    for point in points[::EACH]:
        ground = prepared(tmp_path / point.replace(":", "-"))
        assert killed_at(point, partial(go, ground)), point
        go(ground)
        assert left_in(ground) == left_in(whole), point


def points_of(act: Callable[[], object], log: Path) -> list[str]:
    """Act in a process of its own; each point that it passed, at a middle passing."""
    assert not killed_at("nowhere:1", act, log)
    passed = Counter(line.split()[1] for line in log.read_text().splitlines())
    return [f"{point}:{times // 2 + 1}" for point, times in passed.items()]


def killed_at(at: str, act: Callable[[], object], log: Path | None = None) -> bool:
    """Act in a process of its own until it passes that point; whether it was killed there."""
    child = os.fork()
    if child == 0:
        failpoints._passed.clear()
        vars(failpoints).update(ARMED=True, _AT=frozenset({at}), _LOG=log)
        sys.addaudithook(failpoints._heard)
        try:
            act()
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def prepared(path: Path) -> Ground:
    path.mkdir()
    ground = ground_in(path, "tsm")
    ground.staged.mkdir()
    (ground.staged / "stray").write_text("left by somebody")
    return ground


def left_in(ground: Ground) -> dict[str, Any]:
    """What stands everywhere in the end."""
    found = contents(ground.reach, ground.folder).get()
    return {
        "on tape": sorted((one.name, one.size) for one in found),
        "staging": sorted(path.name for path in (ground.path / "tsm").rglob("*")),
        "back": manifest_of(ground.restored()).digest,
        "beside": sorted(path.name for path in ground.restored().parent.iterdir()),
    }


@pytest.mark.tape
def test_the_client_dies_with_us(tmp_path: Path) -> None:
    """However the process that runs it is killed, dsmc does not go on alone."""
    (tmp_path / "faults").write_text("incremental hang\n")
    command = [sys.executable, "-c", _STEP, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as process:
        try:
            wait(lambda: simulators(tmp_path) and (tmp_path / "faults").read_text() == "")
            process.send_signal(signal.SIGKILL)
            process.wait()
            wait(lambda: not simulators(tmp_path))
        finally:
            process.kill()
