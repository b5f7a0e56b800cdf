"""What the builder wants of ELF files: their loader, and the part of them that is loaded. 64 bits, little-endian."""

import struct
from collections.abc import Iterator

from signer.image.tree import BuildError

_IDENT = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")  # type, flags, offset, two addresses, size in the file, in memory, alignment
_PT_INTERP = 3


def is_elf(data: bytes) -> bool:
    """Whether this is a program or a shared library, for some machine."""
    return data.startswith(b"\x7fELF")


def interpreter(data: bytes) -> str | None:
    """The path of the loader that a program wants; None for a library."""
    for kind, offset, size in _segments(data):
        if kind == _PT_INTERP:
            return data[offset : offset + size].rstrip(b"\0").decode()
    return None


def loaded_part(data: bytes) -> bytes:
    """The file without what is never loaded: symbols for debuggers, and the table of sections.

    Done here rather than by `strip`, whose output depends on its version. Loaders go by the segments alone.
    """
    end = max([_HEADER.size, *(offset + size for _, offset, size in _segments(data))])
    fields = list(_HEADER.unpack_from(data))
    end = max(end, fields[5] + fields[9] * fields[10])  # the table of segments
    fields[6] = fields[12] = fields[13] = 0  # where the table of sections is, its length, that of the names
    return _HEADER.pack(*fields) + data[_HEADER.size : end]


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Type, offset and size in the file, of each segment."""
    if not data.startswith(_IDENT) or len(data) < _HEADER.size:
        raise BuildError("a program or library is for another kind of machine")
    fields = _HEADER.unpack_from(data)
    table, size, count = fields[5], fields[9], fields[10]
    if size != _SEGMENT.size or table + size * count > len(data):
        raise BuildError("a program or library is damaged: its table of segments is not in the file")
    for number in range(count):
        kind, _flags, offset, _, _, length, _, _ = _SEGMENT.unpack_from(data, table + number * size)
        if offset + length > len(data):
            raise BuildError("a program or library is cut: a segment is not in the file")
        yield kind, offset, length
