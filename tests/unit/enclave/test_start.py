"""The duties before listening, in their order."""

from datetime import UTC, datetime

import pytest

from signer.enclave.clock import Clock
from signer.enclave.entropy import SeedError, seed_kernel
from signer.enclave.nsm.interface import Nsm, NsmError
from signer.enclave.start import prepare
from signer.rpc.messages import Attest
from tests.attested.documents import MODULE_ID
from tests.attested.nsm import FakeNsm

AT = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Machine:
    """Writes down what is done to it, in one line of time: module, kernel's pool, clock."""

    def __init__(self) -> None:
        self.nsm = FakeNsm(at=AT)
        self.done = self.nsm.calls
        self.clock = Clock(read=lambda: AT.timestamp() - 100, step=self._step)

    def _step(self, which: int, to: float) -> None:
        self.done.append("step")

    def _ioctl(self, descriptor: int, number: int, info: bytearray, mutate: bool) -> int:
        self.done.append("pool")
        return 0

    async def seed(self, nsm: Nsm) -> int:
        return await seed_kernel(nsm, pool="/dev/null", ioctl=self._ioctl)


@pytest.fixture
def machine() -> Machine:
    return Machine()


async def test_the_order_of_the_duties(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    enclave = await prepare(machine.nsm, clock=machine.clock, seed=machine.seed)
    seeding = ["GetRandom", "pool"] * 4
    assert machine.done == [*seeding, "DescribeNSM", "Attestation", "step", "GetRandom"]  # the last for the boot id
    assert enclave.description.module_id == MODULE_ID
    assert len(enclave.attestor.boot_id) == 16
    said = capsys.readouterr().err
    assert f"security module 1.0.0 of {MODULE_ID}, 1024 random bytes from it" in said
    assert enclave.attestor.boot_id.hex() in said


async def test_each_start_has_its_own_boot_id(machine: Machine) -> None:
    boots = {(await prepare(machine.nsm, clock=machine.clock, seed=machine.seed)).attestor.boot_id for _ in range(5)}
    assert len(boots) == 5


@pytest.mark.parametrize(
    ("failing", "before"),
    [(1, []), (3, ["GetRandom", "pool"]), (9, ["GetRandom", "pool"] * 4), (10, ["DescribeNSM"]), (12, ["step"])],
)
async def test_each_failure_ends_the_start_there(machine: Machine, failing: int, before: list[str]) -> None:
    """*failing* counts what is done to the machine: the module's calls and what follows from them."""
    machine.nsm.failures = {failing: "InternalError"}
    with pytest.raises(NsmError, match="InternalError"):
        await prepare(machine.nsm, clock=machine.clock, seed=machine.seed)
    assert len(machine.done) == failing
    assert machine.done[: failing - 1][-len(before) or failing :] == before


async def test_nothing_is_made_on_an_empty_pool(machine: Machine) -> None:
    async def seed(nsm: Nsm) -> int:
        raise SeedError("no pool")

    with pytest.raises(SeedError):
        await prepare(machine.nsm, clock=machine.clock, seed=seed)
    assert machine.done == []


async def test_the_parts_belong_together(machine: Machine) -> None:
    enclave = await prepare(machine.nsm, clock=machine.clock, seed=machine.seed)
    assert len(await enclave.entropy()) == 32
    assert await enclave.attestor.attest(Attest("session", bytes(16)))
    assert enclave.nsm is machine.nsm
    assert enclave.clock is machine.clock
