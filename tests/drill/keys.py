"""Keys for a drill, sealed as the enclave program seals them in development; without a process, so fast."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from signer import crypto
from signer.config.models import KEY_FILE
from signer.enclave.sealing.local import LocalSealing, load_or_create_key_file
from signer.tezos.keys import Curve, PublicKey
from signer.vaults.nitro.storage import FileStorage

__all__ = ["KEY_FILE", "Key", "make_keys"]


@dataclass(frozen=True, slots=True)
class Key:
    """A key that the signer serves, as the checker knows it."""

    address: str
    public_key: PublicKey


async def make_keys(base_dir: Path, key_file: Path, curves: Iterable[Curve]) -> list[Key]:
    """Add a key of each of *curves* to the blobs in *base_dir*, sealed under *key_file*."""
    sealing, storage = LocalSealing(load_or_create_key_file(key_file)), FileStorage(base_dir / KEY_FILE)
    made = []
    for curve in curves:
        secret = crypto.generate_secret_key(curve)
        storage.append(secret.public_key.hash, await sealing.seal(secret))
        made.append(Key(str(secret.public_key.hash), secret.public_key))
    return made
