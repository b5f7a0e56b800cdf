"""Measuring images: the vectors, each rule of the format, and hostile files."""

import base64
import hashlib
import io
import time
import tracemalloc
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from signer.image import eif, signature
from signer.image.eif import Content, ImageError, Kind
from signer.image.measure import Measured, measure
from signer.rpc._cbor import dumps
from tests.unit.image.vectors import TABLE_AT, Toy, built, opened, patched, sections, toy, toys, with_crc

UNSIGNED, SIGNED = toy("unsigned"), toy("signed")


def measured(data: bytes) -> Measured:
    return measure(opened(data))


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        measured(data)
    return caught.value.reason


@pytest.mark.parametrize("case", toys(), ids=lambda one: one.name)
def test_vectors(case: Toy) -> None:
    if case.expect != "ok":
        assert reason(case.data) == case.expect
        return
    found = measured(case.data)
    assert {f"PCR{number}": value.hex() for number, value in found.registers.items()} == case.measurements
    assert found.size == len(case.data)
    assert (found.layout.architecture, found.layout.default_cpus) == ("x86_64", 2)
    assert found.metadata["ImageName"] == "signer"


def test_several_ramdisks_and_none_of_the_application() -> None:
    contents = [(1, b"kernel"), (2, b"line"), (3, b"first")]
    register = measured(built(contents)).registers
    assert register[0] == register[1]
    assert register[2] == hashlib.sha384(bytes(48) + hashlib.sha384().digest()).digest()
    more = measured(built([*contents, (3, b"sec"), (5, b"{}"), (3, b"ond")])).registers
    assert more[1] == register[1]
    assert more[2] == hashlib.sha384(bytes(48) + hashlib.sha384(b"second").digest()).digest()
    assert more[0] == hashlib.sha384(bytes(48) + hashlib.sha384(b"kernellinefirstsecond").digest()).digest()


def test_equal_ramdisks_are_told_apart_by_their_place() -> None:
    twice = measured(built([(1, b"k"), (2, b"c"), (3, b"same"), (3, b"same")])).registers
    assert twice[2] == hashlib.sha384(bytes(48) + hashlib.sha384(b"same").digest()).digest()


def test_an_image_for_arm() -> None:
    assert measured(patched(UNSIGNED, 6, ">H", 1)).layout.architecture == "aarch64"


WHOLE = sections(UNSIGNED)
KERNEL, CMDLINE, METADATA, FIRST, SECOND = WHOLE

CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "size"),
    "header only": (UNSIGNED[:548], "bounds"),
    "magic": (b".elf" + UNSIGNED[4:], "magic"),
    "version 3": (patched(UNSIGNED, 4, ">H", 3), "version"),
    "no sections": (patched(UNSIGNED, 26, ">H", 0), "sections"),
    "nothing but a header": (with_crc(UNSIGNED[:26] + bytes(522)), "sections"),
    "33 sections": (patched(UNSIGNED, 26, ">H", 33), "sections"),
    "65535 sections": (patched(UNSIGNED, 26, ">H", 65535), "sections"),
    "one section more than there is": (patched(UNSIGNED, 26, ">H", 6), "overlap"),
    "one section that is not counted": (patched(UNSIGNED, 26, ">H", 4), "sections"),
    "a size that is not counted": (patched(UNSIGNED, TABLE_AT + 256 + 8 * 5, ">Q", 1), "sections"),
    "offset behind the end": (patched(UNSIGNED, TABLE_AT + 32, ">Q", 1 << 62), "gap"),
    "offset in the header": (patched(UNSIGNED, TABLE_AT, ">Q", 0), "overlap"),
    "two sections in one": (patched(UNSIGNED, TABLE_AT + 8, ">Q", 548), "overlap"),
    "size of 2^64 - 1": (patched(UNSIGNED, TABLE_AT + 256, ">Q", 2**64 - 1), "bounds"),
    "size differs": (patched(UNSIGNED, 548 + 4, ">Q", 99), "size"),
    "type 0": (patched(UNSIGNED, 548, ">H", 0), "type"),
    "type 6": (patched(UNSIGNED, 548, ">H", 6), "type"),
    "a byte behind": (with_crc(UNSIGNED + b"\0"), "bounds"),
    "a section behind, that nitro-cli would read": (
        with_crc(UNSIGNED + bytes.fromhex("000300000000000000000000")),
        "bounds",
    ),
    "no kernel": (built([CMDLINE, FIRST]), "order"),
    "no command line": (built([KERNEL, FIRST]), "order"),
    "no ramdisk": (built([KERNEL, CMDLINE, METADATA]), "order"),
    "two kernels": (built([KERNEL, CMDLINE, KERNEL, FIRST]), "order"),
    "ramdisk first": (built([FIRST, KERNEL, CMDLINE]), "order"),
    "two of metadata": (built([*WHOLE, METADATA]), "order"),
    "a long command line": (built([KERNEL, (2, bytes(4097)), FIRST]), "size"),
    "metadata no JSON": (built([KERNEL, CMDLINE, (5, b"{"), FIRST]), "metadata"),
    "metadata no object": (built([KERNEL, CMDLINE, (5, b"[]"), FIRST]), "metadata"),
    "metadata without end": (built([KERNEL, CMDLINE, (5, b"[" * 100_000), FIRST]), "metadata"),
    "metadata no text": (built([KERNEL, CMDLINE, (5, b"\xff\xfe"), FIRST]), "metadata"),
    "damaged": (UNSIGNED[:-1] + b"\0", "crc"),
}


