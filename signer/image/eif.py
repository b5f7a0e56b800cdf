"""EIF, the file format of enclave images: what a file holds, and how one is written; section 6.1 of the specification.

A file may be anybody's, so its bytes are not believed. The tools of AWS read it in two ways: nitro-cli takes one
section after the other up to the end of the file, the hypervisor's loader goes by the table in the header. Here both
must tell the same: the sections stand in the order of the table, each right behind the one before, and the last ends
with the file. What it takes to measure one is in `signer.image.measure`.
"""

import enum
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from signer.errors import SignerError

MAGIC = b".eif"
VERSION = 4
MAX_SECTIONS = 32
FLAG_ARM = 0x0001  # the image is for aarch64, otherwise for x86_64
CHUNK = 1 << 20  # bytes of one read: an image has hundreds of megabytes

# What stands in every image of AWS's tools; nitro-cli's options take their place.
DEFAULT_MEMORY = 1 << 30  # bytes
DEFAULT_CPUS = 2

_HEADER = struct.Struct(f">4sHHQQHH{MAX_SECTIONS}Q{MAX_SECTIONS}QII")
_SECTION = struct.Struct(">HHQ")  # type, flags, size of the content
_CRC_AT = _HEADER.size - 4


class ImageError(SignerError):
    """The file is no sound enclave image; *reason* is one word for it."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Kind(enum.IntEnum):
    """The type of a section."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5


# Of contents that are held in memory; kernel and ramdisks never are.
MAX_CONTENT = {Kind.CMDLINE: 4096, Kind.SIGNATURE: 65536, Kind.METADATA: 1 << 20}  # bytes


@dataclass(frozen=True, slots=True)
class Section:
    """One section; *offset* is that of its content."""

    kind: Kind
    offset: int
    size: int  # bytes of the content


@dataclass(frozen=True, slots=True)
class Layout:
    """What the header of a file says, after it was compared with the file."""

    flags: int
    default_memory: int  # bytes
    default_cpus: int
    crc: int
    sections: tuple[Section, ...]

    @property
    def architecture(self) -> str:
        """The machine that the image is for."""
        return "aarch64" if self.flags & FLAG_ARM else "x86_64"

    def only(self, kind: Kind) -> Section | None:
        """The section of a kind of which there is at most one."""
        return next((section for section in self.sections if section.kind is kind), None)


# -- reading


def read_layout(file: BinaryIO) -> Layout:
    """The sections of *file*, compared with its length; the CRC is not. Raises `ImageError` and `OSError`."""
    length = file.seek(0, os.SEEK_END)
    if length < _HEADER.size:
        raise ImageError(
            "size", f"the file has {length} bytes: too few for an enclave image, it is cut or something else"
        )
    file.seek(0)
    magic, version, flags, memory, cpus, _reserved, count, *rest = _HEADER.unpack(file.read(_HEADER.size))
    if magic != MAGIC:
        raise ImageError("magic", "this is no enclave image: it does not begin with .eif")
    if version != VERSION:
        raise ImageError("version", f"the image has version {version} of the format; only {VERSION} is known here")
    if not 1 <= count <= MAX_SECTIONS:
        raise ImageError("sections", f"the header tells of {count} sections; 1 to {MAX_SECTIONS} are possible")
    offsets, sizes = rest[:MAX_SECTIONS], rest[MAX_SECTIONS : 2 * MAX_SECTIONS]
    if any(offsets[count:]) or any(sizes[count:]):
        raise ImageError("sections", f"the header's table has entries behind its {count} sections")
    sections = tuple(_sections(file, list(zip(offsets[:count], sizes[:count], strict=True)), length))
    _check_kinds([section.kind for section in sections])
    return Layout(flags=flags, default_memory=memory, default_cpus=cpus, crc=rest[-1], sections=sections)


