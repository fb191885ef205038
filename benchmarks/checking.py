"""What it costs that seats merge again what an owner proposes: payload bytes that a peer receives per slot, by size.

Contributions of n peers to a fragment of full tiles are encoded and merged; the rest is counting. Without checks the
owner pulls the contributions of the others, and everybody else the update. With checks two seats pull the contributions
too, and nobody who has merged pulls the update. Values are normal and independent, so that updates are as large as can
be.

    OMP_NUM_THREADS=1 python benchmarks/checking.py --json
"""

from __future__ import annotations

import argparse
import hashlib
import json

import numpy as np

from braniac.protocol import codec, limits
from braniac.protocol.codec import CodecRules
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import FragmentSpec, Manifest, MergeRules
from braniac.protocol.merge import Contribution, merge
from braniac.protocol.tiles import TileLayout

_SPREAD = 1 << 16


def identity(number: int) -> Identity:
    return Identity.from_seed(hashlib.sha256(b"benchmark peer %d" % number).digest())


def manifest_of(tiles: int, up: CodecRules, down: CodecRules) -> Manifest:
    return Manifest(
        name="benchmark",
        founder=identity(0).peer_id,
        epoch_ms=0,
        slot_ms=1000,
        seed=0,
        tiers=1,
        model={},
        data={},
        layout_digest=bytes(32),
        fragments=(FragmentSpec(0, TileLayout(((limits.TILE_SIZE_MAX, tiles),))),),
        up=up,
        down=down,
        merge=MergeRules(),
    )


def measure(manifest: Manifest, peers: int, seed: int) -> dict[str, float]:
    """Sizes, and what one of `peers` receives per slot on average, with and without checks."""
    layout = manifest.fragments[0].layout
    given = []
    for number in range(peers):
        work = np.random.default_rng([seed, number]).normal(0, _SPREAD, layout.size).astype(np.int64)
        given.append(Contribution(identity(number).peer_id, 1000, codec.encode_topk(layout, manifest.up, work)[0]))
    merged = merge(manifest, 0, given)
    assert merged is not None
    payload, update = len(given[0].payload), len(merged.update)
    seats = min(limits.COMMITTEE_SIZE, peers) - 1
    without = (peers - 1) * (payload + update) / peers
    checked = without + seats * ((peers - 1) * payload - update) / peers
    return {
        "peers": peers,
        "payload_bytes": payload,
        "update_bytes": update,
        "received_unchecked_bytes": without,
        "received_bytes": checked,
        "more_percent": 100 * (checked / without - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=16, help="of 4096 values each")
    parser.add_argument("--up", type=int, default=256, help="values per tile of a contribution")
    parser.add_argument("--down", type=int, default=1024, help="values per tile of an update")
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON list")
    options = parser.parse_args()
    manifest = manifest_of(options.tiles, CodecRules(options.up, 1), CodecRules(options.down, 2))
    found = [measure(manifest, peers, options.seed) for peers in options.peers]
    if options.json:
        print(json.dumps(found))
        return
    for row in found:
        print("  ".join(f"{name} {value:.0f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
