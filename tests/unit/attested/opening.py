"""Opens an envelope with asn1crypto, which is no part of what is tested."""

import base64

from asn1crypto import cms
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.padding import PKCS7


def open_envelope(key: RSAPrivateKey, text: str) -> bytes:
    """The plaintext of a CiphertextForRecipient, in base64 as KMS sends it."""
    enveloped = cms.ContentInfo.load(base64.b64decode(text), strict=True)["content"]
    (info,) = enveloped["recipient_infos"]
    oaep = padding.OAEP(padding.MGF1(SHA256()), SHA256(), label=None)
    content_key = key.decrypt(info.chosen["encrypted_key"].native, oaep)
    encrypted = enveloped["encrypted_content_info"]
    iv = encrypted["content_encryption_algorithm"]["parameters"].native
    decryptor = Cipher(algorithms.AES(content_key), modes.CBC(iv)).decryptor()
    padded = decryptor.update(encrypted["encrypted_content"].native) + decryptor.finalize()
    unpadder = PKCS7(128).unpadder()
    return unpadder.update(padded) + unpadder.finalize()
