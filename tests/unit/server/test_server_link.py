"""One stream's answers: few questions at once, few messages that wait, and an end when one cannot be sent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from fedsea.errors import FedseaError, NonFiniteError, ProtocolError
from fedsea.server.service import _MOST_QUESTIONS, _MOST_WAITING, Service, _Link
from fedsea.types import Reply
from fedsea.wire import messages as m

ANSWER = m.Failure("PROTOCOL", "", 0.0, -1, False)


async def a_turn() -> None:
    """Let whatever is ready on the event loop run."""
    over = asyncio.Event()
    asyncio.get_running_loop().call_soon(over.set)
    await over.wait()


class FakeSession:
    """A stream that sends when it is let, or fails."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.peer = SimpleNamespace(name="a")
        self.error = error
        self.sent: list[m.Message] = []
        self.has_sent = asyncio.Event()
        self.ended = asyncio.get_running_loop().create_future()

    async def send(self, message: m.Message) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(message)
        self.has_sent.set()

    def end(self, error: FedseaError) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


def make(error: BaseException | None = None) -> tuple[_Link, Any]:
    session = FakeSession(error)
    return _Link(session), session  # type: ignore[arg-type]


def pumped(link: _Link) -> asyncio.Task[None]:
    pump = asyncio.create_task(link.pump())
    pump.add_done_callback(link.pump_ended)
    return pump


def test_a_client_that_asks_on_without_reading_answers_is_not_read_from():
    async def work() -> None:
        link, session = make()
        for _ in range(_MOST_QUESTIONS):
            await asyncio.wait_for(link.may_ask(), 1.0)
        next_one = asyncio.ensure_future(link.may_ask())
        link.put(ANSWER)  # not an answer to a question
        pump = pumped(link)
        await asyncio.wait_for(session.has_sent.wait(), 5.0)
        assert not next_one.done()
        link.answer(ANSWER)
        await asyncio.wait_for(next_one, 5.0)
        pump.cancel()

    asyncio.run(work())


def test_a_client_that_lets_answers_pile_up_is_cut_off():
    async def work() -> None:
        link, session = make()
        for _ in range(_MOST_WAITING):
            link.put(ANSWER)
        assert not session.ended.done()
        link.put(ANSWER)
        assert isinstance(session.ended.result(), ProtocolError)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("raised", "kind", "sentence"),
    [(NonFiniteError("beyond 65504"), NonFiniteError, "65504"), (RuntimeError("private"), FedseaError, "logged why")],
)
def test_an_answer_that_cannot_be_sent_ends_the_stream(raised, kind, sentence):
    async def work() -> None:
        link, session = make(raised)
        pumped(link)
        link.put(ANSWER)
        error = await asyncio.wait_for(session.ended, 5.0)
        assert type(error) is kind
        assert sentence in error.message
        assert "private" not in error.message

    asyncio.run(work())


def test_an_output_that_the_codec_cannot_carry_ends_its_session_and_not_the_stream():
    async def work() -> None:
        link, session = make(NonFiniteError("beyond 65504"))
        failed = []

        def fail_session(number: int, error: NonFiniteError) -> None:
            failed.append((number, error.message))
            session.error = None  # what follows can be carried

        link.fail_session = fail_session
        pump = pumped(link)
        link.put(m.SessionOutput(5, 0, Reply({})))
        link.put(ANSWER)
        await asyncio.wait_for(session.has_sent.wait(), 5.0)
        assert failed == [(5, "beyond 65504")]
        assert session.sent == [ANSWER]
        assert not session.ended.done()
        pump.cancel()

    asyncio.run(work())


def test_stream_is_not_read_on_before_the_sessions_have_room():
    async def work() -> None:
        room, received = asyncio.Event(), []

        async def messages():
            for number in range(3):
                yield m.SessionClose(number)
            yield m.Finished(0)

        sessions = SimpleNamespace(
            receive=lambda client, owners, message, answer: received.append(message.session),
            room=lambda client: room.wait(),
            leave=lambda owners: received.append("left"),
            broke=lambda owners: received.append("ended"),
            fail=lambda client, owners, number, error: None,
        )

        class Incoming:
            peer = SimpleNamespace(name="a")

            def __aiter__(self) -> Any:
                return messages()

        service: Any = SimpleNamespace(sessions=sessions)
        link: Any = SimpleNamespace(session=Incoming(), put=None)
        reading = asyncio.ensure_future(Service._observe(service, link))
        for _ in range(10):
            await a_turn()
        assert received == [0]
        room.set()
        await asyncio.wait_for(reading, 5.0)
        assert received == [0, 1, 2, "left", "ended"]

    asyncio.run(work())
