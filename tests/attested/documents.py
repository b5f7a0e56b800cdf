"""Attestation documents as a Nitro hypervisor makes them today, under a throw-away root.

The chain follows section 2.6 of the enclave specification: root, region, zone, instance, leaf. The document has the
layout of 2025 and 2026: untagged, the payload an indefinite map, absent fields null. The key of a root is derived from
its name, and its certificate is signed deterministically: processes that never met trust the same root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

REGION = "us-west-2"
INSTANCE_ID = "i-0123456789abcdef0"
MODULE_ID = f"{INSTANCE_ID}-enc019a9bbbb00c0ffee"
ROLE_ARN = "arn:aws:iam::123456789012:role/baker"
ZERO = bytes(48)
PROTECTED = bytes.fromhex("a1013822")  # {1: -35}: ES384

_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973  # P-384
_CA_USAGE = ("digital_signature", "key_cert_sign", "crl_sign")
_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def register(text: bytes) -> bytes:
    """A register that was zero and extended once with *text*, as PCR3 and PCR4 are."""
    return hashlib.sha384(ZERO + text).digest()


PCRS: dict[int, bytes] = dict.fromkeys(range(16), ZERO) | {
    0: register(b"whole image"),
    1: register(b"kernel and bootstrap"),
    2: register(b"application"),
    3: register(ROLE_ARN.encode()),
    4: register(INSTANCE_ID.encode()),
}
"""The registers of a running image that is not signed: 0 to 15 are locked."""

DEBUG_PCRS: dict[int, bytes] = PCRS | dict.fromkeys((0, 1, 2, 8), ZERO)
"""The same image in debug mode: 3 and 4 keep their values."""


@dataclass(frozen=True)
class Authority:
    """A certificate that may issue others, with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.der).digest()


@dataclass(frozen=True)
class Chain:
    """What signs documents: the bundle with the root first, the leaf's certificate and its key."""

    bundle: Sequence[bytes]
    certificate: bytes
    key: ec.EllipticCurvePrivateKey

    @property
    def root_sha256(self) -> bytes:
        return hashlib.sha256(self.bundle[0]).digest()


@cache
def root(name: str = "test.nitro-enclaves") -> Authority:
    """The root of that name, the same in every process."""
    secret = int.from_bytes(hashlib.sha512(b"nitro-signer tests: " + name.encode()).digest(), "big") % (_ORDER - 1) + 1
    key = ec.derive_private_key(secret, ec.SECP384R1())
    subject = _name(name)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(hashlib.sha256(name.encode()).digest()[:15], "big") + 1)
        .not_valid_before(datetime(2019, 10, 28, 13, 28, 5, tzinfo=UTC))
        .not_valid_after(datetime(2049, 10, 28, 14, 28, 5, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(usage(*_CA_USAGE), critical=True)
        .sign(key, SHA384(), ecdsa_deterministic=True)
    )
    return Authority(certificate, key)


def usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in names for name in _USAGES})


def issue(
    issuer: Authority,
    subject: str,
    *,
    begins: datetime,
    lives: timedelta,
    path_length: int | None = None,
    is_authority: bool = True,
    usages: Sequence[str] = _CA_USAGE,
    curve: ec.EllipticCurve | None = None,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> Authority:
    """A new key certified by *issuer*; *extra* are further extensions, each with whether it is critical."""
    key = ec.generate_private_key(curve or ec.SECP384R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + lives)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=path_length), critical=True)
        .add_extension(usage(*usages), critical=is_authority)
    )
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical=critical)
    return Authority(builder.sign(issuer.key, SHA384()), key)


def make_chain(
    *, at: datetime, authority: Authority | None = None, module_id: str = MODULE_ID, intermediates: int = 3
) -> Chain:
    """A chain that is valid at *at* and for three hours more, under *authority*, by default the root of the tests."""
    at = at.replace(microsecond=0)
    authorities = [authority or root()]
    levels = [
        (f"8fc4ef94cd9a089d.{REGION}.test.nitro-enclaves", timedelta(days=20, hours=1), _CA_USAGE),
        (f"f6ee6599d23ae49c.zonal.{REGION}.test.nitro-enclaves", timedelta(days=6), _CA_USAGE),
        (f"{module_id.partition('-enc')[0]}.{REGION}.test.nitro-enclaves", timedelta(hours=24), ("key_cert_sign",)),
    ][3 - intermediates :]
    for below, (name, lives, usages) in zip(reversed(range(intermediates)), levels, strict=True):
        authorities.append(
            issue(authorities[-1], name, begins=at - lives / 2, lives=lives, path_length=below, usages=usages)
        )
    leaf = issue(
        authorities[-1],
        f"{module_id}.{REGION}.test"[:64],
        begins=at - timedelta(seconds=3),
        lives=timedelta(hours=3, seconds=3),
        is_authority=False,
        usages=("digital_signature", "content_commitment"),
    )
    return Chain([each.der for each in authorities], leaf.der, leaf.key)


def make_payload(
    chain: Chain,
    *,
    made_at: datetime,
    module_id: str = MODULE_ID,
    pcrs: Mapping[int, bytes] = PCRS,
    public_key: bytes | None = None,
    user_data: bytes | None = None,
    nonce: bytes | None = None,
) -> bytes:
    """The payload as the hypervisor writes it: an indefinite map, in this order, absent fields null."""
    fields = {
        "module_id": module_id,
        "digest": "SHA384",
        "timestamp": _Timestamp(milliseconds(made_at)),
        "pcrs": dict(sorted(pcrs.items())),
        "certificate": chain.certificate,
        "cabundle": list(chain.bundle),
        "public_key": public_key,
        "user_data": user_data,
        "nonce": nonce,
    }
    pairs = b"".join(cbor2.dumps(name) + _encode(value) for name, value in fields.items())
    return b"\xbf" + pairs + b"\xff"


def milliseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def sign(payload: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The COSE_Sign1 around *payload*, untagged."""
    to_sign = cbor2.dumps(["Signature1", PROTECTED, b"", payload])
    r, s = decode_dss_signature(key.sign(to_sign, ec.ECDSA(SHA384())))
    half = max(48, (key.key_size + 7) // 8)  # 48 for P-384; a forger may have another curve
    return bytes(cbor2.dumps([PROTECTED, {}, payload, r.to_bytes(half, "big") + s.to_bytes(half, "big")]))


def make_document(
    chain: Chain,
    *,
    made_at: datetime,
    module_id: str = MODULE_ID,
    pcrs: Mapping[int, bytes] = PCRS,
    public_key: bytes | None = None,
    user_data: bytes | None = None,
    nonce: bytes | None = None,
) -> bytes:
    """A document signed by *chain*; *made_at* becomes its timestamp."""
    payload = make_payload(
        chain,
        made_at=made_at,
        module_id=module_id,
        pcrs=pcrs,
        public_key=public_key,
        user_data=user_data,
        nonce=nonce,
    )
    return sign(payload, chain.key)


class _Timestamp(int):
    """Always eight bytes long, whatever its value."""


def _encode(value: object) -> bytes:
    if isinstance(value, _Timestamp):
        return b"\x1b" + value.to_bytes(8, "big")
    return bytes(cbor2.dumps(value))


def _name(common_name: str) -> x509.Name:
    parts = [
        (NameOID.COUNTRY_NAME, "US"),
        (NameOID.ORGANIZATION_NAME, "Test"),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, "Nitro"),
        (NameOID.COMMON_NAME, common_name),
    ]
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])
