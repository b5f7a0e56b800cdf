"""A stand-in for nitro-cli: an executable that prints what it was told to, in the real format, or misbehaves."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

_SCRIPT = """#!/bin/sh
# Counts its calls, then does as the files beside it say.
cd {directory} || exit 99
echo "$@" >> calls
[ "$1" = describe-enclaves ] || exit 98
[ -e hang ] && {{ echo $$ > pid; sleep 1000 & echo $! > child; wait; }}
[ -e endless ] && {{ echo $$ > pid; exec yes endless; }}
cat errors >&2
cat output
exit $(cat status)
"""

PCRS = {"PCR0": "a" * 96, "PCR1": "b" * 96, "PCR2": "c" * 96}


def enclave(
    cid: int | str,
    *,
    name: str = "signer",
    state: str = "RUNNING",
    flags: str = "NONE",
    pcrs: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One entry of the listing, with all the fields that nitro-cli 1.3 prints."""
    return {
        "EnclaveName": name,
        "EnclaveID": f"i-0123456789abcdef0-enc{cid}",
        "ProcessID": 4711,
        "EnclaveCID": cid,
        "NumberOfCPUs": 2,
        "CPUIDs": [1, 3],
        "MemoryMiB": 1024,
        "State": state,
        "Flags": flags,
        "Measurements": {"HashAlgorithm": "Sha384 { ... }", **(PCRS if pcrs is None else pcrs)},
    }


class NitroCli:
    """The program `nitro-cli` in *directory*; what it does can be changed while others call it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.program = directory / "nitro-cli"
        self.say(b"[]\n")
        self.program.write_text(_SCRIPT.format(directory=shlex.quote(str(directory))))
        self.program.chmod(0o755)

    def path_environment(self) -> dict[str, str]:
        """The environment that lets this one be found before any other."""
        return {"PATH": f"{self.directory}{os.pathsep}{os.environ.get('PATH', '')}"}

    @property
    def calls(self) -> int:
        """How often it was run."""
        try:
            return len((self.directory / "calls").read_text().splitlines())
        except FileNotFoundError:
            return 0

    def show(self, *enclaves: dict[str, Any]) -> None:
        """List these."""
        self.say(json.dumps(enclaves, indent=2).encode() + b"\n")

    def fail(self, status: int, errors: str, output: bytes = b"") -> None:
        """End with *status*, having told *errors* on stderr."""
        self.say(output, errors=errors, status=status)

    def say(self, output: bytes, *, errors: str = "", status: int = 0) -> None:
        """Print *output*, whatever it is."""
        self._behave("")
        for name, content in (("errors", errors.encode()), ("status", b"%d" % status), ("output", output)):
            fresh = self.directory / f".{name}"
            fresh.write_bytes(content)
            fresh.rename(self.directory / name)

    def hang(self) -> None:
        """Never end, nor does the child that it starts; both leave their ids in files."""
        self._behave("hang")

    def babble(self) -> None:
        """Print without end."""
        self._behave("endless")

    def process_id(self, name: str = "pid") -> int | None:
        """The id of the process that hangs, or of its *child*; None before it has begun."""
        try:
            text = (self.directory / name).read_text()
        except FileNotFoundError:
            return None
        return int(text) if text.endswith("\n") else None

    def _behave(self, how: str) -> None:
        for name in ("hang", "endless"):
            path = self.directory / name
            if name == how:
                path.touch()
            else:
                path.unlink(missing_ok=True)
