"""Store measured times and scratch sizes on disk in one SQLite file.

SQLite lets several processes read and write at once. Its transactions are atomic: a
process that is killed leaves no half of one. The journal is the rollback journal, not
the write-ahead log, which does not work on network file systems, where home directories
often are.

The file is a convenience. If it is damaged, or not what this module writes, it is
deleted and started again. If it cannot be read or written, planning goes on without it.
Both give a :class:`ProfileCacheWarning`.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

_FILE = "profile-1.sqlite3"  # with the number of the format
_LOCK = "rebuild.lock"
_SCHEMA = (
    "CREATE TABLE measured (environment TEXT NOT NULL, call TEXT NOT NULL, kind TEXT NOT NULL,"
    " value INTEGER NOT NULL, PRIMARY KEY (environment, call, kind)) WITHOUT ROWID"
)
_IMPOSSIBLE = (
    "SELECT 1 FROM measured WHERE typeof(value) != 'integer' OR value NOT BETWEEN 0 AND 1e16"
    " OR typeof(call) != 'text' OR typeof(kind) != 'text' LIMIT 1"
)
_ROLLBACK = b"\x01\x01"  # how the file is written and read, https://sqlite.org/fileformat.html
_WAIT_S = 10.0

Kind = Literal["time_ns", "scratch_bytes"]


class ProfileCacheWarning(UserWarning):
    """Measured times cannot be stored, or were discarded."""


def default_cache_dir() -> Path | None:
    """``$XDG_CACHE_HOME/remat-planner`` or ``~/.cache/remat-planner``; ``None`` without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # by the specification, a relative one is ignored
        return Path(given) / "remat-planner"
    try:
        return Path.home() / ".cache" / "remat-planner"
    except RuntimeError:
        return None


class ProfileCache:
    """The measurements of one environment: in memory, and on disk after :meth:`save`.

    Parameters
    ----------
    directory
        The directory of the file; ``None`` keeps all in memory and warns.
    environment
        What times depend on besides the call, see
        :func:`~.environment.environment_of`.
    """

    def __init__(self, directory: Path | None, environment: str) -> None:
        self._path = None if directory is None else directory / _FILE
        self._environment = environment
        self._known: dict[tuple[str, str], int] = {}
        self._unsaved: dict[tuple[str, str], int] = {}
        if self._path is None:
            _warn_unusable("the cache of measured times", "there is no home directory")
        else:
            self._load(self._path)

    def get(self, kind: Kind, call: str) -> int | None:
        """Return the measurement of a call, if there is one."""
        return self._known.get((_digest(call), kind))

    def put(self, kind: Kind, call: str, value: int) -> None:
        """Store a measurement; the next :meth:`save` writes it to the file."""
        key = _digest(call), kind
        self._known[key] = self._unsaved[key] = value

    def save(self) -> None:
        """Write new entries to the file; entries of other processes stay."""
        if self._path is None or not self._unsaved:
            return
        rows = [(self._environment, call, kind, n) for (call, kind), n in self._unsaved.items()]
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                _write(self._path, rows)
            except _Damaged as damage:
                _rebuild(self._path, damage)
                _write(self._path, rows)
        except (OSError, sqlite3.Error, _Damaged) as error:
            _warn_unusable(str(self._path), str(error))
        self._unsaved.clear()

    def _load(self, path: Path) -> None:
        try:
            if not path.exists():
                return
            try:
                self._known = _read(path, self._environment)
            except _Damaged as damage:
                _rebuild(path, damage)
        except (OSError, sqlite3.Error) as error:
            _warn_unusable(str(path), str(error))


class _Damaged(Exception):
    """The file is not what this module writes."""


def _read(path: Path, environment: str) -> dict[tuple[str, str], int]:
    query = "SELECT call, kind, value FROM measured WHERE environment = ?"
    with _opened(path, "rw") as connection:  # for a protected file SQLite makes that read-only
        if not _tables(connection):  # another process has just created it
            return {}
        rows = connection.execute(query, (environment,)).fetchall()
    return {(call, kind): value for call, kind, value in rows}


def _write(path: Path, rows: list[tuple[str, str, str, int]]) -> None:
    """Add rows; those that another process wrote first stay, so that all use the same times."""
    with _opened(path, "rwc") as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        if not _tables(connection):
            connection.execute(_SCHEMA)
        connection.executemany("INSERT OR IGNORE INTO measured VALUES (?, ?, ?, ?)", rows)


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """A connection to a file that was checked first.

    Raises
    ------
    _Damaged
        When the file is not a database, is damaged, or is not one of ours.
    sqlite3.OperationalError
        When it cannot be opened or stays locked.
    """
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=_WAIT_S)) as connection:
        connection.isolation_level = None  # transactions are begun by hand
        connection.text_factory = lambda text: text.decode(errors="replace")
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            tables = _tables(connection)
            if tables and _header(path)[18:20] != _ROLLBACK:
                raise _Damaged("its header is not ours")
            if tables and tables != [("table", "measured", _SCHEMA)]:
                raise _Damaged("its tables are not ours")
            if connection.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]:
                raise _Damaged("its pages are damaged")
            if tables and connection.execute(_IMPOSSIBLE).fetchone() is not None:
                raise _Damaged("it has values that nobody measured")
            yield connection
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # "unsupported file format"
                raise _Damaged(str(error)) from error
            raise
        except sqlite3.DatabaseError as error:
            raise _Damaged(str(error)) from error
        except UnicodeDecodeError as error:  # in SQLite's own message, which quotes the file
            raise _Damaged("its text is not UTF-8") from error


def _header(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(100)


def _tables(connection: sqlite3.Connection) -> list[tuple[str, str, str]]:
    query = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    return connection.execute(query).fetchall()


def _rebuild(path: Path, damage: _Damaged) -> None:
    """Remove a damaged file, unless another process has done so meanwhile."""
    with _sole_rebuilder(path.parent):
        try:
            with _opened(path, "rw"):
                return
        except _Damaged:
            pass
        warnings.warn(
            f"{path} is damaged ({damage}); it is started again, and calls are timed again",
            ProfileCacheWarning,
            stacklevel=2,
        )
        journal = path.with_name(f"{path.name}-journal")
        for part in (journal, path):
            part.unlink(missing_ok=True)


@contextmanager
def _sole_rebuilder(directory: Path) -> Iterator[None]:
    """A lock between processes; it is SQLite's, which ends with the process that holds it."""
    with closing(sqlite3.connect(directory / _LOCK, timeout=_WAIT_S)) as lock:
        lock.isolation_level = None
        lock.execute("BEGIN EXCLUSIVE")
        yield
        lock.execute("ROLLBACK")


def _digest(call: str) -> str:
    """A digest of fixed length, however many tensors a call takes."""
    return hashlib.sha256(call.encode()).hexdigest()


def _warn_unusable(what: str, why: str) -> None:
    warnings.warn(
        f"{what} cannot be used ({why}): measured times are forgotten when this process ends; "
        "name another directory with cost_model=Profile(cache_dir=...)",
        ProfileCacheWarning,
        stacklevel=2,
    )
