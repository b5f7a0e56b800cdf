"""The routes of the signing API as values: what is answered, with which status, and what reaches the signer."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from signer.errors import (
    ConfigurationError,
    KeyNotFoundError,
    MalformedRequestError,
    RefusedError,
    SignerError,
    UnavailableError,
)
from signer.http._payload import parse_payload
from signer.http.api import SigningApi
from signer.http.values import ApiRequest, ApiResponse
from signer.observe.metrics import Metrics
from signer.policy import Caller
from signer.signing import SignatureMismatchError
from signer.tezos.errors import Base58Error, DecodeError, TezosError
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature
from signer.vaults.interface import UnsupportedByVaultError, VaultError, VaultUnavailableError
from signer.watermark.interface import Mark, WatermarkRefusedError, WatermarkStoreError

ED = PublicKey(Curve.ED25519, bytes(range(32)))
BLS = PublicKey(Curve.BLS12_381, bytes(range(48)))
OTHER_BLS = PublicKey(Curve.BLS12_381, bytes(48))
ED_SIGNATURE = Signature(Curve.ED25519, bytes(64))
BLS_SIGNATURE = Signature(Curve.BLS12_381, bytes(96))
TZ1, TZ4 = str(ED.hash), str(BLS.hash)
JSON = "application/json; charset=utf-8"
PATHS = {  # every route, and the methods that it has
    f"/keys/{TZ1}": "GET, POST",
    "/authorized_keys": "GET",
    "/known_keys": "GET",
    f"/bls_prove_possession/{TZ4}": "GET",
}


class FakeSigning:
    """A signing service that notes what it is asked, and answers or raises what it was told to."""

    def __init__(self, error: Exception | None = None, authorized: Sequence[PublicKeyHash] | None = None) -> None:
        self.error = error
        self.authorized = authorized
        self.calls: list[tuple[object, ...]] = []
        self.callers: list[Caller] = []

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def authorized_keys(self) -> Sequence[PublicKeyHash] | None:
        self._note("authorized_keys")
        return self.authorized

    def known_keys(self) -> Sequence[PublicKeyHash]:
        self._note("known_keys")
        return [ED.hash, BLS.hash]

    async def public_key(self, pkh: PublicKeyHash) -> PublicKey:
        self._note("public_key", pkh)
        return BLS if pkh == BLS.hash else ED

    async def sign(self, pkh: PublicKeyHash, message: bytes, *, version: int, caller: Caller) -> Signature:
        self.callers.append(caller)
        self._note("sign", pkh, message, version)
        return BLS_SIGNATURE if pkh == BLS.hash else ED_SIGNATURE

    async def prove_possession(self, pkh: PublicKeyHash, *, over: PublicKey | None = None, caller: Caller) -> Signature:
        self.callers.append(caller)
        self._note("prove_possession", pkh, over)
        return BLS_SIGNATURE


async def ask(
    method: str,
    target: str,
    body: bytes = b"",
    *,
    service: FakeSigning | None = None,
    known_keys: bool = True,
    path_prefix: str = "",
) -> ApiResponse:
    api = SigningApi(service or FakeSigning(), metrics=Metrics(), known_keys=known_keys, path_prefix=path_prefix)
    path, _, query = target.partition("?")
    return await api.respond(ApiRequest(method, path, query, body, "192.0.2.1"))


def error_text(response: ApiResponse, status: int) -> str:
    """The text of an error, after a check that it has the form in which Octez clients look for it."""
    assert (response.status, response.content_type) == (status, JSON)
    assert response.body.endswith(b"\n")
    (entry,) = json.loads(response.body)
    assert (entry["id"], entry["kind"], len(entry)) == ("failure", "temporary", 3)
    return str(entry["msg"])


# -- success


@pytest.mark.parametrize(
    ("method", "target", "reply", "call"),
    [
        ("POST", f"/keys/{TZ1}", f'{{"signature":"{ED_SIGNATURE}"}}', ("sign", ED.hash, b"\x13\xff", 2)),
        ("POST", f"/keys/{TZ4}", f'{{"signature":"{BLS_SIGNATURE}"}}', ("sign", BLS.hash, b"\x13\xff", 2)),
        ("GET", f"/keys/{TZ1}", f'{{"public_key":"{ED}"}}', ("public_key", ED.hash)),
        ("GET", f"/keys/{TZ4}?x=1", f'{{"public_key":"{BLS}"}}', ("public_key", BLS.hash)),
        ("GET", "/authorized_keys", "{}", ("authorized_keys",)),
        ("GET", "/known_keys", f'{{"known_keys":["{TZ1}","{TZ4}"]}}', ("known_keys",)),
        (
            "GET",
            f"/bls_prove_possession/{TZ4}",
            f'{{"bls_prove_possession":"{BLS_SIGNATURE}"}}',
            ("prove_possession", BLS.hash, None),
        ),
    ],
)
async def test_each_route_answers_compact_json_and_a_newline(
    method: str, target: str, reply: str, call: tuple[object, ...]
) -> None:
    service = FakeSigning()
    response = await ask(method, target, b'"13ff"\n' if method == "POST" else b"", service=service)
    assert response == ApiResponse(200, reply.encode() + b"\n", JSON)
    assert service.calls == [call]


@pytest.mark.parametrize("keys", [(), (ED.hash, BLS.hash)])
async def test_authorized_keys_lists_hashes_and_an_empty_list_is_not_an_empty_object(
    keys: tuple[PublicKeyHash, ...],
) -> None:
    response = await ask("GET", "/authorized_keys", service=FakeSigning(authorized=keys))
    assert json.loads(response.body) == {"authorized_keys": [str(key) for key in keys]}


@pytest.mark.parametrize(
    ("query", "version"),
    [
        ("", 2),
        ("?version=0", 0),
        ("?version=1", 1),
        ("?version=2", 2),
        ("?version=3", 2),
        ("?version=", 2),
        ("?version=one", 2),
        ("?version=01", 2),
        ("?authentication=sig&version=1&unknown=%ff", 1),
        ("?version=%30", 0),
    ],
)
async def test_version_is_0_or_1_where_asked_for_and_2_otherwise(query: str, version: int) -> None:
    service = FakeSigning()
    assert (await ask("POST", f"/keys/{TZ1}{query}", b'"03"', service=service)).status == 200
    assert service.calls == [("sign", ED.hash, b"\x03", version)]


async def test_too_many_parameters_are_not_our_fault() -> None:
    assert (await ask("POST", f"/keys/{TZ1}?{'a=1&' * 101}", b'"03"')).status in (200, 400)


@pytest.mark.parametrize(
    ("query", "over"),
    [("", None), ("?bls_pk=", None), (f"?a=b&bls_pk={OTHER_BLS}", OTHER_BLS), (f"?version=1&bls_pk={BLS}", BLS)],
)
async def test_bls_pk_names_the_key_that_the_proof_is_over(query: str, over: PublicKey | None) -> None:
    service = FakeSigning()
    assert (await ask("GET", f"/bls_prove_possession/{TZ4}{query}", service=service)).status == 200
    assert service.calls == [("prove_possession", BLS.hash, over)]


async def test_each_request_has_the_peer_and_an_id_of_its_own() -> None:
    service = FakeSigning()
    for api in [SigningApi(service, metrics=Metrics()) for _ in range(2)]:
        for request in [
            ApiRequest("POST", f"/keys/{TZ1}", body=b'"03"', peer="192.0.2.7"),
            ApiRequest("GET", f"/bls_prove_possession/{TZ4}", peer="2001:db8::1"),
        ]:
            await api.respond(request)
    assert [caller.address for caller in service.callers] == ["192.0.2.7", "2001:db8::1"] * 2
    assert len({caller.request_id for caller in service.callers}) == 4


# -- paths and methods


METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "get")
WRONG = [(method, path) for path, allowed in PATHS.items() for method in METHODS if method not in allowed.split(", ")]


@pytest.mark.parametrize(("method", "path"), WRONG)
async def test_another_method_is_405_with_the_allowed_ones_and_no_body(method: str, path: str) -> None:
    service = FakeSigning()
    response = await ask(method, path, b'"03"', service=service, known_keys=False)
    assert (response.status, response.body, response.headers) == (405, b"", (("allow", PATHS[path]),))
    assert not service.calls


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "*",
        "/keys",
        "/keys/",
        "/login",
        f"/keys/{TZ1}/",
        f"/keys/{TZ1}/x",
        f"/Keys/{TZ1}",
        f"/x/keys/{TZ1}",
        "/known_keys/",
        "/authorized_keys/x",
        "/bls_prove_possession",
        "/metrics",
    ],
)
async def test_an_unknown_path_is_404_as_text(method: str, path: str) -> None:
    service = FakeSigning()
    response = await ask(method, path, b'"03"', service=service)
    assert response == ApiResponse(404, b"404 page not found\n", "text/plain; charset=utf-8")
    assert not service.calls


@pytest.mark.parametrize("path", ["//keys/{}", "/keys//{}", "///keys///{}"])
async def test_repeated_slashes_count_as_one(path: str) -> None:
    assert (await ask("GET", path.format(TZ1))).status == 200


@pytest.mark.parametrize(
    ("prefix", "path", "status"),
    [
        ("/signer/v1", f"/signer/v1/keys/{TZ1}", 200),
        ("signer/v1/", f"/signer/v1/keys/{TZ1}", 200),
        ("/signer/v1", f"//signer//v1//keys/{TZ1}", 200),
        ("/signer/v1", "/signer/v1/authorized_keys", 200),
        ("/signer/v1", f"/keys/{TZ1}", 404),
        ("/signer/v1", f"/signer/keys/{TZ1}", 404),
        ("/signer/v1", f"/signer/v1/signer/v1/keys/{TZ1}", 404),
        ("/signer/v1", "/signer/v1", 404),
        ("/keys", f"/keys/{TZ1}", 404),
        ("/keys", f"/keys/keys/{TZ1}", 200),
        ("", f"/signer/v1/keys/{TZ1}", 404),
    ],
)
async def test_the_prefix_stands_in_front_of_every_route(prefix: str, path: str, status: int) -> None:
    assert (await ask("GET", path, path_prefix=prefix)).status == status


async def test_known_keys_is_refused_unless_it_was_opened() -> None:
    service = FakeSigning()
    response = await ask("GET", "/known_keys", service=service, known_keys=False)
    assert error_text(response, 403) == "List known keys request not allowed."
    assert not service.calls


# -- malformed input

BAD_BODIES = [
    (b"", "EOF"),
    (b" \r\n\t", "EOF"),
    (b'"1"', "encoding/hex: odd length hex string"),
    (b'"0x13"', "encoding/hex: invalid byte: U+0078 'x'"),
    (b'"1g"', "encoding/hex: invalid byte: U+0067 'g'"),
    (b'"13 "', "encoding/hex: invalid byte: U+0020 ' '"),
    (b'"\\u0000"', "encoding/hex: invalid byte: U+0000"),
    ('"é3"'.encode(), "encoding/hex: invalid byte: U+00C3"),
    (b'"\\ud800"', "encoding/hex: invalid byte"),
    (b'"\xff\xfe"', "encoding/hex: invalid byte"),
    (b"{}", "json: cannot unmarshal object into Go value of type string"),
    (b'["13"]', "json: cannot unmarshal array into Go value of type string"),
    (b"13", "json: cannot unmarshal number into Go value of type string"),
    (b"1.5", "json: cannot unmarshal number into Go value of type string"),
    (b"true", "json: cannot unmarshal bool into Go value of type string"),
    (b"13ff", "invalid JSON"),
    (b'"13', "invalid JSON"),
    (b"'13'", "invalid JSON"),
    (b'"13" "13"', "invalid JSON"),
    (b"-" + b"9" * 200_000, "json: cannot unmarshal number into Go value of type string"),
    (b"data=13", "invalid JSON"),
]


@pytest.mark.parametrize(("body", "text"), BAD_BODIES, ids=range(len(BAD_BODIES)))
async def test_a_body_that_is_no_json_string_of_hexadecimal_is_400(body: bytes, text: str) -> None:
    service = FakeSigning()
    assert text in error_text(await ask("POST", f"/keys/{TZ1}", body, service=service), 400)
    assert not service.calls


async def test_a_body_that_is_nested_too_deep_is_400() -> None:
    """Without being parsed: where a library has raised the recursion limit, the scanner would overflow the stack."""
    text = error_text(await ask("POST", f"/keys/{TZ1}", b"[" * 200_000), 400)
    assert text == "json: cannot unmarshal array into Go value of type string"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'"13Ff"', b"\x13\xff"),
        (b'  "00" \r\n', b"\x00"),
        (b'"\\u0031\\u0033"', b"\x13"),
        (b'""', b""),
        (b"null", b""),
    ],
)
async def test_forms_of_a_body_that_are_accepted(body: bytes, message: bytes) -> None:
    service = FakeSigning()
    await ask("POST", f"/keys/{TZ1}", body, service=service)
    assert service.calls == [("sign", ED.hash, message, 2)]


@given(st.binary(max_size=200), st.booleans())
def test_parsing_inverts_the_encoding(message: bytes, upper: bool) -> None:
    digits = message.hex().upper() if upper else message.hex()
    assert parse_payload(json.dumps(digits).encode() + b"\n") == message


@given(st.binary(max_size=30) | st.text(alphabet='"0aFg \\u', max_size=12).map(str.encode))
def test_any_body_is_a_message_or_malformed(body: bytes) -> None:
    try:
        message = parse_payload(body)
    except MalformedRequestError as exc:
        assert str(exc)
    else:
        assert message.hex() == (json.loads(body) or "").lower()


@pytest.mark.parametrize(
    ("method", "target", "text"),
    [
        ("POST", "/keys/tz1", "gotez: base58Check decoding error: data is too short"),
        ("POST", f"/keys/{TZ1[:-1]}", "gotez: base58Check decoding error: invalid checksum"),
        ("GET", f"/keys/{TZ1}0", "gotez: base58 decoding error: unexpected character at position 36: 0"),
        ("GET", "/keys/tz1<é>", "gotez: base58 decoding error: unexpected character at position 3: <"),
        ("GET", f"/keys/{ED}", "gotez: unknown public key prefix"),
        ("GET", "/keys/" + "1" * 20_000, "gotez: base58 decoding error"),
        ("GET", "/bls_prove_possession/x", "gotez: base58Check decoding error"),
        ("GET", f"/bls_prove_possession/{TZ4}?bls_pk=x", "gotez: base58Check decoding error"),
        ("GET", f"/bls_prove_possession/{TZ4}?bls_pk={TZ4}", "gotez: unknown public key prefix"),
        ("GET", f"/bls_prove_possession/{TZ4}?bls_pk={ED}", "bls_pk is not a BLS public key"),
    ],
)
async def test_a_malformed_hash_or_key_is_400(method: str, target: str, text: str) -> None:
    service = FakeSigning()
    response = await ask(method, target, b'"03"' if method == "POST" else b"", service=service)
    assert text in error_text(response, 400)
    assert not service.calls


async def test_the_hash_is_read_before_the_body() -> None:
    assert "base58" in error_text(await ask("POST", "/keys/nonsense", b"{"), 400)


# -- errors of the signer

ERRORS: list[tuple[Exception, int]] = [
    (MalformedRequestError("a"), 400),
    (TezosError("b"), 400),
    (Base58Error("c"), 400),
    (DecodeError("gotez: unknown tag 9", offset=1), 400),
    (UnsupportedByVaultError("d"), 400),
    (RefusedError("request kind `block' is not allowed", rule="allow"), 403),
    (KeyNotFoundError("this key not found in any vault"), 404),
    (WatermarkRefusedError("block level 1 below high watermark 2", standing=Mark(2, 0), reason="level_below"), 409),
    (SignerError("e"), 500),
    (ConfigurationError("f"), 500),
    (VaultError("g"), 500),
    (WatermarkStoreError("h"), 500),
    (SignatureMismatchError("i"), 500),
    (UnavailableError("j"), 502),
    (VaultUnavailableError("k"), 502),
]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", f"/keys/{TZ1}"), ("GET", f"/keys/{TZ1}"), ("GET", f"/bls_prove_possession/{TZ4}")]
)
@pytest.mark.parametrize(("error", "status"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
async def test_an_error_has_its_status_and_its_text_in_a_json_list(
    method: str, path: str, error: Exception, status: int
) -> None:
    response = await ask(method, path, b'"03"', service=FakeSigning(error))
    assert error_text(response, status) == str(error)


@pytest.mark.parametrize("path", PATHS)
async def test_a_bug_is_500_and_its_text_stays_inside(path: str) -> None:
    for method in PATHS[path].split(", "):
        response = await ask(method, path, b'"03"', service=FakeSigning(RuntimeError("edsk in a traceback")))
        assert error_text(response, 500) == "internal error, see the signer's log"


async def test_a_502_is_short() -> None:
    """It goes to the user's log ten times; the signer's log has it all."""
    text = "x" * 1000
    response = await ask("POST", f"/keys/{TZ1}", b'"03"', service=FakeSigning(UnavailableError(text)))
    assert error_text(response, 502) == "x" * 240 + "... (see the signer's log)"
    response = await ask("POST", f"/keys/{TZ1}", b'"03"', service=FakeSigning(SignerError(text)))
    assert error_text(response, 500) == text, "others are said once"


def test_502_is_only_for_what_may_be_repeated() -> None:
    """The Octez client repeats a 502 by itself, up to ten times."""
    pending, repeated = [SignerError], []
    while pending:
        error = pending.pop()
        pending += error.__subclasses__()
        assert error.status in (400, 403, 404, 409, 500, 502), "the client knows no other"
        if error.status == 502:
            repeated.append(error)
    assert UnavailableError in repeated
    assert all(issubclass(error, UnavailableError) for error in repeated)


async def test_texts_are_escaped_as_go_does_it() -> None:
    response = await ask("GET", f"/keys/{TZ1}", service=FakeSigning(VaultError('<a> & "é" \n \ud800')))
    assert b'"msg":"\\u003ca\\u003e \\u0026 \\"\xc3\xa9\\" \\n ?"' in response.body
    assert error_text(response, 500) == '<a> & "é" \n ?'


# -- metrics


def handled(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["address"], sample.labels["status"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "sign_handler_requests_total"
    }


async def test_signing_requests_are_counted_by_address_and_status_and_no_others() -> None:
    metrics, service = Metrics(), FakeSigning()
    metrics.know_addresses([TZ1])
    api = SigningApi(service, metrics=metrics)
    for path, method, body in [
        (f"/keys/{TZ1}", "POST", b'"03"'),
        (f"/keys/{TZ1}", "POST", b'"03"'),
        (f"/keys/{TZ1}", "POST", b"?"),
        (f"/keys/{TZ4}", "POST", b'"03"'),
        ("/keys/nonsense", "POST", b'"03"'),
        (f"/keys/{TZ1}", "GET", b""),
        (f"/keys/{TZ1}", "PUT", b""),
        ("/authorized_keys", "GET", b""),
    ]:
        await api.respond(ApiRequest(method, path, body=body))
    service.error = ERRORS[7][0]
    await api.respond(ApiRequest("POST", f"/keys/{TZ1}", body=b'"03"'))
    assert handled(metrics.registry) == {
        (TZ1, "OK"): 2,
        (TZ1, "Bad Request"): 1,
        (TZ1, "Conflict"): 1,
        ("unknown", "OK"): 1,
        ("unknown", "Bad Request"): 1,
    }


@pytest.mark.parametrize(("key", "body"), [(TZ1, b'"0g"'), (TZ1, b""), ("tz1" + "x" * 500, b'"03"')])
async def test_a_signing_request_that_is_none_is_logged_in_one_line(key: str, body: bytes) -> None:
    with capture_logs() as lines:
        api = SigningApi(FakeSigning(), metrics=Metrics())
        text = error_text(await api.respond(ApiRequest("POST", f"/keys/{key}", body=body, peer="192.0.2.1")), 400)
    (line,) = lines
    assert line["event"] == f"Error signing request: {text}"
    assert (line["log_level"], line["pkh"], line["outcome"]) == ("error", key[:64], "refused")
    assert line["request_id"]
    assert line["peer"] == "192.0.2.1"
    assert 0 <= line["duration_ms"] < 60_000


@pytest.mark.parametrize(
    ("method", "path", "error", "level", "status"),
    [
        ("POST", f"/wrong/keys/{TZ1}", None, "warning", 404),
        ("GET", f"/keys/{TZ1}", KeyNotFoundError("none"), "warning", 404),
        ("GET", "/keys/nonsense", None, "warning", 400),
        ("GET", "/known_keys", None, "warning", 403),
        ("PUT", f"/keys/{TZ1}", None, "warning", 405),
        ("GET", f"/keys/{TZ1}", None, "debug", 200),
        ("GET", "/authorized_keys", None, "debug", 200),
    ],
)
async def test_what_signs_nothing_is_logged_in_one_line(
    method: str, path: str, error: Exception | None, level: str, status: int
) -> None:
    api = SigningApi(FakeSigning(error), metrics=Metrics())
    with capture_logs() as lines:
        response = await api.respond(ApiRequest(method, path, peer="192.0.2.1", host="signer:6732"))
    (line,) = lines
    assert 0 <= line.pop("duration_ms") < 60_000
    assert line == {
        "event": f"{method} {path}",
        "log_level": level,
        "status": status,
        "hostname": "signer:6732",
        "peer": "192.0.2.1",
    }
    assert response.status == status


async def test_a_log_line_has_bounds() -> None:
    with capture_logs() as lines:
        await SigningApi(FakeSigning(), metrics=Metrics()).respond(
            ApiRequest("X" * 9000, "/" + "x" * 9000, host="h" * 9000)
        )
    (line,) = lines
    assert (len(line["event"]), len(line["hostname"])) == (64 + 1 + 128, 128)


async def test_a_signing_request_leaves_its_line_to_the_signer() -> None:
    with capture_logs() as lines:
        assert (await ask("POST", f"/keys/{TZ1}", b'"03"')).status == 200
    assert lines == []
