"""sites.json, settings and handlers' modules: what is read, and what is said of mistakes."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint, EntryPoints
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymongo.uri_parser import parse_uri

from caxev.config import (
    ConfigError,
    Deletion,
    Link,
    Patrol,
    Settings,
    Site,
    Sites,
    Stalled,
    find_sites,
    link_between,
    load_file,
    load_handlers,
    load_sites,
    secret,
)
from caxev.config import handlers as handlers_module
from caxev.config.errors import Problems
from caxev.config.reading import read
from caxev.core.registry import Handler, copy, recorded
from tests.config_keys import CLASSES, documented

EXAMPLE = Path(__file__).parent.parent / "sites.json"

CAX_STYLE: list[dict[str, Any]] = [
    {
        "name": "daq",
        "hostname": "daq.example.org",
        "username": "mover",
        "method": "rsync",
        "dir_raw": "/data/raw/",
        "dir_tsm": "/data/tsm/",
        "dir_processed": None,
        "upload_options": ["tape"],
        "download_options": None,
        "task_list": ["CopyPush", "AddChecksum"],
        "rucio_config_p2": "daq_p2.config",
    },
    {
        "name": "cluster",
        "method": "scp",
        "hostname": "cluster.example.org",
        "username": "analyst",
        "dir_raw": "/big/raw",
        "dir_processed": "/big/processed",
        "dir_minitrees": "/big/minitrees",
        "data_type": ["raw", "processed"],
        "upload_options": [],
        "download_options": ["daq", "long-gone"],
        "purge": 5,
        "nstreams": 2,
        "grid_cert": "/home/analyst/cert",
        "pax_processing_versions": None,
        "dataset_list": ["161111_1434"],
    },
    {
        "name": "tape",
        "hostname": None,
        "username": None,
        "method": "tsm",
        "dir_raw": None,
        "upload_options": None,
        "download_options": None,
    },
    {"name": "catalogue", "hostname": "", "username": "", "method": "rucio", "rucio_transfer": []},
    {
        "name": "grid",
        "method": "lcg-cp",
        "hostname": "srm://se.example.org:8443/srm/v2/server?SFN=",
        "dir_raw": "/grid/raw",
        "username": None,
    },
]


def sites_file(directory: Path, content: object) -> Path:
    file = directory / "sites.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return file


def sites_of(directory: Path, *entries: object) -> Sites:
    return load_sites(sites_file(directory, list(entries)))


def handler(name: str, *aliases: str) -> Handler:
    async def react(_job: object) -> None: ...

    return Handler(react, (copy("transferred"),), name, aliases=aliases)


# --- sites.json ---


def test_example() -> None:
    """The sites.json of this repository loads without a warning and plays its three parts."""
    sites = load_sites(EXAMPLE)
    assert list(sites) == ["lngs", "chicago", "stockholm"]
    assert sites.warnings == ()
    assert sites.get("lngs").master == ("raw",)
    assert sites.get("lngs").upload_options == ("stockholm",)
    assert sites.get("chicago").download_options == ("lngs", "stockholm")
    assert sites.get("stockholm").download_options == ()
    assert sites.here("lngs").passive == frozenset()
    assert sites.get("lngs").identity == str(EXAMPLE.parent / "keys" / "lngs")


def test_cax_json(tmp_path: Path) -> None:
    """A file in cax's form loads unchanged, with cax's meanings and defaults."""
    sites = sites_of(tmp_path, *CAX_STYLE)
    daq, cluster = sites.get("daq"), sites.get("cluster")
    assert daq.roots == ("/data/raw",)
    assert daq.data_type == ("raw", "processed", "minitrees")
    assert (daq.purge, daq.nstreams, daq.task_list) == (None, None, ("CopyPush", "AddChecksum"))
    assert cluster.data_type == ("raw", "processed")
    assert (cluster.purge, cluster.nstreams, cluster.upload_options) == (5, 2, ())
    assert cluster.transport == "sftp"
    assert sites.get("catalogue").hostname is None
    assert sites.here("daq").passive == {"tape", "catalogue", "grid"}
    assert sites.here("tape").passive == {"catalogue", "grid"}


def test_warnings(tmp_path: Path) -> None:
    """What cax's files have and nobody can serve is a warning, not an error."""
    unknown, method = sites_of(tmp_path, *CAX_STYLE).warnings
    assert unknown.startswith("site 'cluster': download_options names 'long-gone'")
    assert method.startswith("site 'grid': method 'lcg-cp'")
    assert "gfal-copy" in method


def test_null_is_the_default(tmp_path: Path) -> None:
    """Any key that is null is as if it were absent."""
    nulls = dict.fromkeys(
        ("purge", "port", "lanes", "handlers", "listener", "data_type", "host_key", "method")
    )
    assert sites_of(tmp_path, {"name": "a", **nulls}).get("a") == Site("a")


