"""What an image of ours is made of here: the emulator's kernel, and an init that does what AWS's does (init.sh)."""

import sys
from pathlib import Path
from typing import Any

import pytest

from signer.image.build import Inputs
from tests.integration.image_parts import write_sources
from tests.nitro import boot_image
from tests.unit.image.toys import write_blobs

ARGUMENTS = ("--sealing", "local", "--development", "--key-file", "/tmp/development.key")
INIT, REGISTERS = (Path(__file__).with_name(name) for name in ("init.sh", "registers.py"))


@pytest.fixture(scope="session")
def emulator() -> Any:
    """The tool's module."""
    return boot_image.tool()


@pytest.fixture(scope="session")
def inputs(emulator: Any, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The emulator's kernel in the place of AWS's; its drivers are modules, so they are in the first ramdisk, too."""
    directory = tmp_path_factory.mktemp("i")
    tools = boot_image.parts(emulator)
    modules = {f"modules/{path.name}": path.read_bytes() for path in (tools / "modules").iterdir()}
    blobs = {
        "bzImage": (tools / "vmlinuz").read_bytes(),
        "bzImage.config": (tools / "config").read_bytes(),
        "cmdline": emulator.CMDLINE.encode(),
        "init": INIT.read_bytes(),
        "nsm.ko": modules.pop("modules/nsm.ko"),
        "registers.py": REGISTERS.read_bytes(),
        "bin/busybox": (tools / "busybox").read_bytes(),
    }
    pins = write_blobs(directory / "blobs", blobs | modules)
    write_sources(directory / "sources", directory / "wheels")
    return Inputs(
        python=Path(sys.executable),
        wheels=directory / "wheels",
        blobs=directory / "blobs",
        pins=pins,
        sources=directory / "sources",
        arguments=ARGUMENTS,
    )
