"""Keep the end of a program's output, without filling memory or a disk."""

from __future__ import annotations

import os
from threading import Thread
from typing import IO, Final

_AT_ONCE: Final = 1 << 16
_LINGER: Final = 1.0  # seconds for the last of it, once the program has ended


class Tail:
    """Reads a pipe to its end in a thread of its own, and keeps the last `most` bytes."""

    def __init__(self, pipe: IO[bytes], most: int) -> None:
        self.read = 0
        self._kept = bytearray()
        # A descriptor of our own: the pipe may be closed while a child of the program holds it.
        self._descriptor, self._most = os.dup(pipe.fileno()), most
        self._thread = Thread(target=self._read_all, name="tail", daemon=True)
        self._thread.start()

    @property
    def whole(self) -> bool:
        """Whether all of the output is kept."""
        return self.read <= self._most

    def bytes(self) -> bytes:
        """Return the end. Waits only a moment for it: a child may hold the pipe forever."""
        self._thread.join(_LINGER)
        return bytes(self._kept[-self._most :])

    def text(self) -> str:
        """Return the end as text."""
        return self.bytes().decode(errors="replace")

    def _read_all(self) -> None:
        try:
            while some := os.read(self._descriptor, _AT_ONCE):
                self.read += len(some)
                self._kept += some
                if len(self._kept) > 2 * self._most:
                    del self._kept[: -self._most]
        finally:
            os.close(self._descriptor)
