"""`python -m signer.enclave`: the program in the enclave, the peer of the host's nitro vault."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from proxy import output
from proxy.address import (
    VSOCK_ANY,
    Address,
    AddressError,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    connect,
    listen,
    listen_unix,
    parse,
    remove,
)
from signer.enclave import program
from signer.enclave.entropy import SeedError
from signer.enclave.hybrid import Greeter, Handler
from signer.enclave.log import say
from signer.enclave.nsm.device import open_device
from signer.enclave.nsm.interface import NoNsmError, NsmError
from signer.enclave.sealing.interface import Sealing
from signer.enclave.sealing.local import KeyFileError, LocalSealing, load_or_create_key_file
from signer.enclave.sealing.none import NoSealing
from signer.enclave.server import Server
from signer.enclave.session import Session
from signer.enclave.settings import Settings, SettingsError, read
from signer.enclave.stream import LogStream
from signer.process import end_with_parent, forbid_core_dumps

_USAGE_ERROR = 2  # exit status
_CLOSE_TIMEOUT = 1.0  # seconds for the connections to KMS; the enclave ends with the program

Task = Callable[[], Awaitable[None]]


class StartError(Exception):
    """The program cannot start; the text says why and what to do."""


class ListenError(Exception):
    """The address cannot be listened on; the text says why and what to do."""


class DutyError(Exception):
    """The security module, or what it has to do for this program, failed at the start."""


def main() -> None:
    """Parse the arguments, harden the process, serve until SIGTERM or SIGINT."""
    options = _parser().parse_args()
    try:
        _harden(exit_with_parent=options.exit_with_parent)
        settings = _settings()
        address = _address(options.listen, settings)
        if options.sealing == "kms":
            _forbid_development(options)
            trio.run(_run_attested, address, settings)
        else:
            trio.run(_run_development, address, _sealing(options), settings)
    except StartError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        sys.exit(_USAGE_ERROR)
    except (ListenError, DutyError, NoNsmError) as exc:
        print(f"Error: {exc}", file=sys.stderr)
        sys.exit(1)
    output.settle()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m signer.enclave",
        description="Keeps Tezos keys and signs with them, for a host that stores them sealed.",
    )
    parser.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="vsock:any:<port>, unix:<base>:<port> (hybrid vsock, without a hypervisor) or tcp:<host>:<port>; "
        "default vsock:any:$LISTEN_PORT, port 2000",
    )
    parser.add_argument(
        "--sealing",
        choices=["kms", "local", "none"],
        required=True,
        help="how keys are sealed for the host: kms = by AWS KMS, with attestation (inside an enclave), "
        "local = under a key file (development), none = not at all, in clear (tests of interoperation)",
    )
    parser.add_argument(
        "--development", action="store_true", help="confirm that the keys protect nothing; local and none need it"
    )
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        default="development.key",
        help="32 bytes, created with mode 0600 if absent; default %(default)s",
    )
    parser.add_argument("--exit-with-parent", action="store_true", help="end when the process that started this ends")
    return parser


def _settings() -> Settings:
    try:
        return read(os.environ)
    except SettingsError as exc:
        raise StartError(str(exc)) from exc


def _address(text: str | None, settings: Settings) -> Address:
    if text is None:
        return VsockAddress(VSOCK_ANY, settings.listen_port)
    try:
        return parse(text)
    except AddressError as exc:
        raise StartError(f"--listen: {exc}") from exc


def _forbid_development(options: argparse.Namespace) -> None:
    """Nobody shall believe that keys protect something, or nothing, where it is the other way round."""
    if options.development:
        raise StartError("--sealing kms is not for development: leave out --development, or take --sealing local")


def _sealing(options: argparse.Namespace) -> Sealing:
    if not options.development:
        raise StartError(
            f"--sealing {options.sealing} protects no key from the owner of this machine; "
            "it is for development only: add --development if that is what you want"
        )
    if options.sealing == "none":
        print("WARNING sealing is off: keys leave this program in clear", file=sys.stderr)
        return NoSealing()
    try:
        return LocalSealing(load_or_create_key_file(Path(options.key_file)))
    except KeyFileError as exc:
        raise StartError(str(exc)) from exc


async def _run_attested(address: Address, settings: Settings) -> None:
    """Serve from an image. Raises `NoNsmError`, `DutyError` and `ListenError`."""
    with open_device() as nsm:
        proxy = partial(connect, VsockAddress(settings.proxy_cid, settings.proxy_port))
        try:
            running = await program.start(nsm, settings, proxy)
        except (NsmError, SeedError) as exc:
            raise DutyError(f"the enclave program cannot start: {exc}") from exc
        try:
            await _run(address, running.new_session, running.tend, log_port=settings.log_port)
        finally:
            with trio.move_on_after(_CLOSE_TIMEOUT, shield=True):
                await running.aclose()


async def _run_development(address: Address, sealing: Sealing, settings: Settings) -> None:
    await _run(address, lambda: Session(sealing), log_port=settings.log_port)


async def _run(address: Address, new_session: Callable[[], Session], *tasks: Task, log_port: int) -> None:
    """Listen, then serve until a signal comes, with *tasks* and the log stream beside."""
    server, logs = Server(new_session), LogStream()
    listener = await _listen(address)
    log_listener = None
    if log_port and isinstance(address, VsockAddress):
        try:
            log_listener = await _listen(VsockAddress(address.cid, log_port))
        except ListenError as exc:
            say(f"no log stream: {exc}", "warning")  # signing does not depend on it
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, server)
        for task in tasks:
            nursery.start_soon(task)
        if log_listener is not None:
            nursery.start_soon(trio.serve_listeners, logs.serve, [log_listener])
        await _serve(address, server, listener, {log_port: logs.serve} if log_port else {})
        nursery.cancel_scope.cancel(reason="served to the end")


async def _serve(
    address: Address, server: Server, listener: trio.SocketListener, others: Mapping[int, Handler]
) -> None:
    match address:
        case UnixAddress(base, port):
            _announce(address)
            try:
                await server.serve(listener, greet=Greeter(port, others).greet)
            finally:
                remove(base)
        case TcpAddress(host, _):
            _announce(TcpAddress(host, listener.socket.getsockname()[1]))
            await server.serve(listener)
        case VsockAddress():
            _announce(address)
            await server.serve(listener)


async def _listen(address: Address) -> trio.SocketListener:
    """The guest's side of *address*; raises `ListenError`."""
    try:
        if isinstance(address, UnixAddress):
            return await listen_unix(address.base, mode=0o600)
        (listener, *others) = await listen(address)
    except OSError as exc:
        raise ListenError(f"cannot listen on {address}: {exc.strerror or exc}; {_advice(address, exc)}") from exc
    for other in others:
        await other.aclose()
    return listener


def _advice(address: Address, exc: OSError) -> str:
    match exc.errno:
        case errno.EADDRINUSE:
            return "another program listens there, perhaps an enclave program that is running already"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have that address; for vsock use vsock:any:<port>"
        case errno.EAFNOSUPPORT | errno.EPERM if isinstance(address, VsockAddress):
            return "there is no vsock here; without an enclave use unix:<base>:<port>"
        case errno.EEXIST:
            return "move the file away, or take another path"
        case errno.ENOENT | errno.ENOTDIR:
            return "make the directory first"
        case _:
            return "take another --listen"


async def _stop_on_signal(server: Server) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            server.stop()


def _announce(address: Address) -> None:
    say(f"listening on {address}")


def _harden(*, exit_with_parent: bool) -> None:
    try:
        if exit_with_parent and not end_with_parent():
            sys.exit(0)
        forbid_core_dumps()
    except OSError as exc:
        raise StartError(f"the process cannot be hardened: {exc.strerror}") from exc


if __name__ == "__main__":
    main()
