"""What goes out on one stream: a queue that is bounded, in memory too, however slowly its client reads."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fedsea.errors import FedseaError, NonFiniteError, ProtocolError
from fedsea.types import Reply
from fedsea.wire import messages as m
from fedsea.wire.session import PeerSession

log = logging.getLogger(__name__)

_MOST_WAITING = 1024
_MOST_QUESTIONS = 8


class Link:
    """One stream's outgoing queue, emptied by a task of its own.

    Args:
        session: The stream.
        most_bytes: While what waits keeps more memory than this, the client is not to be read from; see `room`.

    Attributes:
        fail_session: Ends a decoding session of the stream, by its number, whose output the codec cannot carry.
    """

    def __init__(self, session: PeerSession, most_bytes: int) -> None:
        self.session = session
        self.fail_session: Callable[[int, NonFiniteError], None] | None = None
        self._most_bytes = most_bytes
        self._kept = _Kept()
        self._queue: asyncio.Queue[tuple[m.Message, bool]] = asyncio.Queue(_MOST_WAITING)
        self._questions = asyncio.Semaphore(_MOST_QUESTIONS)
        self._some_sent = asyncio.Event()
        self._closed = False

    def put(self, message: m.Message, *, answers: bool = False) -> None:
        """Queue a message; a client that lets a thousand pile up is cut off."""
        if self._closed:
            return
        if self.is_full:
            message = _alone(message)
        try:
            self._queue.put_nowait((message, answers))
        except asyncio.QueueFull:
            self.session.end(ProtocolError("Too many answers wait for this client: it does not read. Reconnect."))
        else:
            self._kept.add(message)

    async def may_ask(self) -> None:
        """Wait until few enough of this client's questions are open; it is not read from meanwhile."""
        await self._questions.acquire()

    def answer(self, message: m.Message) -> None:
        """Queue the answer to a question; the next one may be asked when it is sent."""
        self.put(message, answers=True)

    @property
    def is_full(self) -> bool:
        """Whether what is not sent yet keeps more memory than it may."""
        return self._kept.num_bytes > self._most_bytes

    async def room(self) -> None:
        """Wait until little enough waits to be sent; the client is not read from meanwhile."""
        while self.is_full:
            self._some_sent.clear()
            await self._some_sent.wait()

    async def pump(self) -> None:
        """Send until cancelled."""
        while True:
            message, answers = await self._queue.get()
            try:
                await self.session.send(message)
            except NonFiniteError as error:  # of the encoder: nothing was sent, and the stream is sound
                if self.fail_session is None or not isinstance(message, m.SessionOutput):
                    raise
                self.fail_session(message.session, error)
            self._kept.drop(message)
            self._some_sent.set()
            if answers:
                self._questions.release()

    def pump_ended(self, pump: asyncio.Task[None]) -> None:
        """An answer that cannot be sent ends the stream, so that nobody waits for it."""
        if pump.cancelled() or (error := pump.exception()) is None:
            return
        if not isinstance(error, FedseaError):
            log.error("an answer to client %s could not be sent", self.session.peer.name, exc_info=error)
            error = FedseaError("The server could not send an answer and logged why.")
        self.session.end(error)

    def close(self) -> None:
        """The stream has ended: let go of what waits, and take nothing more, whoever still holds this."""
        self._closed = True
        while not self._queue.empty():
            self._queue.get_nowait()


class _Kept:
    """Memory that messages keep; what several of them have parts of counts once."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._uses: Counter[int] = Counter()

    def add(self, message: m.Message) -> None:
        for tensor in _tensors(message):
            storage = tensor.untyped_storage()
            self.num_bytes += 0 if self._uses[storage.data_ptr()] else storage.nbytes()
            self._uses[storage.data_ptr()] += 1

    def drop(self, message: m.Message) -> None:
        for tensor in _tensors(message):
            storage = tensor.untyped_storage()
            self._uses[storage.data_ptr()] -= 1
            if not self._uses[storage.data_ptr()]:
                del self._uses[storage.data_ptr()]
                self.num_bytes -= storage.nbytes()


def _tensors(message: m.Message) -> Iterator[torch.Tensor]:
    reply: Any = getattr(message, "tensors", None)
    if isinstance(reply, Reply):
        yield from reply.tensors.values()


def _alone(message: m.Message) -> m.Message:
    """The same without what others have of its memory: one row must not keep the whole batch that it was part of."""
    sent: Any = message
    if all(_is_whole(tensor) for tensor in _tensors(message)):
        return message
    own = {name: tensor if _is_whole(tensor) else tensor.clone() for name, tensor in sent.tensors.tensors.items()}
    copy: m.Message = replace(sent, tensors=Reply(own))
    return copy


def _is_whole(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes
