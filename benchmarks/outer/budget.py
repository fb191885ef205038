"""How many values Braniac may send for so many bytes."""

from __future__ import annotations

import bisect
from dataclasses import replace

import numpy as np

from braniac.model.fragments import fragment_table
from braniac.node import bridge
from braniac.protocol import codec, limits
from braniac.protocol.codec import CodecRules
from braniac.protocol.tiles import TileLayout
from outer.swarm import TILE, Plan

MARGIN = 0.97
"""Of a budget is planned with: what peers really send is not independent noise, and takes a little more or less."""


def within(plan: Plan, bytes_per_peer: float) -> Plan | None:
    """The plan changed so that it takes up an uplink of a whole run; None if not even one value per tile fits.

    What is left over goes first into windows, which get shorter, as methods with large uplinks send after every step;
    then into values. A merged update keeps its multiple of the values of a contribution.
    """
    budget = MARGIN * bytes_per_peer
    splits = [split for split in range(1, plan.steps + 1) if plan.steps % split == 0]
    shorter = [replace(plan, windows=plan.windows * split, steps=plan.steps // split) for split in splits]
    base = [plan, *(each for each in shorter if expected_bytes(each) <= budget)][-1]
    plans = [plan_with(base, per_tile) for per_tile in range(1, TILE + 1)]
    fitting = bisect.bisect_right(plans, budget, key=expected_bytes)
    return plans[fitting - 1] if fitting else None


def plan_with(plan: Plan, per_tile: int) -> Plan:
    """With so many values per tile in a contribution, and in proportion in an update."""
    down = min(TILE, per_tile * plan.down.per_tile // plan.up.per_tile)
    return replace(
        plan,
        up=replace(plan.up, per_tile=per_tile),
        down=CodecRules(max(1, down), plan.down.magnitude_bits),
    )


def expected_bytes(plan: Plan) -> float:
    """Uplink of Braniac per peer in a whole run, for values that are independent noise.

    Each seat of a slot pulls the contributions of all others; updates go to those that have no seat.
    """
    layouts = [spec.layout for spec in bridge.fragment_specs(fragment_table(plan.config, plan.fragments))]
    up, down = (sum(_noise_bytes(layout, rules) for layout in layouts) for rules in (plan.up, plan.down))
    peers = len(plan.tiers)
    seats = min(limits.COMMITTEE_SIZE, peers)
    return plan.windows * (seats * (peers - 1) * up + (peers - seats) * down) / peers


def _noise_bytes(layout: TileLayout, rules: CodecRules) -> int:
    noise = np.random.default_rng(0).normal(0, 1 << 16, layout.size).astype(np.int32)
    return len(codec.encode_topk(layout, rules, noise)[0])
