"""Decoding sessions at the server: admission, leases, and continuous batching.

All sessions that have a message waiting run as one batch; a batch is put together at the moment at which the engine is
free for it, so sessions join and leave at every step. Runs on the event loop; only `Batcher.run` is on the engine
thread.

A session belongs to the stream that opened it last. Messages that come late on a broken stream are refused: run
between those of the new stream, they would make a cache that the client does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from fedsea.errors import ConfigError, FedseaError, ProtocolError, SessionLost
from fedsea.model.decoding import TrunkDecoder, reason_of
from fedsea.plan import InferenceSection
from fedsea.server.admission import Admission
from fedsea.server.batches import SMALL_TURN, Answer, Batcher, Owners, Ready, Session
from fedsea.server.engine import Engine
from fedsea.server.executor.local import Priority
from fedsea.server.line import failure, forget_owner
from fedsea.server.ports import Member, Ports
from fedsea.types import Reply
from fedsea.wire import messages as m

log = logging.getLogger(__name__)

_MOST_WAITING = 64
"""Messages of one session that may wait."""
_WAITING_MESSAGES = 4
"""A client's streams are not read on while as many new tokens wait as so many of the largest messages have."""


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
        self._sessions: dict[tuple[str, int, int], Session] = {}
        self._admission = Admission(settings, decoder, roster, ports.clock)
        self._most_rows = _WAITING_MESSAGES * settings.most_rows
        self._waiting_rows: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._some_ran = asyncio.Event()
        self._batcher = Batcher(decoder, settings.batch_tokens)
        self._submitted = False
        self._num_ending = 0  # sessions whose memory is free when their batch has run
        self.num_tokens = 0
        self.num_batches = 0

    # --- what sessions see of the trunk -----------------------------------------------------------------------------

    def publish(self, engine: Engine) -> None:
        """Let sessions that open from now on use the trunk as it is now; on the engine thread."""
        if self._decoder.trunk.caches:
            # A token's memory is measured here, where nothing else runs.
            self._decoder.bound(self._settings.kv_memory_mb << 20)
        self._admission.published = (engine.next_step, self._decoder.trunk.freeze())

    # --- messages ---------------------------------------------------------------------------------------------------

    def receive(self, client: str, owners: Owners, message: m.Message, answer: Answer) -> None:
        """Take a message of a client.

        Args:
            client: Its name.
            owners: Of this stream; filled here.
            message: One of the session messages.
            answer: Queues a reply on the stream that the message came on.

        Raises:
            ProtocolError: The message is something else.
        """
        number = getattr(message, "session", -1)
        try:
            match message:
                case m.SessionOpen():
                    self._open(client, owners, message, answer)
                case m.SessionForward():
                    self._forward(client, owners, message)
                case m.SessionClose():
                    self._close(client, owners, message)
                case _:
                    raise ProtocolError(f"A client may not send {type(message).__name__} here.")
        except FedseaError as error:
            if number < 0:
                raise
            answer(failure(number, error))

    async def room(self, client: str) -> None:
        """Wait until few enough of a client's new tokens wait; it is not read from meanwhile."""
        while self._is_full(client):
            self._some_ran.clear()
            await self._some_ran.wait()

    @contextlib.contextmanager
    def unread(self, client: str) -> Iterator[None]:
        """A stream of a client is not read from for another reason: no lease of its sessions runs out meanwhile."""
        self._unread[client] += 1
        try:
            yield
        finally:
            self._unread[client] -= 1

    def _is_full(self, client: str) -> bool:
        return self._waiting_rows[client] >= self._most_rows

    def _of(self, client: str, owners: Owners, number: int) -> Session | None:
        """The session that a message means, if it belongs to the message's stream."""
        session = self._sessions.get((client, owners.get(number, -1), number))
        return session if session is not None and session.owners is owners else None

    def _open(self, client: str, owners: Owners, message: m.SessionOpen, answer: Answer) -> None:
        if not self._settings.enabled:
            raise ConfigError("The plan does not offer inference (inference.enabled = false).")
        key = (client, message.owner, message.session)
        session = self._sessions.get(key)
        if session is None:
            again = self._admission.ask(client, owners, message, answer)
            owners[message.session] = message.owner
            if self._admission.fits(message):
                self._admit()
            if not again:
                self._admission.refuse(key)
            return
        if len(session.memory.caches) != message.num_sequences or session.memory.blocks != message.blocks:
            raise ProtocolError("A session was opened again in another shape.")
        owners[message.session] = message.owner
        # What still waits was sent on a stream that broke, maybe unnoticed so far; the client sends it again.
        self._drop_waiting(session)
        session.owners, session.answer = owners, answer
        session.last_used = self._ports.clock()
        self._say_opened(session)

    def _close(self, client: str, owners: Owners, message: m.SessionClose) -> None:
        key = (client, message.owner or owners.get(message.session, -1), message.session)
        self._admission.close(key, None if message.owner else owners)
        session = self._sessions.get(key)
        if session is not None and (message.owner or session.owners is owners):
            self._end(session)

    def _admit(self) -> None:
        """Open what there is room for."""
        while (admitted := self._admission.admit()) is not None:
            waiter, memory, version = admitted
            assert waiter.answer is not None
            _, owner, number = waiter.key
            session = Session(
                waiter.client,
                (owner, number),
                memory,
                version,
                waiter.owners,
                waiter.answer,
                self._ports.clock(),
            )
            self._sessions[waiter.key] = session
            self._say_opened(session)

    def _say_opened(self, session: Session) -> None:
        number = session.key[1]
        session.answer(m.SessionOpened(number, session.memory.held, session.version, self._settings.lease_s))

    def _forward(self, client: str, owners: Owners, message: m.SessionForward) -> None:
        session = self._of(client, owners, message.session)
        if session is None:
            raise SessionLost("The server does not know this session (any more): open it again and replay it.")
        most = max(self._settings.prefill_tokens, SMALL_TURN * len(session.memory.caches))
        if sum(message.lengths) > most:
            self._end(session)
            raise ProtocolError(
                f"A message has {sum(message.lengths)} new tokens, and {most} are allowed in this session: send longer "
                "prompts in several."
            )
        if len(session.waiting) >= _MOST_WAITING:
            self._end(session)
            raise ProtocolError("Too many messages of one session wait; read the answers.")
        session.last_used = self._ports.clock()
        session.waiting.append(message)
        self._waiting_rows[client] += sum(message.lengths)
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

    def _ran(self, results: list[tuple[Ready, torch.Tensor | FedseaError]]) -> None:
        self.num_batches += bool(results)
        for ready, result in results:
            try:
                self._ran_one(ready, result)
            except Exception as error:  # noqa: BLE001 (ends this session; raised here it would end the run)
                ready.session.answer(failure(ready.session.key[1], reason_of(error)))
                self._end(ready.session)
        self._submitted = False  # only now: else the next batch would begin with the first of these alone
        if self._batcher.waiting:
            self._submit()

    def _ran_one(self, ready: Ready, result: torch.Tensor | FedseaError) -> None:
        session, message = ready.session, ready.message
        session.running = False
        self._no_longer_waiting(session, ready.num_tokens)
        if session.closed:
            self._num_ending -= 1
            self._free(session)
            return
        session.last_used = self._ports.clock()
        if isinstance(result, FedseaError):
            session.answer(failure(session.key[1], result))
            self._end(session)
            return
        self.num_tokens += ready.num_tokens
        if ready.owners is session.owners:  # else the stream broke meanwhile, and the client asks again
            reply = Reply({} if message.silent else {"": result})
            session.answer(m.SessionOutput(session.key[1], message.number, reply))
        self._offer(session)

    # --- ends -------------------------------------------------------------------------------------------------------

    def fail(self, client: str, owners: Owners, number: int, error: FedseaError) -> None:
        """End a session whose output cannot be sent, and say why on its stream; the client's others go on."""
        if (session := self._of(client, owners, number)) is not None:
            session.answer(failure(number, error))
            self._end(session)

    def _end(self, session: Session) -> None:
        if session.closed:
            return
        session.closed = True
        del self._sessions[session.client, *session.key]
        forget_owner(session.owners, session.key[1], session.key[0])
        self._drop_waiting(session)
        if session.running:
            self._num_ending += 1
            return  # the engine writes to its caches: they are free when the batch has run
        self._free(session)

    def _drop_waiting(self, session: Session) -> None:
        """Nothing of it runs any more, except for what the engine has already."""
        num_rows = sum(sum(message.lengths) for message in session.waiting)
        session.waiting.clear()
        if session.running and (ready := self._batcher.discard(session)) is not None:
            session.running = False
            num_rows += ready.num_tokens
        self._no_longer_waiting(session, num_rows)

    def _no_longer_waiting(self, session: Session, num_rows: int) -> None:
        self._waiting_rows[session.client] -= num_rows
        self._some_ran.set()

    def _free(self, session: Session) -> None:
        self._admission.free(session.client, session.memory)
        self._admit()

    def leave(self, owners: Owners) -> None:
        """End all sessions of a stream whose client has said goodbye."""
        self._admission.stream_ended(owners, for_good=True)
        for session in list(self._sessions.values()):
            if session.owners is owners:
                self._end(session)

    def broke(self, owners: Owners) -> None:
        """A stream has ended without a goodbye: its sessions are kept for their lease, for the client may be back.

        What they hold is kept, and no more: nobody is answered any more, and what waits the client sends again.
        """
        self._admission.stream_ended(owners, for_good=False)
        for session in self._sessions.values():
            if session.owners is owners:
                self._drop_waiting(session)
                session.answer, session.last_used = _unheard, self._ports.clock()

    def tick(self) -> None:
        """End sessions whose lease has run out, and let those who wait have what is theirs."""
        now, lease_s = self._ports.clock(), self._settings.lease_s
        for session in list(self._sessions.values()):
            if self._is_full(session.client) or self._unread[session.client]:
                session.last_used = now  # its next message may have come, and is not read yet
            elif not session.running and not session.waiting and now - session.last_used > lease_s:
                log.info("a session of client %s ended: nothing came for %g s", session.client, lease_s)
                self._end(session)
        self._admission.tick()
        self._admit()
        self._reclaim()

    def _reclaim(self) -> None:
        if self._num_ending:
            return
        for session in self._admission.lenders(self._sessions.values()):
            if session.running or session.waiting:  # else it hears of it, as after a lease, when it goes on
                lost = SessionLost("Another client waited for its share of the memory for keys and values.")
                session.answer(failure(session.key[1], lost))
            log.info("a session of client %s ended: others waited for their share of memory", session.client)
            self._admission.remember(session)
            self._end(session)

    def status(self) -> dict[str, Any]:
        """For `fedsea status`."""
        return {
            "sessions": len(self._sessions),
            "waiting": self._admission.num_waiting,
            "sequences": self._admission.used_sequences.total(),
            "kv_bytes": self._decoder.trunk.arena.num_bytes,
            "kv_bytes_limit": self._settings.kv_memory_mb << 20,
            "pages": self._decoder.trunk.arena.pages,
            "tokens": self.num_tokens,
            "batches": self.num_batches,
        }


def _unheard(_: m.Message) -> None:
    """An answer on a stream that is not there any more."""
