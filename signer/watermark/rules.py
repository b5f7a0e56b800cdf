"""The rule of the watermark, on values; section 3.7 of the signer specification, texts of section 8 of the
remote-signer specification.

Integers are compared as integers: the reference subtracts in 32 bits, and a level far below wraps to "greater".
"""

from dataclasses import dataclass

from signer.errors import MalformedRequestError
from signer.watermark.interface import MAX_LEVEL, Mark, MarkKey, WatermarkRefusedError


@dataclass(frozen=True, slots=True)
class Accept:
    """The mark is to be set to the request and made durable before a signature leaves.

    It may stand there already, without a signature: whoever set it may have been killed before it was on the disk.
    """


@dataclass(frozen=True, slots=True)
class Replay:
    """Exactly these bytes were signed: the stored signature is the answer."""

    signature: str


def check_range(level: int, round: int) -> None:
    """Raise `MalformedRequestError` unless both fit the non-negative 32-bit integers of the protocol."""
    for name, value in (("level", level), ("round", round)):
        if not 0 <= value <= MAX_LEVEL:
            raise MalformedRequestError(f"{name} {value} is outside 0 to {MAX_LEVEL}")


def decide(key: MarkKey, standing: Mark | None, level: int, round: int, digest: bytes) -> Accept | Replay:
    """What to do with a request for *key* while *standing* is its mark; raises `WatermarkRefusedError`."""
    if standing is None or (level, round) > (standing.level, standing.round):
        return Accept()
    if (level, round) == (standing.level, standing.round) and standing.digest == digest:
        return Replay(standing.signature) if standing.signature is not None else Accept()
    raise _refusal(key, standing, level, round)


def _refusal(key: MarkKey, standing: Mark, level: int, round: int) -> WatermarkRefusedError:
    slot, high = key.slot, standing
    if level < high.level:
        reason, text = "level_below", f"{slot} level {level} below high watermark {high.level}"
    elif round < high.round:
        reason = "round_below"
        text = f"{slot} level {level} and round {round} not above high watermark ({high.level},{high.round})"
    elif high.digest is None:
        reason, text = "conflict", f"{slot} level {level} not above high watermark {high.level}"
    else:
        reason = "conflict"
        text = f"{slot} level {level} and round {round} already signed with different data"
    return WatermarkRefusedError(
        f"watermark validation failed: {text} ({key.public_key_hash} on {key.chain_id})",
        standing=standing,
        reason=reason,
    )


def higher(first: Mark | None, second: Mark) -> Mark:
    """The higher of two marks; on a tie the one that knows its digest."""
    if first is None or (second.level, second.round) > (first.level, first.round):
        return second
    if (second.level, second.round) == (first.level, first.round) and first.digest is None:
        return second
    return first
