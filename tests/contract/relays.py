"""A federation with a relay, for tests of what goes through it."""

from __future__ import annotations

from pathlib import Path

from fedsea.wire import messages as m
from fedsea.wire.channel import ClientStream
from tests.contract.loopback import Federation, forward
from tests.support.relay import make_relay

CANARY = "Zebulon Quasimir 0471-993"


class Party(Federation):
    """With a relay."""

    def __init__(self, folder: Path, *names: str) -> None:
        super().__init__(folder, *names)
        self.edge = make_relay(folder / "edge", self.authority)


async def answered(stream: ClientStream, step: int) -> None:
    await stream.send(forward(step, 2))
    output = await stream.receive()
    assert isinstance(output, m.Output)
    assert output.step == step
