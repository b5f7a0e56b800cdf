"""Small wheels, a lock for them, and the files of AWS in miniature."""

import hashlib
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

KERNEL = bytes(0x202) + b"HdrS" + b"kernel"
CONFIGURATION = b"#\n# Linux/x86_64 6.6.79 Kernel Configuration\n#\nCONFIG_NSM=m\n"
BLOBS = {
    "bzImage": KERNEL,
    "bzImage.config": CONFIGURATION,
    "cmdline": b"reboot=k panic=30\n",
    "init": b"\x7fELF init",
    "nsm.ko": b"\x7fELF driver",
}
OWN = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def write_blobs(directory: Path, blobs: Mapping[str, bytes] = BLOBS) -> Path:
    """The files in *directory*, and their list beside it; returns the list."""
    for name, content in blobs.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    pins = directory.with_name("pins.sha256")
    pins.write_text("".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in blobs.items()))
    return pins


def write_wheel(directory: Path, name: str, files: Mapping[str, bytes], *, tags: str = "py3-none-any") -> str:
    """A wheel of version 1.0; returns its entry for the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-1.0-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, content in files.items():
            archive.writestr(inner, content)
    return pinned(name, path)


def pinned(name: str, *paths: Path) -> str:
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return f"{name}==1.0 \\\n" + " \\\n".join(f"    --hash=sha256:{digest}" for digest in digests) + "\n"
