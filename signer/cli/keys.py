"""Keys in vaults: `list`, `import`, `generate`, `prove-possession`."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from signer.cli import secret_keys
from signer.cli.common import CliCommand, configure_logs, load_settings
from signer.cli.secret_keys import ImportError_
from signer.errors import ConfigurationError, SignerError

if TYPE_CHECKING:
    from signer.config import Settings
    from signer.crypto.interface import SecretKey
    from signer.service import ListedKey
    from signer.tezos.keys import PublicKey
    from signer.vaults.interface import Vault

_TYPES = {
    "ed25519": "ED25519",
    "tz1": "ED25519",
    "secp256k1": "SECP256K1",
    "tz2": "SECP256K1",
    "p256": "P256",
    "tz3": "P256",
    "bls": "BLS12_381",
    "tz4": "BLS12_381",
}
_CAN_CREATE = ("NitroEnclave",)


def _with_vaults(work: Callable[[Settings, Mapping[str, Vault]], Awaitable[None]]) -> None:
    """Run *work* with the configured vaults connected."""
    import trio

    from signer import service

    settings = load_settings()

    async def run() -> None:
        async with service.open_vaults(settings) as vaults:
            await work(settings, vaults)

    trio.run(run)


def _vault(settings: Settings, vaults: Mapping[str, Vault], name: str, operation: str) -> Vault:
    vault = vaults.get(name)
    if vault is None:
        raise ImportError_(f"import: {_not_found(settings, name)}")
    if vault.kind not in _CAN_CREATE:
        raise ImportError_(f"import: vault {name} doesn't support {operation} operation")
    return vault


def _not_found(settings: Settings, name: str) -> str:
    """The reference's text, and what to look at."""
    if name in settings.vaults:
        reason = "it is in the configuration but cannot be used now, the log above says why"
    elif settings.vaults:
        reason = f"the configuration has: {', '.join(settings.vaults)}"
    else:
        reason = "the configuration has no vaults"
    return f"vault {name} is not found; {reason}"


def _required(vault: str | None) -> str:
    if vault is None:
        raise click.UsageError('required flag(s) "vault" not set')
    return vault


