"""The calls of a security module over an exchange of bytes: one request, one answer."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

from signer.enclave.log import count
from signer.enclave.nsm import messages
from signer.enclave.nsm.interface import INTERNAL_ERROR, Description, NsmError, Register
from signer.enclave.nsm.messages import (
    Attestation,
    DescribeNsm,
    DescribePcr,
    ExtendPcr,
    GetRandom,
    LockPcr,
    LockPcrs,
    Request,
    encode_request,
)

T = TypeVar("T")

TIMEOUT = 6.0  # seconds for an answer, waiting included: the host gives up a session, and its keys, at 10


class Exchange(Protocol):
    """Hands a request to a module and returns its answer; raises `NsmError` for trouble on the way."""

    async def __call__(self, request: bytes) -> bytes: ...


class Module:
    """An `Nsm` behind *exchange*: the device, or what a test puts in its place."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def _ask(self, request: Request, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(await self._answer_to(encode_request(request)))
        except NsmError as exc:
            count("nsm_failures", exc.value)
            raise

    async def _answer_to(self, request: bytes) -> bytes:
        try:
            with trio.fail_after(TIMEOUT):
                return await self._exchange(request)
        except trio.TooSlowError:
            raise NsmError(INTERNAL_ERROR, f"the module gave no answer within {TIMEOUT:g} s") from None

    async def describe(self) -> Description:
        return await self._ask(DescribeNsm(), messages.decode_description)

    async def describe_pcr(self, index: int) -> Register:
        return await self._ask(DescribePcr(index), messages.decode_register)

    async def extend_pcr(self, index: int, data: bytes) -> bytes:
        return await self._ask(ExtendPcr(index, data), messages.decode_extended)

    async def lock_pcr(self, index: int) -> None:
        request = LockPcr(index)
        await self._ask(request, lambda answer: messages.decode_locked(answer, request))

    async def lock_pcrs(self, range: int) -> None:
        request = LockPcrs(range)
        await self._ask(request, lambda answer: messages.decode_locked(answer, request))

    async def get_random(self) -> bytes:
        return await self._ask(GetRandom(), messages.decode_random)

    async def attest(
        self, *, user_data: bytes | None = None, nonce: bytes | None = None, public_key: bytes | None = None
    ) -> bytes:
        request = Attestation(user_data=user_data, nonce=nonce, public_key=public_key)
        return await self._ask(request, messages.decode_document)
