"""The packages that the enclave program imports: which, and their files, out of wheels that the lock has the hash of.

No installer has a part in it: a wheel is a zip archive, and what an installer would add (RECORD, INSTALLER,
direct_url.json, byte code, scripts) tells of the machine.
"""

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from signer.image.tree import BuildError, Tree

# What `signer.enclave` imports, and what that imports. Not pycparser, which cffi needs at build time only.
DISTRIBUTIONS = (
    "attrs",
    "cbor2",
    "cffi",
    "coincurve",
    "cryptography",
    "h11",
    "idna",
    "outcome",
    "pyblst",
    "pynacl",
    "sniffio",
    "sortedcontainers",
    "trio",
)

# Patterns for a file's name, or that of a folder above it. cacert.pem: in the enclave only pinned roots count.
UNUSED = (
    *("tests", "_tests", "__pycache__", "*.data", "RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "sboms"),
    *("*.pyc", "*.pyi", "py.typed", "*.h", "*.c", "*.pyx", "*.pxd", "*.pth", "cacert.pem"),
)

_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_WHEEL = re.compile(
    r"(?P<name>[^-]+)-(?P<version>[^-]+)(-\d[^-]*)?-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<platform>[^-]+)\.whl"
)
_MAX_UNPACKED = 256 << 20  # bytes of one wheel


@dataclass(frozen=True, slots=True)
class Pin:
    """A distribution in the lock."""

    text: str  # as it stands there
    version: str
    hashes: frozenset[str]  # SHA-256 of its files


@dataclass(frozen=True, slots=True)
class Target:
    """The interpreter that the wheels are for."""

    version: tuple[int, int]
    machine: str  # x86_64 or aarch64

    def runs(self, python: str, abi: str, platform: str) -> bool:
        """Whether a wheel with these tags is for it."""
        major, minor = self.version
        own = f"cp{major}{minor}"
        if platform != "any" and not any(
            one.endswith(f"_{self.machine}") and "linux" in one and "musl" not in one for one in platform.split(".")
        ):
            return False
        if abi == "none":
            return bool({"py3", own} & set(python.split(".")))
        if "abi3" in abi.split("."):
            return any(re.fullmatch(rf"cp{major}(\d+)", one) and int(one[3:]) <= minor for one in python.split("."))
        return own in python.split(".") and own in abi.split(".")


def read_lock(lock: Path) -> Mapping[str, Pin]:
    """The distributions of a requirements file by name; raises `BuildError` and `OSError`."""
    found = {}
    for block in re.split(r"\n(?=\S)", lock.read_text(encoding="utf-8")):
        if pin := _PIN.match(block):
            hashes = frozenset(_HASH.findall(block))
            if not hashes:
                raise BuildError(f"{lock}: {pin[1]} has no hash; make it by: make lock")
            text = "\n".join(line for line in block.splitlines() if "#" not in line)  # without whom it is for
            found[_canonical(pin[1])] = Pin(text.rstrip(" \\") + "\n", pin[2], hashes)
    return found


def requirements(lock: Path) -> str:
    """The part of the lock that the image needs, as a requirements file for pip."""
    pins = read_lock(lock)
    missing = [name for name in DISTRIBUTIONS if name not in pins]
    if missing:
        raise BuildError(f"{lock} does not have {', '.join(missing)}")
    head = "# The packages in the enclave image. Made by: contrib/enclave/build requirements\n"
    return head + "".join(pins[name].text for name in DISTRIBUTIONS)


def read_wheels(directory: Path, requirements: Path, target: Target) -> Tree:
    """The files of site-packages; raises `BuildError` and `OSError`."""
    tree = Tree()
    for name, pin in sorted(read_lock(requirements).items()):
        for path, content in _unpacked(_find(directory, name, pin, target), pin):
            if not any(fnmatch(part, pattern) for part in path.split("/") for pattern in UNUSED):
                tree.file(path, content)
    return tree


def _find(directory: Path, name: str, pin: Pin, target: Target) -> Path:
    """The wheel of this version for this target; by its name alone, its content is checked when it is read."""
    found: list[Path] = []
    others: list[Path] = []
    for path in sorted(directory.glob("*.whl")):
        tags = _WHEEL.fullmatch(path.name)
        if tags and _canonical(tags["name"]) == name:
            fits = tags["version"] == pin.version and target.runs(tags["python"], tags["abi"], tags["platform"])
            (found if fits else others).append(path)
    if len(found) == 1:
        return found[0]
    wanted = f"{name} {pin.version} for Python {target.version[0]}.{target.version[1]} on {target.machine}"
    if found:
        raise BuildError(f"{directory} has more than one wheel of {wanted}: {', '.join(one.name for one in found)}")
    there = f", only {', '.join(one.name for one in others)}" if others else ""
    raise BuildError(f"{directory} has no wheel of {wanted}{there}; get it by pip download, see contrib/enclave")


def _unpacked(wheel: Path, pin: Pin) -> Iterator[tuple[str, bytes]]:
    data = wheel.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest not in pin.hashes:
        raise BuildError(
            f"{wheel} has SHA-256 {digest}, which the lock does not have: it is another file, don't use it"
        )
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(item.file_size for item in archive.infolist()) > _MAX_UNPACKED:
            raise BuildError(f"{wheel} unpacks to more than {_MAX_UNPACKED >> 20} MiB")
        for item in archive.infolist():
            if not item.is_dir():
                yield item.filename, archive.read(item)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
