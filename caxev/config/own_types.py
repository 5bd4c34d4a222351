"""The class of the sites of a file with ``types``: each type adds its keys to those of `Site`.

`caxev.config.loading` reads sites as this class. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Annotated, Any, Final, cast

import attrs

from caxev.config.data_types import CAX, DataTypes, read_types
from caxev.config.permissions import Own, Permission, Permissions, read_permissions
from caxev.config.processing import Processing
from caxev.config.reading import keys, kind_of
from caxev.config.sites import Base, Site
from caxev.config.values import Kind

_MAKING: Final = Annotated[
    Processing | None, Kind('an object, as {"command": ["make", "{input}"]}')
]


def types_of(value: Any) -> DataTypes:
    """Read the ``types`` of a file; null: those of cax. Raises `Problems`."""
    # A key of a site must mean one thing, and so must the name of an attribute of its class.
    taken = {*dir(Site), *keys(Site), *keys(Permissions)}
    return CAX if value is None else read_types(value, taken)


@lru_cache(maxsize=16)
def site_class(types: DataTypes) -> type[Site]:
    """Return the class of sites that may keep and make data of these types."""
    if types == CAX:
        return Site
    body = {"types": types, "__reduce__": _reduced}
    made = attrs.make_class("Site", dict(_fields(types)), (Site,), body, frozen=True, slots=True)
    return cast("type[Site]", made)


def _fields(types: DataTypes) -> Iterator[tuple[str, Any]]:
    for one in types.own:
        yield one.directory, _key(Base)
        if one.source is not None:
            yield one.making, _key(_MAKING)
    kind = kind_of(keys(Site)["permissions"].type)
    assert kind is not None
    read = partial(read_permissions, kind=_permissions_class(types))
    type_ = Annotated[dict[str, Permission], kind._replace(read=read)]
    yield "permissions", attrs.field(factory=dict, hash=False, type=cast("Any", type_))


def _permissions_class(types: DataTypes) -> type[Permissions]:
    own = {one.name: _key(Own, Permission()) for one in types.own}
    made = attrs.make_class("Permissions", own, (Permissions,), frozen=True, slots=True)
    return cast("type[Permissions]", made)


def _key(kind: Any, default: Any = None) -> Any:
    return attrs.field(default=default, type=kind)


def _reduced(site: Site) -> tuple[Any, ...]:
    # pickle finds a class by its name, and this one is nobody's attribute.
    return _restored, (site.types, attrs.asdict(site, recurse=False))


def _restored(types: DataTypes, values: dict[str, Any]) -> Site:
    return site_class(types)(**values)
