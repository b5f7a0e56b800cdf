"""The enclave program's own files: the modules that `signer.enclave` can come to import, the data that they read, and
nothing else of the signer."""

from collections.abc import Iterator
from modulefinder import ModuleFinder
from pathlib import Path

from signer.image.tree import BuildError

PACKAGES = ("signer", "proxy")
START = "signer/enclave/__main__.py"
DATA = ("signer/enclave/kms/roots.pem",)
"""What the modules read beside themselves, by name: whatever else lies in a working copy may be somebody's key."""


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Path from *root* and file of each module and data file, where *root* has both packages; raises `BuildError`."""
    for path in sorted(_modules(root) | {_data(root, name) for name in DATA}):
        yield path.relative_to(root).as_posix(), path


def left_out(root: Path) -> list[str]:
    """Files beside the modules that are neither modules nor data of the program, by their path from *root*."""
    known = {root / name for name in DATA}
    folders = {path.parent for path in _modules(root)}
    found = {path for folder in folders for path in folder.iterdir() if path.suffix != ".py" and not path.is_dir()}
    return sorted(path.relative_to(root).as_posix() for path in found - known)


def _modules(root: Path) -> set[Path]:
    start = root / START
    if not start.is_file():
        raise BuildError(f"{root} does not hold the signer's sources: there is no {START}")
    finder = ModuleFinder([str(root)])
    finder.run_script(str(start))
    files = [getattr(module, "__file__", None) for module in finder.modules.values()]
    found = {Path(file) for file in files if file}
    # What lies beside the packages is not ours, even if it is called like something that they import.
    return {path for path in found if path.relative_to(root).parts[0] in PACKAGES}


def _data(root: Path, name: str) -> Path:
    path = root / name
    if not path.is_file():
        raise BuildError(f"{root} does not hold the signer's sources: there is no {name}")
    return path
