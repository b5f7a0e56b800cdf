"""Logs: three forms, one line for each event whatever the values, no secrets, and never a reason to fail."""

import errno
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import structlog
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signer import crypto
from signer.crypto import SecretKey
from signer.errors import SignerError
from signer.observe import logs
from signer.observe.metrics import Metrics
from signer.policy import Caller, KeyPolicy
from signer.signing import Signing
from signer.tezos.errors import TezosError
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature
from signer.vaults.interface import Accept, VaultHealth, VaultKey, VaultUnavailableError
from signer.watermark.memory import MemoryWatermarks

SECRETS = [  # test keys: of the specification, of the reference's manuals, or of the right form only
    "edsk3gUfUPyBSfrS9CCgmCiQsTCHGkviBDusMxDJstFtojtc1zcpsh",
    "spsk2Dmj1wFdLuqvYBcA8xSvvdFRQ7x5mY7fPfFyk6iNtXEtFHwbYc",
    "p2sk2obfVMEuPUnadAConLWk7Tf4Dt3n4svSgJwrgpamRqJXvaYcg1",
    "BLsk1" + "a" * 49,
    "edesk" + "1" * 83,
    "BLesk" + "1" * 83,
]

Lines = Callable[[], list[str]]
Start = Callable[..., io.StringIO]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def start() -> Iterator[Start]:
    """Configures logging into a stream, for the length of a test."""
    before, root = structlog.get_config(), logging.getLogger()
    root_level = root.level

    def configure(stream: io.StringIO | None = None, *, level: str = "debug", json_lines: bool = False) -> io.StringIO:
        stream = io.StringIO() if stream is None else stream
        logs.configure(level, json_lines=json_lines, stream=stream)
        structlog.configure(cache_logger_on_first_use=False)  # else modules would keep this test's stream
        return stream

    yield configure
    structlog.configure(**before)
    root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, logs._StandardHandler)]
    root.setLevel(root_level)
    logging.getLogger("botocore.credentials").setLevel(logging.NOTSET)


def only_line(stream: io.StringIO) -> str:
    """What was written, after a check that it is one line."""
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text[:-1]


# -- forms


def test_a_json_line_has_time_level_message_and_fields(start: Start) -> None:
    stream = start(json_lines=True)
    structlog.get_logger().warning("the link is down", vault="nitro", keys=3, ops={"reveal": 1}, none=None)
    line = json.loads(only_line(stream))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "warning",
        "msg": "the link is down",
        "vault": "nitro",
        "keys": 3,
        "ops": {"reveal": 1},
        "none": None,
    }
    assert list(json.loads(only_line(stream)))[:3] == ["time", "level", "msg"]


def test_a_text_line_is_logfmt_with_quotes_where_needed(start: Start) -> None:
    stream = start()
    structlog.get_logger().info('say "hello"', plain="tz1abc/2:3", spaced="a b", empty="", ops={"transaction": 2}, n=7)
    line = re.sub(r'time="[^"]*Z"', "T", only_line(stream))
    assert line == (
        r'T level=info msg="say \"hello\"" plain=tz1abc/2:3 spaced="a b" empty="" ops=map[transaction:2] n=7'
    )


def test_a_terminal_gets_a_short_coloured_line(start: Start) -> None:
    stream = start(Terminal())
    structlog.get_logger().error("no key", vault="nitro")
    assert re.fullmatch(r"\x1b\[31mERRO\x1b\[0m\[\d\d:\d\d:\d\d\] no key vault=nitro", only_line(stream))


def test_json_is_json_on_a_terminal_too(start: Start) -> None:
    stream = start(Terminal(), json_lines=True)
    structlog.get_logger().info("x")
    assert json.loads(only_line(stream))["msg"] == "x"


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("trace", ["debug", "info", "warning", "error"]),
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warn", ["warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
        ("fatal", []),
        ("panic", []),
    ],
)
def test_levels(start: Start, level: str, shown: list[str]) -> None:
    stream = start(level=level, json_lines=True)
    log = structlog.get_logger()
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("x")
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == shown


