"""Load the modules that record handlers.

`listener` and the command line call `load_handlers` once at the start; a worker process calls
`load_file` for the same files, so that functions in them are found there under the same name.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Final
from zlib import crc32

from caxev.config.errors import hint, nearest
from caxev.config.plugins import entry_points
from caxev.config.sites import Sites
from caxev.config.values import expanded
from caxev.core import registry
from caxev.core.errors import ConfigError, one_line
from caxev.core.model import OUR_STATUSES, UNKNOWN
from caxev.core.registry import OF_FILES, Handler, recorded
from caxev.limited import CONFIGURATION, read_limited

DEFAULT_HANDLERS: Final = (
    "caxev.handlers.transfer",
    "caxev.handlers.repair",
    "caxev.handlers.checksum",
    "caxev.handlers.judge",
    "caxev.handlers.stalled",
    "caxev.handlers.deletion",
    "caxev.handlers.processing",
    "caxev.handlers.completeness",
    "caxev.handlers.permissions",
    "caxev.handlers.corrections",
    "caxev.handlers.alarms",
    "caxev.handlers.tape",
)
"""The modules that every site loads."""
BY_METHOD: Final = {
    "caxev.handlers.rucio": "rucio",
    "caxev.handlers.rucio_datasets": "rucio",
}
"""The modules that are loaded only if sites.json has a site of that method."""
ENTRY_POINTS: Final = "caxev.handlers"
"""The entry point group with which an installed package offers a handlers' module."""


def load_handlers(
    modules: Iterable[str] = (),
    files: Iterable[str | Path] = (),
    *,
    default: Iterable[str] = DEFAULT_HANDLERS,
) -> None:
    """Import the default modules, those of entry points, `modules`, and then `files`.

    Their handlers are then in `caxev.core.registry.recorded`. Idempotent. Raises `ConfigError`
    naming the module or file that cannot be loaded, and leaves nothing of that one behind.
    """
    for name in default:
        _load(f"handlers module {name!r}", partial(importlib.import_module, name))
    for point in entry_points(group=ENTRY_POINTS):
        where = f"handlers of entry point {point.name!r} ({point.value})"
        _load(where, point.load)
    for name in modules:
        _load(f"handlers module {name!r}", partial(importlib.import_module, name))
    for file in files:
        _load_recording(file)


def load_file(path: str | Path) -> ModuleType:
    """Import a Python file as ``caxev_handlers.<its name>``, the same in every process.

    Raises `ConfigError` if there is no such file, if it fails, or if another file of that name is
    loaded already.
    """
    file = expanded(path).resolve()
    if not file.is_file():
        raise ConfigError(f"--handlers {path}: {_no_file(file)}")
    try:
        read_limited(file, CONFIGURATION)
    except OSError as error:
        raise ConfigError(f"handlers file {path} cannot be read: {error.strerror}") from error
    name = f"{OF_FILES}.{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"
    loaded = sys.modules.get(name)
    if loaded is None:
        return _load(f"handlers file {path}", lambda: _execute(name, file))
    if loaded.__file__ != str(file):
        raise ConfigError(
            f"handlers file {path}: {loaded.__file__} has the same name; rename one of them"
        )
    return loaded


def digest(handlers: Iterable[Handler]) -> str:
    """Return a digest of handlers: their names, and the files of those that caxev does not bring.

    These files are read once: what is changed later counts from the next start on, as their code.
    """
    rows = sorted(f"{one.name} {_digest_of_module(one.module)}" for one in handlers)
    return f"{crc32(' '.join(rows).encode()):08x}"


def _digest_of_module(name: str) -> int:
    own = name.partition(".")[0] == "caxev"  # the version says which these are
    file = None if own else getattr(sys.modules.get(name), "__file__", None)
    return 0 if file is None else _digest_of_file(file)


@cache
def _digest_of_file(file: str) -> int:
    try:
        return crc32(Path(file).read_bytes())
    except OSError:
        return 0


def doubtful_triggers(handlers: Iterable[Handler], sites: Sites) -> Iterator[str]:
    """Report what triggers name that is nearly, and not quite, a name that is known."""
    # Only that: another program may write statuses and hosts that nobody here knows.
    names = {
        "status": (*OUR_STATUSES, UNKNOWN, registry.GONE),
        "type": sites.types.known,
        "host": tuple(sites),
    }
    for one in handlers:
        given = {(key, word) for key in names for t in one.triggers for word in getattr(t, key, ())}
        for key, word in sorted(given):
            guess = None if word in names[key] or word[:1] == "<" else nearest(word, names[key])
            if guess is not None:
                yield f"{one.name} ({one.place}): unknown {key} {word!r} (did you mean {guess!r}?)"


def _load_recording(path: str | Path) -> None:
    name = load_file(path).__name__
    if not any(handler.module == name for handler in recorded):
        raise ConfigError(
            f"handlers file {path} registers no handler: "
            "decorate an async function with @on(...) from caxev"
        )


def _load(where: str, load: Callable[[], ModuleType]) -> ModuleType:
    with _all_or_nothing():
        try:
            return load()
        except ConfigError:
            raise
        except ImportError as error:
            raise ConfigError(f"{where} cannot be imported: {one_line(error)}") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of a library that panics, too
            message = f"{where} fails when it is imported: {one_line(error)}{_line_of(error)}"
            raise ConfigError(message) from error


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    before = len(recorded)
    try:
        yield
    except BaseException:
        # A handler that was recorded before its module failed must not run.
        del recorded[before:]
        raise


def _execute(name: str, file: Path) -> ModuleType:
    package = sys.modules.setdefault(OF_FILES, ModuleType(OF_FILES))
    package.__path__ = []  # unpickling imports the parent first: it must look like a package
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"handlers file {file} is not a Python file: name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # Half a module must not pass for a whole one at the next import.
        del sys.modules[name]
        raise
    return module


def _line_of(error: BaseException) -> str:
    """Return the place at which it was raised, if that adds something: `` (file.py, line 3)``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or isinstance(error, SyntaxError):
        return ""
    if trace.tb_frame.f_globals.get("__name__") == registry.__name__:
        return ""  # `on` names the handler's own place
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"


def _no_file(file: Path) -> str:
    try:
        others = [other.name for other in file.parent.glob("*.py")]
    except OSError:
        others = []
    guess = hint(file.name, others)
    return "no such file" + (f" ({guess})" if guess else "")
