"""The account of the fake KMS: who gets what, under which document, context and state, and how errors are written."""

import base64
import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

from tests.attested.account import CREDENTIALS, Account, Key, Reply, Spelling, Tamper, _Fields
from tests.attested.documents import DEBUG_PCRS, PCRS, Chain, make_chain, make_document, root
from tests.attested.requests import Credentials, Refusal
from tests.unit.attestation.vectors import VECTORS, document
from tests.unit.attested.opening import open_envelope
from tests.unit.attested.signing import signed

_KEY = load_der_private_key(base64.b64decode(VECTORS["rsa_private_key_pkcs8"]), None)
assert isinstance(_KEY, RSAPrivateKey)
RSA: RSAPrivateKey = _KEY
PUBLIC_KEY = RSA.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
X25519_KEY = bytes.fromhex("302a300506032b656e032100") + bytes(range(32))
CONTEXT = {"tezos-signer:format": "1", "tezos-signer:pkh": "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"}
ARN = Account().keys[0].arn


@cache
def chain(name: str = "test.nitro-enclaves") -> Chain:
    return make_chain(at=datetime.now(UTC), authority=root(name))


def recipient(*, of: Chain | None = None, age: float = 0, public_key: bytes | None = PUBLIC_KEY, **changes: Any) -> Any:
    made_at = datetime.now(UTC) - timedelta(seconds=age)
    data = make_document(of or chain(), made_at=made_at, public_key=public_key, **changes)
    return around(data)


def around(data: bytes) -> dict[str, str]:
    return {
        "KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_256",
        "AttestationDocument": base64.b64encode(data).decode(),
    }


def ask(account: Account, operation: str, /, *, tamper: Tamper | None = None, **fields: Any) -> Any:
    """The answer's members, or the name of the error."""
    reply = account.answer(signed(operation, fields), tamper)
    answer = json.loads(reply.body)
    if reply.status != 200:
        return answer["__type"]
    return answer


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_key(account: Account, **fields: Any) -> Any:
    return ask(account, "GenerateDataKey", KeyId="alias/baker", KeySpec="AES_256", **fields)


# -- the operations


