"""The data path of a node: join -> train -> compress -> offer -> merge -> apply -> checkpoint.

The protocol engine decides and this file carries out. `work` does, one at a time and in the engine's order, all that
changes weights, anchors or generations. `download`, `fetch`, `merge` and `check` go on beside it: they only bring blobs
here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from braniac.node.blobs import Blobs
from braniac.node.exchange import BlobUnavailable
from braniac.node.joiner import DownloadBar
from braniac.node.replica import Prepared, Replica, clipped
from braniac.node.startup import Equipment
from braniac.node.status import Status
from braniac.node.store import BlobMissing, DiskFull
from braniac.protocol import events, limits
from braniac.protocol.engine import Engine
from braniac.protocol.errors import WireError
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.messages import FragmentState

log = structlog.get_logger(__name__)

_DISK_RETRY_S = 1.0
_GRACE_SLOTS = 0.5  # so long a peer that is asked for a blob may be silent, if somebody else may have it
_PATIENCE_SLOTS = 2.0  # so long it may take: its uplink may be paced, and others pull from it as well


@dataclass(frozen=True)
class _Save:
    """Make a generation: in its turn, because one made during an update would not show one moment."""


class DataPath:
    """Moves this node's work to the others, and theirs into its weights."""

    def __init__(
        self,
        node: Equipment,
        replica: Replica,
        engine: Engine,
        status: Status,
        *,
        incarnation: int,
        joined: Callable[[], None],
        wake: Callable[[], None],
    ) -> None:
        """`joined` is called when the last missing anchor is here, `wake` when the engine has been told something."""
        self._node = node
        self._replica = replica
        self._engine = engine
        self._status = status
        self._incarnation = incarnation
        self._joined = joined
        self._wake = wake
        slot_s = engine.manifest.slot_s
        self._blobs = Blobs(
            node.store, node.exchange, node.metrics, node.clock,
            grace_s=slot_s * _GRACE_SLOTS, patience_s=slot_s * _PATIENCE_SLOTS,
        )  # fmt: skip
        self._ordered: asyncio.Queue[events.FragmentDue | events.UpdateDue | FragmentState | _Save] = asyncio.Queue()
        self._fetching: set[bytes] = set()
        self._bar: DownloadBar | None = None
        self._took_part = False
        """Whether it has trained in this life, so that a fragment downloaded now costs own work."""
        self._disowned: set[bytes] = set()
        """Offers whose work is not in the weights any more."""
        self._hurry = asyncio.Event()
        """Set when the node leaves: nothing waits for a full disk any more."""

    # --- order -------------------------------------------------------------------------------------------------------

    def put(self, due: events.FragmentDue | events.UpdateDue) -> None:
        """Hand in what `work` shall do next."""
        self._ordered.put_nowait(due)

    async def work(self) -> None:
        """All that changes weights, anchors or generations, one at a time and in the engine's order."""
        while True:
            job = await self._ordered.get()
            try:
                while not await self._do(job):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_DISK_RETRY_S):
                            await self._hurry.wait()
            finally:
                self._ordered.task_done()
                self._wake()

    async def _do(self, job: events.FragmentDue | events.UpdateDue | FragmentState | _Save) -> bool:
        """Whether a job is done with; if not, it must be tried again.

        On a full disk an offer is given up: the work stays in the weights until its turn comes again. So is a save: the
        last generation stays. A change of an anchor waits for space, because without it this node's anchor would differ
        from everybody's.
        """
        try:
            match job:
                case events.FragmentDue(slot, fragment):
                    await self._contribute(slot, fragment)
                case events.UpdateDue():
                    await self._apply(job)
                case FragmentState():
                    await self._restore(job)
                case _Save():
                    await self.commit()
        except DiskFull as error:
            self._node.metrics.checkpoint_failures.inc()
            self._status.trouble("disk", str(error))
            return isinstance(job, events.FragmentDue | _Save) or self._hurry.is_set()
        except BlobMissing as error:
            if isinstance(job, _Save):
                raise
            # The disk has lost an anchor or an update: in this fragment we are like a joiner, and ask the others.
            log.error("a fragment is damaged on disk, downloading it", fragment=job.fragment, reason=str(error))
            self._replica.lose(job.fragment)
            self._engine.fragment_damaged(job.fragment)
        return True

    def save(self) -> None:
        """Make a generation when what is in hand is done, if there is space."""
        self._ordered.put_nowait(_Save())

    async def finish(self) -> None:
        """Do what is in hand, then save it if there is space."""
        await self._ordered.join()
        self.save()
        await self._ordered.join()

    def hurry(self) -> None:
        """The node leaves: wait for a full disk no longer."""
        self._hurry.set()

    # --- join --------------------------------------------------------------------------------------------------------

    def join(self) -> bool:
        """Whether all anchors are here. If not, the engine will ask for those that are missing, and a bar shows it."""
        missing = self._missing()
        if missing:
            self._bar = self._status.bar = DownloadBar(sum(map(self._replica.anchor_bytes, missing)))
            self._bar.start()
        return not missing

    def _missing(self) -> list[int]:
        anchors = self._engine.anchors()
        return [fragment for fragment in self._engine.manifest.held(self._engine.tier) if fragment not in anchors]

    async def download(self, lost: events.FragmentLost) -> None:
        """Download an anchor that is missing or wrong here."""
        fragment = lost.state.fragment
        if self._engine.ready:
            log.warning("downloading a fragment again", fragment=fragment, slot=lost.state.slot)
        self._replica.pin(lost.state.digest, self._engine.slot)
        try:
            await self._blobs.fetch(
                self._node.network.transport,
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
        self._wake()

    async def begin_fragment(self, fragment: int) -> None:
        """Nobody holds this fragment: start it from the run's initial weights."""
        log.warning("nobody holds a fragment, starting it anew", fragment=fragment)
        try:
            state = await asyncio.to_thread(self._replica.initial_state, fragment, self._engine.slot)
        except DiskFull as error:
            self._status.trouble("disk", str(error))
            self._engine.fragment_unavailable(fragment)
            return
        self._ordered.put_nowait(state)
        self._wake()

    async def _restore(self, state: FragmentState) -> None:
        """A fragment was downloaded: take it over."""
        again = self._took_part
        try:
            await self._replica.restore(state)
        except WireError as error:  # asked for again after a window, in the state that the others hold then
            self._node.metrics.refuse_message(error.refusal)
            log.error("a downloaded fragment cannot be used", fragment=state.fragment, reason=str(error))
            return
        self._engine.fragment_restored(state)
        if again:
            self._status.forfeit("too_old")
            self._node.metrics.divergences.labels("digest").inc()
        elif not self._missing():
            self._joined()

    # --- train -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """All anchors are here: train, offer, sit in committees."""
        self._took_part = True
        if self._bar is not None:
            self._bar.stop()
        self._engine.set_ready()
        self._replica.trainer.train()
        self._status.training_began()

    # --- compress, offer ---------------------------------------------------------------------------------------------

    async def _contribute(self, slot: int, fragment: int) -> None:
        """Compress the uncommitted work on the fragment that is due, make it durable, offer it."""
        if slot < self._engine.slot - limits.PROPOSAL_OPEN_SLOTS or fragment not in self._replica.anchors:
            return
        if self._replica.trainer.progress.stalled:
            await self._start_over()
            return
        with self._status.phase("compress"):
            prepared = await self._replica.compress(fragment)
            self._replica.pin(prepared.digest, slot)
        with self._status.phase("checkpoint"):
            await self.commit((slot, prepared))
        self._engine.offer(slot, prepared.digest, prepared.size, prepared.tokens)
        self._engine.blob_fetched(prepared.digest, True, self._node.swarm_clock.now())
        self._status.offered(slot, prepared.size)

    async def _start_over(self) -> None:
        """Training went wrong: nothing is offered, and the weights go back to what the swarm agreed on."""
        log.error("the loss is not finite or jumped, going back to the agreed weights")
        await self._replica.start_over()
        self._disowned = set().union(*map(self._engine.history.disown, self._replica.anchors))
        self._status.forfeit("diverged")
        self._node.metrics.divergences.labels("loss").inc()

    # --- merge -------------------------------------------------------------------------------------------------------

    async def fetch(self, wanted: events.BlobWanted) -> None:
        """Bring a contribution or an update here, unless it is on its way already."""
        if wanted.digest in self._fetching:
            return
        self._fetching.add(wanted.digest)
        self._replica.pin(wanted.digest, self._engine.slot)
        ok = True
        try:
            with self._status.phase("fetch"):
                transport = self._node.network.transport
                await self._blobs.fetch(transport, wanted.digest, wanted.size, wanted.holders, patient=wanted.patient)
        except (BlobUnavailable, DiskFull) as error:
            log.debug("could not fetch", reason=str(error))
            ok = False
        finally:
            self._fetching.discard(wanted.digest)
        self._engine.blob_fetched(wanted.digest, ok, self._node.swarm_clock.now())
        self._wake()

    async def note_signing(self, slot: int) -> None:
        """Let the engine sign in the slots ahead, once it is durable that it may have done so."""
        first, last = max(0, slot - limits.PROPOSAL_OPEN_SLOTS), slot + limits.SIGNING_AHEAD_SLOTS
        if last < first:
            return  # the run has not begun
        try:
            noted = await asyncio.to_thread(self._node.store.marks.note_signing, first, last)
        except DiskFull as error:
            self._status.trouble("disk", str(error))
            return
        self._engine.may_sign(noted)

    async def merge(self, due: events.MergeDue) -> None:
        """Merge the contributions to a slot that this node owns."""
        merged: Merged | None = None
        with self._status.phase("merge"):
            try:
                merged = await asyncio.to_thread(self._merge_now, due)
            except (BlobMissing, DiskFull) as error:
                log.warning("could not merge a slot", slot=due.slot, reason=str(error))
        self._engine.merged(due.slot, merged)
        self._wake()

    async def check(self, due: events.CheckDue) -> None:
        """Merge what another owner has merged, to see whether it is right; then the update need not be fetched."""
        with self._status.phase("check"):
            try:
                merged = await asyncio.to_thread(self._merge_now, due)
            except (BlobMissing, DiskFull) as error:
                log.warning("could not check a slot", slot=due.slot, reason=str(error))
                self._engine.check_failed(due.slot)
            else:
                self._engine.checked(due.slot, merged)
        self._wake()

    def _merge_now(self, due: events.MergeDue | events.CheckDue) -> Merged | None:
        store = self._node.store
        contributions = [Contribution(peer, tokens, store.get(digest)) for peer, tokens, digest in due.contributions]
        merged = merge(self._engine.manifest, due.fragment, contributions)
        if merged is not None:
            self._replica.pin(merged.digest, due.slot)
            store.put(merged.update)
        return merged

    # --- apply, checkpoint -------------------------------------------------------------------------------------------

    async def _apply(self, update: events.UpdateDue) -> None:
        """Apply a certificate: the anchor moves, the weights follow, own work that was taken is subtracted."""
        if not self._engine.history.wanted(update.certificate):
            return  # the fragment was lost or downloaded meanwhile: the update is in what came, or comes again
        if update.acknowledged in self._disowned:
            update = replace(update, acknowledged=None)
        with self._status.phase("apply"):
            try:
                state = await self._replica.apply(update)
            except WireError as error:  # a committee that signed nonsense: nobody can apply it, so nobody does
                self._node.metrics.refuse_message(error.refusal)
                log.error(
                    "a certified update cannot be applied", slot=update.certificate.verdict.slot, reason=str(error)
                )
                return
        self._engine.anchor_moved(update, state)
        if update.undo:
            self._node.metrics.divergences.labels("fork").inc()
        elif clipped(update, self._node.identity.peer_id):
            self._status.forfeit("clipped")

    async def commit(self, offer: tuple[int, Prepared] | None = None) -> None:
        """Make a generation: what a crash from now on goes back to. Raises DiskFull.

        Once `work` runs, `finish` is how others ask for one.
        """
        now = self._node.swarm_clock.now()
        clock = (now - self._node.clock.wall(), now)
        peers = self._node.network.known_peers()
        await self._replica.commit(self._engine, self._incarnation, clock, peers, offer)
        self._node.metrics.checkpoint_generation.set(self._replica.generation)
        self._node.metrics.checkpoint_time.set(self._node.clock.wall())
        self._status.trouble("disk", "")


def _ignore(count: int) -> None:
    """Nobody watches this download."""
