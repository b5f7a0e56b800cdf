"""What an image is made of, out of the environment of the tests: its packages as wheels, and a lock for them."""

import shutil
import zipfile
from importlib import metadata
from pathlib import Path

from signer.image.wheels import DISTRIBUTIONS
from tests.unit.image.toys import OWN, pinned

ROOT = Path(__file__).parents[2]


def write_sources(directory: Path, wheels: Path) -> None:
    """The two packages, and the lock that belongs to *wheels*."""
    for name in ("signer", "proxy"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    lock = directory / "contrib/enclave/requirements.txt"
    lock.parent.mkdir(parents=True)
    lock.write_text("".join(write_wheel_of(name, wheels) for name in DISTRIBUTIONS))


def write_wheel_of(name: str, directory: Path) -> str:
    """The installed distribution as a wheel, if it is not there yet; returns its entry for the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-1.0-{OWN}-{OWN}-manylinux_2_17_{machine()}.whl"
    files = [file for file in metadata.files(name) or () if "__pycache__" not in file.parts and ".." not in file.parts]
    if not path.exists():
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(str(file.locate()), str(file))
    return pinned(name, path)


def machine() -> str:
    import platform

    return platform.machine()
