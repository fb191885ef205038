"""Size and speed of the payload codec, on one core, against a plain copy of memory.

Encodes and decodes a fragment of full tiles whose values are drawn like a residual: Student's t with 4 degrees of
freedom, of another scale in every tile. Copy, encoding and decoding take turns, and medians over the rounds are
printed. Throughput is counted in bytes of dense float32, four for each parameter, whatever was read or written for it,
per second of the core's time: other programs on the machine count only as far as they empty its caches.

  encode        select_topk and encode: int32 fixed point -> payload
  decode        payload -> positions and values, all checked
  scatter       those -> a dense int64 vector, as in Sparse.dense
  node          what the node does for one offer: float32 weights - anchor -> payload
  memcpy        np.copyto of the float32 vector

    OMP_NUM_THREADS=1 python benchmarks/codec.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from braniac.node import bridge
from braniac.protocol import codec, ledger, limits
from braniac.protocol.bitpack import Int32Array
from braniac.protocol.codec import CodecRules
from braniac.protocol.tiles import TileLayout

GB = 1e9


def residual_like(tiles: int, seed: int) -> Int32Array:
    """[tiles * 4096] int32 fixed point: heavy tails, scales over two powers of ten, many equal small integers."""
    dice = np.random.default_rng(seed)
    scales = 10.0 ** dice.uniform(1.5, 3.5, (tiles, 1))
    values = dice.standard_t(4, (tiles, limits.TILE_SIZE_MAX)) * scales
    return np.clip(np.rint(values), -limits.LEVEL_MAX, limits.LEVEL_MAX).astype(np.int32).reshape(-1)


def seconds_of(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time of every way in every round, the ways taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.thread_time()
            way()
            seconds[name].append(time.thread_time() - began)
    return seconds


def measure(tiles: int, rules: CodecRules, rounds: int, seed: int) -> dict[str, object]:
    layout = TileLayout(((limits.TILE_SIZE_MAX, tiles),))
    vector = residual_like(tiles, seed)
    anchor = residual_like(tiles, seed + 1)
    weights = bridge.to_weights(anchor) + bridge.to_weights(vector)
    dense, copy = weights.numpy(), np.zeros(layout.size, np.float32)
    payload, sent = codec.encode_topk(layout, rules, vector)
    decoded = codec.decode(layout, rules, payload)
    assert np.array_equal(decoded.positions, sent.positions)
    assert np.array_equal(decoded.values, sent.values)

    def offer() -> object:
        return codec.encode_topk(layout, rules, ledger.residual(bridge.to_fixed_point(weights), anchor))

    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(copy, dense),
        "encode": lambda: codec.encode_topk(layout, rules, vector),
        "decode": lambda: codec.decode(layout, rules, payload),
        "scatter": lambda: decoded.dense(layout.size),
        "node": offer,
    }
    seconds_of(ways, 1)  # a first round touches every page
    seconds = {name: statistics.median(times) for name, times in seconds_of(ways, rounds).items()}
    speed = {f"{name}_gb_per_s": 4 * layout.size / GB / s for name, s in seconds.items()}
    table_bits = 8 * codec.tables_max(layout, rules) * 2 << rules.magnitude_bits
    return {
        "parameters": layout.size,
        "per_tile": rules.per_tile,
        "magnitude_bits": rules.magnitude_bits,
        "values": len(sent),
        "bits_per_value": 8 * len(payload) / len(sent),
        "bits_per_value_without_levels": (8 * len(payload) - table_bits) / len(sent),
        "bits_per_parameter": 8 * len(payload) / layout.size,
        **speed,
        "encode_of_memcpy": seconds["memcpy"] / seconds["encode"],
        "decode_of_memcpy": seconds["memcpy"] / seconds["decode"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=4096, help="of 4096 values each")
    parser.add_argument("--per-tile", type=int, default=64)
    parser.add_argument("--magnitude-bits", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.tiles, CodecRules(options.per_tile, options.magnitude_bits), options.rounds, options.seed)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:32}{value:12.4g}" if isinstance(value, float) else f"{name:32}{value:>12}")


if __name__ == "__main__":
    main()
