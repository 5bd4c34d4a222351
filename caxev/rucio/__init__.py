"""The catalogue of replicas: Rucio.

`names` has what a run's data is called in it, `rules` reads rule files, `changes` decides which
replicas are wanted, `files` has what a file must be; these are pure or read this disk alone.
`client` has what can be done, in worker processes, with the values of `orders`; `moving` brings
files there and back. Only `connection` and `storage` know Rucio's library.
`caxev.handlers.rucio` and ``caxev rucio`` put them together.
"""

from caxev.rucio.changes import (
    ENDED,
    RuleState,
    Wishes,
    changes,
    wishes_for,
)
from caxev.rucio.client import (
    check,
    datasets,
    declare_bad,
    download,
    give_up,
    look,
    read_copy,
    settle,
    upload,
    verify,
)
from caxev.rucio.connection import missing
from caxev.rucio.errors import OverQuota
from caxev.rucio.files import Checked, stored_as
from caxev.rucio.names import Did, Names, names_of, taken_at
from caxev.rucio.orders import DatasetState, Download, Settlement, Upload, Verdict
from caxev.rucio.rules import Rule, WantedReplica, load_rules, source_of

__all__ = [
    "ENDED",
    "Checked",
    "DatasetState",
    "Did",
    "Download",
    "Names",
    "OverQuota",
    "Rule",
    "RuleState",
    "Settlement",
    "Upload",
    "Verdict",
    "WantedReplica",
    "Wishes",
    "changes",
    "check",
    "datasets",
    "declare_bad",
    "download",
    "give_up",
    "load_rules",
    "look",
    "missing",
    "names_of",
    "read_copy",
    "settle",
    "source_of",
    "stored_as",
    "taken_at",
    "upload",
    "verify",
    "wishes_for",
]
