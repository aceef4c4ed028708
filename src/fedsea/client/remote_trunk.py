"""A trunk at a server, behind one stream that is opened again whenever it breaks.

One background thread runs the event loop; the trainer's calls queue messages and return futures. After every
(re)connection the client says where it stands; steps that were under way are interrupted, evaluations are sent
again, as the very same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from fedsea.client.invitation import Invitation, check_sealed, greet, pause_before
from fedsea.client.patience import pause_s, silence
from fedsea.client.questions import Key, OpenQuestions
from fedsea.client.remote_sessions import RemoteSession, RemoteSessions
from fedsea.client.retry import RetryPolicy
from fedsea.client.trunk import Connected, Event, MicroBatch, Sealed, Standing
from fedsea.errors import FedseaError, ProtocolError, TransportError
from fedsea.types import Channel, Release
from fedsea.wire import messages as m
from fedsea.wire.channel import ClientStream, connect
from fedsea.wire.encoding import Encoded, Encoder
from fedsea.wire.errors import PeerClosed
from fedsea.wire.identity.identity import Identity
from fedsea.wire.limits import HANDSHAKE, WireLimits

log = logging.getLogger(__name__)

_GREETING_S = 60.0
_GOODBYE_S = 2.0
"""So long an observer's goodbye may take; the server ends sessions that it does not hear of after their lease."""