def test_listener(tmp_path: Path) -> None:
    """The method says whether a site has a listener, unless the site itself says so."""
    sites = sites_of(
        tmp_path,
        {"name": "a", "method": "tsm", "listener": True},
        {"name": "b", "listener": False},
        {"name": "c"},
    )
    assert [site.listener for site in sites.values()] == [True, False, True]


@pytest.mark.parametrize(
    ("type_", "version", "expected"),
    [
        ("raw", None, "/big/raw"),
        ("raw", "v6.8.0", "/big/raw"),
        ("processed", "v6.8.0", "/big/processed/pax_v6.8.0"),
        ("minitrees", "v6.8.0", "/big/minitrees/pax_v6.8.0"),
        ("processed", None, None),
        ("processed", "../../etc", None),
        ("tsm", None, None),
        ("untriggered", None, None),
    ],
)
def test_directory(tmp_path: Path, type_: str, version: str | None, expected: str | None) -> None:
    """Each type has its directory, derived data one for each version; others have none."""
    assert sites_of(tmp_path, *CAX_STYLE).get("cluster").directory(type_, version) == expected


@given(version=st.text())
def test_directory_stays_inside(version: str) -> None:
    """Whatever version the database names, the directory is a child of the base directory."""
    directory = Site("a", dir_processed="/p").directory("processed", version)
    assert directory is None or Path(directory).parent == Path("/p")


def test_null_directory(tmp_path: Path) -> None:
    """A site with a null directory holds none of that type."""
    assert sites_of(tmp_path, *CAX_STYLE).get("daq").directory("processed", "v6.8.0") is None


def test_task_list(tmp_path: Path) -> None:
    """`task_list` enables by name or alias; without one, everything is enabled."""
    sites = sites_of(tmp_path, *CAX_STYLE)
    here = sites.here("daq")
    assert here.wants(handler("push", "CopyPush"))
    assert here.wants(handler("AddChecksum"))
    assert not here.wants(handler("pull", "CopyPull"))
    assert sites.here("cluster").wants(handler("pull"))


def test_dataset_list(tmp_path: Path) -> None:
    """`dataset_list` names the only runs that a site acts on; without one, it acts on all."""
    sites = sites_of(tmp_path, *CAX_STYLE)
    assert sites.get("cluster").wants_run("161111_1434")
    assert not sites.get("cluster").wants_run("161111_1500")
    assert sites.get("daq").wants_run("161111_1500")


def test_paths_beside_the_file(tmp_path: Path) -> None:
    """Paths of keys are relative to the file; absolute ones and ~ are kept."""
    site = sites_of(tmp_path, {"name": "a", "identity": "keys/a", "known_hosts": "~/kh"}).get("a")
    assert site.identity == str(tmp_path / "keys" / "a")
    assert site.known_hosts == str(Path.home() / "kh")


