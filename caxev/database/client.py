"""Connecting to the server, and what pymongo's errors mean to us.

Foreign errors are translated here, once, into classes named by what the caller can do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_plus, urlsplit

from bson.errors import BSONError
from loguru import logger
from pymongo import AsyncMongoClient
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DocumentTooLarge,
    InvalidOperation,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)

from caxev import failpoints
from caxev.config.settings import Settings
from caxev.core.errors import UNFORESEEN, ConfigError

Document = dict[str, Any]
Client = AsyncMongoClient[Document]

LOGIN_CODES: Final = {11, 18, 391, 8000}
"""UserNotFound, AuthenticationFailed, ReauthenticationRequired, AtlasError."""
AUTH_CODES: Final = {13, *LOGIN_CODES}
LOST_CODES: Final = {286, 136, 280, 260}
"""ChangeStreamHistoryLost, CappedPositionLost (a live stream overtaken by the oplog),
ChangeStreamFatalError, InvalidResumeToken: the stream cannot go on."""
TOO_LARGE: Final = 10334
"""BSONObjectTooLarge: ends a change stream; of a write it is the document's fault."""
BAD_TOKEN_CODES: Final = {9, 15, 40647, 40648, 40649, 50811}
"""Not a resume token: FailedToParse, Overflow, and the errors of the token's parser."""
WHOLE_CODES: Final = {
    # A primary that steps down, shuts down or was away, and the cursors it took along.
    *(6, 7, 43, 89, 91, 175, 189, 202, 262, 9001, 10058, 10107, 11600, 11601, 11602, 13435, 13436),
    # Locks, time limits, and transactions that the server gave up.
    *(24, 46, 50, 112, 117, 225, 239, 246, 251, 256, 290, 365),
    # A majority, or the member that was asked for, that is not there (yet).
    *(64, 76, 79, 94, 100, 133, 134),
    # Shards that move: StaleShardVersion, StaleEpoch, RetryChangeStream, StaleDbVersion.
    *(63, 150, 234, 249, 13388),
    # Writes are blocked by an administrator; the disk is full.
    *(371, 14031),
}
"""The database as a whole cannot do it now: the next write would fail, too."""
DOCUMENT_CODES: Final = {
    # Values, types and paths that an update cannot have.
    *(2, 9, 14, 22, 28, 40, 52, 53, 54, 55, 56, 57, 66),
    # A validator, a unique index, and documents or index keys that became too large.
    *(121, 171, TOO_LARGE, 11000, 11001, 12582, 17280, 17419, 17420),
}
"""This document, or its update, is at fault: others can be written."""
NOT_REPLICA_SET: Final = 40573


class DatabaseError(Exception):
    """The database refused or failed. The message is one line for a person."""


class Unreachable(DatabaseError):
    """No server could be reached, or none is primary. Try again."""


class NotAuthorized(DatabaseError):
    """Wrong user or password, or a right is missing."""


class LoginFailed(NotAuthorized):
    """Wrong user or password. Wait: one that is being replaced may fit again soon."""


class NotReplicaSet(DatabaseError):
    """The server is not a replica set, so it has no change streams."""


class WrongSchema(DatabaseError):
    """The ledger is another caxev's: this one does not know its form, or must wait to change it."""


class HistoryLost(DatabaseError):
    """The stream cannot be continued from that position: scan, then start again."""


class InvalidDocument(DatabaseError):
    """This document cannot be stored, however often one tries."""


class LeaseLost(DatabaseError):
    """Another process has taken this site over. Stop acting for it."""


def is_transient(error: DatabaseError) -> bool:
    """Return whether to wait and try again: true unless trying again cannot help."""
    if isinstance(error, LoginFailed):
        return True
    return not isinstance(
        error,
        LeaseLost | HistoryLost | NotReplicaSet | WrongSchema | NotAuthorized | InvalidDocument,
    )


