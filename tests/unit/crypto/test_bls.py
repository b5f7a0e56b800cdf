"""BLS: batches against single verification, attacks on batches, and py-ecc as an independent opinion."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py_ecc.bls.ciphersuites import G2Basic, G2MessageAugmentation, G2ProofOfPossession
from pyblst import BlstP2Element

from signer import crypto
from signer.crypto import bls
from signer.tezos.keys import Curve, PublicKey, Signature

KEYS = [crypto.load_secret_key(Curve.BLS12_381, bytes(31) + bytes([number])) for number in range(1, 9)]
ED = crypto.load_secret_key(Curve.ED25519, bytes(32))

Checks = list[tuple[PublicKey, bytes, Signature, int]]


def good(number: int, message: bytes, version: int = 2) -> tuple[PublicKey, bytes, Signature, int]:
    key = KEYS[number]
    return key.public_key, message, key.sign(message, version=version), version


def one_by_one(checks: Sequence[tuple[PublicKey, bytes, Signature, int]]) -> list[bool]:
    return [crypto.verify(key, message, signature, version=version) for key, message, signature, version in checks]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from([b"a", b"b", b"c"]), st.booleans(), st.sampled_from([1, 2])))
)
def test_a_batch_says_what_each_alone_says(drawn: list[tuple[int, bytes, bool, int]]) -> None:
    checks: Checks = []
    for number, message, poisoned, version in drawn:
        key, message_, signature, version_ = good(number, message, version)
        checks.append((key, b"other" if poisoned else message_, signature, version_))
    assert crypto.verify_many(checks) == [not poisoned for _, _, poisoned, _ in drawn]


def test_swapped_and_cancelling_signatures_are_found() -> None:
    first, second = good(0, b"x"), good(1, b"x")
    swapped = [(first[0], b"x", second[2], 2), (second[0], b"x", first[2], 2)]
    assert crypto.verify_many(swapped) == [False, False]
    # sig1 + d and sig2 - d have the right sum: without random coefficients the batch would pass
    point = BlstP2Element().hash_to_group(b"d", b"any")
    plus = BlstP2Element().uncompress(first[2].data) + point
    minus = BlstP2Element().uncompress(second[2].data) + (-point)
    shifted = [
        (first[0], b"x", Signature(Curve.BLS12_381, bytes(plus.compress())), 2),
        (second[0], b"x", Signature(Curve.BLS12_381, bytes(minus.compress())), 2),
    ]
    assert crypto.verify_many([*shifted, good(2, b"x")]) == [False, False, True]


def test_one_key_and_many_messages() -> None:
    """The batch sums hashes here, and keys where fewer messages than keys are in it."""
    checks = [good(0, b"%d" % number, 1 + number % 2) for number in range(9)] + [good(1, b"0")]
    assert crypto.verify_many(checks) == [True] * 10
    checks[3] = (*checks[3][:2], checks[4][2], checks[3][3])
    assert crypto.verify_many(checks) == [True] * 3 + [False] + [True] * 6


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2**63 - 1).map(lambda n: 2 * n + 1)), min_size=1))
@settings(max_examples=20, deadline=None)
def test_sums_of_multiples(drawn: list[tuple[int, int]]) -> None:
    points = [bls._GENERATOR.scalar_mul(number) for number, _ in drawn]
    expected = bls._GENERATOR.scalar_mul(sum(number * coefficient for number, coefficient in drawn))
    assert bls._combine(points, [coefficient for _, coefficient in drawn]).compress() == expected.compress()


def test_batches_hold_other_curves_too() -> None:
    checks = [
        good(0, b"x"),
        (ED.public_key, b"y", ED.sign(b"y"), 2),
        good(1, b"z", 1),
        (ED.public_key, b"z", ED.sign(b"y"), 2),
    ]
    assert crypto.verify_many(checks) == one_by_one(checks) == [True, True, True, False]
    assert crypto.verify_many([]) == []


@pytest.mark.parametrize(
    "hostile", [b"\xc0" + bytes(95), b"\x80" + bytes(95), b"\xa0" + bytes(95), bytes(96), b"\xff" * 96]
)
def test_points_that_are_none(hostile: bytes) -> None:
    key = KEYS[0].public_key
    infinity = PublicKey(Curve.BLS12_381, b"\xc0" + bytes(47))
    bad = Signature(Curve.BLS12_381, hostile)
    assert crypto.verify_many([(key, b"", bad, 2), (infinity, b"", bad, 2), good(0, b"")]) == [False, False, True]
    assert not crypto.verify_possession(key, bad)
    assert not crypto.verify_possession(infinity, bad)


def test_hash_to_curve_of_rfc_9380() -> None:
    """The vector of appendix J.10.1 for the empty message: x of the point, compressed."""
    point = BlstP2Element().hash_to_group(b"", b"QUUX-V01-CS02-with-BLS12381G2_XMD:SHA-256_SSWU_RO_")
    real = "0141ebfbdca40eb85b87142e130ab689c673cf60f1a3e98d69335266f30d9b8d4ac44c1038e9dcdd5393faf5c41fb78a"
    imaginary = "05cb8437535e20ecffaef7752baddf98034139c38452458baeefab379ba13dff5bf5dd71b72418717047f5b0f37da03d"
    compressed = bytearray(point.compress())
    compressed[0] &= 0x1F
    assert compressed.hex() == imaginary + real


@pytest.mark.parametrize("message", [b"", b"\x13" + bytes(77)])
def test_py_ecc_agrees(message: bytes) -> None:
    key = KEYS[4]
    scalar = 5
    assert G2ProofOfPossession.SkToPk(scalar) == key.public_key.data
    assert G2ProofOfPossession.Sign(scalar, message) == key.sign(message, version=2).data
    assert G2MessageAugmentation.Sign(scalar, message) == key.sign(message, version=1).data
    assert G2ProofOfPossession.PopProve(scalar) == key.prove_possession().data
    assert G2Basic.KeyGen(b"\7" * 32) == int.from_bytes(bls.derive_scalar(b"\7" * 32), "big")


def test_expecting_a_signature_changes_no_verdict() -> None:
    key = crypto.generate_secret_key(Curve.BLS12_381)
    for version in (1, 2):
        crypto.expect(key.public_key, b"message", version=version)
        signature = key.sign(b"message", version=version)
        assert crypto.verify(key.public_key, b"message", signature, version=version)
        assert not crypto.verify(key.public_key, b"massage", signature, version=version)
        assert not crypto.verify(key.public_key, b"message", signature, version=3 - version)
        assert not crypto.verify(
            crypto.generate_secret_key(Curve.BLS12_381).public_key, b"message", signature, version=version
        )


def test_expecting_what_cannot_come_is_no_error() -> None:
    key = crypto.generate_secret_key(Curve.BLS12_381).public_key
    crypto.expect(key, b"message", version=0)
    crypto.expect(PublicKey(Curve.BLS12_381, bytes(48)), b"message")
    crypto.expect(crypto.generate_secret_key(Curve.P256).public_key, b"message")
