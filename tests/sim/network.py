"""The network of a simulation: every request and every reply is a message that may be lost, late, doubled or spoilt.

Built on the in-memory transport that the node's own tests use; what differs is that requests and replies travel on
their own, in virtual time, and are handled in the process that they reach.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field

from braniac.node.transport import Bounds, Reason, Unreachable
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from braniac.protocol.identity import PeerId, peer_id_text

_SLOW_SHARE = 0.01  # of all messages, if there are slow ones
_SLOW_S = 5.0


@dataclass
class Weather:
    """What the network does to messages at present. Chances are per message and direction."""

    loss: float = 0.0
    duplication: float = 0.0
    corruption: float = 0.0
    """One bit is turned over."""
    delay_s: float = 0.01
    """Mean; delays are exponential, so messages overtake each other."""
    slow: bool = False
    """One message in a hundred takes up to five seconds more."""
    cuts: set[tuple[PeerId, PeerId]] = field(default_factory=set)
    """(from, to): nothing gets through in this direction."""


class SimNetwork(MemoryNetwork):
    """All transports of one simulation."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random, fired: Counter[str]) -> None:
        super().__init__()
        self.weather = Weather()
        self.messages = 0
        self.trace = hashlib.blake2b(digest_size=16)
        """Of everything that arrived, when and where."""
        self._loop = loop
        self._dice = rng
        self._fired = fired
        self._sent: Counter[tuple[PeerId, PeerId]] = Counter()
        self._arrived: dict[tuple[PeerId, PeerId], int] = {}

    def plug_in(self, peer: PeerId, number: int, context: Context) -> SimTransport:
        """A transport for a process that has just started, at the address that its peer always has."""
        self.leave(peer)
        transport = SimTransport(self, peer, address_of(peer, number), Bounds(), context)
        self._members[peer] = transport
        return transport

    async def carry(self, source: PeerId, target: PeerId) -> bool:
        """See MemoryNetwork: a dial, of which only the outcome counts."""
        delay_s = self._fate(source, target)
        await asyncio.sleep(self.weather.delay_s if delay_s is None else delay_s)
        return delay_s is not None

    async def time_out(self, timeout_s: float) -> None:
        """See MemoryNetwork."""
        await asyncio.sleep(timeout_s)

    def post(
        self, source: PeerId, target: PeerId, data: bytes, context: Context, arrive: Callable[[bytes], None]
    ) -> None:
        """Send one message; `arrive` is called in the receiver's context, once, twice or never."""
        copies = 1 + (self._dice.random() < self.weather.duplication)
        self._fired["duplication"] += copies - 1
        for _ in range(copies):
            if (delay_s := self._fate(source, target)) is not None:
                number = self._sent[source, target] = self._sent[source, target] + 1
                spoilt = self._spoilt(data)
                self._loop.call_later(delay_s, self._land, source, target, number, spoilt, arrive, context=context)

    def _land(self, source: PeerId, target: PeerId, number: int, data: bytes, arrive: Callable[[bytes], None]) -> None:
        self.messages += 1
        if number < self._arrived.get((source, target), 0):
            self._fired["reorder"] += 1
        self._arrived[source, target] = max(number, self._arrived.get((source, target), 0))
        self.trace.update(f"{self._loop.time():.9f}".encode() + source + target + data)
        arrive(data)

    def _fate(self, source: PeerId, target: PeerId) -> float | None:
        """How long a message takes; None if it never arrives."""
        weather = self.weather
        if (source, target) in weather.cuts:
            self._fired["partition" if (target, source) in weather.cuts else "one-way partition"] += 1
            return None
        if self._dice.random() < weather.loss:
            self._fired["loss"] += 1
            return None
        delay_s = self._dice.expovariate(1 / weather.delay_s)
        if weather.slow and self._dice.random() < _SLOW_SHARE:
            self._fired["slow message"] += 1
            delay_s += self._dice.uniform(0.5, _SLOW_S)
        return delay_s

    def _spoilt(self, data: bytes) -> bytes:
        if not data or self._dice.random() >= self.weather.corruption:
            return data
        self._fired["corruption"] += 1
        spoilt = bytearray(data)
        bit = self._dice.randrange(8 * len(data))
        spoilt[bit // 8] ^= 1 << bit % 8
        return bytes(spoilt)


class SimTransport(MemoryTransport):
    """See Transport; made by `SimNetwork.plug_in`."""

    def __init__(self, network: SimNetwork, peer: PeerId, address: str, bounds: Bounds, context: Context) -> None:
        super().__init__(network, peer, address, bounds)
        self._net = network
        self._context = context
        self.serving: set[asyncio.Task[None]] = set()

    async def _exchange(self, peer: PeerId, request: bytes, protocol: str) -> bytes | None:
        """The reply; waits for ever if there is none, because the caller has a deadline."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[bytes] = loop.create_future()
        target = self._net.find(peer)
        if target is None:
            await asyncio.sleep(self._net.weather.delay_s)
            raise Unreachable(Reason.UNDIALABLE, "nobody listens there", peer=peer)
        assert isinstance(target, SimTransport)

        def returned(data: bytes) -> None:
            if not reply.done():
                reply.set_result(data)

        async def serve(data: bytes) -> None:
            try:
                answer = await target.answer(self.peer_id, data, protocol)
            except Exception as error:  # Refused, or the process ended: the caller is told at once
                if not reply.done():
                    reply.set_exception(error)
                return
            self._net.post(peer, self.peer_id, answer, self._context, returned)

        def arrived(data: bytes) -> None:
            if not target.closed:
                task = loop.create_task(serve(data), context=target._context)
                target.serving.add(task)
                task.add_done_callback(target.serving.discard)

        self._net.post(self.peer_id, peer, request, target._context, arrived)
        return await reply

    @property
    def closed(self) -> bool:
        """Whether its process has ended."""
        return self._failed.is_set()


def address_of(peer: PeerId, number: int) -> str:
    """Where the peer of that number can be dialled, in all its lives."""
    return f"/ip4/10.0.0.{number + 1}/tcp/4001/p2p/{peer_id_text(peer)}"
