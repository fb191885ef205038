"""Taking part: recover, join or found; with what was on disk, to the bit, or a sentence about why not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from braniac.node import identity_file
from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.config import DataSection, NetworkSection, NodeConfig, RunSection, StateSection, TrainSection
from braniac.node.errors import ConfigError, Incompatible
from braniac.node.exchange import Exchange
from braniac.node.metrics import Metrics
from braniac.node.network import Network
from braniac.node.p2pd import P2pdOptions
from braniac.node.startup import Equipment, equip, join_run
from braniac.node.store import Store
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from tests.unit.node_harness import EPOCH_S, TEXT, write_run


class Starter:
    """Makes the equipment of nodes, one after the other in the same state directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = FakeClock(wall_s=EPOCH_S + 100)
        self.stores: list[Store] = []
        (root / "text.txt").write_bytes(TEXT.tobytes())

    def equipment(self, name: str = "n0", *, tier: object = "auto", run_id: str | None = None) -> Equipment:
        for store in self.stores:
            store.close()
        state_dir = self.root / name
        config = NodeConfig(
            network=NetworkSection(run_id=run_id),
            run=RunSection(slot_s=1.0),
            train=TrainSection.model_validate({"tier": tier, "batch": 2, "nice": 0}),
            data=DataSection(paths=(self.root / "text.txt",)),
            state=StateSection(dir=state_dir),
        )
        store, metrics, swarm_clock = Store.open(state_dir), Metrics("test", 1), SwarmClock(self.clock)
        self.stores.append(store)
        identity = identity_file.load_or_create(state_dir / "identity.key")
        memory = MemoryNetwork()

        async def start_transport(path: Path, options: P2pdOptions) -> MemoryTransport:
            return memory.join(identity.peer_id)

        network = Network(
            config.network, state_dir / "identity.key", identity, self.clock, start_transport=start_transport
        )
        exchange = Exchange(store, metrics, self.clock, swarm_clock, 10.0)
        return Equipment(config, self.clock, swarm_clock, metrics, store, identity, network, exchange)


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for store in starter.stores:
        store.close()


async def test_without_state_and_peers_a_run_is_founded(starter: Starter) -> None:
    node = starter.equipment()
    membership = await join_run(node)
    assert membership.saved is None
    assert membership.manifest.founder == node.identity.peer_id
    assert membership.manifest.slot_at(node.swarm_clock.now()) == 0
    assert membership.incarnation == int(starter.clock.wall())


async def test_what_is_on_disk_is_taken_up_again(starter: Starter) -> None:
    manifest = write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S)
    node = starter.equipment()
    membership = await join_run(node)
    assert membership.manifest == manifest
    async with equip(node, membership) as (replica, engine):
        assert set(engine.anchors()) == set(manifest.held(0)) == set(replica.anchors)
        assert engine.tier == 0
        for _ in range(3):
            await replica.trainer.call(lambda trainer: trainer.step())
        before = await replica.trainer.call(lambda trainer: trainer.state())
        await replica.commit(engine, membership.incarnation, (5.0, node.swarm_clock.now()), {}, None)

    starter.clock.advance(10)
    again = starter.equipment()
    membership = await join_run(again)
    assert again.swarm_clock.now() == pytest.approx(starter.clock.wall() + 5.0)
    async with equip(again, membership) as (replica, engine):
        tensors, counters = await replica.trainer.call(lambda trainer: trainer.state())
        assert counters == before[1] == {"step": 3}
        assert all(torch.equal(tensors[name], before[0][name]) for name in before[0])
        assert replica.trainer.progress.steps == 3


async def test_slots_and_incarnations_never_go_back(starter: Starter) -> None:
    write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S + 5000)
    starter.clock.set_wall(EPOCH_S - 1e6)  # the battery was empty
    node = starter.equipment()
    membership = await join_run(node)
    assert node.swarm_clock.now() >= EPOCH_S + 5000
    assert membership.incarnation > 1
    starter.clock.set_wall(0.0)
    assert (await join_run(starter.equipment())).incarnation == 2  # one more than what was saved


async def test_the_thread_ends_with_the_context(starter: Starter) -> None:
    write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S)
    node = starter.equipment()
    membership = await join_run(node)

    async def fail() -> None:
        async with equip(node, membership) as (replica, _):
            replica.trainer.train()
            watch = asyncio.ensure_future(replica.trainer.wait_failed())
            try:
                raise RuntimeError("something else went wrong")
            finally:
                watches.append(watch)

    watches: list[asyncio.Future[None]] = []
    with pytest.raises(RuntimeError):
        await fail()
    await watches[0]


async def test_a_pinned_run_must_be_the_one_that_is_found(starter: Starter) -> None:
    manifest = write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S)
    await join_run(starter.equipment(run_id=manifest.run_id.hex()))
    for name in ("n0", "n1"):  # the one on disk, and a new one
        with pytest.raises(Incompatible, match="check --run-id"):
            await join_run(starter.equipment(name, run_id="ab" * 32))


async def test_a_state_of_another_tier_is_not_mixed_up(starter: Starter) -> None:
    write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S)
    node = starter.equipment(tier=3)
    with pytest.raises(Incompatible, match="holds tier 0: drop --tier"):
        async with equip(node, await join_run(node)):
            pass


async def test_a_wrong_path_is_named_before_anything_else(starter: Starter) -> None:
    (starter.root / "text.txt").unlink()
    with pytest.raises(ConfigError, match=r"text\.txt does not exist"):
        await join_run(starter.equipment())
