"""What operators do to marks: list, set, reset, import, export. Works beside a running signer.

Every function opens the database in *base_dir* for itself; SQLite's locks keep it and the signer apart. Nothing lowers
a mark but `reset_mark`.
"""

from pathlib import Path

from signer.errors import SignerError
from signer.files import write_durably
from signer.tezos.keys import PublicKeyHash
from signer.watermark.database import FILE_NAME, Database, exists
from signer.watermark.interface import MAX_LEVEL, Mark, MarkKey, Slot
from signer.watermark.migration import not_taken_over, put_together
from signer.watermark.sources import Entry, Source, find, merge, read, signatory_files


class MarkRefusedError(SignerError):
    """The change is not made; the text says what stands."""

    status = 409


def list_marks(base_dir: Path) -> list[Entry]:
    """Every mark that counts, ordered by chain, key and slot: also those of another signer's files in *base_dir*.

    Changes nothing: where there is no database yet, none is made.
    """
    path = base_dir / FILE_NAME
    if not exists(path):
        return ordered(merge(find(base_dir)))
    database = Database(path)
    try:
        own = Source(path, tuple(database.all()))
        return ordered(merge([own, *not_taken_over(database, base_dir)]))
    finally:
        database.close()


def ordered(marks: dict[MarkKey, Mark]) -> list[Entry]:
    return sorted(marks.items(), key=lambda entry: (entry[0].chain_id, str(entry[0].public_key_hash), entry[0].slot))


def _open(base_dir: Path) -> Database:
    """The database, with the marks that the next `serve` would take over: what is changed here is what counts."""
    database = Database(base_dir / FILE_NAME)
    try:
        put_together(database, not_taken_over(database, base_dir))
    except BaseException:
        database.close()
        raise
    return database


def set_mark(base_dir: Path, key: MarkKey, level: int, round: int) -> Mark | None:
    """Raise a mark; returns the one that stood. Raises `MarkRefusedError` for one that is not higher."""
    check_settable(level, round)
    database = _open(base_dir)
    try:
        with database.transaction():
            standing = database.get(key)
            if standing is not None and (level, round) <= (standing.level, standing.round):
                raise not_raised(key, standing)
            database.put(key, Mark(level, round))
        return standing
    finally:
        database.close()


def check_settable(level: int, round: int) -> None:
    """Raise `MarkRefusedError` for a level or round that no request can have."""
    for name, value in (("level", level), ("round", round)):
        if not 0 <= value <= MAX_LEVEL:
            raise MarkRefusedError(f"{name} {value} is outside 0 to {MAX_LEVEL}")


def not_raised(key: MarkKey, standing: Mark) -> MarkRefusedError:
    """The error where *standing* is at least as high as what was asked for."""
    return MarkRefusedError(
        f"set only raises: the {key.slot} mark of {key.public_key_hash} on {key.chain_id} stands at level "
        f"{standing.level}, round {standing.round}; to lower it use: signer watermark reset"
    )


def reset_mark(
    base_dir: Path, pkh: PublicKeyHash, chain_id: str, slot: Slot | None, *, confirm_key: str, confirm_chain: str
) -> list[Entry]:
    """Forget the marks of a key on a chain (of one *slot*, or of all); returns what was forgotten.

    The key and the chain must be written again as confirmation: afterwards, anything can be signed once more.
    """
    check_confirmed(pkh, chain_id, confirm_key, confirm_chain)
    database = _open(base_dir)
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


def check_confirmed(pkh: PublicKeyHash, chain_id: str, confirm_key: str, confirm_chain: str) -> None:
    """Raise `MarkRefusedError` unless the operator wrote key and chain of a reset once more."""
    if confirm_key != str(pkh) or confirm_chain != chain_id:
        raise MarkRefusedError(
            f"nothing was reset: after a reset {pkh} can sign levels of {chain_id} again that it has signed before, "
            f"and be slashed. If that is what you want, add: --confirm-key {pkh} --confirm-chain {chain_id}"
        )


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
    """Write all marks to *target* as Signatory's `watermark_v2` directory; returns the files written."""
    return write_signatory(list_marks(base_dir), target, str(base_dir))


def write_signatory(marks: list[Entry], target: Path, place: str) -> list[Path]:
    """Write *marks*, which are all that *place* holds, to *target*; returns the files written.

    Refuses to overwrite a file: an older export must not be mistaken for the newer one.
    """
    if not marks:
        raise MarkRefusedError(f"there are no marks in {place}; nothing was written")
    written: list[Path] = []
    try:
        target.mkdir(mode=0o750, parents=True, exist_ok=True)
        for name, content in signatory_files(marks).items():
            path = target / name
            if path.exists():
                raise MarkRefusedError(f"{path} exists already; export to an empty directory")
            write_durably(path, content)
            written.append(path)
    except OSError as exc:
        raise MarkRefusedError(f"cannot export to {target}: {exc.strerror}") from exc
    return written
