"""`signer kms-policy`: print the key policy for the sealing key, or judge the one in force."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from signer.cli.common import DEFAULT_CONFIG, CliCommand, config_path, configure_logs, load_settings, standard_input
from signer.errors import ConfigurationError, SignerError

if TYPE_CHECKING:
    from signer.aws.kms_key import KeyState
    from signer.aws.kms_review import Finding, Running
    from signer.config import NitroSettings

_REGISTERS = ("PCR0", "PCR1", "PCR2", "PCR3", "PCR8")
_MAX_FILE = 1024 * 1024  # bytes; KMS takes 32 KiB
_NOTHING_FOUND, _FOUND, _CANNOT_CHECK = 0, 1, 2


def _register_options(command: Callable[..., object]) -> Callable[..., object]:
    told = {
        "PCR0": "The image's PCR0, as nitro-cli build-enclave prints it; repeat it for a rolling update.",
        "PCR3": "PCR3: the parent's role.",
        "PCR8": "PCR8: the certificate that signed the image.",
    }
    for name in reversed(_REGISTERS):
        option = click.option(
            f"--{name.lower()}", metavar="HEX", multiple=True, help=told.get(name, f"{name}, likewise.")
        )
        command = option(command)
    return command


@click.command("kms-policy", cls=CliCommand)
@_register_options
@click.option("--role", metavar="ROLE", default="", help="Role of the parent instance: ARN, or name.")
@click.option("--account", metavar="ID", default="", help="Account of the key. [default: that of the role's ARN]")
@click.option("--admin", "admins", metavar="ARN", multiple=True, help="Who administers the key; may be repeated.")
@click.option("--region", metavar="REGION", default="", help="Region of the key.")
@click.option("--partition", type=click.Choice(["aws", "aws-cn", "aws-us-gov"]), help="[default: by ARN, region]")
@click.option("--check", "key", metavar="KEY", help="Judge the policy in force: key id, ARN or alias/NAME.")
@click.option("--check-file", "file", metavar="FILE", help="Judge the policy in FILE; -: standard input.")
def kms_policy(
    *,
    role: str,
    account: str,
    admins: tuple[str, ...],
    region: str,
    partition: str | None,
    key: str | None,
    file: str | None,
    **registers: tuple[str, ...],
) -> int:
    """Print the policy of the KMS key that seals an enclave's keys, or judge one.

    Without --check and --check-file: the policy as JSON, from --pcr0, --role and --account. Give it to `aws kms
    create-key --policy` or `put-key-policy`.

    With one of them: what is missing or too wide. The enclave that runs here (by nitro-cli), expected_pcrs of the
    configuration and the values of --pcr0 are compared with it. Exit status 0: nothing found, 1: findings, 2: it could
    not be checked.
    """
    from signer.aws.kms_policy import partition_of

    if "" in (key, file):  # a script whose variable is not set, and to which status 0 would mean: nothing found
        raise click.UsageError("--check and --check-file take a key and a file, not an empty text")
    if key and file:
        raise click.UsageError("give one of --check and --check-file")
    if (key or file) and admins:
        raise click.UsageError("--admin is for the policy to print")
    checked = {name: registers[name.lower()] for name in _REGISTERS if registers[name.lower()]}
    where = partition or partition_of(arn=role, region=region)
    if not (key or file):
        click.echo(_printed(checked, role=role, account=account, admins=admins, partition=where), nl=False)
        return 0
    given = _measurements(checked)  # these are faults of the options, not of what is checked
    if role or account:
        account = _account(account, role)
    role = _role(role, account=account, partition=where) if role else ""
    configure_logs()
    try:
        found = _check(key or "", file or "", given, role=role, account=account, region=region)
    except SignerError as exc:
        click.echo(f"Error: cannot check: {exc}", err=True)
        return _CANNOT_CHECK
    except OSError as exc:
        click.echo(f"Error: cannot check: {exc.filename or file or key}: {exc.strerror or exc}", err=True)
        return _CANNOT_CHECK
    return _FOUND if found else _NOTHING_FOUND


# -- print


def _printed(
    registers: Mapping[str, Sequence[str]], *, role: str, account: str, admins: Sequence[str], partition: str
) -> str:
    from signer.aws.kms_policy import Key, as_text, key_policy

    if "PCR0" not in registers or not role:
        raise click.UsageError("--pcr0 and --role are needed to print a policy; --check KEY judges one")
    account = _account(account, role)
    arn = _role(role, account=account, partition=partition)
    for admin in admins:
        _check_admin(admin, arn, partition)
    return as_text(
        key_policy(
            Key(
                account=account,
                role=arn,
                registers=_measurements(registers),
                administrators=admins,
                partition=partition,
            )
        )
    )


def _account(account: str, role: str) -> str:
    from signer.aws.kms_statements import role_identity

    found = account or next(iter(role_identity(role) or ()), "")
    if not found:
        raise click.UsageError("--account is needed: the twelve digits of the key's account")
    if not re.fullmatch("[0-9]{12}", found):
        raise click.UsageError(f"--account {found}: expected twelve digits")
    return found


def _role(role: str, *, account: str, partition: str) -> str:
    from signer.aws.kms_policy import role_arn

    arn = role_arn(role, account=account, partition=partition)
    if ":assumed-role/" in role:
        click.echo(f"Note: the ARN of a session does not tell a role's path; taken for {arn}", err=True)
    return arn


def _check_admin(admin: str, role: str, partition: str) -> None:
    """Who administers is not the parent's role: an intruder there would write a policy of his own."""
    from signer.aws.kms_policy import NAME_WITH_PATH
    from signer.aws.kms_statements import Principal

    if not re.fullmatch(rf"arn:{partition}:iam::[0-9]{{12}}:(role|user)/{NAME_WITH_PATH}", admin, re.ASCII):
        raise ConfigurationError(f"--admin {admin}: expected arn:{partition}:iam::ACCOUNT:role/NAME, or user/NAME")
    if Principal("AWS", admin).account != Principal("AWS", role).account:
        raise ConfigurationError(f"--admin {admin}: KMS lets nobody of another account change the policy of a key")
    if Principal("AWS", admin).is_role(role):
        raise ConfigurationError(
            "--admin and --role are the same: whoever gets onto the parent could change the policy"
        )


