"""Where the enclave is: as the configuration says, or as `nitro-cli describe-enclaves` says now.

What the listing means is decided in `signer.vaults.nitro.describe`; here the command is run, with limits on its time
and its output. It is asked again whenever the link breaks: a restarted enclave has another CID.
"""

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import structlog
import trio

from proxy.address import Address, AddressError
from signer.config import NitroSettings
from signer.config.models import CID_PATTERN, DEFAULT_CID
from signer.vaults.nitro.describe import DiscoveryError, Enclave, Wanted, choose, parse, shown

__all__ = ["DiscoveryError", "FixedLocator", "Locator", "NitroCliLocator", "Place", "listing", "locator"]

logger = structlog.get_logger(__name__)

COMMAND = "nitro-cli"
TIMEOUT = 10.0  # seconds; the command itself waits up to 3 s for each silent enclave process
KILL_TIMEOUT = 1.0  # seconds from SIGKILL to the end; what the kernel holds fast must not hold the signer
MAX_OUTPUT = 1024 * 1024  # bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where one life of the enclave listens; two that differ are two lives."""

    address: Address
    enclave_id: str = ""  # EnclaveID of nitro-cli; empty where nobody knows it

    def __str__(self) -> str:
        return f"{self.address} ({shown(self.enclave_id)})" if self.enclave_id else str(self.address)


class Locator(Protocol):
    """Finds the enclave."""

    @property
    def fixed(self) -> bool:
        """Whether the place never changes, and asking costs nothing."""

    async def locate(self) -> Place:
        """The place now. Raises `DiscoveryError`."""


def locator(nitro: NitroSettings) -> Locator:
    """The locator that the settings of a vault ask for."""
    fixed = nitro.fixed_enclave
    checked = bool(nitro.expected_pcrs) or nitro.allow_debug_mode is False
    unknown_to_nitro_cli = nitro.enclave_address is not None and CID_PATTERN not in nitro.enclave_address
    if fixed is not None and (unknown_to_nitro_cli or not checked):
        return FixedLocator(fixed)
    wanted = Wanted(
        name=nitro.enclave_name,
        cid=nitro.fixed_cid,
        allow_debug=bool(nitro.allow_debug_mode),
        check_debug=checked,
        expected=nitro.expected_pcrs,
    )
    is_default = nitro.enclave_cid is None and not nitro.enclave_name and not checked
    return NitroCliLocator(nitro, wanted, falls_back=is_default)


async def listing() -> list[Enclave]:
    """All enclaves of this host, as nitro-cli lists them. Raises `DiscoveryError`."""
    program = await trio.to_thread.run_sync(shutil.which, COMMAND, abandon_on_cancel=True)
    if program is None:
        raise DiscoveryError(f"{COMMAND} is not on the PATH")
    done = await _run(program)
    if done.status != 0:
        raise DiscoveryError(f"{COMMAND} describe-enclaves ended with status {done.status}: {_told(done.errors)}")
    return parse(done.output)


class FixedLocator:
    """The place that the configuration names."""

    fixed = True

    def __init__(self, address: Address) -> None:
        self._place = Place(address)

    async def locate(self) -> Place:
        await trio.lowlevel.checkpoint()
        return self._place


class NitroCliLocator:
    """Asks nitro-cli for the enclave that is *wanted*; its address is as *nitro* says for the CID found.

    Where *falls_back*, and there is no nitro-cli (in a container, say), it is the CID that the reference assumes.
    """

    fixed = False

    def __init__(self, nitro: NitroSettings, wanted: Wanted, *, falls_back: bool = False) -> None:
        self._nitro = nitro
        self._wanted = wanted
        self._falls_back = falls_back
        self._said = ""

    async def locate(self) -> Place:
        program = await trio.to_thread.run_sync(shutil.which, COMMAND, abandon_on_cancel=True)
        if program is None and self._falls_back:
            self._say(
                f"enclave_cid is not set and {COMMAND} is not on the PATH: taking CID {DEFAULT_CID}, which is wrong "
                "after the enclave's first restart; set enclave_cid, or let the signer run nitro-cli"
            )
            return Place(self._nitro.enclave_at(DEFAULT_CID))
        if program is None:
            raise DiscoveryError(
                f"{COMMAND} is not on the PATH (or cannot be executed), so the enclave's CID cannot be found: "
                "install aws-nitro-enclaves-cli, or set enclave_cid"
            )
        return self._place(await self._chosen(program))

    def _place(self, chosen: Enclave) -> Place:
        assert chosen.cid is not None
        try:
            return Place(self._nitro.enclave_at(chosen.cid), chosen.enclave_id)
        except AddressError as exc:
            raise DiscoveryError(f"the CID of the enclave ({chosen}) does not fit enclave_address: {exc}") from exc

    async def _chosen(self, program: str) -> Enclave:
        done = await _run(program)
        if done.status == 0:
            self._said = ""
            return choose(parse(done.output), self._wanted)
        trouble = f"{COMMAND} describe-enclaves ended with status {done.status}: {_told(done.errors)}"
        try:
            listed = parse(done.output)
        except DiscoveryError as exc:
            raise DiscoveryError(trouble) from exc
        try:
            chosen = choose(listed, self._wanted)
        except DiscoveryError as exc:  # what it says of the others may be why
            raise DiscoveryError(f"{exc} ({trouble})") from exc
        self._say(f"{trouble}; going on with the enclaves that it listed")
        return chosen

    def _say(self, text: str) -> None:
        if text != self._said:
            logger.warning(text)
        self._said = text


@dataclass(frozen=True, slots=True)
class _Done:
    status: int
    output: bytes
    errors: bytes


async def _run(program: str) -> _Done:
    """Run the command to its end, however it behaves. Raises `DiscoveryError`."""
    try:
        process = await trio.lowlevel.open_process(
            [program, "describe-enclaves"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that its children end with it
        )
    except OSError as exc:
        raise DiscoveryError(f"{program} cannot be run: {exc.strerror or exc}") from exc
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = bytearray(), bytearray()
    status: int | None = None
    try:
        with trio.move_on_after(TIMEOUT) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_collect, process.stderr, errors, limit)
                nursery.start_soon(_collect, process.stdout, output, limit)
            status = await process.wait()
    finally:
        if status is None:  # once it was waited for, its number may be another's
            await _end(process)
    if max(len(output), len(errors)) > MAX_OUTPUT:
        raise DiscoveryError(f"{COMMAND} describe-enclaves printed more than {MAX_OUTPUT} bytes; is it the right one?")
    if status is None:
        raise DiscoveryError(
            f"{COMMAND} describe-enclaves gave no answer within {TIMEOUT:g} s; run it by hand and see what it hangs on"
        )
    return _Done(status, bytes(output), bytes(errors))


async def _collect(stream: trio.abc.ReceiveStream, into: bytearray, command: trio.CancelScope) -> None:
    """Read *stream* to its end, or until it has said more than anybody wants to hear: that ends the *command*."""
    async with stream:
        async for chunk in stream:
            into += chunk
            if len(into) > MAX_OUTPUT:
                command.cancel(reason="too much output")


async def _end(process: trio.Process) -> None:
    """End the command and what it started, at once; nothing of it stays, not even as a zombie.

    Only for a process that nobody has waited for yet: until then its number, and its group's, are no other's.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with trio.move_on_after(KILL_TIMEOUT, shield=True):
        await process.wait()


def _told(errors: bytes) -> str:
    """What a person needs of stderr: the line with the error code, else the first one that says something."""
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
    coded = [line for line in lines if line.startswith("[ E")]
    return shown((coded or lines or ["it said nothing"])[0])
