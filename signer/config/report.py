"""What to say about a configuration: its effective settings, warnings, and what it asks for in vain."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

from signer.config._yaml import Path as KeyPath
from signer.config.models import AUTO, DEFAULT_ENCLAVE_PORT, KEY_FILE, NitroSettings, Settings, Strict
from signer.config.policies import compile_policy
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash

_USER_INFO = re.compile("//[^/@]*@")  # of a URL
_HIDDEN = "(set, not shown)"


def warnings(settings: Settings) -> list[str]:
    """What works but should be changed, for a person."""
    found = [text for pkh, policy in settings.tezos.items() for text in compile_policy(pkh, policy).warnings]
    if settings.watermark.driver == "mem":
        found.append("watermark.driver: mem forgets every mark at exit; a restart can sign one slot twice")
    for name, vault in settings.vaults.items():
        if isinstance(vault.config, NitroSettings):
            found += [f"vaults.{name}.config.{text}" for text in _attestation_warnings(vault.config)]
    return found


def _attestation_warnings(nitro: NitroSettings) -> Iterator[str]:
    if nitro.attestation_root is not None:
        yield (
            "attestation_root: documents are verified to another root than AWS's: whoever holds its key can pass off "
            "anything as an enclave. Leave it out, but for another AWS partition or an emulator"
        )
    if nitro.judging != "off" and not nitro.pcrs:
        yield "attestation: without pcrs any image passes that isn't in debug mode; give at least PCR0"


def unsupported(settings: Settings) -> list[str]:
    """What the configuration asks for and this version doesn't do: the signer refuses to start, never ignores it."""
    return [settings.placed(path, text) for path, text in refusals(settings)]


def refusals(settings: Settings) -> list[tuple[KeyPath, str]]:
    """The same as paths and texts."""
    later = "not supported by this version of the signer; remove it, or stay with the signer that does it"
    found: list[tuple[KeyPath, str]] = []
    if settings.server.jwt is not None and settings.server.authorized_keys is not None:
        found.append((("server",), "cannot use both JWT and static authorized keys"))
    if settings.server.jwt is not None:
        found.append((("server", "jwt"), f"authentication by JWT is {later}"))
    if settings.server.authorized_keys is not None:
        found.append((("server", "authorized_keys"), f"client authentication is {later}"))
    if settings.policy_hook is not None and settings.policy_hook.address:
        found.append((("policy_hook",), f"the policy hook is {later}"))
    for pkh, policy in settings.tezos.items():
        if policy is not None and policy.authorized_keys is not None:
            found.append((("tezos", str(pkh), "authorized_keys"), f"client authentication is {later}"))
        if policy is not None and policy.jwt_users is not None:
            found.append((("tezos", str(pkh), "jwt_users"), f"authentication by JWT is {later}"))
    return found


def effective(settings: Settings) -> str:
    """All settings that count, defaults included, as YAML without secrets."""
    tree = _plain(settings)
    assert isinstance(tree, dict)
    for pkh, policy in settings.tezos.items():
        compiled = compile_policy(pkh, policy)
        entry = tree["tezos"][str(pkh)] or {}
        for old in ("allowed_operations", "allowed_kinds"):
            entry.pop(old, None)
        entry["allow"] = {kind: list(compiled.operations) if kind == "generic" else None for kind in compiled.requests}
        counts = policy is not None and policy.allow_proof_of_possession and pkh.curve is Curve.BLS12_381
        entry["allow_proof_of_possession"] = counts
        tree["tezos"][str(pkh)] = entry
    for name, vault in settings.vaults.items():
        config = tree["vaults"][name]["config"]
        if isinstance(vault.config, NitroSettings) and (config["storage"] or {}).get("config") is None:
            driver = (config["storage"] or {}).get("driver", "file")
            path = str(settings.base_dir / KEY_FILE) if driver == "file" else None
            config["storage"] = {"driver": driver, "config": path}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _place(nitro: NitroSettings) -> dict[str, Any]:
    """Where the enclave is looked for: at an address, or by nitro-cli."""
    if nitro.fixed_enclave is not None:
        where: dict[str, Any] = {"enclave_cid": None, "enclave_port": None, "enclave_address": str(nitro.fixed_enclave)}
    elif nitro.enclave_address is not None:
        where = {"enclave_cid": AUTO, "enclave_port": None, "enclave_address": nitro.enclave_address}
    else:
        port = nitro.enclave_port or DEFAULT_ENCLAVE_PORT
        where = {"enclave_cid": AUTO, "enclave_port": port, "enclave_address": None}
    return where


def _plain(value: object) -> Any:
    match value:
        case Strict():
            fields = {name: _plain(getattr(value, name)) for name in type(value).model_fields}
            if isinstance(value, NitroSettings):
                fields |= _place(value)
            if isinstance(fields.get("address"), str):
                fields["address"] = _USER_INFO.sub("//...@", fields["address"])
            if "jwt" in fields and fields["jwt"] is not None:
                fields["jwt"] = _HIDDEN
            return fields
        case SecretStr():
            return _HIDDEN if value.get_secret_value() else ""
        case PublicKey() | PublicKeyHash() | Path():
            return str(value)
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
