"""A Python interpreter for the image: its program, the part of the standard library that the enclave uses, libraries.

Taken from an installation of this machine (or unpacked on it), which has to be for the enclave's machine. Everything is
put where one finds it without configuration: the program in usr/bin, the standard library beside, in usr/lib, and
all shared libraries in lib, which LD_LIBRARY_PATH names.
"""

import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

from signer.image import elf
from signer.image.tree import BuildError, Tree
from signer.image.wheels import Target

LIBRARIES = "lib"  # where shared libraries are, in the image
_PROGRAMS = "usr/bin"

# Of the standard library; patterns for a path from its folder.
UNUSED = (
    # for developers
    *("test", "idlelib", "lib2to3", "ensurepip", "venv", "distutils", "unittest", "doctest.py", "pydoc*", "pdb.py"),
    *("config-*", "*-packages", "__pycache__", "__phello__", "__hello__.py", "ctypes/test", "ctypes/macholib"),
    *("modulefinder.py", "trace.py", "profile.py", "cProfile.py", "pstats.py", "zipapp.py", "compileall.py"),
    *("tabnanny.py", "pickletools.py", "antigravity.py", "this.py", "LICENSE.txt", "build-details.json"),
    # with screens, databases and mail
    *("tkinter", "turtle*", "curses", "sqlite3", "dbm", "xml", "xmlrpc", "wsgiref", "html", "asyncio", "_pyrepl"),
    *("multiprocessing", "mailbox.py", "mailcap.py", "imaplib.py", "nntplib.py", "poplib.py", "smtp*.py", "ftplib.py"),
    *("telnetlib.py", "cgi*.py", "webbrowser.py", "socketserver.py", "aifc.py", "sunau.py", "wave.py", "sndhdr.py"),
    *(
        "imghdr.py",
        "chunk.py",
        "colorsys.py",
        "plistlib.py",
        "tomllib",
        "zoneinfo",
        "_aix*",
        "_osx*",
        "_ios*",
        "_android*",
    ),
    # C extensions of these, and codecs of other scripts
    *(
        "lib-dynload/_test*",
        "lib-dynload/_xx*",
        "lib-dynload/xx*",
        "lib-dynload/_ctypes_test*",
        "lib-dynload/_tkinter*",
    ),
    *(
        "lib-dynload/_curses*",
        "lib-dynload/_sqlite3*",
        "lib-dynload/_dbm*",
        "lib-dynload/_gdbm*",
        "lib-dynload/readline*",
    ),
    *("lib-dynload/pyexpat*", "lib-dynload/_elementtree*", "lib-dynload/_asyncio*", "lib-dynload/_multiprocessing*"),
    *(
        "lib-dynload/_bz2*",
        "lib-dynload/_lzma*",
        "lib-dynload/_uuid*",
        "lib-dynload/_lsprof*",
        "lib-dynload/_zoneinfo*",
    ),
    *(
        "lib-dynload/nis*",
        "lib-dynload/ossaudiodev*",
        "lib-dynload/audioop*",
        "lib-dynload/spwd*",
        "lib-dynload/_crypt*",
    ),
    *("lib-dynload/_codecs_*", "lib-dynload/_multibytecodec*", "lib-dynload/syslog*", "lib-dynload/_remote_debugging*"),
    *(
        "encodings/cp[0-35-9]*",
        "encodings/mac_*",
        "encodings/iso8859_[2-9]*",
        "encodings/iso8859_1?*",
        "encodings/big5*",
    ),
    *(
        "encodings/euc_*",
        "encodings/gb*",
        "encodings/hz*",
        "encodings/iso2022*",
        "encodings/johab*",
        "encodings/k[oz]*",
    ),
    *("encodings/shift*", "encodings/tis_620*", "encodings/ptcp154*", "encodings/palmos*", "encodings/hp_roman8*"),
)

_UNUSED = re.compile("|".join(translate(pattern) for pattern in UNUSED))

# Loaded by name while a program runs, so that nothing lists it: glibc wants it to end threads.
_LOADED_LATER = ("libgcc_s.so.1",)

_ASK = """
import json, os, platform, site, sys, sysconfig
print(json.dumps({
    "program": os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
    "version": sys.version_info[:2], "full": platform.python_version(), "machine": platform.machine(),
    "name": platform.python_implementation(), "library": sysconfig.get_path("stdlib"), "folder": sys.platlibdir,
    "extensions": sysconfig.get_config_var("DESTSHARED"), "sites": site.getsitepackages(["/prefix"]),
}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An interpreter of this machine."""

    program: Path
    library: Path  # of the standard library
    extensions: Path  # lib-dynload
    folder: str  # of the standard library in the image
    target: Target
    full_version: str

    @property
    def place(self) -> str:
        """Where the program is in the image."""
        return f"{_PROGRAMS}/python{self.target.version[0]}.{self.target.version[1]}"

    @property
    def packages(self) -> str:
        """Where site-packages is in the image."""
        return f"{self.folder}/site-packages"


