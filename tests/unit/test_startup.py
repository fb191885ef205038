"""Taking part: recover, join or found; with what was on disk, to the bit, or a sentence about why not."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from braniac.model.errors import DataError
from braniac.model.sources import Corpus
from braniac.model.tokenizer import FileTokenizer
from braniac.node import identity_file, run_file, startup
from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.config import DataSection, NetworkSection, NodeConfig, RunSection, StateSection, TrainSection
from braniac.node.errors import ConfigError, Incompatible, NodeError
from braniac.node.exchange import Exchange
from braniac.node.marks import Marks
from braniac.node.metrics import Metrics
from braniac.node.network import Network
from braniac.node.p2pd import P2pdOptions
from braniac.node.startup import Equipment, equip, join_run
from braniac.node.store import DiskFull, Store
from braniac.node.text import run_tokenizer
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.identity import Identity, PeerId, peer_id_text
from braniac.protocol.manifest import Manifest, sign_manifest
from tests.unit.node_harness import CONFIG, EPOCH_S, TEXT, identity, make_manifest, write_run
from tests.unit.texts import write_shard, write_tokenizer


class Starter:
    """Makes the equipment of nodes, one after the other in the same state directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = FakeClock(wall_s=EPOCH_S + 100)
        self.stores: list[Store] = []
        (root / "text.txt").write_bytes(TEXT.tobytes())

    def equipment(
        self,
        name: str = "n0",
        *,
        tier: object = "auto",
        run_id: str | None = None,
        run: RunSection | None = None,
        peers: tuple[str, ...] = (),
        memory: MemoryNetwork | None = None,
    ) -> Equipment:
        for store in self.stores:
            store.close()
        state_dir = self.root / name
        config = NodeConfig(
            network=NetworkSection(run_id=run_id, peers=peers),
            run=run or RunSection(slot_s=1.0),
            train=TrainSection.model_validate({"tier": tier, "batch": 2, "nice": 0}),
            data=DataSection(paths=(self.root / "text.txt",)),
            state=StateSection(dir=state_dir),
        )
        store, metrics, swarm_clock = Store.open(state_dir), Metrics("test", 1), SwarmClock(self.clock)
        self.stores.append(store)
        identity = identity_file.load_or_create(state_dir / "identity.key")
        hub = memory or MemoryNetwork()

        async def start_transport(path: Path, options: P2pdOptions) -> MemoryTransport:
            return hub.join(identity.peer_id)

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
        replica.missed = {2: 3}
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
        assert replica.missed == {2: 3}


async def test_a_life_in_which_nobody_answers_does_not_forget_the_others(starter: Starter) -> None:
    """Its generations would say that it knows nobody, and the next life would believe a wall clock that is wrong."""
    write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S)
    others = {identity(1).peer_id: (f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id_text(identity(1).peer_id)}",)}
    for life in range(3):
        node = starter.equipment()
        await node.network.start(node.exchange.answer)
        membership = await join_run(node)
        assert node.swarm_clock.now() < EPOCH_S + 200
        if life:
            assert node.network.known_peers() == others
        async with equip(node, membership) as (replica, engine):
            offset = node.swarm_clock.now() - starter.clock.wall()
            peers = node.network.known_peers() or others
            await replica.commit(engine, membership.incarnation, (offset, node.swarm_clock.now()), peers, None)
        starter.clock.set_wall(EPOCH_S + 3600 * (1 + life))


async def test_slots_and_incarnations_never_go_back(starter: Starter) -> None:
    write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S + 5000)
    starter.clock.set_wall(EPOCH_S - 1e6)  # the battery was empty
    node = starter.equipment()
    membership = await join_run(node)
    assert node.swarm_clock.now() >= EPOCH_S + 5000
    assert membership.incarnation > 1
    starter.clock.set_wall(0.0)
    again = await join_run(starter.equipment())
    assert again.incarnation == membership.incarnation + 1, "though nothing was saved in between"


