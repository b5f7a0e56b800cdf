"""Taking over the marks of another signer, once, when a new database is opened in its directory."""

from pathlib import Path

import structlog

from signer.watermark.database import Database
from signer.watermark.rules import higher
from signer.watermark.sources import Source, find, merge

logger = structlog.get_logger(__name__)


def take_over(database: Database, directory: Path) -> None:
    """Read every source in *directory* that was not taken over before; the higher mark wins everywhere.

    The sources stay as they are. Raises `WatermarkStoreError` for a damaged one: to start without its marks would
    be to forget what was signed.
    """
    known = database.taken_over()
    pending = [source for source in find(directory) if str(source.path) not in known]
    if pending:
        put_together(database, pending)
        for source in pending:
            logger.info(
                "watermarks were taken over, the source is obsolete", source=str(source.path), marks=len(source.entries)
            )


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
            database.note_taken_over(str(source.path), len(source.entries))
    return moved
