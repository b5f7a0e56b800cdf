"""The blobs in a DynamoDB table, in the layout of the reference; section 4.6 of the signer specification, weakness 15.

One item for each key: `pkh` (text) and `value` (the blob). All pages are read, consistently; a key that is there is
never overwritten. Serving needs `dynamodb:Scan` alone; a new key needs `dynamodb:PutItem`.
"""

from typing import Any

import trio

from signer.aws.client import AwsError
from signer.aws.table import Client, Table
from signer.errors import SignerError, UnavailableError
from signer.tezos.keys import PublicKeyHash
from signer.vaults.nitro.storage import KeyExistsError, StorageAwayError, StorageError, StoredKey

DEFAULT_TABLE = "encrypted_keys"
_KEY, _BLOB = "pkh", "value"
_LOOK_INTERVAL = 10.0  # seconds between two scans; each reads the whole table, and is paid for by its size
_APPEND_LIMIT = 15.0  # seconds to store a new key, which is lost if it can't be stored

Content = tuple[StoredKey, ...]


class KeyTable:
    """Implements `signer.vaults.nitro.storage.KeyStorage` on the table *name*."""

    def __init__(self, client: Client, name: str) -> None:
        self.name = f"DynamoDB table {name}"
        self._table = Table(client, name, _KEY)
        self._looked = float("-inf")  # when (Trio's clock) the table was scanned
        self._content: Content = ()
        self._failure: StorageError | None = None  # of the last scan

    async def open(self) -> None:
        """Not patient: whoever asks says what is missing, and asks again, while other vaults serve."""
        try:
            await self._table.open(self._probe, patient=False)
        except SignerError as exc:  # also a refusal: a policy is attached, or a table made, without a restart here
            raise StorageAwayError(f"(Nitro): cannot open {self.name}: {exc}") from exc

    async def _probe(self) -> None:
        await self._table.call("Scan", TableName=self._table.name, Limit=1)

    async def stamp(self, *, fresh: bool = False) -> object:
        """The content as it was at most `_LOOK_INTERVAL` seconds ago, or the failure to read it then."""
        if fresh or trio.current_time() - self._looked >= _LOOK_INTERVAL:
            await self._look()
        else:
            await trio.lowlevel.checkpoint()
        if self._failure is not None:
            raise self._failure
        return self._content or None

    def gone(self) -> StorageError:
        return StorageError(
            f"(Nitro): {self.name} holds no key; the keys known stay in use. Restore its items; restart the signer "
            "if no key is wanted any more"
        )

    async def load(self) -> list[StoredKey]:
        await self._look()
        if self._failure is not None:
            raise self._failure
        return list(self._content)

    async def _look(self) -> None:
        self._looked = trio.current_time()
        try:
            self._content, self._failure = await self._scan(), None
        except AwsError as exc:
            self._failure = self._error("cannot read", exc)
            self._failure.__cause__ = exc

    async def _scan(self) -> Content:
        """Every entry, by address: a scan has no order of its own."""
        found: list[StoredKey] = []
        page: dict[str, Any] = {}
        while True:
            answer = await self._table.call("Scan", TableName=self._table.name, ConsistentRead=True, **page)
            for item in answer.get("Items", ()):
                blob = item.get(_BLOB, {}).get("B", b"")  # without one it is skipped and reported: others serve
                found.append(StoredKey(str(item[_KEY]["S"]), bytes(blob)))
            if not answer.get("LastEvaluatedKey"):
                return tuple(sorted(found, key=lambda stored: stored.public_key_hash))
            page = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}

    async def append(self, key: PublicKeyHash, blob: bytes) -> None:
        with trio.move_on_after(_APPEND_LIMIT, shield=True):  # to be stored or not, not perhaps
            await self._append(key, blob)
            return
        raise StorageAwayError(f"(Nitro): {self.name}: no answer within {_APPEND_LIMIT:g} s, storing {key}")

    async def _append(self, key: PublicKeyHash, blob: bytes) -> None:
        try:
            await self._table.call(
                "PutItem",
                deadline=trio.current_time() + _APPEND_LIMIT,
                TableName=self._table.name,
                Item={_KEY: {"S": str(key)}, _BLOB: {"B": blob}},
                ConditionExpression=f"attribute_not_exists({_KEY})",
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except AwsError as exc:
            if exc.code != "ConditionalCheckFailedException":
                raise self._error(f"cannot store {key} in", exc) from exc
            standing = exc.response.get("Item") or {}
            if standing.get(_BLOB, {}).get("B") != blob:  # else: the reply to our own put was lost, and it was repeated
                raise KeyExistsError(f"(Nitro): {key} is in {self.name} already") from exc
        self._looked = float("-inf")

    async def replace(self, old: StoredKey, blob: bytes) -> None:
        try:
            await self._table.call(
                "PutItem",
                deadline=trio.current_time() + _APPEND_LIMIT,
                TableName=self._table.name,
                Item={_KEY: {"S": old.public_key_hash}, _BLOB: {"B": blob}},
                ConditionExpression="#blob = :old",
                ExpressionAttributeNames={"#blob": _BLOB},
                ExpressionAttributeValues={":old": {"B": old.blob}},
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except AwsError as exc:
            if exc.code != "ConditionalCheckFailedException":
                raise self._error(f"cannot store {old.public_key_hash} in", exc) from exc
            standing = exc.response.get("Item") or {}
            if standing.get(_BLOB, {}).get("B") != blob:  # else: the reply to our own put was lost
                raise StorageError(
                    f"(Nitro): {self.name} has changed meanwhile; nothing was changed. Try again"
                ) from exc
        self._looked = float("-inf")

    def _error(self, what: str, exc: SignerError) -> StorageError:
        text = f"(Nitro): {what} {self.name}: {exc}"
        return StorageAwayError(text) if isinstance(exc, UnavailableError) else StorageError(text)
