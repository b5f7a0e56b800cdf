"""The program of an image as a process without an enclave: its security module is that of the tests.

    python -m tests.attested.enclave --listen unix:DIR/v.sock:2000 --kms PORT --ca-file ca.pem

Everything else is what an image runs: duties, sealing by KMS over TLS, sessions. Documents are signed under the root of
the tests, so a host admits it by `attestation_root`.
"""

import argparse
from functools import partial
from pathlib import Path

import trio

from proxy.address import parse
from signer.enclave import __main__ as image
from signer.enclave import program
from signer.enclave.clock import Clock
from signer.enclave.nsm.interface import Nsm
from signer.enclave.settings import Settings
from tests.attested.documents import PCRS, register
from tests.attested.nsm import FakeNsm


def registers_of(name: str) -> dict[int, bytes]:
    """The registers of an image called *name*; "" is the one of `PCRS`."""
    return PCRS | {0: register(name.encode())} if name else PCRS


async def _no_seed(_nsm: Nsm) -> int:
    return 1024  # the kernel of the tests is not ours to seed


def _no_step(_which: int, _to: float) -> None:
    raise PermissionError(1, "not in a test")


async def _run(arguments: argparse.Namespace) -> None:
    nsm = FakeNsm(pcrs=registers_of(arguments.image), debug=arguments.debug)
    running = await program.start(
        nsm,
        Settings(strict=arguments.strict),
        partial(trio.open_tcp_stream, "127.0.0.1", arguments.kms),
        roots=arguments.ca_file.read_text,
        clock=Clock(step=_no_step),
        seed=_no_seed,
    )
    try:
        await image._run(parse(arguments.listen), running.new_session, running.tend, log_port=2001)
    finally:
        await running.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.attested.enclave")
    parser.add_argument("--listen", required=True, metavar="ADDRESS")
    parser.add_argument("--kms", type=int, required=True, metavar="PORT", help="of the fake KMS, on loopback")
    parser.add_argument("--ca-file", type=Path, required=True)
    parser.add_argument("--image", default="", metavar="NAME", help="another image than the usual one")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--strict", action="store_true")
    trio.run(_run, parser.parse_args())


if __name__ == "__main__":
    main()
