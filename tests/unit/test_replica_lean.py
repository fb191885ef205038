"""Lean training in a node: generations by fragment keep the ledger (I1) through crashes; nothing is copied whole."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from braniac.model.fragments import gather
from braniac.node import bridge, checkpoint, offline
from braniac.node.checkpoint import from_generation
from braniac.node.errors import Incompatible
from braniac.node.replica import Prepared
from braniac.node.store import DiskFull
from braniac.protocol import codec
from braniac.protocol.messages import FragmentState
from tests.unit.node_harness import FRAGMENTS, blob_files, make_trainer
from tests.unit.solo_node import MANIFEST, TABLE, Node

Integers = npt.NDArray[np.int64]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path, precision="lean")
    yield node
    await asyncio.to_thread(node.close)


def test_a_part_says_all_in_two_bytes_if_it_can() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert len(bridge.part_bytes(exact)) == 2000
    assert torch.equal(bridge.part_from_bytes(bridge.part_bytes(exact), 1000), exact)
    finer = exact.clone()
    finer[7] += 2.0**-20
    assert len(bridge.part_bytes(finer)) == 4000
    assert torch.equal(bridge.part_from_bytes(bridge.part_bytes(finer), 1000), finer)


async def test_an_offer_copies_its_fragment_only(node: Node, tmp_path: Path) -> None:
    await node.step(3)
    before = blob_files(tmp_path)
    prepared = await node.replica.compress(1)
    assert prepared.snapshot.tensors == {}
    await node.commit((1, prepared))
    assert node.replica.parts.keys() == {1}
    assert blob_files(tmp_path) - before == {prepared.digest, node.replica.parts[1]}
    part = node.store.get(node.replica.parts[1])
    assert len(part) == 2 * TABLE[1].size
    assert torch.equal(bridge.part_from_bytes(part, TABLE[1].size), await node.weights(1))


async def test_a_clean_end_loses_nothing(node: Node, tmp_path: Path) -> None:
    for _ in range(7):
        await node.slot()
    await node.step(2)
    await node.commit()
    weights = [await node.weights(fragment) for fragment in range(FRAGMENTS)]
    await asyncio.to_thread(node.close)
    after = Node(tmp_path, incarnation=2, precision="lean")
    for fragment, expected in enumerate(weights):
        assert torch.equal(await after.weights(fragment), expected)
    assert await after.thread.call(lambda trainer: trainer.step_count) == 9
    await asyncio.to_thread(after.close)


class Killed(Exception):
    """The process is gone."""


@pytest.mark.parametrize("point", ["compressed", "committed", "offered", "merged", "applied", "confirmed"])
async def test_after_a_crash_each_fragment_is_of_one_moment(tmp_path: Path, point: str) -> None:
    node = Node(tmp_path, precision="lean")
    moments: list[tuple[dict[int, Integers], dict[int, FragmentState], dict[int, bytes]]] = []
    works: dict[int, Integers] = {}
    life: list[str] = []

    def reached(name: str) -> None:
        life.append(name)
        if name == point and life.count(name) == FRAGMENTS + 2:
            raise Killed

    commit = node.commit

    async def commit_and_note(offer: tuple[int, Prepared] | None = None) -> None:
        assert offer is not None
        for fragment in node.replica._moved | {offer[1].fragment}:
            works[fragment] = await node.own_work(fragment)
        await commit(offer)
        offers = dict(node.engine.history.offers) | {offer[0]: offer[1].digest}
        moments.append((dict(works), dict(node.replica.anchors), offers))

    node.commit = commit_and_note  # type: ignore[method-assign]

    async def live() -> None:
        for _ in range(3 * FRAGMENTS):
            await node.slot(reached)

    with pytest.raises(Killed):
        await live()
    await asyncio.to_thread(node.close)

    after = Node(tmp_path, incarnation=2, precision="lean")
    work, anchors, offers = moments[-1]
    assert after.replica.anchors == anchors
    assert after.engine.history.offers == offers
    for fragment in range(FRAGMENTS):
        found = await after.own_work(fragment)
        if fragment in work:
            assert np.array_equal(found, work[fragment])
        else:  # at its anchor, as far as bfloat16 goes
            anchor = bridge.to_weights(after.replica.anchor(fragment))
            assert torch.equal(await after.weights(fragment), anchor.bfloat16().float())
    # The last offer is the work that is still in the weights: a certificate that the others make of it now fits.
    fragment = MANIFEST.fragment_of(max(offers))
    turns = MANIFEST.up.turns_after(after.replica.missed[fragment] - 1)
    layout, work_left = MANIFEST.fragments[fragment].layout, await after.own_work(fragment)
    payload, _ = codec.encode_topk(layout, MANIFEST.up, work_left, turns)
    assert hashlib.sha256(payload).digest() == offers[max(offers)]
    for _ in range(8):
        await after.slot()
    assert after.replica.totals.merged > 3
    await asyncio.to_thread(after.close)


async def test_a_downloaded_fragment_forgets_its_part(node: Node) -> None:
    await node.step(2)
    await node.commit((1, await node.replica.compress(1)))
    anchor = np.arange(TABLE[1].size, dtype=np.int32) << 12
    await node.replica.restore(FragmentState(1, 17, node.store.put(bridge.anchor_bytes(anchor))))
    assert 1 not in node.replica.parts
    assert torch.equal(await node.weights(1), bridge.to_weights(anchor).bfloat16().float())


async def test_a_part_that_does_not_fit_on_the_disk_is_saved_with_the_next_commit(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(FRAGMENTS + 1):
        await node.slot()
    await node.step()
    (moved,) = node.replica._moved
    before = dict(node.replica.parts)
    put = node.store.put

    def full(data: bytes) -> bytes:
        raise DiskFull("no space")

    monkeypatch.setattr(node.store, "put", full)
    with pytest.raises(DiskFull):
        await node.commit()
    assert moved in node.replica._moved
    monkeypatch.setattr(node.store, "put", put)
    await node.commit()
    assert not node.replica._moved
    assert node.replica.parts[moved] != before[moved]


async def test_the_saved_model_can_be_looked_at(node: Node, tmp_path: Path) -> None:
    for _ in range(FRAGMENTS + 2):
        await node.slot()
    await node.commit()
    weights = [await node.weights(fragment) for fragment in range(FRAGMENTS)]
    _, saved, model = offline.load(tmp_path)
    assert saved.weights is None
    parameters = dict(model.named_parameters())
    assert all(torch.equal(gather(parameters, TABLE[f]), expected) for f, expected in enumerate(weights))


async def test_the_other_precision_is_refused_or_taken_over(node: Node, tmp_path: Path) -> None:
    for _ in range(FRAGMENTS):
        await node.slot()
    await node.commit()
    weights = await node.weights(2)
    generation = node.store.recover()
    assert generation is not None
    saved = from_generation(generation)
    full = make_trainer()
    checkpoint.resume(full, node.store, saved, TABLE)
    assert torch.equal(full.read(TABLE[2]), weights)
    with_weights = dataclasses.replace(saved, weights=bytes(32), optimizer=bytes(32))
    with pytest.raises(Incompatible, match=r"train\.precision=fp32"):
        checkpoint.resume(make_trainer(precision="lean"), node.store, with_weights, TABLE)
