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
from braniac.model.tokenizer import BYTES, Tokenizer
from braniac.node import offline
from braniac.node.config import DataSection
from braniac.node.errors import ConfigError
from braniac.node.text import given_tokenizer, run_tokenizer

Format = Literal["folder", "gguf"]
Weights = Literal["agreed", "own"]
Dtype = Literal["f32", "bf16", "f16"]
_DTYPES: dict[Dtype, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def export(
    target: Path,
    *,
    folder: Path | None,
    state_dir: Path,
    data: DataSection,
    weights: Weights,
    form: Format,
    tier: int | None,
    width: int | None,
    tiers: Sequence[int] | None,
    dtype: Dtype,
    overwrite: bool,
) -> dict[str, Any]:
    """Write the model of `folder`, or else of a node's state directory, to `target`; what was written.

    The tokenizer goes along; `data` may name it. `tier` or `width` cut a slice; `tiers` writes the whole model and
    these slices beside it, with a manifest. Raises ConfigError, StateError, ModelError.
    """
    if sum(choice is not None for choice in (tier, width, tiers)) > 1:
        raise ConfigError("--tier, --width and --tiers exclude each other: give one of them")
    model, tokenizer = _model(folder, state_dir, data, weights)
    if tier is not None:
        width = tier_width(model.config, tier)
    if form == "gguf":
        if tiers is not None:
            raise ConfigError("a GGUF file holds one width: give --tier or --width instead of --tiers")
        if dtype == "bf16":
            raise ConfigError("a GGUF file holds f32 or f16: give one of them with --dtype")
        if tokenizer is not None and tokenizer.name != BYTES:
            raise ConfigError(
                "a GGUF file with this tokenizer is llama.cpp's to make: export a folder and convert that"
            )
        export_gguf(model, target, width=width, dtype=dtype, overwrite=overwrite)
    elif tiers is not None:
        save_tiers(model, target, tiers, dtype=_DTYPES[dtype], source=folder, tokenizer=tokenizer, overwrite=overwrite)
    else:
        save_folder(
            model, target, width=width, dtype=_DTYPES[dtype], source=folder, tokenizer=tokenizer, overwrite=overwrite
        )
    return {
        "written": str(target),
        "format": form,
        "family": model.config.family,
        "width": max(model.neurons) if width is None else width,
        "dtype": dtype,
    }


def _model(folder: Path | None, state_dir: Path, data: DataSection, weights: Weights) -> tuple[GPT, Tokenizer | None]:
    if folder is not None:
        model = load_folder(folder)[0]
        return model, None if data.tokenizer is None else given_tokenizer(data)
    store, saved, own = offline.load(state_dir)
    tokenizer = run_tokenizer(saved.manifest, data, state_dir)
    return own if weights == "own" else offline.load_anchors(store, saved), tokenizer
