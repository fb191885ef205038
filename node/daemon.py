"""The data path of a node: join -> train -> compress -> offer -> merge -> apply -> checkpoint.

The protocol engine decides and this file carries out: `drive` gives it time and sends what it says, `_obey` starts
what it asks for, `work` does, in order, all that changes weights and anchors. How a node starts and ends is in
service.py; it trains in a thread of its own (trainer_thread.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine

import structlog

from braniac.node import joiner
from braniac.node.blobs import Blobs
from braniac.node.exchange import BlobUnavailable
from braniac.node.replica import Prepared, Replica, clipped
from braniac.node.startup import Equipment, Membership
from braniac.node.status import Status
from braniac.node.store import BlobMissing, DiskFull
from braniac.protocol import events, limits
from braniac.protocol.engine import Engine
from braniac.protocol.errors import WireError
from braniac.protocol.identity import PeerId, short_name
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.messages import FragmentState

log = structlog.get_logger(__name__)

_MESSAGES_PER_PEER_MAX = 16  # in flight: a peer that does not answer must not collect tasks
_DISK_RETRY_S = 1.0


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
        """`tasks` is where fetches, merges and messages run while `drive` and `work` go on."""
        self.node = node
        self._membership = membership
        self._replica = replica
        self._engine = engine
        self._status = status
        self._tasks = tasks
        self._blobs = Blobs(node.store, node.exchange, node.metrics)
        self._wake = asyncio.Event()
        self._leaving = asyncio.Event()
        self._idle = asyncio.Event()
        """Set while no slot that this node owns waits for its certificate."""
        self._awake = asyncio.Event()
        self._awake.set()
        self._resting = False
        self._catching_up = False
        """Back from a rest, and not yet where the others are."""
        self._took_part = False
        """Whether it has trained in this life, so that a fragment downloaded now costs own work."""
        self._ordered: asyncio.Queue[events.FragmentDue | events.UpdateDue | FragmentState] = asyncio.Queue()
        self._fetching: set[bytes] = set()
        self._in_flight: Counter[PeerId] = Counter()
        self._bar: joiner.DownloadBar | None = None

    # --- beginning and end -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Let peers in, and begin to train if all anchors are here."""
        node, engine = self.node, self._engine
        engine.addresses = node.network.public_addresses()
        self._status.take_part(engine, self._replica)
        node.exchange.manifest, node.exchange.engine = self._membership.signed, engine
        node.exchange.on_input = self._wake.set
        node.exchange.is_anchor = self._replica.is_anchor
        node.exchange.synchronised = True
        missing = [f for f in engine.manifest.held(engine.tier) if f not in engine.anchors()]
        if missing:
            node.metrics.set_state("joining")
            self._bar = joiner.DownloadBar(sum(map(self._replica.anchor_bytes, missing)))
            self._bar.start()
            self._status.bar = self._bar
        else:
            self._begin_training()

    def _begin_training(self) -> None:
        """All anchors are here: train, offer, sit in committees."""
        if self._leaving.is_set() or self._resting:
            return
        self._catching_up, self._took_part = False, True
        if self._bar is not None:
            self._bar.stop()
        self.node.metrics.set_state("training")
        self._engine.set_ready()
        self._replica.trainer.train()
        self._status.training_began()

    async def hand_over(self) -> None:
        """Finish the slots in hand, serve what only this node has, save."""
        log.info("leaving: finishing the slot in hand")
        self._leaving.set()
        self.node.metrics.set_state("leaving")
        self._replica.trainer.pause()
        await self._wind_down()

    async def _wind_down(self) -> None:
        """Take no more seats, let the slots in hand end, save."""
        self._engine.retire()
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3 * self._engine.manifest.slot_s):
                await self._idle.wait()
        await self._ordered.join()
        with contextlib.suppress(DiskFull):
            await self.commit()

    async def say_goodbye(self) -> None:
        """The last words, when nothing else is said any more: a heartbeat after them would bring this node back."""
        self._engine.goodbye()
        async with asyncio.TaskGroup() as farewell:
            for peer, data in self._engine.messages_to_send():
                farewell.create_task(self.node.exchange.send(self.node.network.transport, peer, data))

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
        if self._leaving.is_set():
            return
        self._awake.clear()
        self._wake.set()
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
        self._wake.set()

    # --- the engine's time, messages and events ----------------------------------------------------------------------

    async def drive(self) -> None:
        """Give the engine the time, send what it says, do what it asks for."""
        engine, clock = self._engine, self.node.swarm_clock
        while True:
            await self._awake.wait()
            engine.handle_timer(clock.now())
            self._flush()
            if self._catching_up and engine.caught_up:
                self._begin_training()
            if engine.busy:
                self._idle.clear()
            else:
                self._idle.set()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, engine.get_timer() - clock.now())):
                    await self._wake.wait()

    def _flush(self) -> None:
        while (event := self._engine.next_event()) is not None:
            self._obey(event)
        for peer, data in self._engine.messages_to_send():
            if self._in_flight[peer] < _MESSAGES_PER_PEER_MAX:
                self._in_flight[peer] += 1
                self._spawn(self._send(peer, data))

    async def _send(self, peer: PeerId, data: bytes) -> None:
        try:
            await self.node.exchange.send(self.node.network.transport, peer, data)
        finally:
            self._in_flight[peer] -= 1
            if not self._in_flight[peer]:
                del self._in_flight[peer]

    def _obey(self, event: events.Event) -> None:
        match event:
            case events.SlotBegan():
                self._engine.tokens_per_s = self._replica.trainer.progress.tokens_per_s
                self._engine.addresses = self.node.network.public_addresses()
                self.node.swarm_clock.adjust()
                self._status.slot_began(event)
            case events.FragmentDue() | events.UpdateDue():
                self._ordered.put_nowait(event)
            case events.BlobWanted():
                if event.digest not in self._fetching:
                    self._fetching.add(event.digest)
                    self._spawn(self._fetch(event))
            case events.MergeDue():
                self._spawn(self._merge(event))
            case events.FragmentLost():
                self._spawn(self._download(event))
            case events.FragmentUnheld(fragment):
                self._spawn(self._begin_fragment(fragment))
            case events.PeerMentioned(peer, addresses):
                self.node.network.remember(peer, addresses)
                self.introduce(peer)
            case events.PeerJoined(peer, tier, addresses):
                self.node.network.remember(peer, addresses)
                log.info("a peer joined", peer=short_name(peer), tier=tier)
            case events.PeerLeft(peer, said_goodbye):
                log.info("a peer left" if said_goodbye else "a peer fell silent", peer=short_name(peer))
            case events.SlotSettled() | events.Equivocated():
                self._status.report(event)
            case events.IdentityShared():
                raise self.node.network.identity_shared()

    def introduce(self, peer: PeerId) -> None:
        self._engine.introduce(peer)
        self._wake.set()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.create_task(work)

    # --- the data path -----------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """All that changes weights, anchors or generations, one at a time and in the engine's order."""
        while True:
            job = await self._ordered.get()
            try:
                while not await self._do(job):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_DISK_RETRY_S):
                            await self._leaving.wait()
            finally:
                self._ordered.task_done()
                self._wake.set()

    async def _do(self, job: events.FragmentDue | events.UpdateDue | FragmentState) -> bool:
        """Whether a job is done with; if not, it must be tried again.

        On a full disk an offer is given up: the work stays in the weights until its turn comes again. A change of an
        anchor waits for space, because without it this node's anchor would differ from everybody's.
        """
        try:
            match job:
                case events.FragmentDue(slot, fragment):
                    await self._contribute(slot, fragment)
                case events.UpdateDue():
                    await self._apply(job)
                case FragmentState():
                    await self._restore(job)
        except DiskFull as error:
            self.node.metrics.checkpoint_failures.inc()
            self._status.trouble("disk", str(error))
            return isinstance(job, events.FragmentDue) or self._leaving.is_set()
        except BlobMissing as error:
            # The disk has lost an anchor or an update: in this fragment we are like a joiner, and ask the others.
            log.error("a fragment is damaged on disk, downloading it", fragment=job.fragment, reason=str(error))
            self._replica.lose(job.fragment)
            self._engine.fragment_damaged(job.fragment)
        return True

    async def _contribute(self, slot: int, fragment: int) -> None:
        """Compress the uncommitted work on the fragment that is due, make it durable, offer it."""
        if slot < self._engine.slot - limits.PROPOSAL_OPEN_SLOTS or fragment not in self._replica.anchors:
            return
        with self._status.phase("compress"):
            prepared = await self._replica.compress(fragment)
            self._replica.pin(prepared.digest, slot)
        with self._status.phase("checkpoint"):
            await self.commit((slot, prepared))
        self._engine.offer(slot, prepared.digest, prepared.size, prepared.tokens)
        self._engine.blob_fetched(prepared.digest, True, self.node.swarm_clock.now())
        self._status.offered(slot, prepared.size)

    async def _apply(self, update: events.UpdateDue) -> None:
        """Apply a certificate: the anchor moves, the weights follow, own work that was taken is subtracted."""
        if update.fragment not in self._engine.history.last:
            return  # the fragment was lost meanwhile: the update is in what is downloaded, or comes again
        with self._status.phase("apply"):
            try:
                state = await self._replica.apply(update)
            except WireError as error:  # a committee that signed nonsense: nobody can apply it, so nobody does
                self.node.metrics.refuse_message(error.refusal)
                log.error(
                    "a certified update cannot be applied", slot=update.certificate.verdict.slot, reason=str(error)
                )
                return
        self._engine.anchor_moved(update, state)
        if update.undo:
            self.node.metrics.divergences.labels("fork").inc()
        elif clipped(update, self.node.identity.peer_id):
            self._status.forfeit("clipped")

    async def _restore(self, state: FragmentState) -> None:
        """A fragment was downloaded: take it over."""
        again = self._took_part
        try:
            await self._replica.restore(state)
        except WireError as error:  # asked for again after a window, in the state that the others hold then
            self.node.metrics.refuse_message(error.refusal)
            log.error("a downloaded fragment cannot be used", fragment=state.fragment, reason=str(error))
            return
        self._engine.fragment_restored(state)
        if again:
            self._status.forfeit("too_old")
            self.node.metrics.divergences.labels("digest").inc()
        elif len(self._engine.anchors()) == len(self._engine.manifest.held(self._engine.tier)):
            self._begin_training()

    async def commit(self, offer: tuple[int, Prepared] | None = None) -> None:
        """Make a generation: what a crash from now on goes back to."""
        now = self.node.swarm_clock.now()
        clock = (now - self.node.clock.wall(), now)
        peers = self.node.network.known_peers()
        await self._replica.commit(self._engine, self._membership.incarnation, clock, peers, offer)
        self.node.metrics.checkpoint_generation.set(self._replica.generation)
        self._status.trouble("disk", "")

    async def _fetch(self, wanted: events.BlobWanted) -> None:
        """Bring a contribution or an update here."""
        self._replica.pin(wanted.digest, self._engine.slot)
        ok = True
        try:
            with self._status.phase("fetch"):
                transport = self.node.network.transport
                await self._blobs.fetch(transport, wanted.digest, wanted.size, wanted.holders)
        except (BlobUnavailable, DiskFull) as error:
            log.debug("could not fetch", reason=str(error))
            ok = False
        finally:
            self._fetching.discard(wanted.digest)
        self._engine.blob_fetched(wanted.digest, ok, self.node.swarm_clock.now())
        self._wake.set()

    async def _merge(self, due: events.MergeDue) -> None:
        """Merge the contributions to a slot that this node owns."""
        merged: Merged | None = None
        with self._status.phase("merge"):
            try:
                merged = await asyncio.to_thread(self._merge_now, due)
            except (BlobMissing, DiskFull) as error:
                log.warning("could not merge a slot", slot=due.slot, reason=str(error))
        self._engine.merged(due.slot, merged)
        self._wake.set()

    def _merge_now(self, due: events.MergeDue) -> Merged | None:
        store = self.node.store
        contributions = [Contribution(peer, tokens, store.get(digest)) for peer, tokens, digest in due.contributions]
        merged = merge(self._engine.manifest, due.fragment, contributions)
        if merged is not None:
            self._replica.pin(merged.digest, due.slot)
            store.put(merged.update)
        return merged

    async def _download(self, lost: events.FragmentLost) -> None:
        """Download an anchor that is missing or wrong here."""
        fragment = lost.state.fragment
        if self._engine.ready:
            log.warning("downloading a fragment again", fragment=fragment, slot=lost.state.slot)
        self._replica.pin(lost.state.digest, self._engine.slot)
        try:
            await self._blobs.fetch(
                self.node.network.transport,
                lost.state.digest,
                self._replica.anchor_bytes(fragment),
                lost.holders,
                "anchor",
                self._bar.advance if self._bar else _ignore,
            )
        except (BlobUnavailable, DiskFull) as error:
            log.debug("could not download a fragment", fragment=fragment, reason=str(error))
            self._engine.fragment_unavailable(fragment)
        else:
            self._ordered.put_nowait(lost.state)
        self._wake.set()

    async def _begin_fragment(self, fragment: int) -> None:
        """Nobody holds this fragment: start it from the run's initial weights."""
        log.warning("nobody holds a fragment, starting it anew", fragment=fragment)
        try:
            state = await asyncio.to_thread(self._replica.initial_state, fragment, self._engine.slot)
        except DiskFull as error:
            self._status.trouble("disk", str(error))
            self._engine.fragment_unavailable(fragment)
            return
        self._ordered.put_nowait(state)
        self._wake.set()


def _ignore(count: int) -> None:
    """Nobody watches this download."""