def concerns_one(error: DatabaseError) -> bool:
    """Return whether an error ends only the write that met it, and no others.

    True for unknown codes, too: if one concerned the whole database, the next write would show it.
    """
    return not isinstance(
        error, LeaseLost | HistoryLost | NotReplicaSet | WrongSchema | NotAuthorized | Unreachable
    )


def is_fatal(error: DatabaseError) -> bool:
    """Return whether an error persists even if one waits, or leaves the failed write out."""
    return not (is_transient(error) or concerns_one(error))


@contextmanager
def unless_fatal(trouble: str) -> Iterator[None]:
    """Log an error of the database and leave the block, which the caller tries again later.

    Raises one that is fatal.
    """
    try:
        yield
    except DatabaseError as error:
        if is_fatal(error):
            raise
        logger.debug("{} yet: {}", trouble, error)


def of_the_site(error: DatabaseError) -> DatabaseError:
    """Name the document of a lease, whose write failed: without it its process does nothing.

    So that is waited for, and no other document in the same write is at fault.
    """
    if not concerns_one(error):
        return error
    return Unreachable(f"the ledger refuses the document of the lease and position: {error}")


@contextmanager
def writing_lease(index: int = 0) -> Iterator[None]:
    """Raise `of_the_site` if the write with this index is refused: that of a lease's document."""
    try:
        yield
    except OperationFailure as error:
        if error.code not in DOCUMENT_CODES or (error.details or {}).get("index") != index:
            raise
        raise of_the_site(InvalidDocument(f"{_first_line(error)} (code {error.code})")) from error


def connect(settings: Settings) -> Client:
    """Make a client. Does not wait for the server; must be called inside the asyncio loop."""
    with usable(settings):
        return AsyncMongoClient(
            address(settings),
            **{**_defaults(settings), **RELIED_ON},
            tz_aware=True,
            # One document with a date beyond year 9999, or broken text, must not stop a batch.
            datetime_conversion="DATETIME_AUTO",
            unicode_decode_error_handler="replace",
            appname="caxev",
            event_listeners=listeners(),
        )


@contextmanager
def usable(settings: Settings) -> Iterator[None]:
    """Raise `ConfigError` if no client can be made of an address and the files that it names."""
    try:
        yield
    except OSError as error:  # of a certificate
        raise ConfigError(
            f"{settings.safe_uri} is not a usable database address: {error.strerror or error}"
            f"{_files_named(settings.mongo_uri)}"
        ) from None
    except (InvalidURI, ConfigurationError, ValueError) as error:
        message = f"{settings.safe_uri} is not a usable database address: {_first_line(error)}"
        raise ConfigError(message) from None  # the chain would show the password


def _certificates(uri: str) -> list[tuple[str, str]]:
    """Return the options of an address that name files, and these."""
    # tlsCAFile, tlsCertificateKeyFile, tlsCRLFile: none of the other options ends like that.
    options = parse_qsl(urlsplit(uri).query)
    return [(name, value) for name, value in options if name.lower().endswith("file")]


def _files_named(uri: str) -> str:
    """Return the certificate files that an address names, for people."""
    files = [f"{name}={value}" for name, value in _certificates(uri)]
    return f" ({', '.join(files)})" if files else ""


def credentials(settings: Settings) -> object:
    """Return a value that changes with the password and with the files of certificates."""
    return settings.mongo_uri, [_version(path) for _, path in _certificates(settings.mongo_uri)]


def _version(path: str) -> object:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    # The ctime: nothing else changes when an unreadable file becomes readable.
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


class Writes(CommandListener):
    """Passes a failpoint before each command that writes; in a transaction, before its commit."""

    def started(self, event: CommandStartedEvent) -> None:
        """Pass the failpoint. A crash inside a transaction leaves nothing, wherever it comes."""
        name = event.command_name
        if name in _WRITES and (name == "commitTransaction" or "autocommit" not in event.command):
            failpoints.before(name)

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Do nothing."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Do nothing."""


_WRITES: Final = {"insert", "update", "delete", "findAndModify", "commitTransaction"}


