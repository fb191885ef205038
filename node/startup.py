"""How a node comes to take part in a run: recover, join or found; then model, data, trainer and protocol engine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import structlog

from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node import bridge, checkpoint, consent, joiner, run_file
from braniac.node.checkpoint import Saved, Totals, from_generation
from braniac.node.clock import Clock, SwarmClock
from braniac.node.config import NodeConfig, RunSection
from braniac.node.errors import ConfigError, Incompatible
from braniac.node.exchange import Exchange
from braniac.node.founding import found_run, train_settings
from braniac.node.memory import choose_tier, free_memory_bytes, memory_left_bytes
from braniac.node.metrics import Metrics
from braniac.node.network import Network
from braniac.node.replica import Replica
from braniac.node.store import DiskFull, Store
from braniac.node.text import given_tokenizer, keep_tokenizer, run_tokenizer, text_source
from braniac.node.trainer_thread import TrainerThread
from braniac.protocol import statements
from braniac.protocol.engine import Engine
from braniac.protocol.errors import WireError
from braniac.protocol.history import History
from braniac.protocol.identity import Identity, peer_id_text
from braniac.protocol.manifest import Manifest
from braniac.protocol.roster import Roster

log = structlog.get_logger(__name__)

_PLAIN = RunSection()
_DISK_RETRY_S = 1.0

MakeTrainer = Callable[["Equipment", Manifest, int, TrainSettings], Awaitable[Trainer]]
"""Makes the trainer of a tier, as it is before the first step."""


@dataclass
class Equipment:
    """What a node has before it knows its run."""

    config: NodeConfig
    clock: Clock
    swarm_clock: SwarmClock
    metrics: Metrics
    store: Store
    identity: Identity
    network: Network
    exchange: Exchange
    ask: consent.Ask | None = None
    """Asks the person at the terminal before the first download; None: go on without asking."""


@dataclass(frozen=True)
class Membership:
    """Which run, and what of it was on disk."""

    manifest: Manifest
    signed: tuple[bytes, bytes]
    saved: Saved | None
    incarnation: int
    """Grows with every start, however short, so that no sequence number is used twice."""
    founded: bool = False
    """Whether this node has just begun the run, and nobody else has anything of it."""


async def join_run(node: Equipment) -> Membership:
    """The run on disk, the one of the peers we were given, or a new one.

    Raises ConfigError, Incompatible, StateError, and ManifestError for a run that cannot be joined.
    """
    _check_data(node.config)
    given = _given_run(node.config)
    generation = await asyncio.to_thread(node.store.recover)
    for number, reason in node.store.skipped:
        log.warning("passed over a damaged generation", generation=number, reason=reason)
    if generation is not None:
        saved = from_generation(generation)
        _check_pinned(node.config, saved.manifest, given)
        await _resume_time(node, saved)
        log.info("resuming", generation=generation.number, step=saved.step, tier=saved.tier)
        return Membership(saved.manifest, saved.signed_manifest, saved, await _incarnation(node, saved))
    if node.config.network.peers:
        node.metrics.set_state("joining")
        manifest, signed = await joiner.find_run(node.network, node.exchange)
        _check_pinned(node.config, manifest, given)
        await _agree(node, manifest)
        node.swarm_clock.step()
        return Membership(manifest, signed, None, await _incarnation(node, None))
    if given is not None:
        manifest, signed = given
        if manifest.founder != node.identity.peer_id:
            raise ConfigError(
                f"the run in {node.config.run.file} was founded by {peer_id_text(manifest.founder)}, not by this node: "
                "give --peers or a join link to find it"
            )
    else:
        tokenizer = given_tokenizer(node.config.data)
        manifest, body, signature = found_run(node.config.run, node.identity, node.clock.wall(), tokenizer)
        signed = (body, signature)
    _check_pinned(node.config, manifest, None)
    log.info("founded a run", name=manifest.name, slot_s=manifest.slot_s)
    return Membership(manifest, signed, None, await _incarnation(node, None), founded=True)


async def _incarnation(node: Equipment, saved: Saved | None) -> int:
    """The number of this start, for sequence numbers: peers drop what repeats one as replayed.

    The wall clock may have been set back, and the last start may have ended before it saved a generation. So the number
    must be on disk before anything is said, and a full disk is waited for.
    """
    least = max(int(node.clock.wall()), saved.incarnation + 1 if saved else 0)
    waiting = False
    while True:
        try:
            return await asyncio.to_thread(node.store.marks.count_start, least)
        except DiskFull as error:
            if not waiting:
                log.warning("waiting for space on the disk", reason=str(error))
            waiting = True
        await asyncio.sleep(_DISK_RETRY_S)


def _given_run(config: NodeConfig) -> tuple[Manifest, tuple[bytes, bytes]] | None:
    """The run in the file that was named, if any. Raises ConfigError, VersionMismatch."""
    if config.run.file is None:
        return None
    more = [key for key in config.run.model_fields_set - {"file"} if getattr(config.run, key) != getattr(_PLAIN, key)]
    if more:
        raise ConfigError(
            f"run.{min(more)} is for a new run, and the run in {config.run.file} is fixed: drop it, or drop --run"
        )
    return run_file.read(config.run.file)


async def _agree(node: Equipment, manifest: Manifest) -> None:
    """Say what taking part costs, and ask where somebody can answer. Raises NodeError, and what `equip` raises."""
    model, settings = bridge.model_of(manifest)[0], train_settings(node.config.train, manifest)
    tier = _tier(node.config, None, model, settings)
    await consent.before_the_first_download(node.config, manifest, model, settings, tier, node.ask)


async def _resume_time(node: Equipment, saved: Saved) -> None:
    """The swarm's time by those who kept it; slots never go backwards (I3).

    If nobody answers it goes on where it stopped. The wall clock may be hours ahead, and there is no way back from a
    slot in the future; from one in the past there is. Only whoever knows no other peer may go by the wall clock.
    """
    by_wall_s = saved.swarm_time_s if saved.peers else node.clock.wall() + saved.clock_offset_s
    node.swarm_clock.set(max(by_wall_s, saved.swarm_time_s))
    for peer, addresses in saved.peers.items():
        node.network.remember(peer, addresses)  # or a life in which nobody answers would forget that there are others
    known = [address for addresses in saved.peers.values() for address in addresses]
    await joiner.ask_the_time(node.network, node.exchange, [*node.network.bootstrap, *known], saved.manifest)
    moved_s = node.swarm_clock.step()
    if node.swarm_clock.now() < saved.swarm_time_s:
        node.swarm_clock.set(saved.swarm_time_s)
    log.info("took the swarm's time", peers=node.swarm_clock.peers, moved_s=round(moved_s, 1))


def _check_data(config: NodeConfig) -> None:
    """Say at once that a path is wrong, not after the run was found. Raises ConfigError."""
    for path in config.data.files:
        if not path.exists():
            raise ConfigError(f"{path} does not exist: give the path of a text file or of a folder with some")


def _check_pinned(config: NodeConfig, manifest: Manifest, given: tuple[Manifest, tuple[bytes, bytes]] | None) -> None:
    if given is not None and given[0].run_id != manifest.run_id:
        raise Incompatible(
            f"this is run {manifest.run_id.hex()[:12]}..., not {given[0].run_id.hex()[:12]}... of {config.run.file}: "
            "check --run, --peers and --state-dir"
        )
    joiner.check_run_id(config.network, manifest)


async def trainer_on_texts(node: Equipment, manifest: Manifest, tier: int, settings: TrainSettings) -> Trainer:
    """A trainer on the texts that this node's owner has chosen. Raises ConfigError, DataError."""
    config = ModelConfig.from_dict(dict(manifest.model))
    corpus = await _read_text(node.config, manifest, config)
    batches = Batches(corpus, manifest.seed, node.identity.peer_id, config.context, settings.batch)
    return await asyncio.to_thread(Trainer, config, tier, batches, settings)


