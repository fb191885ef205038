"""A simulated machine with one node on it: it boots, crashes, sleeps, fills its disk, and comes back from it.

What runs in it is the production code from joining to the last generation: `join_run`, `equip`, `Daemon` with its data
path, exchange, store. Left out are the operating system's side of a node (control socket, metrics server, sensors,
signals) and hivemind's daemon with the directory; see docs/SIMULATOR.md.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braniac.node import joiner
from braniac.node.clock import SwarmClock
from braniac.node.config import CapsSection, NetworkSection, NodeConfig, RunSection, StateSection, TrainSection
from braniac.node.daemon import Daemon
from braniac.node.exchange import Exchange
from braniac.node.metrics import Metrics
from braniac.node.network import Network
from braniac.node.p2pd import P2pdOptions
from braniac.node.replica import Replica
from braniac.node.startup import Equipment, equip, join_run
from braniac.node.status import Status
from braniac.node.store import Store
from braniac.protocol.engine import Engine
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest
from tests.sim.clocks import SimClock
from tests.sim.disk import PowerCut, SimDisk
from tests.sim.loop import HOST
from tests.sim.network import SimTransport, address_of
from tests.sim.training import InlineThread, Walker

if TYPE_CHECKING:
    from braniac.model.trainer import TrainSettings
    from tests.sim.world import World

CALL_TIMEOUT_S = 2.0
_DOORS = 2  # machines whose addresses the others are told; the first is the founder and is told none
_THREAD_S = 0.004  # most that work for a thread waits for its turn


class Machine:
    """What stays when its node dies: key, disk, wall clock."""

    def __init__(self, world: World, number: int, identity: Identity, tier: int, *, lean: bool) -> None:
        self.world = world
        self.number = number
        self.identity = identity
        self.tier = tier
        self.lean = lean
        self.root: Path = world.root / f"n{number}"
        self.wall_offset_s = 0.0
        self.drift = 0.0
        self.disk_full = False
        self.life: Life | None = None
        self.lives = 0

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def training(self) -> bool:
        """Whether its node takes part, as far as it knows itself."""
        life = self.life
        return life is not None and life.engine is not None and life.engine.ready and not life.resting

    def start(self) -> None:
        """Boot, and start the node."""
        assert self.life is None
        self.lives += 1
        self.life = Life(self)
        self.life.begin()

    def set_full(self, full: bool) -> None:
        """Let the disk take no more data, or take it again."""
        self.disk_full = full
        if self.life is not None:
            self.life.disk.full = full

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back; the monotonic one does not mind."""
        self.wall_offset_s += seconds
        if self.life is not None:
            self.life.clock.jump(seconds)


