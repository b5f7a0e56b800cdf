"""A module that hangs: whoever asks is told so in time, and the next one is served."""

from collections import Counter

import pytest
import trio
from trio.testing import MockClock

from signer.enclave.entropy import MixedEntropy
from signer.enclave.log import journal
from signer.enclave.nsm.interface import NsmError
from tests.attested.nsm import FakeNsm


async def test_a_module_that_hangs_is_not_waited_for_as_long_as_the_host_waits(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    nsm, began = FakeNsm(), trio.current_time()
    failures = journal._counters.setdefault("nsm_failures", Counter())
    before = failures["InternalError"]
    with monkeypatch.context() as hanging:
        hanging.setattr(nsm, "_exchange", lambda _: trio.sleep_forever())
        with pytest.raises(NsmError, match=r"^InternalError \(the module gave no answer within 6 s\)$"):
            await nsm.attest()
        assert trio.current_time() - began == pytest.approx(6)
        with pytest.raises(NsmError, match="no answer within 6 s"):
            await MixedEntropy(nsm)()
    assert failures["InternalError"] == before + 2
    assert len(await MixedEntropy(nsm)()) == 32
