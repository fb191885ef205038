"""Merging: the same contributions give the same bytes, and nobody shouts louder than the median."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from braniac.protocol import codec, limits, screen
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.codec import CodecRules
from braniac.protocol.errors import Refusal
from braniac.protocol.manifest import MergeRules
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.tiles import EMPTY, Sparse, TileLayout
from tests.unit.swarm_harness import identity, make_manifest

GOLDEN = Path(__file__).parent.parent / "golden" / "merge.json"
PEERS = sorted(identity(n).peer_id for n in range(8))
RULES = {
    "everybody": MergeRules(coverage_halves=0),
    "between": MergeRules(coverage_halves=1),
    "senders": MergeRules(coverage_halves=2, step_q16=3 << 15),
}


def noise(size: int, name: str) -> Int64Array:
    """[size] integers of 15 bits and a sign that no version of numpy can change."""
    data = hashlib.shake_256(name.encode()).digest(2 * size)
    return np.frombuffer(data, "<i2").astype(np.int64)


def contributions(manifest: Any, count: int, seed: int) -> list[Contribution]:
    size = manifest.fragments[0].layout.size
    shared = noise(size, f"{seed} shared") // 2
    found = []
    for n in range(count):
        own = noise(size, f"{seed} {n}")
        payload, _ = codec.encode_topk(manifest.fragments[0].layout, manifest.up, shared + own)
        found.append(Contribution(PEERS[n], 1000 + 300 * n, payload))
    return found


def of(manifest: Any, peer: int, values: Int64Array | list[int], tokens: int = 1000) -> Contribution:
    payload, _ = codec.encode_topk(manifest.fragments[0].layout, manifest.up, np.asarray(values, np.int64))
    return Contribution(PEERS[peer], tokens, payload)


def merged(manifest: Any, given: list[Contribution]) -> Merged:
    result = merge(manifest, 0, given)
    assert result is not None
    return result


def dense(manifest: Any, result: Merged) -> list[int]:
    layout = manifest.fragments[0].layout
    return [int(v) for v in codec.decode(layout, manifest.down, result.update).dense(layout.size)]


def exact(size: int, **rules: int) -> Any:
    """A run whose codec keeps every value of one-value tiles, so that merged numbers can be read off."""
    every = CodecRules(4096, 4)
    return make_manifest(rings=(0,), layout=TileLayout(((1, size),)), up=every, down=every, merge=MergeRules(**rules))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_the_order_of_arrival_does_not_matter(rules: MergeRules) -> None:
    manifest = make_manifest(merge=rules)
    given = contributions(manifest, 4, seed=1)
    outcomes = {merged(manifest, list(order)).update for order in itertools.permutations(given)}
    assert len(outcomes) == 1


def test_concurrent_merges_agree() -> None:
    manifest = make_manifest(layout=TileLayout(((1024, 16),)))
    given = contributions(manifest, 6, seed=2)
    with ThreadPoolExecutor(2) as pool:
        updates = set(pool.map(lambda order: merged(manifest, order).update, [given, given[::-1]] * 4))
    assert len(updates) == 1


def test_the_number_of_threads_of_numpy_does_not_matter() -> None:
    script = textwrap.dedent("""
        from tests.unit.test_protocol_merge import contributions, make_manifest, merged, TileLayout
        manifest = make_manifest(layout=TileLayout(((1024, 16),)))
        print(merged(manifest, contributions(manifest, 6, seed=2)).digest.hex())
    """)
    found = set()
    for threads in ("1", "2"):
        environment = dict(os.environ, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
        root = Path(__file__).parent.parent.parent
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True, check=True
        )
        found.add(done.stdout.strip())
    manifest = make_manifest(layout=TileLayout(((1024, 16),)))
    assert found == {merged(manifest, contributions(manifest, 6, seed=2)).digest.hex()}


def golden_outcomes() -> dict[str, str]:
    """Digests of merges of fixed inputs, which pin every rounding rule."""
    outcomes = {}
    for name, rules in RULES.items():
        for count, layout in ((1, ((64, 2), (16, 1))), (3, ((64, 2), (16, 1))), (8, ((4096, 2), (1, 5), (100, 3)))):
            manifest = make_manifest(merge=rules, layout=TileLayout(layout))
            given = contributions(manifest, count, seed=count)
            payloads = hashlib.sha256(b"".join(c.payload for c in given)).hexdigest()[:16]
            outcomes[f"{name}, {count} of seed {count}"] = f"{payloads} -> {merged(manifest, given).digest.hex()}"
    return outcomes


def test_golden() -> None:
    """If this fails, peers of this version and of the last one would disagree: raise PROTOCOL_VERSION."""
    assert golden_outcomes() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("rules", [MergeRules(coverage_halves=h) for h in (0, 1, 2)], ids=["all", "half", "sent"])
@pytest.mark.parametrize("tokens", [1, 777, limits.WEIGHT_MAX])
def test_a_single_contribution_returns_unchanged(rules: MergeRules, tokens: int) -> None:
    manifest = make_manifest(merge=rules)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        vector = (rng.standard_normal(manifest.fragments[0].layout.size) * 10.0 ** (seed % 7)).astype(np.int64)
        payload, sent = codec.encode_topk(manifest.fragments[0].layout, manifest.up, vector)
        result = merged(manifest, [Contribution(PEERS[0], tokens, payload)])
        assert dense(manifest, result) == sent.dense(len(vector)).tolist()
        assert result.admitted == ((PEERS[0], limits.CLIP_ONE),)


def test_normalisers() -> None:
    """Coordinate 0 is sent by both, 1 and 2 by one each; all weigh the same, and no norm is above the median."""
    given = ([400, 300, 0], [400, 0, 300])
    for halves, alone in ((0, 150), (2, 300), (1, 212)):  # 300/2, 300/1, 300 * 256 / floor(sqrt(512 * 256))
        manifest = exact(3, coverage_halves=halves)
        result = merged(manifest, [of(manifest, 0, given[0]), of(manifest, 1, given[1])])
        assert dense(manifest, result) == [400, alone, alone]


def test_division_rounds_half_away_from_zero() -> None:
    """Two contributions of the same norm, so that none is clipped: the sums are -1, 7, 1 and -7."""
    manifest = exact(4, coverage_halves=0)
    given = [of(manifest, 0, [3, 4, -3, -4]), of(manifest, 1, [-4, 3, 4, -3])]
    assert dense(manifest, merged(manifest, given)) == [-1, 4, 1, -4]


def test_the_outer_step_scales_the_update() -> None:
    manifest = exact(2, step_q16=2 << 16)
    assert dense(manifest, merged(manifest, [of(manifest, 0, [10, -20])])) == [20, -40]


def test_norms_above_the_median_are_clipped_to_it() -> None:
    manifest = exact(2, coverage_halves=0)
    given = [of(manifest, 0, [300, 400]), of(manifest, 1, [300, 400]), of(manifest, 2, [3000, 4000])]
    result = merged(manifest, given)
    factors = dict(result.admitted)
    assert factors[PEERS[0]] == factors[PEERS[1]] == limits.CLIP_ONE
    assert factors[PEERS[2]] == limits.CLIP_ONE // 10
    assert dense(manifest, result) == [300, 400]


@pytest.mark.parametrize("cap", [1, 4])
@pytest.mark.parametrize("attackers", [1, 2, 3])
def test_loud_liars_are_bounded(attackers: int, cap: int) -> None:
    """Below half of the peers, the largest values and the largest claims move the mean by no more than their cap.

    Those who say the same share one voice; honest peers do too here, but they are more than half.
    """
    size, honest = 4, 7 - attackers
    manifest = exact(size, coverage_halves=0, weight_cap=cap, margin_percent=0)
    truth = [1000, -1000, 1000, -1000]
    given = [of(manifest, n, truth) for n in range(honest)]
    loud = [-v * 4096 for v in truth]
    given += [of(manifest, honest + n, loud, tokens=limits.WEIGHT_MAX) for n in range(attackers)]
    update = dense(manifest, merged(manifest, given))
    worst = 1000 * (honest - cap) / (honest + cap)
    assert update == pytest.approx([worst, -worst, worst, -worst], abs=8)
    assert max(map(abs, update)) <= 1001


def test_weights_are_capped_at_medians_and_shared_by_who_says_the_same() -> None:
    assert screen.scaled_weights([100, 100, 100], [1, 1, 1], 4) == [256] * 3
    assert screen.scaled_weights([50, 100, 1 << 20], [1, 1, 1], 4) == [128, 256, 1024]
    assert screen.scaled_weights([50, 100, 1 << 20], [1, 2, 2], 1) == [128, 128, 128]
    assert screen.scaled_weights([1, 1 << 20, 1 << 20], [2, 1, 2], 4) == [1, 256, 128]
    assert screen.scaled_weights([], [], 4) == []


def test_the_median_of_an_even_count_is_between() -> None:
    assert screen.median([5, 1, 9]) == 5
    assert screen.median([5, 1, 9, 6]) == 5
    assert screen.clip_factors([]) == []
    assert screen.clip_factors([0, 0, 10]) == [limits.CLIP_ONE, limits.CLIP_ONE, 0]
    assert screen.clip_factors([10, 20]) == [limits.CLIP_ONE, 15 * limits.CLIP_ONE // 20]
    assert screen.clip_factors([10, 2000]) == [limits.CLIP_ONE, 20 * limits.CLIP_ONE // 2000]
    assert screen.clip_factors([10, 20, 2000, 2000]) == [limits.CLIP_ONE] * 2 + [40 * limits.CLIP_ONE // 2000] * 2


def test_norms_are_exact_beyond_int64() -> None:
    count = 1 << 17
    values = np.full(count, limits.LEVEL_MAX, np.int32)
    assert screen.integer_norm(Sparse(np.arange(count), values)) ** 2 <= count * limits.LEVEL_MAX**2
    assert screen.integer_norm(Sparse(np.arange(4), values[:4])) == 2 * limits.LEVEL_MAX
    assert screen.integer_norm(EMPTY) == 0


def test_the_largest_legal_sums_do_not_overflow() -> None:
    count = limits.CONTRIBUTIONS_PER_SLOT_MAX
    manifest = exact(1, coverage_halves=2, step_q16=1 << 18, weight_cap=8)
    largest = 2047 << 13
    peers = [identity(n).peer_id for n in range(count)]
    payload = of(manifest, 0, [largest]).payload
    given = [Contribution(p, limits.WEIGHT_MAX if n % 2 else 1, payload) for n, p in enumerate(peers)]
    assert dense(manifest, merged(manifest, given)) == [largest]


def test_bad_payloads_are_refused_and_the_rest_is_merged() -> None:
    manifest = make_manifest()
    given = contributions(manifest, 4, seed=5)
    broken = [
        Contribution(given[1].peer, given[1].tokens, given[1].payload[:-1]),
        Contribution(given[3].peer, given[3].tokens, b""),
    ]
    result = merged(manifest, [broken[1], given[0], broken[0], given[2]])
    assert result.refused == ((PEERS[1], Refusal.WRONG_SHAPE), (PEERS[3], Refusal.WRONG_SHAPE))
    assert [peer for peer, _ in result.admitted] == [PEERS[0], PEERS[2]]
    assert result.update == merged(manifest, [given[0], given[2]]).update
    assert merge(manifest, 0, broken) is None
    assert merge(manifest, 0, []) is None


def test_empty_contributions_merge_to_an_empty_update() -> None:
    manifest = make_manifest()
    size = manifest.fragments[0].layout.size
    result = merged(manifest, [of(manifest, 0, [0] * size), of(manifest, 1, [0] * size)])
    assert dense(manifest, result) == [0] * size
    assert len(result.update) <= manifest.update_bytes_max(0)


def test_an_update_fits_its_bound_and_its_tiles() -> None:
    manifest = make_manifest(down=CodecRules(64, 2))
    result = merged(manifest, contributions(manifest, 8, seed=8))
    layout = manifest.fragments[0].layout
    update = codec.decode(layout, manifest.down, result.update)
    assert len(result.update) <= manifest.update_bytes_max(0)
    assert len(update) == int(layout.capacity(64).sum())
