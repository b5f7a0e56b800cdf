"""A whole image, built twice under conditions that differ in all that must not matter, and its program run."""

import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from signer.image import elf
from signer.image.measure import measure
from tests.integration.image_parts import write_sources
from tests.unit.image.test_cpio import Member, unpacked
from tests.unit.image.toys import write_blobs
from tests.unit.image.vectors import sections


def build(
    directory: Path, output: Path, *arguments: str, umask: int = 0o022, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the builder that *directory* has the sources of."""
    inputs = directory.parent
    return subprocess.run(
        [
            *(sys.executable, "-m", "signer.image", "image", "--python", sys.executable, "--output", str(output)),
            *("--wheels", str(inputs / "wheels"), "--blobs", str(inputs / "blobs")),
            *("--pins", str(inputs / "pins.sha256"), *arguments),
        ],
        env={"PYTHONPATH": str(directory), "PATH": os.environ["PATH"], **environment},
        cwd=output.parent,
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two copies of the sources, of another age and with other permissions."""
    inputs = tmp_path_factory.mktemp("image")
    write_blobs(inputs / "blobs")
    first, second = inputs / "first", inputs / "another-place"
    for place in (first, second):
        write_sources(place, inputs / "wheels")
    for path in second.rglob("*.py"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o600)
    (second / "signer/__pycache__").mkdir()
    (second / "signer/enclave/development.key").write_bytes(bytes(32))
    (second / "signer/enclave/kms/baker.pem").write_bytes(bytes(32))
    return first, second


@pytest.fixture(scope="module")
def image(places: tuple[Path, Path]) -> Path:
    """Built in the first place."""
    output = places[0] / "signer.eif"
    done = build(places[0], output, TZ="UTC", LC_ALL="C", PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    with output.open("rb") as file:
        registers = measure(file).registers
    for number, value in registers.items():
        assert f"PCR{number}  {value.hex()}\n" in done.stdout
    needed = math.ceil(4 * output.stat().st_size / 2**20)
    assert f"memory of the enclave: at least {needed} MiB\n" in done.stdout
    return output


def application(image: Path) -> dict[str, Member]:
    """The second ramdisk."""
    return unpacked(sections(image.read_bytes())[4][1])


def test_two_builds_give_the_same_bytes(image: Path, places: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "other-name.eif"
    done = build(
        places[1], output, umask=0o077, TZ="Asia/Tokyo", LC_ALL="C.UTF-8", LANG="de_DE.UTF-8", PYTHONHASHSEED="4711"
    )
    assert done.returncode == 0, done.stderr
    told = {line.rpartition(": ")[2] for line in done.stderr.splitlines() if line.startswith("left out")}
    assert told == {"signer/enclave/development.key", "signer/enclave/kms/baker.pem"}
    assert output.with_name("other-name.eif.manifest").read_text() == image.with_name("signer.eif.manifest").read_text()
    assert output.read_bytes() == image.read_bytes()


def test_what_is_in_it(image: Path) -> None:
    found = application(image)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    assert found["env"].content == b"LANG=C.UTF-8\nLD_LIBRARY_PATH=/lib\nPATH=/usr/bin\n"
    command = f"/usr/bin/{version}\n-I\n-B\n-m\nsigner.enclave\n--sealing\nkms\n"
    assert found["cmd"].content == command.encode()
    assert {f"rootfs/{name}" for name in ("dev", "proc", "run", "sys", "tmp", "usr", "lib")} <= set(found)
    for path, member in found.items():
        assert (member.time, member.owner) == (0, (0, 0))
        if elf.is_elf(member.content):
            assert member.content == elf.loaded_part(member.content), path
        name = path.rpartition("/")[2]
        assert not path.endswith((".py", ".pyi", ".pth", ".key")), path
        assert name not in ("RECORD", "INSTALLER", "direct_url.json", "__pycache__", "pip", "pytest", "test"), path
    content = image.read_bytes()
    assert str(image.parent).encode() not in content
    assert b"signer.service" not in content, "the rest of the signer stays out"


def test_its_program_runs(image: Path, tmp_path: Path) -> None:
    """Unpacked, with the loader and the libraries that are in it, and nothing of this environment."""
    for path, member in application(image).items():
        target = tmp_path / path
        if member.mode & 0o040000:
            target.mkdir()
        else:
            target.write_bytes(member.content)
            target.chmod(member.mode & 0o777)
    root = tmp_path / "rootfs"
    (loader,) = root.glob("lib*/ld-linux*")
    python = root / (tmp_path / "cmd").read_text().splitlines()[0].lstrip("/")
    script = "import sys, signer.enclave.__main__, signer.crypto; "
    script += "print(*sorted(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"
    done = subprocess.run(
        [loader, "--library-path", root / "lib", "--argv0", python, python, "-I", "-B", "-c", script],
        env={"PYTHONHOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(root)) for line in done.stdout.splitlines()), done.stdout


def test_a_failed_build_leaves_the_image_before_it(image: Path, places: tuple[Path, Path]) -> None:
    before = image.read_bytes()
    done = build(places[0], image, "--env", "PROXY_PORT=abc")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: PROXY_PORT: expected a port number, got 'abc'\n"
    assert image.read_bytes() == before
    assert not list(image.parent.glob("image.*"))


def test_a_setting_changes_pcr0_and_pcr2_only(image: Path, places: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "strict.eif"
    assert build(places[0], output, "--env", "SEAL_STRICT=1", "--", "--sealing", "none").returncode == 0
    with image.open("rb") as one, output.open("rb") as two:
        plain, strict = measure(one).registers, measure(two).registers
    assert [number for number in plain if plain[number] != strict[number]] == [0, 2]
    found = application(output)
    assert b"\nSEAL_STRICT=1\n" in found["env"].content
    assert found["cmd"].content.endswith(b"\nsigner.enclave\n--sealing\nnone\n")


def test_missing_files(places: tuple[Path, Path], tmp_path: Path) -> None:
    done = build(places[0], tmp_path / "out.eif", "--blobs", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: No such file or directory: {tmp_path}/bzImage\n"
    assert list(tmp_path.iterdir()) == []


def test_the_requirements(places: tuple[Path, Path]) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [root / "contrib/enclave/build", "requirements"],
        env={"PYTHON": sys.executable, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (root / "contrib/enclave/requirements.txt").read_text()


def test_the_header_of_the_image(image: Path) -> None:
    magic, version, flags = struct.unpack_from(">4sHH", image.read_bytes())
    assert (magic, version, flags) == (b".eif", 4, 0)