def test_an_unknown_user_s_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is that of all sites, and an account of one need not be at another."""
    entry = {"name": "a", "identity": "~no-such-user/key", "rucio": {"home": "~no-such-user"}}
    assert sites_of(tmp_path, entry).get("a").identity == str(tmp_path / "~no-such-user" / "key")
    monkeypatch.chdir(tmp_path)
    for act in (
        lambda: load_sites(find_sites("~no-such-user/sites.json")),
        lambda: secret("A", {"A_FILE": "~no-such-user/a"}),
        lambda: load_file("~no-such-user/handlers.py"),
    ):
        with pytest.raises(ConfigError, match="~no-such-user/"):
            act()


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1B/s", 1),
        ("200MB/s", 200e6),
        ("200 MB/s", 200e6),
        ("1.5GB/s", 1.5e9),
        ("10kB/s", 10e3),
        ("2MiB/s", 2 * 2**20),
        ("", None),
        ("0B/s", None),
        ("200", None),
        ("200MB", None),
        ("200mb/s", None),
        ("-1MB/s", None),
        ("1e3MB/s", None),
        ("infB/s", None),
        (" 200MB/s", None),
        ("٣MB/s", None),
        (200, None),
        (True, None),
        ([], None),
    ],
)
def test_rates(tmp_path: Path, text: object, rate: float | None) -> None:
    """A rate is bytes a second, in powers of 1000 or 1024; anything else is a mistake."""
    entry = {"name": "a", "max_rate": text}
    if rate is None:
        with pytest.raises(ConfigError, match='max_rate must be a rate, as "200MB/s", not'):
            sites_of(tmp_path, entry)
    else:
        found = sites_of(tmp_path, entry).get("a").max_rate
        assert (found, type(found)) == (rate, float)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        (None, 0),
        ("0B", 0),
        ("500GB", 500 * 10**9),
        ("1 PB", 10**15),
        ("1.5TB", 15 * 10**11),
        ("4KiB", 4096),
        ("1PiB", 2**50),
        ("4kiB", ""),
        ("4KB", ""),
        ("500GB/s", ""),
        ("9" * 400 + "B", ""),
        (500, ""),
        ({}, ""),
    ],
)
def test_free_space(tmp_path: Path, text: object, amount: int | str) -> None:
    """What must stay free is whole bytes; anything else is a mistake."""
    entry = {"name": "a", "min_free": text}
    if amount == "":
        with pytest.raises(ConfigError, match='min_free must be an amount, as "500GB", not'):
            sites_of(tmp_path, entry)
    else:
        found = sites_of(tmp_path, entry).get("a").min_free
        assert (found, type(found)) == (amount, int)


def test_receiver(tmp_path: Path) -> None:
    """The receiver is one line of a command, or null."""
    named = {"name": "a", "receiver": "/opt/caxev/bin/caxev"}
    assert sites_of(tmp_path, named).get("a").receiver == "/opt/caxev/bin/caxev"
    for none in (None, ""):
        assert sites_of(tmp_path, {"name": "a", "receiver": none}).get("a").receiver is None
    for bad in ("a\nb", "a\rb", "a\0b", 5, ["caxev"]):
        with pytest.raises(ConfigError, match="receiver must be a command in one line, not"):
            sites_of(tmp_path, {"name": "a", "receiver": bad})


def test_priority(tmp_path: Path) -> None:
    """The earlier a tag stands in ``priority``, the more urgent is a run that has it."""
    site = sites_of(tmp_path, {"name": "a", "priority": ["calibration", "blinded"]}).get("a")
    assert site.priority == ("calibration", "blinded")
    bad: object
    for bad in ("calibration", [""], [5], {}):
        with pytest.raises(ConfigError, match="priority must be a list of names, not"):
            sites_of(tmp_path, {"name": "a", "priority": bad})


def test_links(tmp_path: Path) -> None:
    """A way's own limits go before the site's, and of two ends' numbers the smaller counts."""
    limits = {
        "max_rate": "10MB/s",
        "hours": "20:00-06:00",
        "transfers": 2,
        "nstreams": None,
        "x_note": 1,
    }
    sites = sites_of(
        tmp_path,
        {"name": "a", "max_rate": "50MB/s", "nstreams": 8, "links": {"b": limits}},
        {"name": "b", "max_rate": "5MB/s", "links": {"c": {}, "nowhere": {}}},
        {"name": "c", "links": {"b": {"transfers": 1, "hours": "01:00-02:00"}}},
    )
    a, b, c = sites.values()
    to_b = a.link("b")
    assert (to_b.max_rate, to_b.transfers, to_b.nstreams) == (10e6, 2, 8)
    assert a.link("c") == Link(max_rate=50e6, nstreams=8)
    assert link_between(a, b) == Link(5e6, to_b.hours, 2, 8)
    assert link_between(b, a) == link_between(a, b)
    assert link_between(c, b) == link_between(b, c) == Link(5e6, c.link("b").hours, 1, None)
    assert link_between(a, c).max_rate == 50e6
    (warning,) = sites.warnings
    assert warning.startswith("site 'b': links names 'nowhere', which is no site of this file")
    assert pickle.loads(pickle.dumps(a)) == a


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([], "links must be limits by site, as"),
        ({"": {}}, "links must be limits by site, as"),
        ({"b": 5}, "links: 'b': must be an object, not 5"),
        ({"b": {"max_rat": "1B/s"}}, r"'b': unknown key 'max_rat' \(did you mean 'max_rate'\?"),
        ({"b": {"qqq": 1}}, r"'b': unknown key 'qqq' \(take it out"),
        ({"b": {"max_rate": 5}}, "'b': max_rate must be a rate, as \"200MB/s\", not 5"),
        ({"b": {"transfers": 0}}, "'b': transfers must be a whole number, 1 or more, not 0"),
        ({"b": {"nstreams": True}}, "'b': nstreams must be a whole number"),
        ({"b": {"hours": "8-9"}}, "'b': hours must be a time of day in UTC"),
        ({"b": {"hours": "08:60-09:00"}}, "'b': hours must be"),
        ({"b": {"hours": "08:00-24:01"}}, "'b': hours must be"),
        ({"b": {"hours": "24:00-08:00"}}, "'b': hours must be"),
        ({"b": {"hours": "08:00-08:00"}}, "'b': hours must be"),
        ({"b": {"hours": ["08:00", "09:00"]}}, "'b': hours must be"),
        ({"b": {"transfers": 0}, "c": {"x": 1}}, "2 problems, the first: site 'a': links: 'b'"),
    ],
)
def test_mistakes_in_links(tmp_path: Path, links: object, message: str) -> None:
    """Each mistake within ``links`` is a line of its own that names the other site and the key."""
    with pytest.raises(ConfigError, match=message):
        sites_of(tmp_path, {"name": "a", "links": links})


