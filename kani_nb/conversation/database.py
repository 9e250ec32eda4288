"""Opening the conversations' SQLite file: where it is, its permissions, its journal mode, its version, its errors.

Knows the schema and nothing of conversations. No file is ever deleted or overwritten here: what cannot be read is
refused with its path and the way to move it aside.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kani_nb.errors import StoreError

#: Marks the file as ours ("kani" in ASCII), so that another program's database is never written to.
APPLICATION_ID = 0x6B616E69

#: How long a statement waits for another process to finish its transaction.
BUSY_TIMEOUT_S = 5.0

#: Applied in order, once each; `PRAGMA user_version` is how many were. Never change one that was released: add one.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY,
        notebook TEXT NOT NULL,
        name TEXT NOT NULL,
        system TEXT,
        head TEXT,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL
    );
    CREATE INDEX conversations_by_notebook ON conversations (notebook, updated_at);
    CREATE TABLE turns (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        conversation_id TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        created_at REAL NOT NULL,
        interrupted INTEGER NOT NULL,
        record TEXT NOT NULL
    );
    CREATE INDEX turns_by_conversation ON turns (conversation_id, seq);
    CREATE TABLE journal (
        turn_id TEXT PRIMARY KEY,
        conversation_id TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        record TEXT NOT NULL,
        written_at REAL NOT NULL,
        host TEXT NOT NULL,
        pid INTEGER NOT NULL,
        process_started_at REAL NOT NULL
    );
    """,
)

#: File systems shared by several machines: WAL needs memory that all its users share.
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "afs", "9p", "lustre", "gpfs", "beegfs", "ceph", "gluster", "fuse.sshfs")


def default_store_path() -> Path:
    """`conversations.db` in `KANI_NB_HOME`, or in the folder where this platform keeps a user's data."""
    home = os.environ.get("KANI_NB_HOME")
    if home:
        return Path(home).expanduser() / "conversations.db"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "kani_nb" / "conversations.db"


def connect(path: Path) -> sqlite3.Connection:
    """A connection to the database at `path`, of the current version; made when there is none.

    The folder is made with mode 0700 and the file with 0600. Usable from any thread, by one at a time; in autocommit
    mode, so that every transaction is begun by hand.

    Raises:
        StoreError: the file cannot be made, read or written, is corrupt, another program's, or of a newer version.
    """
    with translated_errors(path):
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            _check_version(connection, path)
            _set_journal_mode(connection, path)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """One write transaction: all of it, or nothing when the block raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system raise into `StoreError`s that name `path` and the way out."""
    try:
        yield
    except sqlite3.Error as error:
        raise _store_error(path, str(error)) from error
    except OSError as error:
        raise StoreError(
            f"the conversations' store {path} cannot be opened",
            why=str(error.strerror or error),
            fix="set KANI_NB_HOME to a folder that you can write to",
        ) from error


def _store_error(path: Path, reason: str) -> StoreError:
    lowered = reason.lower()
    if "not a database" in lowered or "malformed" in lowered or "corrupt" in lowered:
        return StoreError(
            f"the conversations' store {path} is corrupt",
            why=reason,
            fix=f"move it aside and start a new one: mv {path} {path}.corrupt",
        )
    if "locked" in lowered or "busy" in lowered:
        why, fix = f"another program has held it for {BUSY_TIMEOUT_S:.0f} s", "close that program, and try again"
    elif "full" in lowered:
        why, fix = "the disk is full", "free some space, or set KANI_NB_HOME to a folder on another disk"
    elif "readonly" in lowered or "read-only" in lowered:
        why, fix = "it is read-only", "make it writable, or set KANI_NB_HOME to a folder that you can write to"
    else:
        why, fix = reason, "set KANI_NB_HOME to a folder that you can write to"
    return StoreError(f"the conversations' store {path} cannot be read or written", why=why, fix=fix)


def _check_version(connection: sqlite3.Connection, path: Path) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise StoreError(
            f"{path} is not a store of conversations",
            why="it is another program's database",
            fix="set KANI_NB_HOME to another folder",
        )
    if version > len(MIGRATIONS):
        raise StoreError(
            f"the conversations' store {path} has version {version}",
            why=f"this kani_nb knows versions up to {len(MIGRATIONS)}",
            fix="pip install --upgrade kani-nb, or set KANI_NB_HOME to another folder",
        )
    return int(version)


def _set_journal_mode(connection: sqlite3.Connection, path: Path) -> None:
    """WAL where it works, else a rollback journal."""
    mode = "DELETE" if _is_on_network(path) else "WAL"
    (present,) = connection.execute("PRAGMA journal_mode").fetchone()
    if present.upper() == mode:
        return
    try:
        connection.execute(f"PRAGMA journal_mode = {mode}")
    except sqlite3.OperationalError as error:
        # No shared memory here, or another process is changing the mode right now: either mode is correct.
        if "disk" in str(error) or "readonly" in str(error):
            raise


def _is_on_network(path: Path) -> bool:
    """Whether `path` lies on a file system that several machines may share."""
    import psutil

    where = path.resolve()
    mounts = [
        (len(mount.mountpoint), mount.fstype.lower())
        for mount in psutil.disk_partitions(all=True)
        if where.is_relative_to(mount.mountpoint)
    ]
    return bool(mounts) and max(mounts)[1].startswith(_NETWORK_FILE_SYSTEMS)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Apply the migrations that this file has not had yet, each in a transaction of its own."""
    while _check_version(connection, path) < len(MIGRATIONS):
        with transaction(connection):
            version = _check_version(connection, path)  # another process may have been faster
            if version < len(MIGRATIONS):
                for statement in filter(str.strip, MIGRATIONS[version].split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {version + 1}")
