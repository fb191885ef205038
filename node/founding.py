"""Founding a run: from configuration to a signed manifest, and the tier that fits this machine."""

from __future__ import annotations

from pathlib import Path

import psutil

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.fragments import fragment_table, layout_digest
from braniac.model.trainer import TrainSettings, memory_bytes_needed
from braniac.node import bridge
from braniac.node.config import RunSection, Tier, TrainSection
from braniac.node.errors import ResourceError
from braniac.protocol.codec import CodecRules
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest, MergeRules, sign_manifest

_SHARE_OF_FREE_MEMORY = 0.8  # leave the rest to the person whose device this is
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def found_run(run: RunSection, identity: Identity, now: float) -> tuple[Manifest, bytes, bytes]:
    """A new run whose first slot begins at `now` (Unix seconds): the manifest, and its signed form."""
    config = PRESETS[run.preset]
    manifest = Manifest(
        name=run.name,
        founder=identity.peer_id,
        epoch_ms=int(now * 1000),
        slot_ms=round(run.slot_s * 1000),
        seed=run.seed,
        tiers=config.tiers,
        model=config.to_dict(),
        data={"tokenizer": "bytes"},
        layout_digest=layout_digest(config, run.fragments),
        fragments=bridge.fragment_specs(fragment_table(config, run.fragments)),
        up=CodecRules(run.up_per_tile, magnitude_bits=1),
        down=CodecRules(run.down_per_tile, magnitude_bits=2),
        merge=MergeRules(),
    )
    return manifest, *sign_manifest(manifest, identity)


def train_settings(train: TrainSection, manifest: Manifest) -> TrainSettings:
    """How this node trains in that run."""
    defaults = TrainSettings()
    return TrainSettings(
        learning_rate=train.learning_rate or defaults.learning_rate, batch=train.batch, seed=manifest.seed
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


def choose_tier(wanted: Tier, config: ModelConfig, settings: TrainSettings, free_bytes: int) -> int:
    """The tier to train: the wanted one, or the largest that fits. Raises ResourceError if that is none."""
    needs = [memory_bytes_needed(config, tier, settings) for tier in range(config.tiers)]
    budget = int(free_bytes * _SHARE_OF_FREE_MEMORY)
    if wanted != "auto":
        if needs[wanted] > free_bytes:
            raise ResourceError(
                f"tier {wanted} needs {_mib(needs[wanted])} and {_mib(free_bytes)} are free: use --tier auto"
            )
        return wanted
    for tier, need in enumerate(needs):
        if need <= budget:
            return tier
    raise ResourceError(
        f"even the smallest tier needs {_mib(needs[-1])} and {_mib(budget)} may be used: close other programs"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
