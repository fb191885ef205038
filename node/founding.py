"""Founding a run: from configuration to a signed manifest, and how a node trains in it."""

from __future__ import annotations

from dataclasses import dataclass

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.fragments import fragment_table, layout_digest
from braniac.model.tokenizer import BYTES, ByteTokenizer, Tokenizer
from braniac.model.trainer import TrainSettings, default_precision
from braniac.node import bridge
from braniac.node.config import RunSection, TrainSection
from braniac.node.errors import ConfigError
from braniac.node.run_data import run_data
from braniac.protocol.codec import CodecRules
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest, MergeRules, sign_manifest


@dataclass(frozen=True)
class Recipe:
    """How a run of one preset is paced, if its founder does not say otherwise."""

    slot_s: float
    fragments: int
    up_per_tile: int
    down_per_tile: int


TURNS = 4
"""Whose values a contribution may hold: after up to three misses in a row nothing is behind."""

RECIPES = {
    # Minutes long, for trying things out: each window carries 6% of the values, so that few windows are enough.
    "tiny": Recipe(slot_s=1.0, fragments=8, up_per_tile=256, down_per_tile=1024),
    # Hours long: 0.16 bit per parameter and window up, and room in an update for what eight peers send.
    "small": Recipe(slot_s=10.0, fragments=24, up_per_tile=64, down_per_tile=512),
}
RECIPES |= {f"{preset}-llama": recipe for preset, recipe in RECIPES.items()}
RECIPES |= {
    # Days long. A fragment is of 2 to 4 million values, so that its offer and merge take little beside the training.
    "nano-124m": Recipe(slot_s=30.0, fragments=64, up_per_tile=64, down_per_tile=512),
    "nano-1b": Recipe(slot_s=60.0, fragments=256, up_per_tile=64, down_per_tile=512),
}


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Refuse a tokenizer whose tokens a model does not know. Raises ConfigError."""
    if tokenizer.vocab_size > model.vocab_size:
        kind = "text is read as bytes" if tokenizer.name == BYTES else "the tokenizer has more tokens"
        raise ConfigError(
            f"model.vocab_size = {model.vocab_size} is too small: {kind}, so give at least {tokenizer.vocab_size}"
        )


def found_run(
    run: RunSection, identity: Identity, now: float, tokenizer: Tokenizer | None = None
) -> tuple[Manifest, bytes, bytes]:
    """A new run whose first slot begins at `now` (Unix seconds): the manifest, and its signed form.

    Text is read with `tokenizer`, or as bytes. Raises ConfigError if the preset's model does not know its tokens.
    """
    tokenizer = tokenizer or ByteTokenizer()
    check_vocabulary(tokenizer, PRESETS[run.preset])
    config, recipe = PRESETS[run.preset], RECIPES[run.preset]
    fragments = run.fragments or recipe.fragments
    manifest = Manifest(
        name=run.name,
        founder=identity.peer_id,
        epoch_ms=int(now * 1000),
        slot_ms=round((run.slot_s or recipe.slot_s) * 1000),
        seed=run.seed,
        tiers=config.tiers,
        model=config.to_dict(),
        data={"tokenizer": tokenizer.name},
        layout_digest=layout_digest(config, fragments),
        fragments=bridge.fragment_specs(fragment_table(config, fragments)),
        up=CodecRules(run.up_per_tile or recipe.up_per_tile, magnitude_bits=1, turns=TURNS),
        down=CodecRules(run.down_per_tile or recipe.down_per_tile, magnitude_bits=2),
        merge=MergeRules(),
    )
    return manifest, *sign_manifest(manifest, identity)


def train_settings(train: TrainSection, manifest: Manifest) -> TrainSettings:
    """How this node trains in that run. Raises Incompatible for a recipe that this version does not know."""
    optimizer = run_data(manifest).optimizer
    return TrainSettings(
        learning_rate=train.learning_rate or optimizer.learning_rate,
        adam_learning_rate=optimizer.adam_learning_rate,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        batch=train.batch,
        precision=train.precision or default_precision(ModelConfig.from_dict(dict(manifest.model))),
        kept_layers=train.kept_layers,
        device=train.device,
        seed=manifest.seed,
    )
