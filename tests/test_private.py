"""Where only the listener may write, and what goes between that and the data directories."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve

from caxev.batch.base import End
from caxev.batch.folder import Folder, Place
from caxev.batch.runner import run as run_job
from caxev.batch.runner import run_here
from caxev.batch.work import take_stock
from caxev.cli.processes import check_private
from caxev.cli.sites import private_problems
from caxev.config import ConfigError, Site, load_sites, state_directory
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.files import (
    Confined,
    Meter,
    Seen,
    bring_in,
    confine,
    landing,
    make_private,
    mirror,
    not_private,
    pinned,
)
from caxev.files.incoming import copy_file, forget_incoming, link_file
from caxev.rucio.files import Checked
from caxev.rucio.moving import Fetching
from caxev.rucio.names import Did
from tests.forked import Forked
from tests.places import vouched
from tests.test_commands import SHM, elsewhere
from tests.test_processing import make_input, quiet, spec_in, written

SECRET = "the password"


@pytest.fixture
def far() -> Iterator[Path]:
    """A directory on another file system than `tmp_path`."""
    if not elsewhere():
        pytest.skip("there is one file system here")
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        yield Path(directory)


# -- which directories will do --------------------------------------------------------------------


def test_a_private_directory_is_made(tmp_path: Path) -> None:
    """With all above it, closed to others, whatever the umask; done again it is as it was."""
    path = tmp_path / "a" / "b"
    before = os.umask(0)
    try:
        assert make_private(str(path)) == vouched(path)
        path.chmod(0o755)
        assert make_private(str(path)) == vouched(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o700


def link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_name("x")))


def file(path: Path) -> None:
    path.rmdir()
    path.touch()


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "open to its group": (lambda path: path.chmod(0o770), "chmod go-w"),
    "below what anybody may write": (lambda path: path.parent.chmod(0o777), "replace what is in"),
    "another user's": (lambda path: os.chown(path, 12345, -1), "belongs to another user"),
    "below another user's": (lambda path: os.chown(path.parent, 12345, -1), "may replace"),
    "a link": (link, "is a link"),
    "a file": (file, "is not a directory"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_others_may_write_is_refused(tmp_path: Path, how: str) -> None:
    """Whoever can write there, or put another directory in its place, would be obeyed."""
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    path = tmp_path / "above" / "state"
    make_private(str(path))
    spoil, why = SPOILT[how]
    spoil(path)
    assert why in (not_private(str(path)) or "")
    with pytest.raises(Denied):
        make_private(str(path))


def test_a_mount_point_without_its_disk_keeps_nobody_from_listening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is root's until then: what needs it waits, and so a listener may start before it."""
    if os.geteuid() != 0:
        pytest.skip("only root has directories of root's")
    for name in ("raw", "tsm", "jobs"):
        (tmp_path / name).mkdir()
    made = {"command": ["x"], "directory": str(tmp_path / "jobs")}
    entry = {
        "name": "a",
        "dir_raw": str(tmp_path / "raw"),
        "dir_processed": str(tmp_path / "processed"),
        "dir_tsm": str(tmp_path / "tsm"),
        "state": str(tmp_path / "state"),
        "processing": made,
    }
    (tmp_path / "sites.json").write_text(json.dumps([entry]))
    (tmp_path / "jobs" / "a").mkdir()
    sites = load_sites(tmp_path / "sites.json")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    check_private("a", sites)
    assert len([*private_problems(sites.get("a"), sites)]) == 2
    for path in ("tsm", "jobs/a"):
        with pytest.raises(Denied, match="mount its disk"):
            make_private(str(tmp_path / path))
    os.chown(tmp_path / "tsm", 54321, -1)
    with pytest.raises(ConfigError, match="another user"):
        check_private("a", sites)


def test_a_directory_for_all_in_which_each_keeps_his_own_will_do(tmp_path: Path) -> None:
    """Below such as /tmp nobody can rename what is another's."""
    (tmp_path / "above").mkdir()
    (tmp_path / "above").chmod(0o1777)
    assert make_private(str(tmp_path / "above" / "state"))


