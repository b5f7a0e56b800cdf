"""What the signer in front of an emulated enclave has to do: sign with every key."""

from collections.abc import Sequence

from signer import crypto
from signer.tezos.keys import PublicKey, Signature
from tests.integration.conftest import Setup, attestation
from tests.nitro.test_drill import CURVES


def assert_all_sign(setup: Setup, addresses: Sequence[str]) -> None:
    """Each of *addresses*, one of each of `CURVES`, signs an attestation over HTTP, and the signature verifies."""
    for pkh, curve in zip(addresses, CURVES.values(), strict=True):
        status, answer = setup.api.get(f"/keys/{pkh}")
        assert status == 200, answer
        message = attestation(curve, 7)
        status, signed = setup.api.sign(pkh, message)
        assert status == 200, signed
        key = PublicKey.from_base58(answer["public_key"])
        assert crypto.verify(key, message, Signature.from_base58(signed["signature"]))
