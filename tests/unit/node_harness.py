"""What the tests of node/ share: a model of 9,000 parameters, its run, and one node's parts without a daemon."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from braniac.model.config import ModelConfig, Precision
from braniac.model.data import Batches
from braniac.model.fragments import fragment_table, layout_digest
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node import bridge, identity_file
from braniac.node.checkpoint import Saved, Totals, to_content
from braniac.node.clock import FakeClock
from braniac.node.replica import Replica
from braniac.node.store import Store
from braniac.node.trainer_thread import TrainerThread
from braniac.protocol.codec import CodecRules
from braniac.protocol.history import History
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest, MergeRules, sign_manifest
from braniac.protocol.messages import FragmentState

torch.set_num_threads(1)  # operations this small only lose by being shared

CONFIG = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, context=8)
FRAGMENTS = 5
PATIENCE_S = 60.0
EPOCH_S = 1_700_000_000.0
SETTINGS = TrainSettings(batch=2, warmup_steps=0)
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 50, np.uint8)
CORPUS = Corpus("a fox", (TEXT[:2000],), (TEXT[2000:],))


def identity(number: int) -> Identity:
    """The same peer for the same number, in every test."""
    return Identity.from_seed(hashlib.sha256(b"test node %d" % number).digest())


def make_manifest(
    founder: Identity, *, epoch_s: float = EPOCH_S, slot_ms: int = 1000, config: ModelConfig = CONFIG
) -> Manifest:
    """A run of the small model; every value may be sent, so that little is left out."""
    return Manifest(
        name="test",
        founder=founder.peer_id,
        epoch_ms=int(epoch_s * 1000),
        slot_ms=slot_ms,
        seed=0,
        tiers=config.tiers,
        model=config.to_dict(),
        data={"tokenizer": "bytes"},
        layout_digest=layout_digest(config, FRAGMENTS),
        fragments=bridge.fragment_specs(fragment_table(config, FRAGMENTS)),
        up=CodecRules(512, magnitude_bits=1, turns=4),
        down=CodecRules(2048, magnitude_bits=2),
        merge=MergeRules(),
    )


def make_trainer(tier: int = 0, peer: bytes = b"peer", precision: Precision = "fp32") -> Trainer:
    batches = Batches(CORPUS, SETTINGS.seed, peer, CONFIG.context, SETTINGS.batch)
    return Trainer(CONFIG, tier, batches, dataclasses.replace(SETTINGS, precision=precision))


def make_thread(trainer: Trainer, tokens: int = 0) -> TrainerThread:
    """Not started yet."""
    return TrainerThread(trainer, FakeClock(), threads=1, nice=0, tokens=tokens)


def make_replica(
    store: Store, founder: Identity, thread: TrainerThread, tier: int = 0, *, lean: bool = False
) -> Replica:
    manifest = make_manifest(founder)
    model = bridge.model_of(manifest)
    return Replica(store, manifest, sign_manifest(manifest, founder), tier, model, thread, Totals(), lean=lean)


def write_run(root: Path, slot_ms: int, *, epoch_s: float, config: ModelConfig = CONFIG) -> Manifest:
    """Make `root` the state directory of a founder whose run has not begun, so that a daemon takes up a small model."""
    store = Store.open(root)
    founder = identity_file.load_or_create(root / "identity.key")
    manifest = make_manifest(founder, epoch_s=epoch_s, slot_ms=slot_ms, config=config)
    history = History(manifest)
    history.begin(manifest.held(0))
    anchors = {}
    for index, fragment in enumerate(fragment_table(config, FRAGMENTS)):
        anchor = bridge.initial_anchor(config, fragment, manifest.seed)
        anchors[index] = FragmentState(index, -1, store.put(bridge.anchor_bytes(anchor)))
    saved = Saved(
        manifest,
        sign_manifest(manifest, founder),
        tier=0,
        incarnation=1,
        clock_offset_s=0.0,
        swarm_time_s=epoch_s,
        anchors=anchors,
        history=history,
        weights=None,
        optimizer=None,
        step=0,
        totals=Totals(),
        peers={},
    )
    store.commit(to_content(saved, history.to_json()), {state.digest for state in anchors.values()})
    store.close()
    return manifest


def blob_files(root: Path) -> set[bytes]:
    """Digests of the blobs in a state directory."""
    return {bytes.fromhex(path.name) for path in (root / "blobs").glob("*/*")}


async def until(condition: Callable[[], object], look_s: float = 0.0) -> None:
    """Let other tasks run until something is true, looking every `look_s`. TimeoutError if it never is."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(look_s)