async def test_a_start_that_cannot_be_counted_waits(starter: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sequence numbers might repeat those of an earlier one that could not be counted either."""
    full = [True, True, False]
    count_start = Marks.count_start

    def count(self: Marks, least: int) -> int:
        if full.pop(0):
            raise DiskFull("no space left")
        return count_start(self, least)

    monkeypatch.setattr(Marks, "count_start", count)
    monkeypatch.setattr(startup, "_DISK_RETRY_S", 0.0)
    write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S)
    with capture_logs() as logs:
        await join_run(starter.equipment())
    assert full == []
    assert [line["event"] for line in logs].count("waiting for space on the disk") == 1


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


# --- runs from a file, and what is asked before joining --------------------------------------------------------------


def write_file(path: Path, founder: Identity) -> Manifest:
    """A signed run file."""
    manifest = make_manifest(founder, epoch_s=EPOCH_S)
    run_file.write(path, *sign_manifest(manifest, founder), overwrite=True)
    return manifest


async def test_the_run_in_a_file_is_founded_by_who_signed_it(starter: Starter) -> None:
    path = starter.root / "run.braniac"
    node = starter.equipment(run=RunSection(file=path))
    manifest = write_file(path, node.identity)
    membership = await join_run(node)
    assert (membership.manifest, membership.founded) == (manifest, True)
    async with equip(node, membership) as (replica, engine):
        assert set(engine.anchors()) == set(manifest.held(0))  # it begins from the initial weights
        await replica.commit(engine, membership.incarnation, (0.0, node.swarm_clock.now()), {}, None)
    again = await join_run(starter.equipment(run=RunSection(file=path)))
    assert again.manifest == manifest
    assert not again.founded
    write_file(path, identity(5))
    with pytest.raises(Incompatible, match=r"not .*\.\.\. of .*run\.braniac: check --run"):
        await join_run(starter.equipment(run=RunSection(file=path)))


async def test_the_run_in_a_file_cannot_be_founded_by_others(starter: Starter) -> None:
    path = starter.root / "run.braniac"
    write_file(path, identity(5))
    with pytest.raises(ConfigError, match="not by this node: give --peers or a join link"):
        await join_run(starter.equipment(run=RunSection(file=path)))
    with pytest.raises(ConfigError, match=r"run\.seed is for a new run"):
        await join_run(starter.equipment(run=RunSection(file=path, seed=1)))
    with pytest.raises(ConfigError, match="cannot read the run file"):
        await join_run(starter.equipment(run=RunSection(file=starter.root / "none")))


class Door:
    """A node that serves a run's manifest on a memory network, and one that is told where it is."""

    def __init__(self, starter: Starter, run: RunSection | None = None) -> None:
        self.memory = MemoryNetwork()
        self.host = self.memory.join(identity(7).peer_id)
        [address] = self.host.addresses()
        self.joiner = starter.equipment("joiner", run=run, peers=(address,), memory=self.memory, tier=3)

    async def open(self, manifest: Manifest, founder: Identity) -> Equipment:
        """Serve that run: the node that may join."""
        body, signature = sign_manifest(manifest, founder)
        signed = pb.SignedManifest(body=body, signature=signature).SerializeToString()
        reply = pb.Reply(manifest=signed, swarm_time_s=EPOCH_S + 100).SerializeToString()

        async def answer(peer: PeerId, request: bytes) -> bytes:
            return reply

        await self.host.serve(answer)
        await self.joiner.network.start(answer)
        return self.joiner


async def test_nothing_is_joined_before_a_person_agrees(starter: Starter) -> None:
    founder, asked = identity(7), []
    manifest = make_manifest(founder)
    node = await Door(starter).open(manifest, founder)

    async def ask(text: str) -> bool:
        asked.append(text)
        return len(asked) > 1

    node.ask = ask
    with pytest.raises(NodeError, match="nothing was downloaded"):
        await join_run(node)
    membership = await join_run(node)
    assert (membership.manifest, membership.founded) == (manifest, False)
    assert manifest.run_id.hex() in asked[0]
    assert "3 *" in asked[0]  # the tier that it would take
    node.ask = None
    assert (await join_run(node)).manifest == manifest  # a service goes on by itself


async def test_a_founder_that_lost_its_state_joins_like_anybody(starter: Starter) -> None:
    path = starter.root / "run.braniac"
    door = Door(starter, RunSection(file=path))
    manifest = write_file(path, door.joiner.identity)
    node = await door.open(manifest, door.joiner.identity)
    membership = await join_run(node)
    assert not membership.founded
    async with equip(node, membership) as (_, engine):
        assert not engine.anchors()  # what the others have must be downloaded, not begun anew


async def test_a_run_file_pins_the_run_that_peers_may_offer(starter: Starter) -> None:
    path = starter.root / "run.braniac"
    write_file(path, identity(5))
    node = await Door(starter, RunSection(file=path)).open(make_manifest(identity(7)), identity(7))
    with pytest.raises(Incompatible, match="check --run, --peers"):
        await join_run(node)


async def test_a_runs_tokenizer_must_be_brought_once(starter: Starter) -> None:
    founder, file = identity(7), write_tokenizer(starter.root / "given.json")
    plain = make_manifest(founder, config=dataclasses.replace(CONFIG, vocab_size=448))
    manifest = dataclasses.replace(plain, data={"tokenizer": FileTokenizer.read(file).name})
    node = await Door(starter).open(manifest, founder)
    membership = await join_run(node)

    async def start(tokenizer: Path | None) -> Corpus:
        data = DataSection(paths=node.config.data.paths, tokenizer=tokenizer)
        node.config = node.config.model_copy(update={"data": data})
        async with equip(node, membership) as (replica, _):
            return await replica.trainer.call(lambda trainer: trainer.batches.corpus)

    with pytest.raises(
        DataError, match=r"text\.txt is text, and this model's tokenizer is not here: set data\.tokeniz"
    ):
        await start(None)
    with pytest.raises(
        ConfigError, match=r"other\.json is not the tokenizer of this run \(sha256:.*\): ask its founder"
    ):
        await start(write_tokenizer(starter.root / "other.json", vocab_size=300))
    first, kept = await start(file), await start(None)
    assert first.train[0].tolist() == kept.train[0].tolist()
    assert int(first.train[0].max()) > 255
    with pytest.raises(ConfigError, match="this run reads text as bytes: drop data"):
        run_tokenizer(make_manifest(founder), node.config.data.model_copy(update={"tokenizer": file}), starter.root)


async def test_a_bad_shard_is_refused_or_left_out(starter: Starter) -> None:
    write_run(starter.root / "n0", 1000, epoch_s=EPOCH_S)
    write_shard(starter.root / "bad.bin", [999])
    for choice in ("refuse", "skip"):
        node = starter.equipment()
        paths = (*node.config.data.paths, starter.root / "bad.bin")
        data = DataSection.model_validate({"paths": paths, "bad_shards": choice})
        node.config = node.config.model_copy(update={"data": data})
        membership = await join_run(node)
        if choice == "refuse":
            with pytest.raises(DataError, match=r"bad\.bin holds token 999 at byte 1024"):
                await equip(node, membership).__aenter__()
            continue
        with capture_logs() as logs:
            async with equip(node, membership) as (replica, _):
                corpus = await replica.trainer.call(lambda trainer: trainer.batches.corpus)
        assert len(corpus.train) == 1
        assert any("bad.bin holds token 999" in line.get("reason", "") for line in logs)
