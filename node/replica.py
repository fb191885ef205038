"""This node's copy of the run: the model it trains, the anchors it holds, and what moves between them.

Every method that changes weights and anchors together is called from one task, in the order of the protocol's
events, so a generation committed by that task always shows one consistent moment.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import structlog
import torch

from braniac.model.config import ModelConfig
from braniac.model.fragments import Fragment
from braniac.model.trainer import Trainer
from braniac.node import bridge
from braniac.node.checkpoint import Saved, Snapshot, Totals, save_tensors, to_content
from braniac.node.store import Store
from braniac.node.trainer_thread import TrainerThread
from braniac.protocol import codec, ledger, limits, statements
from braniac.protocol.bitpack import Int32Array
from braniac.protocol.engine import Engine
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.events import UpdateDue
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import FragmentState

log = structlog.get_logger(__name__)

_COLLECT_EVERY = 8  # generations between two sweeps of the store


@dataclass(frozen=True)
class Prepared:
    """A contribution that is stored, and the moment it was read from."""

    fragment: int
    digest: bytes
    size: int
    tokens: int
    """Trained on since the fragment was last offered, or since the start."""
    snapshot: Snapshot


class Replica:
    """Weights (in the trainer thread) and anchors (in the store) of one node in one run."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        signed_manifest: tuple[bytes, bytes],
        tier: int,
        model: tuple[ModelConfig, tuple[Fragment, ...]],
        trainer: TrainerThread,
        totals: Totals,
        *,
        lean: bool = False,
    ) -> None:
        """`lean`: generations hold weights by fragment, so that nothing is copied as a whole."""
        self.manifest = manifest
        self.tier = tier
        self.trainer = trainer
        self.totals = totals
        self.anchors: dict[int, FragmentState] = {}
        self.generation = 0
        self.config, self._fragments = model
        self._store = store
        self._signed_manifest = signed_manifest
        self.parts: dict[int, bytes] = {}
        """Lean: digest of each fragment's weights, as of its last offer or merge; without one it is at its anchor."""
        self._lean = lean
        self._moved: set[int] = set()
        """Lean: fragments whose anchor is newer than their part."""
        self._offered_at: dict[int, int] = {}
        self.missed: dict[int, int] = {}
        """Offers of each fragment since one was last taken."""
        self._began_tokens = trainer.progress.tokens
        self._pins: dict[bytes, int] = {}
        self._pins_lock = threading.Lock()
        self._former: deque[bytes] = deque(maxlen=2 * manifest.window)

    # --- anchors -----------------------------------------------------------------------------------------------------

    def anchor(self, fragment: int) -> Int32Array:
        """The agreed weights, [size] int32. Raises BlobMissing, BlobDamaged."""
        data = self._store.get(self.anchors[fragment].digest)
        return bridge.anchor_from_bytes(data, self._fragments[fragment].size)

    def begin(self) -> None:
        """Take up the initial anchors of a new run. Raises DiskFull."""
        for index in self.manifest.held(self.tier):
            self.anchors[index] = self.initial_state(index, 0)

    def initial_state(self, fragment: int, slot: int) -> FragmentState:
        """A fragment before the first slot, its anchor put into the store and pinned in `slot`. Raises DiskFull."""
        anchor = bridge.initial_anchor(self.config, self._fragments[fragment], self.manifest.seed)
        data = bridge.anchor_bytes(anchor)
        self.pin(hashlib.sha256(data).digest(), slot)
        return FragmentState(fragment, -1, self._store.put(data))

    def lose(self, fragment: int) -> None:
        """Its anchor cannot be read any more; the weights stay as they are until it is downloaded."""
        self.anchors.pop(fragment, None)
        self.parts.pop(fragment, None)

    def is_anchor(self, digest: bytes) -> bool:
        """Whether a blob is one of the anchors held here, or was one lately."""
        return digest in self._former or any(state.digest == digest for state in self.anchors.values())

    def anchor_bytes(self, fragment: int) -> int:
        """Size of a fragment's anchor as it is downloaded."""
        return 4 * self._fragments[fragment].size

    # --- the data path -----------------------------------------------------------------------------------------------

    async def compress(self, fragment: int) -> Prepared:
        """Read the work on a fragment that no certificate holds yet, and store it as a payload. Raises DiskFull."""
        cut = self._fragments[fragment]
        weights, snapshot = await self.trainer.call(lambda trainer: (trainer.read(cut), self._snapshot(trainer)))
        tokens = self.trainer.progress.tokens
        turns = self.manifest.up.turns_after(self.missed.get(fragment, 0))

        def encode() -> tuple[bytes, int]:
            uncommitted = ledger.residual(bridge.to_fixed_point(weights), self.anchor(fragment))
            layout = self.manifest.fragments[fragment].layout
            payload, _ = codec.encode_topk(layout, self.manifest.up, uncommitted, turns)
            return self._store.put(payload), len(payload)

        digest, size = await asyncio.to_thread(encode)
        since = tokens - self._offered_at.get(fragment, self._began_tokens)
        self._offered_at[fragment] = tokens
        self.missed[fragment] = self.missed.get(fragment, 0) + 1
        return Prepared(fragment, digest, size, since, snapshot)

    def _snapshot(self, trainer: Trainer) -> Snapshot:
        if self._lean:
            return Snapshot({}, trainer.step_count)
        tensors, counters = trainer.state()
        return Snapshot(tensors, counters["step"])

    async def apply(self, update: UpdateDue) -> FragmentState:
        """Add (or undo) an update to anchor and weights; take back what it holds of this node's own work.

        Raises WireError if the committee signed something that is not an update, DiskFull, BlobMissing.
        """
        verdict = update.certificate.verdict
        index = verdict.fragment
        cut, layout = self._fragments[index], self.manifest.fragments[index].layout

        def settle() -> tuple[ledger.Settlement, bytes]:
            merged = codec.decode(layout, self.manifest.down, self._store.get(verdict.update_digest))
            own = update.acknowledged
            sent = codec.decode(layout, self.manifest.up, self._store.get(own)) if own else None
            settlement = ledger.settle(merged, sent, undo=update.undo)
            anchor = ledger.move_anchor(self.anchor(index), settlement)
            return settlement, self._store.put(bridge.anchor_bytes(anchor))

        settlement, digest = await asyncio.to_thread(settle)
        change = bridge.weight_change(settlement, cut.size)
        await self.trainer.call(lambda trainer: trainer.rebase(cut, change))
        before = self.anchors[index]
        self.pin(before.digest, verdict.slot)  # somebody may be downloading it
        self._former.append(before.digest)
        self.anchors[index] = FragmentState(index, max(before.slot, verdict.slot), digest)
        self._moved.add(index)
        if update.acknowledged and not update.undo:
            self.missed.pop(index, None)
        self._count(update)
        return self.anchors[index]

    async def restore(self, state: FragmentState) -> None:
        """Replace a fragment by a downloaded anchor; own work on it that was not merged is forfeited as too old.

        Raises WireError for an anchor whose sums would not stay exact (I4).
        """
        cut = self._fragments[state.fragment]
        data = await asyncio.to_thread(self._store.get, state.digest)
        anchor = bridge.anchor_from_bytes(data, cut.size)
        if int(abs(anchor.astype("i8")).max()) > limits.ANCHOR_MAX:
            raise WireError(Refusal.MALFORMED, "a downloaded anchor holds values out of range")
        weights = bridge.to_weights(anchor)

        def load(trainer: Trainer) -> None:
            trainer.load_fragment(cut, weights)
            self.trainer.compare_anew()

        await self.trainer.call(load)
        self.anchors[state.fragment] = state
        self.missed.pop(state.fragment, None)
        self.parts.pop(state.fragment, None)
        self._moved.discard(state.fragment)

    async def start_over(self) -> None:
        """Set all weights to their anchors; own work that was not merged is gone. Raises BlobMissing."""
        for index in sorted(self.anchors):
            cut = self._fragments[index]
            weights = bridge.to_weights(await asyncio.to_thread(self.anchor, index))
            await self.trainer.call(functools.partial(_load, cut, weights))
            self.parts.pop(index, None)
            self._moved.discard(index)
        self.missed.clear()
        await self.trainer.call(lambda trainer: self.trainer.start_over())

    async def commit(
        self,
        engine: Engine,
        incarnation: int,
        clock: tuple[float, float],
        peers: dict[PeerId, tuple[str, ...]],
        offer: tuple[int, Prepared] | None,
    ) -> None:
        """Make a generation of this moment, or of the moment in which an `offer` for a slot was read. Raises DiskFull.

        `clock` is (swarm time less wall time, swarm time).
        """
        if offer is None:
            snapshot, offered = await self.trainer.call(self._snapshot), None
        else:
            snapshot, offered = offer[1].snapshot, (offer[0], offer[1].digest)
        if self._lean:
            await self._save_parts(set(self.anchors) if offer is None and snapshot.step else set(), offer)
        protocol = engine.state(offered)
        saved = Saved(
            self.manifest,
            self._signed_manifest,
            self.tier,
            incarnation,
            *clock,
            anchors=dict(self.anchors),
            history=engine.history,
            weights=None,
            optimizer=None,
            step=snapshot.step,
            totals=replace(self.totals, tokens=self.trainer.progress.tokens),
            peers=peers,
            parts=dict(self.parts),
            missed=dict(self.missed),
        )
        proofs = statements.proofs_bytes(engine.roster.banned.values())
        blobs = {state.digest for state in self.anchors.values()} | engine.history.confirmed_blobs()
        blobs |= {offered[1]} if offered else set()
        in_use, edge = engine.history.blobs(), engine.slot - 2 * self.manifest.window
        sweep = self.generation % _COLLECT_EVERY == 0

        def write() -> int:
            if self._lean:
                whole, kept = set(self.parts.values()), saved
            else:
                weights, optimizer = save_tensors(self._store, self.config, self.tier, snapshot)
                whole, kept = {weights, optimizer}, replace(saved, weights=weights, optimizer=optimizer)
            if proofs:
                bans = self._store.put(proofs)
                kept = replace(kept, bans=bans)
                whole.add(bans)
            content = to_content(kept, protocol)
            number = self._store.commit(content, whole | {b for b in blobs if self._store.has(b)})
            if sweep:
                self._store.collect(self._needed(in_use, edge))
            return number

        self.generation = await asyncio.to_thread(write)

    async def _save_parts(self, fragments: set[int], offer: tuple[int, Prepared] | None) -> None:
        """Put the present weights of some fragments into the store, and of those offered or moved. Raises DiskFull.

        An offer's fragment may have been trained on since the offer was read: what was sent is still in it.
        """
        fragments |= self._moved & self.anchors.keys()
        if offer is not None:
            fragments.add(offer[1].fragment)
        for index in sorted(fragments):
            cut = self._fragments[index]
            weights = await self.trainer.call(functools.partial(_read, cut))
            self.parts[index] = await asyncio.to_thread(self._store.put, bridge.part_bytes(weights))
            self._moved.discard(index)

    def pin(self, digest: bytes, slot: int) -> None:
        """Keep a blob that no generation names yet for two windows after `slot`. Pin before putting."""
        with self._pins_lock:
            self._pins[digest] = slot

    def _needed(self, in_use: set[bytes], edge: int) -> Iterator[bytes]:
        """Blobs to keep that no generation names; pins up to slot `edge` are dropped.

        The store asks while nothing can be put, so what was pinned and fetched during the commit is in it.
        """
        yield from in_use
        with self._pins_lock:
            self._pins = {digest: at for digest, at in self._pins.items() if at > edge}
            pinned = set(self._pins)
        yield from pinned

    def _count(self, update: UpdateDue) -> None:
        step = -1 if update.undo else 1
        merged = step if update.acknowledged else 0
        self.totals = replace(
            self.totals, certificates=self.totals.certificates + step, merged=self.totals.merged + merged
        )


def _read(fragment: Fragment, trainer: Trainer) -> torch.Tensor:
    return trainer.read(fragment)


def _load(fragment: Fragment, weights: torch.Tensor, trainer: Trainer) -> None:
    trainer.load_fragment(fragment, weights)


def clipped(update: UpdateDue, me: PeerId) -> bool:
    """Whether the certificate scaled this peer's contribution down; the difference is forfeited."""
    share = update.certificate.verdict.share_of(me)
    return update.acknowledged is not None and share is not None and share.clip < limits.CLIP_ONE
