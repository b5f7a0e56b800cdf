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

from proxy.address import Address
from signer.config import models
from signer.config._yaml import Document, Value, YamlError, parse
from signer.config._yaml import Path as KeyPath
from signer.config.models import MISSING_KEY_ID, MISSING_KEY_TYPE, NitroSettings, Policy, Settings
from signer.config.policies import compile_policy
from signer.config.report import refusals
from signer.errors import ConfigurationError
from signer.tezos.errors import TezosError
from signer.tezos.keys import Curve, PublicKeyHash

VAULT_DRIVERS: dict[str, type[BaseModel]] = {"nitro": NitroSettings, "awskms": models.AwsKmsSettings}
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
_SHELL_VARIABLE = re.compile(rf"\$(\$?){_NAME}")  # the second $ takes away the meaning of the first
_SHELL_VARIABLE_OR_BRACED = re.compile(rf"\$(\$?)(?:{_NAME}|\{{{_NAME}\}})")
_START = re.compile(rf"\$(?=\{{{_NAME}\}})")
_START_IN_PATH = re.compile(rf"\$(?={_NAME}|\{{{_NAME}\}})")
_ANY_HOST = ("", "0.0.0.0", "[::]")  # noqa: S104  # compared, not listened on
_WORDS = {
    "model_type": "expected a map",
    "dict_type": "expected a map",
    "mapping_type": "expected a map",
    "list_type": "expected a list",
    "string_type": "expected a text",
    "path_type": "expected a path",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "int_type": "expected an integer",
    "int_parsing": "expected an integer",
    "int_from_float": "expected an integer",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a number",
    "missing": "is missing",
}
_MEMBERS = ("str", "AwsTable", "NitroSettings", "AwsKmsSettings")  # of unions
_WHOLE = ("expected_pcrs", "pcrs")  # a register without a value would be a check that is lost, not a default
_SOME_KEY = PublicKeyHash(Curve.ED25519, bytes(20))  # in place of one that can't be read, to look at its policy
_NO_BASE_DIR = "Key: 'Config.BaseDir' Error:Field validation for 'BaseDir' failed on the 'required' tag"
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
    missing: list[str] = []

    def replace(match: re.Match[str]) -> str:
        name = match[match.lastindex or 1]
        if match[1]:
            return match[0][1:]
        if name not in environ:
            missing.append(name)
        return environ.get(name, "")

    return variables.sub(replace, text), missing


def escaped(text: str, *, path: bool = False) -> str:
    """*text* for a configuration file, so that no `${NAME}` in it is replaced; in a *path*, no `$NAME` either.

    The latter also for the path given to `load`.
    """
    return (_START_IN_PATH if path else _START).sub("$$", text)