@click.command("list", cls=CliCommand)
@click.option("-v", "--vault", metavar="NAME", help="Only the keys of this vault.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_command(*, vault: str | None, as_json: bool) -> None:
    """Print every key of every vault."""
    configure_logs()

    async def work(settings: Settings, vaults: Mapping[str, Vault]) -> None:
        from signer import service

        if vault is not None and vault not in vaults:
            raise ConfigurationError(_not_found(settings, vault))
        keys = service.listed_keys(settings, vaults)
        _print_keys([key for key in keys if vault in (None, key.vault.name)], as_json=as_json)

    _with_vaults(work)


def _print_keys(keys: list[ListedKey], *, as_json: bool) -> None:
    from signer.cli import listing

    if as_json:
        click.echo(json.dumps([listing.as_json(key) for key in keys]))
        return
    for key in keys:
        click.echo(listing.as_text(key))


@click.command(cls=CliCommand)
@click.option("-v", "--vault", metavar="NAME", help="The vault that makes the keys. [required]")
@click.option("-n", "--num", type=click.IntRange(1, 1000), default=1, help="How many. [default: 1]")
@click.option("-t", "--type", "key_type", default="ed25519", help="tz1, tz2, tz3, tz4 or the curve. [default: ed25519]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def generate(*, vault: str | None, num: int, key_type: str, as_json: bool) -> None:
    """Make new keys in a vault and print them. A running signer can use them at once."""
    from signer.tezos.keys import Curve

    configure_logs()
    if key_type not in _TYPES:
        raise click.UsageError(f"unknown key type: {key_type}")
    name, curve = _required(vault), Curve[_TYPES[key_type]]

    async def work(settings: Settings, vaults: Mapping[str, Vault]) -> None:
        target, made = _vault(settings, vaults, name, "generate"), []
        try:
            with _progress("generating", num) as advance:
                for _ in range(num):
                    made.append(await target.generate(curve))
                    advance()
        finally:
            _print_keys(_listed(settings, target, made), as_json=as_json)

    _with_vaults(work)


def _listed(settings: Settings, vault: Vault, keys: list[PublicKey]) -> list[ListedKey]:
    from signer import service

    hashes = {key.hash for key in keys}
    return [key for key in service.listed_keys(settings, {vault.name: vault}) if key.public_key_hash in hashes]


@click.command("import", cls=CliCommand)
@click.argument("secrets", metavar="[SECRET-KEY]...", nargs=-1)
@click.option("-v", "--vault", metavar="NAME", help="The vault that takes the keys. [required]")
@click.option("--password", metavar="TEXT", help="Passphrase of encrypted keys; better give it at the prompt.")
@click.option(
    "--password-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the passphrase; a newline at its end doesn't count.",
)
@click.option("-f", "--from", "source", type=click.Path(path_type=Path), help="File with one key.")
@click.option("-o", "--opt", "options", metavar="K:V[,K:V...]", multiple=True, help="Options of the vault.")
@click.option("--sealed", is_flag=True, help="The host's side of `signer seal-for`: sealed keys over standard input.")
def import_command(
    secrets: tuple[str, ...],
    *,
    vault: str | None,
    password: str | None,
    password_file: Path | None,
    source: Path | None,
    options: tuple[str, ...],
    sealed: bool,
) -> None:
    """Bring secret keys into a vault: from --from FILE, the arguments, standard input, or a prompt.

    --from and arguments exclude each other; without them standard input is read, or a prompt asks on a terminal.
    --from holds one key, standard input one or several, one a line.
    Base58 (plain or encrypted), PEM and DER are read. Prints nothing on success but log lines.
    """
    configure_logs()
    name = _required(vault)
    for option in options:
        parse_options(option)
    if sealed:
        if secrets or source or password or password_file:
            raise click.UsageError("--sealed takes no secret keys: they stay where `signer seal-for` runs")
        _with_vaults(lambda settings, vaults: _import_sealed(_vault(settings, vaults, name, "import")))
        return
    if secrets or password:
        click.echo(
            "WARNING: secrets given as arguments stay in the shell's history and were visible to every user of this "
            "machine; use --from, --password-file, standard input or the prompt",
            err=True,
        )
    if secrets and source is not None:
        # The reference takes the file and passes over the arguments: whoever gave both would miss keys.
        raise click.UsageError("give the keys by --from or as arguments, not both")
    keys = secret_keys.parse_all(secret_keys.read(secrets, source), secret_keys.passphrase(password, password_file))
    try:
        _with_vaults(lambda settings, vaults: _import_all(_vault(settings, vaults, name, "import"), keys))
    finally:
        for key in keys:
            key.wipe()


async def _import_sealed(vault: Vault) -> None:
    from signer.cli.sealing import import_sealed
    from signer.vaults.nitro.vault import NitroVault

    assert isinstance(vault, NitroVault)  # of those that can create
    await import_sealed(vault)


async def _import_all(vault: Vault, keys: list[SecretKey]) -> None:
    import structlog

    log = structlog.get_logger("signer.import")
    stored: list[str] = []
    with _progress("importing", len(keys)) as advance:
        for number, key in enumerate(keys, 1):
            pkh = str(key.public_key.hash)
            log.info("Requesting import operation", pkh=pkh, vault=vault.kind)
            try:
                await vault.import_key(key)
            except SignerError as exc:
                done = f"; stored before it: {', '.join(stored)}" if stored else ""
                raise ImportError_(f"{secret_keys.which(number, keys)}{exc}{done}") from exc
            log.info("Successfully imported", pkh=pkh, vault=vault.kind)
            stored.append(pkh)
            advance()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal where there is work to wait for."""
    if total < 3 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


@click.command(cls=CliCommand)
@click.argument("addresses", metavar="[PKH]...", nargs=-1)
@click.option("-v", "--vault", metavar="NAME", help="The nitro vault that holds the keys. [required]")
@click.option("--all", "everything", is_flag=True, help="Every key of the vault.")
@click.option("--yes", is_flag=True, help="Don't ask.")
def reseal(*, addresses: tuple[str, ...], vault: str | None, everything: bool, yes: bool) -> None:
    """Seal stored keys anew, in version 1: bound to their address, and never seen by KMS.

    There is no way back: tee-signer can't open them. Keep a copy of the old key file until the keys have signed.
    """
    from signer.errors import MalformedRequestError
    from signer.tezos.errors import TezosError
    from signer.tezos.keys import PublicKeyHash

    configure_logs()
    name = _required(vault)
    if bool(addresses) == everything:
        raise click.UsageError("give the addresses of keys, or --all")
    try:
        wanted = [PublicKeyHash.from_base58(address) for address in addresses]
    except TezosError as exc:
        raise MalformedRequestError(str(exc)) from exc
    if not yes:
        click.confirm("tee-signer can't open keys of version 1. Go on?", abort=True, err=True)

    async def work(settings: Settings, vaults: Mapping[str, Vault]) -> None:
        from signer.vaults.nitro.vault import NitroVault

        target = _vault(settings, vaults, name, "reseal")
        assert isinstance(target, NitroVault)  # of those that can create
        for key in wanted or list(target.keys()):
            done = await target.reseal(key)
            click.echo(f"{key}: {'sealed anew' if done else 'of version 1 already'}")
        left = sorted(target.health().skipped) if everything else ()
        if left:  # whoever turns the legacy format off after this must not lose them
            raise SignerError(f"not looked at, for the enclave does not open them: {', '.join(left)}")

    _with_vaults(work)


@click.command("prove-possession", cls=CliCommand)
@click.argument("pkh", metavar="PKH")
@click.option("-v", "--vault", metavar="NAME", help="The vault that holds the key. [default: any]")
@click.option("--bls-pk", metavar="BLpk...", help="Prove over this public key. [default: the key's own]")
def prove_possession(pkh: str, *, vault: str | None, bls_pk: str | None) -> None:
    """Print a proof of possession of a tz4 key; its policy needs allow_proof_of_possession."""
    from signer.errors import KeyNotFoundError, MalformedRequestError
    from signer.policy import check_possession, compile_policies
    from signer.tezos.errors import TezosError
    from signer.tezos.keys import PublicKey, PublicKeyHash

    configure_logs()
    try:
        key = PublicKeyHash.from_base58(pkh)
        over = PublicKey.from_base58(bls_pk) if bls_pk else None
    except TezosError as exc:
        raise MalformedRequestError(str(exc)) from exc

    async def work(settings: Settings, vaults: Mapping[str, Vault]) -> None:
        from signer.signing import verified_possession

        policy = compile_policies(settings).get(key)
        if policy is None:
            raise ConfigurationError(f"{key} is not listed in config")
        check_possession(policy)
        for name, candidate in vaults.items():
            found = candidate.keys().get(key)
            if found is not None and vault in (None, name):
                click.echo(str(await verified_possession(candidate, found, over)))
                return
        raise KeyNotFoundError("this key not found in any vault")

    _with_vaults(work)


def parse_options(text: str) -> dict[str, str]:
    """`name:value[,name:value…]`, values quoted with ' or " or escaped with a backslash (section 7.3)."""
    pairs: dict[str, str] = {}
    name: str | None = None
    current, quote, escaped = "", "", False
    for place, character in enumerate(text + ","):
        if escaped and place == len(text):
            break
        if escaped:
            current, escaped = current + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            current, quote = (current, "") if character == quote else (current + character, quote)
        elif character in "'\"" and name is not None:
            quote = character
        elif character == ":" and name is None:
            name, current = current, ""
        elif character == ",":
            if not name:
                raise click.UsageError(f"--opt {text}: expected name:value[,name:value...]")
            pairs[name], name, current = current, None, ""
        else:
            current += character
    if quote or escaped:
        raise click.UsageError(f"--opt {text}: a quote is not closed, or a backslash has nothing to escape")
    return pairs


COMMANDS = (list_command, import_command, generate, reseal, prove_possession)
