"""The data path of a node that is alone in its run: a slot from end to end, a full disk, and saving in turn."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from braniac.model.trainer import Trainer
from braniac.node import bridge, datapath
from braniac.node.checkpoint import from_generation
from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.config import NetworkSection, NodeConfig, StateSection
from braniac.node.datapath import DataPath
from braniac.node.exchange import Exchange
from braniac.node.metrics import Metrics
from braniac.node.network import Network
from braniac.node.startup import Equipment
from braniac.node.status import Status
from braniac.node.store import DiskFull
from braniac.protocol import events, limits
from braniac.protocol.messages import FragmentState
from tests.unit.node_harness import until
from tests.unit.solo_node import ME, TABLE, Node


class Lone:
    """A lone node and its data path, driven by hand instead of by a daemon."""

    def __init__(self, root: Path) -> None:
        self.node = node = Node(root)
        for _ in range(limits.ELIGIBLE_SLOTS):  # before, it has no seat
            node.next_slot()
        clock = FakeClock()
        self.swarm_clock, self.metrics = SwarmClock(clock), Metrics("test", 1)
        config = NodeConfig(network=NetworkSection(), state=StateSection(dir=root))
        network = Network(config.network, root / "identity.key", ME, clock)
        exchange = Exchange(node.store, self.metrics, clock, self.swarm_clock, 10.0)
        equipment = Equipment(config, clock, self.swarm_clock, self.metrics, node.store, ME, network, exchange)
        self.path = DataPath(
            equipment,
            node.replica,
            node.engine,
            Status(equipment),
            incarnation=1,
            joined=lambda: None,
            wake=lambda: None,
        )

    def due(self) -> events.FragmentDue:
        """Let a slot begin: what it asks for first."""
        [due] = [event for event in self.node.next_slot() if isinstance(event, events.FragmentDue)]
        self.swarm_clock.set(self.node.now)
        return due

    async def certify(self, due: events.FragmentDue) -> events.UpdateDue:
        """Offer and merge: the update that is to be applied then."""
        self.path.put(due)
        await self.path.finish()
        while pending := self.node.drain():
            for event in pending:
                match event:
                    case events.BlobWanted():
                        self.node.engine.blob_fetched(event.digest, self.node.store.has(event.digest), self.node.now)
                    case events.MergeDue():
                        await self.path.merge(event)
                    case events.UpdateDue():
                        return event
        raise AssertionError("the slot has no certificate")

    def failures(self) -> float:
        return self.metrics.registry.get_sample_value("braniac_checkpoint_failures_total") or 0.0


@pytest.fixture
async def lone(tmp_path: Path) -> AsyncIterator[Lone]:
    lone = Lone(tmp_path)
    working = asyncio.create_task(lone.path.work())
    yield lone
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await asyncio.to_thread(lone.node.close)


async def test_a_slot_from_own_work_to_a_generation(lone: Lone) -> None:
    node = lone.node
    await node.step(3)
    due = lone.due()
    before = node.replica.anchors[due.fragment]
    lone.path.put(await lone.certify(due))
    await lone.path.finish()
    after = node.replica.anchors[due.fragment]
    assert after.slot == due.slot
    assert after.digest != before.digest
    assert node.replica.totals.merged == 1
    generation = node.store.recover()
    assert generation is not None
    assert from_generation(generation).anchors == node.replica.anchors


async def test_an_update_that_waits_behind_a_download_which_holds_it_is_not_applied(lone: Lone) -> None:
    node = lone.node
    await node.step(3)
    due = lone.due()
    update = await lone.certify(due)
    anchor = node.replica.anchor(due.fragment) + np.int32(5)
    held = FragmentState(due.fragment, due.slot, node.store.put(bridge.anchor_bytes(anchor)))
    lone.path._ordered.put_nowait(held)
    lone.path.put(update)
    await lone.path.finish()
    assert node.replica.anchors[due.fragment] == held
    assert node.replica.totals.merged == 0
    older = dataclasses.replace(held, slot=due.slot - 1)
    lone.path._ordered.put_nowait(older)
    lone.path.put(dataclasses.replace(update, acknowledged=None))
    await lone.path.finish()
    assert node.replica.anchors[due.fragment].digest != held.digest, "this one does not hold it"


def full(data: bytes) -> bytes:
    raise DiskFull("the disk is full: make room")


async def test_on_a_full_disk_an_offer_is_given_up(lone: Lone, monkeypatch: pytest.MonkeyPatch) -> None:
    node = lone.node
    with monkeypatch.context() as patch:
        patch.setattr(node.store, "put", full)
        lone.path.put(lone.due())
        await lone.path.finish()
    assert lone.failures() == 2  # the offer, and what `finish` would have saved
    assert not node.engine.history.offers
    assert node.replica.generation == 0
    await lone.certify(lone.due())
    assert len(node.engine.history.offers) == 1


@pytest.mark.parametrize("leaving", [False, True])
async def test_on_a_full_disk_an_update_waits_unless_the_node_leaves(
    lone: Lone, monkeypatch: pytest.MonkeyPatch, leaving: bool
) -> None:
    monkeypatch.setattr(datapath, "_DISK_RETRY_S", 0.01)
    update = await lone.certify(lone.due())
    with monkeypatch.context() as patch:
        patch.setattr(lone.node.store, "put", full)
        lone.path.put(update)
        await until(lambda: lone.failures() > 1)
        if leaving:
            lone.path.hurry()
            await lone.path.finish()
    await lone.path.finish()
    assert (lone.node.replica.anchors[update.fragment].slot == -1) == leaving


async def test_nothing_is_applied_while_a_generation_is_made(lone: Lone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a generation would show no moment, and the sweep after it would take an anchor for a leftover."""
    await lone.node.step(3)
    update = await lone.certify(lone.due())
    replica, log = lone.node.replica, []
    reached, go_on = asyncio.Event(), asyncio.Event()
    commit, apply = replica.commit, replica.apply

    async def slow_commit(*args: Any) -> None:
        reached.set()
        await go_on.wait()
        await commit(*args)
        log.append("saved")

    async def seen_apply(update: events.UpdateDue) -> FragmentState:
        log.append("applying")
        return await apply(update)

    monkeypatch.setattr(replica, "commit", slow_commit)
    monkeypatch.setattr(replica, "apply", seen_apply)
    saving = asyncio.create_task(lone.path.finish())
    await reached.wait()
    lone.path.put(update)
    for _ in range(10):  # turns of the loop: enough for whoever takes the update
        await asyncio.sleep(0)
    assert log == []
    go_on.set()
    await saving
    assert log == ["saved", "applying"]


