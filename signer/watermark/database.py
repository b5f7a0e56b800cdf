"""The marks in SQLite: schema, opening, and the statements on one row. Blocks; knows no Trio.

WAL with `synchronous=FULL`: a commit returns when the mark is on the disk. Whoever checks and sets does so inside one
`BEGIN IMMEDIATE`, reading the row from the database and never from a cache, so that two processes on one file can't
both advance from the same mark.

A new database appears under its name whole, or not at all. So an empty file, and a WAL without its database, are what
is left of marks that are gone, and never the beginning of new ones.
"""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from signer.files import give_to_owner_of, sync_directory
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKeyHash
from signer.watermark.interface import Mark, MarkKey, Slot, WatermarkStoreError

FILE_NAME = "watermarks.db"
BUSY_TIMEOUT = 5.0  # seconds to wait for another process that writes
_APPLICATION_ID = 0x545A574D  # "TZWM": tells our file from any other SQLite database
_SCHEMA_VERSION = 2
_QUICK_CHECK_LIMIT = 16 * 1024 * 1024  # bytes; a larger file isn't checked at start, which would take seconds
_AUTO_CHECKPOINT = 1000  # pages of the WAL, SQLite's default: 4 MiB

_SCHEMA = """
CREATE TABLE mark (
    chain_id TEXT NOT NULL,
    public_key_hash TEXT NOT NULL,
    slot TEXT NOT NULL,
    level INTEGER NOT NULL CHECK (level BETWEEN 0 AND 2147483647),
    round INTEGER NOT NULL CHECK (round BETWEEN 0 AND 2147483647),
    digest BLOB,
    signature TEXT,
    PRIMARY KEY (chain_id, public_key_hash, slot)
) WITHOUT ROWID;
CREATE TABLE taken_over (source TEXT PRIMARY KEY, marks INTEGER NOT NULL, fingerprint TEXT NOT NULL) WITHOUT ROWID;
"""
_UPGRADES = {1: "ALTER TABLE taken_over ADD COLUMN fingerprint TEXT NOT NULL DEFAULT ''"}  # from that version
_RESTORE = (
    "restore a copy that holds the last signed levels, or start a new one in an empty base_dir and raise each mark "
    "above the chain's current level with: signer watermark set"
)
_SELECT = "SELECT level, round, digest, signature FROM mark WHERE chain_id = ? AND public_key_hash = ? AND slot = ?"
_REPLACE = "INSERT OR REPLACE INTO mark VALUES (?, ?, ?, ?, ?, ?, ?)"
_REMEMBER = "UPDATE mark SET signature = ? WHERE chain_id = ? AND public_key_hash = ? AND slot = ? AND digest = ?"


