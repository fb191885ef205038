"""Looks at a run from within, without a part in it: for dashboards about peers that nobody can scrape.

An observer is a peer of a tier that holds nothing. It greets the others and is greeted, so every heartbeat and every
certificate reaches it; it verifies them as any node does, and trains, signs and serves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata

import structlog

from braniac.node import foreground, identity_file, joiner
from braniac.node.clock import Clock, SwarmClock, SystemClock
from braniac.node.config import NodeConfig
from braniac.node.errors import ConfigError
from braniac.node.exchange import Exchange
from braniac.node.metrics import EventLoopLag
from braniac.node.metrics_server import MetricsServer
from braniac.node.network import Network, TransportFactory
from braniac.node.pump import Pump
from braniac.node.splits import Splits
from braniac.node.store import Store
from braniac.node.swarm_metrics import SwarmCollector, SwarmMetrics
from braniac.node.transport_libp2p import LibP2PTransport
from braniac.protocol import events, limits
from braniac.protocol.engine import Engine
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest

log = structlog.get_logger(__name__)

FOLDER = "observer"
"""In the state directory: an observer has a key of its own, and may run beside a node."""


class _Left(Exception):
    """Ends the tasks of an observer that was told to leave."""


class Observer:
    """One observer, from start to leave."""

    def __init__(
        self, config: NodeConfig, clock: Clock, start_transport: TransportFactory = LibP2PTransport.start
    ) -> None:
        """Takes its folder. Raises AlreadyRunning, ConfigError, IdentityFileError."""
        if not config.network.peers:
            raise ConfigError("there is no run to observe: give --peers ADDR, or a join link")
        self._config = config
        self._clock = clock
        self._store = Store.open(config.state.dir / FOLDER)
        key = config.state.dir / FOLDER / "identity.key"
        self._identity = identity_file.load_or_create(key)
        self._swarm_clock = SwarmClock(clock)
        self.metrics = SwarmMetrics(importlib.metadata.version("braniac-node"), limits.PROTOCOL_VERSION)
        self.network = Network(config.network, key, self._identity, clock, start_transport=start_transport)
        self._exchange = Exchange(self._store, self.metrics, clock, self._swarm_clock, config.network.call_timeout_s)
        self.network.on_version = self._exchange.hear_version
        self.server = MetricsServer(self.metrics, config.metrics.host, config.metrics.port)
        self.engine: Engine | None = None
        """Once the run is found."""
        self._splits = Splits()
        self._main: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()

    async def run(self) -> None:
        """Observe the run until told to leave. Raises what node and protocol raise."""
        self._main = asyncio.current_task()
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(contextlib.suppress(asyncio.CancelledError))  # `leave` ends it also while it starts
            stack.callback(self._store.close)
            await stack.enter_async_context(self.server)
            log.info("serving metrics", url=f"http://{self.server.host}:{self.server.port}/metrics")
            await self.network.start(self._exchange.answer)
            stack.push_async_callback(self.network.close)
            self.metrics.set_state("joining")
            manifest, _ = await joiner.find_run(self.network, self._exchange)
            joiner.check_run_id(self._config.network, manifest)
            self._swarm_clock.step()
            await self._observe(manifest)

    def leave(self) -> None:
        """Say goodbye and stop; at once if asked twice, or if there is no run yet."""
        assert self._main is not None
        if (self._leaving.is_set() or self.engine is None) and not self._main.cancelling():
            self._main.cancel()
        self._leaving.set()

    async def _observe(self, manifest: Manifest) -> None:
        incarnation, now = int(self._clock.wall()), self._swarm_clock.now()
        tier, history = manifest.observer_tier, History(manifest)
        engine = Engine(manifest, self._identity, tier, incarnation=incarnation, now=now, history=history)
        engine.addresses, engine.version = self.network.public_addresses(), self.metrics.version
        self._splits.window_s = manifest.window * manifest.slot_s
        collector = SwarmCollector(engine, self._splits, self._clock, self._swarm_clock)
        self.metrics.registry.register(collector)
        self.metrics.set_run(manifest.run_id.hex(), manifest.name, FOLDER)
        await self.network.open_directory(manifest.run_id)
        tasks = asyncio.TaskGroup()
        pump = Pump(engine, self._exchange, self.network, lambda event: self._obey(event, engine, collector), tasks)

        def introduce(peer: PeerId) -> None:
            engine.introduce(peer)
            pump.wake()

        self.engine, self._exchange.engine, self._exchange.on_input = engine, engine, pump.wake
        self.metrics.set_state("observing")
        log.info("observing", run_id=manifest.run_id.hex(), name=manifest.name)
        lag = EventLoopLag(self.metrics.event_loop_lag, self._clock)
        try:
            async with tasks:
                for part in (
                    lag.run(),
                    self.network.keep_alive(),
                    self.network.keep_knocking(self.network.bootstrap, introduce),
                    self.network.keep_listed(tier, introduce),
                    joiner.check_run(self.network, self._exchange, manifest),
                    pump.run(),
                    self._leave_when_told(),
                ):
                    tasks.create_task(part)
        except* _Left:
            self.metrics.set_state("leaving")
            await pump.say_goodbye()
            log.info("left")

    async def _leave_when_told(self) -> None:
        await self._leaving.wait()
        raise _Left

    def _obey(self, event: events.Event, engine: Engine, collector: SwarmCollector) -> None:
        self.metrics.note(event, engine)
        match event:
            case events.SlotBegan():
                self._swarm_clock.adjust()
                engine.addresses = self.network.public_addresses()
                self.metrics.peers.set(len(engine.live_peers()))
                self.metrics.clock_offset.set(self._swarm_clock.now() - self._clock.wall())
                shown = (state for member in engine.live_peers() for state in member.anchors.values())
                self._splits.look(self._clock.monotonic(), shown)
            case events.PeerMentioned(peer, addresses):
                self.network.remember(peer, addresses)
                engine.introduce(peer)
            case events.PeerJoined(peer, _, addresses):
                self.network.remember(peer, addresses)
            case events.SlotSettled(slot, fragment, certificate):
                if certificate is not None:
                    collector.certified_at_s = self._clock.monotonic()
                contributors = len(certificate.verdict.shares) if certificate else 0
                peers, apart = len(engine.live_peers()), len(self._splits.open_s())
                log.info(
                    f"slot {slot}", fragment=fragment, contributors=contributors, peers=peers, split_fragments=apart
                )
            case events.IdentityShared():
                raise self.network.identity_shared()


def run_observer(config: NodeConfig) -> int:
    """Observe in the foreground: the exit code."""

    async def main() -> None:
        observer = Observer(config, SystemClock())
        foreground.leave_when_told(observer.leave)
        await observer.run()

    return foreground.run(main())