@pytest.mark.parametrize(("data", "expected"), CASES.values(), ids=CASES)
def test_refused_with_its_reason(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize("data", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_every_truncation(data: bytes) -> None:
    for length in range(len(data)):
        cut = data[:length]
        assert reason(cut) in {"size", "bounds"}
        assert length < 548 or reason(with_crc(cut)) == "bounds"


@pytest.mark.parametrize("data", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_every_changed_byte(data: bytes) -> None:
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]
        reason(changed)  # every one is refused


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_changes_with_a_good_checksum_end_in_a_measurement_or_an_image_error(data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from([UNSIGNED, SIGNED])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(image) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=9))
        image[at : at + len(piece)] = piece
    try:
        measured(with_crc(bytes(image)))
    except ImageError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_a_signature_of_anything(content: bytes) -> None:
    assert reason(built([*WHOLE, (4, content)])) == "signature"


def test_a_great_image_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "great.eif"
    great = tmp_path / "ramdisk"
    with great.open("wb") as file:
        file.truncate(64 << 20)
    with path.open("wb") as file:
        eif.write(file, [Content(Kind.KERNEL, b"k"), Content(Kind.CMDLINE, b"c"), Content(Kind.RAMDISK, great)])
    tracemalloc.start()
    began = time.monotonic()
    try:
        with path.open("rb") as file:
            assert measure(file).size > 64 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 20


def test_a_file_that_becomes_shorter() -> None:
    class Shrinking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(size)[:100]

    with pytest.raises(ImageError) as caught:
        list(eif.stream(Shrinking(UNSIGNED), eif.read_layout(opened(UNSIGNED))))
    assert caught.value.reason in {"size", "crc"}


# -- writing


def test_written_as_the_tools_of_aws_write() -> None:
    file = io.BytesIO()
    eif.write(file, [Content(Kind(kind), content) for kind, content in WHOLE])
    assert file.getvalue() == UNSIGNED
    assert file.tell() == len(UNSIGNED)


def test_what_cannot_be_written() -> None:
    kernel, line, ramdisk = (Content(Kind(kind), b"x") for kind in (1, 2, 3))
    for contents, expected in (([line, kernel, ramdisk], "order"), ([kernel, line, *[ramdisk] * 31], "sections")):
        with pytest.raises(ImageError) as caught:
            eif.write(io.BytesIO(), contents)
        assert caught.value.reason == expected


def test_a_file_that_grows_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ramdisk"
    path.write_bytes(b"short")

    class Growing(io.BytesIO):
        def write(self, data: object, /) -> int:
            path.write_bytes(b"longer than before")
            return super().write(data)  # type: ignore[arg-type] # only bytes are written

    contents = [Content(Kind.KERNEL, b"k"), Content(Kind.CMDLINE, b"c"), Content(Kind.RAMDISK, path)]
    with pytest.raises(ImageError, match="changed while it was read"):
        eif.write(Growing(), contents)


# -- signatures


class Signer:
    """Signs images as `nitro-cli build-enclave --private-key` does."""

    def __init__(self, curve: ec.EllipticCurve) -> None:
        self.key = ec.generate_private_key(curve)
        self.algorithm = {256: -7, 384: -35, 521: -36}.get(curve.key_size, -7)
        self.digest = {-7: hashes.SHA256(), -35: hashes.SHA384(), -36: hashes.SHA512()}[self.algorithm]
        self.size = (curve.key_size + 7) // 8
        self.certificate = certificate_for(self.key)

    def cose(self, pcr0: bytes, *, header: Mapping[int, object] | None = None, **more: object) -> list[object]:
        """Of *pcr0*; *header* and *more* change or add members of what is signed."""
        protected = dumps({1: self.algorithm, **(header or {})})
        payload = dumps({"register_index": 0, "register_value": list(pcr0)} | more)
        value = self.key.sign(dumps(["Signature1", protected, b"", payload]), ec.ECDSA(self.digest))
        r, s = decode_dss_signature(value)
        return [protected, {}, payload, r.to_bytes(self.size) + s.to_bytes(self.size)]

    def section(self, cose: object) -> bytes:
        return dumps([{"signing_certificate": list(self.certificate), "signature": list(dumps(cose))}])


def certificate_for(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *, days: int = 1) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "image")])
    now = datetime(2026, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=days))
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