class RemoteTrunk:
    """See `Trunk`. Use as a context manager, or call `start` and `close`.

    Args:
        address: `HOST:PORT` of the server.
        identity: This client's; given as a function so that a renewed one is used at the next connection.
        invitation: As fetched; a server that later has another plan is refused.
        limits: What the server may announce.
        standing: Where this client stands durably, asked for at every connection.
        retry: How long a lost connection is sought.
        role: "train" or "observe".
        on_waiting: Told for whom the server waits.
        answer_within_s: A server that is connected and owes an answer to a session, or to what is asked outside any
            step, longer than this counts as lost for it. What belongs to a step may wait for other clients.
    """

    def __init__(
        self,
        address: str,
        identity: Callable[[], Identity],
        invitation: Invitation,
        limits: WireLimits,
        standing: Callable[[], Standing],
        retry: RetryPolicy,
        role: str = "train",
        on_waiting: Callable[[tuple[str, ...]], None] = lambda _: None,
        answer_within_s: float = math.inf,
    ) -> None:
        self.address = address
        self.invitation = invitation
        self._stream: ClientStream | None = None
        self._traffic_before: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._identity = identity
        self._limits = limits
        self._standing = standing
        self._retry = retry
        self._role = role
        self._on_waiting = on_waiting
        self._answer_within_s = answer_within_s
        self._writing = False
        wire = invitation.plan.wire
        self._encoder = Encoder("client", {Channel.HIDDEN: wire.hidden, Channel.GRADIENT: wire.gradient})
        self._events: queue.SimpleQueue[Event | FedseaError] = queue.SimpleQueue()
        self._questions = OpenQuestions()
        self._outgoing: asyncio.Queue[Encoded] = asyncio.Queue()
        self._loop = asyncio.new_event_loop()
        self._sessions: RemoteSessions | None = None
        self._joined = False
        self._sessions_lock = threading.Lock()  # around these two: sessions are made on any thread
        self._given_up: FedseaError | None = None
        self._thread = threading.Thread(target=self._work, name="fedsea-wire", daemon=True)
        self._closing = threading.Event()
        self._farewell: Encoded | None = None
        self._running: asyncio.Task[None] | None = None

    def start(self) -> RemoteTrunk:
        """Connect in the background."""
        self._thread.start()
        return self

    def __enter__(self) -> RemoteTrunk:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self._stop()

    # --- the Trunk protocol -----------------------------------------------------------------------------------------

    def next_event(self) -> Event:
        """See `Trunk.next_event`."""
        while True:
            event = self._events.get()
            if isinstance(event, FedseaError):
                raise event
            if not isinstance(event, m.StepOpen) or self._questions.take(event):
                return event

    def seal(self, release: Release) -> Sealed:
        """The payload's bytes, by the plan's codec."""
        return self._encoder.seal(release)

    def forward(self, where: MicroBatch, hidden: Sealed) -> Future[torch.Tensor]:
        """See `Trunk.forward`."""
        return self._ask(("output", where.step, where.attempt, where.number), self._forward(where, hidden, False))

    def backward(self, where: MicroBatch, gradient: Sealed) -> Future[torch.Tensor | None]:
        """See `Trunk.backward`."""
        message = m.Backward(where.step, where.attempt, where.number, gradient)
        return self._ask(("gradient", where.step, where.attempt, where.number), message)

    def ready(self, step: int, attempt: int, num_target_tokens: int, squared_norm: float, gradients: Sealed) -> None:
        """See `Trunk.ready`."""
        self._send(m.StepReady(step, attempt, num_target_tokens, squared_norm, gradients))

    def update(self, round_index: int, num_target_tokens: int, parameters: Sealed) -> None:
        """See `Trunk.update`."""
        self._send(m.RoundUpdate(round_index, num_target_tokens, parameters))

    def tell(self, message: m.Message) -> None:
        """See `Trunk.tell`."""
        self._send(message)

    def evaluate(self, where: MicroBatch, hidden: Sealed) -> Future[torch.Tensor]:
        """See `Trunk.evaluate`; survives a lost connection."""
        return self._ask(("evaluation", where.step, -1, where.number), self._forward(where, hidden, True), lasting=True)

    def pull_back(self, where: MicroBatch, hidden: Sealed, gradient: Sealed) -> Future[torch.Tensor]:
        """See `Trunk.pull_back`; survives a lost connection."""
        message = m.Pullback(where.step, where.number, where.blocks, where.lengths, hidden, gradient)
        return self._ask(("pullback", where.step, -1, where.number), message, lasting=True)

    def open_session(self, max_tokens: int, num_sequences: int = 1) -> RemoteSession:
        """See `Trunk.open_session`; survives a lost connection and a server that starts again."""
        with self._sessions_lock:
            if self._sessions is None:
                plan = self.invitation.plan
                blocks = plan.partition_of(self._identity().name).trunk(self._limits.num_blocks)
                bounds = plan.inference.prefill_tokens, plan.inference.max_sequences
                self._sessions = RemoteSessions(self, blocks, *bounds, self._retry, online=self._joined)
                if self._given_up is not None:
                    self._sessions.lost(self._given_up)
        return self._sessions.open(max_tokens, num_sequences)

    def fetch(self) -> Future[m.TrunkState]:
        """See `Trunk.fetch`; survives a lost connection."""
        return self._ask(("trunk", 0, -1, 0), m.FetchTrunk(), lasting=True)

    def abandon(self, step: int, error: FedseaError) -> None:
        """See `Trunk.abandon`."""
        if not self._closing.is_set():
            self._send(m.Failure(error.code, "", 0.0, step, True))
        self._stop()

    def close(self, next_step: int) -> None:
        """Say goodbye and end the stream; after a lost connection it is said again, for the server waits for it."""
        self._farewell = self._encoder.encode(m.Finished(next_step))
        self._stop()

    @staticmethod
    def _forward(where: MicroBatch, hidden: Sealed, evaluate: bool) -> m.Forward:
        attempt = 0 if evaluate else where.attempt
        return m.Forward(
            where.step,
            attempt,
            where.number,
            where.count,
            where.blocks,
            where.lengths,
            where.num_target_tokens,
            evaluate,
            hidden,
        )

    @property
    def connected(self) -> bool:
        """Whether the server is there at the moment."""
        return self._stream is not None

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes sent and received so far, over all connections."""
        sent, received = self.traffic
        return sum(sent.values()), sum(received.values())

    @property
    def traffic(self) -> tuple[Counter[str], Counter[str]]:
        """Bytes sent and received so far, by kind of message."""
        sent, received = self._traffic_before
        if (stream := self._stream) is None:
            return sent, received
        return sent + Counter(stream.stats.sent), received + Counter(stream.stats.received)

    # --- for sessions -----------------------------------------------------------------------------------------------

    def send(self, message: m.Message) -> None:
        """See `remote_sessions.Post`."""
        self._send(message)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """See `remote_sessions.Post`."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, call)

    # --- from the trainer's thread ----------------------------------------------------------------------------------

    def _ask(self, key: Key, message: m.Message, *, lasting: bool = False) -> Future[Any]:
        encoded = self._encoder.encode(message)
        future, sendable = self._questions.add(key, encoded, lasting=lasting)
        if sendable:
            self._queue(encoded, future)
        return future

    def _send(self, message: m.Message) -> None:
        self._queue(self._encoder.encode(message))

    def _queue(self, encoded: Encoded, question: Future[Any] | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended; `next_event` says why
            self._loop.call_soon_threadsafe(self._put, encoded, question)

    def _stop(self) -> None:
        if not self._thread.is_alive():
            return
        if self._role == "observe":
            self._farewell = self._farewell or self._encoder.encode(m.Finished(0))
        self._closing.set()
        self._queue(_GOODBYE)
        if self._role == "observe":  # nobody waits for it: a server that is away or hangs is not sought to be told
            self._thread.join(timeout=_GOODBYE_S if self.connected else 0.0)
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._break_off)
        self._thread.join(timeout=10.0)

    # --- on the event loop ------------------------------------------------------------------------------------------

    def _break_off(self) -> None:
        if self._running is not None:
            self._running.cancel()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._running = self._loop.create_task(self._run())
            self._loop.run_until_complete(self._running)
        except asyncio.CancelledError:
            log.debug("the connection to %s was broken off", self.address)
        except Exception:
            log.exception("the connection's thread failed")
            self._give_up(FedseaError("The connection failed for a reason of our own; the log has the details."))
        finally:
            self._lose_sessions(ProtocolError("The connection was closed on this side."))
            self._loop.close()

    def _put(self, encoded: Encoded, question: Future[Any] | None) -> None:
        if question is None or not question.done():  # else it was given up on its way here
            self._outgoing.put_nowait(encoded)

    async def _run(self) -> None:
        tries, lost = self._retry.tries(), False
        while True:
            try:
                async with await connect(self.address, self._identity(), limits=HANDSHAKE) as stream:
                    await self._join(stream, again=lost)
                    tries, lost = self._retry.tries(), False
                    await self._converse(stream)
                    return
            except FedseaError as error:
                self._questions.begin(None)
                self._set_joined(False)
                if self._closing.is_set() and (not self._must_be_heard or isinstance(error, PeerClosed)):
                    return
                if not await pause_before(error, tries):
                    self._give_up(error)
                    return
                lost = True

    @property
    def _must_be_heard(self) -> bool:
        """Whether a goodbye is said again after a lost connection: the run waits for that of whoever trains."""
        return self._farewell is not None and self._role != "observe"

    def _give_up(self, error: FedseaError) -> None:
        if isinstance(error, TransportError):
            error = TransportError(f"{error.message} Gave up after {self._retry.retry_for_s:g} s of trying.")
        self._closing.set()
        self._questions.fail(error)
        self._lose_sessions(error)
        self._events.put(error)

    def _lose_sessions(self, error: FedseaError) -> None:
        with self._sessions_lock:
            self._given_up, sessions = self._given_up or error, self._sessions
        if sessions is not None:
            sessions.lost(self._given_up)

    async def _join(self, stream: ClientStream, *, again: bool) -> None:
        try:
            async with asyncio.timeout(_GREETING_S):
                welcome = await greet(stream)
        except TimeoutError:
            raise TransportError(f"{self.address} did not answer in {_GREETING_S:g} s.") from None
        if (welcome.plan_sha256, welcome.run_id) != (self.invitation.plan.sha256(), self.invitation.run_id):
            raise ProtocolError(
                "The server came back with another plan or another run: start this client again to take part in it."
            )
        check_sealed(self.invitation.plan, stream)
        stream.limits, stream.encoder = self._limits, self._encoder
        standing = self._standing()
        while not self._outgoing.empty():
            self._outgoing.get_nowait()  # of before the connection broke; lasting requests follow
        await stream.send(
            m.Join(welcome.plan_sha256, standing.next_step, standing.prepared_step, standing.round, self._role)
        )
        for encoded in self._questions.lasting():
            self._outgoing.put_nowait(encoded)
        self._set_joined(True)
        if self._closing.is_set():
            self._outgoing.put_nowait(_GOODBYE)
        if again:
            log.info("connected to %s again", self.address)
        self._events.put(Connected())

    def _set_joined(self, joined: bool) -> None:
        with self._sessions_lock:
            self._joined, sessions = joined, self._sessions
        if sessions is not None:
            sessions.connected() if joined else sessions.disconnected()

    async def _converse(self, stream: ClientStream) -> None:
        self._stream = stream
        reader = asyncio.create_task(self._read(stream))
        writer = asyncio.create_task(self._write(stream))
        watcher = asyncio.create_task(self._watch(stream))
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self._farewell is not None:
                await reader  # the server ends the stream when it has heard the goodbye
        finally:
            tasks = (reader, writer, watcher)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._traffic_before, self._stream = self.traffic, None

    async def _write(self, stream: ClientStream) -> None:
        while True:
            encoded = await self._outgoing.get()
            if encoded is _GOODBYE:
                if self._farewell is not None:
                    await stream.send(self._farewell)
                return
            self._writing = True
            await stream.send(encoded)
            self._writing = False

    async def _watch(self, stream: ClientStream) -> None:
        """End the wait of whoever is owed an answer by a server that is there and says nothing."""
        if math.isinf(self._answer_within_s):
            return
        self._writing, before = False, (-1, -1)
        while True:
            await asyncio.sleep(pause_s(self._answer_within_s))
            now = stream.stats.sent_bytes, stream.stats.received_bytes
            uploads = now[0] != before[0] and (self._writing or not self._outgoing.empty())
            if self._sessions is not None and not uploads:
                self._sessions.look(silence(self._answer_within_s))
            if now == before:  # else a large answer may be on its way
                self._questions.look(silence(self._answer_within_s))
            before = now

    async def _read(self, stream: ClientStream) -> None:
        while True:
            self._deliver(await stream.receive())

    def _deliver(self, message: m.Message) -> None:
        match message:
            case m.Output(evaluate=True):
                self._questions.resolve(("evaluation", message.step, -1, message.micro_batch), _single(message.tensors))
            case m.Output():
                key = ("output", message.step, message.attempt, message.micro_batch)
                self._questions.resolve(key, _single(message.tensors))
            case m.InputGradient(evaluate=True):
                self._questions.resolve(("pullback", message.step, -1, message.micro_batch), _single(message.tensors))
            case m.InputGradient():
                key = ("gradient", message.step, message.attempt, message.micro_batch)
                self._questions.resolve(key, _single(message.tensors) if message.tensors else None)
            case m.TrunkState():
                self._questions.resolve(("trunk", 0, -1, 0), message)
            case m.StepOpen():
                self._questions.begin(message)
                self._events.put(message)
            case m.RoundOpen() | m.Finished():
                self._questions.begin(None)  # a straggler may still be at a step that went on without it
                self._events.put(message)
            case (
                m.StepDone()
                | m.RoundResult()
                | m.SecureRoster()
                | m.SecureDelivery()
                | m.SecureSurvivors()
                | m.SecureEvidence()
            ):
                self._events.put(message)
            case m.SessionOpened() | m.SessionOutput() | m.SessionFailed():
                if self._sessions is not None:
                    self._sessions.receive(message)
            case m.Waiting():
                self._on_waiting(message.waiting_for)
            case m.Failure():
                log.warning("The server reports: %s", message.message)
            case _:
                raise ProtocolError(f"The server sent an unexpected {type(message).__name__}.")


_GOODBYE = Encoded((), 0, 0, "")


def _single(tensors: Any) -> torch.Tensor:
    if not isinstance(tensors, dict) or set(tensors) != {""}:
        raise ProtocolError("The server's answer must hold exactly one unnamed tensor.")
    tensor: torch.Tensor = tensors[""]
    return tensor
