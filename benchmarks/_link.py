"""An emulated link: a TCP proxy with a delay and a bandwidth in each direction, for every connection by itself.

The delay is half the round-trip time in each direction, and what is under way does not hold back what follows: a
connection reaches its full bandwidth at any delay. Once a link's queue is full (the data under way, and a little
more) the proxy reads no further, so that TCP slows the sender down like a real link's router does.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

_READ_BYTES = 16 << 10
"""Small enough that the last byte of a message is not held up by what was read together with it."""

_QUEUE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """A link.

    Attributes:
        rtt_ms: Round-trip time.
        mbit: Megabits a second in each direction; 0 is unlimited.
    """

    rtt_ms: float
    mbit: float

    @property
    def delay_s(self) -> float:
        """One way."""
        return self.rtt_ms / 2000

    @property
    def bytes_per_s(self) -> float:
        """One direction."""
        return self.mbit * 1e6 / 8 if self.mbit > 0 else float("inf")

    @property
    def queue_bytes(self) -> int:
        """Most bytes that one direction holds: what is under way at full bandwidth, and a short queue."""
        under_way = 0.0 if self.mbit <= 0 else self.delay_s * self.bytes_per_s
        return int(under_way) + (_QUEUE_BYTES if self.mbit > 0 else 4 << 20)


class Pacer:
    """When bytes leave one direction of a link; pure arithmetic.

    >>> pacer = Pacer(LinkSettings(rtt_ms=20, mbit=8))   # 1 MB/s
    >>> pacer.arrival(0.0, 1000), pacer.arrival(0.0, 1000), pacer.arrival(1.0, 1000)
    (0.011, 0.012, 1.011)
    """

    def __init__(self, settings: LinkSettings) -> None:
        self._settings = settings
        self._free_at = 0.0

    def arrival(self, now: float, num_bytes: int) -> float:
        """When the last of so many bytes, handed over at `now`, comes out at the other end.

        Args:
            now: Seconds; never less than in the call before.
            num_bytes: They wait for whatever was handed over before.
        """
        self._free_at = max(now, self._free_at) + num_bytes / self._settings.bytes_per_s
        return round(self._free_at + self._settings.delay_s, 9)


class _Direction:
    """Carries bytes from a reader to a writer through one direction of a link."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        settings: LinkSettings,
        clock: Callable[[], float],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._settings = settings
        self._clock = clock
        self._pacer = Pacer(settings)
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._changed = asyncio.Event()
        self._broken = False
        self.num_bytes = 0

    async def run(self) -> None:
        """Until the reader ends; what is under way still arrives, then the writer is ended too."""
        delivering = asyncio.create_task(self._deliver())
        try:
            with suppress(ConnectionError):
                while not delivering.done() and (chunk := await self._reader.read(_READ_BYTES)):
                    self.num_bytes += len(chunk)
                    self._held_bytes += len(chunk)
                    self._under_way.append((self._pacer.arrival(self._clock(), len(chunk)), chunk))
                    self._changed.set()
                    while self._held_bytes >= self._settings.queue_bytes and not self._broken:
                        self._changed.clear()
                        await self._changed.wait()
            self._under_way.append((self._pacer.arrival(self._clock(), 0), b""))
            self._changed.set()
            await delivering
        finally:
            delivering.cancel()

    async def _deliver(self) -> None:
        try:
            while True:
                while not self._under_way:
                    self._changed.clear()
                    await self._changed.wait()
                due, chunk = self._under_way.popleft()
                if (wait := due - self._clock()) > 0:
                    await asyncio.sleep(wait)
                if not chunk:
                    break
                self._writer.write(chunk)
                await self._writer.drain()
                self._held_bytes -= len(chunk)
                self._changed.set()
            self._writer.write_eof()
        except OSError:  # the far side is gone: what comes now is dropped
            self._broken = True
            self._changed.set()


class LinkProxy:
    """Listens on a free port of the loopback and connects whoever comes with `target`, each over a link of its own.

    Args:
        target: `HOST:PORT`.
        settings: Of every link.
        clock: Monotonic seconds.
    """

    def __init__(self, target: str, settings: LinkSettings, clock: Callable[[], float] = time.monotonic) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._settings = settings
        self._clock = clock
        self._server: asyncio.Server | None = None
        self._directions: list[_Direction] = []

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None, "not started"
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def num_bytes(self) -> int:
        """TCP payload carried so far in both directions of all links: frames with all that TLS and HTTP/2 add."""
        return sum(direction.num_bytes for direction in self._directions)

    async def __aenter__(self) -> LinkProxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        both = [
            _Direction(reader, far_writer, self._settings, self._clock),
            _Direction(far_reader, writer, self._settings, self._clock),
        ]
        self._directions += both
        try:
            await asyncio.gather(*(direction.run() for direction in both))
        finally:
            writer.close()
            far_writer.close()