PCR0 = measured(UNSIGNED).registers[0]
P384 = Signer(ec.SECP384R1())


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_signed_on_every_curve(curve: ec.EllipticCurve) -> None:
    signer = Signer(curve)
    found = measured(built([*WHOLE, (4, signer.section(signer.cose(PCR0)))]))
    der = x509.load_pem_x509_certificate(signer.certificate).public_bytes(serialization.Encoding.DER)
    assert found.registers[8] == hashlib.sha384(bytes(48) + hashlib.sha384(der).digest()).digest()
    assert found.registers[0] == PCR0, "the signature is not measured"


def other(position: int, value: object) -> Callable[[list[object]], list[object]]:
    return lambda cose: [*cose[:position], value, *cose[position + 1 :]]


def with_a_zero_between(cose: list[object]) -> list[object]:
    """r and s are as they were, as numbers."""
    raw = cose[3]
    assert isinstance(raw, bytes)
    return [*cose[:3], raw[:48] + b"\0" + raw[48:]]


def truths(data: bytes) -> list[object]:
    """Ones as the CBOR value true."""
    return [True if byte == 1 else byte for byte in data]


def edited(certificate: bytes, old: bytes, new: bytes) -> bytes:
    """The certificate with *new* in the place of *old* in its DER."""
    der = x509.load_pem_x509_certificate(certificate).public_bytes(serialization.Encoding.DER)
    changed = der.replace(old, new, 1)
    assert changed != der
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(changed) + b"-----END CERTIFICATE-----\n"


VERSION_2 = edited(P384.certificate, bytes.fromhex("a003020102"), bytes.fromhex("a003020101"))  # counted from 0
YEAR_0 = edited(certificate_for(P384.key, days=365 * 100), b"2125", b"0000")

BAD_SIGNATURES: dict[str, bytes] = {
    "of another image": P384.section(P384.cose(bytes(48))),
    "of another register": P384.section(P384.cose(PCR0, register_index=1)),
    "of another key": P384.section(Signer(ec.SECP384R1()).cose(PCR0)),
    "more than the register": P384.section(P384.cose(PCR0, more=0)),
    "another algorithm": P384.section(P384.cose(PCR0, header={1: -7})),
    "more in the header": P384.section(P384.cose(PCR0, header={4: b"key"})),
    "no algorithm": P384.section(other(0, b"")(P384.cose(PCR0))),
    "short": P384.section(other(3, bytes(95))(P384.cose(PCR0))),
    "long": P384.section(with_a_zero_between(P384.cose(PCR0))),
    "zeros": P384.section(other(3, bytes(96))(P384.cose(PCR0))),
    "unprotected header": P384.section(other(1, {1: -35})(P384.cose(PCR0))),
    "payload a text": P384.section(other(2, "text")(P384.cose(PCR0))),
    "three elements": P384.section(P384.cose(PCR0)[:3]),
    "no array": P384.section("cose"),
    "two entries": dumps([{"signing_certificate": b"", "signature": b""}] * 2),
    "no entry": dumps([]),
    "more members": dumps([{"signing_certificate": b"", "signature": b"", "more": 0}]),
    "numbers over 255": dumps([{"signing_certificate": [256], "signature": b""}]),
    "truths for numbers": dumps(
        [{"signing_certificate": P384.certificate, "signature": truths(dumps(P384.cose(PCR0)))}]
    ),
    "no certificate": dumps([{"signing_certificate": b"-----BEGIN", "signature": b""}]),
    "a certificate of version 2": dumps(
        [{"signing_certificate": VERSION_2, "signature": dumps(P384.cose(PCR0))}],
    ),
    "a certificate until year 0": dumps(
        [{"signing_certificate": YEAR_0, "signature": dumps(P384.cose(PCR0))}],
    ),
    "an RSA key": dumps(
        [{"signing_certificate": certificate_for(rsa.generate_private_key(65537, 2048)), "signature": b""}]
    ),
    "a curve of its own": Signer(ec.SECP256K1()).section([]),
}


@pytest.mark.parametrize("section", BAD_SIGNATURES.values(), ids=BAD_SIGNATURES)
def test_bad_signatures(section: bytes) -> None:
    assert reason(built([*WHOLE, (4, section)])) == "signature"


def test_another_image_under_the_same_signature() -> None:
    contents = sections(SIGNED)
    contents[1] = (2, contents[1][1] + b" init=/bin/sh")
    assert reason(built(contents)) == "signature"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(sections(SIGNED)[5][1]) - 1), st.binary(min_size=1, max_size=4))
def test_a_changed_signature_section_is_refused_or_means_the_same(at: int, piece: bytes) -> None:
    section = sections(SIGNED)[5][1]
    changed = section[:at] + piece + section[at + len(piece) :]
    good = signature.parse(section)
    try:
        found = signature.parse(changed)
        signature.verify(found, measured(SIGNED).registers[0])
    except ImageError as exc:
        assert exc.reason == "signature"
    else:  # text around the PEM block, and other forms of one number
        assert (found.certificate.public_key(), found.signed) == (good.certificate.public_key(), good.signed)
