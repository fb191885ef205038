"""Weights and anchors together: the ledger (I1) in floats, and crashes at every point of a slot.

A real trainer, thread, store and engine; one peer alone, whose committee is itself, so that every certificate is real.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch

from braniac.node import bridge
from braniac.node.replica import Prepared, clipped
from braniac.protocol import codec, events, limits, statements
from braniac.protocol.errors import WireError
from braniac.protocol.events import UpdateDue
from braniac.protocol.merge import Contribution, merge
from braniac.protocol.messages import Certificate, FragmentState, Share
from tests.unit.node_harness import (
    FRAGMENTS,
    blob_files,
    identity,
)
from tests.unit.solo_node import MANIFEST, ME, TABLE, Node

OTHER = identity(1)


def update_of(
    node: Node, slot: int, own: tuple[bytes, int] | None, payloads: list[bytes], *, clip: int = limits.CLIP_ONE
) -> UpdateDue:
    """A certificate for `slot` that somebody's committee signed, with these payloads of others and perhaps ours."""
    fragment = MANIFEST.fragment_of(slot)
    peers = [OTHER, identity(2), identity(3)]
    given = [Contribution(peer.peer_id, 1, data) for peer, data in zip(peers, payloads, strict=False)]
    signers = {peer.peer_id: peer for peer in (ME, *peers)}
    if own is not None:
        given.append(Contribution(ME.peer_id, 1, node.store.get(own[0])))
    merged = merge(MANIFEST, fragment, given)
    assert merged is not None
    node.store.put(merged.update)
    shares = []
    for contribution in sorted(given, key=lambda c: c.peer):
        digest, size = hashlib.sha256(contribution.payload).digest(), len(contribution.payload)
        signer = signers[contribution.peer]
        commitment = statements.make_commitment(signer, MANIFEST.run_id, slot, fragment, digest, size, 1)
        shares.append(Share(commitment, clip))
    verdict = statements.make_verdict(
        MANIFEST.run_id, slot, fragment, (OTHER.peer_id,), shares, merged.digest, len(merged.update)
    )
    signature = statements.sign_verdict(OTHER, verdict.digest)
    return UpdateDue(Certificate(verdict, ((OTHER.peer_id, signature),)), own[0] if own else None)


def payload_of(fragment: int, seed: int) -> bytes:
    spec = MANIFEST.fragments[fragment]
    vector = np.random.default_rng(seed).integers(-(1 << 16), 1 << 16, spec.layout.size)
    return codec.encode_topk(spec.layout, MANIFEST.up, vector)[0]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    yield node
    await asyncio.to_thread(node.close)


async def test_a_new_run_starts_without_own_work(node: Node) -> None:
    for fragment in MANIFEST.held(0):
        assert not (await node.own_work(fragment)).any()
        assert node.replica.is_anchor(node.replica.anchors[fragment].digest)
        assert node.replica.anchor_bytes(fragment) == 4 * TABLE[fragment].size
    assert not node.replica.is_anchor(bytes(32))


async def test_a_merge_of_one_moves_the_anchor_and_not_the_weights(node: Node) -> None:
    await node.step(3)
    fragment, slot = 1, 1
    before, anchor = await node.weights(fragment), node.replica.anchor(fragment).astype(np.int64)
    prepared = await node.replica.compress(fragment)
    sent = codec.decode(MANIFEST.fragments[fragment].layout, MANIFEST.up, node.store.get(prepared.digest))
    assert len(sent)
    state = await node.replica.apply(update_of(node, slot, (prepared.digest, prepared.size), []))
    assert torch.equal(await node.weights(fragment), before)
    assert np.array_equal(node.replica.anchor(fragment), anchor + sent.dense(len(anchor)))
    assert state == node.replica.anchors[fragment]
    assert (state.fragment, state.slot) == (fragment, slot)
    assert (node.replica.totals.certificates, node.replica.totals.merged) == (1, 1)


@pytest.mark.parametrize("mine", [True, False])
async def test_own_work_changes_by_what_the_certificate_took(node: Node, mine: bool) -> None:
    await node.step(3)
    fragment, slot = 2, 2
    prepared = await node.replica.compress(fragment)
    before, anchor = await node.own_work(fragment), node.replica.anchor(fragment).astype(np.int64)
    own = (prepared.digest, prepared.size) if mine else None
    update = update_of(node, slot, own, [payload_of(fragment, 1), payload_of(fragment, 2)])
    layout = MANIFEST.fragments[fragment].layout
    merged = codec.decode(layout, MANIFEST.down, node.store.get(update.certificate.verdict.update_digest))
    sent = codec.decode(layout, MANIFEST.up, node.store.get(prepared.digest)).dense(layout.size)
    taken = np.zeros(layout.size, np.int64)
    if mine:
        taken[merged.positions] = sent[merged.positions]
        assert taken.any()
    await node.replica.apply(update)
    assert np.array_equal(node.replica.anchor(fragment), anchor + merged.dense(layout.size))
    assert np.abs(await node.own_work(fragment) - (before - taken)).max() <= 1  # one rounding of a float32 sum


