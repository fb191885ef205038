"""Weights as safetensors, in Hugging Face's names and orientation; strict to read, as anybody may have written them.

In memory down_proj is [neurons, D] and o_proj [heads * K, D]; on disk they are the other way round, as nn.Linear would
store them. The metadata says how the weights were sliced: `matformer_tier`, `matformer_base_intermediate_size` and the
whole `config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError, ModelError
from braniac.model.tiers import is_input_major, parameter_shapes


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about itself."""

    config: ModelConfig
    """Of the whole model, not of the slice."""
    tier: int
    extra: dict[str, str]
    """Whatever else the writer noted."""


def to_safetensors(
    tensors: Mapping[str, Tensor], config: ModelConfig, tier: int, extra: Mapping[str, str] | None = None
) -> bytes:
    """Serialise one tier's weights (in-memory names and orientation). Raises CheckpointError if they do not fit."""
    _check(tensors, config, tier)
    metadata = {
        **(extra or {}),
        "format": "pt",
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "matformer_tier": str(tier),
        "matformer_base_intermediate_size": str(config.intermediate_size),
    }
    on_disk = {name: _turned(name, tensor.detach()).contiguous() for name, tensor in tensors.items()}
    return _in_order(safetensors.torch.save(on_disk, metadata))


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata sorted. The library shuffles them, and equal weights have to give equal bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust(-len(text) % 8 + len(text))  # as the library aligns it
    return b"".join((len(padded).to_bytes(8, "little"), padded, memoryview(data)[end:]))


def from_safetensors(data: bytes) -> tuple[dict[str, Tensor], Metadata]:
    """Inverse of `to_safetensors`. Raises CheckpointError, naming the key and what it should have been."""
    try:
        on_disk = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that this torch does not know
        raise CheckpointError(f"the checkpoint is no valid safetensors file ({error}): fetch it again.") from error
    # The library has validated the header but does not hand out its metadata; eight bytes of length precede the JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = _metadata(header.get("__metadata__") or {})
    tensors = {name: _turned(name, tensor).contiguous() for name, tensor in on_disk.items()}
    _check(tensors, metadata.config, metadata.tier)
    return tensors, metadata


def _turned(name: str, tensor: Tensor) -> Tensor:
    """Between memory and disk, either way."""
    return tensor.mT if is_input_major(name) and tensor.dim() == 2 else tensor


def _metadata(found: dict[str, str]) -> Metadata:
    known = ("format", "config", "matformer_tier", "matformer_base_intermediate_size")
    for key in known[1:]:
        if key not in found:
            raise CheckpointError(f"the checkpoint's metadata lacks {key!r}: it was not written by braniac.")
    try:
        values = json.loads(found["config"])
        if not isinstance(values, dict):
            raise CheckpointError("the checkpoint's metadata has a 'config' that is no JSON object.")
        config = ModelConfig.from_dict(values)
        tier = int(found["matformer_tier"])
        parameter_shapes(config, tier)
    except (ValueError, RecursionError, ModelError) as error:
        raise CheckpointError(f"the checkpoint's metadata cannot be used: {error}") from error
    if found["matformer_base_intermediate_size"] != str(config.intermediate_size):
        raise CheckpointError(
            f"the checkpoint's matformer_base_intermediate_size is {found['matformer_base_intermediate_size']!r}: "
            f"its config says {config.intermediate_size}."
        )
    return Metadata(config, tier, {key: value for key, value in found.items() if key not in known})


def _check(tensors: Mapping[str, Tensor], config: ModelConfig, tier: int) -> None:
    """Exactly the tier's tensors, in memory orientation, float32 and finite."""
    shapes = parameter_shapes(config, tier)
    for name in shapes:
        if name not in tensors:
            raise CheckpointError(f"the checkpoint lacks {name!r}: tier {tier} of its model needs it.")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise CheckpointError(f"the checkpoint has an unknown tensor {name!r}: tier {tier} of its model has none.")
        if tensor.shape != shapes[name]:
            wanted = shapes[name][::-1] if is_input_major(name) else shapes[name]
            found = tuple(_turned(name, tensor).shape)
            raise CheckpointError(f"checkpoint tensor {name!r} is {found}: tier {tier} needs {wanted}.")
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"checkpoint tensor {name!r} is {tensor.dtype}: torch.float32 is expected.")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"checkpoint tensor {name!r} holds values that are not finite: fetch it again.")
