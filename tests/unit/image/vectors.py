"""The toy images of the vectors, and ways of changing images."""

import base64
import io
import json
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CRC_AT = 544
TABLE_AT = 28  # 32 offsets, then 32 sizes
SECTION = struct.Struct(">HHQ")


@dataclass(frozen=True)
class Toy:
    name: str
    data: bytes
    measurements: dict[str, str]
    expect: str


@cache
def vectors() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "vectors/attestation.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def toys() -> list[Toy]:
    return [
        Toy(one["name"], base64.b64decode(one["eif"]), one["measurements"], one["expect"]) for one in vectors()["eif"]
    ]


def toy(name: str) -> bytes:
    return next(one.data for one in toys() if one.name == name)


def with_crc(data: bytes) -> bytes:
    """The checksum made good again after a change."""
    crc = zlib.crc32(data[CRC_AT + 4 :], zlib.crc32(data[:CRC_AT]))
    return data[:CRC_AT] + struct.pack(">I", crc) + data[CRC_AT + 4 :]


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    """One number replaced, and the checksum made good."""
    size = struct.calcsize(form)
    return with_crc(data[:at] + struct.pack(form, value) + data[at + size :])


def sections(data: bytes) -> list[tuple[int, bytes]]:
    """Type and content of each section."""
    (count,) = struct.unpack_from(">H", data, 26)
    found = []
    for offset in struct.unpack_from(f">{count}Q", data, TABLE_AT):
        kind, _flags, size = SECTION.unpack_from(data, offset)
        found.append((kind, data[offset + SECTION.size :][:size]))
    return found


def built(contents: list[tuple[int, bytes]], *, header: bytes = b"") -> bytes:
    """A file of these sections, by an encoder of its own; *header* gives the first 26 bytes."""
    offsets, end = [], 548
    for _, content in contents:
        offsets.append(end)
        end += SECTION.size + len(content)
    unused = [0] * (32 - len(contents))
    table = [*offsets, *unused, *(len(content) for _, content in contents), *unused]
    head = (header or toy("unsigned"))[:26] + struct.pack(">H64QII", len(contents), *table, 0, 0)
    return with_crc(head + b"".join(SECTION.pack(kind, 0, len(content)) + content for kind, content in contents))


def opened(data: bytes) -> io.BytesIO:
    return io.BytesIO(data)