WITHIN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "state": lambda root: {"state": str(root)},
    "deep below": lambda root: {"state": str(root / "a" / "b")},
    "by another name": lambda root: {"state": str(root.parent / "alias")},
    "processing": lambda root: {"processing": {"command": ["x"], "directory": str(root)}},
    "staging": lambda root: {"dir_tsm": str(root / "tsm")},
    "scratch": lambda root: {"archive": {"scratch": str(root)}},
}


@pytest.mark.parametrize("what", WITHIN)
@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_it_does_not_lie_where_other_sites_may_write(tmp_path: Path, what: str, kind: str) -> None:
    """Neither in a directory of its own site nor in one of a site on the same machine."""
    for name in ("raw", "processed"):
        (tmp_path / name).mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / kind)
    mine = {"name": "a", "method": "local", "dir_processed": str(tmp_path / "processed")}
    other = {"name": "b", "method": "local", "dir_raw": str(tmp_path / "raw")}
    file = tmp_path / "sites.json"
    file.write_text(json.dumps([{**mine, **WITHIN[what](tmp_path / kind)}, other]))
    sites = load_sites(file)
    (problem,) = private_problems(sites.get("a"), sites)
    assert "where other sites may write" in problem


def test_sites_check_and_the_listener_refuse_it(tmp_path: Path) -> None:
    """By one line that names the key, and status 3 of the listener."""
    raw = tmp_path / "raw"
    raw.mkdir()
    file = tmp_path / "sites.json"
    file.write_text(json.dumps([{"name": "a", "dir_raw": str(raw), "state": str(raw / "state")}]))
    environment = {**os.environ, "CAXEV_MONGO_URI": "mongodb://127.0.0.1:1/?replicaSet=x"}
    for words, code in ((["sites", "check"], 1), (["listen"], 3), (["listen", "--dry-run"], 3)):
        command, pipe = ["--config", str(file), *words, "--site", "a"], subprocess.PIPE
        with Forked(command, environment, stdout=pipe, stderr=subprocess.STDOUT) as done:
            said = done.communicate()[0].decode()
        assert done.returncode == code
        assert "state: " in said
        assert "where other sites may write" in said
    assert list(raw.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "warned"), [({}, True), ({"directory": "/jobs"}, False), ({"system": "local"}, False)]
)
def test_jobs_of_a_batch_system_need_a_place_that_nodes_see(
    tmp_path: Path, more: dict[str, str], warned: bool
) -> None:
    """The state directory is usually on the listener's own disk, so that one must be named."""
    how = {"command": ["x"], "system": "slurm", **more}
    file = tmp_path / "sites.json"
    file.write_text(json.dumps([{"name": "a", "dir_processed": "/made", "processing": how}]))
    warnings = load_sites(file).warnings
    assert [("the nodes must see it" in one) for one in warnings] == [True] * warned


def test_no_copy_lies_in_dir_tsm(tmp_path: Path) -> None:
    """Data for tape is staged there: an entry that names a place in it names nothing of ours."""
    (tmp_path / "tsm" / "run").mkdir(parents=True)
    (tmp_path / "raw").mkdir()
    site = Site(name="a", dir_raw=str(tmp_path / "raw"), dir_tsm=str(tmp_path / "tsm"))
    assert site.roots == (str(tmp_path / "raw"),)
    with pytest.raises(GiveUp, match="not inside"):
        confine(str(tmp_path / "tsm" / "run"), site.roots)


def test_what_nobody_goes_on_with_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By when anything in it was changed last, whatever times its files have been given."""
    assert forget_incoming(str(tmp_path)) == 0
    one = tmp_path / "incoming" / "one" / "copy"
    one.mkdir(parents=True)
    (one / "data").touch()
    os.utime(one / "data", (0, 0))
    (one / "link").symlink_to(tmp_path)
    assert forget_incoming(str(tmp_path)) == 0
    monkeypatch.setattr("caxev.files.incoming.KEPT", -1.0)
    assert forget_incoming(str(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "incoming"]
    assert list((tmp_path / "incoming").iterdir()) == []


KILLED = """
import os, sys
from caxev.files import landing
with landing(sys.argv[1], b"/data/run") as private:
    os.link(sys.argv[2], os.path.join(private, b"link"))
    os._exit(9)