@pytest.mark.parametrize("json_lines", [True, False])
def test_an_exception_is_shown_with_its_trace(start: Start, json_lines: bool) -> None:
    stream = start(json_lines=json_lines)
    try:
        raise ValueError("what happened")
    except ValueError:
        structlog.get_logger().exception("internal error")
    text = json.loads(only_line(stream))["exception"] if json_lines else stream.getvalue()
    assert "Traceback" in text
    assert "ValueError: what happened" in text


def test_libraries_are_heard_from_warning_on(start: Start) -> None:
    stream = start(json_lines=True)
    logging.getLogger("botocore").info("chatter")
    logging.getLogger("botocore").warning("%s expired", "token")
    line = json.loads(only_line(stream))
    assert (line["level"], line["msg"], line["source"]) == ("warning", "token expired", "botocore")


@pytest.mark.parametrize(("level", "lines"), [("info", 0), ("warn", 0), ("debug", 1)])
def test_a_renewal_that_fails_is_left_to_who_asked_for_it(start: Start, level: str, lines: int) -> None:
    """botocore tells it with a trace at each try, a minute apart for as long as it lasts."""
    stream = start(level=level)
    logging.getLogger("botocore.credentials").warning("Refreshing temporary credentials failed")
    assert stream.getvalue().count("\n") == lines


# -- one line, whatever the values

HOSTILE = ["a\nb", "a\r\nlevel=error msg=forged", "\x1b[2J\x1b[31m", "\x00\x07\x08", 'a" level=error x="', "\t"]


@pytest.mark.parametrize("json_lines", [True, False])
@pytest.mark.parametrize("value", HOSTILE)
def test_control_characters_of_message_and_values_are_escaped(start: Start, value: str, json_lines: bool) -> None:
    stream = start(json_lines=json_lines)
    structlog.get_logger().info(value, error=value)
    line = only_line(stream)
    assert not re.search(r"[\x00-\x1f]", line)
    if json_lines:
        assert (json.loads(line)["msg"], json.loads(line)["error"]) == (value, value)
    else:
        assert line.endswith(f" level=info msg={json.dumps(value)} error={json.dumps(value)}")


@pytest.mark.parametrize("value", HOSTILE)
def test_control_characters_of_values_are_escaped_on_a_terminal(start: Start, value: str) -> None:
    stream = start(Terminal())
    structlog.get_logger().info("refused", error=value)
    assert only_line(stream).endswith(f" refused error={json.dumps(value)}")


@pytest.mark.parametrize("value", ["\x9b31m", "a\x85b", "a\x7f", "a\u2028b"], ids=ascii)
@pytest.mark.parametrize("json_lines", [True, False])
def test_other_control_characters_are_escaped_too(start: Start, value: str, json_lines: bool) -> None:
    stream = start(json_lines=json_lines)
    structlog.get_logger().info("x", error=value)
    assert not re.search("[\x7f-\x9f\u2028\u2029]", only_line(stream))


@pytest.mark.parametrize("message", ["a\nb", "\x1b[2J"], ids=ascii)
def test_control_characters_of_a_message_are_escaped_on_a_terminal(start: Start, message: str) -> None:
    stream = start(Terminal())
    structlog.get_logger().info(message)
    assert only_line(stream).count("\x1b") == 2, "the colour is switched on and off"


@pytest.mark.parametrize(("level", "text"), [(35, "%s"), (logging.WARNING, "%d")])
def test_an_odd_record_of_a_library_disturbs_nobody(start: Start, level: int, text: str) -> None:
    start()
    logging.getLogger("botocore").log(level, text, "argument")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.text(),
    key=st.from_regex(r"[a-z]{1,8}", fullmatch=True).filter(lambda key: key not in ("event", "level", "time", "msg")),
)
def test_any_value_stays_in_one_json_line_and_is_read_back(start: Start, key: str, value: str) -> None:
    stream = start(json_lines=True)
    structlog.get_logger().info("x", **{key: value})
    assert json.loads(only_line(stream))[key] == value


# -- secrets


