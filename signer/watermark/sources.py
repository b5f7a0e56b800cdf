"""The files in which other signers keep their marks: reading and writing them. Pure but for the files themselves.

Signatory's three generations (section 3.7 of the signer specification) and octez-signer's (section 9 of the
remote-signer specification). Old names of the slots are translated; several entries that fall into one slot are
handed out one by one, and the higher wins where they are put together.
"""

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKeyHash, Signature, digest_text, parse_chain_id, parse_digest
from signer.watermark.interface import MAX_LEVEL, Mark, MarkKey, Slot, WatermarkStoreError
from signer.watermark.rules import higher

SIGNATORY_DIRECTORIES = ("watermark_v2", "watermark_v1", "watermark")

_SLOTS = {
    "block": Slot.BLOCK,
    "attestation": Slot.ATTESTATION,
    "attestation_with_dal": Slot.ATTESTATION,
    "endorsement": Slot.ATTESTATION,
    "preattestation": Slot.PREATTESTATION,
    "preendorsement": Slot.PREATTESTATION,
}
_ORDERS = {0: Slot.BLOCK, 1: Slot.PREATTESTATION}  # of Signatory's v1; any other is an attestation
OCTEZ_FILES = {
    "block_high_watermarks": Slot.BLOCK,
    "preattestation_high_watermarks": Slot.PREATTESTATION,
    "preendorsement_high_watermarks": Slot.PREATTESTATION,
    "attestation_high_watermarks": Slot.ATTESTATION,
    "endorsement_high_watermarks": Slot.ATTESTATION,
}
_MAX_FILE = 64 * 1024 * 1024  # bytes

Entry = tuple[MarkKey, Mark]


@dataclass(frozen=True, slots=True)
class Source:
    """A place where marks were found, and what it holds."""

    path: Path
    entries: tuple[Entry, ...]

    @property
    def fingerprint(self) -> str:
        """Another one as soon as any mark is another."""
        return blake2b("\n".join(sorted(map(repr, self.entries))).encode(), digest_size=16).hexdigest()


def find(directory: Path) -> list[Source]:
    """Every source in *directory*; raises `WatermarkStoreError` for one that is there and can't be read."""
    found = []
    for name in SIGNATORY_DIRECTORIES:
        if stat.S_ISDIR(_mode(directory / name)):
            found.append(Source(directory / name, tuple(_signatory_directory(directory / name))))
    for name in OCTEZ_FILES:
        if stat.S_ISREG(_mode(directory / name)):
            found.append(Source(directory / name, tuple(_octez_file(directory / name))))
    return found


def read(path: Path) -> list[Source]:
    """The sources at *path*: a signer's directory, one of Signatory's directories, or one of octez-signer's files."""
    mode = _mode(path)
    if stat.S_ISREG(mode):
        if path.name in OCTEZ_FILES:
            return [Source(path, tuple(_octez_file(path)))]
        if path.suffix == ".json":
            return [Source(path, tuple(_signatory_file(path)))]
    elif stat.S_ISDIR(mode):
        sources = find(path)
        if sources:
            return sources
        if _json_files(path):
            return [Source(path, tuple(_signatory_directory(path)))]
    known = ", ".join((*SIGNATORY_DIRECTORIES, *OCTEZ_FILES))
    raise WatermarkStoreError(f"{path}: no watermarks found; expected a directory that holds one of {known}")


def merge(sources: list[Source]) -> dict[MarkKey, Mark]:
    """The highest mark of each key over all sources."""
    merged: dict[MarkKey, Mark] = {}
    for source in sources:
        for key, mark in source.entries:
            merged[key] = higher(merged.get(key), mark)
    return merged


def signatory_files(marks: list[Entry]) -> dict[str, str]:
    """File name to content in Signatory's v2 form, so that a user can go back to it.

    An attestation's mark is written for both kinds that Signatory tells apart: going back lowers no protection.
    """
    chains: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for key, mark in marks:
        kinds = chains.setdefault(key.chain_id, {}).setdefault(str(key.public_key_hash), {})
        digest = None if mark.digest is None else digest_text(mark.digest)
        names = ("attestation", "attestation_with_dal") if key.slot is Slot.ATTESTATION else (key.slot.value,)
        for name in names:
            kinds[name] = {"level": mark.level, "round": mark.round, "hash": digest}
    return {f"{chain}.json": _dump(content) for chain, content in chains.items()}


def _dump(content: dict[str, dict[str, dict[str, object]]]) -> str:
    ordered = {pkh: dict(sorted(kinds.items())) for pkh, kinds in sorted(content.items())}
    return json.dumps(ordered, indent=4)


# -- Signatory


def _signatory_directory(directory: Path) -> Iterator[Entry]:
    for path in _json_files(directory):
        if stat.S_ISREG(_mode(path)):
            yield from _signatory_file(path)


def _json_files(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.name.endswith(".json"))
    except OSError as exc:  # `Path.glob` would find nothing, and say nothing
        raise _unreadable(directory, exc) from exc