def test_encrypt_and_decrypt() -> None:
    account = Account()
    sealed = ask(account, "Encrypt", KeyId="alias/baker", Plaintext=text(b"secret"), EncryptionContext=CONTEXT)
    assert sealed == {
        "CiphertextBlob": sealed["CiphertextBlob"],
        "KeyId": ARN,
        "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    }
    assert base64.b64decode(sealed["CiphertextBlob"]).startswith(bytes.fromhex("0102020078"))
    blob = sealed["CiphertextBlob"]
    plain = ask(account, "Decrypt", CiphertextBlob=blob, EncryptionContext=CONTEXT)
    assert (plain["Plaintext"], plain["KeyId"]) == (text(b"secret"), ARN)
    assert set(plain) == {"Plaintext", "KeyId", "EncryptionAlgorithm", "KeyMaterialId"}
    attested = ask(account, "Decrypt", CiphertextBlob=blob, EncryptionContext=CONTEXT, Recipient=recipient())
    assert set(attested) == {"CiphertextForRecipient", "KeyId", "EncryptionAlgorithm", "KeyMaterialId"}
    assert open_envelope(RSA, attested["CiphertextForRecipient"]) == b"secret"
    assert [call.operation for call in account.calls] == ["Encrypt", "Decrypt", "Decrypt"]
    assert account.calls[2].document is not None
    assert account.calls[2].context == CONTEXT


def test_a_data_key_opens_to_what_it_was() -> None:
    account = Account(chunk_size=5)
    made = data_key(account, EncryptionContext=CONTEXT, Recipient=recipient())
    assert set(made) == {"CiphertextBlob", "CiphertextForRecipient", "KeyId", "KeyMaterialId"}
    key = open_envelope(RSA, made["CiphertextForRecipient"])
    assert len(key) == 32
    assert len(base64.b64decode(made["CiphertextForRecipient"])) == 493 + 9 * 2, "ten pieces instead of one"
    blob = made["CiphertextBlob"]
    again = ask(account, "Decrypt", CiphertextBlob=blob, KeyId=ARN, EncryptionContext=CONTEXT, Recipient=recipient())
    assert open_envelope(RSA, again["CiphertextForRecipient"]) == key
    assert data_key(account)["Plaintext"] != data_key(account)["Plaintext"]
    assert len(base64.b64decode(ask(account, "GenerateDataKey", KeyId=ARN, NumberOfBytes=7)["Plaintext"])) == 7


def test_random_bytes() -> None:
    account = Account()
    assert len(base64.b64decode(ask(account, "GenerateRandom", NumberOfBytes=1024)["Plaintext"])) == 1024
    sealed = ask(account, "GenerateRandom", NumberOfBytes=32, Recipient=recipient())
    assert len(open_envelope(RSA, sealed["CiphertextForRecipient"])) == 32


def test_keys_have_several_names() -> None:
    account = Account()
    alias = ARN.replace(f"key/{account.keys[0].key_id}", "alias/baker")
    for name in (account.keys[0].key_id, ARN, "alias/baker", alias):
        metadata = ask(account, "DescribeKey", KeyId=name)["KeyMetadata"]
        assert (metadata["Arn"], metadata["Enabled"], metadata["KeyState"]) == (ARN, True, "Enabled")
    for name in ("alias/other", "other", ARN[:-1]):
        assert ask(account, "DescribeKey", KeyId=name) == "NotFoundException"


def test_blobs_outlive_the_process() -> None:
    blob = ask(Account(), "Encrypt", KeyId="alias/baker", Plaintext=text(b"secret"))["CiphertextBlob"]
    assert ask(Account(), "Decrypt", CiphertextBlob=blob)["Plaintext"] == text(b"secret")


def test_sizes() -> None:
    account = Account()
    longest = ask(account, "Encrypt", KeyId="alias/baker", Plaintext=text(bytes(4096)))["CiphertextBlob"]
    assert len(base64.b64decode(longest)) <= 6144
    for fields in (
        {"Plaintext": text(bytes(4097))}, {"Plaintext": ""}, {}, {"Plaintext": text(b"x"), "KeyId": None}
    ):  # fmt: skip
        assert ask(account, "Encrypt", **{"KeyId": "alias/baker"} | fields) == "ValidationException"
    assert ask(account, "Decrypt", CiphertextBlob=text(bytes(6145))) == "ValidationException"
    for number in (None, 0, 1025):
        assert ask(account, "GenerateRandom", NumberOfBytes=number) == "ValidationException"
        assert ask(account, "GenerateDataKey", KeyId=ARN, NumberOfBytes=number) == "ValidationException"
    assert ask(account, "GenerateDataKey", KeyId=ARN, KeySpec="AES_512") == "ValidationException"
    assert ask(account, "GenerateDataKey", KeyId=ARN, KeySpec="AES_256", NumberOfBytes=3) == "ValidationException"


@pytest.mark.parametrize(
    ("operation", "body", "name"),
    [
        ("Encrypt", b"{", "SerializationException"),
        ("Encrypt", b"[]", "SerializationException"),
        ("Encrypt", b"\xff", "SerializationException"),
        ("Encrypt", b'{"KeyId": 1}', "SerializationException"),
        ("Encrypt", b'{"KeyId": "alias/baker", "Plaintext": "*"}', "SerializationException"),
        ("Encrypt", b'{"KeyId": "alias/baker", "Plaintext": "YQ==", "EncryptionContext": {"a": 1}}',
         "SerializationException"),
        ("Decrypt", b'{"CiphertextBlob": "YQ==", "Recipient": []}', "SerializationException"),
        ("GenerateRandom", b'{"NumberOfBytes": "1"}', "SerializationException"),
        ("Sign", b"{}", "UnknownOperationException"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_read(operation: str, body: bytes, name: str) -> None:
    reply = Account().answer(signed(operation, body))
    assert (reply.status, json.loads(reply.body)["__type"]) == (400, name)


def test_content_type_and_service_are_those_of_the_protocol() -> None:
    account = Account()
    assert account.answer(signed("GenerateRandom", {"NumberOfBytes": 1})).status == 200
    for other in (
        signed("GenerateRandom", {"NumberOfBytes": 1}, content_type="application/json"),
        signed("GenerateRandom", {"NumberOfBytes": 1}, service="DynamoDB_20120810"),
    ):
        reply = account.answer(other)
        assert json.loads(reply.body)["__type"] == "UnknownOperationException"


# -- who asks


def test_only_known_credentials_are_served() -> None:
    account = Account()
    fresh = Credentials("AKIDFRESH", "new", "token")
    request = signed("GenerateRandom", {"NumberOfBytes": 1}, fresh)
    assert json.loads(account.answer(request).body)["__type"] == "UnrecognizedClientException"
    account.credentials = [fresh]
    assert account.answer(request).status == 200
    fresh.expired = True
    assert json.loads(account.answer(request).body)["__type"] == "ExpiredTokenException"
    assert [call.error for call in account.calls] == ["UnrecognizedClientException", "", "ExpiredTokenException"]


def _same(moment: datetime) -> datetime:
    return moment


def test_the_clock_is_the_account_s() -> None:
    for minutes, error in ((6, "expired"), (-6, "not yet current"), (4, "")):
        then = datetime.now(UTC) + timedelta(minutes=minutes)
        account = Account(clock=partial(_same, then))
        answer = json.loads(account.answer(signed("GenerateRandom", {"NumberOfBytes": 1})).body)
        assert (f"Signature {error}: " in answer["message"]) if error else ("Plaintext" in answer)


# -- documents


def test_documents_of_the_vectors_are_judged_by_their_reasons() -> None:
    """Under the vectors' root and at their time; signatures of requests are left to the other tests."""
    now = datetime.fromisoformat(VECTORS["defaults"]["now"])
    account = Account(clock=lambda: now, root_sha256=bytes.fromhex(VECTORS["defaults"]["root_sha256"]))
    outcomes = {}
    for case in VECTORS["documents"]:
        if "now" in case.get("params", {}):
            continue
        try:
            account._judge(_fields_with(document(case["name"])))
            outcomes[case["name"]] = "ok"
        except Refusal as refusal:
            assert refusal.name == "ValidationException"
            outcomes[case["name"]] = str(refusal.text)
    for case in VECTORS["documents"]:
        outcome = outcomes.get(case["name"], "not tried")
        if outcome == "not tried":
            continue
        if case["expect"] in ("nonce", "user_data", "module", "pcr", "debug"):  # not KMS's to judge, or by policy
            assert outcome == "ok" or "public_key" in outcome
        elif case["expect"] == "ok" and case["facts"]["public_key"]:
            assert outcome == "ok"
        else:
            assert f"refused, {'public_key' if case['expect'] == 'ok' else case['expect']}" in outcome
    assert len(outcomes) > 50


def _fields_with(data: bytes) -> _Fields:
    return _Fields({"Recipient": around(data)})


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("another root", {"of": "other"}),
        ("too old", {"age": 301}),
        ("of the future", {"age": -120}),
        ("no key", {"public_key": None}),
        ("X25519", {"public_key": X25519_KEY}),
        ("key that is none", {"public_key": b"key"}),
    ],
)
def test_a_document_that_kms_refuses(fault: str, changes: dict[str, Any]) -> None:
    account = Account()
    blob = ask(account, "Encrypt", KeyId="alias/baker", Plaintext=text(b"secret"))["CiphertextBlob"]
    if "of" in changes:
        changes = changes | {"of": chain("other.nitro-enclaves")}
    for fields in ({"CiphertextBlob": blob}, {"CiphertextBlob": blob, "KeyId": ARN}):
        assert ask(account, "Decrypt", **fields, Recipient=recipient(**changes)) == "ValidationException"
    assert data_key(account, Recipient=recipient(**changes)) == "ValidationException"
    assert ask(account, "GenerateRandom", NumberOfBytes=1, Recipient=recipient(**changes)) == "ValidationException"


@pytest.mark.parametrize(
    "change",
    [
        {"KeyEncryptionAlgorithm": "RSAES_OAEP_SHA_1"},
        {"KeyEncryptionAlgorithm": None},
        {"AttestationDocument": None},
        {"AttestationDocument": text(b"garbage")},
    ],
)
def test_a_recipient_that_is_none(change: dict[str, Any]) -> None:
    assert data_key(Account(), Recipient=recipient() | change) == "ValidationException"
    assert data_key(Account(), Recipient={}) == "ValidationException"


def test_an_unsigned_document_of_the_emulator_only_where_it_is_allowed() -> None:
    emulated = document("emulator_header")
    made_at = datetime.fromisoformat(VECTORS["defaults"]["now"])
    account = Account(clock=lambda: made_at)
    with pytest.raises(Refusal, match="refused, algorithm"):
        account._judge(_fields_with(emulated))
    account.takes_emulated = True
    found = account._judge(_fields_with(emulated))
    facts = VECTORS["documents"][0]["facts"]
    assert (found.module_id, found.timestamp) == (facts["module_id"], facts["timestamp"])
    assert found.pcrs[0].hex() == facts["pcrs"]["0"]
    assert found.public_key == PUBLIC_KEY
    account.clock = lambda: made_at + timedelta(seconds=301)
    with pytest.raises(Refusal, match="refused, stale"):
        account._judge(_fields_with(emulated))
    account.clock = lambda: datetime.now(UTC)
    assert account._judge(_Fields({"Recipient": recipient()})).public_key == PUBLIC_KEY
    with pytest.raises(Refusal, match="refused, root"):
        account._judge(_Fields({"Recipient": recipient(of=chain("other.nitro-enclaves"))}))
    for broken in (emulated[:-200], b"\x84\x43\xa1\x01\x20", b"\x84\x43\xa1\x01\x20\xa0\x41\xa0\x40"):
        with pytest.raises(Refusal, match="refused"):
            account._judge(_fields_with(broken))


# -- policies, contexts, states


def test_conditions_on_registers() -> None:
    account = Account()
    key = account.keys[0]
    blob = ask(account, "Encrypt", KeyId="alias/baker", Plaintext=text(b"secret"))["CiphertextBlob"]
    key.pcrs = {0: [bytes(47) + b"\1", PCRS[0]], 3: [PCRS[3]]}
    good: dict[str, Any] = {"CiphertextBlob": blob, "Recipient": recipient()}
    assert "CiphertextForRecipient" in ask(account, "Decrypt", **good)
    assert "CiphertextForRecipient" in data_key(account, Recipient=recipient())
    for pcrs in (PCRS | {0: PCRS[1]}, PCRS | {3: PCRS[4]}, DEBUG_PCRS):
        assert ask(account, "Decrypt", CiphertextBlob=blob, Recipient=recipient(pcrs=pcrs)) == "AccessDeniedException"
        assert data_key(account, Recipient=recipient(pcrs=pcrs)) == "AccessDeniedException"
    assert ask(account, "Decrypt", CiphertextBlob=blob) == "AccessDeniedException", "without a document"
    assert data_key(account) == "AccessDeniedException"
    assert "CiphertextBlob" in ask(account, "Encrypt", KeyId=ARN, Plaintext=text(b"x")), "which takes no document"
    key.pcrs = {16: [bytes(48)]}
    assert ask(account, "Decrypt", **good) == "AccessDeniedException", "a register that is not in the document"


def test_conditions_on_the_context_and_denied_operations() -> None:
    account = Account()
    account.keys[0].context = {"tezos-signer:format": "1"}
    assert data_key(account) == "AccessDeniedException"
    assert data_key(account, EncryptionContext={"tezos-signer:format": "2"}) == "AccessDeniedException"
    assert "KeyMetadata" in ask(account, "DescribeKey", KeyId=ARN), "which has no context"
    assert "Plaintext" in data_key(account, EncryptionContext=CONTEXT)
    account.keys[0].denied = ["Encrypt"]
    fields: dict[str, Any] = {"KeyId": ARN, "Plaintext": text(b"x"), "EncryptionContext": CONTEXT}
    reply = account.answer(signed("Encrypt", fields))
    assert "with an explicit deny in a resource-based policy" in json.loads(reply.body)["Message"]


def test_the_encryption_context_is_bound() -> None:
    account = Account()
    blob = data_key(account, EncryptionContext=CONTEXT)["CiphertextBlob"]
    for context in (None, {}, CONTEXT | {"more": "1"}, CONTEXT | {"tezos-signer:pkh": "tz1"}):
        answer = ask(account, "Decrypt", CiphertextBlob=blob, EncryptionContext=context)
        assert answer == "InvalidCiphertextException"
    backwards = dict(reversed(CONTEXT.items()))
    assert "Plaintext" in ask(account, "Decrypt", CiphertextBlob=blob, EncryptionContext=backwards)


def test_damaged_and_foreign_blobs() -> None:
    account = Account()
    blob = base64.b64decode(data_key(account)["CiphertextBlob"])
    for place in range(len(blob)):
        damaged = bytearray(blob)
        damaged[place] ^= 1
        assert ask(account, "Decrypt", CiphertextBlob=text(bytes(damaged))) == "InvalidCiphertextException"
    assert ask(account, "Decrypt", CiphertextBlob=text(blob[:30])) == "InvalidCiphertextException"
    assert ask(account, "Decrypt", KeyId=ARN, CiphertextBlob=text(b"garbage")) == "InvalidCiphertextException"


def test_a_blob_of_another_key() -> None:
    account = Account()
    other = account.add(aliases=["alias/other"])
    blob = ask(account, "Encrypt", KeyId="alias/other", Plaintext=text(b"x"))["CiphertextBlob"]
    assert ask(account, "Decrypt", KeyId=ARN, CiphertextBlob=blob) == "IncorrectKeyException"
    assert ask(account, "Decrypt", KeyId=other.arn, CiphertextBlob=blob)["KeyId"] == other.arn
    assert ask(account, "Decrypt", CiphertextBlob=blob)["KeyId"] == other.arn, "the blob chooses where nobody does"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"state": "Disabled"}, "DisabledException"),
        ({"state": "PendingDeletion"}, "KMSInvalidStateException"),
        ({"state": "PendingImport"}, "KMSInvalidStateException"),
        ({"state": "Unavailable"}, "KMSInvalidStateException"),
        ({"spec": "RSA_2048"}, "InvalidKeyUsageException"),
    ],
)
def test_states(change: dict[str, Any], name: str) -> None:
    account = Account()
    blob = data_key(account)["CiphertextBlob"]
    account.keys = [Key(account.keys[0].key_id, ["alias/baker"], **change)]
    assert data_key(account) == name
    assert ask(account, "Encrypt", KeyId=ARN, Plaintext=text(b"x")) == name
    assert ask(account, "Decrypt", CiphertextBlob=blob) == name
    metadata = ask(account, "DescribeKey", KeyId=ARN)["KeyMetadata"]
    assert metadata["Enabled"] is ("spec" in change)
    assert ("EncryptionAlgorithms" in metadata) is ("state" in change)


