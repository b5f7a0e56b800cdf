"""Files that must be there after a power failure, and belong to the right user."""

import os
import tempfile
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Put *text* (UTF-8) at *path* with mode 0600: the whole of it, on the disk, or nothing. Raises `OSError`."""
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            give_to_owner_of(path.parent, file.fileno())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Bring the entries of a directory to the disk; raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_to_owner_of(directory: Path, descriptor: int) -> None:
    """Where root works for the signer (`sudo signer generate`), files stay the signer's: those of *directory*'s owner.

    Raises `OSError`.
    """
    if os.geteuid() == 0:
        owner = directory.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
