"""Connections that break at chosen points of a client's or the server's code, and come back before it goes on."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import torch

from fedsea.client.remote_trunk import RemoteTrunk
from fedsea.client.retry import RetryPolicy
from fedsea.client.segments import ClientSegments
from fedsea.client.setup import ClientOptions
from fedsea.client.state import ClientStore
from fedsea.client.trainer import Trainer
from fedsea.client.trunk import MicroBatch
from fedsea.plan import FederationPlan
from fedsea.privacy.boundary import Boundary
from fedsea.server.service import Service
from fedsea.types import BlockRange
from tests.support.assets import HIDDEN
from tests.support.federation import Federation
from tests.support.proxy import CuttingProxy

DEADLINE_S = 30.0
_NOWHERE = MicroBatch(10**6, 0, 0, 1, (2,), 1, BlockRange(1, 4))

Point = tuple[type[Any], str]

HEAD: Point = (ClientSegments, "head")
PREPARE: Point = (ClientStore, "prepare")
EVALUATE: Point = (ClientSegments, "evaluate_head")
POINTS: tuple[Point, ...] = (
    HEAD,
    PREPARE,
    EVALUATE,
    (ClientSegments, "embed"),
    (ClientSegments, "squared_norm"),
    (ClientSegments, "parameters"),
    (ClientSegments, "apply"),
    (ClientStore, "save"),
    (ClientStore, "flush"),
    (Trainer, "_offer_prepared"),
    (Trainer, "_take_round"),
)


class Line:
    """One client's connection, as an observer of its run. Use as a context manager around the run."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.name = name
        self.proxy = CuttingProxy(federation.address)
        self.num_cuts = 0
        self.trunk: RemoteTrunk | None = None

    def __enter__(self) -> Line:
        self.proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.__exit__()

    def begin(self, _plan: FederationPlan, _name: str, trunk: Any) -> None:
        self.trunk = trunk

    def step(self, _: object) -> None:
        """Not kept."""

    evaluation = waiting = step

    def bytes(self, up: int, down: int) -> None:
        """Not kept."""

    @property
    def is_open(self) -> bool:
        """Whether the client's run has begun, and it has not said goodbye."""
        return self.trunk is not None and not self.trunk._closing.is_set()

    def cut(self) -> None:
        """Break the connection."""
        self.num_cuts += 1
        self.proxy.cut()

    def blip(self) -> None:
        """Break the connection; back when the client has read what it is told at its return."""
        self.cut()
        assert self.trunk is not None
        hidden = self.trunk.seal(Boundary("trusted-server").hidden(torch.zeros(2, HIDDEN)))
        # Asked on the new connection, and answered after what is told there.
        self.trunk.evaluate(_NOWHERE, hidden).result(DEADLINE_S)


def before(monkeypatch: Any, point: Point, strike: Callable[[str], None]) -> None:
    """Call `strike` with the client's name before a method does its work, on the thread of a client's run."""
    owner, method = point
    original = getattr(owner, method)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        strike(threading.current_thread().name.removeprefix("test-"))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, wrapped)


def strike_once(line: Line, call: int) -> Callable[[str], None]:
    """A blip before one client's `call`-th call, from 1."""
    calls = 0

    def strike(name: str) -> None:
        nonlocal calls
        if name == line.name:
            calls += 1
            if calls == call:
                line.blip()

    return strike


def disturb_at_random(monkeypatch: Any, lines: dict[str, Line], seed: str, num_cuts: int) -> None:
    """Break connections at many points of clients and server, each client's `num_cuts` times at most."""
    draws = {name: random.Random(f"{seed}/{name}") for name in lines}
    at_server = random.Random(f"{seed}/server")

    def strike(name: str) -> None:
        line = lines.get(name)
        if line is None or line.num_cuts >= num_cuts or not line.is_open:
            return
        draw = draws[name].random()
        if draw < 0.1:
            line.blip()
        elif draw < 0.15:
            line.cut()

    for point in POINTS:
        before(monkeypatch, point, strike)
    send = Service.send

    def send_and_cut(self: Service, client: str, message: Any) -> None:
        send(self, client, message)
        if lines[client].num_cuts < num_cuts and at_server.random() < 0.1:
            lines[client].cut()

    monkeypatch.setattr(Service, "send", send_and_cut)


def impatient(monkeypatch: Any) -> None:
    """Lost connections are sought at once."""
    monkeypatch.setattr(ClientOptions, "retry", property(lambda self: RetryPolicy(self.retry_for_s, first_s=0.02)))
