"""Layouts as data: small parsers, put together as the tables of the request specification are written.

A layout moves a `Reader` behind one value and returns nothing; where policy needs a value (a ballot's vote, a
transaction's destination) `signer.tezos._operations` reads it itself. Layouts nest only as deep as the tables do, so
no input can exhaust the stack.
"""

from collections.abc import Callable

from signer.tezos._micheline import skip_expression
from signer.tezos._reader import MAX_BOUNDED_NATURAL, Reader

Layout = Callable[[Reader], None]

HASH = 20  # bytes
KEY_LENGTHS = {0: 32, 1: 33, 2: 33, 3: 48, 4: 1312}  # by curve tag; 4 (ML-DSA-44) from protocol 025 on
SIGNATURE_LENGTHS = (64, 96, 2420)  # bytes: the usual curves, BLS, ML-DSA-44
MAX_ENTRYPOINT = 31  # bytes
NAMED_ENTRYPOINT = 255
ENTRYPOINTS = (
    b"default",
    b"root",
    b"do",
    b"set_delegate",
    b"remove_delegate",
    b"deposit",
    b"stake",
    b"unstake",
    b"finalize_unstake",
    b"set_delegate_parameters",
)
"""Names of the entrypoints that have a tag; the index is the tag."""


# -- parts


def sequence(*layouts: Layout) -> Layout:
    """One value after the other."""

    def read(reader: Reader) -> None:
        for layout in layouts:
            layout(reader)

    return read


def fixed(length: int, what: str) -> Layout:
    """`bytes(length)`."""

    def read(reader: Reader) -> None:
        reader.skip(length, what)

    return read


def blob(what: str, *, limit: int | None = None) -> Layout:
    """`dyn` bytes."""

    def read(reader: Reader) -> None:
        reader.blob(what, limit=limit)

    return read


def dyn(layout: Layout, what: str) -> Layout:
    """`dyn(X)`: exactly one X fills the region."""

    def read(reader: Reader) -> None:
        with reader.region(what):
            layout(reader)

    return read


def many(layout: Layout, what: str, *, limit: int | None = None) -> Layout:
    """`list(X)`: zero or more X fill the region; *limit* is in elements."""

    def read(reader: Reader) -> None:
        elements = 0
        with reader.region(what):
            while reader.position < reader.end:
                if elements == limit:
                    raise reader.fail(f"at most {limit} elements of {what}")
                layout(reader)
                elements += 1

    return read


def option(layout: Layout, what: str) -> Layout:
    """`option(X)`."""

    def read(reader: Reader) -> None:
        if reader.present(what):
            layout(reader)

    return read


def choice(what: str, alternatives: dict[int, Layout]) -> Layout:
    """A `u8` tag, then what the tag says."""
    known = ", ".join(map(str, alternatives))

    def read(reader: Reader) -> None:
        tag = reader.u8(what)
        if tag not in alternatives:
            raise reader.unknown_tag(tag, f"{what} tag {known}")
        alternatives[tag](reader)

    return read


def nothing(_reader: Reader) -> None:
    """No bytes."""


def u8(what: str, *, maximum: int = 255) -> Layout:
    def read(reader: Reader) -> None:
        value = reader.u8(what)
        if value > maximum:
            raise reader.fail(f"{what} of at most {maximum}, got {value}", offset=reader.position - 1)

    return read


def u16(what: str) -> Layout:
    return fixed(2, what)


def i32(what: str) -> Layout:
    return fixed(4, what)


def natural_i32(what: str) -> Layout:
    def read(reader: Reader) -> None:
        reader.natural_i32(what)

    return read


def int31(what: str) -> Layout:
    def read(reader: Reader) -> None:
        reader.int31(what)

    return read


def natural(what: str, *, limit: int | None = None) -> Layout:
    def read(reader: Reader) -> None:
        reader.natural(what, limit=limit)

    return read


def mutez(what: str) -> Layout:
    def read(reader: Reader) -> None:
        reader.mutez(what)

    return read


def integer(what: str) -> Layout:
    def read(reader: Reader) -> None:
        reader.integer(what)

    return read


def boolean(what: str) -> Layout:
    return fixed(1, what)


def rest(what: str, lengths: tuple[int, ...]) -> Layout:
    """All that is left of the region, which must have one of *lengths* bytes."""
    known = ", ".join(map(str, lengths))

    def read(reader: Reader) -> None:
        if reader.remaining not in lengths:
            raise reader.fail(f"{what} of {known} bytes, {reader.remaining} are left")
        reader.position = reader.end

    return read


# -- keys, hashes, addresses (section 2)


def pkh(what: str) -> Layout:
    def read(reader: Reader) -> None:
        read_pkh(reader, what)

    return read


def read_pkh(reader: Reader, what: str) -> bytes:
    """The 21 bytes of a public key hash: curve tag and hash."""
    tag = reader.u8(what)
    if tag not in KEY_LENGTHS:
        raise reader.unknown_tag(tag, f"{what}, a public key hash tag 0 to 4")
    reader.skip(HASH, what)
    return reader.data[reader.position - HASH - 1 : reader.position]


def public_key(reader: Reader) -> None:
    tag = reader.u8("public key")
    if tag not in KEY_LENGTHS:
        raise reader.unknown_tag(tag, "public key tag 0 to 4")
    reader.skip(KEY_LENGTHS[tag], "public key")


def contract(what: str) -> Layout:
    def read(reader: Reader) -> None:
        read_contract(reader, what)

    return read


def read_contract(reader: Reader, what: str) -> bytes | None:
    """The 21 bytes of an implicit account, or None for an originated contract."""
    tag = reader.u8(what)
    if tag == 0:
        return read_pkh(reader, what)
    if tag != 1:
        raise reader.unknown_tag(tag, f"{what}, a contract tag 0 or 1")
    reader.skip(HASH + 1, what)  # the padding byte is ignored by readers
    return None


def originated(what: str) -> Layout:
    return choice(what, {1: fixed(HASH + 1, what)})


def read_entrypoint(reader: Reader) -> bytes:
    """The name of an entrypoint, whichever way it is written."""
    tag = reader.u8("entrypoint")
    if tag < len(ENTRYPOINTS):
        return ENTRYPOINTS[tag]
    if tag != NAMED_ENTRYPOINT:
        raise reader.unknown_tag(tag, "entrypoint tag 0 to 9 or 255")
    length = reader.u8("length of the entrypoint name")
    if length > MAX_ENTRYPOINT:
        raise reader.fail(f"an entrypoint name of at most {MAX_ENTRYPOINT} bytes", offset=reader.position - 1)
    return reader.take(length, "entrypoint name")


expression: Layout = skip_expression
script = dyn(skip_expression, "Micheline expression")
bls_proof = dyn(fixed(96, "BLS proof of possession"), "BLS proof of possession")
manager = sequence(
    natural("counter", limit=MAX_BOUNDED_NATURAL),
    natural("gas limit", limit=MAX_BOUNDED_NATURAL),
    natural("storage limit", limit=MAX_BOUNDED_NATURAL),
)
"""Counter, gas limit and storage limit: what follows source and fee."""
