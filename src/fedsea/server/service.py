"""Connections: handshake, messages in and out, and the coordinator between them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import fedsea
from fedsea.errors import AuthError, ConfigError, FedseaError, ProtocolError
from fedsea.federation.secure import Verifier
from fedsea.model.decoding import TrunkDecoder
from fedsea.plan import FederationPlan, backward_channel, server_statement
from fedsea.server.coordinator import Coordinator
from fedsea.server.engine import Engine
from fedsea.server.executor.local import EngineThread, Priority
from fedsea.server.link import Link
from fedsea.server.ports import Member
from fedsea.server.sessions import Sessions
from fedsea.server.state import RunState, ServerStore
from fedsea.types import Channel
from fedsea.wire import messages as m
from fedsea.wire.encoding import Encoder
from fedsea.wire.errors import PeerClosed
from fedsea.wire.frames import PROTOCOL_VERSION
from fedsea.wire.identity.peers import PeerIdentity
from fedsea.wire.limits import WireLimits
from fedsea.wire.session import PeerSession

log = logging.getLogger(__name__)

_HANDSHAKE_S = 60.0
_WAITING_MESSAGES = 4
"""A client is not read from while answers for it wait that are larger than so many of the largest messages."""
_PATIENCE_S = 120.0
_PATIENCE_BOUNDED_S = 20.0


class Service:
    """Serves the clients of one run. The coordinator's world (`coordinator.Ports`).

    Args:
        plan: The resolved plan.
        engine: The trunk.
        store: Durable state.
        state: Where the run stands.
        roster: What each client has.
        executor: The engine thread.
        verifier: Checks clients' certificates for each other; needed with `aggregation.secure`.
        barred: Says why a client that is away would be turned away, in a word, or "".
    """

    def __init__(
        self,
        plan: FederationPlan,
        engine: Engine,
        store: ServerStore,
        state: RunState,
        roster: dict[str, Member],
        executor: EngineThread,
        verifier: Verifier | None = None,
        barred: Callable[[str], str] = lambda _: "",
    ) -> None:
        self.plan = plan
        self.roster = roster
        self.coordinator = Coordinator(plan, engine, store, state, roster, self, verifier)
        self.sessions = Sessions(plan.inference, TrunkDecoder(engine.trunk), self, roster)
        self.over = asyncio.Event()
        self._engine = engine
        self._published: tuple[int, bool] | None = None
        self._welcome = m.Welcome(plan.to_json(), plan.sha256(), state.run_id)
        self._hidden_size = engine.trunk.hidden_size
        first = plan.client_names[0]
        self._num_blocks = roster[first].blocks.stop + plan.partition_of(first).output_blocks
        self._executor = executor
        self._links: dict[str, Link] = {}
        self._using: Counter[str] = Counter()  # streams of clients that take part in no step
        self._left: set[str] = set()
        self._refused: dict[str, str] = {}
        self._barred = barred
        self._alone_since: float | None = None
        self._sent: Counter[str] = Counter()
        self._received: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    # --- the coordinator's ports ------------------------------------------------------------------------------------

    def send(self, client: str, message: m.Message) -> None:
        """See `Ports.send`."""
        if (link := self._links.get(client)) is not None:
            link.put(message)

    def disconnect(self, client: str, error: FedseaError) -> None:
        """See `Ports.disconnect`."""
        if (link := self._links.get(client)) is not None:
            link.session.end(error)

    def submit(self, priority: Priority, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """See `Ports.submit`."""
        self._executor.submit(priority, job).add_done_callback(lambda future: self._deliver(future, then))

    def clock(self) -> float:
        """See `Ports.clock`."""
        return time.monotonic()

    def _deliver(self, future: asyncio.Future[Any], then: Callable[[Any], None]) -> None:
        if future.cancelled():
            return
        if (error := future.exception()) is None:
            try:
                then(future.result())
            except Exception as raised:  # noqa: BLE001 (the event loop would log it and go on, and clients would wait)
                error = raised
        if error is not None:
            self.coordinator.engine_failed(error)
        if self.coordinator.failure is not None:
            self.over.set()

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def handle(self, session: PeerSession) -> None:
        """Serve one stream from handshake to end."""
        try:
            await self._handle(session)
        except FedseaError as error:
            self._errors[error.code] += 1
            raise

    async def _handle(self, session: PeerSession) -> None:
        name = session.peer.name
        entry = self.plan.client(name)
        self._refused.pop(name, None)
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                await self._hello(session)
                join = await session.receive()
        except TimeoutError:
            raise ProtocolError(f"No complete handshake came within {_HANDSHAKE_S:g} s; connect again.") from None
        except PeerClosed:
            return  # only wanted to read the plan
        if not isinstance(join, m.Join):
            raise ProtocolError(f"The handshake needs a Join; a {type(join).__name__} came.")
        if join.plan_sha256 != self._welcome.plan_sha256:
            raise ConfigError(
                "The client agreed to another plan than this server's: install the same version of fedsea on both "
                f"sides (the server has {fedsea.__version__})."
            )
        session.limits = self._limits(entry.name, decodes=join.role == "observe")
        wire = self.plan.wire
        session.encoder = Encoder("server", {Channel.HIDDEN: wire.hidden, Channel.GRADIENT: wire.gradient})
        link = Link(session, _WAITING_MESSAGES * 4 * session.limits.max_tokens * self._hidden_size)
        pump = asyncio.create_task(link.pump())
        pump.add_done_callback(link.pump_ended)
        uses = join.role == "observe"
        self._using[name] += uses
        try:
            await (self._observe(link) if uses else self._train(link, name, join))
        finally:
            self._using[name] -= uses
            pump.cancel()
            link.close()
            self._sent += session.stats.sent
            self._received += session.stats.received

    async def _hello(self, session: PeerSession) -> None:
        hello = await session.receive()
        if not isinstance(hello, m.Hello):
            raise ProtocolError(f"A session begins with Hello; a {type(hello).__name__} came.")
        if hello.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"The client speaks protocol {hello.protocol_version}, this server {PROTOCOL_VERSION}: install fedsea "
                f"{fedsea.__version__} at the client."
            )
        await session.send(self._welcome)

    def _limits(self, name: str, *, decodes: bool) -> WireLimits:
        secure = self.coordinator.secure
        max_tokens, max_sequences = self.plan.most_in_a_message(name, self._hidden_size, decodes=decodes)
        return WireLimits(
            hidden_size=self._hidden_size,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            max_tensor_bytes=self.plan.wire.max_tensor_mb << 20,
            codecs={Channel.HIDDEN: self.plan.wire.hidden, Channel.GRADIENT: self.plan.wire.gradient},
            bundle_shapes=self.roster[name].shapes,
            num_blocks=self._num_blocks,
            masked_shapes={} if secure is None else secure.layout.shapes_of(name),
        )

    async def _observe(self, link: Link) -> None:
        owners: dict[int, int] = {}
        link.fail_session = partial(self.sessions.fail, link.session.peer.name, owners)
        try:
            async for message in link.session:
                match message:
                    case m.Finished():
                        self.sessions.leave(owners)
                        return
                    case m.SessionOpen() | m.SessionForward() | m.SessionClose():
                        self.sessions.receive(link.session.peer.name, owners, message, link.put)
                        await self.sessions.room(link.session.peer.name)
                    case _:
                        await self._ask(link, message)
                with self.sessions.unread(link.session.peer.name):
                    await link.room()
        finally:
            self.sessions.broke(owners)

    async def _ask(self, link: Link, message: m.Message) -> None:
        await link.may_ask()
        name = link.session.peer.name
        self.coordinator.answer(name, message, link.answer, trains=self._links.get(name) is link)

    async def _train(self, link: Link, name: str, join: m.Join) -> None:
        strict = self.coordinator.wait_s is None
        self.coordinator.state.check_standing(name, join, strict=strict)  # before anybody is sent away for it
        if (before := self._links.get(name)) is not None:
            before.session.end(AuthError(f"Another process connected as {name}; only one may train at a time."))
            self._gone(name, before)
        self._links[name] = link
        try:
            self.coordinator.join(name, join)
            async for message in link.session:
                match message:
                    case m.Finished():
                        self._left.add(name)
                        return
                    case m.Failure():
                        log.warning("client %s stopped at step %d: %s", name, message.step, message.code)
                        return
                    case m.Forward(evaluate=True) | m.Pullback() | m.FetchTrunk():
                        await self._ask(link, message)
                    case _:
                        self.coordinator.receive(name, message)
                await link.room()
        finally:
            self._gone(name, link)

    def _gone(self, name: str, link: Link) -> None:
        if self._links.get(name) is link:
            del self._links[name]
            log.info("client %s left", name)
            self.coordinator.leave(name)
        self._look_whether_over()

    def _look_whether_over(self) -> None:
        """The run is over when it is finished and everybody has said goodbye.

        It is also over when nobody has been connected for a while: a client may have gone for good, or have said
        goodbye to the process before this one.
        """
        if not self.coordinator.finished or self._links:
            self._alone_since = None
            return
        if self._alone_since is None:
            self._alone_since = self.clock()
        alone_s = self.clock() - self._alone_since
        patience_s = _PATIENCE_S if self.coordinator.wait_s is None else _PATIENCE_BOUNDED_S
        if alone_s > patience_s or self._left >= set(self.plan.client_names):
            self.over.set()

    # --- asked and told from outside --------------------------------------------------------------------------------

    def refused(self, name: str, reason: str) -> None:
        """A client was turned away or cut off at the port; said in the status until it is back."""
        if name in self.roster:
            self._refused[name] = reason

    async def tick(self) -> None:
        """Bound waiting; runs until cancelled."""
        while True:
            await asyncio.sleep(0.05)
            self.coordinator.tick()
            self.sessions.tick()
            self._publish()
            self._look_whether_over()

    def _publish(self) -> None:
        """Let new sessions decode with the trunk as it is at the start, after every round, and at the end."""
        now = (self.coordinator.state.rounds_done, self.coordinator.finished)
        if self.plan.inference.enabled and now != self._published:
            self._published = now
            self.submit(Priority.CONTROL, partial(self.sessions.publish, self._engine), lambda _: None)

    def status(self, _: PeerIdentity | None = None) -> dict[str, Any]:
        """Where the run stands, for `fedsea status`."""
        coordinator, state = self.coordinator, self.coordinator.state
        away = [name for name in self.plan.client_names if name not in coordinator.connected]
        live = [link.session.stats for link in self._links.values()]
        sent = sum((stats.sent for stats in live), self._sent)
        received = sum((stats.received for stats in live), self._received)
        return {
            "run_id": state.run_id,
            "federation": self.plan.name,
            "plan_sha256": self.plan.sha256(),
            "version": fedsea.__version__,
            "trust_mode": self.plan.trust.mode,
            "trust": server_statement(self.plan),
            "backward_channel": backward_channel(self.plan),
            "time": time.time(),
            "next_step": state.next_step,
            "num_steps": self.plan.num_steps,
            "rounds_done": state.rounds_done,
            "rounds": self.plan.training.rounds,
            "finished": coordinator.finished,
            "clients": list(self.plan.client_names),
            "connected": [name for name in self.plan.client_names if name in coordinator.connected],
            "using": [name for name in self.plan.client_names if self._using[name]],
            "waiting_for": list(coordinator.waiting_for()),
            "refused": self._refused | {name: why for name in away if (why := self._barred(name))},
            "target_tokens": coordinator.num_target_tokens,
            "bytes_sent": sent.total(),
            "bytes_received": received.total(),
            "bytes_sent_by_kind": dict(sent),
            "bytes_received_by_kind": dict(received),
            "engine_s": {name: round(seconds, 3) for name, seconds in self._executor.busy_s.items()},
            "engine_cpu_s": {name: round(seconds, 3) for name, seconds in self._executor.cpu_s.items()},
            "inference": self.sessions.status() if self.plan.inference.enabled else None,
            "errors": dict(self._errors),
        }
