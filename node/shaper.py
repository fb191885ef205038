"""A slow line between two ends: a proxy that delays, jitters, paces and, for UDP, loses what passes through it.

For swarms on one machine, where the kernel's own tool (netem) is often missing. A TCP stream keeps its order and loses
nothing: whoever wants lost packets below TCP drops them in a packet filter, as faults_docker.py does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self, cast

from braniac.node.errors import ConfigError, ResourceError
from braniac.node.foreground import leave_when_told

_PIECE_BYTES = 1 << 14
_PIECES_MAX = 64  # under way in one direction of one stream: a sender that is faster has to wait
_CLIENTS_MAX = 256  # of one forwarded UDP port; the one silent for longest makes room
_BACKLOG_S_MAX = 2.0  # a datagram that would wait longer for its turn is dropped, as a router does


@dataclass(frozen=True)
class Line:
    """What a line does to each direction of each stream, or to each direction of a UDP port."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Up to so much is added to the delay, evenly spread."""
    bytes_per_s: float = 0.0
    """0: any number."""
    loss: float = 0.0
    """Chance that a datagram vanishes."""


@dataclass(frozen=True)
class Forward:
    """A port here, and the place it stands for."""

    port: int
    """0: any free one."""
    host: str
    to_port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "4001=host:4001". Raises ConfigError."""
        here, _, there = text.partition("=")
        host, _, to_port = there.rpartition(":")
        if not (host and here.isdecimal() and to_port.isdecimal() and max(int(here), int(to_port)) < 1 << 16):
            raise ConfigError(f"{text!r} is not a forward: write PORT=HOST:PORT, as in 4001=founder:4001")
        return cls(int(here), host, int(to_port))


class Pace:
    """When what is sent now comes out at the other end."""

    def __init__(self, line: Line, rng: random.Random) -> None:
        self._line = line
        self._rng = rng
        self._free_at = 0.0
        self._out_at = 0.0

    def out_at(self, now: float, count: int) -> float:
        """Loop time at which `count` bytes that enter `now` are out; never before what entered earlier."""
        if self._line.bytes_per_s:
            self._free_at = max(self._free_at, now) + count / self._line.bytes_per_s
        delay_s = self._line.delay_s + self._line.jitter_s * self._rng.random()
        self._out_at = max(self._out_at, max(self._free_at, now) + delay_s)
        return self._out_at

    def loses(self, now: float) -> bool:
        """Whether a datagram that enters `now` vanishes, by chance or because too many wait before it."""
        return self._rng.random() < self._line.loss or self._free_at - now > _BACKLOG_S_MAX


class Shaper:
    """Forwards ports over lines, between `start` and `stop` or as `async with`."""

    def __init__(self, line: Line, rng: random.Random) -> None:
        self._line = line
        self._rng = rng
        self._servers: list[asyncio.Server] = []
        self._ports: list[asyncio.DatagramTransport] = []
        self._streams: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def forward_tcp(self, forward: Forward, host: str = "0.0.0.0") -> int:
        """Begin to forward a TCP port: the port. Raises ResourceError."""
        with _in_words(forward):
            server = await asyncio.start_server(partial(self._accept, forward), host, forward.port, limit=_PIECE_BYTES)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def forward_udp(self, forward: Forward, host: str = "0.0.0.0") -> int:
        """Begin to forward a UDP port: the port. Raises ResourceError."""
        loop = asyncio.get_running_loop()
        with _in_words(forward):
            transport, _ = await loop.create_datagram_endpoint(
                lambda: _UdpPort(forward, self._line, self._rng), local_addr=(host, forward.port)
            )
        self._ports.append(transport)
        return int(transport.get_extra_info("sockname")[1])

    async def stop(self) -> None:
        """Cut everything that passes through."""
        for server in self._servers:
            server.close()
        for port in self._ports:
            port.close()
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    async def _accept(self, forward: Forward, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            there = await asyncio.open_connection(forward.host, forward.to_port, limit=_PIECE_BYTES)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._carry(reader, there[1]))
                    both.create_task(self._carry(there[0], writer))
            finally:
                there[1].transport.abort()
        except* OSError:  # an end hung up, or nobody answers: the other end is told by the cut
            pass
        finally:
            writer.transport.abort()
            self._streams.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction of a stream, to its end."""
        pace, loop = Pace(self._line, self._rng), asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_PIECES_MAX)

        async def take_in() -> None:
            while True:
                piece = await reader.read(_PIECE_BYTES)
                await under_way.put((pace.out_at(loop.time(), len(piece)), piece))
                if not piece:
                    return

        async def let_out() -> None:
            while True:
                at, piece = await under_way.get()
                await asyncio.sleep(max(0.0, at - loop.time()))
                if not piece:
                    return writer.write_eof()
                writer.write(piece)
                await writer.drain()

        async with asyncio.TaskGroup() as ends:
            ends.create_task(take_in())
            ends.create_task(let_out())