async def test_ruined_weights_are_not_offered_but_set_back_to_the_anchors(lone: Lone) -> None:
    node = lone.node
    await node.step(2)
    first = lone.due()
    waiting = await lone.certify(first)  # its update is on its way when training goes wrong
    offers = len(node.engine.history.offers)
    await node.thread.call(_ruin)
    node.thread.train()
    await until(lambda: node.thread.progress.stalled)
    node.thread.pause()
    second = lone.due()
    lone.path.put(second)
    await lone.path.finish()
    assert not node.thread.progress.stalled
    assert len(node.engine.history.offers) <= offers
    assert lone.metrics.registry.get_sample_value("braniac_forfeited_total", {"reason": "diverged"}) == 1
    assert lone.metrics.registry.get_sample_value("braniac_divergences_total", {"kind": "loss"}) == 1
    lone.path.put(waiting)
    await lone.path.finish()
    for fragment in TABLE:  # nothing of the work that was given up is subtracted
        weights = await node.thread.call(lambda trainer, f=fragment: trainer.read(f))
        assert np.array_equal(bridge.to_fixed_point(weights), node.replica.anchor(fragment.index))


def _ruin(trainer: Trainer) -> None:
    with torch.no_grad():
        for parameter in trainer.params.values():
            parameter.fill_(float("nan"))
