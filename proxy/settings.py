"""What a listener and the process can be told, from the command line or from one YAML file. Times are in seconds.

The file has the names of the options, with underscores. What stands at its top holds for every listener that does not
say otherwise:

    allowlist: /etc/nitro_enclaves/vsock-proxy.yaml
    idle_timeout: 300
    listeners:
      - {listen: "vsock:3:8000", remote: "kms.eu-west-1.amazonaws.com:443"}
      - {listen: "vsock:3:8001", remote: "sts.eu-west-1.amazonaws.com:443", num_workers: 8}
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from yaml.constructor import ConstructorError

from proxy.address import VSOCK_ANY, Address, AddressError, TcpAddress, UnixAddress, VsockAddress, parse

DEFAULT_ALLOW_LIST = "/etc/nitro_enclaves/vsock-proxy.yaml"
DEFAULT_WORKERS = 64  # the original has 4
PARENT_CID = 3  # of the parent instance, as its enclaves see it
_MAX_FILE = 1024 * 1024  # bytes


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: one of the two would be ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class SettingsError(Exception):
    """The settings can't be used; the text has a line for each fault."""


def _address(value: object) -> Address:
    if isinstance(value, VsockAddress | UnixAddress | TcpAddress):
        address: Address = value
    elif isinstance(value, str):
        try:
            address = parse(value)
        except AddressError as exc:
            raise PydanticCustomError("address", "{text}", {"text": str(exc)}) from exc
    else:
        raise PydanticCustomError("address", "expected vsock:<cid>:<port>, unix:<base>:<port> or tcp:<host>:<port>")
    if isinstance(address, VsockAddress) and address.port == VSOCK_ANY:
        raise PydanticCustomError("address", "Linux takes the port {port} for any port", {"port": address.port})
    return address


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "expected a number")
    return value


Seconds = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=31_536_000, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=1_000_000)]
Cid = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**32)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, strict=False)


class Limits(_Model):
    """What each listener has for itself; the descriptions are the help of the command line."""

    num_workers: Annotated[int, BeforeValidator(_no_bool), Field(ge=1)] = Field(
        default=DEFAULT_WORKERS, description="connections served at the same time"
    )
    max_waiting: Count = Field(default=128, description="accepted connections that wait for one of them to end")
    queue_timeout: Seconds = Field(default=10.0, description="seconds that a connection waits, then it is reset")
    connect_timeout: Seconds = Field(default=10.0, description="seconds to reach the target, over all its addresses")
    idle_timeout: Seconds = Field(default=600.0, description="seconds without a byte either way; 0: no limit")
    half_closed_timeout: Seconds = Field(
        default=60.0, description="seconds without a byte once one side has ended; 0: no limit"
    )
    max_lifetime: Seconds = Field(default=0.0, description="seconds that a connection may last; 0: no limit")
    max_connections_per_cid: Count = Field(
        default=0, description="connections of one CID at the same time; 0: no limit"
    )
    max_rate_per_cid: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1_000_000, allow_inf_nan=False)] = (
        Field(default=0.0, description="new connections of one CID in a second; 0: no limit")
    )
    allowed_cids: tuple[Cid, ...] | None = Field(default=None, description="the CIDs that may connect; absent: any")
    check_tls_name: bool = Field(
        default=False, description="require a TLS ClientHello that names the listed host; nothing is decrypted"
    )


class Forward(Limits):
    """One listener and where it leads."""

    listen: Annotated[Address, PlainValidator(_address)]
    remote_host: str
    remote_port: Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=65535)]  # no list can allow 0
    family: Literal[4, 6] | None = None

    @model_validator(mode="before")
    @classmethod
    def _split_remote(cls, value: object) -> object:
        if isinstance(value, dict) and "remote" in value:
            value = dict(value)
            remote = host_port(value.pop("remote"))
            if remote is None:
                raise PydanticCustomError("remote", "remote: expected host:port")
            value |= {"remote_host": remote[0], "remote_port": remote[1]}
        return value

    @model_validator(mode="after")
    def _known_peers(self) -> "Forward":
        if self.allowed_cids is not None and not isinstance(self.listen, VsockAddress):
            raise PydanticCustomError("cids", "allowed_cids: only a vsock listener knows the CID of its peers")
        return self

    def __str__(self) -> str:
        """How metrics and logs name the listener."""
        return self.listen.listener_path if isinstance(self.listen, UnixAddress) else str(self.listen)