class _Loader:
    """One pass over a document; collects faults."""

    def __init__(self, document: Document, name: str, environ: Mapping[str, str]) -> None:
        self._document = document
        self._origin = models.Origin(name, document.lines)
        self._environ = environ
        self._faults: list[tuple[int, str]] = []  # line, text
        for path, text in document.faults:
            self._note(path, text)

    def fault(self, path: KeyPath, text: str) -> None:
        if path not in self._document.unset:  # that is said already, and the value is none
            self._note(path, text)

    def _note(self, path: KeyPath, text: str) -> None:
        self._faults.append((self._origin.line(path) or 0, self._origin.placed(path, text)))

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
        settings = self._validate(Settings, tree, ())
        if settings is not None:
            settings.came_from(self._origin)
            if _overlap(settings.server.address, settings.server.utility_address):
                self.fault(("server", "utility_address"), "server.address takes this port already")
            self._check_proxies(settings)
            if self._faults:  # those of a good file are for the command to say: some do without
                for path, text in refusals(settings):
                    self.fault(path, text)
        return settings

    def _check_proxies(self, settings: Settings) -> None:
        """Vaults may share a built-in proxy, but not one that leads elsewhere."""
        taken: dict[Address, tuple[str, str]] = {}  # listening address: vault, target
        for name, vault in settings.vaults.items():
            nitro = vault.config
            if isinstance(nitro, NitroSettings) and nitro.proxy_remote_address:
                first, target = taken.setdefault(nitro.proxy_listen, (name, nitro.proxy_remote_address))
                if target != nitro.proxy_remote_address:
                    path = ("vaults", name, "config", "proxy_local_port")
                    self.fault(path, f"the proxy of vault {first} takes this port already, and leads to {target}")

    def _base_dir(self, flag: str, value: object) -> object:
        if flag:
            return self._base_dir_of_flag(flag)
        if isinstance(value, str):
            value = self._shell(value, ("base_dir",))  # braces are expanded already
            if not value:
                self.fault(("base_dir",), _NO_BASE_DIR)
        return value

    def _base_dir_of_flag(self, flag: str) -> str:
        text, missing = _expand(_SHELL_VARIABLE_OR_BRACED, flag, self._environ)
        for name in missing:
            self._faults.append((0, f"--base-dir: the environment variable {name} is not set"))
        if not text and not missing:
            self._faults.append((0, f"--base-dir: {_NO_BASE_DIR}"))
        return text

    def _shell(self, text: str, path: KeyPath) -> str:
        """`$NAME`, which the reference expands in paths."""
        expanded, missing = _expand(_SHELL_VARIABLE, text, self._environ)
        for name in missing:
            self._note(path, f"the environment variable {name} is not set")
            self._document.unset.add(path)
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
                    (*path, "driver") if isinstance(entry, dict) and "driver" in entry else path,
                    f"Key: 'Config.{what}' Error:Field validation for '{last}' failed on the 'required' tag",
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
            if key in _place_keys(filled):
                continue
            if self._is_usable(path, key, variable, value):
                filled[key] = value
        if not filled.get("encryption_key_id"):
            if (*path, "encryption_key_id") not in self._document.unset:
                self.fault(path, MISSING_KEY_ID)
            filled["encryption_key_id"] = "missing"  # it hides no other fault
        storage = filled.get("storage")
        if isinstance(storage, dict):
            filled["storage"] = self._storage(storage, (*path, "storage"))
        return filled

    def _is_usable(self, path: KeyPath, key: str, variable: str, value: str) -> bool:
        """Whether the variable holds what the key takes; if not, that is a fault (weakness 13)."""
        try:
            NitroSettings.model_validate({"encryption_key_id": "x", key: value})
        except ValidationError as exc:
            self.fault(path, f"the environment variable {variable}: {_plain_words(exc.errors()[0])}, got {value!r}")
            return False
        return True

    def _storage(self, storage: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        """*storage* with its path expanded; without the path if that is none."""
        driver, file = storage.get("driver", "file"), storage.get("config")
        if driver not in STORAGE_DRIVERS:
            self.fault(
                (*path, "driver"), f"(Nitro): unknown key storage {driver}" + _nearest(str(driver), STORAGE_DRIVERS)
            )
        if isinstance(file, str):
            return {**storage, "config": self._shell(file, (*path, "config"))}
        if driver == "file" and file is not None:
            self.fault((*path, "config"), "expected the path of the key file")
            return {**storage, "config": None}
        return dict(storage)

    def _policies(self, tree: dict[str, Any], vaults: tuple[str, ...]) -> None:
        """Check each key's policy by itself, so that one fault hides no other."""
        section = tree.get("tezos")
        if not isinstance(section, dict):
            return
        checked: dict[PublicKeyHash, Policy | None] = {}
        for address, written in section.items():
            path: KeyPath = ("tezos", address)
            policy = None if written is None else self._validate(Policy, written, path)
            pkh = _SOME_KEY
            try:
                pkh = PublicKeyHash.from_base58(address)
                checked[pkh] = policy
            except TezosError as exc:
                self.fault(path, str(exc))
            for key, text in compile_policy(pkh, policy).faults:
                self.fault((*path, key), text)
            if policy is not None and policy.vault is not None and policy.vault not in vaults:
                self.fault((*path, "vault"), f"no vault is called {policy.vault}" + _nearest(policy.vault, vaults))
        tree["tezos"] = checked

    def _validate(self, model: type[_M], value: object, path: KeyPath) -> _M | None:
        """*value* as *model*. What is wrong is noted and left out, so that it hides no fault of another kind.

        With a fault noted nobody gets to see the settings. None where too little is left.
        """
        left_out: list[KeyPath] = []
        for _ in range(2):
            try:
                return model.model_validate(value)
            except ValidationError as exc:
                wrong: list[KeyPath] = []
                for error in exc.errors(include_url=False, include_input=False):
                    if error["type"] == MISSING_KEY_TYPE:
                        continue  # said already, or a consequence of what is left out
                    location = tuple(part for part in error["loc"] if not _is_artificial(part))
                    wrong.append(location)
                    if location and any(location == deeper[: len(location)] for deeper in left_out):
                        continue  # a list that is empty by now, say
                    self.fault((*path, *location), _text(model, error, location))
                left_out += wrong
                for location in reversed(wrong):  # the last items of a list first: the others keep their places
                    value = _without(value, location)
        return None


def _place_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that the environment must not fill, since *config* says where the enclave is without them."""
    written = config.get("enclave_address")
    if isinstance(written, str) and models.CID_PATTERN in written:
        return ("enclave_port", "enclave_cid") if config.get("enclave_name") else ("enclave_port",)
    if "enclave_address" in config:
        return ("enclave_cid", "enclave_port")
    return ("enclave_cid",) if config.get("enclave_name") else ()


def _without(value: Any, location: KeyPath) -> Any:
    """A copy of *value* less what is at *location*."""
    if not location:
        return value
    first, rest = location[0], location[1:]
    if isinstance(value, dict) and first in value:
        kept: Any = dict(value)
        kept[first] = _without(value[first], rest)
    elif isinstance(value, list) and isinstance(first, int) and first < len(value):
        kept = list(value)
        kept[first] = _without(value[first], rest)
    else:
        return value
    if not rest:
        del kept[first]
    return kept


def _overlap(one: str, other: str) -> bool:
    """Whether two listeners (`host:port`) get into each other's way."""
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    return int(port) == int(other_port) and (host == other_host or not {host, other_host}.isdisjoint(_ANY_HOST))


def _without_nulls(value: Any) -> Any:
    """A key without a value leaves the default in place, at any depth; but for those of `_WHOLE`."""
    if isinstance(value, dict):
        return {key: item if key in _WHOLE else _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _is_artificial(part: str | int) -> bool:
    """Pydantic names union members and dictionary keys in its locations; the file has no such keys."""
    return isinstance(part, str) and (part == "[key]" or part in _MEMBERS)


def _text(model: type[BaseModel], error: ErrorDetails, location: KeyPath) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key" + _nearest(str(location[-1]), _keys_at(model, location[:-1]))
    if error["type"] == "hostname_port" and location[:1] == ("server",):
        name = {"address": "Address", "utility_address": "UtilityAddress"}.get(str(location[-1]), "")
        tag = f"Key: 'Config.Server.{name}' Error:Field validation for '{name}' failed on the 'hostname_port' tag"
        return f"{tag}; {error['msg']}"
    return _plain_words(error)


def _plain_words(error: ErrorDetails) -> str:
    """What pydantic says, without its own words: nobody knows its types."""
    return _WORDS.get(error["type"]) or error["msg"].replace("Input should be", "must be")


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
