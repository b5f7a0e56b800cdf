"""Our own image: measured as AWS's tool measures it, and booted in the emulator, from where it signs.

The kernel is the emulator's, and init does what AWS's does (init.sh): both files of AWS and the heartbeat to nitro-cli
are for real machines only.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from signer.image import build as builder
from signer.image.build import Built, Inputs, build
from signer.image.eif import Kind, read_layout
from tests.integration.conftest import Setup, running
from tests.nitro import boot_image
from tests.nitro.guest import PORT
from tests.nitro.machine import MEMORY, Machine
from tests.nitro.signing import assert_all_sign
from tests.nitro.test_drill import CURVES, TIMEOUTS

CID = 18


@pytest.fixture(scope="module")
def image(inputs: Inputs) -> tuple[Path, Built]:
    path = inputs.blobs.with_name("signer.eif")
    return path, build(inputs, path)


def test_measured_as_the_tool_of_aws_does(image: tuple[Path, Built], emulator: Any, tmp_path: Path) -> None:
    """eif_build, from the same kernel, command line and ramdisks."""
    path, built = image
    tools, configuration = boot_image.parts(emulator), path.with_name("blobs") / "bzImage.config"
    numbered: dict[Kind, list[Path]] = {kind: [] for kind in Kind}
    with path.open("rb") as file:
        for number, section in enumerate(read_layout(file).sections):
            target = tmp_path / str(number)
            numbered[section.kind].append(target)
            file.seek(section.offset)
            target.write_bytes(file.read(section.size))
    (kernel,), (line,) = numbered[Kind.KERNEL], numbered[Kind.CMDLINE]
    ramdisks = [word for ramdisk in numbered[Kind.RAMDISK] for word in ("--ramdisk", str(ramdisk))]
    command: list[str | Path] = [tools / "eif_build", "--kernel", kernel, "--kernel_config", configuration, *ramdisks]
    command += ["--cmdline", line.read_text(), "--output", tmp_path / "theirs.eif"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout[done.stdout.index("{") :])
    for number, value in built.measured.registers.items():
        assert theirs[f"PCR{number}"] == value.hex()
    told = subprocess.run(
        [sys.executable, "-m", "signer", "measure", tmp_path / "theirs.eif"], capture_output=True, check=True
    )
    assert json.loads(told.stdout)["Measurements"]["PCR0"] == theirs["PCR0"], "their file, by our reader"


@pytest.fixture
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    directory = tmp_path_factory.mktemp("m")  # short: the path of a unix socket has at most 107 bytes
    with running(directory) as found:
        found.nitro.update(enclave_address=f"unix:{directory}/{CID}.sock:{PORT}", **TIMEOUTS)
        yield found


def test_booted_and_signing(image: tuple[Path, Built], setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    path, built = image
    machine = Machine(path, setup.directory, CID)
    try:
        kernel = machine.wait_for("init: started")
        begun = machine.wait_for("Mem:")
        for number, value in list(built.measured.registers.items()):
            assert f"PCR{number}={value.hex()}" in machine.console, "as the machine has measured it"
        listening = machine.wait_for(f"enclave: listening on vsock:any:{PORT}")
        addresses = [pkh for kind in CURVES for pkh in setup.generate(kind)]
        signer = setup.start_signer()
        assert_all_sign(setup, addresses)
        assert setup.stop(signer) == 0
        memory = re.search(r"Mem: +(\d+) +(\d+)", machine.console)
        assert memory
    finally:
        machine.kill()
    with capsys.disabled():
        print(
            f"\nimage {built.measured.size / 2**20:.1f} MiB, root file system {built.root_size / 2**20:.1f} MiB; "
            f"with {MEMORY} MiB of memory, {memory[2]} of {memory[1]} MiB taken before the program; "
            f"init after {kernel:.1f} s, the program listens {listening - begun:.1f} s after it was started"
        )


def test_the_program_for_production_does_its_duties_and_listens(
    inputs: Inputs, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arguments that an image has by itself: the security module and its entropy come before the listener."""
    directory = tmp_path_factory.mktemp("p")
    image = directory / "production.eif"
    build(replace(inputs, arguments=builder.ARGUMENTS, environment={"SEAL_STRICT": "1", "LISTEN_PORT": "2010"}), image)
    machine = Machine(image, directory, CID)
    try:
        begun = machine.wait_for("Mem:")
        listening = machine.wait_for("enclave: listening on vsock:any:2010")
    finally:
        machine.kill()
    with capsys.disabled():
        print(f"\nwith sealing by KMS, the program listens {listening - begun:.1f} s after it was started")