def _sections(file: BinaryIO, table: Sequence[tuple[int, int]], length: int) -> Iterator[Section]:
    expected = _HEADER.size
    for number, (offset, size) in enumerate(table):
        if offset < expected:
            raise ImageError("overlap", f"section {number} begins at {offset}, inside what stands before it")
        if offset > expected:
            raise ImageError("gap", f"section {number} begins at {offset}; what stands before it ends at {expected}")
        start = offset + _SECTION.size
        expected = start + size
        if expected > length:
            raise ImageError("bounds", f"section {number} ends at {expected}, the file at {length}: the file is cut")
        file.seek(offset)
        kind, _flags, told = _SECTION.unpack(file.read(_SECTION.size))
        if told != size:
            raise ImageError("size", f"section {number} says that it has {told} bytes, the header's table {size}")
        if kind not in list(Kind):
            raise ImageError("type", f"section {number} has the unknown type {kind}")
        if size > MAX_CONTENT.get(Kind(kind), size):
            raise ImageError("size", f"section {number} has {size} bytes: too many for a {Kind(kind).name.lower()}")
        yield Section(Kind(kind), start, size)
    if expected != length:
        raise ImageError("bounds", f"{length - expected} byte(s) follow the last section")


def _check_kinds(kinds: Sequence[Kind]) -> None:
    """Kernel, command line and ramdisks in this order, as they are measured and loaded."""
    measured = [kind for kind in kinds if kind not in (Kind.SIGNATURE, Kind.METADATA)]
    ramdisks = measured[2:]
    if measured[:2] != [Kind.KERNEL, Kind.CMDLINE] or not ramdisks or set(ramdisks) != {Kind.RAMDISK}:
        names = ", ".join(kind.name.lower() for kind in measured) or "none of these"
        raise ImageError("order", f"expected a kernel, a command line and ramdisks, found {names}")
    for kind in (Kind.SIGNATURE, Kind.METADATA):
        if kinds.count(kind) > 1:
            raise ImageError("order", f"there are {kinds.count(kind)} {kind.name.lower()} sections")


def stream(file: BinaryIO, layout: Layout) -> Iterator[tuple[Section, bytes]]:
    """Every section's content in pieces, a section without any as one empty piece; the CRC is compared at the end.

    So nothing that was made of the pieces counts before the iterator has ended. Raises `ImageError` and `OSError`.
    """
    file.seek(0)
    crc = zlib.crc32(file.read(_HEADER.size)[:_CRC_AT])
    for section in layout.sections:
        crc = zlib.crc32(_read(file, _SECTION.size), crc)
        left = section.size
        while True:
            piece = _read(file, min(left, CHUNK))
            crc = zlib.crc32(piece, crc)
            yield section, piece
            left -= len(piece)
            if not left:
                break
    if crc != layout.crc:
        raise ImageError("crc", "the image is damaged: its checksum differs; copy or build it again")


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ImageError("size", "the file became shorter while it was read")
    return data


# -- writing


@dataclass(frozen=True, slots=True)
class Content:
    """A section to write: the bytes, or the file that has them."""

    kind: Kind
    source: bytes | Path

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def pieces(self) -> Iterator[bytes]:
        """The content in pieces."""
        if isinstance(self.source, bytes):
            yield self.source
            return
        with self.source.open("rb") as file:
            while piece := file.read(CHUNK):
                yield piece


def write(file: BinaryIO, contents: Sequence[Content], *, flags: int = 0) -> None:
    """Write an image of *contents*, in this order, to the seekable *file*. Raises `OSError`, `ImageError`."""
    _check_kinds([content.kind for content in contents])
    if len(contents) > MAX_SECTIONS:
        raise ImageError("sections", f"an image has at most {MAX_SECTIONS} sections, not {len(contents)}")
    sizes = [content.size for content in contents]
    offsets, end = [], _HEADER.size
    for size in sizes:
        offsets.append(end)
        end += _SECTION.size + size
    unused = [0] * (MAX_SECTIONS - len(contents))
    table = (*offsets, *unused, *sizes, *unused)
    header = _HEADER.pack(MAGIC, VERSION, flags, DEFAULT_MEMORY, DEFAULT_CPUS, 0, len(contents), *table, 0, 0)
    crc = zlib.crc32(header[:_CRC_AT])
    file.write(header)
    for content, size in zip(contents, sizes, strict=True):
        for piece in (_SECTION.pack(content.kind, 0, size), *content.pieces()):
            crc = zlib.crc32(piece, crc)
            file.write(piece)
    if file.tell() != end:
        raise ImageError("size", "a file that goes into the image changed while it was read")
    file.seek(_CRC_AT)
    file.write(struct.pack(">I", crc))
    file.seek(0, os.SEEK_END)
