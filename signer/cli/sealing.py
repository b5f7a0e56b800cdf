"""Sealed imports: `seal-for` on the operator's machine, and the host's side of it, `import --sealed`."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import click

from signer.cli import secret_keys
from signer.cli.common import CliCommand, configure_logs, standard_input
from signer.cli.secret_keys import ImportError_

if TYPE_CHECKING:
    from signer.attestation.document import Document
    from signer.crypto.interface import SecretKey
    from signer.vaults.nitro.vault import NitroVault

_DEBUG_REGISTERS = (0, 1, 2)  # zero in debug mode; 3 is without a role, and 8 of an unsigned image
_REGISTERS = (0, 1, 2, 3, 4, 8)
_ANSWER_TIMEOUT = 300.0  # seconds for a line of the command: somebody may have to type a password first
_END_TIMEOUT = 10.0  # seconds for the command to end once it has nothing left to do
_MAY_BE_STORED = (
    "the sealed key was on its way, and may be stored: run this again, which then says that the key is in the vault "
    "already"
)


class _Lines(Protocol):
    """What lines are read from."""

    def readline(self, limit: int, /) -> bytes: ...


class _Pipe:
    """Lines of *whom*, who has its time for each, if *in_time*; a command's output may be held open by others than it.

    Python's own buffer would be locked by a thread that waits in it: a program that ends meanwhile crashes over that.
    """

    def __init__(self, descriptor: int, whom: str, *, in_time: bool = True) -> None:
        self._descriptor = descriptor
        self._whom = whom
        self._in_time = in_time
        self._buffer = b""

    def readline(self, limit: int, /) -> bytes:
        """Up to the newline, the end, or *limit* bytes."""
        deadline = time.monotonic() + _ANSWER_TIMEOUT
        while b"\n" not in self._buffer and len(self._buffer) < limit:
            left = max(0.0, deadline - time.monotonic()) if self._in_time else None
            if not select.select([self._descriptor], [], [], left)[0]:
                raise ImportError_(f"{self._whom} has not answered for {_ANSWER_TIMEOUT:g} s; is the host reachable?")
            chunk = os.read(self._descriptor, limit)
            if not chunk:
                break
            self._buffer += chunk
        end = min(limit, self._buffer.find(b"\n") + 1 or limit)
        line, self._buffer = self._buffer[:end], self._buffer[end:]
        return line


class _Line:
    """A way to the host: lines out, lines in."""

    def __init__(self, outgoing: IO[bytes], incoming: _Lines, whom: str) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._whom = whom

    def ask(self, line: bytes) -> bytes:
        """Send one line, and return the one that comes back."""
        from signer.vaults.nitro.sealed_import import MAX_LINE

        try:
            self._outgoing.write(line)
            self._outgoing.flush()
        except BrokenPipeError:
            pass  # what it said last tells why
        answer = self._incoming.readline(MAX_LINE + 1)
        if not answer:
            raise ImportError_(f"{self._whom} said nothing more; its own messages tell why")
        return answer


def _register_options(command: click.decorators.FC) -> click.decorators.FC:
    for number in reversed(_REGISTERS):
        command = click.option(
            f"--pcr{number}",
            metavar="HEX",
            multiple=True,
            help=f"PCR{number} that the enclave must have; repeatable.",
        )(command)
    return command


@click.command("seal-for", cls=CliCommand)
@click.argument("command", metavar="[-- COMMAND [ARGUMENT]...]", nargs=-1, type=click.UNPROCESSED)
@click.option("-f", "--from", "source", type=click.Path(path_type=Path), help="File with one key.")
@click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the passphrase; a newline at its end doesn't count.",
)
@_register_options
@click.option(
    "--image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Image file whose measurements the enclave has to have, in place of --pcr0.",
)
@click.option("--module", metavar="ID", help="Module id that the enclave has to have, i-...-enc...")
@click.option("--root", metavar="HEX", help="SHA-256 of another root certificate than AWS's.")
def seal_for(
    command: tuple[str, ...],
    *,
    source: Path | None,
    password_file: Path | None,
    image: Path | None,
    module: str | None,
    root: str | None,
    **registers: tuple[str, ...],
) -> None:
    """Seal secret keys for an enclave that proves what it is; for the operator's own machine, never the host.

    COMMAND reaches `signer import --sealed` on the host, mostly over SSH:

    \b
        signer seal-for --from key.pem --pcr0 HEX -- ssh baker signer import --sealed -v nitro

    The host's enclave attests itself to this machine, which compares it with --pcr0 or --image, and seals the key for
    that enclave alone: the host sees ciphertext. Without COMMAND the lines go over standard output and input, and
    --from is needed. Keys are read as by `signer import`.
    """
    if command and secret_keys.looks_like_one(command[0]):  # it would be shown as a program that can't be found
        raise click.UsageError(
            "secret keys are no arguments, where everybody sees them: use --from, standard input or the prompt. This "
            "one is in the shell's history now"
        )
    configure_logs()
    wanted = _wanted(registers, image)
    if not command and source is None:
        raise click.UsageError("--from is needed: standard input is the way from the host, as there is no COMMAND")
    fingerprint = _fingerprint(root)
    keys = secret_keys.parse_all(secret_keys.read((), source), secret_keys.passphrase(None, password_file))
    try:
        with _line(command) as line:
            for number, key in enumerate(keys, 1):
                _import_one(line, key, wanted, module, fingerprint, where=secret_keys.which(number, keys))
    finally:
        for key in keys:
            key.wipe()


def _wanted(registers: dict[str, tuple[str, ...]], image: Path | None) -> dict[int, frozenset[bytes]]:
    wanted: dict[int, frozenset[bytes]] = {}
    for number in _REGISTERS:
        values = frozenset(_hex(text, 48, f"--pcr{number}") for text in registers[f"pcr{number}"])
        if number in _DEBUG_REGISTERS and any(not any(value) for value in values):
            raise click.UsageError(f"--pcr{number}: a register of zeros is that of debug mode, never that of an image")
        if values:
            wanted[number] = values
    if image is not None:
        from signer.image.measure import measure_file

        for number, value in measure_file(image).registers.items():
            if number in wanted and value not in wanted[number]:
                raise click.UsageError(f"--pcr{number} and --image differ: the image has {value.hex()}")
            wanted[number] = frozenset([value])
    if 0 not in wanted:
        raise click.UsageError("--pcr0 or --image is needed: it says which program may have the key")
    return wanted


def _fingerprint(root: str | None) -> bytes | None:
    if root is None:
        return None
    click.echo("WARNING: documents are verified to another root than AWS's", err=True)
    return _hex(root.replace(":", ""), 32, "--root")


def _hex(text: str, size: int, option: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != size:
        raise click.UsageError(f"{option}: expected {2 * size} hexadecimal digits")
    return value


def _standard_output() -> IO[bytes]:
    if sys.stdout is None:
        raise ImportError_("standard output is closed, and it is the way to the other side")
    return sys.stdout.buffer


@contextmanager
def _line(command: Sequence[str]) -> Iterator[_Line]:
    """The way to the host: over *command*, which is ended after it, or over our own output and input."""
    if not command:
        yield _Line(_standard_output(), standard_input(), "the other side")
        return
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as exc:
        raise ImportError_(f"cannot run {command[0]}: {exc.strerror}") from exc
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield _Line(process.stdin, _Pipe(process.stdout.fileno(), command[0]), command[0])
        process.stdin.close()
        status = process.wait(_END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise ImportError_(f"{command[0]} did not end within {_END_TIMEOUT:g} s, after the keys were stored") from None
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):  # of what it did not take
            process.stdin.close()
    if status != 0:
        raise ImportError_(f"{command[0]} ended with status {status}, after the keys were stored")


def _import_one(
    line: _Line,
    key: SecretKey,
    pcrs: dict[int, frozenset[bytes]],
    module: str | None,
    root: bytes | None,
    *,
    where: str,
) -> None:
    import secrets
    from datetime import UTC, datetime

    from signer.attestation.document import ROOT_SHA256, Expected
    from signer.errors import SignerError
    from signer.vaults.nitro import sealed_import as lines

    nonce = secrets.token_bytes(lines.NONCE_SIZE)
    expected = Expected(
        nonce=nonce, module_id=module, pcrs=pcrs, needs_public_key=True, root_sha256=root or ROOT_SHA256
    )
    try:
        answer = lines.read_answer(line.ask(lines.Question(nonce).line()))
        order, document = lines.seal_for(answer.document, key, expected, now=datetime.now(UTC))
        _show(document, order.address)
        imported = lines.read_imported(_send(line, lines.order_line(order)))
    except SignerError as exc:
        raise ImportError_(f"{where}{exc}") from exc
    if imported.public_key != key.public_key:
        raise ImportError_(
            f"{where}the host says that it stored {imported.public_key.hash} for {key.public_key.hash}: "
            "don't trust it; the secret key was sealed for the enclave, and nobody else has it"
        )
    click.echo(f"stored: {imported.public_key.hash}", err=True)


def _send(line: _Line, order: bytes) -> bytes:
    """The answer to *order*; whoever hears none doesn't know what became of the key."""
    try:
        return line.ask(order)
    except ImportError_ as exc:
        raise ImportError_(f"{exc}; {_MAY_BE_STORED}") from exc
    except KeyboardInterrupt:
        click.echo(f"interrupted: {_MAY_BE_STORED}", err=True)
        raise