class _UdpPort(asyncio.DatagramProtocol):
    """A port that clients send to; each client gets a socket of its own towards the other end."""

    def __init__(self, forward: Forward, line: Line, rng: random.Random) -> None:
        self._forward = forward
        self._clients: dict[tuple[str, int], _Client] = {}
        self._there = Pace(line, rng)
        self.back = Pace(line, rng)
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)  # asyncio's own is not declared as one

    def connection_lost(self, error: Exception | None) -> None:
        for client in self._clients.values():
            client.close()

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        client = self._clients.pop(address, None) or _Client(self, address, self._forward)
        self._clients[address] = client
        if len(self._clients) > _CLIENTS_MAX:
            self._clients.pop(next(iter(self._clients))).close()
        self.pass_on(self._there, data, client.send)

    def pass_on(self, pace: Pace, data: bytes, send: Callable[[bytes], object]) -> None:
        """Send later, or never."""
        loop = asyncio.get_running_loop()
        if not pace.loses(loop.time()):
            loop.call_at(pace.out_at(loop.time(), len(data)), send, data)


class _Client(asyncio.DatagramProtocol):
    """The socket towards the other end, for one client."""

    def __init__(self, port: _UdpPort, address: tuple[str, int], forward: Forward) -> None:
        self._port = port
        self._address = address
        self._transport: asyncio.DatagramTransport | None = None
        self._waiting: list[bytes] = []
        self._opening = asyncio.ensure_future(self._open(forward))

    async def _open(self, forward: Forward) -> None:
        with contextlib.suppress(OSError):  # nobody there: datagrams vanish, as they may
            await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: self, remote_addr=(forward.host, forward.to_port)
            )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)
        for data in self._waiting:
            self._transport.sendto(data)
        self._waiting.clear()

    def send(self, data: bytes) -> None:
        """To the other end."""
        if self._transport is not None:
            self._transport.sendto(data)
        elif len(self._waiting) < _PIECES_MAX:
            self._waiting.append(data)

    def datagram_received(self, data: bytes, address: object) -> None:
        self._port.pass_on(self._port.back, data, lambda data: self._port.transport.sendto(data, self._address))

    def close(self) -> None:
        self._opening.cancel()
        if self._transport is not None:
            self._transport.close()


@contextlib.contextmanager
def _in_words(forward: Forward) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot listen on port {forward.port} ({error.strerror or error}): choose another"
        ) from None


def run_shaper(tcp: Sequence[Forward], udp: Sequence[Forward], line: Line, seed: int) -> int:
    """Forward in the foreground until told to stop: the exit code. Raises ResourceError."""

    async def main() -> None:
        told = asyncio.Event()
        leave_when_told(told.set)
        async with Shaper(line, random.Random(seed)) as shaper:
            for forward in tcp:
                await shaper.forward_tcp(forward)
            for forward in udp:
                await shaper.forward_udp(forward)
            await told.wait()

    asyncio.run(main())
    return 0
