"""An even uplink: the pace that follows the swarm, and what is held back by it."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from braniac.node import costs
from braniac.node.blobs import Blobs
from braniac.node.exchange import BlobUnavailable
from braniac.node.founding import RECIPES
from braniac.node.metrics import Metrics
from braniac.node.pacing import Pacing, paced_bytes_per_slot
from tests.unit.node_harness import identity
from tests.unit.test_caps import KIB, Pair, blob_of
from tests.unit.test_costs import found

PACE = 16 * KIB


async def paced(pair: Pair, blob: bytes, *, first: bool = False) -> float:
    """How long the asker waits for a blob from a holder whose pace is set."""
    pair.holder.throttle.pace.rate = PACE
    pair.holder.throttle.first_bytes_max = len(blob) if first else len(blob) - 1
    began_s = pair.elapsed_s
    await pair.asker.fetch(blob, pair.holder)
    return pair.elapsed_s - began_s


async def test_an_update_takes_the_time_that_its_pace_says(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        assert await paced(pair, blob_of(200_000)) == pytest.approx(200_000 / PACE, rel=0.05)


@pytest.mark.parametrize("patient", [True, False])
async def test_who_sends_slowly_but_surely_is_waited_for(tmp_path: Path, patient: bool) -> None:
    async with Pair(tmp_path) as pair:
        asker, blob = pair.asker, blob_of(200_000)
        blobs = Blobs(asker.store, asker.exchange, Metrics("test", 1), pair.clock, patience_s=60.0 if patient else 0.0)
        pair.holder.throttle.pace.rate = PACE / 2
        digest, holders = pair.holder.store.put(blob), [pair.holder.peer, identity(7).peer_id]
        if patient:
            await blobs.fetch(asker.transport, digest, len(blob), holders)
            assert asker.store.get(digest) == blob
        else:
            with pytest.raises(BlobUnavailable, match="too slow"):
                await blobs.fetch(asker.transport, digest, len(blob), holders)


async def test_an_anchor_has_no_pace(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        pair.holder.exchange.is_anchor = lambda digest: True
        assert await paced(pair, blob_of(2_000_000)) == 0.0


async def test_what_is_short_goes_ahead_of_those_that_wait(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        pace = pair.holder.throttle.pace
        pace.rate = 1000.0
        pace.charge(1000.0)
        done: list[str] = []

        async def take(name: str) -> None:
            await (pace.take_first if name == "contribution" else pace.take_bulk)(500.0)
            done.append(name)

        waiting = [asyncio.ensure_future(take(name)) for name in ("update", "another update", "contribution")]
        await asyncio.gather(*waiting)
        assert done.index("contribution") <= 1  # only the one whose turn it is may be before it
        assert done.index("another update") == 2


async def test_a_long_queue_sends_others_away_from_updates_only(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        pace = pair.holder.throttle.pace
        pace.rate = 1000.0
        pace.charge(8100.0)
        with pytest.raises(BlobUnavailable, match="overloaded"):
            await pair.asker.fetch(b"an update", pair.holder)
        pair.holder.exchange.is_anchor = lambda digest: True
        assert await pair.asker.fetch(b"an anchor", pair.holder) == [9]


def test_the_pace_is_a_little_over_the_average_and_follows_the_swarm() -> None:
    run = found("nano-1b")
    assert paced_bytes_per_slot(run, 0, 1, 1.5) == 0.0  # nobody asks for anything
    for peers in (8, 64, 4096):
        blobs = costs.slot_bytes(run, 0, peers) - costs._message_bytes(run, 0, peers, 1.0)
        assert paced_bytes_per_slot(run, 0, peers, 1.5) == pytest.approx(1.5 * blobs)
        assert paced_bytes_per_slot(run, 0, peers, 3.0) == pytest.approx(3 * blobs)
    assert paced_bytes_per_slot(run, 3, 8, 1.5) < 0.6 * paced_bytes_per_slot(run, 0, 8, 1.5)


@pytest.mark.parametrize("preset", sorted(RECIPES))
@pytest.mark.parametrize("peers", [2, 3, 4, 8, 64])
def test_a_contribution_has_left_long_before_the_slot_ends(preset: str, peers: int) -> None:
    run = found(preset)
    largest = max(costs.full_bytes(run.fragments[fragment].layout, run.up) for fragment in run.held(0))
    assert paced_bytes_per_slot(run, 0, peers, 1.5) >= 4 * largest


async def test_the_throttle_is_set_for_as_many_as_there_are(tmp_path: Path) -> None:
    async with Pair(tmp_path) as pair:
        throttle, run = pair.holder.throttle, dataclasses.replace(found(), slot_ms=20_000)
        pacing = Pacing(throttle, run, 0, 1.5)
        assert throttle.pace.rate == 0.0
        assert throttle.first_bytes_max == max(run.contribution_bytes_max(f) for f in run.held(0))
        for peers in (8, 3, 1):
            pacing.follow(peers)
            assert throttle.pace.rate == pytest.approx(paced_bytes_per_slot(run, 0, peers, 1.5) / 20)
        Pacing(throttle, run, 0, 0.0).follow(8)
        assert throttle.pace.rate == 0.0  # as fast as it can
