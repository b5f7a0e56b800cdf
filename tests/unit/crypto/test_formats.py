"""Every form in which a secret key may come, and what a wrong one is told; never a byte of the secret."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from signer.crypto import (
    CryptoError,
    InvalidKeyError,
    PassphraseNeededError,
    WrongPassphraseError,
    generate_secret_key,
    load_secret_key,
)
from signer.crypto.formats import UnknownFormatError, encrypt, parse_secret_key, to_base58
from signer.tezos import base58
from signer.tezos.keys import Curve

KEYS = {curve: load_secret_key(curve, bytes(range(1, 33))) for curve in Curve}


# openssl ecparam -name secp256k1 -genkey -noout -param_enc explicit
EXPLICIT_SECP256K1 = """\
-----BEGIN EC PRIVATE KEY-----
MIIBUQIBAQQgSypPg2lePofBJ09W4DwB03FM0G9iTLezZLGlqVuixHmggeMwgeAC
AQEwLAYHKoZIzj0BAQIhAP////////////////////////////////////7///wv
MEQEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABCAAAAAAAAAAAAAA
AAAAAAAAAAAAAAAAAAAAAAAAAAAABwRBBHm+Zn753LusVaBilc6HCwcCm/zbLc4o
2VnygVsW+BeYSDradyajxGVdpPv8DhEIqP0XtEimhVQZnEfQj/sQ1LgCIQD/////
///////////////+uq7c5q9IoDu/0l6M0DZBQQIBAaFEA0IABFaHcixgIBhR0cb2
E/7Gn/dQngcErOhD4Qx854PMBFkeIVR7Fm88TMDMo/d+jHM81MvRR7+mq6nBKWF1
Fspivyg=
-----END EC PRIVATE KEY-----
"""


def never() -> str:
    raise AssertionError("the key is not encrypted")


def private(curve: Curve) -> ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey:
    secret = bytes(range(1, 33))
    if curve is Curve.ED25519:
        return ed25519.Ed25519PrivateKey.from_private_bytes(secret)
    kind = ec.SECP256R1() if curve is Curve.P256 else ec.SECP256K1()
    return ec.derive_private_key(int.from_bytes(secret, "big"), kind)


@pytest.mark.parametrize("curve", list(Curve))
@pytest.mark.parametrize("around", ["{}", " {}\n", "\r\n\t{}\r\n", "\ufeff{}", "unencrypted:{}"])
def test_base58_with_anything_around(curve: Curve, around: str) -> None:
    key = KEYS[curve]
    assert parse_secret_key(around.format(to_base58(key)).encode(), never).public_key == key.public_key


@pytest.mark.parametrize("curve", list(Curve))
def test_encrypted_base58(curve: Curve) -> None:
    key = KEYS[curve]
    text = encrypt(key, "password", bytes(range(8)))
    assert text[2:5] == "esk"
    for form in (text, f"encrypted:{text}\n"):
        assert parse_secret_key(form.encode(), lambda: "password").public_key == key.public_key
    with pytest.raises(WrongPassphraseError, match="gotez: unable to decrypt the private key"):
        parse_secret_key(text.encode(), lambda: "Password")
    with pytest.raises(PassphraseNeededError):
        parse_secret_key(text.encode(), lambda: None)


def test_the_known_encrypted_key() -> None:
    key = parse_secret_key(b"edsk4FTF78Qf1m2rykGpHqostAiq5gYW4YZEoGUSWBTJr2njsDHSnd", never)
    assert encrypt(key, "password", bytes(range(8))) == (
        "edesk1G15ZSUwitvk2D8Xm4TcZwYU1bjNVbX5BZRKXK7kVuB9wyxQHSuFvPGuNLFAj8aN4kKU5jb9G85qXQ3S4YV"
    )


def test_the_long_edsk() -> None:
    key = KEYS[Curve.ED25519]
    text = base58.encode(base58.ED25519_SECRET_KEY, bytes(key.secret_bytes()) + key.public_key.data)
    assert parse_secret_key(text.encode(), never).public_key == key.public_key


@pytest.mark.parametrize("curve", [Curve.ED25519, Curve.SECP256K1, Curve.P256])
@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("passphrase", [None, "open sesame"])
def test_pem_and_der(curve: Curve, encoding: Encoding, form: PrivateFormat, passphrase: str | None) -> None:
    if form is PrivateFormat.TraditionalOpenSSL and (curve is Curve.ED25519 or passphrase):
        form = PrivateFormat.PKCS8
    protection: KeySerializationEncryption = NoEncryption()
    if passphrase:
        protection = BestAvailableEncryption(passphrase.encode())
    data = private(curve).private_bytes(encoding, form, protection)
    assert parse_secret_key(data, lambda: passphrase).public_key == KEYS[curve].public_key
    if encoding is Encoding.PEM:
        assert parse_secret_key(b"\n  " + data + b"\n\n", lambda: passphrase).public_key == KEYS[curve].public_key
    if passphrase:
        with pytest.raises(WrongPassphraseError):
            parse_secret_key(data, lambda: "wrong")
        with pytest.raises(PassphraseNeededError):
            parse_secret_key(data, lambda: None)


def test_other_keys_are_named() -> None:
    other = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(InvalidKeyError, match="crypt: unsupported key type"):
        parse_secret_key(other, never)
    rsa_key = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(InvalidKeyError, match="^x509: unsupported algorithm: RSA; accepted: Ed25519, secp256k1"):
        parse_secret_key(rsa_key, never)
    ed448_key = ed448.Ed448PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(InvalidKeyError, match="^x509: unsupported algorithm: Ed448"):
        parse_secret_key(ed448_key, never)


def test_a_curve_whose_parameters_are_written_out() -> None:
    """The right curve, but not by its name: to say that secp256k1 is accepted would lead nowhere."""
    with pytest.raises(InvalidKeyError, match="a named curve is needed") as caught:
        parse_secret_key(EXPLICIT_SECP256K1.encode(), never)
    assert "accepted" not in str(caught.value)


@pytest.mark.parametrize("second", ["-----BEGIN", " -----BEGIN", "edsk", "\tunencrypted:spsk", "p2esk"])
def test_a_second_key_is_not_passed_over(second: str) -> None:
    first = private(Curve.P256).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    keys = {
        "-----BEGIN": first,
        " -----BEGIN": " " + first,
        "edsk": to_base58(KEYS[Curve.ED25519]),
        "\tunencrypted:spsk": "\tunencrypted:" + to_base58(KEYS[Curve.SECP256K1]) + "\r\n",
        "p2esk": encrypt(KEYS[Curve.P256], "password", bytes(8)),
    }
    with pytest.raises(UnknownFormatError, match="^the text holds 2 secret keys; give each by itself$"):
        parse_secret_key((first + keys[second]).encode(), never)


def test_what_is_no_second_key_may_follow() -> None:
    """OpenSSL writes the curve in front of the key; people keep the public key behind it."""
    key = private(Curve.SECP256K1)
    before = "-----BEGIN EC PARAMETERS-----\nBgUrgQQACg==\n-----END EC PARAMETERS-----\n"
    text = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode()
    after = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    found = parse_secret_key((before + text + after).encode(), never)
    assert found.public_key == KEYS[Curve.SECP256K1].public_key


@pytest.mark.parametrize("prefix", [base58.SECP256K1_SECRET_KEY, base58.P256_SECRET_KEY, base58.BLS_SECRET_KEY])
def test_zero_is_no_key(prefix: base58.Prefix) -> None:
    with pytest.raises(InvalidKeyError, match="secret key is zero"):
        parse_secret_key(base58.encode(prefix, bytes(32)).encode(), never)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "failed to decode PEM block"),
        (b"-----BEGIN", "failed to decode PEM block"),
        (b"tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q", "unknown private key prefix"),
        (b"edsk0", "unexpected character"),
        (b"", "too short"),
        (b"0" * 70000, "larger than any secret key"),
        (b"\x30\x82\x01\x00", "failed to decode DER"),
        (b"\xff\xfe", "failed to decode DER"),
    ],
)
def test_texts(text: bytes, expected: str) -> None:
    with pytest.raises(UnknownFormatError, match=expected):
        parse_secret_key(text, never)


def test_a_scalar_out_of_range_in_base58() -> None:
    from signer.tezos import base58

    with pytest.raises(InvalidKeyError, match="order"):
        parse_secret_key(base58.encode(base58.BLS_SECRET_KEY, b"\xff" * 32).encode(), never)


@given(st.sampled_from(list(Curve)), st.integers(0, 53), st.characters(codec="ascii"))
def test_no_error_shows_a_part_of_the_secret(curve: Curve, position: int, character: str) -> None:
    text = to_base58(KEYS[curve])
    damaged = text[:position] + character + text[position + 1 :]
    try:
        parse_secret_key(damaged.encode(), lambda: None)
    except CryptoError as exc:
        parts = {text[start : start + 6] for start in range(4, len(text) - 6)}
        assert not any(part in str(exc) for part in parts)
        assert exc.__suppress_context__ or exc.__cause__ is None


def test_generated_keys_survive_every_text_form() -> None:
    for curve in Curve:
        key = generate_secret_key(curve)
        assert parse_secret_key(to_base58(key).encode(), never).public_key == key.public_key


def protected(curve: Curve, passphrase: bytes, form: Encoding) -> bytes:
    return private(curve).private_bytes(form, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))


@pytest.mark.parametrize("form", [Encoding.PEM, Encoding.DER])
def test_an_empty_passphrase_is_a_wrong_one(form: Encoding) -> None:
    with pytest.raises(WrongPassphraseError):
        parse_secret_key(protected(Curve.P256, b"x", form), lambda: "")


def test_a_passphrase_that_is_not_utf_8() -> None:
    key = parse_secret_key(protected(Curve.P256, b"\xff\xfe", Encoding.PEM), lambda: "\udcff\udcfe")
    assert key.public_key == KEYS[Curve.P256].public_key


def test_the_word_encrypted_behind_a_plain_key() -> None:
    text = private(Curve.P256).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert parse_secret_key(text + b"not ENCRYPTED\n", never).public_key == KEYS[Curve.P256].public_key


@pytest.mark.parametrize("vector", ["00112233445566AA", "", "AES-256-CBC", "0" * 31])
def test_a_damaged_initialization_vector(vector: str) -> None:
    """The library would end the process with a panic."""
    lines = ["-----BEGIN EC PRIVATE KEY-----", "Proc-Type: 4,ENCRYPTED", f"DEK-Info: AES-256-CBC,{vector}", ""]
    lines += ["AAAA" * 16, "-----END EC PRIVATE KEY-----"]
    with pytest.raises(CryptoError):
        parse_secret_key("\n".join(lines).encode(), lambda: "x")


def test_a_traditional_encrypted_pem() -> None:
    key = private(Curve.P256)
    text = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"x"))
    assert parse_secret_key(text, lambda: "x").public_key == KEYS[Curve.P256].public_key