@pytest.mark.parametrize(
    ("hours", "now", "seconds"),
    [
        (None, "12:00:00", 0),
        ("20:00-06:00", "20:00:00", 0),
        ("20:00-06:00", "05:59:59", 0),
        ("20:00-06:00", "06:00:00", 14 * 3600),
        ("20:00-06:00", "19:59:30", 30),
        ("08:00-09:30", "07:00:00", 3600),
        ("08:00-09:30", "09:29:59", 0),
        ("08:00-09:30", "09:30:00", 22.5 * 3600),
        ("18:00-24:00", "23:59:59", 0),
        ("18:00-24:00", "00:00:00", 18 * 3600),
        ("00:00-24:00", "13:00:00", 0),
    ],
)
def test_hours(tmp_path: Path, hours: str | None, now: str, seconds: float) -> None:
    """Hours are of the day in UTC, with their beginning and without their end, over midnight."""
    link = sites_of(tmp_path, {"name": "a", "links": {"b": {"hours": hours}}}).get("a").link("b")
    moment = datetime.fromisoformat(f"2016-11-11T{now}+00:00")
    assert link.opens_in(moment) == seconds
    assert (link.closes_in(moment) == 0) == (seconds > 0)


@pytest.mark.parametrize(
    ("hours", "seconds"),
    [(None, inf), ("20:00-06:00", 1800), ("05:00-24:00", 18.5 * 3600), ("00:00-24:00", inf)],
)
def test_when_a_link_closes(tmp_path: Path, hours: str | None, seconds: float) -> None:
    """At the end of its hours, of the next day where they wrap."""
    link = sites_of(tmp_path, {"name": "a", "links": {"b": {"hours": hours}}}).get("a").link("b")
    assert link.closes_in(datetime.fromisoformat("2016-11-11T05:30:00+00:00")) == seconds


@given(
    begin=st.integers(0, 1439),
    end=st.integers(0, 1440),
    now=st.datetimes(timezones=st.just(UTC), max_value=datetime(2100, 1, 1)),  # noqa: DTZ001
)
def test_hours_open_when_they_say(begin: int, end: int, now: datetime) -> None:
    """After the seconds that a link says, it is open; and a second before, it was not."""
    text = f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    try:
        link = read(Link, {"hours": text})
    except Problems:
        assert begin == end
        return
    wait = link.opens_in(now)
    assert 0 <= wait < 86400
    assert link.opens_in(now + timedelta(seconds=wait, microseconds=1)) == 0
    if wait > 1:
        assert link.opens_in(now + timedelta(seconds=wait - 1)) == pytest.approx(1, abs=1e-3)


def test_sites_cross_to_workers() -> None:
    """A site can be handed to a worker process and compared."""
    site = load_sites(EXAMPLE).get("chicago")
    assert pickle.loads(pickle.dumps(site)) == site


