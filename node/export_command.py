"""`braniac-node export`: turn what a node or `train` has made into files for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from braniac.model.gguf_export import export_gguf
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, save_folder, save_tiers
from braniac.model.tiers import tier_width
from braniac.node import offline
from braniac.node.errors import ConfigError

Format = Literal["folder", "gguf"]
Weights = Literal["agreed", "own"]
Dtype = Literal["f32", "bf16", "f16"]
_DTYPES: dict[Dtype, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def export(
    target: Path,
    *,
    folder: Path | None,
    state_dir: Path,
    weights: Weights,
    form: Format,
    tier: int | None,
    width: int | None,
    tiers: Sequence[int] | None,
    dtype: Dtype,
    overwrite: bool,
) -> dict[str, Any]:
    """Write the model of `folder`, or else of a node's state directory, to `target`; what was written.

    `tier` or `width` cut a slice; `tiers` writes the whole model and these slices beside it, with a manifest. Raises
    ConfigError, StateError, CheckpointError.
    """
    if sum(choice is not None for choice in (tier, width, tiers)) > 1:
        raise ConfigError("--tier, --width and --tiers exclude each other: give one of them")
    model = _model(folder, state_dir, weights)
    if tier is not None:
        width = tier_width(model.config, tier)
    if form == "gguf":
        if tiers is not None:
            raise ConfigError("a GGUF file holds one width: give --tier or --width instead of --tiers")
        if dtype == "bf16":
            raise ConfigError("a GGUF file holds f32 or f16: give one of them with --dtype")
        export_gguf(model, target, width=width, dtype=dtype, overwrite=overwrite)
    elif tiers is not None:
        save_tiers(model, target, tiers, dtype=_DTYPES[dtype], source=folder, overwrite=overwrite)
    else:
        save_folder(model, target, width=width, dtype=_DTYPES[dtype], source=folder, overwrite=overwrite)
    return {
        "written": str(target),
        "format": form,
        "family": model.config.family,
        "width": max(model.neurons) if width is None else width,
        "dtype": dtype,
    }


def _model(folder: Path | None, state_dir: Path, weights: Weights) -> GPT:
    if folder is not None:
        return load_folder(folder)[0]
    store, saved, own = offline.load(state_dir)
    return own if weights == "own" else offline.load_anchors(store, saved)
