"""The way of one request: decode, policy, then watermark and signature side by side, verify, reply.

Implements sections 3.1 and 3.8 of the signer specification with the order of the design: everything refusable is
refused before the watermark moves, and a signature leaves only when the mark is durable **and** the signature has
been verified against the key. HTTP, and how a vault makes a signature, are left to others.

A request that has passed the checks becomes a *flight*: it runs in this module's own nursery, not in its caller's
task. So a caller that goes away changes nothing: the exchange with the vault is finished, mark and signature are
kept for the repeat. Equal requests in flight share one flight and receive the same signature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from signer import crypto
from signer.errors import KeyNotFoundError, MalformedRequestError, RefusedError, SignerError, UnavailableError
from signer.observe.metrics import Metrics
from signer.policy import Caller, KeyPolicy, check_first_byte, check_possession, check_request
from signer.tezos.errors import TezosError
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature, digest_of
from signer.tezos.requests import Request, decode
from signer.vaults.interface import SignatureMismatchError, Vault, VaultHealth, VaultKey
from signer.watermark.interface import (
    SLOT_OF_KIND,
    Advance,
    MarkKey,
    WatermarkRefusedError,
    WatermarkStore,
    WatermarkStoreError,
)

logger = structlog.get_logger(__name__)

__all__ = ["Caller", "SignatureMismatchError", "Signing", "verified_possession"]

_LARGE = 8 * 1024  # bytes of a request that are decoded in a thread
MAX_VERIFY_BATCH = 32  # signatures; bounds how long one batch keeps the event loop, some 10 ms


@dataclass(frozen=True, slots=True)
class _Order:
    """A request that passed all checks: what is to be signed, by which key, where."""

    key: VaultKey
    pkh: PublicKeyHash
    vault: Vault
    message: bytes
    digest: bytes
    version: int
    request: Request
    deadline: float  # Trio's clock: until when the vault may take

    @property
    def identity(self) -> tuple[PublicKeyHash, bytes, int]:
        """Equal for requests that must get the same signature."""
        scheme = self.version if self.pkh.curve is Curve.BLS12_381 else 0
        return (self.pkh, self.digest, scheme)


class _Flight:
    """One order on its way, and everybody who waits for it."""

    __slots__ = ("callers", "done", "error", "log", "replayed", "signature")

    def __init__(self, log: "_RequestLog") -> None:
        self.log = log  # of the caller who set it off
        self.callers = 0  # who wait now
        self.done = trio.Event()
        self.signature: Signature | None = None
        self.error: Exception | None = None
        self.replayed = False


class Signing:
    """Signs for callers with the keys of all vaults.

    *policies* says which keys may sign what; *vaults* are asked in the order given; *marks* is the watermark store.
    The vaults and the store run elsewhere; `run` must be running for `sign` to get anywhere.
    """

    def __init__(
        self,
        *,
        policies: Mapping[PublicKeyHash, KeyPolicy],
        vaults: Sequence[Vault],
        marks: WatermarkStore,
        metrics: Metrics,
    ) -> None:
        self._policies = policies
        self._vaults = tuple(vaults)
        self._marks = marks
        self._metrics = metrics
        self._flights: dict[tuple[PublicKeyHash, bytes, int], _Flight] = {}
        self._nursery: trio.Nursery | None = None
        self._verifier = _Verifier()
        self._accounts = _Accounts()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry flights until cancelled; started once `sign` can be called.

        Cancelling cuts flights short: whoever wants them finished stops the callers first, then calls `drain`.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._verifier.run)
            nursery.start_soon(self._accounts.run)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # it takes no flights any more

    def replace_policies(self, policies: Mapping[PublicKeyHash, KeyPolicy]) -> None:
        """Check requests against *policies* from now on; one on its way keeps those that it was checked with."""
        self._policies = policies

    async def drain(self) -> None:
        """Return when no flight is left; the deadline is the caller's."""
        while self._flights:
            flight = next(iter(self._flights.values()))
            await flight.done.wait()

    def authorized_keys(self) -> Sequence[PublicKeyHash] | None:
        """Hashes of the keys that may authenticate a client; None while authentication isn't configured."""
        return None

    def known_keys(self) -> Sequence[PublicKeyHash]:
        """The configured keys that some vault can use now, sorted by address."""
        found = [pkh for pkh, policy in self._policies.items() if self._find(pkh, policy) is not None]
        return sorted(found, key=str)

    async def public_key(self, pkh: PublicKeyHash) -> PublicKey:
        """The public key of any key in any vault (section 2.4); raises `KeyNotFoundError`."""
        return (await self._lookup(pkh, self._policies.get(pkh)))[1].public_key

    async def sign(self, pkh: PublicKeyHash, message: bytes, *, version: int, caller: Caller) -> Signature:
        """Sign the bytes of a request for *caller*.

        Returns the curve's own form of signature. Raises a `SignerError` whose status says what happened, or a
        `TezosError` (the bytes are no request). Cancelling it abandons the wait, not the work.
        """
        began = trio.current_time()
        log = _RequestLog(pkh=pkh, caller=caller, began=began)
        try:
            order = await self._check(pkh, message, version, log)
            flight = self._depart(order, log)
            flight.callers += 1
            try:
                await flight.done.wait()
            finally:
                flight.callers -= 1
            if flight.error is not None:
                raise flight.error
        except (SignerError, TezosError) as exc:
            self._account_refusal(exc, log)
            raise
        assert flight.signature is not None
        log.ended = trio.current_time()
        self._accounts.add(partial(self._account_success, order, log, replayed=flight.replayed))
        return flight.signature

    async def prove_possession(self, pkh: PublicKeyHash, *, over: PublicKey | None = None, caller: Caller) -> Signature:
        """A BLS proof of possession over *over*, by default over the key itself (section 3.8).

        It signs a public key under a domain tag of its own, never a protocol message: no watermark.
        """
        facts = {"request_id": caller.request_id, "pkh": str(pkh)}
        try:
            policy = self._policy(pkh)
            vault, key = await self._lookup(pkh, policy)
            check_possession(policy)
            facts["vault"] = vault.kind
            logger.info("Requesting proof of possession", **facts)
            proof = await verified_possession(vault, key, over)
        except SignerError as exc:
            log = logger.warning if exc.status < 500 else logger.error
            log(f"Error proving possession: {exc}", status=exc.status, **facts)
            raise
        logger.info("Possession proved successfully", **facts)
        return proof

    # -- before the watermark moves

    def _policy(self, pkh: PublicKeyHash) -> KeyPolicy:
        policy = self._policies.get(pkh)
        if policy is None:
            raise RefusedError(f"{pkh} is not listed in config", rule=f"tezos.{pkh}")
        return policy

    async def _check(self, pkh: PublicKeyHash, message: bytes, version: int, log: "_RequestLog") -> _Order:
        policy = self._policy(pkh)
        if policy.log_payloads:
            log.raw = message
        if len(message) <= _LARGE:
            request = decode(message, version=version)
        else:  # a microsecond a byte, during which nobody else would be served
            check_first_byte(policy, message)
            request = await trio.to_thread.run_sync(partial(decode, message, version=version))
        log.request = request
        if version == 0 and pkh.curve is Curve.BLS12_381:
            raise MalformedRequestError("signing version 0 is not defined for tz4 keys: ask for version 2")
        vault, key = await self._lookup(pkh, policy)
        log.vault = vault.kind
        check_request(policy, pkh, request)
        return _Order(key, pkh, vault, message, digest_of(message), version, request, log.began + vault.patience)

    def _permitted_vaults(self, policy: KeyPolicy | None) -> Sequence[Vault]:
        """The vaults that may be used for a key with *policy*, in the order of the configuration."""
        if policy is None or policy.vault is None:
            return self._vaults
        return [vault for vault in self._vaults if vault.name == policy.vault]

    def _find(self, pkh: PublicKeyHash, policy: KeyPolicy | None) -> tuple[Vault, VaultKey] | None:
        """The first vault with the key; one that is away only where no other has it."""
        away = None
        for vault in self._permitted_vaults(policy):
            key = vault.keys().get(pkh)
            if key is not None and vault.serves(pkh):
                return vault, key
            if key is not None and away is None:
                away = vault, key
        return away

    async def _lookup(self, pkh: PublicKeyHash, policy: KeyPolicy | None) -> tuple[Vault, VaultKey]:
        began, found = trio.current_time(), self._find(pkh, policy)
        if found is None:
            async with trio.open_nursery() as nursery:
                for vault in self._permitted_vaults(policy):
                    deadline = began + vault.patience
                    nursery.start_soon(self._wait_for_vault, vault, pkh, policy, deadline, nursery.cancel_scope)
            found = self._find(pkh, policy)
        if found is not None:
            return found
        states = {vault.name: vault.health() for vault in self._permitted_vaults(policy)}
        reasons = [f"{name}: {health.detail}" for name, health in states.items() if not health.ready]
        reasons += _skipped(pkh, states)
        if reasons and policy is not None:  # it may well be there, or come: the client should ask again
            raise UnavailableError(f"no vault can use {pkh} now ({'; '.join(reasons)})")
        raise KeyNotFoundError("; ".join(["this key not found in any vault", *_skipped(pkh, states)]))

    async def _wait_for_vault(
        self,
        vault: Vault,
        pkh: PublicKeyHash,
        policy: KeyPolicy | None,
        deadline: float,
        waiting: trio.CancelScope,
    ) -> None:
        """Give *vault* until *deadline*: another process may have stored the key just now; it may be away, or load.

        Ends *waiting* as soon as the key is known: the other vaults need not be waited for.
        """
        with trio.move_on_at(deadline):
            await vault.refresh()
            if self._find(pkh, policy) is None and policy is not None:
                await vault.wait_for(pkh, deadline)
        if self._find(pkh, policy) is not None:
            waiting.cancel()

    # -- the flight

    def _depart(self, order: _Order, log: "_RequestLog") -> _Flight:
        flight = self._flights.get(order.identity)
        if flight is None:
            if self._nursery is None:
                raise UnavailableError("the signer is shutting down; ask again")
            flight = self._flights[order.identity] = _Flight(log)
            self._nursery.start_soon(self._fly, order, flight)
        return flight

    async def _fly(self, order: _Order, flight: _Flight) -> None:
        try:
            flight.signature = await self._signature(order, flight)
        except SignerError as exc:
            flight.error = exc
        except trio.Cancelled:
            flight.error = UnavailableError("the signer is shutting down; ask again")
            raise
        except Exception as exc:  # a bug must end the request, not every other request
            logger.exception("internal error while signing", pkh=str(order.pkh))
            flight.error = SignerError("internal error, see the signer's log")
            flight.error.__cause__ = exc
        finally:
            del self._flights[order.identity]
            flight.done.set()
            if not flight.callers:
                flight.log.abandoned(flight.error)

    async def _signature(self, order: _Order, flight: _Flight) -> Signature:
        slot = SLOT_OF_KIND.get(order.request.kind)
        if slot is None:
            self._metrics.watermark_operation(self._marks.backend, order.request.kind, refused=False)
            return await self._ask_vault(order)
        assert order.request.chain_id is not None
        mark = MarkKey(order.request.chain_id, order.pkh, slot)
        signature, stored = await self._sign_and_mark(order, mark)
        if stored is not None:
            earlier = _parse_stored(stored, order)
            if earlier is not None and await self._verifies(order, earlier):
                flight.replayed = True
                return earlier
        if signature is None:
            signature = await self._ask_vault(order)
        self._marks.remember(mark, order.digest, str(signature))
        return signature

    async def _sign_and_mark(self, order: _Order, mark: MarkKey) -> tuple[Signature | None, str | None]:
        """Advance the mark and have the signature made, side by side while the vault is up.

        While the vault's link is down the signature comes first: an enclave that stays away moves no mark. What
        needs no enclave, a repeat and a refusal, doesn't wait for it.
        Returns the new signature, verified (None if an earlier one stands), and the one stored before.
        """
        if not order.vault.serves(order.pkh):
            stored = await self._recall(order, mark)
            if stored is not None:
                return None, stored
            signature = await self._ask_vault(order)
            return signature, await self._advance(order, mark, lambda _: None).wait()

        failure: SignerError | None = None
        made: Signature | None = None
        with trio.CancelScope() as asking:

            def settled(advance: Advance) -> None:
                if advance.error is not None or advance.stored is not None:
                    asking.cancel()  # no new signature is wanted; the vault finishes its exchange by itself

            advance = self._advance(order, mark, settled)
            try:
                made = await self._ask_vault(order)
            except SignerError as exc:
                failure = exc
        stored = await advance.wait()
        if failure is not None and stored is None:
            raise failure
        return made, stored

    def _advance(self, order: _Order, mark: MarkKey, on_settled: Callable[[Advance], None]) -> Advance:
        """Begin to advance the mark; its outcome is counted when it is known."""
        assert order.request.level is not None
        assert order.request.round is not None
        began = trio.current_time()

        def settled(advance: Advance) -> None:
            self._count_decision(order, began, refused=advance.error is not None)
            on_settled(advance)

        return self._marks.advance(mark, order.request.level, order.request.round, order.digest, on_settled=settled)

    async def _recall(self, order: _Order, mark: MarkKey) -> str | None:
        """The stored signature of exactly these bytes; counted as a decision where it is the last one."""
        assert order.request.level is not None
        assert order.request.round is not None
        began = trio.current_time()
        try:
            stored = await self._marks.recall(mark, order.request.level, order.request.round, order.digest)
        except SignerError:
            self._count_decision(order, began, refused=True)
            raise
        if stored is not None:
            self._count_decision(order, began, refused=False)
        return stored

    def _count_decision(self, order: _Order, began: float, *, refused: bool) -> None:
        self._metrics.watermark_operation(self._marks.backend, order.request.kind, refused=refused)
        self._metrics.watermark_duration(self._marks.backend, trio.current_time() - began)

    async def _ask_vault(self, order: _Order) -> Signature:
        """A new signature, verified."""
        began, chain_id = trio.current_time(), order.request.chain_id or ""
        if self._nursery is not None and self._is_alone and order.pkh.curve is Curve.BLS12_381:
            self._nursery.start_soon(_expect, order)
        try:
            signature = await order.vault.sign(
                order.pkh,
                order.message,
                version=order.version,
                accept=partial(self._verifies, order),
                deadline=order.deadline,
            )
        except SignatureMismatchError as exc:
            self._metrics.vault_error(order.vault.kind, "n/a", chain_id)
            raise SignatureMismatchError(_mismatch_text("signature", order.pkh, order.vault)) from exc
        except SignerError as exc:
            self._metrics.vault_error(order.vault.kind, str(exc.status), chain_id)
            raise
        elapsed = trio.current_time() - began
        self._metrics.vault_signed(order.vault.kind, str(order.pkh), order.request.kind, chain_id, elapsed)
        return signature

    @property
    def _is_alone(self) -> bool:
        """Whether one flight is all there is: nobody to share a verification with."""
        return len(self._flights) == 1

    async def _verifies(self, order: _Order, signature: Signature) -> bool:
        key = order.key.public_key
        if self._is_alone or key.curve is not Curve.BLS12_381:
            return crypto.verify(key, order.message, signature, version=order.version)
        return await self._verifier.verify(key, order.message, signature, order.version)

    # -- the account of it

    def _account_success(self, order: _Order, log: "_RequestLog", *, replayed: bool) -> None:
        request = order.request
        self._metrics.signed(
            str(order.pkh),
            order.vault.kind,
            request.kind,
            request.operations,
            request.chain_id or "",
            request.round,
        )
        log.success(replayed=replayed)

    def _account_refusal(self, exc: SignerError | TezosError, log: "_RequestLog") -> None:
        address = str(log.pkh)
        if isinstance(exc, RefusedError) and exc.violation is not None:
            self._metrics.policy_violation(exc.violation, address)
        if isinstance(exc, WatermarkRefusedError) and log.request is not None:
            self._metrics.watermark_refused(
                address, log.request.kind, log.request.chain_id or "", exc.reason, log.vault or ""
            )
        log.failure(exc)


