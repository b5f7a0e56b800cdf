"""Answers of KMS as values of Tezos: strict DER, low s, and which keys fit."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from signer import crypto
from signer.crypto import p256, secp256k1
from signer.tezos.keys import Curve, digest_of
from signer.vaults.awskms.keys import UnfitKeyError, read_key
from signer.vaults.awskms.signatures import SignatureFormError, read_signature
from tests.unit.vaults.kms import arn, private, told

ORDERS = {Curve.SECP256K1: secp256k1.ORDER, Curve.P256: p256.ORDER}
CURVES = (Curve.SECP256K1, Curve.P256)
ECDSA = st.sampled_from(CURVES)
SCALARS = st.one_of(st.integers(1, 300), st.integers(1, 2**256 - 1))


@given(ECDSA, SCALARS, SCALARS)
def test_what_is_read_is_what_was_written(curve: Curve, r: int, s: int) -> None:
    order = ORDERS[curve]
    r, s = r % (order - 1) + 1, s % (order - 1) + 1
    data = read_signature(curve, encode_dss_signature(r, s)).data
    got = int.from_bytes(data[32:], "big")
    assert int.from_bytes(data[:32], "big") == r
    assert got == (min(s, order - s) if curve is Curve.SECP256K1 else s)


@given(ECDSA, st.integers(1, 2**255), st.integers(1, 2**255), st.data())
def test_no_truncation_and_nothing_trailing(curve: Curve, r: int, s: int, data: st.DataObject) -> None:
    der = encode_dss_signature(r, s)
    cut = data.draw(st.integers(0, len(der) - 1))
    for wrong in (der[:cut], der + b"\0", der + der, bytes([der[0], der[1] + 1]) + der[2:] + b"\0"):
        with pytest.raises(SignatureFormError, match="crypt: invalid ASN.1"):
            read_signature(curve, wrong)


@given(ECDSA, st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(curve: Curve, der: bytes) -> None:
    try:
        data = read_signature(curve, der).data
    except SignatureFormError:
        return
    r, s = int.from_bytes(data[:32], "big"), int.from_bytes(data[32:], "big")
    assert der in (encode_dss_signature(r, s), encode_dss_signature(r, ORDERS[curve] - s))


@given(ECDSA, st.integers(1, 2**255), st.integers(1, 2**255), st.data())
def test_a_flipped_bit_is_never_read_as_the_same(curve: Curve, r: int, s: int, data: st.DataObject) -> None:
    der = bytearray(encode_dss_signature(r, s))
    before = read_signature(curve, bytes(der))
    der[data.draw(st.integers(0, len(der) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert read_signature(curve, bytes(der)) != before
    except SignatureFormError:
        pass


@pytest.mark.parametrize(
    "der",
    [
        "",
        "30",
        "3000",
        "300602010102010100",  # trailing
        "3008020200010202000 1".replace(" ", ""),  # padded
        "3006020181020101",  # negative
        "3006020101020181",
        "3006020100020101",  # zero
        "3006020101020100",
        "300502010102 00".replace(" ", ""),  # empty integer
        "308106020101020101",  # long form
        "3080020101020101" + "0000",  # indefinite
        "3106020101020101",  # a SET
        "3006030101020101",  # a BIT STRING
        "3009020101020101020101",  # three
        "3003020101",  # one
        "3027" + "0222" + "01" * 34 + "020101",  # too long
        "3026" + "0221" + "00" + "ff" * 32 + "020101",  # above the order
    ],
)
@pytest.mark.parametrize("curve", CURVES)
def test_a_signature_in_no_proper_form_is_refused(der: str, curve: Curve) -> None:
    with pytest.raises(SignatureFormError, match="crypt: invalid ASN.1"):
        read_signature(curve, bytes.fromhex(der))


@pytest.mark.parametrize("curve", CURVES)
def test_the_order_itself_is_refused(curve: Curve) -> None:
    for r, s in ((ORDERS[curve], 1), (1, ORDERS[curve])):
        with pytest.raises(SignatureFormError):
            read_signature(curve, encode_dss_signature(r, s))
    assert read_signature(curve, encode_dss_signature(1, ORDERS[curve] - 1)).curve is curve


def test_a_high_s_of_secp256k1_verifies_after_reading_and_one_of_p256_is_left_alone() -> None:
    digest = digest_of(b"x")
    for spec, curve in (("ECC_SECG_P256K1", Curve.SECP256K1), ("ECC_NIST_P256", Curve.P256)):
        key = private(spec)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        public = read_key(told(spec, key, arn(1))).public_key
        highs = set()
        for _ in range(40):  # half of all have a high s
            signature = read_signature(curve, key.sign(digest, ec.ECDSA(Prehashed(SHA256()))))
            assert crypto.verify(public, b"x", signature)
            highs.add(int.from_bytes(signature.data[32:], "big") > ORDERS[curve] // 2)
        assert highs == ({False} if curve is Curve.SECP256K1 else {False, True})


@pytest.mark.parametrize("length", [0, 63, 65, 128])
def test_an_ed25519_signature_has_64_bytes(length: int) -> None:
    with pytest.raises(SignatureFormError, match=f"has 64 bytes, not {length}"):
        read_signature(Curve.ED25519, bytes(length))
    assert read_signature(Curve.ED25519, bytes(64)).data == bytes(64)


@pytest.mark.parametrize(
    ("spec", "prefix"), [("ECC_SECG_P256K1", "sppk"), ("ECC_NIST_P256", "p2pk"), ("ECC_NIST_EDWARDS25519", "edpk")]
)
def test_a_key_that_fits_is_read(spec: str, prefix: str) -> None:
    key = read_key(told(spec, private(spec), arn(1)))
    assert (key.arn, str(key.public_key)[:4]) == (arn(1), prefix)


def test_an_older_server_tells_the_spec_under_its_older_name() -> None:
    answer = told("ECC_NIST_P256", private("ECC_NIST_P256"), arn(1))
    del answer["KeySpec"]
    assert read_key(answer).public_key.curve is Curve.P256


@pytest.mark.parametrize(
    "spec",
    [
        "RSA_2048",
        "RSA_4096",
        "ECC_NIST_P384",
        "ECC_NIST_P521",
        "SM2",
        "ML_DSA_44",
        "ML_DSA_65",
        "ML_DSA_87",
        "NEW",
        None,
    ],
)
def test_a_spec_that_is_none_of_ours_is_passed_over_unread(spec: str | None) -> None:
    answer = {"KeyId": arn(1), "KeySpec": spec, "KeyUsage": "SIGN_VERIFY", "PublicKey": b"never looked at"}
    with pytest.raises(UnfitKeyError, match=f"KeySpec {spec}: Tezos has no such keys"):
        read_key(answer)


@pytest.mark.parametrize("usage", ["ENCRYPT_DECRYPT", "KEY_AGREEMENT", "GENERATE_VERIFY_MAC", None])
def test_a_key_that_does_not_sign_is_passed_over(usage: str | None) -> None:
    answer = told("ECC_NIST_P256", private("ECC_NIST_P256"), arn(1)) | {"KeyUsage": usage}
    with pytest.raises(UnfitKeyError, match=f"KeyUsage {usage}"):
        read_key(answer)


def test_a_public_key_that_is_not_what_the_spec_says_is_refused() -> None:
    other = told("ECC_NIST_P256", private("ECC_NIST_P256"), arn(1)) | {"KeySpec": "ECC_SECG_P256K1"}
    with pytest.raises(UnfitKeyError, match="but the public key is of P256"):
        read_key(other)
    rsa_key = rsa.generate_private_key(65537, 2048).public_key()
    der = rsa_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(UnfitKeyError, match="of no curve of Tezos"):
        read_key(other | {"PublicKey": der})


@pytest.mark.parametrize("member", ["KeyId", "PublicKey"])
@pytest.mark.parametrize("value", [None, "", 5])
def test_an_answer_that_lacks_something_is_refused(member: str, value: object) -> None:
    answer = told("ECC_NIST_P256", private("ECC_NIST_P256"), arn(1)) | {member: value}
    with pytest.raises(UnfitKeyError, match="told no public key"):
        read_key(answer)


@given(st.binary(max_size=120))
def test_any_bytes_are_no_reason_to_fall(der: bytes) -> None:
    answer = {"KeyId": arn(1), "KeySpec": "ECC_NIST_P256", "KeyUsage": "SIGN_VERIFY", "PublicKey": der}
    with pytest.raises(UnfitKeyError):
        read_key(answer)


@given(st.integers(0, 90), st.integers(0, 7))
def test_a_flipped_bit_of_a_public_key_is_no_reason_to_fall(place: int, bit: int) -> None:
    answer = told("ECC_SECG_P256K1", private("ECC_SECG_P256K1"), arn(1))
    der = bytearray(answer["PublicKey"])
    der[place % len(der)] ^= 1 << bit
    try:
        read_key(answer | {"PublicKey": bytes(der)})
    except UnfitKeyError:
        pass
