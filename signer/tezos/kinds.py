"""Names of request kinds and operation kinds, as policies, metrics and listings spell them.

Section 11 of the request specification.
"""

from enum import StrEnum


class RequestKind(StrEnum):
    """What a whole request is (section 4)."""

    ATTESTATION = "attestation"
    ATTESTATION_WITH_DAL = "attestation_with_dal"
    BLOCK = "block"
    GENERIC = "generic"
    PACK = "pack"
    PREATTESTATION = "preattestation"


REQUEST_KINDS: tuple[str, ...] = tuple(sorted(kind.value for kind in RequestKind))

PSEUDO_OPERATION_KINDS: tuple[str, ...] = ("finalize_unstake", "set_delegate_parameters", "stake", "unstake")

OPERATION_KINDS: tuple[str, ...] = (
    "activate_account",
    "attestations_aggregate",
    "ballot",
    "dal_entrapment_evidence",
    "dal_publish_commitment",
    "delegation",
    "double_baking_evidence",
    "double_consensus_operation_evidence",
    "drain_delegate",
    "failing_noop",
    "finalize_unstake",
    "increase_paid_storage",
    "origination",
    "preattestations_aggregate",
    "proposals",
    "register_global_constant",
    "reveal",
    "seed_nonce_revelation",
    "set_delegate_parameters",
    "set_deposits_limit",
    "signature_prefix",
    "smart_rollup_add_messages",
    "smart_rollup_cement",
    "smart_rollup_execute_outbox_message",
    "smart_rollup_originate",
    "smart_rollup_publish",
    "smart_rollup_recover_bond",
    "smart_rollup_refute",
    "smart_rollup_timeout",
    "stake",
    "transaction",
    "transfer_ticket",
    "unstake",
    "update_companion_key",
    "update_consensus_key",
    "vdf_revelation",
    "zk_rollup_origination",
    "zk_rollup_publish",
    "zk_rollup_update",
)
"""The 39 kinds that `allow.generic` takes, sorted."""

BALLOT_KINDS: tuple[str, ...] = ("ballot:nay", "ballot:pass", "ballot:yay")
