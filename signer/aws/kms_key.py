"""A KMS key as it stands: its policy in force, its state, its grants. Reads, changes nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from signer.aws.client import AwsClient, AwsError
from signer.aws.kms_review import Finding, Grant, Severity

_DEADLINE = 20.0  # seconds for each call, repeats included: somebody waits for the answer
_PAGES = 50  # of 100 grants; a key has at most 50,000, and nobody reads on after so many
_DENIED = "AccessDeniedException"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyState:
    """What KMS told. *metadata* is that of DescribeKey, empty where it may not be called; *notes*: what wasn't seen."""

    key: str  # ARN, or what was asked for
    policy: str  # JSON
    metadata: Mapping[str, Any]
    grants: tuple[Grant, ...]
    notes: tuple[str, ...]

    @property
    def account(self) -> str:
        return str(self.metadata.get("AWSAccountId", ""))

    def findings(self) -> Iterator[Finding]:
        """What is wrong with the key, whatever its policy says."""
        spec = self.metadata.get("KeySpec", "SYMMETRIC_DEFAULT")
        if spec != "SYMMETRIC_DEFAULT":
            text = f"its KeySpec is {spec}: an enclave's keys are sealed by a key of SYMMETRIC_DEFAULT only"
            yield Finding(Severity.ERROR, "key", text, "give the key of encryption_key_id")
        if self.metadata.get("KeyManager") == "AWS":
            text = "AWS manages it: its policy can't be changed"
            yield Finding(Severity.ERROR, "key", text, "make a key of your own")
        state = self.metadata.get("KeyState", "Enabled")
        if state != "Enabled":
            ending = state == "PendingDeletion"
            text = f"its state is {state}: " + ("all sealed keys go with it" if ending else "nothing can be unsealed")
            advice = "stop that at once: aws kms cancel-key-deletion" if ending else "enable it: aws kms enable-key"
            yield Finding(Severity.ERROR, "key", text, advice)
        if self.metadata.get("MultiRegion"):
            text = "it is a multi-Region key: each replica opens the same blobs, and has a policy of its own"
            yield Finding(Severity.WARNING, "key", text, "check each replica, or use a key of one region")


async def read_key(client: AwsClient, key: str) -> KeyState:
    """The state of *key*: an id, an ARN, an alias (`alias/...`, or its ARN). Raises `AwsError`."""
    notes: list[str] = []
    try:
        metadata = (await _call(client, "DescribeKey", key, KeyId=key))["KeyMetadata"]
    except AwsError as exc:
        if exc.code != _DENIED or "alias/" in key:  # an alias means nothing to the other calls
            raise
        metadata = {}
        notes.append("the state of the key was not seen: kms:DescribeKey is not allowed")
    found = str(metadata.get("Arn", key))
    policy = (await _call(client, "GetKeyPolicy", found, KeyId=found, PolicyName="default"))["Policy"]
    grants: tuple[Grant, ...] = ()
    try:
        grants, is_all = await _grants(client, found)
        if not is_all:
            notes.append(f"only the first {len(grants)} grants of the key were seen")
    except AwsError as exc:
        if exc.code != _DENIED:
            raise
        notes.append("the grants of the key were not seen: kms:ListGrants is not allowed")
    return KeyState(key=found, policy=policy, metadata=metadata, grants=grants, notes=tuple(notes))


async def _grants(client: AwsClient, key: str) -> tuple[tuple[Grant, ...], bool]:
    """The grants, and whether these are all."""
    found: list[Grant] = []
    page: dict[str, Any] = {}
    for _ in range(_PAGES):
        answer = await _call(client, "ListGrants", key, KeyId=key, Limit=100, **page)
        found += [
            Grant(
                grant_id=str(one.get("GrantId", "")),
                grantee=str(one.get("GranteePrincipal", "somebody")),
                operations=tuple(one.get("Operations", ())),
            )
            for one in answer.get("Grants", ())
        ]
        if not answer.get("Truncated"):
            return tuple(found), True
        page = {"Marker": answer["NextMarker"]}
    return tuple(found), False


async def _call(client: AwsClient, action: str, key: str, **parameters: Any) -> dict[str, Any]:
    return await client.call(action, resource=key, deadline=trio.current_time() + _DEADLINE, **parameters)