class Database:
    """An open store at *path*; used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection, self.is_new = _open(path)
        self._synced = True  # what the connection is set to
        self._suspect = False  # whether the disk has failed, and nothing was brought to it since
        try:
            self._files = _identities(path)
        except OSError as exc:
            self._connection.close()
            raise store_error(path, exc) from exc

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self, *, synced: bool = True) -> Iterator[None]:
        """A write transaction: committed and durable at the end, rolled back on any error.

        Without *synced* it survives the end of the process but not a power failure: for signatures, not for marks.
        Raises `WatermarkStoreError` with what to do for everything that SQLite can meet.
        """
        try:
            self._set_synced(synced)
            self._connection.execute("BEGIN IMMEDIATE")  # may wait for another process, while files come and go
            try:
                self._check_in_place()
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as exc:
            self._suspect |= (getattr(exc, "sqlite_errorname", None) or "").startswith("SQLITE_IOERR")
            raise store_error(self.path, exc) from exc

    def _set_synced(self, synced: bool) -> None:
        """Set the connection for one transaction, before it begins: one that can't be set is not begun.

        NORMAL, never OFF, where the commit needn't be synced: with OFF a checkpoint that falls into it would start the
        WAL over while the marks that stood there, synced and signed, are not on the disk in the database yet.
        """
        if synced != self._synced or self._suspect:
            self._connection.execute(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}")
            self._synced = synced
        if self._suspect:
            self._bring_to_disk()

    def _bring_to_disk(self) -> None:
        """After an I/O error: write what the WAL holds to the database, sync it, and start the WAL over.

        The kernel reports pages that it could not write once, and then takes them for written. They might be frames
        that precede the next commit in the WAL, and without them that commit would be lost as well.
        """
        (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise sqlite3.OperationalError("the disk has failed, and another process keeps the WAL in use")
        self._suspect = False

    def get(self, key: MarkKey) -> Mark | None:
        row = self._connection.execute(_SELECT, _identity(key)).fetchone()
        return None if row is None else Mark(*row)

    def put(self, key: MarkKey, mark: Mark) -> None:
        self._connection.execute(_REPLACE, (*_identity(key), mark.level, mark.round, mark.digest, mark.signature))

    def remember(self, key: MarkKey, digest: bytes, signature: str) -> None:
        self._connection.execute(_REMEMBER, (signature, *_identity(key), digest))

    def delete(self, key: MarkKey) -> None:
        self._connection.execute(
            "DELETE FROM mark WHERE chain_id = ? AND public_key_hash = ? AND slot = ?", _identity(key)
        )

    def all(self) -> list[tuple[MarkKey, Mark]]:
        """Every mark, ordered by chain, key and slot."""
        try:
            rows = self._connection.execute(
                "SELECT chain_id, public_key_hash, slot, level, round, digest, signature FROM mark ORDER BY 1, 2, 3"
            ).fetchall()
            return [
                (MarkKey(chain, PublicKeyHash.from_base58(pkh), Slot(slot)), Mark(*mark))
                for chain, pkh, slot, *mark in rows
            ]
        except sqlite3.Error as exc:
            raise store_error(self.path, exc) from exc
        except (TezosError, ValueError) as exc:
            raise _damaged(self.path, str(exc)) from exc

    def taken_over(self) -> dict[str, str]:
        """The sources that were taken over already: path to fingerprint of what they held then."""
        return dict(self._connection.execute("SELECT source, fingerprint FROM taken_over").fetchall())

    def note_taken_over(self, source: str, marks: int, fingerprint: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO taken_over VALUES (?, ?, ?)", (source, marks, fingerprint))

    def _check_in_place(self) -> None:
        """Files that were moved away or replaced are written to no more: their marks would not count."""
        for name, identity, size in self._files:
            try:
                found = os.stat(name)  # noqa: PTH116  # on the way of every signature
            except OSError as exc:
                raise WatermarkStoreError(self._gone(name, exc)) from exc
            if (found.st_dev, found.st_ino) != identity:
                raise WatermarkStoreError(
                    f"the watermark database's file {name} was replaced by another file. Nothing is signed; restart "
                    "the signer if the new file is meant to count"
                )
            if found.st_size < size:
                raise _damaged(self.path, "it was cut short while in use")

    def _gone(self, name: str, exc: OSError) -> str:
        text = f"the watermark database's file {name} is gone: {exc.strerror}. Nothing is signed; "
        if name == str(self.path):
            return f"{text}{_RESTORE}: a restart without it forgets every mark"
        return f"{text}stop the signer without killing it (it then saves what it holds), and start it again"


def _identities(path: Path) -> list[tuple[str, tuple[int, int], int]]:
    """Name, device and inode, and least size of each file that an open database consists of.

    Without its `-wal` the commits, without its `-shm` the locks are where no other process finds them.
    """
    real = os.path.realpath(path)  # SQLite puts the others beside what a symbolic link points to
    files = []
    for name in (str(path), f"{real}-wal", f"{real}-shm"):
        found = os.stat(name)  # noqa: PTH116
        files.append((name, (found.st_dev, found.st_ino), found.st_size if name == str(path) else 0))
    return files


def _identity(key: MarkKey) -> tuple[str, str, str]:
    return key.chain_id, str(key.public_key_hash), key.slot.value


def _open(path: Path) -> tuple[sqlite3.Connection, bool]:
    """The connection, and whether the database was made for it."""
    try:
        is_new = not exists(path)
        if is_new:
            _create(path)
        if path.stat().st_size == 0:
            raise _damaged(path, "it is empty")
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as exc:
        raise store_error(path, exc) from exc
    try:
        _prepare(connection, path)
    except sqlite3.Error as exc:
        connection.close()
        raise store_error(path, exc) from exc
    except BaseException:
        connection.close()
        raise
    return connection, is_new


def exists(path: Path) -> bool:
    """Whether there is a database at *path*; raises `WatermarkStoreError` where only its WAL is left.

    SQLite would delete that WAL with the marks in it, for belonging to no database.
    """
    if path.exists():
        return True
    wal = path.with_name(f"{path.name}-wal")
    if wal.exists() and wal.stat().st_size:
        raise _damaged(path, f"it is gone, but {wal} is there, which may hold its last marks")
    return False


def _create(path: Path) -> None:
    """A database without marks, mode 0600, whose content and directory entry are on the disk."""
    descriptor, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    temporary = Path(name)
    try:
        try:
            give_to_owner_of(path.parent, descriptor)
        finally:
            os.close(descriptor)
        with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            _write_schema(connection)
        with suppress(FileExistsError):  # another process was first, and its file counts
            path.hardlink_to(temporary)
    finally:
        for suffix in ("", "-wal", "-shm"):  # SQLite leaves its own where the disk is full
            Path(f"{name}{suffix}").unlink(missing_ok=True)
    sync_directory(path.parent)


def _write_schema(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA.strip().split(";\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Settings, schema and checks."""
    (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise WatermarkStoreError(f"{path}: this file system can't keep a WAL; set a base_dir on a local disk")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint={_AUTO_CHECKPOINT}")
    connection.execute("BEGIN IMMEDIATE")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application == _APPLICATION_ID and version in _UPGRADES:
        connection.execute(_UPGRADES[version])
        version = _SCHEMA_VERSION
        connection.execute(f"PRAGMA user_version={version}")
    connection.execute("COMMIT")
    if application != _APPLICATION_ID:
        raise WatermarkStoreError(f"{path} is a database of another program; move it away or set another base_dir")
    if version != _SCHEMA_VERSION:
        raise WatermarkStoreError(
            f"{path} has schema version {version}, this program knows {_SCHEMA_VERSION}: run the newer signer"
        )
    if path.stat().st_size <= _QUICK_CHECK_LIMIT:
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _damaged(path, verdict)


def store_error(path: Path, exc: Exception) -> WatermarkStoreError:
    """What SQLite or the system said, with what to do about it."""
    if isinstance(exc, WatermarkStoreError):
        return exc
    name = getattr(exc, "sqlite_errorname", "") or ""
    text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")) or "No space left" in text:
        advice = "the disk is full: make room, the signer then goes on by itself"
    elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        advice = f"another process has kept it locked for {BUSY_TIMEOUT:g} s: find it with: fuser {path}"
    elif name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _damaged(path, text)
    elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")) or isinstance(exc, OSError):
        advice = f"make {path.parent} and the file writable for the signer's user"
    else:
        advice = "look at the disk and the system's log"
    return WatermarkStoreError(f"watermark database {path}: {text}; nothing is signed; {advice}")


def _damaged(path: Path, reason: str) -> WatermarkStoreError:
    return WatermarkStoreError(
        f"watermark database {path} is damaged: {reason}. Nothing is signed. Keep it; {_RESTORE}"
    )
