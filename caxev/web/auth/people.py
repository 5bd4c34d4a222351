"""A person, and the role that their groups give. Pure."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Final

from attrs import frozen

LONGEST: Final = 200
"""Characters of a name: it goes into requests and into the history."""


class PersonRole(StrEnum):
    """The rights of a person: an operator also acts."""

    READER = "reader"
    OPERATOR = "operator"


@frozen
class Person:
    """The person who asks. Requests and the history have the name."""

    name: str
    role: PersonRole

    @property
    def may_act(self) -> bool:
        return self.role is PersonRole.OPERATOR


class NotAdmitted(Exception):
    """The person does not get in. `status` is HTTP's; the message is for them."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class LogInAgain(NotAdmitted):
    """The facts about the person are too old: at a page, their browser goes to the log-in."""

    def __init__(self) -> None:
        super().__init__(401, "You logged in too long ago: log in again.")


@frozen
class Membership:
    """The groups that make a person a reader or an operator; without `readers`, all are readers."""

    readers: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()

    def person(self, name: str, groups: Collection[str]) -> Person:
        """Return who that is. Raises `NotAdmitted` if they have no role, or no usable name."""
        if not name or len(name) > LONGEST or not name.isprintable():
            raise NotAdmitted(
                403, "Your name cannot be used: it is empty, too long or unprintable."
            )
        if not self.operators.isdisjoint(groups):
            return Person(name, PersonRole.OPERATOR)
        if self.readers and self.readers.isdisjoint(groups):
            raise NotAdmitted(403, f"{name} is in no group that may see this page.")
        return Person(name, PersonRole.READER)
