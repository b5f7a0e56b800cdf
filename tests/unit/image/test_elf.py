"""ELF files: the loader, the loaded part, and files that are cut or for another machine."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from signer.image import elf
from signer.image.tree import BuildError

PROGRAM = Path(sys.executable).resolve().read_bytes()


def test_the_loader() -> None:
    loader = elf.interpreter(PROGRAM)
    assert loader is not None
    assert Path(loader).exists()
    assert elf.interpreter(Path(loader).read_bytes()) is None, "a library has none"


def test_the_loaded_part_is_enough(tmp_path: Path) -> None:
    small = elf.loaded_part(PROGRAM)
    assert len(small) < len(PROGRAM)
    assert elf.loaded_part(small) == small
    program = tmp_path / "bin/python"
    program.parent.mkdir()
    program.write_bytes(small)
    program.chmod(0o755)
    done = subprocess.run([program, "-I", "-S", "-c", "print(6 * 7)"], capture_output=True, check=True)
    assert done.stdout == b"42\n"


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh", b"\x7fELF", b"\x7fELF\x01\x01" + bytes(60), PROGRAM[:63]])
def test_other_files(data: bytes) -> None:
    with pytest.raises(BuildError):
        elf.loaded_part(data)


def test_every_truncation_is_refused_or_harmless() -> None:
    small = elf.loaded_part(PROGRAM)
    for length in range(0, len(small), 97):
        with pytest.raises(BuildError):
            elf.loaded_part(small[:length])


def toy(*, entry_size: int = 56) -> bytes:
    """One segment of four bytes, its table behind them, then what is not loaded, and a table of sections."""
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 68, 200, 0, 64, entry_size, 1, 64, 3, 2
    )
    table = struct.pack("<IIQQQQQQ", 1, 5, 64, 0, 0, 4, 4, 1)
    return head + b"code" + table + b"symbols" + bytes(192)


def test_the_table_of_segments_stays_and_that_of_sections_goes() -> None:
    small = elf.loaded_part(toy())
    assert small[64:] == toy()[64:124]
    assert struct.unpack_from("<Q", small, 40) == (0,), "where the table of sections is"
    assert struct.unpack_from("<2H", small, 60) == (0, 0), "its length, and that of the names"
    assert small[:40] == toy()[:40]


def test_segments_of_another_form() -> None:
    with pytest.raises(BuildError, match="its table of segments"):
        elf.loaded_part(toy(entry_size=32))


def test_what_is_elf() -> None:
    assert elf.is_elf(PROGRAM)
    assert not elf.is_elf(b"")