def find(program: Path) -> Interpreter:
    """The interpreter that *program* is, also where it belongs to a virtual environment; raises `BuildError`."""
    done = subprocess.run([program, "-I", "-c", _ASK], capture_output=True, text=True, check=False, env={})
    if done.returncode:
        raise BuildError(f"{program} does not run: {done.stderr.strip()[-500:]}")
    told = json.loads(done.stdout)
    major, minor = told["version"]
    folder = f"usr/{told['folder']}/python{major}.{minor}"
    if told["name"] != "CPython" or (major, minor) < (3, 11):
        raise BuildError(f"{program} is {told['name']} {told['full']}; CPython 3.11 or newer is needed")
    if f"/prefix/{folder.removeprefix('usr/')}/site-packages" not in told["sites"]:
        raise BuildError(
            f"{program} looks for packages in places of its distribution ({', '.join(told['sites'])}); take a Python "
            "as python.org releases it, or one of python-build-standalone"
        )
    return Interpreter(
        program=Path(told["program"]),
        library=Path(told["library"]),
        extensions=Path(told["extensions"] or Path(told["library"]) / "lib-dynload"),
        folder=folder,
        target=Target((major, minor), told["machine"]),
        full_version=told["full"],
    )


def standard_library(interpreter: Interpreter) -> Iterator[tuple[str, Path]]:
    """What is packed of the standard library: the path from its folder, and the file."""
    yield from _used(interpreter.library, "")
    if interpreter.extensions.is_dir() and not interpreter.extensions.is_relative_to(interpreter.library):
        yield from _used(interpreter.extensions, "lib-dynload/")


def _used(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.name == "__pycache__" or _UNUSED.fullmatch(name):
            continue
        if path.is_dir():
            yield from _used(path, f"{name}/")
        elif path.suffix in (".py", ".so"):
            yield name, path


def compiled(interpreter: Interpreter, sources: Sequence[tuple[str, Path]]) -> Iterator[bytes]:
    """The byte code of each source, given as its path in the image and the file; raises `BuildError`."""
    script = Path(__file__).with_name("_compile.py")
    done = subprocess.run(
        [interpreter.program, "-I", "-S", script],
        input=json.dumps([[str(path), f"/{shown}"] for shown, path in sources]).encode(),
        capture_output=True,
        check=False,
        env={},
    )
    if done.returncode:
        raise BuildError(f"the sources do not compile: {done.stderr.decode(errors='replace').strip()[-1000:]}")
    at = 0
    for _ in sources:
        (length,) = struct.unpack_from(">I", done.stdout, at)
        yield done.stdout[at + 4 : at + 4 + length]
        at += 4 + length


def compiled_contents(interpreter: Interpreter, sources: Sequence[tuple[str, bytes]]) -> Iterator[bytes]:
    """The same for sources in memory."""
    with tempfile.TemporaryDirectory() as directory:
        files = []
        for number, (shown, content) in enumerate(sources):
            files.append((shown, Path(directory) / str(number)))
            files[-1][1].write_bytes(content)
        yield from compiled(interpreter, files)


def add(tree: Tree, interpreter: Interpreter) -> None:
    """Put the program and its standard library into *tree*, the root file system; byte code in place of sources."""
    tree.file(interpreter.place, elf.loaded_part(interpreter.program.read_bytes()), program=True)
    files = [(f"{interpreter.folder}/{name}", path) for name, path in standard_library(interpreter)]
    sources = [(name, path) for name, path in files if path.suffix == ".py"]
    for (name, _), code in zip(sources, compiled(interpreter, sources), strict=True):
        tree.file(f"{name}c", code)
    for name, path in files:
        if path.suffix == ".so":
            tree.file(name, elf.loaded_part(path.read_bytes()))
    if not any(name.startswith(f"{interpreter.folder}/lib-dynload/") for name, _ in files):
        tree.folder(f"{interpreter.folder}/lib-dynload")  # by which the interpreter knows its place


def add_libraries(tree: Tree, interpreter: Interpreter, extensions: Iterable[Path], own: Path) -> None:
    """Put in the loader, and the shared libraries of the program and all *extensions* but those under *own*."""
    loader = elf.interpreter(interpreter.program.read_bytes())
    if loader is None or not Path(loader).exists():
        raise BuildError(f"{interpreter.program} has no loader on this machine; take a Python for glibc")
    tree.file(loader.lstrip("/"), elf.loaded_part(Path(loader).read_bytes()), program=True)
    libraries: dict[str, Path] = {}
    own_extensions = [path for name, path in standard_library(interpreter) if path.suffix == ".so"]
    for path in (interpreter.program, *own_extensions, *extensions):
        for name, library in _needed(loader, path):
            if not library.is_relative_to(own):
                libraries[name] = library
    for name in _LOADED_LATER:
        beside = libraries.get("libc.so.6", Path(loader)).with_name(name)
        if beside.exists():
            libraries[name] = beside
    for name, library in sorted(libraries.items()):
        if name != Path(loader).name:
            tree.file(f"{LIBRARIES}/{name}", elf.loaded_part(library.read_bytes()))


def _needed(loader: str, path: Path) -> Iterator[tuple[str, Path]]:
    """The libraries of a program or library, by the loader's own word."""
    done = subprocess.run([loader, "--list", path], capture_output=True, text=True, check=False, env={})
    missing = re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE)
    if done.returncode or missing:
        wanted = ", ".join(missing) or (done.stderr or done.stdout).strip()[-300:]
        raise BuildError(f"{path} needs what this machine does not have: {wanted}")
    for name, library in re.findall(r"^\s*(\S+) => (/.*) \(0x[0-9a-f]+\)$", done.stdout, re.MULTILINE):
        yield name, Path(library)
