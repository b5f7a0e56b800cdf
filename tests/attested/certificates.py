"""The test CA of KMS, and the certificates by which a client has to tell the real KMS from others.

The CA's key is derived from its name, and its certificate signed deterministically: an image may carry it, and any
process can be the server.
"""

from __future__ import annotations

import hashlib
import ssl
import tempfile
import warnings
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.attested.documents import usage

HOST = "kms.us-west-2.amazonaws.com"
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256


class Tls(StrEnum):
    """What a client meets when it connects; all but the first are to be refused."""

    GOOD = "good"
    WRONG_NAME = "wrong-name"
    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    UNKNOWN_CA = "unknown-ca"
    SELF_SIGNED = "self-signed"
    TLS_1_1 = "tls-1.1"
    SILENT = "silent"  # takes the connection and never answers, as a proxy does that cannot dial
    NONE = "none"  # HTTP in clear: for a client that is told so, by `http://`


class Authority:
    """A CA of that name, the same in every process."""

    def __init__(self, name: str) -> None:
        secret = int.from_bytes(hashlib.sha512(b"nitro-signer tests: " + name.encode()).digest(), "big")
        self.key = ec.derive_private_key(secret % (_ORDER - 1) + 1, ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(int.from_bytes(hashlib.sha256(name.encode()).digest()[:15], "big") + 1)
            .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2050, 1, 1, tzinfo=UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .add_extension(usage("key_cert_sign", "crl_sign"), critical=True)
            .sign(self.key, SHA256(), ecdsa_deterministic=True)
        )

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()


@cache
def authority(name: str = "nitro-signer test CA") -> Authority:
    """The CA that clients of the fake KMS are to trust, unless another *name* is given."""
    return Authority(name)


def server_context(tls: Tls) -> ssl.SSLContext:
    """A server's context with a certificate and versions by *tls*."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    if tls is Tls.TLS_1_1:
        with warnings.catch_warnings():  # Python calls the version deprecated, and so do we
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "server.pem"
        path.write_bytes(_certificate(tls))
        context.load_cert_chain(path)
    return context


def _certificate(tls: Tls) -> bytes:
    """Key and certificate in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    host = "sts.us-west-2.amazonaws.com" if tls is Tls.WRONG_NAME else HOST
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    issuer = authority("another CA") if tls is Tls.UNKNOWN_CA else authority()
    self_signed = tls is Tls.SELF_SIGNED
    begins, ends = _life(tls, datetime.now(UTC))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if self_signed else issuer.name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage("digital_signature"), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
        .sign(key if self_signed else issuer.key, SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private + certificate.public_bytes(Encoding.PEM)


def _life(tls: Tls, now: datetime) -> tuple[datetime, datetime]:
    day = timedelta(days=1)
    if tls is Tls.EXPIRED:
        return now - 30 * day, now - day
    if tls is Tls.NOT_YET_VALID:
        return now + day, now + 30 * day
    return now - day, now + 30 * day
