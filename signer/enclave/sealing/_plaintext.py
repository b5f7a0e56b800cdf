"""The plaintext of every blob: CBOR of the private key map, section 5.1 of the enclave specification."""

from signer.crypto import InvalidKeyError, load_secret_key
from signer.crypto.interface import SecretKey
from signer.enclave.sealing.interface import SealingError
from signer.rpc._cbor import CborError, dumps, loads
from signer.rpc.messages import CURVE_NAMES, MalformedCallError, decode_private_key


def encode(key: SecretKey) -> bytes:
    """The map of one entry, key type to 32 bytes."""
    return dumps({CURVE_NAMES[key.curve]: bytes(key.secret_bytes())})


def decode(plaintext: bytes) -> SecretKey:
    """The key; raises `SealingError` as the reference names it, without a byte of the secret."""
    try:
        found = decode_private_key(loads(plaintext))
        return load_secret_key(found.curve, found.secret)
    except (CborError, MalformedCallError):
        raise SealingError("deserialization error", "the blob does not hold a private key") from None
    except InvalidKeyError as exc:
        raise SealingError("deserialization error", str(exc)) from None
