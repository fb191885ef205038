"""Checkpoints: round trip, Hugging Face's orientation, and refusal of anything that does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import safetensors.torch
import torch

from braniac.model.checkpoint import from_safetensors, to_safetensors
from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError
from braniac.model.tiers import HEAD, parameter_shapes

CONFIG = ModelConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, context=4)
DOWN = "model.layers.0.mlp.down_proj.weight"


def some_tensors(tier: int) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=dice) for name, shape in parameter_shapes(CONFIG, tier).items()}


def forged(tensors: dict[str, torch.Tensor] | None = None, metadata: Mapping[str, str | None] | None = None) -> bytes:
    """A checkpoint of tier 1 with other tensors or metadata than its writer would allow."""
    honest = {
        "config": json.dumps(CONFIG.to_dict()),
        "matformer_tier": "1",
        "matformer_base_intermediate_size": "32",
    }
    chosen = {key: value for key, value in {**honest, **(metadata or {})}.items() if value is not None}
    on_disk = {
        name: (t.mT if name == DOWN and t.dim() == 2 else t).contiguous()
        for name, t in (some_tensors(1) if tensors is None else tensors).items()
    }
    return safetensors.torch.save(on_disk, chosen)


@pytest.mark.parametrize("tier", [0, 1, 3])
def test_round_trip(tier: int) -> None:
    tensors = some_tensors(tier)
    data = to_safetensors(tensors, CONFIG, tier, {"run": "abc"})
    found, metadata = from_safetensors(data)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (metadata.config, metadata.tier, metadata.extra) == (CONFIG, tier, {"run": "abc"})


def test_equal_weights_give_equal_bytes() -> None:
    """Else blobs, which are named by their digests, would have another name each time."""
    written = {to_safetensors(some_tensors(0), CONFIG, 0, {"run": "abc"}) for _ in range(10)}
    assert len(written) == 1
    assert all(
        (8 + int.from_bytes(data[:8], "little")) % 8 == 0 for data in written
    )  # tensors lie as the library aligns


def test_on_disk_down_proj_lies_as_hugging_face_has_it() -> None:
    tensors = some_tensors(1)
    raw = safetensors.torch.load(to_safetensors(tensors, CONFIG, 1))
    assert raw[DOWN].shape == (8, 16)
    assert torch.equal(raw[DOWN], tensors[DOWN].mT)
    assert raw["model.layers.0.mlp.up_proj.weight"].shape == (16, 8)


def test_the_forger_is_otherwise_honest() -> None:
    tensors, metadata = from_safetensors(forged())
    assert metadata.tier == 1
    assert torch.equal(tensors[DOWN], some_tensors(1)[DOWN])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({HEAD: None}, "lacks 'lm_head.weight'"),
        ({"evil": torch.zeros(1)}, "unknown tensor 'evil'"),
        ({DOWN: torch.zeros(32, 8)}, r"is \(8, 32\): tier 1 needs \(8, 16\)"),
        ({DOWN: torch.zeros(4)}, r"is \(4,\): tier 1 needs \(8, 16\)"),
        ({HEAD: torch.zeros(256, 8, dtype=torch.float16)}, "torch.float16: torch.float32 is expected"),
        ({HEAD: torch.full((256, 8), torch.nan)}, "not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_reader_and_writer(change: dict[str, Any], sentence: str) -> None:
    tensors = {name: t for name, t in {**some_tensors(1), **change}.items() if t is not None}
    with pytest.raises(CheckpointError, match=sentence):
        from_safetensors(forged(tensors))
    with pytest.raises(CheckpointError, match=sentence):
        to_safetensors(tensors, CONFIG, 1)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"config": None}, "lacks 'config'"),
        ({"matformer_tier": None}, "lacks 'matformer_tier'"),
        ({"matformer_tier": "one"}, "cannot be used"),
        ({"matformer_tier": "4"}, "tier 4 does not exist"),
        ({"matformer_base_intermediate_size": "64"}, "its config says 32"),
        ({"config": "{"}, "cannot be used"),
        ({"config": "[]"}, "no JSON object"),
        ({"config": "[" * 100_000}, "cannot be used"),
        ({"config": json.dumps({**CONFIG.to_dict(), "num_hidden_layers": 10**9})}, "from 1 to"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(metadata: dict[str, str | None], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        from_safetensors(forged(metadata=metadata))


def test_cut_and_garbled_files_are_refused() -> None:
    data = to_safetensors(some_tensors(1), CONFIG, 1)
    for broken in (b"", data[:7], data[:100], data[:-1], data + b"x", b"\xff" * 64):
        with pytest.raises(CheckpointError, match="no valid safetensors"):
            from_safetensors(broken)
