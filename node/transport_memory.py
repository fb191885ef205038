"""A network inside one event loop, with faults on demand, for tests and simulations.

Nothing here waits: a message that gets lost fails its call at once, as if the deadline had passed, unless the network
is given a `sleep` (of a fake clock, say) that makes deadlines and delays take their time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from braniac.node.transport import (
    EXCHANGE,
    Bounds,
    Doorman,
    Handler,
    Reason,
    Refused,
    Traffic,
    Unreachable,
    parse_address,
    split_host_port,
)
from braniac.protocol.identity import PeerId, peer_id_text
from braniac.protocol.limits import MESSAGE_BYTES_MAX


async def _no_time_passes(seconds: float) -> None:
    await asyncio.sleep(0)


class MemoryNetwork:
    """All transports of one test, and the faults between them.

    `loss` is the chance that a request or a reply vanishes, decided by `rng`; `delay_s` is slept before each message.
    """

    def __init__(
        self,
        *,
        loss: float = 0.0,
        rng: random.Random | None = None,
        delay_s: float = 0.0,
        sleep: Callable[[float], Awaitable[None]] = _no_time_passes,
    ) -> None:
        assert rng is not None or not loss, "loss needs a seeded generator"
        self.loss = loss
        self.delay_s = delay_s
        self._rng = rng
        self._sleep = sleep
        self._members: dict[PeerId, MemoryTransport] = {}
        self._joined = 0
        self._cuts: set[tuple[PeerId, PeerId]] = set()
        self._suspended: set[PeerId] = set()

    def join(self, peer_id: PeerId, bounds: Bounds | None = None) -> MemoryTransport:
        """A transport for `peer_id`, at a new address; it takes the place of an earlier, closed one."""
        assert peer_id not in self._members, "this peer is already there"
        self._joined += 1
        address = f"/ip4/10.0.{self._joined >> 8}.{self._joined & 255}/tcp/4001/p2p/{peer_id_text(peer_id)}"
        self._members[peer_id] = MemoryTransport(self, peer_id, address, bounds or Bounds())
        return self._members[peer_id]

    def cut(self, source: PeerId, target: PeerId) -> None:
        """Lose every message from `source` to `target`; the other way stays open."""
        self._cuts.add((source, target))

    def mend(self, source: PeerId, target: PeerId) -> None:
        """Undo `cut`."""
        self._cuts.discard((source, target))

    def suspend(self, peer: PeerId) -> None:
        """Let `peer` keep its connections and answer nothing, like a phone app in the background."""
        self._suspended.add(peer)

    def resume(self, peer: PeerId) -> None:
        """Undo `suspend`."""
        self._suspended.discard(peer)

    def leave(self, peer: PeerId) -> None:
        """Forget a closed transport: calls to it fail to connect."""
        self._members.pop(peer, None)

    def find(self, peer: PeerId) -> MemoryTransport | None:
        """The transport of a peer that is there."""
        return self._members.get(peer)

    def listens(self, host: str, port: int) -> bool:
        """Whether somebody is there at a host and port."""
        places = (address for member in self._members.values() for address in member.addresses())
        return any(split_host_port(parse_address(address)[1]) == (host, port) for address in places)

    async def carry(self, source: PeerId, target: PeerId) -> bool:
        """Move one message; whether it arrived."""
        if self.delay_s:
            await self._sleep(self.delay_s)
        lost = self._rng is not None and self._rng.random() < self.loss
        return not lost and (source, target) not in self._cuts and target not in self._suspended

    async def time_out(self, timeout_s: float) -> None:
        """Wait as a caller does whose message was lost."""
        await self._sleep(timeout_s)


class MemoryTransport:
    """See Transport; made by `MemoryNetwork.join`."""

    def __init__(self, network: MemoryNetwork, peer_id: PeerId, address: str, bounds: Bounds) -> None:
        self.peer_id = peer_id
        self.traffic = Traffic()
        self._network = network
        self._address = address
        self._doorman = Doorman(self.traffic, bounds)
        self._handlers: dict[str, Handler] = {}
        self._failed = asyncio.Event()
        self._deadlines: set[asyncio.Timeout] = set()

    async def call(self, peer: PeerId, request: bytes, *, timeout_s: float, protocol: str = EXCHANGE) -> bytes:
        """See Transport."""
        try:
            reply = await self._call(peer, request, timeout_s, protocol)
        except Unreachable as error:
            self.traffic.calls[error.reason] += 1
            raise
        self.traffic.calls["ok"] += 1
        return reply

    async def connect(self, address: str, *, timeout_s: float) -> PeerId:
        """See Transport."""
        peer, _ = parse_address(address)
        if self._failed.is_set():
            raise Unreachable(Reason.CLOSED, "this transport is closed", address=address)
        target = self._network.find(peer)
        if target is None or target.addresses() != [address]:
            raise Unreachable(Reason.UNDIALABLE, "nobody listens there", address=address)
        if not await self._network.carry(self.peer_id, peer) or not await self._network.carry(peer, self.peer_id):
            await self._network.time_out(timeout_s)
            raise Unreachable(Reason.TIMEOUT, f"no answer in {timeout_s:g} s", address=address)
        return peer

    def remember(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """See Transport; in memory a peer is found by its id, so nothing needs to be kept."""

    async def seen_from(self, peer: PeerId) -> list[str]:
        """See Transport; in memory everybody is always connected."""
        there = self._network.find(peer)
        return [split_host_port(parse_address(address)[1])[0] for address in there.addresses()] if there else []

    async def probe(self, host: str, port: int) -> bool:
        """See Transport."""
        return self._network.listens(host, port)

    def addresses(self) -> list[str]:
        """See Transport."""
        return [self._address]

    async def serve(self, handler: Handler, *, protocol: str = EXCHANGE) -> None:
        """See Transport."""
        assert protocol not in self._handlers, "this protocol is already served"
        self._handlers[protocol] = handler

    async def wait_failed(self) -> None:
        """See Transport."""
        await self._failed.wait()

    async def close(self) -> None:
        """See Transport."""
        self.fail()

    def fail(self) -> None:
        """Die at once, as when the daemon under a real transport is killed."""
        if self._failed.is_set():
            return
        self._failed.set()
        self._network.leave(self.peer_id)
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0.0)

    async def _call(self, peer: PeerId, request: bytes, timeout_s: float, protocol: str) -> bytes:
        if len(request) > MESSAGE_BYTES_MAX:
            raise Unreachable(Reason.OVERSIZE, f"a request of {len(request)} bytes", peer=peer)
        if self._failed.is_set():
            raise Unreachable(Reason.CLOSED, "this transport is closed", peer=peer)
        self.traffic.sent_bytes += len(request)
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                self._deadlines.add(deadline)
                reply = await self._exchange(peer, request, protocol)
                if reply is None:
                    await self._network.time_out(timeout_s)
                    raise TimeoutError
        except TimeoutError:
            if self._failed.is_set():
                raise Unreachable(Reason.CLOSED, "this transport was closed", peer=peer) from None
            raise Unreachable(Reason.TIMEOUT, f"no answer in {timeout_s:g} s", peer=peer) from None
        except Refused as refused:
            raise Unreachable(Reason.REFUSED, str(refused), peer=peer) from None
        finally:
            self._deadlines.discard(deadline)
        self.traffic.received_bytes += len(reply)
        return reply

    async def _exchange(self, peer: PeerId, request: bytes, protocol: str) -> bytes | None:
        """The reply, or None if the request or the reply was lost on the way."""
        target = self._network.find(peer)
        if target is None:
            raise Unreachable(Reason.UNDIALABLE, "nobody listens there", peer=peer)
        if not await self._network.carry(self.peer_id, peer):
            return None
        reply = await target.answer(self.peer_id, request, protocol)
        return reply if await self._network.carry(peer, self.peer_id) else None

    async def answer(self, peer: PeerId, request: bytes, protocol: str) -> bytes:
        """Reply to a peer of this network. Raises Refused; Unreachable if this transport dies before the reply."""
        handler = self._handlers.get(protocol)
        if handler is None:
            raise Refused("unknown")
        try:
            async with asyncio.timeout(None) as deadline:
                self._deadlines.add(deadline)
                return await self._doorman.answer(handler, peer, request)
        except TimeoutError:
            raise Unreachable(Reason.LOST, "the connection broke", peer=self.peer_id) from None
        finally:
            self._deadlines.discard(deadline)
