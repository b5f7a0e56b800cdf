"""What KMS is asked about keys: which there are, their public keys, and what people call them.

Reads `ListKeys` to the last page (weakness 27 of the reference), unless the configuration names the keys; then nothing
but `GetPublicKey` is needed. What an answer means for the vault is not decided here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import trio

from signer.aws.client import AwsError, AwsUnavailableError
from signer.vaults.awskms.keyring import Reading
from signer.vaults.awskms.keys import KmsKey, UnfitKeyError, read_key

READERS = 16  # calls at once: a thousand keys take no thousand round trips in a row
PATIENCE = 5.0  # seconds for one call with its repeats; the watchdog hears of silence after 6 s
_PAGE = 1000  # keys: the most that ListKeys takes; it may give fewer
_ALIASES = 100  # the most that ListAliases takes
_TAGS = 50  # and ListResourceTags

_OF_THE_KEY = (  # refusals that are about one key: the others can still be used
    "AccessDeniedException",
    "UnsupportedOperationException",
    "DisabledException",
    "KMSInvalidStateException",
    "NotFoundException",
    "InvalidKeyUsageException",
    "InvalidArnException",
    "ValidationException",
)


class Client(Protocol):
    """The part of `signer.aws.client.AwsClient` that is needed here."""

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]: ...


class Account:
    """The keys that *client* may see; *names* are those of the configuration (ids, ARNs, aliases), empty for all."""

    def __init__(self, client: Client, names: Sequence[str] = ()) -> None:
        self._client = client
        self._names = tuple(names)

    async def ids(self) -> Sequence[str]:
        """The names of the configuration, else the ARNs of all keys. Raises `AwsError`."""
        if self._names:
            return self._names
        listed = await self._pages("ListKeys", "Keys", Limit=_PAGE)
        return list(dict.fromkeys(str(one["KeyArn"]) for one in listed if "KeyArn" in one))

    async def read(self, ids: Sequence[str], found: Callable[[str, KmsKey], None] = lambda _id, _key: None) -> Reading:
        """Fetch the public keys of *ids*, `READERS` at once; *found* hears of each as soon as it is there.

        Raises `AwsError` for what is wrong with more than one key: the credentials, say.
        """
        reading, waiting = Reading(), iter(ids)

        async def reader() -> None:
            for one in waiting:
                await self._read(one, reading, found)

        await _side_by_side(reader, min(READERS, len(ids)))
        return reading

    async def _read(self, one: str, reading: Reading, found: Callable[[str, KmsKey], None]) -> None:
        try:
            answer = await self._ask("GetPublicKey", one, KeyId=one)
            key = read_key(answer)
            if not _is_about(one, key.arn):
                raise AwsUnavailableError(f"kms:GetPublicKey on {one}: KMS told the key {key.arn}", response=answer)
            reading.keys[one] = key
            found(one, key)
        except UnfitKeyError as exc:
            reading.refused[one] = str(exc)
        except AwsUnavailableError as exc:
            reading.unanswered[one] = exc
        except AwsError as exc:
            if exc.of_all:
                raise
            if exc.code in _OF_THE_KEY:
                reading.refused[one] = _short(exc)
            else:  # a refusal that nobody has heard of: it holds no other key up, and is tried again
                reading.unanswered[one] = exc

    async def aliases(self) -> Mapping[str, Sequence[str]]:
        """Aliases by key id; none where the role may not read them."""
        found: dict[str, list[str]] = {}
        try:
            for one in await self._pages("ListAliases", "Aliases", Limit=_ALIASES):
                found.setdefault(str(one.get("TargetKeyId", "")), []).append(str(one["AliasName"]))
        except AwsError:
            return {}
        return found

    async def tags(self, arns: Sequence[str]) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Tags by ARN, of the keys whose tags the role may read."""
        found: dict[str, Sequence[tuple[str, str]]] = {}
        waiting: Iterator[str] = iter(arns)

        async def reader() -> None:
            for arn in waiting:
                try:
                    tags = await self._pages("ListResourceTags", "Tags", resource=arn, KeyId=arn, Limit=_TAGS)
                except AwsError as exc:
                    if isinstance(exc, AwsUnavailableError) or (exc.code == "AccessDeniedException" and not found):
                        return  # nor would a thousand more be told, most likely, and each may take `PATIENCE`
                    continue
                found[arn] = [(str(tag["TagKey"]), str(tag["TagValue"])) for tag in tags]

        await _side_by_side(reader, min(READERS, len(arns)))
        return found

    async def _pages(self, action: str, member: str, *, resource: str = "", **parameters: Any) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        markers: set[str] = set()
        answer = await self._ask(action, resource, **parameters)
        while True:
            items += answer.get(member) or []
            marker = answer.get("NextMarker")
            if not answer.get("Truncated") or not marker:
                if member not in answer:  # to take it for an empty list would drop all keys
                    raise AwsUnavailableError(f"kms:{action}: KMS told no {member}", action=action, response=answer)
                return items
            if marker in markers:
                raise AwsUnavailableError(
                    f"kms:{action}: KMS began again with a page that was read", action=action, response=answer
                )
            markers.add(marker)
            answer = await self._ask(action, resource, Marker=marker, **parameters)

    async def _ask(self, action: str, resource: str, **parameters: Any) -> dict[str, Any]:
        deadline = trio.current_time() + PATIENCE
        return await self._client.call(action, resource=resource, deadline=deadline, **parameters)


def _is_about(one: str, arn: str) -> bool:
    """Whether *arn* is the key that was asked for as *one*; an alias may mean any."""
    resource = one.rpartition(":")[2]
    if resource.startswith("alias/"):
        return True
    return one == arn if one != resource else arn.endswith(f":key/{one}")


def _short(error: AwsError) -> str:
    """Why KMS refused the key; the id stands beside it already."""
    return str(error).partition(f" on {error.resource}: ")[2] or str(error)


async def _side_by_side(work: Callable[[], Any], number: int) -> None:
    """Run *work* *number* times at once; the first error of AWS ends all, and comes out as it is."""
    failure: AwsError | None = None
    async with trio.open_nursery() as nursery:

        async def one() -> None:
            nonlocal failure
            try:
                await work()
            except AwsError as exc:
                failure = failure or exc
                nursery.cancel_scope.cancel(reason="another call was refused")

        for _ in range(number):
            nursery.start_soon(one)
    if failure is not None:
        raise failure
