"""Between model and protocol: the only file that turns tensors into integer arrays and back.

Weights are float32 tensors, anchors int32 fixed point with 20 fraction bits. A weight below 16 differs from its
fixed-point form by at most 2**-21, and what rounding leaves out stays in the weight: it is part of the work that is
offered next time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from braniac.model.config import ModelConfig
from braniac.model.fragments import Fragment, fragment_table, initial_fragment, layout_digest
from braniac.node.errors import Incompatible
from braniac.protocol import limits
from braniac.protocol.bitpack import Int32Array, Int64Array
from braniac.protocol.ledger import Settlement
from braniac.protocol.manifest import FragmentSpec, Manifest
from braniac.protocol.tiles import TileLayout

_ONE = float(1 << limits.FRACTION_BITS)


def fragment_specs(fragments: tuple[Fragment, ...]) -> tuple[FragmentSpec, ...]:
    """The model's fragment table as the protocol needs it."""
    return tuple(FragmentSpec(fragment.ring, TileLayout(fragment.groups)) for fragment in fragments)


def model_of(manifest: Manifest) -> tuple[ModelConfig, tuple[Fragment, ...]]:
    """Configuration and fragment table of a run's model.

    Raises Incompatible if this software cuts the model into other fragments than the founder's, ConfigError.
    """
    config = ModelConfig.from_dict(dict[str, Any](manifest.model))
    fragments = fragment_table(config, manifest.window)
    same = layout_digest(config, manifest.window) == manifest.layout_digest
    if not same or fragment_specs(fragments) != manifest.fragments or config.tiers != manifest.tiers:
        raise Incompatible(
            "this version of braniac-node cuts the run's model into other fragments than its founder's: install theirs"
        )
    return config, fragments


def initial_anchor(config: ModelConfig, fragment: Fragment, seed: int) -> Int32Array:
    """A fragment's anchor before the first slot, [size] int32; the same on every machine."""
    return initial_fragment(config, fragment, seed)


def anchor_bytes(anchor: Int32Array) -> bytes:
    """An anchor as it is stored, hashed and sent: int32, little-endian."""
    return anchor.astype("<i4", copy=False).tobytes()


def anchor_from_bytes(data: bytes, size: int) -> Int32Array:
    """Inverse of `anchor_bytes`; the caller has checked hash and length."""
    assert len(data) == 4 * size
    return np.frombuffer(data, "<i4")


def to_fixed_point(weights: torch.Tensor) -> Int64Array:
    """Float32 weights [size] as int64 in units of 2**-20, rounded to nearest even."""
    scaled = weights.numpy() * np.float32(_ONE)
    return np.rint(scaled, out=scaled).astype(np.int64)


def to_weights(anchor: Int32Array) -> torch.Tensor:
    """An anchor [size] as float32 weights; exact below 16."""
    return torch.from_numpy((anchor.astype(np.float64) / _ONE).astype(np.float32))


def part_bytes(weights: torch.Tensor) -> bytes:
    """A fragment's weights, float32 [size], as a generation keeps them: bfloat16 where that says all, else float32."""
    narrow = weights.bfloat16()
    stored = narrow.view(torch.int16) if torch.equal(narrow.float(), weights) else weights
    return stored.numpy().astype(stored.numpy().dtype.newbyteorder("<"), copy=False).tobytes()


def part_from_bytes(data: bytes, size: int) -> torch.Tensor:
    """Inverse of `part_bytes`: float32 [size]; the caller has checked the hash."""
    assert len(data) in (2 * size, 4 * size)
    if len(data) == 4 * size:
        return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(torch.bfloat16).float()


def weight_change(settlement: Settlement, size: int) -> torch.Tensor:
    """What a settlement adds to the weights, float32 [size]."""
    change = np.zeros(size, np.float32)
    change[settlement.positions] = settlement.weights / _ONE
    return torch.from_numpy(change)
