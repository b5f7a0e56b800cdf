"""The rule of the watermark against the reference's overflow, and its texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import MalformedRequestError
from signer.tezos.keys import Curve, PublicKeyHash
from signer.watermark.interface import MAX_LEVEL, Mark, MarkKey, Slot, WatermarkRefusedError
from signer.watermark.rules import Accept, Replay, check_range, decide, higher

KEY = MarkKey("NetXdQprcVkpaWU", PublicKeyHash(Curve.ED25519, bytes(20)), Slot.ATTESTATION)
numbers = st.integers(0, MAX_LEVEL)
A, B = b"a" * 32, b"b" * 32


@given(numbers, numbers, numbers, numbers)
def test_only_what_is_higher_moves_the_mark(level: int, round_: int, new_level: int, new_round: int) -> None:
    standing = Mark(level, round_, A)
    if (new_level, new_round) > (level, round_):
        assert decide(KEY, standing, new_level, new_round, B) == Accept()
    else:
        with pytest.raises(WatermarkRefusedError):
            decide(KEY, standing, new_level, new_round, B)


def test_the_same_bytes() -> None:
    assert decide(KEY, None, 0, 0, A) == Accept()
    assert decide(KEY, Mark(5, 1, A), 5, 1, A) == Accept()
    assert decide(KEY, Mark(5, 1, A, "sig"), 5, 1, A) == Replay("sig")
    with pytest.raises(WatermarkRefusedError):
        decide(KEY, Mark(5, 1, A, "sig"), 5, 0, A)


@pytest.mark.parametrize(
    ("standing", "level", "round_", "text", "reason"),
    [
        (Mark(10, 0, A), 9, 7, "attestation level 9 below high watermark 10", "level_below"),
        (Mark(10, 3, A), 10, 2, "attestation level 10 and round 2 not above high watermark \\(10,3\\)", "round_below"),
        (Mark(10, 3, A), 10, 3, "attestation level 10 and round 3 already signed with different data", "conflict"),
        (Mark(10, 3), 10, 3, "attestation level 10 not above high watermark 10", "conflict"),
    ],
)
def test_texts(standing: Mark, level: int, round_: int, text: str, reason: str) -> None:
    with pytest.raises(WatermarkRefusedError, match=f"^watermark validation failed: {text}") as caught:
        decide(KEY, standing, level, round_, B)
    assert caught.value.reason == reason
    assert caught.value.standing == standing
    assert caught.value.status == 409


@pytest.mark.parametrize(("level", "round_"), [(-1, 0), (0, -1), (MAX_LEVEL + 1, 0), (0, MAX_LEVEL + 1)])
def test_what_is_no_level(level: int, round_: int) -> None:
    with pytest.raises(MalformedRequestError, match="outside 0 to 2147483647"):
        check_range(level, round_)


@given(st.lists(st.tuples(numbers, numbers), min_size=1))
def test_the_higher_of_marks(pairs: list[tuple[int, int]]) -> None:
    best: Mark | None = None
    for level, round_ in pairs:
        best = higher(best, Mark(level, round_))
    assert best is not None
    assert (best.level, best.round) == max(pairs)


def test_on_a_tie_the_digest_is_kept() -> None:
    assert higher(Mark(1, 1), Mark(1, 1, A)) == Mark(1, 1, A)
    assert higher(Mark(1, 1, A), Mark(1, 1, B)) == Mark(1, 1, A)
