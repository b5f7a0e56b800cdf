"""A security module in the process of the tests, section 9.1 of the enclave specification.

It speaks the module's CBOR, so that the program's own codec is on the way, keeps 32 registers and signs documents in
the current layout under the root of the tests.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from signer.attestation.cbor import CborError, decode
from signer.enclave.nsm.messages import MAX_REQUEST, PCR_LENGTH
from signer.enclave.nsm.module import Module
from signer.rpc._cbor import dumps
from tests.attested.documents import DEBUG_PCRS, MODULE_ID, PCRS, ZERO, Chain, make_chain, make_document

REGISTERS = 32
LOCKED = 16  # registers that are locked before the program starts
RANDOM_LENGTH = 256  # bytes
_CHAIN_LIFE = timedelta(hours=2)  # the leaf lives three, and is renewed while the enclave runs

Arguments = Mapping[int | str, object]


class _Refusal(Exception):
    """Answered with this word."""


class FakeNsm(Module):
    """A module.

    *debug* zeroes the registers that debug mode zeroes; *at* fixes the time of documents, else it is now, *drift*
    seconds off. *failures* gives the word that a call fails with, by the call's number from 1, and *cut* the length
    that every answer is cut to, as the driver does with a short buffer.
    """

    def __init__(
        self,
        *,
        debug: bool = False,
        pcrs: Mapping[int, bytes] = PCRS,
        module_id: str = MODULE_ID,
        at: datetime | None = None,
        drift: float = 0.0,
        failures: Mapping[int, str] | None = None,
        cut: int | None = None,
        random: Callable[[int], bytes] = os.urandom,
        random_length: int = RANDOM_LENGTH,
    ) -> None:
        super().__init__(self._answer)
        image = DEBUG_PCRS if debug else pcrs
        self.registers = [image.get(index, ZERO) for index in range(REGISTERS)]
        self.locked = set(range(LOCKED))
        self.module_id = module_id
        self.at = at
        self.drift = drift
        self.failures = dict(failures or {})
        self.cut = cut
        self.calls: list[str] = []  # names, in their order
        self._random = random
        self._random_length = random_length
        self._chain: tuple[datetime, Chain] | None = None

    @property
    def root_sha256(self) -> bytes:
        """The fingerprint to verify its documents under."""
        return self._signer(self._now()).root_sha256

    async def _answer(self, request: bytes) -> bytes:
        return self.exchange(request)[: self.cut]

    def exchange(self, request: bytes) -> bytes:
        """The answer to *request*, whatever it is."""
        name, arguments = _parsed(request)
        self.calls.append(name)
        try:
            if len(self.calls) in self.failures:
                raise _Refusal(self.failures[len(self.calls)])
            if len(request) > MAX_REQUEST:
                raise _Refusal("InputTooLarge")
            result = self._perform(name, arguments)
        except _Refusal as refusal:
            return dumps({"Error": str(refusal)})
        return dumps(name if result is None else {name: result})

    def _perform(self, name: str, arguments: Arguments) -> Mapping[str, object] | None:
        match name:
            case "DescribeNSM":
                return self._describe()
            case "DescribePCR":
                index = self._index(arguments)
                return {"lock": index in self.locked, "data": self.registers[index]}
            case "ExtendPCR":
                return {"data": self._extend(self._unlocked(arguments), arguments.get("data"))}
            case "LockPCR":
                self.locked.add(self._unlocked(arguments))
                return None
            case "LockPCRs":
                self.locked.update(range(_number(arguments.get("range"), REGISTERS)))
                return None
            case "GetRandom":
                return {"random": self._random(self._random_length)}
            case "Attestation":
                return {"document": self._document(arguments)}
        raise _Refusal("InvalidOperation")

    def _describe(self) -> Mapping[str, object]:
        return {
            "version_major": 1,
            "version_minor": 0,
            "version_patch": 0,
            "module_id": self.module_id,
            "max_pcrs": REGISTERS,
            "locked_pcrs": sorted(self.locked),
            "digest": "SHA384",
        }

    def _index(self, arguments: Arguments) -> int:
        return _number(arguments.get("index"), REGISTERS - 1)

    def _unlocked(self, arguments: Arguments) -> int:
        index = self._index(arguments)
        if index in self.locked:
            raise _Refusal("ReadOnlyIndex")
        return index

    def _extend(self, index: int, data: object) -> bytes:
        if not isinstance(data, bytes):
            raise _Refusal("InvalidArgument")
        assert len(self.registers[index]) == PCR_LENGTH
        self.registers[index] = hashlib.sha384(self.registers[index] + data).digest()
        return self.registers[index]

    def _document(self, arguments: Arguments) -> bytes:
        user_data, nonce, public_key = (
            _free_field(arguments.get(name)) for name in ("user_data", "nonce", "public_key")
        )
        now = self._now()
        return make_document(
            self._signer(now),
            made_at=now,
            module_id=self.module_id,
            pcrs={index: self.registers[index] for index in self.locked},
            user_data=user_data,
            nonce=nonce,
            public_key=public_key,
        )

    def _now(self) -> datetime:
        return (self.at or datetime.now(UTC)) + timedelta(seconds=self.drift)

    def _signer(self, now: datetime) -> Chain:
        if self._chain is None or not timedelta() <= now - self._chain[0] <= _CHAIN_LIFE:
            self._chain = now, make_chain(at=now, module_id=self.module_id)
        return self._chain[1]


def _parsed(request: bytes) -> tuple[str, Arguments]:
    """Name and arguments; a name that no call has where there is none."""
    try:
        item = decode(request)
    except CborError:
        return "", {}
    match item:
        case str(name):
            return name, {}
        case dict() if len(item) == 1:
            ((key, arguments),) = item.items()
            if isinstance(key, str) and isinstance(arguments, dict):
                return key, arguments
    return "", {}


def _number(value: object, limit: int) -> int:
    if type(value) is not int or value < 0:
        raise _Refusal("InvalidArgument")
    if value > limit:
        raise _Refusal("InvalidIndex")
    return value


def _free_field(value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    raise _Refusal("InvalidArgument")
