"""One node that is alone in its run, driven one call at a time: real trainer, thread, store and engine, no daemon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from braniac.model.config import Precision
from braniac.model.fragments import fragment_table
from braniac.node import bridge, checkpoint
from braniac.node.checkpoint import Saved, from_generation
from braniac.node.replica import Prepared, Replica
from braniac.node.store import Store
from braniac.node.trainer_thread import TrainerThread
from braniac.protocol import events, ledger
from braniac.protocol.codec import Int64Array
from braniac.protocol.engine import Engine
from braniac.protocol.history import History
from braniac.protocol.merge import Contribution, merge
from tests.unit.node_harness import (
    CONFIG,
    EPOCH_S,
    FRAGMENTS,
    identity,
    make_manifest,
    make_replica,
    make_thread,
    make_trainer,
)

ME = identity(0)
MANIFEST = make_manifest(ME)
TABLE = fragment_table(CONFIG, FRAGMENTS)


class Node:
    """One life of a node that is alone in its run: what the daemon does, one call at a time."""

    def __init__(self, root: Path, incarnation: int = 1, precision: Precision = "fp32") -> None:
        self.store = Store.open(root, keep=2)
        generation = self.store.recover()
        self.saved: Saved | None = from_generation(generation) if generation else None
        trainer = make_trainer(precision=precision)
        history = History(MANIFEST)
        if self.saved is not None:
            assert precision == "lean" or (self.saved.weights and self.saved.optimizer)
            checkpoint.resume(trainer, self.store, self.saved, TABLE)
            history = self.saved.history
        self.incarnation = incarnation
        self.thread: TrainerThread = make_thread(trainer)
        self.replica: Replica = make_replica(self.store, ME, self.thread, lean=precision == "lean")
        if self.saved is None:
            history.begin(MANIFEST.held(0))
            self.replica.begin()
        else:
            self.replica.anchors = dict(self.saved.anchors)
            self.replica.parts, self.replica.missed = dict(self.saved.parts), dict(self.saved.missed)
            self.replica.totals = self.saved.totals
        self.now = EPOCH_S + 0.1 if self.saved is None else self.saved.swarm_time_s
        self.engine = Engine(MANIFEST, ME, 0, incarnation=incarnation, now=self.now, history=history)
        for state in self.replica.anchors.values():
            self.engine.anchor_known(state)
        self.thread.start()
        self.engine.set_ready()

    def close(self) -> None:
        self.thread.stop()
        self.store.close()

    async def step(self, count: int = 1) -> None:
        for _ in range(count):
            await self.thread.call(lambda trainer: trainer.step())

    async def weights(self, fragment: int) -> torch.Tensor:
        return await self.thread.call(lambda trainer: trainer.read(TABLE[fragment]))

    async def own_work(self, fragment: int) -> Int64Array:
        """x - anchor in units."""
        weights = await self.weights(fragment)
        return ledger.residual(bridge.to_fixed_point(weights), self.replica.anchor(fragment))

    def next_slot(self) -> list[events.Event]:
        """Let a slot begin: what the engine then asks for."""
        self.now = MANIFEST.slot_start(self.engine.slot + 1) + 0.01
        self.engine.handle_timer(self.now)
        return self.drain()

    def drain(self) -> list[events.Event]:
        found = []
        while (event := self.engine.next_event()) is not None:
            found.append(event)
        return found

    async def commit(self, offer: tuple[int, Prepared] | None = None) -> None:
        await self.replica.commit(self.engine, self.incarnation, (0.0, self.now), {}, offer)

    async def slot(self, reached: Callable[[str], None] = lambda point: None) -> list[events.Event]:
        """One whole slot; `reached` is told the name of every point at which the node might be killed."""
        seen = self.next_slot()
        for event in seen:
            if isinstance(event, events.FragmentDue):
                await self.step()
                prepared = await self.replica.compress(event.fragment)
                self.replica.pin(prepared.digest, event.slot)
                reached("compressed")
                await self.commit((event.slot, prepared))
                reached("committed")
                self.engine.offer(event.slot, prepared.digest, prepared.size, prepared.tokens)
                self.engine.blob_fetched(prepared.digest, True, self.now)
                reached("offered")
        seen += await self._certify(reached)
        return seen

    async def _certify(self, reached: Callable[[str], None]) -> list[events.Event]:
        seen = []
        while pending := self.drain():
            seen += pending
            for event in pending:
                match event:
                    case events.MergeDue():
                        given = [Contribution(p, t, self.store.get(d)) for p, t, d in event.contributions]
                        merged = merge(MANIFEST, event.fragment, given)
                        assert merged is not None
                        self.replica.pin(merged.digest, event.slot)
                        self.store.put(merged.update)
                        self.engine.merged(event.slot, merged)
                        reached("merged")
                    case events.BlobWanted():
                        self.engine.blob_fetched(event.digest, self.store.has(event.digest), self.now)
                    case events.UpdateDue():
                        state = await self.replica.apply(event)
                        reached("applied")
                        self.engine.anchor_moved(event, state)
                        reached("confirmed")
        return seen
