"""`/dev/nsm`, section 1.1 of the enclave specification: one ioctl that blocks its thread."""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from signer.enclave.nsm.interface import INPUT_TOO_LARGE, INTERNAL_ERROR, NoNsmError, NsmError
from signer.enclave.nsm.messages import MAX_REQUEST
from signer.enclave.nsm.module import Module

PATH = "/dev/nsm"
REQUEST_NUMBER = 0xC0200A00  # _IOWR(0x0A, 0, 32 bytes); any other number is EINVAL
MAX_RESPONSE = 0x3000  # bytes; an answer is cut to a shorter buffer without a word
_MESSAGE = struct.Struct("=QQQQ")  # request address, request length, response address, response length

Ioctl = Callable[[int, int, bytearray, bool], int]


class Device:
    """Exchanges messages with the module behind *descriptor*, one at a time, each in a worker thread."""

    def __init__(self, descriptor: int, *, ioctl: Ioctl = fcntl.ioctl) -> None:
        self._descriptor = descriptor
        self._ioctl = ioctl
        self._limiter = trio.CapacityLimiter(1)  # the driver has one lock; more threads would only wait for it

    async def __call__(self, request: bytes) -> bytes:
        """The answer to *request*. The call itself cannot be interrupted (the driver gives up after 120 s). Whoever is
        cancelled leaves it to its thread, which has the buffers, and keeps the place until it ends: all callers have
        less time than that, and would be told nothing."""
        return await trio.to_thread.run_sync(self._call, request, limiter=self._limiter, abandon_on_cancel=True)

    def _call(self, request: bytes) -> bytes:
        if len(request) > MAX_REQUEST:
            raise NsmError(INPUT_TOO_LARGE, f"{len(request)} bytes, the limit is {MAX_REQUEST}")
        # Both buffers stay in variables: the kernel knows only their addresses.
        asked = ctypes.create_string_buffer(request, len(request))
        answer = ctypes.create_string_buffer(MAX_RESPONSE)
        message = bytearray(
            _MESSAGE.pack(ctypes.addressof(asked), len(request), ctypes.addressof(answer), MAX_RESPONSE)
        )
        try:
            self._ioctl(self._descriptor, REQUEST_NUMBER, message, True)
        except OSError as exc:
            raise _translated(exc) from exc
        length = _MESSAGE.unpack(message)[3]
        if not 0 < length <= MAX_RESPONSE:
            raise NsmError(INTERNAL_ERROR, f"the driver reports an answer of {length} bytes")
        return answer.raw[:length]


def _translated(exc: OSError) -> NsmError:
    if exc.errno == errno.EMSGSIZE:
        return NsmError(INPUT_TOO_LARGE, f"the driver takes at most {MAX_REQUEST} bytes")
    return NsmError(INTERNAL_ERROR, f"{PATH}: {exc.strerror or exc}")


@contextmanager
def open_device(path: str = PATH) -> Iterator[Module]:
    """The module of this enclave, until the block ends. Raises `NoNsmError`."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise NoNsmError(_why_not(path, exc)) from exc
    try:
        yield Module(Device(descriptor))
    finally:
        os.close(descriptor)


def _why_not(path: str, exc: OSError) -> str:
    if exc.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return (
            f"not inside an enclave: there is no security module here ({path}: {exc.strerror}). Start the image with "
            "nitro-cli run-enclave; outside an enclave use --sealing local --development"
        )
    return f"the security module cannot be opened ({path}: {exc.strerror})"
