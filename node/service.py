"""The life of a node: equip, take part in a run, leave.

One event loop, one trainer thread, p2pd as the only other process. Everything that runs is in one task group: if one
part fails, the node stops with a reason instead of limping.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import random
import sys
from collections.abc import Iterable

import structlog

from braniac.node import daily_meter, foreground, identity_file, joiner
from braniac.node.answers import Answers
from braniac.node.clock import Clock, SwarmClock, SystemClock
from braniac.node.config import NodeConfig
from braniac.node.consent import Ask
from braniac.node.control import NO_SLOTS, ControlServer
from braniac.node.daemon import Daemon
from braniac.node.daily_meter import DailyMeter
from braniac.node.dial_back import DialBacks
from braniac.node.exchange import Exchange
from braniac.node.governor import Governor
from braniac.node.join_link import link_for
from braniac.node.log_view import log_path
from braniac.node.logs import log_to_file
from braniac.node.metrics import EventLoopLag, Metrics
from braniac.node.metrics_server import MetricsServer
from braniac.node.network import Network, TransportFactory
from braniac.node.policy import Policy
from braniac.node.reachability import Reachability
from braniac.node.sensors import Sensors
from braniac.node.startup import Equipment, equip, join_run
from braniac.node.status import Status
from braniac.node.store import Store
from braniac.node.systemd import Notifier, Pulse, describe_status
from braniac.node.throttle import Throttle
from braniac.node.transport_libp2p import LibP2PTransport
from braniac.node.web import WebServer
from braniac.protocol import limits
from braniac.protocol.engine import Engine

log = structlog.get_logger(__name__)

_KNOWN_MAX = 32  # peers of earlier days to knock at; the others come by introduction
_STILL_SLOTS_MAX = 5  # without a new slot for so many, and a minute, the node hangs


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
        self.meter = DailyMeter(config.state.dir / daily_meter.FILE_NAME, clock)
        throttle = Throttle(config.caps, clock, self.meter)
        exchange = Exchange(store, metrics, clock, swarm_clock, config.network.call_timeout_s, throttle)
        exchange.dial_back = DialBacks(
            lambda peer: network.transport.seen_from(peer), lambda *place: network.transport.probe(*place), clock
        ).answer
        network.on_version = exchange.hear_version
        self.node = Equipment(config, clock, swarm_clock, metrics, store, identity, network, exchange)
        metrics.checkpoint_time.set(clock.wall())
        metrics.quota.set(throttle.daily_bytes)
        metrics.quota_used.set_function(self.meter.used_bytes)
        self.lag = EventLoopLag(metrics.event_loop_lag, clock, resting=lambda: self.governor.resting)
        policy = Policy(config.policy, config.caps)
        sensors = Sensors(config.state.dir, clock, self.meter.used_bytes)
        self.governor = Governor(policy, sensors, clock, config.policy.sample_s, metrics)
        self.status = Status(self.node)
        self.answers = Answers(self.node, self.status, self.lag, self.governor, self.leave)
        self.daemon: Daemon | None = None
        """Its part in a run, once there is one."""
        self._notifier = Notifier(os.environ)
        self._pulse = Pulse(clock)
        self._main: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()

    async def run(self) -> None:
        """Take part in the run until told to leave. Raises what node, model and protocol raise."""
        self._main = asyncio.current_task()
        node = self.node
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(contextlib.suppress(asyncio.CancelledError))  # `leave` ends a node also while it starts
            stack.callback(node.store.close)
            stack.callback(self.meter.save)
            await stack.enter_async_context(ControlServer(node.config.control_socket, self.answers))
            if node.config.metrics.enabled:
                server = MetricsServer(node.metrics, node.config.metrics.host, node.config.metrics.port)
                await stack.enter_async_context(server)
                log.info("serving metrics", url=f"http://{node.config.metrics.host}:{server.port}/metrics")
            if node.config.web.enabled:
                web = await stack.enter_async_context(WebServer(self.answers, node.config.web.port))
                log.info("serving the web page", url=web.url)
            await node.network.start(node.exchange.answer)
            stack.push_async_callback(node.network.close)
            await stack.enter_async_context(self._notifier.telling(self._describe, self._is_well))
            await self._take_part()

    def leave(self, *, now: bool = False) -> None:
        """Hand over and stop; at once if `now`, if asked twice, or if there is no run yet."""
        assert self._main is not None
        self._notifier.tell("STOPPING=1")
        at_once = now or self._leaving.is_set() or self.status.engine is None
        if at_once and not self._main.cancelling():  # a third signal must not stop the cleaning up
            self._main.cancel()
        self._leaving.set()

    def _describe(self) -> str:
        return describe_status(self.answers.status(NO_SLOTS))

    def _is_well(self) -> bool:
        engine = self.status.engine
        if engine is None or self.governor.resting:
            return self._pulse.beats(None, 0.0)
        return self._pulse.beats(engine.slot, 60.0 + _STILL_SLOTS_MAX * engine.manifest.slot_s)

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
            dialled = self.answers.dialled = Reachability(
                node.network, node.exchange, engine, node.clock, random.Random()
            )
            try:
                async with tasks:
                    if saved is None and replica.anchors:
                        await daemon.path.commit()  # a founder killed now must find its run again, not found another
                    daemon.open()
                    _say_how_to_join(engine, node.network.transport.addresses(), node.network.public_addresses())
                    for part in (
                        self.lag.run(),
                        node.network.keep_alive(),
                        node.network.keep_knocking([*node.network.bootstrap, *known[:_KNOWN_MAX]], daemon.introduce),
                        node.network.keep_listed(engine.tier, daemon.introduce),
                        joiner.check_run(node.network, node.exchange, manifest),
                        replica.trainer.wait_failed(),
                        daemon.drive(),
                        daemon.path.work(),
                        self.governor.run(daemon),
                        dialled.keep(),
                        self.meter.keep_saved(),
                        self._leave_when_told(daemon),
                    ):
                        tasks.create_task(part)
            except* _Left:
                await daemon.say_goodbye()  # when nothing else is said any more
                log.info("left", generation=replica.generation)

    async def _leave_when_told(self, daemon: Daemon) -> None:
        await self._leaving.wait()
        await daemon.hand_over()
        raise _Left


def _say_how_to_join(engine: Engine, addresses: Iterable[str], public: Iterable[str]) -> None:
    """In the log, and on stdout for scripts and for people to copy."""
    run_id = engine.manifest.run_id.hex()
    log.info("taking part", run_id=run_id, name=engine.manifest.name, tier=engine.tier)
    sys.stdout.write(f"run {run_id}\n")
    for address in addresses:
        log.info("listening", address=address)
        sys.stdout.write(f"join with: braniac-node join --peers {address}\n")
    if (link := link_for(run_id, public)).addresses:
        sys.stdout.write(f"join link: {link}\n")
    sys.stdout.flush()


def _log_file(config: NodeConfig) -> contextlib.AbstractContextManager[None]:
    if not config.log.file:
        return contextlib.nullcontext()
    return log_to_file(log_path(config.state.dir), int(config.log.file_mib * (1 << 20)), config.log.files_kept)


def run_daemon(config: NodeConfig, ask: Ask | None = None) -> int:
    """Run a node in the foreground: the exit code. `ask` asks before the first download."""

    async def main() -> None:
        service = Service(config, SystemClock())
        service.node.ask = ask
        foreground.leave_when_told(service.leave)
        with _log_file(config):  # the state directory is ours now
            await service.run()

    return foreground.run(main())
