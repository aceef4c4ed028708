"""The emulated link of the benchmarks: its arithmetic, and that bytes come through it unchanged."""

from __future__ import annotations

import asyncio
import itertools
import os

import pytest

from benchmarks._link import LinkProxy, LinkSettings, Pacer

MB = 1_000_000


def test_one_message_takes_half_the_round_trip_and_its_own_length() -> None:
    pacer = Pacer(LinkSettings(rtt_ms=20, mbit=8))
    assert pacer.arrival(5.0, 100_000) == pytest.approx(5.0 + 0.010 + 0.1)


def test_delay_does_not_reduce_throughput() -> None:
    pacer = Pacer(LinkSettings(rtt_ms=1000, mbit=80))
    arrivals = [pacer.arrival(0.0, 10_000) for _ in range(1000)]
    assert arrivals[-1] - arrivals[0] == pytest.approx(999 * 10_000 / (10 * MB))
    assert arrivals[-1] == pytest.approx(0.5 + 1.0)


def test_chunks_arrive_in_order_and_never_faster_than_the_bandwidth() -> None:
    pacer = Pacer(LinkSettings(rtt_ms=40, mbit=8))
    arrivals = [pacer.arrival(0.001 * i, 5000) for i in range(50)]
    assert all(after - before >= 5000 / MB - 1e-9 for before, after in itertools.pairwise(arrivals))


def test_an_idle_link_saves_nothing_up() -> None:
    pacer = Pacer(LinkSettings(rtt_ms=0, mbit=8))
    pacer.arrival(0.0, 1000)
    assert pacer.arrival(60.0, MB) == pytest.approx(61.0)


def test_no_bandwidth_limit_leaves_the_delay_alone() -> None:
    pacer = Pacer(LinkSettings(rtt_ms=20, mbit=0))
    assert pacer.arrival(1.0, 10**9) == pytest.approx(1.010)


def test_queue_holds_what_is_under_way_and_little_more() -> None:
    settings = LinkSettings(rtt_ms=20, mbit=100)
    under_way = 0.010 * 12.5 * MB
    assert under_way < settings.queue_bytes < under_way + (128 << 10)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()
    writer.close()


async def _through(settings: LinkSettings, payload: bytes) -> tuple[bytes, int]:
    async with await asyncio.start_server(_echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with LinkProxy(f"127.0.0.1:{port}", settings) as proxy, asyncio.timeout(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)

            async def send() -> None:
                writer.write(payload)
                await writer.drain()
                writer.write_eof()

            sending = asyncio.create_task(send())
            answer = await reader.read(-1)
            await sending
            writer.close()
            return answer, proxy.num_bytes


@pytest.mark.parametrize("settings", [LinkSettings(rtt_ms=4, mbit=0), LinkSettings(rtt_ms=2, mbit=800)])
def test_bytes_come_back_unchanged_and_are_counted(settings: LinkSettings) -> None:
    payload = os.urandom(3 * MB)
    answer, counted = asyncio.run(_through(settings, payload))
    assert answer == payload
    assert counted == 2 * len(payload)


def test_nobody_at_the_target_ends_the_connection() -> None:
    async def run() -> bytes:
        async with await asyncio.start_server(_echo, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
        async with LinkProxy(f"127.0.0.1:{port}", LinkSettings(0, 0)) as proxy, asyncio.timeout(20):
            reader, _ = await asyncio.open_connection("127.0.0.1", proxy.port)
            return await reader.read(-1)

    assert asyncio.run(run()) == b""
