"""Merging contributions into one update: integer sums in sorted peer order, so the same set gives the same bytes.

    A_i = alpha * sum_r w_r v_r,i / N_i         v_r clipped to the median norm, w_r tokens capped, shared among copies
    N_i = W, sqrt(W * W_i) or W_i               W: weight of all contributors, W_i: of those that sent coordinate i
    U   = top-k2 per tile of A, quantised       what does not fit returns to its senders

Before that, contributions that contradict most of the others are left out (screen.py); their senders keep the work.

Everything is int64 and stays below 2**63 with the most contributors, weights and levels that are legal. There are two
declared roundings: division rounds half away from zero, the square root rounds down (IEEE 754 square roots of integers
below 2**52 are exactly rounded, so every machine agrees). A single contribution comes back unchanged at alpha = 1,
whatever the normaliser: a swarm of one trains exactly as if it were alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from braniac.protocol import codec, limits, screen
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest, MergeRules
from braniac.protocol.tiles import EMPTY, Sparse, TileLayout


@dataclass(frozen=True)
class Contribution:
    """A payload as it arrived, not yet decoded."""

    peer: PeerId
    tokens: int
    payload: bytes


@dataclass(frozen=True)
class Merged:
    """The outcome of a slot's merge."""

    update: bytes
    """The encoded update U."""
    admitted: tuple[tuple[PeerId, int], ...]
    """(peer, clip factor) of every contribution in it, in ascending order of peer id."""
    refused: tuple[tuple[PeerId, Refusal], ...]

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.update).digest()


def merge(manifest: Manifest, fragment: int, contributions: Sequence[Contribution]) -> Merged | None:
    """Decode, screen and merge. None when nothing was admitted. The order of `contributions` does not matter."""
    spec = manifest.fragments[fragment]
    decoded: list[tuple[Contribution, Sparse]] = []
    refused: list[tuple[PeerId, Refusal]] = []
    for contribution in sorted(contributions, key=lambda c: c.peer):
        try:
            decoded.append((contribution, codec.decode(spec.layout, manifest.up, contribution.payload)))
        except WireError as error:
            refused.append((contribution.peer, error.refusal))
    assert len({c.peer for c, _ in decoded}) == len(decoded), "one contribution per peer and slot"
    if not decoded:
        return None
    comparison = screen.compare(spec.layout.size, [sparse for _, sparse in decoded])
    opposed = comparison.opposed(manifest.merge.margin_percent)
    refused += [(decoded[n][0].peer, Refusal.OPPOSED) for n in opposed]
    kept = [n for n in range(len(decoded)) if n not in opposed]
    peers, vectors = [decoded[n][0] for n in kept], [decoded[n][1] for n in kept]
    clips = screen.clip_factors([screen.integer_norm(sparse) for sparse in vectors])
    voices = comparison.only(kept).voices()
    weights = screen.scaled_weights([c.tokens for c in peers], voices, manifest.merge.weight_cap)
    average = _average(manifest.merge, vectors, clips, weights)
    update, _ = codec.encode(spec.layout, manifest.down, _top(spec.layout, average, manifest.down.per_tile))
    admitted = tuple((c.peer, factor) for c, factor in zip(peers, clips, strict=True))
    return Merged(update, admitted, tuple(sorted(refused)))


def _average(rules: MergeRules, vectors: Sequence[Sparse], clips: Sequence[int], weights: Sequence[int]) -> Sparse:
    """A on the union of the coordinates that were sent."""
    positions = np.concatenate([v.positions for v in vectors])
    if not len(positions):
        return EMPTY
    weighted = np.concatenate([screen.clip(v, c) * w for v, c, w in zip(vectors, clips, weights, strict=True)])
    weight = np.repeat(np.asarray(weights, np.int64), [len(v) for v in vectors])
    union, member = np.unique(positions, return_inverse=True)
    order = np.argsort(member, kind="stable")
    first = np.searchsorted(member[order], np.arange(len(union)))
    total = np.add.reduceat(weighted[order], first)
    covered = np.add.reduceat(weight[order], first)
    divisor = _normaliser(rules, sum(weights), covered) << 16
    return _nonzero(union, _divide(total * rules.step_q16, divisor))


def _normaliser(rules: MergeRules, everyone: int, covered: Int64Array) -> Int64Array:
    """N_i; see the module docstring."""
    if rules.coverage_halves == 0:
        return np.full_like(covered, everyone)
    if rules.coverage_halves == 2:
        return covered
    return np.sqrt((covered * everyone).astype(np.float64)).astype(np.int64)


def _divide(numerator: Int64Array, divisor: Int64Array) -> Int64Array:
    """Integer division, rounded half away from zero."""
    quotient: Int64Array = np.sign(numerator) * ((2 * np.abs(numerator) + divisor) // (2 * divisor))
    return quotient


def _nonzero(positions: Int64Array, values: Int64Array) -> Sparse:
    values = np.clip(values, -limits.LEVEL_MAX, limits.LEVEL_MAX)
    some = values != 0
    return Sparse(positions[some], values[some].astype(np.int32))


def _top(layout: TileLayout, vector: Sparse, per_tile: int) -> Sparse:
    """The largest values of each tile; of equal magnitudes the earlier position wins."""
    if not len(vector):
        return vector
    tile = np.searchsorted(layout.tile_starts(), vector.positions, side="right") - 1
    order = np.lexsort((vector.positions, -np.abs(vector.values.astype(np.int64)), tile))
    ranked = tile[order]
    rank = np.arange(len(order)) - np.searchsorted(ranked, ranked)
    kept = np.sort(order[rank < layout.capacity(per_tile)[ranked]])
    return Sparse(vector.positions[kept], vector.values[kept])
