"""The slow line: what it does to bytes and datagrams, over real sockets, and when, in arithmetic."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from typing import cast

import pytest

from braniac.node.errors import ConfigError, ResourceError
from braniac.node.shaper import Forward, Line, Pace, Shaper

HOST = "127.0.0.1"


class Echo(asyncio.DatagramProtocol):
    """Sends datagrams back."""

    def __init__(self) -> None:
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, address: object) -> None:
        self.transport.sendto(data, address)  # type: ignore[arg-type]


class Inbox(asyncio.DatagramProtocol):
    """Keeps datagrams."""

    def __init__(self) -> None:
        self.got: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, address: object) -> None:
        self.got.put_nowait(data)


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    """Of a TCP server that sends back what it gets, until the other side has ended."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, HOST, 0) as server:
        yield server.sockets[0].getsockname()[1]


async def through(port: int, data: bytes) -> tuple[bytes, float]:
    """What comes back of some bytes, and after how many seconds the last of them."""
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(HOST, port)
    began = loop.time()
    writer.write(data)
    writer.write_eof()
    back = await reader.read()
    writer.close()
    await writer.wait_closed()
    return back, loop.time() - began


async def test_a_stream_comes_out_whole_in_order_and_later(echo_port: int) -> None:
    data = random.Random(1).randbytes(300_000)
    async with Shaper(Line(delay_s=0.05, jitter_s=0.02), random.Random(0)) as shaper:
        port = await shaper.forward_tcp(Forward(0, HOST, echo_port), HOST)
        results = await asyncio.gather(*(through(port, data) for _ in range(3)))
    for back, took_s in results:
        assert back == data
        assert took_s >= 0.1


async def test_a_stream_is_paced(echo_port: int) -> None:
    async with Shaper(Line(bytes_per_s=200_000), random.Random(0)) as shaper:
        port = await shaper.forward_tcp(Forward(0, HOST, echo_port), HOST)
        back, took_s = await through(port, bytes(50_000))
    assert len(back) == 50_000
    assert took_s >= 0.25


async def test_nobody_at_the_other_end_is_a_cut_connection(unused_port: int) -> None:
    async with Shaper(Line(), random.Random(0)) as shaper:
        port = await shaper.forward_tcp(Forward(0, HOST, unused_port), HOST)
        reader, writer = await asyncio.open_connection(HOST, port)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


@pytest.fixture
def unused_port() -> int:
    """One on which nobody listens now."""
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


async def test_datagrams_go_there_and_back() -> None:
    loop = asyncio.get_running_loop()
    there, _ = await loop.create_datagram_endpoint(Echo, local_addr=(HOST, 0))
    async with Shaper(Line(delay_s=0.01), random.Random(3)) as shaper:
        port = await shaper.forward_udp(Forward(0, HOST, there.get_extra_info("sockname")[1]), HOST)
        client, inbox = await loop.create_datagram_endpoint(Inbox, remote_addr=(HOST, port))
        began = loop.time()
        for number in range(20):
            client.sendto(b"%d" % number)
        heard = [await inbox.got.get() for _ in range(20)]
        assert loop.time() - began >= 0.02
        client.close()
    there.close()
    assert heard == [b"%d" % number for number in range(20)]


def test_pace_is_delay_jitter_and_rate_and_keeps_the_order() -> None:
    pace = Pace(Line(delay_s=1.0, jitter_s=0.5, bytes_per_s=100.0), random.Random(0))
    outs = [pace.out_at(10.0, 50) for _ in range(20)]
    assert outs == sorted(outs)
    for number, out in enumerate(outs, 1):
        assert 10.0 + number * 0.5 + 1.0 <= out <= 10.0 + number * 0.5 + 1.5 + 1e-9


def test_datagrams_are_lost_by_chance_and_when_too_many_wait() -> None:
    pace = Pace(Line(loss=0.3), random.Random(0))
    assert 250 < sum(pace.loses(0.0) for _ in range(1000)) < 350
    slow = Pace(Line(bytes_per_s=100.0), random.Random(0))
    assert not slow.loses(0.0)
    slow.out_at(0.0, 500)
    assert slow.loses(0.0)
    assert not slow.loses(4.0)


@pytest.mark.parametrize("text", ["", "4001", "4001=host", "x=host:1", "1=:1", "70000=host:1", "1=host:70000"])
def test_a_forward_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="PORT=HOST:PORT"):
        Forward.parse(text)


def test_a_forward_is_read() -> None:
    assert Forward.parse("4001=founder:4002") == Forward(4001, "founder", 4002)


async def test_a_port_in_use_is_a_sentence(echo_port: int) -> None:
    async with Shaper(Line(), random.Random(0)) as shaper:
        with pytest.raises(ResourceError, match=f"port {echo_port} .*choose another"):
            await shaper.forward_tcp(Forward(echo_port, HOST, 1), HOST)
