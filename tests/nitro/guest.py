"""The enclave program as an image in an emulated Nitro Enclave, which the tool named by NITRO_GUEST makes and boots."""

import json
import os
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = 2000  # of the enclave program
WITNESS_PORT = 2009  # of witness.py
MEMORY = 1024  # MiB; the image has to be smaller than half of it
DEADLINE = 240.0  # seconds for anything to happen at all: the guest's processor is emulated
LISTENING = f"listening on vsock:any:{PORT}"

_REPOSITORY = Path(__file__).parents[2]
_WITNESS = Path(__file__).with_name("witness.py")

# Both processes die with the guest. The program is the one that the tool started, so that its end is the guest's.
_BOOT = '"$PYTHON" "$WITNESS" $$ "$WITNESS_PORT" & exec "$PYTHON" -m signer.enclave "$@"'


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Return once *condition* holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


class Image:
    """What goes into the guest: an interpreter, the two packages, what they import, and the key file.

    The packages that the tests need stay out, as they would from a real image: they are most of the environment.
    Without a key file the program seals by KMS, as in a real image.
    """

    def __init__(self, directory: Path, key_file: Path | None = None) -> None:
        self._key_file = key_file
        environment = directory / "python"  # without packages of its own
        venv.EnvBuilder(symlinks=True).create(environment)
        self._python = environment / "bin/python"
        self._packages = _imported_packages()

    def arguments(self) -> list[str]:
        """For the tool: what to pack, and what to run."""
        added = [_REPOSITORY / "signer", _REPOSITORY / "proxy", _WITNESS, *self._packages]
        sealing = ["--sealing", "kms"]
        if self._key_file is not None:
            added.append(self._key_file)
            sealing = ["--sealing", "local", "--development", "--key-file", str(self._key_file)]
        places = dict.fromkeys([_REPOSITORY, *(package.parent for package in self._packages)])
        variables = {
            "PYTHONPATH": ":".join(map(str, places)),
            "PYTHON": self._python,
            "WITNESS": _WITNESS,
            "WITNESS_PORT": WITNESS_PORT,
        }
        return [
            *("--python", str(self._python)),
            *(word for path in added for word in ("--add", str(path))),
            *(word for name, value in variables.items() for word in ("--env", f"{name}={value}")),
            *("--", "/bin/sh", "-c", _BOOT, "enclave", "--listen", f"vsock:any:{PORT}", *sealing),
        ]


def _imported_packages() -> list[Path]:
    """The installed packages that the enclave program imports, each as the folder or file in site-packages."""
    script = "import json, sys, signer.enclave.__main__ as _; print(json.dumps([getattr(module, '__file__', None)"
    script += " for module in list(sys.modules.values())]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=_REPOSITORY)
    packages = set()
    for file in filter(None, json.loads(done.stdout)):
        for parent in Path(file).parents:
            if parent.name == "site-packages":
                packages.add(parent / Path(file).relative_to(parent).parts[0])
    return sorted(packages)


class Guest:
    """One life of the enclave, under its own CID; its vsock device is the unix socket at *base*."""

    def __init__(self, image: Image, *, cid: int, base: Path, log: Path) -> None:
        self.cid = cid
        self.base = base
        self._log = log
        self.began = time.monotonic()
        # -t: an end even if the tests are killed
        tool = [os.environ["NITRO_GUEST"], "-t", "900", "-m", str(MEMORY), "--cid", str(cid)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*tool, "--socket", str(base), *image.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=_REPOSITORY,
            )

    @property
    def log(self) -> str:
        """What the program has said, and the tool about it."""
        return self._log.read_text(errors="replace")

    def wait_until_it_listens(self) -> None:
        wait_for(lambda: LISTENING in self.log or self._ended(), f"the enclave program of CID {self.cid} to listen")
        assert not self._ended(), self.log

    def sockets(self) -> list[Any]:
        """The program's sockets, as the witness in the guest sees them."""
        answers: list[list[Any]] = []

        def asked() -> bool:
            assert not self._ended(), self.log
            if answer := self._ask_witness():
                answers.append(json.loads(answer))
            return bool(answers)

        wait_for(asked, f"the witness in CID {self.cid}")
        return answers[0]

    def _ask_witness(self) -> bytes:
        """Its answer; empty if it does not listen yet."""
        with socket.socket(socket.AF_UNIX) as hybrid:
            hybrid.settimeout(DEADLINE)
            hybrid.connect(str(self.base))
            hybrid.sendall(b"CONNECT %d\n" % WITNESS_PORT)
            with hybrid.makefile("rb") as stream:
                return stream.read() if stream.readline().startswith(b"OK ") else b""

    def kill(self) -> None:
        """End it at once: the tool kills the machine under the program, which hears nothing of it."""
        if not self._ended():
            self._process.terminate()
            self._process.wait(DEADLINE)

    def _ended(self) -> bool:
        return self._process.poll() is not None