def _show(document: Document, address: str) -> None:
    instance, _, _ = document.module_id.partition("-enc")
    click.echo(
        f"sealing {address} for the enclave {document.module_id} on instance {instance}, "
        f"attested at {document.made_at:%Y-%m-%d %H:%M:%S} UTC, with\n  PCR0 {document.pcrs[0].hex()}",
        err=True,
    )


# -- the host's side


async def import_sealed(vault: NitroVault) -> None:
    """Pass on between standard input and output, and the enclave, until the input ends."""
    import structlog
    import trio

    from signer.errors import SignerError
    from signer.vaults.nitro import sealed_import as lines

    log = structlog.get_logger("signer.import")

    outgoing = _standard_output()
    is_closed = sys.stdin is None
    incoming: _Lines = standard_input() if is_closed else _Pipe(sys.stdin.fileno(), "the operator", in_time=False)

    async def read() -> bytes:
        return await trio.to_thread.run_sync(incoming.readline, lines.MAX_LINE + 1, abandon_on_cancel=True)

    def write(line: bytes) -> None:
        outgoing.write(line)
        outgoing.flush()

    if not is_closed and sys.stdin.isatty():
        click.echo(
            "waiting for the lines of `signer seal-for`, which runs on the operator's machine and starts this command: "
            f"signer seal-for --pcr0 HEX -- ssh HOST signer import --sealed -v {vault.name}",
            err=True,
        )
    while asked := await read():
        try:
            question = lines.read_question(asked)
            write(lines.Answer(await vault.attest_import(question.nonce)).line())
            ordered = await read()
            if not ordered:
                raise ImportError_("the operator's machine went away before it sealed a key; nothing was stored")
            order = lines.read_order(ordered)
            log.info("Requesting import operation", pkh=order.address, vault=vault.kind)
            key = await vault.import_sealed(order)
        except SignerError as exc:
            write(lines.refusal(str(exc)))
            raise
        log.info("Successfully imported", pkh=str(key.hash), vault=vault.kind)
        write(lines.Imported(key).line())


COMMANDS = (seal_for,)
