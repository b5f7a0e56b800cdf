"""Taking over the marks of another signer that are found in the directory of the database."""

from pathlib import Path

import structlog

from signer.watermark.database import Database
from signer.watermark.rules import higher
from signer.watermark.sources import Source, find, merge

logger = structlog.get_logger(__name__)


def take_over(database: Database, directory: Path) -> None:
    """Read every source in *directory* that holds other marks than when it was last taken over; the higher mark wins.

    So whoever goes back to the other signer for a while, and returns, loses nothing that was signed meanwhile.

    The sources stay as they are. Raises `WatermarkStoreError` for a damaged one: to start without its marks would
    be to forget what was signed.
    """
    pending = not_taken_over(database, directory)
    if pending:
        put_together(database, pending)
        for source in pending:
            logger.info("watermarks were taken over", source=str(source.path), marks=len(source.entries))
    if database.is_new and not database.all():
        logger.warning(
            "a new watermark database was made, without a mark: any level is signed. If a key has signed before, stop, "
            "and restore or import its marks, or raise them with: signer watermark set",
            database=str(database.path),
        )


def not_taken_over(database: Database, directory: Path) -> list[Source]:
    """The sources in *directory* that hold what the database has not seen."""
    known = database.taken_over()
    return [source for source in find(directory) if known.get(str(source.path)) != source.fingerprint]


def put_together(database: Database, sources: list[Source]) -> int:
    """Raise the marks to those of *sources* in one transaction; returns how many moved."""
    moved = 0
    with database.transaction():
        for key, mark in merge(sources).items():
            standing = database.get(key)
            best = higher(standing, mark)
            if best != standing:
                database.put(key, best)
                moved += 1
        for source in sources:
            database.note_taken_over(str(source.path), len(source.entries), source.fingerprint)
    return moved