def listeners() -> list[CommandListener]:
    """Return the listeners for any client: none, unless a campaign has armed the failpoints."""
    return [Writes()] if failpoints.ARMED else []


WRITE_LIMIT: Final = 10.0
"""Seconds within which a majority must have a write. It may become durable all the same."""
RELIED_ON: Final[Mapping[str, Any]] = {
    # A lagging secondary would show a run without its latest change, and a write that the next
    # primary lacks would be rolled back.
    "readPreference": "primary",
    "w": "majority",
    "wTimeoutMS": int(WRITE_LIMIT * 1000),
}
"""Options that the engine relies on, and that the address therefore cannot choose."""
_OVERRIDDEN: Final = {
    *(name.lower() for name in RELIED_ON),
    *("readpreferencetags", "maxstalenessseconds", "readconcernlevel", "wtimeout"),
    # Time limits are set for each call (`Connection`): one for all sockets would break off an idle
    # change stream, whose answer the server holds back for half a minute.
    *("j", "journal", "timeoutms", "sockettimeoutms"),
}
POOL: Final = 10
"""Connections that a listener needs at least: its streams keep some busy all the time."""


def address(settings: Settings) -> str:
    """Return the address without the options that caxev sets itself; log each of these.

    Raises `ConfigError` if too few connections are allowed.
    """
    uri, mark, query = settings.mongo_uri.partition("?")
    kept = []
    for option in re.split("[&;]", query):
        name, _, value = option.partition("=")
        if name.lower() in _OVERRIDDEN:
            _warn_overridden(settings.safe_uri, name)
        else:
            kept.append(option)
        if name.lower() == "maxpoolsize" and 0 < _whole(value) < POOL:
            raise ConfigError(
                f"the address of {settings.safe_uri} has maxPoolSize={value}: caxev needs {POOL} "
                "connections or more; leave the option out, or raise it"
            )
    return f"{uri}{mark}{'&'.join(kept)}"


def _whole(value: str) -> int:
    """Return a number as PyMongo reads it; 0 if it is none."""
    try:
        return int(unquote_plus(value))
    except ValueError:
        return 0


@cache
def _warn_overridden(where: str, name: str) -> None:
    logger.warning("the option {} in the address of {} is ignored: caxev sets it", name, where)


def _defaults(settings: Settings) -> Document:
    # A watcher waits this long for a dead primary before it tries the next one. A primary that
    # hangs is given up once it has not answered a heartbeat in time (both together).
    defaults = {
        "serverSelectionTimeoutMS": 5000,
        "connectTimeoutMS": 5000,
        "heartbeatFrequencyMS": 2000,
    }
    # Not over the address: a slow link may need more.
    given = settings.mongo_uri.lower()
    return {name: value for name, value in defaults.items() if name.lower() not in given}


@contextmanager
def translated(settings: Settings) -> Iterator[None]:
    """Raise our own errors for pymongo's."""
    try:
        yield
    except PyMongoError as error:
        raise meaning(error, settings) from error
    # PyMongo's own for a set, ValueError for a UUID, RecursionError for a list in itself.
    except (BSONError, RecursionError, *UNFORESEEN) as error:
        raise InvalidDocument(f"the database cannot store it: {_first_line(error)}") from error


def meaning(error: PyMongoError, settings: Settings) -> DatabaseError:
    """Return our own error for one of pymongo's."""
    where = settings.safe_uri
    match error:
        case ServerSelectionTimeoutError():
            return Unreachable(f"no answer from the database at {where}: {_first_line(error)}")
        case DocumentTooLarge():
            return InvalidDocument(f"too large for the database: {_first_line(error)}")
        # InvalidOperation: the client was closed, because its credentials were renewed.
        case AutoReconnect() | ConnectionFailure() | InvalidOperation():
            return Unreachable(f"the connection to {where} broke: {_first_line(error)}")
        case BulkWriteError():
            return _of_operation(_first_of(error), where)
        case OperationFailure():
            return _of_operation(error, where)
        case _:
            return DatabaseError(f"{where}: {_first_line(error)}")


