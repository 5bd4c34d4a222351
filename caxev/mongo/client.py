"""Connecting to the server, and what pymongo's errors mean to us.

Foreign errors are translated here, once, into classes that say what the caller can do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from pymongo import AsyncMongoClient
from pymongo.errors import (
    AutoReconnect,
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

from caxev import crash
from caxev.config import ConfigError, Settings

Document = dict[str, Any]
Client = AsyncMongoClient[Document]

AUTH_CODES: Final = {8000, 18, 13, 11}
LOST_CODES: Final = {286, 136, 280, 260, 10334}  # the last one: only of a stream
"""ChangeStreamHistoryLost, CappedPositionLost (a live stream overtaken by the oplog),
ChangeStreamFatalError, InvalidResumeToken, BSONObjectTooLarge: the stream cannot go on."""
TRANSIENT_CODES: Final = {6, 7, 43, 89, 91, 175, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436}
"""A primary that steps down, shuts down or was away, and cursors that died with it."""
BAD_TOKEN_CODES: Final = {9, 15, 40647, 40648, 40649, 50811}
"""A resume token that is none: FailedToParse, Overflow, and what the token's parser says."""
UNSTORABLE_CODES: Final = {2, 9, 14, 28, 40, 52, 54, 56, 57, 66, 11000, 17280, 17419, 17420}
"""Values, types and paths that an update cannot have, documents that became too large."""
NOT_REPLICA_SET: Final = 40573


class DatabaseError(Exception):
    """The database did not do what was asked. The message is one line for a person."""


class Unreachable(DatabaseError):
    """No server could be reached, or none is primary. Try again."""


class Refused(DatabaseError):
    """Wrong user or password, or a right is missing."""


class NotReplicaSet(DatabaseError):
    """The server is not a replica set, so it has no change streams."""


class HistoryLost(DatabaseError):
    """The stream cannot be continued from that position: scan, then start anew."""


class Unstorable(DatabaseError):
    """What was to be written cannot be stored, however often one tries."""


class Deposed(DatabaseError):
    """Another process has taken this site over. Stop acting for it."""


def passing(error: DatabaseError) -> bool:
    """Whether to wait and try again: true of all but what trying again cannot change."""
    return not isinstance(error, Deposed | HistoryLost | NotReplicaSet | Refused | Unstorable)


def connect(settings: Settings) -> Client:
    """Make a client. Does not wait for the server; must be called inside the asyncio loop."""
    try:
        return AsyncMongoClient(
            settings.mongo_uri,
            **_options(settings),
            tz_aware=True,
            # One document with a date beyond year 9999, or broken text, must not stop a batch.
            datetime_conversion="DATETIME_AUTO",
            unicode_decode_error_handler="replace",
            appname="caxev",
            # Not the address's to choose: a look at a lagging secondary would miss its change,
            # and a write that a new primary does not know would be undone.
            readPreference="primary",
            w="majority",
            event_listeners=listeners(),
        )
    except OSError as error:  # of a certificate
        raise ConfigError(
            f"{settings.safe_uri} is not a usable database address: {error.strerror or error}"
            f"{_files_named(settings.mongo_uri)}"
        ) from None
    except (InvalidURI, ConfigurationError, ValueError) as error:
        message = f"{settings.safe_uri} is not a usable database address: {_first_line(error)}"
        raise ConfigError(message) from None  # the chain would show the password


def _files_named(uri: str) -> str:
    """The certificate files that an address names, for people."""
    options = parse_qsl(urlsplit(uri).query)
    files = [f"{name}={value}" for name, value in options if name.lower().endswith("file")]
    return f" ({', '.join(files)})" if files else ""


class Writes(CommandListener):
    """Passes a crash point before each command that writes; inside a transaction only the end."""

    def started(self, event: CommandStartedEvent) -> None:
        """Pass it: what is written inside a transaction is not there before its commit."""
        name = event.command_name
        if name in _WRITES and (name == "commitTransaction" or "autocommit" not in event.command):
            crash.before(name)

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Nothing."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Nothing."""


_WRITES: Final = {"insert", "update", "delete", "findAndModify", "commitTransaction"}


def listeners() -> list[CommandListener]:
    """What any client is made with: nothing, unless a campaign has armed the crash points."""
    return [Writes()] if crash.ARMED else []


def _options(settings: Settings) -> Document:
    # A watcher waits this long for a dead primary before it looks for the new one; one that hangs
    # is given up when it has not answered a heartbeat in time (both together).
    defaults = {
        "serverSelectionTimeoutMS": 5000,
        "connectTimeoutMS": 5000,
        "heartbeatFrequencyMS": 2000,
    }
    given = settings.mongo_uri.lower()
    return {name: value for name, value in defaults.items() if name.lower() not in given}


@contextmanager
def translated(settings: Settings) -> Iterator[None]:
    """Raise our own errors for pymongo's."""
    try:
        yield
    except PyMongoError as error:
        raise meaning(error, settings) from error
    except (BSONError, OverflowError, UnicodeError) as error:
        raise Unstorable(f"not storable in the database: {_first_line(error)}") from error


def meaning(error: PyMongoError, settings: Settings) -> DatabaseError:
    """Return what an error of pymongo's is to us."""
    where = settings.safe_uri
    match error:
        case ServerSelectionTimeoutError():
            return Unreachable(f"no answer from the database at {where}: {_first_line(error)}")
        case DocumentTooLarge():
            return Unstorable(f"too large for the database: {_first_line(error)}")
        case AutoReconnect() | ConnectionFailure() | InvalidOperation():
            return Unreachable(f"the connection to {where} broke: {_first_line(error)}")
        case OperationFailure():
            return _of_operation(error, where)
        case _:
            return DatabaseError(f"{where}: {_first_line(error)}")


def _of_operation(error: OperationFailure, where: str) -> DatabaseError:
    code, reason = error.code, _first_line(error)
    if code in AUTH_CODES:
        return Refused(
            f"the database at {where} refused us: {reason}; "
            "check the user, and the password in MONGO_PASSWORD"
        )
    if code == NOT_REPLICA_SET:
        return NotReplicaSet(not_replica_set(where))
    if code in LOST_CODES or error.has_error_label("NonResumableChangeStreamError"):
        return HistoryLost(f"the change stream cannot go on: {reason} (code {code})")
    if code in UNSTORABLE_CODES:
        return Unstorable(f"not storable in the database: {reason} (code {code})")
    if code in TRANSIENT_CODES or error.has_error_label("TransientTransactionError"):
        return Unreachable(f"the database at {where} is changing over: {reason}")
    return DatabaseError(f"the database at {where}: {reason} (code {code})")


def not_replica_set(where: str) -> str:
    """Return what to tell someone whose server is not a replica set."""
    return (
        f"the database at {where} is not a replica set, so it has no change streams; start mongod "
        'with --replSet rs0 and run rs.initiate() once (MongoDB manual: "Convert a Standalone '
        'to a Replica Set")'
    )


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0].partition(", Timeout:")[0].partition(", full error:")[0]
    return text[:300]


PLAIN: Final[CodecOptions[Document]] = CodecOptions(
    tz_aware=True,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
)