def _measurements(registers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    from signer.aws.kms_policy import measurement

    return {name: [measurement(name, one) for one in values] for name, values in registers.items()}


# -- check


def _check(
    key: str,
    file: str,
    registers: Mapping[str, Sequence[str]],
    *,
    role: str,
    account: str,
    region: str,
) -> list[Finding]:
    from signer.aws.kms_review import Expected, review
    from signer.aws.kms_statements import parse_policy

    given = {f"--{name.lower()}": {name: values} for name, values in registers.items()}
    vaults = _vaults()
    state = _read(key, vaults, region) if key else None
    statements = parse_policy(_text(file) if state is None else state.policy)
    keys = {key, state.key} if state else set()
    concerned = _concerned(vaults, keys)
    if others := _sealed_by_others(vaults, keys):
        click.echo(f"Note: nothing of this host was compared: {others}: encryption_key_id is another key", err=True)
    expected = Expected(
        role=role,
        account=account or (state.account if state else ""),
        running=() if others else _running(concerned),
        required=[*registers],
        releases=given | {f"{name}: expected_pcrs": one.expected_pcrs for name, one in concerned.items()},
    )
    found = review(statements, expected, state.grants if state else ())
    if state is not None:
        found = [*state.findings(), *found]
        for note in state.notes:
            click.echo(f"Note: {note}", err=True)
    _show(found, state.key if state else file)
    return found


def _vaults() -> dict[str, NitroSettings]:
    """The nitro vaults of the configuration; none where the file that nobody has named isn't there."""
    from signer.config import NitroSettings

    path = config_path()
    if path == DEFAULT_CONFIG and not Path(path).exists():
        return {}
    try:
        vaults = load_settings(prepare=False).vaults
    except ConfigurationError as exc:
        raise ConfigurationError(f'{exc}\n-c "" leaves the configuration out') from exc
    return {name: vault.config for name, vault in vaults.items() if isinstance(vault.config, NitroSettings)}


def _concerned(vaults: Mapping[str, NitroSettings], keys: Collection[str]) -> Mapping[str, NitroSettings]:
    """The vaults sealed by the key; where none says so (an alias, a file), the only one."""
    ids = {_key_id(one) for one in keys}
    sealed = {name: one for name, one in vaults.items() if _key_id(one.encryption_key_id) in ids}
    return sealed or (vaults if len(vaults) == 1 and not _sealed_by_others(vaults, keys) else {})


def _sealed_by_others(vaults: Mapping[str, NitroSettings], keys: Collection[str]) -> str:
    """The names of all vaults, where each of them says that another key seals it; an alias doesn't say which."""
    ids = {_key_id(one) for one in keys if one and "alias/" not in one}
    own = [_key_id(one.encryption_key_id) for one in vaults.values() if "alias/" not in one.encryption_key_id]
    return ", ".join(vaults) if ids and len(own) == len(vaults) and all(one and one not in ids for one in own) else ""


def _key_id(key: str) -> str:
    return key.rpartition("/")[2]


def _text(file: str) -> str:
    if file == "-":
        data = standard_input().read(_MAX_FILE + 1)
    else:
        with Path(file).open("rb") as source:
            data = source.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ConfigurationError(f"{file} has more than {_MAX_FILE} bytes: that is no key policy")
    return data.decode("utf-8-sig", errors="replace")


def _read(key: str, vaults: Mapping[str, NitroSettings], region: str) -> KeyState:
    import trio

    from signer.aws.client import AwsClient
    from signer.aws.kms_key import read_key
    from signer.config.models import AwsCredentials

    sealed = _concerned(vaults, {key}) or (vaults if len(vaults) == 1 else {})
    own = next((one.credentials for one in sealed.values()), AwsCredentials())
    in_arn = key.split(":")[3] if key.startswith("arn:") and key.count(":") >= 5 else ""
    credentials = own.model_copy(update={"region": region or in_arn or own.region})
    return trio.run(read_key, AwsClient("kms", credentials, component="kms-policy"), key)


def _running(vaults: Mapping[str, NitroSettings]) -> tuple[Running, ...]:
    """The enclaves that run here; where that can't be known, it is said, and they are not compared."""
    import trio

    from signer.aws.kms_review import Running
    from signer.vaults.nitro import discovery
    from signer.vaults.nitro.describe import Wanted, choose

    found: list[Running] = []
    try:
        listed = trio.run(discovery.listing)
        wanted = [Wanted(name=one.enclave_name, cid=one.fixed_cid, allow_debug=True) for one in vaults.values()]
        for one in wanted or [Wanted(allow_debug=True)]:
            enclave = choose(listed, one)
            measured = {name: enclave.measurements[name] for name in _REGISTERS if name in enclave.measurements}
            found.append(Running(name=str(enclave.name), measurements=measured, is_debug=enclave.is_debug))
    except discovery.DiscoveryError as exc:
        click.echo(f"Note: the enclave that runs was not compared: {exc}", err=True)
    return tuple(found)


def _printable(line: str) -> str:
    """Without what moves the cursor or starts a line: Sids and values are the text of whoever wrote the policy."""
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in line)


def _show(found: Sequence[Finding], subject: str) -> None:
    for one in found:
        click.echo(_printable(f"{one.severity}: {one.where}: {one.text}"))
        click.echo(_printable(f"    {one.advice[0].upper()}{one.advice[1:]}."))
    errors = sum(one.severity == "error" for one in found)
    if not found:
        click.echo("nothing found")
    sys.stdout.flush()
    click.echo(f"{subject}: {errors} error(s), {len(found) - errors} warning(s)", err=True)


COMMANDS = (kms_policy,)
