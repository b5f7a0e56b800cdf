"""The enclave program's own modules: those that `signer.enclave` can come to import, and nothing else of the signer."""

from collections.abc import Iterator
from modulefinder import ModuleFinder
from pathlib import Path

from signer.image.tree import BuildError

PACKAGES = ("signer", "proxy")
START = "signer/enclave/__main__.py"
DATA = (".pem",)  # files beside the modules that go in, too


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Path from *root* and file of each module and data file, where *root* has both packages; raises `BuildError`."""
    start = root / START
    if not start.is_file():
        raise BuildError(f"{root} does not hold the signer's sources: there is no {START}")
    finder = ModuleFinder([str(root)])
    finder.run_script(str(start))
    files = [getattr(module, "__file__", None) for module in finder.modules.values()]
    found = {Path(file) for file in files if file}
    folders = {path.parent for path in found}
    found |= {path for folder in folders for path in folder.iterdir() if path.suffix in DATA}
    for path in sorted(found):
        yield path.relative_to(root).as_posix(), path
