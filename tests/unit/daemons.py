"""Whole daemons, several in one event loop, over the in-memory network. Slots are real time, short ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

from braniac.node import identity_file
from braniac.node.clock import SystemClock
from braniac.node.config import DataSection, MetricsSection, NetworkSection, NodeConfig, StateSection, TrainSection
from braniac.node.p2pd import P2pdOptions
from braniac.node.service import Service
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from braniac.protocol.manifest import Manifest
from tests.unit.node_harness import PATIENCE_S, TEXT, until, write_run

SLOT_MS = 600
LOOK_S = 0.01


class Swarm:
    """Daemons of one run. The first founds it; the others are told where the first is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory = MemoryNetwork()
        self.manifest: Manifest = write_run(root / "n0", SLOT_MS, epoch_s=time.time())
        self.daemons: list[Service] = []
        self.tasks: list[asyncio.Task[None]] = []
        (root / "text.txt").write_bytes(TEXT.tobytes())

    async def start_transport(self, path: Path, options: P2pdOptions) -> MemoryTransport:
        return self.memory.join(identity_file.load(path).peer_id)

    def config(self, name: str, tier: int, peers: tuple[str, ...]) -> NodeConfig:
        return NodeConfig(
            network=NetworkSection(peers=peers, call_timeout_s=5.0),
            train=TrainSection.model_validate({"tier": tier, "batch": 2, "nice": 19}),
            data=DataSection(paths=(self.root / "text.txt",)),
            state=StateSection(dir=self.root / name),
            metrics=MetricsSection(enabled=False),
        )

    @property
    def door(self) -> str:
        """Where the first daemon is."""
        return self.daemons[0].node.network.transport.addresses()[0]

    def start(self, name: str, tier: int, peers: tuple[str, ...] = ()) -> Service:
        daemon = Service(self.config(name, tier, peers), SystemClock(), self.start_transport)
        self.daemons.append(daemon)
        self.tasks.append(asyncio.ensure_future(daemon.run()))
        return daemon

    async def found(self) -> Service:
        daemon = self.start("n0", 0)
        await self.until(lambda: daemon.node.metrics.state == "training")
        return daemon

    async def join(self, name: str, tier: int) -> Service:
        daemon = self.start(name, tier, (self.door,))
        await self.until(lambda: daemon.node.metrics.state == "training")
        return daemon

    async def until(self, condition: object) -> None:
        """Wait for something; the end of a daemon ends the wait."""
        assert callable(condition)
        await until(lambda: condition() or any(task.done() for task in self.tasks), LOOK_S)
        for task in self.tasks:
            if task.done():
                await task
        assert condition()

    async def ended(self, daemon: Service) -> None:
        """Wait for a daemon's end, and raise what ended it."""
        task = self.tasks.pop(self.daemons.index(daemon))
        self.daemons.remove(daemon)
        async with asyncio.timeout(PATIENCE_S):
            await task


async def swarm_below(root: Path) -> AsyncIterator[Swarm]:
    """The body of a fixture: what still runs at the end is stopped."""
    swarm = Swarm(root)
    yield swarm
    for daemon, task in zip(swarm.daemons, swarm.tasks, strict=True):
        if not task.done():
            daemon.leave(now=True)
    await asyncio.gather(*swarm.tasks, return_exceptions=True)
