"""Between a protocol engine and the world: it is given the time, its messages are sent, its events are handed over."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable

from braniac.node.exchange import Exchange
from braniac.node.network import Network
from braniac.protocol import events
from braniac.protocol.engine import Engine
from braniac.protocol.identity import PeerId

_MESSAGES_PER_PEER_MAX = 16  # in flight: a peer that does not answer must not collect tasks


class Pump:
    """Drives one engine: `turn`, then `wait`, for ever (`run`)."""

    def __init__(
        self,
        engine: Engine,
        exchange: Exchange,
        network: Network,
        obey: Callable[[events.Event], None],
        tasks: asyncio.TaskGroup,
    ) -> None:
        """`obey` gets every event, in order; messages are sent in `tasks`."""
        self._engine = engine
        self._exchange = exchange
        self._network = network
        self._obey = obey
        self._tasks = tasks
        self._in_flight: Counter[PeerId] = Counter()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """The engine may have something to say before its timer goes off."""
        self._woken.set()

    def turn(self) -> None:
        """Give the engine the time, do what it asks for, send what it says."""
        self._engine.handle_timer(self._exchange.swarm_clock.now())
        while (event := self._engine.next_event()) is not None:
            self._obey(event)
        for peer, data in self._engine.messages_to_send():
            if self._in_flight[peer] < _MESSAGES_PER_PEER_MAX:
                self._in_flight[peer] += 1
                self._tasks.create_task(self._send(peer, data))

    async def wait(self) -> None:
        """Until the engine's timer goes off or somebody calls `wake`."""
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._engine.get_timer() - self._exchange.swarm_clock.now())):
                await self._woken.wait()

    async def run(self) -> None:
        """Turn and wait, for ever."""
        while True:
            self.turn()
            await self.wait()

    async def say_goodbye(self) -> None:
        """The last words, when nothing else is said any more: a heartbeat after them would bring this peer back."""
        self._engine.goodbye()
        async with asyncio.TaskGroup() as farewell:
            for peer, data in self._engine.messages_to_send():
                farewell.create_task(self._exchange.send(self._network.transport, peer, data))

    async def _send(self, peer: PeerId, data: bytes) -> None:
        try:
            await self._exchange.send(self._network.transport, peer, data)
        finally:
            self._in_flight[peer] -= 1
            if not self._in_flight[peer]:
                del self._in_flight[peer]