def _first_of(error: BulkWriteError) -> OperationFailure:
    """Return the error of the first write that failed, else that of the majority."""
    failed = [*error.details.get("writeErrors", ()), *error.details.get("writeConcernErrors", ())]
    one = failed[0] if failed else {}
    return OperationFailure(one.get("errmsg", str(error)), one.get("code"), one)


def _of_operation(error: OperationFailure, where: str) -> DatabaseError:
    code, reason = error.code, _first_line(error)
    if code in LOGIN_CODES:
        return LoginFailed(
            f"the database at {where} denied access: {reason}; "
            "check the user, and the password in MONGO_PASSWORD"
        )
    if code in AUTH_CODES:
        return NotAuthorized(
            f"the database at {where} denied access: {_lacking(error)}; "
            "an administrator gives rights by caxev db grants"
        )
    if code == NOT_REPLICA_SET:
        return NotReplicaSet(not_replica_set(where))
    if code in LOST_CODES or error.has_error_label("NonResumableChangeStreamError"):
        return HistoryLost(f"the change stream cannot continue: {reason} (code {code})")
    if code in DOCUMENT_CODES:
        return InvalidDocument(
            f"the database cannot store it: {reason}{_details(error)} (code {code})"
        )
    if code in WHOLE_CODES or error.has_error_label("TransientTransactionError"):
        return Unreachable(
            f"the database at {where} is temporarily unable to do it: {reason} (code {code})"
        )
    return DatabaseError(f"the database at {where}: {reason} (code {code})")


_DENIED: Final = re.compile(r'not authorized on (\S+) to execute command \{ (\w+): (?:"([^"]*)")?')
_RIGHTS: Final = {
    "aggregate": "find",
    "count": "find",
    "distinct": "find",
    "getMore": "find",
    "findAndModify": "update",
    "delete": "remove",
    "createIndexes": "createIndex",
    "create": "createCollection",
    "drop": "dropCollection",
}
"""The right that a command of the server needs, if it has another name."""


def _lacking(error: OperationFailure) -> str:
    """Return which right the user lacks, without the command that the server's message repeats."""
    # It has the session's id, the cluster's signature, and the content of the write.
    text = str((error.details or {}).get("errmsg", error))
    found = _DENIED.search(text)
    if found is None:
        return _first_line(error)
    database, command, collection = found.groups()
    right = "changeStream" if "$changeStream" in text else _RIGHTS.get(command, command)
    # Such an update needs both rights; a site's user has the other one.
    right = "insert" if right == "update" and "upsert: true" in text else right
    place = f"{database}.{collection}" if collection else f"the database {database}"
    return f"this user lacks the right {right!r} on {place}"


def _details(error: OperationFailure) -> str:
    """Return the rules and fields that a validator objects to. Values are not for the log."""
    found = (error.details or {}).get("errInfo", {}).get("details", {})
    rules = found.get("schemaRulesNotSatisfied") if isinstance(found, dict) else None
    names = [text for rule in rules or () for text in _objections(rule)]
    return f": {', '.join(names)}"[:300] if names else ""


def _objections(rule: Any) -> Iterator[str]:
    if isinstance(rule, Mapping):
        for one in rule.get("propertiesNotSatisfied", ()):
            yield str(one.get("propertyName"))
        yield from map(str, rule.get("missingProperties", ()))


def not_replica_set(where: str) -> str:
    """Return the message for a server that is not a replica set."""
    return (
        f"the database at {where} is not a replica set, so it has no change streams; start mongod "
        'with --replSet rs0 and run rs.initiate() once (MongoDB manual: "Convert a Standalone '
        'to a Replica Set")'
    )


def _first_line(error: BaseException) -> str:
    # pymongo appends timeouts and the whole topology.
    text = str(error).partition("\n")[0].partition(", Timeout:")[0].partition(", full error:")[0]
    return text[:300]