@pytest.mark.parametrize("json_lines", [True, False])
@pytest.mark.parametrize("secret", SECRETS, ids=[secret[:5] for secret in SECRETS])
def test_secret_keys_are_masked_wherever_they_stand_in_a_text(start: Start, secret: str, json_lines: bool) -> None:
    stream = start(json_lines=json_lines)
    structlog.get_logger().info(f"imported {secret}", uri=f"unencrypted:{secret}, again {secret}")
    line = only_line(stream)
    assert secret[6:] not in line
    assert line.count("***") == 3


@pytest.mark.parametrize("where", ["trace", "exception", "list", "dict", "bytes"])
def test_secret_keys_are_masked_in_other_values_too(start: Start, where: str) -> None:
    stream, log, secret = start(json_lines=True), structlog.get_logger(), SECRETS[0]
    if where == "trace":
        try:
            raise ValueError(secret)
        except ValueError:
            log.exception("x")
    else:
        values = {"exception": ValueError(secret), "list": [secret], "dict": {"a": secret}, "bytes": secret.encode()}
        log.info("x", value=values[where])
    assert secret[6:] not in only_line(stream)


@pytest.mark.parametrize("name", ["secret_access_key", "session_token", "Password", "passphrase", "aws_credentials"])
def test_values_under_telling_names_are_masked(start: Start, name: str) -> None:
    stream = start(json_lines=True)
    structlog.get_logger().info("x", **{name: "hunter2"}, region="eu")
    line = json.loads(only_line(stream))
    assert (line[name], line["region"]) == ("***", "eu")


def test_public_values_are_not_masked(start: Start) -> None:
    stream = start(json_lines=True)
    key = crypto.load_secret_key(Curve.ED25519, bytes(32))
    public = {"pkh": str(key.public_key.hash), "public_key": str(key.public_key), "sig": str(key.sign(b"x", version=2))}
    structlog.get_logger().info("x", **public)
    assert json.loads(only_line(stream)).items() >= public.items()


# -- a log that cannot be written


class BrokenStream(io.StringIO):
    """Fails at every write, as a full disk does; notes that it was asked."""

    asked = 0

    def write(self, _text: str) -> int:
        self.asked += 1
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_stream_that_fails_disturbs_nobody(start: Start) -> None:
    stream = BrokenStream()
    start(stream)
    structlog.get_logger().error("x")
    logging.getLogger("botocore").error("y")
    assert stream.asked == 2


def test_a_closed_stream_disturbs_nobody(start: Start) -> None:
    stream = start()
    stream.close()
    structlog.get_logger().error("x")


@pytest.mark.parametrize("json_lines", [False, True])
def test_a_process_without_standard_error_logs_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, json_lines: bool
) -> None:
    start()  # the fixture puts back what it changes
    monkeypatch.setattr(sys, "stderr", None)
    logs.configure(json_lines=json_lines)
    structlog.get_logger().error("x")


# -- one line for each signing request

CHAIN = "NetXdQprcVkpaWU"


class LocalVault:
    """A vault with one key in memory that can be told to fail."""

    name, kind, ready = "local", "Local", True

    def __init__(self, secret: SecretKey) -> None:
        self._secret = secret
        self.error: SignerError | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()

    patience = 2.5

    def serves(self, key: PublicKeyHash) -> bool:
        return True

    @property
    def last_sign_of_life(self) -> float:
        return trio.current_time()

    async def wait_change(self) -> None:
        await trio.sleep_forever()

    async def reload(self) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_for(self, key: PublicKeyHash, deadline: float) -> None:
        await trio.lowlevel.checkpoint()

    async def refresh(self) -> None:
        await trio.lowlevel.checkpoint()

    def keys(self) -> Mapping[PublicKeyHash, VaultKey]:
        return {self._secret.public_key.hash: VaultKey(self._secret.public_key)}

    def health(self) -> VaultHealth:
        return VaultHealth(True, "up", 1, {})

    async def sign(
        self, key: PublicKeyHash, message: bytes, *, version: int, accept: Accept, deadline: float
    ) -> Signature:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return self._secret.sign(message, version=version)

    async def prove_possession(self, key: PublicKeyHash, *, over: PublicKey | None = None, accept: Accept) -> Signature:
        raise NotImplementedError

    async def import_key(self, secret: SecretKey) -> PublicKey:
        raise NotImplementedError

    async def generate(self, curve: Curve) -> PublicKey:
        raise NotImplementedError


