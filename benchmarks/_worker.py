"""The processes of a benchmark, steered over a connection to whoever started them.

Orders and answers are JSON. Whoever trains waits for a number of steps, takes them, and answers; the end of the orders
ends it. A server and a proxy answer every order with what they have counted so far, until the orders end.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_OWNER: Connection
"""To whoever started this process; set by `work`."""


def work(role: str, settings: dict[str, Any], owner: Connection, log: str) -> None:
    """What a process of a benchmark does.

    Args:
        role: Function of this module.
        settings: Its argument.
        owner: Where orders come from and answers go.
        log: File that exists; for what the libraries print.
    """
    global _OWNER
    _OWNER = owner
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    globals()[role](settings)


def tell(**values: Any) -> None:
    """Answer whoever started this process."""
    _OWNER.send_bytes(json.dumps(values).encode())


def next_order() -> Any:
    """What to do now; None at the end."""
    try:
        return json.loads(_OWNER.recv_bytes())
    except EOFError:
        return None


def orders() -> Iterator[Any]:
    """What to do, one after the other, until the end."""
    return iter(next_order, None)


# --- server -----------------------------------------------------------------------------------------------------------


def server(settings: dict[str, Any]) -> None:
    """A server of fedsea, with probes in it if it is to train."""
    from _probes import Probes, server_probes

    from fedsea.server.run import ServerOptions, serve
    from fedsea.server.service import Service

    probes = server_probes() if settings["probes"] else Probes()
    services: list[Service] = []
    begin = Service.__init__

    def noted(service: Service, *args: Any, **kwargs: Any) -> None:
        begin(service, *args, **kwargs)
        services.append(service)

    Service.__init__ = noted  # type: ignore[method-assign]

    def answer() -> None:
        for _ in orders():
            tell(probes=probes.totals(), status=services[0].status())

    threading.Thread(target=answer, daemon=True).start()
    root = Path(settings["root"])
    options = ServerOptions(
        plan=Path(settings["plan"]),
        listen="127.0.0.1:0",
        identity=root / "server",
        ca=root / "ca",
        run=Path(settings["run"]),
        threads=settings["threads"],
        device=settings["device"],
        exit_when_finished=True,
        ready_file=Path(settings["ready"]),
    )
    serve(options)


def proxy(settings: dict[str, Any]) -> None:
    """An emulated link before a server."""
    from _link import LinkProxy, LinkSettings

    async def run() -> None:
        link = LinkSettings(settings["rtt_ms"], settings["mbit"])
        async with LinkProxy(settings["target"], link) as listening:
            tell(address=f"127.0.0.1:{listening.port}")
            loop = asyncio.get_running_loop()
            while await loop.run_in_executor(None, next_order) is not None:
                tell(bytes=listening.num_bytes)

    asyncio.run(run())


# --- who trains -------------------------------------------------------------------------------------------------------


class Gate:
    """Observer of a client that lets it take so many steps at a time.

    Args:
        replay: Stands for a machine of its own, see `_replay.py`, after an order with the seconds of its passes.
    """

    def __init__(self, replay: Any = None) -> None:
        from _probes import client_probes

        self.probes = client_probes()
        self._replay = replay
        self.link: Any = None
        self._left = 0
        self._reports: list[Any] = []
        self._start = 0.0

    def begin(self, _plan: Any, name: str, link: Any = None) -> None:
        """Ready: the first order is awaited here, before the client connects to take part."""
        self.link = link
        tell(ready=name)
        self._await_order()

    def step(self, report: Any) -> None:
        """A step was applied; when the order is carried out, answer and wait for the next one."""
        self._reports.append(report)
        self._left -= 1
        if self._left == 0:
            self._answer()
            self._await_order()

    def evaluation(self, report: Any) -> None:
        """Not part of a benchmark."""

    def _await_order(self) -> None:
        order = next_order()
        if isinstance(order, dict):
            self._replay.start(order)
            order = next_order()
        self._left = order or 0
        self._reports.clear()
        self._start = time.perf_counter()

    def _answer(self) -> None:
        phases = {key: sum(r.seconds[key] for r in self._reports) for key in self._reports[0].seconds}
        up, down = self.link.num_bytes if self.link is not None else (0, 0)
        tell(
            wall_s=time.perf_counter() - self._start,
            now=time.monotonic(),
            num_steps=len(self._reports),
            num_tokens=sum(r.num_tokens for r in self._reports),
            first_loss=self._reports[0].mean_loss,
            phases=phases,
            up=up,
            down=down,
            probes=self.probes.totals(),
            seconds_per_token={} if self._replay is None else self._replay.seconds_per_token(),
        )


def client(settings: dict[str, Any]) -> None:
    """A client of fedsea that trains when it is told."""
    from fedsea.client.run import train
    from fedsea.client.setup import ClientOptions

    options = ClientOptions(
        server=settings["server"],
        identity=Path(settings["identity"]),
        data=(Path(settings["data"]),),
        run=Path(settings["run"]),
        threads=settings["threads"],
        evaluate=False,
    )
    replay = None
    if settings["own_machine"]:
        from _replay import Replay

        replay = Replay()
    train(options, Gate(replay))


def central(settings: dict[str, Any]) -> None:
    """The same model, adapters, data and optimizer in one process with transformers and peft alone."""
    from _central import Central

    training = Central(Path(settings["plan"]), Path(settings["data"]), settings["name"], settings["threads"])
    tell(ready="central")
    for num_steps in orders():
        if num_steps < 0:
            tell(heads=training.heads(-num_steps))
            continue
        start = time.perf_counter()
        losses, num_tokens = training.steps(num_steps)
        tell(
            wall_s=time.perf_counter() - start,
            num_steps=num_steps,
            num_tokens=num_tokens,
            first_loss=losses[0],
            probes={},
        )


# --- who decodes ------------------------------------------------------------------------------------------------------


def split_decoder(settings: dict[str, Any]) -> None:
    """A client of fedsea that decodes when it is told."""
    from _decoding import split

    split(settings, orders(), tell)


def central_decoder(settings: dict[str, Any]) -> None:
    """The whole model in transformers' `generate`."""
    from _decoding import central

    central(settings, orders(), tell)
