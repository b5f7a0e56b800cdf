"""The kernel's pool is filled first, and no single source decides a key."""

import errno
import hashlib
import os
import struct
from pathlib import Path

import pytest

from signer.enclave.entropy import SEED, MixedEntropy, SeedError, kernel_entropy, seed_kernel
from signer.enclave.nsm.interface import NsmError
from tests.attested.nsm import FakeNsm


class Pool:
    """Takes what RNDADDENTROPY hands over, as the kernel would."""

    def __init__(self, *, error: int = 0) -> None:
        self.chunks: list[bytes] = []
        self.error = error

    def __call__(self, descriptor: int, number: int, info: bytearray, mutate: bool) -> int:
        assert number == 0x40085203
        os.fstat(descriptor)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        bits, length = struct.unpack_from("<ii", info)
        assert bits == 8 * length == 8 * (len(info) - 8)
        self.chunks.append(bytes(info[8:]))
        return 0


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "random"
    path.touch()
    return str(path)


@pytest.mark.parametrize(("length", "calls"), [(256, 4), (1024, 1), (4000, 1), (300, 4), (1, 1024)])
async def test_at_least_1024_bytes_of_the_module(path: str, length: int, calls: int) -> None:
    given: list[bytes] = []

    def random(count: int) -> bytes:
        given.append(len(given).to_bytes(2, "big")[-count:] + bytes(max(0, count - 2)))
        return given[-1]

    pool = Pool()
    nsm = FakeNsm(random=random, random_length=length)
    fed = await seed_kernel(nsm, pool=path, ioctl=pool)
    assert fed == length * calls >= SEED == 1024
    assert pool.chunks == given
    assert nsm.calls == ["GetRandom"] * calls


async def test_a_module_that_fails_ends_it(path: str) -> None:
    pool = Pool()
    with pytest.raises(NsmError, match="InternalError"):
        await seed_kernel(FakeNsm(failures={3: "InternalError"}), pool=path, ioctl=pool)
    assert len(pool.chunks) == 2
    with pytest.raises(NsmError, match="InvalidResponse"):
        await seed_kernel(FakeNsm(random_length=0), pool=path, ioctl=pool)


async def test_a_module_that_repeats_itself_ends_it(path: str) -> None:
    with pytest.raises(SeedError, match="the same random bytes twice"):
        await seed_kernel(FakeNsm(random=lambda count: b"\7" * count), pool=path, ioctl=Pool())


@pytest.mark.parametrize(("error", "text"), [(errno.EPERM, "CAP_SYS_ADMIN"), (errno.EINVAL, "Invalid argument")])
async def test_a_pool_that_takes_nothing_ends_it(path: str, error: int, text: str) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(SeedError, match=text):
        await seed_kernel(FakeNsm(), pool=path, ioctl=Pool(error=error))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_no_pool(tmp_path: Path) -> None:
    nsm = FakeNsm()
    with pytest.raises(SeedError, match="cannot be opened"):
        await seed_kernel(nsm, pool=str(tmp_path / "none"), ioctl=Pool())
    assert nsm.calls == []


@pytest.mark.parametrize("length", [256, 32, 31, 5])
async def test_both_sources_decide(length: int) -> None:
    def kernel(count: int) -> bytes:
        return b"\1" * count

    drawn = await MixedEntropy(FakeNsm(random=lambda count: b"\2" * count, random_length=length), kernel=kernel)()
    assert drawn == hashlib.sha512(b"\1" * 32 + b"\2" * 32).digest()[:32]
    for other in (
        MixedEntropy(FakeNsm(random=lambda count: b"\3" * count, random_length=length), kernel=kernel),
        MixedEntropy(FakeNsm(random=lambda count: b"\2" * count), kernel=lambda count: b"\3" * count),
    ):
        assert await other() != drawn


async def test_each_draw_is_new() -> None:
    entropy = MixedEntropy(FakeNsm())
    assert len({await entropy() for _ in range(20)} | {await kernel_entropy() for _ in range(20)}) == 40


async def test_no_draw_without_the_module() -> None:
    with pytest.raises(NsmError):
        await MixedEntropy(FakeNsm(failures={1: "InternalError"}))()
