"""`signer demo`: the whole signer on one machine, with the enclave program as a child process.

Everything is the real thing (HTTP, policy, durable watermarks, the wire to the enclave) except the sealing, which
protects nothing. The keys are kept in the demo's directory and found again on the next run.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from signer.cli.common import CliCommand, Globals, configure_logs
from signer.errors import ConfigurationError

if TYPE_CHECKING:
    from signer.config import Settings
    from signer.service import Serving
    from signer.tezos.keys import PublicKey

TYPES = ("tz1", "tz2", "tz3", "tz4")
_PORT = 2000
_EPOCH = 1_577_836_800  # 2020-01-01: levels are the seconds since, so they rise from run to run
_CHAIN_ID = blake2b(b"nitro-signer demo", digest_size=4).digest()  # of no network
_ENCLAVE_START = 10.0  # seconds
_MAX_SOCKET_PATH = 100  # bytes; the kernel's limit is 107, and a port is appended
_WARNING = "The keys are sealed under a file of this machine: this protects nothing. Never use them for real funds."


@dataclass(frozen=True)
class _Paths:
    """The files of a demo."""

    directory: Path
    socket: Path

    @property
    def configuration(self) -> Path:
        return self.directory / "signatory.yaml"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def development_key(self) -> Path:
        return self.directory / "development.key"

    @property
    def enclave_log(self) -> Path:
        return self.directory / "enclave.log"


def _parse_keys(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    if not values:
        return dict.fromkeys(TYPES, 1)
    wanted: dict[str, int] = {}
    for value in values:
        kind, _, number = value.partition("=")
        if kind not in TYPES or not (number.isascii() and number.isdigit()) or int(number) > 1000:
            raise click.BadParameter(f"expected {'|'.join(TYPES)}=NUMBER, at most 1000, got {value!r}")
        wanted[kind] = int(number)
    if not any(wanted.values()):
        raise click.BadParameter("a demo needs at least one key")
    return wanted


@click.command(cls=CliCommand)
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=".demo",
    help="Where keys and marks are kept. [default: .demo]",
)
@click.option("--address", default="127.0.0.1:6732", help="Signing API. [default: 127.0.0.1:6732]")
@click.option("--utility-address", default="127.0.0.1:9583", help="Metrics and health. [default: 127.0.0.1:9583]")
@click.option(
    "--keys",
    metavar="TYPE=N",
    multiple=True,
    callback=_parse_keys,
    help="How many keys of a type; repeatable. [default: one each of tz1 to tz4]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object once ready, and nothing else.")
def demo(directory: Path, *, address: str, utility_address: str, keys: dict[str, int], as_json: bool) -> None:
    """Run the whole signer here, with an enclave process that protects nothing."""
    flags = click.get_current_context().ensure_object(Globals)
    flags.log = flags.log or "error"  # the terminal belongs to what the demo prints
    configure_logs()
    with _paths(directory) as paths, _enclave(paths) as child:
        import trio

        trio.run(_Demo(paths, address, utility_address, keys, child, as_json=as_json).run)


@contextmanager
def _paths(directory: Path) -> Iterator[_Paths]:
    """The demo's directory, locked against a second demo."""
    directory = directory.absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigurationError(f"cannot use the directory {directory}: {exc.strerror}") from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(lock)
        raise ConfigurationError(f"another demo runs in {directory}; give this one another --dir") from exc
    try:
        socket = directory / "enclave.sock"
        if len(os.fsencode(socket)) <= _MAX_SOCKET_PATH:
            yield _Paths(directory, socket)
        else:
            with tempfile.TemporaryDirectory(prefix="nitro-signer-") as short:
                yield _Paths(directory, Path(short) / "enclave.sock")
    finally:
        os.close(lock)


