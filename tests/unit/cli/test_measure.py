"""`signer measure`: JSON, the table, comparison with expected values, and bad files."""

import json
import os
from pathlib import Path

import pytest

from signer.cli import images
from tests.unit.cli.test_listing import Outcome, call
from tests.unit.image.vectors import built, sections, toy, toys

UNSIGNED = toys()[0]
ZERO = "0" * 96


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "signer.eif"
    found.write_bytes(UNSIGNED.data)
    return found


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Outcome:
    class Terminal:
        class stdout:
            @staticmethod
            def isatty() -> bool:
                return True

    monkeypatch.setattr(images, "sys", Terminal)
    return call("measure", *arguments)


def test_json_with_the_member_of_nitro_cli(path: Path) -> None:
    done = call("measure", str(path))
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == {
        "Measurements": {"HashAlgorithm": "Sha384 { ... }"} | UNSIGNED.measurements,
        "EifVersion": 4,
        "Architecture": "x86_64",
        "Size": len(UNSIGNED.data),
        "IsSigned": False,
        "ImageName": "signer",
        "ImageVersion": "1",
    }


def test_a_signed_image(path: Path) -> None:
    path.write_bytes(toy("signed"))
    found = json.loads(call("measure", str(path)).out)
    assert found["Measurements"]["PCR8"] == toys()[2].measurements["PCR8"]
    assert found["IsSigned"] is True
    assert found["NotAfter"].startswith("20")


def test_a_table_on_a_terminal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(built([*sections(UNSIGNED.data)[:2], (5, b'{"ImageName": "a\\u001b[2Jb"}'), (3, b"first")]))
    done = on_a_terminal(monkeypatch, str(path))
    assert done.status == 0
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert list(lines) == ["PCR0", "PCR1", "PCR2", "EifVersion", "Architecture", "Size", "IsSigned", "ImageName"]
    assert len(lines["PCR0"]) == 96
    assert lines["ImageName"] == r'"a\u001b[2Jb"', "nothing from the file controls the terminal"
    assert on_a_terminal(monkeypatch, str(path), "--json").out.startswith("{")


def test_compared_with_expected_values(path: Path) -> None:
    values = [f"--check={name}={value.upper()}" for name, value in UNSIGNED.measurements.items()]
    assert call("measure", str(path), *values).status == 0
    done = call("measure", str(path), "--check", f"PCR0={ZERO}", "--check", f"pcr8={ZERO}", *values[1:])
    assert done.status == 1
    told = f"PCR0 is {UNSIGNED.measurements['PCR0']}, expected {ZERO}; PCR8 is not there, expected {ZERO}"
    assert done.err == f"Error: the image is another one: {told}\n"
    assert json.loads(done.out)["Measurements"]["PCR0"] == UNSIGNED.measurements["PCR0"]


@pytest.mark.parametrize("text", ["PCR0", "PCR0=", f"PCR3={ZERO}", f"PCR0={ZERO}0", f"PCR0={ZERO[2:]}xy", ZERO])
def test_what_cannot_be_compared(path: Path, text: str) -> None:
    done = call("measure", str(path), "--check", text)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"Error: --check {text}: expected PCR0= (or 1, 2, 8) and 96 hexadecimal digits\n")


def test_a_bad_file(path: Path, tmp_path: Path) -> None:
    path.write_bytes(toy("unsigned_bad_crc"))
    done = call("measure", str(path))
    assert (done.status, done.out) == (1, "")
    assert done.err == f"Error: {path}: the image is damaged: its checksum differs; copy or build it again\n"
    assert call("measure", str(tmp_path / "none.eif")).err.startswith("Error: No such file or directory: ")
    assert call("measure", str(tmp_path)).err == f"Error: Is a directory: {tmp_path}\n"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO without a writer, which would hold up whoever opens it, and a device without end."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero")):
        done = call("measure", str(path))
        assert (done.status, done.out) == (1, "")
        assert done.err == f"Error: {path}: this is a pipe or a device; copy the image to a file\n"


def test_an_image_for_seal_for_is_told_by_its_path(path: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = call("seal-for", "--image", str(fifo), "--", "false")
    assert (done.status, done.err) == (1, f"Error: {fifo}: this is a pipe or a device; copy the image to a file\n")
    path.write_bytes(b"no image")
    assert call("seal-for", "--image", str(path), "--", "false").err.startswith(f"Error: {path}: the file has 8 bytes")
