"""The configuration as frozen models; section 1 of the signer specification, and what we add to it.

Field descriptions are the reference documentation in short; `docs/configuration.md` has it at length. Durations are in
seconds, sizes in bytes.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from proxy import address
from signer.config._yaml import Path as KeyPath
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKey, PublicKeyHash, parse_chain_id

DEFAULT_BASE_DIR = "/var/lib/signatory"
KEY_FILE = "enclave_keys.json"  # in the base directory
DYNAMODB_DRIVERS = ("aws", "dynamodb")  # two names of the same
DEFAULT_CID = 16  # commonly the first that nitro-cli hands out
DEFAULT_ENCLAVE_PORT = 2000
_HOST_PORT = "expected host:port, such as 127.0.0.1:6732 or :6732, with a port from 1 to 65535"
_MAX_UINT32 = 2**32 - 1
CID_PATTERN = "{cid}"  # in an enclave_address
_KMS_REGION = re.compile(  # in an ARN, and in the name of an endpoint of KMS, in a VPC or not
    r"arn:[a-z-]+:kms:([a-z0-9-]+):.*|(?:.*\.)?kms(?:-fips)?\.([a-z0-9-]+-[0-9]+)\..*"
)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62}))*\.?")


class Strict(BaseModel):
    """Base of all sections: frozen, unknown keys refused, values never repeated in error texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True)


MISSING_KEY_ID = "(Nitro): missing encryption key id"
MISSING_KEY_TYPE = "key_id"  # of the error


def _host_port(text: object) -> object:
    if not isinstance(text, str) or not is_host_port(text):
        raise PydanticCustomError("hostname_port", _HOST_PORT)
    return text


def is_host_port(text: str) -> bool:
    """Whether *text* is `host:port`, `:port` or `[IPv6]:port`."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
        return False
    return host == "" or _HOST.fullmatch(host) is not None or (host[0] + host[-1] == "[]" and _is_ipv6(host[1:-1]))


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


HostPort = Annotated[str, BeforeValidator(_host_port)]


def _go_integer(value: object) -> object:
    """Integers as Go parses them: 16, 0x10, 0o20, 020, 0b10000, 1_000; from text, too."""
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"0[0-7_]+", text):
            text = "0o" + text[1:]
        try:
            return int(text, 0)
        except ValueError:
            raise PydanticCustomError("integer", "expected an integer") from None
    if isinstance(value, bool):
        raise PydanticCustomError("integer", "expected an integer")
    return value


Uint32 = Annotated[int, BeforeValidator(_go_integer), Field(ge=0, le=_MAX_UINT32)]
Port = Annotated[int, BeforeValidator(_go_integer), Field(ge=1, le=_MAX_UINT32)]
AUTO = "auto"


def _cid(value: object) -> object:
    """`auto`, or an integer as Go parses it."""
    if isinstance(value, str) and value.strip().lower() == AUTO:
        return AUTO
    try:
        number = _go_integer(value)
    except PydanticCustomError:
        raise PydanticCustomError("cid", "expected auto, or the CID as an integer") from None
    if not isinstance(number, int) or not 0 <= number <= _MAX_UINT32:
        raise PydanticCustomError("cid", "expected auto, or the CID as an integer from 0 to 4294967295")
    if number == address.VSOCK_ANY:
        raise PydanticCustomError(
            "cid", "4294967295 is where to listen, for any CID; give that of the enclave, or auto"
        )
    return number


Cid = Annotated[int | Literal["auto"], BeforeValidator(_cid)]


def _registers(value: object) -> object:
    """A map in which no register is there twice, under two spellings."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PydanticCustomError("pcrs", "expected a map of registers, such as PCR0, to their values")
    seen: set[str] = set()
    for spelled in map(_spelled, value):
        if spelled in seen:
            raise PydanticCustomError("pcrs", "{register} is given twice", {"register": spelled})
        seen.add(spelled)
    return value


def _spelled(register: object) -> str:
    return "PCR" + str(register).upper().removeprefix("PCR")