# -- how answers and errors are written


@pytest.mark.parametrize(
    ("spelling", "body", "headers"),
    [
        (Spelling.AS_SEEN, {"__type": "AccessDeniedException", "Message": "no"}, {}),
        (Spelling.LOWER, {"__type": "AccessDeniedException", "message": "no"}, {}),
        (Spelling.UPPER, {"__type": "AccessDeniedException", "Message": "no"}, {}),
        (Spelling.NO_TEXT, {"__type": "AccessDeniedException"}, {}),
        (Spelling.PREFIX, {"__type": "com.amazonaws.kms#AccessDeniedException", "message": "no"}, {}),
        (Spelling.SUFFIX, {"__type": "AccessDeniedException:http://internal.amazon.com/", "message": "no"}, {}),
        (Spelling.HEADER, None, {"x-amzn-ErrorType": "AccessDeniedException:http://internal.amazon.com/coral/"}),
    ],
)
def test_spellings_of_errors(spelling: Spelling, body: Any, headers: dict[str, str]) -> None:
    reply = Account(spelling=spelling).refuse(Refusal("AccessDeniedException", "no"))
    assert reply == Reply(400, json.dumps(body).encode() if body else b"", headers)


def test_errors_as_they_were_seen() -> None:
    account = Account()
    assert json.loads(account.refuse(Refusal("InvalidCiphertextException", "x")).body) == {
        "__type": "InvalidCiphertextException"
    }
    other = account.refuse(Refusal("KMSInternalException", "x", status=500))
    assert (other.status, json.loads(other.body)["message"]) == (500, "x")


