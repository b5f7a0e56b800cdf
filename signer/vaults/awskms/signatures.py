"""What KMS answers to `Sign`, as a signature of Tezos; pure, section 5.2 of the signer specification.

ECDSA signatures come as DER (RFC 3279), which is read strictly: one SEQUENCE of two INTEGERs, shortest form, nothing
behind. secp256k1 needs the low s, that the chain accepts alone; P-256 stays as it is. Ed25519 comes as its 64 bytes.
"""

from signer.crypto import p256, secp256k1
from signer.tezos.keys import Curve, Signature

_SCALAR = 32  # bytes
_SEQUENCE, _INTEGER = 0x30, 0x02  # tags
_ORDERS = {Curve.SECP256K1: secp256k1.ORDER, Curve.P256: p256.ORDER}


class SignatureFormError(Exception):
    """The bytes are no signature of that curve."""


def read_signature(curve: Curve, answer: bytes) -> Signature:
    """*answer* as r‖s. Raises `SignatureFormError`; whether it verifies is the caller's to see."""
    if curve is Curve.ED25519:
        if len(answer) != 2 * _SCALAR:
            raise SignatureFormError(f"an Ed25519 signature has 64 bytes, not {len(answer)}")
        return Signature(curve, answer)
    r, rest = _integer(_content(answer))
    s, rest = _integer(rest)
    if rest or not all(0 < number < _ORDERS[curve] for number in (r, s)):
        raise SignatureFormError("crypt: invalid ASN.1")
    data = r.to_bytes(_SCALAR, "big") + s.to_bytes(_SCALAR, "big")
    return Signature(curve, secp256k1.normalise_low_s(data) if curve is Curve.SECP256K1 else data)


def _content(der: bytes) -> bytes:
    """What is in the SEQUENCE; its length has one byte, as two integers of 33 bytes have 70."""
    if len(der) < 2 or der[0] != _SEQUENCE or der[1] >= 0x80 or len(der) != 2 + der[1]:
        raise SignatureFormError("crypt: invalid ASN.1")
    return der[2:]


def _integer(der: bytes) -> tuple[int, bytes]:
    """A positive INTEGER in its shortest form, and what follows it."""
    if len(der) < 3 or der[0] != _INTEGER or not 1 <= der[1] <= _SCALAR + 1 or len(der) < 2 + der[1]:
        raise SignatureFormError("crypt: invalid ASN.1")
    content, rest = der[2 : 2 + der[1]], der[2 + der[1] :]
    padded = len(content) > 1 and content[0] == 0 and content[1] < 0x80
    if content[0] >= 0x80 or padded:
        raise SignatureFormError("crypt: invalid ASN.1")
    return int.from_bytes(content, "big"), rest
