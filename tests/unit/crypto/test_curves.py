"""Properties that all curves share, and what a hostile key or signature may look like."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signer import crypto
from signer.crypto import bls, p256, secp256k1
from signer.crypto.interface import InvalidKeyError, SecretKey, UnsupportedError
from signer.tezos.keys import Curve, PublicKey, Signature

KEYS = {curve: crypto.load_secret_key(curve, bytes(31) + b"\x07") for curve in Curve}
ORDERS = {Curve.SECP256K1: secp256k1.ORDER, Curve.P256: p256.ORDER, Curve.BLS12_381: bls.ORDER}
curves = st.sampled_from(list(Curve))


@settings(max_examples=40)
@given(curves, st.binary(max_size=100), st.data())
def test_a_signature_verifies_and_no_changed_bit_does(curve: Curve, message: bytes, data: st.DataObject) -> None:
    key = KEYS[curve]
    signature = key.sign(message)
    assert signature == key.sign(message)
    assert crypto.verify(key.public_key, message, signature)
    bit = data.draw(st.integers(0, len(signature.data) * 8 - 1))
    changed = bytearray(signature.data)
    changed[bit // 8] ^= 1 << bit % 8
    assert not crypto.verify(key.public_key, message, Signature(curve, bytes(changed)))
    assert not crypto.verify(key.public_key, message + b"\0", signature)


@settings(max_examples=40)
@given(curves, st.binary(min_size=96, max_size=96), st.binary(min_size=48, max_size=48))
def test_hostile_bytes_never_raise(curve: Curve, signature: bytes, key: bytes) -> None:
    public = KEYS[curve].public_key
    lengths = {Curve.BLS12_381: (96, 48), Curve.ED25519: (64, 32)}.get(curve, (64, 33))
    hostile = Signature(curve, signature[: lengths[0]])
    assert not crypto.verify(public, b"message", hostile)
    other = PublicKey(curve, key[: lengths[1]])
    assert not crypto.verify(other, b"message", hostile)


@pytest.mark.parametrize("curve", list(Curve))
def test_secrets_are_checked_hidden_and_wiped(curve: Curve) -> None:
    with pytest.raises(InvalidKeyError, match="32 bytes, not 31"):
        crypto.load_secret_key(curve, bytes(31))
    if curve in ORDERS:
        for number in (0, ORDERS[curve], 2**256 - 1):
            with pytest.raises(InvalidKeyError, match="order"):
                crypto.load_secret_key(curve, number.to_bytes(32, "big"))
    key = crypto.load_secret_key(curve, bytes(range(1, 33)))
    assert str(key.public_key.hash) in repr(key)
    assert "0102030405" not in repr(vars(key)) or "bytearray" in repr(vars(key))
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(key)
    assert bytes(key.secret_bytes()) == bytes(range(1, 33))
    key.wipe()
    assert not any(key.secret_bytes())
    with pytest.raises(InvalidKeyError, match="wiped"):
        key.sign(b"")


def test_the_generic_form_fits_any_curve_but_bls() -> None:
    for curve, key in KEYS.items():
        signature = key.sign(b"x")
        if curve is not Curve.BLS12_381:
            assert crypto.verify(key.public_key, b"x", Signature(None, signature.data))
        other = KEYS[Curve.P256 if curve is not Curve.P256 else Curve.ED25519]
        assert not crypto.verify(other.public_key, b"x", signature)
    assert not crypto.verify(KEYS[Curve.BLS12_381].public_key, b"x", Signature(None, bytes(64)))


def test_a_high_s_does_not_verify_on_secp256k1() -> None:
    key = KEYS[Curve.SECP256K1]
    signature = key.sign(b"x").data
    s = int.from_bytes(signature[32:], "big")
    assert s <= secp256k1.ORDER // 2
    high = signature[:32] + (secp256k1.ORDER - s).to_bytes(32, "big")
    assert not crypto.verify(key.public_key, b"x", Signature(Curve.SECP256K1, high))
    assert secp256k1.normalise_low_s(high) == signature
    assert secp256k1.normalise_low_s(signature) == signature


def test_public_keys_are_points() -> None:
    for key in KEYS.values():
        crypto.check_public_key(key.public_key)
    for bad in (
        PublicKey(Curve.ED25519, b"\x01" + bytes(31)),  # of low order
        PublicKey(Curve.SECP256K1, b"\x02" + b"\xff" * 32),
        PublicKey(Curve.P256, b"\x05" + bytes(32)),
        PublicKey(Curve.BLS12_381, b"\xc0" + bytes(47)),  # infinity
        PublicKey(Curve.BLS12_381, b"\x80" + bytes(46) + b"\x04"),  # on the curve, outside of the subgroup
    ):
        with pytest.raises(InvalidKeyError):
            crypto.check_public_key(bad)


@pytest.mark.parametrize("curve", list(Curve))
def test_generated_keys_come_from_the_entropy_given(curve: Curve) -> None:
    asked: list[int] = []

    def entropy(count: int) -> bytes:
        asked.append(count)
        return bytes([len(asked)]) * count

    first = crypto.generate_secret_key(curve, entropy)
    assert asked == [32]
    assert crypto.generate_secret_key(curve, lambda count: b"\1" * count).public_key == first.public_key


def test_ecdsa_draws_again_for_a_number_that_is_no_scalar() -> None:
    draws = iter([bytes(32), b"\xff" * 32, bytes(31) + b"\5"])
    key = crypto.generate_secret_key(Curve.P256, lambda _: next(draws))
    assert bytes(key.secret_bytes()) == bytes(31) + b"\5"


def test_only_bls_proves_possession_and_never_with_version_0() -> None:
    for curve, key in KEYS.items():
        if curve is not Curve.BLS12_381:
            with pytest.raises(UnsupportedError, match="proof of possession is not supported"):
                key.prove_possession()
            assert not crypto.verify_possession(key.public_key, key.sign(b""))
    blskey: SecretKey = KEYS[Curve.BLS12_381]
    with pytest.raises(UnsupportedError, match="version 0"):
        blskey.sign(b"", version=0)
    with pytest.raises(UnsupportedError, match="BLS public key"):
        blskey.prove_possession(KEYS[Curve.P256].public_key)
    assert not crypto.verify(blskey.public_key, b"", blskey.sign(b""), version=0)
    assert blskey.sign(b"", version=3) == blskey.sign(b"", version=255) == blskey.sign(b"", version=2)
    assert blskey.sign(b"", version=1) != blskey.sign(b"", version=2)
