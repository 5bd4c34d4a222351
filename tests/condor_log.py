"""HTCondor's event logs, written by HTCondor's own code.

The wheel of htcondor has no daemon, but the library by which the daemons write: an event is made of
its attributes, and the library formats it, locks the log and appends to it. Python gets the reader
only, so that the writer is called by its symbols.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

import classad2
import htcondor2
from htcondor2 import JobEventType

OLD: Final = 0x00
"""The form with MM/DD and local time, as written before HTCondor 9.0."""
ISO: Final = 0x10
SUBSECOND: Final = 0x50
"""ISO, with milliseconds."""
_SIZE: Final = 1 << 16
"""Bytes for a `WriteUserLog`, of which some hundred are used."""

# PyDLL holds the GIL: the library must not be called by two threads at once.
_LIBRARY: Final = ctypes.PyDLL(htcondor2.htcondor2_impl.__file__)
_POINTER: Final = ctypes.c_void_p


def _function(symbol: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((symbol, _LIBRARY))


_event_of = _function("_Z16instantiateEventPN7classad7ClassAdE", _POINTER, _POINTER)
_construct = _function("_ZN12WriteUserLogC1Ev", None, _POINTER)
_destroy = _function("_ZN12WriteUserLogD1Ev", None, _POINTER)
_open = _function(
    "_ZN12WriteUserLog10initializeEPKciiii",
    ctypes.c_bool,
    *(_POINTER, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int),
)
_write = _function(
    "_ZN12WriteUserLog10writeEventEP9ULogEventPKN7classad7ClassAdEPb",
    ctypes.c_bool,
    *(_POINTER, _POINTER, _POINTER, _POINTER),
)


def append(log: Path, job: str, event: JobEventType, *, form: int = ISO, **fields: Any) -> None:
    """Append an event of a job, CLUSTER.PROC, of these attributes, at the present time."""
    cluster, proc = map(int, job.split("."))
    row = {"EventTypeNumber": int(event), "Cluster": cluster, "Proc": proc, "Subproc": 0, **fields}
    ad = classad2.ClassAd(row)
    # The C++ object is the first member of Python's.
    made = _event_of(_POINTER.from_address(id(ad._handle) + object.__basicsize__))
    writer = ctypes.create_string_buffer(_SIZE)
    _construct(writer)
    try:
        assert _open(writer, bytes(log), cluster, proc, 0, form)
        assert _write(writer, made, None, None)
    finally:
        _destroy(writer)
