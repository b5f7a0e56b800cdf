"""Documents: every vector with its reason, and what an attacker may try beside them."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import load_der_private_key
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from signer.attestation.document import MAX_DOCUMENT, ROOT_SHA256, Document, DocumentError, Expected, verify
from signer.errors import SignerError
from tests.attested.documents import (
    DEBUG_PCRS,
    MODULE_ID,
    PCRS,
    Authority,
    Chain,
    issue,
    make_chain,
    make_document,
    make_payload,
    milliseconds,
    register,
    root,
    sign,
)
from tests.unit.attestation.vectors import DOCUMENTS, VECTORS, document, inputs

NOW = datetime(2026, 11, 25, 9, 0, tzinfo=UTC)
NONCE = bytes(range(32))
WANTED = Expected(nonce=NONCE, root_sha256=root().sha256)
_REASONS = {"size", "cbor", "cose", "algorithm", "payload", "root", "chain", "validity", "signature", "stale"}
_REASONS |= {"nonce", "user_data", "module", "debug", "pcr", "public_key"}


@cache
def chain(intermediates: int = 3) -> Chain:
    return make_chain(at=NOW, intermediates=intermediates)


def made(**changes: Any) -> bytes:
    chosen: dict[str, Any] = {"made_at": NOW, "nonce": NONCE} | changes
    return make_document(chain(), **chosen)


def refusal(data: bytes, expected: Expected = WANTED, now: datetime = NOW) -> str:
    """The reason, or "" for a document that is accepted."""
    try:
        verify(data, expected, now=now)
    except DocumentError as exc:
        return exc.reason
    return ""


# -- vectors


@pytest.mark.parametrize("name", DOCUMENTS)
def test_vector(name: str) -> None:
    case = DOCUMENTS[name]
    expected, now = inputs(case.get("params"))
    if case["expect"] != "ok":
        assert refusal(document(name), expected, now) == case["expect"]
        return
    found, facts = verify(document(name), expected, now=now), case["facts"]
    assert (found.module_id, found.timestamp) == (facts["module_id"], facts["timestamp"])
    assert {index: value.hex() for index, value in found.pcrs.items() if any(value)} == {
        int(index): value for index, value in facts["pcrs"].items()
    }
    for field in ("public_key", "user_data", "nonce"):
        value = getattr(found, field)
        assert (None if value is None else value.hex()) == facts[field]


def test_the_vectors_cover_every_reason_but_size() -> None:
    assert {case["expect"] for case in DOCUMENTS.values()} == _REASONS - {"size"} | {"ok"}


def test_the_pinned_root_is_that_of_aws() -> None:
    certificate = base64.b64decode(VECTORS["aws_root_g1"]["certificate"])
    assert hashlib.sha256(certificate).digest() == ROOT_SHA256
    assert Expected(nonce=None).root_sha256 == ROOT_SHA256
    subject = x509.load_der_x509_certificate(certificate).subject.rfc4514_string()
    assert subject == "CN=aws.nitro-enclaves,OU=AWS,O=Amazon,C=US"


def test_the_vectors_are_of_the_parts_that_they_name() -> None:
    test_root = base64.b64decode(VECTORS["test_root"]["certificate"])
    assert hashlib.sha256(test_root).hexdigest() == VECTORS["test_root"]["sha256"] == VECTORS["defaults"]["root_sha256"]
    payload = cbor2.loads(cbor2.loads(document("valid"))[2])
    assert payload["cabundle"][0] == test_root
    certificate = x509.load_der_x509_certificate(payload["certificate"])
    key = load_der_private_key(base64.b64decode(VECTORS["leaf_private_key_pkcs8"]), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert certificate.public_key() == key.public_key()
    expected, now = inputs()
    found = verify(document("valid"), expected, now=now)
    assert found.pcrs[3] == register(VECTORS["pcr3_role_arn"].encode()), "the ARN is hashed once, behind the zeros"
    assert found.pcrs[4] == register(VECTORS["pcr4_instance_id"].encode())


def test_the_root_of_aws_is_wanted_unless_another_is_configured() -> None:
    expected, now = inputs()
    assert refusal(document("valid"), replace(expected, root_sha256=ROOT_SHA256), now) == "root"


# -- our own documents


def test_a_document_says_what_was_put_in() -> None:
    data = made(public_key=b"key", user_data=b"data", pcrs=PCRS | {16: bytes(range(48))})
    found = verify(data, WANTED, now=NOW)
    assert found == Document(
        module_id=MODULE_ID,
        timestamp=milliseconds(NOW),
        pcrs=PCRS | {16: bytes(range(48))},
        public_key=b"key",
        user_data=b"data",
        nonce=NONCE,
    )
    assert found.made_at == NOW
    assert not found.is_debug


def test_the_layout_is_that_of_current_devices() -> None:
    data = made()
    assert data.startswith(bytes.fromhex("8444a1013822a059"))
    payload = cbor2.loads(data)[2]
    assert payload.startswith(b"\xbf\x69module_id")
    assert payload.endswith(b"\xff")
    assert b"\x69timestamp\x1b" in payload
    theirs = cbor2.loads(cbor2.loads(document("valid_nulls"))[2])
    ours = cbor2.loads(payload)
    assert list(ours) == list(theirs)
    assert ours["public_key"] is theirs["public_key"] is None
    assert list(ours["pcrs"]) == list(theirs["pcrs"]) == list(range(16))
    assert len(ours["cabundle"]) == len(theirs["cabundle"]) == 4


@pytest.mark.parametrize("intermediates", [0, 1, 2, 3])
def test_the_length_of_the_chain_is_free(intermediates: int) -> None:
    data = make_document(chain(intermediates), made_at=NOW, nonce=NONCE)
    assert refusal(data) == ""


def test_another_root_of_the_same_pattern_is_refused() -> None:
    other = make_chain(at=NOW, authority=root("other.nitro-enclaves"))
    data = make_document(other, made_at=NOW, nonce=NONCE)
    assert refusal(data) == "root"
    assert refusal(data, replace(WANTED, root_sha256=other.root_sha256)) == ""


def test_debug_mode_is_refused_unless_allowed() -> None:
    data = made(pcrs=DEBUG_PCRS)
    assert refusal(data) == "debug"
    allowed = replace(WANTED, allow_debug=True, pcrs={0: [PCRS[0]], 20: [bytes(48)]})
    assert verify(data, allowed, now=NOW).is_debug


def test_one_register_that_is_zero_is_no_debug_mode() -> None:
    for index in (0, 1, 2):
        data = made(pcrs=PCRS | {index: bytes(48)})
        assert refusal(data) == ""
        assert refusal(data, replace(WANTED, pcrs={index: [PCRS[index]]}, allow_debug=True)) == "pcr"


def test_one_of_several_values_of_a_register_will_do() -> None:
    assert refusal(made(), replace(WANTED, pcrs={0: {bytes(48), PCRS[0]}, 8: [bytes(48)]})) == ""
    assert refusal(made(), replace(WANTED, pcrs={0: {bytes(48), PCRS[1]}})) == "pcr"
    assert refusal(made(), replace(WANTED, pcrs={0: []})) == "pcr"
    assert refusal(made(), replace(WANTED, pcrs={16: [bytes(48)]})) == "pcr"


@pytest.mark.parametrize(("seconds", "reason"), [(0, ""), (-300, ""), (-300.001, "stale"), (60, ""), (60.001, "stale")])
def test_age(seconds: float, reason: str) -> None:
    assert refusal(made(made_at=NOW + timedelta(seconds=seconds))) == reason


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-300.001, "300.001 s old, at most 300"), (60.001, "60.001 s ahead of this clock, at most 60")],
)
def test_a_limit_is_seen_to_be_passed(seconds: float, text: str) -> None:
    with pytest.raises(DocumentError, match=text):
        verify(made(made_at=NOW + timedelta(seconds=seconds)), WANTED, now=NOW)


def test_the_time_zone_of_now_is_free_but_needed() -> None:
    elsewhere = NOW.astimezone(datetime.strptime("+0530", "%z").tzinfo)
    assert refusal(made(), now=elsewhere) == ""
    with pytest.raises(ValueError, match="time zone"):
        verify(made(), WANTED, now=NOW.replace(tzinfo=None))


@pytest.mark.parametrize("nonce", [None, b"", NONCE[:-1], NONCE + b"\0"])
def test_a_nonce_must_be_the_one_that_was_asked_for(nonce: bytes | None) -> None:
    assert refusal(made(nonce=nonce)) == "nonce"
    assert refusal(made(nonce=nonce), replace(WANTED, nonce=None)) == ""


def test_an_empty_nonce_is_not_an_absent_one() -> None:
    assert refusal(made(nonce=None), replace(WANTED, nonce=b"")) == "nonce"
    assert refusal(made(nonce=b""), replace(WANTED, nonce=b"")) == ""


def test_an_empty_public_key_is_none() -> None:
    assert verify(made(public_key=b""), WANTED, now=NOW).public_key is None
    assert refusal(made(public_key=b""), replace(WANTED, needs_public_key=True)) == "public_key"


@pytest.mark.parametrize("length", [0, MAX_DOCUMENT + 1, 1_000_000])
def test_size(length: int) -> None:
    assert refusal(bytes(length)) == "size"
    assert refusal(b"\x84" * length) == "size"


def test_the_first_failing_step_names_the_reason() -> None:
    """Step by step, each fault hides all that come after it."""
    late = NOW + timedelta(hours=4)
    wants = replace(
        WANTED,
        nonce=b"n",
        user_data=b"u",
        module_id="m",
        pcrs={0: [b"p"]},
        needs_public_key=True,
        max_age=0,
        max_skew=-1,
    )
    faulty = made(nonce=None, pcrs=DEBUG_PCRS)
    forged = faulty[:-1] + bytes([faulty[-1] ^ 1])
    assert refusal(forged, replace(wants, root_sha256=ROOT_SHA256), late) == "root"
    assert refusal(forged, wants, late) == "validity"
    assert refusal(forged, wants) == "signature"
    assert refusal(faulty, wants) == "stale"
    wants = replace(wants, max_skew=0.0)
    assert refusal(faulty, wants) == "nonce"
    wants = replace(wants, nonce=None)
    assert refusal(faulty, wants) == "user_data"
    wants = replace(wants, user_data=None)
    assert refusal(faulty, wants) == "module"
    wants = replace(wants, module_id=None)
    assert refusal(faulty, wants) == "debug"
    wants = replace(wants, allow_debug=True)
    assert refusal(faulty, wants) == "public_key"
    assert refusal(made(nonce=None), wants) == "pcr"


def test_texts_say_what_to_do() -> None:
    for reason in _REASONS:
        error = DocumentError(reason)
        assert isinstance(error, SignerError)
        assert str(error).startswith(f"attestation document refused, {reason}: ")
    with pytest.raises(DocumentError, match=f"PCR0 is {PCRS[0].hex()}"):
        verify(made(), replace(WANTED, pcrs={0: [bytes(48)]}), now=NOW)


# -- certificates that Amazon would not issue, under a root that is trusted


def _signed_by(leaf: Authority, *above: Authority) -> bytes:
    whole = Chain([each.der for each in above], leaf.der, leaf.key)
    return make_document(whole, made_at=NOW, nonce=NONCE)


_LIFE: dict[str, Any] = {"begins": NOW - timedelta(minutes=1), "lives": timedelta(hours=3)}
_LEAF: dict[str, Any] = _LIFE | {"is_authority": False, "usages": ("digital_signature",)}
_UNKNOWN = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])


@pytest.mark.parametrize(
    ("fault", "leaf", "reason"),
    [
        ("none", {}, ""),
        ("is an authority", {"is_authority": True}, "chain"),
        ("may not sign", {"usages": ("content_commitment",)}, "chain"),
        ("P-256", {"curve": ec.SECP256R1()}, "chain"),
        ("P-521", {"curve": ec.SECP521R1()}, "chain"),
        ("unknown critical extension", {"extra": [(_UNKNOWN, True)]}, "chain"),
        ("unknown extension", {"extra": [(_UNKNOWN, False)]}, ""),
        ("over", {"begins": NOW - timedelta(hours=4)}, "validity"),
        ("not yet", {"begins": NOW + timedelta(seconds=1)}, "validity"),
    ],
)
def test_leaf(fault: str, leaf: dict[str, Any], reason: str) -> None:
    assert refusal(_signed_by(issue(root(), "leaf", **_LEAF | leaf), root())) == reason


@pytest.mark.parametrize(
    ("fault", "authority", "reason"),
    [
        ("none", {}, ""),
        ("no authority", {"is_authority": False}, "chain"),
        ("may not issue", {"usages": ("digital_signature", "crl_sign")}, "chain"),
        ("P-256", {"curve": ec.SECP256R1()}, "chain"),
        ("path of 0 with 0 below", {"path_length": 0}, ""),
        ("unknown critical extension", {"extra": [(_UNKNOWN, True)]}, "chain"),
        ("over", {"begins": NOW - timedelta(hours=4)}, "validity"),
    ],
)
def test_authority(fault: str, authority: dict[str, Any], reason: str) -> None:
    above = issue(root(), "authority", **_LIFE | authority)
    assert refusal(_signed_by(issue(above, "leaf", **_LEAF), root(), above)) == reason


def test_the_limit_of_a_path_counts_authorities_only() -> None:
    first = issue(root(), "first", **_LIFE, path_length=1)
    second = issue(first, "second", **_LIFE)
    third = issue(second, "third", **_LIFE)
    assert refusal(_signed_by(issue(second, "leaf", **_LEAF), root(), first, second)) == ""
    assert refusal(_signed_by(issue(third, "leaf", **_LEAF), root(), first, second, third)) == "chain"


def test_names_must_chain_too() -> None:
    above = issue(root(), "authority", **_LIFE)
    renamed = issue(root(), "renamed", **_LIFE)
    leaf = issue(Authority(renamed.certificate, above.key), "leaf", **_LEAF)
    assert refusal(_signed_by(leaf, root(), above)) == "chain"


def test_a_name_in_another_encoding_is_another_name() -> None:
    above = issue(root(), "authority", **_LIFE)
    printable = x509.Name(
        [
            x509.NameAttribute(each.oid, each.value, _type=_ASN1Type.PrintableString)
            for each in above.certificate.subject
        ]
    )
    assert printable == above.certificate.subject
    builder = x509.CertificateBuilder().subject_name(printable).issuer_name(root().certificate.subject)
    builder = builder.public_key(above.key.public_key()).serial_number(1)
    builder = builder.not_valid_before(_LIFE["begins"]).not_valid_after(_LIFE["begins"] + _LIFE["lives"])
    for extension in above.certificate.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    double = Authority(builder.sign(root().key, SHA384()), above.key)
    assert refusal(_signed_by(issue(double, "leaf", **_LEAF), root(), double)) == ""
    assert refusal(_signed_by(issue(double, "leaf", **_LEAF), root(), above)) == "chain"


def test_a_key_of_the_same_name_is_not_the_issuer() -> None:
    above, double = (issue(root(), "authority", **_LIFE) for _ in range(2))
    assert refusal(_signed_by(issue(double, "leaf", **_LEAF), root(), above)) == "chain"


def test_bytes_behind_a_certificate_are_refused() -> None:
    leaf = issue(root(), "leaf", **_LEAF)
    whole = Chain([root().der], leaf.der + b"\0", leaf.key)
    assert refusal(make_document(whole, made_at=NOW, nonce=NONCE)) == "chain"


def test_a_certificate_signed_with_another_hash_is_refused() -> None:
    """Same key and names; only the algorithm differs."""
    key = ec.generate_private_key(ec.SECP384R1())
    good = issue(root(), "leaf", **_LEAF).certificate
    builder = (
        x509.CertificateBuilder()
        .subject_name(good.subject)
        .issuer_name(good.issuer)
        .public_key(key.public_key())
        .serial_number(good.serial_number)
        .not_valid_before(good.not_valid_before_utc)
        .not_valid_after(good.not_valid_after_utc)
    )
    for extension in good.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    for algorithm, reason in ((SHA256(), "chain"), (SHA384(), "")):
        leaf = Authority(builder.sign(root().key, algorithm), key)
        assert refusal(_signed_by(leaf, root())) == reason


@pytest.mark.parametrize("missing", [x509.BasicConstraints, x509.KeyUsage])
def test_both_extensions_are_needed(missing: type[x509.ExtensionType]) -> None:
    good = issue(root(), "leaf", **_LEAF)
    builder = (
        x509.CertificateBuilder()
        .subject_name(good.certificate.subject)
        .issuer_name(good.certificate.issuer)
        .public_key(good.key.public_key())
        .serial_number(1)
        .not_valid_before(good.certificate.not_valid_before_utc)
        .not_valid_after(good.certificate.not_valid_after_utc)
    )
    for extension in good.certificate.extensions:
        if not isinstance(extension.value, missing):
            builder = builder.add_extension(extension.value, extension.critical)
    leaf = Authority(builder.sign(root().key, SHA384()), good.key)
    assert refusal(_signed_by(leaf, root())) == "chain"


# -- forms of the payload and of the envelope


def _with(**changes: object) -> bytes:
    """A document whose payload differs; `...` leaves a field out."""
    fields = cbor2.loads(make_payload(chain(), made_at=NOW, nonce=NONCE)) | changes
    kept = {name: value for name, value in fields.items() if value is not ...}
    return sign(cbor2.dumps(kept), chain().key)


@pytest.mark.parametrize(
    "change",
    [
        {"module_id": ""}, {"module_id": b"i-1"}, {"module_id": ...}, {"digest": "SHA256"}, {"digest": ...},
        {"timestamp": 0}, {"timestamp": -1}, {"timestamp": True}, {"timestamp": "1"}, {"timestamp": ...},
        {"pcrs": {}}, {"pcrs": [bytes(48)]}, {"pcrs": ...}, {"pcrs": {0: PCRS[0], 1: PCRS[1]}},
        {"pcrs": {**PCRS, 32: bytes(48)}}, {"pcrs": {**PCRS, -1: bytes(48)}}, {"pcrs": {**PCRS, "3": bytes(48)}},
        {"pcrs": {**PCRS, 8: bytes(32)}}, {"pcrs": {**PCRS, 8: bytes(64)}}, {"pcrs": {**PCRS, 8: None}},
        {"certificate": b""}, {"certificate": bytes(1025)}, {"certificate": None}, {"certificate": ...},
        {"cabundle": []}, {"cabundle": [b""]}, {"cabundle": [b"x"] * 9}, {"cabundle": [bytes(1025)]},
        {"cabundle": b"x"}, {"cabundle": ["x"]}, {"cabundle": ...},
        {"public_key": bytes(1025)}, {"user_data": bytes(1025)}, {"nonce": bytes(1025)}, {"nonce": "text"},
        {"public_key": False}, {"nonce": [1]},
    ],
    ids=lambda change: ",".join(f"{name}={value!r:.20}" for name, value in change.items()),
)  # fmt: skip
def test_payload(change: dict[str, object]) -> None:
    assert refusal(_with(**change)) == "payload"


@pytest.mark.parametrize(
    "change",
    [
        {"other": [1, {"a": None}]}, {"public_key": ...}, {"user_data": bytes(1024)}, {"public_key": bytes(1024)},
        {"pcrs": {**PCRS, **dict.fromkeys(range(16, 32), bytes(48))}},
    ],
    ids=lambda change: ",".join(f"{name}={value!r:.20}" for name, value in change.items()),
)  # fmt: skip
def test_payload_that_is_taken(change: dict[str, object]) -> None:
    assert refusal(_with(**change)) == ""


def test_a_key_that_is_no_text_is_refused_beside_all_fields() -> None:
    fields = cbor2.loads(make_payload(chain(), made_at=NOW, nonce=NONCE))
    assert refusal(sign(cbor2.dumps(fields | {"1": 1}), chain().key)) == ""
    assert refusal(sign(cbor2.dumps(fields | {1: 1}), chain().key)) == "payload"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "cbor"),
        (b"\x80", "payload"),
        (b"\xa1\x01\x02", "payload"),
        (b"\xbf\x01\x02\xff", "payload"),
        (b"\xf6", "payload"),
        (b"\xc0\xa0", "cbor"),
    ],
)
def test_payload_that_is_no_map_of_texts(payload: bytes, reason: str) -> None:
    assert refusal(sign(payload, chain().key)) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda four: four[:3], "cose"),
        (lambda four: [*four, 0], "cose"),
        (lambda four: dict(enumerate(four)), "cose"),
        (lambda four: four[2], "cose"),
        (lambda four: [{1: -35}, *four[1:]], "cose"),
        (lambda four: [four[0], None, *four[2:]], "cose"),
        (lambda four: [four[0], [], *four[2:]], "cose"),
        (lambda four: [four[0], {4: b"kid"}, *four[2:]], "cose"),
        (lambda four: [*four[:2], None, four[3]], "cose"),
        (lambda four: [*four[:3], four[3].hex()], "cose"),
        (lambda four: [b"", *four[1:]], "cose"),
        (lambda four: [b"\xa0", *four[1:]], "cose"),
        (lambda four: [b"\xa1\x01\x39\x00\x22", *four[1:]], "cose"),  # -35, not in its shortest form
        (lambda four: [b"\xa1\x01\xf6", *four[1:]], "cose"),
        (lambda four: [b"\xa1\x01\xf5", *four[1:]], "cose"),
        (lambda four: [b"\xa2\x01\x26\x04\x40", *four[1:]], "cose"),
        (lambda four: [b"\xa1\x01\x26", *four[1:]], "algorithm"),  # ES256
        (lambda four: [b"\xa1\x01\x20", *four[1:]], "algorithm"),
        (lambda four: [b"\xa1\x01\x05", *four[1:]], "algorithm"),  # a MAC
        (lambda four: [*four[:3], four[3][:95]], "signature"),
        (lambda four: [*four[:3], four[3] + b"\0"], "signature"),
        (lambda four: [*four[:3], b""], "signature"),
        (lambda four: [*four[:3], four[3][:48] + b"\0" + four[3][48:]], "signature"),  # the same two numbers
        (lambda four: [*four[:3], bytes(96)], "signature"),
        (lambda four: [*four[:3], b"\xff" * 96], "signature"),
    ],
)
def test_envelope(change: Callable[[list[Any]], object], reason: str) -> None:
    assert refusal(cbor2.dumps(change(cbor2.loads(made())))) == reason


def test_a_tag_of_the_wrong_number_or_twice_is_refused() -> None:
    assert refusal(b"\xd2" + made()) == ""
    assert refusal(b"\xd1" + made()) == "cose"
    assert refusal(b"\xd2\xd2" + made()) == "cbor"
    assert refusal(b"\xd1" + made()[:-1]) == "cbor"


def test_what_is_quoted_of_a_document_that_nobody_signed_is_called_unverified() -> None:
    four = cbor2.loads(made())
    for data in (
        b"\xc5",
        made() + b"\0",
        b"\xd1" + made(),
        cbor2.dumps([b"\xa1\x01\x26", *four[1:]]),
        cbor2.dumps([*four[:2], b"\xc5", four[3]]),
    ):
        with pytest.raises(DocumentError, match=r"refused, \w+ \(unverified: "):
            verify(data, WANTED, now=NOW)


def test_an_envelope_in_indefinite_form_is_read_and_the_signature_still_fits() -> None:
    data = made()
    assert refusal(b"\x9f" + data[1:] + b"\xff") == ""


# -- hostile bytes


@cache
def _small() -> bytes:
    """Two certificates and three registers: fast to verify, and every part is there."""
    few = {index: PCRS[index] for index in (0, 1, 2)}
    return make_document(chain(0), made_at=NOW, nonce=NONCE, pcrs=few, user_data=b"u", public_key=b"k")


def test_every_truncation_is_refused_as_cbor() -> None:
    data = _small()
    assert refusal(data) == ""
    assert [refusal(data[:length]) for length in range(1, len(data))] == ["cbor"] * (len(data) - 1)


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
def test_no_changed_byte_is_accepted(change: int) -> None:
    data = bytearray(_small())
    for place in range(len(data)):
        data[place] ^= change
        reason = refusal(bytes(data))
        assert reason, f"byte {place} of {len(data)} may be changed"
        data[place] ^= change


def test_no_changed_byte_of_a_certificate_crashes_behind_the_root() -> None:
    """The chain as an attacker can present it: a certificate with any byte changed below a root that is trusted."""
    whole = chain(1)
    for which in (1, 2):
        certificates = [*whole.bundle, whole.certificate]
        for place in range(len(certificates[which])):
            damaged = bytearray(certificates[which])
            damaged[place] ^= 0x41
            certificates[which] = bytes(damaged)
            data = make_document(replace(whole, bundle=certificates[:2], certificate=certificates[2]), made_at=NOW)
            assert refusal(data) == "chain"
            certificates = [*whole.bundle, whole.certificate]


def test_a_certificate_that_the_library_warns_of_is_refused_without_noise() -> None:
    """A serial number below zero; warnings are errors here."""
    whole = chain(1)
    authority = bytearray(whole.bundle[1])
    place = authority.index(bytes.fromhex("a003020102")) + 7  # behind the version: tag, length, then the number
    authority[place] |= 0x80
    data = make_document(replace(whole, bundle=[whole.bundle[0], bytes(authority)]), made_at=NOW)
    assert refusal(data) == "chain"


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert refusal(data) in {"size", "cbor", "cose", "algorithm"}


@given(
    st.binary(max_size=300),
    st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    st.dictionaries(st.integers(-1, 33), st.binary(max_size=64), max_size=4),
    st.none() | st.binary(max_size=40) | st.text(max_size=5),
)
def test_any_values_in_the_fields_are_refused(
    certificate: bytes, bundle: list[bytes], pcrs: dict[int, bytes], nonce: object
) -> None:
    data = _with(certificate=certificate, cabundle=[root().der, *bundle][:8], pcrs=dict(PCRS) | pcrs, nonce=nonce)
    assert refusal(data) in {"payload", "chain"}


def test_garbage_under_a_genuine_signature_is_still_refused_as_chain() -> None:
    """Extensions of all kinds with garbage in them, which only a broken authority would sign."""
    for value in (b"", b"\0", b"\x30\x80", b"\x30\x03\x01\x01\xff" * 3, b"\xff" * 60):
        for oid in ("2.5.29.31", "2.5.29.17", "2.5.29.35", "2.5.29.37", "2.5.29.14", "1.2.3.4"):
            extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
            leaf = issue(root(), "leaf", **_LEAF, extra=[(extension, False)])
            assert refusal(_signed_by(leaf, root())) in {"", "chain"}
