"""The calls of a security module over an exchange of bytes: one request, one answer."""

from typing import Protocol

from signer.enclave.nsm import messages
from signer.enclave.nsm.interface import Description, Register
from signer.enclave.nsm.messages import (
    Attestation,
    DescribeNsm,
    DescribePcr,
    ExtendPcr,
    GetRandom,
    LockPcr,
    LockPcrs,
    encode_request,
)


class Exchange(Protocol):
    """Hands a request to a module and returns its answer; raises `NsmError` for trouble on the way."""

    async def __call__(self, request: bytes) -> bytes: ...


class Module:
    """An `Nsm` behind *exchange*: the device, or what a test puts in its place."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def describe(self) -> Description:
        return messages.decode_description(await self._exchange(encode_request(DescribeNsm())))

    async def describe_pcr(self, index: int) -> Register:
        return messages.decode_register(await self._exchange(encode_request(DescribePcr(index))))

    async def extend_pcr(self, index: int, data: bytes) -> bytes:
        return messages.decode_extended(await self._exchange(encode_request(ExtendPcr(index, data))))

    async def lock_pcr(self, index: int) -> None:
        request = LockPcr(index)
        messages.decode_locked(await self._exchange(encode_request(request)), request)

    async def lock_pcrs(self, range: int) -> None:
        request = LockPcrs(range)
        messages.decode_locked(await self._exchange(encode_request(request)), request)

    async def get_random(self) -> bytes:
        return messages.decode_random(await self._exchange(encode_request(GetRandom())))

    async def attest(
        self, *, user_data: bytes | None = None, nonce: bytes | None = None, public_key: bytes | None = None
    ) -> bytes:
        request = Attestation(user_data=user_data, nonce=nonce, public_key=public_key)
        return messages.decode_document(await self._exchange(encode_request(request)))
