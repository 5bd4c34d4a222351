"""Amounts as people read them: bytes, durations, and the progress of work. Pure.

The command line and the page print the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite

from attrs import frozen


def size(number: object) -> str | None:
    """Return bytes as people read them: ``1.2 GB`` (powers of 1000)."""
    if not isinstance(number, int | float):
        return None
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:  # noqa: PLR2004  # rounds to 1000
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def lasting(seconds: float) -> str:
    """Return a duration for people, in the largest unit that fits at least twice."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@frozen
class ReportedProgress:
    """The progress of reactions in bytes, and bytes a second; None if unknown."""

    done: int
    total: int | None = None
    rate: float | None = None

    @classmethod
    def of(cls, row: object) -> ReportedProgress | None:
        """Return the progress in a reaction's ledger document; None if it has none, or nonsense."""
        # Ledger documents may come from other versions of the program: trust no type.
        match row:
            case {"done": int(done)}:
                assert isinstance(row, Mapping)
                return cls(done, _total(row.get("total")), _rate(row.get("rate")))
            case _:
                return None

    @classmethod
    def sum(cls, several: Iterable[ReportedProgress]) -> ReportedProgress:
        """Return the total progress, as far as it is known."""
        found = list(several)
        rates = [one.rate for one in found if one.rate is not None]
        return cls(
            sum(one.done for one in found),
            sum(one.total or 0 for one in found) or None,
            sum(rates) if rates else None,
        )

    @property
    def left(self) -> float | None:
        """Return the seconds until the end at this rate; None if unknown."""
        if self.total is None or not self.rate:
            return None
        return max(self.total - self.done, 0) / self.rate

    @property
    def values(self) -> dict[str, float | None]:
        """The progress in numbers, for programs."""
        return {
            "bytes_done": self.done,
            "bytes_total": self.total,
            "bytes_per_s": self.rate,
            "eta_s": self.left and round(self.left),
        }

    def __str__(self) -> str:
        whole = "" if self.total is None else f" of {size(self.total)}"
        rate = "" if self.rate is None else f", {size(self.rate)}/s"
        left = "" if self.left is None else f", {lasting(self.left)} left"
        return f"{size(self.done)}{whole}{rate}{left}"


def _total(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _rate(value: object) -> float | None:
    if not isinstance(value, int | float) or not isfinite(value):
        return None
    return max(float(value), 0.0)
