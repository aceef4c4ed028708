"""The processes of a benchmark: `python _worker.py ROLE '{settings}'`, steered over stdin and stdout.

Whoever trains waits for a line with a number of steps, takes them, and answers with one line of JSON; the end of stdin
ends it. A server and a proxy answer every line with what they have counted so far, until stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def tell(**values: Any) -> None:
    """One line to whoever started this process."""
    _OUT.write(json.dumps(values) + "\n")
    _OUT.flush()


def ordered() -> int:
    """Steps to take now; 0 at the end."""
    return int(sys.stdin.readline() or 0)


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
        for _ in sys.stdin:
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
            while await loop.run_in_executor(None, sys.stdin.readline):
                tell(bytes=listening.num_bytes)

    asyncio.run(run())


# --- who trains -------------------------------------------------------------------------------------------------------


class Gate:
    """Observer of a client that lets it take so many steps at a time.

    Args:
        replay: Stands for a machine of its own, see `_replay.py`, after a line with the seconds of its passes.
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
        line = sys.stdin.readline()
        if line.startswith("{"):
            self._replay.start(json.loads(line))
            line = sys.stdin.readline()
        self._left = int(line or 0)
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
    while num_steps := ordered():
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

    split(settings, tell)


def central_decoder(settings: dict[str, Any]) -> None:
    """The whole model in transformers' `generate`."""
    from _decoding import central

    central(settings, tell)


if __name__ == "__main__":
    # Libraries may print; only answers go to the pipe.
    _OUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    globals()[sys.argv[1]](json.loads(sys.argv[2]))
