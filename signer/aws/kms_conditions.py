"""What a statement's conditions ask of the attestation document, and whether they hold what they seem to. Pure.

Sources: sections 2.3 and 3.9 of the enclave specification; IAM's rules for operators: a missing key meets no positive
operator and every negated one, `...IfExists` is met by a missing key, `ForAllValues:` by an empty set, `ForAnyValue:`
is not. Under one operator all keys have to match, and of a key's values one.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from signer.aws.kms_statements import Condition, Statement

_EQUAL = ("stringequals", "stringequalsignorecase", "stringlike")
_UNEQUAL = ("stringnotequals", "stringnotequalsignorecase", "stringnotlike")
_MENDED = "write StringEqualsIgnoreCase with the PCR0 of the released image"
_MENDED_DENY = "write StringNotEqualsIgnoreCase with the PCR0 of the released image"


class Harm(StrEnum):
    """What a fault does: lets in who should stay out, or keeps out the enclave."""

    OPENS = "opens"
    CLOSES = "closes"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a condition, and what to do."""

    harm: Harm
    text: str
    advice: str


def binding_values(statement: Statement) -> dict[str, set[str]]:
    """The registers to which an Allow binds a request, each with the values accepted (lower case)."""
    bound: dict[str, set[str]] = {}
    for one in statement.attestation:
        if one.register and restricts(one):
            values = {value.lower() for value in one.values}
            bound[one.register] = bound[one.register] & values if one.register in bound else values
    return bound


def pins_image(registers: Iterable[str]) -> bool:
    """Whether these leave one image: PCR0 is the whole of it, PCR1 and PCR2 are its two parts."""
    found = set(registers)
    return "PCR0" in found or {"PCR1", "PCR2"} <= found


def needs_document(statement: Statement) -> bool:
    """Whether a request without an attestation document never meets the conditions."""
    return not all(_met_without_document(one) for one in statement.attestation)


def _met_without_document(condition: Condition) -> bool:
    if condition.base == "null":
        values = {value.lower() for value in condition.values}
        return "true" in values or "false" not in values
    negated = condition.is_negated and condition.quantifier != "foranyvalue"
    return negated or condition.if_exists or condition.quantifier == "forallvalues"


def restricts(condition: Condition) -> bool:
    """Whether a condition of an Allow is met only by documents with values that are named."""
    return (
        condition.base in _EQUAL
        and not condition.if_exists
        and condition.quantifier != "forallvalues"
        and not _has_wildcard(condition)
    )


def allow_faults(condition: Condition) -> Iterator[Fault]:
    """What is wrong with a condition of an Allow on the attestation."""
    if not condition.register:
        yield _no_register(condition)
        if _met_without_document(condition):
            yield Fault(Harm.OPENS, f"{condition} is met by a request without a document", _MENDED)
    elif condition.base == "null":
        yield Fault(Harm.OPENS, f"{condition} accepts the document of any enclave, or none", _MENDED)
    elif condition.is_negated:
        yield Fault(
            Harm.OPENS,
            f"{condition}: in an Allow it lets in everything but the image named",
            _MENDED,
        )
    elif condition.base not in _EQUAL:
        yield Fault(Harm.CLOSES, f"{condition}: a register is a text; this operator never matches it", _MENDED)
    elif condition.if_exists:
        yield Fault(Harm.OPENS, f"{condition} is met by a request without a document", _MENDED)
    elif condition.quantifier == "forallvalues":
        yield Fault(Harm.OPENS, f"{condition} is met by an empty set, so by a request without a document", _MENDED)
    elif _has_wildcard(condition):
        yield Fault(Harm.OPENS, f"{condition} has a wildcard: it accepts images that nobody has named", _MENDED)
    else:
        yield from _value_faults(condition)


