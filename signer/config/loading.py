"""From a file and the environment to `Settings`: every fault at once, each with its place.

Section 1.1 of the signer specification. Nothing is created here; `prepare_base_dir` does that for commands that need
the directory.
"""

import difflib
import os
import re
import secrets
import stat
import types
import typing
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from signer.config import models
from signer.config._yaml import Document, Value, YamlError, parse
from signer.config._yaml import Path as KeyPath
from signer.config.models import MISSING_KEY_ID, NitroSettings, Policy, Settings
from signer.config.policies import compile_policy
from signer.errors import ConfigurationError
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKeyHash

VAULT_DRIVERS: dict[str, type[BaseModel]] = {"nitro": NitroSettings, "awskms": models.AwsCredentials}
STORAGE_DRIVERS = ("file", "aws", "dynamodb")
WATERMARK_DRIVERS = ("file", "mem", "aws", "dynamodb")

_NITRO_ENVIRONMENT = {
    "enclave_cid": "ENCLAVE_CID",
    "enclave_port": "ENCLAVE_PORT",
    "encryption_key_id": "ENCRYPTION_KEY_ID",
    "proxy_local_port": "PROXY_LOCAL_PORT",
    "proxy_remote_address": "PROXY_REMOTE_ADDRESS",
}
_NAME = "([A-Za-z_][A-Za-z0-9_]*)"
_SHELL_VARIABLE = re.compile(rf"\${_NAME}")
_SHELL_VARIABLE_OR_BRACED = re.compile(rf"\$(?:{_NAME}|\{{{_NAME}\}})")
_M = TypeVar("_M", bound=BaseModel)
_MAX_FILE = 4 * 1024 * 1024  # bytes


def load(path: str, *, base_dir: str = "", environ: Mapping[str, str] | None = None) -> Settings:
    """Read the configuration file at *path* ("" reads none) over the defaults.

    *base_dir*, if not empty, takes the place of the file's. Raises `ConfigurationError` whose text lists every fault,
    one a line: file, line, key path, what is wrong.
    """
    environment = os.environ if environ is None else environ
    document = Document()
    if path:
        try:
            document = parse(_read(path), environment)
        except YamlError as exc:
            where = f"{path}:{exc.line}" if exc.line else path
            raise ConfigurationError(f"{where}: {exc}") from exc
    loader = _Loader(document, path or "configuration", environment)
    settings = loader.settings(base_dir)
    if loader.faults:
        raise ConfigurationError("\n".join(loader.faults))
    assert settings is not None
    return settings


def prepare_base_dir(settings: Settings) -> None:
    """Make the base directory if it is absent, and prove it writable (section 1.1, step 5)."""
    directory = settings.base_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(
            f"CRITICAL: Base directory permission error: cannot create directory {directory}: {exc.strerror}. "
            "Fix: create it for the signer's user, or set base_dir"
        ) from exc
    probe = directory / f".signatory_write_test_{secrets.token_hex(4)}"
    try:
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as exc:
        raise ConfigurationError(
            f"CRITICAL: Base directory permission error: cannot write to directory {directory}: {exc.strerror}. "
            "Fix: make it writable for the signer's user, and the disk not full"
        ) from exc


def _read(path: str) -> str:
    error = "CRITICAL: Config file permission error:"
    expanded, missing = _expand(_SHELL_VARIABLE_OR_BRACED, path, os.environ)
    if missing:
        raise ConfigurationError(f"{error} {path}: the environment variable {missing[0]} is not set")
    try:
        status = os.stat(expanded)  # noqa: PTH116
        if stat.S_ISDIR(status.st_mode):
            raise ConfigurationError(f"{error} path is a directory, expected a file: {path}")
        with open(expanded, encoding="utf-8") as file:  # noqa: PTH123
            text = file.read(_MAX_FILE + 1)
    except FileNotFoundError as exc:
        raise ConfigurationError(f"{error} file does not exist: {path}") from exc
    except OSError as exc:
        raise ConfigurationError(
            f"{error} cannot read file {path}: {exc.strerror}. Fix: make it readable for the signer's user"
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path}: not a UTF-8 text") from exc
    if len(text) > _MAX_FILE:
        raise ConfigurationError(f"{path}: larger than {_MAX_FILE} bytes")
    return text