async def test_undoing_restores_the_anchor_to_the_bit(node: Node) -> None:
    await node.step(3)
    fragment, slot = 0, 5
    prepared = await node.replica.compress(fragment)
    first, work = node.replica.anchors[fragment], await node.own_work(fragment)
    update = update_of(node, slot, (prepared.digest, prepared.size), [payload_of(fragment, 3)])
    await node.replica.apply(update)
    moved = node.replica.anchors[fragment]
    assert moved.digest != first.digest
    assert node.replica.is_anchor(first.digest)  # somebody may still be downloading it
    await node.replica.apply(dataclasses.replace(update, undo=True))
    assert node.replica.anchors[fragment].digest == first.digest
    assert np.abs(await node.own_work(fragment) - work).max() <= 1
    assert node.replica.totals.certificates == node.replica.totals.merged == 0


async def test_an_update_that_is_none_changes_nothing(node: Node) -> None:
    fragment, slot = 1, 1
    update = update_of(node, slot, None, [payload_of(fragment, 1)])
    nonsense = node.store.put(b"nonsense")
    verdict = dataclasses.replace(update.certificate.verdict, update_digest=nonsense)
    bad = UpdateDue(dataclasses.replace(update.certificate, verdict=verdict), None)
    before, states = await node.weights(fragment), dict(node.replica.anchors)
    with pytest.raises(WireError):
        await node.replica.apply(bad)
    assert torch.equal(await node.weights(fragment), before)
    assert node.replica.anchors == states


async def test_weight_is_what_was_trained_since_the_last_offer(node: Node) -> None:
    node.thread.train()
    while node.thread.progress.steps < 4:
        await node.thread.call(lambda trainer: None)
    node.thread.pause()
    await node.thread.call(lambda trainer: None)
    tokens = node.thread.progress.tokens
    assert (await node.replica.compress(1)).tokens == tokens
    assert (await node.replica.compress(1)).tokens == 0
    assert (await node.replica.compress(2)).tokens == tokens


async def values_of_next_offer(node: Node, fragment: int) -> tuple[int, tuple[bytes, int]]:
    prepared = await node.replica.compress(fragment)
    sent = codec.decode(MANIFEST.fragments[fragment].layout, MANIFEST.up, node.store.get(prepared.digest))
    return len(sent), (prepared.digest, prepared.size)


async def test_after_a_missed_turn_the_next_offer_holds_the_values_of_both(node: Node) -> None:
    await node.step(3)
    fragment = 2
    usual = int(MANIFEST.fragments[fragment].layout.capacity(MANIFEST.up.per_tile).sum())
    offers = [await values_of_next_offer(node, fragment) for _ in range(4)]
    assert [values for values, _ in offers] == [usual, 2 * usual, 3 * usual, 4 * usual]
    assert (await values_of_next_offer(node, 1))[0] < 2 * usual, "another fragment has missed nothing"
    await node.replica.apply(update_of(node, fragment, None, [payload_of(fragment, 1)]))
    offers.append(await values_of_next_offer(node, fragment))
    assert offers[-1][0] == usual, "for a link that is too slow for more"
    await node.replica.apply(update_of(node, fragment + MANIFEST.window, offers[-1][1], [payload_of(fragment, 2)]))
    await node.step(1)
    assert (await values_of_next_offer(node, fragment))[0] == usual


async def test_a_fragment_that_was_downloaded_has_missed_nothing(node: Node) -> None:
    await node.step(2)
    await node.replica.compress(3)
    anchor = np.zeros(TABLE[3].size, np.int32)
    await node.replica.restore(FragmentState(3, 17, node.store.put(bridge.anchor_bytes(anchor))))
    await node.step(1)
    usual = int(MANIFEST.fragments[3].layout.capacity(MANIFEST.up.per_tile).sum())
    assert (await values_of_next_offer(node, 3))[0] <= usual


async def test_a_downloaded_fragment_replaces_weights_and_anchor(node: Node) -> None:
    await node.step(2)
    anchor = np.arange(TABLE[3].size, dtype=np.int32) - 50
    state = FragmentState(3, 17, node.store.put(bridge.anchor_bytes(anchor)))
    await node.replica.restore(state)
    assert np.array_equal(node.replica.anchor(3), anchor)
    assert not (await node.own_work(3)).any()
    assert node.replica.anchors[3] == state


@pytest.mark.parametrize("value", [limits.ANCHOR_MAX + 1, -(1 << 31)])
async def test_a_downloaded_fragment_out_of_range_is_refused(node: Node, value: int) -> None:
    before, state = await node.weights(3), node.replica.anchors[3]
    anchor = np.zeros(TABLE[3].size, np.int32)
    anchor[-1] = value
    with pytest.raises(WireError, match="range"):
        await node.replica.restore(FragmentState(3, 17, node.store.put(bridge.anchor_bytes(anchor))))
    assert torch.equal(await node.weights(3), before)
    assert node.replica.anchors[3] == state