"""


def test_what_a_killed_process_linked_goes_at_once(tmp_path: Path) -> None:
    """Else the bytes of a copy that is deleted would stay for days; what may be in use stays."""
    state, data = str(tmp_path / "state"), tmp_path / "data"
    data.touch()
    subprocess.run([sys.executable, "-c", KILLED, state, str(data)], check=False)
    assert data.stat().st_nlink == 2
    there = tmp_path / "state" / "incoming" / "another-machine.passing"
    there.mkdir()
    with landing(state, b"/data/other") as private:
        assert forget_incoming(state) == 1
        assert Path(os.fsdecode(private)).exists()
        assert there.exists()
        with pytest.raises(Retry, match="another process"), landing(state, b"/data/other"):
            pass
    assert data.stat().st_nlink == 1


def test_where_state_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sites.json says, else CAXEV_STATE, else systemd, else the user's own; each site's own."""
    where = {"CAXEV_STATE": "/b", "STATE_DIRECTORY": "/c:/d", "XDG_STATE_HOME": "/e"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    assert state_directory(Site(name="lngs", state="/a")) == "/a/lngs"
    site = Site(name="lngs")
    assert state_directory(site) == "/b/lngs"
    monkeypatch.delenv("CAXEV_STATE")
    assert state_directory(site) == "/c/lngs"
    monkeypatch.delenv("STATE_DIRECTORY")
    assert state_directory(site) == "/e/caxev/lngs"
    assert state_directory(evolve(site, name="../x/y")) == "/e/caxev/__x_y"


# -- jobs -----------------------------------------------------------------------------------------


def test_a_job_s_files_are_not_taken_from_where_others_write(tmp_path: Path) -> None:
    """What stands there would be executed: at the node, too, it is looked at before."""
    make_input(tmp_path)
    group = Folder(tmp_path / "jobs").file([spec_in(tmp_path, argv=("touch", f"{tmp_path}/ran"))])
    (tmp_path / "jobs").chmod(0o777)
    for deed in (
        lambda: run_job(Place(group, 0)),
        lambda: run_here(str(tmp_path / "jobs"), spec_in(tmp_path)),
    ):
        with pytest.raises(Denied, match="others may write"):
            deed()
    assert not (tmp_path / "ran").exists()


def test_nothing_is_imported_from_where_a_job_is_started(tmp_path: Path) -> None:
    """A module put there, of any name that caxev imports, is not run."""
    for name in ("caxev", "json", "attrs"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    command = Place(tmp_path, 0).command("run")
    done = subprocess.run([*command, "a", "b", "c"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "huge"])
def test_what_comes_back_from_a_job_is_read_as_data(tmp_path: Path, kind: str) -> None:
    """A log or an end that is no plain file, or has no end, shows nothing and blocks nobody."""
    folder = Folder(tmp_path / "jobs")
    place = Place(folder.file([spec_in(tmp_path)]), 0)
    (tmp_path / "secret").write_text(json.dumps({"how": "done", "why": SECRET}))
    for path in (place.file("log"), place.file("ended")):
        match kind:
            case "link":
                path.symlink_to(tmp_path / "secret")
            case "fifo":
                os.mkfifo(path)
            case "directory":
                path.mkdir()
            case _:
                path.touch()
                os.truncate(path, 1 << 40)
    assert folder.tail("job.1").strip(" |") == ""
    assert place.ended is None


@pytest.mark.parametrize("on_another_disk", [False, True])
def test_a_link_put_into_a_job_s_input_is_not_followed(
    tmp_path: Path, far: Path, on_another_disk: bool
) -> None:
    """The job reads what was there when it began, and writes where nobody can put a link."""
    (tmp_path / "raw").mkdir()
    raw = far if on_another_disk else tmp_path / "raw"
    copy = raw / "one"
    (copy / "below").mkdir(parents=True)
    (copy / "data").write_text("data")
    (copy / "below" / "more").write_text("more")
    (copy / "link").symlink_to("data")
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("data", "more"):
        (secret / name).write_text(SECRET)
    script = f"""\
cd {copy}; rm -r data below; ln -s {secret}/data data; ln -s {secret} below; cd "$OLDPWD"
cat "$1/data" "$1/link" "$1/below/more" > "$2"; pwd >> "$2"
"""
    spec = evolve(spec_in(tmp_path), input=str(copy), roots=(str(raw),))
    spec = evolve(spec, argv=("sh", "-c", script, "sh", spec.view, spec.output))
    assert run_here(str(tmp_path / "jobs"), spec).how is End.DONE
    work = tmp_path / "jobs" / "work" / spec.name
    assert Path(spec.output).read_text() == f"datadatamore{work}\n"


@pytest.mark.parametrize("bad", ["link", "fifo"])
def test_a_job_is_not_begun_on_what_no_copy_holds(tmp_path: Path, bad: str) -> None:
    """A link that leads out, or a FIFO that would hold it up for ever."""
    copy = tmp_path / "raw" / "one"
    copy.mkdir(parents=True)
    os.mkfifo(copy / "x") if bad == "fifo" else (copy / "x").symlink_to("/etc/passwd")
    folder = Folder(tmp_path / "jobs")
    spec = spec_in(tmp_path, argv=("touch", str(tmp_path / "ran")))
    assert run_here(str(folder.home), spec).exit == 127
    assert not (tmp_path / "ran").exists()
    assert ("/etc/passwd" if bad == "link" else f"{copy}/x") in folder.tail(spec.name)


def test_a_link_is_neither_staged_nor_sent(tmp_path: Path) -> None:
    """What programs of others are given is a regular file, whatever stands under its name now."""
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "link").symlink_to("secret")
    os.mkfifo(tmp_path / "fifo")
    for bad in ("link", "fifo"):
        path = os.fsencode(tmp_path / bad)
        with pytest.raises(Retry):
            link_file(vouched(path), vouched(tmp_path / "staged"))
        with pytest.raises(Retry), pinned(vouched(path)):
            pass
    assert not os.path.lexists(tmp_path / "staged")
    (tmp_path / "data").write_text("data")
    with pinned(vouched(tmp_path / "data")) as name:
        (tmp_path / "data").unlink()
        (tmp_path / "data").symlink_to("secret")
        done = subprocess.run(["cat", name], capture_output=True, check=True)
    assert done.stdout == b"data"


def test_rucio_writes_where_nobody_else_may(tmp_path: Path, far: Path) -> None:
    """Its library would follow a link in the partial; what it brought goes there by no link."""
    outside = tmp_path / "outside"
    for name in ("outside", "partial"):
        (tmp_path / name).mkdir()
    one = Checked(b"data", "data", 4, "0400019b")
    client = SimpleNamespace(list_replicas=lambda *_, **__: [])
    order = SimpleNamespace(dataset=Did("scope", "name"), rse=None)
    fetching = Fetching(
        SimpleNamespace(client=client),  # type: ignore[arg-type]
        vouched(tmp_path / "partial"),
        vouched(far),
        order,  # type: ignore[arg-type]
        [one],
        Meter(quiet, 0),
    )

    class Storage:
        """Writes by name, once somebody has put a link in the partial's place."""

        def fetch(self, _pfn: str, path: bytes) -> None:
            (tmp_path / "partial").rename(tmp_path / "aside")
            (tmp_path / "partial").symlink_to(outside)
            Path(os.fsdecode(path)).write_text("data")

    fetching._storages["X"] = Storage()  # type: ignore[assignment]
    with pytest.raises(Retry):
        fetching._fetched(Seen(b"data", "file", 4), "X", "pfn")
    assert list(outside.iterdir()) == []
    assert list(far.iterdir()) == []


# -- between two file systems ---------------------------------------------------------------------


def make_tree(top: Path) -> dict[str, str]:
    (top / "below").mkdir(parents=True)
    (top / "data").write_text("data")
    (top / "below" / "more").write_text("more")
    (top / "link").symlink_to("data")
    return found(top)


def found(top: Path) -> dict[str, str]:
    files = (one for one in top.rglob("*") if not one.is_dir())
    return {
        str(one.relative_to(top)): str(one.readlink()) if one.is_symlink() else one.read_text()
        for one in files
    }


def test_an_input_on_another_file_system_is_found(tmp_path: Path, far: Path) -> None:
    """There can be no hard links to it: the job finds links to the files that we have opened."""
    make_tree(far / "one")
    (far / "single").write_text("data")
    for name, held in (("one", ("data", "below/more", "link")), ("single", ("",))):
        with mirror(vouched(far / name), vouched(tmp_path / name)):
            read = {one: (tmp_path / name / one).read_text() for one in held}
            assert read == {one: "more" if one == "below/more" else "data" for one in held}
    assert not (tmp_path / "single").exists()


def test_as_many_files_are_held_open_as_there_are(
    tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit that this process has is raised; if that cannot be, the message names the limit."""
    make_tree(far / "one")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr("caxev.files.incoming._OURS", hard // 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        with mirror(vouched(far / "one"), vouched(tmp_path / "view")):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > hard // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr("caxev.files.incoming._OURS", hard)
    refused = pytest.raises(GiveUp, match=rf"more files \(.*\) than .*\({hard:,}\)")
    with refused, mirror(vouched(far / "one"), vouched(tmp_path / "again")):
        pass


@pytest.mark.parametrize("single", [False, True])
def test_a_result_is_brought_to_another_file_system(
    tmp_path: Path, far: Path, single: bool
) -> None:
    """By a copy that is renamed; what was made is gone, and done again it is done."""
    made, final = tmp_path / "made", far / "deep" / "final"
    wanted: object = make_tree(made) if not single else made.write_text("data")
    assert bring_in(vouched(made), str(final), [str(far)]) == (4 if single else 8)
    assert (final.read_text() if single else found(final)) == ("data" if single else wanted)
    assert not made.exists()
    assert bring_in(vouched(made), str(final), [str(far)]) == (4 if single else 8)
    assert [one.name for one in final.parent.iterdir()] == ["final"]


def test_a_result_is_brought_in_though_it_was_killed_at_the_end(
    tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made is removed file by file: what is left of it is no other copy."""
    made, final = tmp_path / "made", far / "final"
    wanted, removed = make_tree(made), list[Path]()

    def dies(path: Confined) -> None:
        if os.path.lexists(path):
            removed.append(next(Path(os.fsdecode(path)).glob("*/*")))
            removed[0].unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("caxev.files.incoming.remove", dies)
        with pytest.raises(KeyboardInterrupt):
            bring_in(vouched(made), str(final), [str(far)])
    assert len(removed) == 1
    assert bring_in(vouched(made), str(final), [str(far)]) == 8
    assert found(final) == wanted
    assert list(tmp_path.iterdir()) == []


def test_a_job_s_result_is_compared_with_its_copy(
    tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another file system: nothing verifies it later, as it is the first of its kind."""
    spec = spec_in(tmp_path)
    written(spec, "data")
    final = far / Path(spec.output).name

    def torn(old: Confined, new: Confined) -> None:
        copy_file(old, new)
        path = Path(os.fsdecode(new))
        status = path.stat()
        path.write_text("torn")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    take = partial(take_stock, str(tmp_path / "jobs"), spec.name, str(final), (str(far),), True)
    with monkeypatch.context() as patched:
        patched.setattr("caxev.files.incoming.copy_file", torn)
        with pytest.raises(Retry, match="the disk gives something else"):
            take()
    assert not final.exists()
    assert take().size == 4
    assert final.read_text() == "data"


def test_what_stands_there_is_not_replaced(tmp_path: Path, far: Path) -> None:
    """Nor does what was made get lost."""
    (tmp_path / "made").write_text("data")
    (far / "final").write_text("another")
    with pytest.raises(GiveUp, match=r"something else stands|exists already"):
        bring_in(vouched(tmp_path / "made"), str(far / "final"), [str(far)])
    assert (tmp_path / "made").read_text() == "data"
    assert (far / "final").read_text() == "another"


def test_nothing_is_brought_out_of_the_roots(tmp_path: Path) -> None:
    """Also through a directory that is a link."""
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "made").touch()
    with pytest.raises(GiveUp, match="not inside"):
        bring_in(
            vouched(tmp_path / "made"),
            str(tmp_path / "root" / "link" / "x"),
            [str(tmp_path / "root")],
        )
    assert list((tmp_path / "outside").iterdir()) == []
