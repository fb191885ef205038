"""How many values Braniac may send for so many bytes."""

from __future__ import annotations

import bisect
import functools
from dataclasses import replace

import numpy as np

from braniac.model.fragments import fragment_table
from braniac.node import bridge
from braniac.protocol import codec, limits
from braniac.protocol.codec import CodecRules
from braniac.protocol.tiles import TileLayout
from outer.swarm import TILE, Plan

OVERLAP = 0.97
"""Of what independent noise would take: peers choose the same places a little more often. Runs took 0.947 to 0.958."""

LEAST_VALUES = (64, 256)
"""Per tile in a contribution: many small windows, or fewer with more. Which learns better depends on the length."""


def within(plan: Plan, traffic: float) -> list[Plan]:
    """The plan changed so that it fills the links of a peer, both ways, as far as so much in a whole run does.

    One plan for each of LEAST_VALUES: windows of as few steps as leave room for so many values, and as many values as
    fit then; if not even one window has that room, one window. A merged update keeps its multiple of the values of a
    contribution. None if a single value per tile is too much.
    """
    cuts = [_cut(plan, steps) for steps in range(1, plan.total_steps + 1) if plan.total_steps % steps == 0]
    found: dict[int, Plan] = {}
    for least in LEAST_VALUES:
        base = next((cut for cut in cuts if expected_traffic(plan_with(cut, least)) <= traffic), cuts[-1])
        plans = [plan_with(base, per_tile) for per_tile in range(1, TILE + 1)]
        if fitting := bisect.bisect_right(plans, traffic, key=expected_traffic):
            found[base.windows] = plans[fitting - 1]
    return list(found.values())


def _cut(plan: Plan, steps: int) -> Plan:
    """As many steps in all, so many in a window."""
    return replace(plan, windows=plan.total_steps // steps, steps=steps)


def plan_with(plan: Plan, per_tile: int) -> Plan:
    """With so many values per tile in a contribution, and in proportion in an update."""
    down = min(TILE, per_tile * plan.down.per_tile // plan.up.per_tile)
    return replace(
        plan,
        up=replace(plan.up, per_tile=per_tile),
        down=CodecRules(max(1, down), plan.down.magnitude_bits),
    )


def expected_traffic(plan: Plan) -> float:
    """What a peer of Braniac sends and receives in a whole run, in bytes, for values that are nearly independent noise.

    An update has no more values than places were chosen. Each seat of a slot pulls the contributions of all others;
    updates go to those that have no seat. Each byte that is sent is received by another peer.
    """
    layouts = [spec.layout for spec in bridge.fragment_specs(fragment_table(plan.config, plan.fragments))]
    peers = len(plan.tiers)
    chosen = TILE * (1 - (1 - plan.up.per_tile / TILE) ** peers)
    update = CodecRules(min(plan.down.per_tile, round(chosen)), plan.down.magnitude_bits)
    up, down = (sum(_noise_bytes(layout, rules) for layout in layouts) for rules in (plan.up, update))
    seats = min(limits.COMMITTEE_SIZE, peers)
    return OVERLAP * 2 * plan.windows * (seats * (peers - 1) * up + (peers - seats) * down) / peers


@functools.cache
def _noise_bytes(layout: TileLayout, rules: CodecRules) -> int:
    noise = np.random.default_rng(0).normal(0, 1 << 16, layout.size).astype(np.int32)
    return len(codec.encode_topk(layout, rules, noise)[0])
