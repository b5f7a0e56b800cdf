"""The ioctl through a stub that checks number and packing, as the driver would."""

import ctypes
import errno
import json
import os
import struct
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from signer.enclave.log import journal
from signer.enclave.nsm.device import MAX_RESPONSE, Device, open_device
from signer.enclave.nsm.interface import NoNsmError, NsmError
from signer.enclave.nsm.module import Module


class Driver:
    """Reads a request from the addresses in the message and writes *answer* there, cut to the buffer."""

    def __init__(self, answer: bytes = b"\x67LockPCR", *, error: int = 0, reported: int | None = None) -> None:
        self.answer = answer
        self.error = error
        self.reported = reported
        self.requests: list[bytes] = []
        self.threads: set[int] = set()

    def __call__(self, descriptor: int, number: int, message: bytearray, mutate: bool) -> int:
        self.threads.add(threading.get_ident())
        assert (descriptor, number, mutate) == (77, 0xC0200A00, True)
        assert len(message) == 32
        asked, length, at, room = struct.unpack("<QQQQ", message)
        self.requests.append(ctypes.string_at(asked, length))
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        assert room == 12_288
        written = self.answer[:room]
        ctypes.memmove(at, written, len(written))
        message[24:] = struct.pack("<Q", len(written) if self.reported is None else self.reported)
        return 0


async def test_request_and_answer_travel_through_the_buffers() -> None:
    driver = Driver()
    await Module(Device(77, ioctl=driver)).lock_pcr(16)
    assert [one.hex() for one in driver.requests] == ["a1674c6f636b504352a165696e64657810"]
    assert threading.get_ident() not in driver.threads


async def test_the_longest_answer_arrives_whole() -> None:
    driver = Driver(bytes(range(256)) * 48)
    assert await Device(77, ioctl=driver)(b"\x60") == driver.answer
    assert len(driver.answer) == MAX_RESPONSE


def counted(value: str) -> int:
    """How many failures of that name the program has told of."""
    return int(json.loads(journal.counters())["counters"].get("nsm_failures", {}).get(value, 0))


@pytest.mark.parametrize(
    ("error", "value"),
    [
        (errno.EMSGSIZE, "InputTooLarge"),
        (errno.EINVAL, "InternalError"),
        (errno.EFAULT, "InternalError"),
        (errno.EIO, "InternalError"),
        (errno.ENODATA, "InternalError"),
        (errno.ETIMEDOUT, "InternalError"),
    ],
)
async def test_errors_of_the_driver(error: int, value: str) -> None:
    before = counted(value)
    with pytest.raises(NsmError) as caught:
        await Module(Device(77, ioctl=Driver(error=error))).get_random()
    assert caught.value.value == value
    assert counted(value) == before + 1, "in the log stream"
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("reported", [0, MAX_RESPONSE + 1, 2**64 - 1])
async def test_a_length_that_cannot_be(reported: int) -> None:
    with pytest.raises(NsmError, match=f"an answer of {reported} bytes"):
        await Device(77, ioctl=Driver(reported=reported))(b"\x60")


async def test_a_request_over_the_limit_never_reaches_the_driver() -> None:
    driver = Driver()
    await Device(77, ioctl=driver)(bytes(4096))
    with pytest.raises(NsmError, match="InputTooLarge"):
        await Device(77, ioctl=driver)(bytes(4097))
    assert len(driver.requests) == 1


async def test_one_call_at_a_time() -> None:
    driver, together = Driver(), threading.Barrier(2)

    def meeting(descriptor: int, number: int, message: bytearray, mutate: bool) -> int:
        with pytest.raises(threading.BrokenBarrierError):  # nobody else comes while this call is on
            together.wait(0.05)
        return driver(descriptor, number, message, mutate)

    device = Device(77, ioctl=meeting)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(device, b"\x60")
    assert len(driver.requests) == 3


async def test_a_cancelled_caller_goes_at_once_and_leaves_the_device_usable() -> None:
    """Others still wait for the end of its call."""
    begun, go_on = threading.Event(), threading.Event()
    driver = Driver()

    def slow(descriptor: int, number: int, message: bytearray, mutate: bool) -> int:
        begun.set()
        assert go_on.wait(10)
        return driver(descriptor, number, message, mutate)

    device = Device(77, ioctl=slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device, b"\x60")
        await trio.to_thread.run_sync(begun.wait)
        nursery.cancel_scope.cancel(reason="test")
    assert not driver.requests, "the call is still on"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Module(device).lock_pcr, 3)
        await trio.testing.wait_all_tasks_blocked()
        assert device._limiter.statistics().tasks_waiting == 1
        go_on.set()
    assert [len(request) for request in driver.requests] == [1, 17], "one after the other"


def test_outside_an_enclave_it_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NoNsmError, match="not inside an enclave") as caught, open_device(str(tmp_path / "nsm")):
        pass
    assert "--sealing local --development" in str(caught.value)


def test_a_device_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(NoNsmError, match="cannot be opened"), open_device(str(tmp_path)):
        pass


async def test_something_else_in_its_place_is_an_error_of_the_module(tmp_path: Path) -> None:
    """A plain file takes no ioctl; the descriptor is closed behind the block."""
    path = tmp_path / "nsm"
    path.touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with open_device(str(path)) as nsm, pytest.raises(NsmError, match="InternalError"):
        await nsm.describe()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