def _expand(variables: re.Pattern[str], text: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """*text* with its variables replaced, and the names of those that aren't set."""
    names = [match[match.lastindex or 1] for match in variables.finditer(text)]
    expanded = variables.sub(lambda match: environ.get(match[match.lastindex or 1], ""), text)
    return expanded, [name for name in names if name not in environ]


class _Loader:
    """One pass over a document; collects faults."""

    def __init__(self, document: Document, name: str, environ: Mapping[str, str]) -> None:
        self._document = document
        self._name = name
        self._environ = environ
        self._faults: list[tuple[int, str]] = []  # line, text
        for path, text in document.faults:
            self.fault(path, text)

    def fault(self, path: KeyPath, text: str) -> None:
        line = next(
            (
                self._document.lines[path[:end]]
                for end in range(len(path), -1, -1)
                if path[:end] in self._document.lines
            ),
            None,
        )
        where = f"{self._name}:{line}" if line is not None else self._name
        dotted = ".".join(map(str, path))
        self._faults.append((line or 0, f"{where}: {dotted}: {text}" if dotted else f"{where}: {text}"))

    @property
    def faults(self) -> list[str]:
        """What is wrong, in the order of the lines, each once."""
        return list(dict.fromkeys(text for _, text in sorted(self._faults, key=itemgetter(0))))

    def settings(self, base_dir: str) -> Settings | None:
        value = self._document.value
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.fault((), "expected a map with the keys server, vaults, tezos, watermark, base_dir")
            return None
        tree: dict[str, Any] = {key: item for key, item in value.items() if item is not None}
        tree["base_dir"] = self._base_dir(base_dir, tree.get("base_dir", models.DEFAULT_BASE_DIR))
        self._drop_nulls(tree, "server")
        self._drop_nulls(tree, "watermark")
        self._check_watermark(tree)
        names = tuple(tree["vaults"]) if isinstance(tree.get("vaults"), dict) else ()
        self._vaults(tree)
        self._policies(tree, names)
        return self._validate(Settings, tree, ())

    def _base_dir(self, flag: str, value: object) -> object:
        text = flag or value
        if isinstance(text, str):
            text = self._shell(text, ("base_dir",), braced=bool(flag))  # in the file, braces are expanded already
            if not text:
                self.fault(
                    ("base_dir",),
                    "Key: 'Config.BaseDir' Error:Field validation for 'BaseDir' failed on the 'required' tag",
                )
        return text

    def _shell(self, text: str, path: KeyPath, *, braced: bool = False) -> str:
        """`$NAME`, which the reference expands in paths."""
        expanded, missing = _expand(_SHELL_VARIABLE_OR_BRACED if braced else _SHELL_VARIABLE, text, self._environ)
        for name in missing:
            self.fault(path, f"the environment variable {name} is not set")
        return expanded

    def _drop_nulls(self, tree: dict[str, Any], section: str) -> None:
        """A key without a value leaves the default in place."""
        tree[section] = _without_nulls(tree.get(section))
        if tree[section] is None:
            del tree[section]

    def _check_watermark(self, tree: dict[str, Any]) -> None:
        section = tree.get("watermark")
        if isinstance(section, dict) and isinstance(section.get("driver"), str):
            driver = section["driver"]
            if driver not in WATERMARK_DRIVERS:
                self.fault(
                    ("watermark", "driver"),
                    f"unknown watermark backend: {driver}" + _nearest(driver, WATERMARK_DRIVERS),
                )

    def _vaults(self, tree: dict[str, Any]) -> None:
        """Give each vault's config its driver's model: the driver says which keys there are."""
        section = tree.get("vaults")
        if not isinstance(section, dict):
            return
        checked: dict[str, Any] = {}
        for name, entry in section.items():
            path: KeyPath = ("vaults", name)
            if not isinstance(entry, dict) or not entry.get("driver"):
                what = f"Vaults[{name}]" + ("" if entry is None else ".Driver")
                last = what.rpartition(".")[2]
                self.fault(
                    path, f"Key: 'Config.{what}' Error:Field validation for '{last}' failed on the 'required' tag"
                )
                continue
            model = VAULT_DRIVERS.get(str(entry["driver"]))
            if model is None:
                known = tuple(VAULT_DRIVERS)
                self.fault(
                    (*path, "driver"),
                    f"unknown vault driver: {entry['driver']}" + _nearest(str(entry["driver"]), known),
                )
                continue
            for key in entry.keys() - {"driver", "config"}:
                self.fault((*path, key), "unknown key" + _nearest(key, ("driver", "config")))
            config = _without_nulls(entry.get("config") or {})
            if model is NitroSettings and isinstance(config, dict):
                config = self._nitro(config, (*path, "config"))
                if not config.get("encryption_key_id"):
                    self.fault((*path, "config"), MISSING_KEY_ID)
            validated = self._validate(model, config, (*path, "config"))
            if validated is not None:
                checked[name] = entry | {"config": validated}
        tree["vaults"] = checked

    def _nitro(self, config: Mapping[str, Value], path: KeyPath) -> dict[str, Any]:
        """Fill what the configuration leaves open from the environment; expand the storage path."""
        filled: dict[str, Any] = dict(config)
        for key, variable in _NITRO_ENVIRONMENT.items():
            value = self._environ.get(variable, "")
            if value == "" or filled.get(key) not in (None, ""):
                continue
            if key in ("enclave_cid", "enclave_port") and "enclave_address" in filled:
                continue
            if self._is_usable(path, key, variable, value):
                filled[key] = value
        storage = filled.get("storage")
        if isinstance(storage, dict):
            self._check_storage(storage, (*path, "storage"))
            if isinstance(storage.get("config"), str):
                expanded = self._shell(storage["config"], (*path, "storage", "config"))
                filled["storage"] = storage | {"config": expanded}
        return filled

    def _is_usable(self, path: KeyPath, key: str, variable: str, value: str) -> bool:
        """Whether the variable holds what the key takes; if not, that is a fault (weakness 13)."""
        try:
            NitroSettings.model_validate({"encryption_key_id": "x", key: value})
        except ValidationError as exc:
            self.fault(path, f"the environment variable {variable}: {exc.errors()[0]['msg']}, got {value!r}")
            return False
        return True

    def _check_storage(self, storage: Mapping[str, Any], path: KeyPath) -> None:
        driver = storage.get("driver", "file")
        if driver not in STORAGE_DRIVERS:
            self.fault(
                (*path, "driver"), f"(Nitro): unknown key storage {driver}" + _nearest(str(driver), STORAGE_DRIVERS)
            )
        elif driver == "file" and not isinstance(storage.get("config"), str | None):
            self.fault((*path, "config"), "expected the path of the key file")

    def _policies(self, tree: dict[str, Any], vaults: tuple[str, ...]) -> None:
        """Check each key's policy by itself, so that one fault hides no other."""
        section = tree.get("tezos")
        if not isinstance(section, dict):
            return
        checked: dict[PublicKeyHash, Policy | None] = {}
        for address, written in section.items():
            path: KeyPath = ("tezos", address)
            policy = None if written is None else self._validate(Policy, written, path)
            try:
                pkh = PublicKeyHash.from_base58(address)
            except TezosError as exc:
                self.fault(path, str(exc))
                continue
            checked[pkh] = policy
            for key, text in compile_policy(pkh, policy).faults:
                self.fault((*path, key), text)
            if policy is not None and policy.vault is not None and policy.vault not in vaults:
                self.fault((*path, "vault"), f"no vault is called {policy.vault}" + _nearest(policy.vault, vaults))
        tree["tezos"] = checked

    def _validate(self, model: type[_M], value: object, path: KeyPath) -> _M | None:
        try:
            return model.model_validate(value)
        except ValidationError as exc:
            for error in exc.errors(include_url=False, include_input=False):
                location = tuple(part for part in error["loc"] if not _is_artificial(part))
                self.fault((*path, *location), _text(model, error, location))
            return None


def _without_nulls(value: Any) -> Any:
    """A key without a value leaves the default in place, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _is_artificial(part: str | int) -> bool:
    """Pydantic names union members and dictionary keys in its locations; the file has no such keys."""
    return isinstance(part, str) and (part == "[key]" or part in ("str", "AwsTable", "NitroSettings", "AwsCredentials"))


def _text(model: type[BaseModel], error: ErrorDetails, location: KeyPath) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key" + _nearest(str(location[-1]), _keys_at(model, location[:-1]))
    if error["type"] == "hostname_port" and location[:1] == ("server",):
        name = {"address": "Address", "utility_address": "UtilityAddress"}.get(str(location[-1]), "")
        return f"Key: 'Config.Server.{name}' Error:Field validation for '{name}' failed on the 'hostname_port' tag"
    return error["msg"]


def _nearest(word: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(names)}" if names else ""


def _keys_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys that the model below *path* knows."""
    current: object = model
    for part in path:
        members = [member for member in _members(current) if isinstance(member, type) and issubclass(member, BaseModel)]
        fields = members[0].model_fields if members else {}
        current = fields[str(part)].annotation if part in fields else _element(current)
    for member in _members(current):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return list(member.model_fields)
    return []


def _members(annotation: object) -> list[object]:
    """The members of a union, or the annotation itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in _members(member)]
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    return [annotation]


def _element(annotation: object) -> object:
    """What a map or list of this annotation holds."""
    for member in _members(annotation):
        arguments = typing.get_args(member)
        if arguments:
            return arguments[-1]
    return None