@contextlib.asynccontextmanager
async def equip(
    node: Equipment,
    membership: Membership,
    make_trainer: MakeTrainer = trainer_on_texts,
    make_thread: type[TrainerThread] = TrainerThread,
) -> AsyncIterator[tuple[Replica, Engine]]:
    """Model, data, trainer thread and engine, as they were or new; the thread ends with the context.

    A simulation brings a trainer and a thread of its own. Raises ConfigError, DataError, Incompatible, ResourceError,
    StateError.
    """
    saved, manifest = membership.saved, membership.manifest
    model = bridge.model_of(manifest)
    settings = train_settings(node.config.train, manifest)
    tier = _tier(node.config, saved, model[0], settings)
    trainer = await make_trainer(node, manifest, tier, settings)
    if saved is not None:
        await asyncio.to_thread(checkpoint.resume, trainer, node.store, saved, model[1])
    totals = saved.totals if saved else Totals()
    train = node.config.train
    thread = make_thread(
        trainer,
        node.clock,
        threads=train.threads,
        nice=train.nice,
        tokens=totals.tokens,
        duty_percent=node.config.caps.duty_percent,
    )
    lean = settings.precision == "lean"
    replica = Replica(node.store, manifest, membership.signed, tier, model, thread, totals, lean=lean)
    history = saved.history if saved else History(manifest)
    if saved is not None:
        replica.anchors, replica.generation = dict(saved.anchors), saved.generation
        replica.parts = dict(saved.parts) if lean else {}
        replica.missed = dict(saved.missed)
        node.metrics.checkpoint_generation.set(saved.generation)
    elif membership.founded:
        history.begin(manifest.held(tier))
        await asyncio.to_thread(replica.begin)
    engine = Engine(
        manifest,
        node.identity,
        tier,
        incarnation=membership.incarnation,
        now=node.swarm_clock.now(),
        history=history,
        signed=node.store.marks.signed(),
    )
    for state in replica.anchors.values():
        engine.anchor_known(state)
    if saved is not None and saved.bans is not None:
        await _recall_bans(engine.roster, manifest, node.store, saved.bans)
    thread.start()
    try:
        yield replica, engine
    finally:
        await asyncio.to_thread(thread.stop)


