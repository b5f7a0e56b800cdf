"""cpio archives in the form `newc`, which the kernel unpacks as its ramdisk; the same tree gives the same bytes.

Section 6.6 of the specification: names sorted, time 0, owner 0:0, inodes counted, no device numbers. The archive is
not compressed: what zlib makes depends on its version, and the measurement would with it.
"""

from collections.abc import Iterator
from typing import BinaryIO

from signer.image.tree import Tree

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_BLOCK = 512  # bytes; ramdisks follow one another in memory, and the kernel wants each aligned


def write(file: BinaryIO, tree: Tree) -> None:
    """Write *tree* to *file*, from its position on; raises `OSError`."""
    size = 0
    for piece in _pieces(tree):
        size += len(piece)
        file.write(piece)
    file.write(bytes(-size % _BLOCK))


def _pieces(tree: Tree) -> Iterator[bytes]:
    number = 0
    for number, (path, entry) in enumerate(tree, 1):
        yield _header(path, inode=number, mode=entry.mode, size=len(entry.content))
        yield entry.content + bytes(-len(entry.content) % 4)
    yield _header(_TRAILER, inode=number + 1, mode=0, size=0)


def _header(path: str, *, inode: int, mode: int, size: int) -> bytes:
    """The 13 fields: inode, mode, uid, gid, links, time, size, 4 device numbers, length of the name, checksum."""
    name = path.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name), 0)
    header = _MAGIC + b"".join(b"%08x" % field for field in fields) + name
    return header + bytes(-len(header) % 4)
