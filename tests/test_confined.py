"""Paths that have been confined are a type of their own: no other path reaches the disk code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]

HERE: Final = (
    "open_resolved({}, 0)",
    "opened({}, 0)",
    "read_file({}, 1)",
    "look({})",
    "look_source({})",
    "scan({})",
    "digest_tree({}, sha512=False, report=to_nobody)",
    "identity({})",
    "writing({}, directory=True)",
    "sync_tree({})",
    "publish({}, good)",
    "publish(good, {})",
    "rename_new({}, good)",
    "rename_new(good, {})",
    "make_parents({}, ())",
    "bring_in({}, '/data/run', ())",
    "copy_file({}, good)",
    "copy_file(good, {})",
    "place_file({}, good)",
    "place_file(good, {})",
    "link_file({}, good)",
    "link_file(good, {})",
    "mirror({}, good)",
    "mirror(good, {})",
    "pinned({})",
    "name_in({}, b'')",
    "StagedCopy({}, (), ())",
    "resolved.unlink({})",
    "resolved.rmdir({})",
    "resolved.mkdir({}, 0)",
    "resolved.symlink(b'', {})",
    "resolved.rename({}, good)",
    "resolved.rename(good, {})",
    "resolved.link({}, good)",
    "resolved.link(good, {})",
    "resolved.remove({})",
    "resolved.chmod({}, 0)",
    "resolved.sync({})",
    "receive.write_piece({}, piece, b'')",
    "receive.read_piece({}, piece)",
)
"""Calls that take a path of this machine."""
THERE: Final = (
    "await remote.look({})",
    "await remote.source({})",
    "await remote.free({})",
    "await remote.make_parents({})",
    "await remote.make_directory({})",
    "await remote.remove_tree({})",
    "await remote.remove_all({})",
    "await remote.write_new({}, b'')",
    "remote.opened({}, 0)",
    "await remote.withdraw({}, far)",
    "await remote.publish({}, far)",
    "await remote.publish(far, {})",
    "storage.remove({})",
    "storage.rename({}, far)",
    "storage.make_directories([{}])",
)
"""Calls that take a path of another machine."""
HEADER: Final = """\
import os
from caxev.files import *
from caxev.files import resolved
from caxev.files.identity import identity
from caxev.files.incoming import copy_file, link_file
from caxev.files.publishing import rename_new, sync_tree
from caxev.files.resolved import read_file
from caxev.transfer import receive
from caxev.transfer.grid import GridStorage
from caxev.transfer.ssh.remote import Remote

async def calls(
    text: str, raw: bytes, good: Confined, far: FarPath, piece: Piece,
    remote: Remote, storage: GridStorage,
) -> None:
"""


def refused(directory: Path, lines: list[str]) -> set[int]:
    """Return the indices of the lines that mypy refuses."""
    snippet = directory / "snippet.py"
    snippet.write_text(HEADER + "".join(f"    {line}\n" for line in lines))
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            str(snippet),
        ],  # with the cache of the check before the tests
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ended.stderr, ended.stderr
    first = HEADER.count("\n") + 1
    found = re.findall(r"snippet\.py:(\d+): error: (.*)", ended.stdout)
    assert all(re.search(r"arg-type|type-var|list-item", why) for _, why in found), ended.stdout
    return {int(number) - first for number, _ in found}


def test_an_unconfined_path_reaches_no_disk_code(tmp_path: Path) -> None:
    """Mypy refuses a text, bytes, a path that was joined by hand, and one of the other side."""
    bad, right = list[str](), list[str]()
    for calls, good, other in ((HERE, "good", "far"), (THERE, "far", "good")):
        wrong = ("text", "raw", f"os.path.join({good}, b'x')", other)
        bad += [call.format(path) for call in calls for path in wrong]
        right += [call.format(path) for call in calls for path in (good, f"parent({good})")]
    assert refused(tmp_path, bad + right) == set(range(len(bad)))


CONFINING: Final = {
    ("caxev/files/paths.py", "_held"),
    ("caxev/files/paths.py", "root_of"),
    ("caxev/files/private.py", "make_private"),
    ("caxev/files/roots.py", "_in_root"),
    ("caxev/transfer/gfal.py", "check"),
    ("caxev/transfer/grid.py", "confined"),
    ("caxev/transfer/ssh/session.py", "_held"),
}
"""The functions that resolve and check a path, or know it to be a root."""


def test_only_functions_that_confine_make_confined_paths() -> None:
    """Everywhere else a path is derived from one that was confined, or confined itself."""
    makers = set()
    for path in (*(ROOT / "caxev").rglob("*.py"), *(ROOT / "handlers").glob("*.py")):
        text = path.read_text()
        if "Confined(" not in text and "FarPath(" not in text:
            continue
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                names = {
                    call.func.id
                    for call in ast.walk(function)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
                if names & {"Confined", "FarPath"}:
                    makers.add((str(path.relative_to(ROOT)), function.name))
    assert makers == CONFINING
