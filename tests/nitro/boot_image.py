"""Boots an enclave image of ours in the emulator of the tool that NITRO_GUEST names; a script of its own.

    boot_image.py IMAGE SOCKET DIRECTORY CID MEMORY

The tool makes images itself, with an init of its own, and boots those; here only its machine is wanted. The image's
console becomes DIRECTORY/console. SIGTERM ends the machine.
"""

import argparse
import importlib.util
import os
import signal
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any


def tool() -> ModuleType:
    """The tool as a module."""
    sys.dont_write_bytecode = True  # beside it
    loader = SourceFileLoader("nitro_guest", os.environ["NITRO_GUEST"])
    spec = importlib.util.spec_from_loader("nitro_guest", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def parts(guest: Any) -> Path:
    """The directory with kernel, modules, busybox and eif_build; built at first use."""
    found: Path = guest.installed()
    return found


def main() -> None:
    """Boot until the machine ends."""
    image, base, directory, cid, memory = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    guest: Any = tool()
    options = argparse.Namespace(t=900, c=2, m=int(memory), cid=int(cid), socket=base, forward=[], v=True)
    guest.boot(parts(guest), Path(directory), options, Path(image))


if __name__ == "__main__":
    main()