async def _expect(order: _Order) -> None:
    """Prepare for the signature of a lone request while the vault makes it."""
    await trio.lowlevel.checkpoint()  # the call to the vault goes out first
    crypto.expect(order.key.public_key, order.message, version=order.version)


class _Verifier:
    """Verifies BLS signatures in batches, since one alone costs more than a millisecond.

    What arrives while a batch is being verified forms the next one, so that a lone request waits for nobody.
    """

    def __init__(self) -> None:
        self._waiting: list[_Check] = []
        self._wakeup = trio.Event()

    async def run(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup = trio.Event()
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_VERIFY_BATCH], self._waiting[MAX_VERIFY_BATCH:]
                results = crypto.verify_many([(c.key, c.message, c.signature, c.version) for c in batch])
                for check, result in zip(batch, results, strict=True):
                    check.result = result
                    check.done.set()
                await trio.lowlevel.checkpoint()

    async def verify(self, key: PublicKey, message: bytes, signature: Signature, version: int) -> bool:
        check = _Check(key, message, signature, version)
        self._waiting.append(check)
        self._wakeup.set()
        await check.done.wait()
        return check.result


class _Accounts:
    """Metrics and log lines of what was signed. No client waits for them, so they are written after the answer."""

    def __init__(self) -> None:
        self._entries: list[Callable[[], None]] = []
        self._wakeup = trio.Event()
        self._running = False

    def add(self, entry: Callable[[], None]) -> None:
        self._entries.append(entry)
        if self._running:
            self._wakeup.set()
        else:
            self._write()

    async def run(self) -> None:
        self._running = True
        try:
            while True:
                await self._wakeup.wait()
                self._wakeup = trio.Event()
                self._write()
        finally:
            self._running = False
            self._write()

    def _write(self) -> None:
        entries, self._entries = self._entries, []
        for entry in entries:
            try:
                entry()
            except Exception:  # a bug in the account is no reason to stop signing
                logger.exception("internal error: the account of a request is lost")