class Settings(_Model):
    """The process."""

    forwards: tuple[Forward, ...] = Field(min_length=1)
    allowlist: Path = Path(DEFAULT_ALLOW_LIST)
    drain_timeout: Seconds = 10.0
    metrics: tuple[str, int] | None = None  # host and port


PROCESS_KEYS = ("allowlist", "drain_timeout", "metrics", "listeners")


def load(path: Path, overrides: Mapping[str, Any]) -> Settings:
    """The settings in the YAML file at *path*, with *overrides* (of the command line) put on top.

    Raises `SettingsError`, which lists every fault.
    """
    tree = _read(path)
    unknown = [key for key in tree if key not in PROCESS_KEYS and key not in Limits.model_fields and key != "family"]
    faults = [f"{path}: {key}: unknown key{_nearest(key)}" for key in unknown]
    common = {key: tree[key] for key in tree if key in Limits.model_fields or key == "family"}
    listeners = tree.get("listeners")
    if not isinstance(listeners, list) or not all(isinstance(entry, dict) for entry in listeners) or not listeners:
        faults.append(f"{path}: listeners: expected a list of maps with listen and remote")
        raise SettingsError("\n".join(faults))
    forwards: list[Forward] = []
    for number, entry in enumerate(listeners, 1):
        try:
            forwards.append(Forward.model_validate(common | entry | _of_listener(overrides)))
        except ValidationError as exc:
            faults += [f"{path}: listener {number}: {text}" for text in explain(exc)]
    fields: dict[str, Any] = {key: tree[key] for key in ("allowlist", "drain_timeout") if key in tree}
    if tree.get("metrics") is not None:
        fields["metrics"] = host_port(tree["metrics"])
        if fields["metrics"] is None:
            faults.append(f"{path}: metrics: expected host:port")
    fields |= {key: overrides[key] for key in ("allowlist", "drain_timeout", "metrics") if key in overrides}
    if faults:
        raise SettingsError("\n".join(faults))
    try:
        return Settings(forwards=tuple(forwards), **fields)
    except ValidationError as exc:
        raise SettingsError("\n".join(f"{path}: {text}" for text in explain(exc))) from exc


def _of_listener(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key in Limits.model_fields or key == "family"}


def host_port(value: object) -> tuple[str, int] | None:
    """Host and port of the text `host:port`, the host perhaps in brackets; None for anything else."""
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        return None
    return host, int(port)


def explain(exc: ValidationError) -> Iterator[str]:
    """One line for each fault, with its key, and the nearest known key for one that isn't."""
    for error in exc.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in error["loc"])
        text = error["msg"]
        if error["type"] == "extra_forbidden":
            text = "unknown key" + _nearest(str(error["loc"][-1]))
        yield f"{key}: {text}" if key else text


def _nearest(key: str) -> str:
    known = (*PROCESS_KEYS, *Limits.model_fields, "listen", "remote", "family")
    found = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as exc:
        raise SettingsError(f"cannot read {path}: {exc.strerror}") from exc
    if len(data) > _MAX_FILE:
        raise SettingsError(f"{path}: larger than {_MAX_FILE} bytes")
    try:
        tree = yaml.load(data, _Loader)  # noqa: S506  # it is a SafeLoader
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise SettingsError(f"{path}:{mark.line + 1 if mark else 1}: {exc.problem or exc.context}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise SettingsError(f"{path}: not YAML: {str(exc).splitlines()[0]}") from exc
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise SettingsError(f"{path}: expected a map with the key listeners")
    return tree