@contextmanager
def _enclave(paths: _Paths) -> Iterator[subprocess.Popen[bytes]]:
    """The enclave program as a child, in a session of its own: Ctrl-C is for the signer, which drains first."""
    command = [sys.executable, "-m", "signer.enclave", "--listen", f"unix:{paths.socket}:{_PORT}"]
    command += ["--sealing", "local", "--development", "--key-file", str(paths.development_key), "--exit-with-parent"]
    with paths.enclave_log.open("ab") as log:
        # Not trio.run_process: it forks in a worker thread, and the kernel would take that thread's end for ours.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class _Demo:
    def __init__(
        self,
        paths: _Paths,
        address: str,
        utility_address: str,
        wanted: dict[str, int],
        child: subprocess.Popen[bytes],
        *,
        as_json: bool,
    ) -> None:
        self._paths = paths
        self._address = address
        self._utility_address = utility_address
        self._wanted = wanted
        self._child = child
        self._as_json = as_json

    async def run(self) -> None:
        from signer import config, service

        settings = self._settings([])
        config.prepare_base_dir(settings)
        await self._wait_for_enclave()
        async with self._watched():
            stored = self._stored()
            if self._missing(stored):
                stored = await self._make_keys(settings)
            settings = self._settings(stored)
            await service.serve(settings, no_list=True, on_ready=self._ready)

    # -- the enclave process

    async def _wait_for_enclave(self) -> None:
        import trio

        deadline = time.monotonic() + _ENCLAVE_START
        while not self._paths.socket.exists() or not await self._accepts():
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise self._enclave_failed()
            await trio.sleep(0.01)

    async def _accepts(self) -> bool:
        from proxy.address import UnixAddress, connect

        with suppress(OSError):
            stream = await connect(UnixAddress(str(self._paths.socket), _PORT))
            await stream.aclose()
            return True
        return False

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """End with an error if the enclave process ends."""

        from signer.supervise import open_nursery

        async with open_nursery() as nursery:
            nursery.start_soon(self._watch)
            yield
            nursery.cancel_scope.cancel()

    async def _watch(self) -> None:
        import trio

        descriptor = os.pidfd_open(self._child.pid)
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)
        raise self._enclave_failed()

    def _enclave_failed(self) -> ConfigurationError:
        return ConfigurationError(
            f"the enclave process has ended or does not answer; its log: {self._paths.enclave_log}"
        )

    # -- keys and settings

    def _stored(self) -> list[str]:
        from signer.vaults.nitro.storage import FileStorage

        return [key.public_key_hash for key in FileStorage(self._paths.state / "enclave_keys.json").load()]

    def _missing(self, stored: list[str]) -> dict[str, int]:
        counts = {kind: sum(address.startswith(kind) for address in stored) for kind in TYPES}
        return {kind: number - counts[kind] for kind, number in self._wanted.items() if number > counts[kind]}

    async def _make_keys(self, settings: Settings) -> list[str]:
        """Make the keys that are missing, one type after the other so that the order is the same each time."""
        from signer import service
        from signer.tezos.keys import Curve

        curves = dict(zip(TYPES, Curve, strict=True))
        async with service.open_vaults(settings) as vaults:
            if "demo" not in vaults:
                raise self._enclave_failed()
            vault = vaults["demo"]
            for kind, number in self._missing([*map(str, vault.keys())]).items():
                for _ in range(number):
                    await vault.generate(curves[kind])
        return self._stored()

    def _settings(self, addresses: list[str]) -> Settings:
        """Write the configuration of the demo, as an operator would, and load it."""
        import yaml

        from signer import config
        from signer.tezos.kinds import OPERATION_KINDS, REQUEST_KINDS

        allow = {kind: list(OPERATION_KINDS) if kind == "generic" else None for kind in REQUEST_KINDS}
        tree: dict[str, Any] = {
            "base_dir": config.escaped(str(self._paths.state), path=True),
            "server": {"address": self._address, "utility_address": self._utility_address, "known_keys": True},
            "vaults": {
                "demo": {
                    "driver": "nitro",
                    "config": {
                        "enclave_address": config.escaped(f"unix:{self._paths.socket}:{_PORT}"),
                        "encryption_key_id": "development",
                        "credentials": {"access_key_id": "none", "secret_access_key": "none", "region": "none"},
                    },
                }
            },
            "tezos": {
                address: {"allow": allow, "allow_proof_of_possession": address.startswith("tz4")}
                for address in addresses
            },
        }
        temporary = self._paths.configuration.with_suffix(".tmp")
        temporary.write_text("# Written anew by each `signer demo`.\n" + yaml.safe_dump(tree, sort_keys=False))
        temporary.replace(self._paths.configuration)
        return config.load(config.escaped(str(self._paths.configuration), path=True), environ={})

    # -- once it serves

    async def _ready(self, serving: Serving) -> None:
        import trio

        keys = self._shown([key.key.public_key for key in serving.keys])
        await trio.to_thread.run_sync(self._sign_and_verify, serving.url, keys)
        text = self._json(serving, keys) if self._as_json else self._text(serving, keys)
        click.echo(text)
        sys.stdout.flush()

    def _shown(self, keys: list[PublicKey]) -> list[PublicKey]:
        """As many keys of each type as were asked for, in the order of the types."""
        shown: list[PublicKey] = []
        for kind in TYPES:
            of_kind = [key for key in keys if key.curve.address_prefix == kind]
            shown += of_kind[: self._wanted.get(kind, 0)]
        return shown

    def _sign_and_verify(self, url: str, keys: list[PublicKey]) -> None:
        """One attestation with each key over HTTP, verified; blocks."""
        from signer import crypto
        from signer.tezos.keys import Signature

        level = int(time.time()) - _EPOCH
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        try:
            for key in keys:
                message = _attestation(key, level)
                connection.request("POST", f"/keys/{key.hash}", json.dumps(message.hex()))
                answer = connection.getresponse().read()
                signature = json.loads(answer).get("signature") if answer.startswith(b"{") else None
                if signature is None or not crypto.verify(key, message, Signature.from_base58(signature)):
                    raise ConfigurationError(f"the self-test of {key.hash} failed: {answer.decode(errors='replace')}")
        except OSError as exc:
            raise ConfigurationError(f"the self-test failed: {exc}") from exc
        finally:
            connection.close()

    def _json(self, serving: Serving, keys: list[PublicKey]) -> str:
        listed = [
            {"type": key.curve.address_prefix, "public_key_hash": str(key.hash), "public_key": str(key)} for key in keys
        ]
        return json.dumps({"url": serving.url, "utility_url": serving.utility_url, "keys": listed})

    def _text(self, serving: Serving, keys: list[PublicKey]) -> str:
        lines = [
            f"Signing API      {serving.url}",
            f"Metrics, health  {serving.utility_url}/metrics, {serving.utility_url}/healthz",
            f"Configuration    {self._paths.configuration}",
            "",
            f"Keys (each has signed an attestation over HTTP, and the signature was verified): {len(keys)}",
        ]
        lines += [f"  {key.hash}  {key}" for key in keys]
        if keys:
            message = _attestation(keys[0], int(time.time()) - _EPOCH + 1)
            body = shlex.quote(json.dumps(message.hex()))
            lines += ["", "Sign an attestation:", f"  curl -d {body} {serving.url}/keys/{keys[0].hash}"]
        lines += ["", "Use them from an Octez client:"]
        lines += [
            f"  octez-client import secret key demo-{key.curve.address_prefix}-{number} {serving.url}/{key.hash}"
            for number, key in enumerate(keys, 1)
        ]
        return "\n".join([*lines, "", f"WARNING: {_WARNING}", "Ctrl-C stops."])


def _attestation(key: PublicKey, level: int) -> bytes:
    """An attestation of *level* on the demo's own chain, in the form that the key's curve signs."""
    from signer.tezos.keys import Curve

    branch, payload = bytes(32), bytes(32)
    place = level.to_bytes(4, "big") + bytes(4)
    head = b"\x13" + _CHAIN_ID + branch
    if key.curve is Curve.BLS12_381:
        return head + b"\x29" + place + payload
    return head + b"\x15" + bytes(2) + place + payload


COMMANDS = (demo,)
