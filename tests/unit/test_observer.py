"""Observers beside whole daemons, in one event loop: what they tell is what the nodes tell of themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from braniac.node.clock import SystemClock
from braniac.node.config import NodeConfig, StateSection
from braniac.node.errors import ConfigError, Incompatible
from braniac.node.metrics import BaseMetrics
from braniac.node.observer import Observer
from braniac.node.service import Service
from tests.unit.daemons import LOOK_S, Swarm, swarm_below
from tests.unit.node_harness import PATIENCE_S, until


@pytest.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    async for swarm in swarm_below(tmp_path):
        yield swarm


def observer_of(swarm: Swarm, **network: object) -> Observer:
    config = swarm.config("watcher", 0, (swarm.door,))
    config = config.model_copy(update={"network": config.network.model_copy(update=network)})
    return Observer(config, SystemClock(), swarm.start_transport)


def value(metrics: BaseMetrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, name
    return found


def peers(observer: Observer) -> float:
    """How many peers it hears."""
    return sum(
        value(observer.metrics, "braniac_swarm_peers", state=state, tier=str(tier))
        for state in ("ready", "joining")
        for tier in range(4)
    )


async def test_its_counts_match_those_of_the_nodes(swarm: Swarm) -> None:
    founder = await swarm.found()
    observer = observer_of(swarm)
    observing = asyncio.ensure_future(observer.run())
    try:
        await swarm.until(lambda: observer.metrics.ready)
        joiner = await swarm.join("n1", 3)
        await swarm.until(lambda: peers(observer) == 2 == len(certificates_since(observer, founder)))
        for node in (founder, joiner):
            metrics = node.node.metrics
            await swarm.until(lambda metrics=metrics: value(metrics, "braniac_peers") + 1 == peers(observer))
            assert abs(value(metrics, "braniac_slot") - value(observer.metrics, "braniac_swarm_slot")) <= 1
        assert [peer.state for peer in founder.answers.peers().peers].count("observer") == 1
        assert founder.answers.status(0).peers_live == 1
        assert dict(founder.answers.status(0).peers_by_tier) == {3: 1}
        loss = value(founder.node.metrics, "braniac_loss_nats_per_byte", split="train")
        told = value(observer.metrics, "braniac_swarm_loss_nats_per_byte", tier="0")
        assert told == pytest.approx(loss, rel=0.5)  # one slot older
        version = founder.node.metrics.version
        assert value(observer.metrics, "braniac_swarm_peer_versions", version=version) == 2
        assert value(observer.metrics, "braniac_messages_refused_total", code="bad_signature") == 0
    finally:
        observer.leave()
        await observing
    await swarm.until(lambda: "observer" not in [peer.state for peer in founder.answers.peers().peers])  # a goodbye


def certificates_since(observer: Observer, node: Service) -> set[int]:
    """The first two slots that observer and node both saw certified, or fewer."""
    assert observer.engine is not None
    seen = observer.engine.history.contributions._open.keys()
    return set(sorted(seen & {r.slot for r in node.answers.status(0).slots if r.certificate})[:2])


async def test_it_leaves_before_a_run_is_found(swarm: Swarm) -> None:
    founder = await swarm.found()
    observer = observer_of(swarm)
    founder.leave(now=True)
    await swarm.ended(founder)
    observing = asyncio.ensure_future(observer.run())
    await until(lambda: observer.network.failures, LOOK_S)
    observer.leave()
    async with asyncio.timeout(PATIENCE_S):
        await observing


async def test_another_run_than_the_one_asked_for_is_refused(swarm: Swarm) -> None:
    await swarm.found()
    with pytest.raises(Incompatible, match="check --run-id"):
        await observer_of(swarm, run_id="1" * 64).run()


def test_without_a_peer_there_is_nothing_to_observe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --peers"):
        Observer(NodeConfig(state=StateSection(dir=tmp_path)), SystemClock())
