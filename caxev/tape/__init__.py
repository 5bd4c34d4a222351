"""Tape: where copies go to stay. One class for each kind of archive, all behind one interface.

`steps` has what is done with an archive, for `caxev.handlers.tape` and the command line. An archive
of your own is found by the entry point group ``caxev.tape``: the method's name, and the class.
"""

from caxev.tape.base import Archive, Reach, Stored, Talk, folder_of
from caxev.tape.find import archive, methods
from caxev.tape.steps import (
    Copied,
    Data,
    Told,
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
    "Reach",
    "Stored",
    "Talk",
    "Told",
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
