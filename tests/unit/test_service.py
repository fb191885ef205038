"""Whole daemons, several in one event loop, over the in-memory network: join, train, certify, agree, leave.

Slots are real time, short ones; nothing here depends on how long anything takes, only on what happens in the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from braniac.node import identity_file, offline
from braniac.node.clock import SystemClock
from braniac.node.config import DataSection, MetricsSection, NodeConfig, StateSection, TrainSection
from braniac.node.errors import Incompatible
from braniac.node.p2pd import P2pdOptions
from braniac.node.service import Service
from braniac.node.store import Store
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from tests.unit.daemons import LOOK_S, SLOT_MS, Swarm, swarm_below
from tests.unit.node_harness import TEXT, until, write_run


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    async for swarm in swarm_below(tmp_path):
        yield swarm


def contributors(daemon: Service) -> set[int]:
    """How many contributions the certificates held that this daemon saw."""
    return {record.contributors for record in daemon.answers.status(0).slots if record.certificate}


def certified(daemon: Service) -> dict[int, bytes]:
    """slot -> certificate."""
    return {record.slot: record.certificate for record in daemon.answers.status(0).slots if record.certificate}


def agree(first: Service, second: Service) -> bool:
    """Whether both show the same last slot and bytes of every fragment that both hold, each merged at least once."""
    ours = {s.fragment: (s.slot, s.digest) for s in first.status.engine.anchors().values()}  # type: ignore[union-attr]
    theirs = {s.fragment: (s.slot, s.digest) for s in second.status.engine.anchors().values()}  # type: ignore[union-attr]
    common = ours.keys() & theirs.keys()
    return bool(common) and all(ours[f] == theirs[f] and ours[f][0] >= 0 for f in common)


async def test_two(swarm: Swarm) -> None:
    founder = await swarm.found()
    joiner = await swarm.join("n1", 0)
    await swarm.until(lambda: 2 in contributors(founder) and 2 in contributors(joiner))
    await swarm.until(lambda: agree(founder, joiner))
    common = certified(founder).keys() & certified(joiner).keys()
    assert common
    assert all(certified(founder)[slot] == certified(joiner)[slot] for slot in common)
    status = joiner.answers.status(0)
    assert status.run_id == swarm.manifest.run_id.hex()
    assert status.contributions_merged > 0
    assert status.join_bytes_needed == 4 * swarm.manifest.parameters(0)
    assert status.join_bytes_received >= status.join_bytes_needed
    assert [peer.state for peer in joiner.answers.peers().peers] == ["live"]

    joiner.leave()
    await swarm.ended(joiner)
    assert joiner.node.metrics.state == "leaving"
    generation = Store.look(swarm.root / "n1").recover()
    assert generation is not None
    assert len(generation.content["anchors"]) == swarm.manifest.window  # type: ignore[arg-type]
    [peer] = founder.answers.peers().peers
    assert peer.state == "silent"  # it said goodbye

    again = await swarm.join("n1", 0)  # and it is welcome back, with what it had
    assert again.status.bar is None
    assert again.status.engine is not None
    founder.leave()
    await swarm.ended(founder)
    assert not founder.daemon._pump._in_flight


async def test_a_lost_anchor_is_downloaded_again(swarm: Swarm) -> None:
    founder = await swarm.found()
    joiner = await swarm.join("n1", 0)
    await swarm.until(lambda: agree(founder, joiner))
    assert joiner.daemon is not None
    for state in joiner.daemon._replica.anchors.values():
        name = state.digest.hex()
        (swarm.root / "n1" / "blobs" / name[:2] / name).unlink(missing_ok=True)
    store, anchors = joiner.node.store, joiner.daemon._replica.anchors
    # Not counted one by one: an anchor that moved while its blob was removed was never missed.
    await swarm.until(lambda: joiner.answers.status(0).forfeited["too_old"] > 0)
    await swarm.until(
        lambda: len(anchors) == swarm.manifest.window and all(store.has(s.digest) for s in anchors.values())
    )
    await swarm.until(lambda: agree(founder, joiner))
    assert joiner.node.metrics.state == "training"


async def test_late(swarm: Swarm) -> None:
    founder = await swarm.found()
    await swarm.until(lambda: len(certified(founder)) >= swarm.manifest.window)
    small = await swarm.join("n1", 3)
    status = small.answers.status(0)
    held = swarm.manifest.held(3)
    assert status.join_bytes_needed == 4 * swarm.manifest.parameters(3)
    assert status.join_bytes_received < 4 * swarm.manifest.parameters(0)
    assert {state.fragment for state in status.digests} == set(held)
    assert len(held) < swarm.manifest.window
    assert founder.node.exchange.sent["anchor"] >= status.join_bytes_needed
    await swarm.until(lambda: 2 in contributors(small))
    await swarm.until(lambda: agree(founder, small))
    assert set(small.daemon._replica.anchors) == set(held)
    for daemon in (small, founder):
        daemon.leave()
        await swarm.ended(daemon)
    report = offline.evaluate(swarm.root / "n1", data=DataSection(paths=(swarm.root / "text.txt",)), tiers=None)
    assert set(report["agreed"]) == {"3"}


async def test_leave_while_joining(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    founder = await swarm.found()
    founder.node.exchange.is_anchor = lambda digest: pytest.fail("nothing is served")  # every chunk fails
    joiner = swarm.start("n1", 0, (swarm.door,))
    await swarm.until(lambda: joiner.status.engine is not None)
    assert joiner.node.metrics.state == "joining"
    joiner.leave()
    await swarm.ended(joiner)
    founder.node.exchange.is_anchor = founder.daemon._replica.is_anchor
    assert joiner.status.engine is not None
    assert not joiner.status.engine.ready
    again = await swarm.join("n1", 0)
    assert again.status.engine is not None


async def test_leave_before_a_run_is_found(swarm: Swarm) -> None:
    founder = await swarm.found()
    address = swarm.door
    founder.leave(now=True)
    await swarm.ended(founder)
    lost = swarm.start("n1", 0, (address,))
    await swarm.until(lambda: lost.node.network.failures)
    assert lost.node.metrics.state == "joining"
    lost.leave()
    await swarm.ended(lost)
    Store.open(swarm.root / "n1").close()  # nothing holds it any more


async def test_leave_twice_is_now(swarm: Swarm) -> None:
    founder = await swarm.found()
    founder.daemon._idle.clear()
    founder.daemon._engine.retire()
    generation = founder.daemon._replica.generation
    founder.leave()
    founder.leave()
    founder.leave()  # impatience does no harm
    await swarm.ended(founder)
    assert founder.daemon._replica.generation <= generation + 1
    Store.open(swarm.root / "n0").close()


async def test_a_node_of_another_run_is_sent_away(swarm: Swarm) -> None:
    await swarm.found()
    write_run(swarm.root / "n1", SLOT_MS, epoch_s=time.time())
    stranger = swarm.start("n1", 0, (swarm.door,))
    with pytest.raises(ExceptionGroup) as caught:
        await swarm.ended(stranger)
    assert caught.group_contains(Incompatible, match="use another --state-dir")


async def test_a_founder_that_is_killed_at_once_finds_its_run_again(tmp_path: Path) -> None:
    memory = MemoryNetwork()
    (tmp_path / "text.txt").write_bytes(TEXT.tobytes() * 20)

    async def start_transport(path: Path, options: P2pdOptions) -> MemoryTransport:
        return memory.join(identity_file.load(path).peer_id)

    config = NodeConfig(
        data=DataSection(paths=(tmp_path / "text.txt",)),
        train=TrainSection.model_validate({"tier": 3, "batch": 1, "nice": 19}),
        state=StateSection(dir=tmp_path / "n0"),
        metrics=MetricsSection(enabled=False),
    )
    runs = []
    for _ in range(2):
        daemon = Service(config, SystemClock(), start_transport)
        task = asyncio.ensure_future(daemon.run())
        await until(lambda task=task, daemon=daemon: task.done() or daemon.status.engine is not None, LOOK_S)
        runs.append(daemon.answers.status(0).run_id)
        daemon.leave(now=True)
        await task
    assert runs[0] == runs[1] != ""


async def test_rest_and_go_on(swarm: Swarm) -> None:
    """Pause and resume by hand: silent meanwhile, nothing of its work given up, and back where the others are."""
    founder = await swarm.found()
    joiner = await swarm.join("n1", 0)
    await swarm.until(lambda: 2 in contributors(founder) and agree(founder, joiner))
    assert joiner.daemon is not None
    await swarm.until(lambda: joiner.answers.status(0).reachability == "public")
    given_up = dict(joiner.answers.status(0).forfeited)  # on a very busy machine, before anybody rested
    joiner.answers.pause(0.0, finish=False)
    await swarm.until(lambda: joiner.node.exchange.engine is None)
    assert joiner.node.metrics.state == "paused"
    await swarm.until(lambda: founder.answers.peers().peers[0].state == "silent")  # it said goodbye
    steps, sent = joiner.answers.status(0).steps, joiner.node.exchange.sent.total()
    slot = founder.answers.status(0).slot
    await swarm.until(lambda: any(at > slot + 1 for at in certified(founder)))  # the others go on without it
    assert joiner.answers.status(0).steps == steps
    assert joiner.node.exchange.sent["blob"] <= sent
    joiner.answers.resume()
    await swarm.until(lambda: joiner.node.metrics.state == "training")
    back = founder.answers.status(0).slot
    await swarm.until(lambda: any(r.slot > back and r.contributors == 2 for r in founder.answers.status(0).slots))
    await swarm.until(lambda: agree(founder, joiner))
    now_given_up = dict(joiner.answers.status(0).forfeited)
    assert {**now_given_up, "clipped": 0} == {**given_up, "clipped": 0}  # being clipped is part of contributing
    totals = {c.peer_id: c.tokens for c in founder.answers.contributions().contributors}
    assert len(totals) == 2
    assert all(totals.values())
