"""Decoding sessions at the server: admission, leases, and continuous batching.

All sessions that have a message waiting run as one batch; a batch is put together at the moment at which the engine is
free for it, so sessions join and leave at every step. Runs on the event loop; only `_Batcher.run` is on the engine
thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fedsea.errors import CapacityError, ConfigError, FedseaError, ProtocolError, SessionLost
from fedsea.model.cache import Frozen
from fedsea.model.decoding import Memory, TrunkDecoder, Turn
from fedsea.plan import InferenceSection
from fedsea.server.engine import Engine
from fedsea.server.executor.local import Priority
from fedsea.server.ports import Member, Ports
from fedsea.types import Reply
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

Answer = Callable[[m.Message], None]

_SMALL_TURN = 16
"""A message with more new tokens per sequence is a prefill: one of those runs in a batch, beside all small ones."""
_MOST_IN_BATCH = 1024
_MOST_WAITING = 64
"""Messages of one session that may wait."""


@dataclass(slots=True, eq=False)
class Session:
    """One session.

    Attributes:
        client: Whose; from the certificate.
        key: Its process's number and its own.
        answer: Where replies go: the stream that named it last.
        waiting: Messages that have not run yet, in order.
    """

    client: str
    key: tuple[int, int]
    memory: Memory
    version: int
    num_bytes: int
    answer: Answer
    last_used: float
    waiting: deque[m.SessionForward] = field(default_factory=deque)
    running: bool = False
    closed: bool = False


class Sessions:
    """All sessions of a server.

    Args:
        settings: The plan's `inference` section.
        decoder: The trunk; its `run` is called on the engine thread alone.
        ports: The world.
        roster: What each client of the plan has.
    """

    def __init__(
        self, settings: InferenceSection, decoder: TrunkDecoder, ports: Ports, roster: dict[str, Member]
    ) -> None:
        self._settings = settings
        self._decoder = decoder
        self._ports = ports
        self._roster = roster
        self._sessions: dict[tuple[str, int, int], Session] = {}
        self._published: tuple[int, Frozen] | None = None
        self._used_bytes = 0
        self._batcher = _Batcher(decoder, settings.batch_tokens)
        self._submitted = False
        self.num_tokens = 0
        self.num_batches = 0

    # --- what sessions see of the trunk -----------------------------------------------------------------------------

    def publish(self, engine: Engine) -> None:
        """Let sessions that open from now on use the trunk as it is now; on the engine thread."""
        if self._decoder.trunk.caches:
            _ = self._decoder.token_bytes  # found here, where nothing else runs
        self._published = (engine.next_step, self._decoder.trunk.freeze())

    # --- messages ---------------------------------------------------------------------------------------------------

    def receive(self, client: str, owners: dict[int, int], message: m.Message, answer: Answer) -> None:
        """Take a message of a client.

        Args:
            client: Its name.
            owners: Of this stream: session number to the owner that opened it; filled here.
            message: One of the session messages.
            answer: Queues a reply on the stream that the message came on.

        Raises:
            ProtocolError: The message is something else.
        """
        number = getattr(message, "session", -1)
        try:
            match message:
                case m.SessionOpen():
                    self._open(client, message, answer)
                    owners[message.session] = message.owner
                case m.SessionForward():
                    self._forward(client, owners, message, answer)
                case m.SessionClose():
                    session = self._sessions.get((client, owners.pop(message.session, -1), message.session))
                    if session is not None:
                        self._end(session)
                case _:
                    raise ProtocolError(f"A client may not send {type(message).__name__} here.")
        except FedseaError as error:
            if number < 0:
                raise
            answer(_failure(number, error))

    def _open(self, client: str, message: m.SessionOpen, answer: Answer) -> None:
        if not self._settings.enabled:
            raise CapacityError("The plan does not offer inference (inference.enabled = false).", 3600.0)
        key = (client, message.owner, message.session)
        session = self._sessions.get(key)
        if session is None:
            session = self._admit(client, message, answer)
            self._sessions[key] = session
        elif len(session.memory.caches) != message.num_sequences or session.memory.blocks != message.blocks:
            raise ProtocolError("A session was opened again in another shape.")
        # What still waits was sent on a stream that broke; the client sends it again.
        session.waiting.clear()
        session.answer = answer
        session.last_used = self._ports.clock()
        answer(m.SessionOpened(message.session, session.memory.held, session.version, self._settings.lease_s))

    def _admit(self, client: str, message: m.SessionOpen, answer: Answer) -> Session:
        settings = self._settings
        if message.blocks != self._roster[client].blocks:
            blocks = self._roster[client].blocks
            raise ProtocolError(f"Client {client} asked for other blocks than {blocks.start}:{blocks.stop}, its own.")
        if message.max_tokens > settings.max_tokens:
            raise ProtocolError(
                f"A session of {message.max_tokens} tokens was asked for; the plan's inference.max_tokens is "
                f"{settings.max_tokens}: shorten prompt or answer."
            )
        own = sum(len(s.memory.caches) for s in self._sessions.values() if s.client == client)
        if own + message.num_sequences > settings.max_sequences:
            raise CapacityError(
                f"Client {client} has {own} sequences open, and the plan's inference.max_sequences is "
                f"{settings.max_sequences}: close some, or try again later.",
                1.0,
            )
        if self._published is None:
            raise CapacityError("The server is not ready for sessions yet; try again.", 0.2)
        if not self._decoder.trunk.caches:
            raise ConfigError("Models of this family cannot decode with a cache; training and evaluation work.")
        num_bytes = self._decoder.bytes_for(message.num_sequences, message.max_tokens)
        room = settings.kv_memory_mb << 20
        if num_bytes > room:
            raise ProtocolError(
                f"A session would need {num_bytes >> 20} MB for keys and values, and the server has {room >> 20} MB in "
                "all: ask for fewer or shorter sequences, or raise inference.kv_memory_mb in the plan."
            )
        if self._used_bytes + num_bytes > room:
            raise CapacityError("The server's memory for sessions is full at the moment; try again later.", 1.0)
        version, frozen = self._published
        memory = self._decoder.open(message.num_sequences, message.max_tokens, message.blocks, frozen)
        self._used_bytes += num_bytes
        key = (message.owner, message.session)
        return Session(client, key, memory, version, num_bytes, answer, self._ports.clock())

    def _forward(self, client: str, owners: dict[int, int], message: m.SessionForward, answer: Answer) -> None:
        session = self._sessions.get((client, owners.get(message.session, -1), message.session))
        if session is None:
            raise SessionLost("The server does not know this session (any more): open it again and replay it.")
        if len(session.waiting) >= _MOST_WAITING:
            self._end(session)
            raise ProtocolError("Too many messages of one session wait; read the answers.")
        session.answer = answer
        session.last_used = self._ports.clock()
        session.waiting.append(message)
        self._offer(session)

    # --- batches ----------------------------------------------------------------------------------------------------

    def _offer(self, session: Session) -> None:
        if session.running or session.closed or not session.waiting:
            return
        session.running = True
        self._batcher.add(session, session.waiting.popleft())
        self._submit()

    def _submit(self) -> None:
        if not self._submitted:
            self._submitted = True
            self._ports.submit(Priority.DECODE, self._batcher.run, self._ran)

    def _ran(self, results: list[tuple[Session, m.SessionForward, torch.Tensor | FedseaError]]) -> None:
        self._submitted = False
        self.num_batches += bool(results)
        for session, message, result in results:
            session.running = False
            if session.closed:
                session.memory.close()
                continue
            session.last_used = self._ports.clock()
            if isinstance(result, FedseaError):
                session.answer(_failure(session.key[1], result))
                self._end(session)
                continue
            self.num_tokens += sum(message.lengths)
            reply = Reply({} if message.silent else {"": result})
            session.answer(m.SessionOutput(session.key[1], message.number, reply))
            self._offer(session)
        if self._batcher.waiting:
            self._submit()

    # --- ends -------------------------------------------------------------------------------------------------------

    def _end(self, session: Session) -> None:
        if session.closed:
            return
        session.closed = True
        session.waiting.clear()
        self._used_bytes -= session.num_bytes
        del self._sessions[session.client, *session.key]
        if not session.running:  # else when its batch has run: until then the engine writes there
            session.memory.close()

    def tick(self) -> None:
        """End sessions whose lease has run out."""
        now, lease_s = self._ports.clock(), self._settings.lease_s
        for session in list(self._sessions.values()):
            if not session.running and not session.waiting and now - session.last_used > lease_s:
                log.info("a session of client %s ended: nothing came for %g s", session.client, lease_s)
                self._end(session)

    def forget(self, client: str) -> None:
        """End all sessions of a client, whose certificate is not valid any more."""
        for session in list(self._sessions.values()):
            if session.client == client:
                self._end(session)

    def status(self) -> dict[str, Any]:
        """For `fedsea status`."""
        return {
            "sessions": len(self._sessions),
            "sequences": sum(len(session.memory.caches) for session in self._sessions.values()),
            "kv_bytes": self._used_bytes,
            "kv_bytes_limit": self._settings.kv_memory_mb << 20,
            "pages": self._decoder.trunk.arena.pages,
            "tokens": self.num_tokens,
            "batches": self.num_batches,
        }


class _Batcher:
    """Messages that may run, one of a session; the engine thread takes a batch of them when it is free."""

    def __init__(self, decoder: TrunkDecoder, batch_tokens: int) -> None:
        self._decoder = decoder
        self._batch_tokens = batch_tokens
        self._lock = threading.Lock()
        self._small: dict[str, deque[tuple[Session, m.SessionForward]]] = {}
        self._large: dict[str, deque[tuple[Session, m.SessionForward]]] = {}

    def add(self, session: Session, message: m.SessionForward) -> None:
        small = sum(message.lengths) <= _SMALL_TURN * len(message.lengths)
        queues = self._small if small else self._large
        with self._lock:
            queues.setdefault(session.client, deque()).append((session, message))

    @property
    def waiting(self) -> bool:
        """Whether anything does."""
        return bool(self._small or self._large)

    def _take(self) -> list[tuple[Session, m.SessionForward]]:
        """All small messages that fit, in turn from each client, and one large one."""
        with self._lock:
            taken = _in_turn(self._small, self._batch_tokens, most=_MOST_IN_BATCH)
            room = self._batch_tokens - sum(sum(message.lengths) for _, message in taken)
            return taken + _in_turn(self._large, max(room, 1 if not taken else 0), most=1)

    def run(self) -> list[tuple[Session, m.SessionForward, torch.Tensor | FedseaError]]:
        """Run the next batch; on the engine thread."""
        batch = [(session, message) for session, message in self._take()]
        turns = [
            Turn(session.memory, message.positions, message.lengths, message.sources, message.tensors[""])  # type: ignore[index]
            for session, message in batch
        ]
        results = self._decoder.run(turns)
        return [(*entry, result) for entry, result in zip(batch, results, strict=True)]


def _in_turn(
    queues: dict[str, deque[tuple[Session, m.SessionForward]]], room: int, most: int
) -> list[tuple[Session, m.SessionForward]]:
    """One message of each client after the other, while they fit; the first fits always if there is any room.

    Whoever was taken from last stands at the end of the next batch's line.
    """
    taken: list[tuple[Session, m.SessionForward]] = []
    while queues and len(taken) < most and room > 0:
        client = next(iter(queues))
        queue = queues[client]
        num_tokens = sum(queue[0][1].lengths)
        if taken and num_tokens > room:
            break
        taken.append(queue.popleft())
        room -= num_tokens
        del queues[client]
        if queue:
            queues[client] = queue
    return taken


def _failure(session: int, error: FedseaError) -> m.SessionFailed:
    return m.SessionFailed(session, error.code, error.message, getattr(error, "retry_after_s", 0.0))
