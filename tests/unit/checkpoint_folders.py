"""Checkpoint folders as somebody may have left them, for the tests of slicing, tiers and manifests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from braniac.model.tier_folders import Strategy, write_manifest

BASE = 64
STRATEGIES: tuple[Strategy, ...] = ("auto", "sliced", "universal")
MODEL = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
NAMES = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(2) for kind in ("up", "down")]


def weights(*widths: int) -> bytes:
    tensors = {"model.embed_tokens.weight": torch.zeros(8, 4)}
    for layer, width in enumerate(widths if len(widths) > 1 else widths * 2):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.zeros(width, 4)
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = torch.zeros(4, width)
    return safetensors.torch.save(tensors, {"format": "pt"})


def save(folder: Path, width: int, base: int | None = None, tier: int | None = None, **changes: object) -> Path:
    """A checkpoint as somebody may have left it: keys that are None are not written."""
    keys = {"matformer_base_intermediate_size": base, "matformer_tier": tier}
    config = {**MODEL, "intermediate_size": width, **keys, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (folder / "model.safetensors").write_bytes(weights(width))
    return folder


def export(parent: Path) -> Path:
    """X with two tiers, a tokenizer and a manifest."""
    universal = save(parent / "X", 64, 64, 0)
    (universal / "tokenizer.json").write_text("{}")
    save(parent / "X-tier1", 32, 64, 1)
    save(parent / "X-tier2", 16, 64, 2)
    write_manifest(universal, [1, 2])
    return universal


def edit(universal: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest in a universal checkpoint's folder."""
    path = universal / "matformer_manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