def test_no_such_site(tmp_path: Path) -> None:
    """A site that is not there is an error naming the file, the nearest and all known ones."""
    sites = sites_of(tmp_path, *CAX_STYLE)
    with pytest.raises(ConfigError) as error:
        sites.get("clustr")
    assert str(error.value) == (
        f"no site 'clustr' in {sites.path} "
        "(did you mean 'cluster'? known: daq, cluster, tape, catalogue, grid)"
    )
    assert sites.find("clustr") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: "),
        (" \n", "is empty: "),
        ("[]", "holds an empty list"),
        ("{}", "holds an object, not a list of sites"),
        ("null", "holds null, not a list of sites"),
        ('[{"name": "a",}]', "is not JSON: .* at line 1, column "),
        ("[" * 100_000, "is nested too deeply"),
        ("[5]", "site no. 1: is 5, not an object"),
        ('[{"method": "scp"}]', "site no. 1: name is missing: it must be a text"),
        ('[{"name": ""}]', 'site no. 1: name must be a text that is not empty, not ""'),
        ('[{"name": null}]', "site no. 1: name must be .*, not null"),
        ('[{"name": "a"}, {"name": "a"}]', "site 'a': stands 2 times"),
        ('[{"name": "a", "purg": 5}]', r"unknown key 'purg' \(did you mean 'purge'\?"),
        ('[{"name": "a", "qqq": 5}]', r"unknown key 'qqq' \(take it out"),
        (
            '[{"name": "a", "purge": "five"}]',
            'purge must be a number of days, up to 36525, not "five"',
        ),
        ('[{"name": "a", "purge": true}]', "purge must be a number of days, up to 36525, not true"),
        ('[{"name": "a", "purge": -1}]', "purge must be a number of days, up to 36525, not -1"),
        ('[{"name": "a", "purge": NaN}]', "purge must be a number of days, up to 36525, not NaN"),
        ('[{"name": "a", "purge": Infinity}]', "purge must be a number of days"),
        # Now and so much would be out of the range of dates.
        ('[{"name": "a", "purge": 1e9}]', "purge must be a number of days"),
        ('[{"name": "a", "stalled": {"retry": 2e7}}]', "retry must be a number of hours"),
        ('[{"name": "a", "patrol": {"days": 4e6}}]', "days must be a number of days above 0"),
        ('[{"name": "a", "method": "stfp"}]', r'not "stfp" \(did you mean \'sftp\'\?\)'),
        ('[{"name": "a", "method": ["scp"]}]', r'method must be one of .*, not \["scp"\]'),
        ('[{"name": "a", "data_type": "raw"}]', 'data_type must be a list of names, not "'),
        ('[{"name": "a", "port": 0}]', "port must be a port, 1 to 65535, not 0"),
        ('[{"name": "a", "lanes": {"transfer": 0}}]', "lanes must be numbers of workers"),
        ('[{"name": "a", "host_key": "ab:cd"}]', r"host_key must be .*fingerprint \(SHA256:"),
        ('[{"name": "a", "listener": 1}]', "listener must be true or false, not 1"),
        (
            '[{"name": "a", "dir_raw": "raw"}]',
            'dir_raw must be an absolute path or null, not "raw"',
        ),
        ('[{"name": "a", "dir_raw": "/a/../b"}]', "dir_raw must be a path without"),
        (
            '[{"name": "a", "purge": 1, "purge": 2}]',
            "site 'a': 'purge' stands there more than once",
        ),
        (
            '[{"name": "a", "links": {"b": {"transfers": 1, "transfers": 2}}}]',
            "site 'a': 'links': 'b': 'transfers' stands there more than once",
        ),
        ('{"a": 1, "a": 2}', "holds an object, not a list of sites"),
    ],
)
def test_mistakes(tmp_path: Path, content: str, message: str) -> None:
    """Each mistake is one line that names the file, the site, the key and the value."""
    file = sites_file(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as error:
        load_sites(file)
    assert str(error.value).startswith(str(file))
    assert len(str(error.value).splitlines()) == 1


def test_notes_of_ones_own_may_stand_twice(tmp_path: Path) -> None:
    """A key of one's own may be given again, as people do who write notes into JSON."""
    text = '[{"name": "a", "x_note": 1, "x_note": 2, "x_mine": {"b": 1, "b": 2}}]'
    assert list(load_sites(sites_file(tmp_path, text))) == ["a"]


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """Several mistakes are told together; the first line sums them up."""
    file = sites_file(tmp_path, [{"name": "a", "purge": "x", "port": 0}, {"name": "b", "zzz": 1}])
    with pytest.raises(ConfigError) as error:
        load_sites(file)
    first, *others = str(error.value).splitlines()
    assert first.startswith(f"{file}: 3 problems, the first: site 'a': purge")
    assert [line.strip() for line in others] == list(error.value.problems)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    """A file that is missing, a directory or no text is said to be so."""
    with pytest.raises(ConfigError, match=r"gone\.json does not exist: name your sites\.json by"):
        load_sites(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_sites(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'[{"name": "\xe9"}]')
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 11\)"):
        load_sites(tmp_path / "latin.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
site_entries = st.dictionaries(
    st.sampled_from([field.name for field in Site.__attrs_attrs__]) | st.text(max_size=5),
    json_values,
    max_size=4,
)


@given(document=st.lists(site_entries | json_values, max_size=3) | json_values)
def test_any_document(tmp_path_factory: pytest.TempPathFactory, document: object) -> None:
    """Any JSON at all is either a set of sites or a `ConfigError`."""
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(document))
    try:
        sites = load_sites(file)
    except ConfigError as error:
        assert str(error).startswith(str(file))  # noqa: PT017  # either outcome is right
    else:
        assert len(sites) > 0


def test_finding_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--config`` goes before ``CAXEV_SITES``, and this before the file in this directory."""
    monkeypatch.chdir(tmp_path)
    sites_file(tmp_path, "[]")
    monkeypatch.setenv("CAXEV_SITES", "/from/environment.json")
    assert find_sites("/given.json") == Path("/given.json")
    assert find_sites(None) == Path("/from/environment.json")
    monkeypatch.delenv("CAXEV_SITES")
    assert find_sites(None) == Path("sites.json")
    # What cannot be looked at, as in a closed directory, is not there.
    monkeypatch.setattr("caxev.config.loading.PLACES", ("x" * 300, "sites.json"))
    assert find_sites(None) == Path("sites.json")


def test_no_sites_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no sites.json is named or found, the error says where it was looked for."""
    monkeypatch.delenv("CAXEV_SITES", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caxev.config.loading.PLACES", ("sites.json", str(tmp_path / "etc.json")))
    with pytest.raises(ConfigError, match=r"no sites\.json: neither sites\.json nor .*--config"):
        find_sites(None)


# --- settings and secrets ---


def test_settings_from_environment() -> None:
    """Arguments go before the environment, and the environment before the defaults."""
    environ = {"CAXEV_MONGO_URI": "mongodb://h1,h2:27018/?replicaSet=r", "CAXEV_DATABASE": "db"}
    settings = Settings.load(environ=environ)
    assert settings.mongo_uri == environ["CAXEV_MONGO_URI"]
    assert (settings.database, settings.collection, settings.prefix) == ("db", "runs_new", "caxev_")
    settings = Settings.load(mongo_uri="mongodb://h3", database="other", environ=environ)
    assert (settings.mongo_uri, settings.database) == ("mongodb://h3", "other")


@pytest.mark.parametrize(
    "uri", ["mongodb://eb@h/run", "mongodb://eb:%s@h/run", "mongodb://eb:@h/run"]
)
@given(password=st.text(min_size=1, alphabet=st.characters(codec="utf-8")))
def test_password_goes_in_and_stays_in(uri: str, password: str) -> None:
    """Any password arrives at the driver as it is, and is in no text that is shown."""
    settings = Settings.load(mongo_uri=uri, environ={"MONGO_PASSWORD": password})
    parsed = parse_uri(settings.mongo_uri)
    assert (parsed["username"], parsed["password"]) == ("eb", password)
    assert settings.safe_uri == "mongodb://eb@h/run"
    assert "mongodb" not in repr(settings)


def test_user_from_environment() -> None:
    """``CAXEV_MONGO_USER`` is the user where the address names none."""
    environ = {"CAXEV_MONGO_USER": "a:b", "MONGO_PASSWORD": "p@ss"}
    assert Settings.load(mongo_uri="mongodb://h", environ=environ).mongo_uri == (
        f"mongodb://{quote_plus('a:b')}:{quote_plus('p@ss')}@h"
    )
    given_user = Settings.load(mongo_uri="mongodb://eb@h", environ=environ)
    assert given_user.mongo_uri == "mongodb://eb:p%40ss@h"


def test_password_in_the_address() -> None:
    """A password that the address holds is kept, and still not shown."""
    settings = Settings.load(
        mongo_uri="mongodb+srv://eb:geheim@h.example/run?tlsCertificateKeyFilePassword=geheim",
        environ={"MONGO_PASSWORD": "other"},
    )
    assert ":geheim@" in settings.mongo_uri
    assert "geheim" not in settings.safe_uri + repr(settings)


def test_no_password_needed() -> None:
    """A user known by a certificate needs no password."""
    uri = "mongodb://CN%3Dlngs@h/?authMechanism=MONGODB-X509"
    assert Settings.load(mongo_uri=uri, environ={}).mongo_uri == uri


def test_no_password_found() -> None:
    """A user without any password is an error that says where to put it."""
    with pytest.raises(ConfigError, match=r"no password for mongodb://eb@h: set MONGO_PASSWORD"):
        Settings.load(mongo_uri="mongodb://eb@h", environ={})


def test_no_database_named() -> None:
    """Without an address the error names the variable and the option."""
    with pytest.raises(ConfigError, match=r"set CAXEV_MONGO_URI or give --mongo-uri mongodb://"):
        Settings.load(environ={})


@pytest.mark.parametrize(
    "uri",
    [
        "geheim",
        "http://eb:geheim@h",
        "mongodb://",
        "mongodb://eb:geheim@",
        "mongodb://:geheim@h",
        "mongodb://eb:ge/heim@h",
        "mongodb://eb:1?geheim@h",
        "mongodb://eb:ge@heim@h",
        "mongodb://eb:ge:heim@h",
        "mongodb://eb:geheim%@h",
        "mongodb://eb:geheim@h:port",
        "mongodb://eb:geheim@h:70000",
        "mongodb://eb:geheim@h,,i",
    ],
)
def test_bad_addresses(uri: str) -> None:
    """An address that cannot be used is one line, without the password."""
    with pytest.raises(ConfigError, match=r"the database's address .* is not usable") as error:
        Settings.load(mongo_uri=uri, environ={})
    assert "heim" not in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a/b", "x" * 64])
def test_bad_database_names(name: str) -> None:
    """A name that MongoDB would refuse is refused here, with the option's name."""
    with pytest.raises(ConfigError, match="CAXEV_DATABASE or --database"):
        Settings("mongodb://h", database=name)
    with pytest.raises(ConfigError, match="CAXEV_COLLECTION or --collection"):
        Settings("mongodb://h", collection=f"${name}")


def test_secret_order(tmp_path: Path) -> None:
    """The variable goes before the file, the file before systemd's credential; else None."""
    (tmp_path / "file").write_text("from file\n")
    (tmp_path / "mongo_password").write_text("from systemd\n")
    environ = {
        "MONGO_PASSWORD": "from variable",
        "MONGO_PASSWORD_FILE": str(tmp_path / "file"),
        "CREDENTIALS_DIRECTORY": str(tmp_path),
    }
    found = []
    for name in ("MONGO_PASSWORD", "MONGO_PASSWORD_FILE", "CREDENTIALS_DIRECTORY"):
        found.append(secret("MONGO_PASSWORD", environ))
        del environ[name]
    assert found == ["from variable", "from file", "from systemd"]
    assert secret("MONGO_PASSWORD", environ) is None
    assert secret("MONGO_PASSWORD", {"CREDENTIALS_DIRECTORY": str(tmp_path / "none")}) is None


def test_secret_files_that_fail(tmp_path: Path) -> None:
    """A file for a secret that is missing, empty or binary is an error that shows none of it."""
    for name, content in (("empty", b"\n"), ("binary", b"geheim\xff")):
        (tmp_path / name).write_bytes(content)
    for name, why in (("gone", "No such file"), ("empty", "is empty"), ("binary", "not UTF-8")):
        with pytest.raises(ConfigError, match=why) as error:
            secret("MONGO_PASSWORD", {"MONGO_PASSWORD_FILE": str(tmp_path / name)})
        assert "MONGO_PASSWORD_FILE" in str(error.value)
        assert error.value.__cause__ is None
        assert "geheim" not in str(error.value)


# --- handlers ---

REACTION = """
from caxev import copy, on

@on(copy("transferred"), name="{name}")
async def react(job):
    "React."
"""


MINE = "caxev_handlers.mine"


@pytest.fixture
def clean() -> Iterator[None]:
    """Take what a test has loaded out again."""
    handlers, modules = list(recorded), set(sys.modules)
    yield
    # Handlers of caxev that the test imported first stay: nothing would record them once more.
    ours = [h for h in recorded if h.module.startswith("caxev.handlers.") and h not in handlers]
    recorded[:] = [*handlers, *ours]
    for name in set(sys.modules) - modules:
        if name.startswith(("caxev_handlers", "some_handlers")):
            del sys.modules[name]


def named(name: str) -> list[Handler]:
    return [handler for handler in recorded if handler.name == name]


def test_handler_files(tmp_path: Path, clean: None) -> None:
    """A file's handlers are recorded once, however often it is loaded, under a stable module."""
    file = tmp_path / "my-tags.py"
    file.write_text(REACTION.format(name="mine"))
    for _ in range(2):
        load_handlers(files=[file], default=())
    (mine,) = named("mine")
    assert mine.module == "caxev_handlers.my_tags"
    assert pickle.loads(pickle.dumps(mine.function)) is mine.function


def test_digest_of_handlers(tmp_path: Path, clean: None) -> None:
    """It is the same wherever a file lies, and another one if its code or a name differs."""

    def digest(directory: str, text: str) -> str:
        file = tmp_path / directory / "mine.py"
        file.parent.mkdir()
        file.write_text(text)
        load_handlers(files=[file], default=())
        found = handlers_module.digest(one for one in recorded if one.module == MINE)
        recorded[:] = [one for one in recorded if one.module != MINE]
        del sys.modules[MINE]
        return found

    first = digest("a", REACTION.format(name="mine"))
    assert digest("b", REACTION.format(name="mine")) == first
    assert digest("c", REACTION.format(name="mine") + "    return None\n") != first
    assert digest("d", REACTION.format(name="other")) != first


def test_handler_modules(tmp_path: Path, clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules named by a site or by default are imported."""
    (tmp_path / "some_handlers_a.py").write_text(REACTION.format(name="a"))
    (tmp_path / "some_handlers_b.py").write_text(REACTION.format(name="b"))
    monkeypatch.syspath_prepend(tmp_path)
    load_handlers(["some_handlers_a"], default=["some_handlers_b"])
    assert named("a")
    assert named("b")


def test_entry_points(tmp_path: Path, clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers of installed packages are found by the entry point group ``caxev.handlers``."""
    (tmp_path / "some_handlers_c.py").write_text(REACTION.format(name="c"))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("c", "some_handlers_c", "caxev.handlers")
    monkeypatch.setattr(
        handlers_module, "entry_points", lambda group: EntryPoints([point]).select(group=group)
    )
    load_handlers(default=())
    assert named("c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "registers no handler: decorate an async function with @on"),
        ("import no_such_thing\n", "cannot be imported: ModuleNotFoundError: .*no_such_thing"),
        ("def f(:\n", "fails when it is imported: SyntaxError: "),
        ("1 / 0\n", r"fails when it is imported: ZeroDivisionError: .* \(bad\.py, line 1\)"),
        ("raise SystemExit(0)\n", r"fails when it is imported: SystemExit: 0 \(bad\.py, line 1\)"),
        ("raise GeneratorExit\n", r"fails when it is imported: GeneratorExit.*\(bad\.py, line 1\)"),
        (
            "from caxev import new_run, on\n@on(new_run())\ndef react(job): pass\n",
            r"TypeError: the handler react \(.*bad\.py, line 2\) is not async",
        ),
    ],
)
def test_bad_handler_files(tmp_path: Path, clean: None, text: str, message: str) -> None:
    """A handler file that fails is one line naming it and the error; nothing of it stays."""
    file = tmp_path / "bad.py"
    file.write_text(REACTION.format(name="half") + text if "line 1" in message else text)
    message = message.replace("line 1", "line 7")
    with pytest.raises(ConfigError, match=message) as error:
        load_handlers(files=[file], default=())
    assert str(file) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not named("half")


def test_missing_handlers(tmp_path: Path) -> None:
    """A missing module or file is named, with the nearest file."""
    (tmp_path / "tags.py").touch()
    with pytest.raises(ConfigError, match=r"--handlers .*tag\.py: no such file .*'tags\.py'"):
        load_file(tmp_path / "tag.py")
    with pytest.raises(ConfigError, match="handlers module 'no_such_module' cannot be imported"):
        load_handlers(["no_such_module"], default=())


def test_two_files_of_one_name(tmp_path: Path, clean: None) -> None:
    """Two handler files of one name cannot be told apart in a worker, so the second is refused."""
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "same.py").write_text(REACTION.format(name=directory))
    load_file(tmp_path / "a" / "same.py")
    with pytest.raises(ConfigError, match="has the same name; rename one"):
        load_file(tmp_path / "b" / "same.py")


# -- how copies are looked after ------------------------------------------------------------------


def test_how_copies_are_looked_after(tmp_path: Path) -> None:
    """Without a word cax's rules hold: three others, 2 h and 24 h, and nothing is read again."""
    (plain,) = sites_of(tmp_path, {"name": "a"}).values()
    assert (plain.patrol, plain.deletion, plain.stalled) == (None, Deletion(), Stalled())
    assert (plain.deletion.copies, plain.stalled) == (2, Stalled(2.0, 24.0))
    keys = {
        "patrol": {"days": 90, "max_rate": "50MB/s", "x_why": "rot"},
        "deletion": {"copies": 2, "protect": ["keep"], "proof_days": 30, "when_full": True},
        "stalled": {"retry": 48, "warn": None},
    }
    (site,) = sites_of(tmp_path, {"name": "a", **keys}).values()
    assert site.patrol == Patrol(90.0, 50e6)
    assert site.deletion == Deletion(2, ("keep",), 30.0, 7.0, when_full=True)
    assert site.stalled == Stalled(2.0, 48.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patrol", 90, 'patrol must be an object, as {"days": 90'),
        ("patrol", {}, "patrol: days is missing"),
        (
            "patrol",
            {"days": 0},
            "patrol: days must be a number of days above 0, up to 36525, not 0",
        ),
        ("patrol", {"days": 9, "rate": 1}, "patrol: unknown key 'rate' (did you mean 'max_rate'?"),
        ("deletion", {"copies": 0}, "deletion: copies must be a whole number, 1 or more, not 0"),
        ("deletion", {"protect": "keep"}, "deletion: protect must be a list of tags"),
        (
            "deletion",
            {"proof_days": -1},
            "deletion: proof_days must be a number of days, up to 36525, not -1",
        ),
        ("deletion", {"when_full": 1}, "deletion: when_full must be true or false, not 1"),
        (
            "stalled",
            {"warn": "2h"},
            'stalled: warn must be a number of hours, up to 876600, not "2h"',
        ),
    ],
)
def test_mistakes_in_how_copies_are_looked_after(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    """Each names the key within the key, its value, and what it must be."""
    with pytest.raises(ConfigError) as error:
        sites_of(tmp_path, {"name": "a", key: value})
    assert message in str(error.value)


def test_directories_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """The whole machine is an error; one for two types, or one inside another's, a warning."""
    here = {"name": "a", "method": "local", "dir_raw": "/data/raw", "dir_processed": "/data/raw"}
    inner = {"name": "b", "hostname": "b.org", "dir_raw": "/data/raw/b/"}
    shared = {"name": "c", "hostname": "b.org", "dir_raw": "/data/raw/b"}
    mixed = {"name": "d", "hostname": "b.org", "dir_minitrees": "/data/raw/b"}
    away = {"name": "e", "hostname": "e.org", "dir_tsm": "/data"}
    far = {"name": "f", "hostname": "f.org", "dir_raw": "/data/raw/b/x"}
    assert sites_of(tmp_path, inner, shared, away, far).warnings == ()
    (types,) = sites_of(tmp_path, here).warnings
    assert types.startswith("dir_raw of site 'a' is dir_processed of site 'a' as well: /data/raw")
    nested = sites_of(tmp_path, {**here, "dir_processed": None}, inner).warnings
    assert [one.partition(".")[0] for one in nested] == [
        "dir_raw of site 'b' lies inside dir_raw of site 'a': /data/raw/b"
    ]
    (within,) = sites_of(tmp_path, {**here, "dir_processed": "/data/raw/processed"}).warnings
    assert within.startswith("dir_processed of site 'a' lies inside dir_raw of site 'a'")
    assert len(sites_of(tmp_path, shared, mixed).warnings) == 1
    twice = {"name": "a", "dir_raw": "//data/raw", "dir_processed": "/data/raw/"}
    assert len(sites_of(tmp_path, twice).warnings) == 1
    with pytest.raises(ConfigError, match="dir_raw is '/', the whole machine"):
        sites_of(tmp_path, {"name": "a", "dir_raw": "//"})


# -- documentation --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", dict.fromkeys(CLASSES.values()), ids=lambda cls: cls.__name__)
def test_every_key_is_documented(cls: type) -> None:
    """Below the field of each key stands what it means."""
    assert [key.name for key in documented(cls) if not key.text.endswith(".")] == []