def deny_faults(statement: Statement) -> Iterator[Fault]:
    """What is wrong with the conditions of a Deny that asks for an attestation."""
    for condition in statement.attestation:
        yield from _deny_condition_faults(condition)
    if len(statement.attestation) > 1:
        keys = " and ".join(one.key for one in statement.attestation)
        yield Fault(
            Harm.OPENS,
            f"{keys} in one statement have to differ all at once before it denies: one that fits is enough to pass",
            "write one Deny for each register",
        )
    if others := [str(one) for one in statement.conditions if not one.is_attestation]:
        yield Fault(Harm.OPENS, f"it denies only under {', '.join(others)}, too", "take the other conditions out")


def _deny_condition_faults(condition: Condition) -> Iterator[Fault]:
    if not condition.register:
        yield _no_register(condition)
    elif condition.base == "null":
        closes = "false" in {value.lower() for value in condition.values}
        text = "denies whoever shows a document" if closes else "lets any enclave pass, of any image"
        yield Fault(Harm.CLOSES if closes else Harm.OPENS, f"{condition} {text}", _MENDED_DENY)
    elif condition.base in _EQUAL:
        text = f"{condition}: the wrong way round, it denies the image named and lets everybody else pass"
        yield Fault(Harm.CLOSES, text, _MENDED_DENY)
    elif condition.base not in _UNEQUAL:
        yield Fault(Harm.CLOSES, f"{condition}: a register is a text; this operator never compares it", _MENDED_DENY)
    elif condition.quantifier == "foranyvalue":
        yield Fault(Harm.OPENS, f"{condition} does not deny a request without a document", _MENDED_DENY)
    elif _has_wildcard(condition):
        yield Fault(Harm.OPENS, f"{condition} has a wildcard: it lets images pass that nobody has named", _MENDED_DENY)
    else:
        yield from _value_faults(condition)


def denied_unless(statement: Statement) -> tuple[str, set[str]] | None:
    """The register and values outside of which a faultless Deny refuses."""
    if len(statement.attestation) != 1 or any(deny_faults(statement)):
        return None
    (condition,) = statement.attestation
    return condition.register, {value.lower() for value in condition.values}


def _has_wildcard(condition: Condition) -> bool:
    return condition.base in ("stringlike", "stringnotlike") and any(set("*?") & {*value} for value in condition.values)


def _no_register(condition: Condition) -> Fault:
    if "nitrotpmpcr" in condition.key.lower():
        return Fault(
            Harm.CLOSES,
            f"{condition.key} is of NitroTPM, another product: the document of an enclave never has it",
            "write kms:RecipientAttestation:PCR0",
        )
    return Fault(
        Harm.CLOSES,
        f"{condition.key} is no register of an enclave: KMS knows ImageSha384 and PCR0 to PCR31",
        "write kms:RecipientAttestation:PCR0",
    )


def _value_faults(condition: Condition) -> Iterator[Fault]:
    if not condition.values:
        yield Fault(Harm.CLOSES, f"{condition} names no value", "put in the value that nitro-cli build-enclave printed")
    for value in condition.values:
        if "${" in value:
            text = f"{condition}: {value} is a policy variable: who sets it (a tag, for example) names the image"
            yield Fault(Harm.OPENS, text, "put in the value of the released image")
        elif not re.fullmatch("[0-9a-fA-F]{96}", value):
            shown = value if len(value) <= 24 else f"{value[:24]}..."
            text = f"{condition}: {shown!r} is the value of no register (96 hexadecimal digits): no image has it"
            yield Fault(Harm.CLOSES, text, "put in the value that nitro-cli build-enclave printed")
        elif not value.strip("0"):
            text = f"{condition}: zeros are what an enclave in debug mode shows, whatever its image"
            if condition.register in ("PCR3", "PCR8"):
                text = f"{condition}: zeros are what an enclave shows that has no such thing, so it asks for nothing"
            yield Fault(Harm.OPENS, text, "take the zeros out; put in the value of the released image")
        elif value != value.lower() and condition.base not in ("stringequalsignorecase", "stringnotequalsignorecase"):
            text = f"{condition} tells capital letters apart, and KMS compares with small ones"
            yield Fault(Harm.CLOSES, text, "write the ...IgnoreCase operator")
