"""The run that is simulated: the recipe of `nano-1b`, with payloads as large as the codec makes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from braniac.node.founding import RECIPES, TURNS
from braniac.protocol import codec, limits
from braniac.protocol.codec import CodecRules
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import FragmentSpec, Manifest, MergeRules
from braniac.protocol.tiles import TileLayout

PARAMETERS = 1_011_000_000
_MEASURED_TILES = 64
_SPREAD = 1 << 16


@dataclass(frozen=True)
class Sizes:
    """Bytes of what moves, per fragment."""

    contribution: int
    update: int
    anchor: int


def identity(number: int) -> Identity:
    return Identity.from_seed(hashlib.sha256(b"phone %d" % number).digest())


def make_run() -> tuple[Manifest, Sizes]:
    """One billion parameters in equal fragments of whole tiles, all of which everybody holds."""
    recipe = RECIPES["nano-1b"]
    tiles = round(PARAMETERS / recipe.fragments / limits.TILE_SIZE_MAX)
    up, down = CodecRules(recipe.up_per_tile, 1, TURNS), CodecRules(recipe.down_per_tile, 2)
    manifest = Manifest(
        name="scale",
        founder=identity(0).peer_id,
        epoch_ms=0,
        slot_ms=round(1000 * recipe.slot_s),
        seed=0,
        tiers=1,
        model={},
        data={},
        layout_digest=bytes(32),
        fragments=(FragmentSpec(0, TileLayout(((limits.TILE_SIZE_MAX, tiles),))),) * recipe.fragments,
        up=up,
        down=down,
        merge=MergeRules(),
    )
    size = tiles * limits.TILE_SIZE_MAX
    return manifest, Sizes(_payload_bytes(up, tiles), _payload_bytes(down, tiles), 4 * size)


def _payload_bytes(rules: CodecRules, tiles: int) -> int:
    """Of `tiles` tiles of normal values: measured on fewer, of which all are alike."""
    layout = TileLayout(((limits.TILE_SIZE_MAX, _MEASURED_TILES),))
    values = np.random.default_rng(0).normal(0, _SPREAD, layout.size).astype(np.int64)
    payload, _ = codec.encode_topk(layout, rules, values)
    return round(len(payload) * tiles / _MEASURED_TILES)