def attestation(level: int, round: int = 0, payload: int = 0) -> bytes:
    place = level.to_bytes(4, "big") + round.to_bytes(4, "big") + payload.to_bytes(32, "big")
    return b"\x13\x7a\x06\xa7\x70" + bytes(32) + b"\x15\x00\x00" + place


async def lines_of(
    start: Start, messages: Sequence[bytes], *, log_payloads: bool = False, error: SignerError | None = None
) -> list[dict[str, Any]]:
    """The log of a signer that is asked for *messages*, one after the other; the last one meets *error*."""
    secret = crypto.load_secret_key(Curve.ED25519, bytes(range(32)))
    vault, pkh = LocalVault(secret), secret.public_key.hash
    policies = {pkh: KeyPolicy(requests=("attestation",), operations=(), log_payloads=log_payloads)}
    signing = Signing(policies=policies, vaults=[vault], marks=MemoryWatermarks(), metrics=Metrics())
    stream = start(level="info", json_lines=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(signing.run)
        for number, message in enumerate(messages):
            vault.error = error if number == len(messages) - 1 else None
            try:
                await signing.sign(pkh, message, version=2, caller=Caller("192.0.2.1", f"r{number}"))
            except (SignerError, TezosError):
                pass
        nursery.cancel_scope.cancel()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_a_signed_request_is_one_line_with_its_facts(start: Start) -> None:
    (line,) = await lines_of(start, [attestation(7, 2)])
    assert line.pop("duration_ms") >= 0
    del line["time"]
    assert line == {
        "level": "info",
        "msg": "Signed attestation successfully",
        "outcome": "signed",
        "request_id": "r0",
        "pkh": "tz1haTDx9MiA53qTAkchH9sUWoKfFABN6ggh",
        "peer": "192.0.2.1",
        "vault": "Local",
        "request": "attestation",
        "chain_id": CHAIN,
        "lvl": 7,
        "round": 2,
    }


@pytest.mark.parametrize(
    ("messages", "error", "expected"),
    [
        ([attestation(7), attestation(7)], None, {"level": "info", "outcome": "replayed"}),
        (
            [attestation(7), attestation(6)],
            None,
            {"level": "error", "outcome": "refused", "status": 409, "rule": "watermark", "standing_level": 7},
        ),
        (
            [b"\x12" + attestation(7)[1:37] + b"\x14" + attestation(7)[38:]],
            None,
            {"level": "error", "outcome": "refused", "status": 403, "rule": "allow", "request": "preattestation"},
        ),
        ([b"\xff" * 80], None, {"level": "error", "outcome": "refused", "status": 400}),
        ([b""], None, {"level": "error", "outcome": "refused", "status": 400}),
        (
            [attestation(7)],
            VaultUnavailableError("the link is\ndown"),
            {"level": "error", "outcome": "failed", "status": 502, "msg": "Error signing request: the link is\ndown"},
        ),
    ],
    ids=["replayed", "watermark", "policy", "undecodable", "empty", "vault"],
)
async def test_every_other_outcome_is_one_line_that_says_why(
    start: Start, messages: list[bytes], error: SignerError | None, expected: dict[str, object]
) -> None:
    lines = await lines_of(start, messages, error=error)
    assert [line["request_id"] for line in lines] == [f"r{number}" for number in range(len(messages))]
    assert lines[-1].items() >= expected.items()


@pytest.mark.parametrize("log_payloads", [True, False])
async def test_bytes_are_logged_only_where_the_policy_says_so(start: Start, log_payloads: bool) -> None:
    for message in (attestation(7), b"\xff" * 80):
        (line,) = await lines_of(start, [message], log_payloads=log_payloads)
        assert line.get("raw") == (message.hex() if log_payloads else None)
        assert (message.hex() in json.dumps(line)) is log_payloads
