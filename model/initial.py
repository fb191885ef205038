"""The first weights of a run, computed by every peer for itself, to the bit.

Nobody downloads the anchors of slot 0, so they must be identical on every machine, in every tier and for every
library version. Hence integers all the way: NumPy's Philox stream (its raw output is frozen by NumPy's compatibility
policy) keyed by run seed and tensor name, one counter per 64x64 block so that any tile can be drawn alone, and uniform
values in units of 2**-20, the fixed point of the anchors. No logarithm, cosine or floating-point rounding enters.

What is drawn (variances; the shapes of the distributions hardly matter to RMS-normalised networks):
  embeddings               1        followed by an RMSNorm, so only its ratio to the learning rate counts
  embeddings, if tied      1/D      they are the head too, and its first logits should be of order one
  q, k, v, gate, up        1/(4D)   half of the usual 1/sqrt(D) deviation, as modded-nanogpt does
  o, down, head            0        blocks start as the identity, the first prediction is uniform; unless zero_outputs
                                    is off: then 1/(4 times their number of inputs), as the matrices above
  value embeddings         0        they start to speak when the text asks for it
  gains                    0        all are one
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from braniac.model.config import ModelConfig
from braniac.model.tiers import EMBEDDING, HEAD, is_gain

FRACTION_BITS = 20
BLOCK_SIDE = 64


def initial_tensor(
    config: ModelConfig, name: str, shape: tuple[int, ...], seed: int, row0: int = 0
) -> npt.NDArray[np.float32]:
    """Initial values of one parameter, or of its rows from `row0` on, float32 `shape`.

    Fewer rows give a prefix of the same values (a tier).
    """
    rows, cols = shape if len(shape) == 2 else (1, shape[0])
    units = initial_units(config, name, row0, rows, 0, cols, seed)
    return (units / 2.0**FRACTION_BITS).astype(np.float32).reshape(shape)


def initial_units(
    config: ModelConfig, name: str, row0: int, rows: int, col0: int, cols: int, seed: int
) -> npt.NDArray[np.int32]:
    """Initial values of one rectangle of a parameter, int32 [rows, cols] in units of 2**-20; a gain is one row."""
    if is_gain(name):
        return np.full((rows, cols), 1 << FRACTION_BITS, np.int32)
    bound = _bound(config, name)
    units = np.zeros((rows, cols), np.int32)
    if bound == 0:
        return units
    key = int.from_bytes(hashlib.blake2b(f"initial\0{seed}\0{name}".encode(), digest_size=16).digest(), "little")
    for i in range(row0 // BLOCK_SIDE, -(-(row0 + rows) // BLOCK_SIDE)):
        for j in range(col0 // BLOCK_SIDE, -(-(col0 + cols) // BLOCK_SIDE)):
            block = _block(key, i, j, bound)
            top, left = i * BLOCK_SIDE - row0, j * BLOCK_SIDE - col0  # of the block, within the rectangle
            cropped = block[max(0, -top) : rows - top, max(0, -left) : cols - left]
            r, c = max(0, top), max(0, left)
            units[r : r + cropped.shape[0], c : c + cropped.shape[1]] = cropped
    return units


def _bound(config: ModelConfig, name: str) -> int:
    """Largest magnitude, in units: uniform on [-b, b] has variance b*b/3. Integer square root: exact everywhere."""
    if name == EMBEDDING:
        tied = config.tie_word_embeddings
        return math.isqrt((3 << (2 * FRACTION_BITS)) // (config.hidden_size if tied else 1))
    inputs = _inputs(config, name)
    return math.isqrt((3 << (2 * FRACTION_BITS)) // (4 * inputs)) if inputs else 0


def _inputs(config: ModelConfig, name: str) -> int:
    """How many inputs of a random matrix are summed up, in the whole model; 0 for one that starts at zero."""
    if any(kind in name for kind in (".q_proj.", ".k_proj.", ".v_proj.", ".gate_proj.", ".up_proj.")):
        return config.hidden_size
    if config.zero_outputs:
        return 0
    if ".o_proj." in name:
        return config.num_attention_heads * config.head_dim
    if ".down_proj." in name:
        return config.intermediate_size
    return config.hidden_size if name == HEAD else 0


def _block(key: int, i: int, j: int, bound: int) -> npt.NDArray[np.int32]:
    """Block (i, j) of a tensor: int32 [64, 64], uniform on [-bound, bound]."""
    # The stream advances the lowest counter word only, so blocks with other upper words never overlap.
    raw = np.random.Philox(key=key, counter=(i << 64) | (j << 128)).random_raw(BLOCK_SIDE * BLOCK_SIDE // 2)
    halves = np.stack((raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)), axis=1)  # explicit: no byte order enters
    scaled = (halves * np.uint64(2 * bound + 1)) >> np.uint64(32)
    return (scaled.astype(np.int32) - np.int32(bound)).reshape(BLOCK_SIDE, BLOCK_SIDE)
