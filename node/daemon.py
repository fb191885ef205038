"""A node's part in a run: it drives the protocol engine, and knows whether the node joins, trains, rests or leaves.

`drive` gives the engine time and sends what it says, `_obey` starts what it asks for; most of that is the data path
(datapath.py). How a node starts and ends is in service.py; it trains in a thread of its own (trainer_thread.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine

import structlog

from braniac.node.datapath import DataPath
from braniac.node.pacing import Pacing
from braniac.node.pump import Pump
from braniac.node.replica import Replica
from braniac.node.startup import Equipment, Membership
from braniac.node.status import Status
from braniac.node.whereabouts import Whereabouts
from braniac.protocol import events
from braniac.protocol.engine import Engine
from braniac.protocol.identity import PeerId, short_name

log = structlog.get_logger(__name__)


class Daemon:
    """One node's part in a run."""

    def __init__(
        self,
        node: Equipment,
        membership: Membership,
        replica: Replica,
        engine: Engine,
        status: Status,
        tasks: asyncio.TaskGroup,
    ) -> None:
        """`tasks` is where fetches, merges and messages run while `drive` and `path.work` go on."""
        self.node = node
        self._membership = membership
        self._replica = replica
        self._engine = engine
        self._status = status
        self._tasks = tasks
        self._whereabouts = Whereabouts(engine, lambda peer: node.network.transport.seen_from(peer))
        self._pacing = Pacing(node.exchange.throttle, engine.manifest, engine.tier, node.config.caps.upload_pace)
        self._pump = Pump(engine, node.exchange, node.network, self._obey, tasks)
        self._idle = asyncio.Event()
        """Set while no slot that this node owns waits for its certificate."""
        self._awake = asyncio.Event()
        """Cleared while the node is at rest and the engine gets no time."""
        self._awake.set()
        self._knows_others = membership.saved is not None and bool(membership.saved.peers)
        """By what is on disk. Whoever knows nobody goes by its wall clock when it starts, however wrong that is."""
        self._leaving = False
        self._resting = False
        """From the wish to rest until `wake`."""
        self._catching_up = False
        """Back from a rest, and not yet where the others are."""
        self.path = DataPath(
            node,
            replica,
            engine,
            status,
            incarnation=membership.incarnation,
            joined=self._begin_training,
            wake=self._pump.wake,
        )

    # --- beginning and end -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Let peers in, and begin to train if all anchors are here."""
        node, engine = self.node, self._engine
        engine.addresses, engine.version = node.network.public_addresses(), node.metrics.version
        self._status.take_part(engine, self._replica)
        node.exchange.manifest, node.exchange.engine = self._membership.signed, engine
        node.exchange.on_input = self._pump.wake
        node.exchange.is_anchor = self._replica.is_anchor
        node.exchange.synchronised = True
        self._spawn(self.path.note_signing(engine.slot))
        if self.path.join():
            self._begin_training()
        else:
            node.metrics.set_state("joining")

    def _begin_training(self) -> None:
        """All anchors are here."""
        if self._leaving or self._resting:
            return
        self._catching_up = False
        self.node.metrics.set_state("training")
        self.path.train()

    async def hand_over(self) -> None:
        """Finish the slots in hand, serve what only this node has, save."""
        log.info("leaving: finishing the slot in hand")
        self._leaving = True
        self.path.hurry()
        self.node.metrics.set_state("leaving")
        self._replica.trainer.pause()
        await self._wind_down()

    async def _wind_down(self) -> None:
        """Take no more seats, let the slots in hand end, save."""
        self._engine.retire()
        self._pump.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3 * self._engine.manifest.slot_s):
                await self._idle.wait()
        await self.path.finish()

    async def say_goodbye(self) -> None:
        """The last words of a node that leaves or rests."""
        await self._pump.say_goodbye()

    # --- resting -----------------------------------------------------------------------------------------------------

    async def rest(self, *, finish: bool) -> None:
        """Stop training, now or when the slot in hand is over, and then all traffic; the others count on nothing here.

        What was trained stays in the weights and is offered after `wake`.
        """
        log.info("resting: finishing the slot in hand" if finish else "resting")
        self._resting = True
        if not finish:
            self._replica.trainer.pause()
        self.node.metrics.set_state("paused")
        await self._wind_down()
        self._replica.trainer.pause()
        if self._leaving:
            return
        self._awake.clear()
        self._pump.wake()
        self.node.exchange.engine = None
        self.node.network.rest()
        await self.say_goodbye()
        log.info("at rest", generation=self._replica.generation)

    async def wake(self) -> None:
        """Go on after `rest`: first listen, then train and take part."""
        log.info("going on")
        self._resting, self._catching_up = False, True
        self.node.exchange.engine = self._engine
        self.node.network.wake()
        self.node.metrics.set_state("joining")
        self._engine.rejoin(self.node.swarm_clock.now())
        for peer in self.node.network.known_peers():
            self._engine.introduce(peer)
        self._awake.set()
        self._pump.wake()

    # --- the engine's time, messages and events ----------------------------------------------------------------------

    async def drive(self) -> None:
        """Give the engine the time, send what it says, do what it asks for."""
        engine = self._engine
        while True:
            await self._awake.wait()
            self._pump.turn()
            if self._catching_up and engine.caught_up:
                self._begin_training()
            if engine.busy:
                self._idle.clear()
            else:
                self._idle.set()
            await self._pump.wait()

    def _obey(self, event: events.Event) -> None:
        match event:
            case events.SlotBegan():
                progress = self._replica.trainer.progress
                self._engine.tokens_per_s, self._engine.loss = progress.tokens_per_s, progress.loss
                self._engine.addresses = self.node.network.public_addresses()
                self.node.swarm_clock.adjust()
                self._status.slot_began(event)
                self._pacing.follow(1 + len(self._engine.live_peers()))
                self._spawn(self.path.note_signing(event.slot))
                self._spawn(self._whereabouts.look(event.slot))
            case events.FragmentDue() | events.UpdateDue():
                self.path.put(event)
            case events.BlobWanted():
                self._spawn(self.path.fetch(event))
            case events.MergeDue():
                self._spawn(self.path.merge(event))
            case events.CheckDue():
                self._spawn(self.path.check(event))
            case events.FragmentLost():
                self._spawn(self.path.download(event))
            case events.FragmentUnheld(fragment):
                self._spawn(self.path.begin_fragment(fragment))
            case events.PeerMentioned(peer, addresses):
                self.node.network.remember(peer, addresses)
                self.introduce(peer)
            case events.PeerJoined(peer, tier, addresses):
                self.node.network.remember(peer, addresses)
                self._spawn(self._whereabouts.locate(peer))
                log.info("a peer joined", peer=short_name(peer), tier=tier)
                if self._engine.ready and not self._knows_others:
                    self._knows_others = True
                    self.path.save()
            case events.PeerLeft(peer, said_goodbye):
                log.info("a peer left" if said_goodbye else "a peer fell silent", peer=short_name(peer))
            case events.SlotSettled() | events.Equivocated() | events.WrongMerge():
                self._status.report(event)
            case events.IdentityShared():
                raise self.node.network.identity_shared()

    def introduce(self, peer: PeerId) -> None:
        self._engine.introduce(peer)
        self._pump.wake()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.create_task(work)