def _register(key: object) -> str:
    if _spelled(key) not in ("PCR0", "PCR1", "PCR2"):
        raise PydanticCustomError("pcrs", "expected PCR0, PCR1 or PCR2: nitro-cli tells no other register")
    return _spelled(key)


def _attested_register(key: object) -> str:
    if not re.fullmatch("PCR([0-9]|[12][0-9]|3[01])", _spelled(key)):
        raise PydanticCustomError("pcrs", "expected PCR0 to PCR31")
    return _spelled(key)


def _accepted(check: Callable[[object], str]) -> Callable[[object], object]:
    """One value, or a list of those accepted, whose items are checked each at its own place."""

    def accepted(value: object) -> object:
        if not isinstance(value, list | tuple):
            return (check(value),)
        if not value:
            raise PydanticCustomError("pcrs", "an empty list accepts no image: give a value, or leave the register out")
        return value

    return accepted


def _measurement(value: object) -> str:
    text = _register_value(value)
    if not text.strip("0"):
        raise PydanticCustomError("pcrs", "a register of zeros is that of debug mode, never that of an image")
    return text


def _register_value(value: object) -> str:
    text = value.strip().lower() if isinstance(value, str) else ""
    if not re.fullmatch("[0-9a-f]{96}", text):
        raise PydanticCustomError("pcrs", "expected 96 hexadecimal digits, or a list of such, in quotes")
    return text


def _of_an_image(registers: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
    """Zeros mean debug mode in PCR0 to PCR2 alone: PCR3 has them without a role, PCR8 without a signature."""
    for register in ("PCR0", "PCR1", "PCR2"):
        if not all(value.strip("0") for value in registers.get(register, ())):
            raise PydanticCustomError(
                "pcrs",
                "{register}: a register of zeros is that of debug mode, never that of an image",
                {"register": register},
            )
    return registers


Register = Annotated[str, BeforeValidator(_register)]
Measurements = Annotated[
    tuple[Annotated[str, BeforeValidator(_measurement)], ...], BeforeValidator(_accepted(_measurement))
]
Registers = Annotated[Mapping[Register, Measurements], BeforeValidator(_registers)]
AttestedRegister = Annotated[str, BeforeValidator(_attested_register)]
RegisterValues = Annotated[
    tuple[Annotated[str, BeforeValidator(_register_value)], ...], BeforeValidator(_accepted(_register_value))
]
AttestedRegisters = Annotated[
    Mapping[AttestedRegister, RegisterValues], BeforeValidator(_registers), AfterValidator(_of_an_image)
]


def _attestation(value: object) -> object:
    """`off` is false to YAML 1.1."""
    if value is False:
        return "off"
    if value not in ("off", "warn", "require"):
        raise PydanticCustomError("attestation", "expected off, warn or require")
    return value


Attestation = Annotated[Literal["off", "warn", "require"], BeforeValidator(_attestation)]


def _fingerprint(value: object) -> object:
    text = value.strip().lower().replace(":", "") if isinstance(value, str) else ""
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise PydanticCustomError("fingerprint", "expected the SHA-256 of a root certificate, 64 hexadecimal digits")
    return text


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "expected a number")
    return value


Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=3600)]


def _public_keys(value: object) -> object:
    """A scalar, or a sequence of scalars and sequences, flattened in order."""
    if value is None:
        return None
    flat: list[PublicKey] = []
    waiting = [value]
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, list):
            waiting[:0] = item
        elif isinstance(item, str):
            try:
                flat.append(PublicKey.from_base58(item))
            except TezosError as exc:
                raise PydanticCustomError("public_key", "{text}", {"text": str(exc)}) from None
        else:
            raise PydanticCustomError("public_key", "expected a public key, or a list of public keys")
    return tuple(flat)


AuthorizedKeys = Annotated[tuple[PublicKey, ...] | None, BeforeValidator(_public_keys)]


