"""Files that come from elsewhere, held to their SHA-256: kernel, command line, init and NSM driver of AWS.

The list has the form of `sha256sum`, so that people can make and check it with that: a line for each file, the digits,
two spaces, the path.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from signer.image.tree import BuildError, Tree

KERNELS = ("bzImage", "Image")  # by the names in AWS's package, for x86_64 and aarch64
CMDLINE = "cmdline"
INIT = "init"
NSM = "nsm.ko"
LOAD_ORDER = "modules_load_order"  # nitro-cli makes it, too, for the drivers that init has to load

_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")


@dataclass(frozen=True, slots=True)
class Blobs:
    """What the image begins with. All of it is in PCR1."""

    kernel: bytes
    cmdline: bytes
    kernel_version: str
    ramdisk: Tree  # init, the driver, and what else the list has

    @property
    def flags(self) -> int:
        """Those of the image's header."""
        return 0 if self.kernel[0x202:0x206] == b"HdrS" else 1


def read_blobs(directory: Path, pins: Path) -> Blobs:
    """The files that *pins* lists, from *directory*; raises `BuildError` and `OSError`."""
    listed = _read_pins(pins)
    files = {name: _pinned(directory, name, digest, pins) for name, digest in listed.items()}
    kernel = next((files.pop(name) for name in KERNELS if name in files), None)
    missing = [name for name in (CMDLINE, INIT, NSM) if name not in files]
    if kernel is None:
        missing.insert(0, " or ".join(KERNELS))
    if missing or kernel is None:
        raise BuildError(f"{pins} does not list {', '.join(missing)}; make it by sha256sum over all of them")
    cmdline = files.pop(CMDLINE).strip()
    if not cmdline or not cmdline.isascii() or not cmdline.decode().isprintable():
        raise BuildError(f"{directory / CMDLINE} is not one line of text")
    configurations = [files.pop(name) for name in (f"{kernel}.config" for kernel in KERNELS) if name in files]
    ramdisk = Tree()
    ramdisk.folder("dev")  # init mounts it
    ramdisk.file(LOAD_ORDER, _load_order(files))
    for name, content in files.items():
        ramdisk.file(name, content, program=True)
    return Blobs(kernel=kernel, cmdline=cmdline, kernel_version=_version(configurations), ramdisk=ramdisk)


def _read_pins(pins: Path) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(pins.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        matched = _LINE.fullmatch(line)
        if not matched:
            raise BuildError(f"{pins}:{number}: expected a line of sha256sum, 64 hexadecimal digits and a path")
        if matched[2] in found:
            raise BuildError(f"{pins}:{number}: {matched[2]} stands there twice")
        found[matched[2]] = matched[1]
    return found


def _pinned(directory: Path, name: str, digest: str, pins: Path) -> bytes:
    content = (directory / name).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise BuildError(
            f"{directory / name} has SHA-256 {found}, but {pins} wants {digest}: another version of AWS's package, or "
            "a changed file. Where the new version is wanted, write the list anew, and expect another PCR0 and PCR1"
        )
    return content


def _load_order(files: Mapping[str, bytes]) -> bytes:
    """The drivers in the order of the list, that of the security module last; as nitro-cli writes it."""
    drivers = [name for name in files if name.endswith(".ko") and "/" not in name and name != NSM]
    head = ["# Module load order for Nitro Enclaves", "# Load modules in this order (one per line)"]
    return "".join(f"{line}\n" for line in (*head, *drivers, NSM)).encode()


def _version(configurations: list[bytes]) -> str:
    """The kernel's version, as its configuration says in a comment; for the metadata, which nothing measures."""
    found = re.search(rb"^# Linux/\S+ (\S+) Kernel Configuration$", b"".join(configurations), re.MULTILINE)
    return found[1].decode("ascii", "replace") if found else "unknown"
