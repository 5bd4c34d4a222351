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
ROOM_AGAIN: Final = 3600.0
"""Seconds after which an RSE that was full is tried again."""

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
"""What will not change by itself."""

REFUSED: Final = frozenset(
    {"AccessDenied", "CannotAuthenticate", "CannotAuthorize", "NoAuthInformation"}
    | {"ScopeAccessDenied"}
)
"""What somebody must allow. Proxies and tokens are renewed, too."""

_GATEWAY: Final = re.compile(
    r"http status code: 50[234]\b"  # Rucio's client, of its own server
    r"|bad status code 50[234]\b|details: 50[234](?:\n|$)"  # its protocols, of a storage
    r"|\bhttp(?:/\d(?:\.\d)?)? 50[234]\b"  # gfal and davix
    r"|\b50[234] (?:bad gateway|service (?:temporarily )?unavailable|gateway time-?out)"
    r"|requested service is not available at the moment",  # `ServiceUnavailable`, by its text
    re.IGNORECASE,
)
"""What is made of a gateway's answer while the server behind it is away.

An error of an upload may hold another one's text alone: its class means nothing then.
"""

FULL: Final = frozenset({"FullStorage", "InsufficientAccountLimit", "RSEOverQuota"})


class OverQuota(Retry):
    """There is no room for it at the RSE: by the account's limit there, or at all.

    It is tried again for ever, since somebody will make room, but not often.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why, after=ROOM_AGAIN)


@contextmanager
def translated(what: str, away: float) -> Iterator[None]:
    """Raise Rucio's errors as ours; `what` was being done.

    A server that cannot be reached is asked again after `away` seconds; this costs no attempt.
    """
    try:
        yield
    except (Retry, GiveUp):
        raise
    except Exception as error:
        meaning = meaning_of(error, what, away)
        if meaning is None:
            raise
        raise meaning from error


def meaning_of(error: BaseException, what: str, away: float) -> Retry | GiveUp | None:
    """What an error means to the caller; None for one that its client does not raise."""
    names = {cls.__name__ for cls in type(error).__mro__}
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    text = f"{what}: {_text(error)}"
    if "rucio" in modules:
        if names & FULL:
            return OverQuota(text)
        if names & REFUSED:
            return Denied(text)
        if names & {"ServerConnectionException", "ServiceUnavailable"} or _GATEWAY.search(
            str(error)
        ):
            return Retry(text, after=away)
        return GiveUp(text) if names & HOPELESS else Retry(text)
    if modules & {"requests", "urllib3"}:
        return Retry(text, after=away)
    return Retry(text) if isinstance(error, (OSError, *UNFORESEEN)) else None


def is_called(error: BaseException, name: str) -> bool:
    """Whether it is Rucio's error of that name, or a kind of it."""
    return any(cls.__name__ == name for cls in type(error).__mro__)


def _text(error: BaseException) -> str:
    """Rucio's own message on one line, without what its schema validator adds below."""
    said = str(error).strip().split("\n\nFailed validating")[0]
    words = " ".join(said.split()) or "no message"
    name = type(error).__name__
    return f"{name}: {words[:_LONGEST]}"
