"""A certificate authority, its clients, and a server on loopback, for tests that need the real thing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from fedsea.privacy.boundary import Boundary
from fedsea.types import BlockRange, Channel, Reply
from fedsea.wire import messages as m
from fedsea.wire.channel import ClientStream, connect
from fedsea.wire.encoding import Encoder
from fedsea.wire.identity import Authority, Identity, PeerGate, enroll, install
from fedsea.wire.limits import HANDSHAKE, WireLimits
from fedsea.wire.server import PeerSession, WireServer, serve
from fedsea.wire.transport import Timing

CODECS = {Channel.HIDDEN: "fp32", Channel.GRADIENT: "fp32"}
LIMITS = WireLimits(1024, 8192, 8, 64 << 20, CODECS, {}, 6)

QUICK = Timing(check_s=0.05)


class Federation:
    """An authority with a server and enrolled clients, in a folder."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "ca", "test federation")
        self.server = Identity.load(self.authority.issue_server(["127.0.0.1"], folder=folder / "server"))
        self.clients = {name: self.add(name) for name in names}

    def add(self, name: str, *, days_ago: float = 0) -> Identity:
        enrollment = enroll(self.folder / name, name)
        authority = Authority.open(self.folder / "ca", clock=lambda: datetime.now(UTC) - timedelta(days=days_ago))
        certificate = authority.approve(enrollment.csr_pem, name=name, days=30)
        install(self.folder / name, certificate.pem, self.authority.ca_pem, self.authority.fingerprint)
        return Identity.load(self.folder / name)

    def gate(self) -> PeerGate:
        return PeerGate(self.folder / "ca")


async def echo(session: PeerSession) -> None:
    """Answers every `Forward` with its own tensor; every `FetchTrunk` with an error nobody expected."""
    session.limits, session.encoder = LIMITS, Encoder("server", CODECS)
    async for message in session:
        if isinstance(message, m.Forward):
            assert not isinstance(message.tensors, Reply)
            await session.send(m.Output(message.step, 0, 0, False, Reply(message.tensors)))  # type: ignore[arg-type]
        elif isinstance(message, m.FetchTrunk):
            raise RuntimeError("private detail")


@asynccontextmanager
async def running(
    federation: Federation,
    handler: Callable[[PeerSession], Awaitable[None]] = echo,
    *,
    timing: Timing = QUICK,
    **options: Any,
) -> AsyncIterator[tuple[WireServer, str]]:
    """A server and its address."""
    options.setdefault("status", lambda peer: {"you": peer.name})
    options.setdefault("gate", federation.gate())
    gate = options.pop("gate")
    server = await serve("127.0.0.1:0", federation.server, gate, handler, limits=HANDSHAKE, timing=timing, **options)
    try:
        yield server, f"127.0.0.1:{server.port}"
    finally:
        await server.stop(1.0)


async def join(address: str, identity: Identity, **options: Any) -> ClientStream:
    return await connect(address, identity, limits=LIMITS, encoder=Encoder("client", CODECS), **options)


def forward(step: int, rows: int) -> m.Forward:
    release = Boundary("trusted-server").hidden(torch.full((rows, 1024), float(step)))
    return m.Forward(step, 0, 0, 1, BlockRange(1, 5), (rows,), rows, False, release)


def run(work: Coroutine[Any, Any, None], timeout_s: float = 30.0) -> None:
    """Run a test's coroutine, bounded in time."""
    asyncio.run(asyncio.wait_for(work, timeout_s))