class _Check:
    """One BLS signature that waits for its verification."""

    __slots__ = ("done", "key", "message", "result", "signature", "version")

    def __init__(self, key: PublicKey, message: bytes, signature: Signature, version: int) -> None:
        self.key = key
        self.message = message
        self.signature = signature
        self.version = version
        self.done = trio.Event()
        self.result = False


@dataclass(slots=True)
class _RequestLog:
    """What the one log line of a signing request says; filled in on the way."""

    pkh: PublicKeyHash
    caller: Caller
    began: float  # seconds, Trio's clock
    request: Request | None = None
    vault: str | None = None
    raw: bytes | None = None  # only with log_payloads
    ended: float | None = None  # None: now

    def success(self, *, replayed: bool) -> None:
        assert self.request is not None
        logger.info(
            f"Signed {self.request.kind} successfully",
            outcome="replayed" if replayed else "signed",
            **self._fields(),
        )

    def failure(self, exc: SignerError | TezosError) -> None:
        facts = self._fields()
        if isinstance(exc, RefusedError):
            facts["rule"] = exc.rule
        if isinstance(exc, WatermarkRefusedError):
            facts["rule"] = "watermark"
            facts["standing_level"], facts["standing_round"] = exc.standing.level, exc.standing.round
        outcome = "failed" if isinstance(exc, WatermarkStoreError) or _status(exc) >= 500 else "refused"
        logger.error(f"Error signing request: {exc}", outcome=outcome, status=_status(exc), **facts)

    def abandoned(self, exc: Exception | None) -> None:
        """Nobody waits for the outcome any more; what moved a mark leaves its line all the same."""
        assert self.request is not None
        if exc is None:
            logger.info(f"Signed {self.request.kind}, but its caller has gone", outcome="signed", **self._fields())
        else:
            logger.error(f"Error signing request: {exc}; its caller has gone", outcome="failed", **self._fields())

    def _fields(self) -> dict[str, object]:
        facts: dict[str, object] = {"request_id": self.caller.request_id, "pkh": str(self.pkh)}
        if self.caller.address:
            facts["peer"] = self.caller.address
        if self.vault is not None:
            facts["vault"] = self.vault
        if self.request is not None:
            facts["request"] = str(self.request.kind)
            if self.request.chain_id is not None:
                facts["chain_id"] = self.request.chain_id
                facts["lvl"], facts["round"] = self.request.level, self.request.round
            if self.request.operations:
                facts["ops"] = _count(self.request.operations)
                facts["ops_total"] = len(set(self.request.operations))
        if self.raw is not None:
            facts["raw"] = self.raw.hex()
        ended = trio.current_time() if self.ended is None else self.ended
        facts["duration_ms"] = round((ended - self.began) * 1000, 3)
        return facts


