"""deploy/MIGRATING.md: nothing of cax is left out, and what is named there works."""

from __future__ import annotations

import pytest

from caxev.config import BY_METHOD, Site, load_handlers
from caxev.config.reading import FORMER, keys
from caxev.config.sites import CORRECTIONS
from caxev.core.registry import recorded
from tests.documents import marked, section, tables

MIGRATING = "deploy/MIGRATING.md"


def words(text: str) -> list[str]:
    return text.split()


CAX_COMMANDS = words("""
    cax caxer massive-cax cax-process cax-mv cax-rm cax-stray cax-status massive-tsm
    cax-tsm-remove cax-tsm-watch ruciax ruciax-rm massive-ruciax ruciax-check ruciax-purge
    ruciax-download ruciax-locator
""")
CAX_FLAGS = words("""
    --once --run --name --host --config --log --log-file --disable_database_update --ncpu
    --version --start --stop --tag --mem_per_cpu --walltime --partition --reservation
    --from-run --to-run --last-days --rucio-rule --rucio-scope --rucio-rse --rucio-upload
""")
CAX_PROGRAMS = {
    "massive-cax": "--start --stop --tag --mem_per_cpu --walltime --partition --reservation",
    "massive-tsm": "--from-run --to-run --last-days --logfile",
    "massive-ruciax": "--from-run --to-run --last-days --on-disk-only",
    "cax-mv": "--input --output",
    "cax-rm": "--location",
    "cax-stray": "--delete",
    "cax-status": "--host --status",
    "cax-tsm-remove": "--location",
    "cax-tsm-watch": "--monitor --status --log-path",
    "ruciax-rm": "--location --status",
    "ruciax-check": "--mode --location",
    "ruciax-purge": "--purge",
    "ruciax-download": "--type --rse --dir --restore --overwrite --list --location",
    "ruciax-locator": "--method --rse --copies --status",
}
"""The flags of programs of cax beside those that several have."""
CAX_TASKS = words("""
    CopyPush CopyPull AddChecksum CompareChecksums RetryStalledTransfer
    RetryBadChecksumTransfer SetPermission AddSize ProcessBatchQueue ProcessBatchQueueHax
    PurgeProcessed BufferPurger AddGains AddDriftVelocity SetNeuralNetwork AddTSMChecksum
    RucioRule
""")


CAX_KEYS = words("""
    name hostname username method dir_raw dir_processed dir_minitrees dir_tsm data_type
    upload_options download_options purge pax_version_purge pax_processing_versions nstreams
    grid_cert task_list dataset_list rucio_account rucio_upload_rse rucio_download_rse
    rucio_transfer rucio_config_p2 rucio_config_p3 pax_versions receive directory
""")
CAX_COLLECTIONS = words("""
    runs_new gains drift_velocity neural_network field_distortion light_collection_efficiency
    s2_xy_map
""")


def table(title: str) -> list[list[str]]:
    """The rows of a section's only table."""
    (rows,) = tables(section(MIGRATING, title))
    return rows


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Programs", CAX_COMMANDS),
        ("Flags", CAX_FLAGS),
        ("Keys", CAX_KEYS),
        ("Tasks", CAX_TASKS),
        ("Collections", CAX_COLLECTIONS),
    ],
    ids=str,
)
def test_nothing_of_cax_is_left_out(title: str, names: list[str]) -> None:
    """Each program, flag, key, task and collection of cax has a row with its counterpart."""
    rows = table(title)
    assert set(names) <= {word.split()[0] for row in rows for word in marked(row[0])}
    assert all(row[1] for row in rows)


@pytest.mark.parametrize(("program", "flags"), CAX_PROGRAMS.items(), ids=CAX_PROGRAMS)
def test_no_flag_of_a_program_is_left_out(program: str, flags: str) -> None:
    """Each flag of each program of cax has a row of that program."""
    of_program = [row for row in table("Flags") if program in row[0].partition(":")[0].split(", ")]
    named = {word.split()[0] for row in of_program for word in marked(row[0])}
    assert named == set(words(flags))


def test_keys_of_cax_are_accepted() -> None:
    """The keys in the table are keys of sites.json, or are refused with their new names."""
    for row in table("Keys"):
        for key in marked(row[0]):
            assert key in keys(Site) or f"`{FORMER[key]}`" in row[1], key


def test_tasks_of_cax_enable_the_handlers_of_the_table() -> None:
    """A task enables the handlers of its row in ``task_list``."""
    load_handlers(BY_METHOD)
    shipped = [one for one in recorded if one.module.startswith("caxev.handlers.")]
    for row in table("Tasks"):
        for task in marked(row[0]):
            enabled = [one.name for one in shipped if task in one.aliases]
            assert enabled, task
            assert all(f"`{name}`" in row[1] for name in enabled), task


def test_corrections_of_cax_have_a_table() -> None:
    """The corrections of cax that are named here are those that sites.json knows."""
    named = {
        word for word in marked(section(MIGRATING, "Collections")) if word[:3] in {"Add", "Set"}
    }
    assert named <= set(CORRECTIONS)
