"""The listing of keys, section 7.4 of the signer specification: scripts read it, so it is kept to the space."""

from collections.abc import Iterable

from signer.service import ListedKey

_WIDTH = 27  # characters of a label with its padding


def as_text(key: ListedKey) -> str:
    """One key and the blank line behind it."""
    rows = [
        ("Public Key Hash:", str(key.public_key_hash)),
        ("Public Key:", str(key.key.public_key)),
        ("Reference:", key.key.reference),
        *_labels(key),
        ("Vault:", key.vault.kind),
        ("Active:", _boolean(key.policy is not None)),
    ]
    if key.policy is not None:
        rows += [
            ("Allowed Requests:", _list(key.policy.requests)),
            ("Allowed Operations:", _list(key.policy.operations)),
            ("Allow Proof of Possession:", _boolean(key.policy.allow_proof_of_possession)),
        ]
    return "".join(f"{label:{_WIDTH}}{value}\n" for label, value in rows)


def as_json(key: ListedKey) -> dict[str, object]:
    """The same as values."""
    facts: dict[str, object] = {
        "public_key_hash": str(key.public_key_hash),
        "public_key": str(key.key.public_key),
        "reference": key.key.reference,
        "vault": key.vault.kind,
        "vault_name": key.vault.name,
        "active": key.policy is not None,
    }
    if key.key.aliases:
        facts["aliases"] = list(key.key.aliases)
    if key.key.tags:
        facts["tags"] = dict(key.key.tags)
    if key.policy is not None:
        facts |= {
            "allowed_requests": list(key.policy.requests),
            "allowed_operations": list(key.policy.operations),
            "allow_proof_of_possession": key.policy.allow_proof_of_possession,
        }
    return facts


def _labels(key: ListedKey) -> Iterable[tuple[str, str]]:
    """What people call it in the vault; a line of its own each, so that the reference stays what scripts expect."""
    if key.key.aliases:
        yield "Aliases:", _list(key.key.aliases)
    if key.key.tags:
        yield "Tags:", _list(f"{name}={value}" for name, value in key.key.tags)


def _list(values: Iterable[str]) -> str:
    return "[" + " ".join(values) + "]"


def _boolean(value: bool) -> str:
    return "true" if value else "false"
