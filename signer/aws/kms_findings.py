"""What a review of a key policy finds, and what is known beside the policy. Pure."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """Error: a key can get out, or the enclave can't get at it. Warning: one more mistake, and it is so."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to change: where, what, and what to do about it."""

    severity: Severity
    where: str
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.text}; {self.advice}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An enclave that runs, as nitro-cli tells."""

    name: str = ""
    measurements: Mapping[str, str]  # register to lower-case hex
    is_debug: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known beside the policy. Nothing of it has to be."""

    role: str = ""  # ARN of the parent's role; empty: whom the policy lets decrypt with an attestation
    account: str = ""
    running: Sequence[Running] = ()
    required: Collection[str] = ()  # registers that the policy has to ask for
    # by its source ("--pcr0", "expected_pcrs"): register to values
    releases: Mapping[str, Mapping[str, Collection[str]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One grant on the key."""

    grant_id: str
    grantee: str
    operations: tuple[str, ...]  # "Decrypt"


def listed(names: Iterable[str], most: int = 6) -> str:
    """Them as text, not more than *most* of them."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
