"""Sixteen keys, ten minutes, one use."""

import hashlib

import pytest

from signer.attestation.sealed import raw_public_key
from signer.enclave.import_keys import LIFETIME, MAX_KEYS, ImportKey, ImportKeys


def key_of(number: int) -> ImportKey:
    return ImportKey(number.to_bytes(32, "big"))


def test_a_key_and_its_public_forms() -> None:
    key = key_of(1)
    assert key.secret == bytes(31) + b"\1"
    assert len(key.subject_public_key_info) == 44
    assert key.subject_public_key_info.hex().startswith("302a300506032b656e032100")
    assert raw_public_key(key.subject_public_key_info) == key.public_key
    key.vouched_by(b"document")
    assert key.document_sha256 == hashlib.sha256(b"document").digest()
    key.wipe()
    assert not any(key.secret)


def test_a_key_is_taken_once() -> None:
    keys, key = ImportKeys(), key_of(1)
    keys.add(key, 0)
    assert keys.take(key_of(2).public_key, 0) is None
    assert keys.take(key.public_key, 0) is key
    assert any(key.secret)
    assert keys.take(key.public_key, 0) is None
    assert len(keys) == 0


@pytest.mark.parametrize(("after", "there"), [(0, True), (599.9, True), (600, False), (1e9, False)])
def test_a_key_lives_ten_minutes(after: float, there: bool) -> None:
    keys, key = ImportKeys(), key_of(1)
    keys.add(key, 100.0)
    keys.expire(100.0 + after)
    assert any(key.secret) is there
    assert (keys.take(key.public_key, 100.0 + after) is key) is there
    assert LIFETIME == 600


def test_a_key_whose_time_is_over_is_not_taken_even_if_nobody_looked() -> None:
    keys, key = ImportKeys(), key_of(1)
    keys.add(key, 0)
    assert keys.take(key.public_key, LIFETIME) is None
    assert not any(key.secret)


def test_the_oldest_gives_way() -> None:
    keys = ImportKeys()
    added = [key_of(number) for number in range(1, MAX_KEYS + 4)]
    for now, key in enumerate(added):
        keys.add(key, now)
        assert len(keys) <= MAX_KEYS == 16
    assert [any(key.secret) for key in added] == [False] * 3 + [True] * 16
    assert keys.take(added[2].public_key, 20) is None
    assert keys.take(added[3].public_key, 20) is added[3]


def test_a_dead_key_makes_room_before_a_living_one_gives_way() -> None:
    keys = ImportKeys()
    dead = key_of(1)
    keys.add(dead, 0)
    living = [key_of(number) for number in range(2, MAX_KEYS + 1)]
    for key in living:
        keys.add(key, 500)
    keys.add(key_of(99), LIFETIME)
    assert not any(dead.secret)
    assert all(any(key.secret) for key in living)


def test_no_secret_in_a_repr() -> None:
    keys, key = ImportKeys(), ImportKey(b"\x41" * 32)
    keys.add(key, 0)
    assert "AAAA" not in repr(key) + repr(keys._kept)
