"""The ledger rule (I1): what a certificate does to an anchor and to a peer's own weights.

    anchor_f += U          x_f += U - sent, at the coordinates U holds, if my payload is in the certificate

so x - anchor, my work that the swarm does not have yet, changes by exactly what the certificate took from me. Undoing
a certificate is the same with the signs turned. This is the one place where the rule is written; the daemon applies
its result to tensors, the tests and the simulator to integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braniac.protocol import limits
from braniac.protocol.bitpack import Int32Array, Int64Array
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.tiles import Sparse


@dataclass(frozen=True)
class Settlement:
    """Changes at `positions` [n] of a fragment, in fixed point."""

    positions: Int64Array
    anchor: Int64Array
    """Added to the agreed anchor."""
    weights: Int64Array
    """Added to the peer's own weights."""


def settle(update: Sparse, sent: Sparse | None, *, undo: bool = False) -> Settlement:
    """What applying (or undoing) `update` changes for a peer whose contribution `sent` is in it, or is not (None)."""
    anchor = update.values.astype(np.int64)
    weights = anchor.copy()
    if sent is not None and len(sent):
        at = np.searchsorted(sent.positions, update.positions)
        at = np.minimum(at, len(sent) - 1)
        taken = sent.positions[at] == update.positions
        weights[taken] -= sent.values[at[taken]]
    sign = -1 if undo else 1
    return Settlement(update.positions, sign * anchor, sign * weights)


def move_anchor(anchor: Int32Array, settlement: Settlement) -> Int32Array:
    """A new anchor [size] int32. Raises WireError if a value would leave the range in which sums stay exact (I4)."""
    moved = anchor.astype(np.int64)
    moved[settlement.positions] += settlement.anchor
    if len(moved) and int(np.abs(moved).max()) > limits.ANCHOR_MAX:
        raise WireError(Refusal.MALFORMED, "an update would push an anchor out of its range")
    return moved.astype(np.int32)


def residual(weights: Int64Array, anchor: Int32Array) -> Int64Array:
    """x - anchor in fixed point: what a peer offers when the fragment is due."""
    return weights - anchor