@pytest.mark.parametrize(
    ("how", "members"), [("missing", {}), ("null", {"Plaintext": None}), ("empty", {"Plaintext": ""})]
)
def test_what_stands_beside_an_envelope(how: str, members: dict[str, Any]) -> None:
    made = data_key(Account(empty_plaintext=how), Recipient=recipient())
    assert {name: value for name, value in made.items() if name == "Plaintext"} == members
    assert "CiphertextForRecipient" in made


def test_tampering() -> None:
    account = Account()
    blobs = [
        ask(account, "Encrypt", KeyId="alias/baker", Plaintext=text(plaintext))["CiphertextBlob"]
        for plaintext in (b"first", b"second")
    ]

    def tampered(tamper: Tamper | None, blob: str = blobs[1]) -> Any:
        return ask(account, "Decrypt", tamper=tamper, CiphertextBlob=blob, Recipient=recipient())

    assert open_envelope(RSA, tampered(None, blobs[0])["CiphertextForRecipient"]) == b"first"
    swapped = tampered(Tamper.OTHER_PLAINTEXT)
    assert open_envelope(RSA, swapped["CiphertextForRecipient"]) == b"first"
    assert swapped["KeyId"] == ARN
    other_key = tampered(Tamper.OTHER_KEY)
    assert other_key["KeyId"] != ARN
    assert open_envelope(RSA, other_key["CiphertextForRecipient"]) == b"second"
    message = base64.b64decode(tampered(Tamper.OTHER_RECIPIENT)["CiphertextForRecipient"])
    assert hashlib.sha256(PUBLIC_KEY).digest() not in message
    too = tampered(Tamper.PLAINTEXT_TOO)
    assert (too["Plaintext"], "CiphertextForRecipient" in too) == (text(b"second"), True)
    only = tampered(Tamper.PLAINTEXT_ONLY)
    assert (only["Plaintext"], "CiphertextForRecipient" in only) == (text(b"second"), False)
    none = tampered(Tamper.NO_ENVELOPE)
    assert not {"Plaintext", "CiphertextForRecipient"} & set(none)
    damaged = base64.b64decode(tampered(Tamper.DAMAGED_ENVELOPE)["CiphertextForRecipient"])
    assert not damaged.endswith(bytes(10))


def test_credentials_of_the_account_are_its_own() -> None:
    one, two = Account(), Account()
    one.credentials[0].expired = True
    assert not two.credentials[0].expired
    assert replace(CREDENTIALS) == two.credentials[0]