class Server(Strict):
    """`server`."""

    address: HostPort = ":6732"
    utility_address: HostPort = ":9583"
    authorized_keys: AuthorizedKeys = None
    jwt: Mapping[str, Any] | None = Field(default=None, repr=False)
    known_keys: bool = False  # whether GET /known_keys lists the keys
    path_prefix: str = ""  # in front of every route of the signing API, "/signer/v1"
    max_body_bytes: Annotated[int, Field(ge=1024, le=1024 * 1024)] = 256 * 1024
    header_timeout: Seconds = 5.0
    body_timeout: Seconds = 10.0
    keep_alive_timeout: Seconds = 75.0
    shutdown_timeout: Seconds = 10.0

    @field_validator("path_prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        stripped = value.strip("/")
        if not re.fullmatch(r"[A-Za-z0-9._~/-]*", stripped):
            raise PydanticCustomError("prefix", "expected a path such as /signer/v1")
        return f"/{stripped}" if stripped else ""


class AwsCredentials(Strict):
    """The AWS credential block; what is empty comes from the SDK's chain."""

    access_key_id: str = ""
    secret_access_key: SecretStr = SecretStr("")
    session_token: SecretStr = SecretStr("")
    region: str = ""


class AwsTable(AwsCredentials):
    """A DynamoDB table and the credentials for it."""

    table: str = ""


class Storage(Strict):
    """`storage` of a nitro vault: where its blobs are."""

    driver: str = "file"
    config: str | AwsTable | None = None

    @property
    def in_table(self) -> AwsTable | None:
        """The table of the blobs; None where they are in a file."""
        if self.driver not in DYNAMODB_DRIVERS:
            return None
        return self.config if isinstance(self.config, AwsTable) else AwsTable()


def _check_enclave_address(text: str) -> None:
    try:
        parsed = address.parse(text)
    except address.AddressError as exc:
        raise PydanticCustomError("address", "{text}", {"text": str(exc)}) from None
    if isinstance(parsed, address.VsockAddress) and parsed.cid == address.VSOCK_ANY:
        raise PydanticCustomError("address", "vsock:any is where to listen; give the CID of the enclave")
    if parsed.port == 0:
        raise PydanticCustomError("address", "port 0 is none to connect to")


class NitroSettings(Strict):
    """`config` of a vault with driver `nitro`."""

    enclave_cid: Cid | None = None  # None, auto: nitro-cli is asked
    enclave_port: Port | None = None
    enclave_address: str | None = None  # may contain {cid}
    enclave_name: str = ""  # EnclaveName or EnclaveID; empty: the only one that runs
    allow_debug_mode: bool | None = None  # None: no, where nitro-cli is asked
    expected_pcrs: Registers = {}  # values accepted for each register, of what nitro-cli tells
    attestation: Attestation | None = None  # None: require where there are pcrs, else off
    pcrs: AttestedRegisters = {}  # values accepted for each register, of what the enclave attests
    attestation_root: Annotated[str, BeforeValidator(_fingerprint)] | None = None  # None: AWS's root
    enclave_log_port: Annotated[int, BeforeValidator(_go_integer), Field(ge=0, le=_MAX_UINT32)] = 2001  # 0: unread
    seal: Literal["legacy", "v1"] = "legacy"  # the format of new blobs; both are read
    sessions: Annotated[int, BeforeValidator(_go_integer), Field(ge=1, le=16)] = 2
    encryption_key_id: str = ""
    proxy_local_port: Port = 8000
    proxy_remote_address: str = ""
    storage: Storage | None = None
    credentials: AwsCredentials = AwsCredentials()
    connect_timeout: Seconds = 5.0
    exchange_timeout: Seconds = 10.0
    wait_timeout: Seconds = 2.5

    @field_validator("enclave_address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            _check_enclave_address(value.replace(CID_PATTERN, str(DEFAULT_CID)))
        return value

    @field_validator("credentials", mode="before")
    @classmethod
    def _no_credentials(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("proxy_remote_address")
    @classmethod
    def _remote(cls, value: str) -> str:
        if value and not is_host_port(value):
            raise PydanticCustomError("hostname_port", _HOST_PORT)
        return value

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        pattern = self.enclave_address is not None and CID_PATTERN in self.enclave_address
        if self.enclave_address is not None:
            if self.enclave_port is not None or (self.enclave_cid is not None and not pattern):
                raise PydanticCustomError("address", "enclave_address takes the place of enclave_cid and enclave_port")
            asked = self.expected_pcrs or (self.allow_debug_mode is not None and self.judging == "off")
            if not pattern and (self.enclave_name or asked):
                raise PydanticCustomError(
                    "address",
                    "enclave_name, expected_pcrs and allow_debug_mode need enclave_cid in place of enclave_address: "
                    "they are about what nitro-cli tells",
                )
            if pattern and self.proxy_remote_address and self.enclave_address.startswith("unix:"):
                raise PydanticCustomError(
                    "address", "with the CID in enclave_address it isn't known where the built-in proxy has to listen"
                )
            if pattern and self.fixed_cid is not None:
                _check_enclave_address(self.enclave_address.replace(CID_PATTERN, str(self.fixed_cid)))
        if self.enclave_name and self.fixed_cid is not None:
            raise PydanticCustomError("name", "enclave_name says which CID to take; leave enclave_cid out, or auto")
        if not self.encryption_key_id:
            raise PydanticCustomError(MISSING_KEY_TYPE, MISSING_KEY_ID)
        if self.pcrs and self.attestation == "off":
            raise PydanticCustomError("attestation", "pcrs are compared by attestation: warn or require, never by off")
        return self

    @property
    def judging(self) -> Literal["off", "warn", "require"]:
        """What becomes of an enclave that does not prove what it is."""
        return self.attestation or ("require" if self.pcrs else "off")

    @property
    def proxy_listen(self) -> address.Address:
        """Where the enclave looks for `proxy_local_port` of its parent."""
        match self.enclave_at(DEFAULT_CID):
            case address.VsockAddress():
                return address.VsockAddress(address.VSOCK_ANY, self.proxy_local_port)
            case address.UnixAddress(base, _):
                return address.UnixAddress(base, self.proxy_local_port)
            case address.TcpAddress():
                return address.TcpAddress("127.0.0.1", self.proxy_local_port)

    @property
    def kms_region(self) -> str:
        """The region that the key's ARN names, or the host behind the proxy; "" where neither does."""
        for text in (self.encryption_key_id, self.proxy_remote_address):
            if match := _KMS_REGION.fullmatch(text):
                return match[1] or match[2]
        return ""

    @property
    def fixed_cid(self) -> int | None:
        """The CID that the configuration names; None where nitro-cli has to tell it."""
        return self.enclave_cid if isinstance(self.enclave_cid, int) else None

    @property
    def fixed_enclave(self) -> address.Address | None:
        """Where the enclave listens, if that is known without asking nitro-cli."""
        if self.enclave_address is not None and CID_PATTERN not in self.enclave_address:
            return address.parse(self.enclave_address)
        return None if self.fixed_cid is None else self.enclave_at(self.fixed_cid)

    def enclave_at(self, cid: int) -> address.Address:
        """Where an enclave with this CID listens. Raises `AddressError` where the CID doesn't fit `enclave_address`."""
        if self.enclave_address is not None:
            return address.parse(self.enclave_address.replace(CID_PATTERN, str(cid)))
        return address.VsockAddress(cid, self.enclave_port or DEFAULT_ENCLAVE_PORT)


_KMS_ARN = re.compile(r"arn:[a-z-]+:kms:([a-z0-9-]+):[0-9]{12}:(key/[A-Za-z0-9-]+|alias/[A-Za-z0-9/_-]+)")
_KMS_NAME = re.compile(r"alias/[A-Za-z0-9/_-]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32}")


def _kms_key(value: object) -> object:
    """A key id, an alias, or the ARN of either."""
    if not isinstance(value, str) or not (_KMS_ARN.fullmatch(value) or _KMS_NAME.fullmatch(value)):
        raise PydanticCustomError("kms_key", "expected a key id, alias/<name>, or an ARN of either")
    return value


KmsKeyName = Annotated[str, BeforeValidator(_kms_key)]


class AwsKmsSettings(AwsCredentials):
    """`config` of a vault with driver `awskms`."""

    keys: tuple[KmsKeyName, ...] | None = None  # those alone; None: all that the account lists
    wait_timeout: Seconds = 2.5
    refresh_interval: Seconds = 300.0  # between two looks at the list of keys

    @field_validator("keys")
    @classmethod
    def _some_keys(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise PydanticCustomError("kms_keys", "an empty list names no key: name some, or leave keys out for all")
        return value

    @model_validator(mode="after")
    def _one_region(self) -> Self:
        for number, key in enumerate(self.keys or ()):
            arn = _KMS_ARN.fullmatch(key)
            if arn is not None and self.region and arn[1] != self.region:
                raise PydanticCustomError(
                    "kms_region",
                    "keys.{number} is in {theirs}, and region is {ours}: a vault has one region",
                    {"number": number, "theirs": arn[1], "ours": self.region},
                )
        return self


class Vault(Strict):
    """One entry of `vaults`; *config* is the driver's own model."""

    driver: str
    config: NitroSettings | AwsKmsSettings


class WatermarkTable(AwsTable):
    """`config` of the marks in DynamoDB."""

    write_timeout: Seconds = 3.0  # for a mark to be set; the Octez client repeats a request for 3.6 s


class Watermark(Strict):
    """`watermark`."""

    driver: str = "file"
    config: WatermarkTable | None = None

    @property
    def in_table(self) -> WatermarkTable | None:
        """The table of the marks; None where they are not in DynamoDB."""
        return (self.config or WatermarkTable()) if self.driver in DYNAMODB_DRIVERS else None


class PolicyHook(Strict):
    """`policy_hook`."""

    address: str = ""
    authorized_keys: AuthorizedKeys = None


def _chain(text: str) -> str:
    try:
        parse_chain_id(text)
    except TezosError as exc:
        raise PydanticCustomError("chain_id", "{text}", {"text": str(exc)}) from None
    return text


class Policy(Strict):
    """One entry of `tezos`, as written."""

    allow: dict[str, list[str] | None] | None = None
    allowed_operations: list[str] | None = None
    allowed_kinds: list[str] | None = None
    allowed_chains: list[Annotated[str, AfterValidator(_chain)]] | None = None
    allow_proof_of_possession: bool = False
    log_payloads: bool = False
    authorized_keys: AuthorizedKeys = None
    jwt_users: list[str] | None = None
    vault: str | None = None
    strict_forms: bool = False  # refuse slot forms with a tz4 key, BLS forms with any other


def _address_key(text: object) -> object:
    if isinstance(text, PublicKeyHash):
        return text
    try:
        return PublicKeyHash.from_base58(str(text))
    except TezosError as exc:
        raise PydanticCustomError("public_key_hash", "{text}", {"text": str(exc)}) from None


KeyHash = Annotated[PublicKeyHash, BeforeValidator(_address_key)]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where settings were read: the file's name, and the line of each key."""

    name: str
    lines: Mapping[KeyPath, int]

    def line(self, path: KeyPath) -> int | None:
        """The line of *path*, or of the nearest thing around it that the file has."""
        around = (path[:end] for end in range(len(path), -1, -1))
        return next((self.lines[place] for place in around if place in self.lines), None)

    def placed(self, path: KeyPath, text: str) -> str:
        """*text* behind file, line and key."""
        line, dotted = self.line(path), ".".join(map(str, path))
        where = self.name if line is None else f"{self.name}:{line}"
        return f"{where}: {dotted}: {text}" if dotted else f"{where}: {text}"


class Settings(Strict):
    """The whole configuration."""

    _origin: Origin | None = PrivateAttr(None)

    server: Server = Server()
    vaults: dict[str, Vault] = {}
    tezos: dict[KeyHash, Policy | None] = {}
    watermark: Watermark = Watermark()
    policy_hook: PolicyHook | None = None
    base_dir: Path = Path(DEFAULT_BASE_DIR)

    def came_from(self, origin: Origin) -> None:
        """Note where the settings were read, for what is said about them later."""
        self._origin = origin

    def placed(self, path: KeyPath, text: str) -> str:
        """*text* behind the place of *path* in the file, as far as there is one."""
        return (self._origin or Origin("configuration", {})).placed(path, text)