async def _recall_bans(roster: Roster, manifest: Manifest, store: Store, digest: bytes) -> None:
    """Go on without those that were banned before."""
    stored = await asyncio.to_thread(store.get, digest)
    try:
        for proof in statements.open_proofs(stored, manifest.run_id):
            roster.ban(proof)
    except WireError as error:  # of another version: they will be convicted again
        log.warning("cannot read who was banned", reason=str(error))


async def _read_text(config: NodeConfig, manifest: Manifest, model: ModelConfig) -> Corpus:
    """What this node trains on; the first time, that takes as long as tokenising it. Raises ConfigError, DataError."""
    tokenizer = run_tokenizer(manifest, config.data, config.state.dir)
    keep_tokenizer(config.state.dir, tokenizer)
    leaving = threading.Event()
    try:
        source = text_source(config.data, tokenizer)
        corpus = await asyncio.to_thread(source.load, model.vocab_size, lambda: not leaving.is_set())
    finally:
        leaving.set()  # a node that is told to leave meanwhile must not wait for the thread
    for sentence in corpus.skipped:
        log.warning("left out a shard", reason=sentence)
    return corpus


def _tier(config: NodeConfig, saved: Saved | None, model: ModelConfig, settings: TrainSettings) -> int:
    """The tier on disk if it fits, or one that does. Raises ConfigError, Incompatible, ResourceError."""
    wanted = config.train.tier
    if saved is not None and wanted not in ("auto", saved.tier):
        raise Incompatible(f"{config.state.dir} holds tier {saved.tier}: drop --tier, or use another --state-dir")
    tier = wanted if saved is None else saved.tier
    return choose_tier(tier, model, settings, free_memory_bytes(), memory_left_bytes(config.caps.memory_mib))
