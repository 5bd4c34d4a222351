"""The right to read copies at a site: ``permissions`` of its entry in sites.json.

`caxev.handlers.permissions` goes by them. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from attrs import frozen

from caxev.config.reading import keys, read
from caxev.config.values import Kind, check, filled, match, matching, printable

_WHO: Final = r"(?:d(?:efault)?:)?(?:u(?:ser)?|g(?:roup)?|o(?:ther)?|m(?:ask)?)"
_ENTRY: Final = rf"{_WHO}:[A-Za-z0-9_.@-]*:[rwxX-]{{1,3}}"
_OWNER: Final = 0o700


def _mode(value: Any) -> int:
    mode = int(match("0?[0-7]{3,4}", value).string, 8)
    # Without the owner's bits caxev could not read or repair its own copies. If others could write
    # (0o002), or files ran as their owner (0o4000), a copy would not be safe from other accounts.
    check(mode & _OWNER == _OWNER and not mode & 0o4002)
    return mode


@frozen
class Permission:
    """The mode, group and entries of an ACL that a copy's files are given; None: left as it is."""

    mode: Annotated[
        int | None,
        Kind('a mode as "0750", with all for the owner and no writing for others', _mode),
    ] = None
    """The mode of directories. Files get it without its execute and special bits."""
    group: Annotated[str | None, Kind("a group's name", printable)] = None
    """The name of the group."""
    acl: Annotated[
        str | None,
        Kind('entries for setfacl, as "g:xenon:rX"', matching(rf"{_ENTRY}(,{_ENTRY})*")),
    ] = None
    """Entries that ``setfacl --modify`` adds (Debian: acl)."""

    @property
    def file_mode(self) -> int | None:
        """The mode of files: that of directories without execute and special bits."""
        return None if self.mode is None else self.mode & 0o666


Own = Annotated[Permission, Kind('an object, as {"mode": "0750"}')]


@frozen
class Permissions(Permission):
    """The key in sites.json: values for all types of data, and for single types."""

    raw: Own = Permission()
    """Raw data's own values; they override those for all types."""
    processed: Own = Permission()
    """Processed data's own."""
    minitrees: Own = Permission()
    """Minitrees' own."""


def read_permissions(value: Any, kind: type[Permissions] = Permissions) -> dict[str, Permission]:
    """Read a site's ``permissions``, by type of data. Raises `Problems`."""
    # A type without any value is left out, so that its copies are not walked for nothing.
    given = read(kind, value)
    common = Permission(given.mode, given.group, given.acl)
    own = [name for name in keys(kind) if name not in keys(Permission)]
    merged = {name: filled(getattr(given, name), common) for name in own}
    return {name: one for name, one in merged.items() if one != Permission()}
