"""The vectors of attestation, with the inputs that verification takes."""

import base64
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from signer.attestation.document import Expected

_FILE = Path(__file__).parents[2] / "vectors" / "attestation.json"
VECTORS: dict[str, Any] = json.loads(_FILE.read_text())
DOCUMENTS: dict[str, dict[str, Any]] = {case["name"]: case for case in VECTORS["documents"]}


def document(name: str) -> bytes:
    return base64.b64decode(DOCUMENTS[name]["document"])


def inputs(params: Mapping[str, Any] | None = None) -> tuple[Expected, datetime]:
    """The default inputs, single ones replaced by *params*."""
    chosen = VECTORS["defaults"] | (params or {})
    expected = Expected(
        nonce=_bytes(chosen["nonce"]),
        user_data=_bytes(chosen["user_data"]),
        module_id=chosen["module_id"],
        pcrs={int(index): [bytes.fromhex(value)] for index, value in chosen["pcrs"].items()},
        allow_debug=chosen["allow_debug"],
        needs_public_key=chosen["need_public_key"],
        root_sha256=bytes.fromhex(chosen["root_sha256"]),
        max_age=chosen["max_age_s"],
        max_skew=chosen["max_skew_s"],
    )
    return expected, datetime.fromisoformat(chosen["now"])


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)
