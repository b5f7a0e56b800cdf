"""Requests to sign, built from the layouts of section 6 of the request specification."""

import struct

from signer.tezos.keys import Curve

_BRANCH = bytes(range(32))
_PAYLOAD = bytes(range(32, 64))


def attestation(curve: Curve, *, chain: int, level: int, round: int = 0) -> bytes:
    """An attestation in the form that *curve* signs: without a slot for BLS (tag 41), else with one (tag 21)."""
    head = b"\x13" + struct.pack(">I", chain) + _BRANCH
    if curve is Curve.BLS12_381:
        return head + struct.pack(">Bii", 41, level, round) + _PAYLOAD
    return head + struct.pack(">BHii", 21, 0, level, round) + _PAYLOAD
