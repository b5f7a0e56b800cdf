"""The files of AWS: held to the list, and what the list must have."""

import hashlib
from pathlib import Path

import pytest

from signer.image.pins import read_blobs
from signer.image.tree import BuildError
from tests.unit.image.toys import BLOBS, KERNEL, write_blobs


def refused(directory: Path, pins: Path) -> str:
    with pytest.raises(BuildError) as caught:
        read_blobs(directory, pins)
    return str(caught.value)


def test_read(tmp_path: Path) -> None:
    pins = write_blobs(tmp_path / "blobs", BLOBS | {"modules/vsock.ko": b"more", "virtio.ko": b"more"})
    pins.write_text("# aws-nitro-enclaves-cli-devel 1.4.2\n\n" + pins.read_text().replace("  cmdline", " *cmdline"))
    found = read_blobs(tmp_path / "blobs", pins)
    assert (found.kernel, found.cmdline, found.kernel_version, found.flags) == (
        KERNEL,
        b"reboot=k panic=30",
        "6.6.79",
        0,
    )
    assert [(path, oct(entry.mode)) for path, entry in found.ramdisk] == [
        ("dev", "0o40755"),
        ("init", "0o100755"),
        ("modules", "0o40755"),
        ("modules/vsock.ko", "0o100755"),
        ("modules_load_order", "0o100644"),
        ("nsm.ko", "0o100755"),
        ("virtio.ko", "0o100755"),
    ]
    order = {path: entry.content for path, entry in found.ramdisk}["modules_load_order"]
    assert order.splitlines()[2:] == [b"virtio.ko", b"nsm.ko"], "in a new version of AWS's package, init goes by it"


def test_for_arm_and_without_configuration(tmp_path: Path) -> None:
    blobs = {name: content for name, content in BLOBS.items() if not name.startswith("bzImage")}
    found = read_blobs(tmp_path / "blobs", write_blobs(tmp_path / "blobs", blobs | {"Image": bytes(1000)}))
    assert (found.flags, found.kernel_version) == (1, "unknown")


@pytest.mark.parametrize("name", BLOBS)
def test_a_changed_file(tmp_path: Path, name: str) -> None:
    pins = write_blobs(tmp_path / "blobs")
    (tmp_path / "blobs" / name).write_bytes(BLOBS[name] + b"!")
    assert refused(tmp_path / "blobs", pins).startswith(f"{tmp_path}/blobs/{name} has SHA-256 ")


def test_every_digit_counts(tmp_path: Path) -> None:
    pins = write_blobs(tmp_path / "blobs")
    digest = hashlib.sha256(BLOBS["init"]).hexdigest()
    pins.write_text(pins.read_text().replace(digest, digest[:-1] + ("1" if digest[-1] == "0" else "0")))
    assert refused(tmp_path / "blobs", pins).startswith(f"{tmp_path}/blobs/init has SHA-256 {digest}")


@pytest.mark.parametrize("name", ["bzImage", "cmdline", "init", "nsm.ko"])
def test_a_file_that_is_not_listed(tmp_path: Path, name: str) -> None:
    pins = write_blobs(tmp_path / "blobs")
    pins.write_text("".join(line for line in pins.read_text().splitlines(True) if not line.endswith(f" {name}\n")))
    assert refused(tmp_path / "blobs", pins).startswith(f"{pins} does not list {name}")


def test_a_listed_file_that_is_not_there(tmp_path: Path) -> None:
    pins = write_blobs(tmp_path / "blobs")
    (tmp_path / "blobs/init").unlink()
    with pytest.raises(FileNotFoundError):
        read_blobs(tmp_path / "blobs", pins)


@pytest.mark.parametrize("line", ["0123  init", "init", "0" * 63 + "g  init", "0" * 64 + "  "])
def test_a_line_of_another_form(tmp_path: Path, line: str) -> None:
    pins = write_blobs(tmp_path / "blobs")
    pins.write_text(pins.read_text() + line + "\n")
    assert refused(tmp_path / "blobs", pins).startswith(f"{pins}:6: expected a line of sha256sum")


def test_a_file_listed_twice(tmp_path: Path) -> None:
    pins = write_blobs(tmp_path / "blobs")
    pins.write_text(pins.read_text() + "0" * 64 + "  init\n")
    assert refused(tmp_path / "blobs", pins) == f"{pins}:6: init stands there twice"


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb", b"\xff", b"a\0"])
def test_a_command_line_that_is_none(tmp_path: Path, content: bytes) -> None:
    pins = write_blobs(tmp_path / "blobs", BLOBS | {"cmdline": content})
    assert refused(tmp_path / "blobs", pins) == f"{tmp_path}/blobs/cmdline is not one line of text"
