"""A file system in the making: path to entry. What the machine's files have of owner, time and mode doesn't get in."""

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from signer.errors import SignerError

_FILE, _PROGRAM, _FOLDER = stat.S_IFREG | 0o644, stat.S_IFREG | 0o755, stat.S_IFDIR | 0o755


class BuildError(SignerError):
    """An image can't be built of what was given; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a folder; owner 0:0, time 0."""

    mode: int  # type and permissions, as in struct stat
    content: bytes = b""


class Tree:
    """Entries by their path, which is relative to the root and has no `.` or `..`; parents appear by themselves."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def folder(self, path: str) -> None:
        """Have the folder *path*."""
        _check(path)
        while path:
            known = self._entries.setdefault(path, Entry(_FOLDER))
            if known.mode != _FOLDER:
                raise BuildError(f"{path} is a file and a folder")
            path = path.rpartition("/")[0]

    def file(self, path: str, content: bytes, *, program: bool = False) -> None:
        """Add a file; equal content at the same path is no conflict."""
        _check(path)
        entry = Entry(_PROGRAM if program else _FILE, content)
        if self._entries.setdefault(path, entry) != entry:
            raise BuildError(f"two different files want to be {path}")
        if "/" in path:
            self.folder(path.rpartition("/")[0])

    def graft(self, prefix: str, other: "Tree") -> None:
        """Add everything of *other* under *prefix*."""
        for path, entry in other:
            if stat.S_ISDIR(entry.mode):
                self.folder(f"{prefix}/{path}")
            else:
                self.file(f"{prefix}/{path}", entry.content, program=entry.mode == _PROGRAM)

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        """Entries in the order of their paths' bytes, so folders before what is in them."""
        return iter(sorted(self._entries.items(), key=lambda item: item[0].encode()))

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(entry.content) for entry in self._entries.values())

    def manifest(self) -> str:
        """A line for each entry: permissions, bytes, SHA-256, path. Two of them tell what differs in two images."""
        return "".join(
            f"{stat.filemode(entry.mode)} {len(entry.content):9} {hashlib.sha256(entry.content).hexdigest()} {path}\n"
            for path, entry in self
        )


def _check(path: str) -> None:
    if not path.isprintable() or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise BuildError(f"{path!r} cannot be a path in the image")
