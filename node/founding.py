"""Founding a run: from configuration to a signed manifest, and the tier that fits this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.fragments import fragment_table, layout_digest
from braniac.model.trainer import TrainSettings, default_precision, memory_bytes_needed
from braniac.node import bridge
from braniac.node.config import RunSection, Tier, TrainSection
from braniac.node.errors import ConfigError, ResourceError
from braniac.node.run_data import run_data
from braniac.protocol.codec import CodecRules
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest, MergeRules, sign_manifest

_SHARE_OF_FREE_MEMORY = 0.8  # leave the rest to the person whose device this is
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Recipe:
    """How a run of one preset is paced, if its founder does not say otherwise."""

    slot_s: float
    fragments: int
    up_per_tile: int
    down_per_tile: int


RECIPES = {
    # Minutes long, for trying things out: each window carries 6% of the values, so that few windows are enough.
    "tiny": Recipe(slot_s=1.0, fragments=8, up_per_tile=256, down_per_tile=1024),
    # Hours long: 0.16 bit per parameter and window.
    "small": Recipe(slot_s=10.0, fragments=24, up_per_tile=64, down_per_tile=256),
}
RECIPES |= {f"{preset}-llama": recipe for preset, recipe in RECIPES.items()}
RECIPES |= {
    # Days long. A fragment is of 2 to 4 million values, so that its offer and merge take little beside the training.
    "nano-124m": Recipe(slot_s=30.0, fragments=64, up_per_tile=64, down_per_tile=256),
    "nano-1b": Recipe(slot_s=60.0, fragments=256, up_per_tile=64, down_per_tile=256),
}


def found_run(run: RunSection, identity: Identity, now: float) -> tuple[Manifest, bytes, bytes]:
    """A new run whose first slot begins at `now` (Unix seconds): the manifest, and its signed form."""
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
        data={"tokenizer": "bytes"},
        layout_digest=layout_digest(config, fragments),
        fragments=bridge.fragment_specs(fragment_table(config, fragments)),
        up=CodecRules(run.up_per_tile or recipe.up_per_tile, magnitude_bits=1),
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
        device=train.device,
        seed=manifest.seed,
    )


def free_memory_bytes() -> int:
    """What this process may take: free memory, or what its control group leaves, whichever is less."""
    free = psutil.virtual_memory().available
    for path in _CGROUP_LIMITS:
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):
            continue
        free = min(free, limit - psutil.Process().memory_info().rss)
    return free


def memory_left_bytes(cap_mib: int) -> int | None:
    """What a cap on this process's memory leaves to the trainer; None without a cap."""
    return cap_mib * 2**20 - psutil.Process().memory_info().rss if cap_mib else None


def choose_tier(
    wanted: Tier, config: ModelConfig, settings: TrainSettings, free_bytes: int, left_bytes: int | None = None
) -> int:
    """The tier to train: the wanted one, or the largest that fits. Raises ConfigError, ResourceError.

    `left_bytes` is what the owner's cap leaves, all of which may be used; of what is free only a part may.
    """
    needs = [memory_bytes_needed(config, tier, settings) for tier in range(config.tiers)]
    budget = int(free_bytes * _SHARE_OF_FREE_MEMORY)
    if left_bytes is not None:
        budget = min(budget, left_bytes)
    if wanted != "auto":
        if wanted >= config.tiers:
            raise ConfigError(f"this run has no tier {wanted}: choose one from 0 to {config.tiers - 1}, or --tier auto")
        if left_bytes is not None and needs[wanted] > left_bytes:
            raise ResourceError(
                f"tier {wanted} needs {_mib(needs[wanted])} and caps.memory_mib leaves {_mib(max(0, left_bytes))}: "
                "raise it, or use --tier auto"
            )
        if needs[wanted] > free_bytes:
            raise ResourceError(
                f"tier {wanted} needs {_mib(needs[wanted])} and {_mib(free_bytes)} are free: use --tier auto"
            )
        return wanted
    for tier, need in enumerate(needs):
        if need <= budget:
            return tier
    remedy = "raise caps.memory_mib" if budget == left_bytes else "close other programs"
    raise ResourceError(f"even the smallest tier needs {_mib(needs[-1])} and {_mib(budget)} may be used: {remedy}")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
