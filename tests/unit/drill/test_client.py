"""The client of the drill: the Octez rule for 502, and answers in any pieces."""

import pytest
import trio
import trio.testing

from tests.drill.client import Answer, HttpError, octez, parse, read_answer

RAW = b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\nX: y\r\n\r\n{"signature": "sig"}'


class Server:
    """Answers 502 so many times, then 200; notes when it was asked."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.asked: list[float] = []

    async def attempt(self) -> Answer:
        await trio.lowlevel.checkpoint()
        self.asked.append(round(trio.current_time(), 3))
        return Answer(502 if len(self.asked) <= self.refusals else 200, "{}")


async def test_502_is_asked_again_with_the_pauses_of_octez(autojump_clock: trio.testing.MockClock) -> None:
    server = Server(100)
    answer, refused = await octez(server.attempt)
    assert (answer.status, refused) == (502, 10)
    assert server.asked == [0, 0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.1, 2.8, 3.6]


@pytest.mark.parametrize("refusals", [0, 1, 5, 9])
async def test_the_first_other_answer_ends_it(autojump_clock: trio.testing.MockClock, refusals: int) -> None:
    server = Server(refusals)
    answer, refused = await octez(server.attempt)
    assert (answer.status, refused, len(server.asked)) == (200, refusals, refusals + 1)


def test_answers_are_read_once_complete() -> None:
    assert all(parse(RAW[:length]) is None for length in range(len(RAW)))
    answer = parse(RAW)
    assert answer == Answer(200, '{"signature": "sig"}')
    assert answer is not None
    assert answer.signature == "sig"


def test_what_is_no_answer_is_said() -> None:
    with pytest.raises(HttpError, match="no status"):
        parse(b"hello\r\n\r\n")


async def test_an_answer_cut_short_is_no_answer() -> None:
    sink, source = trio.testing.memory_stream_one_way_pair()
    await sink.send_all(RAW[:-1])
    await sink.aclose()
    with pytest.raises(HttpError, match="closed after"):
        await read_answer(source)


async def test_an_answer_in_pieces() -> None:
    sink, source = trio.testing.memory_stream_one_way_pair()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for byte in RAW:
                await sink.send_all(bytes([byte]))

        assert (await read_answer(source)).status == 200