class Life:
    """One process, from start to end. It is the host of its callbacks."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.world = machine.world
        self.frozen = False
        self.held: list[asyncio.Handle] = []
        self.dead = False
        self.number = machine.lives
        self.disk = SimDisk(self.world.fired, machine.disk_full)
        self.clock = SimClock(
            self.world.loop, wall_s=self.world.true_time_s() + machine.wall_offset_s, drift=machine.drift
        )
        self.context = contextvars.copy_context()
        self.context.run(HOST.set, self)
        self.transport: SimTransport | None = None
        self.trainer: Walker | None = None
        self.equipment: Equipment | None = None
        self.replica: Replica | None = None
        self.engine: Engine | None = None
        self.daemon: Daemon | None = None
        self.task: asyncio.Task[None]
        self._rng = random.Random(f"threads {self.world.seed} {machine.number} {machine.lives}")
        self._spawned: list[asyncio.Task[None]] = []
        self._leave = asyncio.Event()
        self._wake: asyncio.Event | None = None
        """While it rests, or is about to."""

    # --- the host of its callbacks -----------------------------------------------------------------------------------

    def thread_delay_s(self) -> float:
        """See Host."""
        return 0.0 if self.dead else self._rng.uniform(0.0, _THREAD_S)

    def run_in_thread(self, work: Callable[[], Any]) -> Any:
        """See Host: where the power may fail."""
        try:
            return work()
        except PowerCut:
            self.kill("kill")
            raise

    # --- life and death ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the process."""
        self.task = self.world.loop.create_task(self._run(), context=self.context)
        self.task.add_done_callback(self._ended)

    def kill(self, mode: str) -> None:
        """End it without a word; `mode` says what the disk loses, see CrashingFiles."""
        if self.dead:
            return
        self.dead = True
        self.disk.lose_power(mode)
        if self.transport is not None:
            self.transport.fail()
        self.world.died(self)
        for task in (self.task, *self._spawned):
            task.cancel()  # so that what it had open is closed; nothing it does in the meantime has an effect
        self.world.loop.thaw(self)

    def leave(self) -> None:
        """Let it finish, save and say goodbye, as on SIGTERM."""
        self._leave.set()

    @property
    def resting(self) -> bool:
        """From the wish to rest until it is awake again."""
        return self._wake is not None

    def rest(self, *, finish: bool) -> None:
        """Rest for its owner's sake, until `wake`."""
        assert self._wake is None
        self._wake = asyncio.Event()
        self._spawned.append(self.world.loop.create_task(self._rest(finish, self._wake), context=self.context))

    def wake(self) -> None:
        """Go on, if it rests."""
        if self._wake is not None:
            self._wake.set()

    async def _rest(self, finish: bool, wake: asyncio.Event) -> None:
        """What the governor does."""
        assert self.daemon is not None
        await self.daemon.rest(finish=finish)
        await wake.wait()
        await self.daemon.wake()
        self._wake = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else _root(task.exception())
        expected = self.dead or error is None or isinstance(error, PowerCut)
        if not self.dead:
            self.dead = True
            if self.transport is not None:
                self.transport.fail()
            self.world.died(self)
        self.machine.life = None
        if not expected:
            self.world.violated("a node ended", self.machine.name, repr(error) + _place(error))

    # --- what the process does ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        machine = self.machine
        store = Store.open(machine.root, keep=2, files=self.disk)
        try:
            metrics = Metrics("simulated", 1)
            config = self._config()
            key = machine.root / "identity.key"
            network = Network(config.network, key, machine.identity, self.clock, start_transport=self._start_transport)
            swarm_clock = SwarmClock(self.clock)
            exchange = Exchange(store, metrics, self.clock, swarm_clock, CALL_TIMEOUT_S)
            self.equipment = Equipment(
                config, self.clock, swarm_clock, metrics, store, machine.identity, network, exchange
            )
            await network.start(exchange.answer)
            await self._take_part(self.equipment)
        finally:
            store.close()
            if self.transport is not None:
                self.transport.fail()

    def _config(self) -> NodeConfig:
        machine, world = self.machine, self.world
        others = [m for m in world.machines[:_DOORS] if m is not machine and machine.number]
        doors = tuple(address_of(m.identity.peer_id, m.number) for m in others)
        return NodeConfig(
            network=NetworkSection(peers=doors, call_timeout_s=CALL_TIMEOUT_S),
            run=RunSection(file=world.run_file),
            train=TrainSection(tier=machine.tier, batch=1, precision="lean" if machine.lean else "fp32"),
            state=StateSection(dir=machine.root),
            caps=CapsSection(),
        )

    async def _start_transport(self, path: Path, options: P2pdOptions) -> SimTransport:
        machine = self.machine
        self.transport = self.world.network.plug_in(machine.identity.peer_id, machine.number, self.context)
        return self.transport

    async def _make_trainer(self, node: Equipment, manifest: Manifest, tier: int, settings: TrainSettings) -> Walker:
        self.trainer = Walker(tier, manifest.seed, node.identity.peer_id)
        return self.trainer

    async def _take_part(self, node: Equipment) -> None:
        """As Service does it, without what only a real machine has."""
        membership = await join_run(node)
        saved = membership.saved
        async with equip(node, membership, self._make_trainer, InlineThread) as (replica, engine):
            self.replica, self.engine = replica, engine
            self.world.checks.began(self, membership)
            known = [addresses[0] for addresses in saved.peers.values() if addresses] if saved else []
            tasks = asyncio.TaskGroup()
            daemon = self.daemon = Daemon(node, membership, replica, engine, Status(node), tasks)
            try:
                async with tasks:
                    if saved is None and replica.anchors:
                        await daemon.path.commit()
                    daemon.open()
                    for part in (
                        node.network.keep_knocking([*node.network.bootstrap, *known], daemon.introduce),
                        joiner.check_run(node.network, node.exchange, membership.manifest),
                        daemon.drive(),
                        daemon.path.work(),
                        self._leave_when_told(daemon),
                    ):
                        tasks.create_task(part)
            except* _Left:
                await daemon.say_goodbye()

    async def _leave_when_told(self, daemon: Daemon) -> None:
        await self._leave.wait()
        await daemon.hand_over()
        raise _Left


class _Left(Exception):
    """Ends the tasks of a node that has handed over."""


def _root(error: BaseException | None) -> BaseException | None:
    """What really went wrong."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _place(error: BaseException | None) -> str:
    """Where it was raised."""
    if error is None or (trace := error.__traceback__) is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
