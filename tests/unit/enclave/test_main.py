"""How the program of an image is run: duties, then listening, then the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import trio
import trio.testing

from proxy.address import VSOCK_ANY, Address, TcpAddress, VsockAddress
from signer.enclave import __main__ as main
from signer.enclave import program
from signer.enclave.kms.transport import Connect
from signer.enclave.nsm.interface import Nsm
from signer.enclave.sealing.local import LocalSealing
from signer.enclave.session import Session
from signer.enclave.settings import Settings
from signer.rpc.frames import encode_frame
from signer.rpc.messages import Initialize, encode_call, encode_reply
from tests.attested.nsm import FakeNsm

LOOPBACK = TcpAddress("127.0.0.1", 0)


def put_in_place(monkeypatch: pytest.MonkeyPatch, nsm: FakeNsm, done: list[str]) -> None:
    """*nsm* becomes the machine's module."""

    @contextmanager
    def opened() -> Iterator[Nsm]:
        done.append("open")
        try:
            yield nsm
        finally:
            done.append("close")

    monkeypatch.setattr(main, "open_device", opened)


async def test_a_module_that_fails_is_said_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    nsm = FakeNsm(failures={1: "InternalError"})
    put_in_place(monkeypatch, nsm, [])
    with pytest.raises(
        main.DutyError, match=r"^the enclave program cannot start: InternalError \(the module failed\)$"
    ):
        await main._run_attested(LOOPBACK, Settings())
    assert nsm.calls == ["GetRandom"]


class Recorded:
    """A program that writes down what is done with it."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def new_session(self) -> Session:
        return Session(LocalSealing(bytes(32)))

    async def tend(self) -> None:
        self._done.append("tend")
        await trio.sleep_forever()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._done.append("aclose")


async def test_it_listens_after_the_duties_and_closes_what_it_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    listening = trio.Event()
    put_in_place(monkeypatch, FakeNsm(), done)

    async def start(nsm: Nsm, settings: Settings, connect: Connect) -> Recorded:
        await trio.lowlevel.checkpoint()
        done.append("duties")
        return Recorded(done)

    def announce(address: Address) -> None:
        done.append("listen")
        listening.set()

    monkeypatch.setattr(program, "start", start)
    monkeypatch.setattr(main, "_announce", announce)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(main._run_attested, LOOPBACK, Settings())
        await listening.wait()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel(reason="test")
    assert done[:2] == ["open", "duties"]
    assert set(done[2:4]) == {"listen", "tend"}
    assert done[4:] == ["aclose", "close"]


async def test_an_address_in_use_ends_an_image_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    put_in_place(monkeypatch, FakeNsm(), done)

    async def start(nsm: Nsm, settings: Settings, connect: Connect) -> Recorded:
        await trio.lowlevel.checkpoint()
        return Recorded(done)

    monkeypatch.setattr(program, "start", start)
    async with trio.open_nursery() as nursery:
        (taken,) = await nursery.start(partial(trio.serve_tcp, _nobody, 0, host="127.0.0.1"))
        port = taken.socket.getsockname()[1]
        with pytest.raises(main.ListenError, match="cannot listen on tcp:127.0.0.1"):
            await main._run_attested(TcpAddress("127.0.0.1", port), Settings())
        nursery.cancel_scope.cancel(reason="test")
    assert done == ["open", "aclose", "close"]


async def _nobody(stream: trio.SocketStream) -> None:
    await stream.aclose()


async def test_a_log_port_that_is_taken_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def listen(address: VsockAddress) -> trio.SocketListener:
        if address.port == 2001:
            raise main.ListenError(f"cannot listen on {address}: Address already in use")
        return listener

    monkeypatch.setattr(main, "_listen", listen)
    async with trio.open_nursery() as nursery:
        run = partial(main._run, log_port=2001)
        nursery.start_soon(run, VsockAddress(VSOCK_ANY, 2000), lambda: Session(LocalSealing(bytes(32))))
        async with await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]) as stream:
            await stream.send_all(encode_frame(encode_call(Initialize())))
            assert (await stream.receive_some()).endswith(encode_reply(None))
        nursery.cancel_scope.cancel()
    assert "no log stream: cannot listen on vsock:any:2001" in capsys.readouterr().err
