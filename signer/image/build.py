"""Builds the enclave's image without Docker: the same inputs give the same bytes on every machine, so the same PCR0.

Section 6.6 of the specification. An image is the kernel, its command line, metadata, and two ramdisks: the first has
what AWS gives (init and the NSM driver), the second `rootfs/` and, beside it, the files `env` and `cmd`, from which
init takes the program's environment and arguments. All but the metadata is measured.
"""

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from signer import __version__
from signer.enclave.settings import SettingsError
from signer.enclave.settings import read as read_settings
from signer.image import cpio, eif, elf, interpreter, program, wheels
from signer.image.eif import Content, Kind
from signer.image.interpreter import Interpreter
from signer.image.measure import Measured, measure
from signer.image.pins import read_blobs
from signer.image.tree import BuildError, Tree

REPOSITORY = Path(__file__).parents[2]
REQUIREMENTS = Path("contrib/enclave/requirements.txt")
ARGUMENTS = ("--sealing", "kms")  # of the enclave program
SETTINGS = ("SEAL_STRICT", "PROXY_PORT", "PROXY_CID", "LISTEN_PORT", "LOG_PORT", "ENDPOINT", "KMS_KEY")
FOLDERS = ("dev", "proc", "run", "sys", "tmp", "var")  # which init mounts, or expects

_NAME = "nitro-signer"
_EPOCH = "1970-01-01T00:00:00+00:00"  # in the place of the time of the build


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All that an image is made of."""

    python: Path  # an interpreter
    wheels: Path  # a directory
    blobs: Path  # a directory: kernel, command line, init, driver
    pins: Path  # their hashes
    sources: Path = REPOSITORY  # the directory with signer/ and proxy/
    environment: Mapping[str, str] = field(default_factory=dict)  # of the enclave program, e.g. SEAL_STRICT
    arguments: Sequence[str] = ARGUMENTS


@dataclass(frozen=True, slots=True)
class Built:
    """An image that was written."""

    measured: Measured
    manifest: str  # what is in both ramdisks
    root_size: int  # bytes of the files in the enclave's root file system


def build(inputs: Inputs, output: Path) -> Built:
    """Write the image to *output*; raises `BuildError`, `ImageError` and `OSError`, then *output* is as before."""
    blobs = read_blobs(inputs.blobs, inputs.pins)
    found = interpreter.find(inputs.python)
    root = root_file_system(inputs, found)
    application = Tree()
    application.graft("rootfs", root)
    application.file("env", _lines(_environment(inputs.environment)))
    application.file("cmd", _lines([f"/{found.place}", "-I", "-B", "-m", "signer.enclave", *inputs.arguments]))
    metadata = _metadata(blobs.kernel_version)
    with tempfile.TemporaryDirectory(prefix="image.", dir=output.parent) as directory:
        ramdisk = Path(directory) / "application"
        with ramdisk.open("wb") as file:
            cpio.write(file, application)
        contents = [
            Content(Kind.KERNEL, blobs.kernel),
            Content(Kind.CMDLINE, blobs.cmdline),
            Content(Kind.METADATA, metadata),
            Content(Kind.RAMDISK, _archive(blobs.ramdisk)),
            Content(Kind.RAMDISK, ramdisk),
        ]
        image = Path(directory) / "image"
        with image.open("w+b") as file:
            eif.write(file, contents, flags=blobs.flags)
            measured = measure(file)  # what was written, not what should have been
        image.replace(output)
    manifest = f"{blobs.ramdisk.manifest()}\n{application.manifest()}"
    return Built(measured, manifest, root.size)


def root_file_system(inputs: Inputs, found: Interpreter) -> Tree:
    """The enclave's root: the interpreter, the packages, the program, and the libraries of them all."""
    tree = Tree()
    for name in FOLDERS:
        tree.folder(name)
    interpreter.add(tree, found)
    packages = wheels.read_wheels(inputs.wheels, inputs.sources / REQUIREMENTS, found.target)
    for name, path in program.modules(inputs.sources):
        packages.file(name, path.read_bytes())
    _add_packages(tree, packages, found)
    with tempfile.TemporaryDirectory() as directory:
        extensions = _written(packages, Path(directory))
        interpreter.add_libraries(tree, found, extensions, Path(directory).resolve())
    return tree


def _add_packages(tree: Tree, packages: Tree, found: Interpreter) -> None:
    files = [(f"{found.packages}/{name}", entry.content) for name, entry in packages if not _is_folder(entry.mode)]
    sources = [(name, content) for name, content in files if name.endswith(".py")]
    for (name, _), code in zip(sources, interpreter.compiled_contents(found, sources), strict=True):
        tree.file(f"{name}c", code)
    for name, content in files:
        if not name.endswith(".py"):
            tree.file(name, elf.loaded_part(content) if elf.is_elf(content) else content)


def _written(packages: Tree, directory: Path) -> list[Path]:
    """The shared libraries of *packages* as files, placed as in the image, so that the loader can be asked."""
    paths = []
    for name, entry in packages:
        if elf.is_elf(entry.content):
            path = directory.resolve() / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(entry.content)
            paths.append(path)
    return paths


def _environment(given: Mapping[str, str]) -> list[str]:
    """The variables of the program, sorted. All are measured, so those that say nothing are left out."""
    _check(given)
    variables = {"LD_LIBRARY_PATH": f"/{interpreter.LIBRARIES}", "LANG": "C.UTF-8", "PATH": "/usr/bin"}
    variables |= {name: value for name, value in given.items() if value}
    return [f"{name}={value}" for name, value in sorted(variables.items())]


def _check(settings: Mapping[str, str]) -> None:
    """What the enclave program would refuse at its start is refused here, by the program's own reader."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise BuildError(f"{name} is no setting of the enclave program; those are {', '.join(SETTINGS)}")
        if not value.isprintable():
            raise BuildError(f"{name}: {value!r} has characters that cannot be in a line")
    try:
        read_settings(settings)
    except SettingsError as exc:
        raise BuildError(str(exc)) from exc


def _lines(lines: Sequence[str]) -> bytes:
    """A file that init reads line by line."""
    if any(not line or "\n" in line for line in lines):
        raise BuildError("an argument of the enclave program is empty or has more than one line")
    return "".join(f"{line}\n" for line in lines).encode()


def _metadata(kernel_version: str) -> bytes:
    """As nitro-cli expects it; nothing measures it, and it is the same for every build of a version."""
    facts = {
        "ImageName": _NAME,
        "ImageVersion": __version__,
        "BuildMetadata": {
            "BuildTime": _EPOCH,
            "BuildTool": _NAME,
            "BuildToolVersion": __version__,
            "OperatingSystem": "Linux",
            "KernelVersion": kernel_version,
        },
        "DockerInfo": {},
        "CustomMetadata": {},
    }
    return json.dumps(facts, separators=(",", ":")).encode()


def _archive(tree: Tree) -> bytes:
    file = io.BytesIO()
    cpio.write(file, tree)
    return file.getvalue()


def _is_folder(mode: int) -> bool:
    return mode & 0o170000 == 0o040000
