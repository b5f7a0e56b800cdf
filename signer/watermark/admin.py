"""What operators do to marks: list, set, reset, import, export. Works beside a running signer.

Every function opens the database in *base_dir* for itself; SQLite's locks keep it and the signer apart. Nothing lowers
a mark but `reset_mark`.
"""

import os
import tempfile
from pathlib import Path

from signer.errors import SignerError
from signer.tezos.keys import PublicKeyHash
from signer.watermark.database import FILE_NAME, Database
from signer.watermark.interface import MAX_LEVEL, Mark, MarkKey, Slot
from signer.watermark.migration import put_together
from signer.watermark.sources import Entry, read, signatory_files


class MarkRefusedError(SignerError):
    """The change is not made; the text says what stands."""

    status = 409


def list_marks(base_dir: Path) -> list[Entry]:
    """Every mark, ordered by chain, key and slot."""
    database = Database(base_dir / FILE_NAME)
    try:
        return database.all()
    finally:
        database.close()


def set_mark(base_dir: Path, key: MarkKey, level: int, round: int) -> Mark | None:
    """Raise a mark; returns the one that stood. Raises `MarkRefusedError` for one that is not higher."""
    for name, value in (("level", level), ("round", round)):
        if not 0 <= value <= MAX_LEVEL:
            raise MarkRefusedError(f"{name} {value} is outside 0 to {MAX_LEVEL}")
    database = Database(base_dir / FILE_NAME)
    try:
        with database.transaction():
            standing = database.get(key)
            if standing is not None and (level, round) <= (standing.level, standing.round):
                raise MarkRefusedError(
                    f"set only raises: the {key.slot} mark of {key.public_key_hash} on {key.chain_id} stands at level "
                    f"{standing.level}, round {standing.round}; to lower it use: signer watermark reset"
                )
            database.put(key, Mark(level, round))
        return standing
    finally:
        database.close()


def reset_mark(
    base_dir: Path, pkh: PublicKeyHash, chain_id: str, slot: Slot | None, *, confirm_key: str, confirm_chain: str
) -> list[Entry]:
    """Forget the marks of a key on a chain (of one *slot*, or of all); returns what was forgotten.

    The key and the chain must be written again as confirmation: afterwards, anything can be signed once more.
    """
    if confirm_key != str(pkh) or confirm_chain != chain_id:
        raise MarkRefusedError(
            f"nothing was reset: after a reset {pkh} can sign levels of {chain_id} again that it has signed before, "
            f"and be slashed. If that is what you want, add: --confirm-key {pkh} --confirm-chain {chain_id}"
        )
    database = Database(base_dir / FILE_NAME)
    try:
        forgotten: list[Entry] = []
        with database.transaction():
            for one in Slot if slot is None else (slot,):
                key = MarkKey(chain_id, pkh, one)
                standing = database.get(key)
                if standing is not None:
                    database.delete(key)
                    forgotten.append((key, standing))
        return forgotten
    finally:
        database.close()


def import_marks(base_dir: Path, source: Path) -> tuple[int, int]:
    """Take over the marks of another signer at *source*; returns how many were read and how many raised ours."""
    sources = read(source)
    database = Database(base_dir / FILE_NAME)
    try:
        moved = put_together(database, sources)
    finally:
        database.close()
    return sum(len(one.entries) for one in sources), moved


def export_signatory(base_dir: Path, target: Path) -> list[Path]:
    """Write all marks to *target* as Signatory's `watermark_v2` directory; returns the files written.

    Refuses to overwrite a file: an older export must not be mistaken for the newer one.
    """
    written: list[Path] = []
    try:
        target.mkdir(mode=0o750, parents=True, exist_ok=True)
        for name, content in signatory_files(list_marks(base_dir)).items():
            path = target / name
            if path.exists():
                raise MarkRefusedError(f"{path} exists already; export to an empty directory")
            descriptor, temporary = tempfile.mkstemp(prefix="watermark", dir=target)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).rename(path)
            written.append(path)
        directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as exc:
        raise MarkRefusedError(f"cannot export to {target}: {exc.strerror}") from exc
    return written
