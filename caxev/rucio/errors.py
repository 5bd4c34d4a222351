"""Rucio's errors, as what the caller can do: `Retry`, `OverQuota` or `GiveUp`, in Rucio's words.

Used by `connection` and `storage` alone. Known by the names of their classes, so that nothing of
Rucio's needs to be imported for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from caxev.core.errors import UNFORESEEN, Denied, GiveUp, Retry

_LONGEST: Final = 500

HOPELESS: Final = frozenset(
    {
        "AccountNotFound",
        "ClientProtocolNotFound",
        "ClientProtocolNotSupported",
        "ConfigNotFound",
        "ConfigurationError",
        "ConfigLoadingError",
        "DataIdentifierNotFound",
        "IdentityError",
        "IdentityNotFound",
        "InputValidationError",
        "InvalidMetadata",
        "InvalidObject",
        "InvalidReplicationRule",
        "InvalidRSEExpression",
        "InvalidValueForKey",
        "ManualRuleApprovalBlocked",
        "MissingClientParameter",
        "MissingDependency",
        "MissingModuleException",
        "RSEFileNameNotSupported",
        "RSENotFound",
        "RSEOperationNotSupported",
        "RSEProtocolDomainNotSupported",
        "RSEProtocolNotSupported",
        "ScopeNotFound",
        "StagingAreaRuleRequiresLifetime",
        "UnsupportedDIDType",
    }
)
"""Permanent errors."""

REFUSED: Final = frozenset(
    {"AccessDenied", "CannotAuthenticate", "CannotAuthorize", "NoAuthInformation"}
    | {"ScopeAccessDenied"}
)
"""Errors of missing permissions, also by a proxy or token that somebody must renew."""

_GATEWAY: Final = re.compile(
    r"http status code: (?:429|50[234])\b"  # Rucio's client, of its own server
    r"|bad status code (?:429|50[234])\b"  # its protocols, of a storage
    r"|details: (?:429|50[234])(?:\n|$)"
    r"|\bhttp(?:/\d(?:\.\d)?)? (?:429|50[234])\b"  # gfal and davix
    r"|\b50[234] (?:bad gateway|service (?:temporarily )?unavailable|gateway time-?out)"
    r"|\b429 too many requests"
    r"|requested service is not available at the moment",  # `ServiceUnavailable`, by its text
    re.IGNORECASE,
)
"""Texts of errors made from a gateway's answer while the server behind it is down or busy.

An error of an upload may contain only the text of another one, so that its class has no meaning.
"""

FULL: Final = frozenset({"FullStorage", "InsufficientAccountLimit", "RSEOverQuota"})


class OverQuota(Denied):
    """The RSE is full, or the account's limit there is reached: somebody must make room."""


@contextmanager
def translated(what: str, away: float) -> Iterator[None]:
    """Raise Rucio's errors as ours; `what` describes the operation.

    A server that cannot be reached is tried again after `away` seconds, without costing an attempt.
    """
    try:
        yield
    except (Retry, GiveUp):  # ours already, as from `limited_session`
        raise
    except Exception as error:
        meaning = meaning_of(error, what, away)
        if meaning is None:
            raise
        raise meaning from error


def meaning_of(error: BaseException, what: str, away: float) -> Retry | GiveUp | None:
    """Return our error for an error, or None if it is not one of Rucio's client."""
    names = {cls.__name__ for cls in type(error).__mro__}
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    text = f"{what}: {_text(error)}"
    if "rucio" in modules:
        # By the whole class hierarchy, so that new subclasses are recognized; the specific sets
        # come first.
        if names & FULL:
            return OverQuota(text)
        if names & REFUSED:
            return Denied(text)
        if names & {"ServerConnectionException", "ServiceUnavailable"} or _GATEWAY.search(
            str(error)
        ):
            return Retry(text, after=away)
        return GiveUp(text) if names & HOPELESS else Retry(text)
    # Not every call of Rucio's client wraps the errors of its HTTP library.
    if modules & {"requests", "urllib3"}:
        return Retry(text, after=away)
    return Retry(text) if isinstance(error, (OSError, *UNFORESEEN)) else None


def is_called(error: BaseException, name: str) -> bool:
    """Return whether an error is Rucio's of that name, or a subclass."""
    return any(cls.__name__ == name for cls in type(error).__mro__)


def _text(error: BaseException) -> str:
    """Return Rucio's message on one line, without the schema validator's details."""
    message = str(error).strip().split("\n\nFailed validating")[0]
    words = " ".join(message.split()) or "no message"
    name = type(error).__name__
    return f"{name}: {words[:_LONGEST]}"
