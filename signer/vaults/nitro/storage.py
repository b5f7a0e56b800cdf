"""The blobs on the host, section 4.6 of the signer specification: what a storage is, and the file of the reference.

`enclave_keys.json` is in the reference's format.

Every write is complete or absent (temporary file, fsync, rename, fsync of the directory) and happens under a lock
file, read anew, so that two processes lose nothing to each other. A file that another process changed is noticed by
its inode, size and time. `FileStorage` blocks on the disk; `KeyFile` calls it in worker threads.
"""

import base64
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from signer.errors import ConfigurationError, SignerError, UnavailableError
from signer.files import give_to_owner_of, write_durably
from signer.tezos.keys import PublicKeyHash

_LOCK_TIMEOUT = 10.0  # seconds to wait for another process that writes
_LOCK_RETRY = 0.02  # seconds between two tries
_HASH, _BLOB = "public_key_hash", "encrypted_private_key"

FileStamp = tuple[int, int, int] | None
"""Inode, size and modification time in ns; None for a file that isn't there."""


class StorageError(ConfigurationError):
    """The blobs cannot be read or written, or are damaged; the text names their place and says what to do."""


class StorageAwayError(StorageError, UnavailableError):
    """The storage is out of reach, or refuses; that may pass without a change here. A new key may have been stored."""

    status = 502


class KeyExistsError(SignerError):
    """The key is stored already; nothing was changed."""

    status = 400


@dataclass(frozen=True, slots=True)
class StoredKey:
    """One entry: the address as written in the file, and the blob as the enclave returned it."""

    public_key_hash: str
    blob: bytes


class KeyStorage(Protocol):
    """Where the blobs are. Every function raises `StorageError` where it cannot do its work."""

    name: str  # for a person

    async def stamp(self, *, fresh: bool = False) -> object:
        """What changes when the content does, cheaper than reading it all; None where there is no content at all.

        Without *fresh* it may be that of some seconds ago.
        """

    def gone(self) -> StorageError:
        """What to say where there is no content at all, though keys are in use."""

    async def load(self) -> list[StoredKey]:
        """All entries, in the order in which they are listed."""

    async def open(self) -> None:
        """Make what is missing, and find out whether the storage can be used; called first.

        Raises `StorageAwayError` where it is worth to be called again.
        """

    async def append(self, key: PublicKeyHash, blob: bytes) -> None:
        """Add an entry durably; never changes one. Raises `KeyExistsError` for a key that is there."""

    async def replace(self, old: StoredKey, blob: bytes) -> None:
        """Put *blob* in the place of that of *old*, in one step; raises `StorageError` where another one is there."""


class KeyFile:
    """Implements `KeyStorage` on the key file at *path*."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = FileStorage(path)

    async def stamp(self, *, fresh: bool = False) -> object:  # a look at a file is cheap
        return await trio.to_thread.run_sync(self._file.stamp)

    def gone(self) -> StorageError:
        return StorageError(
            f"(Nitro/file storage): {self.name} is gone; the keys known stay in use. Restore it, or leave [] in it "
            "if no key is wanted any more"
        )

    async def load(self) -> list[StoredKey]:
        return await trio.to_thread.run_sync(self._file.load)

    async def open(self) -> None:
        await trio.to_thread.run_sync(self._file.check_writable)

    async def append(self, key: PublicKeyHash, blob: bytes) -> None:
        await trio.to_thread.run_sync(self._file.append, key, blob)

    async def replace(self, old: StoredKey, blob: bytes) -> None:
        await trio.to_thread.run_sync(self._file.replace, old, blob)


class FileStorage:
    """The key file at *path*, for callers that may block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stamp(self) -> FileStamp:
        """What changes when the file does; cheap."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._error("cannot read", exc) from exc
        return status.st_ino, status.st_size, status.st_mtime_ns

    def load(self) -> list[StoredKey]:
        """All entries in the order of the file; an absent or empty file holds none. Raises `StorageError`."""
        return [self._entry(index, entry) for index, entry in enumerate(self._read())]

    def check_writable(self) -> None:
        """Make the directory if it is absent, and prove that the file could be written; raises `StorageError`."""
        try:
            self.path.parent.mkdir(mode=0o770, parents=True, exist_ok=True)
            writable = os.access(self.path if self.path.exists() else self.path.parent, os.W_OK)
        except OSError as exc:
            raise self._error("cannot write", exc) from exc
        if not writable:
            raise StorageError(f"(Nitro/file storage): cannot write {self.path}: permission denied. Fix its owner")

    def append(self, key: PublicKeyHash, blob: bytes) -> None:
        """Add an entry durably. Raises `KeyExistsError` for a key that is there, `StorageError`."""
        with self._locked():
            entries = self._read()
            if any(isinstance(entry, dict) and entry.get(_HASH) == str(key) for entry in entries):
                raise KeyExistsError(f"(Nitro): {key} is in {self.path} already")
            entries.append({_HASH: str(key), _BLOB: base64.b64encode(blob).decode()})
            self._write(json.dumps(entries, indent=4))

    def replace(self, old: StoredKey, blob: bytes) -> None:
        """Exchange the blob of an entry durably; raises `StorageError`."""
        with self._locked():
            entries = self._read()
            for index, entry in enumerate(entries):
                if isinstance(entry, dict) and self._entry(index, entry) == old:
                    entry[_BLOB] = base64.b64encode(blob).decode()
                    self._write(json.dumps(entries, indent=4))
                    return
            raise StorageError(
                f"(Nitro/file storage): {self.path} has changed meanwhile; nothing was changed. Try again"
            )

    def _read(self) -> list[object]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as exc:
            raise self._error("cannot read", exc) from exc
        if not text.strip():
            return []
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise self._damaged(str(exc)) from exc
        if not isinstance(entries, list):
            raise self._damaged("it is not a JSON array")
        return entries

    def _entry(self, index: int, entry: object) -> StoredKey:
        """What the entry holds; a bad one has no blob: it is skipped and reported, and the others serve."""
        fields = entry if isinstance(entry, dict) else {}
        address, blob = fields.get(_HASH), fields.get(_BLOB)
        if not isinstance(address, str):
            address = f"entry {index + 1}"
        try:
            return StoredKey(address, base64.b64decode(blob, validate=True) if isinstance(blob, str) else b"")
        except ValueError:  # no Base64; where it isn't even ASCII, that is no `binascii.Error`
            return StoredKey(address, b"")

    def _write(self, text: str) -> None:
        try:
            write_durably(self.path, text)
        except OSError as exc:
            raise self._error("cannot write", exc) from exc

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock file, which is never removed: another process may be waiting for this very one."""
        path = self.path.with_name(self.path.name + ".lock")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise self._error("cannot lock", exc) from exc
        try:
            give_to_owner_of(path.parent, descriptor)
            deadline = time.monotonic() + _LOCK_TIMEOUT
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as exc:
                    if time.monotonic() > deadline:
                        raise StorageError(
                            f"(Nitro/file storage): {path} has been locked by another process for "
                            f"{_LOCK_TIMEOUT:g} s; see which one with: fuser {path}"
                        ) from exc
                    time.sleep(_LOCK_RETRY)
            yield
        finally:
            os.close(descriptor)

    def _error(self, what: str, exc: Exception) -> StorageError:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        return StorageError(f"(Nitro/file storage): {what} {self.path}: {reason}")

    def _damaged(self, reason: str) -> StorageError:
        return StorageError(
            f"(Nitro/file storage): {self.path} is damaged: {reason}. Nothing was changed; restore it from a copy, "
            "or mend it by hand: it is a JSON array of entries with public_key_hash and encrypted_private_key"
        )
