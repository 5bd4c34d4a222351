"""Tape archives: one class for each kind, all behind one interface.

`steps` has the operations for `caxev.handlers.tape` and the command line. Another kind of archive
is added by the entry point group ``caxev.tape``: the method's name, and the class.
"""

from caxev.tape.base import Archive, Reach, Stored, Transcript, folder_of
from caxev.tape.find import archive, methods
from caxev.tape.steps import (
    Copied,
    Data,
    Outcome,
    back_up,
    check,
    compare,
    contents,
    directly,
    holdings,
    recall,
    unstage,
)

__all__ = [
    "Archive",
    "Copied",
    "Data",
    "Outcome",
    "Reach",
    "Stored",
    "Transcript",
    "archive",
    "back_up",
    "check",
    "compare",
    "contents",
    "directly",
    "folder_of",
    "holdings",
    "methods",
    "recall",
    "unstage",
]
