"""One stream's answers: few questions at once, little that waits, and an end when one cannot be sent."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsea.errors import FedseaError, NonFiniteError, ProtocolError
from fedsea.server.link import _MOST_QUESTIONS, _MOST_WAITING, Link
from fedsea.server.service import Service
from fedsea.types import Reply
from fedsea.wire import messages as m
from tests.unit.server.session_world import BLOCKS, SIZE, World, rows

ANSWER = m.Failure("PROTOCOL", "", 0.0, -1, False)
MOST_BYTES = 4096


def output(tensor: torch.Tensor) -> m.SessionOutput:
    return m.SessionOutput(0, 0, Reply({"": tensor}))


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


def make(error: BaseException | None = None) -> tuple[Link, Any]:
    session = FakeSession(error)
    return Link(session, MOST_BYTES), session  # type: ignore[arg-type]


def pumped(link: Link) -> asyncio.Task[None]:
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


def test_a_client_is_not_read_from_while_large_answers_for_it_are_not_sent():
    async def work() -> None:
        link, session = make()
        for _ in range(2):
            link.put(output(torch.zeros(MOST_BYTES // 8)))
        await asyncio.wait_for(link.room(), 1.0)
        link.put(output(torch.zeros(1)))
        reading = asyncio.ensure_future(link.room())
        await a_turn()
        assert not reading.done()
        assert not session.ended.done()
        pump = pumped(link)
        await asyncio.wait_for(reading, 5.0)
        pump.cancel()

    asyncio.run(work())


def test_answers_that_are_parts_of_one_batch_count_once_and_later_ones_do_not_keep_theirs():
    async def work() -> None:
        link, session = make()
        batch = torch.zeros(MOST_BYTES // 4)
        for part in batch.split(4):
            link.put(output(part))
        assert not link.is_full
        link.put(output(torch.zeros(1)))
        assert link.is_full
        other = torch.ones(MOST_BYTES // 4)
        kept = weakref.ref(other.untyped_storage())
        link.put(output(other[:1]))
        del other
        gc.collect()
        assert kept() is None
        pump = pumped(link)
        while len(session.sent) < MOST_BYTES // 16 + 2:
            await a_turn()
        assert not link.is_full
        assert link._kept.num_bytes == 0
        assert session.sent[-1].tensors.tensors[""].tolist() == [1.0]
        pump.cancel()

    asyncio.run(work())


def test_a_stream_that_has_ended_keeps_nothing_of_what_waited():
    async def work() -> None:
        link, session = make()
        tensor = torch.zeros(3)
        kept = weakref.ref(tensor)
        link.put(output(tensor))
        del tensor
        link.close()
        link.put(ANSWER)
        gc.collect()
        assert kept() is None
        pump = pumped(link)
        await a_turn()
        assert session.sent == []
        pump.cancel()

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


def test_stream_is_not_read_on_before_the_sessions_and_the_link_have_room():
    async def work() -> None:
        room, sent, received = asyncio.Event(), asyncio.Event(), []

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
            unread=lambda client: contextlib.nullcontext(),
        )

        class Incoming:
            peer = SimpleNamespace(name="a")

            def __aiter__(self) -> Any:
                return messages()

        service: Any = SimpleNamespace(sessions=sessions)
        link: Any = SimpleNamespace(session=Incoming(), put=None, room=sent.wait)
        reading = asyncio.ensure_future(Service._observe(service, link))
        for event in (room, sent):
            for _ in range(10):
                await a_turn()
            assert received == [0]
            event.set()
        await asyncio.wait_for(reading, 5.0)
        assert received == [0, 1, 2, "left", "ended"]

    asyncio.run(work())


def test_stream_that_trains_is_not_read_on_before_its_link_has_room():
    async def work() -> None:
        sent, received = asyncio.Event(), []

        async def messages():
            for number in range(2):
                yield m.StepReady(number, 0, 1, 1.0)
            yield m.Finished(0)

        class Incoming:
            def __aiter__(self) -> Any:
                return messages()

        coordinator = SimpleNamespace(
            wait_s=None,
            state=SimpleNamespace(check_standing=lambda *_, **__: None),
            join=lambda *_: None,
            receive=lambda name, message: received.append(message.step),
        )
        service: Any = SimpleNamespace(coordinator=coordinator, _links={}, _left=set(), _gone=lambda *_: None)
        link: Any = SimpleNamespace(session=Incoming(), room=sent.wait)
        reading = asyncio.ensure_future(Service._train(service, link, "a", m.Join("", 0, -1, 0, "train")))
        for _ in range(10):
            await a_turn()
        assert received == [0]
        sent.set()
        await asyncio.wait_for(reading, 5.0)
        assert received == [0, 1]

    asyncio.run(work())


def test_client_that_sends_and_never_reads_is_kept_so_much_and_no_more():
    async def work() -> None:
        world, num_read = World("a", prefill_tokens=16, max_sequences=1, max_tokens=64), 0

        class Deaf(FakeSession):
            async def send(self, message: m.Message) -> None:
                await asyncio.Event().wait()

            async def __aiter__(self) -> Any:
                nonlocal num_read
                yield m.SessionOpen(0, 7, 1, 64, BLOCKS)
                while True:
                    num_read += 1
                    yield m.SessionForward(0, num_read, (0,), (16,), (), False, {"": rows(16)})

        session: Any = Deaf()
        link = Link(session, MOST_BYTES)
        pump = pumped(link)
        service: Any = SimpleNamespace(sessions=world.sessions)
        reading = asyncio.ensure_future(Service._observe(service, link))
        for _ in range(200):
            await a_turn()
            world.run()
        most = MOST_BYTES // (16 * SIZE * 4) + 1 + 4  # what fills the link, and may wait to be run meanwhile
        assert MOST_BYTES // (16 * SIZE * 4) < num_read <= most
        assert world.sessions._waiting_rows["a"] == 0
        reading.cancel()
        pump.cancel()

    asyncio.run(work())
