"""The measurements of an enclave image, as the hypervisor makes them: section 6.2 of the specification.

PCR0 is the whole image, PCR1 kernel, command line and first ramdisk, PCR2 the other ramdisks, PCR8 the certificate that
signed it. The file is read once, in pieces.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cryptography import x509

from signer.image import signature
from signer.image.eif import MAX_CONTENT, ImageError, Kind, Layout, read_layout, stream

_START = bytes(48)  # every register before it is extended


@dataclass(frozen=True, slots=True)
class Measured:
    """What a sound image is. The metadata is **not** measured: whoever has the file can write what he likes there."""

    registers: Mapping[int, bytes]  # PCR0, 1, 2, and 8 if the image is signed
    layout: Layout
    size: int  # bytes of the file
    metadata: Mapping[str, object] = field(default_factory=dict)
    certificate: x509.Certificate | None = None  # PCR8's; its dates and issuer are unchecked


def measure_file(path: Path) -> Measured:
    """Measure the image at *path*; raises `ImageError`, whose text begins with the path, and `OSError`."""
    with open(path, "rb", opener=_without_waiting) as file:  # pathlib's has no opener
        try:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError("file", "this is a pipe or a device; copy the image to a file")
            return measure(file)
        except ImageError as exc:
            raise ImageError(exc.reason, f"{path}: {exc}") from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a FIFO, too, at once: without a writer it would hold the command up for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def measure(file: BinaryIO) -> Measured:
    """Measure the image in *file*, which is seekable; raises `ImageError` and `OSError`."""
    layout = read_layout(file)
    image, bootstrap, application = hashlib.sha384(), hashlib.sha384(), hashlib.sha384()
    ramdisks = [section for section in layout.sections if section.kind is Kind.RAMDISK]
    kept = {kind: bytearray() for kind in MAX_CONTENT}
    for section, piece in stream(file, layout):
        if section.kind in kept:
            kept[section.kind] += piece
        if section.kind in (Kind.SIGNATURE, Kind.METADATA):
            continue
        image.update(piece)
        (application if section in ramdisks[1:] else bootstrap).update(piece)
    size = file.tell()
    registers = {0: extended(image.digest()), 1: extended(bootstrap.digest()), 2: extended(application.digest())}
    certificate = None
    if layout.only(Kind.SIGNATURE):
        found = signature.parse(bytes(kept[Kind.SIGNATURE]))
        signature.verify(found, registers[0])
        certificate = found.certificate
        registers[8] = extended(hashlib.sha384(found.certificate_der).digest())
    metadata = _metadata(bytes(kept[Kind.METADATA])) if layout.only(Kind.METADATA) else {}
    return Measured(registers=registers, layout=layout, size=size, metadata=metadata, certificate=certificate)


def extended(digest: bytes) -> bytes:
    """A register after its one extension."""
    return hashlib.sha384(_START + digest).digest()


def _metadata(content: bytes) -> Mapping[str, object]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ImageError("metadata", "the image's metadata is no JSON object: nitro-cli would refuse to run it")
    return found