def _signatory_file(path: Path) -> Iterator[Entry]:
    chain = _chain(path, path.stem)
    for name, value in _object(path, _load(path)).items():
        inner = _object(path, value)
        if name in _SLOTS:  # v0: kind, then key
            for address, mark in inner.items():
                yield MarkKey(chain, _key(path, address), _SLOTS[name]), _signatory_mark(path, mark)
        elif "level" in inner:  # v1: one mark for each key
            yield MarkKey(chain, _key(path, name), _slot_of_v1(path, inner)), _signatory_mark(path, inner)
        else:  # v2: key, then kind
            for kind, mark in inner.items():
                if kind not in _SLOTS:
                    raise _damaged(path, f"{name}: unknown kind {kind!r}")
                yield MarkKey(chain, _key(path, name), _SLOTS[kind]), _signatory_mark(path, mark)


def _slot_of_v1(path: Path, fields: dict[str, object]) -> Slot:
    order = fields.get("order")
    if order is None:  # Go reads an absent number as zero
        order = 0
    if not isinstance(order, int) or isinstance(order, bool):
        raise _damaged(path, f"order {order!r} is not an integer")
    return _ORDERS.get(order, Slot.ATTESTATION)


def _signatory_mark(path: Path, value: object) -> Mark:
    fields = _object(path, value)
    text = fields.get("hash")
    try:
        digest = parse_digest(text) if isinstance(text, str) and text else None
    except TezosError as exc:
        raise _damaged(path, f"hash {text!r}: {exc}") from exc
    return Mark(_integer(path, fields, "level"), _integer(path, fields, "round", default=0), digest)


# -- octez-signer


def _octez_file(path: Path) -> Iterator[Entry]:
    slot = OCTEZ_FILES[path.name]
    for chain, keys in _object(path, _load(path)).items():
        for address, value in _object(path, keys).items():
            fields = _object(path, value)
            level, round_ = _integer(path, fields, "level"), _integer(path, fields, "round", default=0)
            digest = _octez_digest(path, fields.get("hash"))
            signature = _octez_signature(fields.get("signature")) if digest is not None else None
            key = MarkKey(_chain(path, chain), _key(path, address), slot)
            yield key, Mark(level, round_, digest, signature)


def _octez_digest(path: Path, value: object) -> bytes | None:
    if value is None:
        return None
    try:
        digest = bytes.fromhex(str(value))
    except ValueError as exc:
        raise _damaged(path, f"hash {value!r} is not hexadecimal") from exc
    if len(digest) != 32:
        raise _damaged(path, f"hash {value!r} has {len(digest)} bytes instead of 32")
    return digest


def _octez_signature(value: object) -> str | None:
    """A signature in its curve's form; another is left out: the same bytes are signed again."""
    try:
        signature = Signature.from_base58(str(value)) if value is not None else None
    except TezosError:
        return None
    return str(signature) if signature is not None and signature.curve is not None else None


# -- both


def _mode(path: Path) -> int:
    """Type and permissions of what is at *path*, 0 where nothing is; a link that leads nowhere is not nothing."""
    try:
        return path.stat().st_mode
    except OSError as exc:
        if isinstance(exc, FileNotFoundError) and not path.is_symlink():
            return 0
        raise _unreadable(path, exc) from exc


def _load(path: Path) -> object:
    try:
        if path.stat().st_size > _MAX_FILE:
            raise _damaged(path, f"it is larger than {_MAX_FILE} bytes")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    except (ValueError, RecursionError) as exc:
        raise _damaged(path, str(exc)) from exc


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object in which no name hides another; which of the two counts, readers disagree about."""
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} occurs twice in one object")
        fields[name] = value
    return fields


def _object(path: Path, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _damaged(path, "an object was expected")
    return value


def _integer(path: Path, fields: dict[str, object], name: str, *, default: int | None = None) -> int:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_LEVEL:
        raise _damaged(path, f"{name} {value!r} is not an integer from 0 to {MAX_LEVEL}")
    return value


def _chain(path: Path, text: str) -> str:
    try:
        parse_chain_id(text)
    except TezosError as exc:
        raise _damaged(path, f"{text!r} is not a chain id: {exc}") from exc
    return text


def _key(path: Path, text: str) -> PublicKeyHash:
    try:
        return PublicKeyHash.from_base58(text)
    except TezosError as exc:
        raise _damaged(path, f"{text!r} is not a public key hash: {exc}") from exc


def _unreadable(path: Path, exc: OSError) -> WatermarkStoreError:
    return WatermarkStoreError(
        f"cannot read the watermarks in {path}: {exc.strerror}. Make it readable for the signer's user, or move it "
        "away if its levels are known to be far below the chain's"
    )


def _damaged(path: Path, reason: str) -> WatermarkStoreError:
    return WatermarkStoreError(
        f"cannot take over the watermarks in {path}: {reason}. Mend the file, or move it away if its levels are "
        "known to be far below the chain's"
    )
