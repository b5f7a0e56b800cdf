"""The vault: the keys of an AWS account that Tezos can use, and signatures asked of KMS; section 5.

The keys are read at start, the list again now and then, and all of it at a reload. A request never causes a reading,
but for an unknown hash, and then once in `LOOK_AGAIN` however many are asked for: `GET /keys` needs no authentication
(weakness 30 of the reference). What KMS refuses about one key leaves the others alone, and a reading that fails leaves
the keys known as they are.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
import trio

from signer.aws.client import AwsError, AwsUnavailableError
from signer.crypto.interface import SecretKey
from signer.errors import KeyNotFoundError
from signer.observe.tasks import Tasks
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature, digest_of
from signer.vaults.awskms.account import Account, Client
from signer.vaults.awskms.keyring import Keyring
from signer.vaults.awskms.keys import KmsKey
from signer.vaults.awskms.signatures import SignatureFormError, read_signature
from signer.vaults.interface import (
    Accept,
    SignatureMismatchError,
    UnsupportedByVaultError,
    VaultError,
    VaultHealth,
    VaultKey,
    VaultUnavailableError,
)

logger = structlog.get_logger(__name__)

KIND = "AWSKMS"
LOOK_AGAIN = 10.0  # seconds between two looks at the list of keys for hashes that nobody knows
ROUNDS = 3  # readings of a key that KMS doesn't answer for, after which its absence is taken for a fact
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0  # seconds between two readings while something is wrong
_SHARE = 0.1  # of the time that it has been wrong already: what was short is found soon
_JITTER = 0.1  # of a pause, either way
_SHOWN = 100  # skipped keys in the health; an account may have thousands
_NAMED = 3  # ids in a log line

__all__ = ["KIND", "AwsKmsVault"]


class AwsKmsVault:
    """The keys that *client* may see, or those of *names*. Implements `signer.vaults.interface.Vault`.

    *wait_timeout* bounds one request, *refresh_interval* is between two looks at the list of keys; in seconds. With
    *describe* the keys come with aliases and tags, as far as the role may read them: for listings.
    """

    kind = KIND

    def __init__(
        self,
        *,
        name: str,
        client: Client,
        names: Sequence[str] = (),
        wait_timeout: float = 2.5,
        refresh_interval: float = 300.0,
        describe: bool = False,
        tasks: Tasks | None = None,
    ) -> None:
        self.name = name
        self.patience = wait_timeout
        self._watched = _Watched(client)
        self._account = Account(self._watched, names)
        self._named = bool(names)
        self._interval = refresh_interval
        self._describe = describe
        self._task = (tasks or Tasks()).add(f"vault {name}")
        self._ring = Keyring()
        self._rounds = 0  # readings in a row that left some unanswered
        self._loaded = False  # whether a reading came to its end
        self._failure = ""  # of the last reading
        self._away = ""  # why KMS is out of reach; empty while it answers
        self._wrong_since = float("inf")  # Trio's clock
        self._looked_at = float("-inf")
        self._begun = self._done = 0  # readings, which follow each other
        self._whole = True  # whether the next reading is to be of all keys
        self._wanted, self._changed = trio.Event(), trio.Event()

    # -- the state

    @property
    def ready(self) -> bool:
        return self._loaded and not self._away

    def serves(self, key: PublicKeyHash) -> bool:
        return key in self._ring.signers and not self._away

    async def wait_for(self, key: PublicKeyHash, deadline: float) -> None:
        await trio.lowlevel.checkpoint()
        with trio.move_on_at(deadline):
            while not self.serves(key) and (key in self._ring.signers or self._may_come):
                await self._changed.wait()

    @property
    def _may_come(self) -> bool:
        """Whether a key that is not known may turn up by itself."""
        return not self._loaded or bool(self._ring.unanswered and self._rounds < ROUNDS)

    async def wait_change(self) -> None:
        await self._changed.wait()

    @property
    def last_sign_of_life(self) -> float:
        return self._watched.waiting_since

    def keys(self) -> Mapping[PublicKeyHash, VaultKey]:
        return self._ring.keys

    def health(self) -> VaultHealth:
        number = len(self._ring.keys)
        if not self._loaded:
            detail = self._failure or f"reading the keys, {number} in"
        elif self._away:
            detail = f"KMS is out of reach: {self._away}"
        else:
            detail = f"{number} key(s)" + (
                f"; the last look at the keys failed: {self._failure}" if self._failure else ""
            )
        skipped = {**self._ring.unanswered, **self._ring.refused}
        ready = self.ready and not self._may_come and bool(number or not skipped)
        return VaultHealth(ready, detail, number, _bounded(skipped))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # -- reading the keys

    async def refresh(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._named or not self.ready:
            return  # nothing new can come, or it is looked for already
        with trio.move_on_after(self.patience):
            if self._done < self._begun:
                await self._ended(self._begun)
            elif trio.current_time() - self._looked_at >= LOOK_AGAIN:
                await self._read_again(whole=False)

    async def reload(self) -> None:
        with trio.move_on_after(self.patience):
            await self._read_again(whole=True)
            if self._failure:
                raise VaultError(self._failure)

    async def _read_again(self, *, whole: bool) -> None:
        """Return when a reading that begins after this has ended; several who ask share it."""
        self._whole |= whole
        self._wanted.set()
        await self._ended(self._begun + 1)

    async def _ended(self, number: int) -> None:
        while self._done < number:
            await self._changed.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await self._read()
            task_status.started()
            while True:
                with trio.move_on_after(self._pause()):
                    await self._wanted.wait()
                await self._read()
        finally:
            self._task.stopped()

    def _pause(self) -> float:
        """Seconds until the next reading, if nobody wants one before."""
        pause = self._interval
        if self._failure or self._away or self._ring.unanswered:
            down = max(trio.current_time() - self._wrong_since, 0.0)
            pause = min(max(_SHARE * down, _SHORTEST_PAUSE), _LONGEST_PAUSE, pause)
        return pause * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311  # jitter, not a secret

    async def _read(self) -> None:
        """One reading; what goes wrong with it is noted and tried again."""
        self._begun += 1
        whole, self._whole, self._wanted = self._whole, False, trio.Event()
        self._looked_at = trio.current_time()
        try:
            await self._look(whole=whole)
        except AwsError as exc:
            self._whole |= whole
            self._note_failure(exc)
        else:
            self._failure = ""
            self._note_answer()
            self._task.running(self.health().detail)
        self._done = self._begun
        self._notify()

    async def _look(self, *, whole: bool) -> None:
        ids = await self._account.ids()
        reading = await self._account.read(self._questions(ids, whole=whole), self._found)
        if reading.silence is not None:
            raise reading.silence
        self._say_refused(self._ring.settle(ids, reading, whole=whole))
        self._rounds = self._rounds + 1 if self._ring.unanswered else 0
        if self._ring.unanswered:
            self._wrong_since = min(self._wrong_since, trio.current_time())
        self._loaded = True
        if self._describe:
            arns = [key.reference for key in self._ring.keys.values()]
            self._ring.label(await self._account.aliases(), await self._account.tags(arns))

    def _questions(self, ids: Sequence[str], *, whole: bool) -> Sequence[str]:
        if whole:
            return ids
        new = self._ring.unread(ids)
        if self._named and self._away and not new:
            return list(self._ring.known)[:1]  # no list is asked for, so this shows whether KMS is back
        return new

    def _found(self, one: str, key: KmsKey) -> None:
        if self._ring.adopt(one, key):
            self._note_answer()
            self._notify()

    def _say_refused(self, refused: Mapping[str, str]) -> None:
        """Once, one line for each reason: an account may have thousands of keys that are none of ours."""
        by_reason: dict[str, list[str]] = {}
        for one, why in refused.items():
            by_reason.setdefault(why.partition(": ")[0] if not self._named else why, []).append(one)
        for why, ids in by_reason.items():
            shown = ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
            log = logger.warning if self._named or ids[0] in self._ring.known else logger.info
            log(f"vault {self.name}: {len(ids)} key(s) of KMS not used: {why}", vault_name=self.name, keys=shown)

    # -- what KMS is to us

    def _note_answer(self) -> None:
        """KMS answers."""
        if self._away:
            self._away = ""
            self._notify()
        if not self._failure and not self._ring.unanswered:
            self._wrong_since = float("inf")

    def _note_failure(self, error: AwsError) -> None:
        """A reading failed."""
        self._failure = str(error)
        self._wrong_since = min(self._wrong_since, trio.current_time())
        if isinstance(error, AwsUnavailableError) and error.silent:
            self._away = str(error)
        elif error.response:
            self._away = ""
        self._task.failing(str(error).removeprefix(f"{self._task.name}: "))

    def _note_silence(self, error: AwsUnavailableError) -> None:
        """A signature was not made; if KMS is away, see to it that its return is noticed."""
        if not error.silent or self._away:
            return
        self._away = str(error)
        self._wrong_since = min(self._wrong_since, trio.current_time())
        self._task.failing(str(error).removeprefix(f"{self._task.name}: "))
        self._wanted.set()
        self._notify()

    # -- signatures

    async def sign(
        self, key: PublicKeyHash, message: bytes, *, version: int, accept: Accept, deadline: float
    ) -> Signature:
        known = self._ring.signers.get(key)
        if known is None:
            raise KeyNotFoundError(f"vault {self.name} has no key {key}")
        answer = await self._ask(known, digest_of(message), deadline)
        try:
            signature = read_signature(known.scheme.curve, answer)
        except SignatureFormError as exc:
            raise VaultError(f"(AWSKMS/{known.arn}): {exc}") from exc
        if not await accept(signature):
            raise SignatureMismatchError(f"(AWSKMS/{known.arn}): the signature does not verify")
        return signature

    async def _ask(self, key: KmsKey, digest: bytes, deadline: float) -> bytes:
        try:
            answer = await self._watched.call(
                "Sign",
                resource=key.arn,
                deadline=deadline,
                KeyId=key.arn,
                Message=digest,
                MessageType=key.scheme.message_type,
                SigningAlgorithm=key.scheme.algorithm,
            )
        except AwsUnavailableError as exc:
            self._note_silence(exc)
            raise VaultUnavailableError(str(exc)) from exc
        except AwsError as exc:
            raise VaultError(str(exc)) from exc
        self._note_answer()
        signature = answer.get("Signature")
        return signature if isinstance(signature, bytes) else b""

    async def prove_possession(self, key: PublicKeyHash, *, over: PublicKey | None = None, accept: Accept) -> Signature:
        await trio.lowlevel.checkpoint()
        raise UnsupportedByVaultError("proof of possession is not supported")

    async def import_key(self, secret: SecretKey) -> PublicKey:
        await trio.lowlevel.checkpoint()
        raise UnsupportedByVaultError(f"import: vault {self.name} doesn't support import operation")

    async def generate(self, curve: Curve) -> PublicKey:
        await trio.lowlevel.checkpoint()
        raise UnsupportedByVaultError(f"import: vault {self.name} doesn't support generate operation")


class _Watched:
    """A client that knows since when it has been waiting for an answer."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._began: dict[object, float] = {}  # Trio's clock, of the calls that are on their way

    @property
    def waiting_since(self) -> float:
        """Trio's clock: when the oldest call on its way was made; now, if there is none."""
        return min(self._began.values(), default=trio.current_time())

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]:
        with self._noted():
            return await self._client.call(action, resource=resource, deadline=deadline, **parameters)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        token = object()
        self._began[token] = trio.current_time()
        try:
            yield
        finally:
            del self._began[token]


def _bounded(skipped: Mapping[str, str]) -> Mapping[str, str]:
    if len(skipped) <= _SHOWN:
        return skipped
    shown = dict(list(skipped.items())[:_SHOWN])
    return shown | {"...": f"and {len(skipped) - _SHOWN} more"}