async def test_a_node_alone_certifies_and_applies_its_own_work(node: Node) -> None:
    outcomes: list[events.SlotSettled] = []
    for _ in range(4 + FRAGMENTS):
        outcomes += [e for e in await node.slot() if isinstance(e, events.SlotSettled)]
    merged = [e for e in outcomes if e.merged]
    assert len(merged) >= FRAGMENTS
    assert {e.fragment for e in merged} == set(range(FRAGMENTS))
    assert node.replica.totals.merged == len(merged)


class Killed(Exception):
    """The process is gone."""


@pytest.mark.parametrize("point", ["compressed", "committed", "offered", "merged", "applied", "confirmed"])
async def test_after_a_crash_everything_belongs_to_one_moment(tmp_path: Path, point: str) -> None:
    node = Node(tmp_path)
    committed: list[tuple[dict[int, torch.Tensor], dict[int, FragmentState], set[int], dict[int, bytes]]] = []
    life: list[str] = []

    def reached(name: str) -> None:
        life.append(name)
        if name == point and life.count(name) == 3:
            raise Killed

    async def moment() -> None:
        weights = {f: await node.weights(f) for f in range(FRAGMENTS)}
        state = node.engine.state()
        confirmed = {
            statements.open_certificate(bytes.fromhex(e["certificate"]), MANIFEST.run_id).verdict.slot
            for e in state["entries"]
        }
        committed.append((weights, dict(node.replica.anchors), confirmed, dict(node.engine.history.offers)))

    commit = node.commit

    async def commit_and_note(offer: tuple[int, Prepared] | None = None) -> None:
        await commit(offer)
        await moment()
        if offer is not None:
            committed[-1][3][offer[0]] = offer[1].digest

    node.commit = commit_and_note  # type: ignore[method-assign]

    async def live() -> None:
        for _ in range(12):
            await node.slot(reached)

    with pytest.raises(Killed):
        await live()
    await asyncio.to_thread(node.close)

    after = Node(tmp_path, incarnation=2)
    weights, anchors, confirmed, offers = committed[-1]
    assert after.replica.anchors == anchors
    assert after.engine.history.offers == offers
    assert {slot for slot in range(20) if after.engine.history.entry(slot)} == confirmed
    for fragment in range(FRAGMENTS):
        assert torch.equal(await after.weights(fragment), weights[fragment])
    # The last offer is the work that is still in the weights: a certificate that the others make of it now fits.
    slot = max(offers)
    layout = MANIFEST.fragments[MANIFEST.fragment_of(slot)].layout
    work = await after.own_work(MANIFEST.fragment_of(slot))
    turns = MANIFEST.up.turns_after(after.replica.missed[MANIFEST.fragment_of(slot)] - 1)
    payload, _ = codec.encode_topk(layout, MANIFEST.up, work, turns)
    assert hashlib.sha256(payload).digest() == offers[slot]
    assert after.store.get(offers[slot]) == payload
    for _ in range(8):  # and it goes on
        await after.slot()
    assert after.replica.totals.merged > 3
    await asyncio.to_thread(after.close)


async def test_a_sweep_keeps_all_that_may_be_needed(node: Node, tmp_path: Path) -> None:
    for _ in range(5 * FRAGMENTS):
        await node.slot()
        needed = {state.digest for state in node.replica.anchors.values()} | node.engine.history.blobs()
        assert needed <= blob_files(tmp_path)
    bound = 2 * 2 + 5 * FRAGMENTS * limits.HISTORY_WINDOWS + 3 * 8 * 4
    assert len(blob_files(tmp_path)) < bound
    assert len(node.replica._pins) < 4 * 2 * FRAGMENTS + 32


async def test_what_arrives_during_a_commit_survives_its_sweep(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[bytes] = []
    commit = node.store.commit

    def slow_commit(content: dict[str, object], refs: set[bytes]) -> int:
        data = b"an update, fetched while the generation is written"
        node.replica.pin(hashlib.sha256(data).digest(), node.engine.slot)
        arrived.append(node.store.put(data))
        return commit(content, refs)  # type: ignore[arg-type]

    monkeypatch.setattr(node.store, "commit", slow_commit)
    stray = node.store.put(b"nobody needs this")
    await node.commit()
    assert arrived[0] in blob_files(tmp_path)
    assert stray not in blob_files(tmp_path)


async def test_clipping_is_noticed(node: Node) -> None:
    await node.step()
    prepared = await node.replica.compress(1)
    own = (prepared.digest, prepared.size)
    half = update_of(node, 1, own, [], clip=limits.CLIP_ONE // 2)
    assert clipped(half, ME.peer_id)
    assert not clipped(update_of(node, 1, own, []), ME.peer_id)
    assert not clipped(update_of(node, 1, None, [payload_of(1, 1)], clip=1), ME.peer_id)
