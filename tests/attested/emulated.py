"""Documents of the emulated enclave, which are not signed: algorithm -1, zeros for certificates and signature.

`adopt` puts the fields of such a document under the test root, so that the fake KMS judges them as it judges others.
Whoever talks to it could write anything: it is for tests of everything else.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from signer.attestation.cbor import CborError, decode
from tests.attested.documents import make_chain, make_document

_HEADER = bytes.fromhex("a10120")  # {1: -1}


def is_emulated(document: bytes) -> bool:
    return document.startswith(b"\x84\x43" + _HEADER)


def adopt(document: bytes, *, at: datetime) -> bytes:
    """The same fields, signed by a chain of the test root that is valid at *at*; without fields, *document* itself."""
    match _fields(document):
        case {
            "module_id": str(module_id),
            "timestamp": int(timestamp),
            "pcrs": dict(pcrs),
            **rest,
        }:
            public_key, user_data, nonce = (_bytes(rest.get(name)) for name in ("public_key", "user_data", "nonce"))
            made_at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=timestamp)
            return make_document(
                make_chain(at=at),
                made_at=made_at,
                module_id=module_id,
                pcrs=pcrs,
                public_key=public_key,
                user_data=user_data,
                nonce=nonce,
            )
    return document


def _bytes(value: object) -> bytes | None:
    return value if isinstance(value, bytes) else None


def _fields(document: bytes) -> object:
    try:
        match decode(document):
            case [_, _, bytes(payload), _]:
                return decode(payload)
    except CborError:
        pass
    return None