async def verified_possession(vault: Vault, key: VaultKey, over: PublicKey | None) -> Signature:
    """A proof of possession by *key* in *vault*, verified; raises `SignatureMismatchError` for a wrong one."""
    pkh = key.public_key.hash

    async def accept(proof: Signature) -> bool:
        await trio.lowlevel.checkpoint()
        return crypto.verify_possession(key.public_key, proof, over=over)

    try:
        return await vault.prove_possession(pkh, over=over, accept=accept)
    except SignatureMismatchError as exc:
        raise SignatureMismatchError(_mismatch_text("proof of possession", pkh, vault)) from exc


def _skipped(pkh: PublicKeyHash, states: Mapping[str, VaultHealth]) -> list[str]:
    """Why vaults that have the key's blob cannot use it: what an operator needs to hear."""
    address = str(pkh)
    return [f"{name}: {health.skipped[address]}" for name, health in states.items() if address in health.skipped]


def _parse_stored(text: str, order: _Order) -> Signature | None:
    """A signature as the store has it; None for a damaged one, which is no reason to miss the slot."""
    try:
        return Signature.from_base58(text)
    except TezosError as exc:
        logger.warning(
            "the signature stored beside the mark is damaged, it is made anew", pkh=str(order.pkh), error=str(exc)
        )
        return None


def _count(operations: Sequence[str]) -> dict[str, int]:
    return {kind: operations.count(kind) for kind in sorted(set(operations))}


def _status(exc: SignerError | TezosError) -> int:
    return exc.status if isinstance(exc, SignerError) else 400


def _mismatch_text(what: str, pkh: PublicKeyHash, vault: Vault) -> str:
    return (
        f"vault {vault.name} returned a {what} that does not verify under {pkh}; it was thrown away. "
        "Nothing left the signer; if this repeats, restart the enclave and compare its key with the blob store"
    )
