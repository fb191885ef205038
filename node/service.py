"""The life of a node: equip, take part in a run, leave.

One event loop, one trainer thread, p2pd as the only other process. Everything that runs is in one task group: if one
part fails, the node stops with a reason instead of limping.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import signal
import sys
from collections.abc import Iterable

import structlog

from braniac.node import identity_file, joiner
from braniac.node.clock import Clock, SwarmClock, SystemClock
from braniac.node.config import NodeConfig
from braniac.node.control import ControlServer
from braniac.node.daemon import Daemon
from braniac.node.exchange import Exchange
from braniac.node.governor import Governor
from braniac.node.logs import route_hivemind
from braniac.node.metrics import EventLoopLag, Metrics
from braniac.node.metrics_server import MetricsServer
from braniac.node.network import Network, TransportFactory
from braniac.node.policy import Policy
from braniac.node.sensors import Sensors
from braniac.node.startup import Equipment, equip, join_run
from braniac.node.status import Status
from braniac.node.store import Store
from braniac.node.transport_libp2p import LibP2PTransport
from braniac.protocol import limits
from braniac.protocol.engine import Engine

log = structlog.get_logger(__name__)

_KNOWN_MAX = 32  # peers of earlier days to knock at; the others come by introduction
_SWITCH_INTERVAL_S = 0.001  # the trainer holds the interpreter's lock; the event loop must get it back quickly


class _Left(Exception):
    """Ends the tasks of a node that has handed over."""


class Service:
    """One node, from start to leave."""

    def __init__(
        self, config: NodeConfig, clock: Clock, start_transport: TransportFactory = LibP2PTransport.start
    ) -> None:
        """Takes the state directory. Raises AlreadyRunning, ConfigError, IdentityFileError."""
        metrics = Metrics(importlib.metadata.version("braniac-node"), limits.PROTOCOL_VERSION)
        store = Store.open(config.state.dir, keep=config.state.keep_generations)
        identity_path = config.state.dir / "identity.key"
        identity = identity_file.load_or_create(identity_path)
        network = Network(config.network, identity_path, identity, clock, start_transport=start_transport)
        swarm_clock = SwarmClock(clock)
        exchange = Exchange(store, metrics, clock, swarm_clock, config.network.call_timeout_s)
        self.node = Equipment(config, clock, swarm_clock, metrics, store, identity, network, exchange)
        self.lag = EventLoopLag(metrics.event_loop_lag, clock)
        self.governor = Governor(Policy(), Sensors(), clock, config.policy.sample_s)
        self.status = Status(self.node, self.lag, self.governor, self.leave)
        self.daemon: Daemon | None = None
        """Its part in a run, once there is one."""
        self._main: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()

    async def run(self) -> None:
        """Take part in the run until told to leave. Raises what node, model and protocol raise."""
        self._main = asyncio.current_task()
        node = self.node
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(contextlib.suppress(asyncio.CancelledError))  # `leave` ends a node also while it starts
            stack.callback(node.store.close)
            await stack.enter_async_context(ControlServer(node.config.control_socket, self.status))
            if node.config.metrics.enabled:
                server = MetricsServer(node.metrics, node.config.metrics.host, node.config.metrics.port)
                await stack.enter_async_context(server)
                log.info("serving metrics", url=f"http://{node.config.metrics.host}:{server.port}/metrics")
            await node.network.start(node.exchange.answer)
            stack.push_async_callback(node.network.close)
            await self._take_part()

    def leave(self, *, now: bool = False) -> None:
        """Hand over and stop; at once if `now`, if asked twice, or if there is no run yet."""
        assert self._main is not None
        at_once = now or self._leaving.is_set() or self.status.engine is None
        if at_once and not self._main.cancelling():  # a third signal must not stop the cleaning up
            self._main.cancel()
        self._leaving.set()

    async def _take_part(self) -> None:
        """The node's life in a run."""
        node = self.node
        membership = await join_run(node)
        manifest, saved = membership.manifest, membership.saved
        async with equip(node, membership) as (replica, engine):
            await node.network.open_directory(manifest.run_id)
            known = [addresses[0] for addresses in saved.peers.values() if addresses] if saved else []
            tasks = asyncio.TaskGroup()
            daemon = self.daemon = Daemon(node, membership, replica, engine, self.status, tasks)
            try:
                async with tasks:
                    if saved is None and replica.anchors:
                        await daemon.commit()  # a founder killed right now must find its run again, not found another
                    daemon.open()
                    _say_how_to_join(engine, node.network.transport.addresses())
                    for part in (
                        self.lag.run(),
                        node.network.keep_alive(),
                        node.network.keep_knocking([*node.network.bootstrap, *known[:_KNOWN_MAX]], daemon.introduce),
                        node.network.keep_listed(engine.tier, daemon.introduce),
                        joiner.check_run(node.network, node.exchange, manifest),
                        replica.trainer.wait_failed(),
                        daemon.drive(),
                        daemon.work(),
                        self.governor.run(daemon),
                        self._leave_when_told(daemon),
                    ):
                        tasks.create_task(part)
            except* _Left:
                await daemon.say_goodbye()  # when nothing else is said any more

    async def _leave_when_told(self, daemon: Daemon) -> None:
        await self._leaving.wait()
        await daemon.hand_over()
        raise _Left


def _say_how_to_join(engine: Engine, addresses: Iterable[str]) -> None:
    """In the log, and on stdout for scripts and for people to copy."""
    run_id = engine.manifest.run_id.hex()
    log.info("taking part", run_id=run_id, name=engine.manifest.name, tier=engine.tier)
    sys.stdout.write(f"run {run_id}\n")
    for address in addresses:
        log.info("listening", address=address)
        sys.stdout.write(f"join with: braniac-node join --peers {address}\n")
    sys.stdout.flush()


def run_daemon(config: NodeConfig) -> int:
    """Run a node in the foreground: the exit code."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    route_hivemind()

    async def main() -> None:
        service = Service(config, SystemClock())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.leave)
        await service.run()

    if sys.platform == "win32":
        asyncio.run(main())
    else:
        import uvloop

        uvloop.run(main())
    return 0
